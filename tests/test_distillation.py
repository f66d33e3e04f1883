"""The second stage of pre-training: `--distill`, and what both stages share: `--unlabelled`, `--max_crop_scale`."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import random_images, write_hdf5
from safetensors.numpy import load_file
from test_trainer import command, killed_at
from transformers import AutoModel, ViTModel

import main
from galaxy_mae.data.cache import open_galaxies
from galaxy_mae.data.frame import Frame
from galaxy_mae.data.pretraining import open_pretraining_data
from galaxy_mae.data.split import split_galaxies
from galaxy_mae.errors import UserError
from galaxy_mae.evaluation.distillation import TARGETS, DistillationTrainer
from galaxy_mae.evaluation.features import merge_rings, ring_choices, ring_pool, ring_weights
from galaxy_mae.evaluation.probes import effective_rank
from galaxy_mae.model.backbone import Tokens
from galaxy_mae.provenance import read_pretraining, read_run
from galaxy_mae.training.pretraining import seen_galaxies


@pytest.fixture(scope="module")
def more_hdf5(tmp_path_factory):
    """60 other images, and the first 200 of `small_hdf5`'s seed, at places of their own."""
    images = np.concatenate([random_images(60, seed=5), random_images(200)])
    path = tmp_path_factory.mktemp("more") / "more.h5"
    return write_hdf5(path, images, ra=np.linspace(0, 300, 260), dec=np.full(260, 60.0), pxscale=np.full(260, 0.262))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """Of galaxies without positions."""
    folder = tmp_path_factory.mktemp("runs") / "teacher"
    main.main(command(folder, write_hdf5(folder.with_name("seen.h5"), random_images(200)), "--max_steps", "6"))
    return folder


def test_a_student_resumes_bit_for_bit_and_needs_its_teacher_no_more(tmp_path, small_hdf5, more_hdf5, teacher):
    flags = ["--max_steps", "6", "--save_steps", "2", "--unlabelled", str(more_hdf5), "--init_from", str(teacher)]
    gone = shutil.copytree(teacher, tmp_path / "gone")
    flags += ["--distill", str(gone), "--photometric_jitter", "0.25"]
    main.main(command(tmp_path / "whole", small_hdf5, *flags))
    with killed_at(3, DistillationTrainer):
        main.main(command(tmp_path / "parts", small_hdf5, *flags))
    shutil.rmtree(gone)
    main.main(command(tmp_path / "parts", small_hdf5, *flags))
    whole, parts = (load_file(tmp_path / name / "encoder" / "model.safetensors") for name in ("whole", "parts"))
    before = load_file(teacher / "encoder" / "model.safetensors")
    assert all(np.array_equal(whole[name], parts[name]) for name in whole)
    assert any(not np.array_equal(whole[name], before[name]) for name in whole)
    assert type(AutoModel.from_pretrained(tmp_path / "parts" / "encoder")) is ViTModel
    log = json.loads((tmp_path / "parts" / "trainer_state.json").read_text())["log_history"]
    losses = [entry["eval_loss"] for entry in log if "eval_loss" in entry]
    assert losses[-1] < losses[0]
    assert not (tmp_path / "parts" / TARGETS).exists()
    assert read_run(tmp_path / "parts")["distill"]["source"] == str(gone)
    splits = read_pretraining(str(tmp_path / "parts" / "encoder")).galaxies["split"].to_pylist()
    seen = len(read_pretraining(str(teacher / "encoder")).galaxies)
    assert splits.count("init_from") == seen
    assert "distill" not in splits  # the same galaxies


def test_targets_are_standard_and_those_of_held_out_galaxies_change_nothing(tmp_path, teacher):
    images = random_images(200, seed=3)
    galaxies = open_galaxies(str(write_hdf5(tmp_path / "one.h5", images)))
    held_out = np.concatenate([split_galaxies(galaxies)[name] for name in ("validation", "test")])
    images[held_out] = 255 - images[held_out]
    write_hdf5(tmp_path / "other.h5", images)
    targets = []
    for name in ("one", "other"):
        with killed_at(0, DistillationTrainer):
            main.main(command(tmp_path / name, tmp_path / f"{name}.h5", "--distill", str(teacher)))
        targets.append(np.load(tmp_path / name / TARGETS))
        seen = seen_galaxies(open_pretraining_data(str(tmp_path / f"{name}.h5"), 32), tmp_path / name)
        assert seen["split"].to_pylist().count("distill") == len(read_pretraining(str(teacher / "encoder")).galaxies)
        same = seen_galaxies(open_pretraining_data(str(teacher.with_name("seen.h5")), 32), tmp_path / name)
        assert set(same["split"].to_pylist()) == {"train", "validation"}  # the galaxies of the teacher, listed once
    train = np.setdiff1d(np.arange(200), held_out)
    assert np.allclose(targets[0][train], targets[1][train], atol=2e-2)
    assert not np.allclose(targets[0][held_out], targets[1][held_out], atol=1e-1)
    assert np.isclose((targets[0][train].astype(float) ** 2).mean(), 1, atol=0.05)
    covariance = np.cov(targets[0][train].astype(float), rowvar=False)
    assert np.abs(covariance - np.diag(np.diag(covariance))).max() < 0.05 * np.diag(covariance).max()


def test_unlabelled_galaxies_are_trained_on_but_those_that_are_held_out(small_hdf5, more_hdf5):
    data = open_pretraining_data(str(small_hdf5), 32, unlabelled=[str(more_hdf5)])
    rows, held_out = data.train_dataset().indices, np.concatenate([data.split["validation"], data.split["test"]])
    assert set(data.split["train"]) <= set(rows)
    unlabelled = rows[rows >= 200] - 200
    assert set(unlabelled) == set(range(260)) - {60 + row for row in held_out}
    assert np.array_equal(data.pixels[rows[-3:]], data.unlabelled[0].pixels[unlabelled[-3:]])
    assert len(data.catalogue()) == len(rows) + len(data.split["validation"])
    alone = open_pretraining_data(str(small_hdf5), 32)
    assert data.fingerprint != alone.fingerprint == data.galaxies.fingerprint
    one, all_ = (x.pixels[x.train_dataset().indices] / 255 for x in (alone, data))
    assert np.allclose(data.channel_statistics(), [all_.mean(axis=(0, 1, 2)), all_.std(axis=(0, 1, 2))], atol=1e-6)
    assert np.allclose(alone.channel_statistics(), [one.mean(axis=(0, 1, 2)), one.std(axis=(0, 1, 2))], atol=1e-6)


def test_the_margin_of_larger_crops_is_not_part_of_the_galaxies(small_hdf5):
    """Nor are features cached as those of images with the margin."""
    data = open_pretraining_data(str(small_hdf5), 16, frame=Frame("center", 0.5), max_crop_scale=1.5)
    assert data.galaxies.image_size == 16
    assert data.galaxies.frame == Frame("center", 0.5)
    assert data.wide.image_size == 20
    assert np.array_equal(data.galaxies.pixels, data.wide.pixels[:, 2:-2, 2:-2])
    assert data.galaxies.fingerprint != data.wide.fingerprint == data.fingerprint


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--max_crop_scale", "1.5"], "--fit crop has nothing around it"),
        (["--max_crop_scale", "1.5", "--fit", "center:0.9"], "center:FRACTION of at most 0.8"),
        (["--max_crop_scale", "0.1"], "it is below --min_crop_scale"),
        (["--photometric_jitter", "-1"], "--photometric_jitter -1.0: it must be at least 0"),
        (["--distill", "nowhere"], "--distill nowhere: no such folder"),
        (["--unlabelled", "nowhere"], "--unlabelled nowhere: no such file"),
    ],
)
def test_what_cannot_be_trained_is_told(tmp_path, small_hdf5, flags, told):
    with pytest.raises(UserError, match=told):
        main.main(command(tmp_path / "run", small_hdf5, *flags))


@pytest.mark.parametrize("grid", [(4, 4), (8, 8), (2, 2)])
def test_the_head_pools_as_the_features_do(grid):
    tokens = Tokens(torch.rand(3, *grid, 5), None)
    for number in ring_choices(grid):
        means = torch.einsum("bpc,pr->brc", tokens.patches.flatten(1, 2), torch.from_numpy(ring_weights(number, grid)))
        assert np.allclose(means.flatten(1), merge_rings(ring_pool(tokens), number, grid), atol=1e-6)
    mean = torch.from_numpy(ring_weights(1, grid)).flatten() @ tokens.patches.flatten(1, 2)
    assert torch.allclose(mean, tokens.patches.mean(dim=(1, 2)))


def test_effective_rank_counts_directions():
    random = np.random.default_rng(0)
    basis, _ = np.linalg.qr(random.normal(size=(200, 20)))
    assert np.isclose(effective_rank(basis[:, :7] @ np.linalg.qr(random.normal(size=(7, 7)))[0]), 7, atol=0.01)
    assert np.isclose(effective_rank(np.outer(random.normal(size=50), np.ones(9))), 1, atol=0.01)

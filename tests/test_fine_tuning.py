"""Fine-tuning: resumed equals uninterrupted, the best epoch is kept, mixup and eight views are what they say."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import random_images
from safetensors.torch import load_file
from test_classifier import DEVIATION, MEAN
from test_mae import small_config

from galaxy_mae import fine_tuning
from galaxy_mae.batches import GalaxyBatches
from galaxy_mae.classifier import build_classifier, random_encoder
from galaxy_mae.fine_tuning import LabelledRows, classify, eight_views, fine_tune
from galaxy_mae.mae import encoder_config
from galaxy_mae.recipe import read_evaluation
from galaxy_mae.trainer import FineTuningTrainer, mix_up, smooth_targets

NAMES = ("dark", "bright")
QUICK = ["--encoder", "x", "--use_cpu", "True", "--bf16", "False", "--report_to", "none", "--disable_tqdm", "True"]
QUICK += ["--batch_size", "16", "--num_train_epochs", "4", "--learning_rate", "2e-3"]


@pytest.fixture(scope="module")
def survey():
    """Images whose brightness tells their class."""
    label = np.random.default_rng(0).integers(0, 2, 120)
    images = random_images(120) // 2 + (30 * label).astype(np.uint8)[:, None, None, None]
    batches = GalaxyBatches(images, MEAN, DEVIATION, 32)
    known = np.where(np.arange(120) < 100, label, -1)
    return batches, LabelledRows(np.arange(80), np.arange(80, 100), known, NAMES)


@pytest.fixture(scope="module")
def encoder():
    return random_encoder(encoder_config(small_config()), 0)


def arguments(*flags: str):
    return read_evaluation([*QUICK, *flags]).training


def test_fine_tuning_killed_and_called_again_ends_with_the_same_bits(tmp_path, survey, encoder, monkeypatch):
    batches, rows = survey
    whole, chosen = fine_tune(encoder, batches, rows, arguments(), tmp_path / "whole", seed=5)
    train = FineTuningTrainer.training_step

    class Killed(BaseException):
        pass

    def killed(self, *args, **kwargs):
        if self.state.global_step == 12:  # in the third of four epochs of five steps
            raise Killed
        return train(self, *args, **kwargs)

    monkeypatch.setattr(FineTuningTrainer, "training_step", killed)
    with pytest.raises(Killed):
        fine_tune(encoder, batches, rows, arguments(), tmp_path / "killed", seed=5)
    monkeypatch.undo()
    assert list((tmp_path / "killed").glob("checkpoint-*"))
    resumed, chosen_again = fine_tune(encoder, batches, rows, arguments(), tmp_path / "killed", seed=5)
    assert chosen == chosen_again
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    assert not list((tmp_path / "killed").glob("checkpoint-*"))
    monkeypatch.setattr(fine_tuning, "FineTuningTrainer", None)  # nothing is trained a third time
    third, chosen_third = fine_tune(encoder, batches, rows, arguments(), tmp_path / "killed", seed=5)
    assert chosen_third == chosen
    assert all(torch.equal(a, b) for a, b in zip(third.parameters(), resumed.parameters(), strict=True))


def test_the_best_epoch_on_validation_rows_is_what_comes_out(tmp_path, survey, encoder, monkeypatch):
    """The classifier learns, and in the last epoch is turned upside down, so that an earlier epoch is the best."""
    seen = {}
    save, train = FineTuningTrainer._save_checkpoint, FineTuningTrainer.training_step

    def watched(self, model, trial):
        save(self, model, trial)
        weights = load_file(Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}" / "model.safetensors")
        accuracy = next(entry["eval_accuracy"] for entry in self.state.log_history[::-1] if "eval_accuracy" in entry)
        seen[round(self.state.epoch)] = (accuracy, weights)

    def ruined(self, *args, **kwargs):
        if self.state.global_step == 70:  # the first step of the last of 15 epochs of five steps
            self.model.classifier.weight.data.neg_()
        return train(self, *args, **kwargs)

    monkeypatch.setattr(FineTuningTrainer, "_save_checkpoint", watched)
    monkeypatch.setattr(FineTuningTrainer, "training_step", ruined)
    flags = ["--num_train_epochs", "15"]
    batches, rows = survey
    model, chosen = fine_tune(encoder, batches, rows, arguments(*flags), tmp_path, seed=0)
    accuracies = {epoch: accuracy for epoch, (accuracy, _) in seen.items()}
    assert len(accuracies) == chosen["epochs"] == 15
    assert accuracies[chosen["best_epoch"]] == max(accuracies.values()) == chosen["validation_accuracy"]
    assert chosen["best_epoch"] < 15
    assert accuracies[15] < 0.5
    assert max(accuracies.values()) > 0.8
    best = seen[chosen["best_epoch"]][1]
    assert all(torch.equal(value, best[name]) for name, value in model.state_dict().items())
    predicted = classify(model, batches, rows.validation).argmax(axis=1)
    assert np.mean(predicted == rows.label[rows.validation]) == chosen["validation_accuracy"]


def test_fine_tuning_learns_and_leaves_the_encoder_alone(tmp_path, survey, encoder):
    batches, rows = survey
    before = copy.deepcopy(encoder.state_dict())
    model, chosen = fine_tune(encoder, batches, rows, arguments("--num_train_epochs", "15"), tmp_path, seed=0)
    assert chosen["validation_accuracy"] >= 0.9
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    moved = [name for name, value in model.vit.state_dict().items() if not torch.equal(value, before[name])]
    assert len(moved) == len(before)  # positions and class token as well


def test_seed_of_a_fine_tuning_changes_head_order_and_augmentation(tmp_path, survey, encoder):
    batches, rows = survey
    one, other = (
        fine_tune(encoder, batches, rows, arguments("--num_train_epochs", "1"), tmp_path / str(seed), seed)[0]
        for seed in (0, 1)
    )
    assert not torch.equal(one.classifier.weight, other.classifier.weight)
    images = {seed: batches.augmented_by(seed, 0.5).augmented({"rows": torch.arange(4)}, 0) for seed in (0, 1)}
    assert not torch.equal(images[0], images[1])
    assert batches.augmented_by(0, 0.5).pixels is batches.pixels


def test_labels_that_are_not_of_training_or_validation_rows_are_never_touched(tmp_path, survey, encoder, monkeypatch):
    """Rows 100 to 119 have the class -1, which no loss takes: what went in is only what is known."""
    batches, rows = survey
    seen = set()
    prepare = FineTuningTrainer._prepare_inputs

    def watched(self, inputs):
        seen.update(inputs["rows"].tolist())
        return prepare(self, inputs)

    monkeypatch.setattr(FineTuningTrainer, "_prepare_inputs", watched)
    fine_tune(encoder, batches, rows, arguments(), tmp_path, seed=0)
    assert seen <= set(range(100))
    assert set(range(80, 100)) < seen


def test_smoothing_and_mixup():
    targets = smooth_targets(torch.tensor([2, 0]), 4, 0.1)
    assert torch.allclose(targets, torch.tensor([[0.025, 0.025, 0.925, 0.025], [0.925, 0.025, 0.025, 0.025]]))
    images = torch.rand(6, 3, 4, 4)
    labels = torch.eye(6)
    mixed, soft = mix_up(images, labels, 0.2, seed=0, step=3)
    share = float(soft[0, 0])
    assert soft[0, 5] == pytest.approx(1 - share)
    assert torch.allclose(mixed, share * images + (1 - share) * images.flip(0), atol=1e-6)
    assert torch.allclose(soft.sum(dim=1), torch.ones(6))
    assert torch.equal(mix_up(images, labels, 0.2, seed=0, step=3)[0], mixed)
    assert mix_up(images, labels, 0.0, seed=0, step=3)[0] is images
    shares = [float(mix_up(images, labels, 0.2, seed=0, step=step)[1][0, 0]) for step in range(4000)]
    assert np.mean(shares) == pytest.approx(0.5, abs=0.03)
    assert np.var(shares) == pytest.approx(0.25 / 1.4, abs=0.01)  # of Beta(0.2, 0.2)


def test_eight_views_are_the_square_s_symmetries(encoder):
    image = torch.arange(16.0).reshape(1, 1, 4, 4)
    views = [tuple(view.flatten().tolist()) for view in eight_views(image)]
    assert len(set(views)) == 8
    for turned in eight_views(image):
        assert {tuple(view.flatten().tolist()) for view in eight_views(turned)} == set(views)


def test_mean_of_eight_views_does_not_change_when_the_sky_is_turned(encoder):
    images = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    turned = np.ascontiguousarray(np.rot90(images, 1, axes=(1, 2))[:, ::-1])
    model = build_classifier(encoder, NAMES, 0).eval()
    with torch.no_grad():
        model.classifier.weight.normal_()
    views = [GalaxyBatches(x, MEAN, DEVIATION, 32) for x in (images, turned)]
    rows = np.arange(5)
    plain = [classify(model, x, rows) for x in views]
    eight = [classify(model, x, rows, eightfold=True) for x in views]
    assert np.allclose(*eight, atol=1e-6)
    assert np.abs(plain[0] - plain[1]).max() > 1e-4
    assert np.allclose(eight[0].sum(axis=1), 1)

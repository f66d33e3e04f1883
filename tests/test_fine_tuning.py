"""Fine-tuning: resuming changes nothing, the best epoch is kept, mixup and test-time augmentation are as documented."""

import copy
import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import random_images
from safetensors.torch import load_file
from test_encoder import MEAN, STD
from test_mae import small_config

from galaxy_mae.data.batches import GalaxyBatches
from galaxy_mae.data.cache import open_galaxies
from galaxy_mae.data.seen import TrainingImages
from galaxy_mae.data.split import split_galaxies
from galaxy_mae.errors import UserError
from galaxy_mae.evaluation import fine_tuning
from galaxy_mae.evaluation.fine_tuning import (
    FineTuningTrainer,
    LabelledSplit,
    build_fine_tuning_trainer,
    classify,
    fine_tune,
    labelled_split,
    mix_up,
    smooth_targets,
)
from galaxy_mae.model.classifier import build_classifier
from galaxy_mae.model.encoder import random_encoder
from galaxy_mae.model.mae import encoder_config
from galaxy_mae.model.saved_model import TRAINING_IMAGES
from galaxy_mae.training.arguments import FineTuningArguments
from galaxy_mae.training.recipe import read_evaluation_recipe, set_batch_and_learning_rate

NAMES = ("dark", "bright")
QUICK = ["--encoder", "x", "--use_cpu", "True", "--bf16", "False", "--report_to", "none", "--disable_tqdm", "True"]
QUICK += ["--batch_size", "16", "--num_train_epochs", "4", "--learning_rate", "2e-3"]


@pytest.fixture(scope="module")
def survey():
    """Images of two classes that differ in brightness. Galaxies 100 to 119 are neither trained nor validated on."""
    label = np.random.default_rng(0).integers(0, 2, 120)
    images = random_images(120) // 2 + (30 * label).astype(np.uint8)[:, None, None, None]
    batches = GalaxyBatches(images, MEAN, STD, 32)
    known = np.where(np.arange(120) < 100, label, -1)
    return batches, LabelledSplit(np.arange(80), np.arange(80, 100), known, NAMES)


@pytest.fixture(scope="module")
def encoder():
    return random_encoder(encoder_config(small_config()), 0)


def arguments(*flags: str) -> FineTuningArguments:
    recipe = read_evaluation_recipe([*QUICK, *flags])
    set_batch_and_learning_rate(recipe.training, recipe.explicitly_set, bytes_per_image=1)
    return recipe.training


def unchanged(model, before: dict) -> list[str]:
    """Names of the classifier's tensors that still have the values of the encoder."""
    tensors = [(name.removeprefix("beit."), value) for name, value in model.beit.named_parameters()]
    assert len(tensors) > 20
    return [name for name, value in tensors if name in before and torch.equal(value, before[name])]


def test_one_epoch_changes_every_tensor_but_not_the_encoder(tmp_path, survey, encoder):
    batches, labelled = survey
    before = copy.deepcopy(encoder.state_dict())
    model, best_params = fine_tune(
        encoder, batches, labelled, arguments("--num_train_epochs", "1"), tmp_path, "run", seed=0
    )
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    assert len(unchanged(model, before)) == 0
    assert (best_params["best_epoch"], best_params["epochs"]) == (1, 1)
    manifest = json.loads((tmp_path / "fine_tuning.json").read_text())
    assert sorted(manifest["files"]) == [
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
        TRAINING_IMAGES,
    ]
    TrainingImages.parse(json.loads((tmp_path / TRAINING_IMAGES).read_text()))
    predicted = classify(model, batches, labelled.validation).argmax(axis=1)
    assert np.mean(predicted == labelled.label[labelled.validation]) == best_params["validation_accuracy"]


@pytest.mark.parametrize("micro_batch", [16, 4])
def test_loss_is_the_mean_cross_entropy_of_soft_labels(tmp_path, survey, encoder, monkeypatch, micro_batch):
    """Of the images of a step, however they are divided; transformers' own loss of soft labels is another one."""
    batches, labelled = survey
    flags = arguments("--num_train_epochs", "1", "--logging_steps", "1", "--label_smoothing", "0.2", "--mixup", "0.5")
    flags.max_steps, flags.per_device_train_batch_size, flags.gradient_accumulation_steps = (
        1,
        micro_batch,
        16 // micro_batch,
    )
    trainer = build_fine_tuning_trainer(encoder, batches, labelled, flags, tmp_path, "run", seed=0)
    with torch.no_grad():
        trainer.model.classifier.weight.normal_(generator=torch.Generator().manual_seed(0))
        trainer.model.classifier.bias.fill_(1)
    before, prepare, losses = copy.deepcopy(trainer.model).eval(), trainer.prepare_batch, {True: [], False: []}

    def watched(batch, training):
        inputs = prepare(batch, training)
        with torch.no_grad():
            model = before if training else trainer.model
            log_p = torch.log_softmax(model(inputs["pixel_values"]).logits.double(), dim=1)
        soft = inputs["labels"] if training else torch.eye(2)[inputs["labels"]]
        losses[training] += (-(soft * log_p).sum(dim=1)).tolist()
        return inputs

    monkeypatch.setattr(trainer, "prepare_batch", watched)
    trainer.train()
    assert len(losses[True]) == 16
    assert trainer.state.log_history[0]["loss"] == pytest.approx(np.mean(losses[True]), rel=1e-4)
    losses[False].clear()
    metrics = trainer.evaluate()
    assert len(losses[False]) == 20
    assert metrics["eval_loss"] == pytest.approx(np.mean(losses[False]), rel=1e-4)
    predicted = classify(trainer.model, batches, labelled.validation).argmax(axis=1)
    assert metrics["eval_accuracy"] == np.mean(predicted == labelled.label[labelled.validation])


def test_resumed_fine_tuning_equals_the_uninterrupted_one_bit_for_bit(tmp_path, survey, encoder, monkeypatch):
    batches, labelled = survey
    uninterrupted, best_params = fine_tune(
        encoder, batches, labelled, arguments(), tmp_path / "uninterrupted", "run", seed=5
    )
    train = FineTuningTrainer.training_step

    class Killed(BaseException):
        pass

    def killed(self, *args, **kwargs):
        if self.state.global_step == 12:  # in the third of four epochs of five steps
            raise Killed
        return train(self, *args, **kwargs)

    monkeypatch.setattr(FineTuningTrainer, "training_step", killed)
    with pytest.raises(Killed):
        fine_tune(encoder, batches, labelled, arguments(), tmp_path / "killed", "run", seed=5)
    monkeypatch.undo()
    assert list((tmp_path / "killed").glob("checkpoint-*"))
    resumed, params_again = fine_tune(encoder, batches, labelled, arguments(), tmp_path / "killed", "run", seed=5)
    assert best_params == params_again
    assert all(torch.equal(a, b) for a, b in zip(uninterrupted.parameters(), resumed.parameters(), strict=True))
    assert not list((tmp_path / "killed").glob("checkpoint-*"))
    monkeypatch.setattr(fine_tuning, "FineTuningTrainer", None)  # nothing is trained a third time
    third, params_third = fine_tune(encoder, batches, labelled, arguments(), tmp_path / "killed", "run", seed=5)
    assert params_third == best_params
    assert all(torch.equal(a, b) for a, b in zip(third.parameters(), resumed.parameters(), strict=True))


@pytest.mark.slow
def test_another_seeds_checkpoint_or_classifier_and_a_damaged_one_are_not_taken(
    tmp_path, survey, encoder, monkeypatch, caplog
):
    batches, labelled = survey
    flags, weights = arguments("--num_train_epochs", "1"), tmp_path / "0" / "model.safetensors"
    models = [fine_tune(encoder, batches, labelled, flags, tmp_path / str(s), f"seed_{s}", s)[0] for s in (0, 1)]
    with monkeypatch.context() as patch:  # killed before the classifier is finished
        patch.setattr(fine_tuning, "write_manifest", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            fine_tune(encoder, batches, labelled, flags, tmp_path / "killed", "seed_0", 0)

    def again(reason: str) -> bool:
        """Whether seed 0 ends with its own weights, after a line with the reason."""
        caplog.clear()
        model, _ = fine_tune(encoder, batches, labelled, flags, tmp_path / "0", "seed_0", 0)
        assert len([line for line in caplog.messages if reason in line]) == 1
        assert not list((tmp_path / "0").glob("*checkpoint-*"))
        return all(torch.equal(a, b) for a, b in zip(model.parameters(), models[0].parameters(), strict=True))

    shutil.rmtree(tmp_path / "0")
    shutil.copytree(tmp_path / "1", tmp_path / "0")
    assert again("belongs to another run (id seed_1, this one is seed_0): fine-tuned again")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert again("the checksum of model.safetensors is wrong): fine-tuned again")
    finished = tmp_path / "0" / "fine_tuning.json"
    for content in ("", "null", '{"run": "seed_0", "files": {}}', '{"run": 5, "files": []}'):
        finished.write_text(content)
        assert again("fine-tuned again")
    shutil.rmtree(tmp_path / "1")
    shutil.copytree(tmp_path / "killed", tmp_path / "1")
    caplog.clear()
    model, _ = fine_tune(encoder, batches, labelled, flags, tmp_path / "1", "seed_1", 1)
    assert "checkpoint-5 belongs to another run (id seed_0, this one is seed_1): skipped" in caplog.text
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), models[1].parameters(), strict=True))


def test_the_epoch_with_the_best_validation_accuracy_is_returned(tmp_path, survey, encoder, monkeypatch):
    """The classifier learns. In the last epoch its head changes sign, so that an earlier epoch is the best."""
    saved = {}
    save, train = FineTuningTrainer._save_checkpoint, FineTuningTrainer.training_step

    def watched(self, model, trial):
        save(self, model, trial)
        weights = load_file(Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}" / "model.safetensors")
        accuracy = next(entry["eval_accuracy"] for entry in self.state.log_history[::-1] if "eval_accuracy" in entry)
        saved[round(self.state.epoch)] = (accuracy, weights)

    def flipped(self, *args, **kwargs):
        if self.state.global_step == 70:  # the first step of the last of 15 epochs of five steps
            self.model.classifier.weight.data.neg_()
        return train(self, *args, **kwargs)

    monkeypatch.setattr(FineTuningTrainer, "_save_checkpoint", watched)
    monkeypatch.setattr(FineTuningTrainer, "training_step", flipped)
    flags = ["--num_train_epochs", "15"]
    batches, labelled = survey
    model, best_params = fine_tune(encoder, batches, labelled, arguments(*flags), tmp_path, "run", seed=0)
    accuracies = {epoch: accuracy for epoch, (accuracy, _) in saved.items()}
    assert len(accuracies) == best_params["epochs"] == 15
    assert accuracies[best_params["best_epoch"]] == max(accuracies.values()) == best_params["validation_accuracy"]
    assert best_params["best_epoch"] < 15
    assert accuracies[15] < 0.5
    assert max(accuracies.values()) > 0.8
    best = saved[best_params["best_epoch"]][1]
    for name in ("classifier.weight", "classifier.bias"):
        best[name] /= best_params["temperature"]
    assert all(torch.equal(value, best[name]) for name, value in model.state_dict().items())
    predicted = classify(model, batches, labelled.validation).argmax(axis=1)
    assert np.mean(predicted == labelled.label[labelled.validation]) == best_params["validation_accuracy"]


def test_fine_tuning_learns_and_does_not_change_the_encoder(tmp_path, survey, encoder):
    batches, labelled = survey
    before = copy.deepcopy(encoder.state_dict())
    model, best_params = fine_tune(
        encoder, batches, labelled, arguments("--num_train_epochs", "15"), tmp_path, "run", seed=0
    )
    assert best_params["validation_accuracy"] >= 0.9
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    assert len(unchanged(model, before)) == 0  # position embeddings and class token as well


def test_seed_of_a_fine_tuning_changes_head_order_and_augmentation(tmp_path, survey, encoder, monkeypatch):
    batches, labelled = survey
    orders = {0: [], 1: []}
    prepare = FineTuningTrainer.prepare_batch

    def watched(self, batch, training):
        if training:
            orders[self.args.seed] += batch["index"].tolist()
        return prepare(self, batch, training)

    monkeypatch.setattr(FineTuningTrainer, "prepare_batch", watched)
    one, other = (
        fine_tune(encoder, batches, labelled, arguments("--num_train_epochs", "1"), tmp_path / str(seed), "run", seed)[
            0
        ]
        for seed in (0, 1)
    )
    assert not torch.equal(one.classifier.weight, other.classifier.weight)
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(80))
    batch = {"index": torch.arange(4)}
    images = [batches.with_augmentation(seed, 0.5).train_transform(batch, 0) for seed in (0, 1)]
    assert not torch.equal(*images)
    assert batches.with_augmentation(0, 0.5).pixels is batches.pixels


def test_photometry_is_random_in_training_if_the_flag_is_set(tmp_path, survey, encoder):
    batches, labelled = survey
    batch, images = batches.collate(list(range(16))) | {"labels": torch.zeros(16, dtype=torch.int64)}, {}
    for strength in ("0", "0.25"):
        flags = arguments("--photometric_jitter", strength)
        trainer = build_fine_tuning_trainer(encoder, batches, labelled, flags, tmp_path, "run", seed=0)
        images[strength] = [trainer.prepare_batch(batch, training)["pixel_values"] for training in (True, False)]
    assert not torch.allclose(images["0"][0], images["0.25"][0], atol=0.1)
    assert torch.equal(images["0"][1], images["0.25"][1])


def test_optimizer_has_layer_wise_learning_rates(tmp_path, survey, encoder, monkeypatch):
    batches, labelled = survey
    create, groups = FineTuningTrainer.create_optimizer, []

    def watched(self, *args):
        groups.extend((group["lr"], group["weight_decay"]) for group in create(self, *args).param_groups)
        raise KeyboardInterrupt

    monkeypatch.setattr(FineTuningTrainer, "create_optimizer", watched)
    with pytest.raises(KeyboardInterrupt):
        fine_tune(encoder, batches, labelled, arguments("--layer_decay", "0.5"), tmp_path, "run", seed=0)
    assert {rate for rate, _ in groups} == {2e-3, 1e-3, 5e-4, 2.5e-4}
    assert {decay for _, decay in groups} == {0.05, 0.0}


def test_only_training_and_validation_galaxies_are_used(tmp_path, survey, encoder, monkeypatch):
    """No batch contains galaxies 100 to 119, whose class is -1. Training batches contain no validation galaxies."""
    batches, labelled = survey
    used = {True: set(), False: set()}
    prepare = FineTuningTrainer.prepare_batch

    def watched(self, batch, training):
        used[training].update(batch["index"].tolist())
        return prepare(self, batch, training)

    monkeypatch.setattr(FineTuningTrainer, "prepare_batch", watched)
    fine_tune(encoder, batches, labelled, arguments("--num_train_epochs", "1"), tmp_path, "run", seed=0)
    assert used == {True: set(range(80)), False: set(range(80, 100))}


def test_label_smoothing_and_mixup():
    targets = smooth_targets(torch.tensor([2, 0]), 4, 0.1)
    assert torch.allclose(targets, torch.tensor([[0.025, 0.025, 0.925, 0.025], [0.925, 0.025, 0.025, 0.025]]))
    images = torch.rand(6, 3, 4, 4)
    labels = torch.eye(6)
    mixed, soft = mix_up(images, labels, 0.2, seed=0, step=3)
    weight = float(soft[0, 0])
    assert soft[0, 5] == pytest.approx(1 - weight)
    assert torch.allclose(mixed, weight * images + (1 - weight) * images.flip(0), atol=1e-6)
    assert torch.allclose(soft.sum(dim=1), torch.ones(6))
    assert torch.equal(mix_up(images, labels, 0.2, seed=0, step=3)[0], mixed)
    assert mix_up(images, labels, 0.0, seed=0, step=3)[0] is images
    weights = [float(mix_up(images, labels, 0.2, seed=0, step=step)[1][0, 0]) for step in range(4000)]
    assert np.mean(weights) == pytest.approx(0.5, abs=0.03)
    assert np.var(weights) == pytest.approx(0.25 / 1.4, abs=0.01)  # of Beta(0.2, 0.2)


def test_test_time_augmentation_is_invariant_under_rotation_and_mirroring(encoder):
    images = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    transformed = np.ascontiguousarray(np.rot90(images, 1, axes=(1, 2))[:, ::-1])
    model = build_classifier(encoder, NAMES, 0).eval()
    with torch.no_grad():
        model.classifier.weight.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    both = [GalaxyBatches(x, MEAN, STD, 32) for x in (images, transformed)]
    indices = np.arange(5)
    without_tta = [classify(model, x, indices) for x in both]
    with_tta = [classify(model, x, indices, tta=True) for x in both]
    assert np.allclose(*with_tta, atol=1e-6)
    assert np.abs(without_tta[0] - without_tta[1]).max() > 1e-4
    assert np.allclose(with_tta[0].sum(axis=1), 1)


def test_labelled_split_does_not_contain_test_labels(small_hdf5):
    galaxies = open_galaxies(str(small_hdf5))
    split = split_galaxies(galaxies)
    labelled = labelled_split(galaxies, split)
    assert np.all(labelled.label[split["test"]] == -1)
    for part in ("train", "validation"):
        assert np.array_equal(labelled.label[split[part]], galaxies.label[split[part]])
    with pytest.raises(UserError, match="leaves no validation galaxies"):
        labelled_split(galaxies, split | {"validation": np.array([], int)})
    all_test = dataclasses.replace(galaxies, predefined_test=np.ones(len(galaxies), bool))
    with pytest.raises(UserError, match="leaves no train galaxies; all are test galaxies by their names"):
        labelled_split(all_test, split_galaxies(all_test))

"""Calibration: errors as by hand, temperatures that are known, and that only validation galaxies set them."""

import copy
import json

import numpy as np
import pytest
import torch
from conftest import random_images
from scipy.special import softmax
from test_encoder import MEAN, STD
from test_fine_tuning import NAMES, arguments, encoder, survey  # noqa: F401 (fixtures)

from galaxy_mae.data.batches import GalaxyBatches
from galaxy_mae.evaluation import calibration, fine_tuning
from galaxy_mae.evaluation.calibration import (
    at_temperature,
    calibration_scores,
    expected_calibration_error,
    fit_temperature,
    log_probabilities,
    reliability_bins,
)
from galaxy_mae.evaluation.fine_tuning import LabelledSplit, classify, fine_tune, fold_temperature_into_head
from galaxy_mae.figures import reliability_diagrams
from galaxy_mae.model.classifier import build_classifier

# Confidences 0.9 and 0.95 (one correct), 0.45 (correct), 1 (correct) and 0.4 (wrong), of three classes.
PROBABILITIES = np.array([[0.9, 0.1, 0], [0.02, 0.95, 0.03], [0.45, 0.3, 0.25], [0, 0, 1], [0.4, 0.3, 0.3]])
LABEL = np.array([0, 2, 0, 2, 1])


def simulated(temperature: float, count: int = 20_000, classes: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """Logits that are calibrated once they are divided by the temperature, and labels drawn from them."""
    rng = np.random.default_rng(0)
    logits = 2 * rng.normal(size=(count, classes))
    cumulative = softmax(logits, axis=1).cumsum(axis=1)
    return temperature * logits, (rng.random((count, 1)) > cumulative).sum(axis=1).clip(max=classes - 1)


def test_error_and_bins_by_hand(monkeypatch):
    """Five bins: (0.2, 0.4] holds the last row, (0.4, 0.6] the third, (0.8, 1] the others."""
    monkeypatch.setattr(calibration, "BINS", 5)
    confidence = (0.9 + 0.95 + 1) / 3
    by_hand = (0.4 + 0.55 + 3 * abs(2 / 3 - confidence)) / 5
    assert expected_calibration_error(PROBABILITIES, LABEL) == pytest.approx(by_hand)
    bins = reliability_bins([PROBABILITIES, PROBABILITIES], LABEL)
    assert [b["bin"] for b in bins] == [1, 2, 4]
    assert [b["galaxies"] for b in bins] == [2, 2, 6]
    assert [b["accuracy"] for b in bins] == pytest.approx([0, 1, 2 / 3])
    assert [b["confidence"] for b in bins] == pytest.approx([0.4, 0.45, confidence])


@pytest.mark.parametrize("temperature", [0.02, 0.5, 1.0, 3.0, 40.0])
def test_a_known_temperature_is_found(temperature):
    logits, label = simulated(temperature)
    fitted = fit_temperature(logits, label)
    assert fitted == pytest.approx(temperature, rel=0.03)
    shifted = fit_temperature(logits + np.arange(len(logits))[:, None], label)
    assert shifted == pytest.approx(fitted, rel=1e-4)
    calibrated = softmax(logits / fitted, axis=1)
    assert expected_calibration_error(calibrated, label) < 0.015
    assert np.allclose(at_temperature(calibrated, 1 / fitted), softmax(logits, axis=1), atol=1e-6)


@pytest.mark.parametrize(
    ("logits", "label"),
    [
        ([[2.0, 0.0]], [0]),  # one row, correct
        ([[2.0, 0.0]], [1]),  # one row, wrong
        ([[2.0, 0.0], [0.0, 9.0], [0.1, 0.2]], [0, 1, 1]),  # separable
        ([[0.0, 0.0], [0.0, 0.0]], [0, 1]),  # an untrained head
        ([[2.0, 0.0], [2.0, 0.0]], [0, 1]),  # sure, and right in one case of two
    ],
)
def test_rows_that_do_not_tell_how_sure_to_be_change_nothing(logits, label):
    assert fit_temperature(np.array(logits), np.array(label)) == 1.0


def test_a_probability_that_was_rounded_to_zero_is_no_obstacle():
    probabilities = np.array([[1.0, 0.0], [0.7, 0.3], [0.6, 0.4]])
    temperature = fit_temperature(log_probabilities(probabilities), np.array([1, 0, 0]))
    assert np.isfinite(temperature)
    assert np.isfinite(at_temperature(probabilities, temperature)).all()


def test_the_limit_of_a_calibrated_classifier_is_exceeded_by_one_in_twenty():
    """Whatever the size of the test set. One that is too sure by 10 percentage points exceeds it nearly always."""
    rng = np.random.default_rng(1)
    exceeded = {0.0: 0, 0.1: 0}
    for _ in range(30):
        confidence = rng.uniform(0.55, 0.95, 400)
        for shift in exceeded:
            label = (rng.random(400) > confidence - shift).astype(int)
            scores = calibration_scores([np.stack([confidence, 1 - confidence], axis=1)], label)
            exceeded[shift] += scores["ece"] > scores["ece_if_calibrated"]
    assert exceeded[0.0] <= 5  # 1.5 expected
    assert exceeded[0.1] >= 25


def test_scores_of_several_seeds():
    """The mean of seeds that are too sure is less sure than each of them."""
    rng = np.random.default_rng(2)
    logits, label = simulated(3.0, count=2000)
    seeds = [softmax(logits + rng.normal(size=logits.shape), axis=1) for _ in range(3)]
    scores = calibration_scores(seeds, label)
    assert scores["ece_per_seed"] == [expected_calibration_error(p, label) for p in seeds]
    assert scores["ece"] == pytest.approx(np.mean(scores["ece_per_seed"]))
    assert scores["ece_of_mean"] == expected_calibration_error(np.mean(seeds, axis=0), label) < scores["ece"]
    assert sum(b["galaxies"] for b in scores["reliability"]) == 6000
    assert scores == json.loads(json.dumps(scores))


def test_a_reliability_diagram_of_one_bin(tmp_path, drawn_figures):
    bins = reliability_bins([np.full((3, 2), 0.5)], np.array([0, 1, 1]))
    reliability_diagrams(tmp_path / "figure.png", {"before": bins, "after": bins}, 15, "title")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


# --------------------------------------------------------------------------------------------------------- fine-tuning


@pytest.fixture
def unsure(encoder):  # noqa: F811
    """A classifier whose logits are far too small, and noisy classes that it predicts better than chance."""
    images = random_images(400)
    batches = GalaxyBatches(images, MEAN, STD, 32)
    model = build_classifier(encoder, NAMES, 0)
    with torch.no_grad():
        model.classifier.weight.normal_(std=0.01, generator=torch.Generator().manual_seed(0))
        model.classifier.bias.copy_(torch.tensor([0.001, -0.001]))
    model = model.eval()
    predicted = classify(model, batches, np.arange(400)).argmax(axis=1)
    wrong = np.random.default_rng(0).random(400) < 0.2
    return model, batches, LabelledSplit(np.arange(100), np.arange(100, 300), predicted ^ wrong, NAMES)


def test_the_temperature_is_folded_into_the_head(unsure):
    """The classifier alone gives the calibrated probabilities, and classifies as before."""
    model, batches, labelled = unsure
    original = copy.deepcopy(model.state_dict())
    before = classify(model, batches, np.arange(400))
    about = fold_temperature_into_head(model, batches, labelled, bf16=False)
    after = classify(model, batches, np.arange(400))
    assert about["temperature"] < 0.5
    assert np.array_equal(before.argmax(axis=1), after.argmax(axis=1))
    assert np.allclose(at_temperature(before, about["temperature"]), after, atol=1e-4)
    assert np.allclose(at_temperature(after, 1 / about["temperature"]), before, atol=1e-4)
    changed = [name for name, value in model.state_dict().items() if not torch.equal(value, original[name])]
    assert sorted(changed) == ["classifier.bias", "classifier.weight"]
    label = labelled.label[labelled.validation]
    expected = expected_calibration_error(before[labelled.validation], label)
    assert about["validation_ece_before"] == pytest.approx(expected, abs=1e-6)  # batches are not the same
    assert about["validation_ece"] < 0.1 < about["validation_ece_before"]


def test_the_temperature_depends_on_validation_galaxies_alone(unsure):
    """Classes of training and test galaxies may be anything; those of the validation set may not."""
    model, batches, labelled = unsure
    temperatures = []
    for changed in ([], labelled.train, np.arange(300, 400), labelled.validation[:40]):
        label = labelled.label.copy()
        label[changed] ^= 1
        other = LabelledSplit(labelled.train, labelled.validation, label, NAMES)
        temperatures.append(fold_temperature_into_head(copy.deepcopy(model), batches, other, False)["temperature"])
    assert temperatures[0] == temperatures[1] == temperatures[2] != temperatures[3]


def test_killed_between_training_and_saving_gives_the_same_classifier(tmp_path, survey, encoder, monkeypatch):  # noqa: F811
    """It was calibrated in memory; the checkpoint was not, and is calibrated once."""
    batches, labelled = survey
    flags = arguments("--num_train_epochs", "2", "--learning_rate", "3e-4")
    whole, best_params = fine_tune(encoder, batches, labelled, flags, tmp_path / "whole", "run", 0)
    assert best_params["temperature"] != 1
    with monkeypatch.context() as patch:
        patch.setattr(fine_tuning, "write_manifest", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            fine_tune(encoder, batches, labelled, flags, tmp_path / "killed", "run", 0)
    for _ in range(2):  # resumed, and then opened
        again, params_again = fine_tune(encoder, batches, labelled, flags, tmp_path / "killed", "run", 0)
        assert params_again == best_params
        assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))

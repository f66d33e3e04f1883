"""Probes: fitted classifiers are the optima that they should be, and everything is selected on the validation set."""

import numpy as np
import pytest
import torch
from conftest import random_images
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from test_encoder import MEAN, STD
from test_mae import small_config
from threadpoolctl import threadpool_info, threadpool_limits

from galaxy_mae.data.batches import GalaxyBatches
from galaxy_mae.evaluation.probes import (
    C_GRID,
    FeaturesAndLabels,
    attentive_probe,
    knn_classifier,
    linear_probe,
    nearest_centroid,
    validation_accuracies,
)
from galaxy_mae.model.encoder import random_encoder
from galaxy_mae.model.mae import encoder_config


def blobs(count: int, seed: int, noise: float = 2.0, dimensions: int = 20, classes: int = 3) -> FeaturesAndLabels:
    """Overlapping Gaussian classes in features of very different scales."""
    centers = np.random.default_rng(0).normal(0, 1, (classes, dimensions))
    rng = np.random.default_rng(seed)
    label = rng.integers(0, classes, count)
    features = (centers[label] + rng.normal(0, noise, (count, dimensions))) * np.geomspace(0.01, 100, dimensions) + 5
    return FeaturesAndLabels(features.astype(np.float32), label)


def test_linear_probe_is_the_optimum_of_the_penalized_likelihood():
    """PyTorch's L-BFGS in float64 finds the same probabilities on standardized features."""
    train, validation = blobs(600, 1), blobs(300, 2)
    probe = linear_probe(train, validation)
    x = torch.tensor((train.features - train.features.mean(0)) / train.features.std(0), dtype=torch.float64)
    y, c = torch.tensor(train.label), probe.best_params["C"]
    weight = torch.zeros(20, 3, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=500, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def objective():
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(x @ weight + bias, y) + weight.square().sum() / (2 * c * len(y))
        loss.backward()
        return loss

    optimizer.step(objective)
    expected = torch.softmax(x @ weight + bias, dim=1).detach().numpy()
    assert np.allclose(probe.probabilities(train.features), expected, atol=5e-3)


def test_penalty_is_selected_on_the_validation_set():
    """The selected penalty has the best of the recorded validation accuracies; noisy features need a strong one."""
    train, validation = (blobs(count, seed, noise=8.0, dimensions=150) for count, seed in ((300, 1), (2000, 2)))
    probe = linear_probe(train, validation)
    validation_scores = probe.best_params["validation_scores"]
    assert probe.best_params["validation_accuracy"] == max(validation_scores.values())
    accuracy = np.mean(probe.probabilities(validation.features).argmax(axis=1) == validation.label)
    assert accuracy == pytest.approx(probe.best_params["validation_accuracy"])
    assert probe.best_params["C"] < 0.1
    memorizing = linear_probe(train, train)  # selected on the training set itself: a weak penalty is the best
    assert memorizing.best_params["C"] > 10 * probe.best_params["C"]
    assert set(map(float, validation_scores)) <= {float(f"{c:.3g}") for c in C_GRID}


def test_stronger_of_equal_penalties_is_selected():
    label = np.arange(60) % 2
    features = np.repeat(label[:, None] * 2.0 - 1, 3, axis=1).astype(np.float32)  # every penalty is perfect
    probe = linear_probe(FeaturesAndLabels(features, label), FeaturesAndLabels(features, label))
    assert probe.best_params["C"] == C_GRID[0]
    assert len(probe.best_params["validation_scores"]) == 4  # three weaker ones did not improve it


def test_knn_and_nearest_centroid_by_hand():
    train, test = blobs(500, 1, noise=1.0), blobs(200, 2, noise=1.0)
    mean, std = train.features.mean(0), train.features.std(0)
    x, y = (train.features - mean) / std, (test.features - mean) / std
    cosine = (y @ x.T) / np.linalg.norm(y, axis=1)[:, None] / np.linalg.norm(x, axis=1)
    nearest = np.argsort(-cosine, axis=1)[:, :20]
    votes = np.stack([(train.label[nearest] == c).mean(axis=1) for c in range(3)], axis=1)
    assert np.allclose(knn_classifier(train).probabilities(test.features), votes)
    few = knn_classifier(FeaturesAndLabels(train.features[:9], train.label[:9]))
    assert few.best_params == {"num_neighbors": 9}
    centroids = np.stack([x[train.label == c].mean(axis=0) for c in range(3)])
    closest = ((y[:, None] - centroids) ** 2).sum(axis=-1).argmin(axis=1)
    assert np.array_equal(nearest_centroid(train).probabilities(test.features).argmax(axis=1), closest)


def marked_tokens(count: int, seed: int) -> FeaturesAndLabels:
    """Tokens of noise. One of them, anywhere, is marked and carries the class; the mean of all hardly shows it."""
    rng = np.random.default_rng(seed)
    label = rng.integers(0, 4, count)
    tokens = rng.normal(0, 1, (count, 64, 16))
    place = rng.integers(0, 64, count)
    tokens[np.arange(count), place] = 0
    tokens[np.arange(count), place, 15] = 6
    tokens[np.arange(count), place, label] = 3
    return FeaturesAndLabels(tokens.astype(np.float16), label)


def test_attentive_probe_classifies_what_mean_pooling_cannot():
    train, validation, test = marked_tokens(1500, 0), marked_tokens(300, 1), marked_tokens(300, 2)
    probe = attentive_probe(train, validation, queries=2, seed=0)
    probabilities = probe.probabilities(test.features)
    assert np.allclose(probabilities.sum(axis=1), 1)
    assert np.mean(probabilities.argmax(axis=1) == test.label) > 0.9
    means = [FeaturesAndLabels(x.features.astype(np.float32).mean(axis=1), x.label) for x in (train, validation, test)]
    predicted = linear_probe(*means[:2]).probabilities(means[2].features).argmax(axis=1)
    assert np.mean(predicted == test.label) < 0.65
    # The weights are those of the best epoch, not of the last one.
    accuracy = np.mean(probe.probabilities(validation.features).argmax(axis=1) == validation.label)
    assert accuracy == pytest.approx(probe.best_params["validation_accuracy"])
    again = attentive_probe(train, validation, queries=2, seed=0)
    assert np.array_equal(again.probabilities(test.features), probabilities)


@pytest.fixture(scope="module")
def labelled_images():
    """An encoder, batches, a split, and labels 3 and 7 that show as brightness."""
    label = np.where(np.random.default_rng(0).random(120) < 0.5, 3, 7)
    images = random_images(120) // 2 + (15 * label).astype(np.uint8)[:, None, None, None]
    split = {"train": np.arange(70), "validation": np.arange(70, 100), "test": np.arange(100, 120)}
    return random_encoder(encoder_config(small_config()), 0), GalaxyBatches(images, MEAN, STD, 32), split, label


def test_validation_accuracies_use_training_and_validation_galaxies_only(labelled_images):
    encoder, batches, split, label = labelled_images
    accuracies = validation_accuracies(encoder, batches, split, label)
    assert accuracies["num_validation_images"] == 30
    assert accuracies["linear_probe_accuracy"] > 0.8
    assert accuracies["knn_accuracy"] > 0.6
    other = np.where(np.isin(np.arange(120), split["test"]), 10 - label, label)
    assert validation_accuracies(encoder, batches, split, other) == accuracies


@pytest.mark.parametrize(
    ("fit", "model"),
    [(lambda x: linear_probe(x, x), LogisticRegression), (knn_classifier, KNeighborsClassifier)],
    ids=["linear_probe", "knn"],
)
def test_probes_take_one_blas_thread(fit, model, monkeypatch):
    """More than there are free cores wait for one another. Afterwards BLAS has those that it had."""
    threads = []

    def count_threads() -> list[int]:
        return [x["num_threads"] for x in threadpool_info() if x["user_api"] == "blas"]

    def watched(method):
        return lambda *arguments, **kwargs: threads.append(count_threads()) or method(*arguments, **kwargs)

    for name in ("fit", "predict_proba"):
        monkeypatch.setattr(model, name, watched(getattr(model, name)))
    train = blobs(60, 1)
    with threadpool_limits(2, user_api="blas"):
        before = count_threads()
        probe = fit(train)
        fits = len(threads)
        probe.probabilities(train.features)
        assert count_threads() == before
    assert 0 < fits < len(threads)
    assert all(set(each) == {1} for each in threads)


def test_validation_accuracies_with_a_class_that_was_not_trained_on(labelled_images):
    """Its validation galaxies count as errors. With a single class in the training set there is nothing to probe."""
    encoder, batches, split, label = labelled_images
    accuracies = validation_accuracies(encoder, batches, split, label)
    unknown = label.copy()
    unknown[split["validation"][:15]] = 5
    assert validation_accuracies(encoder, batches, split, unknown)["linear_probe_accuracy"] <= 0.5
    assert accuracies["linear_probe_accuracy"] > 0.5
    expected = {name: accuracies[name] for name in ("num_validation_images", "rankme")}
    for label in (np.zeros(120, int), None):
        assert validation_accuracies(encoder, batches, split, label) == expected

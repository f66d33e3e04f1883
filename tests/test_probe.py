"""Frozen features and their probes: features as the README computes them, optima that are optima, honest choices."""

import numpy as np
import pytest
import torch
from conftest import random_images
from test_classifier import DEVIATION, MEAN
from test_mae import small_config
from transformers import AutoImageProcessor, AutoModel

from galaxy_mae.batches import GalaxyBatches
from galaxy_mae.classifier import load_encoder, random_encoder
from galaxy_mae.mae import build_mae, encoder_config, save_encoder
from galaxy_mae.probe import (
    PENALTIES,
    Examples,
    attention_probe,
    choose_pooling,
    linear_probe,
    nearest_class_mean,
    nearest_neighbours,
    pooled_features,
    tokens_on_disk,
)


def blobs(count: int, seed: int, noise: float = 2.0, width: int = 20, classes: int = 3) -> Examples:
    """Overlapping Gaussian classes in features of very different scales."""
    centres = np.random.default_rng(0).normal(0, 1, (classes, width))
    rng = np.random.default_rng(seed)
    label = rng.integers(0, classes, count)
    features = (centres[label] + rng.normal(0, noise, (count, width))) * np.geomspace(0.01, 100, width) + 5
    return Examples(features.astype(np.float32), label)


def test_features_are_those_of_the_readme(tmp_path):
    """Image processor and `AutoModel` against our own path, on images that need no resizing."""
    save_encoder(build_mae(small_config(), seed=2), tmp_path / "encoder", MEAN, DEVIATION, ())
    images = random_images(300)
    encoder = load_encoder(str(tmp_path / "encoder"))
    batches = GalaxyBatches(images, encoder.mean, encoder.deviation, 32)
    ours = pooled_features(encoder.model, batches, tmp_path / "features.npz")
    pixels = AutoImageProcessor.from_pretrained(tmp_path / "encoder")(list(images), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        model = AutoModel.from_pretrained(tmp_path / "encoder", add_pooling_layer=False)
        hidden = model(pixels).last_hidden_state
    assert np.allclose(ours["mean"], hidden[:, 1:].mean(dim=1), atol=1e-5)
    assert np.allclose(ours["cls"], hidden[:, 0], atol=1e-5)
    assert choose_pooling(ours, "both").shape == (300, 96)
    assert np.array_equal(choose_pooling(ours, "cls"), ours["cls"])
    rows = np.array([7, 299, 3])
    tokens = tokens_on_disk(encoder.model, batches, rows, tmp_path)
    assert np.allclose(tokens, hidden[rows, 1:], atol=2e-2)


def test_features_are_computed_once(tmp_path, monkeypatch):
    encoder = random_encoder(encoder_config(small_config()), 0)
    batches = GalaxyBatches(random_images(20), MEAN, DEVIATION, 32)
    first = pooled_features(encoder, batches, tmp_path / "a.npz")
    monkeypatch.setattr(encoder, "forward", None)
    again = pooled_features(encoder, batches, tmp_path / "a.npz")
    assert all(np.array_equal(first[name], again[name]) for name in first)
    with pytest.raises(TypeError):
        pooled_features(encoder, batches, tmp_path / "b.npz")


def test_linear_probe_is_the_optimum_of_its_penalty():
    """The gradient of the penalised likelihood on standardised features vanishes where the probe says it is."""
    train, validation = blobs(600, 1), blobs(300, 2)
    probe = linear_probe(train, validation)
    x = torch.tensor((train.features - train.features.mean(0)) / train.features.std(0), dtype=torch.float64)
    y, c = torch.tensor(train.label), probe.chosen["C"]
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


def test_penalty_is_chosen_on_validation_rows():
    """What is chosen is the best of what was tried, by accuracy that anybody can compute; noise wants a strong one."""
    train, validation = (blobs(count, seed, noise=8.0, width=150) for count, seed in ((300, 1), (2000, 2)))
    probe = linear_probe(train, validation)
    tried = probe.chosen["tried"]
    assert probe.chosen["validation_accuracy"] == max(tried.values())
    right = np.mean(probe.probabilities(validation.features).argmax(axis=1) == validation.label)
    assert right == pytest.approx(probe.chosen["validation_accuracy"])
    assert probe.chosen["C"] < 0.1
    easy = linear_probe(train, Examples(train.features, train.label))  # memorising wants a weak one
    assert easy.chosen["C"] > 10 * probe.chosen["C"]
    assert set(map(float, tried)) <= {float(f"{c:.3g}") for c in PENALTIES}


def test_neighbours_and_means_by_hand():
    train, test = blobs(500, 1, noise=1.0), blobs(200, 2, noise=1.0)
    mean, deviation = train.features.mean(0), train.features.std(0)
    x, y = (train.features - mean) / deviation, (test.features - mean) / deviation
    cosine = (y @ x.T) / np.linalg.norm(y, axis=1)[:, None] / np.linalg.norm(x, axis=1)
    nearest = np.argsort(-cosine, axis=1)[:, :20]
    votes = np.stack([(train.label[nearest] == c).mean(axis=1) for c in range(3)], axis=1)
    assert np.allclose(nearest_neighbours(train).probabilities(test.features), votes)
    centres = np.stack([x[train.label == c].mean(axis=0) for c in range(3)])
    closest = ((y[:, None] - centres) ** 2).sum(axis=-1).argmin(axis=1)
    assert np.array_equal(nearest_class_mean(train).probabilities(test.features).argmax(axis=1), closest)


def needles(count: int, seed: int) -> Examples:
    """Tokens of noise, one of which, anywhere, is marked and carries the class; the mean of all hardly shows it."""
    rng = np.random.default_rng(seed)
    label = rng.integers(0, 4, count)
    tokens = rng.normal(0, 1, (count, 64, 16))
    place = rng.integers(0, 64, count)
    tokens[np.arange(count), place] = 0
    tokens[np.arange(count), place, 15] = 6
    tokens[np.arange(count), place, label] = 3
    return Examples(tokens.astype(np.float16), label)


def test_attention_probe_finds_what_the_mean_hides():
    train, validation, test = needles(1500, 0), needles(300, 1), needles(300, 2)
    probe = attention_probe(train, validation, queries=2, seed=0)
    probabilities = probe.probabilities(test.features)
    assert np.allclose(probabilities.sum(axis=1), 1)
    assert np.mean(probabilities.argmax(axis=1) == test.label) > 0.9
    means = [Examples(x.features.astype(np.float32).mean(axis=1), x.label) for x in (train, validation, test)]
    hidden = linear_probe(*means[:2]).probabilities(means[2].features).argmax(axis=1)
    assert np.mean(hidden == test.label) < 0.65
    right = np.mean(probe.probabilities(validation.features).argmax(axis=1) == validation.label)
    assert right == pytest.approx(probe.chosen["validation_accuracy"])  # the chosen epoch's weights, not the last one's
    again = attention_probe(train, validation, queries=2, seed=0)
    assert np.array_equal(again.probabilities(test.features), probabilities)

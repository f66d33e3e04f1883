"""Frozen features: the same as the image processor and `AutoModel` give, and computed only once."""

import threading

import numpy as np
import pytest
import torch
from conftest import random_images
from test_encoder import MEAN, STD
from test_mae import small_config
from transformers import AutoImageProcessor, AutoModel

from galaxy_mae.data.batches import GalaxyBatches
from galaxy_mae.evaluation import features
from galaxy_mae.evaluation.features import cache_patch_tokens, encode, pooled_features, select_pooling
from galaxy_mae.model.encoder import load_encoder, random_encoder
from galaxy_mae.model.mae import build_mae, encoder_config, save_encoder


def test_features_are_those_of_the_readme(tmp_path):
    """On images that need no resizing, they equal those of the image processor and `AutoModel`."""
    save_encoder(build_mae(small_config(), seed=2), tmp_path / "encoder", MEAN, STD, ())
    images = random_images(300)
    encoder = load_encoder(str(tmp_path / "encoder"))
    batches = GalaxyBatches(images, encoder.mean, encoder.std, 32)
    pooled = pooled_features(encoder.model, batches, tmp_path / "features.npz")
    pixels = AutoImageProcessor.from_pretrained(tmp_path / "encoder")(list(images), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        model = AutoModel.from_pretrained(tmp_path / "encoder", add_pooling_layer=False)
        tokens = model(pixels).last_hidden_state
    assert np.allclose(pooled["mean"], tokens[:, 1:].mean(dim=1), atol=1e-5)
    assert np.allclose(pooled["cls"], tokens[:, 0], atol=1e-5)
    assert select_pooling(pooled, "both").shape == (300, 96)
    assert np.array_equal(select_pooling(pooled, "cls"), pooled["cls"])
    assert np.array_equal(select_pooling(pooled, "mean"), pooled["mean"])
    indices = np.array([7, 299, 3])
    (tmp_path / "tokens").mkdir()
    patch_tokens = cache_patch_tokens(encoder.model, batches, indices, tmp_path / "tokens")
    assert patch_tokens.shape == (3, 16, 48)
    assert np.allclose(patch_tokens, tokens[indices, 1:], atol=2e-2)


def test_features_are_computed_once(tmp_path, monkeypatch):
    encoder = random_encoder(encoder_config(small_config()), 0)
    batches = GalaxyBatches(random_images(20), MEAN, STD, 32)
    first = pooled_features(encoder, batches, tmp_path / "a.npz")
    monkeypatch.setattr(encoder, "forward", None)
    again = pooled_features(encoder, batches, tmp_path / "a.npz")
    assert all(np.array_equal(first[name], again[name]) for name in first)
    with pytest.raises(TypeError):
        pooled_features(encoder, batches, tmp_path / "b.npz")
    assert [path.name for path in tmp_path.glob("*.npz")] == ["a.npz"]


def test_features_keep_the_order_of_the_indices():
    encoder = random_encoder(encoder_config(small_config()), 0)
    batches = GalaxyBatches(random_images(40), MEAN, STD, 32)
    indices = np.random.default_rng(0).permutation(40)
    in_order, shuffled = (torch.cat(list(encode(encoder, batches, x))) for x in (np.arange(40), indices))
    assert torch.allclose(in_order[indices], shuffled, atol=1e-5)


def test_processes_that_need_the_same_features_compute_them_once(tmp_path, monkeypatch):
    encoder = random_encoder(encoder_config(small_config()), 0)
    batches = GalaxyBatches(random_images(20), MEAN, STD, 32)
    computed, results = [], []

    def slowly(*args):
        computed.append(1)
        second.start()
        second.join(timeout=0.3)
        assert second.is_alive()  # it waits
        return pool(*args)

    pool = features._pool
    monkeypatch.setattr(features, "_pool", slowly)
    second = threading.Thread(target=lambda: results.append(pooled_features(encoder, batches, tmp_path / "a.npz")))
    results.append(pooled_features(encoder, batches, tmp_path / "a.npz"))
    second.join()
    assert len(computed) == 1
    assert len(results) == 2
    assert np.array_equal(results[0]["mean"], results[1]["mean"])


def test_damaged_features_are_computed_again(tmp_path, caplog):
    encoder = random_encoder(encoder_config(small_config()), 0)
    batches = GalaxyBatches(random_images(20), MEAN, STD, 32)
    path = tmp_path / "a.npz"
    expected = pooled_features(encoder, batches, path)
    good = path.read_bytes()
    other = tmp_path / "other.npz"
    pooled_features(encoder, GalaxyBatches(random_images(21), MEAN, STD, 32), other)
    np.save(tmp_path / "array.npy", np.zeros(3))
    array = (tmp_path / "array.npy").read_bytes()
    flipped = [bytearray(good) for _ in range(3)]
    for content, position in zip(flipped, (0.2, 0.5, 0.8), strict=True):
        content[int(position * len(good))] ^= 1
    for content in (b"", good[:-100], good[:200], other.read_bytes(), b"\x93NUMPY", array, *flipped):
        path.write_bytes(content)
        caplog.clear()
        again = pooled_features(encoder, batches, path)
        assert caplog.messages == [f"{path} is damaged: the features are computed again"]
        assert all(np.array_equal(again[name], expected[name]) for name in expected)
        assert path.read_bytes() == good

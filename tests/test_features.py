"""Frozen features: the same as the image processor and `AutoModel` give, and computed only once."""

import numpy as np
import pytest
import torch
from conftest import random_images
from test_encoder import MEAN, STD
from test_mae import small_config
from transformers import AutoImageProcessor, AutoModel

from galaxy_mae.data.batches import GalaxyBatches
from galaxy_mae.evaluation.features import cache_patch_tokens, encode, pooled_features, select_pooling
from galaxy_mae.model.encoder import load_encoder, random_encoder
from galaxy_mae.model.mae import build_mae, encoder_config, save_encoder


def test_features_are_those_of_the_readme(tmp_path):
    """On images that need no resizing, they equal those of the image processor and `AutoModel`."""
    save_encoder(build_mae(small_config(), seed=2), tmp_path / "encoder", MEAN, STD, ())
    images = random_images(300)
    encoder = load_encoder(str(tmp_path / "encoder"))
    batches = GalaxyBatches(images, encoder.mean, encoder.std, 32)
    features = pooled_features(encoder.model, batches, tmp_path / "features.npz")
    pixels = AutoImageProcessor.from_pretrained(tmp_path / "encoder")(list(images), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        model = AutoModel.from_pretrained(tmp_path / "encoder", add_pooling_layer=False)
        tokens = model(pixels).last_hidden_state
    assert np.allclose(features["mean"], tokens[:, 1:].mean(dim=1), atol=1e-5)
    assert np.allclose(features["cls"], tokens[:, 0], atol=1e-5)
    assert select_pooling(features, "both").shape == (300, 96)
    assert np.array_equal(select_pooling(features, "cls"), features["cls"])
    assert np.array_equal(select_pooling(features, "mean"), features["mean"])
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

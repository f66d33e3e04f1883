"""Frozen features: the same as the image processor and `AutoModel` give, and computed only once."""

import itertools
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import random_images
from test_encoder import MEAN, STD
from test_mae import small_config
from transformers import AutoImageProcessor, AutoModel

from galaxy_mae.data.batches import GalaxyBatches, orientations
from galaxy_mae.errors import UserError
from galaxy_mae.evaluation import features
from galaxy_mae.evaluation.features import (
    RINGS,
    Features,
    cache_patch_tokens,
    encode,
    frozen_features,
    merge_rings,
    orientation_features,
    ring_choices,
    ring_of_patches,
)
from galaxy_mae.model.encoder import load_encoder, random_encoder
from galaxy_mae.model.mae import build_mae, encoder_config, save_encoder


def equal(one: Features, other: Features) -> bool:
    return one.grid == other.grid and all(
        np.array_equal(a, b)
        for a, b in zip(
            (one.mean, one.cls, one.rings, *one.layers),
            (other.mean, other.cls, other.rings, *other.layers),
            strict=True,
        )
    )


def test_features_belong_to_the_images_in_their_order():
    """Another version of this program may read the same files in another order, under the same fingerprint."""
    galaxies = SimpleNamespace(fingerprint="f" * 64, image_hash=np.arange(9, dtype=np.uint64))
    other = SimpleNamespace(fingerprint="f" * 64, image_hash=galaxies.image_hash[::-1])
    assert features.features_file(galaxies, "e" * 64, False) != features.features_file(other, "e" * 64, False)


def test_features_are_those_of_the_readme(tmp_path):
    """On images that need no resizing, they equal those of the image processor and `AutoModel`."""
    save_encoder(build_mae(small_config(), seed=2), tmp_path / "encoder", MEAN, STD, ())
    images = random_images(300)
    encoder = load_encoder(str(tmp_path / "encoder"))
    batches = GalaxyBatches(images, encoder.mean, encoder.std, 32)
    features = frozen_features(encoder.model, batches, tmp_path / "features.npz")
    pixels = AutoImageProcessor.from_pretrained(tmp_path / "encoder")(list(images), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        model = AutoModel.from_pretrained(tmp_path / "encoder", add_pooling_layer=False)
        output = model(pixels, output_hidden_states=True)
        tokens = output.last_hidden_state
    assert np.allclose(features.pooled("mean"), tokens[:, 1:].mean(dim=1), atol=1e-5)
    assert np.allclose(features.pooled("cls"), tokens[:, 0], atol=1e-5)
    assert np.array_equal(features.pooled("both"), np.concatenate([features.mean, features.cls], axis=1))
    assert len(features.layers) == encoder.model.config.num_hidden_layers - 1
    for layer, hidden_states in zip(features.layers, output.hidden_states[1:-1], strict=True):
        assert np.allclose(layer, hidden_states[:, 1:].mean(dim=1), atol=2e-3)
    indices = np.array([7, 299, 3])
    (tmp_path / "tokens").mkdir()
    patch_tokens = cache_patch_tokens(encoder.model, batches, indices, tmp_path / "tokens")
    assert patch_tokens.shape == (3, 16, 48)
    assert np.allclose(patch_tokens, tokens[indices, 1:], atol=2e-2)


def test_features_are_computed_once(tmp_path, monkeypatch):
    encoder = random_encoder(encoder_config(small_config()), 0)
    batches = GalaxyBatches(random_images(20), MEAN, STD, 32)
    first = frozen_features(encoder, batches, tmp_path / "a.npz")
    monkeypatch.setattr(encoder, "forward", None)
    again = frozen_features(encoder, batches, tmp_path / "a.npz")
    assert equal(first, again)
    with pytest.raises(TypeError):
        frozen_features(encoder, batches, tmp_path / "b.npz")
    assert [path.name for path in tmp_path.glob("*.npz")] == ["a.npz"]


def test_features_keep_the_order_of_the_indices():
    encoder = random_encoder(encoder_config(small_config()), 0)
    batches = GalaxyBatches(random_images(40), MEAN, STD, 32)
    indices = np.random.default_rng(0).permutation(40)
    in_order, shuffled = (
        torch.cat([last.patches for *_, last in encode(encoder, batches, x)]) for x in (np.arange(40), indices)
    )
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
    second = threading.Thread(target=lambda: results.append(frozen_features(encoder, batches, tmp_path / "a.npz")))
    results.append(frozen_features(encoder, batches, tmp_path / "a.npz"))
    second.join()
    assert len(computed) == 1
    assert len(results) == 2
    assert equal(*results)


def test_damaged_features_are_computed_again(tmp_path, caplog):
    encoder = random_encoder(encoder_config(small_config()), 0)
    batches = GalaxyBatches(random_images(20), MEAN, STD, 32)
    path = tmp_path / "a.npz"
    expected = frozen_features(encoder, batches, path)
    good = path.read_bytes()
    other = tmp_path / "other.npz"
    frozen_features(encoder, GalaxyBatches(random_images(21), MEAN, STD, 32), other)
    np.save(tmp_path / "array.npy", np.zeros(3))
    array = (tmp_path / "array.npy").read_bytes()
    flipped = [bytearray(good) for _ in range(3)]
    for content, position in zip(flipped, (0.2, 0.5, 0.8), strict=True):
        content[int(position * len(good))] ^= 1
    for content in (b"", good[:-100], good[:200], other.read_bytes(), b"\x93NUMPY", array, *flipped):
        path.write_bytes(content)
        caplog.clear()
        again = frozen_features(encoder, batches, path)
        assert caplog.messages == [f"{path} is damaged: the features are computed again"]
        assert equal(again, expected)
        assert path.read_bytes() == good


def test_an_encoder_without_a_class_token_has_only_patch_features():
    mean = np.zeros((3, 8), np.float32)
    features = Features(mean, None, np.zeros((3, RINGS + 1, 8), np.float16), [], (4, 4))
    assert features.pooled("mean") is mean
    with pytest.raises(UserError, match="--pooling cls: this encoder has no class token"):
        features.pooled("cls")


@pytest.mark.parametrize("side", [4, 8, 14, 16])
def test_ring_means_are_those_of_the_patches_by_their_distance(side, tmp_path):
    """For every number of rings, also where they are merged of narrower ones with unequal numbers of patches."""
    encoder = random_encoder(encoder_config(small_config(image_size=8 * side)), 0)
    batches = GalaxyBatches(random_images(3, 8 * side), MEAN, STD, 8 * side)
    features = frozen_features(encoder, batches, tmp_path / "features.npz")
    ((*_, last),) = encode(encoder, batches, np.arange(3))
    position = (np.arange(side) - (side - 1) / 2) / (side / 2)
    radius = np.sqrt(position[:, None] ** 2 + position**2)
    assert len(ring_choices(features.grid)) >= 2
    for num_rings in ring_choices(features.grid):
        edges = [*np.linspace(0, 1, num_rings), np.inf]
        expected = [
            last.patches.numpy()[:, (radius >= low) & (radius < high)].mean(axis=1)
            for low, high in itertools.pairwise(edges)
        ]
        merged = merge_rings(features.rings, num_rings, features.grid)
        assert np.allclose(merged, np.concatenate(expected, axis=1), atol=5e-3)


def test_rings_do_not_change_with_rotation():
    ring = ring_of_patches(8, 8)
    assert all(np.array_equal(ring, np.rot90(ring, turns)) for turns in range(4))
    assert np.array_equal(ring, ring.T)
    assert ring.max() == RINGS  # the corners


@pytest.fixture
def survey_and_encoder():
    """Images whose outer ring is a background, as a galaxy's, and an encoder."""
    images = np.full((6, 64, 64, 3), 20, np.uint8)
    images[:, 12:52, 12:52] = random_images(6, 40)
    return images, random_encoder(encoder_config(small_config(image_size=64)), 0)


def oriented(encoder, images: np.ndarray, folder) -> np.ndarray:
    """(2, N, rings * channels): means and stds over the orientations."""
    features = orientation_features(encoder, GalaxyBatches(images, MEAN, STD, 64), folder / "oriented.npz")
    assert features.dtype == np.float16
    return np.stack(np.split(features.astype(np.float32), 2, axis=1))


def test_orientation_features_are_mean_and_std_of_ring_means(survey_and_encoder, tmp_path):
    images, encoder = survey_and_encoder
    num_rings = ring_choices((8, 8))[-1]
    views = []
    for number, view in enumerate(orientations(torch.from_numpy(images).permute(0, 3, 1, 2).float())):
        pixels = view.permute(0, 2, 3, 1).clamp(0, 255).round().byte().numpy()
        frozen = frozen_features(encoder, GalaxyBatches(pixels, MEAN, STD, 64), tmp_path / f"{number}.npz")
        views.append(merge_rings(frozen.rings, num_rings, frozen.grid))
    mean, std = oriented(encoder, images, tmp_path)
    assert mean.shape == (6, num_rings * 48)
    assert np.allclose(mean, np.mean(views, axis=0), atol=0.01)
    assert np.allclose(std, np.std(views, axis=0), atol=0.01)
    assert std.mean() > 0.05


def test_orientation_features_are_the_same_for_a_turned_and_mirrored_image(survey_and_encoder, tmp_path):
    images, encoder = survey_and_encoder
    turned = np.ascontiguousarray(np.rot90(images, 3, axes=(1, 2))[:, :, ::-1])
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
    assert np.allclose(
        oriented(encoder, images, tmp_path / "one"), oriented(encoder, turned, tmp_path / "other"), atol=2e-3
    )
    symmetric = np.full((1, 64, 64, 3), 90, np.uint8)
    (tmp_path / "symmetric").mkdir()
    assert np.abs(oriented(encoder, symmetric, tmp_path / "symmetric")[1]).max() < 1e-3


def test_orientation_features_without_rings_are_of_all_patches(tmp_path):
    encoder = random_encoder(encoder_config(small_config(image_size=16)), 0)
    batches = GalaxyBatches(random_images(5, 16), MEAN, STD, 16)
    features = orientation_features(encoder, batches, tmp_path / "a.npz")
    assert not ring_choices((2, 2))
    assert features.shape == (5, 2 * 48)

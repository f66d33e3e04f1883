"""Batches: correct geometry, and random numbers that depend only on (seed, step, index)."""

import math
import re

import numpy as np
import pytest
import torch
from conftest import random_images
from torch._dynamo.utils import counters
from torch._inductor import config as inductor_config
from torch._inductor.graph import GraphLowering

from galaxy_mae.data import batches as batches_module
from galaxy_mae.data.batches import (
    EpochSampler,
    GalaxyBatches,
    IndexDataset,
    dihedral_views,
    orientations,
    random_transforms,
    warp,
)
from galaxy_mae.data.random_numbers import compiled, mask_noise, uniforms
from galaxy_mae.errors import UserError

MASK64 = 2**64 - 1


def splitmix(x: int) -> int:
    """SplitMix64's finalizer in Python's integers."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK64
    return x ^ (x >> 31)


def test_random_numbers_are_splitmix64():
    golden, key = 0x9E3779B97F4A7C15, 0
    for part in (5, 1, 77, 123456789):  # seed, stream, step, index
        key = splitmix((key + part + golden) & MASK64)
    expected = [(splitmix((key + k * golden) & MASK64) >> 40) / 2**24 for k in range(1, 5)]
    assert uniforms(torch.tensor([123456789]), seed=5, step=77, count=4, stream=1)[0].tolist() == expected


def test_random_numbers_are_uniform_and_independent():
    numbers = torch.stack([uniforms(torch.arange(20000), seed=0, step=step, count=4) for step in (0, 1)])
    table = numbers.permute(1, 0, 2).reshape(20000, 8).numpy()
    assert np.all(np.abs(table.mean(axis=0) - 0.5) < 0.01)
    counts = np.stack([np.histogram(column, 20, (0, 1))[0] for column in table.T])
    assert np.all(np.abs(counts - 1000) < 150)  # 1000 expected in each, std 31
    assert np.all(np.abs(np.corrcoef(table.T) - np.eye(8)) < 0.03)


INDICES = torch.cat([torch.arange(40), 2**40 + torch.arange(40), torch.tensor([2**62, 2**63 - 1])])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # inductor's own
def test_compiled_random_numbers_are_the_same_and_one_graph_serves_all_steps():
    torch._dynamo.reset()
    counters.clear()
    for seed in (0, 1, 2**32 - 1):
        for step in (0, 1, 2**31 - 1, 2**40 + 3):
            numbers = compiled(mask_noise)(INDICES, 64, seed=seed, step=step)
            assert torch.equal(numbers, mask_noise(INDICES, 64, seed, step))
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # inductor's own
@pytest.mark.parametrize(
    ("draw", "size"), [(mask_noise, {"num_patches": 64}), (random_transforms, {"min_crop_scale": 0.2})]
)
def test_the_code_for_gpus_computes_in_64_bits(monkeypatch, draw, size):
    """Triton's indices have 32 bits: an index times a constant of 64 bits is an error there."""
    code = []

    def stop(source):
        code.append(source)
        raise InterruptedError  # nothing here could run it

    torch._dynamo.reset()  # what other tests compiled
    monkeypatch.setattr(GraphLowering, "save_output_code", staticmethod(stop))
    monkeypatch.setattr("torch.utils._triton.triton_hash_with_backend", str)  # of a driver, which is not there
    with (
        inductor_config.patch(cpu_backend="triton", force_disable_caches=True),
        pytest.raises(Exception, match="Interr"),
    ):
        compiled.__wrapped__(draw)(INDICES, **size, seed=0, step=1)
    assert "tl.int64" in code[0]
    assert not re.search(r"\d{12,}\)?\s*\*\s*x\d|x\d\s*\*\s*\(?-?\d{12,}", code[0])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="compares a GPU with the CPU")
def test_random_numbers_are_the_same_on_a_gpu():
    for draw in (mask_noise, compiled(mask_noise)):
        assert torch.equal(draw(INDICES.cuda(), 64, seed=7, step=2**40).cpu(), mask_noise(INDICES, 64, 7, 2**40))
    crops = compiled(random_transforms)(INDICES.cuda(), seed=7, step=5, min_crop_scale=0.2)
    assert torch.allclose(crops.cpu(), random_transforms(INDICES, 7, 5, 0.2), atol=1e-6)


@pytest.fixture
def batches():
    images = random_images(64)
    return GalaxyBatches(images, np.array([0.5, 0.4, 0.3]), np.array([0.2, 0.3, 0.4]), 32, seed=3)


def test_augmentation_and_mask_of_a_galaxy_do_not_depend_on_its_batch(batches):
    alone = batches.train_transform(batches.collate([17]), step=9)
    together = batches.train_transform(batches.collate([3, 17, 40]), step=9)
    assert torch.allclose(alone[0], together[1], atol=1e-4)
    noise = mask_noise(torch.tensor([3, 17, 40]), 16, 0, 9)
    assert torch.equal(mask_noise(torch.tensor([17]), 16, 0, 9)[0], noise[1])


def test_augmentation_depends_on_step_seed_and_index(batches):
    def augmented(indices, step, seed=3):
        batches.seed = seed
        return batches.train_transform(batches.collate(indices), step)

    assert torch.equal(augmented([1, 2], 5), augmented([1, 2], 5))
    assert not torch.allclose(augmented([1, 2], 5), augmented([1, 2], 6), atol=0.1)
    assert not torch.allclose(augmented([1, 2], 5), augmented([1, 2], 5, seed=4), atol=0.1)
    transforms = random_transforms(torch.tensor([1, 2]), seed=3, step=5, min_crop_scale=0.2)
    assert not torch.allclose(transforms[0], transforms[1], atol=0.01)


def test_crops_are_drawn_by_the_compiled_function_only_where_that_is_set(batches, monkeypatch):
    used = []
    monkeypatch.setattr(batches_module, "compiled", lambda draw: used.append(draw) or draw)
    eager = batches.train_transform(batches.collate([1, 2]), 5)
    assert not used
    batches.compiled = True
    assert torch.equal(batches.train_transform(batches.collate([1, 2]), 5), eager)
    assert used == [random_transforms]


def test_evaluation_masks_are_the_same_in_every_run():
    indices = torch.tensor([5, 60])
    assert torch.equal(mask_noise(indices, 16), mask_noise(indices, seed=0, step=0, num_patches=16))
    assert not torch.equal(mask_noise(indices, 16), mask_noise(indices, seed=0, step=1, num_patches=16))


def test_epoch_sampler_shuffles_all_samples_and_leaves_out_the_rest_of_a_batch():
    sampler = EpochSampler(103, batch_size=10, seed=1)
    epochs = []
    for epoch in range(40):
        sampler.set_epoch(epoch)
        epochs.append(list(sampler))
        assert epochs[-1] == list(sampler)
    assert len(sampler) == 100
    assert all(len(order) == len(set(order)) == 100 for order in epochs)
    assert set().union(*epochs) == set(range(103))  # another remainder in every epoch
    assert len({tuple(order) for order in epochs}) == 40
    assert list(EpochSampler(103, batch_size=10, seed=2)) != epochs[0]


def test_index_dataset_returns_sample_indices():
    dataset = IndexDataset(np.array([7, 3, 9]))
    assert [dataset[i] for i in range(len(dataset))] == [7, 3, 9]


def test_images_are_the_same_with_and_without_the_on_device_cache(batches, monkeypatch):
    monkeypatch.setattr("galaxy_mae.data.batches._fits_on_device", lambda size, device: False)
    arguments = (batches.pixels, batches.mean.numpy().ravel(), batches.std.numpy().ravel(), 32)
    from_loader = GalaxyBatches(*arguments, seed=3)
    indices = [5, 60, 2]
    assert "images" in from_loader.collate(indices)
    assert "images" not in batches.collate(indices)
    for make in (lambda b: b.eval_transform(b.collate(indices)), lambda b: b.train_transform(b.collate(indices), 4)):
        assert torch.equal(make(from_loader), make(batches))


def test_evaluation_images_are_complete_and_normalized(batches):
    pixels = batches.pixels[[8]][0].transpose(2, 0, 1) / 255
    expected = (pixels - np.array([[[0.5]], [[0.4]], [[0.3]]])) / np.array([[[0.2]], [[0.3]], [[0.4]]])
    assert np.allclose(batches.eval_transform(batches.collate([8]))[0].numpy(), expected, atol=1e-5)


def test_warp_by_known_affine_maps():
    images = torch.from_numpy(random_images(1, 32, seed=2))
    upright = images.permute(0, 3, 1, 2).float()
    unchanged = torch.tensor([[[1.0, 0, 0], [0, 1, 0]]])
    assert torch.allclose(warp(images, unchanged, 32), upright, atol=1e-3)
    mirror = torch.tensor([[[-1.0, 0, 0], [0, 1, 0]]])
    assert torch.allclose(warp(images, mirror, 32), upright.flip(-1), atol=1e-3)
    quarter = torch.tensor([[[0.0, -1, 0], [1, 0, 0]]])
    assert torch.allclose(warp(images, quarter, 32), upright.rot90(1, (2, 3)), atol=1e-2)


def test_warp_is_bicubic_and_reflects_at_the_border():
    images = torch.from_numpy(np.random.default_rng(0).integers(60, 200, (1, 32, 32, 3), dtype=np.uint8))
    upright = images.permute(0, 3, 1, 2).float()
    half_a_pixel = torch.tensor([[[1.0, 0, 1 / 32], [0, 1, 0]]])
    weights = torch.tensor([-0.09375, 0.59375, 0.59375, -0.09375])  # the cubic kernel (Keys 1981, a = -0.75) at 1/2
    expected = (upright.unfold(3, 4, 1) * weights).sum(-1)
    assert torch.allclose(warp(images, half_a_pixel, 32)[..., 1:30], expected, atol=1e-2)
    three_pixels = torch.tensor([[[1.0, 0, -6 / 32], [0, 1, 0]]])
    assert torch.allclose(warp(images, three_pixels, 32)[..., :3], upright[..., :3].flip(-1), atol=1e-2)


def test_random_crops_have_the_areas_and_positions_of_the_recipe():
    indices = torch.arange(4000)
    maps = random_transforms(indices, seed=0, step=0, min_crop_scale=0.2)
    linear, center = maps[:, :, :2], maps[:, :, 2]
    area = torch.linalg.det(linear).abs()
    assert 0.19 < area.min() < 0.22
    assert 0.9 < area.max() <= 1
    assert 0.55 < area.mean() < 0.62  # uniform in [0.2, 1] has mean 0.6; a few long crops are clipped to the image
    assert 0.45 < (torch.linalg.det(linear) < 0).float().mean() < 0.55  # half of them mirrored
    sides = torch.linalg.svdvals(linear)
    assert torch.all(sides.max(dim=1).values / sides.min(dim=1).values < 4 / 3 + 1e-4)
    angle = torch.atan2(linear[:, 1, 1], -linear[:, 0, 1])  # of the second column, which is never mirrored
    assert np.histogram(angle.numpy(), 8, (-np.pi, np.pi))[0].min() > 400  # every direction, 500 expected
    lengths = linear.norm(dim=1)  # (B, 2): width and height of the crop as fractions of the image
    assert torch.all(center.abs() <= 1 - lengths + 1e-5)  # inside the image before the rotation


def test_constant_channel_raises_user_error():
    with pytest.raises(UserError, match="color channel is constant"):
        GalaxyBatches(random_images(2), np.full(3, 0.5), np.array([0.1, 0.0, 0.1]), 32)


def test_dihedral_views_are_the_eight_symmetries_of_a_square():
    image = torch.arange(16.0).reshape(1, 1, 4, 4)
    views = [tuple(view.flatten().tolist()) for view in dihedral_views(image)]
    assert len(set(views)) == 8
    for rotated in dihedral_views(image):
        assert {tuple(view.flatten().tolist()) for view in dihedral_views(rotated)} == set(views)


def test_orientations_are_turned_by_multiples_of_45_degrees_and_mirrored():
    """A smooth blob beside the center goes around it, once for the image and once for its mirror image."""
    y, x = torch.meshgrid(torch.arange(32) - 15.5, torch.arange(32) - 15.5, indexing="ij")
    blob = torch.exp(-((x - 4) ** 2 + (y - 1.5) ** 2) / 4)
    views = list(orientations(blob.expand(2, 3, 32, 32)))
    assert torch.equal(views[0][1, 2], blob)
    found = []
    for view in views:
        assert view.shape == (2, 3, 32, 32)
        weight = view[1, 2] / view[1, 2].sum()
        found.append(torch.rad2deg(torch.atan2((weight * y).sum(), (weight * x).sum())).item())
        assert torch.hypot((weight * y).sum(), (weight * x).sum()).item() == pytest.approx(math.hypot(4, 1.5), rel=0.01)
    angle = math.degrees(math.atan2(1.5, 4))
    expected = [(sign * angle + 45 * turns + 180) % 360 - 180 for sign in (1, -1) for turns in range(8)]
    assert np.allclose(sorted(found), sorted(expected), atol=0.5)

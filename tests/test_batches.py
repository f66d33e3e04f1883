"""Batches: correct geometry, and random numbers that depend only on (seed, step, index)."""

import importlib.util
import itertools
import math
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import random_images
from torch._dynamo.utils import counters
from torch._inductor import config as inductor_config
from torch._inductor.graph import GraphLowering
from torch.utils._python_dispatch import TorchDispatchMode

from galaxy_mae.data import batches as batches_module
from galaxy_mae.data.batches import (
    EpochSampler,
    GalaxyBatches,
    ImageStack,
    IndexDataset,
    _pointwise_grid,
    check_fused_warp,
    dihedral_views,
    orientations,
    random_transforms,
    select_fused_warp,
    warp,
    width_of_crops,
)
from galaxy_mae.data.photometry import _windows, jitter
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
def test_the_code_for_gpus_computes_in_64_bits(monkeypatch):
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
        compiled.__wrapped__(mask_noise)(INDICES, 64, seed=0, step=1)
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


WARP_TRITON = "galaxy_mae.data.warp_triton"


@pytest.fixture(scope="module")
def warp_triton():
    """The module of the Triton kernel, which Triton's interpreter executes; a copy that nobody else imports."""
    pytest.importorskip("triton", reason="Triton is not installed (requirements-dev.txt: on Linux with x86-64)")
    spec = importlib.util.find_spec(WARP_TRITON)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.parametrize(("input_size", "size"), [(37, 24), (20, 45)])
def test_fused_warp_equals_the_cpu_path_in_all_corners_of_the_crop_range(warp_triton, monkeypatch, input_size, size):
    """Smallest and largest area, both aspects, the crop at each corner of the image, mirrored or not, turned."""
    numbers = list(itertools.product((0.0, 1 - 2**-24), repeat=5))
    angles = itertools.cycle([0, 1 / 8, 0.21, 0.4, 0.55, 0.68, 0.93])
    corners = torch.tensor([(*crop, angle, mirror) for (*crop, mirror), angle in zip(numbers, angles, strict=False)])
    monkeypatch.setattr("galaxy_mae.data.batches.uniforms", lambda *_: corners)
    images = np.random.default_rng(0).integers(0, 256, (len(corners), input_size, input_size, 3), dtype=np.uint8)
    batches = GalaxyBatches(images, np.array([0.5, 0.4, 0.3]), np.array([0.2, 0.3, 0.4]), size)
    batch = batches.collate(list(range(len(corners)))[::-1])
    expected = batches.train_transform(batch, 0)
    transforms = random_transforms(batch["index"], 0, 0, 0.2)
    monkeypatch.setattr(warp_triton, "_ROWS", 64)  # a crop a program: the interpreter takes 0.1 s for each
    monkeypatch.setattr(warp_triton, "_COLUMNS", 64)
    pixels = torch.from_numpy(images)
    crops = warp_triton.fused_warp(pixels, batch["index"], transforms, batches.mean, batches.std, size)
    assert crops.shape == expected.shape
    assert (crops - expected).abs().max() < 1e-4


@pytest.mark.parametrize("on_device", [True, False])
def test_train_transform_by_the_fused_warp(batches, warp_triton, monkeypatch, on_device):
    """In the kernel's own tiles, of images on the device or of images that the loader brings."""
    batches.image_size, batches.on_device = 12, on_device
    batch = batches.collate([5, 60, 2])
    assert ("images" in batch) == (not on_device)
    expected = batches.train_transform(batch, step=4)
    batches.pixels = torch.from_numpy(batches.pixels)  # as on a GPU
    calls = []

    def fused_warp(*arguments):
        calls.append(arguments)
        return warp_triton.fused_warp(*arguments)

    monkeypatch.setattr("galaxy_mae.data.batches.select_fused_warp", lambda *sizes: fused_warp)
    assert (batches.train_transform(batch, step=4) - expected).abs().max() < 1e-4
    assert [arguments[0] is batches.pixels for arguments in calls] == [on_device]  # no copy of those on the device


def test_fused_warp_reads_images_beyond_four_gigabytes(warp_triton, tmp_path):
    """A sparse file, of which one image is written. Offsets of 32 bits would read its beginning."""
    pixels = np.memmap(tmp_path / "pixels", np.uint8, "w+", shape=(2**32 // (64 * 64 * 3) + 2, 64, 64, 3))
    pixels[-1] = random_images(1, 64)[0]
    pixels = torch.from_numpy(pixels)
    index, transforms = torch.tensor([len(pixels) - 1]), torch.tensor([[[1.0, 0, 0], [0, 1, 0]]])
    crops = warp_triton.fused_warp(pixels, index, transforms, torch.zeros(3), torch.ones(3), 8)
    assert torch.allclose(crops, warp(pixels[-1:], transforms, 8) / 255, atol=1e-4)


@pytest.mark.slow
def test_kernel_compiles_for_a_gpu(tmp_path, monkeypatch):
    """Which needs no GPU. The interpreter takes what the compiler refuses."""
    triton = pytest.importorskip(
        "triton", reason="Triton is not installed (requirements-dev.txt: on Linux with x86-64)"
    )
    from triton.backends.compiler import GPUTarget

    from galaxy_mae.data.warp_triton import _warp_kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    types = ["*u8", "*i64", *["*fp32"] * 4, *["constexpr"] * 5]
    sizes = dict(zip(_warp_kernel.arg_names[6:], (256, 224, 196, 32, 8), strict=True))
    signature = dict(zip(_warp_kernel.arg_names, types, strict=True))
    source = triton.compiler.ASTSource(_warp_kernel, signature, constexprs=sizes)
    assert triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]


@pytest.mark.parametrize("missing", [True, False])
def test_where_triton_is_missing_or_cannot_compile_pytorch_makes_the_crops(monkeypatch, caplog, missing):
    def cannot_compile(*_):
        raise RuntimeError("Failed to find C compiler.\nPlease specify via CC")

    monkeypatch.setitem(sys.modules, WARP_TRITON, None if missing else SimpleNamespace(fused_warp=None))
    monkeypatch.setattr("galaxy_mae.data.batches.check_fused_warp", cannot_compile)
    caplog.set_level("INFO", "galaxy_mae")
    select_fused_warp.cache_clear()
    assert [select_fused_warp(torch.device("cuda"), 31, 17) for _ in range(2)] == [None, None]
    select_fused_warp.cache_clear()
    (line,) = caplog.messages
    assert (WARP_TRITON if missing else "(Failed to find C compiler.): PyTorch makes them, more slowly") in line
    assert select_fused_warp(torch.device("cpu"), 31, 17) is None
    assert len(caplog.messages) == 1


def test_fused_warp_is_used_only_if_its_crops_are_right(warp_triton):
    check_fused_warp(warp_triton.fused_warp, torch.device("cpu"), 13, 12)
    with pytest.raises(ValueError, match="differ"):
        check_fused_warp(lambda *a: warp_triton.fused_warp(*a).flip(-1), torch.device("cpu"), 13, 12)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("on_device", [True, False])
@pytest.mark.parametrize("fused", [True, False])
def test_crops_of_a_gpu_equal_those_of_a_cpu_with_tf32_on(batches, monkeypatch, fused, on_device):
    monkeypatch.setattr(torch.backends, "fp32_precision", "tf32")  # as transformers does
    monkeypatch.setattr("galaxy_mae.data.batches._fits_on_device", lambda *_: on_device)
    on_gpu = GalaxyBatches(batches.pixels, np.array([0.5, 0.4, 0.3]), np.array([0.2, 0.3, 0.4]), 32, "cuda", seed=3)
    if fused:
        assert select_fused_warp(on_gpu.device, 32, 32) is not None
    else:
        monkeypatch.setattr("galaxy_mae.data.batches.select_fused_warp", lambda *_: None)
    crops, expected = (x.train_transform(x.collate(list(range(64))), step=4) for x in (on_gpu, batches))
    assert (crops.cpu() - expected).abs().max() < 1e-4


class Operations(TorchDispatchMode):
    """The names of the operations that are dispatched."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name())
        return function(*args, **kwargs or {})


@pytest.mark.slow
def test_crops_on_a_gpu_need_no_matrix_product_which_tf32_would_round():
    transforms = random_transforms(torch.arange(8), 0, 0, 0.2)
    expected = F.affine_grid(transforms.double(), [8, 3, 21, 21], align_corners=False)
    assert torch.allclose(_pointwise_grid(transforms, 21).double(), expected, rtol=0, atol=1e-6)
    images = torch.zeros(8, 32, 32, 3, dtype=torch.uint8, device="meta")
    with Operations() as operations:
        assert warp(images, transforms.to("meta"), 21).shape == (8, 3, 21, 21)
        assert len(list(orientations(images.permute(0, 3, 1, 2).float()))) == 16
    assert operations.names.count("aten::grid_sampler_2d") == 2
    assert not [name for name in operations.names if "affine" in name or "mm" in name or "matmul" in name]


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


def test_crops_may_be_larger_than_the_frame():
    """They come from a margin around it, of which an evaluation sees nothing; without one all is as it was."""
    images = np.zeros((40, width_of_crops(32, 1.64), width_of_crops(32, 1.64), 3), np.uint8)
    images[:, 5:-5, 5:-5] = 200  # the frame, on black
    assert images.shape[1] == 42
    mean, std = np.full(3, 0.5), np.full(3, 0.3)
    batches = GalaxyBatches(images, mean, std, 32, seed=3, min_crop_scale=0.6, max_crop_scale=1.64)
    batch = batches.collate(list(range(40)))
    complete = batches.eval_transform(batch)
    assert complete.shape[-1] == 32
    assert bool((complete == complete[0, 0, 0, 0]).all())
    crops = batches.train_transform(batch, 7)
    bright = (crops[:, 0] > 0).float().mean(dim=(1, 2))
    assert 0.5 < float(bright.min()) < 0.75
    assert float(bright.max()) > 0.85
    areas = torch.det(random_transforms(torch.arange(4000), 3, 7, 0.6, 1.64)[:, :, :2]).abs()
    assert 0.59 < float(areas.min()) < 0.65
    assert 1.55 < float(areas.max()) < 1.65
    index = torch.arange(50)
    assert torch.equal(random_transforms(index, 3, 7, 0.2), random_transforms(index, 3, 7, 0.2, 1.0))
    assert width_of_crops(32, 1.0) == 32


def test_photometry_is_random_by_image_and_step_alone():
    """Each change has its size, another batch changes nothing, and strength 0 leaves noise and seeing."""
    images = torch.full((300, 3, 16, 16), 0.4)
    images[:, 0] = 0.5
    index = torch.arange(300)
    changed = jitter(images, index, 3, 7, 0.25)
    assert torch.equal(changed[40:60], jitter(images[40:60], index[40:60], 3, 7, 0.25))
    assert not torch.equal(changed, jitter(images, index, 3, 8, 0.25))
    assert 0 <= float(changed.min()) < float(changed.max()) <= 1
    level = changed.mean(dim=(2, 3))
    assert 0.2 < float(level[:, 1].log().std()) < 0.6
    assert 0.1 < float((level[:, 0] / level[:, 1]).log().std()) < 0.6
    noise = changed.std(dim=(2, 3))[level.amax(dim=1) < 0.9].mean(dim=1)
    assert 0 < float(noise.min()) < 0.005
    assert 0.03 < float(noise.max()) < 0.05
    faint = jitter(images, index, 3, 7, 0.0)
    assert torch.allclose(faint.mean(dim=(2, 3)), images.mean(dim=(2, 3)), atol=0.02)
    point = torch.zeros(300, 3, 16, 16)
    point[:, :, 8, 8] = 1
    peaks = jitter(point, index, 3, 7, 0.0)[:, 1, 8, 8]
    assert 0.4 < float((peaks > 0.85).float().mean()) < 0.7  # half of them are not blurred
    assert float(peaks.min()) < 0.2
    field, ends = torch.rand(3, 256, 256), torch.tensor([0.0, 1 - 2**-24])  # the smallest and largest random number
    assert torch.equal(_windows(field, ends, ends, 64), torch.stack([field[:, :64, :64], field[:, -64:, -64:]]))


@pytest.mark.parametrize("strength", [0.0, 0.25])
def test_photometry_is_part_of_training_alone(strength):
    images = random_images(40)
    batches, plain = (
        GalaxyBatches(images, np.full(3, 0.5), np.full(3, 0.3), 32, photometric_jitter=value) for value in (strength, 0)
    )
    batch = batches.collate(list(range(40)))
    assert torch.equal(batches.eval_transform(batch), plain.eval_transform(batch))
    assert torch.equal(batches.train_transform(batch, 5), plain.train_transform(batch, 5)) == (strength == 0)
    tuned = batches.with_augmentation(1, 0.8).train_transform(batch, 5)
    assert torch.equal(tuned, plain.with_augmentation(1, 0.8).train_transform(batch, 5)), "fine-tuning has its own"


def test_several_arrays_of_images_are_one():
    parts = [random_images(5), random_images(3, seed=1), random_images(9, seed=2)]
    stack, whole = ImageStack(parts), np.concatenate(parts)
    rows = [16, 0, 5, 7, 8, 4, 16]
    assert (stack.shape, stack.nbytes, len(stack)) == (whole.shape, whole.nbytes, len(whole))
    assert np.array_equal(stack[rows], whole[rows])
    assert np.array_equal(stack[4:9], whole[4:9])

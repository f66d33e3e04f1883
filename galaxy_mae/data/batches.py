"""Sample indices in, augmented float images out.

The Trainer's loader carries sample indices, not pixels. The uint8 pixels are already on the device, and one batched
warp there does the random resized crop, the rotation and the flip of a complete batch. That removes image decoding,
worker processes and most copies from the training loop. If the pixels do not fit on the device, the loader carries the
uint8 images as well, in pinned memory, and everything else stays the same.

The crop, rotation and mask of an image come from `random_numbers.py`. They do not depend on the other images of the
batch, on the number of processes, or on interruptions of the run.
"""

import copy
import functools
import logging
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset, Sampler

from galaxy_mae.data.photometry import jitter
from galaxy_mae.data.random_numbers import compiled, uniforms
from galaxy_mae.errors import UserError

logger = logging.getLogger(__name__)

_GPU_CACHE_FRACTION = 0.4  # of the device's memory, which the pixels may occupy


class IndexDataset(Dataset):
    """A dataset whose items are sample indices."""

    def __init__(self, indices: np.ndarray):
        self.indices = np.asarray(indices, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, item: int) -> int:
        return int(self.indices[item])

    def sampler(self, batch_size: int, seed: int) -> "EpochSampler":
        """The order of its items in training."""
        return EpochSampler(len(self), batch_size, seed)


class EpochSampler(Sampler):
    """A random order of `length` samples, a function of (seed, epoch), truncated to full batches.

    Truncated, because a smaller last batch would take an optimizer step of its own with a noisier gradient.
    """

    def __init__(self, length: int, batch_size: int, seed: int):
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Select the order of an epoch; the loader and the Trainer call this."""
        self.epoch = epoch

    def random_step(self, step: int) -> int:
        """What crops and masks of an optimizer step depend on, beside the galaxy: the step."""
        return step

    def __len__(self) -> int:
        return self.length // self.batch_size * self.batch_size

    def __iter__(self) -> Iterator[int]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.length)
        return iter(order[: len(self)].tolist())


class ImageStack:
    """Images of several arrays, (N, S, S, 3) uint8 each, numbered in their order, without a copy of them."""

    def __init__(self, parts: Sequence[np.ndarray]):
        self.parts, self.starts = parts, np.cumsum([0, *map(len, parts)])
        self.shape, self.nbytes = (int(self.starts[-1]), *parts[0].shape[1:]), sum(part.nbytes for part in parts)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice | Sequence[int]) -> np.ndarray:
        rows = np.arange(len(self))[rows]
        part, images = np.searchsorted(self.starts, rows, "right") - 1, np.empty((len(rows), *self.shape[1:]), np.uint8)
        for i in np.unique(part):
            images[part == i] = self.parts[i][rows[part == i] - self.starts[i]]
        return images


class GalaxyBatches:
    """Makes batches of normalized float images from a memory-mapped uint8 array.

    Args:
        pixels: (N, S, S, 3) uint8, with a margin around the model's frame if crops may be larger (`width_of_crops`).
        mean, std: (3,) statistics of the training set in units of 0 to 1, by which images are normalized.
        image_size, device: width and height of the images that are made, and where.
        seed: of the augmentation.
        min_crop_scale, max_crop_scale: smallest and largest area of a random crop, as a fraction of the frame's area.
        photometric_jitter: strength of the random photometry of crops, as of `photometry.jitter`.

    Raises:
        UserError: a color channel is constant.
    """

    def __init__(
        self,
        pixels: np.ndarray | ImageStack,
        mean: np.ndarray,
        std: np.ndarray,
        image_size: int,
        device: torch.device | str = "cpu",
        seed: int = 0,
        min_crop_scale: float = 0.2,
        max_crop_scale: float = 1.0,
        photometric_jitter: float = 0.0,
    ):
        if not np.all(np.asarray(std) > 0):
            raise UserError("a color channel is constant over the training images; use RGB images")
        self.device = torch.device(device)
        self.num_images, self.image_size = len(pixels), image_size
        self.seed, self.crop_scales = seed, (min_crop_scale, max_crop_scale)
        self.photometric_jitter = photometric_jitter
        self.compiled = False  # whether crops come from a compiled function
        self.channel_mean, self.channel_std = np.asarray(mean, np.float64), np.asarray(std, np.float64)
        self.mean, self.std = (
            torch.tensor(x, dtype=torch.float32, device=self.device).view(3, 1, 1) for x in (mean, std)
        )
        self.on_device = _fits_on_device(pixels.nbytes, self.device)
        if self.on_device and self.device.type != "cpu":
            self.pixels = torch.empty(pixels.shape, dtype=torch.uint8, device=self.device)
            for start in range(0, len(pixels), 1024):  # in chunks: the host never holds a second copy
                self.pixels[start : start + 1024] = torch.from_numpy(np.array(pixels[start : start + 1024]))
        else:
            self.pixels = pixels  # on a CPU the page cache holds the memory map

    @property
    def inference_batch_size(self) -> int:
        """Images per forward pass without gradients: enough to fill a GPU, or few enough for a CPU's cache."""
        return 16 if self.device.type == "cpu" else 256

    def with_augmentation(self, seed: int, min_crop_scale: float, photometric_jitter: float = 0.0) -> "GalaxyBatches":
        """The same images, in the same memory, with another augmentation."""
        other = copy.copy(self)
        other.seed, other.crop_scales, other.photometric_jitter = seed, (min_crop_scale, 1.0), photometric_jitter
        return other

    def collate(self, indices: list[int]) -> dict[str, torch.Tensor]:
        """A batch: `index` (B,) int64 and, unless the pixels are on the device, `images` (B, S, S, 3) uint8."""
        batch = {"index": torch.tensor(indices, dtype=torch.int64)}
        if not self.on_device:
            batch["images"] = torch.from_numpy(self.pixels[indices])
        return batch

    def eval_transform(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """The complete images of a batch, normalized: (B, 3, image_size, image_size) float32."""
        images = self._images(batch)
        if self.crop_scales[1] > 1:
            images = center(images, self.image_size)
        images = images.permute(0, 3, 1, 2).float()
        if images.shape[-1] != self.image_size:
            images = F.interpolate(images, size=self.image_size, mode="bilinear", antialias=True)
        return self._normalize(images)

    def train_transform(self, batch: dict[str, torch.Tensor], step: int) -> torch.Tensor:
        """The images with this step's augmentation: (B, 3, image_size, image_size) float32."""
        images, index = self._random_crops(batch, step), batch["index"].to(self.device)
        if not self.photometric_jitter:
            return images
        images = images.mul_(self.std).add_(self.mean)
        return jitter(images, index, self.seed, step, self.photometric_jitter).sub_(self.mean).div_(self.std)

    def _random_crops(self, batch: dict[str, torch.Tensor], step: int) -> torch.Tensor:
        """The images with this step's random crop, rotation and flip."""
        index = batch["index"].to(self.device)
        draw = compiled(random_transforms) if self.compiled else random_transforms
        smallest, largest = self.crop_scales
        transforms = draw(index, seed=self.seed, step=step, min_crop_scale=smallest, max_crop_scale=largest)
        pixels = batch.get("images", self.pixels)
        if largest > 1:  # of the frame to those of the pixels
            transforms = transforms * (self.image_size / pixels.shape[1])
        fused_warp = select_fused_warp(self.device, pixels.shape[1], self.image_size)
        if fused_warp is None:
            return self._normalize(warp(self._images(batch), transforms, self.image_size))
        if "images" in batch:
            pixels, index = self._images(batch), torch.arange(len(index), device=self.device)
        return fused_warp(pixels, index, transforms, self.mean, self.std, self.image_size)

    def _images(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """(B, S, S, 3) uint8 on the device."""
        if "images" in batch:
            return batch["images"].to(self.device, non_blocking=True)
        if isinstance(self.pixels, torch.Tensor):
            return self.pixels[batch["index"].to(self.device)]
        return torch.from_numpy(self.pixels[batch["index"].numpy()])

    def _normalize(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, S, S) float32 from 0-255 to zero mean and unit variance over the training set, in place."""
        return images.div_(255).sub_(self.mean).div_(self.std)


def _fits_on_device(size: int, device: torch.device) -> bool:
    """Whether `size` bytes of pixels can stay on the device during a run; logs it if not."""
    if device.type != "cuda":
        return True
    total = torch.cuda.get_device_properties(device).total_memory
    fits = size <= _GPU_CACHE_FRACTION * total
    if not fits:
        sizes = f"the pixels ({size / 1e9:.1f} GB) are too large for the GPU ({total / 1e9:.1f} GB)"
        logger.info("%s: they stay on disk and are copied in pinned batches", sizes)
    return fits


def width_of_crops(image_size: int, max_crop_scale: float) -> int:
    """The width of the square in which random crops lie: more than `image_size` by a margin on each side."""
    return image_size + 2 * math.ceil((max_crop_scale**0.5 - 1) * image_size / 2) if max_crop_scale > 1 else image_size


def center(images: np.ndarray | torch.Tensor, size: int) -> np.ndarray | torch.Tensor:
    """The square of `size` pixels at the center of (N, S, S, 3) images."""
    margin = (images.shape[1] - size) // 2
    return images[:, margin : margin + size, margin : margin + size]


def random_transforms(
    indices: torch.Tensor,
    seed: int | torch.Tensor,
    step: int | torch.Tensor,
    min_crop_scale: float,
    max_crop_scale: float = 1.0,
) -> torch.Tensor:
    """Random resized crop, rotation by any angle and mirror reflection, as affine maps.

    The crop follows the official MAE recipe (He et al. 2022, appendix A.1): an area uniform in [min_crop_scale, 1], a
    log-uniform aspect ratio in [3/4, 4/3], anywhere inside the image; or, with a `max_crop_scale` above 1, inside the
    square of that area about it. Galaxies have no preferred orientation or handedness, so the crop is also rotated
    about its center by any angle and mirrored with probability 1/2.

    Returns:
        (B, 2, 3) float32: from output to input coordinates, both from -1 to 1, as `torch.nn.functional.affine_grid`.
    """
    u = uniforms(indices, seed, step, 6)
    limit = max_crop_scale**0.5
    area = min_crop_scale + (max_crop_scale - min_crop_scale) * u[:, 0]
    stretch = torch.exp((u[:, 1] - 0.5) * np.log(4 / 3))  # square root of the aspect ratio
    width = (area.sqrt() * stretch).clamp(max=limit)
    height = (area.sqrt() / stretch).clamp(max=limit)
    center_x = (2 * u[:, 2] - 1) * (limit - width)
    center_y = (2 * u[:, 3] - 1) * (limit - height)
    angle = 2 * np.pi * u[:, 4]
    mirror = torch.where(u[:, 5] < 0.5, -1.0, 1.0)
    cos, sin = angle.cos(), angle.sin()
    row_x = torch.stack([cos * width * mirror, -sin * height, center_x], dim=1)
    row_y = torch.stack([sin * width * mirror, cos * height, center_y], dim=1)
    return torch.stack([row_x, row_y], dim=1)


def warp(images: torch.Tensor, transforms: torch.Tensor, size: int) -> torch.Tensor:
    """Sample images along affine maps, bicubically. Outside of the image its reflection is sampled.

    Args:
        images: (B, S, S, 3) uint8.
        transforms: (B, 2, 3) float32, from output to input coordinates.

    Returns:
        (B, 3, size, size) float32 from 0 to 255.
    """
    grid = _sampling_grid(transforms, size)
    values = images.permute(0, 3, 1, 2).float()
    sampled = F.grid_sample(values, grid, mode="bicubic", padding_mode="reflection", align_corners=False)
    return sampled.clamp_(0, 255)


def _sampling_grid(transforms: torch.Tensor, size: int) -> torch.Tensor:
    """`affine_grid` in full float32: (B, size, size, 2).

    On a GPU `affine_grid` is a matrix product, in TF32 if that is on, which moves crops by up to 0.14 pixels.
    """
    if transforms.device.type == "cpu":
        return F.affine_grid(transforms, [len(transforms), 3, size, size], align_corners=False)
    return _pointwise_grid(transforms, size)


def _pointwise_grid(transforms: torch.Tensor, size: int) -> torch.Tensor:
    """`affine_grid` without a matrix product. On a CPU its last bits would differ from those of earlier runs."""
    centers = (2 * torch.arange(size, device=transforms.device) + 1 - size) / size
    by_x, by_y, shift = (column[:, None, None] for column in transforms.unbind(-1))  # (B, 1, 1, 2)
    return by_x * centers[:, None] + by_y * centers[:, None, None] + shift


@functools.cache
def select_fused_warp(device: torch.device, input_size: int, size: int) -> Callable[..., torch.Tensor] | None:
    """`fused_warp` on CUDA, compiled for these sizes; None on other devices and, logged, where it cannot be used."""
    if device.type != "cuda":
        return None
    try:
        from galaxy_mae.data.warp_triton import fused_warp  # needs Triton, which comes with PyTorch for CUDA

        check_fused_warp(fused_warp, device, input_size, size)
    except Exception as error:  # of the import, of compilers and drivers
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        logger.info("the Triton kernel for random crops cannot be used (%s): PyTorch makes them, more slowly", reason)
        return None
    return fused_warp


def check_fused_warp(fused_warp: Callable[..., torch.Tensor], device: torch.device, input_size: int, size: int) -> None:
    """Compare two crops of noise with those of `warp`.

    Raises:
        ValueError: they differ.
    """
    index = torch.arange(2, device=device)
    noise = uniforms(index, seed=0, step=0, count=input_size**2 * 3).mul(256).byte()
    noise = noise.view(2, input_size, input_size, 3)
    transforms = random_transforms(index, seed=0, step=0, min_crop_scale=0.2)
    mean, std = torch.full((2, 3), 0.5, device=device)
    expected = warp(noise, transforms, size).div(255).sub(0.5).div(0.5)
    if not torch.allclose(fused_warp(noise, index, transforms, mean, std, size), expected, rtol=0, atol=1e-2):
        raise ValueError("its crops differ from PyTorch's")


def dihedral_views(images: torch.Tensor) -> Iterator[torch.Tensor]:
    """The rotations by multiples of 90 degrees of (B, C, S, S) images and of their mirror images: eight views."""
    for x in (images, images.flip(3)):
        for turns in range(4):
            yield torch.rot90(x, turns, dims=(2, 3))


def orientations(images: torch.Tensor) -> Iterator[torch.Tensor]:
    """The rotations by multiples of 45 degrees of (B, C, S, S) images and of their mirror images: sixteen views.

    Those by odd multiples are interpolated bicubically, and the reflection of the image fills their corners. Dieleman
    et al. (2015, MNRAS 450, 1441) gave a classifier of galaxies sixteen viewpoints at once, for the same reason.
    """
    half = 0.5**0.5
    turn = images.new_tensor([[half, -half, 0], [half, half, 0]]).expand(len(images), 2, 3)
    grid = _sampling_grid(turn, images.shape[-1])
    turned = F.grid_sample(images, grid, mode="bicubic", padding_mode="reflection", align_corners=False)
    for x in (images, turned):
        yield from dihedral_views(x)

"""Row numbers in, augmented float images out.

The Trainer's loader carries row numbers, not pixels: the uint8 pixels already lie on the device, and one batched warp
there does the random resized crop, the rotation and the flip of a whole batch at once. That removes image decoding,
worker processes and most of the copying from the training loop. Where the device has too little memory, the loader
carries the uint8 images too, in pinned memory, and everything else stays the same.

Every random number is a hash of (seed, step, row), so that an image's crop, turn and mask do not depend on what else is
in the batch, on how many processes share it, or on whether the run was interrupted.
"""

import copy
import logging

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset

logger = logging.getLogger(__name__)

RESIDENT_SHARE = 0.4  # of the device's memory: what pixels may take before they stay in the memory map


class Rows(Dataset):
    """A dataset whose items are row numbers of the decoded source."""

    def __init__(self, rows: np.ndarray):
        self.rows = np.asarray(rows, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> int:
        return int(self.rows[index])


class GalaxyBatches:
    """Makes batches of normalised float images from the rows of a memory-mapped uint8 array.

    Args:
        pixels: (N, S, S, 3) uint8.
        mean, deviation: (3,) statistics of the training rows in units of 0 to 1; images leave normalised by them.
        image_size: width and height of the images that leave.
        device: where they are made.
        seed: of the augmentation.
        smallest_crop: least share of the image's area that a random crop takes.
        resident: whether the pixels lie on the device; None decides by its memory.
    """

    def __init__(
        self,
        pixels: np.ndarray,
        mean: np.ndarray,
        deviation: np.ndarray,
        image_size: int,
        device: torch.device | str = "cpu",
        seed: int = 0,
        smallest_crop: float = 0.2,
        resident: bool | None = None,
    ):
        self.device = torch.device(device)
        self.count = len(pixels)
        self.image_size = image_size
        self.seed = seed
        self.smallest_crop = smallest_crop
        self.mean = torch.tensor(mean, dtype=torch.float32, device=self.device).view(3, 1, 1)
        self.deviation = torch.tensor(deviation, dtype=torch.float32, device=self.device).view(3, 1, 1)
        self.resident = _fits(pixels.nbytes, self.device) if resident is None else resident
        if self.resident and self.device.type != "cpu":
            self.pixels = torch.empty(pixels.shape, dtype=torch.uint8, device=self.device)
            for start in range(0, len(pixels), 1024):  # in slabs: the host never holds a second copy
                self.pixels[start : start + 1024] = torch.from_numpy(np.array(pixels[start : start + 1024]))
        else:
            self.pixels = pixels  # on the CPU the memory map is resident already: the page cache holds it

    @property
    def at_a_time(self) -> int:
        """Images of one forward pass without gradients: enough to fill a GPU, or few enough for a CPU's cache."""
        return 16 if self.device.type == "cpu" else 256

    def augmented_by(self, seed: int, smallest_crop: float) -> "GalaxyBatches":
        """The same images, on the same memory, with another augmentation."""
        other = copy.copy(self)
        other.seed, other.smallest_crop = seed, smallest_crop
        return other

    def collate(self, rows: list[int]) -> dict[str, torch.Tensor]:
        """A loader's batch: `rows` (B,) int64 and, where the pixels are not resident, `images` (B, S, S, 3) uint8."""
        batch = {"rows": torch.tensor(rows, dtype=torch.int64)}
        if not self.resident:
            batch["images"] = torch.from_numpy(self.pixels[rows])
        return batch

    def plain(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """The whole images of a batch, normalised: (B, 3, image_size, image_size) float32."""
        images = self._images(batch).permute(0, 3, 1, 2).float()
        if images.shape[-1] != self.image_size:
            images = F.interpolate(images, size=self.image_size, mode="bilinear", antialias=True)
        return self._normalise(images)

    def augmented(self, batch: dict[str, torch.Tensor], step: int) -> torch.Tensor:
        """The batch's images, each cropped, turned and flipped at random for this step, and normalised.

        Returns:
            (B, 3, image_size, image_size) float32.
        """
        images = self._images(batch)
        transforms = random_transforms(batch["rows"].to(self.device), self.seed, step, self.smallest_crop)
        return self._normalise(warp(images, transforms, self.image_size))

    def _images(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """(B, S, S, 3) uint8 on the device."""
        if "images" in batch:
            return batch["images"].to(self.device, non_blocking=True)
        if isinstance(self.pixels, np.ndarray):
            return torch.from_numpy(self.pixels[batch["rows"].numpy()])
        return self.pixels[batch["rows"].to(self.device)]

    def _normalise(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, S, S) float32 from 0-255 to zero mean and unit deviation over the training rows, in place."""
        return images.div_(255).sub_(self.mean).div_(self.deviation)


def _fits(size: int, device: torch.device) -> bool:
    """Whether `size` bytes of pixels may lie on the device for the whole run; says so in the log if not."""
    if device.type != "cuda":
        return True
    total = torch.cuda.get_device_properties(device).total_memory
    if size <= RESIDENT_SHARE * total:
        return True
    logger.info(
        "the pixels (%.1f GB) are too large for the device (%.1f GB): they stay on disk and travel in pinned batches",
        size / 1e9,
        total / 1e9,
    )
    return False


# ----------------------------------------------------------------------------------------------- the random numbers


def uniforms(rows: torch.Tensor, seed: int, step: int, count: int, stream: int = 0) -> torch.Tensor:
    """Independent uniform random numbers for each row: a pure function of (seed, stream, step, row).

    A counter-based generator: the finaliser of SplitMix64 (Steele, Lea & Flood 2014) hashes the key and then the
    key plus multiples of the golden ratio. The same numbers on every device.

    Args:
        rows: (B,) int64.
        seed, step, stream: non-negative integers; streams keep augmentation and masks apart.
        count: numbers for each row.

    Returns:
        (B, count) float32 in [0, 1), multiples of 2**-24.
    """
    key = torch.zeros((), dtype=torch.int64, device=rows.device)
    for part in (seed, stream, step, rows):
        key = _mix(key + part + _GOLDEN)
    counter = torch.arange(1, count + 1, device=rows.device) * _GOLDEN
    bits = _mix(key[:, None] + counter)
    return ((bits >> 40) & 0xFFFFFF).float() * 2.0**-24


_GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # as signed 64-bit integers, which wrap around as SplitMix64 wants


def _mix(x: torch.Tensor) -> torch.Tensor:
    """SplitMix64's finaliser; the masks make torch's arithmetic shift a logical one."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * (0xBF58476D1CE4E5B9 - 2**64)
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * (0x94D049BB133111EB - 2**64)
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


def mask_noise(rows: torch.Tensor, seed: int, step: int, patches: int) -> torch.Tensor:
    """What ViTMAE sorts to choose the masked patches: (B, patches) float32, a function of (seed, step, row)."""
    return uniforms(rows, seed, step, patches, stream=1)


# -------------------------------------------------------------------------------------------------------- the warp


def random_transforms(rows: torch.Tensor, seed: int, step: int, smallest_crop: float) -> torch.Tensor:
    """Random resized crop, rotation by any angle and mirror image, as affine maps.

    The crop follows the official MAE recipe (He et al. 2022, appendix A.1): an area uniform in [smallest_crop, 1], a
    log-uniform aspect ratio in [3/4, 4/3], anywhere inside the image. Galaxies have no up and no handedness, so the
    crop is also turned about its centre by any angle and mirrored half of the time.

    Returns:
        (B, 2, 3) float32: from output to input coordinates, both from -1 to 1, as `torch.nn.functional.affine_grid`.
    """
    u = uniforms(rows, seed, step, 6)
    area = smallest_crop + (1 - smallest_crop) * u[:, 0]
    stretch = torch.exp((u[:, 1] - 0.5) * np.log(4 / 3))  # square root of the aspect ratio
    width = (area.sqrt() * stretch).clamp(max=1)
    height = (area.sqrt() / stretch).clamp(max=1)
    centre_x = (2 * u[:, 2] - 1) * (1 - width)
    centre_y = (2 * u[:, 3] - 1) * (1 - height)
    angle = 2 * np.pi * u[:, 4]
    mirror = torch.where(u[:, 5] < 0.5, -1.0, 1.0)
    cos, sin = angle.cos(), angle.sin()
    row_x = torch.stack([cos * width * mirror, -sin * height, centre_x], dim=1)
    row_y = torch.stack([sin * width * mirror, cos * height, centre_y], dim=1)
    return torch.stack([row_x, row_y], dim=1)


def warp(images: torch.Tensor, transforms: torch.Tensor, size: int) -> torch.Tensor:
    """Sample images along affine maps, bicubically; beyond the edges the image is reflected, as the sky goes on.

    Args:
        images: (B, S, S, 3) uint8.
        transforms: (B, 2, 3) float32, from output to input coordinates.
        size: width and height of the result.

    Returns:
        (B, 3, size, size) float32 from 0 to 255.
    """
    grid = F.affine_grid(transforms, [len(images), 3, size, size], align_corners=False)
    values = images.permute(0, 3, 1, 2).float()
    sampled = F.grid_sample(values, grid, mode="bicubic", padding_mode="reflection", align_corners=False)
    return sampled.clamp_(0, 255)

"""Random photometry: one galaxy as another stretch, other filters, another sky and another seeing would show it.

What a network has learned from one survey depends on how that survey's pictures look. In the second stage of
pre-training the target of a galaxy stays while its picture changes so.
"""

import functools
import math

import torch
import torch.nn.functional as F

from galaxy_mae.data.random_numbers import uniforms

_SEEING = (0.3, 1.2)  # std of the Gaussian that half of the images are blurred by, in pixels
_NOISE = 0.04  # largest std of the noise, as a fraction of the range of a pixel
_KERNEL = 5  # width of the blur in pixels


def jitter(images: torch.Tensor, indices: torch.Tensor, seed: int, step: int, strength: float) -> torch.Tensor:
    """Change the photometry of images, each by random numbers of its own: pure functions of (seed, step, index).

    In this order: half of the images are blurred; gamma, brightness, each channel and the distance from gray are scaled
    by log-normal factors; a sky of each channel and noise are added.

    Args:
        images: (B, 3, S, S) float32 from 0 to 1.
        indices: (B,) int64, of the samples.
        seed, step: as for `random_numbers.uniforms`.
        strength: std of the logarithms of gamma and brightness. Those of the channels are 0.7 times, that of the
            distance from gray 1.5 times, and the sky, as a fraction of the range, 0.1 times as large.

    Returns:
        As `images`, clipped to 0 to 1.
    """
    size = images.shape[-1]
    uniform = uniforms(indices, seed, step, 14, stream=2)
    blurred, sigma, level, x, y = uniform[:, :5].unbind(1)
    normal = strength * _normal(uniform[:, 5:])[:, :, None, None]
    gamma, brightness, saturation = (each.exp()[:, None] for each in normal[:, :3].unbind(1))
    colors, sky = (0.7 * normal[:, 3:6]).exp(), 0.1 * normal[:, 6:]
    seeing = _blur(images, _SEEING[0] + (_SEEING[1] - _SEEING[0]) * sigma)
    images = torch.where((blurred < 0.5)[:, None, None, None], images, seeing)
    images = images.clamp(1e-4, 1) ** gamma * brightness * colors
    gray = images.mean(dim=1, keepdim=True)
    images = gray + (images - gray) * saturation + sky
    noise = _windows(_noise_field(4 * size, images.device), x, y, size)
    return (images + _NOISE * level[:, None, None, None] * noise).clamp(0, 1)


def _blur(images: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Convolve (B, 3, S, S) images with Gaussians of (B,) stds in pixels."""
    distance = torch.arange(_KERNEL, device=images.device) - _KERNEL // 2
    weights = torch.exp(-0.5 * (distance / sigma[:, None]) ** 2)
    weights = (weights / weights.sum(dim=1, keepdim=True)).repeat_interleave(3, dim=0)  # (3 B, _KERNEL)
    flat, edge = images.flatten(0, 1)[None], _KERNEL // 2
    flat = F.conv2d(F.pad(flat, (edge, edge, 0, 0), "reflect"), weights[:, None, None], groups=len(weights))
    flat = F.conv2d(F.pad(flat, (0, 0, edge, edge), "reflect"), weights[:, None, :, None], groups=len(weights))
    return flat.view_as(images)


@functools.cache
def _noise_field(width: int, device: torch.device) -> torch.Tensor:
    """Normal noise, (3, width, width) float32, of which each image gets a window: hashes of all pixels are slow."""
    rows = torch.arange(3 * width, device=device)
    return _normal(uniforms(rows, 0, 0, width, stream=3)).view(3, width, width)


def _windows(field: torch.Tensor, x: torch.Tensor, y: torch.Tensor, size: int) -> torch.Tensor:
    """Windows of a field at (B,) positions from 0 to 1: (B, 3, size, size)."""
    offset, places = torch.arange(size, device=field.device), field.shape[-1] - size + 1
    columns, rows = ((position * places).long()[:, None] + offset for position in (x, y))
    return field[:, rows[:, :, None], columns[:, None, :]].transpose(0, 1)


def _normal(uniform: torch.Tensor) -> torch.Tensor:
    """Normal random numbers from uniform ones in [0, 1)."""
    return math.sqrt(2) * torch.erfinv((2 * uniform - 1).clamp(min=-1 + 1e-6))

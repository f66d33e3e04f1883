"""Counter-based random numbers of crops and masks: pure functions of (seed, step, sample index)."""

import torch

_GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # as a signed 64-bit integer, which wraps around as SplitMix64 needs


def uniforms(indices: torch.Tensor, seed: int, step: int, count: int, stream: int = 0) -> torch.Tensor:
    """Independent uniform random numbers per sample: a pure function of (seed, stream, step, index).

    A counter-based generator: the finalizer of SplitMix64 (Steele, Lea & Flood 2014) hashes the key and then the key
    plus multiples of the golden ratio. The numbers are the same on every device.

    Args:
        indices: (B,) int64.
        seed, step, stream: non-negative integers; streams keep augmentation and masks independent.
        count: numbers per sample.

    Returns:
        (B, count) float32 in [0, 1), multiples of 2**-24.
    """
    key = torch.zeros((), dtype=torch.int64, device=indices.device)
    for part in (seed, stream, step, indices):
        key = _mix(key + part + _GOLDEN)
    counter = torch.arange(1, count + 1, device=indices.device) * _GOLDEN
    bits = _mix(key[:, None] + counter)
    return ((bits >> 40) & 0xFFFFFF).float() * 2.0**-24


def _mix(x: torch.Tensor) -> torch.Tensor:
    """SplitMix64's finalizer; the masks turn torch's arithmetic shift into a logical one."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * (0xBF58476D1CE4E5B9 - 2**64)
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * (0x94D049BB133111EB - 2**64)
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


def mask_noise(indices: torch.Tensor, num_patches: int, seed: int = 0, step: int = 0) -> torch.Tensor:
    """The noise that ViTMAE sorts to select masked patches: (B, num_patches) float32, from (seed, step, index).

    The defaults fix the masks of validation images, the same in every run.
    """
    return uniforms(indices, seed, step, num_patches, stream=1)

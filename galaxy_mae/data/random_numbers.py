"""Counter-based random numbers of crops and masks: pure functions of (seed, step, sample index)."""

import functools
from collections.abc import Callable

import torch

_GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # as a signed 64-bit integer, which wraps around as SplitMix64 needs


def uniforms(
    indices: torch.Tensor, seed: int | torch.Tensor, step: int | torch.Tensor, count: int, stream: int = 0
) -> torch.Tensor:
    """Independent uniform random numbers per sample: a pure function of (seed, stream, step, index).

    A counter-based generator: the finalizer of SplitMix64 (Steele, Lea & Flood 2014) hashes the key and then the key
    plus multiples of the golden ratio. The numbers are the same on every device.

    Args:
        indices: (B,) int64.
        seed, step, stream: non-negative integers, or () int64; streams keep augmentation and masks independent.
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


def mask_noise(
    indices: torch.Tensor, num_patches: int, seed: int | torch.Tensor = 0, step: int | torch.Tensor = 0
) -> torch.Tensor:
    """The noise that ViTMAE sorts to select masked patches: (B, num_patches) float32, from (seed, step, index).

    The defaults fix the masks of validation images, the same in every run.
    """
    return uniforms(indices, seed, step, num_patches, stream=1)


@functools.cache
def compiled(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A function of sample indices, a seed and a step, such as `mask_noise`, as one graph of `torch.compile`.

    On a GPU that is a few launches in place of about a hundred. The integers are the same. Seed and step, which must be
    named, become tensors: one graph serves all of them. They are filled in on the device; for a copy the host would
    wait.
    """
    # An index times a constant of 64 bits must not be folded into an index, which Triton may compute in 32 bits.
    graph = torch.compile(function, fullgraph=True, options={"constant_and_index_propagation": False})

    def call(indices: torch.Tensor, *args, seed: int, step: int, **kwargs) -> torch.Tensor:
        seed, step = (torch.full((), number, dtype=torch.int64, device=indices.device) for number in (seed, step))
        return graph(indices, *args, seed=seed, step=step, **kwargs)

    return call

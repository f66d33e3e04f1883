"""Random crops on a GPU as one Triton kernel: uint8 images in, normalized float32 crops out.

It computes what `warp` in `batches.py` and the normalization compute, in the same order and in float32. PyTorch gathers
the images, makes floats and a grid of them, finds the reflected pixels for each channel anew and passes four times over
the crops. Here each crop is written once, and nothing is kept in between.
"""

import torch
import triton
import triton.language as tl

# Pixels of a program. A warp of 32 threads makes 4 x 8 of them, so that it reads few lines of memory at every angle.
_ROWS, _COLUMNS = 32, 8


@triton.jit
def _far_weight(distance):
    """The cubic kernel (Keys 1981, a = -0.75, as in PyTorch) at distances from 1 to 2."""
    return ((-0.75 * distance + 3.75) * distance - 6.0) * distance + 3.0


@triton.jit
def _near_weight(distance):
    """The cubic kernel at distances up to 1."""
    return (1.25 * distance - 2.25) * distance * distance + 1.0


@triton.jit
def _reflect(position, length: tl.constexpr):
    """Integer positions reflected at the outer edges of the first and the last pixel, so that all are inside."""
    position = tl.where(position < 0, -1 - position, position) % (2 * length)
    return tl.minimum(position, 2 * length - 1 - position)


@triton.jit
def _taps(position, length: tl.constexpr):
    """The four pixels around each position along an axis of `length` pixels, and their weights."""
    first = tl.floor(position)
    t, first = position - first, first.to(tl.int32)
    before, after = _reflect(first - 1, length), _reflect(first + 2, length)
    pixels = (before, _reflect(first, length), _reflect(first + 1, length), after)
    return pixels, (_far_weight(t + 1), _near_weight(t), _near_weight(1 - t), _far_weight(2 - t))


@triton.jit
def _normalize(values, mean, std):
    """From 0-255 to zero mean and unit variance; divisions are rounded as PyTorch's are."""
    values = tl.minimum(tl.maximum(values, 0.0), 255.0)
    return tl.div_rn(tl.div_rn(values, 255.0) - tl.load(mean), tl.load(std))


@triton.jit
def _warp_kernel(
    pixels, indices, transforms, mean, std, crops,
    input_size: tl.constexpr, size: tl.constexpr, tiles: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr,
):  # fmt: skip
    """A tile of `rows` x `columns` pixels of a crop, all channels."""
    sample, tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    tiles_in_row: tl.constexpr = (size + columns - 1) // columns
    y = tile // tiles_in_row * rows + tl.arange(0, rows)[:, None]
    x = tile % tiles_in_row * columns + tl.arange(0, columns)[None, :]

    transforms += sample * 6
    grid_x = tl.div_rn((2 * x + 1 - size).to(tl.float32), 1.0 * size)  # centers of pixels, from -1 to 1
    grid_y = tl.div_rn((2 * y + 1 - size).to(tl.float32), 1.0 * size)
    input_x = tl.load(transforms) * grid_x + tl.load(transforms + 1) * grid_y + tl.load(transforms + 2)
    input_y = tl.load(transforms + 3) * grid_x + tl.load(transforms + 4) * grid_y + tl.load(transforms + 5)
    input_x = (input_x + 1) * (input_size / 2) - 0.5  # in pixels
    input_y = (input_y + 1) * (input_size / 2) - 0.5
    left_to_right, weights_x = _taps(input_x, input_size)
    top_to_bottom, weights_y = _taps(input_y, input_size)

    image = pixels + tl.load(indices + sample) * (input_size * input_size * 3)  # int64: there may be over 2**31 bytes
    red = tl.full([rows, columns], 0.0, tl.float32)
    green, blue = red, red
    for i in tl.static_range(4):
        row_red = tl.full([rows, columns], 0.0, tl.float32)
        row_green, row_blue = row_red, row_red
        for j in tl.static_range(4):
            pixel = image + (top_to_bottom[i] * input_size + left_to_right[j]) * 3
            row_red += weights_x[j] * tl.load(pixel).to(tl.float32)
            row_green += weights_x[j] * tl.load(pixel + 1).to(tl.float32)
            row_blue += weights_x[j] * tl.load(pixel + 2).to(tl.float32)
        red += weights_y[i] * row_red
        green += weights_y[i] * row_green
        blue += weights_y[i] * row_blue

    inside = (y < size) & (x < size)
    crop = crops + sample * (3 * size * size) + y * size + x
    tl.store(crop, _normalize(red, mean, std), mask=inside)
    tl.store(crop + size * size, _normalize(green, mean + 1, std + 1), mask=inside)
    tl.store(crop + 2 * size * size, _normalize(blue, mean + 2, std + 2), mask=inside)


def fused_warp(
    pixels: torch.Tensor,
    indices: torch.Tensor,
    transforms: torch.Tensor,
    mean: torch.Tensor,
    std: torch.Tensor,
    size: int,
) -> torch.Tensor:
    """Sample `pixels[indices]` along affine maps, as `warp` does, and normalize them.

    Args:
        pixels: (N, S, S, 3) uint8, contiguous.
        indices: (B,) int64, each in [0, N), which is not checked.
        transforms: (B, 2, 3) float32, contiguous, from output to input coordinates.
        mean, std: 3 float32 each, in units of 0 to 1.

    Returns:
        (B, 3, size, size) float32.
    """
    crops = torch.empty(len(indices), 3, size, size, device=pixels.device)
    tiles = triton.cdiv(size, _ROWS) * triton.cdiv(size, _COLUMNS)
    arguments = (pixels, indices, transforms, mean, std, crops, pixels.shape[1], size, tiles, _ROWS, _COLUMNS)
    with torch.cuda.device_of(pixels):  # Triton launches on the current device
        _warp_kernel[(len(indices) * tiles,)](*arguments)
    return crops

"""How an image in any form becomes 8-bit colors, with a reason for each image that cannot be used.

The header of an encoded image is checked before its pixels are decoded. An image comes from bytes, from an array, or
from a file whose content is in the fingerprint; no path or URL that a table names is opened.
"""

import io
import warnings
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from galaxy_mae.data.fits import (
    FITS_SUFFIXES,
    Cutout,
    Extension,
    Stretch,
    UnreadableImage,
    check_size,
    is_fits,
    read_cutout,
)
from galaxy_mae.errors import UserError, first_line

# Formats that hold nothing but pixels of at most 16 bits, or say that they hold more. EPS, for example, is a program.
_IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".tif", ".tiff", ".gif", ".bmp", *FITS_SUFFIXES)
ARRAY_SUFFIX = ".npy"
STATISTICS = ("sky", "brightness", "peak", "color", "noise", "radius", "saturated")  # of `image_statistics`
_CHUNK = 256  # images whose statistics are computed at once
BATCH_BYTES = 16 << 20  # pixels decoded at once; the process needs a few times this much memory

# An encoded image, its file, or why there is none; or its pixels, (H, W, 3) uint8, or fluxes that are to be stretched,
# (bands, H, W) floats as of `Curve.rgb`, whose first row is the lowest.
Encoded = bytes | Path | Extension | Cutout | np.ndarray | UnreadableImage | None


def decoding() -> AbstractContextManager:
    """Within the block, Pillow's warnings are ignored: metadata are not used, and sizes are checked here.

    Entered by the main thread, because Python's filters of warnings are those of all threads.
    """
    return warnings.catch_warnings(action="ignore")


def decode(value: Encoded, stretch: Stretch = Stretch(), reduced: Counter | None = None) -> np.ndarray:  # noqa: B008
    """Decode an image of at most 16 bits per channel, or stretch fluxes, to RGB. Called within `decoding`.

    Args:
        value: the image.
        stretch: of fluxes and FITS cut-outs.
        reduced: counts what is lost: transparency, all frames but the first, bits of 16.

    Returns:
        (H, W, 3) uint8.

    Raises:
        UnreadableImage: it is missing, cannot be decoded, is too large, or has more than 16 bits per channel.
    """
    if value is None:
        raise UnreadableImage("is missing")
    if isinstance(value, UnreadableImage):
        raise UnreadableImage(str(value))  # a new one: a traceback would keep all that is in reach of this call
    value = as_cutout(value, stretch)
    if isinstance(value, Cutout):
        if reduced is not None:
            reduced.update(value.notes)
        return value.rgb()
    if isinstance(value, np.ndarray):
        return value
    try:
        file = value if isinstance(value, Path) else io.BytesIO(value)
        with Image.open(file, formats=_IMAGE_FORMATS) as image:
            _check_header(image)
            if reduced is not None:
                reduced["transparency: it is ignored"] += image.has_transparency_data
                reduced["several frames: the first one is used"] += getattr(image, "is_animated", False)
                # Pillow reads colors of 16 bits as 8 bits; only the tile's raw mode, like "RGB;16B", says so.
                is_deep = any(";16" in str(tile.args) for tile in image.tile)
                reduced["16 bits per channel: 0 to 65535 becomes 0 to 255"] += is_deep
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            if image.mode.startswith("I;16"):
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            return np.asarray(image.convert("RGB"))
    except UnreadableImage:
        raise
    except Exception as error:  # Pillow's decoders raise whatever damaged bytes lead them to
        if getattr(error, "errno", None):  # the system's, of a file
            raise UnreadableImage(f"cannot be read ({error.strerror})") from error
        reason = "unknown format" if isinstance(error, UnidentifiedImageError) else first_line(error)[:200]
        formats = ", ".join(_IMAGE_FORMATS)
        raise UnreadableImage(f"cannot be decoded ({reason}); it must be a complete {formats} or FITS image") from error


def as_cutout(value: Encoded, stretch: Stretch) -> Encoded:
    """Fluxes and FITS files as a `Cutout`, others as they are. Raises an `UnreadableImage` as `decode` does."""
    if isinstance(value, Extension) or (isinstance(value, Path) and is_fits(value)):
        return read_cutout(value, stretch)
    if isinstance(value, Path) and value.suffix.lower() == ARRAY_SUFFIX:
        value = _load_array(value)
    if isinstance(value, np.ndarray) and value.dtype != np.uint8:
        curve, planes, notes = stretch.resolve([""] * len(value), {})
        return Cutout(value[planes], curve, notes)
    return value


def _check_header(image: Image.Image) -> None:
    """Check an image's size and number of bits before its pixels are decoded."""
    check_size(*image.size)
    if image.mode in ("F", "I"):
        fix = "convert the images to 0-255 first, or write them as FITS, which takes a stretch"
        raise UnreadableImage(f"has 32 bits per channel (mode {image.mode}): {fix}")


def takes_stretch(path: Path) -> bool:
    """Whether what is in a file may be fluxes."""
    return is_fits(path) or path.suffix.lower() == ARRAY_SUFFIX


def from_array(image: np.ndarray) -> np.ndarray:
    """An image of (H, W), (H, W, C) or (C, H, W) numbers, as an `Encoded`: (H, W, 3) uint8 or (C, H, W) fluxes.

    Of 8 bits it is gray, RGB or RGBA. Raises an `UnreadableImage` if it is no image.
    """
    if image.ndim == 2:
        image = image[None]
    elif image.ndim == 3 and image.shape[2] < image.shape[0]:
        image = np.moveaxis(image, 2, 0)
    is_bytes = image.dtype == np.uint8
    is_image = image.ndim == 3 and image.dtype.kind in "uif" and 0 not in image.shape
    if not is_image or (is_bytes and len(image) not in (1, 3, 4)):
        needed = "(H, W), (H, W, C) or (C, H, W) is needed, with C 1, 3 or 4 if it is uint8"
        raise UnreadableImage(f"is an array of {image.dtype} {image.shape}: {needed}")
    check_size(*image.shape[:0:-1])
    return np.moveaxis(image[:3], 0, 2).repeat(3 if len(image) == 1 else 1, axis=2) if is_bytes else image


def _load_array(path: Path) -> np.ndarray:
    """The image in an .npy file; nothing is read of one that is none, or holds Python objects."""
    try:
        return from_array(np.load(path, mmap_mode="r", allow_pickle=False))
    except (OSError, ValueError, EOFError) as error:
        if isinstance(error, UnreadableImage):
            raise
        raise UnreadableImage(f"cannot be read as .npy ({first_line(error)[:200]})") from error


def area_average(images: np.ndarray, size: int) -> np.ndarray:
    """Average (b, S, S, 3) uint8 images over the area of each new pixel, to (b, size, size, 3) uint8.

    If S is a multiple of `size`, this is Pillow's box filter, which rounds twice: the image processors that are saved
    with the models (`model.saved_model.save_model`) then make the same pixels. Otherwise it is exact; Pillow's filter
    would never split an old pixel.
    """
    old = images.shape[1]
    if old % size == 0:
        box = Image.Resampling.BOX
        return np.stack([np.asarray(Image.fromarray(image).resize((size, size), box)) for image in images])
    edges = np.arange(size + 1) * old / size
    pixel = np.arange(old)
    overlap = np.minimum(edges[1:, None], pixel + 1) - np.maximum(edges[:-1, None], pixel)
    weights = (overlap.clip(0) * size / old).astype(np.float32)  # (size, S): fraction of each new pixel in each old one
    rows = weights @ images.reshape(len(images), old, old * 3).astype(np.float32)  # (b, size, S * 3)
    average = weights @ rows.reshape(len(images), size, old, 3)  # (b, size, size, 3)
    return np.rint(average).astype(np.uint8)


def image_statistics(pixels: np.ndarray) -> np.ndarray:
    """Numbers that tell how images look, and what may be wrong with them: (N, 7) float32, in the order of `STATISTICS`.

    The sky is the median of what is outside of the circle that touches the edges, in gray levels of 0 to 255;
    brightness is the mean above it within half of that circle, peak the 98th percentile of the difference; color is the
    red less the blue light there, in units of the brightness; noise is the mean difference of neighboring pixels of the
    sky; the radius is the mean distance from the center of the light above three times the noise, in widths of the
    image, 0 if there is none; saturated is the fraction of values of 255.

    Args:
        pixels: (N, S, S, 3) uint8. Of more than 128 pixels, every second, third, ... is used.
    """
    step = max(1, pixels.shape[1] // 64)
    axis = np.arange(0, pixels.shape[1], step) - (pixels.shape[1] - 1) / 2
    distance = np.hypot(*np.meshgrid(axis, axis)) / pixels.shape[1]
    outside, center = distance > 0.5, distance < 0.25
    neighbors, found = outside[:, 1:] & outside[:, :-1], [np.zeros((0, len(STATISTICS)), np.float32)]
    for start in range(0, len(pixels), _CHUNK):
        chunk = pixels[start : start + _CHUNK, ::step, ::step]
        images = chunk.astype(np.float32)
        sky = np.median(images[:, outside], axis=1)
        light, colors = (images - sky[:, None, None]).mean(axis=3), images[:, center].mean(axis=1) - sky
        noise = np.abs(np.diff(light, axis=2)[:, neighbors]).clip(0, 30).mean(axis=1)  # a star at the edge is no noise
        galaxy = np.where(light > 3 * noise.clip(1)[:, None, None], light, 0)
        brightness, total = colors.mean(axis=1), galaxy.sum(axis=(1, 2))
        numbers = (
            *(sky.mean(axis=1), brightness, np.percentile(np.abs(light[:, center]), 98, axis=1)),
            *((colors[:, 0] - colors[:, 2]) / brightness.clip(5), noise),
            *((galaxy * distance).sum(axis=(1, 2)) / total.clip(1e-9), (chunk == 255).mean(axis=(1, 2, 3))),
        )
        found.append(np.stack(numbers, axis=1).astype(np.float32))
    return np.concatenate(found)


def unreadable(where: str, row: int, problem: str, object_id: Sequence[str] | None) -> UserError:
    """The error of a source of which a row has no usable image."""
    name = f" {object_id[row][:200]!r}" if object_id is not None and object_id[row] else ""
    return UserError(f"{where}: the image{name} of row {row} {problem}")

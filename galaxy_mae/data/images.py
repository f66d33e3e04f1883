"""Decoding of image files and of encoded images in tables, with a reason for each image that cannot be used.

The `datasets` library would open whatever path or URL a table names, and decode images of any size and format. Here the
header is checked before the pixels are decoded, and an image comes from bytes or from a file whose content is in the
fingerprint.
"""

import io
import logging
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from galaxy_mae.data.fits import Stretch, is_fits, read_cutout
from galaxy_mae.data.readers import BATCH_BYTES, MAX_IMAGE_SIZE, Batch, UnreadableImage, none_readable, unreadable
from galaxy_mae.errors import first_line

logger = logging.getLogger(__name__)

# Formats that hold nothing but pixels of at most 8 bits, or say that they hold more. EPS, for example, is a program.
_IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP")
_BATCH_ROWS = 1024  # encoded images read at once, at most


Encoded = bytes | Path | UnreadableImage  # an encoded image, its file, or why there is none


def read_images(
    source: str,
    count: int,
    encoded: Callable[[int, int], Sequence[Encoded]],
    object_id: Sequence[str] | None,
    stretch: Stretch,
    skip_unreadable: bool,
) -> tuple[int, Iterator[Batch]]:
    """Return the width and height of the images, and an iterator over batches of them.

    Args:
        source: the value of `--dataset`, for messages.
        count: number of rows.
        encoded: returns the encoded images from one row up to another.
        object_id: names of the rows, for messages.
        stretch: of FITS cut-outs.
        skip_unreadable: whether the size may be that of a later row than the first.

    Raises:
        UserError: no image is readable or, without `skip_unreadable`, the first one is not.
    """

    def decode(value: Encoded, reduced: Counter) -> np.ndarray:
        if isinstance(value, Path) and is_fits(value):
            return read_cutout(value, stretch)
        with decoding():
            return decode_rgb(value, reduced)

    first_problem = None
    for row in range(count):
        try:
            size = check_square(decode(encoded(row, row + 1)[0], Counter()))
            return size, _batches(source, count, encoded, decode, size)
        except UnreadableImage as problem:
            if not skip_unreadable:
                raise unreadable(source, row, str(problem), object_id) from problem
            first_problem = first_problem or str(problem)
    raise none_readable(source, count, first_problem)


def check_square(image: np.ndarray, size: int | None = None) -> int:
    """The width and height of an image, or an `UnreadableImage` if it is not square, or not of this size."""
    height, width = image.shape[:2]
    if height != width or size not in (None, width):
        expected = f"{size} x {size}" if size else "square"
        raise UnreadableImage(
            f"is {width} x {height} pixels, not {expected}; crop or resize the images to squares of one size first"
        )
    return width


def _batches(
    source: str,
    count: int,
    encoded: Callable[[int, int], Sequence[Encoded]],
    decode: Callable[[Encoded, Counter], np.ndarray],
    size: int,
) -> Iterator[Batch]:
    step = min(_BATCH_ROWS, max(1, BATCH_BYTES // (3 * size * size)))
    reduced: Counter = Counter()
    for start in range(0, count, step):
        values = encoded(start, min(start + step, count))
        pixels = np.zeros((len(values), size, size, 3), np.uint8)
        problems = {}
        for i, value in enumerate(values):
            try:
                image = decode(value, reduced)
                check_square(image, size)
                pixels[i] = image
            except UnreadableImage as problem:
                problems[i] = str(problem)
        yield pixels, problems
    for loss, number in reduced.items():
        if number:
            logger.warning("%s: %d of %d images have %s", source, number, count, loss)


@contextmanager
def decoding() -> Iterator[None]:
    """Within the block, Pillow's warnings of metadata are ignored, and that of a huge image is an error.

    Entered by the main thread, because Python's filters of warnings are those of all threads.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of metadata, which are not used
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


def decode_rgb(value: Encoded, reduced: Counter) -> np.ndarray:
    """Decode an image of at most 8 bits per channel to RGB, (H, W, 3) uint8. Called within `decoding`.

    Args:
        value: the encoded image.
        reduced: counts what is lost: one more for an image with transparency, with several frames.

    Raises:
        UnreadableImage: it cannot be decoded, is too large, or has more than 8 bits per channel.
    """
    if isinstance(value, UnreadableImage):
        raise value
    try:
        image = Image.open(value if isinstance(value, Path) else io.BytesIO(value), formats=_IMAGE_FORMATS)
        with image:
            _check_header(image)
            reduced["transparency: it is ignored"] += image.has_transparency_data
            reduced["several frames: the first one is used"] += getattr(image, "is_animated", False)
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            return np.asarray(image.convert("RGB"))
    except UnreadableImage:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UnreadableImage(f"is larger than {MAX_IMAGE_SIZE} x {MAX_IMAGE_SIZE} pixels: crop it first") from error
    except Exception as error:  # Pillow's decoders raise whatever damaged bytes lead them to
        reason = "unknown format" if isinstance(error, UnidentifiedImageError) else first_line(error)[:200]
        raise UnreadableImage(
            f"cannot be decoded ({reason}); it must be a complete {', '.join(_IMAGE_FORMATS)} or FITS image"
        ) from error


def _check_header(image: Image.Image) -> None:
    """Check an image's size and number of bits before its pixels are decoded."""
    if not all(1 <= length <= MAX_IMAGE_SIZE for length in image.size):
        raise UnreadableImage(
            f"is {image.width} x {image.height} pixels; crop or resize it to between 1 and {MAX_IMAGE_SIZE}"
        )
    # Pillow reads colors of 16 bits as 8 bits; only the tile's raw mode, like "RGB;16B", says so.
    if image.mode == "F" or image.mode.startswith("I") or any(";16" in str(tile.args) for tile in image.tile):
        raise UnreadableImage(
            f"has more than 8 bits per channel (mode {image.mode}): "
            "convert the images to 0-255 first, with a suitable stretch"
        )

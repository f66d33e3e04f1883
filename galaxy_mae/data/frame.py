"""The frame: how an image of any size and shape becomes a square, in which the galaxy stands as a model knows it.

What a model has learned depends on how large a galaxy is in its image, and surveys differ in that: some cut out the
same angle for all, others a multiple of the galaxy's radius. `--fit` and `--arcsec` choose; docs/data.md lists them.
"""

import argparse
import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from galaxy_mae.data.fits import MAX_IMAGE_SIZE, UnreadableImage
from galaxy_mae.data.images import area_average
from galaxy_mae.errors import UserError

HALF_WIDTH = 1.25  # of the frame of `--fit galaxy`, in radii: docs/log.md, "The frame"
_CHOICES = "crop, pad, resize, galaxy, galaxy:RADII, or center:FRACTION as in center:0.5"
FIT_HELP = (
    "how images become squares: crop, the largest at the center; pad, all of the image, with black; resize, all, "
    "distorted; center:0.5, half the width of crop; galaxy, a multiple of the galaxy's radius; default: as the model "
    "was trained, and crop if there is none or it does not say"
)
ARCSEC_HELP = "width on the sky of what is cropped or padded, where the scale is known: a column pxscale, or a WCS"
_MEASURED = 96  # pixels, the width at which a galaxy's radius is measured: 1.5 ms an image
_LIGHT = 0.9  # the fraction of a galaxy's light within its radius
_THRESHOLD = 1.5  # of its pixels, in standard deviations of the background, as Source Extractor's default


@dataclass(frozen=True)
class Frame:
    """How images become squares.

    Attributes:
        kind: `crop`: the largest square at the center; `pad`: the complete image, with black beside it; `resize`: the
            complete image, distorted if it is not square; `center`: a part of `crop`; `galaxy`: a multiple of the
            galaxy's radius, and `crop` where that cannot be measured, or is more.
        amount: of `center` the fraction of the width; of `galaxy` half the width of the frame in radii.
        arcsec: width of the square of `crop` on the sky, with black where the image ends; None, and where the scale of
            an image is not known, is its own.
    """

    kind: str = "crop"
    amount: float | None = None
    arcsec: float | None = None

    @classmethod
    def parse(cls, text: str = "crop", arcsec: float | None = None) -> "Frame":
        """The frame of `--fit` and `--arcsec`. Raises a `UserError` if there is no such one."""
        kind, _, number = str(text).partition(":")
        try:
            amount, arcsec = float(number) if number else None, None if arcsec is None else float(arcsec)
        except (TypeError, ValueError):
            amount, kind = None, ""
        limits = {"crop": None, "pad": None, "resize": None, "center": (amount, 1), "galaxy": (amount or 1, 100)}
        limit = limits.get(kind, (0, 0))
        if (limit is None and number) or (limit and not (limit[0] and 0 < limit[0] <= limit[1])):
            raise UserError(f"--fit {text}: it must be {_CHOICES}")
        if arcsec is not None and not 0 < arcsec < math.inf:
            raise UserError(f"--arcsec {arcsec:g}: it must be above 0")
        return cls(kind, amount, arcsec)

    @classmethod
    def chosen(cls, fit: str | None, arcsec: float | None) -> "Frame | None":
        """That of `parse`, if the user gave one of the two flags."""
        return None if fit is None and arcsec is None else cls.parse(fit or "crop", arcsec)

    @classmethod
    def of(cls, about: dict[str, Any]) -> "Frame":
        """The frame whose `dataclasses.asdict` a file holds. Raises as `parse`."""
        amount = f":{about['amount']}" if about.get("amount") else ""
        return cls.parse(f"{about.get('kind')}{amount}", about.get("arcsec"))

    def widened(self, factor: float) -> "Frame":
        """The frame that shows more around it, for crops in which a galaxy becomes smaller. A `UserError` if none."""
        amount = self.amount or (HALF_WIDTH if self.kind == "galaxy" else None)
        if amount is None or (self.kind == "center" and amount * factor > 1):
            raise UserError(
                f"--max_crop_scale {factor**2:.4g}: --fit {self.kind} has nothing around it; use --fit galaxy, or a "
                f"--fit center:FRACTION of at most {1 / factor:.2f}"
            )
        return replace(self, amount=amount * factor)

    @staticmethod
    def add_flags(parser: argparse.ArgumentParser) -> None:
        """Add `--fit` and `--arcsec` to a parser."""
        parser.add_argument("--fit", metavar="FIT", help=FIT_HELP)
        parser.add_argument("--arcsec", type=float, metavar="WIDTH", help=ARCSEC_HELP)

    @property
    def fit(self) -> str:
        """The value of `--fit`."""
        return f"{self.kind}:{self.amount:g}" if self.amount else self.kind

    @property
    def needs_scale(self) -> bool:
        """Whether the scale of an image changes its frame, or gives its galaxy a radius on the sky."""
        return self.arcsec is not None or self.kind == "galaxy"

    def __str__(self) -> str:
        """What a cache of framed images is named by, beside their content."""
        return f"{self.kind} {self.amount} {self.arcsec}"

    def apply(self, image: np.ndarray, size: int | None, pixel_scale: float = math.nan) -> "Framed":
        """Frame an image and average it over areas to `size`; what is smaller is enlarged, bilinearly.

        Args:
            image: (H, W, 3) uint8.
            size: width and height of the result in pixels; None is that of the frame.
            pixel_scale: arcsec per pixel; NaN if unknown.

        Raises:
            UnreadableImage: the frame would be larger than 4096 pixels.
        """
        shape, radius = image.shape[:2], galaxy_radius(image) if self.kind == "galaxy" else math.nan
        width = self.width(shape, radius, pixel_scale)
        size = size or width
        if self.kind == "resize":
            square = np.asarray(Image.fromarray(image).resize((width, width), Image.Resampling.BILINEAR))
        else:
            square = _centered(image, width)
        if width > size:
            square = area_average(square[None], size)[0]
        elif width < size:
            square = np.asarray(Image.fromarray(square).resize((size, size), Image.Resampling.BILINEAR))
        return Framed(square, (shape[1], shape[0], width, radius, radius * pixel_scale))

    def width(self, shape: tuple[int, int], radius: float = math.nan, pixel_scale: float = math.nan) -> int:
        """The width of the frame of an image of `shape` in its pixels; what is unknown is NaN; raises as `apply`.

        It is even where the image's own is, so that both have one center, and a turned image gives a turned frame.
        """
        width = side = max(shape) if self.kind in ("pad", "resize") else min(shape)
        if self.arcsec and pixel_scale > 0 and self.kind != "resize":
            width = self.arcsec / pixel_scale
        if self.kind == "center":
            width *= self.amount
        if self.kind == "galaxy" and radius > 0:
            width = min(width, 2 * radius * (self.amount or HALF_WIDTH))
        if width > MAX_IMAGE_SIZE:
            raise UnreadableImage(
                f"would be {width:.0f} pixels wide, over {MAX_IMAGE_SIZE}: reduce it, or check --arcsec"
            )
        return max(2 - side % 2, side - 2 * round((side - width) / 2))


@dataclass(frozen=True)
class Framed:
    """(S, S, 3) uint8 pixels of an image in its frame, and the five numbers of its row of `geometry`."""

    pixels: np.ndarray
    numbers: tuple[float, ...]


UNREADABLE = (0, 0, 0, math.nan, math.nan)  # the numbers of an image that is none


def geometry(numbers: np.ndarray, frame: Frame) -> pa.Table:
    """Columns of a catalogue: the sizes of N images, and of their galaxies if the frame needed them.

    Args:
        numbers: (N, 5), of each image width, height, width of the frame, and radius of the galaxy in its pixels, and
            radius in arcsec; NaN if unknown.
        frame: what was applied.
    """
    radius = "radius with 90 % of the galaxy's light, measured on the stretched image"
    columns = [
        ("image_width", pa.int64(), "width of the image; 0 if it cannot be read", "pix"),
        ("image_height", pa.int64(), "height of the image", "pix"),
        ("frame_width", pa.int64(), "width of the part of it that the model sees", "pix"),
        ("radius", pa.float32(), radius, "pix"),
        ("radius_arcsec", pa.float32(), radius, "arcsec"),
    ][: 5 if frame.kind == "galaxy" else 3]
    fields = [pa.field(name, kind, True, {"description": text, "unit": unit}) for name, kind, text, unit in columns]
    values = (x.astype(field.type.to_pandas_dtype()) for x, field in zip(numbers.T, fields, strict=False))
    return pa.table(list(map(pa.array, values)), pa.schema(fields))


def _centered(image: np.ndarray, width: int) -> np.ndarray:
    """The square of some pixels at the center of an image, (width, width, 3) uint8, black where the image ends."""
    out = np.zeros((width, width, 3), np.uint8)
    (y, to_y, height), (x, to_x, across) = (
        (max(0, (length - width) // 2), max(0, (width - length) // 2), min(length, width)) for length in image.shape[:2]
    )
    out[to_y : to_y + height, to_x : to_x + across] = image[y : y + height, x : x + across]
    return out


def galaxy_radius(image: np.ndarray) -> float:
    """The radius of the circle with 90 % of the light of the galaxy at the center of an image, in its pixels.

    Measured by sep (Barbary 2016, JOSS 1, 58), Source Extractor as a library, on the mean of the channels: one
    background of the complete image, the deblended segment at the center, and its light about its barycenter. Light
    of a stretched image is not flux: the radius says how large the galaxy looks, not how large it is.

    Args:
        image: (H, W, 3) uint8; of it the largest square at the center is used.

    Returns:
        NaN where nothing stands at the center, or what does is smaller than a star or larger than the image.
    """
    import sep

    square = _centered(image, min(image.shape[:2]))
    size = min(_MEASURED, len(square))
    small = Image.fromarray(square).resize((size, size), Image.Resampling.BOX)
    light = np.asarray(small, np.float32).mean(axis=2)
    sep.set_extract_pixstack(_MEASURED**2)  # its default of 300,000 pixels is allocated in each call: 2 ms
    background = sep.Background(light, bw=size, bh=size)
    light -= background.globalback
    threshold = _THRESHOLD * max(background.globalrms, 1)  # JPEG's sky may be without noise
    try:
        objects, segments = sep.extract(light, threshold, segmentation_map=True)
    except Exception:  # it has no class of its own for an overflow of its buffers, as by noise
        return math.nan
    center = slice(size // 2 - max(1, size // 32), size // 2 + max(1, size // 32))
    found = segments[center, center]
    if not found.any():
        return math.nan
    segment = np.bincount(found[found > 0]).argmax()
    galaxy = objects[segment - 1]
    light[segments != segment] = 0
    radius, _ = sep.flux_radius(light, [galaxy["x"]], [galaxy["y"]], [float(size)], _LIGHT, subpix=1)
    return float(radius[0]) * len(square) / size if 1.5 <= radius[0] <= size / 2 else math.nan

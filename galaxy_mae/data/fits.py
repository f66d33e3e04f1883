"""FITS cut-outs: calibrated fluxes become 8-bit colors.

The pixels of a cut-out are floats over a large range, and how they are stretched decides what is visible. `Stretch` is
therefore part of a data set's fingerprint and of a recipe.
"""

import argparse
import dataclasses
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from galaxy_mae.errors import UserError, first_line

FITS_SUFFIXES = (".fits", ".fit")
MAX_IMAGE_SIZE = 4096  # pixels, as for --image_size: 50 MB decoded, more than any cut-out of one galaxy needs
_MAX_FLUX = 1e30  # anything beyond is clipped, so that no product overflows


class UnreadableImage(ValueError):
    """An image that cannot be used. The message says why, and continues "the image of row 3"."""


def check_size(width: int, height: int) -> None:
    """Raise an `UnreadableImage` if an image has no pixels, or too many to be decoded."""
    if not (1 <= width <= MAX_IMAGE_SIZE and 1 <= height <= MAX_IMAGE_SIZE):
        raise UnreadableImage(f"is {width} x {height} pixels; crop or resize it to between 1 and {MAX_IMAGE_SIZE}")


def _flag(default: Any, kind: type, description: str, **options: Any) -> Any:
    """A field of `Stretch` that is also a flag of the command line; its help names the range."""
    return field(default=default, metadata={"type": kind, "help": f"FITS: {description}", **options})


@dataclass(frozen=True)
class Stretch:
    """How FITS cut-outs become images of 8 bits. Each field is the flag of the same name.

    Three bands become blue, green and red by the arcsinh stretch of Lupton et al. 2004 (PASP 116, 133), in
    `astropy.visualization.make_lupton_rgb`. The defaults are for g, r and z in nanomaggies per pixel and have the curve
    of the Legacy Surveys' viewer: arcsinh(20 I) / sqrt(20), where I is the mean of 6.0 g, 3.4 r and 2.2 z, plus 0.03.
    One band becomes gray: `PercentileInterval`, then `AsinhStretch`, for any unit. `lupton_minimum` and
    `lupton_stretch` are scaled fluxes; `fits_bands` None takes the three bands of a cube. A value that is out of its
    range raises a `UserError`.
    """

    fits_bands: tuple[int, ...] | None = _flag(None, int, "three planes that become blue, green, red; from 0", nargs=3)
    lupton_scales: tuple[float, ...] = _flag((6.0, 3.4, 2.2), float, "three factors of these bands, above 0", nargs=3)
    lupton_minimum: float = _flag(-0.03, float, "scaled flux that is black")
    lupton_stretch: float = _flag(0.231, float, "linear stretch, above 0; lower: brighter")
    lupton_q: float = _flag(4.62, float, "arcsinh softening Q, above 0")
    asinh_a: float = _flag(0.1, float, "one band: arcsinh softening, above 0, at most 1")
    asinh_percentile: float = _flag(99.5, float, "one band: percentile interval, above 0, at most 100")

    def __post_init__(self):
        bands, scales = self.fits_bands, self.lupton_scales
        valid = {
            "fits_bands": bands is None or (len(bands) == len(set(bands)) == 3 and min(bands) >= 0),
            "lupton_scales": len(scales) == 3 and all(0 < scale < math.inf for scale in scales),
            "lupton_minimum": math.isfinite(self.lupton_minimum),
            "lupton_stretch": 0 < self.lupton_stretch < math.inf,
            "lupton_q": 0 < self.lupton_q < math.inf,
            "asinh_a": 0 < self.asinh_a <= 1,
            "asinh_percentile": 0 < self.asinh_percentile <= 100,
        }
        for f in dataclasses.fields(self):
            if not valid[f.name]:
                words = " ".join(map(str, np.ravel(getattr(self, f.name)).tolist()))
                raise UserError(f"--{f.name} {words}: out of its range ({f.metadata['help']})")

    @staticmethod
    def add_flags(parser: argparse.ArgumentParser) -> None:
        """Add one flag per field to a parser."""
        group = parser.add_argument_group("stretch of FITS cut-outs")
        for f in dataclasses.fields(Stretch):
            group.add_argument(
                f"--{f.name}", default=f.default, metavar=f.metadata["type"].__name__.upper(), **f.metadata
            )

    @classmethod
    def from_options(cls, options: object) -> "Stretch":
        """The stretch in an object that has its fields as attributes, lists in place of tuples."""
        values = {f.name: getattr(options, f.name) for f in dataclasses.fields(cls)}
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})

    def rgb(self, bands: np.ndarray) -> np.ndarray:
        """Stretch the bands of an image.

        Args:
            bands: (3, H, W) floats, in the order blue, green, red; or (1, H, W). NaN counts as 0.

        Returns:
            (H, W, 3) uint8.
        """
        from astropy.visualization import AsinhStretch, ManualInterval, PercentileInterval, make_lupton_rgb

        bands = np.nan_to_num(np.asarray(bands, np.float64), nan=0.0).clip(-_MAX_FLUX, _MAX_FLUX)
        if len(bands) == 1:
            gray = AsinhStretch(self.asinh_a)(PercentileInterval(self.asinh_percentile)(bands[0]))
            return np.rint(255 * gray).astype(np.uint8)[:, :, None].repeat(3, axis=2)
        blue, green, red = bands * np.reshape(self.lupton_scales, (3, 1, 1))
        interval = ManualInterval(vmin=self.lupton_minimum)
        return make_lupton_rgb(red, green, blue, interval=interval, stretch=self.lupton_stretch, Q=self.lupton_q)


def is_fits(path: Path) -> bool:
    return path.suffix.lower() in FITS_SUFFIXES


def read_cutout(path: Path, stretch: Stretch) -> np.ndarray:
    """Read the first image of a FITS file: one band (H, W) or (1, H, W), or a cube (bands, H, W).

    The first row of FITS is the lowest, that of the result the highest, as in the surveys' JPEG images.

    Returns:
        (H, W, 3) uint8.

    Raises:
        UnreadableImage: it is not FITS, truncated, too large, or has no such image.
    """
    from astropy.io import fits

    with open_fits(path) as hdus:
        hdu = next((hdu for hdu in hdus if hdu.is_image and hdu.shape), None)
        if hdu is None or len(hdu.shape) not in (2, 3) or isinstance(hdu, fits.CompImageHDU):
            axes = "(height, width) or (bands, height, width)"
            raise UnreadableImage(f"has no pixels, or other axes than {axes}, or is compressed: unpack it with funpack")
        *bands, height, width = hdu.shape
        check_size(width, height)
        check_complete(hdu, path)
        if not bands:
            planes = [hdu.section[:]]
        elif bands == [1]:
            planes = [hdu.section[0]]
        elif max(stretch.fits_bands or (0, 1, 2)) < bands[0] and (stretch.fits_bands or bands == [3]):
            planes = [hdu.section[band] for band in stretch.fits_bands or (0, 1, 2)]
        else:
            fix = "choose those for blue, green and red, counted from 0, as in --fits_bands 0 1 2"
            raise UnreadableImage(f"has {bands[0]} bands: {fix}")
        return stretch.rgb(np.stack(planes))[::-1]


@contextmanager
def open_fits(path: Path) -> Iterator:
    """The HDUs of a FITS file, within the block. Raises an `UnreadableImage` if it is not FITS, or damaged."""
    from astropy.io import fits

    try:
        with warnings.catch_warnings(), path.open("rb") as stream:
            warnings.simplefilter("ignore")  # of headers that are not standard, and of fluxes that are not finite
            if stream.read(9) != b"SIMPLE  =":  # astropy would unpack a compressed file of any size
                raise UnreadableImage("is not a FITS file")
            stream.seek(0)
            with fits.open(stream, memmap=False) as hdus:
                yield hdus
    except (UnreadableImage, UserError):
        raise
    except Exception as error:  # astropy raises whatever a damaged header leads it to
        if getattr(error, "errno", None):
            raise UnreadableImage(f"cannot be read ({error.strerror})") from error
        raise UnreadableImage(f"cannot be read as FITS ({first_line(error)[:200]})") from error


def check_complete(hdu, path: Path) -> None:
    """Raise an `UnreadableImage` if a file ends before what an HDU declares."""
    if not 0 <= hdu.size <= path.stat().st_size - hdu.fileinfo()["datLoc"]:
        raise UnreadableImage("is truncated: copy or download the file again")

"""FITS cut-outs: calibrated fluxes become 8-bit colors.

The pixels of a cut-out are floats over a large range, and how they are stretched decides what is visible. `Stretch` is
therefore part of a data set's fingerprint and of a recipe.
"""

import argparse
import dataclasses
import itertools
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from galaxy_mae.errors import UserError, first_line

FITS_SUFFIXES = (".fits", ".fit")
MAX_IMAGE_SIZE = 4096  # pixels, as for --image_size: 50 MB decoded, more than any cut-out of one galaxy needs
MAX_HDUS = 20  # in which an image or a table is looked for
_MAX_FLUX = 1e30  # anything beyond is clipped, so that no product overflows


class UnreadableImage(ValueError):
    """An image that cannot be used. The message says why, and continues "the image of row 3"."""


@dataclass(frozen=True)
class Stretch:
    """How FITS cut-outs become images of 8 bits. Each field is the flag of the same name.

    Three bands become blue, green and red by the arcsinh stretch of Lupton et al. 2004 (PASP 116, 133), in
    `astropy.visualization.make_lupton_rgb`. The defaults are for g, r and z in nanomaggies per pixel and have the curve
    of the Legacy Surveys' viewer: arcsinh(20 I) / sqrt(20), where I is the mean of 6.0 g, 3.4 r and 2.2 z, plus 0.03.
    One band becomes gray: `PercentileInterval`, then `AsinhStretch`, for any unit.

    Attributes:
        fits_bands: planes of a cube, counted from 0, that become blue, green and red; None takes the three of a cube.
        lupton_scales: factors of the bands that become blue, green and red, before the stretch.
        lupton_minimum: scaled flux that becomes black, nanomaggies per pixel.
        lupton_stretch: linear stretch, nanomaggies per pixel; lower is brighter.
        lupton_q: softening of the arcsinh.
        asinh_a: of one band, the fraction of the interval where the arcsinh turns from linear to logarithmic.
        asinh_percentile: of one band, percentage of the pixels in the interval, which excludes as many bright as faint.

    Raises:
        UserError: a value is out of its range.
    """

    fits_bands: tuple[int, ...] | None = field(
        default=None,
        metadata={"type": int, "nargs": 3, "help": "FITS: planes that become blue, green, red; from 0"},
    )
    lupton_scales: tuple[float, ...] = field(
        default=(6.0, 3.4, 2.2), metadata={"type": float, "nargs": 3, "help": "FITS: factors of these bands"}
    )
    lupton_minimum: float = field(default=-0.03, metadata={"type": float, "help": "FITS: scaled flux that is black"})
    lupton_stretch: float = field(
        default=0.231, metadata={"type": float, "help": "FITS: linear stretch; lower: brighter"}
    )
    lupton_q: float = field(default=4.62, metadata={"type": float, "help": "FITS: arcsinh softening Q"})
    asinh_a: float = field(default=0.1, metadata={"type": float, "help": "FITS, one band: arcsinh softening"})
    asinh_percentile: float = field(
        default=99.5, metadata={"type": float, "help": "FITS, one band: percentile interval"}
    )

    def __post_init__(self):
        bands = self.fits_bands
        if bands is not None and not (len(set(bands)) == len(bands) == 3 and min(bands) >= 0):
            raise UserError(f"--fits_bands {_words(bands)}: give three different planes, counted from 0")
        if len(self.lupton_scales) != 3 or not all(0 < scale < math.inf for scale in self.lupton_scales):
            raise UserError(f"--lupton_scales {_words(self.lupton_scales)}: give three numbers above 0")
        if not math.isfinite(self.lupton_minimum):
            raise UserError(f"--lupton_minimum {self.lupton_minimum}: it must be a finite number")
        if not 0 < self.lupton_stretch < math.inf:
            raise UserError(f"--lupton_stretch {self.lupton_stretch}: it must be a number above 0")
        if not 0 < self.lupton_q < math.inf:
            raise UserError(f"--lupton_q {self.lupton_q}: it must be a number above 0")
        if not 0 < self.asinh_a <= 1:
            raise UserError(f"--asinh_a {self.asinh_a}: it must be above 0 and at most 1")
        if not 0 < self.asinh_percentile <= 100:
            raise UserError(f"--asinh_percentile {self.asinh_percentile}: it must be above 0 and at most 100")

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
        """The stretch in an object that has its fields as attributes, lists in place of tuples.

        Raises:
            UserError: a value is out of its range.
        """
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


def _words(values: tuple) -> str:
    return " ".join(map(str, values))


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
    with open_fits(path) as hdus:
        images = (hdu for hdu in itertools.islice(hdus, MAX_HDUS) if hdu.is_image and hdu.shape)
        hdu = next(images, None)
        _check_image(hdu, path)
        bands = _bands(hdu.shape, stretch)
        planes = [hdu.section[b] if len(hdu.shape) == 3 else hdu.section[:] for b in bands]
        return stretch.rgb(np.stack(planes))[::-1]


@contextmanager
def open_fits(path: Path) -> Iterator:
    """The HDUs of a FITS file, within the block.

    Raises:
        UnreadableImage: it is not FITS, or damaged.
    """
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
        raise UnreadableImage(f"cannot be read as FITS ({first_line(error)[:200]})") from error


def check_complete(hdu, path: Path) -> None:
    """Raise an `UnreadableImage` if a file ends before what an HDU declares."""
    if not 0 <= hdu.size <= path.stat().st_size - hdu.fileinfo()["datLoc"]:
        raise UnreadableImage("is truncated: copy or download the file again")


def _check_image(hdu, path: Path) -> None:
    """Check what an HDU declares before its pixels are read."""
    from astropy.io import fits

    if hdu is None:
        raise UnreadableImage("has no pixels: no image in the primary HDU or an extension")
    if isinstance(hdu, fits.CompImageHDU):
        raise UnreadableImage("is a compressed FITS image: unpack it with funpack")
    if len(hdu.shape) not in (2, 3):
        raise UnreadableImage(f"has {len(hdu.shape)} axes: it must be (height, width) or (bands, height, width)")
    height, width = hdu.shape[-2:]
    if not (1 <= width <= MAX_IMAGE_SIZE and 1 <= height <= MAX_IMAGE_SIZE):
        raise UnreadableImage(f"is {width} x {height} pixels; crop or resize it to between 1 and {MAX_IMAGE_SIZE}")
    check_complete(hdu, path)


def _bands(shape: tuple[int, ...], stretch: Stretch) -> tuple[int, ...]:
    """The planes of an image that are read: blue, green, red, or the only one."""
    count = 1 if len(shape) == 2 else shape[0]
    if count == 1:
        return (0,)
    if stretch.fits_bands is None and count != 3:
        raise UnreadableImage(f"has {count} bands: choose those for blue, green and red, as in --fits_bands 0 1 2")
    bands = stretch.fits_bands or (0, 1, 2)
    if max(bands) >= count:
        raise UnreadableImage(f"has {count} bands, and --fits_bands {_words(bands)} counts them from 0")
    return bands

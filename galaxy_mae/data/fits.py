"""FITS cut-outs: calibrated fluxes become 8-bit colors.

The pixels of a cut-out are floats over a large range, and how they are stretched decides what is visible. `Stretch` is
therefore part of a data set's fingerprint and of a recipe.
"""

import bz2
import dataclasses
import gzip
import io
import json
import math
import re
import warnings
from collections import ChainMap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from galaxy_mae.errors import UserError, first_line
from galaxy_mae.files import check_decoded, read_settings

FITS_SUFFIXES = tuple(name + packed for packed in ("", ".gz", ".bz2", ".fz") for name in (".fits", ".fit", ".fts"))
MAX_IMAGE_SIZE = 4096  # pixels, as for --image_size: 50 MB decoded, more than any cut-out of one galaxy needs
STRETCH_HELP = (
    "how FITS cut-outs and fluxes become images: legacy, sdss, hsc, hst, asinh, linear, or a YAML file (docs/data.md); "
    "auto: what the header tells, else legacy for three bands and asinh for one"
)
_MAX_FLUX = 1e30  # anything beyond is clipped, so that no product overflows
_MAX_UNPACKED = 1 << 29  # bytes of an unpacked file: the largest image in eight bytes and four bands
_WAVELENGTHS = "ugrizyjhk"  # bands, from blue to red
_SURVEYS = {"legacy": "legacy ?survey|decals", "sdss": "sdss", "hsc": r"\bhsc|hyper.?suprime", "hst": r"\bhst\b"}
_BAND = re.compile(r"(?:.*[-_ .])?([ugrizyjhk]|f\d{3,4}[a-z]+)")  # the name of an extension, as in `HSC-G`, `F814W`
# Words in the names of extensions that hold no image of a galaxy.
_NO_IMAGE = re.compile(
    r"(?:.*[^A-Z])?(AREA|BAD|BKG|CON|COV|CTX|DQ|ERR(OR)?|EXP(TIME)?|FLAGS?|I(NV)?VAR|MA?SKS?|MODEL|N?EXP|NOISE|PSF|"
    r"QUALITY|RESIDUAL|RMS|SEG(MENTATION)?|SIGMA|SKY|STD|UNC|UNCERT(AINTY)?|VAR(IANCE)?|W[GH]?T|WEIGHTS?)(?:[^A-Z].*)?"
)


class UnreadableImage(ValueError):
    """An image that cannot be used. The message says why, and continues "the image of row 3"."""


def check_size(width: int, height: int) -> None:
    """Raise an `UnreadableImage` if an image has no pixels, or too many to be decoded."""
    if not (1 <= width <= MAX_IMAGE_SIZE and 1 <= height <= MAX_IMAGE_SIZE):
        raise UnreadableImage(f"is {width} x {height} pixels; crop or resize it to between 1 and {MAX_IMAGE_SIZE}")


@dataclass(frozen=True)
class Curve:
    """A formula that makes colors from fluxes. A YAML file of `--stretch` has some of its fields, and a `preset`.

    With x = scales * flux + offset, and I the mean of the three x, each at least 0, the color is
    x * arcsinh(q I) / (I * divisor), less `black`, divided by `white` - `black`, and clipped to 0..1.

    Attributes:
        bands: that become blue, green and red: their names, or their numbers from 0; empty for any three.
        scales: factors of these bands. They are for fluxes of which 1 has the AB magnitude `zero_point`.
        offset: added to the scaled flux.
        percentile: in place of scales and offset, x is 0 to 1 over this percentage of the image's finite pixels.
        q: softening of the arcsinh; 0 is linear.
        joint: whether the bands have one I and one interval, which keeps colors; else each its own.
        keep_color: where a band is above 1, divide all by the largest; else it is clipped, and a nucleus is white.
    """

    bands: tuple[str | int, ...] = ()
    scales: tuple[float, ...] = (1.0, 1.0, 1.0)
    zero_point: float | None = None
    offset: float = 0.0
    percentile: float | None = None
    q: float = 0.0
    divisor: float = 1.0
    joint: bool = True
    black: float = 0.0
    white: float = 1.0
    keep_color: bool = False

    def rgb(self, bands: np.ndarray) -> np.ndarray:
        """Stretch the bands of an image.

        Args:
            bands: (3, H, W) floats, in the order blue, green, red; or (1, H, W). A pixel is black if a band is NaN.

        Returns:
            (H, W, 3) uint8.

        Raises:
            UnreadableImage: no pixel is finite.
        """
        bands = np.asarray(bands, np.float64)
        missing, finite = np.isnan(bands).any(axis=0), np.isfinite(bands)
        if not finite.all(axis=0).any():
            raise UnreadableImage("has no pixel with a finite flux in all bands")
        x = np.where(missing, 0, bands).clip(-_MAX_FLUX, _MAX_FLUX)
        if self.percentile:
            for part in [slice(None)] if self.joint else map(slice, range(len(x)), range(1, len(x) + 1)):
                tail = (100 - self.percentile) / 2
                low, high = np.percentile(x[part][finite[part]], [tail, 100 - tail])
                x[part] = ((x[part] - low) / ((high - low) or 1)).clip(0, 1)
        else:
            x = x * np.reshape(self.scales, (3, 1, 1)) + self.offset
        if self.q:
            intensity = x.clip(0).mean(axis=0, keepdims=True) if self.joint else x
            ratio = np.full_like(intensity, self.q)
            x = x * np.divide(np.arcsinh(self.q * intensity), intensity, out=ratio, where=intensity != 0)
        x = (x / self.divisor - self.black) / (self.white - self.black)
        if self.keep_color:
            x /= x.max(axis=0).clip(1)
        pixels = np.rint(255 * np.where(missing, 0, x).clip(0, 1)).astype(np.uint8)
        return np.broadcast_to(pixels[::-1], (3, *pixels.shape[1:])).transpose(1, 2, 0).copy()


PRESETS = {
    # The Legacy Surveys' viewer: `sdss_rgb`, `dr2_rgb` in map/views.py of https://github.com/legacysurvey/imagine, in
    # nanomaggies per pixel. It clips to white, where Lupton et al. 2004 (PASP 116, 133) keep the color.
    "legacy": Curve(("g", "r", "z"), (6.0, 3.4, 2.2), 22.5, offset=0.03, q=20.0, divisor=math.sqrt(20)),
    # The JPEGs of SDSS frames since DR8 (frame-irg-*.jpg): `sdss_frame_jpg` of photoop, 0.4 * (9, 6.5, 5) for g, r, i,
    # in nanomaggies per pixel, nonlinearity 2.25 of the sum of the bands. Its cut at 30 nanomaggies is left out.
    "sdss": Curve(("g", "r", "i"), (3.6, 2.6, 2.0), 22.5, q=6.75, divisor=6.75, keep_color=True),
    # Hyper Suprime-Cam: `hscColor` of colorPostage.py, https://hsc-gitlab.mtk.nao.ac.jp/ssp-software/data-access-tools
    # (PDR3), for counts of its coadds, whose zero point is 27; each band is scaled to magnitude 19.
    "hsc": Curve(
        ("g", "r", "i"), (10**-3.2,) * 3, 27.0, 0.0, None, math.exp(10), math.asinh(math.exp(10)), False, -0.05, 2 / 3
    ),
    # The Hubble Legacy Archive's previews, https://hla.stsci.edu/fitscutcgi_interface.html: of each band, percentiles
    # 0.5 to 99.5, arcsinh. That page does not give its softening: it is that of `asinh`.
    "hst": Curve(percentile=99.0, q=10.0, divisor=math.asinh(10), joint=False),
    # `PercentileInterval` and `AsinhStretch` of astropy.visualization, whose default a is 0.1 = 1 / q; for any unit.
    "asinh": Curve(percentile=99.5, q=10.0, divisor=math.asinh(10)),
    "linear": Curve(percentile=99.5),
}


@dataclass(frozen=True)
class Stretch:
    """The value of `--stretch`: a name of `PRESETS`, or `auto`; and as JSON what a file changes of it."""

    preset: str = "auto"
    changes: str = "{}"

    def __post_init__(self):
        if self.preset not in ("auto", *PRESETS):
            raise ValueError(f"there is no stretch {str(self.preset)[:50]!r}")
        self._changed(PRESETS["legacy" if self.preset == "auto" else self.preset])

    @classmethod
    def named(cls, value: str) -> "Stretch":
        """That of a flag: a preset or a YAML file. Raises a `UserError` if it is neither."""
        if value in ("auto", *PRESETS):
            return cls(value)
        import yaml

        try:
            changes = yaml.safe_load(read_settings(Path(value)))
            return cls(changes.pop("preset", "auto"), json.dumps(changes, sort_keys=True))
        except OSError as error:
            names = ", ".join(("auto", *PRESETS))
            raise UserError(f"--stretch {value}: none of {names}, nor a YAML file ({error.strerror})") from error
        except (yaml.YAMLError, ValueError, TypeError, AttributeError) as error:
            wrong = f"not a stretch ({first_line(error)[:200]})"
            raise UserError(f"--stretch {value}: {wrong}; its fields are in docs/data.md") from error

    def _changed(self, curve: Curve) -> Curve:
        """A curve with the changes of the file. Raises a ValueError or TypeError if they make no curve."""
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(self.changes).items()}
        curve = dataclasses.replace(curve, **values)
        numbers = [*curve.scales, curve.offset, curve.q, curve.divisor, curve.black, curve.white]
        valid = {
            "bands": len(curve.bands) in (0, 3) and len({*curve.bands}) == len(curve.bands),
            "scales": len(curve.scales) == 3 and min(curve.scales) > 0 and all(map(math.isfinite, numbers)),
            "percentile": curve.percentile is None or 0 < curve.percentile <= 100,
            "q": curve.q >= 0 and curve.divisor > 0 and curve.white > curve.black,
        }
        if wrong := [name for name, is_valid in valid.items() if not is_valid]:
            raise ValueError(f"`{wrong[0]}` is out of its range")
        return curve

    def resolve(self, names: Sequence[str], header: Mapping[str, Any]) -> tuple[Curve, list[int], list[str]]:
        """The curve for an image, in its unit; its planes that become blue, green and red, or gray; what was assumed.

        `names` are those of its bands, empty where they are not known. Raises an `UnreadableImage` if it is not known
        which planes these are.
        """
        words = " ".join(str(header.get(key, "")) for key in ("SURVEY", "TELESCOP", "INSTRUME", "ORIGIN")).lower()
        known = next((name for name, pattern in _SURVEYS.items() if re.search(pattern, words)), None)
        unit, preset, assumed, is_gray = _nanomaggies(header), self.preset, [], len(names) == 1
        if preset == "auto":
            named = [name for name in ("legacy", "sdss") if {*PRESETS[name].bands} <= {*names}]
            preset = known or next(iter(named), "legacy")
        if is_gray and not PRESETS[preset].percentile:
            preset = "asinh"  # the others need three
        if preset != self.preset and preset != known and (is_gray or not unit):
            what = "one band" if is_gray else "three bands, and no survey or unit that is known in their header"
            assumed.append(f"{what}: --stretch {preset} is assumed")
        curve = PRESETS[preset] if is_gray and self.preset not in ("auto", preset) else self._changed(PRESETS[preset])
        if curve.zero_point is not None and unit:
            factor = unit * 10 ** (0.4 * (curve.zero_point - 22.5))
            curve = dataclasses.replace(curve, scales=tuple(factor * scale for scale in curve.scales))
        planes = [names.index(band) if band in names else band for band in curve.bands]
        if is_gray:
            planes = [0]
        elif len(names) == 3 and not (planes and {*planes} <= {0, 1, 2}):
            planes = sorted(range(3), key=lambda i: _WAVELENGTHS.find(names[i]) if all(names) else i)
        if not planes or not {*planes} <= {*range(len(names))}:
            fix = "choose those for blue, green and red, from 0, by `bands: [0, 1, 2]` in a YAML file of --stretch"
            raise UnreadableImage(f"has {len(names)} bands: {fix}")
        return curve, planes, assumed


def _nanomaggies(header: Mapping[str, Any]) -> float | None:
    """What a flux of 1 is in nanomaggies (3631 nJy each), by the zero point or unit in a header; None if unknown."""
    from astropy import units

    with suppress(ValueError, TypeError, ZeroDivisionError):
        if zero_flux := header.get("FLUXMAG0"):
            return 1e9 / float(zero_flux)
        if unit := str(header.get("BUNIT", "")).strip():
            return 1.0 if unit.lower().startswith("nanomagg") else units.Unit(unit).to(units.nJy) / 3631
    return None


class Extension(NamedTuple):
    """The image in an extension of a FITS file that holds several galaxies; `index` is as in `file.fits[index]`."""

    path: Path
    index: int


@dataclass(frozen=True)
class Cutout:
    """Fluxes, (1 or 3, H, W) floats whose first row is the lowest; their curve; and what was assumed or left out.

    `header` is that of the image in its file.
    """

    bands: np.ndarray
    curve: Curve
    notes: list[str]
    header: Mapping[str, Any] | None = None

    @property
    def nan_fraction(self) -> float:
        """Of the pixels, how many are NaN in a band."""
        return float(np.isnan(self.bands).any(axis=0).mean())

    @property
    def pixel_scale(self) -> float:
        """Arcsec per pixel, by the WCS in the header; NaN if there is none."""
        from astropy.wcs import WCS, utils

        with suppress(Exception), warnings.catch_warnings(action="ignore"):  # headers can hold anything
            wcs = WCS(self.header).celestial
            if wcs.has_celestial:
                return float(utils.proj_plane_pixel_scales(wcs).mean()) * 3600
        return math.nan

    def rgb(self) -> np.ndarray:
        """(H, W, 3) uint8, the highest row first, as in the surveys' JPEG images. Raises as `Curve.rgb`."""
        return self.curve.rgb(self.bands)[::-1]


def is_fits(path: Path) -> bool:
    return path.name.lower().endswith(FITS_SUFFIXES)


def read_cutout(file: Path | Extension, stretch: Stretch) -> Cutout:
    """Read the image of a FITS file: one band (H, W), a cube (bands, H, W), or a band in each of several extensions.

    Axes of length 1 are dropped. Of several images, the first one is read.

    Raises:
        UnreadableImage: it is not FITS, truncated, too large, or has no such image.
    """
    path, index = file if isinstance(file, Extension) else (file, None)
    with open_fits(path) as hdus:
        images, names = _images(hdus)
        used = list(images.values()) if names else [hdus[index]] if index is not None else list(images.values())[:1]
        if not used or len(used[0].shape) < 2 or sum(n > 1 for n in used[0].shape[:-2]) > 1:
            raise UnreadableImage("has no pixels, or other axes than (height, width) or (bands, height, width)")
        *leading, height, width = used[0].shape
        check_size(width, height)
        for hdu in used:
            check_complete(hdu)
        header, count = ChainMap(used[0].header, hdus[0].header), math.prod(leading)
        told = str(header.get("BANDS", "")).strip().lower()
        names = names or (list(told) if len(told) == count else [""] * count)
        curve, planes, notes = stretch.resolve(names, header)
        places = [(used[k], 0) if len(used) > 1 else (used[0], k) for k in planes]
        bands = [hdu.section[tuple(k if n > 1 else 0 for n in leading) or ...] for hdu, k in places]
    if index is None and len(images) > len(used):
        notes.append("more images in their FITS file: the first one is used")
    return Cutout(np.stack(bands), curve, notes, used[0].header)


def galaxies_in(path: Path) -> list[Extension]:
    """The images of a FITS file: all, a galaxy each, if they have one size, else the first; none if it is damaged."""
    with suppress(UnreadableImage), open_fits(path) as hdus:
        images, names = _images(hdus)
        # Beside an image in the primary HDU, one without a name may be its variance.
        unnamed = 0 in images and not any(hdu.name for i, hdu in images.items() if i)
        is_one = names or unnamed or len({hdu.shape for hdu in images.values()}) > 1
        return [Extension(path, i) for i in images][: 1 if is_one else None]
    return []


def _images(hdus) -> tuple[dict[int, Any], list[str]]:
    """The HDUs that hold images of galaxies, by number; and the names of their bands, if each is one of one galaxy."""
    images = {}
    try:
        for i, hdu in enumerate(hdus):
            if hdu.is_image and hdu.shape and not _NO_IMAGE.fullmatch(hdu.name):
                images[i] = hdu
    except OSError:
        if len(images) != 1:  # what follows the only image may be anything
            raise
    floats = {i: hdu for i, hdu in images.items() if hdu.header["BITPIX"] < 0}  # others are maps beside them
    images = floats or images
    images = {i: hdu for i, hdu in images.items() if hdu.name in ("SCI", "IMAGE")} or images
    bands = [match[1] if (match := _BAND.fullmatch(hdu.name.lower())) else "" for hdu in images.values()]
    shapes = {hdu.shape for hdu in images.values()}
    is_galaxy = all(bands) and len({*bands}) == len(bands) > 1 and len(shapes) == 1 and len(min(shapes)) == 2
    return images, bands if is_galaxy else []


@contextmanager
def open_fits(path: Path) -> Iterator:
    """The HDUs of a FITS file, within the block. Raises an `UnreadableImage` if it is not FITS, or damaged."""
    from astropy.io import fits

    try:
        # Warnings are of headers that are not standard, and of fluxes that are not finite.
        with warnings.catch_warnings(action="ignore"), path.open("rb") as stream:
            start = stream.read(2)
            stream.seek(0)
            packed = {b"\x1f\x8b": gzip.open, b"BZ": bz2.open}.get(start)
            opened = packed(stream) if packed else stream
            if opened.read(9) != b"SIMPLE  =":
                raise UnreadableImage("is not a FITS file")
            opened.seek(0)
            with fits.open(_unpacked(opened) if packed else opened, memmap=False) as hdus:
                yield hdus
    except (UnreadableImage, UserError):
        raise
    except Exception as error:  # astropy raises whatever a damaged header leads it to
        if getattr(error, "errno", None):
            raise UnreadableImage(f"cannot be read ({error.strerror})") from error
        raise UnreadableImage(f"cannot be read as FITS ({first_line(error)[:200]})") from error


def _unpacked(stream) -> io.BytesIO:
    """The content of a compressed file, of which astropy would unpack any size."""
    content = io.BytesIO()
    while block := stream.read(1 << 20):
        if content.tell() + len(block) > _MAX_UNPACKED:
            raise UnreadableImage(f"is larger than {_MAX_UNPACKED >> 20} MB when it is unpacked; crop it")
        content.write(block)
    content.seek(0)
    return content


def check_complete(hdu) -> None:
    """Raise an `UnreadableImage` if a file ends before what an HDU declares, or an HDU unpacks to too much."""
    place = hdu.fileinfo()
    if (tile := getattr(hdu, "tile_shape", None)) and math.prod(map(int, tile)) * 8 > _MAX_UNPACKED:
        raise UnreadableImage(f"is compressed in tiles that are larger than {_MAX_UNPACKED >> 20} MB")
    if not 0 <= (place["datSpan"] if tile else hdu.size) <= place["file"].size - place["datLoc"]:
        raise UnreadableImage("is truncated: copy or download the file again")


def check_table(hdu, path: Path) -> None:
    """As `check_complete`, for a table, which must not take far more memory than its file either (`UserError`)."""
    check_complete(hdu)
    check_decoded(hdu.size, path)

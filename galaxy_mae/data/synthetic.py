"""Procedural galaxies of the ten Galaxy10 DECaLS classes: a dataset that needs no download, no licence and no disk.

All later stages (batches, pre-training, probes, figures) can be run and tested on it, on a laptop or on a node without
network. A galaxy is rendered as the survey would observe it. Sersic bulges, exponential discs, Ferrers bars,
logarithmic arms, edge-on discs and tidal debris form a scene in three bands (g, r, z), in nanomaggies per square
arcsec. Stars and background galaxies are added. The scene is blurred by the seeing, averaged over the detector's
pixels, given the noise of the sky, and turned into a color image by an asinh stretch.

Lengths are angles, never pixels. The scene is always computed at the survey's own sampling of 0.262 arcsec, and the
image size only sets how many pixels the detector has over the same 67 arcsec. A galaxy of 64 pixels is therefore the
binned version of the same galaxy at 256 pixels. All classes share the distributions of size, brightness, redshift and
color, so that a class has to be recognized by its morphology.

Galaxy i has class i % 10 and is a pure function of (seed, i), which are the key of the counter-based generator Philox.
All images are float32. The scalars that multiply them must be Python floats, so that NumPy does not promote them to
float64.
"""

import math
from functools import lru_cache
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from galaxy_mae.errors import UserError

FIELD_OF_VIEW = 67.072  # arcsec: 256 pixels of 0.262 arcsec
_SCENE_SIZE = 256
_SAMPLE = FIELD_OF_VIEW / _SCENE_SIZE  # arcsec
_MIN_SIZE = 16

# Stellar populations as flux in g, r, z relative to r: an old bulge (g-r 0.97, r-z 0.65), a disc, young arms.
_OLD = np.array([0.41, 1.0, 1.82], np.float32)
_DISC = np.array([0.51, 1.0, 1.60], np.float32)
_YOUNG = np.array([0.74, 1.0, 1.38], np.float32)
_DUST_OPACITY = np.array([1.39, 1.0, 0.56], np.float32)  # Cardelli et al. 1989, R_V = 3.1, relative to r

_SEEING = np.array([1.30, 1.20, 1.12])  # arcsec, median FWHM in g, r, z (Dey et al. 2019)
_NOISE = np.array([0.036, 0.062, 0.12], np.float32)  # nanomaggies per square arcsec in a pixel of 0.262 arcsec
_DISPLAY = np.array([6.0, 3.4, 2.2], np.float32) * 0.0686  # the Legacy Surveys' weights of g, r, z for blue, green, red
_SOFTENING, _LEVELS = 4.5, 55.0  # of the asinh: where it becomes logarithmic, and grey levels per e-fold

Image = np.ndarray  # (256, 256) float32


# ----------------------------------------------------------------------------------------------------- public interface


def labels(count: int) -> np.ndarray:
    """Return the classes of the first `count` galaxies, (count,) int64, in Galaxy10's order: galaxy i has class i % 10.

    Raises:
        UserError: count below 1.
    """
    if count < 1:
        raise UserError(f"{count} synthetic galaxies: the number must be at least 1")
    return np.arange(count, dtype=np.int64) % 10


def catalogue(count: int, size: int = 256, seed: int = 0) -> dict[str, np.ndarray]:
    """Return the catalogue of the first `count` galaxies. The entry of a galaxy does not depend on `count`.

    Positions follow the R2 low-discrepancy sequence (Roberts 2018), uniformly on the sphere, over two regions with the
    extent of DECaLS. No two of the first 20 000 are closer than 5 arcmin, so no two images overlap on the sky.

    Args:
        count: number of galaxies.
        size: width and height of the images in pixels; sets the pixel scale.
        seed: shifts the positions.

    Returns:
        `label` (count,) int64; `ra`, `dec` (J2000, degrees) and `pixel_scale` (arcsec per pixel), (count,) float64.

    Raises:
        UserError: count below 1, size below 16, or a negative seed.
    """
    _check_size(size)
    label = labels(count)
    shift = _generator(seed, 2**63).random(2)  # an index that no image has
    plastic = 1.32471795724474602596  # the root of x^3 = x + 1: the plastic number, which generates the R2 sequence
    across, up = (shift[:, None] + np.arange(1, count + 1) / plastic ** np.array([[1], [2]])) % 1
    along = 235 * across  # the southern cap spans 105 degrees of right ascension, the northern cap 130
    ra = np.where(along < 105, (315 + along) % 360, 15 + along)
    low, high = np.sin(np.deg2rad([-15.0, 30.0]))
    return {
        "label": label,
        "ra": ra,
        "dec": np.rad2deg(np.arcsin(low + (high - low) * up)),
        "pixel_scale": np.full(count, FIELD_OF_VIEW / size),
    }


def render(indices: np.ndarray, size: int = 256, seed: int = 0) -> np.ndarray:
    """Render galaxies. The image of galaxy i depends only on (seed, i, size), not on the other galaxies.

    Args:
        indices: (B,) integers >= 0; galaxy i has class i % 10.
        size: width and height in pixels, >= 16; the field of view is always 67 arcsec.
        seed: >= 0; each seed gives different galaxies.

    Returns:
        (B, size, size, 3) uint8, RGB.

    Raises:
        UserError: size below 16, or a negative index or seed.
    """
    _check_size(size)
    images = np.empty((len(indices), size, size, 3), np.uint8)
    for image, index in zip(images, indices, strict=True):
        generator = _generator(seed, int(index))
        sky = _observe(_scene(int(index) % 10, generator), size, generator)
        sky += _sky_noise(size, generator)
        image[:] = _stretch(sky)
    return images


def _check_size(size: int) -> None:
    if size < _MIN_SIZE:
        raise UserError(f"synthetic galaxies of {size} pixels: the image size must be at least {_MIN_SIZE}")


def _generator(seed: int, index: int) -> np.random.Generator:
    if seed < 0 or index < 0:
        raise UserError(f"synthetic galaxy {index} of seed {seed}: the index and the seed must not be negative")
    return np.random.Generator(np.random.Philox(key=[seed, index]))


# ---------------------------------------------------------------------------------------------------------- observation


def _observe(scene: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """Blur a (3, 256, 256) scene by the seeing and average it over the detector's pixels, to (3, size, size).

    The point-spread function is that of Moffat (1969), beta = 3.5, approximated to 0.02 % of its power by two Gaussians
    of equal flux. A Gaussian is separable, so blurring and sampling are one banded matrix along each axis.
    """
    seeing = _SEEING * np.exp(rng.normal(0, 0.08))
    coarse = _binning(4)
    wings = coarse @ scene @ coarse.T  # the wider Gaussian does not resolve the finest samples
    observed = np.empty((3, size, size), np.float32)
    for band, fwhm in enumerate(np.round(seeing * 20) / 20):  # rounded: all galaxies share a few cached matrices
        core = _detector(size, _SCENE_SIZE, 0.385 * fwhm)
        wing = _detector(size, _SCENE_SIZE // 4, 0.72 * fwhm)
        observed[band] = _apply(core, _apply(core, scene[band]).T).T
        observed[band] += _apply(wing, _apply(wing, wings[band]).T).T
    return observed


def _apply(detector: list[tuple[slice, np.ndarray]], light: np.ndarray) -> np.ndarray:
    """Multiply the banded matrix of `_detector` with (samples, M) light."""
    return np.concatenate([block @ light[samples] for samples, block in detector])


@lru_cache(maxsize=256)
def _detector(size: int, samples: int, sigma: float) -> list[tuple[slice, np.ndarray]]:
    """Return the (size, samples) matrix that blurs samples by a Gaussian and averages the result over each pixel.

    The matrix is banded. It is returned as blocks of rows, each with the slice of samples that it needs. This saves two
    thirds of the multiplications.
    """
    width = FIELD_OF_VIEW / samples
    sigma = math.sqrt(sigma**2 - (width**2 - _SAMPLE**2) / 12)  # a wide sample already has some width of its own
    edges = np.linspace(0, FIELD_OF_VIEW, size + 1)[:, None]
    centers = (np.arange(samples) + 0.5) * width
    distance = (edges - centers) / (math.sqrt(2) * sigma)
    cumulative, near = np.sign(distance), np.abs(distance) < 4
    cumulative[near] = [math.erf(value) for value in distance[near]]
    weights = np.diff(cumulative, axis=0) / 2 * width / (FIELD_OF_VIEW / size)
    weights = (weights * math.sqrt(0.5)).astype(np.float32)  # each Gaussian has half of the flux
    blocks = []
    for rows in np.array_split(weights, 4):
        used = np.flatnonzero(rows.max(axis=0) > 1e-6 * weights.max())
        near = slice(int(used[0]), int(used[-1]) + 1)
        blocks.append((near, np.ascontiguousarray(rows[:, near])))
    return blocks


@lru_cache(maxsize=1)
def _binning(factor: int) -> np.ndarray:
    return np.kron(np.eye(_SCENE_SIZE // factor), np.full((1, factor), 1 / factor)).astype(np.float32)


def _sky_noise(size: int, rng: np.random.Generator) -> np.ndarray:
    """Return the white Gaussian noise of the sky, (3, size, size), in the units of the scene."""
    # Binning averages the noise of the 0.262 arcsec pixels, so wider pixels have less noise.
    depth = np.exp(rng.normal(0, 0.25)) * size / _SCENE_SIZE
    # Looking up quantiles by random integers is four times faster than the generator's own normal distribution.
    noise = np.take(_normal_quantiles(), rng.integers(0, 1 << 16, (3, size, size), np.uint16))
    noise *= (depth * _NOISE).astype(np.float32)[:, None, None]
    return noise


@lru_cache(maxsize=1)
def _normal_quantiles() -> np.ndarray:
    steps = 1 << 12  # fine enough for 8 bits; the table of 256 KiB fits in the CPU cache
    quantiles = [NormalDist().inv_cdf((step + 0.5) / steps) for step in range(steps)]
    return np.repeat(np.array(quantiles, np.float32), (1 << 16) // steps)


def _stretch(sky: np.ndarray) -> np.ndarray:
    """Turn (3, S, S) surface brightness in g, r, z into an (S, S, 3) uint8 RGB image (Lupton et al. 2004).

    The asinh compresses the mean of the bands and all bands are scaled by the same factor, so bright pixels keep their
    color.
    """
    planes = sky * _DISPLAY[:, None, None]
    intensity = np.abs(planes[0] + planes[1] + planes[2]) + 1e-6
    intensity *= _SOFTENING / 3
    planes *= np.arcsinh(intensity) * (_SOFTENING * _LEVELS) / intensity
    planes += 7  # the sky is not completely black
    np.clip(planes, 0, 255, out=planes)
    blue, green, red = planes.astype(np.uint8)
    image = np.empty((*red.shape, 3), np.uint8)
    for channel, plane in enumerate((red, green, blue)):
        image[..., channel] = plane
    return image


# ---------------------------------------------------------------------------------------------------------------- scene


class _Plane(NamedTuple):
    """Coordinates in the plane of an inclined disc: `u` along its major axis, `v` deprojected."""

    u: Image  # arcsec
    v: Image  # arcsec
    squared_radius: Image  # arcsec^2
    axis_ratio: float


def _scene(label: int, rng: np.random.Generator) -> np.ndarray:
    """Return the (3, 256, 256) float32 sky before the atmosphere, in nanomaggies per square arcsec."""
    redshift = float(np.clip(0.07 * np.exp(0.45 * rng.standard_normal()), 0.015, 0.2))
    # In a flux-limited sample, near galaxies look larger. The effect is weaker than geometry predicts, because the
    # distant galaxies in the sample are giants.
    radius = float(np.clip(5.4 * (redshift / 0.07) ** -0.4 * np.exp(rng.normal(0, 0.2)), 3.2, 9.0))
    magnitude = rng.normal(21.1, 0.4)  # mean within the half-light radius, per square arcsec, r band
    flux = 2 * math.pi * radius**2 * 10 ** (0.4 * (22.5 - magnitude))
    galaxy = _RENDERERS[label](rng, radius)
    # With redshift the bands move to the bluer, fainter part of the spectrum. Dust and metals add scatter.
    redness = 1.5 * (redshift - 0.07) + rng.normal(0, 0.08)
    reddening = np.exp(redness * np.array([-1.0, 0.0, 0.6]))
    galaxy *= (flux * reddening).astype(np.float32)[:, None, None]
    _add_background(galaxy, rng)
    _add_stars(galaxy, rng)
    return galaxy


@lru_cache(maxsize=1)
def _axis() -> np.ndarray:
    return ((np.arange(_SCENE_SIZE) + 0.5) * _SAMPLE - FIELD_OF_VIEW / 2).astype(np.float32)


def _plane(axis_ratio: float, angle: float, x: float = 0.0, y: float = 0.0, window: slice = slice(None)) -> _Plane:
    """Return the coordinates of a disc at (x, y) arcsec. `window` selects samples, the same for rows and columns."""
    east, north = _axis()[window] - x, (_axis()[window] - y)[:, None]
    cosine, sine = math.cos(angle), math.sin(angle)
    u = cosine * east + sine * north
    v = (cosine * north - sine * east) / axis_ratio
    return _Plane(u, v, u * u + v * v, axis_ratio)


def _bands(*components: tuple[np.ndarray, Image]) -> np.ndarray:
    """Sum components, each the (3,) color of a stellar population times a monochrome image, into (3, 256, 256)."""
    return sum(color[:, None, None] * image for color, image in components)


def _add_background(scene: np.ndarray, rng: np.random.Generator) -> None:
    """Add faint background galaxies: small inclined exponential discs, red or blue, each on a cut-out of the scene."""
    half = 16
    middle = slice(_SCENE_SIZE // 2 - half, _SCENE_SIZE // 2 + half)
    for _ in range(rng.poisson(5)):
        column, row = rng.integers(half, _SCENE_SIZE - half, 2)
        # Counts rise by 0.4 dex per magnitude. Fainter discs are smaller.
        flux = min(2.5 * rng.pareto(1.0) + 1.5, 40.0)
        scale = 0.35 * flux**0.2 * rng.uniform(0.8, 1.3)
        plane = _plane(rng.uniform(0.35, 1), rng.uniform(0, math.pi), window=middle)
        color = _YOUNG + rng.uniform(0, 1.2) * (_OLD - _YOUNG)
        profile = flux * _exponential(plane, scale)
        scene[:, row - half : row + half, column - half : column + half] += color[:, None, None] * profile


def _add_stars(scene: np.ndarray, rng: np.random.Generator) -> None:
    """Add stars of the Milky Way as point sources, from red dwarfs to white turn-off stars."""
    count = rng.poisson(3)
    x, y = rng.uniform(-FIELD_OF_VIEW / 2, FIELD_OF_VIEW / 2, (2, count))
    flux = np.minimum(1.5 * (rng.pareto(0.8, count) + 1), 250)
    blueness = rng.beta(0.6, 1.0, count)[:, None]
    color = np.array([0.3, 1.0, 2.2]) * (1 - blueness) + np.array([0.6, 1.0, 1.3]) * blueness
    for band in range(3):
        scene[band] += _round_gaussians(x, y, np.full(count, 0.15), flux * color[:, band])


def _round_gaussians(x: np.ndarray, y: np.ndarray, sigma: np.ndarray, flux: np.ndarray) -> Image:
    """Return the sum of round Gaussians. A Gaussian is separable, so the sum is one matrix product."""
    x, y, sigma, flux = (values.astype(np.float32)[:, None] for values in (x, y, sigma, flux))
    spread = 2 * sigma**2
    columns = np.exp(-((_axis() - x) ** 2) / spread)
    rows = np.exp(-((_axis() - y) ** 2) / spread) * (flux / (math.pi * spread))
    return rows.T @ columns


# ---------------------------------------------------------------------------------------- published profiles, unit flux


def _sersic(plane: _Plane, index: float, radius: float) -> Image:
    """Sersic (1963) profile of half-light radius `radius`, with b_n of Ciotti & Bertin (1999)."""
    b = 2 * index - 1 / 3 + 4 / (405 * index) + 46 / (25515 * index**2)
    total = 2 * math.pi * index * radius**2 * b ** (-2 * index) * math.gamma(2 * index) * plane.axis_ratio
    # Softening by a third of a sample: the flux of the cusp must not depend on its position between samples.
    reduced = (plane.squared_radius + (_SAMPLE / 3) ** 2) * radius**-2
    return np.exp(-b * reduced ** (0.5 / index)) * (1 / total)


def _exponential(plane: _Plane, scale: float) -> Image:
    """Exponential disc (Freeman 1970) of scale length `scale`."""
    total = 2 * math.pi * scale**2 * plane.axis_ratio
    return np.exp(np.sqrt(plane.squared_radius) * (-1 / scale)) * (1 / total)


def _ferrers(plane: _Plane, length: float, width: float, angle: float) -> Image:
    """Ferrers (1877) bar, n = 2, on the boxy generalised ellipses of Athanassoula et al. (1990), c = 4."""
    cosine, sine = math.cos(angle), math.sin(angle)
    along = (cosine * plane.u + sine * plane.v) * (1 / length)
    across = (cosine * plane.v - sine * plane.u) * (1 / width)
    along *= along
    across *= across
    profile = np.maximum(1 - np.sqrt(along * along + across * across), 0) ** 2
    return profile / (profile.sum() * _SAMPLE**2)


def _edge_on_disc(plane: _Plane, scale: float, height: float) -> Image:
    """Edge-on disc (van der Kruit & Searle 1981): (R/h) K1(R/h) sech^2(z/z0), on a plane of axis ratio 1.

    x K1(x) is approximated by sqrt(1 + pi x / 2) exp(-x), which is exact at 0 and infinity and within 3 % between them.
    """
    x = np.abs(plane.u) * (1 / scale)
    z = np.minimum(np.abs(plane.v) * (1 / height), 20)
    profile = np.sqrt(1 + (math.pi / 2) * x) * np.exp(-x) / np.cosh(z) ** 2
    profile *= np.minimum(np.exp((4.2 - x) * 4), 1)  # stellar discs end at about four scale lengths
    return profile / (profile.sum() * _SAMPLE**2)


def _arms(plane: _Plane, pitch: float, number: int, start: tuple[float, float], rng: np.random.Generator) -> Image:
    """Return the density of spiral arms, mean about 1: ridges along logarithmic spirals with a pitch angle in radians.

    The ridges pass through start = (radius, angle) and fade inside that radius, where the arms of real discs begin.
    """
    radius, angle = start
    theta = np.arctan2(plane.v, plane.u)
    lnr = np.log(plane.squared_radius + 0.04) * 0.5
    wobble, side, contrast = rng.uniform(0, 0.25), rng.uniform(0, 2 * math.pi), rng.uniform(1.2, 2.2)
    winding = int(rng.choice([-1, 1])) / math.tan(pitch)
    phase = number * (theta - angle - (lnr - math.log(radius)) * winding)
    # Make the arms differ in spacing and brightness.
    ridges = np.exp(contrast * np.cos(phase + wobble * np.cos(theta - side)))
    ridges *= (1 + wobble * np.cos(theta + side)) / float(np.i0(contrast))
    inside = np.exp(plane.squared_radius * (-1.2 / radius**2))
    return ridges + (0.8 - ridges) * inside


def _gaussian(squared_distance: Image) -> Image:
    return np.exp(-0.5 * np.minimum(squared_distance, 100))  # larger distances give denormal numbers, which are slow


def _tail(plane: _Plane, angle: float, pitch: float, radii: tuple[float, float], width: float) -> Image:
    """Tidal tail: an open spiral with a Gaussian cross-section, brightest half-way between the two `radii`."""
    radius = np.sqrt(plane.squared_radius)
    turn = np.arctan2(plane.v, plane.u) - angle - np.log(radius * (1 / radii[0]) + 0.01) * (1 / math.tan(pitch))
    turn -= 2 * math.pi * np.round(turn * (0.5 / math.pi))
    across = radius * turn * (math.sin(pitch) / width)
    along = (radius - sum(radii) / 2) * (2 / (radii[1] - radii[0]))
    profile = _gaussian(across * across + 3 * along * along)
    return profile / (profile.sum() * _SAMPLE**2)


# ------------------------------------------------------------------------------------------------------ the ten classes
# A renderer takes the galaxy's random generator and its half-light radius in arcsec (of the circle that contains half
# of the light). It returns a (3, 256, 256) image with unit flux in r.


def _random_center(rng: np.random.Generator) -> tuple[float, float]:
    return rng.normal(0, 0.5), rng.normal(0, 0.5)


def _smooth(rng: np.random.Generator, radius: float, axis_ratio: float, index: float) -> np.ndarray:
    """An elliptical galaxy: one Sersic profile, redder inside."""
    plane = _plane(axis_ratio, rng.uniform(0, math.pi), *_random_center(rng))
    major = radius / math.sqrt(axis_ratio)
    color = _OLD + rng.uniform(0, 0.9) * (_DISC - _OLD)
    core = rng.uniform(0.02, 0.12)
    return _bands(
        (color * (1 - core), _sersic(plane, index, major)),
        (_OLD * core, _sersic(plane, 2.0, 0.35 * major)),
    )


def _round_smooth(rng: np.random.Generator, radius: float) -> np.ndarray:
    return _smooth(rng, radius, rng.uniform(0.88, 1.0), rng.uniform(1.3, 3.5))


def _in_between_smooth(rng: np.random.Generator, radius: float) -> np.ndarray:
    return _smooth(rng, radius, rng.uniform(0.48, 0.70), rng.uniform(1.2, 3.0))


def _cigar_smooth(rng: np.random.Generator, radius: float) -> np.ndarray:
    return _smooth(rng, radius, rng.uniform(0.25, 0.36), rng.uniform(0.7, 1.4))


class _Disc(NamedTuple):
    """The disc of a spiral galaxy: its position on the sky and how its light is divided."""

    plane: _Plane
    scale: float  # arcsec, of the exponential disc
    bulge: float  # fraction of the light
    arm_fraction: float  # fraction of the disc's light that lies in the arms


def _disc(rng: np.random.Generator, radius: float, bulge: float, arm_fraction: float) -> _Disc:
    axis_ratio = rng.uniform(0.5, 1.0)
    plane = _plane(axis_ratio, rng.uniform(0, math.pi), *_random_center(rng))
    return _Disc(plane, radius / 1.55 / axis_ratio**0.4, bulge, arm_fraction)


def _spiral(rng: np.random.Generator, disc: _Disc, arms: Image) -> np.ndarray:
    """An old bulge, an exponential disc, and young arms that extend farther than the disc."""
    plane, scale = disc.plane, disc.scale
    warm = _DISC + rng.uniform(0, 0.5) * (_OLD - _DISC)
    cool = _YOUNG + rng.uniform(0, 0.6) * (_DISC - _YOUNG)
    light = 1 - disc.bulge
    return _bands(
        (_OLD * disc.bulge, _sersic(plane, rng.uniform(1.5, 3.5), rng.uniform(0.25, 0.4) * scale)),
        (warm * (light * (1 - disc.arm_fraction)), _exponential(plane, scale)),
        (cool * (light * disc.arm_fraction), _exponential(plane, 1.35 * scale) * arms),
    )


def _barred_spiral(rng: np.random.Generator, radius: float) -> np.ndarray:
    disc = _disc(rng, radius, rng.uniform(0.05, 0.12), rng.uniform(0.4, 0.65))
    length, angle = rng.uniform(1.1, 1.6) * disc.scale, rng.uniform(0, math.pi)
    # The arms start at the ends of the bar.
    arms = _arms(disc.plane, math.radians(rng.uniform(12, 24)), 2, (length, angle), rng)
    bar_fraction = rng.uniform(0.2, 0.3)
    bar = _ferrers(disc.plane, 1.15 * length, rng.uniform(0.24, 0.34) * length, angle)
    return (1 - bar_fraction) * _spiral(rng, disc, arms) + _bands((_OLD * bar_fraction, bar))


def _tight_spiral(rng: np.random.Generator, radius: float) -> np.ndarray:
    disc = _disc(rng, radius, rng.uniform(0.08, 0.22), rng.uniform(0.5, 0.75))
    start = (0.8 * disc.scale, rng.uniform(0, math.pi))
    number = int(rng.choice([2, 3], p=[0.85, 0.15]))
    return _spiral(rng, disc, _arms(disc.plane, math.radians(rng.uniform(8, 13)), number, start, rng))


def _loose_spiral(rng: np.random.Generator, radius: float) -> np.ndarray:
    disc = _disc(rng, radius, rng.uniform(0.04, 0.15), rng.uniform(0.5, 0.8))
    start = (0.6 * disc.scale, rng.uniform(0, math.pi))
    number = int(rng.choice([2, 3, 4], p=[0.65, 0.2, 0.15]))
    return _spiral(rng, disc, _arms(disc.plane, math.radians(rng.uniform(20, 35)), number, start, rng))


def _edge_on(rng: np.random.Generator, radius: float, bulge: float, dust: float) -> np.ndarray:
    """A disc seen edge-on, with a bulge that is thicker than the disc and with dust in its plane."""
    plane = _plane(1.0, rng.uniform(0, math.pi), *_random_center(rng))
    scale, height = radius, rng.uniform(0.15, 0.26) * radius
    # Few discs are completely flat.
    disc = plane._replace(v=plane.v + rng.normal(0, 0.006) / radius * plane.u * plane.u)
    warm = _YOUNG + rng.uniform(0.2, 1.0) * (_OLD - _YOUNG)
    galaxy = _bands((warm * (1 - bulge), _edge_on_disc(disc, scale, height)))
    if bulge:
        flattening = rng.uniform(0.7, 0.95)
        v = plane.v * (1 / flattening)
        spheroid = _Plane(plane.u, v, plane.u * plane.u + v * v, flattening)
        galaxy += _bands((_OLD * bulge, _sersic(spheroid, rng.uniform(1.5, 3.0), rng.uniform(0.4, 0.55) * scale)))
    lane = np.exp(-0.5 * ((disc.v - rng.normal(0, 0.3 * height)) * (2.5 / height)) ** 2)
    lane *= np.exp(np.abs(disc.u) * (-0.5 / scale))
    return galaxy * np.exp(-(dust * _DUST_OPACITY)[:, None, None] * lane)


def _edge_on_without_bulge(rng: np.random.Generator, radius: float) -> np.ndarray:
    return _edge_on(rng, radius, 0.0, rng.uniform(0, 0.5))


def _edge_on_with_bulge(rng: np.random.Generator, radius: float) -> np.ndarray:
    return _edge_on(rng, radius, rng.uniform(0.28, 0.45), rng.uniform(0, 1.0))


def _progenitor(rng: np.random.Generator, radius: float, x: float, y: float) -> np.ndarray:
    """One galaxy of a merging pair: a bulge and a disc."""
    axis_ratio, bulge = rng.uniform(0.45, 1.0), rng.uniform(0.3, 0.7)
    plane = _plane(axis_ratio, rng.uniform(0, math.pi), x, y)
    color = _DISC + rng.uniform(-0.5, 1.0) * (_OLD - _DISC)
    return _bands(
        (_OLD * bulge, _sersic(plane, 2.5, 0.5 * radius / math.sqrt(axis_ratio))),
        (color * (1 - bulge), _exponential(plane, radius / 1.5 / math.sqrt(axis_ratio))),
    )


def _merging(rng: np.random.Generator, radius: float) -> np.ndarray:
    """Two overlapping galaxies with two nuclei, tidal tails and a bridge between them."""
    separation, direction = rng.uniform(1.0, 2.4) * radius + 1.5, rng.uniform(0, 2 * math.pi)
    mass = rng.uniform(0.5, 0.75)
    x, y = separation * math.cos(direction), separation * math.sin(direction)
    first, second = (-(1 - mass) * x, -(1 - mass) * y), (mass * x, mass * y)
    sizes = 0.9 * radius * math.sqrt(mass / 0.5), 0.9 * radius * math.sqrt((1 - mass) / 0.5)
    pair = mass * _progenitor(rng, sizes[0], *first) + (1 - mass) * _progenitor(rng, sizes[1], *second)
    debris = np.zeros((_SCENE_SIZE, _SCENE_SIZE), np.float32)
    for place, outward, size in ((first, direction + math.pi, sizes[0]), (second, direction, sizes[1])):
        spin = int(rng.choice([-1, 1]))  # a negative axis ratio reverses the winding of the tail
        plane = _plane(rng.uniform(0.5, 1.0) * spin, 0.0, *place)
        radii = 0.5 * size, size * rng.uniform(2.5, 5.0)
        start, width = spin * (outward + rng.normal(0, 0.5)), size * rng.uniform(0.3, 0.55)
        debris += rng.gamma(1.5, 0.045) * _tail(plane, start, rng.uniform(0.6, 1.2), radii, width)
    along = _plane(1.0, direction, *first)
    bridge = _gaussian((along.v / (0.35 * radius)) ** 2 + 2 * (2 * along.u / separation - 1) ** 2)
    debris += rng.uniform(0.02, 0.08) * bridge / (bridge.sum() * _SAMPLE**2)
    return pair * 0.85 + _bands((_DISC + rng.uniform(-0.5, 1) * (_YOUNG - _DISC), debris))


def _disturbed(rng: np.random.Generator, radius: float) -> np.ndarray:
    """A disturbed galaxy: either a lopsided disc with young knots and a tidal tail, or a spheroid with shells."""
    return _shells(rng, radius) if rng.random() < 0.25 else _tidally_disturbed_disc(rng, radius)


def _tidally_disturbed_disc(rng: np.random.Generator, radius: float) -> np.ndarray:
    axis_ratio, angle = rng.uniform(0.5, 0.95), rng.uniform(0, 2 * math.pi)
    scale = radius / 1.5 / axis_ratio**0.4
    plane = _plane(axis_ratio, angle, *_random_center(rng))
    # The tide shears the disc to one side: the outer light is bent and displaced from the centre.
    u = plane.u - rng.uniform(0.5, 1.1) * scale * np.tanh(plane.squared_radius * (0.15 / scale**2))
    v = plane.v + rng.uniform(-0.12, 0.12) / scale * u * u
    sheared = _exponential(_Plane(u, v, u * u + v * v, axis_ratio), scale)
    arm = _arms(plane, rng.uniform(0.3, 0.6), 1, (0.5 * scale, rng.uniform(0, 2 * math.pi)), rng)
    count = int(rng.integers(8, 18))
    # The knots lie on the side to which the disc is sheared.
    towards = angle + rng.normal(0, 1.0, count)
    x, y = scale * rng.gamma(3, 0.5, count) * np.stack([np.cos(towards), np.sin(towards)])
    knots = _round_gaussians(x, y, rng.uniform(0.3, 0.9, count), rng.dirichlet(np.ones(count)))
    radii = 1.0 * scale, rng.uniform(4, 7) * scale
    tail = _tail(plane, rng.uniform(-0.8, 0.8), rng.uniform(0.5, 1.1), radii, 0.5 * scale)
    cool = _YOUNG + rng.uniform(0, 0.8) * (_DISC - _YOUNG)
    return _bands(
        (_DISC * 0.35, sheared),
        (cool * 0.35, sheared * arm),
        (_YOUNG * 0.1, knots),
        (cool * rng.uniform(0.08, 0.2), tail),
        (_OLD * rng.uniform(0.03, 0.1), _sersic(plane, 1.5, 0.4 * scale)),
    )


def _shells(rng: np.random.Generator, radius: float) -> np.ndarray:
    """A spheroid with the sharp-edged arcs that an accreted companion leaves (Malin & Carter 1983)."""
    galaxy = _smooth(rng, 0.8 * radius, rng.uniform(0.6, 0.9), rng.uniform(2.0, 4.0))
    plane = _plane(rng.uniform(0.7, 1.0), rng.uniform(0, 2 * math.pi))
    r = np.sqrt(plane.squared_radius)
    arcs = np.zeros_like(r)
    # Shells alternate between two sides, because the companion's stars oscillate through the centre (Quinn 1984).
    for side, edge in ((1, rng.uniform(1.1, 1.6)), (-1, rng.uniform(1.7, 2.3)), (1, rng.uniform(2.5, 3.2))):
        inside = np.exp((r - edge * radius) / (0.4 * radius)) * (r < edge * radius)
        arcs += inside * np.exp(5 * (side * plane.u / (r + 0.1) - 1)) / edge
    arcs /= arcs.sum() * _SAMPLE**2
    return 0.8 * galaxy + _bands((_DISC * 0.2, arcs))


_RENDERERS = (
    _disturbed,
    _merging,
    _round_smooth,
    _in_between_smooth,
    _cigar_smooth,
    _barred_spiral,
    _tight_spiral,
    _loose_spiral,
    _edge_on_without_bulge,
    _edge_on_with_bulge,
)

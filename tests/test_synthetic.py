"""Synthetic galaxies are a pure function of seed and index, show the same sky at any size, and have their morphology.

Morphology is measured from the pixels with the methods of astronomers, never read from the generator's parameters:
moments for axis ratios, rotational asymmetry (Conselice 2003), Fourier modes for bars, and a Fourier transform over
(ln r, theta) for the pitch angle of the arms (Puerari & Dottori 1992).
"""

import numpy as np
import pytest

from galaxy_mae.data import synthetic
from galaxy_mae.errors import UserError

DISTURBED, MERGING, ROUND, IN_BETWEEN, CIGAR, BARRED, TIGHT, LOOSE, EDGE_ON, EDGE_ON_BULGE = range(10)
EACH = 30  # galaxies per class
ARCSEC = 1 / 0.262  # pixels


@pytest.fixture(scope="module")
def galaxies() -> np.ndarray:
    """(10, EACH, 256, 256, 3) float: images by class, minus the pedestal of the sky."""
    images = synthetic.render(np.arange(10 * EACH), 256)
    return images.reshape(EACH, 10, 256, 256, 3).swapaxes(0, 1).astype(np.float32) - 7


def binned(image: np.ndarray, factor: int) -> np.ndarray:
    """Area-average the two axes before the last."""
    *lead, height, width, bands = image.shape
    blocks = image.reshape(*lead, height // factor, factor, width // factor, factor, bands)
    return blocks.mean(axis=(-4, -2), dtype=np.float64)


def main_body(light: np.ndarray) -> np.ndarray:
    """Mask of the pixels above a quarter of the central peak and connected to the centre, so without neighbours."""
    middle = slice(len(light) // 2 - 2, len(light) // 2 + 2)
    bright = light > 0.25 * light[middle, middle].max()
    body = np.zeros_like(bright)
    body[middle, middle] = True
    while True:
        grown = body.copy()
        for shift, axis in ((1, 0), (-1, 0), (1, 1), (-1, 1)):
            grown |= np.roll(body, shift, axis) & bright
        if np.array_equal(grown, body):
            return body
        body = grown


def principal_axes(image: np.ndarray) -> tuple[float, float, np.ndarray]:
    """Axis ratio, root mean square length in arcsec, and minor and major unit vectors of the main body."""
    light = binned(image, 2).mean(axis=-1)
    weight = main_body(light) * light
    places = (np.indices(light.shape)[::-1].reshape(2, -1) - 63.5) * 2 / ARCSEC
    variance, axes = np.linalg.eigh(np.cov(places, aweights=weight.ravel()))
    return float(np.sqrt(variance[0] / variance[1])), float(np.sqrt(variance[1])), axes.T


def along_and_across(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates of every pixel along the galaxy (in units of its length) and across it (in arcsec)."""
    _, length, (minor, major) = principal_axes(image)
    y, x = (np.indices(image.shape[:2]) - 127.5) / ARCSEC
    return np.abs(major[0] * x + major[1] * y) / length, np.abs(minor[0] * x + minor[1] * y)


def polar(image: np.ndarray, radii: np.ndarray, deproject: bool = False) -> np.ndarray:
    """(radius, 128 angles): the image in polar coordinates in the disc's plane, relative to the mean of each circle."""
    theta = np.arange(128) / 128 * 2 * np.pi
    ratio, _, (minor, major) = principal_axes(image) if deproject else (1, 1, np.eye(2))
    u, v = radii[:, None] * np.cos(theta), radii[:, None] * ratio * np.sin(theta)
    columns, rows = (np.rint(127.5 + (u * major[i] + v * minor[i]) * ARCSEC).astype(int) for i in (0, 1))
    circles = np.maximum(image.mean(axis=-1)[rows.clip(0, 255), columns.clip(0, 255)], 1)
    return circles / circles.mean(axis=1, keepdims=True) - 1


def medians(measure, galaxies: np.ndarray, *classes: int) -> list[float]:
    return [float(np.median([measure(image) for image in galaxies[label]])) for label in classes]


def test_image_depends_only_on_seed_and_index():
    indices = np.array([23, 7, 0, 41, 12, 999_999_999])
    together = synthetic.render(indices, 64, seed=5)
    assert together.dtype == np.uint8
    assert np.array_equal(together[::-1], synthetic.render(indices[::-1], 64, seed=5))
    for image, index in zip(together, indices, strict=True):
        assert np.array_equal(image, synthetic.render(np.array([index]), 64, seed=5)[0])
    assert len({image.tobytes() for image in (*together, *synthetic.render(indices, 64, seed=6))}) == 2 * len(indices)


@pytest.mark.parametrize("size", [16, 64, 97, 256, 300])
def test_every_size_shows_the_same_sky(size):
    """Without noise, the smaller image is exactly the binned image of 256 pixels, and light is conserved."""
    for label in range(10):
        fine = synthetic._observe(synthetic._scene(label, np.random.default_rng(label)), 256, np.random.default_rng(1))
        scene = synthetic._scene(label, np.random.default_rng(label))
        sky = synthetic._observe(scene, size, np.random.default_rng(1))
        assert sky.shape == (3, size, size)
        assert scene.dtype == sky.dtype == np.float32
        assert np.allclose(sky.mean((1, 2)), fine.mean((1, 2)), rtol=1e-3)
        assert np.allclose(sky.mean((1, 2)), scene.mean((1, 2)), rtol=0.01)  # some light is blurred across the borders
        if 256 % size == 0:
            averaged = binned(fine.transpose(1, 2, 0), 256 // size).transpose(2, 0, 1)
            assert np.allclose(sky, averaged, rtol=1e-3, atol=1e-4 * sky.max())


def test_small_image_is_the_binned_large_image():
    """With noise and after the stretch, they agree on average within 3 of 255 levels, and the noise is as low."""
    indices = np.arange(40)
    small, large = synthetic.render(indices, 64).astype(float), binned(synthetic.render(indices, 256), 4)
    assert np.abs(small - large).mean() < 3
    assert np.corrcoef(small.ravel(), large.ravel())[0, 1] > 0.99
    sky = small[:, :6, :6].reshape(len(indices), -1, 3)
    assert np.median(np.abs(sky - np.median(sky, axis=1, keepdims=True))) <= 1


def test_axis_ratios_of_smooth_and_edge_on_galaxies(galaxies):
    ratio = np.array([[principal_axes(image)[0] for image in images] for images in galaxies])
    assert np.mean(ratio[ROUND] > 0.8) > 0.9
    assert np.mean(np.abs(ratio[IN_BETWEEN] - 0.6) < 0.15) > 0.9
    assert np.mean(np.abs(ratio[CIGAR] - 0.34) < 0.1) > 0.9
    assert np.mean(ratio[EDGE_ON] < 0.22) > 0.9
    assert np.mean(ratio[EDGE_ON_BULGE] < 0.4) > 0.9


def test_bulge_of_edge_on_galaxies_is_thick_and_bright(galaxies):
    def swelling(image):
        (along, across), light = along_and_across(image), np.maximum(image.mean(axis=-1), 0)
        inner, outer = (light * (part & (across < 4)) for part in (along < 0.3, (along > 1.2) & (along < 1.8)))
        return np.sqrt((inner * across**2).sum() / inner.sum() / ((outer * across**2).sum() / outer.sum()))

    def concentration(image):
        (along, across), light = along_and_across(image), image.mean(axis=-1)
        return light[(along < 0.15) & (across < 1)].mean() / light[(along > 0.8) & (along < 1.2) & (across < 1)].mean()

    for measure in (swelling, concentration):
        without, bulge = (np.array([measure(image) for image in galaxies[label]]) for label in (EDGE_ON, EDGE_ON_BULGE))
        assert np.mean(bulge[:, None] > without) > 0.8  # of all pairs


def test_barred_spirals_have_straight_bars(galaxies):
    """A bar has a strong m = 2 mode with a constant phase over the inner radii; unbarred discs do not."""

    def straightness(image):
        circles = polar(image, np.linspace(1.2, 4.5, 14))
        return np.abs(np.fft.rfft(circles, axis=1)[:, 2].mean()) / 64

    barred, tight, loose = medians(straightness, galaxies, BARRED, TIGHT, LOOSE)
    assert barred > 1.5 * tight
    assert barred > 1.5 * loose


def test_pitch_angle_of_tight_and_loose_spirals(galaxies):
    def pitch(image):
        """Pitch angle in degrees of the strongest logarithmic spiral with two to four arms."""
        circles, window = polar(image, np.geomspace(2.5, 16, 64), deproject=True), np.hanning(64)[:, None]
        circles -= (window * circles).sum(axis=0) / window.sum()  # the residual of the inclination has no winding
        power = np.abs(np.fft.fft2(np.clip(circles, -0.5, 0.5) * window, s=(512, 128)))[:, 2:5]
        slope = np.fft.fftfreq(512, np.log(16 / 2.5) / 63) * 2 * np.pi
        power[np.abs(slope) < 2] = 0
        at, arms = np.unravel_index(power.argmax(), power.shape)
        return np.rad2deg(np.arctan((arms + 2) / abs(slope[at])))

    tight, loose = medians(pitch, galaxies, TIGHT, LOOSE)
    assert 8 < tight < 16
    assert 19 < loose < 35


def test_merging_galaxies_have_two_nuclei(galaxies):
    def second_nucleus(image):
        """Brightness of the second peak relative to the first, within 14 arcsec and at least 3 from the first."""
        light = np.pad(binned(image, 4).mean(axis=-1)[19:45, 19:45], 1)
        shifts = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
        peaks = np.where(light == np.max([np.roll(light, shift, (0, 1)) for shift in shifts], axis=0), light, 0)
        y, x = np.indices(peaks.shape)
        first = np.unravel_index(peaks.argmax(), peaks.shape)
        return peaks[np.hypot(y - first[0], x - first[1]) * 4 / ARCSEC > 3].max() / peaks.max()

    merging = np.array([second_nucleus(image) for image in galaxies[MERGING]])
    single = np.array([second_nucleus(image) for label in (ROUND, IN_BETWEEN, CIGAR) for image in galaxies[label]])
    assert np.mean(merging > 0.65) > 0.9
    assert np.mean(single > 0.65) < 0.25  # foreground stars and neighbours


def test_disturbed_galaxies_are_asymmetric(galaxies):
    def asymmetry(image):
        light = image.mean(axis=-1)[76:180, 76:180]
        return np.abs(light - light[::-1, ::-1]).sum() / light.sum()

    disturbed, *others = medians(asymmetry, galaxies, DISTURBED, ROUND, IN_BETWEEN, BARRED, TIGHT, LOOSE)
    assert disturbed > 1.5 * max(others)


def test_brightness_size_and_color_do_not_predict_the_class(galaxies):
    """Nearest centroid on histogram features, fitted on one half and tested on the other. Chance is 0.1."""
    light = galaxies.mean(axis=-1)
    area = (light > 20).mean(axis=(2, 3))
    color = [np.log(galaxies[..., band].sum((2, 3)) / galaxies[..., 1].sum((2, 3))) for band in (0, 2)]
    features = np.stack([light.mean(axis=(2, 3)), light.max(axis=(2, 3)), area, *color], axis=-1)
    features = (features - features.mean((0, 1))) / features.std((0, 1))
    centroids = features[:, ::2].mean(axis=1)
    predicted = np.linalg.norm(features[:, 1::2, None] - centroids, axis=-1).argmin(axis=-1)
    assert np.mean(predicted == np.arange(10)[:, None]) < 0.3


def test_catalogue_covers_the_footprint_without_overlaps():
    catalogue = synthetic.catalogue(5000, 128)
    assert {name: column.dtype.name for name, column in catalogue.items()} == {
        "label": "int64", "ra": "float64", "dec": "float64", "pixel_scale": "float64"
    }  # fmt: skip
    for name, column in synthetic.catalogue(700, 128).items():
        assert np.array_equal(column, catalogue[name][:700])
    assert np.array_equal(catalogue["label"], synthetic.labels(5000))
    assert np.allclose(catalogue["pixel_scale"], 0.524)
    assert catalogue["dec"].min() > -20
    assert catalogue["dec"].max() < 34
    assert not np.array_equal(synthetic.catalogue(10, seed=1)["ra"], catalogue["ra"][:10])
    ra, dec = np.deg2rad(catalogue["ra"]), np.deg2rad(catalogue["dec"])
    unit = np.stack([np.cos(dec) * np.cos(ra), np.cos(dec) * np.sin(ra), np.sin(dec)], axis=1)
    cosines = np.concatenate([np.sort(part @ unit.T, axis=1)[:, -2] for part in np.array_split(unit, 10)])
    assert np.rad2deg(np.arccos(cosines.max())) * 60 > 5  # arcmin; an image's diagonal is 1.6


@pytest.mark.parametrize(
    "call",
    [
        lambda: synthetic.labels(0),
        lambda: synthetic.catalogue(0),
        lambda: synthetic.catalogue(10, 8),
        lambda: synthetic.render(np.arange(2), 8),
        lambda: synthetic.render(np.array([-1])),
        lambda: synthetic.render(np.arange(2), seed=-1),
    ],
)
def test_invalid_arguments_raise_user_error(call):
    with pytest.raises(UserError, match="synthetic galax"):
        call()

"""FITS cut-outs become the pixels that astropy's stretches give, and a bad file is named in one line."""

import gzip
from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits
from astropy.visualization import AsinhStretch, ManualInterval, PercentileInterval, make_lupton_rgb

from galaxy_mae.data.cache import open_galaxies
from galaxy_mae.data.fits import Stretch, read_cutout
from galaxy_mae.errors import UserError
from galaxy_mae.training.recipe import read_evaluation_recipe, read_recipe


def cubes(count: int, bands: int = 3, size: int = 32) -> np.ndarray:
    """(count, bands, size, size) float32 fluxes in nanomaggies per pixel: a galaxy off the center, and noise."""
    rng = np.random.default_rng(bands)
    y, x = np.mgrid[:size, :size]
    galaxy = np.exp(-np.hypot(x - 10, y - 20) / rng.uniform(2, 5, (count, 1, 1, 1)))
    flux = rng.uniform(0.1, 0.5, (count, bands, 1, 1)) * galaxy + rng.normal(0, 0.004, (count, bands, size, size))
    return flux.astype(np.float32)


def write_cutouts(folder: Path, images: np.ndarray) -> Path:
    folder.mkdir(parents=True)
    for row, image in enumerate(images):
        fits.writeto(folder / f"{row:03d}.fits", image)
    return folder


def test_three_bands_are_blue_green_and_red_and_the_lowest_row_is_the_last(tmp_path):
    cube = np.zeros((3, 16, 16), np.float32)
    cube[0, 0], cube[1, 7], cube[2, 15] = 1, 1, 1  # first band: lowest row
    fits.writeto(tmp_path / "a.fits", cube)
    pixels = read_cutout(tmp_path / "a.fits", Stretch())
    for row, channel in ((15, 2), (8, 1), (0, 0)):
        others = np.delete(pixels[row], channel, axis=1)
        assert (pixels[row, :, channel] > 200).all()
        assert (others < 60).all()


def test_folder_of_cubes_has_the_pixels_of_make_lupton_rgb(tmp_path):
    images = cubes(4)
    images[1, 2, 5, 5] = np.nan
    stretch = Stretch(lupton_scales=(3.0, 2.0, 1.0), lupton_minimum=-0.1, lupton_stretch=0.5, lupton_q=8.0)
    galaxies = open_galaxies(str(write_cutouts(tmp_path / "cutouts", images)), stretch=stretch)
    images[1, 2, 5, 5] = 0
    for row, (g, r, z) in enumerate(images.astype(float)):
        expected = make_lupton_rgb(1.0 * z, 2.0 * r, 3.0 * g, interval=ManualInterval(-0.1), stretch=0.5, Q=8.0)
        assert np.array_equal(galaxies.pixels[row], expected[::-1])


def test_default_stretch_has_the_curve_of_the_legacy_surveys_viewer(tmp_path):
    """Up to where the viewer clips single colors: there astropy keeps the color."""
    cube = np.abs(cubes(1)[0]).astype(float)
    fits.writeto(tmp_path / "a.fits", cube)
    scaled = cube * np.reshape([6.0, 3.4, 2.2], (3, 1, 1)) + 0.03
    intensity = scaled.mean(axis=0)
    viewer = 255 * (scaled * np.arcsinh(20 * intensity) / np.sqrt(20) / intensity)[::-1, ::-1].transpose(1, 2, 0)
    unclipped = viewer.max(axis=2) < 255
    assert unclipped.mean() > 0.9
    assert np.abs(read_cutout(tmp_path / "a.fits", Stretch())[unclipped] - viewer[unclipped]).max() < 1.5
    assert (Stretch().rgb(np.zeros((3, 4, 4))) == 32).all()  # as are the blank images of Galaxy10 DECaLS


@pytest.mark.parametrize("shape", [(32, 32), (1, 32, 32)])
def test_one_band_is_gray(tmp_path, shape):
    image = cubes(1, bands=1)[0, 0]
    fits.writeto(tmp_path / "a.fits", image.reshape(shape))
    pixels = read_cutout(tmp_path / "a.fits", Stretch(asinh_a=0.3, asinh_percentile=90.0))
    expected = 255 * AsinhStretch(0.3)(PercentileInterval(90)(image.astype(float)))[::-1]
    assert np.array_equal(pixels, np.rint(expected)[:, :, None].repeat(3, axis=2))


def test_scaled_integers_in_an_extension_are_read(tmp_path):
    image = np.arange(256, dtype=np.uint16).reshape(16, 16) + 30000  # stored as int16 with BZERO
    fits.HDUList([fits.PrimaryHDU(), fits.ImageHDU(image)]).writeto(tmp_path / "a.fits")
    stretch = Stretch(asinh_percentile=100.0)
    expected = 255 * AsinhStretch(0.1)(np.arange(256).reshape(16, 16) / 255)[::-1]
    assert np.array_equal(read_cutout(tmp_path / "a.fits", stretch)[:, :, 0], np.rint(expected))


def test_bands_of_a_larger_cube_are_chosen(tmp_path):
    images = cubes(2, bands=5)
    folder = write_cutouts(tmp_path / "five", images)
    with pytest.raises(UserError, match=r"'000.fits' of row 0 has 5 bands: choose .* --fits_bands 0 1 2"):
        open_galaxies(str(folder))
    with pytest.raises(UserError, match="has 5 bands: choose those"):
        open_galaxies(str(folder), stretch=Stretch(fits_bands=(0, 1, 5)))
    chosen = open_galaxies(str(folder), stretch=Stretch(fits_bands=(4, 1, 2)))
    three = open_galaxies(str(write_cutouts(tmp_path / "three", images[:, [4, 1, 2]])))
    assert np.array_equal(chosen.pixels, three.pixels)


def test_fluxes_that_are_not_finite_give_an_image(tmp_path):
    for name, value in (("nan", np.nan), ("inf", np.inf), ("huge", 1e308)):
        for shape in ((3, 8, 8), (8, 8)):
            image = np.zeros(shape)
            image[..., 2:, :] = value
            fits.writeto(tmp_path / "a.fits", image, overwrite=True)
            pixels = read_cutout(tmp_path / "a.fits", Stretch())
            background = pixels[-1].max()  # the two lowest rows, which are zero
            assert (pixels[:-2] == background).all() if name == "nan" else (pixels[:-2] > background).all()


def test_stretch_is_part_of_the_fingerprint_of_cutouts_alone(tmp_path):
    folder = write_cutouts(tmp_path / "cutouts", cubes(3))
    one, other = (open_galaxies(str(folder), stretch=Stretch(lupton_q=q)) for q in (4.0, 8.0))
    assert one.fingerprint != other.fingerprint
    assert not np.array_equal(one.pixels, other.pixels)
    one, other = (open_galaxies("synthetic:20", 16, stretch=Stretch(lupton_q=q)) for q in (4.0, 8.0))
    assert one.fingerprint == other.fingerprint


def truncate(path: Path) -> None:
    fits.writeto(path, cubes(1)[0])
    path.write_bytes(path.read_bytes()[:-2880])


def declare(**cards: int):
    def write(path: Path) -> None:
        fits.writeto(path, cubes(1)[0])
        content = path.read_bytes()
        for name, value in cards.items():
            at = content.index(f"{name:<8}=".encode())
            content = content[:at] + f"{name:<8}={value:>21}".encode().ljust(80) + content[at + 80 :]
        path.write_bytes(content)

    return write


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: path.write_bytes(b"junk"), "is not a FITS file"),
        (lambda path: path.write_bytes(gzip.compress(bytes(10**8))), "is not a FITS file"),
        (lambda path: path.write_bytes(b"SIMPLE  =                    T"), "cannot be read as FITS"),
        (truncate, "is truncated"),
        (declare(NAXIS1=5000), "is 5000 x 32 pixels"),
        (declare(NAXIS1=2**40, NAXIS2=2**40), "cannot be read as FITS"),
        (declare(NAXIS1=-5), "pixels; crop"),
        (declare(NAXIS1=16), "is 16 x 32 pixels, not"),
        (declare(NAXIS3=10**9), "is truncated"),
        (declare(BITPIX=17), "cannot be read as FITS"),
        (lambda path: fits.PrimaryHDU().writeto(path), "has no pixels"),
        (lambda path: fits.writeto(path, np.zeros((2, 3, 8, 8))), "or other axes than (height, width)"),
        (lambda path: fits.CompImageHDU(np.zeros((8, 8), np.int16)).writeto(path), "unpack it with funpack"),
    ],
)
def test_bad_cutouts_are_refused_in_one_line_or_skipped(tmp_path, write, message):
    folder = tmp_path / "cutouts"
    folder.mkdir()
    write(folder / "a.fits")
    with pytest.raises(UserError) as refusal:
        open_galaxies(str(folder))
    assert message in str(refusal.value)
    assert "the image 'a.fits' of row 0 " in str(refusal.value)
    assert "\n" not in str(refusal.value)
    fits.writeto(folder / "b.fits", cubes(1)[0])
    galaxies = open_galaxies(str(folder), skip_unreadable=True)
    assert [message in problem for problem in galaxies.problem] == [True, False]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--fits_bands 0 1", "--fits_bands 0 1: out of its range (FITS: three planes"),
        ("--fits_bands 0 1 1", "--fits_bands 0 1 1"),
        ("--fits_bands 0 1 -1", "from 0"),
        ("--lupton_scales 1 2 0", "--lupton_scales 1.0 2.0 0.0: out of its range (FITS: three factors"),
        ("--lupton_scales 1 2", "three factors"),
        ("--lupton_minimum nan", "--lupton_minimum nan"),
        ("--lupton_stretch 0", "--lupton_stretch 0.0"),
        ("--lupton_q inf", "--lupton_q inf"),
        ("--asinh_a 1.1", "--asinh_a 1.1"),
        ("--asinh_percentile 0", "--asinh_percentile 0.0"),
    ],
)
def test_flags_of_the_stretch_are_checked_by_both_scripts(flags, message):
    for read, others in ((read_recipe, []), (read_evaluation_recipe, ["--encoder", "runs/a"])):
        with pytest.raises(UserError) as refusal:
            read([*others, *flags.split()])
        assert message in str(refusal.value)


def test_flags_of_the_stretch_reach_the_stretch_and_the_recipe():
    flags = ["--fits_bands", *"310", "--lupton_scales", *"123", "--lupton_q", "7", "--asinh_percentile", "99"]
    expected = Stretch((3, 1, 0), (1.0, 2.0, 3.0), lupton_q=7.0, asinh_percentile=99.0)
    recipe = read_recipe(flags)
    assert recipe.galaxies.stretch == expected
    assert recipe.as_dict()["lupton_q"] == 7.0
    assert read_evaluation_recipe(["--encoder", "runs/a", *flags]).evaluation.stretch == expected
    assert read_recipe([]).galaxies.stretch == Stretch()

"""FITS cut-outs become the pixels that the surveys' recipes give, and a bad file is named in one line."""

import bz2
import gzip
from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits
from astropy.visualization import AsinhStretch, PercentileInterval
from PIL import Image

from galaxy_mae.data import synthetic
from galaxy_mae.data.__main__ import main
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


def write(path: Path, *images: np.ndarray, names: tuple[str, ...] = (), first: int = 0, **cards) -> Path:
    """A FITS file whose images are HDUs from `first` on, in extensions of these names; the cards are the primary's."""
    hdus = [fits.PrimaryHDU(None if first else images[0])]
    hdus[0].header.update(cards)
    hdus += [fits.ImageHDU(image, name=name) for image, name in zip(images[1 - first :], names, strict=True)]
    fits.HDUList(hdus).writeto(path, overwrite=True)
    return path


def pixels_of(path: Path, stretch: str = "auto") -> np.ndarray:
    return read_cutout(path, Stretch.named(stretch)).rgb()


def test_three_bands_are_blue_green_and_red_and_the_lowest_row_is_the_last(tmp_path):
    cube = np.zeros((3, 16, 16), np.float32)
    cube[0, 0], cube[1, 7], cube[2, 15] = 1, 1, 1  # first band: lowest row
    pixels = pixels_of(write(tmp_path / "a.fits", cube))
    for row, channel in ((15, 2), (8, 1), (0, 0)):
        others = np.delete(pixels[row], channel, axis=1)
        assert (pixels[row, :, channel] > 200).all()
        assert (others < 60).all()


def viewer(g: np.ndarray, r: np.ndarray, z: np.ndarray) -> np.ndarray:
    """The colors of the Legacy Surveys' viewer, 0 to 1, (3, H, W) in the order red, green, blue."""
    scaled = [z * 2.2 + 0.03, r * 3.4 + 0.03, g * 6.0 + 0.03]
    intensity = sum(np.maximum(0, x) for x in scaled) / 3
    factor = np.arcsinh(20 * intensity) / np.sqrt(20) / (intensity + (intensity == 0) * 1e-6)
    return np.clip(np.stack(scaled) * factor, 0, 1)


def sdss_frames(g: np.ndarray, r: np.ndarray, i: np.ndarray) -> np.ndarray:
    scaled = 0.4 * np.stack([5 * i, 6.5 * r, 9 * g])
    total = scaled.clip(0).sum(axis=0)
    scaled *= np.where(total == 0, 1, np.arcsinh(2.25 * total) / (2.25 * np.where(total == 0, 1, total)))
    return (scaled / np.maximum(1, scaled.max(axis=0))).clip(0, 1)


def hsc_postage(g: np.ndarray, r: np.ndarray, i: np.ndarray) -> np.ndarray:
    x = np.stack([i, r, g]) * 10 ** (0.4 * 19) / 63095734448.0194
    return ((np.arcsinh(np.exp(10) * x) / np.arcsinh(np.exp(10)) + 0.05) / (2 / 3 + 0.05)).clip(0, 1)


def hubble(*bands: np.ndarray) -> np.ndarray:
    return np.stack([AsinhStretch(0.1)(PercentileInterval(99)(band)) for band in reversed(bands)])


@pytest.mark.parametrize(
    ("name", "formula", "unit"),
    [("legacy", viewer, 1.0), ("sdss", sdss_frames, 1.0), ("hsc", hsc_postage, 63.0), ("hst", hubble, 1.0)],
)
def test_presets_have_the_colors_of_their_surveys_also_in_a_bright_nucleus(tmp_path, name, formula, unit):
    cube = cubes(1)[0].astype(float) * unit
    y, x = np.mgrid[:32, :32]
    cube += unit * np.reshape([20.0, 40.0, 60.0], (3, 1, 1)) * np.exp(-(np.hypot(x - 10, y - 20) ** 2) / 4)
    pixels = pixels_of(write(tmp_path / "a.fits", cube), name)
    expected = 255 * formula(*cube)[:, ::-1].transpose(1, 2, 0)
    assert np.abs(pixels - expected).max() <= 0.5 + 1e-9
    if name == "legacy":
        assert (pixels[11, 10] == 255).all()  # a white nucleus
        assert (pixels_of(write(tmp_path / "b.fits", np.zeros((3, 4, 4)))) == 32).all()  # as in Galaxy10 DECaLS


@pytest.mark.parametrize("shape", [(32, 32), (1, 32, 32), (1, 1, 32, 32)])
@pytest.mark.parametrize(("name", "a"), [("auto", 0.1), ("legacy", 0.1), ("linear", None)])
def test_one_band_is_gray(tmp_path, shape, name, a):
    image = cubes(1, bands=1)[0, 0]
    cutout = read_cutout(write(tmp_path / "a.fits", image.reshape(shape)), Stretch.named(name))
    gray = PercentileInterval(99.5)(image.astype(float))[::-1]
    expected = np.rint(255 * (AsinhStretch(a)(gray) if a else gray))
    assert np.array_equal(cutout.rgb(), expected[:, :, None].repeat(3, axis=2))
    assert bool(cutout.notes) == (name != "linear")


@pytest.mark.parametrize(
    ("cards", "stretch", "notes"),
    [
        ({}, "legacy", 1),
        ({"SURVEY": "LegacySurvey", "BANDS": "grz"}, "legacy", 0),
        ({"BUNIT": "nanomaggy"}, "legacy", 0),
        ({"BUNIT": "count"}, "legacy", 1),
        ({"BANDS": "gri"}, "sdss", 1),
        ({"ORIGIN": "SDSS"}, "sdss", 0),
        ({"INSTRUME": "Hyper Suprime-Cam"}, "hsc", 0),
        ({"TELESCOP": "HST"}, "hst", 0),
    ],
)
def test_the_header_chooses_the_preset_or_one_line_says_what_is_assumed(tmp_path, caplog, cards, stretch, notes):
    path = write(tmp_path / "a.fits", cubes(1)[0], **cards)
    cutout = read_cutout(path, Stretch())
    assert np.array_equal(cutout.rgb(), pixels_of(path, stretch))
    assert len(cutout.notes) == notes
    (tmp_path / "cutouts").mkdir()
    path.rename(tmp_path / "cutouts" / "a.fits")
    open_galaxies(str(tmp_path / "cutouts"))
    assert caplog.text.count(f"--stretch {stretch} is assumed") == notes


@pytest.mark.parametrize(
    ("cards", "factor"),
    [({"BUNIT": "nJy"}, 3631.0), ({"BUNIT": "uJy"}, 3.631), ({"FLUXMAG0": 10 ** (0.4 * 27)}, 10 ** (0.4 * 4.5))],
)
@pytest.mark.parametrize("stretch", ["legacy", "sdss"])
def test_fluxes_of_other_units_are_converted_to_those_of_the_preset(tmp_path, cards, factor, stretch):
    expected = pixels_of(write(tmp_path / "a.fits", cubes(1)[0].astype(float), BUNIT="nanomaggy"), stretch)
    found = pixels_of(write(tmp_path / "b.fits", cubes(1)[0].astype(float) * factor, **cards), stretch)
    assert np.abs(found.astype(int) - expected).max() <= 1


def test_a_file_changes_a_preset(tmp_path):
    path = write(tmp_path / "a.fits", cubes(1, bands=5)[0])
    (tmp_path / "my.yaml").write_text("preset: sdss\nbands: [4, 1, 2]\nkeep_color: false\nscales: [1, 2, 3]\n")
    g, r, i = cubes(1, bands=5)[0][[4, 1, 2]].astype(float) * np.reshape([1 / 3.6, 2 / 2.6, 3 / 2.0], (3, 1, 1))
    expected = 255 * sdss_frames(g, r, i)[:, ::-1].transpose(1, 2, 0)
    assert expected.max() < 255
    assert np.abs(pixels_of(path, str(tmp_path / "my.yaml")) - expected).max() < 0.51


def test_scaled_integers_in_an_extension_are_read(tmp_path):
    image = np.arange(256, dtype=np.uint16).reshape(16, 16) + 30000  # stored as int16 with BZERO
    path = write(tmp_path / "a.fits", image, names=("",), first=1)
    expected = 255 * AsinhStretch(0.1)(PercentileInterval(99.5)(np.arange(256.0).reshape(16, 16)))[::-1]
    assert np.array_equal(pixels_of(path)[:, :, 0], np.rint(expected))


GRZ = cubes(1)[0]
MAP = np.full((32, 32), 3, np.int16)


@pytest.mark.parametrize(
    ("images", "names", "expected"),
    [
        ([MAP, GRZ[0]], ("DQ", "SCI"), GRZ[:1]),
        ([MAP, GRZ[0]], ("flags", "a galaxy"), GRZ[:1]),
        ([MAP, GRZ[0]], ("a map", "a galaxy"), GRZ[:1]),
        ([GRZ[0], GRZ[1], GRZ[2]], ("WHT", "VAR_POISSON", "IMAGE"), GRZ[2:]),
        ([GRZ[0], GRZ[1]], ("other", "SCI"), GRZ[1:2]),
        ([GRZ[2], GRZ[0], GRZ[1]], ("z", "g", "r"), GRZ),
        ([GRZ[2], GRZ[1], GRZ[0]], ("HSC-I", "HSC-R", "HSC-G"), GRZ),
        ([GRZ[2], GRZ[0], GRZ[1], GRZ[1]], ("DES_Z", "DES_G", "DES_R", "DES_I"), GRZ),
    ],
)
def test_extensions_are_chosen_by_their_names(tmp_path, images, names, expected):
    cutout = read_cutout(write(tmp_path / "a.fits", *images, names=names, first=1), Stretch())
    assert np.array_equal(cutout.bands, expected)


def test_a_galaxy_per_extension_is_a_row_each(tmp_path, caplog):
    folder = tmp_path / "survey"
    for name in ("round", "spiral"):
        (folder / name).mkdir(parents=True)
    images = cubes(4, bands=1)[:, 0]
    write(folder / "round" / "m.fits", *images[:3], names=("GAL0", "GAL1", "GAL2"), first=1)
    write(folder / "spiral" / "two.fits", *images[2:], names=("",))  # beside an image, it may be its variance
    galaxies = open_galaxies(str(folder))
    assert galaxies.object_id.tolist() == [*(f"round/m.fits[{i}]" for i in (1, 2, 3)), "spiral/two.fits"]
    assert galaxies.label.tolist() == [0, 0, 0, 1]
    assert "1 images have more images in their FITS file: the first one is used" in caplog.text
    for row in range(3):
        assert np.array_equal(galaxies.pixels[row], pixels_of(write(tmp_path / "a.fits", images[row])))
    assert np.array_equal(galaxies.pixels[3], galaxies.pixels[2])
    (folder / "metadata.csv").write_text("file_name,redshift\nround/m.fits[2],0.5\nspiral/two.fits,0.25\n")
    named = open_galaxies(str(folder))
    assert named.object_id.tolist() == ["round/m.fits[2]", "spiral/two.fits", "round/m.fits[1]", "round/m.fits[3]"]
    assert named.extra["redshift"].to_pylist() == [0.5, 0.25, None, None]


def test_one_file_is_a_data_set_too(tmp_path):
    images = cubes(3, bands=1)[:, 0]
    write(tmp_path / "one.fits", images[0])
    write(tmp_path / "m.fits", *images, names=("A1", "A2", "A3"), first=1)
    assert open_galaxies(str(tmp_path / "one.fits")).object_id.tolist() == ["one.fits"]
    assert open_galaxies(str(tmp_path / "m.fits")).object_id.tolist() == ["m.fits[1]", "m.fits[2]", "m.fits[3]"]


def test_stretches_are_compared_on_a_contact_sheet(tmp_path, capsys, drawn_figures):
    folder = write_cutouts(tmp_path / "cutouts", cubes(2))
    main([str(folder), "--compare", "legacy", "sdss", "asinh", "--contact_sheet", str(tmp_path / "a.png")])
    with Image.open(tmp_path / "a.png") as sheet:
        assert sheet.height > 300  # three lines
    (folder / "000.fits").write_bytes(b"junk")
    with pytest.raises(UserError, match="one of the first images is not a FITS file"):
        main([str(folder), "--compare", "legacy"])


def test_images_survive_the_inverse_of_the_legacy_stretch(tmp_path):
    """Fluxes that the viewer's formula turns into given colors, written as FITS, are these colors again."""
    images = synthetic.render(np.arange(5), 64)
    for image in images:
        color = image[::-1, :, ::-1].transpose(2, 0, 1) / 255
        mean = color.mean(axis=0)
        intensity = np.sinh(np.sqrt(20) * mean) / 20
        scaled = color * np.divide(intensity, mean, out=np.ones_like(mean), where=mean > 0)
        flux = (scaled - 0.03) / np.reshape([6.0, 3.4, 2.2], (3, 1, 1))
        pixels = pixels_of(write(tmp_path / "a.fits", flux.astype(np.float32)))
        assert np.abs(pixels.astype(int) - image)[image.max(axis=2) < 255].max() <= 1


def pack(path: Path, packed: str) -> None:
    image = cubes(1)[0][0]
    if packed == ".fz":
        hdus = [fits.PrimaryHDU(), fits.CompImageHDU(image, compression_type="GZIP_2", quantize_level=0)]
        fits.HDUList(hdus).writeto(path)
    else:
        content = write(path.with_suffix(".tmp"), image).read_bytes()
        path.with_suffix(".tmp").unlink()
        path.write_bytes({"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress}[packed](content))


def test_compressed_files_and_other_suffixes_are_read(tmp_path):
    (tmp_path / "cutouts").mkdir()
    for suffix in (".fits", ".FIT", ".fts"):
        for packed in ("", ".gz", ".bz2", ".fz"):
            pack(tmp_path / "cutouts" / f"a{suffix}{packed}", packed)
    galaxies = open_galaxies(str(tmp_path / "cutouts"))
    assert len(galaxies) == 12
    assert (galaxies.pixels == galaxies.pixels[0]).all()
    assert galaxies.pixels[0].std() > 10


def test_bands_of_a_larger_cube_are_chosen(tmp_path):
    images = cubes(2, bands=5)
    folder = write_cutouts(tmp_path / "five", images)
    with pytest.raises(UserError, match=r"'000.fits' of row 0 has 5 bands: choose .* `bands: \[0, 1, 2\]`"):
        open_galaxies(str(folder))
    with pytest.raises(UserError, match="has 5 bands: choose those"):
        open_galaxies(str(folder), stretch=Stretch("auto", '{"bands": [0, 1, 5]}'))
    chosen = open_galaxies(str(folder), stretch=Stretch("auto", '{"bands": [4, 1, 2]}'))
    three = open_galaxies(str(write_cutouts(tmp_path / "three", images[:, [4, 1, 2]])))
    assert np.array_equal(chosen.pixels, three.pixels)


@pytest.mark.parametrize("bands", [1, 3])
@pytest.mark.parametrize("stretch", ["auto", "hst", "linear"])
def test_nan_is_black_and_does_not_change_the_other_pixels(tmp_path, bands, stretch):
    image = cubes(1, bands=bands)[0].astype(float)
    expected = pixels_of(write(tmp_path / "a.fits", image[:, :, :28]), stretch)
    image[:, :, 28:] = np.nan
    pixels = pixels_of(write(tmp_path / "a.fits", image), stretch)
    assert np.array_equal(pixels[:, :28], expected)
    assert (pixels[:, 28:] == 0).all()
    image[-1, 5, 5] = np.nan  # in one band
    assert (pixels_of(write(tmp_path / "a.fits", image), stretch)[-6, 5] == 0).all()


def test_the_fraction_of_nan_is_kept_and_an_image_of_nan_alone_is_unreadable(tmp_path):
    images = cubes(4, bands=1)[:, 0]
    images[1, :8], images[2] = np.nan, np.nan
    folder = write_cutouts(tmp_path / "cutouts", images)
    Image.fromarray(np.eye(32, dtype=np.uint8)).save(folder / "z.png")
    for _ in range(2):  # the second time from the cache
        galaxies = open_galaxies(str(folder), skip_unreadable=True)
        assert galaxies.problem.tolist() == ["", "", "has no pixel with a finite flux in all bands", "", ""]
        assert np.array_equal(galaxies.nan_fraction, np.float32([0, 0.25, 1, 0, np.nan]), equal_nan=True)
    (folder / "000.fits").unlink()
    with pytest.raises(UserError, match="'002.fits' of row 1 has no pixel".replace(".", "[.]")):
        open_galaxies(str(folder))


def test_fluxes_that_are_not_finite_give_an_image(tmp_path):
    for value in (np.inf, -np.inf, 1e308):
        for shape in ((3, 8, 8), (8, 8)):
            image = np.zeros(shape)
            image[..., 2:, :] = value
            image[..., 0, 0] = 1e-3  # else the finite pixels are all equal
            pixels = pixels_of(write(tmp_path / "a.fits", image))
            background = pixels[-1].min()  # the two lowest rows
            assert (pixels[:-2] > background).all() if value > 0 else (pixels[:-2] <= background).all()


def test_stretch_is_part_of_the_fingerprint_of_cutouts_alone(tmp_path):
    folder = write_cutouts(tmp_path / "cutouts", cubes(3))
    one, other = (open_galaxies(str(folder), stretch=Stretch(name)) for name in ("legacy", "sdss"))
    assert one.fingerprint != other.fingerprint
    assert not np.array_equal(one.pixels, other.pixels)
    one, other = (open_galaxies("synthetic:20", 16, stretch=Stretch(name)) for name in ("legacy", "sdss"))
    assert one.fingerprint == other.fingerprint


def truncate(path: Path) -> None:
    fits.writeto(path, cubes(1)[0])
    path.write_bytes(path.read_bytes()[:-2880])


def declare(**cards: int):
    def damage(path: Path) -> None:
        fits.writeto(path, cubes(1)[0])
        content = path.read_bytes()
        for name, value in cards.items():
            at = content.index(f"{name:<8}=".encode())
            content = content[:at] + f"{name:<8}={value:>21}".encode().ljust(80) + content[at + 80 :]
        path.write_bytes(content)

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(b"junk"), "is not a FITS file"),
        (lambda path: path.write_bytes(gzip.compress(bytes(10**8))), "is not a FITS file"),
        (lambda path: path.write_bytes(b"SIMPLE  =                    T"), "cannot be read as FITS"),
        (truncate, "is truncated"),
        (declare(NAXIS1=5000), "is 5000 x 32 pixels"),
        (declare(NAXIS1=2**40, NAXIS2=2**40), "cannot be read as FITS"),
        (declare(NAXIS1=-5), "pixels; crop"),
        (declare(NAXIS3=10**9), "is truncated"),
        (declare(BITPIX=17), "cannot be read as FITS"),
        (lambda path: fits.PrimaryHDU().writeto(path), "has no pixels"),
        (lambda path: fits.writeto(path, np.zeros((2, 3, 8, 8))), "or other axes than (height, width)"),
        (lambda path: path.write_bytes(gzip.compress(b"SIMPLE  =" + bytes(2**21))), "is larger than 1 MB when it"),
        (lambda path: path.write_bytes(gzip.compress(write(path, GRZ).read_bytes())[:-99]), "cannot be read as FITS"),
        (lambda path: write(path, MAP, names=("MASK",), first=1), "has no pixels"),
        (lambda path: write(path, np.full((8, 8), np.nan)), "has no pixel with a finite flux"),
    ],
)
def test_bad_cutouts_are_refused_in_one_line_or_skipped(tmp_path, monkeypatch, damage, message):
    monkeypatch.setattr("galaxy_mae.data.fits._MAX_UNPACKED", 1 << 20)
    folder = tmp_path / "cutouts"
    folder.mkdir()
    damage(folder / "a.fits")
    with pytest.raises(UserError) as refusal:
        open_galaxies(str(folder))
    assert message in str(refusal.value)
    assert "the image 'a.fits' of row 0 " in str(refusal.value)
    assert "\n" not in str(refusal.value)
    fits.writeto(folder / "b.fits", cubes(1)[0])
    galaxies = open_galaxies(str(folder), skip_unreadable=True)
    assert [message in problem for problem in galaxies.problem] == [True, False]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "none of auto, legacy, sdss, hsc, hst, asinh, linear, nor a YAML file (No such file"),
        ("lupton_q: 3", "not a stretch"),
        ("preset: lsst", "not a stretch (there is no stretch 'lsst'"),
        ("- q", "not a stretch"),
        ("q: [", "not a stretch"),
        ("q: .inf", "`scales` is out of its range"),
        ("q: -1", "`q` is out of its range"),
        ("scales: [1, 2, 0]", "`scales` is out of its range"),
        ("scales: [1, 2]", "`scales` is out of its range"),
        ("bands: [0, 1, 1]", "`bands` is out of its range"),
        ("percentile: 0", "`percentile` is out of its range"),
        ("percentile: high", "not a stretch"),
        ("white: 0", "`q` is out of its range"),
    ],
)
def test_a_stretch_is_checked_by_both_scripts(tmp_path, content, message):
    if content:
        (tmp_path / "my.yaml").write_text(content)
    for read, others in ((read_recipe, []), (read_evaluation_recipe, ["--encoder", "runs/a"])):
        with pytest.raises(UserError) as refusal:
            read([*others, "--stretch", str(tmp_path / "my.yaml")])
        assert message in str(refusal.value)
        assert f"--stretch {tmp_path / 'my.yaml'}: " in str(refusal.value)


def test_the_flag_is_in_the_recipe():
    assert read_recipe(["--stretch", "sdss"]).as_dict()["stretch"] == "sdss"
    assert read_evaluation_recipe(["--encoder", "runs/a", "--stretch", "hsc"]).evaluation.stretch == "hsc"
    assert read_recipe([]).galaxies.stretch == "auto"

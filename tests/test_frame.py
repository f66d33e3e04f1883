"""Images of any size and shape become squares, in which the galaxy stands as a model knows it."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from astropy.io import fits
from conftest import png, random_images
from PIL import Image
from test_trainer import command

import galaxy_mae
import linear_probe_checkpoints
import main
from galaxy_mae.data.cache import open_galaxies
from galaxy_mae.data.frame import HALF_WIDTH, Frame, galaxy_radius
from galaxy_mae.data.images import STATISTICS
from galaxy_mae.data.split import pairs_on_the_sky, sky_positions, split_galaxies
from galaxy_mae.errors import UserError
from galaxy_mae.predictions.schema import flags


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GALAXY_MAE_CACHE", str(tmp_path / "cache"))


def disc(height: int, width: int, radius: float, center: tuple[float, float] = (0, 0)) -> np.ndarray:
    """A uniform disc, whose 90 % of light are within 0.949 radii, on a faint sky: (height, width, 3) uint8."""
    y, x = np.mgrid[:height, :width] + 0.5
    inside = np.hypot(y - height / 2 - center[0], x - width / 2 - center[1]) <= radius
    noise = np.random.default_rng(0).normal(6, 1.5, (height, width))
    return np.repeat((noise + 150 * inside)[..., None], 3, axis=2).clip(0, 255).astype(np.uint8)


# ------------------------------------------------------------------------------------------------------------ radius


@pytest.mark.parametrize(("height", "width", "radius"), [(256, 256, 30), (256, 256, 60), (64, 64, 10), (200, 424, 25)])
def test_radius_holds_nine_tenths_of_the_light(height, width, radius):
    image = disc(height, width, radius)
    image = np.maximum(image, disc(height, width, 8, center=(0.42 * height, 0.42 * width)))  # a bright neighbor
    assert galaxy_radius(image) == pytest.approx(0.949 * radius, rel=0.08)


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((64, 64, 3), np.uint8),
        np.full((64, 64, 3), 200, np.uint8),
        disc(128, 128, 0),
        disc(128, 128, 10, center=(40, 40)),  # none at the center
        disc(256, 256, 2),  # a star
        random_images(1, 64)[0],
        np.zeros((1, 1, 3), np.uint8),
        np.zeros((3, 500, 3), np.uint8),
    ],
)
def test_what_has_no_radius(image):
    assert np.isnan(galaxy_radius(image))


# ------------------------------------------------------------------------------------------------------------ frames


@pytest.mark.parametrize(
    ("text", "arcsec", "width"),
    [
        ("crop", None, 60),
        ("pad", None, 100),
        ("resize", None, 100),
        ("center:0.5", None, 30),
        ("galaxy", None, round(2 * HALF_WIDTH * 0.949 * 12)),
        ("galaxy:1", None, round(2 * 0.949 * 12)),
        ("galaxy:9", None, 60),
        ("crop", 20.0, 40),
        ("crop", 80.0, 160),
        ("center:0.5", 80.0, 80),
    ],
)
def test_width_of_the_frame(text, arcsec, width):
    """In an image of 60 x 100 pixels with 0.5 arcsec each; the disc is at the center of every frame."""
    image = disc(60, 100, 12)
    framed = Frame.parse(text, arcsec).apply(image, 48, pixel_scale=0.5)
    assert framed.pixels.shape == (48, 48, 3)
    assert framed.numbers[2] == pytest.approx(width, abs=1.5)
    assert framed.numbers[:2] == (100, 60)
    bright = np.argwhere(framed.pixels[..., 0] > 75)
    assert bright.mean(axis=0) == pytest.approx([23.5, 23.5], abs=1)
    if text != "resize":
        assert np.ptp(bright[:, 0]) + 1 == pytest.approx(min(48, 24 * 48 / framed.numbers[2]), abs=2)


@pytest.mark.parametrize("radius", [14.2, 14.5, 14.8, 15.2])
@pytest.mark.parametrize(
    ("side", "text"), [(100, "galaxy"), (101, "galaxy"), (100, "center:0.37"), (101, "center:0.5")]
)
def test_a_turned_image_gives_a_turned_frame(side, text, radius):
    """Both have one center. The widths of the frames are odd and even."""
    image, frame = disc(side, side, radius), Frame.parse(text)
    turned = frame.apply(np.ascontiguousarray(np.rot90(image)), None)
    np.testing.assert_array_equal(turned.pixels, np.rot90(frame.apply(image, None).pixels))


def test_the_frame_of_pad_is_black_beside_the_image():
    framed = Frame.parse("pad").apply(np.full((10, 40, 3), 90, np.uint8), None)
    assert framed.pixels.shape == (40, 40, 3)
    assert (framed.pixels[15:25] == 90).all()
    assert framed.pixels.sum() == 10 * 40 * 3 * 90


@pytest.mark.parametrize("text", ["", "stretch", "center", "center:0", "center:1.5", "galaxy:-1", "crop:2", "center:x"])
def test_no_such_frame(text):
    with pytest.raises(UserError, match=r"--fit .*: it must be crop, pad"):
        Frame.parse(text)


# ---------------------------------------------------------------------------------------------------------- data sets

SHAPES = [(64, 64), (128, 96), (40, 200), (256, 256), (20, 30)]


def write_folder(folder, extension="png"):
    folder.mkdir()
    for i, (height, width) in enumerate(SHAPES):
        Image.fromarray(disc(height, width, min(height, width) / 5)).save(folder / f"{i}.{extension}")
    return folder


def test_a_folder_of_any_shapes_is_read_completely(tmp_path, caplog):
    galaxies = open_galaxies(str(write_folder(tmp_path / "mixed")), 48)
    assert not galaxies.problem.any()
    assert galaxies.pixels.shape == (5, 48, 48, 3)
    assert [
        *zip(galaxies.geometry["image_height"].to_pylist(), galaxies.geometry["image_width"].to_pylist(), strict=True)
    ] == SHAPES
    assert galaxies.geometry["frame_width"].to_pylist() == [64, 96, 40, 256, 20]
    for pixels in galaxies.pixels:  # the same disc in all
        assert np.mean(pixels[..., 0] > 75) == pytest.approx(np.pi / 25, abs=0.02)
    (line,) = [record.message for record in caplog.records]
    assert "2 of 5 images have less than 48 pixels: they are enlarged" in line


def test_the_frame_is_part_of_the_fingerprint_and_the_split_is_not(tmp_path):
    folder = str(write_folder(tmp_path / "mixed"))
    opened = {
        text: open_galaxies(folder, 32, frame=Frame.parse(text)) for text in ("crop", "pad", "galaxy", "galaxy:3")
    }
    assert len({galaxies.fingerprint for galaxies in opened.values()}) == 4
    assert not np.array_equal(opened["galaxy"].pixels, opened["crop"].pixels)
    for galaxies in opened.values():
        assert np.array_equal(galaxies.image_hash, opened["crop"].image_hash)  # of the native image: leaks are found
        for part, rows in split_galaxies(galaxies).items():
            assert np.array_equal(rows, split_galaxies(opened["crop"])[part])
    assert np.array_equal(open_galaxies(folder, 32, frame=Frame.parse("galaxy")).pixels, opened["galaxy"].pixels)


def test_overlaps_follow_the_size_of_each_image(tmp_path):
    """100 arcsec apart: within reach of the second image of 200 arcsec, not of two of 16 arcsec."""
    table = {"image": [png(disc(side, side, 4)) for side in (16, 200)], "pxscale": [1.0, 1.0]}
    pq.write_table(pa.table(table | {"ra": [10.0, 10.0], "dec": [0.0, 100 / 3600]}), tmp_path / "a.parquet")
    galaxies = open_galaxies(str(tmp_path / "a.parquet"), 16)
    assert pairs_on_the_sky(*sky_positions(galaxies))[0].tolist() == [[0, 1]]


def test_arcsec_by_column_and_by_wcs(tmp_path, caplog):
    """The second galaxy has half the pixel scale of the first one, so it is twice as large; the third has none."""
    images = [disc(64, 64, 8), disc(128, 128, 16), disc(64, 64, 8)]
    table = pa.table({"image": [png(image) for image in images], "pxscale": [0.5, 0.25, None]})
    pq.write_table(table, tmp_path / "a.parquet")
    cutouts = tmp_path / "cutouts"
    cutouts.mkdir()
    for i, (image, scale) in enumerate(zip(images, (0.5, 0.25, None), strict=True)):
        header = fits.Header()
        if scale:
            header.update(CTYPE1="RA---TAN", CTYPE2="DEC--TAN", CDELT1=-scale / 3600, CDELT2=scale / 3600)
        fits.writeto(cutouts / f"{i}.fits", image[..., 0].astype(np.float32), header)
    for source in (tmp_path / "a.parquet", cutouts):
        caplog.clear()
        galaxies = open_galaxies(str(source), 16, frame=Frame.parse("crop", 16.0))
        assert galaxies.geometry["frame_width"].to_pylist() == [32, 64, 64]
        first, second, third = galaxies.pixels.astype(int)
        assert np.abs(first - second).mean() < 6 < np.abs(first - third).mean()
        (line,) = [record.message for record in caplog.records if "--arcsec" in record.message]
        assert "--arcsec is not used for 1 images" in line
    paths = [cutouts / f"{i}.fits" for i in range(3)]
    assert galaxy_mae.predict(paths, arcsec=16, use_cpu=True)["frame_width"].tolist() == [32, 64, 64]


def test_catalogue_has_sizes_radii_and_flags(tmp_path):
    images = [disc(64, 64, 8), disc(96, 128, 12), disc(64, 64, 0), np.full((9, 9, 3), 5, np.uint8)]
    table = pa.table({"image": [*map(png, images), b"junk"], "pxscale": [0.5, 0.25, 0.5, 0.5, 0.5], "radius": range(5)})
    pq.write_table(table, tmp_path / "a.parquet")
    found = galaxy_mae.predict(tmp_path / "a.parquet", fit="galaxy", use_cpu=True)
    assert found["image_width"].tolist() == [64, 128, 64, 9, 0]
    assert found["image_height"].tolist() == [64, 96, 64, 9, 0]
    assert found["flag"].tolist()[2:] == ["empty", "blank", "unreadable"]
    assert found["radius"].to_numpy()[:2] == pytest.approx([7.6, 11.4], rel=0.1)
    assert found["radius_arcsec"].to_numpy()[:2] == pytest.approx([3.8, 2.85], rel=0.1)
    assert found["radius"].isna().tolist() == [False, False, True, True, True]
    assert found["radius_input"].tolist() == list(range(5))
    cropped = galaxy_mae.predict(tmp_path / "a.parquet", fit="crop", use_cpu=True)
    assert "radius_arcsec" not in cropped
    assert cropped["flag"].tolist()[2:] == ["empty", "blank", "unreadable"]
    in_memory = galaxy_mae.predict(images, fit="galaxy", use_cpu=True)
    assert in_memory["predicted_class"].tolist() == found["predicted_class"].tolist()[:4]


def test_the_flag_of_what_has_no_radius():
    """The mildest of all flags: what is empty or unlike the training images says so."""
    statistics = np.where(np.array(STATISTICS) == "peak", 100.0, 0.0)[None].repeat(3, axis=0)
    radius, far = np.array([5, np.nan, np.nan]), np.array([0.5, 0.5, 2])
    found = flags(statistics, np.array(["", "", ""], object), np.zeros(3, bool), None, radius, far)
    assert found.tolist() == ["", "no_radius", "far"]


def test_a_model_looks_at_galaxies_in_the_frame_of_its_training(tmp_path, monkeypatch):
    """Also the classifier that is fine-tuned from it. The flag chooses another one."""
    monkeypatch.chdir(tmp_path)
    images = [disc(96, 96, radius) for radius in np.linspace(12, 30, 120)]
    sky = {"ra": np.linspace(0, 300, 120), "dec": np.zeros(120)}  # discs look alike to the search for seen galaxies
    table = pa.table({"image": [png(image) for image in images], "label": np.arange(120) % 2} | sky)
    pq.write_table(table, "galaxies.parquet")
    flags = ["--dataset", "galaxies.parquet", "--max_steps", "2", "--fit", "galaxy", "--max_crop_scale", "1.5"]
    main.main(command(tmp_path / "run", tmp_path / "galaxies.parquet", *flags))
    looks = json.loads((tmp_path / "run" / "encoder" / "training_images.json").read_text())
    assert Frame.of(looks["frame"]) == Frame("galaxy")
    method = ["--method", "ssl_fine_tune", "--seeds", "1", "--num_train_epochs", "1", "--batch_size", "16"]
    evaluation = ["--encoder", "run", "--dataset", "galaxies.parquet", "--report_to", "none", "--output_dir", "results"]
    linear_probe_checkpoints.main([*evaluation, *method])
    about = json.loads((tmp_path / "results" / "evaluation.json").read_text())
    assert Frame.of(about["frame"]) == Frame("galaxy")
    for model in ("run", "results/ssl_fine_tune"):
        found = galaxy_mae.predict("galaxies.parquet", model)
        assert found["radius"].notna().all()
        assert (found["frame_width"] < 96).all()
        assert "radius" not in galaxy_mae.predict("galaxies.parquet", model, fit="crop")
    pair, between = [images[0], images[-1]], {}
    for fit in (None, "crop"):
        between[fit] = np.abs(
            np.subtract(*galaxy_mae.predict(pair, "run", embeddings=True, fit=fit)["embedding"])
        ).mean()
    assert between[None] < 0.5 * between["crop"]

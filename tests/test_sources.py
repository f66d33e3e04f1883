"""Every kind of source gives the same array, and a broken source raises an error of one line."""

import json
import multiprocessing
import os
import subprocess
import sys
import time

import h5py
import numpy as np
import pytest
from conftest import random_images, write_hdf5
from PIL import Image

from galaxy_mae.data.sources import GALAXY10_CLASSES, open_galaxies
from galaxy_mae.errors import UserError


@pytest.fixture
def images():
    return random_images(40)


LABEL = np.sort(np.arange(40) % 10)


def test_hdf5_file_is_read_unchanged(tmp_path, images):
    columns = {name: np.random.default_rng(0).uniform(0, 1, 40) for name in ("ra", "dec", "pxscale")}
    columns["ra"][3] = np.nan
    galaxies = open_galaxies(str(write_hdf5(tmp_path / "a.h5", images, LABEL, **columns)))
    assert np.array_equal(galaxies.pixels, images)
    assert np.array_equal(galaxies.label, LABEL)
    assert galaxies.class_names == GALAXY10_CLASSES
    for name, key in (("ra", "ra"), ("dec", "dec"), ("pixel_scale", "pxscale")):
        assert np.array_equal(getattr(galaxies, name), columns[key], equal_nan=True)
    indices = np.array([0, 5, 33])
    mean, std = galaxies.channel_statistics(indices)
    assert np.allclose(mean, images[indices].mean(axis=(0, 1, 2)) / 255)
    assert np.allclose(std, images[indices].std(axis=(0, 1, 2)) / 255)


def test_parquet_and_image_folders_give_the_same_array(tmp_path, images):
    import datasets

    table = {"image": [encoded(image, tmp_path) for image in images], "label": LABEL, "ra": np.arange(40.0)}
    datasets.Dataset.from_dict(table).to_parquet(tmp_path / "galaxies.parquet")
    from_parquet = open_galaxies(str(tmp_path / "galaxies.parquet"))
    for row, (image, label) in enumerate(zip(images, LABEL, strict=True)):
        folder = tmp_path / "folder" / f"{label}_class"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{row:04d}.png")
    from_folder = open_galaxies(str(tmp_path / "folder"))
    for galaxies in (from_parquet, from_folder):
        assert np.array_equal(galaxies.pixels, images)
        assert np.array_equal(galaxies.label, LABEL)
    assert from_parquet.class_names == GALAXY10_CLASSES
    assert np.array_equal(from_parquet.ra, np.arange(40.0))
    assert from_folder.class_names == tuple(f"{c}_class" for c in range(10))


def test_predefined_test_split_is_marked(tmp_path, images):
    for part, rows in (("train", range(30)), ("test", range(30, 40))):
        for row in rows:
            folder = tmp_path / part / f"{LABEL[row]}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(images[row]).save(folder / f"{row:04d}.png")
    galaxies = open_galaxies(str(tmp_path))
    assert galaxies.predefined_test.sum() == 10
    assert np.array_equal(galaxies.pixels[galaxies.predefined_test], images[30:])


def test_image_size_below_the_native_size_is_area_averaged(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), dtype=np.uint8)
    path = write_hdf5(tmp_path / "a.h5", images)
    small = open_galaxies(str(path), 8)
    mean = images.reshape(40, 8, 4, 8, 4, 3).mean(axis=(2, 4))
    assert np.abs(small.pixels - mean).max() <= 0.501
    odd = open_galaxies(str(path), 24)  # does not divide 32: each new pixel contains thirds of old pixels
    fine = images.repeat(3, axis=1).repeat(3, axis=2)
    mean = fine.reshape(40, 24, 4, 24, 4, 3).mean(axis=(2, 4))
    assert np.abs(odd.pixels - mean).max() <= 0.501
    assert small.native_size == 32
    assert open_galaxies(str(path), 64).image_size == 32  # images are not enlarged


def test_cached_source_is_not_ingested_again(tmp_path, images, monkeypatch):
    path = write_hdf5(tmp_path / "a.h5", images)
    open_galaxies(str(path))
    copied = tmp_path / "copy.h5"
    copied.write_bytes(path.read_bytes())
    monkeypatch.setattr("galaxy_mae.data.sources._ingest", lambda *_: pytest.fail("ingested again"))
    started = time.perf_counter()
    assert np.array_equal(open_galaxies(str(path)).pixels, images)
    assert time.perf_counter() - started < 1
    assert np.array_equal(open_galaxies(str(copied)).pixels, images)  # recognised by its content
    with pytest.raises(pytest.fail.Exception):
        open_galaxies(str(write_hdf5(tmp_path / "a.h5", images[::-1])))  # changed in place: ingested again


def _open(path: str) -> bool:
    return bool(np.array_equal(open_galaxies(path).pixels, random_images(40, seed=9)))


def test_several_processes_open_one_source_at_once(tmp_path):
    path = write_hdf5(tmp_path / "a.h5", random_images(40, seed=9))
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        assert pool.map(_open, [str(path)] * 4) == [True] * 4


def test_killed_ingestion_leaves_no_incomplete_array(tmp_path):
    """After a kill at any time, a later run does not take an incomplete array for a complete one."""
    path = write_hdf5(tmp_path / "a.h5", random_images(2000, 64, seed=5))
    program = "import sys; from galaxy_mae.data.sources import open_galaxies; open_galaxies(sys.argv[1])"
    environment = os.environ | {"GALAXY_MAE_CACHE": str(tmp_path / "cache")}
    killed = 0
    for delay in (0.05, 0.2, 0.4):
        process = subprocess.Popen([sys.executable, "-c", program, path], env=environment, stderr=subprocess.DEVNULL)
        while process.poll() is None and not list((tmp_path / "cache").glob("*/.tmp-*/*.npy")):
            time.sleep(0.01)
        time.sleep(delay)
        process.kill()
        killed += process.wait() != 0
    assert killed
    done = subprocess.run([sys.executable, "-c", program, path], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (stored,) = (tmp_path / "cache").glob("*/64.npy")
    assert np.array_equal(np.load(stored, mmap_mode="r"), random_images(2000, 64, seed=5))


def test_ingestion_needs_little_memory(tmp_path):
    """A process that ingests 590 MB of pixels uses less than 500 MB at its peak, including its imports."""
    path = tmp_path / "large.h5"
    with h5py.File(path, "w") as file:
        images = file.create_dataset("images", (3000, 256, 256, 3), "u1", chunks=(8, 256, 256, 3), compression=1)
        block = random_images(100, 256)
        for start in range(0, 3000, 100):
            images[start : start + 100] = block
        file["ans"] = np.arange(3000) % 10
    program = (
        "import sys; from galaxy_mae.data.sources import open_galaxies; open_galaxies(sys.argv[1]);"
        "print([line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')][0])"
    )
    environment = os.environ | {"GALAXY_MAE_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", program, path], env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert int(done.stdout) < 500_000  # kB


def truncated(path, images):
    write_hdf5(path, images)
    path.write_bytes(path.read_bytes()[:-2000])


def without(key):
    def write(path, images):
        write_hdf5(path, images)
        with h5py.File(path, "a") as file:
            del file[key]

    return write


def with_key(key, values):
    def write(path, images):
        without(key)(path, images)
        with h5py.File(path, "a") as file:
            file[key] = values

    return write


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path, images: path.write_text("no galaxies here"), "not an HDF5 file"),
        (lambda path, images: path.write_bytes(b""), "not an HDF5 file"),
        (truncated, "truncated"),
        (without("images"), "no key `images`"),
        (without("ans"), "no key `ans`"),
        (with_key("images", np.zeros((40, 32, 32), np.uint8)), "shape (40, 32, 32)"),
        (with_key("images", np.zeros((40, 32, 16, 3), np.uint8)), "shape (40, 32, 16, 3)"),
        (with_key("images", np.zeros((40, 32, 32, 3), np.float32)), "dtype float32"),
        (with_key("ans", np.zeros(39, np.uint8)), "40 images"),
        (with_key("ans", np.arange(40) % 11), "row 10 has label 10"),
        (with_key("ra", np.zeros(39)), "`ra`"),
        (lambda path, images: write_hdf5(path, images[:0]), "empty"),
    ],
)
def test_broken_hdf5_raises_user_error(tmp_path, images, write, message):
    path = tmp_path / "broken.h5"
    if message == "`ra`":
        write_hdf5(path, images)
        with h5py.File(path, "a") as file:
            file["ra"] = np.zeros(39)
    else:
        write(path, images)
    with pytest.raises(UserError, match=r"broken\.h5") as error:
        open_galaxies(str(path))
    assert message in str(error.value)


# `datasets` leaves the file open when it cannot decode it.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_broken_images_raise_user_error(tmp_path, images):
    folder = tmp_path / "images" / "round"
    folder.mkdir(parents=True)
    for row in range(3):
        Image.fromarray(images[row]).save(folder / f"{row}.png")
    Image.fromarray(images[0][:16]).save(folder / "3.png")
    with pytest.raises(UserError, match="row 3 is 32 x 16"):
        open_galaxies(str(tmp_path / "images"))
    (folder / "3.png").write_bytes((folder / "2.png").read_bytes()[:100])
    with pytest.raises(UserError, match="row 3 cannot be decoded"):
        open_galaxies(str(tmp_path / "images"))
    (tmp_path / "nothing").mkdir()
    with pytest.raises(UserError, match="the folder is empty"):
        open_galaxies(str(tmp_path / "nothing"))
    (tmp_path / "no.parquet").write_text("no table")
    with pytest.raises(UserError, match="cannot be read as Parquet"):
        open_galaxies(str(tmp_path / "no.parquet"))


def test_full_cache_disk_leaves_no_files(small_disk, tmp_path, monkeypatch):
    path = write_hdf5(tmp_path / "a.h5", random_images(2000, 64, seed=6))
    monkeypatch.setenv("GALAXY_MAE_CACHE", str(small_disk))
    with pytest.raises(UserError, match=r"the disk or quota is full.*GALAXY_MAE_CACHE"):
        open_galaxies(str(path))
    assert not [file for file in small_disk.rglob("*") if ".np" in file.name]


def parquet(path, **columns):
    import datasets

    datasets.Dataset.from_dict(columns).to_parquet(path)
    return str(path)


def encoded(image, tmp_path):
    path = tmp_path / "one.png"
    Image.fromarray(image).save(path)
    return {"bytes": path.read_bytes(), "path": None}


def test_string_labels_missing_labels_and_non_labels(tmp_path, images, caplog):
    encoded_images = [encoded(image, tmp_path) for image in images]
    named = open_galaxies(parquet(tmp_path / "named.parquet", image=encoded_images, label=["spiral", "round"] * 20))
    assert named.class_names == ("round", "spiral")
    assert named.label.tolist() == [1, 0] * 20
    partly = open_galaxies(parquet(tmp_path / "partly [1].parquet", image=encoded_images, label=[1, None] * 20))
    assert partly.label is None
    assert "not used" in caplog.text
    with pytest.raises(UserError, match="does not contain class labels"):
        open_galaxies(parquet(tmp_path / "ids.parquet", image=encoded_images, label=list(range(10**6, 10**6 + 40))))


def test_columns_of_the_wrong_type_raise_user_error(tmp_path, images):
    encoded_images = [encoded(image, tmp_path) for image in images[:4]]
    with pytest.raises(UserError, match="`ra` must contain numbers"):
        open_galaxies(parquet(tmp_path / "a.parquet", image=encoded_images, ra=["12:34:56"] * 4))
    with pytest.raises(UserError, match="row 0 cannot be decoded"):
        open_galaxies(parquet(tmp_path / "b.parquet", image=[{"bytes": b"junk", "path": None}, *encoded_images]))
    with pytest.raises(UserError, match="does not contain images"):
        open_galaxies(parquet(tmp_path / "c.parquet", image=[1, 2, 3]))
    deep = [encoded(np.zeros((32, 32), np.uint16) + 4000, tmp_path)]
    with pytest.raises(UserError, match="more than 8 bits"):
        open_galaxies(parquet(tmp_path / "d.parquet", image=deep))


@pytest.mark.parametrize("source", ["nowhere.h5", "missing/galaxies.parquet", "no such thing", "synthetic:0"])
def test_unknown_source_raises_user_error(source):
    with pytest.raises(UserError, match="--dataset"):
        open_galaxies(source)


def test_synthetic_source_has_all_columns():
    galaxies = open_galaxies("synthetic:50", 32)
    assert galaxies.pixels.shape == (50, 32, 32, 3)
    assert np.bincount(galaxies.label).tolist() == [5] * 10
    assert np.isfinite(galaxies.ra).all()
    assert json.dumps(galaxies.class_names) == json.dumps(GALAXY10_CLASSES)

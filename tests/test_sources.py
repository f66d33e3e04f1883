"""Every kind of source gives the same array, and a broken source raises an error of one line."""

import errno
import fcntl
import gc
import io
import json
import multiprocessing
import os
import re
import shutil
import socket
import struct
import subprocess
import sys
import tarfile
import tempfile
import time
import zlib
from contextlib import suppress
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from astropy.io import fits
from conftest import SHARED, random_images, write_hdf5
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from galaxy_mae import files
from galaxy_mae.catalogue.__main__ import main as catalogue
from galaxy_mae.data import cache, download, hats, kinds, synthetic
from galaxy_mae.data.__main__ import main
from galaxy_mae.data.cache import _sample_checksum, channel_statistics, open_galaxies
from galaxy_mae.data.columns import GALAXY10_CLASSES, GALAXY10_SDSS_CLASSES, read_columns
from galaxy_mae.data.fits import Cutout, Stretch
from galaxy_mae.data.source import Source
from galaxy_mae.data.split import split_galaxies
from galaxy_mae.data.stream import open_stream
from galaxy_mae.errors import UserError


@pytest.fixture
def images():
    return random_images(40)


LABEL = np.sort(np.arange(40) % 10)
TEN_CLASSES = tuple(f"class {c}" for c in range(10))  # where nothing tells their names


def test_hdf5_file_is_read_unchanged(tmp_path, images):
    columns = {name: np.random.default_rng(0).uniform(0, 1, 40) for name in ("ra", "dec", "pxscale")}
    columns["ra"][3] = np.nan
    galaxies = open_galaxies(str(write_hdf5(tmp_path / "a.h5", images, LABEL, **columns)))
    assert np.array_equal(galaxies.pixels, images)
    assert np.array_equal(galaxies.label, LABEL)
    assert galaxies.class_names == TEN_CLASSES
    for name, key in (("ra", "ra"), ("dec", "dec"), ("pixel_scale", "pxscale")):
        assert np.array_equal(getattr(galaxies, name), columns[key], equal_nan=True)
    indices = np.array([0, 5, 33])
    mean, std = channel_statistics([(galaxies, indices)])
    assert np.allclose(mean, images[indices].mean(axis=(0, 1, 2)) / 255)
    assert np.allclose(std, images[indices].std(axis=(0, 1, 2)) / 255)


def test_image_size_below_the_native_size_is_area_averaged(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), dtype=np.uint8)
    path = write_hdf5(tmp_path / "a.h5", images)
    small = open_galaxies(str(path), 8)
    mean = images.reshape(40, 8, 4, 8, 4, 3).mean(axis=(2, 4))
    assert np.abs(small.pixels - mean).max() <= 1  # rounded twice, as the image processors of the models do
    odd = open_galaxies(str(path), 24)  # does not divide 32: each new pixel contains thirds of old pixels
    fine = images.repeat(3, axis=1).repeat(3, axis=2)
    mean = fine.reshape(40, 24, 4, 24, 4, 3).mean(axis=(2, 4))
    assert np.abs(odd.pixels - mean).max() <= 0.501
    assert small.native_size == 32


def test_cached_source_is_not_ingested_again(tmp_path, images, monkeypatch):
    path = write_hdf5(tmp_path / "a.h5", images)
    open_galaxies(str(path))
    copied = tmp_path / "copy.h5"
    copied.write_bytes(path.read_bytes())
    monkeypatch.setattr("galaxy_mae.data.cache._ingest", lambda *_: pytest.fail("ingested again"))
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
    program = "import sys; from galaxy_mae.data.cache import open_galaxies; open_galaxies(sys.argv[1])"
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
    assert sorted(file.name for file in stored.parent.iterdir()) == [".lock", "64.npy", "64.npz", "source.json"]
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
        "import sys; from galaxy_mae.data.cache import open_galaxies; open_galaxies(sys.argv[1]);"
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
        (lambda path, images: path.write_text("no galaxies here"), "cannot be read as HDF5"),
        (lambda path, images: path.write_bytes(b""), "cannot be read as HDF5"),
        (truncated, "truncated"),
        (without("images"), "no key `images`"),
        (with_key("images", np.zeros((40, 32), np.uint8)), "`images` is uint8 (40, 32)"),
        (with_key("images", np.zeros((40, 32, 32, 2), np.uint8)), "with C 1, 3 or 4 if it is uint8"),
        (with_key("images", np.zeros((40, 5, 32, 32), np.float32)), "has 5 bands: choose those"),
        (with_key("images", np.zeros((40, 32, 32, 3), complex)), "`images` is complex128"),
        (with_key("ans", np.zeros(39, np.uint8)), "40 images"),
        (with_key("ans", np.arange(40) - 1), "row 0 has label -1"),
        (with_key("ra", np.zeros(39)), "`ra`"),
        (lambda path, images: write_hdf5(path, images[:0]), "it is empty"),
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


def test_broken_images_raise_user_error(tmp_path, images):
    folder = tmp_path / "images" / "round"
    folder.mkdir(parents=True)
    for row in range(3):
        Image.fromarray(images[row]).save(folder / f"{row}.png")
    (folder / "3.png").write_bytes((folder / "2.png").read_bytes()[:100])
    with pytest.raises(UserError, match="row 3 cannot be decoded"):
        open_galaxies(str(tmp_path / "images"))
    (tmp_path / "nothing").mkdir()
    with pytest.raises(UserError, match="the folder is empty"):
        open_galaxies(str(tmp_path / "nothing"))
    (tmp_path / "no.parquet").write_text("no table")
    with pytest.raises(UserError, match="cannot be read as Parquet"):
        open_galaxies(str(tmp_path / "no.parquet"))


def test_leftovers_beside_a_complete_entry_are_removed(tmp_path, images, own_cache):
    """As of a process that was killed after it had renamed its last file."""
    survey = write_hdf5(tmp_path / "survey.h5", images)
    open_galaxies(str(survey))
    entry = next(own_cache.glob("*/source.json")).parent
    (entry / ".tmp-0123456789ab").mkdir()
    (entry / ".tmp-0123456789ab.lock").touch()
    open_galaxies(str(survey))
    assert not list(entry.glob(".tmp-*"))


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
        open_galaxies(parquet(tmp_path / "a.parquet", image=encoded_images, ra=["12:34:56"] * 4, dec=[0.0] * 4))
    with pytest.raises(UserError, match="row 0 cannot be decoded"):
        open_galaxies(parquet(tmp_path / "b.parquet", image=[{"bytes": b"junk", "path": None}, *encoded_images]))
    with pytest.raises(UserError, match="no column of images"):
        open_galaxies(parquet(tmp_path / "c.parquet", image=[1, 2, 3]))


@pytest.mark.parametrize(
    "source",
    [
        "nowhere.h5",
        "missing/galaxies.parquet",
        "no such thing",
        "synthetic:0",
        "synthetic:²",
        "a\0.h5",
    ],
)
def test_unknown_source_raises_user_error(source):
    with pytest.raises(UserError, match="--dataset"):
        open_galaxies(source)


def test_synthetic_galaxies_are_made_once(monkeypatch):
    """But for the few among which the first is looked at; and one sees how far it is."""
    rendered, render = [], synthetic.render
    monkeypatch.setattr(synthetic, "render", lambda i, size: rendered.append(len(i)) or render(i, size))
    open_galaxies("synthetic:300", 24)
    assert sum(rendered) <= 300 + 32
    assert max(rendered) <= 32


# -------------------------------------------------------------------------------------------------------- hostile files


@pytest.fixture
def no_network(monkeypatch):
    """Fail if anything asks for the address of a host or connects to one."""
    for name in ("getaddrinfo", "create_connection"):
        monkeypatch.setattr(socket, name, lambda *_a, **_k: pytest.fail("the network was used"))
    monkeypatch.setattr(socket.socket, "connect", lambda *_a, **_k: pytest.fail("the network was used"))


@pytest.fixture
def own_cache(tmp_path, monkeypatch) -> Path:
    """A cache folder for one test."""
    monkeypatch.setenv("GALAXY_MAE_CACHE", str(tmp_path / "own cache"))
    return tmp_path / "own cache"


def assert_refused(source: Path, message: str, cache: Path) -> None:
    """The source is refused within seconds, by one line, and leaves no pixels in the cache."""
    started = time.perf_counter()
    with pytest.raises(UserError) as refusal:
        open_galaxies(str(source))
    assert time.perf_counter() - started < 10  # the first import of `datasets` takes a few of them
    line = str(refusal.value)
    assert "\n" not in line
    assert message in line
    assert len(line) - len(str(source)) < 400
    assert source.name in line
    assert not [file for file in cache.rglob("*") if ".np" in file.name]


def png(width: int, height: int, bits: int = 8, *chunks: tuple[bytes, bytes]) -> bytes:
    """An RGB PNG of any declared size; its pixels are black, and there if they are few."""
    pixels = zlib.compress((b"\0" + bytes(3 * bits // 8 * width)) * height) if width * height < 10**6 else b""
    header = struct.pack(">IIBBBBB", width, height, bits, 2, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", pixels), (b"IEND", b"")]
    written = (struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(written)


def test_png_of_the_tests_is_read(tmp_path):
    """The refusals below have the cause they name: without it the image is read."""
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"image": [png(32, 32)] * 3}), path)
    assert open_galaxies(str(path)).blank.all()


def hdf5_with(key, create):
    """Replace `key` in a valid file; `create(file, folder, key)` makes what stands in its place."""

    def write(path, images):
        write_hdf5(path, images, ra=np.zeros(len(images)), dec=np.zeros(len(images)))
        write_hdf5(path.with_name("other.h5"), images)
        with h5py.File(path, "a") as file:
            del file[key]
            create(file, path.parent, key)

    return write


def links(**targets):
    def create(file, _folder, key):
        for name, target in targets.items():
            file[key if name == "key" else name] = target

    return create


def virtual(file, folder, key):
    layout = h5py.VirtualLayout((40, 32, 32, 3), "u1")
    layout[:] = h5py.VirtualSource(folder / "other.h5", "images", (40, 32, 32, 3))
    file.create_virtual_dataset(key, layout)


def external_storage(file, folder, key):
    (folder / "raw").write_bytes(bytes(40 * 32 * 32 * 3))
    file.create_dataset(key, (40, 32, 32, 3), "u1", external=[(folder / "raw", 0, 40 * 32 * 32 * 3)])


def declared(shape, *chunks, **options):
    """A data set of which only the given chunks, compressed ones, are there."""

    def create(file, _folder, key):
        values = file.create_dataset(key, shape, "u1", **options)
        for row, content in enumerate(chunks):
            values.id.write_direct_chunk((row, 0, 0, 0), content)

    return create


other_file = h5py.ExternalLink("other.h5", "/images")


@pytest.mark.parametrize(
    ("key", "create", "message"),
    [
        ("images", links(key=other_file), "`images` is a link"),
        ("images", links(key=h5py.ExternalLink("missing.h5", "/images")), "`images` is a link"),
        ("ra", links(key=h5py.ExternalLink("other.h5", "/ans")), "`ra` is a link"),
        ("images", links(key=h5py.SoftLink("/out"), out=other_file), "`images` is a link"),
        ("images", links(key=h5py.SoftLink("/nowhere")), "`images` is a link"),
        ("images", links(key=h5py.SoftLink("/images")), "`images` is a link"),
        ("images", virtual, "all its values in this file"),
        ("images", external_storage, "all its values in this file"),
        ("images", lambda file, _, key: file.create_group(key), "or no data set with"),
        ("images", lambda file, _, key: file.create_dataset(key, data=h5py.Empty("u1")), "or no data set with"),
        ("ans", lambda file, _, key: file.create_group(key), "or no data set with"),
        ("ans", links(key=np.zeros(40, np.complex64)), "`ans` is complex64"),
        ("images", declared((10**9, 32, 32, 3), chunks=(1, 32, 32, 3)), "declares 3,072,000,000,000 bytes"),
        ("images", declared((10**9, 32, 32, 3)), "not all of them were written"),
        ("images", declared((40, 32, 32, 3), *[bytes(3072)] * 30, chunks=(1, 32, 32, 3)), "not all of them"),
        ("ans", declared((40,), chunks=(8,)), "`ans` declares 40 bytes, and not all"),
        (
            "images",
            declared((2, 4096, 4096, 3), bytes(10**6), chunks=(30, 4096, 4096, 3), maxshape=(None,) * 4),
            "chunks of",
        ),
        ("images", declared((40, 0, 0, 3)), "`images` is uint8 (40, 0, 0, 3)"),
        ("images", declared((40, 5000, 5000, 3), chunks=(1, 50, 50, 3)), "`images` is uint8 (40, 5000, 5000, 3)"),
    ],
)
def test_hdf5_that_points_elsewhere_or_declares_too_much_is_refused(tmp_path, images, own_cache, key, create, message):
    path = tmp_path / "hostile.h5"
    hdf5_with(key, create)(path, images)
    assert_refused(path, message, own_cache)


def struct_of(**fields):
    return pa.array([dict(zip(fields, row, strict=True)) for row in zip(*fields.values(), strict=True)])


GOOD = [png(32, 32)] * 3
BOMB = (b"zTXt", b"a\0\0" + zlib.compress(bytes(10**8)))


@pytest.mark.parametrize("as_struct", [False, True])
def test_a_value_that_many_rows_refer_to_is_read_in_small_batches(tmp_path, as_struct):
    """It is in the file once: 64 rows of it would take 1.3 GB."""
    values = pa.array([b"x" * 20_000_000], pa.binary())
    column = pa.DictionaryArray.from_arrays(pa.array([0] * 64, pa.int32()), values).cast(pa.binary())
    if as_struct:
        column = pa.StructArray.from_arrays([column, pa.nulls(64, pa.string())], ["bytes", "path"])
    path = tmp_path / "a.parquet"
    pq.write_table(
        pa.table({"image": column, "ra": range(64)}), path, compression="zstd", dictionary_pagesize_limit=2**30
    )
    assert path.stat().st_size < 100_000
    partition = hats.Partition(-1, -1, path.name, (path,))
    names = ["image.bytes", "image.path"] if as_struct else ["image"]
    batches = [(len(batch), batch.nbytes) for batch in partition.read(names, 64)]
    assert sum(rows for rows, _ in batches) == 64
    assert max(size for _, size in batches) < 64 << 20
    assert [len(batch) for batch in partition.read(["ra"], 64)] == [64]


def test_tables_and_fluxes_that_take_far_more_memory_than_their_file_are_refused(tmp_path, monkeypatch, own_cache):
    """Texts of a dictionary, runs of floats, and holes of a FITS table; the bound is lowered, to spare memory."""
    monkeypatch.setattr(files, "MAX_DECODED_BYTES", 1 << 20)
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"image": GOOD * 100, "name": ["y" * 100_000] * 300}), path)
    assert_refused(path, "far more than it can hold", own_cache)
    flux = pa.array([{"band": ["g"], "flux": [[[0.0] * 10**6]]}])
    pq.write_table(pa.table({"image": flux, "noise": np.random.default_rng(0).random(1)}), path)
    with pytest.raises(UserError, match="far more than it can hold"):
        hats.Partition(-1, -1, path.name, (path,)).count_rows()
    table = fits.BinTableHDU.from_columns([fits.Column("path", "8A", array=["a.png"])])
    table.writeto(tmp_path / "a.fits")
    content = (tmp_path / "a.fits").read_bytes()
    (tmp_path / "a.fits").write_bytes(
        content.replace(b"NAXIS2  =                    1", b"NAXIS2  =              1000000")
    )
    os.truncate(tmp_path / "a.fits", 10**7)
    assert_refused(tmp_path / "a.fits", "far more than it can hold", own_cache)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"image": ["/etc/galaxy.png"] * 3}, "row 0 cannot be opened"),
        ({"image": ["http://127.0.0.1:9/a.png"] * 3}, "row 0 cannot be opened"),
        (
            {"image": struct_of(bytes=[GOOD[0], None, None], path=["a", "b.png", "c"])},
            "row 1 has the path or URL 'b.png'",
        ),
        (
            {"image": struct_of(bytes=[GOOD[0], None], path=["a", "http://127.0.0.1:9/" + "a" * 999])},
            "row 1 has the path",
        ),
        ({"image": struct_of(bytes=[GOOD[0], None], path=["", None])}, "row 1 is missing"),
        ({"image": [*GOOD, None]}, "row 3 is missing"),
        ({"image": struct_of(image=list(struct_of(bytes=GOOD).to_pylist()))}, "no column of images"),
        ({"image": [[g] for g in GOOD]}, "no column of images"),
        ({"image": [[[0, 1], [2, 3]]] * 3}, "no column of images"),
        ({"image": pa.nulls(10**7, pa.binary())}, "declares 10,000,000 rows"),
        ({"image": [b"", *GOOD]}, "row 0 cannot be decoded"),
        (
            {"image": [*GOOD, b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n"]},
            "row 3 cannot be decoded (unknown",
        ),
        ({"image": [png(0, 0), *GOOD]}, "row 0"),
        ({"image": [*GOOD, png(60000, 60000)]}, "row 3 cannot be decoded (Image size"),
        ({"image": [*GOOD, png(10000, 10000)]}, "row 3 is 10000 x 10000 pixels"),
        ({"image": [*GOOD, png(5000, 2000)]}, "row 3 is 5000 x 2000 pixels"),
        ({"image": [*GOOD, png(32, 32, 8, BOMB)]}, "row 3 cannot be decoded"),
        ({"image": GOOD, "label": [[0], [1], [2]]}, "`label` has list<"),
        ({"image": GOOD, "label": [0.0, 1.0, -2.0]}, "row 2 has label -2"),
        ({"image": GOOD, "label": [0.0, 1.0, 1e300]}, "has more than 1000 classes"),
        ({"image": GOOD, "ra": [[0.0], [1.0], [2.0]], "dec": [0.0] * 3}, "`ra` must contain numbers"),
        ({"image": GOOD, "ra": [0.0] * 3, "dec": [{"degrees": 1}] * 3}, "`dec` must contain numbers"),
    ],
)
def test_hostile_tables_are_refused(tmp_path, own_cache, no_network, columns, message):
    """No path or URL is opened: if one were, the message would be of the decoder, or `no_network` would fail."""
    path = tmp_path / "hostile.parquet"
    pq.write_table(pa.table(columns), path)
    assert_refused(path, message, own_cache)


def test_declared_image_features_with_urls_are_refused(tmp_path, own_cache, no_network):
    """The same in a table that declares its column as images, which the library would open itself."""
    import datasets

    path = tmp_path / "declared.parquet"
    rows = [{"bytes": None, "path": "http://127.0.0.1:9/a.png"}] * 3
    schema = datasets.Features({"image": datasets.Image(), "other": datasets.Image()}).arrow_schema
    pq.write_table(pa.table({"image": rows, "other": rows}, schema=schema), path)
    assert_refused(path, "row 0 has the path or URL 'http", own_cache)


def write_images(folder: Path, images: np.ndarray) -> Path:
    folder.mkdir(parents=True)
    for row, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{row:04d}.png")
    return folder


@pytest.mark.parametrize("kind", ["images", "Parquet files"])
def test_planted_scripts_and_settings_in_a_folder_are_not_used(tmp_path, images, own_cache, no_network, kind):
    folder = tmp_path / "survey"
    if kind == "images":
        write_images(folder, images)
    else:
        folder.mkdir()
        for split, rows in (("train", images[:30]), ("test", images[30:])):
            pq.write_table(pa.table({"image": [encoded(row, tmp_path) for row in rows]}), folder / f"{split}.parquet")
    for script in ("survey.py", "dataset.py", "__init__.py"):
        (folder / script).write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    (folder / "README.md").write_text("---\nconfigs:\n- config_name: a\n  data_files: http://127.0.0.1:9/a.zip\n---\n")
    galaxies = open_galaxies(str(folder))
    assert np.array_equal(galaxies.pixels, images)
    assert galaxies.predefined_test.sum() == (10 if kind == "Parquet files" else 0)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("file_name", ["../outside.png", "http://127.0.0.1:9/a.png", "/etc/hostname", ".hidden.png"])
def test_image_folder_reads_only_files_that_are_hashed(tmp_path, images, own_cache, no_network, file_name):
    folder = write_images(tmp_path / "survey", images[:3])
    for path in (tmp_path / "outside.png", folder / ".hidden.png"):
        Image.fromarray(images[0]).save(path)
    (folder / "metadata.csv").write_text(f"file_name,ra,dec\n0001.png,1,1\n{file_name},2,2\n")
    with pytest.raises(UserError) as refusal:
        open_galaxies(str(folder))
    assert "\n" not in str(refusal.value)
    assert not [file for file in own_cache.rglob("*") if ".np" in file.name]


def test_links_in_an_image_folder(tmp_path, images, own_cache):
    """Changes behind a link to a file are noticed. A link to a folder is refused."""
    stored = write_images(tmp_path / "stored", images[:3])
    folder = tmp_path / "linked [1]"
    folder.mkdir()
    for file in stored.iterdir():
        (folder / file.name).symlink_to(file)
    assert np.array_equal(open_galaxies(str(folder)).pixels, images[:3])
    Image.fromarray(images[9]).save(stored / "0001.png")
    assert np.array_equal(open_galaxies(str(folder)).pixels[1], images[9])
    (folder / "more").symlink_to(stored)
    with pytest.raises(UserError, match="more is a link to a folder"):
        open_galaxies(str(folder))


def test_hub_images_are_read_from_the_library_s_cache_alone(tmp_path, images, own_cache, no_network, monkeypatch):
    """What the Hub answers is replaced; the library's own code of a data set may never be run."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub")
    cached = write_images(tmp_path / "hub" / "downloads", images[:3])
    outside = write_images(tmp_path / "outside", images[:3])

    def answer(*paths):
        def load_dataset(_name, *, trust_remote_code):
            assert trust_remote_code is False
            rows = [{"bytes": None, "path": str(path)} for path in paths]
            features = datasets.Features({"image": datasets.Image()})
            return datasets.DatasetDict(train=datasets.Dataset(pa.table({"image": rows}, schema=features.arrow_schema)))

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)

    answer(*sorted(cached.iterdir()))
    assert np.array_equal(open_galaxies("someone/galaxies").pixels, images[:3])
    for wrong in (
        outside / "0000.png",
        cached / "../../outside/0000.png",
        "http://127.0.0.1:9/a.png",
        "hf://datasets/a",
    ):
        answer(wrong)
        with pytest.raises(UserError, match="row 0 has the path or URL"):
            open_galaxies("someone/galaxies")


def test_float_labels_that_are_whole_numbers_are_read(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"image": GOOD, "label": [2.0, 0.0, 1.0]}), path)
    assert open_galaxies(str(path)).label.tolist() == [2, 0, 1]


def test_reduced_images_are_said_once(tmp_path, images, caplog):
    folder = tmp_path / "images"
    folder.mkdir()
    frames = [Image.fromarray(image) for image in images[:3]]
    for row in range(2):
        frames[row].convert("RGBA").save(folder / f"{row}.png")
    frames[0].save(folder / "2.gif", save_all=True, append_images=frames[1:])
    assert np.array_equal(open_galaxies(str(folder)).pixels[:2], images[:2])
    lines = [record.message for record in caplog.records]
    assert len(lines) == 2
    assert "2 images have transparency: it is ignored" in lines[0]
    assert "1 images have several frames: the first one is used" in lines[1]


# ---------------------------------------------------------------------------------------------------------- coordinates


@pytest.mark.parametrize("kind", ["h5", "parquet"])
@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("dec", [0.0, 91.0, 0.0], "row 1 has `dec` 91; it must be from -90 to 90 (degrees"),
        ("dec", [0.0, 0.0, np.inf], "row 2 has `dec` inf"),
        ("ra", [0.0, 361.0, 0.0], "row 1 has `ra` 361; it must be from -180 to 360"),
        ("pxscale", [0.262, -0.262, 0.262], "row 1 has `pxscale` -0.262; it must be from 1e-06 to 60"),
        ("pxscale", [0.0, 0.262, 0.262], "row 0 has `pxscale` 0"),
        ("pxscale", [0.262, 0.262, 1e6], "row 2 has `pxscale` 1e+06; it must be from 1e-06 to 60"),
    ],
)
def test_impossible_coordinates_are_refused(tmp_path, images, own_cache, kind, column, values, message):
    columns = {"ra": np.zeros(3), "dec": np.zeros(3), "pxscale": np.ones(3)} | {column: np.array(values)}
    path = tmp_path / f"sky.{kind}"
    if kind == "h5":
        write_hdf5(path, images[:3], **columns)
    else:
        pq.write_table(pa.table({"image": GOOD, **columns}), path)
    assert_refused(path, message, own_cache)


@pytest.mark.parametrize("column", ["ra", "dec"])
def test_one_coordinate_alone_is_left_out_with_a_line(tmp_path, images, caplog, column):
    galaxies = open_galaxies(str(write_hdf5(tmp_path / "a.h5", images, **{column: np.zeros(40)})))
    assert galaxies.ra is None
    assert galaxies.dec is None
    assert f"`{column}` is not used" in caplog.text


def test_negative_right_ascension_is_wrapped_and_unknown_values_stay(tmp_path, images):
    ra = np.array([-0.5, np.nan, 359.5])
    galaxies = open_galaxies(str(write_hdf5(tmp_path / "a.h5", images[:3], ra=ra, dec=np.array([np.nan, -90, 90]))))
    assert np.array_equal(galaxies.ra, [359.5, np.nan, 359.5], equal_nan=True)
    assert np.array_equal(galaxies.dec, [np.nan, -90, 90], equal_nan=True)


# ----------------------------------------------------------------------------------------------- purged, damaged caches


def flip(path: Path, offset: int) -> None:
    """Invert a byte, as a failing disk does; the size and the time of the file stay."""
    state = path.stat()
    content = bytearray(path.read_bytes())
    content[offset] ^= 255
    path.write_bytes(content)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("32.npy", Path.unlink),
        ("32.npz", Path.unlink),
        ("source.json", Path.unlink),
        ("32.npy", lambda path: os.truncate(path, path.stat().st_size - 1)),
        ("32.npz", lambda path: os.truncate(path, path.stat().st_size - 1)),
        ("32.npy", lambda path: path.write_bytes(b"")),
        ("32.npz", lambda path: path.write_bytes(b"")),
        ("32.npy", lambda path: path.write_bytes(bytes(path.stat().st_size))),
        ("32.npz", lambda path: path.write_bytes(b"\x80\x04N." * 99)),
        ("32.npz", lambda path: path.write_bytes(path.with_name("32.npy").read_bytes())),
        ("32.npz", lambda path: np.savez(path, image_hash=np.zeros(40))),
        ("32.npz", lambda path: flip(path, path.stat().st_size // 2)),
        ("32.npy", lambda path: flip(path, 20)),
        ("32.npy", lambda path: flip(path, -1)),
        *(("source.json", lambda path, text=text: path.write_text(text)) for text in ("", "[]", "null", "\0")),
        ("source.json", lambda path: path.write_bytes(b"\xff\xfe\x00")),
    ],
)
def test_damaged_cache_entry_is_ingested_again(tmp_path, images, own_cache, caplog, name, damage):
    path = write_hdf5(tmp_path / "a.h5", images, ra=np.zeros(40), dec=np.zeros(40))
    open_galaxies(str(path))
    open_galaxies(str(path), 16)
    (damaged,) = own_cache.glob(f"*/{name}")
    damage(damaged)
    for size in (None, 16, None):  # the other size survives, and a mended entry is not ingested again
        galaxies = open_galaxies(str(path), size)
    assert np.array_equal(galaxies.pixels, images)
    assert galaxies.native_size == 32
    assert galaxies.class_names == TEN_CLASSES
    (line,) = [record.message for record in caplog.records]
    assert name in line
    assert "caching" in line
    damage(damaged)
    path.unlink()
    with pytest.raises(UserError, match="no such file"):
        open_galaxies(str(path))


def test_cache_that_is_altered_between_the_samples_is_found_by_verify(tmp_path, own_cache, caplog):
    images = random_images(400)
    path = str(write_hdf5(tmp_path / "a.h5", images))
    open_galaxies(path)
    (stored,) = own_cache.glob("*/32.npy")
    flip(stored, 10_000)
    assert not np.array_equal(open_galaxies(path).pixels, images)  # what samples cannot see
    assert np.array_equal(open_galaxies(path, verify=True).pixels, images)
    assert "32.npy is altered" in caplog.text
    caplog.clear()
    open_galaxies(path, verify=True)
    assert not caplog.records


def test_samples_of_a_large_file_are_read_in_milliseconds(tmp_path):
    """A sparse file of 4 GB: all of it could not be read in this time."""
    with (tmp_path / "256.npy").open("wb") as file:
        file.truncate(4 << 30)
    started = time.perf_counter()
    _sample_checksum(tmp_path / "256.npy")
    assert time.perf_counter() - started < 0.2


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"0" * 62, b"g" * 64])
def test_damaged_hash_cache_is_computed_again(tmp_path, images, own_cache, content):
    path = write_hdf5(tmp_path / "a.h5", images)
    expected = open_galaxies(str(path)).fingerprint
    (entry,) = (own_cache / "fingerprints").iterdir()
    entry.write_bytes(content)
    assert open_galaxies(str(path)).fingerprint == expected


def test_command_verifies_the_cache_and_does_not_report_overlaps_it_cannot_know(tmp_path, images, own_cache, capsys):
    many = random_images(400)
    path = str(write_hdf5(tmp_path / "a.h5", many, ra=np.zeros(400)))
    open_galaxies(path)
    (stored,) = own_cache.glob("*/32.npy")
    flip(stored, 10_000)
    main([path, "--verify", "--contact_sheet", str(tmp_path / "sheet.png")])
    text = capsys.readouterr().out
    assert "no coordinates: overlaps on the sky are not known" in text
    assert "SHA-256 of all of them" in text
    assert np.array_equal(open_galaxies(path).pixels, many)
    unknown = np.where(np.arange(40) < 30, np.nan, np.arange(40.0))
    main(
        [
            str(write_hdf5(tmp_path / "b.h5", images, ra=unknown, dec=np.zeros(40))),
            "--contact_sheet",
            str(tmp_path / "sheet.png"),
        ]
    )
    assert "may overlap on the sky (not known for 30 images without coordinates)" in capsys.readouterr().out
    main(
        [
            str(write_hdf5(tmp_path / "c.h5", images, ra=unknown * np.nan, dec=unknown * np.nan)),
            "--contact_sheet",
            str(tmp_path / "sheet.png"),
        ]
    )
    assert "no coordinates: overlaps on the sky are not known" in capsys.readouterr().out


@pytest.fixture
def read_only(tmp_path):
    """Make a folder read-only, also for root, by a mount."""
    mounted = []

    def make(folder: Path) -> None:
        for options in (["--bind", folder, folder], ["-o", "remount,ro,bind", folder]):
            done = subprocess.run(["mount", *options], capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f"a folder cannot be mounted read-only here: {done.stderr.strip()}")
            if "--bind" in options:
                mounted.append(folder)

    yield make
    for folder in mounted:
        subprocess.run(["umount", "--lazy", folder], check=True)


def test_cached_source_is_opened_from_a_read_only_cache(tmp_path, images, own_cache, read_only):
    path = write_hdf5(tmp_path / "a.h5", images)
    open_galaxies(str(path))
    read_only(own_cache)
    assert np.array_equal(open_galaxies(str(path)).pixels, images)
    copied = tmp_path / "copy.h5"  # its hash is not cached, and cannot be
    copied.write_bytes(path.read_bytes())
    assert np.array_equal(open_galaxies(str(copied)).pixels, images)
    with pytest.raises(UserError, match="is not writable: set GALAXY_MAE_CACHE"):
        open_galaxies(str(path), 16)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # the library leaves files open
@pytest.mark.parametrize("cause", ["full", "read-only", "damaged"])
def test_what_the_library_of_the_hub_cannot_write_or_read_is_named(
    tmp_path, images, small_disk, read_only, own_cache, monkeypatch, cause
):
    """The library is real, and wraps its errors; in place of the Hub is a folder."""
    import datasets

    noise = np.random.default_rng(0).bytes(500_000).hex()
    folder = write_images(tmp_path / "survey", images[:8])
    lines = [f"{row:04d}.png,{row}{noise if cause == 'full' else ''}\n" for row in range(8)]
    lines += ["../outside.png,8\n"] if cause == "damaged" else []
    (folder / "metadata.csv").write_text("file_name,note\n" + "".join(lines))
    load = datasets.load_dataset
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", small_disk)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: load("imagefolder", data_dir=str(folder)))
    if cause == "read-only":
        read_only(small_disk)
    with pytest.raises(UserError) as refusal:
        open_galaxies("someone/galaxies")
    expected = {
        "full": f"{small_disk}: the disk or quota is full.* HF_HOME",
        "read-only": f"someone/galaxies: {small_disk}.*: Read-only file system: set HF_HOME",
        "damaged": r"cannot be read as a data set of the Hub \(An error occurred.*\.\./outside\.png",
    }
    assert re.search(expected[cause], str(refusal.value))
    assert not [file for file in own_cache.rglob("*") if ".np" in file.name]
    del refusal
    gc.collect()


# ------------------------------------------------------------------------------------------ unreadable images, names


UNREADABLE = {  # rows of `write_unreadable`, and how their reasons begin
    0: "cannot be decoded (unknown format)",
    1: "is 4097 x 16 pixels",
    6: "cannot be decoded (",
}


def write_unreadable(path: Path, images: np.ndarray) -> Path:
    """A Parquet file, or a folder, of 40 images, of which only the rows of `UNREADABLE` cannot be used."""
    replaced = {0: b"junk", 1: png(4097, 16), 6: png(32, 32)[:60]}
    contents = [encoded(image, path.parent)["bytes"] for image in images]
    contents = [replaced.get(row, content) for row, content in enumerate(contents)]
    if path.suffix:
        pq.write_table(pa.table({"image": contents}), path)
    else:
        (path / "round").mkdir(parents=True)
        for row, content in enumerate(contents):
            (path / "round" / f"{row:02d}.png").write_bytes(content)
    return path


@pytest.mark.parametrize("name", ["galaxies.parquet", "galaxies"])
def test_unreadable_images_are_skipped_with_a_reason(tmp_path, images, own_cache, caplog, name):
    source = str(write_unreadable(tmp_path / name, images))
    with pytest.raises(UserError, match="of row 0 cannot be decoded"):
        open_galaxies(source)
    assert not list(own_cache.rglob("*.np[yz]"))
    readable = np.array([row not in UNREADABLE for row in range(40)])
    for size in (None, None, 16):  # the second time from the cache
        caplog.clear()
        galaxies = open_galaxies(source, size, skip_unreadable=True)
        (line,) = [record.message for record in caplog.records]
        assert f"{len(UNREADABLE)} of 40 images are unreadable" in line
        assert galaxies.native_size == 32
        assert np.array_equal(galaxies.problem == "", readable)
        assert all(galaxies.problem[row].startswith(reason) for row, reason in UNREADABLE.items())
        assert not galaxies.pixels[~readable].any()
        assert np.array_equal(galaxies.blank, ~readable)
        assert set(split_galaxies(galaxies)["dropped"]) == set(UNREADABLE)
        if size is None:
            assert np.array_equal(galaxies.pixels[readable], images[readable])
    with pytest.raises(UserError, match="of row 0 cannot be decoded"):
        open_galaxies(source)


def test_source_without_any_readable_image_is_refused(tmp_path, own_cache):
    path = tmp_path / "galaxies.parquet"
    pq.write_table(pa.table({"image": [b"junk", png(4097, 16), None]}), path)
    with pytest.raises(UserError, match=r"the image of row 0 cannot be decoded .*, as all 3 images are"):
        open_galaxies(str(path), skip_unreadable=True)
    assert not list(own_cache.rglob("*.np[yz]"))


def test_damaged_chunk_of_hdf5_marks_its_rows(tmp_path, images, own_cache):
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        stored = file.create_dataset("images", data=images, chunks=(4, 32, 32, 3), compression="gzip")
        file["ans"] = LABEL
        stored.id.write_direct_chunk((8, 0, 0, 0), b"not deflated" * 99)
        stored.id.write_direct_chunk((36, 0, 0, 0), b"not deflated" * 99)
    bad = np.isin(np.arange(40), [8, 9, 10, 11, 36, 37, 38, 39])
    with pytest.raises(UserError, match="row 8 cannot be read"):
        open_galaxies(str(path))
    assert not list(own_cache.rglob("*.np[yz]"))  # the first one ends the ingestion
    galaxies = open_galaxies(str(path), skip_unreadable=True)
    assert np.array_equal(galaxies.problem != "", bad)
    assert np.array_equal(galaxies.pixels[~bad], images[~bad])
    assert not galaxies.pixels[bad].any()
    with h5py.File(path, "a") as file:
        for row in range(0, 40, 4):
            file["images"].id.write_direct_chunk((row, 0, 0, 0), b"not deflated" * 99)
    with pytest.raises(UserError, match="as all 40 images are"):
        open_galaxies(str(path), skip_unreadable=True)


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"objid": [1237648720693755918, 7, 8]}, ["1237648720693755918", "7", "8"]),
        ({"iauname": ["J1", "é\n", None]}, ["J1", "é\n", ""]),
        ({"ID": ["007", "a", "b"]}, ["007", "a", "b"]),
        (
            {"id": ["x", "y", "z"], "object_id": np.array([2**64 - 1, 0, 1], np.uint64)},
            ["18446744073709551615", "0", "1"],
        ),
        ({"id": [1.0, 2.0, 3.0]}, None),
        ({}, None),
    ],
)
def test_names_of_galaxies_in_a_table(tmp_path, columns, expected):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"image": GOOD, **columns}), path)
    for _ in range(2):  # ingested, cached
        galaxies = open_galaxies(str(path))
        assert (None if galaxies.object_id is None else galaxies.object_id.tolist()) == expected


def test_names_of_galaxies_in_other_sources(tmp_path, images):
    folder = tmp_path / "folder"
    for row, place in enumerate(("round", "spiral")):
        write_images(folder / place, images[2 * row : 2 * row + 2])
    files = ["round/0000.png", "round/0001.png", "spiral/0000.png", "spiral/0001.png"]
    assert open_galaxies(str(folder)).object_id.tolist() == files
    (folder / "metadata.csv").write_text("file_name,object_id\n" + "".join(f"{f},{i}\n" for i, f in enumerate(files)))
    assert open_galaxies(str(folder)).object_id.tolist() == ["0", "1", "2", "3"]
    for row, names in enumerate((np.arange(40) + 10**18, ["é", *"a" * 39], np.array([b"ab"] * 40))):
        path = write_hdf5(tmp_path / f"{row}.h5", images, object_id=names)
        expected = [name.decode() if isinstance(name, bytes) else str(name) for name in names]
        assert open_galaxies(str(path)).object_id.tolist() == expected
    assert open_galaxies(str(write_hdf5(tmp_path / "a.h5", images))).object_id is None
    path = write_hdf5(tmp_path / "b.h5", images, object_id=np.zeros(39, int))
    with pytest.raises(UserError, match="`object_id` is int64"):
        open_galaxies(str(path))


def test_one_image_in_a_folder_that_is_renamed_gets_its_new_name(tmp_path, images):
    folder = write_images(tmp_path / "folder", images[:1])
    assert open_galaxies(str(folder)).object_id.tolist() == ["0000.png"]
    (folder / "0000.png").rename(folder / "ngc1.png")
    assert open_galaxies(str(folder)).object_id.tolist() == ["ngc1.png"]


# ----------------------------------------------------------------------------------------- other columns, other kinds


def test_other_columns_pass_through(tmp_path, images):
    """Those that nobody here knows, as they are; without lists, structs, further images and what is used."""
    encoded_images = [encoded(image, tmp_path) for image in images]
    redshift, survey = np.linspace(0, 1, 40).astype(np.float32), ["DECaLS", None] * 20
    columns = {"redshift": redshift, "survey": survey, "label": LABEL, "id": LABEL.astype(float)}
    table = pa.table({"image": encoded_images, "mask": encoded_images, "votes": [[1, 2]] * 40, **columns})
    pq.write_table(table, tmp_path / "a.parquet")
    for size in (None, None, 16):  # ingested, cached
        galaxies = open_galaxies(str(tmp_path / "a.parquet"), size)
        expected = pa.table({"redshift": redshift, "survey": survey, "id": LABEL.astype(float)})
        assert galaxies.extra.equals(expected)  # names that are numbers with decimals are not used
    hdf5 = write_hdf5(tmp_path / "a.h5", images, redshift=redshift, votes=np.zeros((40, 2)), name=["é"] * 40)
    with h5py.File(hdf5, "a") as file:
        file["other"] = h5py.ExternalLink("other.h5", "/images")
        file.create_group("group")
    assert open_galaxies(str(hdf5)).extra.equals(pa.table({"name": ["é"] * 40, "redshift": redshift}))
    folder = write_images(tmp_path / "folder", images[:3])
    (tmp_path / "a.csv").write_text(
        "path,z,n,code\n" + "".join(f"folder/000{i}.png,0.{i},{i},0{i}\n" for i in range(3))
    )
    expected = pa.table({"z": [0.0, 0.1, 0.2], "n": [0, 1, 2], "code": ["00", "01", "02"]})
    assert open_galaxies(str(tmp_path / "a.csv")).extra.equals(expected)
    (folder / "metadata.csv").write_text("file_name,z\n" + "".join(f"000{i}.png,0.{i}\n" for i in range(3)))
    assert open_galaxies(str(folder)).extra.equals(pa.table({"z": [0.0, 0.1, 0.2]}))
    assert open_galaxies("synthetic:20", 16).extra.num_columns == 0


def test_columns_of_one_name_are_refused_where_they_are_used(tmp_path):
    twice = pa.table([pa.array(GOOD), pa.array([1, 2, 3]), pa.array([4, 5, 6])], names=["image", "x", "x"])
    pq.write_table(twice, tmp_path / "a.parquet")
    assert open_galaxies(str(tmp_path / "a.parquet")).extra.num_columns == 0
    for names in (["image", "label", "label"], ["image", "image", "x"]):
        pq.write_table(twice.set_column(1, "x", pa.array(GOOD)).rename_columns(names), tmp_path / "b.parquet")
        with pytest.raises(UserError, match=f"it has 2 columns `{names[1]}`"):
            open_galaxies(str(tmp_path / "b.parquet"))


def test_a_partition_without_rows_is_read(tmp_path, images):
    table = multimodal_universe(images, tmp_path)
    hats = write_hats(tmp_path / "hats", table)
    empty = hats / "dataset/Norder=2/Dir=0/Npix=43.parquet"
    pq.write_table(table.slice(0, 0), empty)
    (hats / "partition_info.csv").write_text("Norder,Npix\n2,43\n2,40\n2,41\n2,42\n")
    check_multimodal_universe(open_galaxies(str(hats)), images)


def test_a_new_kind_of_input_is_a_class_and_a_line(tmp_path, images, monkeypatch):
    class NumpyArray(Source):
        suffixes = (".npy",)
        missing = 0

        @property
        def num_rows(self):
            try:
                array = np.load(self.path, mmap_mode="r", allow_pickle=False)
            except (OSError, EOFError, ValueError) as error:
                raise UserError(f"{self.where}: cannot be read as a NumPy array ({error})") from error
            if array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] != 3:
                raise UserError(f"{self.where}: {array.dtype} {array.shape}; it must be uint8 (N, S, S, 3)")
            return len(array)

        @property
        def table(self):
            return pa.table({})

        def images(self):
            yield from np.array_split(np.load(self.path, mmap_mode="r")[self.missing :], 7)

    line = (lambda given: given.path.is_file() and given.path.suffix in NumpyArray.suffixes, NumpyArray)
    monkeypatch.setattr(kinds, "KINDS", (line, *kinds.KINDS))
    np.save(tmp_path / "a.npy", images)
    galaxies = open_galaxies(str(tmp_path / "a.npy"), 16)
    assert np.array_equal(galaxies.pixels, open_galaxies(str(write_hdf5(tmp_path / "a.h5", images)), 16).pixels)
    assert galaxies.label is galaxies.ra is galaxies.object_id is None
    (tmp_path / "damaged.npy").write_bytes((tmp_path / "a.npy").read_bytes()[:-10])
    with pytest.raises(UserError, match="cannot be read as a NumPy array"):
        open_galaxies(str(tmp_path / "damaged.npy"))
    with pytest.raises(UserError, match="no such file"):  # not taken for a Hub id
        open_galaxies("folder/missing.npy")
    np.save(tmp_path / "b.npy", images[:-1])
    monkeypatch.setattr(NumpyArray, "missing", 1)
    with pytest.raises(UserError, match=rf"{len(images) - 1:,} rows, {len(images) - 2:,} images"):
        open_galaxies(str(tmp_path / "b.npy"))


def test_opening_a_data_set_imports_little():
    """On a login node: neither torch nor what only some kinds of input need."""
    slow = {"torch", "datasets", "pandas", "astropy", "h5py", "scipy", "sklearn", "requests", "imagehash"}
    program = (
        "import sys; from galaxy_mae.data import cache, kinds, seen, split\n"
        f"assert not (found := {slow} & set(sys.modules)), found"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.skipif(not (SHARED / "cases").is_dir(), reason="shared/cases is absent")
@pytest.mark.parametrize(
    ("name", "rows", "classes"),
    [
        ("split_one_test_name", 4, ()),
        ("split_dev", 3, ("dev", "prod")),
        ("split_twice", 2, ()),
        ("pq_split_names", 9, ()),
        ("train_label", 4, ("round", "spiral")),
        ("meta_partial", 3, ()),
        ("meta_parquet", 2, ()),
        ("galaxy10_sdss_layout.h5", 20, GALAXY10_SDSS_CLASSES),
        ("unlabelled.h5", 20, ()),
        ("npy_folder", 2, ()),
    ],
)
def test_inputs_that_went_wrong(own_cache, name, rows, classes):
    galaxies = open_galaxies(str(SHARED / "cases" / name))
    assert (len(galaxies), galaxies.class_names) == (rows, classes)
    assert not galaxies.predefined_test.any()


# ------------------------------------------------------------------------------------ arrays, deep images, class names


def uint8_layouts(images: np.ndarray) -> dict[str, np.ndarray]:
    return {"channels last": images, "channels first": images.transpose(0, 3, 1, 2), "gray": images[..., 0]}


@pytest.mark.parametrize("layout", ["channels last", "channels first", "gray"])
@pytest.mark.parametrize(
    ("name", "image_key", "label_key"),
    [
        *(("a.npy", "", ""), ("a.npz", "images", "labels"), ("a.npz", "arr_0", "arr_1"), ("a.npz", "data", "")),
        *(("a.h5", "image", "y"), ("a.hdf5", "data", "label"), ("a.h5", "images", "")),
    ],
)
def test_arrays_of_any_layout_and_key(tmp_path, images, own_cache, layout, name, image_key, label_key):
    array, path = np.ascontiguousarray(uint8_layouts(images)[layout]), tmp_path / name
    arrays = {image_key: array, "redshift": np.arange(40.0), "object_id": np.arange(40).astype("S2")}
    arrays |= {label_key: LABEL} if label_key else {}
    if name == "a.npy":
        np.save(path, array)
    elif name == "a.npz":
        np.savez_compressed(path, **arrays)
    else:
        with h5py.File(path, "w") as file:
            file.update(arrays)
    galaxies = open_galaxies(str(path))
    assert np.array_equal(galaxies.pixels, images if layout != "gray" else images[..., :1].repeat(3, axis=3))
    assert (galaxies.label is None) == (not label_key)
    if label_key:
        assert galaxies.label.tolist() == LABEL.tolist()
    if name != "a.npy":
        assert galaxies.object_id.tolist() == [str(row) for row in range(40)]
        assert galaxies.extra["redshift"].to_pylist() == list(range(40))


@pytest.mark.parametrize("name", ["a.npy", "a.npz", "a.h5", "mmu.h5", "folder"])
def test_arrays_of_fluxes_take_the_stretch(tmp_path, own_cache, caplog, name):
    fluxes, path = np.random.default_rng(0).uniform(0, 0.2, (3, 5, 16, 16)).astype(np.float32), tmp_path / name
    planes = [1, 3, 4] if name == "mmu.h5" else [4, 0, 2]
    if name == "folder":
        path.mkdir()
        for row, flux in enumerate(fluxes):
            np.save(path / f"{row}.npy", flux)
    elif name.endswith("h5"):
        with h5py.File(path, "w") as file:
            file["image_array"], file["object_id"] = fluxes, [b"a", b"b", b"c"]
            if name == "mmu.h5":
                file["image_band"] = [[b"des-u", b"des-g", b"des-i", b"des-r", b"des-z"]] * 3
    else:
        (np.save if name == "a.npy" else np.savez)(path, fluxes)
    changes = {} if name == "mmu.h5" else {"bands": planes}
    stretches = [Stretch("legacy", json.dumps(changes | {"q": q})) for q in (20.0, 10.0)]
    opened = [open_galaxies(str(path), stretch=stretch) for stretch in stretches]
    for galaxies, stretch in zip(opened, stretches, strict=True):
        curve, _, _ = stretch.resolve([""] * 3 if name == "mmu.h5" else [""] * 5, {})
        assert np.array_equal(galaxies.pixels, [Cutout(flux[planes], curve, []).rgb() for flux in fluxes])
    assert opened[0].fingerprint != opened[1].fingerprint
    assert name == "folder" or "float32: fluxes, which take the stretch" in caplog.text


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: np.savez(path, images=np.array([{}] * 3)), "Object arrays"),
        (lambda path: path.write_bytes(b"PK\3\4 no zip"), "cannot be read as arrays"),
        (lambda path: np.savez(path, a=np.zeros((3, 8, 8))), "no key `images` (it has: a)"),
        (lambda path: np.savez(path, images=np.zeros((2, 9000, 9000, 3), np.uint8)), "between 1 and 4096"),
    ],
)
def test_impossible_arrays_are_refused(tmp_path, own_cache, write, message):
    write(tmp_path / "a.npz")
    with pytest.raises(UserError, match=re.escape(message)):
        open_galaxies(str(tmp_path / "a.npz"))


def test_truncated_arrays_are_refused(tmp_path, images, own_cache):
    np.save(tmp_path / "a.npy", images)
    os.truncate(tmp_path / "a.npy", 10_000)
    with pytest.raises(UserError, match="cannot be read as arrays of numbers"):
        open_galaxies(str(tmp_path / "a.npy"))


def test_images_of_16_bits_cmyk_and_palettes_are_read(tmp_path, own_cache, caplog):
    folder = tmp_path / "images"
    folder.mkdir()
    ramp = np.arange(32 * 32, dtype=np.uint16).reshape(32, 32) * 64 + 63
    Image.fromarray(ramp).save(folder / "0.png")
    Image.fromarray(ramp).save(folder / "1.tif")
    Image.fromarray(ramp.astype(">u2")).save(folder / "2.tif")
    Image.new("CMYK", (32, 32), (0, 255, 255, 0)).save(folder / "3.tif")
    palette = Image.new("P", (32, 32), 1)
    palette.putpalette([0, 0, 0, 9, 8, 7])
    palette.save(folder / "4.png")
    galaxies = open_galaxies(str(folder))
    for row in range(3):
        assert np.array_equal(galaxies.pixels[row], (ramp // 256)[..., None].repeat(3, axis=2))
    assert galaxies.pixels[3:, 0, 0].tolist() == [[255, 0, 0], [9, 8, 7]]
    assert "3 images have 16 bits per channel: 0 to 65535 becomes 0 to 255" in caplog.text


@pytest.mark.parametrize(
    ("name", "size", "counts", "expected"),
    [
        ("ans", 256, (1081, 1853, 2645, 2027, 334, 2043, 1829, 2628, 1423, 1873), "Disturbed"),
        ("ans", 128, (1081, 1853, 2645, 2027, 334, 2043, 1829, 2628, 1423, 1873), "class 0"),
        ("ans", 256, (242, 259, 1938, 1954, 149, 450, 558, 565, 244, 659), "class 0"),
        ("ans", 69, (3,) * 10, "Disk, Face-on, No Spiral"),
        ("ans", 69, (3,) * 9, "class 0"),
        ("gz10_label", 32, (3,) * 4, "Disturbed"),
    ],
)
def test_names_of_galaxy10_are_given_to_galaxy10_alone(name, size, counts, expected):
    table = pa.table({name: np.repeat(np.arange(len(counts)), counts)})
    assert read_columns("a", table, size=size)["class_names"][0] == expected


# ------------------------------------------------------------------------- tar files, save_to_disk, files of no kind


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def test_webdataset_is_read(tmp_path, images, own_cache, caplog):
    contents = [encoded(image, tmp_path)["bytes"] for image in images[:5]]
    first = {"J1.5.png": contents[0], "J1.7.png": contents[1], "._J1.png": b"", "README": b"a"}
    first |= {"J1.5.cls": b"3", "J1.7.cls": b"1\n", "J1.5.json": b'{"ra": 1.5, "dec": 2, "z": 0.1}'}
    write_tar(tmp_path / "s" / "train-000001.tar", first)
    second = {"a/x.png": contents[2], "a/x.jpg": contents[3], "a/x.cls": b"0", "b/x.png": contents[4]}
    write_tar(tmp_path / "s" / "test-000000.tar", second)
    galaxies = open_galaxies(str(tmp_path / "s"))
    assert np.array_equal(galaxies.pixels, images[[2, 3, 4, 0, 1]])
    assert galaxies.object_id.tolist() == ["a/x", "a/x.jpg", "b/x", "J1.5", "J1.7"]
    assert galaxies.predefined_test.tolist() == [True, True, True, False, False]
    assert "1 training, 0 validation, 1 test" in caplog.text
    one = open_galaxies(str(tmp_path / "s" / "train-000001.tar"))
    assert one.label.tolist() == [3, 1]
    assert one.ra[0] == 1.5
    assert one.extra["z"].to_pylist() == [0.1, None]
    for content, message in ((b"no json", "cannot be read"), (b"[1]", "cannot be read")):
        write_tar(tmp_path / "s" / "a.tar", {"a.png": contents[0], "a.json": content})
        with pytest.raises(UserError, match=message):
            open_galaxies(str(tmp_path / "s" / "a.tar"))
    (tmp_path / "s" / "a.tar").write_bytes(b"no tar" * 999)
    with pytest.raises(UserError, match="cannot be read as tar"):
        open_galaxies(str(tmp_path / "s" / "a.tar"))


@pytest.mark.filterwarnings("ignore")
def test_folder_of_save_to_disk_is_read(tmp_path, images, own_cache, caplog):
    import datasets

    table = {"image": [encoded(image, tmp_path) for image in images], "label": LABEL, "z": np.arange(40.0)}
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(10), z=datasets.Value("float32"))
    rows = datasets.Dataset.from_dict(table, features=features)
    rows.select(range(30, 40)).save_to_disk(tmp_path / "one", num_shards=2)
    galaxies = open_galaxies(str(tmp_path / "one"))
    assert np.array_equal(galaxies.pixels, images[30:])
    assert galaxies.label.tolist() == LABEL[30:].tolist()
    split = datasets.DatasetDict(train=rows.select(range(30)), test=rows.select(range(30, 40)))
    split.save_to_disk(tmp_path / "split")
    shutil.copy(tmp_path / "split/train/data-00000-of-00001.arrow", tmp_path / "split/train/cache-0123.arrow")
    caplog.clear()
    galaxies = open_galaxies(str(tmp_path / "split"))
    assert np.array_equal(galaxies.pixels, images)
    assert np.flatnonzero(galaxies.predefined_test).tolist() == list(range(30, 40))
    assert galaxies.extra["z"].to_pylist() == list(range(40))
    (tmp_path / "split/train/data-00000-of-00001.arrow").write_bytes(b"junk")
    with pytest.raises(UserError, match="cannot be read as Arrow"):
        open_galaxies(str(tmp_path / "split"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.xlsx", b"PK\3\4", "it is a zip archive, as .xlsx is: unpack it, or save the spreadsheet as CSV"),
        ("a.png", png(32, 32), "it is one image: pass its folder"),
        ("a.pkl", b"\x80\4", "it is a Python pickle: it may run code and is never opened"),
        ("a.h5", b"<html>", "it is a document: if a download failed"),
        ("a.pq", b"PAR1", "it is Parquet: end its name with .parquet"),
        ("a.zst", b"(\xb5/\xfd", "it is a compressed file: unpack it"),
        ("a.txt", b"path,ra", "it is of an unknown format: tables of paths end with .csv"),
    ],
)
def test_what_a_file_is_that_is_not_read(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=re.escape(f"--dataset {tmp_path / name}: {message}")):
        open_galaxies(str(tmp_path / name))


def test_hdf5_of_any_name_is_read(tmp_path, images, own_cache):
    path = write_hdf5(tmp_path / "a.h5", images)
    assert np.array_equal(open_galaxies(str(path.rename(tmp_path / "a.he5"))).pixels, images)


# ---------------------------------------------------------------- the Multimodal Universe, HATS; five forms of a survey


def multimodal_universe(images: np.ndarray, folder: Path) -> pa.Table:
    """A table in the schema of `mmu_gz10`."""
    count = len(images)
    return pa.table(
        {
            "_healpix_29": np.arange(count),
            "rgb_image": [encoded(image, folder) | {"path": "galaxy.png"} for image in images],
            "gz10_label": np.arange(count) % 7,
            "redshift": np.full(count, np.nan),
            "rgb_pixel_scale": np.full(count, 0.262),
            "ra": np.arange(count, dtype=float),
            "dec": np.zeros(count),
            "object_id": [f"{row:05d}" for row in range(count)],
        }
    )


def check_multimodal_universe(galaxies, images: np.ndarray) -> None:
    assert np.array_equal(galaxies.pixels, images)
    assert galaxies.class_names == GALAXY10_CLASSES
    assert np.array_equal(galaxies.label, np.arange(len(images)) % 7)
    assert np.array_equal(galaxies.ra, np.arange(len(images)))
    assert np.array_equal(galaxies.pixel_scale, np.full(len(images), 0.262))
    assert galaxies.object_id.tolist() == [f"{row:05d}" for row in range(len(images))]


def write_hats(folder: Path, table: pa.Table) -> Path:
    """A HATS catalogue of three partitions, with all files that stand beside them; the thumbnail repeats galaxies."""
    from astropy.io import fits

    for i, rows in enumerate((slice(0, 10), slice(10, 30), slice(30, 40))):
        part = folder / f"dataset/Norder=2/Dir=0/Npix={i + 40}.parquet"
        part.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table.slice(rows.start, rows.stop - rows.start), part)
    pq.write_metadata(table.schema, folder / "dataset/_common_metadata")
    pq.write_metadata(table.schema, folder / "dataset/_metadata")
    (folder / "partition_info.csv").write_text("Norder,Npix\n2,40\n2,41\n2,42\n")
    (folder / "hats.properties").write_text("obs_collection=mmu_gz10\n")
    pq.write_table(table.slice(0, 3), folder / "dataset/data_thumbnail.parquet")
    pq.write_table(pa.table({"Npix": [40, 41, 42]}), folder / "per_partition_statistics.parquet")
    for name in ("point_map.fits", "skymap.fits"):
        fits.writeto(folder / name, np.zeros(192))
    return folder


def test_multimodal_universe_as_a_file_and_as_a_hats_catalogue(tmp_path, images):
    table = multimodal_universe(images, tmp_path)
    pq.write_table(table, tmp_path / "gz10.parquet")
    check_multimodal_universe(open_galaxies(str(tmp_path / "gz10.parquet")), images)
    hats = write_hats(tmp_path / "collection" / "gz10", table)
    check_multimodal_universe(open_galaxies(str(hats)), images)
    write_hats(tmp_path / "collection" / "gz10_10arcs", table)
    (tmp_path / "collection" / "collection.properties").write_text("hats_primary_table_url=gz10\n")
    check_multimodal_universe(open_galaxies(str(tmp_path / "collection")), images)
    (hats / "dataset/Norder=2/Dir=0/Npix=41.parquet").unlink()
    with pytest.raises(UserError, match=r"Npix=41\.parquet: there is no such file"):
        open_galaxies(str(hats))


def test_multimodal_universe_from_the_hub(tmp_path, images, own_cache, no_network, monkeypatch):
    import datasets

    table = multimodal_universe(images, tmp_path)

    def load_dataset(_name, *, trust_remote_code):
        return datasets.DatasetDict(train=datasets.Dataset(table).cast_column("rgb_image", datasets.Image()))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    check_multimodal_universe(open_galaxies("MultimodalUniverse/gz10"), images)


def test_rgb_images_are_taken_of_several_columns(tmp_path, images):
    """The Legacy Survey of the Multimodal Universe has its bands in `image`, and other images beside `rgb`."""
    import datasets

    rgb, mask = ([encoded(image, tmp_path) for image in part] for part in (images[:3], images[3:6]))
    columns = {"blobmodel": mask, "image": [[{"band": "g", "flux": [[0.0]]}]] * 3, "rgb": rgb}
    plain = pa.table(columns)
    features = datasets.Features.from_arrow_schema(plain.schema) | {"blobmodel": datasets.Image()}
    for name, table in (("plain", plain), ("declared", plain.cast(datasets.Features(features).arrow_schema))):
        pq.write_table(table, tmp_path / f"{name}.parquet")
        assert np.array_equal(open_galaxies(str(tmp_path / f"{name}.parquet")).pixels, images[:3])


def test_five_forms_of_one_survey_give_the_same_pixels(tmp_path, images):
    from astropy.io import fits

    cutouts = tmp_path / "cutouts"
    cutouts.mkdir()
    gray = images[..., :1].repeat(3, axis=3)
    gray[:, 0, 0], gray[:, -1, -1] = 0, 255  # the interval of all pixels is then 0 to 255
    for row, image in enumerate(gray):  # fluxes of which the stretch makes exactly these bytes
        flux = np.sinh(image[::-1, :, 0] / 255 * np.arcsinh(10)) / 10
        fits.writeto(cutouts / f"{row:04d}.fits", flux)
    folder = write_images(tmp_path / "folder", gray)
    (tmp_path / "galaxies.csv").write_text("path\n" + "".join(f"folder/{row:04d}.png\n" for row in range(40)))
    pq.write_table(pa.table({"image": [encoded(image, tmp_path) for image in gray]}), tmp_path / "galaxies.parquet")
    sources = [write_hdf5(tmp_path / "a.h5", gray), tmp_path / "galaxies.parquet", folder, tmp_path / "galaxies.csv"]
    opened = [open_galaxies(str(source)) for source in sources]
    opened.append(open_galaxies(str(cutouts), stretch=Stretch("asinh", '{"percentile": 100}')))
    for galaxies in opened:
        assert np.array_equal(galaxies.pixels, gray)
        assert np.array_equal(galaxies.image_hash, opened[0].image_hash)
    assert opened[2].object_id.tolist() == [f"{row:04d}.png" for row in range(40)]
    assert opened[3].object_id.tolist() == [f"folder/{row:04d}.png" for row in range(40)]


def test_fits_and_other_images_in_one_folder_of_classes(tmp_path, images):
    from astropy.io import fits

    write_images(tmp_path / "survey" / "round", images[:2])
    (tmp_path / "survey" / "spiral").mkdir()
    fits.writeto(tmp_path / "survey" / "spiral" / "a.fits", np.full((3, 32, 32), 0.1, np.float32))
    galaxies = open_galaxies(str(tmp_path / "survey"))
    assert galaxies.label.tolist() == [0, 0, 1]
    assert galaxies.object_id.tolist() == ["round/0000.png", "round/0001.png", "spiral/a.fits"]
    assert np.array_equal(galaxies.pixels[:2], images[:2])
    assert (galaxies.pixels[2] == galaxies.pixels[2, 0, 0]).all()


@pytest.mark.slow
def test_memory_does_not_grow_with_the_images_of_a_parquet_file(tmp_path):
    """Of 160 MB of encoded images, less than half are in memory at any time, beside what 16 MB need.

    The decoder is slow, so that a reader that goes ahead by itself has the time for it. No library makes a copy.
    """
    program = (
        "import sys, threading, time; from galaxy_mae.data.cache import open_galaxies\n"
        "from galaxy_mae.data import images\n"
        "decode = images.decode; images.decode = lambda *args: (time.sleep(0.0002), decode(*args))[1]\n"
        "def used(): return [int(x.split()[1]) for x in open('/proc/self/status') if x.startswith('RssAnon')][0]\n"
        "peak = [0]\n"
        "def watch():\n    while True: peak[0] = max(peak[0], used()); time.sleep(0.01)\n"
        "threading.Thread(target=watch, daemon=True).start(); open_galaxies(sys.argv[1], 8); print(peak[0])\n"
        "assert 'datasets' not in sys.modules"
    )
    peaks = []
    noise = np.random.default_rng(0).integers(0, 256, 10_000, np.uint8).tobytes()
    image = encoded(random_images(1)[0], tmp_path)["bytes"]
    for groups in (8, 80):
        path = tmp_path / f"{groups}.parquet"
        with pq.ParquetWriter(path, pa.schema({"image": pa.binary()}), compression="none", use_dictionary=False) as out:
            for _ in range(groups):
                out.write_table(pa.table({"image": [image + noise] * 200}))
        folders = {"GALAXY_MAE_CACHE": str(tmp_path / "cache"), "HF_DATASETS_CACHE": str(tmp_path / "datasets")}
        done = subprocess.run(
            [sys.executable, "-c", program, path], env=os.environ | folders, stdout=subprocess.PIPE, check=True
        )
        peaks.append(int(done.stdout))
    assert peaks[1] - peaks[0] < 70_000  # kB


# ------------------------------------------------------------------- nothing is between a fingerprint and what it names


def bmp(image: np.ndarray) -> bytes:
    """An image in a file whose size depends on that of the image alone."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "BMP")
    return file.getvalue()


def write_hdf5_plain(path: Path, images: np.ndarray, label: np.ndarray) -> Path:
    with h5py.File(path, "w") as file:
        file["images"], file["ans"] = images, label.astype(np.uint8)
    return path


def write_bmp_folder(folder: Path, images: np.ndarray, label: np.ndarray) -> Path:
    folder.mkdir(exist_ok=True)
    for row, image in enumerate(images):
        (folder / f"{row}.bmp").write_bytes(bmp(image))
    (folder / "metadata.csv").write_text("file_name,label\n" + "".join(f"{i}.bmp,{x}\n" for i, x in enumerate(label)))
    return folder


def write_bmp_parquet(path: Path, images: np.ndarray, label: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({"image": [bmp(image) for image in images], "label": label})
    pq.write_table(table, path, compression="none", use_dictionary=False, write_statistics=False)
    return path


def write_bmp_parquet_folder(folder: Path, images: np.ndarray, label: np.ndarray) -> Path:
    for shard, rows in enumerate((slice(0, 3), slice(3, 8))):
        write_bmp_parquet(folder / f"{shard}.parquet", images[rows], label[rows])
    return folder


def write_bmp_hats(folder: Path, images: np.ndarray, label: np.ndarray) -> Path:
    partition = write_bmp_parquet(folder / "dataset/Norder=2/Dir=0/Npix=40.parquet", images, label)
    pq.write_metadata(pq.read_schema(partition), folder / "dataset/_common_metadata")
    (folder / "partition_info.csv").write_text("Norder,Npix\n2,40\n")
    (folder / "hats.properties").write_text("obs_collection=survey\n")
    return folder


def write_bmp_csv(path: Path, images: np.ndarray, label: np.ndarray) -> Path:
    write_bmp_folder(path.with_name("files"), images, label)
    path.write_text("path,label\n" + "".join(f"files/{row}.bmp,{x}\n" for row, x in enumerate(label)))
    return path


def write_bmp_fits_table(path: Path, images: np.ndarray, label: np.ndarray) -> Path:
    from astropy.table import Table

    write_bmp_folder(path.with_name("files"), images, label)
    columns = {"path": [f"files/{row}.bmp" for row in range(len(images))], "label": label}
    Table(columns).write(path, overwrite=True)
    return path


def write_cutout_folder(folder: Path, images: np.ndarray, label: np.ndarray) -> Path:
    """Fluxes of which the default stretch makes these images, if they are gray and have a black and a white pixel."""
    from astropy.io import fits

    folder.mkdir(exist_ok=True)
    (folder / "metadata.jsonl").write_text(
        "".join(json.dumps({"file_name": f"{row}.fits", "label": int(x)}) + "\n" for row, x in enumerate(label))
    )
    for row, image in enumerate(images):
        fits.writeto(folder / f"{row}.fits", np.sinh(image[::-1, :, 0] / 255 * np.arcsinh(10)) / 10, overwrite=True)
    return folder


@pytest.mark.parametrize(
    ("write", "name"),
    [
        (write_hdf5_plain, "a.h5"),
        (write_bmp_parquet, "a.parquet"),
        (write_bmp_parquet_folder, "shards"),
        (write_bmp_hats, "hats"),
        (write_bmp_folder, "folder"),
        (write_cutout_folder, "cutouts"),
        (write_bmp_csv, "a.csv"),
        (write_bmp_fits_table, "a.fits"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_content_that_changes_at_one_path_size_and_time_is_read_again(tmp_path, own_cache, monkeypatch, write, name):
    """As after `tar --mtime`, and in container layers."""
    monkeypatch.setattr(download, "_CLOCK_TICK", 0)  # else new files are always hashed again
    versions = random_images(8)[..., :1].repeat(3, axis=3), random_images(8, seed=1)[..., :1].repeat(3, axis=3)
    labels = np.arange(8) % 2, np.arange(8) // 4
    for images in versions:
        images[:, :2], images[:, -2:] = 0, 255  # the interval of one band
    states, found = {}, []
    for images, label in zip(versions, labels, strict=True):
        source = write(tmp_path / name, images, label)
        files = [file for file in tmp_path.rglob("*") if file.is_file() and own_cache not in file.parents]
        for file in files:
            if file in states:
                assert file.stat().st_size == states[file].st_size
                os.utime(file, ns=(states[file].st_atime_ns, states[file].st_mtime_ns))
            states[file] = file.stat()
        for _ in range(2):
            galaxies = open_galaxies(str(source), stretch=Stretch("asinh", '{"percentile": 100}'))
            assert np.array_equal(galaxies.pixels, images)
            assert np.array_equal(galaxies.label, label)
        found.append(galaxies.fingerprint)
    assert found[0] != found[1]


def test_a_source_that_changes_while_it_is_read_is_not_cached(tmp_path, images, own_cache, monkeypatch):
    path = write_bmp_parquet(tmp_path / "a.parquet", images[:8], np.arange(8))
    first_shape = cache.first_shape

    def replace_it(*arguments):  # the file is hashed already, and not yet read
        write_bmp_parquet(path, images[8:16], np.arange(8))
        return first_shape(*arguments)

    monkeypatch.setattr(cache, "first_shape", replace_it)
    with pytest.raises(UserError, match="it was changed while it was read"):
        open_galaxies(str(path))
    assert not list(own_cache.rglob("*.np[yz]"))


def test_an_entry_of_an_earlier_version_is_named(tmp_path, images, own_cache, caplog):
    path = str(write_hdf5(tmp_path / "a.h5", images))
    open_galaxies(path)
    assert not caplog.records
    (entry,) = own_cache.glob("*_format*")
    earlier = entry.rename(entry.with_name(entry.name.replace("_format", "_format0")))
    open_galaxies(path)
    (line,) = [record.message for record in caplog.records]
    assert f"{earlier} can be deleted" in line


# ------------------------------------------------------------------------------------------- splits, every image a row


@pytest.mark.parametrize(
    ("files", "test", "classes", "note"),
    [
        ("a.png b.png NGC1365_test.png", "", (), ""),
        ("dev/a.png prod/b.png", "", ("dev", "prod"), ""),
        ("test_field/a.png x/b.png", "", ("test_field", "x"), ""),
        ("train_test/a.png train_test/b.png", "", (), ""),
        ("Train_images/round/a.png Train_images/x/b.png train_label.csv", "", ("round", "x"), "is metadata.csv"),
        (
            "Train/x/a.png TEST/x/b.png TEST/y/c.png val/y/d.png",
            "TEST/x/b.png TEST/y/c.png",
            ("x", "y"),
            "1 training, 1 validation, 2 test",
        ),
        ("train/a.png test/b.png", "test/b.png", (), "tell the splits of its files: 1 training, 0 validation, 1 test"),
        ("train/x/a.png test/y/b.png more/y/c.png", "test/y/b.png", ("x", "y"), "is training data: more"),
        ("x/test/a.png x/train/b.png", "", ("test", "train"), ""),
        ("a.png x/b.png y/c.png", "", (), "not all images are at the same depth"),
        ("evaluation/a.png eval/b.png __x/c.png", "", ("__x", "eval", "evaluation"), ""),
        (
            "a.png a.jp2 .b.png README.md",
            "",
            (),
            "2 files are not read, because",
        ),
    ],
)
def test_splits_are_told_by_whole_names_of_folders(tmp_path, images, own_cache, caplog, files, test, classes, note):
    for i, file in enumerate(files.split()):
        (tmp_path / "survey" / file).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[i]).save(tmp_path / "survey" / file, "PNG")
    galaxies = open_galaxies(str(tmp_path / "survey"))
    seen = [file for file in files.split() if file.endswith(".png") and not file.startswith(".")]
    assert sorted(galaxies.object_id) == sorted(seen)
    assert galaxies.object_id[galaxies.predefined_test].tolist() == test.split()
    assert galaxies.class_names == classes
    assert [note in record.message for record in caplog.records] == [True] * bool(note)


@pytest.mark.parametrize(
    ("shards", "test"),
    [
        ("north south test_field", ""),
        ("data/test-00000-of-00001 data/train-00000-of-00002 data/train-00001-of-00002", "data/test-00000-of-00001"),
        ("train Test validation", "Test"),
        ("train-00000-of-00001-0123abcd test-00000-of-00001-0123abcd", "test-00000-of-00001-0123abcd"),
        ("test/a train/b", "test/a"),
        ("a_test-0 latest test.1", ""),
    ],
)
def test_splits_are_told_by_whole_names_of_shards(tmp_path, own_cache, shards, test):
    for shard in shards.split():
        (tmp_path / "survey" / shard).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"image": [GOOD[0]], "id": [shard]}), tmp_path / "survey" / f"{shard}.parquet")
    galaxies = open_galaxies(str(tmp_path / "survey"))
    assert sorted(galaxies.object_id) == sorted(shards.split())
    assert galaxies.object_id[galaxies.predefined_test].tolist() == test.split()


_PARTS = st.sampled_from(
    ["train", "Test", "dev-2", "evaluation", "val", "x.parquet", "metadata", "[a]", "{b}", "a.png"]
) | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="/\0"), min_size=1, max_size=8).filter(
    lambda name: name[0] != "."
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.sets(st.lists(_PARTS, min_size=1, max_size=4).map(tuple), min_size=1, max_size=6))
def test_every_image_of_any_folder_is_one_row(places):
    with tempfile.TemporaryDirectory() as folder:
        written = {}
        for place in sorted(places):
            path = Path(folder, *place[:-1], f"{place[-1]}.png")
            with suppress(OSError):  # one of its folders is a file
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (4, 4), (len(written), 7, 9)).save(path)
                written[str(path.relative_to(folder))] = len(written)
        source = kinds.find_source(folder)
        assert source.num_rows == len(source.file_names) == len(written)
        galaxies = open_galaxies(folder)
        found = {str(Path(path).relative_to(folder)) for batch in source.images() for path in batch}
        assert found == {*written}
        colors = dict(zip(source.file_names, galaxies.pixels[:, 0, 0, 0].tolist(), strict=True))
        assert colors == written


def test_images_and_tables_do_not_displace_each_other_silently(tmp_path, images, own_cache, caplog):
    folder = write_images(tmp_path / "survey", images[:2])
    pq.write_table(pa.table({"galaxy": [1, 2]}), folder / "catalogue.parquet")
    assert np.array_equal(open_galaxies(str(folder)).pixels, images[:2])
    assert "(catalogue.parquet); a table of the images is metadata.csv" in caplog.text
    pq.write_table(pa.table({"image": GOOD}), folder / "galaxies.parquet")
    (folder / "catalogue.parquet").unlink()
    caplog.clear()
    assert len(open_galaxies(str(folder))) == len(GOOD)
    assert "2 files are not read, beside Parquet files (0000.png, 0001.png)" in caplog.text


def test_images_that_the_metadata_do_not_name_are_kept_and_names_without_an_image_are_rows(
    tmp_path, images, own_cache, caplog
):
    folder = write_images(tmp_path / "survey", images[:4])
    table = "file_name,ra,dec\n./0002.png,2,5\n0001.png,1,6\n0002.png,3,7\n"
    (folder / "metadata.csv").write_text(table)
    galaxies = open_galaxies(str(folder))
    assert np.array_equal(galaxies.pixels, images[[2, 1, 0, 3]])
    assert np.array_equal(galaxies.ra, [2, 1, np.nan, np.nan], equal_nan=True)
    assert [record.message.partition(": ")[2] for record in caplog.records] == [
        "1 rows of metadata name an image again: its first row counts",
        "the metadata do not name 2 images, like '0000.png'",
    ]
    (folder / "metadata.csv").write_text(f"{table}missing.png,4,8\n")
    with pytest.raises(UserError, match=r"the image 'missing.png' of row 2 is named by the metadata, and is not"):
        open_galaxies(str(folder))
    galaxies = open_galaxies(str(folder), skip_unreadable=True)
    assert galaxies.object_id.tolist() == ["0002.png", "0001.png", "missing.png", "0000.png", "0003.png"]
    assert np.flatnonzero(galaxies.problem).tolist() == [2]
    for content, message in (("name,ra\n1,2\n", "no column of image paths"), ("", "metadata.csv: cannot be read")):
        (folder / "metadata.csv").write_text(content)
        with pytest.raises(UserError, match=message):
            open_galaxies(str(folder))


# -------------------------------------------------------------------------------------------------- what is left unused


@pytest.mark.parametrize(
    ("columns", "note"),
    [
        ({"label": [0, None, 1]}, "the labels in `label` are partly missing"),
        ({"id": [1.5, 2.5, 3.5]}, "`id` is double, not text or an integer: it is not used"),
        ({"dec": [1.0, 2.0, 3.0]}, "`dec` is not used, because there is no `ra`"),
    ],
)
def test_what_is_not_used_is_said_at_every_opening(tmp_path, own_cache, caplog, columns, note):
    pq.write_table(pa.table({"image": GOOD, **columns}), tmp_path / "a.parquet")
    copied = shutil.copy(tmp_path / "a.parquet", tmp_path / "copied.parquet")
    for path, size in ((tmp_path / "a.parquet", None), (copied, None), (copied, 16), (copied, 16)):
        caplog.clear()
        open_galaxies(str(path), size)
        (line,) = [record.message for record in caplog.records]
        assert line.startswith(f"--dataset {path}: {note}")


# ---------------------------------------------------------------------------- views of Polars; names that are not UTF-8


@pytest.mark.parametrize("struct", [False, True])
def test_columns_of_view_types_are_read(tmp_path, images, own_cache, struct):
    """As of Polars and newer versions of Arrow; alone, beside a file of other types, and as a stream."""
    encoded_images = pa.array([encoded(image, tmp_path)["bytes"] for image in images], pa.binary_view())
    if struct:
        encoded_images = pa.StructArray.from_arrays([encoded_images], ["bytes"])
    columns = {"id": [f"J{i}" for i in range(40)], "label": ["b", "a"] * 20, "survey": ["DECaLS", None] * 20}
    views = {name: pa.array(values, pa.string_view()) for name, values in columns.items()}
    (tmp_path / "survey").mkdir()
    pq.write_table(pa.table({"image": encoded_images, **views}), tmp_path / "survey" / "0.parquet")
    plain = [encoded(image, tmp_path)["bytes"] for image in images]
    plain = pa.table({"image": [{"bytes": image} for image in plain] if struct else plain, **columns})
    galaxies = open_galaxies(str(tmp_path / "survey" / "0.parquet"))
    assert open_stream(str(tmp_path / "survey"), 32).counts.sum() == 40
    pq.write_table(plain, tmp_path / "survey" / "1.parquet")
    twice = open_galaxies(str(tmp_path / "survey"))
    for opened, rows in ((galaxies, slice(None)), (twice, slice(0, 40)), (twice, slice(40, 80))):
        assert np.array_equal(opened.pixels[rows], images)
        assert opened.object_id[rows].tolist() == columns["id"]
        assert opened.label[rows].tolist() == [1, 0] * 20
        assert opened.extra["survey"].to_pylist()[rows] == columns["survey"]


def test_bytes_that_are_not_utf_8_are_escaped(tmp_path, images, own_cache):
    """Names of files and folders, and text in tables."""
    for i, name in enumerate((b"caf\xe9/0\xe9.png", b"round/1.png")):
        file = Path(os.fsdecode(os.fsencode(tmp_path / "survey") + b"/" + name))
        file.parent.mkdir(parents=True)
        file.write_bytes(encoded(images[i], tmp_path)["bytes"])
    galaxies = open_galaxies(str(tmp_path / "survey"))
    assert np.array_equal(galaxies.pixels, images[:2])
    assert galaxies.object_id.tolist() == ["caf\\xe9/0\\xe9.png", "round/1.png"]
    assert galaxies.class_names == ("caf\\xe9", "round")
    offsets = pa.array(["NGC1", "NGC2", "NGC3"]).buffers()[1]
    names = pa.Array.from_buffers(pa.string(), 3, [None, offsets, pa.py_buffer(b"NGC1NG\xe92NGC3")])
    structs = pa.StructArray.from_arrays([pa.array([*GOOD[:2], None]), names.take([2, 2, 1])], ["bytes", "path"])
    pq.write_table(pa.table({"image": structs}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"row 2 has the path or URL '\(not UTF-8\)'"):
        open_galaxies(str(tmp_path / "a.parquet"))
    pq.write_table(pa.table({"image": GOOD, "id": names, "survey": names}), tmp_path / "a.parquet")
    (tmp_path / "shards").mkdir()
    table = Path(shutil.copy(tmp_path / "a.parquet", tmp_path / "shards" / os.fsdecode(b"caf\xe9.parquet")))
    for source in (table, table.parent):
        galaxies = open_galaxies(str(source))
        assert galaxies.object_id.tolist() == galaxies.extra["survey"].to_pylist() == ["NGC1", "NG\\xe92", "NGC3"]
        assert open_stream(str(source), 32).counts.sum() == 3


# --------------------------------------------------------------------------------------- each failure has its own cause


def test_files_that_cannot_be_read_are_single_rows(tmp_path, images, own_cache):
    """Reading a process's memory from its start fails, also for root, as a damaged disk does."""
    folder = write_images(tmp_path / "survey", images[:3])
    for name in ("a.fits", "b.png"):
        (folder / name).symlink_to("/proc/self/mem")
    (folder / "c.png").symlink_to("nowhere.png")
    with pytest.raises(UserError, match=r"the image 'a.fits' of row 3 cannot be read \(Input/output error"):
        open_galaxies(str(folder))
    galaxies = open_galaxies(str(folder), skip_unreadable=True)
    reasons = {"a.fits": "Input/output error", "b.png": "Input/output error", "c.png": "No such file or directory"}
    problems = dict(zip(galaxies.object_id, galaxies.problem, strict=True))
    assert problems == dict.fromkeys(["0000.png", "0001.png", "0002.png"], "") | {
        name: f"cannot be read ({reason})" for name, reason in reasons.items()
    }
    assert np.array_equal(galaxies.pixels[:3], images[:3])
    for name in reasons:
        (folder / name).unlink()
    Image.fromarray(images[3]).save(folder / "b.png")
    assert np.array_equal(open_galaxies(str(folder)).pixels, images[:4])


def test_a_folder_that_cannot_be_read_is_named(tmp_path, images, own_cache, monkeypatch):
    """Its images would be missing without a word. This process may read every folder, if it is root's."""
    write_images(tmp_path / "survey" / "closed", images[:3])
    write_images(tmp_path / "survey" / "open", images[:3])
    scandir = os.scandir

    def closed(path):
        if Path(path).name == "closed":
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", closed)
    assert_refused(tmp_path / "survey", "closed: Permission denied", own_cache)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a.parquet", "a.parquet: cannot be read (Input/output error)"),
        ("a.h5", "a.h5: cannot be read (Input/output error)"),
        ("a.csv", "a.csv: cannot be read as a table ([Errno 5] Input/output error)"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, own_cache, name, message):
    (tmp_path / name).symlink_to("/proc/self/mem")
    assert_refused(tmp_path / name, message, own_cache)


def test_empty_parquet_file_is_named(tmp_path, own_cache):
    (tmp_path / "survey").mkdir()
    pq.write_table(pa.table({"image": GOOD}), tmp_path / "survey" / "a.parquet")
    (tmp_path / "survey" / "b.parquet").touch()
    for source in (tmp_path / "survey" / "b.parquet", tmp_path / "survey"):
        with pytest.raises(UserError, match=r"b.parquet: cannot be read as Parquet \(.*0 bytes\)"):
            open_galaxies(str(source))


@pytest.mark.parametrize("key", ["images", "ans"])
def test_hdf5_filter_that_is_not_installed_is_named(tmp_path, images, own_cache, key):
    """32001 is Blosc, which h5py does not have."""
    path = write_hdf5(tmp_path / "a.h5", images)
    with h5py.File(path, "a") as file:
        del file[key]
        shape = (40, 32, 32, 3)[: 4 if key == "images" else 1]
        created = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        created.set_chunk(shape)
        created.set_filter(32001, h5py.h5z.FLAG_OPTIONAL, (2, 2, 1))
        space = h5py.h5s.create_simple(shape)
        stored = h5py.h5d.create(file.id, key.encode(), h5py.h5t.NATIVE_UINT8, space, created)
        stored.write_direct_chunk((0,) * len(shape), bytes(9999))
    assert_refused(path, f"`{key}` needs the HDF5 filter (32001), which is not here", own_cache)


def test_hdf5_file_that_its_writer_has_locked_is_named(tmp_path, images, own_cache, monkeypatch):
    path = write_hdf5(tmp_path / "a.h5", images)
    with path.open("rb") as writer:
        fcntl.flock(writer, fcntl.LOCK_EX | fcntl.LOCK_NB)
        assert_refused(path, "it is locked by another program", own_cache)

    def no_locks(*_):  # as HDF5 says it on a file system without them
        raise OSError(errno.ENOLCK, "Unable to synchronously open file (unable to lock file, errno = 37)")

    monkeypatch.setattr(h5py, "File", no_locks)
    assert_refused(path, "without locks (No locks available): copy it elsewhere", own_cache)


# ------------------------------------------------------------------------------------------------------ named columns

GIVEN = ("image=cutout", "label=kind", "id=name", "ra=lon", "dec=lat", "pxscale=scale")


def table_with_other_names(folder: Path, kind: str) -> tuple[str, np.ndarray]:
    """Five images whose columns have names of their own, beside usual ones that hold something else."""
    images = random_images(5, 16)
    (folder / "files").mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / "files" / f"{i}.png")
    paths = [f"files/{i}.png" for i in range(5)]
    columns = {"cutout": [(folder / path).read_bytes() for path in paths] if kind == "encoded" else paths}
    columns |= {"kind": [*"abbab"], "label": [7] * 5, "name": [f"N{i}" for i in range(5)], "id": [0] * 5}
    columns |= {"lon": [1.0, 2, 3, 4, 5], "lat": [-1.0, -2, -3, -4, -5], "ra": [9.0] * 5, "dec": [9.0] * 5}
    columns |= {"scale": [0.5] * 5, "z": [0.1] * 5}
    if kind == "csv":
        pd.DataFrame(columns).to_csv(folder / "a.csv", index=False)
        return str(folder / "a.csv"), images
    pq.write_table(pa.table(columns), folder / "a.parquet")
    return str(folder / "a.parquet"), images


@pytest.mark.parametrize("kind", ["encoded", "paths", "csv"])
def test_columns_that_are_named_are_used_and_usual_names_are_not(tmp_path, caplog, kind):
    path, images = table_with_other_names(tmp_path, kind)
    galaxies = open_galaxies(path, columns=GIVEN)
    assert np.array_equal(galaxies.pixels, images)
    assert (galaxies.class_names, galaxies.label.tolist()) == (("a", "b"), [0, 1, 1, 0, 1])
    assert list(galaxies.object_id) == [f"N{i}" for i in range(5)]
    assert (galaxies.ra.tolist(), galaxies.dec.tolist()) == ([1, 2, 3, 4, 5], [-1, -2, -3, -4, -5])
    assert galaxies.pixel_scale.tolist() == [0.5] * 5
    assert galaxies.extra.column_names == ["label", "id", "ra", "dec", "z"]
    used = "`kind` as label, `lon` as ra, `lat` as dec, `scale` as pixel_scale, `name` as object_id"
    assert [
        f"columns used: {used}; passed through: label, id, ra, dec, z" in record.message for record in caplog.records
    ] == [True]
    assert open_galaxies(path, columns=GIVEN[:2]).fingerprint != galaxies.fingerprint
    assert open_galaxies(path, columns=GIVEN[::-1]).fingerprint == galaxies.fingerprint
    output = str(tmp_path / "catalogue.parquet")
    catalogue(["predict", "--dataset", path, "--output", output, "--embeddings", "--columns", *GIVEN])
    table = pd.read_parquet(output)
    assert (table["object_id"].tolist(), table["label"].tolist()) == ([f"N{i}" for i in range(5)], [*"abbab"])
    assert table["label_input"].tolist() == [7] * 5
    catalogue(["page", output])
    assert "Without images" not in (tmp_path / "catalogue.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (["label"], "--columns label=: write image=NAME, label=NAME, id=NAME, ra=NAME"),
        (["class=kind"], "--columns class=kind: write image=NAME"),
        (["label=kind", "label=z"], "name each, and each column, once"),
        (["label=kind", "id=kind"], "name each, and each column, once"),
        (["image=cutout", "label=sort"], "no column 'sort' beside the images, only kind"),
        (["image=picture"], "no column 'picture' of images, only cutout"),
        (["image=cutout", "ra=kind"], "its column `kind` must contain numbers"),
    ],
)
def test_wrong_columns_are_one_line(tmp_path, columns, message):
    path, _ = table_with_other_names(tmp_path, "encoded")
    with pytest.raises(UserError, match=re.escape(message)):
        open_galaxies(path, columns=columns)
    if "image" in columns[0]:
        with pytest.raises(UserError, match="only a table has columns of images"):
            open_galaxies(str(tmp_path / "files"), columns=columns)

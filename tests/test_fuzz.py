"""Random input is either used or refused in one line: tables, images, recipes, flags, files that a run reads back.

Every example has limits of time and of memory, opens no network connection and leaves nothing half-written. The
examples are the same in every run (`derandomize`).
"""

import io
import json
import os
import resource
import signal
import socket
import string
import struct
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from astropy.io import fits
from conftest import random_images, write_hdf5
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from test_encoder import MEAN, STD
from test_linear_probe_checkpoints import QUICK
from test_mae import small_config
from test_trainer import command

import linear_probe_checkpoints
import main
from galaxy_mae.data.__main__ import describe
from galaxy_mae.data.cache import Galaxies, open_galaxies
from galaxy_mae.data.split import split_galaxies
from galaxy_mae.errors import UserError
from galaxy_mae.model.mae import build_mae, save_encoder
from galaxy_mae.training.checkpoints import MANIFEST, find_checkpoint
from galaxy_mae.training.recipe import (
    EVALUATION,
    PRETRAINING,
    Command,
    build_parser,
    read_evaluation_recipe,
    read_recipe,
)

pytestmark = pytest.mark.filterwarnings("ignore")  # as in a process; only tests turn warnings into errors

SECONDS = 10  # of an example
MEMORY = 2 << 30  # bytes that an example may allocate
LONGEST_LINE = 4000  # characters of a message


def fuzz(examples: int) -> settings:
    """The settings of a test: `outcome` has a limit of time, and failures are reported as they are, in bounded time."""
    checks = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large]
    phases = (Phase.explicit, Phase.generate)
    return settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        phases=phases,
        suppress_health_check=checks,
    )


def outcome(action: Callable[[], Any]) -> Any:
    """What an action returns, or its `UserError`. Anything else that it raises fails the test, as a limit does."""
    try:
        with _limits():
            return action()
    except UserError as error:
        line = " ".join(str(error).split())  # as `one_line_errors` prints it
        assert 0 < len(line) < LONGEST_LINE
        return error


@contextmanager
def _limits() -> Iterator[None]:
    """Limit time and memory within the block, restore the environment, and allow no network connection."""

    def connect(self: socket.socket, address: Any) -> None:
        if self.family != socket.AF_UNIX:
            connections.append(address)
            raise ConnectionRefusedError

    def out_of_time(number: int, frame: object) -> None:
        overrun.append(SECONDS)
        raise TimeoutError(f"not done after {SECONDS} s")

    connections: list[Any] = []  # asserted at the end: the code under test may catch what is raised here
    overrun: list[int] = []
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGALRM, out_of_time)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", connect)
        environment = dict(os.environ)
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, before[1]))
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            resource.setrlimit(resource.RLIMIT_AS, before)
            signal.signal(signal.SIGALRM, handler)
            for name in set(os.environ) - set(environment):
                del os.environ[name]
            os.environ.update(environment)
            assert connections == []
            assert overrun == []


@contextmanager
def own_cache() -> Iterator[Path]:
    """A folder for the files of one example, with a cache in `cache`, in which nothing incomplete may be left."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        cache = Path(folder, "cache")
        patch.setenv("GALAXY_MAE_CACHE", str(cache))
        yield Path(folder)
        hidden = [path for path in cache.rglob(".*") if path.name != ".lock"]
        assert hidden == []
        for array in cache.glob("*/*.np[yz]"):
            assert array.with_suffix(".npy").is_file()
            assert array.with_suffix(".npz").is_file()
            assert (array.parent / "source.json").is_file()


def use(source: Path, image_size: int | None = None, skip_unreadable: bool = False) -> Galaxies | UserError:
    """Open a source as `python -m galaxy_mae.data` does, and check what was opened."""

    def action() -> Galaxies:
        galaxies = open_galaxies(str(source), image_size, skip_unreadable=skip_unreadable)
        describe(galaxies, split_galaxies(galaxies, 0))
        return galaxies

    galaxies = outcome(action)
    if isinstance(galaxies, Galaxies):
        size = galaxies.pixels.shape[1]
        assert galaxies.pixels.dtype == np.uint8
        assert galaxies.pixels.shape == (len(galaxies), size, size, 3)
        unreadable = galaxies.problem != ""
        assert skip_unreadable or not unreadable.any()
        assert not unreadable.all()
        assert not galaxies.pixels[unreadable].any()
        assert galaxies.blank[unreadable].all()
        assert galaxies.object_id is None or len(galaxies.object_id) == len(galaxies)
        assert (galaxies.ra is None) == (galaxies.dec is None)
        if galaxies.dec is not None:
            assert not (np.abs(galaxies.dec) > 90).any()
        if galaxies.pixel_scale is not None:
            assert not (galaxies.pixel_scale <= 0).any()
        if galaxies.label is not None:
            assert galaxies.label.min() >= 0
            assert galaxies.label.max() < len(galaxies.class_names)
    return galaxies


# --------------------------------------------------------------------------------------------------------------- images


def encoded(size: tuple[int, int] = (8, 8), mode: str = "RGB", kind: str = "PNG") -> bytes:
    """A small image file."""
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, kind)
    return buffer.getvalue()


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_of_declared_size(width: int, height: int) -> bytes:
    """A PNG whose header declares a size that its pixels do not have; its checksum is right."""
    png = encoded()
    return png[:8] + png_chunk(b"IHDR", struct.pack(">II", width, height) + png[24:29]) + png[33:]


def png_with_chunk(kind: bytes, content: bytes) -> bytes:
    """A PNG with one more chunk after its header."""
    png = encoded()
    return png[:33] + png_chunk(kind, content) + png[33:]


TEXT_BOMB = png_with_chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(1 << 28)))

sizes = st.sampled_from([0, 1, 7, 8, 9, 5000, 60_000, 2**31 - 1, 2**31, 2**32 - 1])
modes = st.sampled_from(["RGB", "RGBA", "L", "LA", "P", "1", "I;16"])


@st.composite
def damaged_images(draw: st.DrawFn) -> bytes:
    """A PNG or JPEG with flipped bits, cut off, with inserted bytes, or none of these."""
    kind, mode = draw(st.sampled_from([("PNG", "RGB"), ("PNG", "RGBA"), ("PNG", "P"), ("JPEG", "RGB"), ("GIF", "P")]))
    content = bytearray(encoded(mode=mode, kind=kind))
    for _ in range(draw(st.integers(0, 3))):
        content[draw(st.integers(0, len(content) - 1))] ^= 1 << draw(st.integers(0, 7))
    if draw(st.booleans()):
        del content[draw(st.integers(0, len(content))) :]
    if draw(st.booleans()):
        at = draw(st.integers(0, len(content)))
        content[at:at] = draw(st.binary(max_size=16))
    return bytes(content)


images = st.one_of(
    damaged_images(),
    st.builds(png_of_declared_size, sizes, sizes),
    st.builds(encoded, st.sampled_from([(8, 8), (8, 9), (1, 1)]), modes),
    st.builds(png_with_chunk, st.sampled_from([b"zTXt", b"iCCP", b"tEXt", b"PLTE", b"acTL"]), st.binary(max_size=64)),
)


@pytest.mark.slow
@fuzz(25)
@given(image=images, first=st.booleans(), as_folder=st.booleans(), skip=st.booleans())
@example(image=png_of_declared_size(60_000, 60_000), first=True, as_folder=False, skip=False)
@example(image=png_of_declared_size(60_000, 60_000), first=False, as_folder=True, skip=True)
@example(image=TEXT_BOMB, first=False, as_folder=False, skip=True)
@example(image=TEXT_BOMB, first=True, as_folder=True, skip=False)
def test_images(image, first, as_folder, skip):
    """A damaged image in a Parquet file or in a folder, before or after a good one."""
    files = [image, encoded()] if first else [encoded(), image]
    with own_cache() as folder:
        if as_folder:
            source = folder / "images"
            for i, content in enumerate(files):
                path = source / f"class_{i}" / f"{i}.png"
                path.parent.mkdir(parents=True)
                path.write_bytes(content)
        else:
            source = folder / "images.parquet"
            pq.write_table(pa.table({"image": [{"bytes": content, "path": None} for content in files]}), source)
        opened = use(source, skip_unreadable=skip)
        assert isinstance(opened, Galaxies) or not skip  # the other image is good


FITS_CARDS = (
    "SIMPLE",
    "BITPIX",
    "NAXIS",
    "NAXIS1",
    "NAXIS2",
    "NAXIS3",
    "BZERO",
    "TFIELDS",
    "TFORM1",
    "TTYPE1",
    "PCOUNT",
)


def fits_file(as_table: bool) -> bytes:
    """A cut-out of three bands, or a table of paths."""
    buffer = io.BytesIO()
    if as_table:
        column = fits.Column("path", "9A", array=["good.fits", "bad.png"])
        fits.HDUList([fits.PrimaryHDU(), fits.BinTableHDU.from_columns([column])]).writeto(buffer)
    else:
        fits.PrimaryHDU(np.random.default_rng(0).normal(size=(3, 8, 8))).writeto(buffer)
    return buffer.getvalue()


@st.composite
def damaged_fits(draw: st.DrawFn, as_table: bool) -> bytes:
    """A FITS file with other values of some cards, flipped bits, cut off, or none of these."""
    content = bytearray(fits_file(as_table))
    for name in draw(st.lists(st.sampled_from(FITS_CARDS), max_size=2)):
        value = draw(st.one_of(sizes.map(str), st.sampled_from(["-1", "T", "'1E'", "'0A'", "'PA(9)'", "1E400", "'"])))
        at = content.find(f"{name:<8}=".encode())
        if at >= 0:
            content[at : at + 80] = f"{name:<8}= {value:>20}".encode().ljust(80)
    for _ in range(draw(st.integers(0, 2))):
        content[draw(st.integers(0, len(content) - 1))] ^= 1 << draw(st.integers(0, 7))
    if draw(st.booleans()):
        del content[draw(st.integers(0, len(content))) :]
    return bytes(content)


@pytest.mark.slow
@pytest.mark.parametrize("as_table", [False, True])
def test_fits(as_table):
    """A damaged cut-out beside a good one, and a damaged table of paths."""

    @fuzz(80)
    @given(content=damaged_fits(as_table), skip=st.booleans())
    def check(content, skip):
        with own_cache() as folder:
            survey = folder / "survey"
            survey.mkdir()
            (survey / "good.fits").write_bytes(fits_file(as_table=False))
            (survey / "bad.fits").write_bytes(content)
            opened = use(survey / "bad.fits" if as_table else survey, skip_unreadable=skip)
            assert as_table or isinstance(opened, Galaxies) or not skip

    check()


@pytest.mark.slow
@fuzz(150)
@given(
    header=st.lists(st.sampled_from(["path", "PATH", "id", "label", "ra", "dec", "pxscale", "", "a b"]), max_size=4),
    rows=st.lists(
        st.lists(
            st.one_of(
                st.just("good.fits"), st.text(max_size=6), st.sampled_from(["1", "1.5", "nan", "http://a/b", "/"])
            ),
            min_size=1,
            max_size=4,
        ),
        max_size=3,
    ),
    skip=st.booleans(),
)
@example(header=["path", "path"], rows=[["good.fits", "good.fits"]], skip=True)
def test_csv(header, rows, skip):
    with own_cache() as folder:
        (folder / "good.fits").write_bytes(fits_file(as_table=False))
        lines = [",".join(header), *(",".join(row[: len(header)]) for row in rows)]
        (folder / "table.csv").write_text("\n".join(lines), errors="replace")
        use(folder / "table.csv", skip_unreadable=skip)


# --------------------------------------------------------------------------------------------------------------- tables

words = st.text(max_size=8)
whole_numbers = st.one_of(st.integers(0, 9), st.integers(-(2**63), 2**63 - 1))
decimals = st.one_of(st.floats(0, 9), st.floats(), st.sampled_from([0.0, 1.0, 2.0, -90.5, 359.9]))

# Arrow types and their values, of columns that should hold numbers or names.
VALUES = {
    pa.int64(): whole_numbers,
    pa.int8(): st.integers(-128, 127),
    pa.uint64(): st.integers(0, 2**64 - 1),
    pa.float64(): decimals,
    pa.float32(): st.floats(width=32),
    pa.bool_(): st.booleans(),
    pa.string(): words,
    pa.large_string(): words,
    pa.binary(): st.binary(max_size=8),
    pa.date32(): st.dates(),
    pa.timestamp("us"): st.datetimes(),
    pa.decimal128(20, 2): st.decimals(-(10**9), 10**9, places=2),
    pa.list_(pa.int64()): st.lists(whole_numbers, max_size=3),
    pa.list_(pa.string()): st.lists(words, max_size=3),
    pa.list_(pa.float64(), 2): st.lists(decimals, min_size=2, max_size=2),
    pa.struct([("a", pa.int64())]): st.fixed_dictionaries({"a": whole_numbers}),
    pa.null(): st.none(),
}
paths = st.sampled_from(["", ".", "/", "a.png", "/etc/passwd", "http://127.0.0.1:9/a.png", "hf://a/b", "zip://a::b"])
IMAGES = {
    pa.struct([("bytes", pa.binary()), ("path", pa.string())]): st.fixed_dictionaries(
        {"bytes": st.one_of(st.none(), images, st.binary(max_size=8)), "path": st.one_of(st.none(), paths, words)}
    ),
    pa.struct([("bytes", pa.string()), ("path", pa.string())]): st.fixed_dictionaries({"bytes": words, "path": words}),
    pa.struct([("image", pa.struct([("bytes", pa.binary())]))]): st.fixed_dictionaries(
        {"image": st.fixed_dictionaries({"bytes": images})}
    ),
    pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())])): st.lists(
        st.fixed_dictionaries({"bytes": images, "path": st.none()}), max_size=2
    ),
    pa.binary(): images,
    pa.string(): st.one_of(paths, words),
    pa.list_(pa.list_(pa.list_(pa.uint8()))): st.just(np.zeros((8, 8, 3), np.uint8).tolist()),
    pa.int64(): whole_numbers,
    pa.null(): st.none(),
}
GOOD_IMAGE = {"bytes": encoded(), "path": None}


@st.composite
def columns(draw: st.DrawFn, values: dict[pa.DataType, st.SearchStrategy], rows: int) -> pa.Array:
    """A column of a random type, with or without nulls."""
    kind = draw(st.sampled_from(list(values)))
    value = st.one_of(st.none(), values[kind]) if draw(st.booleans()) else values[kind]
    return pa.array(draw(st.lists(value, min_size=rows, max_size=rows)), kind)


@st.composite
def tables(draw: st.DrawFn) -> pa.Table:
    """A table with images, labels, coordinates and others, each of them good, of a random type, or not there."""
    rows = draw(st.integers(0, 4))
    table = {}
    if draw(st.integers(0, 3)):
        table["image"] = pa.array([GOOD_IMAGE] * rows, next(iter(IMAGES)))
    elif draw(st.booleans()):
        table[draw(st.sampled_from(["image", "img", "images"]))] = draw(columns(IMAGES, rows))
    for name in draw(st.lists(st.sampled_from(["label", "labels", "ans", "ra", "dec", "pxscale", "id"]), unique=True)):
        table[name] = draw(columns(VALUES, rows))
    if draw(st.booleans()):
        table[draw(words)] = draw(columns(VALUES, rows))
    return pa.table(table)


@pytest.mark.slow
@fuzz(150)
@given(table=tables(), image_size=st.sampled_from([None, 1, 4, 100]))
def test_parquet(table, image_size):
    with own_cache() as folder:
        pq.write_table(table, folder / "table.parquet")
        use(folder / "table.parquet", image_size)


TYPES = ["u1", "<u2", ">i4", "i8", "u8", "f2", "f4", "f8", "c8", "S3", "?", [("a", "u1")], h5py.string_dtype()]
lengths = st.sampled_from([0, 1, 2, 3, 8, 10**9, 2**40])
shapes = st.one_of(
    st.just((3, 8, 8, 3)),
    st.tuples(lengths, st.sampled_from([1, 8]), st.sampled_from([1, 8]), st.sampled_from([1, 3, 4])),
    st.lists(lengths, max_size=5).map(tuple),
)
KINDS = (*["good"] * 12, *["random"] * 4, "group", "soft link", "external link", "type", "empty", "missing")


def add_member(file: h5py.File, name: str, kind: str, shape: tuple[int, ...], dtype: Any, good: np.ndarray) -> None:
    """Add a good data set to an HDF5 file, one of another shape and type that stores nothing, or something else."""
    if kind == "good":
        file[name] = good
    elif kind == "random":
        chunks = tuple(min(n, 8) for n in shape) if shape and all(shape) else None
        file.create_dataset(name, shape, dtype, chunks=chunks, maxshape=shape if chunks else None)
    elif kind == "group":
        file.create_group(f"{name}/inner")
    elif kind == "soft link":
        file[name] = h5py.SoftLink("/nowhere")
    elif kind == "external link":
        file[name] = h5py.ExternalLink("nowhere.h5", "/images")
    elif kind == "type":
        file[name] = np.dtype("f8")
    elif kind == "empty":
        file[name] = h5py.Empty("u1")


@pytest.mark.slow
@fuzz(150)
@given(
    members=st.fixed_dictionaries(
        {
            name: st.tuples(st.sampled_from(KINDS), shapes, st.sampled_from(TYPES))
            for name in ("images", "ans", "ra", "dec", "pxscale", "object_id")
        }
    )
)
def test_hdf5(members):
    good = {"images": random_images(3, 8), "ans": np.arange(3), "ra": np.arange(3.0), "dec": np.arange(3.0)}
    good |= {"pxscale": np.full(3, 0.262), "object_id": np.array([b"a", b"b", b"c"])}
    with own_cache() as folder:
        with h5py.File(folder / "file.h5", "w") as file:
            for name, (kind, shape, dtype) in members.items():
                add_member(file, name, kind, shape, dtype, good[name])
        use(folder / "file.h5")


# ------------------------------------------------------------------------------------------------------ recipes, flags


def options(script: Command) -> list[str]:
    """A script's flags, in one spelling each, but for those that print its help."""
    return sorted({action.option_strings[0] for action in build_parser(script)._actions} - {"-h", "--help"})


HOSTILE_VALUES = ["", "[]", '{"a": 1}', "nan", "inf", "-1", "0", "1.5", "10" * 30, "é", "none", "True"]

# Of arguments of a process: no NUL.
printable = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)
flag_values = st.one_of(
    st.sampled_from([*HOSTILE_VALUES, "[1", "a=b", "a=1,b", "no", "steps", "epoch", "adamw_torch", "cosine"]),
    st.integers().map(str),
    st.floats().map(str),
    printable,
)
json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), printable),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(printable, inner, max_size=3)),
    max_leaves=8,
)


@pytest.fixture
def empty_folder(tmp_path, monkeypatch):
    """The working directory, in which relative paths among the flags come to nothing."""
    monkeypatch.chdir(tmp_path)


SCRIPTS = pytest.mark.parametrize(
    ("script", "read", "given_flags"),
    [
        pytest.param(PRETRAINING, read_recipe, ["--report_to", "none"], id="main.py"),
        pytest.param(EVALUATION, read_evaluation_recipe, ["--encoder", "runs/a"], id="linear_probe_checkpoints.py"),
    ],
)


@pytest.mark.slow
@SCRIPTS
def test_every_flag(empty_folder, script, read, given_flags):
    """Each flag with each hostile value; the failures are collected, because there may be many."""
    failed = []
    for flag in options(script):
        for value in HOSTILE_VALUES:
            try:
                outcome(lambda arguments=(flag, value): read([*given_flags, *arguments]))
            except Exception as error:
                failed.append(f"{flag} {value!r}: {error!r}")
    assert failed == []


@SCRIPTS
def test_flags(empty_folder, script, read, given_flags):
    """Several flags, with any number of any values."""
    flags = st.tuples(st.sampled_from(options(script)), st.lists(flag_values, max_size=2))

    @fuzz(200)
    @given(st.lists(flags, min_size=1, max_size=3))
    def check(flags):
        arguments = [argument for flag, values in flags for argument in (flag, *values)]
        outcome(lambda: read([*given_flags, *arguments]))

    check()


@SCRIPTS
def test_recipes(empty_folder, script, read, given_flags):
    """Recipes with known fields and any values, and files of any text."""
    names = st.one_of(st.sampled_from([flag[2:] for flag in options(script)]), printable)
    recipes = st.one_of(
        st.dictionaries(names, json_values, max_size=3).map(lambda fields: yaml.safe_dump(fields, allow_unicode=True)),
        json_values.map(yaml.safe_dump),
        st.text(string.printable, max_size=30),
    )

    @fuzz(200)
    @given(recipes)
    @example("? [a, b]\n: 1")
    @example("--- 1\n--- 2")
    def check(text):
        Path("recipe.yaml").write_text(text)
        outcome(lambda: read([*given_flags, "--config", "recipe.yaml"]))

    check()


# ------------------------------------------------------------------------------------------------------ files of a run

contents = st.one_of(json_values.map(json.dumps), st.text(string.printable, max_size=20)).map(str.encode)
contents = st.one_of(contents, st.binary(max_size=20))


class _Starting(Exception):
    """Raised in place of a training."""


@fuzz(100)
@given(
    st.one_of(
        contents,
        st.fixed_dictionaries(
            {"recipe": json_values, "finished": json_values, "sessions": json_values}, optional={"format": json_values}
        ).map(lambda run: json.dumps(run).encode()),
    )
)
def test_run_json(small_hdf5, tmp_path, monkeypatch, content):
    """A run whose run.json holds something else is not started over."""

    def start(*arguments):
        raise _Starting

    monkeypatch.setattr(main, "build_trainer", start)
    path = tmp_path / "run" / "run.json"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    refused = outcome(lambda: main.main(command(path.parent, small_hdf5)))
    assert isinstance(refused, UserError)
    assert path.read_bytes() == content


@pytest.fixture(scope="module")
def results(tmp_path_factory, small_hdf5) -> Path:
    """A results folder with one finished method."""
    folder = tmp_path_factory.mktemp("evaluation")
    save_encoder(build_mae(small_config(), seed=11), folder / "run" / "encoder", MEAN, STD, ())
    evaluate(folder, "--dataset", str(small_hdf5), "--method", "zero_shot")
    return folder / "results"


def evaluate(folder: Path, *flags: str) -> None:
    linear_probe_checkpoints.main(
        [*QUICK, "--encoder", str(folder / "run"), "--output_dir", str(folder / "results"), *flags]
    )


@pytest.mark.parametrize("name", ["evaluation.json", "zero_shot.json"])
def test_results(results, small_hdf5, name):
    """Damaged results are named in a line by the report, and an evaluation does not continue among them."""
    path = results / name
    good = path.read_bytes()

    @fuzz(40)
    @given(contents)
    def check(content):
        path.write_bytes(content)
        assert isinstance(outcome(lambda: evaluate(results.parent, "--report")), UserError)
        if name == "evaluation.json":
            flags = ("--dataset", str(small_hdf5), "--method", "ssl_linear_probe")
            assert isinstance(outcome(lambda: evaluate(results.parent, *flags)), UserError)

    try:
        check()
    finally:
        path.write_bytes(good)


checksums = st.dictionaries(printable, json_values, max_size=3)
manifests = st.fixed_dictionaries({"run": st.one_of(st.just("id"), json_values), "files": checksums})


@fuzz(200)
@given(st.one_of(contents, manifests.map(lambda manifest: json.dumps(manifest).encode())))
@example(b"{}")
@example(b'{"run": "id", "files": {}}')
@example(b'{"run": "id", "files": {"model.safetensors": null}}')
@example(b'{"run": "id", "files": {"model.safetensors": "x"}}')
@example(b'{"run": "id", "files": {"\\u0000": "x"}}')
def test_checkpoint_manifest(tmp_path, content):
    """A checkpoint whose manifest holds something else is skipped."""
    checkpoint = tmp_path / "checkpoint-5"
    checkpoint.mkdir(exist_ok=True)
    (checkpoint / "model.safetensors").write_bytes(b"weights")
    (checkpoint / MANIFEST).write_bytes(content)
    assert outcome(lambda: find_checkpoint(tmp_path, "id")) is None


@fuzz(100)
@given(name=st.sampled_from(["source.json", "32.npy", "32.npz"]), content=contents)
def test_cache(name, content):
    """A cached file that holds something else is made again."""
    expected = random_images(4)
    with own_cache() as folder:
        source = write_hdf5(folder / "file.h5", expected)
        use(source)
        (path,) = (folder / "cache").glob(f"*/{name}")
        path.write_bytes(content)
        galaxies = use(source)
        assert isinstance(galaxies, Galaxies)
        assert np.array_equal(galaxies.pixels, expected)

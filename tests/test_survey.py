"""A HATS catalogue is embedded partition by partition: the rows of `predict`, whatever is killed or shared."""

import csv
import ctypes
import json
import os
import resource
import shutil
from argparse import Namespace
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import png, random_images
from test_encoder import MEAN, STD
from test_mae import small_config

import galaxy_mae
from galaxy_mae.catalogue.__main__ import main
from galaxy_mae.catalogue.models import open_model
from galaxy_mae.data import hats
from galaxy_mae.data.fits import PRESETS
from galaxy_mae.data.hats import open_hats
from galaxy_mae.errors import UserError
from galaxy_mae.model.classifier import build_classifier
from galaxy_mae.model.encoder import random_encoder
from galaxy_mae.model.mae import build_mae, encoder_config, save_encoder
from galaxy_mae.model.saved_model import save_model
from galaxy_mae.survey import embed
from galaxy_mae.survey.command import _task
from galaxy_mae.survey.lazy import reuse_memory
from galaxy_mae.survey.partitions import share_of_task

ROWS = (23, 1, 0, 40, 17, 5)  # of the partitions
IMAGE = pa.struct({"bytes": pa.binary(), "path": pa.string()})
PROPERTIES = {"obs_collection": "small", "dataproduct_type": "object", "hats_nrows": "86", "hats_col_healpix": "hp"}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """A classifier of images of 32 pixels with random weights."""
    folder = tmp_path_factory.mktemp("model") / "seed_1"
    folder.mkdir()
    save_model(
        build_classifier(random_encoder(encoder_config(small_config()), 0), ("a", "b", "c"), 1), folder, MEAN, STD
    )
    return str(folder)


def write_hats(folder: Path, partitions: list[pa.Table], properties: dict[str, str] = PROPERTIES) -> Path:
    """Write a HATS catalogue whose pixels are those of order 1 from 0."""
    (folder / "dataset" / "Norder=1" / "Dir=0").mkdir(parents=True)
    for pixel, table in enumerate(partitions):
        pq.write_table(table, folder / hats.pixel_location(1, pixel))
    pq.write_metadata(partitions[0].schema, folder / "dataset" / "_common_metadata")
    with (folder / "partition_info.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("Norder", "Npix"), *((1, pixel) for pixel in range(len(partitions)))])
    text = "#HATS catalog\n" + "".join(f"{key}={value}\n" for key, value in properties.items())
    (folder / "hats.properties").write_text(text)
    return folder


@pytest.fixture(scope="module")
def table() -> pa.Table:
    """86 galaxies; image 30 is broken, 31 missing, 32 too small, 33 blank."""
    images = random_images(sum(ROWS), 32, seed=3)
    images[33] = 9
    encoded = [png(image) for image in images]
    encoded[30:33] = b"broken", None, png(images[0])[:60]
    count = len(images)
    return pa.table(
        {
            "hp": np.arange(count),
            "object_id": [f"J{i}" for i in range(count)],
            "rgb_image": pa.array([{"bytes": b, "path": None} for b in encoded], IMAGE),
            "ra": np.linspace(0, 10, count),
            "dec": np.linspace(0, 10, count),
        }
    )


def split(table: pa.Table) -> list[pa.Table]:
    starts = np.cumsum((0, *ROWS))
    return [table.slice(start, rows) for start, rows in zip(starts, ROWS, strict=False)]


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory, table) -> Path:
    """A collection of these galaxies in six partitions, one of them empty, with a margin that repeats some."""
    folder = tmp_path_factory.mktemp("hats") / "collection"
    write_hats(folder / "small", split(table))
    write_hats(folder / "margin", [table.slice(0, 5)], PROPERTIES | {"dataproduct_type": "margin"})
    (folder / "collection.properties").write_text(
        "obs_collection=c\nhats_primary_table_url=small\nall_margins=margin\n"
    )
    return folder


def run(model: str, catalogue: Path, output: Path, *flags: str) -> None:
    source = ("--catalog", str(catalogue), "--output", str(output), "--use_cpu")
    main(["survey", *(("--model", model) if model else ()), *source, *flags])


def read(output: Path) -> pa.Table:
    """The rows of an output in the order of its partitions."""
    opened = open_hats(str(output))
    return pa.concat_tables([pq.read_table(partition.files[0]) for partition in opened.partitions])


def assert_same_rows(found: pd.DataFrame, expected: pd.DataFrame) -> None:
    """Bit for bit, where NaN equals NaN."""
    pd.testing.assert_frame_equal(found.drop(columns="embedding"), expected.drop(columns="embedding"), check_exact=True)
    assert np.stack(found["embedding"]).tobytes() == np.stack(expected["embedding"]).tobytes()


@pytest.fixture(scope="module")
def whole(tmp_path_factory, model, catalogue) -> Path:
    """The output of one process."""
    output = tmp_path_factory.mktemp("output") / "whole"
    run(model, catalogue, output)
    return output


def test_rows_are_those_of_predict_bit_for_bit(tmp_path, model, table, whole):
    """The same galaxies as one Parquet file, in other batches. What a broken image has is a flag."""
    pq.write_table(table, tmp_path / "plain.parquet")
    expected = galaxy_mae.predict(str(tmp_path / "plain.parquet"), model, embeddings=True, use_cpu=True)
    found = read(whole).to_pandas()
    assert found["hp"].tolist() == list(range(86))
    columns = ["object_id", "ra", "dec", "predicted_class", "p_a", "p_b", "p_c", "entropy", "flag"]
    assert_same_rows(found[[*columns, "embedding"]], expected[[*columns, "embedding"]])
    assert found["flag"][30:34].tolist() == ["unreadable"] * 3 + ["blank"]
    assert [text[:12] for text in found["problem"][30:33]] == ["cannot be de", "is missing", "cannot be de"]
    assert read(whole).schema.field("embedding").type == pa.list_(pa.float32(), found["embedding"][0].size)


def test_tasks_that_are_killed_and_repeated_give_the_same_files(tmp_path, model, catalogue, whole, capsys, monkeypatch):
    """Of three tasks, the second is killed before its last partition; `--finish` names what is missing."""
    output = tmp_path / "whole"
    run(model, catalogue, output, "--task", "0", "--tasks", "3")
    run(model, catalogue, output, "--task", "2", "--tasks", "3")
    left = output / "whole" / ".tmp-0123456789ab"
    left.mkdir()
    (left / "half.parquet").write_bytes(b"PAR1")
    left.with_name(f"{left.name}.lock").touch()
    with pytest.raises(UserError, match=r"of 6 partitions are missing: Norder=1 Npix=\d"):
        run("", catalogue, output, "--finish")
    before = {path: path.stat().st_mtime_ns for path in output.rglob("Npix*")}
    assert 0 < len(before) < 6
    for name, value in {"ID": 8, "MIN": 7, "MAX": 9, "COUNT": 3}.items():
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", str(value))
    run(model, catalogue, output)
    assert "task 1 of 3" in capsys.readouterr().out
    run("", catalogue, output, "--finish")
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert not left.exists()
    assert_same_rows(read(output).to_pandas(), read(whole).to_pandas())
    properties = hats.read_properties(output / "whole" / "hats.properties")
    assert (properties["obs_collection"], properties["hats_nrows"]) == ("whole", "86")
    assert hats.read_properties(output / "collection.properties")["hats_primary_table_url"] == "whole"
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "2")
    with pytest.raises(UserError, match=r"the array has gaps.*: submit consecutive indices"):
        run(model, catalogue, output)


def test_metadata_that_is_not_text_is_named(tmp_path, table):
    source = write_hats(tmp_path / "damaged", [table])
    (source / "hats.properties").write_bytes(b"obs_collection=\xff\xfe")
    with pytest.raises(
        UserError, match=r"not a complete HATS catalogue \('utf-8' codec can't decode .*; copy it again"
    ):
        open_hats(str(source))


def test_an_array_of_which_slurm_says_too_little_is_one_task(monkeypatch):
    for name in ("MIN", "MAX", "COUNT"):
        monkeypatch.delenv(f"SLURM_ARRAY_TASK_{name}", raising=False)
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    assert _task(Namespace(task=None, tasks=None)) == (0, 1)


@pytest.mark.parametrize(
    "array", [("3", "0", "6", "4"), ("7", "0", "3", "4"), ("x", "0", "3", "4"), ("0", "0", "-1", "0"), ("", "", "", "")]
)
def test_an_array_that_makes_no_sense_is_an_error(monkeypatch, array):
    for name, value in zip(("ID", "MIN", "MAX", "COUNT"), array, strict=True):
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", value)
    with pytest.raises(UserError, match=f"the array has gaps, or its variables are wrong \\(task {array[0]} of"):
        _task(Namespace(task=None, tasks=None))


def test_more_tasks_than_partitions_cost_nothing(catalogue):
    rows = open_hats(str(catalogue)).rows
    assert [len(share_of_task(rows, task, 10**12)) for task in (0, 5, 6, 10**12 - 1)] == [1, 1, 0, 0]


def test_shares_have_equal_rows(catalogue):
    rows = open_hats(str(catalogue)).rows
    shares = [share_of_task(rows, task, 2) for task in range(2)]
    assert sorted(p.pixel for share in shares for p in share) == list(range(6))
    assert [sum(rows[p] for p in share) for share in shares] == [40 + 5, 23 + 17 + 1]


def test_a_partition_without_a_file_is_not_an_empty_one(tmp_path, table):
    source = write_hats(tmp_path / "small", split(table))
    (source / hats.pixel_location(1, 0)).unlink()
    partition = next(p for p in open_hats(str(source)).partitions if p.pixel == 0)
    for use in (partition.count_rows, lambda: list(partition.read(["ra"], 64))):
        with pytest.raises(UserError, match=r"Npix=0.parquet: there is no such file"):
            use()


def test_another_model_setting_or_catalogue_is_refused(tmp_path, model, catalogue, whole, table):
    for flags, difference in {
        ("--float16",): "embedding is float32 there and float16 here",
        ("--bf16",): "bf16 is False there and True here",
    }.items():
        with pytest.raises(UserError, match=rf"--output .*whole: another command wrote it \({difference}\)"):
            run(model, catalogue, whole, *flags)
    with pytest.raises(UserError, match=r"model_fingerprint is \w+ there and \w+ here"):
        run("pretrained/galaxy-zoo-small", catalogue, whole)
    other = write_hats(tmp_path / "other", [table], PROPERTIES | {"obs_collection": "other"})
    with pytest.raises(UserError, match="catalog is small there and other here"):
        run(model, other, whole)
    with pytest.raises(UserError, match=r"another command wrote it \(catalog is small there and other here"):
        run("", other, whole, "--finish")
    # A file of another command in the folder is found by its own metadata.
    run(model, other, tmp_path / "half", "--float16")
    about = json.loads((tmp_path / "half" / "survey.json").read_text())
    (tmp_path / "half" / "survey.json").write_text(json.dumps(about | {"embedding": "float32"}))
    with pytest.raises(UserError, match=r"Npix=0\.parquet: another command wrote it"):
        run(model, other, tmp_path / "half")


def test_a_changed_partition_is_computed_again(tmp_path, model, table):
    source = write_hats(tmp_path / "small", split(table))
    run(model, source, tmp_path / "out")
    pq.write_table(table.slice(50, 3), source / hats.pixel_location(1, 0))
    with pytest.raises(UserError, match=r"1 of 6 partitions are missing: Norder=1 Npix=0"):
        run("", source, tmp_path / "out", "--finish")
    run(model, source, tmp_path / "out")
    assert read(tmp_path / "out")["object_id"].to_pylist()[:4] == ["J50", "J51", "J52", "J23"]


def test_float16_embeddings_are_the_rounded_ones(tmp_path, model, catalogue, whole):
    run(model, catalogue, tmp_path / "half", "--float16")
    half, single = (np.stack(read(path)["embedding"].to_pandas()) for path in (tmp_path / "half", whole))
    assert half.dtype == np.float16
    assert half.tobytes() == single.astype(np.float16).tobytes()


def test_embeddings_over_orientations_are_those_of_predict(tmp_path, model, table):
    """Of an encoder only; the same folder takes no other features."""
    save_encoder(build_mae(small_config()), tmp_path / "encoder", MEAN, STD, ())
    source, encoder = write_hats(tmp_path / "small", split(table)), str(tmp_path / "encoder")
    run(encoder, source, tmp_path / "out", "--orientations")
    pq.write_table(table, tmp_path / "plain.parquet")
    flags = {"embeddings": True, "orientations": True, "use_cpu": True}
    expected = galaxy_mae.predict(str(tmp_path / "plain.parquet"), encoder, **flags)
    found = np.stack(read(tmp_path / "out")["embedding"].to_pandas())
    assert found.tobytes() == np.stack(expected["embedding"]).tobytes()
    with pytest.raises(UserError, match="orientations is True there and False here"):
        run(encoder, source, tmp_path / "out")
    with pytest.raises(UserError, match=r"--orientations: --model .* is a classifier"):
        run(model, source, tmp_path / "other", "--orientations")


def test_multi_band_fluxes_are_stretched_like_fits(tmp_path, model):
    """Bands are found by their names, in any order; a missing band and ragged rows are flagged."""
    rng = np.random.default_rng(0)
    flux = rng.gamma(1, 0.1, (20, 4, 40, 40)).astype(np.float32)
    bands = [["des-g", "des-r", "des-i", "des-z"] if i % 2 else ["des-z", "des-i", "des-r", "des-g"] for i in range(20)]
    bands[7] = ["des-g", "des-r", "des-i", "des-y"]
    values = [{"band": band, "flux": f.tolist()} for band, f in zip(bands, flux, strict=True)]
    values[8]["flux"][0][0] = values[8]["flux"][0][0][:-1]
    values[9] = None
    values[10]["flux"] = [[[] for _ in range(40)]] * 4
    values[11]["flux"] = [[[0.0] * 5000]] * 4
    flux[13, :, :20] = np.nan
    values[13]["flux"] = flux[13].tolist()
    kind = pa.struct({"band": pa.list_(pa.string()), "flux": pa.list_(pa.list_(pa.list_(pa.float32())))})
    columns = {"hp": np.arange(20), "image": pa.array(values, kind), "ra": np.zeros(20), "dec": np.zeros(20)}
    source = write_hats(tmp_path / "flux", [pa.table(columns).slice(0, 12), pa.table(columns).slice(12)])
    run(model, source, tmp_path / "out", "--stretch", "sdss")
    found = read(tmp_path / "out").to_pandas()
    stretch = PRESETS["sdss"]
    order = [(0, 1, 3) if i % 2 else (3, 2, 0) for i in range(20)]
    expected = galaxy_mae.predict(
        np.stack([stretch.rgb(f[list(o)])[::-1] for f, o in zip(flux, order, strict=True)]), model, embeddings=True
    )
    good = [i for i in range(20) if i not in (*range(7, 12), 13)]
    assert np.stack(found["embedding"][good]).tobytes() == np.stack(expected["embedding"][good]).tobytes()
    assert found["problem"][7] == "has no band z, only des-g, des-r, des-i, des-y"
    assert found["problem"][8] == "has bands that are no images of one shape, or that have no names"
    assert found["problem"][9] == "is missing"
    assert found["problem"][10] == "has bands that are no images of one shape, or that have no names"
    assert found["problem"][11] == "is 5000 x 1 pixels; crop or resize it to between 1 and 4096"
    assert json.loads((tmp_path / "out" / "survey.json").read_text())["stretch"]["preset"] == "sdss"
    assert found["nan_fraction"][12:14].tolist() == [0, 0.5]
    assert found["flag"][13] == "nan"


def test_other_columns_pass_but_for_images_and_nested_ones(tmp_path, model, table):
    """In the order of the input, with its nulls. One with a name of the output gets another name."""
    others = {
        "redshift": pa.array([None if i % 3 else i / 10 for i in range(len(table))], pa.float32()),
        "flag": pa.array([f"quality {i}" for i in range(len(table))]),
        "spectrum": pa.array([[float(i)] for i in range(len(table))]),
        "thumbnail": pa.array([b"x"] * len(table)),
    }
    wide = table
    for name, values in others.items():
        wide = wide.append_column(name, values)
    run(model, write_hats(tmp_path / "wide", split(wide)), tmp_path / "out")
    run(model, write_hats(tmp_path / "plain", split(table)), tmp_path / "expected")
    found, expected = read(tmp_path / "out"), read(tmp_path / "expected")
    assert found.column_names[:6] == ["hp", "object_id", "ra", "dec", "redshift", "flag_input"]
    assert found["redshift"].equals(pa.chunked_array([others["redshift"]]))
    assert found["flag_input"].to_pylist() == others["flag"].to_pylist()
    assert_same_rows(found.drop_columns(["redshift", "flag_input"]).to_pandas(), expected.to_pandas())


def test_a_partition_with_fewer_rows_than_it_claims_is_computed_again(tmp_path, model, table):
    run(model, write_hats(tmp_path / "small", split(table)), tmp_path / "out")
    before = read(tmp_path / "out")
    path = next(file for file in (tmp_path / "out").rglob("Npix*.parquet") if pq.read_metadata(file).num_rows > 1)
    pq.write_table(pq.ParquetFile(path).read().slice(1), path)  # its metadata still tell the number of before
    run(model, tmp_path / "small", tmp_path / "out")
    assert_same_rows(read(tmp_path / "out").to_pandas(), before.to_pandas())


def test_an_unreadable_partition_is_reported_at_the_end(tmp_path, model, table, capsys):
    """One without a footer, and one with a damaged page; the others are there, and a repaired one completes them."""
    source = write_hats(tmp_path / "small", split(table))
    damaged = [source / hats.pixel_location(1, pixel) for pixel in (0, 3)]
    contents = [path.read_bytes() for path in damaged]
    damaged[0].write_bytes(contents[0][: len(contents[0]) // 2])
    damaged[1].write_bytes(contents[1][:4] + bytes(len(contents[1]) // 2) + contents[1][4 + len(contents[1]) // 2 :])
    with pytest.raises(SystemExit, match="2"):
        run(model, source, tmp_path / "out")
    printed = capsys.readouterr()
    assert "4 of 6 partitions; 23 galaxies" in printed.out
    errors = printed.err.splitlines()
    assert len(errors) == 2
    assert all("cannot be read as Parquet" in error and "error: partition Norder=1 Npix=" in error for error in errors)
    assert len(list((tmp_path / "out").rglob("Npix*"))) == 4
    with pytest.raises(UserError, match=r"1 of 6 partitions cannot be read, as Norder=1 Npix=0 "):
        run("", source, tmp_path / "out", "--finish")
    for path, content in zip(damaged, contents, strict=True):
        path.write_bytes(content)
    run(model, source, tmp_path / "out")
    assert read(tmp_path / "out").num_rows == 86


def test_every_flipped_bit_of_a_done_partition_is_found(tmp_path, model, table):
    """In pages, their headers and the footer; the same command computes that partition again, and no other one."""
    source, output = write_hats(tmp_path / "small", split(table)), tmp_path / "out"
    run(model, source, output)
    path = output / hats.pixel_location(1, 4)
    content, expected = path.read_bytes(), pq.read_table(path).to_pandas()
    for at in np.linspace(0, len(content) - 1, 40).astype(int):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1 << at % 8]) + content[at + 1 :])
        with pytest.raises(UserError, match=r"1 of 6 partitions are missing: Norder=1 Npix=4"):
            run("", source, output, "--finish")
    before = {file: file.stat().st_mtime_ns for file in output.rglob("Npix*") if file != path}
    run(model, source, output)
    assert {file: file.stat().st_mtime_ns for file in before} == before
    assert_same_rows(pq.read_table(path).to_pandas(), expected)
    column = pq.read_metadata(path).row_group(0).column(0)
    last = column.dictionary_page_offset + column.total_compressed_size - 1
    path.write_bytes(content[:last] + bytes([content[last] ^ 1]) + content[last + 1 :])
    with pytest.raises(OSError, match="CRC"):  # other programs find it, too
        pq.ParquetFile(path, page_checksum_verification=True).read()


def test_an_input_that_is_changed_in_place_is_noticed_and_a_copy_is_not_computed_again(tmp_path, model, table):
    """Rows in reversed order, at the same size and the same time of modification."""
    source, output = write_hats(tmp_path / "small", split(table)), tmp_path / "out"
    path = source / hats.pixel_location(1, 3)
    part = pq.read_table(path)
    stored = {"compression": "none", "use_dictionary": False, "write_statistics": False}
    pq.write_table(part, path, **stored)
    run(model, source, output)
    copy = shutil.copytree(source, tmp_path / "copy", copy_function=shutil.copyfile)
    before = {file: file.stat().st_mtime_ns for file in output.rglob("Npix*")}
    run(model, copy, output)
    assert {file: file.stat().st_mtime_ns for file in before} == before
    state = path.stat()
    pq.write_table(part.take(list(range(len(part)))[::-1]), path, **stored)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (state.st_size, state.st_mtime_ns)
    with pytest.raises(UserError, match=r"1 of 6 partitions are missing: Norder=1 Npix=3"):
        run("", source, output, "--finish")
    run(model, source, output)
    assert pq.read_table(output / hats.pixel_location(1, 3))["object_id"].to_pylist()[0] == "J63"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda part: part.drop_columns("ra"), "ra"),
        (lambda part: part.drop_columns("rgb_image"), "rgb_image"),
        (lambda part: part.set_column(1, "object_id", [range(len(part))]), "`object_id` is int64 in it"),
        (lambda part: part.set_column(0, "hp", [[f"00{i}" for i in range(len(part))]]), "`hp` is string in it"),
        (lambda part: part.set_column(2, "rgb_image", [range(len(part))]), "rgb_image"),
        (lambda part: part.set_column(3, "ra", [[[1.0]] * len(part)]), "list"),
    ],
)
def test_an_odd_partition_stops_no_other(tmp_path, model, table, capsys, change, message):
    parts = split(table)
    source = write_hats(tmp_path / "small", [parts[0], change(parts[3]), parts[1]])
    pq.write_metadata(table.schema, source / "dataset" / "_common_metadata")
    with pytest.raises(SystemExit, match="2"):
        run(model, source, tmp_path / "out")
    printed = capsys.readouterr()
    assert "2 of 3 partitions; 24 galaxies" in printed.out
    (line,) = printed.err.splitlines()
    assert line.startswith("error: partition Norder=1 Npix=1: ")
    assert message in line
    assert sorted(file.name for file in (tmp_path / "out").rglob("Npix*")) == ["Npix=0.parquet", "Npix=2.parquet"]


def test_an_input_that_is_changed_while_it_is_read_is_not_done(tmp_path, model, table, monkeypatch, capsys):
    source = write_hats(tmp_path / "small", split(table))
    read = hats.Partition.read

    def changing(partition, *arguments):
        yield from read(partition, *arguments)
        if partition.pixel == 3:
            partition.files[0].touch()

    monkeypatch.setattr(hats.Partition, "read", changing)
    with pytest.raises(SystemExit, match="2"):
        run(model, source, tmp_path / "out")
    assert "Npix=3.parquet: it was changed while it was read" in capsys.readouterr().err
    assert not (tmp_path / "out" / hats.pixel_location(1, 3)).exists()


def test_errors_are_one_line_that_names_the_fix(tmp_path, model, catalogue, table):
    no_images = write_hats(tmp_path / "no_images", [table.drop_columns("rgb_image")])
    margin, empty = catalogue / "margin", tmp_path / "empty"
    empty.mkdir()
    incomplete = write_hats(tmp_path / "incomplete", [table])
    (incomplete / "dataset" / "_common_metadata").unlink()
    used = tmp_path / "used"
    used.mkdir()
    (used / "thesis.tex").touch()
    good, new = catalogue, tmp_path / "new"
    for source, output, flags, message in (
        (tmp_path / "none", new, (), "none has no hats.properties"),
        (empty, new, (), r"not a HATS catalogue: .* has no hats.properties"),
        (incomplete, new, (), "not a complete HATS catalogue"),
        (margin, new, (), "a HATS table of type 'margin', not of objects"),
        (no_images, new, (), r"no column of images .* only hp, object_id, ra, dec; set --image_column"),
        (good, new, ("--image_column", "ra"), "no column 'ra' of images"),
        (good, new, ("--bands", "g", "g", "r"), "--bands g g r: give three different bands"),
        (good, new, ("--task", "3", "--tasks", "3"), "--task 3 --tasks 3: .* from 0 to --tasks less 1"),
        (good, new, ("--task", "3"), "--task 3 --tasks None: set both"),
        (good, new, ("--finish",), "nothing was computed there"),
        (good, good / "out", (), "this is the input, or in it"),
        (good, used, (), "holds other files and no survey.json"),
        (good, tmp_path / "no" / "out", (), r"cannot be created \(No such file or directory\)"),
    ):
        with pytest.raises(UserError, match=message) as error:
            run(model, source, output, *flags)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "new").exists()


def test_full_disk_is_one_line_and_the_command_resumes(small_disk, model, table):
    (small_disk / "ballast").write_bytes(
        bytes(os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_bsize - 20_000)
    )
    source = write_hats(small_disk.parent / "small", split(table))
    output = small_disk / "out"
    with pytest.raises(UserError, match=r"the disk or quota is full.*: free some space; the same command resumes"):
        run(model, source, output)
    (small_disk / "ballast").unlink()
    run(model, source, output)
    assert read(output).num_rows == 86


# ---------------------------------------------------------------------------------------------------------------- LSDB


@pytest.fixture(scope="module")
def sky(tmp_path_factory, table) -> Path:
    """The galaxies as LSDB writes them: a collection with a margin, sorted by HEALPix index."""
    lsdb = pytest.importorskip("lsdb")
    frame = table.drop_columns("hp").to_pandas(types_mapper=pd.ArrowDtype)
    options = {"lowest_order": 3, "highest_order": 6, "partition_rows": 30, "margin_threshold": 600}
    opened = lsdb.from_dataframe(frame, ra_column="ra", dec_column="dec", catalog_name="sky", **options)
    folder = tmp_path_factory.mktemp("lsdb") / "sky"
    opened.write_catalog(folder, as_collection=True, progress_bar=False)
    return folder


@pytest.fixture(scope="module")
def embedded(tmp_path_factory, sky, model) -> Path:
    output = tmp_path_factory.mktemp("embedded") / "embedded"
    run(model, sky, output)
    return output


ignore_warnings = pytest.mark.filterwarnings("ignore")  # of LSDB and Dask


@ignore_warnings
def test_lsdb_opens_the_output_and_cross_matches_all_of_it(embedded, sky):
    lsdb = pytest.importorskip("lsdb")
    from hats.io.validation import is_valid_catalog

    assert is_valid_catalog(embedded, strict=True)
    opened, known = lsdb.open_catalog(embedded), lsdb.open_catalog(sky)[["object_id", "ra", "dec"]]
    assert opened.name == "embedded"
    matched = opened.crossmatch(
        known, radius_arcsec=0.1, suffixes=("", "_known"), suffix_method="all_columns"
    ).compute()
    assert len(matched) == 86
    assert (matched["object_id"] == matched["object_id_known"]).all()
    assert len(opened.cone_search(ra=5, dec=5, radius_arcsec=3600).compute()) == 12


@ignore_warnings
def test_embed_takes_orientations(tmp_path, sky):
    lsdb = pytest.importorskip("lsdb")
    save_encoder(build_mae(small_config()), tmp_path / "encoder", MEAN, STD, ())
    encoder = str(tmp_path / "encoder")
    embedding = embed(lsdb.open_catalog(sky), encoder, orientations=True, use_cpu=True).dtypes["embedding"]
    assert embedding.pyarrow_dtype.value_type == pa.float32()
    assert embedding.pyarrow_dtype.list_size == open_model(encoder, orientations=True).num_features > 2 * 48


@ignore_warnings
def test_embed_is_lazy_and_equal_to_the_command(embedded, sky, model):
    lsdb = pytest.importorskip("lsdb")
    lazy = embed(lsdb.open_catalog(sky), model, use_cpu=True)
    expected = lsdb.open_catalog(embedded)
    assert list(lazy.columns) == list(expected.columns)
    assert lazy.dtypes.tolist() == expected.dtypes.tolist()
    assert lazy.margin is None
    assert_same_rows(lazy.compute(), expected.compute())


def test_memory_is_reused_in_a_worker_of_dask():
    """Its allocator, set here as there, maps every megabyte anew: 256 page faults."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        pytest.skip("the C library is not glibc")
    libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]

    def page_faults() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(50):
            np.ones(1 << 20, np.uint8)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    libc.mallopt(-3, 1 << 17)  # M_MMAP_THRESHOLD
    held = []  # what is free in this process would be used first; a mapped block begins 16 bytes after a page
    while len(held) < 2 or any(address % 4096 != 16 for address in held[-2:]):
        held.append(libc.malloc(1 << 20))
    try:
        assert page_faults() > 10_000
        reuse_memory()
        assert page_faults() < 1000
    finally:
        for address in held:
            libc.free(address)

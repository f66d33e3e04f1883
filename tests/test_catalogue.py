"""Catalogues: equal in every format, the numbers of plain transformers, and resumed wherever they were interrupted."""

import dataclasses
import gzip
import io
import json
import logging
import multiprocessing
import os
import re
import shutil
import signal
import time
from datetime import date
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import small_parts
import torch
from astropy.io import fits, votable
from conftest import SHARED, png, random_images, write_hdf5
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.decomposition import PCA
from test_encoder import MEAN, STD
from test_mae import small_config
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification

import galaxy_mae
from galaxy_mae.catalogue import predict
from galaxy_mae.catalogue.__main__ import main
from galaxy_mae.data.fits import PRESETS, Stretch
from galaxy_mae.data.frame import Frame
from galaxy_mae.data.images import area_average, image_statistics
from galaxy_mae.data.seen import TrainingImages
from galaxy_mae.errors import UserError, one_line_errors
from galaxy_mae.evaluation.fine_tuning import FINISHED
from galaxy_mae.files import claim, write_json
from galaxy_mae.model.classifier import build_classifier
from galaxy_mae.model.encoder import random_encoder
from galaxy_mae.model.mae import build_mae, encoder_config, save_encoder
from galaxy_mae.model.saved_model import TRAINING_IMAGES, save_model
from galaxy_mae.predictions.formats import SUFFIXES, read_catalogue, write_catalogue
from galaxy_mae.predictions.schema import Predictions, add_predictions, column_names, field, galaxy_table, to_numpy

ROOT, REAL = Path(__file__).resolve().parents[1], SHARED / "data" / "galaxies.parquet"
CLASSES = ("Round Smooth", "Edge-on, with Bulge", "Spirale gépée")
P_COLUMNS = ["p_round_smooth", "p_edge_on_with_bulge", "p_spirale_gepee"]
STRINGS = ['a,"x"\'<&>', "é 漢 🌌 ", " \ttrail\n", "", r"\x41 \ ", "a  b\x00c", "\u3000x\u3000", "]]>", "nan", "a\r\nb"]
ABOUT = {"model": {"name": "é\\<&>'\" " * 20, "seeds": [0, 1]}, "created": "2026-11-25T09:00:00+00:00", "pca": 1}


# ------------------------------------------------------------------------------------------------------------- formats


def catalogue_table(rows: int, seed: int = 0) -> pa.Table:
    """Columns of every type, with NaN in each column of numbers."""
    rng = np.random.default_rng(seed)
    p, ra, embedding = rng.random(rows, np.float32), rng.random(rows), rng.random((rows, 3), np.float32)
    p[0] = ra[1] = embedding[2] = np.nan
    columns = {
        field("row", pa.int64(), "row"): np.arange(rows) - 2**62,
        field("object_id", pa.string(), "name, é"): [STRINGS[i % len(STRINGS)] for i in range(rows)],
        field("flag", pa.string(), "empty"): [""] * rows,
        field("p_a", pa.float32(), "probability"): p,
        field("ra", pa.float64(), "right ascension", "deg"): ra,
        field("embedding", pa.list_(pa.float32(), 3), "features"): embedding.tolist(),
        field("pca", pa.list_(pa.float32(), 1), "component"): rng.random((rows, 1), np.float32).tolist(),
    }
    return pa.table(list(columns.values()), pa.schema(list(columns)))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_format_gives_back_the_same_table_and_provenance(tmp_path, suffix):
    """Bit for bit, with strings that need quotes, escapes or UTF-8, and with units and descriptions."""
    tables = [catalogue_table(13), catalogue_table(14, seed=1)]
    write_catalogue(tmp_path / f"a{suffix}", tables, ABOUT)
    read = read_catalogue(tmp_path / f"a{suffix}")
    expected = pa.concat_tables(tables)
    assert read.about == ABOUT
    assert read.table.schema.equals(expected.schema, check_metadata=True)
    for name in expected.column_names:
        values = [to_numpy(table[name]) for table in (read.table, expected)]
        assert values[0].dtype == values[1].dtype
        if name in ("object_id", "flag"):
            assert values[0].tolist() == values[1].tolist()
        else:
            assert values[0].tobytes() == values[1].tobytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"a{suffix}"] + ["a.csv.json"] * (suffix == ".csv")


def test_no_cell_of_a_csv_file_is_a_formula_and_names_survive(tmp_path):
    """Of texts; numbers keep their sign, also those of a column of texts."""
    numbers, formulas = (
        ["-12", "+.5e-3", "'1", "a=b", ""],
        ["=1+1", "@SUM(A1)", "-cmd|' /C calc'!A0", "+-1", "-", "'=1"],
    )
    names = [*numbers, *formulas, "-1\n", "\t=2", "''@x"]
    columns = {"=row": pa.array(range(-3, len(names) - 3)), "object_id": names}
    write_catalogue(tmp_path / "a.csv", [pa.table(columns)], ABOUT)
    cells = pd.read_csv(tmp_path / "a.csv", dtype=str, keep_default_na=False, na_values=[])
    assert list(cells) == ["'=row", "object_id"]
    assert cells["'=row"][0] == "-3"
    assert list(cells.object_id) == [*numbers, *(f"'{name}" for name in names[len(numbers) :])]
    read = read_catalogue(tmp_path / "a.csv").table
    assert read.column_names == list(columns)
    assert read["object_id"].to_pylist() == names


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_columns_of_the_users_own_table_survive(tmp_path, suffix):
    """Of any type and name, with nulls; one that is called like ours is renamed."""
    extra = {
        "redshift": pa.array([0.1, None, 3], pa.float64()),
        "mass, log": pa.array([9.5, 10, None], pa.float32()),
        'Größe "x"': pa.array([1, None, -(2**31)], pa.int32()),
        "objid": pa.array([None, 2**64 - 1, 1], pa.uint64()),
        "id64": pa.array([2**63 - 1, None, 5], pa.int64()),
        "is_star": pa.array([True, None, False]),
        "observed": pa.array([None, date(2026, 11, 30), date(1, 2, 3)], pa.date32()),
        "survey": pa.array(["DECaLS", None, "a\nb"], pa.large_string()),
        "tags": pa.array([["a"], None, []], pa.list_(pa.string())),
        "Flag": pa.array(["x", "y", "z"]),
        "RA": pa.array([1, 2, 3], pa.uint8()),
        "long " * 20: pa.array([1, 2, 3]),
        "é": pa.array([1, 2, 3]),
        "predicted_class": pa.array(["x", "y", "z"]),
        "predicted_class_seed_0": pa.array(["x", "y", "z"]),
        "Rank": pa.array([1, 2, 3]),
    }
    galaxies = SimpleNamespace(object_id=None, ra=None, dec=None, label=None, geometry=None, extra=pa.table(extra))
    table = add_predictions(galaxy_table(galaxies, np.array([2, 1, 0])), flag=np.array(["", "", "blank"]))
    write_catalogue(tmp_path / f"a{suffix}", [table], ABOUT)
    found = read_catalogue(tmp_path / f"a{suffix}")
    assert found.predicted is None
    assert found.seeds == []
    read, expected = (
        found.table,
        {
            "redshift": [3.0, np.nan, 0.1],
            "mass, log": [np.nan, 10.0, 9.5],
            "Größe 'x'": [-(2**31), None, 1],
            "objid": ["1", str(2**64 - 1), ""],
            "id64": [5, None, 2**63 - 1],
            "is_star": [0, None, 1],
            "observed": ["0001-02-03", "2026-11-30", ""],
            "survey": ["a\nb", "", "DECaLS"],
            "tags": ["[]", "", "['a']"],
            "Flag_input": ["z", "y", "x"],
            "RA_input": [3, 2, 1],
            ("long " * 20).strip(): [3, 2, 1],
            "é": [3, 2, 1],
            "predicted_class_input": ["z", "y", "x"],
            "predicted_class_seed_0_input": ["z", "y", "x"],
            "Rank_input": [3, 2, 1],
        },
    )
    assert read.column_names == ["row", "object_id", "ra", "dec", *expected, "flag"]
    for name, values in expected.items():
        assert str(read[name].to_pylist()) == str(values), name


def test_other_programs_read_the_formats(tmp_path):
    """What TOPCAT takes: plain FITS columns with units, a VOTable of the standard, a CSV file with one header line."""
    for suffix in SUFFIXES:
        write_catalogue(tmp_path / f"a{suffix}", [catalogue_table(13)], ABOUT)
    with fits.open(tmp_path / "a.fits") as file:
        file.verify("exception")
        header = file[1].header
        assert [header[f"TFORM{i}"] for i in range(1, 8)] == ["K", "26A", "1A", "E", "D", "3E", "E"]
        assert (header["TUNIT5"], header["TCOMM5"]) == ("deg", "right ascension")
        ucds = [header.get(f"TUCD{i}") for i in range(1, 7)]
        expected = ["meta.record", "meta.id;meta.main", "meta.code.qual", "stat.probability", "pos.eq.ra;meta.main"]
        assert ucds == [*expected, None]
        assert header["RADESYS"] == "ICRS"
        assert (header["DATE"], header["CREATOR"]) == ("2026-11-25T09:00:00", "galaxy_mae")
        assert file[1].data["object_id"][7] == "]]>"
    xml = votable.parse(tmp_path / "a.vot", verify="exception").get_first_table()
    assert [(f.name, f.datatype, f.unit and str(f.unit)) for f in xml.fields][3:5] == [
        ("p_a", "float", None),
        ("ra", "double", "deg"),
    ]
    assert [f.ucd for f in xml.fields][:6] == ucds
    (system,) = votable.parse(tmp_path / "a.vot").iter_coosys()
    assert (system.system, xml.fields[4].ref) == ("ICRS", system.ID)
    assert {f.arraysize for f in xml.fields if f.datatype == "unicodeChar"} == {"*"}
    # A validating parser, as STILTS' votlint, refuses an ID that occurs twice; `pca` is a column and a parameter.
    ids = re.findall(r'\bID="(\w+)"', (tmp_path / "a.vot").read_text())
    assert len(ids) == len(set(ids)) > 7
    frame = pd.read_csv(tmp_path / "a.csv")
    vectors = ["embedding_000", "embedding_001", "embedding_002", "pca_000"]
    assert list(frame) == ["row", "object_id", "flag", "p_a", "ra", *vectors]
    assert frame["p_a"].dtype == frame["embedding_002"].dtype == np.float64
    assert pd.read_parquet(tmp_path / "a.parquet")["embedding"][0].shape == (3,)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_files_of_other_programs_raise_user_error(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    with pytest.raises(UserError, match="no such file"):
        read_catalogue(path)
    write_catalogue(path, [catalogue_table(201)], ABOUT)
    whole = path.read_bytes()
    truncated = whole[: whole.rindex(b"\n", 0, -1) + 1] if suffix == ".csv" else whole[: len(whole) // 2]
    for content in (b"", b"x" * 100, truncated):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"not a catalogue of this program, or damaged"):
            read_catalogue(path)
    write_catalogue(path, [catalogue_table(3)], ABOUT)
    for beside in tmp_path.glob("*.json"):
        beside.unlink()
        with pytest.raises(UserError, match=r"a\.csv\.json with its provenance is not beside it"):
            read_catalogue(path)


EDITED = {"model": {"name": "m", "embedding_fingerprint": "x"}, "class_names": ["a", "b"], "image_size": 32}
EDITED |= {"dataset": "d.parquet", "dataset_fingerprint": "0", "orientations": False, "bf16": False, "versions": {}}
EDITED |= {"created": "2026-11-30", "stretch": dataclasses.asdict(Stretch.named("auto")), "frame": {"kind": "crop"}}


def replaced(name: str, values, kind=None):
    """The edit of a table that gives a column other values, and perhaps another type."""

    def edit(table: pa.Table) -> pa.Table:
        kept = kind or table.schema.field(name).type
        return table.set_column(table.column_names.index(name), name, [pa.array(values, kept)])

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (replaced("label", ["a", None, "b"]), "column label"),
        (replaced("label", [0, 1, 0], pa.int64()), "column label"),
        (replaced("predicted_class", ["a", None, "b"]), "column predicted_class"),
        (replaced("predicted_class", ["a", "star", "b"]), "predicted class is none of the classes"),
        (replaced("predicted_class_seed_7", ["a", "", "b"]), "predicted class is none of the classes"),
        (replaced("predicted_class_seed_7", [0, 0, 0], pa.int8()), "column predicted_class_seed_7"),
        (replaced("object_id", [1, 2, 3], pa.int64()), "column object_id"),
        (replaced("flag", [None, "", ""]), "column flag"),
        (replaced("row", [0.0, 1.0, 2.0], pa.float64()), "column row"),
        (replaced("row", [0, None, 2]), "column row"),
        (replaced("ra", ["0h", "1h", "2h"], pa.string()), "column ra"),
        (replaced("entropy", ["x", "y", "z"], pa.string()), "column entropy"),
        (replaced("p_a", ["x", "y", "z"], pa.string()), "column p_a"),
        (replaced("p_a", [0.1, np.nan, 0.1]), "a probability is not from 0 to 1"),
        (replaced("p_a", [0.1, 1.5, 0.1]), "a probability is not from 0 to 1"),
        (lambda table: table.drop_columns("p_b"), "it has no p_b"),
        (lambda table: table.append_column("label", table["label"]), "column label"),
        (replaced("embedding", [[1.0], [1.0, 2.0], [3.0]], pa.list_(pa.float32())), "column embedding"),
        (replaced("embedding", [[], [], []], pa.list_(pa.float32(), 0)), "size=0"),
        (replaced("embedding", [[1, 2]] * 3, pa.list_(pa.int32(), 2)), "column embedding"),
        (replaced("embedding", [[1.0, 2.0], None, [1.0, 2.0]]), "column embedding"),
        ({"class_names": "ab"}, "class_names of its provenance is 'ab'"),
        ({"class_names": [1, 2]}, "names no model, classes"),
        ({"class_names": ["b", "c"]}, "it has no p_c"),
        ({"model": ["m"]}, "model of its provenance"),
        ({"model": {"name": 3}}, "names no model"),
        ({"image_size": -1}, "size of images"),
        ({"image_size": "32"}, "image_size of its provenance"),
        ({"stretch": {"preset": "mine"}}, "mine"),
        ({"stretch": {"changes": '{"q": -1}'}}, "`q` is out of its range"),
        ({"dataset": 3}, "dataset of its provenance"),
        ([], "not a catalogue"),
    ],
)
def test_what_is_edited_by_hand_ends_in_one_line(tmp_path, edit, message):
    galaxies = SimpleNamespace(
        object_id=None,
        ra=np.zeros(3),
        dec=np.zeros(3),
        label=np.array([0, 1, 1]),
        class_names="ab",
        geometry=None,
        extra=pa.table({}),
    )
    known, p = galaxy_table(galaxies, np.arange(3)), np.full((1, 3, 2), 0.5)
    embedding = np.arange(6, dtype=np.float32).reshape(3, 2)
    table = add_predictions(known, "ab", p, seeds=[7], flag=np.array([""] * 3, object), embedding=embedding)
    path = tmp_path / "a.parquet"
    about = (EDITED | edit if edit else edit) if not callable(edit) else EDITED
    for content, provenance in ((table, EDITED), (edit(table) if callable(edit) else table, about)):
        pq.write_table(content.replace_schema_metadata({"galaxy_mae": json.dumps(provenance)}), path)
        if content is table and provenance is EDITED:
            assert len(read_catalogue(path)) == 3
    with pytest.raises(UserError, match=message) as error:
        read_catalogue(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda text: re.sub(r"<TABLEDATA>.*</TABLEDATA>", '<BINARY><STREAM href="PIPE"/></BINARY>', text),
            "elsewhere",
        ),
        (lambda text: re.sub(r"<TABLEDATA>.*</TABLEDATA>", '<v:STREAM xmlns:v="x" href="PIPE"/>', text), "elsewhere"),
        (lambda text: text.replace("<TABLE>", '<TABLE nrows="1000000000">'), "declares 8,000,000,000|declares"),
        (lambda text: re.sub(r'(<FIELD [^>]*)arraysize="\d+"', r'\1arraysize="900000000"', text), "declares"),
    ],
)
def test_a_votable_of_values_elsewhere_or_of_a_huge_size_is_not_opened(tmp_path, change, message):
    """Neither a URL nor a pipe, at which astropy would wait, is opened."""
    path, pipe = tmp_path / "a.vot", tmp_path / "pipe"
    os.mkfifo(pipe)
    write_catalogue(path, [catalogue_table(13)], ABOUT)
    old = path.read_text()
    flat = re.sub(r"<TABLEDATA>.*?</TABLEDATA>", lambda x: x[0].replace("\n", ""), old, flags=re.DOTALL)
    text = change(flat).replace("PIPE", f"file://{pipe}")
    assert text != flat
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        read_catalogue(path)


def test_compressed_and_sparse_catalogues_are_not_opened(tmp_path):
    """What astropy would unpack or make up, to over 4 GB: of a FITS file at most 512 MB."""
    for suffix in (".vot", ".fits"):
        path = tmp_path / f"a{suffix}"
        write_catalogue(path, [catalogue_table(13)], ABOUT)
        content = path.read_bytes()
        path.write_bytes(gzip.compress(content + bytes((1 << 29) * (suffix == ".fits")), 1))
        with pytest.raises(UserError, match="not a catalogue of this program"):
            read_catalogue(path)
    rows = 10**8
    path.write_bytes(content.replace(b"NAXIS2  =                   13", b"NAXIS2  =            %8d" % rows))
    with path.open("r+b") as file:
        file.truncate(rows * 200)
    with pytest.raises(UserError, match="far more than it can hold"):
        read_catalogue(path)


def test_parquet_without_provenance_raises_user_error(tmp_path):
    pq.write_table(pa.table({"row": [1]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="not a catalogue of this program"):
        read_catalogue(tmp_path / "a.parquet")


def test_columns_of_probabilities_have_unique_ascii_names():
    names = column_names(["A b", "a-B", "é", "漢", "", "A b_1", "a b 1"])
    assert names[:4] == ["p_a_b", "p_a_b_1", "p_e", "p_class_3"]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch("p_[a-z0-9_]+", name) for name in names)


def test_predictions_give_codes_probabilities_and_what_is_usable(tmp_path):
    """As they were written, by the mean and by each seed; an unreadable galaxy has no class."""
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.ones(3), (2, 5))
    label, problem = np.array([2, 0, 1, 1, 0]), np.array(["", "", "", "is missing", ""], object)
    flag = np.array(["", "blank", "saturated", "unreadable", ""], object)
    ra = np.arange(5.0)
    galaxies = SimpleNamespace(
        object_id=None, ra=ra, dec=-ra, label=label, class_names=("b", "c", "a"), geometry=None, extra=pa.table({})
    )
    known, names = galaxy_table(galaxies, np.arange(5)), ("a", "b", "c")
    table = add_predictions(known, names, p, seeds=[7, 8], flag=flag, problem=problem)
    write_catalogue(tmp_path / "a.vot", [table], ABOUT | {"class_names": ["a", "b", "c"]})
    found = read_catalogue(tmp_path / "a.vot")
    assert found.class_names == ["a", "b", "c"]
    assert found.label.tolist() == [0, 1, 2, 2, 1]
    assert found.seeds == [7, 8]
    readable = problem == ""
    assert found.predicted.tolist() == np.where(readable, p.argmax(axis=2), -1).tolist()
    assert found.codes("predicted_class").tolist() == np.where(readable, p.mean(axis=0).argmax(axis=1), -1).tolist()
    assert np.array_equal(found.probabilities[readable], p.mean(axis=0)[readable].astype(np.float32))
    assert np.isnan(found.probabilities[3]).all()
    assert found.position.tolist() == [[x, -x] for x in range(5)]
    assert found.left_out == "1 unreadable, 1 blank"
    assert found.only_usable().row.tolist() == [0, 2, 4]
    other = Predictions(found.table, {"class_names": ["a", "b"]})
    assert other.label is None
    assert other.other_labels == ["c"]
    assert Predictions(found.table.select(["row", "label"]), {}).class_names == ["a", "b", "c"]


# ------------------------------------------------------------------------------------------------------- the prediction


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A run with an encoder, a method with three seeds, and a folder with a classifier in it. Images of 32 pixels."""
    folder = tmp_path_factory.mktemp("models")
    save_encoder(build_mae(small_config()), folder / "run" / "encoder", MEAN, STD, ())
    encoder = random_encoder(encoder_config(small_config()), 0)
    for seed in range(3):
        model = build_classifier(encoder, CLASSES, seed)
        torch.nn.init.normal_(model.classifier.weight, generator=torch.Generator().manual_seed(seed))
        seed_folder = folder / "method" / f"seed_{seed}"
        seed_folder.mkdir(parents=True)
        save_model(model, seed_folder, MEAN, STD)
        (seed_folder / FINISHED).write_text("{}")
    shutil.copytree(folder / "method" / "seed_1", folder / "package" / "classifier")
    return folder


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    """40 images of 32 pixels: 7 is blank, 8 has a bright star, 9 a smaller one."""
    images = random_images(40, 32, seed=3).clip(max=254)
    images[7] = 17
    images[8, :8, :8] = 255  # 1/16 of the pixels
    images[9, :7, :7] = 255
    return images


@pytest.fixture(scope="module")
def survey(tmp_path_factory, images) -> Path:
    """These images in a Parquet file, with names, positions, labels and redshifts. Row 5 is unreadable."""
    path = tmp_path_factory.mktemp("survey") / "survey.parquet"
    encoded = [png(image) for image in images]
    encoded[5] = b"broken"
    columns = {"object_id": [f"J{i}" for i in range(40)], "ra": np.linspace(0, 300, 40), "dec": np.linspace(-5, 5, 40)}
    label = ["spiral" if i % 3 else "smooth" for i in range(40)]
    redshift = pa.array([None, *(i / 100 for i in range(1, 40))])
    pq.write_table(pa.table({"image": encoded, **columns, "label": label, "redshift": redshift}), path)
    return path


def run(*arguments) -> None:
    main(["predict", *map(str, arguments), "--use_cpu"])


def test_rows_are_the_numbers_of_plain_transformers(tmp_path, models, survey, images, capsys):
    classifier = models / "method" / "seed_1"
    run("--model", classifier, "--dataset", survey, "--output", tmp_path / "a.parquet", "--embeddings")
    table = pd.read_parquet(tmp_path / "a.parquet")
    model = AutoModelForImageClassification.from_pretrained(classifier).eval()
    inputs = AutoImageProcessor.from_pretrained(classifier)(list(images), return_tensors="pt")
    with torch.inference_mode():
        pooled = model.beit(**inputs).pooler_output.numpy()
        p = torch.softmax(model(**inputs).logits, dim=1).numpy()
    readable = np.arange(40) != 5
    assert table[P_COLUMNS].to_numpy()[readable] == pytest.approx(p[readable], abs=1e-5)
    assert np.stack(table["embedding"])[readable] == pytest.approx(pooled[readable], abs=1e-4)
    assert table["entropy"].to_numpy()[readable] == pytest.approx(-(p * np.log(p)).sum(axis=1)[readable], abs=1e-4)
    expected = np.where(readable, np.array(CLASSES)[p.argmax(axis=1)], "")
    assert table["predicted_class"].tolist() == expected.tolist()
    assert len(set(expected)) > 2
    assert table["disagreement"].isna().all()  # a single seed
    assert table["row"].tolist() == list(range(40))
    assert table["object_id"].tolist() == [f"J{i}" for i in range(40)]
    assert table["ra"].to_numpy() == pytest.approx(np.linspace(0, 300, 40))
    assert table["dec"].to_numpy() == pytest.approx(np.linspace(-5, 5, 40))
    assert table["label"].tolist() == ["spiral" if i % 3 else "smooth" for i in range(40)]
    assert "40 galaxies: 1 unreadable, 1 blank, 0 nan, 1 saturated;" in capsys.readouterr().out


def test_what_is_wrong_with_an_image_is_flagged(models, survey):
    table = galaxy_mae.predict(str(survey), str(models / "package"), embeddings=True, use_cpu=True)
    flags = {5: "unreadable", 7: "blank", 8: "saturated"}
    assert table["flag"].tolist() == [flags.get(i, "") for i in range(40)]
    assert "cannot be decoded" in table["problem"][5]
    assert (table["problem"].drop(5) == "").all()
    numbers = [*P_COLUMNS, "entropy"]
    assert table.loc[5, numbers].isna().all()
    assert table["predicted_class"][5] == ""
    assert np.isnan(table["embedding"][5]).all()
    assert table.drop(5)[numbers].notna().all(axis=None)


def galaxies_of(count: int, brightness: float = 150, radius: float = 5, sky: float = 6, red: float = 1) -> np.ndarray:
    """Discs with soft edges, of various sizes, brightness and colors, on a noisy sky: (count, 32, 32, 3) uint8."""
    rng = np.random.default_rng(count)
    y, x = np.mgrid[:32, :32] - 15.5
    size, light, color = (rng.normal(1, 0.15, (count, 1, 1)) for _ in range(3))
    disc = brightness * light / (1 + np.exp(np.hypot(x, y) - radius * size.clip(0.5)))
    images = np.stack([disc * color * red, disc, disc * (2 - color * red)], axis=3) + rng.normal(
        sky, 2, (count, 32, 32, 3)
    )
    return images.clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, models) -> Path:
    """A classifier that knows how its training images look."""
    folder = tmp_path_factory.mktemp("trained") / "classifier"
    shutil.copytree(models / "package" / "classifier", folder)
    split = {"train": np.arange(400), "validation": np.arange(400, 700)}
    write_json(folder / TRAINING_IMAGES, TrainingImages.of(galaxies_of(700), split, Frame()).as_json())
    return folder


@pytest.mark.parametrize(
    ("images", "flag", "reasons"),
    [
        (galaxies_of(50), "", ()),
        (galaxies_of(50, brightness=15), "far", ("fainter by", "--stretch")),
        (galaxies_of(50, radius=1.3), "far", (r"0\.\d+ times as large in the frame, see --fit galaxy",)),
        (galaxies_of(50, sky=60), "far", ("a sky of 6. gray levels, not [567] .of FITS files see --stretch",)),
        (galaxies_of(50, red=0.2), "far", ("bluer .of FITS files see --stretch",)),
        (galaxies_of(50, brightness=0), "empty", ("nothing stands at the center",)),
    ],
    ids=["alike", "fainter", "smaller", "sky", "bluer", "empty"],
)
def test_images_unlike_those_of_the_training_are_told(tmp_path, trained, capsys, caplog, images, flag, reasons):
    """By a column, a flag, a warning at the end with the reason, and at the top of the page."""
    pq.write_table(pa.table({"image": [png(image) for image in images]}), tmp_path / "a.parquet")
    command = ["--model", trained, "--dataset", tmp_path / "a.parquet", "--output", tmp_path / "b.parquet"]
    run(*command, "--embeddings")
    found = pd.read_parquet(tmp_path / "b.parquet")
    far = found["far_from_training"] > 1
    assert (found["flag"] == flag).mean() >= 0.9
    assert far.mean() <= 0.1 if not reasons else far.mean() >= 0.9
    line = next((line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")), "")
    assert bool(line) == bool(reasons)
    main(["page", str(tmp_path / "b.parquet")])
    alerts = (tmp_path / "b.html").read_text(encoding="utf-8").partition("Galaxies predicted")[0]
    assert ("unlike those that the model was trained on" in alerts) == bool(reasons)
    if reasons:
        assert line.startswith(f"warning: {far.sum()} of 50 images are unlike those that the model was trained on: ")
        assert all(re.search(reason, line) for reason in reasons), line
    caplog.clear()
    library = galaxy_mae.predict(list(images), str(trained), use_cpu=True)
    assert library["far_from_training"].to_numpy() == pytest.approx(found["far_from_training"].to_numpy())
    assert [line.removeprefix("warning: ")] == [record.message for record in caplog.records] + [""] * (not reasons)


def test_without_training_images_there_is_no_distance_and_damaged_ones_are_one_line(tmp_path, trained, survey):
    shutil.copytree(trained, tmp_path / "model")
    file = tmp_path / "model" / TRAINING_IMAGES
    content = json.loads(file.read_text())
    changes = {"limit": [0, None, "x", float("nan"), 10**400], "mean": [[0], {}, [None] * 6]}
    changes |= {"covariance": [[[0] * 6] * 6, (-np.eye(6)).tolist()], "statistics": [["sky"]]}
    for key, value in [(key, value) for key, values in changes.items() for value in values] + [("", 0)]:
        file.write_text(json.dumps(content | {key: value} if key else [1]))
        with pytest.raises(UserError, match=TRAINING_IMAGES):
            galaxy_mae.predict(str(survey), str(tmp_path / "model"), use_cpu=True)
    file.unlink()
    table = galaxy_mae.predict(str(survey), str(tmp_path / "model"), use_cpu=True)
    assert "far_from_training" not in table
    assert not {"far", "empty"} & {*table["flag"]}


@pytest.mark.skipif(not REAL.is_file(), reason="the real galaxies are absent")
def test_the_small_model_knows_galaxies_of_its_survey():
    """Of the held-out galaxies hardly one is far; most are with another size, or another stretch."""
    for model in ("encoder", "classifier"):
        content = json.loads((ROOT / "pretrained/galaxy-zoo-small" / model / TRAINING_IMAGES).read_text())
        looks = TrainingImages.parse(content)
        encoded = pq.read_table(REAL, columns=["image"])["image"].slice(0, 300).to_pylist()
        images = [np.asarray(Image.open(io.BytesIO(image["bytes"])).convert("RGB")) for image in encoded]
        pixels = np.stack([looks.frame.apply(x, 64).pixels for x in images])
        assert np.mean(looks.distance(image_statistics(pixels)) > 1) <= 0.03
        small = np.full_like(pixels, 4)
        small[:, 24:40, 24:40] = area_average(pixels, 16)
        saturated = pixels.clip(max=63) * 4
        for changed, share in ((small, 0.95), (255 - pixels, 0.95), (pixels // 4, 0.95), (saturated, 0.9)):
            assert np.mean(looks.distance(image_statistics(changed)) > 1) >= share


def test_seeds_give_their_mean_and_their_disagreement(models, survey):
    """The mutual information of class and seed: entropy of the mean minus mean entropy (Houlsby et al. 2011)."""
    both = galaxy_mae.predict(str(survey), str(models / "method"), use_cpu=True).drop(5)
    single = [galaxy_mae.predict(str(survey), str(models / "method" / f"seed_{s}"), use_cpu=True) for s in range(3)]
    p = np.stack([table.drop(5)[P_COLUMNS].to_numpy(np.float64) for table in single])
    mean = p.mean(axis=0)
    assert both[P_COLUMNS].to_numpy() == pytest.approx(mean, abs=1e-6)
    total = -(mean * np.log(mean)).sum(axis=1)
    expected = total + (p * np.log(p)).sum(axis=2).mean(axis=0)
    assert both["entropy"].to_numpy() == pytest.approx(total, abs=1e-5)
    assert both["disagreement"].to_numpy() == pytest.approx(expected, abs=1e-5)
    assert both["disagreement"].max() > 0.1


def test_provenance_names_model_data_and_options(tmp_path, models, survey):
    run("--model", models / "method", "--dataset", survey, "--output", tmp_path / "a.csv", "--stretch", "sdss")
    about = json.loads((tmp_path / "a.csv.json").read_text())["about"]
    assert about["model"]["name"] == str(models / "method")
    assert about["model"]["seeds"] == [0, 1, 2]
    assert re.fullmatch("[0-9a-f]{64}", about["model"]["fingerprint"])
    assert re.fullmatch("[0-9a-f]{64}", about["dataset_fingerprint"])
    assert (about["dataset"], about["image_size"], about["stretch"]["preset"]) == (str(survey), 32, "sdss")
    assert about["class_names"] == list(CLASSES)
    assert about["versions"]["torch"] == torch.__version__
    assert {"commit", "created"} <= set(about)


def test_fingerprint_changes_with_any_weight_and_any_name(tmp_path, models):
    fingerprints = {predict.open_model(str(models / "method")).fingerprint}
    for change in ("weights", "names"):
        folder = tmp_path / change
        shutil.copytree(models / "method", folder)
        config = folder / "seed_2" / "config.json"
        if change == "weights":
            shutil.copy(folder / "seed_1" / "model.safetensors", folder / "seed_2")
        else:
            for path in folder.glob("seed_*/config.json"):
                path.write_text(config.read_text().replace("Round Smooth", "Smooth"))
        fingerprints.add(predict.open_model(str(folder)).fingerprint)
    assert len(fingerprints) == 3


def test_encoder_gives_embeddings_and_with_labels_a_linear_probe(tmp_path, models, survey, images):
    """In the first case they are those of the README."""
    table = galaxy_mae.predict(str(survey), str(models / "run"), use_cpu=True)
    known = ["row", "object_id", "ra", "dec", "label", "redshift", "image_width", "image_height", "frame_width"]
    assert list(table) == [*known, "flag", "problem", "embedding"]
    np.testing.assert_array_equal(table["redshift"], [np.nan, *(i / 100 for i in range(1, 40))])
    folder = models / "run" / "encoder"
    pixels = AutoImageProcessor.from_pretrained(folder)(list(images), return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        model = AutoModel.from_pretrained(folder, add_pooling_layer=False).eval()
        features = model(pixels).last_hidden_state[:, 1:].mean(dim=1).numpy()
    assert np.stack(table["embedding"].drop(5)) == pytest.approx(np.delete(features, 5, axis=0), abs=1e-4)
    label = np.arange(200) % 10
    brightness = (25 * label[:, None, None, None] + random_images(200) / 16).astype(np.uint8)
    labels = write_hdf5(tmp_path / "labels.h5", brightness, label)
    probed = galaxy_mae.predict(str(labels), str(folder), labels=str(labels), use_cpu=True)
    assert probed.filter(regex="^p_").sum(axis=1).to_numpy() == pytest.approx(1, abs=1e-6)
    assert (probed["predicted_class"] == probed["label"]).mean() > 0.9
    assert "embedding" not in probed


def test_features_over_orientations_are_the_same_for_a_turned_and_mirrored_image(tmp_path, models):
    """A linear probe is fitted to them, and a query is compared with them."""
    images = random_images(30)
    turned = np.ascontiguousarray(np.rot90(images, 1, axes=(1, 2))[:, ::-1])
    folder, label = models / "run" / "encoder", np.arange(200) % 10
    tables = [galaxy_mae.predict(x, str(folder), orientations=True, use_cpu=True) for x in (images, turned)]
    one, other = (np.stack(table["embedding"]) for table in tables)
    assert one.shape[1] == predict.open_model(str(folder), orientations=True).num_features > 2 * 48
    assert np.abs(one - other).max() < 1e-4
    assert np.abs(one[0] - other[1]).max() > 0.1
    brightness = (25 * label[:, None, None, None] + random_images(200) / 16).astype(np.uint8)
    data = write_hdf5(tmp_path / "data.h5", brightness, label)
    (tmp_path / "labels").mkdir()
    labels = shutil.copy(data, tmp_path / "labels")
    flags = ("--orientations", "--labels", labels, "--embeddings", "--use_cpu")
    run("--model", folder, "--dataset", data, "--output", tmp_path / "a.parquet", *flags)
    table = read_catalogue(tmp_path / "a.parquet").table
    assert np.mean(to_numpy(table["predicted_class"]) == to_numpy(table["label"])) > 0.9
    assert to_numpy(table["embedding"]).shape[1] == one.shape[1]
    Image.fromarray(np.rot90(brightness[3])).save(tmp_path / "query.png")
    shutil.rmtree(tmp_path / "labels")  # no probe is fitted for a query
    query = ("--query", str(tmp_path / "query.png"), "-k", "1", "--output", str(tmp_path / "similar.parquet"))
    main(["similar", str(tmp_path / "a.parquet"), *query, "--sheet", str(tmp_path / "similar.png")])
    assert read_catalogue(tmp_path / "similar.parquet").table["row"].to_pylist() == [3]


def test_principal_components_are_those_of_scikit_learn(tmp_path, models, survey):
    run("--model", models / "run", "--dataset", survey, "--output", tmp_path / "a.parquet", "--pca", 3)
    read = read_catalogue(tmp_path / "a.parquet")
    embedding, components = (to_numpy(read.table[name]) for name in ("embedding", "pca"))
    assert np.isnan(components[5]).all()
    model = PCA(3, svd_solver="full").fit(np.delete(embedding, 5, axis=0).astype(np.float64))
    expected = model.transform(np.delete(embedding, 5, axis=0))
    assert np.abs(np.delete(components, 5, axis=0)) == pytest.approx(np.abs(expected), abs=1e-4)
    assert read.about["pca_explained_variance"] == pytest.approx(model.explained_variance_ratio_, rel=1e-6)
    run("--model", models / "package", "--dataset", survey, "--output", tmp_path / "b.parquet", "--pca", 2)
    assert "embedding" not in read_catalogue(tmp_path / "b.parquet").table.column_names


def test_cutouts_are_stretched_as_the_flag_says(tmp_path, models):
    """In Python and by the command; the catalogue of FITS files has the fraction of NaN."""
    (tmp_path / "fits").mkdir()
    cubes = np.random.default_rng(0).random((12, 3, 4, 4), np.float32) ** 4
    cubes = cubes.repeat(8, axis=2).repeat(8, axis=3)
    for i, bands in enumerate(cubes):
        fits.PrimaryHDU(bands[:, ::-1]).writeto(tmp_path / "fits" / f"{i:02d}.fits")
    stretched = galaxy_mae.predict([*map(PRESETS["sdss"].rgb, cubes)], models / "method", use_cpu=True)
    found = galaxy_mae.predict(tmp_path / "fits", models / "method", stretch="sdss", use_cpu=True)
    assert len(np.unique(found[P_COLUMNS[0]])) == 12
    assert np.array_equal(found[P_COLUMNS], stretched[P_COLUMNS])
    assert (found["nan_fraction"] == 0).all()
    assert "nan_fraction" not in stretched
    output = tmp_path / "out.csv"
    run("--model", models / "method", "--dataset", tmp_path / "fits", "--output", output, "--stretch", "sdss")
    assert np.array_equal(pd.read_csv(output)[P_COLUMNS].to_numpy(np.float32), found[P_COLUMNS])


# ------------------------------------------------------------------------------------------------------------ in Python


def test_images_in_memory_give_the_rows_of_their_data_set(models, survey, images):
    expected = galaxy_mae.predict(str(survey), str(models / "method"), embeddings=True, use_cpu=True).drop(5)
    for given in (images, [Image.fromarray(image) for image in images]):
        table = galaxy_mae.predict(given, str(models / "method"), embeddings=True, use_cpu=True).drop(5)
        assert np.array_equal(table[P_COLUMNS], expected[P_COLUMNS])
        assert np.array_equal(np.stack(table["embedding"]), np.stack(expected["embedding"]))
        assert table["flag"].tolist() == expected["flag"].tolist()


def test_larger_images_are_averaged_over_areas(models, images, tmp_path):
    large = random_images(9, 48, seed=5)
    pq.write_table(pa.table({"image": [png(image) for image in large]}), tmp_path / "a.parquet")
    expected = galaxy_mae.predict(str(tmp_path / "a.parquet"), str(models / "package"), use_cpu=True)
    mixed = [*(Image.fromarray(image) for image in large), Image.fromarray(images[0])]
    table = galaxy_mae.predict(mixed, str(models / "package"), use_cpu=True)
    assert table[P_COLUMNS].to_numpy()[:9] == pytest.approx(expected[P_COLUMNS].to_numpy(), abs=1e-6)
    assert len(table) == 10


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "there is none"),
        (["a.png"], "images: a.png cannot be read"),
        (np.zeros((2, 32, 32, 3), np.float32), "it must be uint8"),
        (np.zeros((2, 32, 32), np.uint8), "it must be uint8 .H, W, 3."),
        ([Image.new("I;16", (32, 32))], "at most 8 bits"),
        (np.zeros((1, 5000, 5000, 3), np.uint8), "images: image 0 would be 5000 pixels wide, over 4096"),
    ],
)
def test_impossible_images_raise_user_error(models, given, message):
    with pytest.raises(UserError, match=message):
        galaxy_mae.predict(given, str(models / "package"), use_cpu=True)


# ------------------------------------------------------------------------------------------------------- interruptions


class Killed(BaseException):
    """Stands for the end of a process."""


def start(arguments: list[str]) -> multiprocessing.Process:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["galaxy_mae.catalogue.predict"])  # each process starts with torch imported
    process = context.Process(target=small_parts.run, args=(arguments,))
    process.start()
    return process


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a.parquet", "a.fits", "a.csv", "a.vot"])
def test_killed_three_times_it_writes_the_same_bytes(tmp_path, models, survey, name):
    """Killed while it computes, twice, and when the last part is there."""
    flags = ["--model", str(models / "method"), "--dataset", str(survey), "--embeddings", "--pca", "2", "--use_cpu"]
    for folder in ("reference", "killed"):
        (tmp_path / folder).mkdir()
    reference = start([*flags, "--output", str(tmp_path / "reference" / name)])
    output = tmp_path / "killed" / name
    parts = predict.partial_folder(output)
    for count in (2, 5, 10):
        process = start([*flags, "--output", str(output)])
        while len(list(parts.glob("part_*.parquet"))) < count and process.is_alive():
            time.sleep(0.001)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert not output.exists()
    last = start([*flags, "--output", str(output)])
    for process in (reference, last):
        process.join()
        assert process.exitcode == 0
    assert content(tmp_path / "killed") == content(tmp_path / "reference")


@pytest.fixture
def parts_of_four(monkeypatch):
    monkeypatch.setattr(predict, "ROWS_PER_PART", 4)


@pytest.fixture
def killed(tmp_path, models, survey, monkeypatch, parts_of_four) -> list[str]:
    """A command that was killed after three parts of ten."""
    flags = ["--model", models / "method", "--dataset", survey, "--output", tmp_path / "a.parquet"]
    compute, computed = predict.predict_part, []

    def predict_part(*args):
        if len(computed) == 3:
            raise Killed
        computed.append(1)
        return compute(*args)

    with monkeypatch.context() as patch:
        patch.setattr(predict, "predict_part", predict_part)
        with pytest.raises(Killed):
            run(*flags)
    return flags


def test_only_missing_parts_are_computed(tmp_path, models, survey, killed, monkeypatch, caplog):
    compute, starts = predict.predict_part, []
    monkeypatch.setattr(predict, "predict_part", lambda *args: starts.append(args[2].start) or compute(*args))
    caplog.set_level(logging.INFO, "galaxy_mae")
    (tmp_path / ".a.parquet.partial" / "part_000001.parquet").unlink()
    run(*killed)
    assert starts == [4, *range(12, 40, 4)]
    assert "resuming: 32 of 40 galaxies are left" in caplog.messages
    assert [path.name for path in tmp_path.iterdir()] == ["a.parquet"]
    assert pq.read_metadata(tmp_path / "a.parquet").num_row_groups == 10
    table = pd.read_parquet(tmp_path / "a.parquet")
    monkeypatch.setattr(predict, "ROWS_PER_PART", 4096)
    expected = galaxy_mae.predict(survey, models / "method", use_cpu=True)  # in one part
    pd.testing.assert_frame_equal(table, expected, rtol=1e-5, atol=1e-6)


def test_parts_of_another_command_are_refused_or_with_overwrite_discarded(tmp_path, killed, caplog):
    other = [*killed, "--embeddings"]
    with pytest.raises(UserError, match=r"parts of another catalogue \(embeddings is False there and True here\)"):
        run(*other)
    assert len(list(tmp_path.glob(".a.parquet.partial/part_*"))) == 3
    caplog.set_level(logging.INFO, "galaxy_mae")
    run(*other, "--overwrite")
    assert any("discarded" in message for message in caplog.messages)
    assert "embedding" in read_catalogue(tmp_path / "a.parquet").table.column_names
    assert [path.name for path in tmp_path.iterdir()] == ["a.parquet"]


def test_a_process_killed_before_it_could_delete_the_parts_leaves_a_finished_output(
    tmp_path, killed, models, survey, monkeypatch
):
    def discard(self):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(predict.PartialCatalogue, "discard", discard)
        with pytest.raises(Killed):
            run(*killed)
    before = (tmp_path / "a.parquet").read_bytes()
    run(*killed)
    assert (tmp_path / "a.parquet").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["a.parquet"]


def test_an_output_that_is_not_of_the_parts_is_kept(tmp_path, killed):
    write_catalogue(tmp_path / "a.parquet", [catalogue_table(3)], ABOUT)
    for content in ((tmp_path / "a.parquet").read_bytes(), b"not a catalogue"):
        (tmp_path / "a.parquet").write_bytes(content)
        with pytest.raises(UserError, match="it exists"):
            run(*killed)
        assert (tmp_path / "a.parquet").read_bytes() == content


def test_a_folder_without_parts_is_nobodys(tmp_path, killed):
    """A process was killed before its first part, and another command follows."""
    for part in tmp_path.glob(".a.parquet.partial/part_*"):
        part.unlink()
    run(*killed, "--embeddings")
    assert "embedding" in read_catalogue(tmp_path / "a.parquet").table.column_names


def test_damaged_parts_are_named(tmp_path, killed):
    part = tmp_path / ".a.parquet.partial" / "part_000001.parquet"
    part.write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"part_000001\.parquet: damaged .*delete it and repeat the command"):
        run(*killed)
    part.unlink()
    run(*killed)
    assert read_catalogue(tmp_path / "a.parquet").table.num_rows == 40


def test_a_second_process_on_one_output_is_refused(tmp_path, killed):
    with (
        claim(tmp_path / ".a.parquet.partial" / "lock"),
        pytest.raises(UserError, match="another process is writing to this folder"),
    ):
        run(*killed, "--overwrite")
    assert len(list(tmp_path.glob(".a.parquet.partial/part_*"))) == 3


def test_full_disk_leaves_no_output_and_can_be_resumed(small_disk, tmp_path, models, survey, parts_of_four):
    flags = ["--model", models / "method", "--dataset", survey, "--embeddings"]
    free = shutil.disk_usage(small_disk).free
    with (small_disk / "other").open("wb") as file:
        file.write(bytes(free - 100_000))
    with pytest.raises(UserError, match=r"the disk or quota is full.*: free some space; the same command resumes"):
        run(*flags, "--output", small_disk / "a.parquet")
    assert not (small_disk / "a.parquet").exists()
    assert list(small_disk.glob(".a.parquet.partial/part_*"))
    (small_disk / "other").unlink()
    run(*flags, "--output", small_disk / "a.parquet")
    run(*flags, "--output", tmp_path / "a.parquet")
    pd.testing.assert_frame_equal(*(pd.read_parquet(folder / "a.parquet") for folder in (small_disk, tmp_path)))
    assert [path.name for path in small_disk.iterdir()] == ["a.parquet"]


# -------------------------------------------------------------------------------------------------------- what is wrong


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"--model": "nothing/here/at/all"}, "--model nothing/here/at/all: no such folder"),
        ({"--dataset": "nothing.parquet"}, "--dataset nothing.parquet: no such file"),
        ({"--fit": "center:2"}, "--fit center:2: it must be crop, pad,"),
        ({"--arcsec": "0"}, "--arcsec 0: it must be above 0"),
        ({"--output": "{tmp}/a.txt"}, r"--output .*a\.txt: its suffix names no format; use one of \.parquet"),
        ({"--output": "{tmp}/a.fits.gz"}, "its suffix names no format"),
        ({"--output": "{tmp}/none/a.fits"}, "there is no folder .*none"),
        ({"--output": "{tmp}/folder.csv"}, "a folder is in the way"),
        ({"--output": "{tmp}/old.csv"}, r"--output .*old\.csv: it exists; .*--overwrite"),
        ({"--output": "{tmp}/small.parquet/a.csv"}, "there is no folder"),
        ({"--output": "{tmp}/big.parquet", "--overwrite": True}, "it would replace the input of this command"),
        ({"--output": "{tmp}/o.csv", "--overwrite": True}, r"o\.csv: o\.csv\.json beside it would be replaced"),
        ({"--pca": "0"}, "--pca 0: it must be at least 1"),
        (
            {"--pca": "40"},
            "--pca 40: it must be at least 1 and at most the number of features, 48, and of readable galaxies, 39",
        ),
        ({"--labels": "synthetic"}, "--labels: --model .* is a classifier"),
        ({"--orientations": True}, "--orientations: --model .* is a classifier; this is for an encoder"),
        ({"--model": "{models}/run", "--labels": "nothing.h5"}, "--labels nothing.h5: no such file"),
        ({"--stretch": "lsst"}, "--stretch lsst: none of auto, legacy"),
    ],
)
def test_mistakes_end_in_one_line(tmp_path, models, survey, capsys, monkeypatch, flags, message):
    """With exit status 2, and with the files that were there before."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.csv").mkdir()
    for name in ("old.csv", "o.csv.json"):
        (tmp_path / name).write_text("old")
    shutil.copy(survey, tmp_path / "big.parquet")
    pq.write_table(pa.table({"image": [png(image) for image in random_images(30, 16)]}), tmp_path / "small.parquet")
    before = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
    survey = tmp_path / "big.parquet" if flags.get("--overwrite") else survey
    given = {"--model": models / "package", "--dataset": survey, "--output": tmp_path / "a.parquet"} | flags
    arguments = [
        part.replace("{tmp}", str(tmp_path)).replace("{models}", str(models))
        for flag, value in given.items()
        if value is not None
        for part in ((flag,) if value is True else (flag, str(value)))
    ]
    with pytest.raises(SystemExit) as exit, one_line_errors("galaxy_mae.catalogue"):
        run(*arguments)
    line = capsys.readouterr().err.splitlines()[-1]
    assert exit.value.code == 2
    assert re.search(f"^galaxy_mae.catalogue: error: .*{message}", line)
    assert {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")} == before


@pytest.mark.parametrize("kind", ["package", "run"])
def test_outputs_that_are_not_finite_end_in_one_line(tmp_path, models, survey, kind):
    """Of finite weights: otherwise every galaxy would be of the first class. The tensor scales what comes last."""
    shutil.copytree(models / kind, tmp_path / "model")
    (weights,) = (tmp_path / "model").rglob("model.safetensors")
    tensors = load_file(weights)
    name = next(x for x in tensors if x.endswith("classifier.weight" if kind == "package" else "layernorm.weight"))
    tensors[name] = tensors[name].sign() * 3e38
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"{weights.parent}: its outputs are not finite"):
        run("--model", tmp_path / "model", "--dataset", survey, "--output", tmp_path / "a.parquet")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_unfinished_and_unequal_seeds_are_refused(tmp_path, models):
    shutil.copytree(models / "method", tmp_path / "method")
    (tmp_path / "method" / "seed_2" / FINISHED).unlink()
    with pytest.raises(UserError, match="seed_2 is not finished"):
        predict.open_model(str(tmp_path / "method"))
    (tmp_path / "method" / "seed_2" / FINISHED).write_text("{}")
    for file, name, value, message in (
        ("config.json", "id2label", {str(i): name for i, name in enumerate(CLASSES[::-1])}, "classes"),
        ("preprocessor_config.json", "image_mean", [0.1, 0.2, 0.4], "normalization"),
    ):
        path = tmp_path / "method" / "seed_2" / file
        before = path.read_text()
        path.write_text(json.dumps(json.loads(before) | {name: value}))
        with pytest.raises(UserError, match=f"seed_2 has .*{message}.* than seed_0"):
            predict.open_model(str(tmp_path / "method"))
        path.write_text(before)

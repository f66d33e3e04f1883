"""Tables of paths open with the pixels of the files that they name, and nothing else is read."""

import gzip
import os
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from astropy.io import fits
from astropy.table import Table
from conftest import random_images
from PIL import Image
from test_fits import cubes, write_cutouts

from galaxy_mae.data.cache import open_galaxies
from galaxy_mae.data.fits import Stretch
from galaxy_mae.errors import UserError

IDS = ["001234567890123456789", "1237648720693755918", "NGC 1", "IC '2'"]


@pytest.fixture
def survey(tmp_path) -> Path:
    """A folder with four images: two in a subfolder, one in the folder, and one named by an absolute path."""
    for name, image in zip(("a/0.png", "a/1.png", "2.png", "elsewhere/3.png"), random_images(4), strict=True):
        path = tmp_path / "survey" / name if "elsewhere" not in name else tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return tmp_path / "survey"


def paths(survey: Path) -> list[str]:
    return ["a/0.png", "a/1.png", "./2.png", str(survey.parent / "elsewhere/3.png")]


def columns(survey: Path) -> dict[str, list]:
    return {
        "Name": ["x"] * 4,
        "file_loc": paths(survey),
        "LABEL": ["spiral", "round", "round", "spiral"],
        "RA": [10.0, 20.0, 30.0, 40.0],
        "dec": [-1.0, 0.0, 1.0, np.nan],
        "pxscale": [0.262] * 4,
        "iauname": IDS,
    }


@pytest.mark.parametrize("name", ["galaxies.csv", "galaxies.fits"])
def test_table_of_paths(survey, name):
    Table(columns(survey)).write(survey / name)
    galaxies = open_galaxies(str(survey / name))
    assert np.array_equal(galaxies.pixels, random_images(4))
    assert galaxies.class_names == ("round", "spiral")
    assert galaxies.label.tolist() == [1, 0, 0, 1]
    assert galaxies.ra.tolist() == [10, 20, 30, 40]
    assert np.array_equal(galaxies.dec, [-1, 0, 1, np.nan], equal_nan=True)
    assert galaxies.pixel_scale.tolist() == [0.262] * 4
    assert galaxies.object_id.tolist() == IDS


@pytest.mark.parametrize("name", ["galaxies.csv", "galaxies.fits"])
def test_table_of_paths_alone_and_with_whole_numbers(survey, name):
    Table({"path": paths(survey)}).write(survey / name)
    galaxies = open_galaxies(str(survey / name))
    assert galaxies.object_id.tolist() == paths(survey)
    assert galaxies.label is galaxies.ra is None
    numbers = {"path": paths(survey), "id": [2**62 + 1, 2, 3, 4], "label": [3, 0, 1, 2]}
    Table(numbers).write(survey / name, overwrite=True)
    galaxies = open_galaxies(str(survey / name))
    assert galaxies.object_id.tolist() == ["4611686018427387905", "2", "3", "4"]
    assert galaxies.label.tolist() == [3, 0, 1, 2]


def test_leading_zeros_of_csv_are_kept(survey):
    (survey / "galaxies.csv").write_text("path,id\na/0.png,007\n2.png,1e3\n")
    assert open_galaxies(str(survey / "galaxies.csv")).object_id.tolist() == ["007", "1e3"]


def test_spaces_around_names_and_values_of_csv_are_left_out(survey):
    rows = "a/0.png, spiral, 1.5 ,, 007\n a/1.png,\tround,2,-1,b \n2.png , spiral, nan,0,c\n"
    (survey / "galaxies.csv").write_text(f"path, label,\tRA , dec, id\n{rows}")
    galaxies = open_galaxies(str(survey / "galaxies.csv"))
    assert np.array_equal(galaxies.pixels, random_images(4)[:3])
    assert galaxies.label.tolist() == [1, 0, 1]
    assert galaxies.class_names == ("round", "spiral")
    assert np.array_equal(galaxies.ra, [1.5, 2, np.nan], equal_nan=True)
    assert np.array_equal(galaxies.dec, [np.nan, -1, 0], equal_nan=True)
    assert galaxies.object_id.tolist() == ["007", "b", "c"]


def test_fits_names_that_are_no_text_are_escaped(survey):
    Table({"path": paths(survey), "id": ["NGCx", "b", "c", "d"]}).write(survey / "galaxies.fits")
    content = (survey / "galaxies.fits").read_bytes()
    (survey / "galaxies.fits").write_bytes(content.replace(b"NGCx", b"NGC\xe9"))
    assert open_galaxies(str(survey / "galaxies.fits")).object_id.tolist() == ["NGC\\xe9", "b", "c", "d"]


def test_fits_integers_without_a_value_are_missing(survey, caplog):
    label = np.ma.array([0, 1, 0, 1], mask=[False, True, False, False])
    Table({"path": paths(survey), "label": label}).write(survey / "galaxies.fits")
    assert open_galaxies(str(survey / "galaxies.fits")).label is None
    assert "partly missing" in caplog.text


def test_fingerprint_covers_table_images_and_stretch(tmp_path):
    folder = write_cutouts(tmp_path / "cutouts", cubes(2))
    table = tmp_path / "galaxies.csv"
    fingerprints = set()

    def add(stretch: Stretch = Stretch()) -> None:  # noqa: B008 (frozen)
        galaxies = open_galaxies(str(table), stretch=stretch, skip_unreadable=True)
        assert galaxies.fingerprint not in fingerprints
        fingerprints.add(galaxies.fingerprint)

    table.write_text("path\ncutouts/000.fits\ncutouts/001.fits\n")
    add()
    add(Stretch("sdss"))
    table.write_text("path\ncutouts/001.fits\ncutouts/000.fits\n")
    add()
    (folder / "000.fits").rename(folder / "2.fits")
    add()  # one is missing
    (folder / "001.fits").rename(folder / "000.fits")
    (folder / "2.fits").rename(folder / "001.fits")
    add()  # the two are exchanged
    (tmp_path / "moved").mkdir()
    for path in (folder, table):
        path.rename(tmp_path / "moved" / path.name)
    assert open_galaxies(str(tmp_path / "moved" / table.name)).fingerprint in fingerprints
    other = open_galaxies(str(tmp_path / "moved"))  # as a folder of images, in which the table is one of the files
    assert other.fingerprint not in fingerprints


def test_missing_and_empty_paths_are_problems(survey, caplog):
    (survey / "empty.png").touch()
    os.mkfifo(survey / "pipe.png")
    rows = ["a/0.png", "missing.png", "a", "", "empty.png", "pipe.png", "/dev/zero", "x" * 300, "2.png"]
    (survey / "galaxies.csv").write_text("path,n\n" + "".join(f"{row},1\n" for row in rows))
    with pytest.raises(UserError, match=r"the image 'missing.png' of row 1 cannot be opened"):
        open_galaxies(str(survey / "galaxies.csv"))
    galaxies = open_galaxies(str(survey / "galaxies.csv"), skip_unreadable=True)
    assert np.array_equal(galaxies.pixels[[0, -1]], random_images(4)[[0, 2]])
    assert (galaxies.problem != "").tolist() == [False, *[True] * 7, False]
    assert "is empty" in galaxies.problem[4]  # so are the files of /proc, some of which never end
    assert "7 of 9 images are unreadable" in caplog.text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot be read as a table (Empty CSV file)"),
        ("path\n", "it is empty"),
        ("picture\na/0.png\n", "no column of image paths (it has: picture)"),
        ("path,label\na/0.png\n", "Expected 2 columns, got 1"),
        ("path,ra,dec\na/0.png,1h2m,0\n", "column `ra` must contain numbers"),
        ("path,RA,Dec\na/0.png,1,-91\n", "row 0 has `Dec` -91"),
        ("path\nhttp://127.0.0.1:9/a.png\n", "row 0 cannot be opened"),
        ("path\na/0.png\nhf://datasets/a/b.png\n", "row 1 cannot be opened"),
        ("path\n\xff\n", "utf-8"),
        ('path\n"a/0.png\n', "of row 0 cannot be opened"),
        ("path\na\0b.png\n", "null byte"),
        ("path\ngalaxies.csv\n", "cannot be decoded (unknown format)"),
    ],
)
def test_bad_csv_is_refused_in_one_line(survey, text, message):
    (survey / "galaxies.csv").write_bytes(text.encode("latin1"))
    with pytest.raises(UserError) as refusal:
        open_galaxies(str(survey / "galaxies.csv"))
    assert message in " ".join(str(refusal.value).split())
    assert "galaxies.csv" in str(refusal.value)


SEPARATED = "path{0}label{0} RAJ2000{0}DEJ2000{0}id{0}z\n"
SEPARATED += "a/0.png{0}spiral{0}1.5{0}-2{0}007{0}0.1\n2.png{0}é{0}2{0}3{0}b{0}\n"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", SEPARATED.format(",").encode()),
        ("a.csv", SEPARATED.format(";").replace("1.5", "1,5").encode("utf-8-sig")),
        ("a.csv", b"# VizieR\n#\n" + SEPARATED.format("|").encode()),
        ("a.tsv", SEPARATED.format("\t").encode("utf-16")),
        ("a.csv.gz", gzip.compress(SEPARATED.format(",").encode(), mtime=0)),
    ],
)
def test_separators_and_encodings_are_found_out(survey, caplog, name, content):
    (survey / name).write_bytes(content)
    galaxies = open_galaxies(str(survey / name))
    assert np.array_equal(galaxies.pixels, random_images(4)[[0, 2]])
    assert galaxies.class_names == ("spiral", "é")
    assert galaxies.ra.tolist() == [1.5, 2]
    assert galaxies.dec.tolist() == [-2, 3]
    assert galaxies.object_id.tolist() == ["007", "b"]
    assert galaxies.extra["z"].to_pylist() == [0.1, None]
    assert "columns used: `label` as label, `RAJ2000` as ra, `DEJ2000` as dec, `id` as object_id" in caplog.text
    assert "passed through: z" in caplog.text


@pytest.mark.parametrize("name", ["a.ecsv", "a.vot", "a.xml", "a.parquet"])
def test_tables_of_other_formats(survey, name):
    columns = {"image": paths(survey), "type": ["E", "S", "S", "E"], "_RA": [1.0, 2, 3, 4], "_DE": [5.0, 6, 7, 8]}
    columns |= {"id": IDS, "z": np.ma.array([1, 2, 3, 4], mask=[False, True, False, False])}
    if name.endswith("parquet"):
        pq.write_table(pa.table(columns | {"z": [1, None, 3, 4]}), survey / name)
    else:
        Table(columns).write(survey / name, format="ascii.ecsv" if name.endswith("ecsv") else "votable")
    galaxies = open_galaxies(str(survey / name))
    assert np.array_equal(galaxies.pixels, random_images(4))
    assert galaxies.class_names == ("E", "S")
    assert galaxies.ra.tolist() == [1, 2, 3, 4]
    assert galaxies.object_id.tolist() == IDS
    assert galaxies.extra["z"].to_pylist() == [1, None, 3, 4]
    Image.new("RGB", (32, 32), (1, 2, 3)).save(survey / "2.png")
    assert open_galaxies(str(survey / name)).fingerprint != galaxies.fingerprint


@pytest.mark.parametrize("name", ["a.fits", "a.vot", "a.ecsv"])
def test_units_of_other_columns_are_kept(survey, name):
    table = Table({"path": paths(survey), "mass": [1.0, 2, 3, 4], "z": [0.1] * 4}, units={"mass": "solMass"})
    table.write(survey / name, format={".vot": "votable", ".ecsv": "ascii.ecsv"}.get(name[1:]))
    galaxies = open_galaxies(str(survey / name))
    assert galaxies.extra.schema.field("mass").metadata == {b"unit": b"solMass"}
    assert galaxies.extra.schema.field("z").metadata is None


def test_votable_that_points_elsewhere_is_refused(survey):
    table = Table({"path": paths(survey)})
    table.write(survey / "a.vot", format="votable", tabledata_format="binary2")
    content = (survey / "a.vot").read_text()
    assert "<STREAM " in content
    (survey / "a.vot").write_text(re.sub("<STREAM [^>]*>", '<STREAM href="file:///etc/passwd">', content))
    with pytest.raises(UserError, match=r"its values are elsewhere \(file:///etc"):
        open_galaxies(str(survey / "a.vot"))


def test_what_is_no_label_or_position_under_a_guessed_name_passes_through(survey, caplog):
    rows = "a/0.png,00 02 03.4,1,-5\n2.png,00 02 03.5,2,3\n"
    (survey / "a.csv").write_text(f"path,RAJ2000,DEJ2000,type\n{rows}")
    galaxies = open_galaxies(str(survey / "a.csv"))
    assert galaxies.label is galaxies.ra is None
    assert galaxies.extra.column_names == ["RAJ2000", "type"]
    assert "`RAJ2000` is not used as ra" in caplog.text
    assert "`type` is not used as label: row 0 has label -5" in caplog.text


def test_bad_fits_tables_are_refused_in_one_line(survey):
    table = survey / "galaxies.fits"

    def refusal(skip_unreadable: bool = False) -> str:
        with pytest.raises(UserError) as refused:
            open_galaxies(str(table), skip_unreadable=skip_unreadable)
        assert "galaxies.fits" in str(refused.value)
        return str(refused.value)

    fits.PrimaryHDU().writeto(table)
    assert "it has neither an image nor a table" in refusal()
    table.write_bytes(b"junk")
    assert "not a FITS file" in refusal()
    Table({"a": [1, 2]}).write(table, overwrite=True)
    assert "no column of image paths (it has: a)" in refusal()
    Table({"path": [["a.png", "b.png"]] * 2}).write(table, overwrite=True)
    assert "no column of image paths" in refusal()
    Table({"path": [1, 2]}).write(table, overwrite=True)
    assert "no column of image paths (it has: path)" in refusal()
    Table({"path": ["http://127.0.0.1:9/a.png"]}).write(table, overwrite=True)
    assert "cannot be opened ('http" in refusal(skip_unreadable=True)
    Table({"path": ["a/0.png"] * 1000}).write(table, overwrite=True)
    whole = table.read_bytes()
    table.write_bytes(whole[:-2880])
    assert "truncated" in refusal()
    table.write_bytes(whole.replace(b"NAXIS2  =                 1000", b"NAXIS2  =         100000000000"))
    assert "truncated" in refusal()

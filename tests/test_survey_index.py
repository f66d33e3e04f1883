"""An index of a survey's embeddings finds the galaxies that an exact search finds, partition by partition."""

import itertools
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_survey import write_hats

from galaxy_mae.catalogue.__main__ import main
from galaxy_mae.data.hats import open_hats
from galaxy_mae.errors import UserError
from galaxy_mae.predictions.formats import read_catalogue
from galaxy_mae.predictions.neighbors import neighbors
from galaxy_mae.predictions.schema import to_numpy

pytest.importorskip("faiss")
COUNT, DIMENSIONS = 3000, 8


@pytest.fixture(scope="module")
def table() -> pa.Table:
    """Drawn embeddings whose dimensions differ in mean and std; every hundredth is unreadable, the next one blank."""
    rng = np.random.default_rng(0)
    embedding = rng.normal(size=(COUNT, DIMENSIONS)) @ rng.normal(size=(DIMENSIONS, DIMENSIONS)) + 5
    embedding *= np.geomspace(1, 100, DIMENSIONS)
    flag = np.full(COUNT, "", object)
    flag[::100], flag[1::100] = "unreadable", "blank"
    embedding[::100] = np.nan
    values = pa.FixedSizeListArray.from_arrays(pa.array(embedding.astype(np.float32).ravel()), DIMENSIONS)
    columns = {"hp": np.arange(COUNT), "object_id": [f"J{i}" for i in range(COUNT)], "ra": np.linspace(0, 9, COUNT)}
    return pa.table(columns | {"dec": np.zeros(COUNT), "embedding": values, "flag": flag.tolist()})


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory, table):
    """In five partitions; the third one is empty."""
    cuts = (0, 7, 1500, 1500, 2900, COUNT)
    parts = [table.slice(start, stop - start) for start, stop in itertools.pairwise(cuts)]
    return write_hats(tmp_path_factory.mktemp("index") / "survey", parts)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, catalogue):
    folder = tmp_path_factory.mktemp("index") / "of_survey"
    main(["index", "--catalog", str(catalogue), "--output", str(folder)])
    return folder


def test_nearest_are_those_of_an_exact_search(table, catalogue, folder):
    from galaxy_mae.survey.index import open_index  # not without faiss

    index = open_index(folder, open_hats(str(catalogue)))
    assert index.index.ntotal == COUNT - 60
    embedding = to_numpy(table["embedding"])
    usable = np.flatnonzero(np.arange(COUNT) % 100 > 1)
    queries = usable[::60]
    rows, expected = neighbors(embedding[usable], embedding[queries], 10)
    found = [index.nearest(embedding[query], 10) for query in queries]
    hits = [np.isin(near["hp"].to_numpy(), usable[row]).mean() for (near, _), row in zip(found, rows, strict=True)]
    assert np.mean(hits) > 0.9
    assert all(near["hp"][0].as_py() == query for (near, _), query in zip(found, queries, strict=True))
    exact = [similarity for (_, similarity), hit in zip(found, hits, strict=True) if hit == 1]
    np.testing.assert_allclose(exact, expected[np.array(hits) == 1], atol=1e-5)


def test_commands_write_a_ranking(tmp_path, capsys, catalogue, folder):
    output = tmp_path / "near.parquet"
    flags = ("--index", str(folder), "--catalog", str(catalogue))
    main(["nearest", *flags, "--query", "J1777", "-k", "5", "--output", str(output)])
    found = pq.read_table(output)
    assert found["object_id"][0].as_py() == "J1777"
    assert found["similarity"][0].as_py() == pytest.approx(1, abs=1e-6)
    assert found["similarity"].to_pylist() == sorted(found["similarity"].to_pylist(), reverse=True)
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in printed[1:]] == found["object_id"].to_pylist()


@pytest.mark.parametrize("suffix", [".fits", ".vot", ".csv"])
def test_a_ranking_has_the_columns_that_the_survey_kept(tmp_path, table, suffix):
    """Of types that the format does not have, with missing values."""
    count, small = len(table), pa.array(np.arange(len(table)) % 100, pa.int16())
    names = pa.array([f"J{i}" if i % 2 else None for i in range(count)], pa.large_string())
    columns = {
        "object_id": pa.array(np.arange(count), pa.uint64()),
        "tile": small,
        "name": names,
        "star": small.cast("bool"),
    }
    kept = table.drop_columns("object_id")
    for name, values in columns.items():
        kept = kept.append_column(name, values)
    catalogue, folder, output = tmp_path / "kept", str(tmp_path / "index"), tmp_path / f"near{suffix}"
    source = ("--catalog", str(write_hats(catalogue, [kept])))
    main(["index", *source, "--output", folder])
    main(["nearest", *source, "--index", folder, "--query", "1777", "-k", "3", "--output", str(output)])
    found = read_catalogue(output).table.to_pylist()[0]
    assert (found["object_id"], found["tile"], found["name"], found["star"]) == ("1777", 77, "J1777", 1)


def test_errors_are_one_line_that_names_the_fix(tmp_path, table, catalogue, folder, monkeypatch):
    plain = write_hats(tmp_path / "plain", [table.drop_columns("embedding")])
    small = write_hats(tmp_path / "small", [table.slice(0, 260)])
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for file in folder.iterdir():
        (damaged / file.name).write_bytes(file.read_bytes()[: 2000 if file.suffix == ".faiss" else None])
    new = ("--output", str(tmp_path / "new"))
    for arguments, message in (
        (("index", "--catalog", plain, *new), "no column embedding"),
        (("index", "--catalog", small, *new), "an index needs 256 galaxies .* use catalogue similar"),
        (("index", "--catalog", catalogue, "--output", folder), "it exists; choose another name"),
        (("index", "--catalog", catalogue, "--overwrite", "--output", tmp_path), "a folder is in the way"),
        (
            ("nearest", "--index", tmp_path, "--catalog", catalogue, "--query", "J2"),
            "no index is there; build it again",
        ),
        (("nearest", "--index", damaged, "--catalog", catalogue, "--query", "J2"), "cannot be read .* build it again"),
        (("nearest", "--index", folder, "--catalog", small, "--query", "J2"), "it is not of --catalog"),
        (("nearest", "--index", folder, "--catalog", catalogue, "--query", "J"), "no galaxies of .* have this name"),
        (("nearest", "--index", folder, "--catalog", catalogue, "--query", "J100"), "its image is unreadable"),
    ):
        with pytest.raises(UserError, match=message) as error:
            main([str(argument) for argument in arguments])
        assert "\n" not in str(error.value)
    assert not (tmp_path / "new").exists()
    monkeypatch.setitem(sys.modules, "faiss", None)
    monkeypatch.delitem(sys.modules, "galaxy_mae.survey.index")
    with pytest.raises(UserError, match=r"faiss is not installed: pip install"):
        main(["index", "--catalog", str(catalogue), *new])

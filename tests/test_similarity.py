"""Similar and odd galaxies: exact neighbors, planted duplicates and outliers, tables and contact sheets."""

import io
import os
from argparse import Namespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from test_mae import small_config

from galaxy_mae.catalogue.__main__ import main
from galaxy_mae.catalogue.similarity import _find_query
from galaxy_mae.data.download import cache_folder
from galaxy_mae.errors import UserError, one_line_errors
from galaxy_mae.model.mae import build_mae, save_encoder
from galaxy_mae.predictions.formats import read_catalogue, write_catalogue
from galaxy_mae.predictions.neighbors import anomaly_scores, isolation_forest, knn_distance, neighbors, whiten
from galaxy_mae.predictions.schema import Predictions, to_numpy, vector_column

# -------------------------------------------------------------------------------------------------------------- ranking


def correlated(rows: int, dimensions: int = 12, seed: int = 0) -> np.ndarray:
    """(rows, dimensions) float32 with means and variances that differ by orders of magnitude."""
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(rows, dimensions)) @ rng.normal(size=(dimensions, dimensions))
    return (values * np.geomspace(1e-3, 10, dimensions) + np.linspace(-50, 50, dimensions)).astype(np.float32)


def brute_force(embedding: np.ndarray, query: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The definition: cosines of standardized vectors, in float64."""
    x, q = embedding.astype(np.float64), query.astype(np.float64)
    x, q = (x - x.mean(axis=0)) / x.std(axis=0), (q - x.mean(axis=0)) / x.std(axis=0)
    cosine = (q @ x.T) / np.linalg.norm(q, axis=1)[:, None] / np.linalg.norm(x, axis=1)
    row = np.argsort(-cosine, axis=1, kind="stable")[:, :k]
    return row, np.take_along_axis(cosine, row, axis=1)


def test_neighbors_are_those_of_brute_force_in_float64():
    """In all chunks of a large catalogue: a twin in another chunk comes first, too."""
    embedding = correlated(40_000)
    embedding[[7, 20_000, 39_999]] = embedding[3]
    query = np.concatenate([embedding[[3]], correlated(4, seed=1)])
    row, similarity = neighbors(embedding, query, 25)
    expected_row, expected_similarity = brute_force(embedding, query, 25)
    np.testing.assert_array_equal(row, expected_row)
    np.testing.assert_allclose(similarity, expected_similarity, atol=1e-9)
    assert row[0, :4].tolist() == [3, 7, 20_000, 39_999]


def test_neighbors_do_not_depend_on_shift_scale_or_constants_of_dimensions():
    rng = np.random.default_rng(0)
    embedding, query = (rng.normal(size=(rows, 12)).astype(np.float32) for rows in (2000, 5))
    row, similarity = neighbors(embedding, query, 10)
    scale = np.geomspace(1e-3, 1e3, 12)
    changed = [(x * scale + scale * np.linspace(-3, 3, 12)).astype(np.float32) for x in (embedding, query)]
    rounded = np.float32(0.1) + rng.integers(0, 2, 2000) * np.spacing(np.float32(0.1))  # constant, as far as it can be
    changed = [np.insert(changed[0], 4, rounded, axis=1), np.insert(changed[1], 4, 1e6, axis=1)]
    other_row, other_similarity = neighbors(*changed, 10)
    np.testing.assert_array_equal(other_row, row)
    np.testing.assert_allclose(other_similarity, similarity, atol=1e-5)


def test_k_may_exceed_the_rows():
    row, _ = neighbors(correlated(5), correlated(2, seed=1), 9)
    assert np.sort(row, axis=1).tolist() == [[0, 1, 2, 3, 4]] * 2


def test_knn_distance_is_the_mean_distance_to_the_five_nearest_others():
    vectors = correlated(300)
    vectors[10] = vectors[20]  # a twin counts as a neighbor, the row itself does not
    distance = np.linalg.norm(vectors[:, None].astype(np.float64) - vectors, axis=2)
    np.fill_diagonal(distance, np.inf)
    np.testing.assert_allclose(knn_distance(vectors), np.sort(distance, axis=1)[:, :5].mean(axis=1), rtol=1e-4)
    assert knn_distance(vectors[:3]).shape == (3,)


def test_both_scores_rank_planted_outliers_first_whatever_the_scale():
    """They lie off the plane of the others, in a direction of tiny variance."""
    rng = np.random.default_rng(0)
    plane = rng.normal(size=(3000, 2)) @ rng.normal(size=(2, 6)) * 100 + rng.normal(size=(3000, 6))
    outlier = rng.choice(3000, 5, replace=False)
    plane[outlier] += 20 * rng.normal(size=(5, 6))
    for scores in (anomaly_scores(plane.astype(np.float32)), anomaly_scores((plane * 1e-3 + 7).astype(np.float32))):
        for name in ("knn_distance", "isolation_forest"):
            assert set(np.argsort(-scores[name])[:5]) == set(outlier), name


def test_isolation_forest_is_reproducible():
    vectors = correlated(500)
    np.testing.assert_array_equal(isolation_forest(vectors), isolation_forest(vectors))


def test_whitening_leaves_out_rounding_errors_and_what_few_rows_do_not_determine():
    """The features behind a LayerNorm have a constant sum: one direction without any variance."""
    embedding = np.random.default_rng(0).normal(size=(2000, 8))
    embedding -= embedding.mean(axis=1, keepdims=True)
    whitened = whiten((embedding + 3).astype(np.float32))
    assert whitened.shape == (2000, 7)
    np.testing.assert_allclose(np.cov(whitened.T), np.eye(7), atol=1e-3)
    assert whiten(correlated(30)).shape == (30, 3)
    assert whiten(correlated(2)).shape == (2, 1)
    with pytest.raises(UserError, match="all embeddings are equal"):
        whiten(np.full((9, 3), 0.1, np.float32))


# ------------------------------------------------------------------------------------------------------------- commands

NUM_GALAXIES = 26
BLANK, UNREADABLE, TWINS = 4, 9, (3, 17)
COLORS = [(9 * i + 5, 250 - 7 * i, (90 * i) % 251) for i in range(NUM_GALAXIES)]
COLORS[BLANK] = (50, 50, 50)
COLORS[TWINS[1]] = COLORS[TWINS[0]]
NAMES = [f"J{i:02d}$a_$" for i in range(NUM_GALAXIES)]  # not the mathematics of a figure
NAMES[20] = NAMES[21] = "J20"


def png(color: tuple[int, int, int]) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (32, 32), color).save(file, "PNG")
    return file.getvalue()


def write_galaxies(path, colors) -> str:
    """Images of one color each, which is found again on a contact sheet."""
    images = [b"no image" if i == UNREADABLE else png(color) for i, color in enumerate(colors)]
    position = {"ra": np.linspace(0, 300, len(colors)), "dec": np.zeros(len(colors))}
    pq.write_table(pa.table({"image": images, "object_id": NAMES[: len(colors)], **position}), path)
    return str(path)


@pytest.fixture(scope="module")
def survey(tmp_path_factory):
    """A folder with galaxies, an encoder, and the catalogue of both."""
    folder = tmp_path_factory.mktemp("survey")
    dataset = write_galaxies(folder / "galaxies.parquet", COLORS)
    save_encoder(build_mae(small_config(), seed=1), folder / "encoder", np.full(3, 0.4), np.full(3, 0.3), ())
    flags = ["--model", str(folder / "encoder"), "--dataset", dataset, "--output", str(folder / "catalogue.parquet")]
    main(["predict", *flags, "--embeddings"])
    return folder


@pytest.fixture
def run(survey, tmp_path, monkeypatch, drawn_figures):
    """Run a command on the catalogue in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(command: str, *flags: str) -> None:
        main([command, str(survey / "catalogue.parquet"), *flags])

    return run


def tiles_on(sheet) -> list[int]:
    """The galaxies of a contact sheet, found by their colors and in increasing order; twins as the first of them."""
    pixels = np.asarray(Image.open(sheet).convert("RGB"))
    found, counts = np.unique(pixels.reshape(-1, 3), axis=0, return_counts=True)
    areas = {tuple(color): count for color, count in zip(found.tolist(), counts.tolist(), strict=True) if count > 5000}
    areas = {i: areas[color] for i, color in enumerate(COLORS) if color in areas and i != TWINS[1]}
    return sorted(i for i, area in areas.items() for _ in range(round(area / min(areas.values()))))


def as_tiles(rows: list[int]) -> list[int]:
    """What `tiles_on` finds if these rows are on the sheet."""
    return sorted(TWINS[0] if row == TWINS[1] else row for row in rows)


def is_framed(sheet) -> bool:
    pixels = np.asarray(Image.open(sheet).convert("RGB"))
    return np.sum((pixels == (255, 127, 14)).all(axis=2)) > 1000  # matplotlib's tab:orange


def test_a_twin_is_the_first_neighbor_and_the_query_is_none(run, capsys, tmp_path):
    run("similar", "--query", NAMES[3], "-k", "7", "--output", "similar.fits")
    printed = capsys.readouterr().out
    assert "the 7 of 24 galaxies that are most similar to J03$a_$ (left out: 1 unreadable, 1 blank)" in printed
    table = read_catalogue(tmp_path / "similar.fits").table.to_pydict()
    assert table["object_id"][0] == NAMES[17]
    assert table["similarity"][0] == pytest.approx(1, abs=1e-6)
    assert 3 not in table["row"]
    assert table["rank"] == [1, 2, 3, 4, 5, 6, 7]
    assert table["similarity"] == sorted(table["similarity"], reverse=True)
    assert tiles_on("similar.png") == as_tiles([3, *table["row"]])
    assert is_framed("similar.png")


def test_name_row_and_image_file_of_a_galaxy_ask_for_the_same(run, tmp_path):
    """A file is no galaxy of the catalogue, so that its own image is found, first."""
    (tmp_path / "mine.png").write_bytes(png(COLORS[12]))
    run("similar", "--query", NAMES[12], "row:12", "mine.png", "-k", "8", "--output", "similar.parquet")
    table = read_catalogue(tmp_path / "similar.parquet").table.to_pandas()
    by_name, by_row, by_image = (part for _, part in table.groupby("query", sort=False))
    assert by_name["row"].tolist() == by_row["row"].tolist()
    assert by_image["row"].tolist() == [12, *by_name["row"].tolist()[:-1]]
    np.testing.assert_allclose(by_image["similarity"].iloc[1:], by_name["similarity"].iloc[:-1], atol=1e-5)


def test_a_galaxy_is_found_by_its_position_and_by_the_name_of_its_file():
    names = ["a/NGC1365.png", "b/J10.5", "c/J10.7.fits"]
    table = pa.table({"object_id": names, "ra": [359.9999, 10, np.nan], "dec": [-5.0, 5, 5], "flag": [""] * 3})
    table = table.append_column("row", pa.array([7, 8, 9])).append_column(*vector_column("embedding", "", np.eye(3)))
    queries = {"NGC1365": 0, "J10.7": 2, "0.0001,-5.0001": 0, "10, 5": 1, "row:9": 2, "b/J10.5": 1}
    for text, expected in queries.items():
        _, position, _ = _find_query(text, Predictions(table, {}), Namespace(catalogue="a.parquet"))
        assert position == expected, text
    for text in ("J10", "10,5.01", "200,5"):
        with pytest.raises(UserError, match=r"no galaxy of a\.parquet and no file has this name"):
            _find_query(text, Predictions(table, {}), Namespace(catalogue="a.parquet"))


@pytest.mark.slow
def test_all_galaxies_but_the_query_blank_and_unreadable_ones_are_ranked(run, tmp_path):
    run("similar", "--query", "row:0", "-k", "1000", "--output", "all.csv", "--sheet", "all.png")
    rows = read_catalogue(tmp_path / "all.csv").table["row"].to_pylist()
    assert sorted(rows) == [i for i in range(NUM_GALAXIES) if i not in (0, BLANK, UNREADABLE)]
    assert tiles_on("all.png") == as_tiles([0, *rows])


@pytest.mark.slow
def test_odd_ranks_by_either_score_and_draws_the_first(run, capsys, tmp_path):
    orders = []
    for score in ("knn_distance", "isolation_forest"):
        run("odd", "-k", "9", "--rank_by", score, "--output", f"{score}.vot", "--sheet", f"{score}.png")
        table = read_catalogue(tmp_path / f"{score}.vot").table.to_pydict()
        assert table[score] == sorted(table[score], reverse=True)
        assert {"knn_distance", "isolation_forest", "ra", "dec", "object_id"} <= set(table)
        assert tiles_on(f"{score}.png") == as_tiles(table["row"])
        assert not is_framed(f"{score}.png")
        orders.append(table["row"])
    assert orders[0] != orders[1]
    assert "the 9 oddest of 24 galaxies by knn_distance (left out: 1 unreadable, 1 blank)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--query", "J3$a_$"], r"--query J3\$a_\$: no galaxy .* \(the nearest is J\d+\$a_\$\)"),
        (["--query", "row:99"], r"--query row:99: no galaxy"),
        (["--query", "x" * 5000], r"--query x+: no galaxy"),
        (["--query", "J20"], r"--query J20: 2 galaxies .* use one of row:20, row:21"),
        (["--query", NAMES[BLANK]], r"this image is blank"),
        (["--query", f"row:{UNREADABLE}"], r"this image is unreadable"),
        (["--query", "text.png"], r"--query: text\.png cannot be decoded"),
        (["--query", "image.png", "--model", "other"], r"--model other: it is not the model of"),
        (["--query", "row:1", "-k", "0"], r"-k 0: it must be at least 1"),
        (["--query", "row:1", "--output", "x.txt"], r"--output x.txt: its suffix"),
        (["--query", "row:1", "--output", "no/x.csv"], r"--output no/x.csv: there is no folder no"),
        (["--query", "row:1", "--sheet", "x.jpg"], r"--sheet x.jpg: its suffix names no format; use one of .png"),
        (["--query", "row:1", "--sheet", "image.png"], r"--sheet image.png: it exists"),
        (["--query", "row:1", "--dataset", "other.parquet"], r"--dataset other.parquet: these are not the images"),
        (["--query", "row:1", "--dataset", "nowhere"], r"--dataset nowhere: no such file"),
    ],
)
def test_mistakes_end_in_one_line_and_leave_no_file(run, tmp_path, flags, message):
    (tmp_path / "text.png").write_bytes(b"no image")
    (tmp_path / "image.png").write_bytes(png((1, 2, 3)))
    write_galaxies(tmp_path / "other.parquet", COLORS[:12])
    save_encoder(build_mae(small_config(), seed=2), tmp_path / "other", np.full(3, 0.4), np.full(3, 0.3), ())
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match=message) as error:
        run("similar", *flags)
    assert "\n" not in str(error.value)
    assert sorted(tmp_path.iterdir()) == before


def test_files_are_replaced_only_if_asked(run, survey, tmp_path, capsys):
    output = tmp_path / "odd.csv"
    output.write_text("mine")
    with pytest.raises(SystemExit) as end, one_line_errors("galaxy_mae.catalogue"):
        run("odd", "--output", str(output))
    assert (end.value.code, output.read_text()) == (2, "mine")
    assert capsys.readouterr().err == (
        f"galaxy_mae.catalogue: error: --output {output}: it exists; choose another name, or set --overwrite to "
        "replace it\n"
    )
    catalogue = survey / "catalogue.parquet"
    with pytest.raises(UserError, match="it would replace the input of this command"):
        run("odd", "--output", str(catalogue), "--overwrite")
    run("odd", "--output", str(output), "--overwrite", "-k", "2")
    assert read_catalogue(output).table.num_rows == 2


def test_a_missing_catalogue_is_one_line(tmp_path):
    """Also if the output that is to be replaced is there, and for a page."""
    output = tmp_path / "old.csv"
    output.write_text("mine")
    missing, query = str(tmp_path / "none.parquet"), ("--query", "row:1", "--output", str(output), "--overwrite")
    with pytest.raises(UserError, match=r"none\.parquet: no such file"):
        main(["similar", missing, *query])
    with pytest.raises(UserError, match="names no format"):
        main(["page", "."])
    assert output.read_text() == "mine"


def test_without_the_images_there_is_a_table_and_no_sheet(survey, tmp_path, monkeypatch, capsys):
    """A sheet that was asked for is an error."""
    monkeypatch.chdir(tmp_path)
    read = read_catalogue(survey / "catalogue.parquet")
    write_catalogue(tmp_path / "moved.parquet", [read.table], read.about | {"dataset": "gone.parquet"})
    main(["similar", "moved.parquet", "--query", "row:1", "-k", "3", "--output", "s.csv"])
    captured = capsys.readouterr()
    assert captured.err.startswith("no contact sheet: --dataset gone.parquet: no such file")
    assert captured.err.count("\n") == 1
    assert "the 3 of 24 galaxies" in captured.out
    assert read_catalogue(tmp_path / "s.csv").table.num_rows == 3
    assert not (tmp_path / "similar.png").exists()
    with pytest.raises(UserError, match=r"--dataset gone.parquet: no such file"):
        main(["odd", "moved.parquet", "--sheet", "odd.png"])
    main(["odd", "moved.parquet", "--dataset", str(survey / "galaxies.parquet")])
    assert (tmp_path / "odd.png").is_file()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("synthetic:100000000", "no such file"),
        ("synthetic:26", "no such file"),
        ("galaxy10", "no such file"),
        ("someone/galaxies", "no such file"),
        ("/", "far too large"),
        ("PIPE", "no such file"),
        ("other.parquet", "these are not the images"),
    ],
)
def test_what_a_catalogue_names_is_opened_only_if_it_is_its_own_local_data(survey, run, tmp_path, capsys, name, reason):
    """Nothing is made, downloaded or cached for a name in a file that anybody may have written."""
    os.mkfifo(tmp_path / "PIPE")
    write_galaxies(tmp_path / "other.parquet", COLORS[:12])
    read = read_catalogue(survey / "catalogue.parquet")
    write_catalogue(tmp_path / "c.parquet", [read.table], read.about | {"dataset": name})
    cached = sorted(cache_folder().glob("*_format*"))
    main(["similar", "c.parquet", "--query", "row:1"])
    assert reason in capsys.readouterr().err
    assert sorted(cache_folder().glob("*_format*")) == cached
    assert not (tmp_path / "similar.png").exists()
    if name == "synthetic:26":  # nor the model that it names
        about = read.about | {"model": read.about["model"] | {"name": "someone/model"}}
        write_catalogue(tmp_path / "c.parquet", [read.table], about)
        (tmp_path / "mine.png").write_bytes(png(COLORS[12]))
        with pytest.raises(UserError, match="someone/model, is not here; set --model"):
            main(["similar", "c.parquet", "--query", "mine.png"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda row: row[::-1], "its rows are not those of"),
        (lambda row: row + 1, "its rows are not those of"),
        (lambda row: row + 10**15, "its rows are not those of"),
        (lambda row: row - 5, "negative numbers"),
    ],
)
def test_rows_that_are_edited_show_no_wrong_galaxy(survey, run, tmp_path, change, message):
    read = read_catalogue(survey / "catalogue.parquet")
    table = read.table.set_column(0, read.table.schema.field("row"), [change(np.arange(NUM_GALAXIES))])
    write_catalogue(tmp_path / "c.parquet", [table], read.about)
    with pytest.raises(UserError, match=message):
        main(["odd", "c.parquet", "--sheet", "odd.png"])
    assert not (tmp_path / "odd.png").exists()


def test_catalogues_without_usable_embeddings_are_refused(survey, tmp_path):
    read = read_catalogue(survey / "catalogue.parquet")
    table, path = read.table, tmp_path / "c.parquet"
    broken = to_numpy(table["embedding"]).copy()
    broken[5, 0] = np.nan
    column = pa.FixedSizeListArray.from_arrays(broken.ravel(), broken.shape[1])
    nan = table.set_column(table.column_names.index("embedding"), "embedding", column)
    broken[5] = 0
    column = pa.FixedSizeListArray.from_arrays(broken.ravel(), broken.shape[1])
    zero = table.set_column(table.column_names.index("embedding"), "embedding", column)
    for changed, about, message in (
        (
            table.drop_columns("embedding"),
            read.about,
            r"it has no embeddings; write it again with predict --embeddings",
        ),
        (table.slice(4, 2), read.about, r"it has 1 readable galaxies that are not blank; two are needed"),
        (nan, read.about, r"the embedding of row 5 is not finite"),
        (zero, read.about, r"the embedding of row 5 is not finite, or zero"),
        (table.drop_columns("flag"), read.about, r"it has no flag"),
        (table, {"dataset": "x"}, r"it has no \w+; write it again"),
    ):
        write_catalogue(path, [changed], about)
        for command in (["odd", str(path)], ["similar", str(path), "--query", "row:4"]):
            with pytest.raises(UserError, match=message):
                main(command)

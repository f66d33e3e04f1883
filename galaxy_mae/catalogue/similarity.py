"""Similar galaxies, and odd ones, by the embeddings of a catalogue.

The images of a contact sheet come from the data set that the catalogue was made of. Unreadable and blank images have no
meaningful embedding. They are neither neighbors nor odd, and are counted.
"""

import difflib
import importlib.util
import re
import sys
from argparse import Namespace
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from galaxy_mae.catalogue.formats import (
    VECTORS,
    check_suffix,
    describe_left_out,
    field,
    is_usable,
    read_catalogue,
    to_numpy,
    write_catalogue,
)
from galaxy_mae.data.fits import Stretch
from galaxy_mae.data.sources import Galaxies, area_average, open_galaxies
from galaxy_mae.errors import UserError
from galaxy_mae.files import remove_leftovers

SCORES = ("knn_distance", "isolation_forest")
NUM_NEIGHBORS = 5  # of the k-NN distance; more hide a handful of equal artifacts less, and rank single ones lower
NUM_TREES = 200  # of the isolation forest
ROWS_PER_COMPONENT = 10  # that whitening needs
_PRECISION = 10 * np.finfo(np.float32).eps  # relative; what varies less is a rounding error
_CHUNK = 16_384  # rows that are standardized at a time
_LARGE = 1_000_000  # rows from which faiss searches, if it is installed
_HNSW_LINKS, _HNSW_CANDIDATES = 32, 256  # of each row in the graph; that a search of it keeps
_MAX_SHEET = 104  # galaxies of a ranking on a contact sheet; with more it is too large to open
_ABOUT = {"model", "dataset", "dataset_fingerprint", "image_size", "stretch", "bf16"}  # what is read of it
_MAX_SUGGESTED = 100_000  # rows among whose names a similar one is looked for

Tile = tuple[np.ndarray, list[str]]  # of a contact sheet: an (S, S, 3) uint8 image, and the lines below it

# -------------------------------------------------------------------------------------------------------------- ranking


def neighbors(
    embedding: np.ndarray, query: np.ndarray, k: int, index: str | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The rows with the largest cosine similarity to each query, in standardized embeddings.

    Each dimension is scaled to zero mean and unit variance over the rows. Otherwise the few dimensions with a large
    mean decide alone. Constant dimensions do not count.

    Args:
        embedding: (N, D) float32, finite.
        query: (Q, D) float32, finite.
        k: neighbors of each query; N if there are fewer.
        index: `exact`, all similarities, in float64; `flat`, the same by faiss, in float32; `hnsw`, faiss' approximate
            search in a graph (Malkov & Yashunin 2020, IEEE TPAMI 42, 824). None selects `exact`, or from a million rows
            on `flat`, if faiss is installed.

    Returns:
        Rows, (Q, k) int64, and their cosine similarities, (Q, k) float64, in decreasing order.

    Raises:
        UserError: faiss is needed and not installed, or the approximate search found too few rows.
    """
    chunks, mean = _chunks(embedding), embedding.mean(axis=0, dtype=np.float64)
    std = np.sqrt(sum(((chunk - mean) ** 2).sum(axis=0) for chunk in chunks) / len(embedding))
    scale = np.divide(1, std, where=std > _PRECISION * np.abs(mean), out=np.zeros_like(std))

    def standardize(vectors: np.ndarray) -> np.ndarray:
        scaled = (vectors - mean) * scale
        return scaled / np.linalg.norm(scaled, axis=1, keepdims=True).clip(np.finfo(np.float64).tiny)

    query, k = standardize(query), min(k, len(embedding))
    if (index := _select_index(index, len(embedding))) != "exact":
        similarity, row = _search_with_faiss(index, "inner_product", map(standardize, chunks), query, k)
        return row, similarity.astype(np.float64)
    row, similarity = np.empty((len(query), 0), np.int64), np.empty((len(query), 0))
    for i, chunk in enumerate(chunks):  # merged with the best so far, so that memory does not grow with the rows
        new = np.broadcast_to(np.arange(len(chunk)) + i * _CHUNK, (len(query), len(chunk)))
        row = np.concatenate([row, new], axis=1)
        similarity = np.concatenate([similarity, query @ standardize(chunk).T], axis=1)
        best = np.argsort(-similarity, axis=1, kind="stable")[:, :k]
        row, similarity = np.take_along_axis(row, best, axis=1), np.take_along_axis(similarity, best, axis=1)
    return row, similarity


def anomaly_scores(embedding: np.ndarray, index: str | None = None) -> dict[str, np.ndarray]:
    """Two scores of how odd each row is, in whitened embeddings.

    Args:
        embedding: (N, D) float32, finite, of at least two rows.
        index: how the nearest rows are found, as in `neighbors`.

    Returns:
        `knn_distance` and `isolation_forest`, as the functions of these names: (N,) float64.

    Raises:
        UserError: all rows are equal, or as `neighbors`.
    """
    vectors = whiten(embedding)
    return {"knn_distance": knn_distance(vectors, index), "isolation_forest": isolation_forest(vectors)}


def whiten(embedding: np.ndarray) -> np.ndarray:
    """Principal components, each scaled to unit variance: (N, D) float32, of two rows or more, to (N, K) float32.

    Left out are components whose std is a rounding error of float32, and the last ones if there are fewer than ten rows
    for each: with as many components as rows, all rows would have the same distance.

    Raises:
        UserError: all rows are equal.
    """
    chunks, mean = _chunks(embedding), embedding.mean(axis=0, dtype=np.float64)
    covariance = sum((chunk - mean).T @ (chunk - mean) for chunk in chunks) / len(embedding)
    variance, vectors = np.linalg.eigh(covariance)  # in increasing order
    rounding = _PRECISION**2 * (np.trace(covariance) + mean @ mean)
    first = max(np.searchsorted(variance, rounding), len(variance) - max(1, len(embedding) // ROWS_PER_COMPONENT))
    if first == len(variance):
        raise UserError("all embeddings are equal: none is odd")
    scaled = vectors[:, first:] / np.sqrt(variance[first:])
    return np.concatenate([((chunk - mean) @ scaled).astype(np.float32) for chunk in chunks])


def knn_distance(vectors: np.ndarray, index: str | None = None) -> np.ndarray:
    """Mean Euclidean distance to the five nearest other rows (Angiulli & Pizzuti 2002, PKDD).

    Args:
        vectors: (N, K) float32, of at least two rows.
        index: how the nearest rows are found, as in `neighbors`.

    Returns:
        (N,) float64.

    Raises:
        UserError: as `neighbors`.
    """
    from sklearn.neighbors import NearestNeighbors

    k = min(NUM_NEIGHBORS + 1, len(vectors))  # the first is the row itself
    if (index := _select_index(index, len(vectors))) == "exact":
        distance, _ = NearestNeighbors(n_neighbors=k, algorithm="brute").fit(vectors).kneighbors(vectors)
    else:
        distance = np.sqrt(_search_with_faiss(index, "l2", [vectors], vectors, k)[0].clip(0))
    return distance[:, 1:].mean(axis=1, dtype=np.float64)


def isolation_forest(vectors: np.ndarray) -> np.ndarray:
    """The anomaly score of an isolation forest (Liu, Ting & Zhou 2008, ICDM), between 0 and 1, with a fixed seed.

    Args:
        vectors: (N, K) float32.

    Returns:
        (N,) float64.
    """
    from sklearn.ensemble import IsolationForest

    return -IsolationForest(n_estimators=NUM_TREES, random_state=0).fit(vectors).score_samples(vectors)


def _chunks(embedding: np.ndarray) -> list[np.ndarray]:
    return [embedding[start : start + _CHUNK] for start in range(0, len(embedding), _CHUNK)]


def _select_index(index: str | None, rows: int) -> str:
    """The index to search with; None as in `neighbors`."""
    installed = importlib.util.find_spec("faiss") is not None
    if index in ("flat", "hnsw") and not installed:
        raise UserError(f"--index {index}: faiss is not installed: pip install faiss-cpu")
    return index or ("flat" if installed and rows >= _LARGE else "exact")


def _search_with_faiss(
    index: str, metric: str, chunks: Iterable[np.ndarray], query: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """The k best of all chunks' rows for each query: inner products or squared distances, float32, and rows; (Q, k)."""
    import faiss

    metric = {"inner_product": faiss.METRIC_INNER_PRODUCT, "l2": faiss.METRIC_L2}[metric]
    size = query.shape[1]
    searched = faiss.IndexFlat(size, metric) if index == "flat" else faiss.IndexHNSWFlat(size, _HNSW_LINKS, metric)
    for chunk in chunks:
        searched.add(np.ascontiguousarray(chunk, np.float32))
    if index == "hnsw":
        searched.hnsw.efSearch = max(_HNSW_CANDIDATES, 2 * k)
    value, row = searched.search(np.ascontiguousarray(query, np.float32), k)
    if (row < 0).any():  # parts of the graph that are not linked to each other
        raise UserError(f"--index {index}: it found fewer than {k} rows; use --index flat")
    return value, row


# --------------------------------------------------------------------------------------------------------- the commands


@dataclass(frozen=True)
class _Embedded:
    """A catalogue with embeddings.

    Attributes:
        path: of the catalogue.
        table: all rows, without vectors.
        about: the provenance.
        usable: (M,) int64, increasing: the positions in the table of galaxies that are neither unreadable nor blank.
        embedding: (M, D) float32, theirs.
    """

    path: Path
    table: pa.Table
    about: dict[str, Any]
    usable: np.ndarray
    embedding: np.ndarray

    @property
    def stretch(self) -> Stretch:
        """That of the images, if they are FITS cut-outs."""
        return Stretch.from_options(Namespace(**self.about["stretch"]))


@dataclass(frozen=True)
class _Query:
    """What similar galaxies are looked for.

    Attributes:
        text: as given.
        embedding: (D,) float32.
        position: in the table; -1 for an image that is not of the catalogue.
        image: (S, S, 3) uint8 of such an image.
    """

    text: str
    embedding: np.ndarray
    position: int = -1
    image: np.ndarray | None = None


def similar(options: Namespace) -> None:
    """Rank the galaxies of a catalogue by their similarity to each query: a printed table, a file, a contact sheet.

    Raises:
        UserError: no such catalogue, query, model or data set, or files that exist.
    """
    sheet = _check_outputs(options, Path("similar.png"))
    catalogue = _read(options.catalogue)
    queries = [_find_query(text, catalogue, options.model) for text in options.query]
    galaxies = _open_images(catalogue, options)
    ranked, similarities = neighbors(
        catalogue.embedding, np.stack([query.embedding for query in queries]), options.k + 1, options.index
    )
    results = []
    for query, row, similarity in zip(queries, ranked, similarities, strict=True):
        others = np.flatnonzero(catalogue.usable[row] != query.position)[: options.k]
        columns = {
            "query": (pa.string(), "what was asked for", [query.text] * len(others)),
            "similarity": (pa.float64(), "cosine of the standardized embeddings", similarity[others]),
        }
        results.append(_ranking(catalogue, row[others], columns))
    _write(options.output, results, catalogue, {"command": "similar", "queries": options.query})
    if galaxies is not None:
        rankings = [
            [_query_tile(galaxies, catalogue, query), *_tiles(galaxies, result, "similarity")]
            for query, result in zip(queries, results, strict=True)
        ]
        title = "Most similar galaxies, with the cosine similarity of their standardized embeddings"
        _draw(sheet, rankings, title, query_first=True)
    for query, result in zip(queries, results, strict=True):
        count = f"{result.num_rows} of {len(catalogue.usable):,} galaxies"
        _print(result, f"the {count} that are most similar to {query.text}{_left_out(catalogue)}", ("similarity",))
    _print_files(options.output, galaxies and sheet)


def odd(options: Namespace) -> None:
    """Rank the galaxies of a catalogue by how odd they are: a printed table, a file and a contact sheet.

    Raises:
        UserError: no such catalogue or data set, files that exist, or equal embeddings.
    """
    sheet = _check_outputs(options, Path("odd.png"))
    catalogue = _read(options.catalogue)
    galaxies = _open_images(catalogue, options)
    scores = anomaly_scores(catalogue.embedding, options.index)
    row = np.argsort(-scores[options.rank_by], kind="stable")[: options.k]
    descriptions = (f"mean distance to the {NUM_NEIGHBORS} nearest galaxies", "anomaly score of an isolation forest")
    columns = {
        name: (pa.float64(), description, scores[name][row])
        for name, description in zip(SCORES, descriptions, strict=True)
    }
    result = _ranking(catalogue, row, columns)
    title = f"the {len(row)} oddest of {len(catalogue.usable):,} galaxies by {options.rank_by}"
    _write(options.output, [result], catalogue, {"command": "odd", "rank_by": options.rank_by})
    if galaxies is not None:
        _draw(sheet, [_tiles(galaxies, result, options.rank_by)], title.capitalize())
    _print(result, title + _left_out(catalogue), SCORES)
    _print_files(options.output, galaxies and sheet)


def _check_outputs(options: Namespace, default_sheet: Path) -> Path:
    """Check the flags before any work, and return the path of the contact sheet."""
    if options.k < 1:
        raise UserError(f"-k {options.k}: it must be at least 1")
    if options.output:
        check_suffix(options.output, "--output")
    if options.sheet and options.sheet.suffix.lower() != ".png":
        raise UserError(f"--sheet {options.sheet}: it must be the path of a .png file")
    for flag, path in (("--output", options.output), ("--sheet", options.sheet)):
        if path is None:
            continue
        if path.is_dir() or not path.parent.is_dir():
            raise UserError(f"{flag} {path}: give the name of a file in a folder that exists")
        if path.exists() and options.catalogue.exists() and path.samefile(options.catalogue):
            raise UserError(f"{flag} {path}: this is the catalogue; choose another name")
        if path.exists() and not options.overwrite:
            raise UserError(f"{flag} {path}: it exists; choose another name, or set --overwrite to replace it")
    return options.sheet or default_sheet


def _read(path: Path) -> _Embedded:
    """Read a catalogue with embeddings.

    Raises:
        UserError: it cannot be read, has no embeddings, or fewer than two galaxies with one.
    """
    catalogue = read_catalogue(path)
    table, names = catalogue.table, catalogue.table.column_names
    if "embedding" not in names:
        raise UserError(f"{path}: it has no embeddings; write it again with predict --embeddings")
    if missing := {"row", "object_id", "flag"} - set(names):
        raise UserError(f"{path}: it has no column {min(missing)}; write it again with predict")
    if missing := _ABOUT - set(catalogue.about):
        raise UserError(f"{path}: its provenance has no {min(missing)}; write it again with predict")
    usable = np.flatnonzero(is_usable(to_numpy(table["flag"])))
    if len(usable) < 2:
        raise UserError(f"{path}: it has {len(usable)} readable galaxies that are not blank; two are needed")
    embedding = to_numpy(table["embedding"])
    embedding = embedding if len(usable) == len(embedding) else embedding[usable]
    if len(broken := np.flatnonzero(~np.isfinite(embedding).all(axis=1))):
        row = table["row"][int(usable[broken[0]])]
        raise UserError(f"{path}: the embedding of row {row} is not finite; write it again with predict")
    return _Embedded(path, table.drop_columns([x for x in VECTORS if x in names]), catalogue.about, usable, embedding)


def _left_out(catalogue: _Embedded) -> str:
    """How many rows are left out, as in ` (left out: 2 unreadable, 1 blank)`."""
    text = describe_left_out(to_numpy(catalogue.table["flag"]))
    return f" (left out: {text})" if text else ""


# -------------------------------------------------------------------------------------------------------------- queries


def _find_query(text: str, catalogue: _Embedded, model: str | None) -> _Query:
    """The galaxy that a `--query` names: `row:N`, an object_id, or the path of an image."""
    table = catalogue.table
    if match := re.fullmatch(r"row:(\d{1,18})", text):
        found = np.flatnonzero(to_numpy(table["row"]) == int(match[1]))
    else:
        found = np.flatnonzero(pc.equal(table["object_id"], text).to_numpy(zero_copy_only=False))
    if len(found) > 1:
        rows = ", ".join(f"row:{table['row'][int(i)]}" for i in found[:5])
        raise UserError(f"--query {text}: {len(found)} galaxies of {catalogue.path} have this name; use one of {rows}")
    if len(found) == 1:
        position = int(found[0])
        i = int(np.searchsorted(catalogue.usable, position))
        if i == len(catalogue.usable) or catalogue.usable[i] != position:
            raise UserError(f"--query {text}: this image is {table['flag'][position]}; use another galaxy")
        return _Query(text, catalogue.embedding[i], position)
    path = Path(text).expanduser() if text.startswith("~/") else Path(text)
    if _is_file(path):
        image, embedding = _embed_image(path, catalogue, model)
        return _Query(text, embedding, image=image)
    near = ""
    if table.num_rows <= _MAX_SUGGESTED:
        near = "".join(difflib.get_close_matches(text, table["object_id"].to_pylist(), 1))
    raise UserError(
        f"--query {text[:200]}: no galaxy of {catalogue.path} and no file has this name"
        f"{f' (the nearest is {near})' if near else ''}; use an object_id, row:N or the path of an image"
    )


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that no file can have
        return False


def _embed_image(path: Path, catalogue: _Embedded, model: str | None) -> tuple[np.ndarray, np.ndarray]:
    """An image file at the model's size, (S, S, 3) uint8, and its embedding by the model of a catalogue, (D,) float32.

    Args:
        path: the image or FITS cut-out.
        catalogue: names the model, and its fingerprint.
        model: where the model is now; None is where it was.

    Raises:
        UserError: the image cannot be used, or the model is not there, or is another one.
    """
    from galaxy_mae.catalogue.models import open_model  # slow to import, like torch
    from galaxy_mae.data.batches import GalaxyBatches
    from galaxy_mae.data.images import read_images

    about, stretch, known = catalogue.about, catalogue.stretch, catalogue.about["model"]
    opened = open_model(model or known["name"], orientations=about.get("orientations", False))
    if about.get("labels") and "embedding_fingerprint" not in known:
        raise UserError(f"{catalogue.path}: an older version wrote it, with --labels; write it again with predict")
    if opened.embedding_fingerprint != known.get("embedding_fingerprint", known["fingerprint"]):
        raise UserError(
            f"--model {opened.name}: it is not the model of {catalogue.path}, and embeddings of two models cannot be "
            "compared; give the same model, or write the catalogue again with this one"
        )
    try:
        size, batches = read_images(str(path), 1, lambda *_: [path], None, stretch, skip_unreadable=False)
        pixels, _ = next(batches)
    except UserError as error:
        raise UserError(str(error).replace("--dataset", "--query")) from error
    if size < opened.image_size and not opened.enlarges:
        raise UserError(f"--query {path}: {size} x {size} pixels; the model takes {opened.image_size} or more")
    if size > opened.image_size:
        pixels = area_average(pixels, opened.image_size)
    _, features = next(opened.outputs(GalaxyBatches(pixels, opened.mean, opened.std, opened.image_size), about["bf16"]))
    return pixels[0], features[0]


# -------------------------------------------------------------------------------------------------------------- results


def _ranking(catalogue: _Embedded, row: np.ndarray, columns: dict[str, tuple[pa.DataType, str, Any]]) -> pa.Table:
    """Rows of a catalogue, with their rank from 1 and further columns in front.

    Args:
        catalogue: what is ranked.
        row: (k,) of its embeddings.
        columns: type, description and (k,) values by name.
    """
    columns = {"rank": (pa.int64(), "from 1", np.arange(1, len(row) + 1)), **columns}
    found = catalogue.table.take(catalogue.usable[row])
    fields = [field(name, kind, description) for name, (kind, description, _) in columns.items()]
    arrays = [pa.array(values, kind) for kind, _, values in columns.values()]
    return pa.table(arrays + found.columns, pa.schema(fields + list(found.schema)))


def _print(result: pa.Table, title: str, scores: Sequence[str]) -> None:
    """Print rank, names, classes, scores and position of a ranking."""
    names = ["rank", "object_id", "row", "label", "predicted_class", *scores, "ra", "dec"]
    frame = result.select([name for name in names if name in result.column_names]).to_pandas()
    frame = frame.dropna(axis=1, how="all")  # positions that are not known
    formatters = dict.fromkeys(scores, "{:.4f}".format) | dict.fromkeys(("ra", "dec"), "{:.5f}".format)
    print(title)
    print(frame.to_string(index=False, formatters={key: x for key, x in formatters.items() if key in frame}), "\n")


def _print_files(output: Path | None, sheet: Path | None) -> None:
    for name, path in (("table", output), ("contact sheet", sheet)):
        if path:
            print(f"{name}: {path}")


def _write(output: Path | None, results: list[pa.Table], catalogue: _Embedded, ranking: dict[str, Any]) -> None:
    """Write the rankings as a catalogue, if an output is asked for."""
    if output:
        remove_leftovers(output.parent, recursive=False)
        write_catalogue(output, results, catalogue.about | {"ranking": ranking})


def open_images(catalogue: Path, about: dict[str, Any], dataset: str | None) -> Galaxies:
    """The images of a catalogue.

    Args:
        catalogue: its path, for messages.
        about: its provenance.
        dataset: where they are now; None is where they were.

    Raises:
        UserError: they are not there, or are others.
    """
    source, stretch = dataset or about["dataset"], Stretch.from_options(Namespace(**about["stretch"]))
    galaxies = open_galaxies(source, about["image_size"], stretch=stretch, skip_unreadable=True)
    if galaxies.fingerprint != about["dataset_fingerprint"]:
        raise UserError(f"--dataset {source}: these are not the images of {catalogue}; give the same data set")
    return galaxies


def _open_images(catalogue: _Embedded, options: Namespace) -> Galaxies | None:
    """The images. Without them there is no contact sheet, which is an error if it was asked for."""
    try:
        return open_images(catalogue.path, catalogue.about, options.dataset)
    except UserError as error:
        if options.dataset or options.sheet:
            raise
        print(f"no contact sheet: {error}; where the images are now: --dataset", file=sys.stderr)
        return None


def _tiles(galaxies: Galaxies, result: pa.Table, score: str) -> list[Tile]:
    """The first galaxies of a ranking, with rank and score."""
    entries = result[:_MAX_SHEET].to_pylist()
    return [_tile(galaxies, entry, f"{entry['rank']}   {entry[score]:.3f}") for entry in entries]


def _query_tile(galaxies: Galaxies, catalogue: _Embedded, query: _Query) -> Tile:
    if query.image is not None:
        return query.image, ["query", Path(query.text).name]
    return _tile(galaxies, catalogue.table.slice(query.position, 1).to_pylist()[0], "query")


def _tile(galaxies: Galaxies, entry: dict[str, Any], heading: str) -> Tile:
    """The image of a row of a catalogue, with its class and name below it."""
    class_name = entry.get("predicted_class") or entry.get("label")
    return galaxies.pixels[entry["row"]], [heading, *([class_name] if class_name else []), entry["object_id"]]


def _draw(sheet: Path, rankings: list[list[Tile]], title: str, *, query_first: bool = False) -> None:
    """Draw a contact sheet."""
    from galaxy_mae.figures import ranked_galaxies  # matplotlib is slow to import

    remove_leftovers(sheet.parent, recursive=False)
    ranked_galaxies(sheet, rankings, title, query_first=query_first)

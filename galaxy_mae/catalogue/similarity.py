"""Similar galaxies, and odd ones, by the embeddings of a catalogue.

The images of a contact sheet come from the data set that the catalogue was made of. Unreadable and blank images have no
meaningful embedding. They are neither neighbors nor odd, and are counted.
"""

import difflib
import re
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from galaxy_mae.data.cache import Galaxies
from galaxy_mae.errors import UserError
from galaxy_mae.files import check_output, remove_leftovers
from galaxy_mae.predictions.formats import SUFFIXES, read_catalogue, write_catalogue
from galaxy_mae.predictions.neighbors import NUM_NEIGHBORS, SCORES, anomaly_scores, neighbors
from galaxy_mae.predictions.schema import VECTORS, Predictions, field

_MAX_SHEET = 104  # galaxies of a ranking on a contact sheet; with more it is too large to open
_ABOUT = {"model", "dataset", "dataset_fingerprint", "image_size", "stretch", "orientations", "bf16"}  # that are read
_MAX_SUGGESTED = 100_000  # rows among whose names a similar one is looked for

Tile = tuple[np.ndarray, list[str]]  # of a contact sheet: an (S, S, 3) uint8 image, and the lines below it
Rankings = list[tuple[str, pa.Table]]  # with their titles

# --------------------------------------------------------------------------------------------------------- the commands


@dataclass(frozen=True)
class _Query:
    """What similar galaxies are looked for.

    Attributes:
        text: as given.
        embedding: (D,) float32.
        position: among the usable galaxies; -1 for an image that is not of the catalogue.
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
    everything, usable = _read(options.catalogue)
    queries = [_find_query(text, everything, options) for text in options.query]
    galaxies = _open_images(everything, options)
    embedding = np.stack([query.embedding for query in queries])
    ranked, similarities = neighbors(usable.embedding, embedding, options.k + 1)
    rankings = []
    for query, row, similarity in zip(queries, ranked, similarities, strict=True):
        others = np.flatnonzero(row != query.position)[: options.k]
        columns = {
            "query": (pa.string(), "what was asked for", [query.text] * len(others)),
            "similarity": (pa.float64(), "cosine of the standardized embeddings", similarity[others]),
        }
        title = f"the {len(others)} of {len(usable):,} galaxies that are most similar to {query.text}"
        rankings.append((title, _ranking(usable, row[others], columns)))
    firsts = [_query_tile(galaxies, usable, query) for query in queries] if galaxies else []
    title = "Most similar galaxies, with the cosine similarity of their standardized embeddings"
    _write(options, everything, rankings, {"command": "similar", "queries": options.query})
    _draw(sheet, galaxies, rankings, "similarity", title, firsts)
    _print(options, everything, rankings, ("similarity",), galaxies and sheet)


def odd(options: Namespace) -> None:
    """Rank the galaxies of a catalogue by how odd they are: a printed table, a file and a contact sheet.

    Raises:
        UserError: no such catalogue or data set, files that exist, or equal embeddings.
    """
    sheet = _check_outputs(options, Path("odd.png"))
    everything, usable = _read(options.catalogue)
    galaxies = _open_images(everything, options)
    scores = anomaly_scores(usable.embedding)
    row = np.argsort(-scores[options.rank_by], kind="stable")[: options.k]
    descriptions = (f"mean distance to the {NUM_NEIGHBORS} nearest galaxies", "anomaly score of an isolation forest")
    columns = {
        name: (pa.float64(), description, scores[name][row])
        for name, description in zip(SCORES, descriptions, strict=True)
    }
    title = f"the {len(row)} oddest of {len(usable):,} galaxies by {options.rank_by}"
    rankings = [(title, _ranking(usable, row, columns))]
    _write(options, everything, rankings, {"command": "odd", "rank_by": options.rank_by})
    _draw(sheet, galaxies, rankings, options.rank_by, title.capitalize())
    _print(options, everything, rankings, SCORES, galaxies and sheet)


def _check_outputs(options: Namespace, default_sheet: Path) -> Path:
    """Check the flags before any work, and return the path of the contact sheet."""
    if options.k < 1:
        raise UserError(f"-k {options.k}: it must be at least 1")
    for flag, path, suffixes in (("--output", options.output, SUFFIXES), ("--sheet", options.sheet, (".png",))):
        if path is not None:
            check_output(path, flag, suffixes, overwrite=options.overwrite, inputs=[options.catalogue])
    return options.sheet or default_sheet


def _read(path: Path) -> tuple[Predictions, Predictions]:
    """Read a catalogue with embeddings: all rows, and the usable ones.

    Raises:
        UserError: it cannot be read, has no embeddings, or fewer than two galaxies with one.
    """
    everything = read_catalogue(path)
    if everything.embedding is None:
        raise UserError(f"{path}: it has no embeddings; write it again with predict --embeddings")
    everything.check(path, {"row", "object_id", "flag"}, _ABOUT)
    usable = everything.only_usable()
    if len(usable) < 2:
        raise UserError(f"{path}: it has {len(usable)} readable galaxies that are not blank; two are needed")
    if len(broken := np.flatnonzero(~np.isfinite(usable.embedding).all(axis=1))):
        raise UserError(f"{path}: the embedding of row {usable.row[broken[0]]} is not finite; write it again")
    return everything, usable


# -------------------------------------------------------------------------------------------------------------- queries


def _find_query(text: str, everything: Predictions, options: Namespace) -> _Query:
    """The galaxy that a `--query` names: `row:N`, an object_id, or the path of an image."""
    table, catalogue = everything.table, options.catalogue
    if match := re.fullmatch(r"row:(\d{1,18})", text):
        found = np.flatnonzero(everything.row == int(match[1]))
    else:
        found = np.flatnonzero(pc.equal(table["object_id"], text).to_numpy(zero_copy_only=False))
    if len(found) > 1:
        rows = ", ".join(f"row:{row}" for row in everything.row[found[:5]])
        raise UserError(f"--query {text}: {len(found)} galaxies of {catalogue} have this name; use one of {rows}")
    if len(found) == 1:
        position = int(found[0])
        if not everything.usable[position]:
            raise UserError(f"--query {text}: this image is {table['flag'][position]}; use another galaxy")
        return _Query(text, everything.embedding[position], int(everything.usable[:position].sum()))
    path = Path(text).expanduser() if text.startswith("~/") else Path(text)
    if _is_file(path):
        image, embedding = _embed_image(path, everything, options)
        return _Query(text, embedding, image=image)
    near = ""
    if table.num_rows <= _MAX_SUGGESTED:
        near = "".join(difflib.get_close_matches(text, table["object_id"].to_pylist(), 1))
    raise UserError(
        f"--query {text[:200]}: no galaxy of {catalogue} and no file has this name"
        f"{f' (the nearest is {near})' if near else ''}; use an object_id, row:N or the path of an image"
    )


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that no file can have
        return False


def _embed_image(path: Path, everything: Predictions, options: Namespace) -> tuple[np.ndarray, np.ndarray]:
    """An image file at the model's size, (S, S, 3) uint8, and its embedding by the catalogue's model, (D,) float32.

    Raises:
        UserError: the image cannot be used, or the model is not there, or is another one.
    """
    from galaxy_mae.catalogue.models import open_model  # slow to import, like torch
    from galaxy_mae.data.fits import UnreadableImage
    from galaxy_mae.data.images import decoding

    about, known = everything.about, everything.about["model"]
    name, how = options.model or known["name"], {key: about[key] for key in ("bf16", "orientations")}
    opened = open_model(name, **how)
    if opened.embedding_fingerprint != known["embedding_fingerprint"]:
        raise UserError(
            f"--model {opened.name}: it is not the model of {options.catalogue}, and embeddings of two models cannot "
            "be compared; give the same model, or write the catalogue again with this one"
        )
    try:
        with decoding():
            image = opened.image(path, everything.stretch)
    except UnreadableImage as problem:
        raise UserError(f"--query {path}: the image {problem}") from problem
    _, features = next(opened.outputs(image[None]))
    return image, features[0]


# -------------------------------------------------------------------------------------------------------------- results


def _ranking(usable: Predictions, row: np.ndarray, columns: dict[str, tuple[pa.DataType, str, Any]]) -> pa.Table:
    """Rows of a catalogue, with their rank from 1 and further columns in front.

    Args:
        usable: what is ranked.
        row: (k,) int64, positions in it.
        columns: type, description and (k,) values by name.
    """
    columns = {"rank": (pa.int64(), "from 1", np.arange(1, len(row) + 1)), **columns}
    found = usable.table.drop_columns([name for name in VECTORS if name in usable.table.column_names]).take(row)
    fields = [field(name, kind, description) for name, (kind, description, _) in columns.items()]
    arrays = [pa.array(values, kind) for kind, _, values in columns.values()]
    return pa.table(arrays + found.columns, pa.schema(fields + list(found.schema)))


def _write(options: Namespace, everything: Predictions, rankings: Rankings, about: dict[str, Any]) -> None:
    """Write the rankings as a catalogue, if an output is asked for."""
    if options.output:
        remove_leftovers(options.output.parent, recursive=False)
        write_catalogue(options.output, [table for _, table in rankings], everything.about | {"ranking": about})


def _print(
    options: Namespace, everything: Predictions, rankings: Rankings, scores: Sequence[str], sheet: Path | None
) -> None:
    """Print rank, names, classes, scores and position of each ranking, and which files were written."""
    left_out = f" (left out: {everything.left_out})" if everything.left_out else ""
    for title, result in rankings:
        names = ["rank", "object_id", "row", "label", "predicted_class", *scores, "ra", "dec"]
        frame = result.select([name for name in names if name in result.column_names]).to_pandas()
        frame = frame.dropna(axis=1, how="all")  # positions that are not known
        formatters = dict.fromkeys(scores, "{:.4f}".format) | dict.fromkeys(("ra", "dec"), "{:.5f}".format)
        print(title + left_out)
        print(frame.to_string(index=False, formatters={key: x for key, x in formatters.items() if key in frame}), "\n")
    for name, path in (("table", options.output), ("contact sheet", sheet)):
        if path:
            print(f"{name}: {path}")


def _open_images(everything: Predictions, options: Namespace) -> Galaxies | None:
    """The images. Without them there is no contact sheet, which is an error if it was asked for."""
    try:
        return everything.open_images(options.catalogue, options.dataset)
    except UserError as error:
        if options.dataset or options.sheet:
            raise
        print(f"no contact sheet: {error}; where the images are now: --dataset", file=sys.stderr)
        return None


def _draw(
    sheet: Path, galaxies: Galaxies | None, rankings: Rankings, score: str, title: str, firsts: Sequence[Tile] = ()
) -> None:
    """Draw a contact sheet with the first galaxies of each ranking, behind what was asked for, if there are images."""
    if galaxies is None:
        return
    from galaxy_mae.figures import ranked_galaxies  # matplotlib is slow to import

    lines = [
        [_tile(galaxies, entry, f"{entry['rank']}   {entry[score]:.3f}") for entry in result[:_MAX_SHEET].to_pylist()]
        for _, result in rankings
    ]
    lines = [[first, *line] for first, line in zip(firsts, lines, strict=True)] if firsts else lines
    remove_leftovers(sheet.parent, recursive=False)
    ranked_galaxies(sheet, lines, title, query_first=bool(firsts))


def _query_tile(galaxies: Galaxies, usable: Predictions, query: _Query) -> Tile:
    if query.image is not None:
        return query.image, ["query", Path(query.text).name]
    return _tile(galaxies, usable.table.slice(query.position, 1).to_pylist()[0], "query")


def _tile(galaxies: Galaxies, entry: dict[str, Any], heading: str) -> Tile:
    """The image of a row of a catalogue, with its class and name below it."""
    class_name = entry.get("predicted_class") or entry.get("label")
    return galaxies.pixels[entry["row"]], [heading, *([class_name] if class_name else []), entry["object_id"]]

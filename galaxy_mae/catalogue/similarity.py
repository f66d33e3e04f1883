"""Similar galaxies, and odd ones, by the embeddings of a catalogue.

The images of a contact sheet come from the data set that the catalogue was made of. Unreadable and blank images have no
meaningful embedding. They are neither neighbors nor odd, and are counted.
"""

import difflib
import os
import re
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from galaxy_mae.data.cache import Galaxies
from galaxy_mae.data.images import IMAGE_SUFFIXES
from galaxy_mae.errors import UserError
from galaxy_mae.files import check_output
from galaxy_mae.predictions.formats import check_catalogue_output, read_catalogue, write_catalogue
from galaxy_mae.predictions.neighbors import NUM_NEIGHBORS, SCORES, anomaly_scores, neighbors
from galaxy_mae.predictions.schema import VECTORS, Predictions, beside, field, to_table

_QUERY_ARCSEC = 5.0  # how far the position of a query may be from a galaxy
_MAX_SHEET = 104  # galaxies of a ranking on a contact sheet; with more it is too large to open
_MAX_SUGGESTED = 100_000  # rows among whose names a similar one is looked for


def similar(options: Namespace) -> None:
    """Rank the galaxies of a catalogue by their similarity to each query: a printed table, a file, a contact sheet."""
    everything, usable, galaxies = _read(options, "similar")
    embeddings, positions, images = zip(*(_find_query(x, everything, options) for x in options.query), strict=True)
    ranked, similarities = neighbors(usable.embedding, np.stack(embeddings), options.k + 1)
    rankings, firsts = [], []
    for text, position, image, row, similarity in zip(
        options.query, positions, images, ranked, similarities, strict=True
    ):
        others = np.flatnonzero(row != position)[: options.k]
        columns = [
            (field("query", pa.string(), "what was asked for"), [text] * len(others)),
            (field("similarity", pa.float64(), "cosine of the standardized embeddings"), similarity[others]),
        ]
        title = f"the {len(others)} of {len(usable):,} galaxies that are most similar to {text}"
        rankings.append((title, _ranking(usable, row[others], columns)))
        if image is not None:
            firsts.append((image, ["query", Path(text).name]))
        elif galaxies:
            firsts.append(_tile(galaxies, usable.table.slice(position, 1).to_pylist()[0], "query"))
    title = "Most similar galaxies, with the cosine similarity of their standardized embeddings"
    about = {"command": "similar", "queries": options.query}
    _finish(options, everything, galaxies, rankings, about, ("similarity",), title, firsts)


def odd(options: Namespace) -> None:
    """Rank the galaxies of a catalogue by how odd they are: a printed table, a file and a contact sheet."""
    everything, usable, galaxies = _read(options, "odd")
    scores = anomaly_scores(usable.embedding)
    row = np.argsort(-scores[options.rank_by], kind="stable")[: options.k]
    descriptions = (f"mean distance to the {NUM_NEIGHBORS} nearest galaxies", "anomaly score of an isolation forest")
    fields = [field(name, pa.float64(), description) for name, description in zip(SCORES, descriptions, strict=True)]
    columns = [(column, scores[column.name][row]) for column in fields]
    title = f"the {len(row)} oddest of {len(usable):,} galaxies by {options.rank_by}"
    rankings, about = [(title, _ranking(usable, row, columns))], {"command": "odd", "rank_by": options.rank_by}
    _finish(options, everything, galaxies, rankings, about, SCORES, title.capitalize())


def _read(options: Namespace, command: str) -> tuple[Predictions, Predictions, Galaxies | None]:
    """Check the flags, and read a catalogue with embeddings: all rows, the usable ones, and the images for a sheet."""
    path = options.catalogue
    if options.k < 1:
        raise UserError(f"-k {options.k}: it must be at least 1")
    sheet = options.sheet or Path(f"{command}.png")
    how = {"overwrite": options.overwrite, "inputs": [path, *getattr(options, "query", []), options.dataset or path]}
    if options.output is not None:
        check_catalogue_output(options.output, "--output", **how)
    check_output(sheet, "--sheet", (".png",), replace_own=options.sheet is None, **how)
    everything = read_catalogue(path)
    if everything.embedding is None:
        raise UserError(f"{path}: it has no embeddings; write it again with predict --embeddings")
    everything.check(path, {"row", "object_id", "flag"})
    usable = everything.only_usable()
    if len(usable) < 2:
        raise UserError(f"{path}: it has {len(usable)} readable galaxies that are not blank; two are needed")
    if len(broken := np.flatnonzero(~(np.isfinite(usable.embedding).all(axis=1) & usable.embedding.any(axis=1)))):
        raise UserError(f"{path}: the embedding of row {usable.row[broken[0]]} is not finite, or zero; write it again")
    galaxies, missing = everything.open_images(path, options.dataset, needed=options.sheet is not None)
    if missing:
        print(f"no contact sheet: {missing}", file=sys.stderr)
    return everything, usable, galaxies


def _find_query(
    text: str, everything: Predictions, options: Namespace
) -> tuple[np.ndarray, int | None, np.ndarray | None]:
    """What a `--query` names: `row:N`, an object_id, the stem of a file's name, `RA,DEC`, or the path of an image.

    Returns:
        The embedding, (D,) float32; the position among the usable galaxies, None for an image that is not of the
        catalogue; and such an image, (S, S, 3) uint8.
    """
    table, catalogue = everything.table, options.catalogue
    if match := re.fullmatch(r"row:(\d{1,18})", text):
        found = np.flatnonzero(everything.row == int(match[1]))
    elif match := re.fullmatch(r"(\d+(?:\.\d*)?) *, *([+-]?\d+(?:\.\d*)?)", text):
        found = _nearest(everything.position, float(match[1]), float(match[2]))
    else:
        found = np.flatnonzero(pc.equal(table["object_id"], text).to_numpy(zero_copy_only=False))
        if not len(found):  # the name of a file, without its folders and suffix
            files = (Path(name).name for name in table["object_id"].to_pylist())
            found = np.flatnonzero([name.removeprefix(text).lower() in IMAGE_SUFFIXES for name in files])
    if len(found) > 1:
        rows = ", ".join(f"row:{row}" for row in everything.row[found[:5]])
        raise UserError(f"--query {text}: {len(found)} galaxies of {catalogue} have this name; use one of {rows}")
    if len(found) == 1:
        position = int(found[0])
        if not everything.usable[position]:
            raise UserError(f"--query {text}: this image is {table['flag'][position]}; use another galaxy")
        return everything.embedding[position], int(everything.usable[:position].sum()), None
    path = Path(text).expanduser() if text.startswith("~/") else Path(text)
    if os.path.isfile(path):  # noqa: PTH113 (false for names that no file can have)
        image, embedding = _embed_image(path, everything, options)
        return embedding, None, image
    near = difflib.get_close_matches(text, table["object_id"][:_MAX_SUGGESTED].to_pylist(), 1)
    raise UserError(
        f"--query {text[:200]}: no galaxy of {catalogue} and no file has this name"
        f"{f' (the nearest is {near[0]})' if near else ''}; use an object_id, row:N, RA,DEC or the path of an image"
    )


def _nearest(position: np.ndarray, ra: float, dec: float) -> np.ndarray:
    """The row of the galaxy that is nearest to a position in degrees, if it is near enough: (0,) or (1,) int64."""
    (alpha, delta), (a, d) = np.radians(position).T, np.radians([ra, dec])
    haversine = np.sin((delta - d) / 2) ** 2 + np.cos(delta) * np.cos(d) * np.sin((alpha - a) / 2) ** 2
    separation = np.degrees(2 * np.sqrt(haversine)) * 3600  # of small angles; NaN where the position is not known
    return np.flatnonzero(separation == np.nanmin(separation, initial=_QUERY_ARCSEC))[:1]


def _embed_image(path: Path, everything: Predictions, options: Namespace) -> tuple[np.ndarray, np.ndarray]:
    """An image file at the model's size, (S, S, 3) uint8, and its embedding by the catalogue's model, (D,) float32."""
    from galaxy_mae.catalogue.models import open_model  # slow to import, like torch
    from galaxy_mae.catalogue.predict import in_memory
    from galaxy_mae.model.saved_model import DEFAULT_MODEL

    about, known = everything.about, everything.about["model"]
    name = options.model or known["name"]
    if not (options.model or name == DEFAULT_MODEL or os.path.isdir(os.path.expanduser(name))):  # noqa: PTH111, PTH112
        raise UserError(f"--query {path}: the model of {options.catalogue}, {name}, is not here; set --model")
    opened = open_model(name, bf16=about["bf16"], orientations=about["orientations"])
    if opened.embedding_fingerprint != known.get("embedding_fingerprint"):
        raise UserError(
            f"--model {opened.name}: it is not the model of {options.catalogue}, and embeddings of two models cannot "
            "be compared; give the same model, or write the catalogue again with this one"
        )
    galaxies = in_memory([path], opened.image_size, everything.stretch, everything.frame, "--query")
    _, features = next(opened.outputs(galaxies.pixels))
    return galaxies.pixels[0], features[0]


def _ranking(usable: Predictions, row: np.ndarray, columns: list[tuple[pa.Field, Any]]) -> pa.Table:
    """The rows at some positions, with their rank from 1 and other columns in front."""
    rank = field("rank", pa.int64(), "from 1"), np.arange(1, len(row) + 1)
    found = usable.table.drop_columns([name for name in VECTORS if name in usable.table.column_names])
    return beside(to_table([rank, *columns]), found.take(row))


def _finish(
    options: Namespace,
    everything: Predictions,
    galaxies: Galaxies | None,
    rankings: Sequence[tuple[str, pa.Table]],
    about: dict[str, Any],
    scores: Sequence[str],
    title: str,
    firsts: Sequence[tuple[np.ndarray, list[str]]] = (),
) -> None:
    """Write the rankings as a catalogue, if an output is asked for, draw them, if there are images, and print them.

    All `scores` are printed; the one of `rank_by` is on the contact sheet, where `firsts` come before the rankings.
    """
    files = {}
    if options.output:
        write_catalogue(options.output, [table for _, table in rankings], everything.about | {"ranking": about})
        files["table"] = options.output
    if galaxies:
        from galaxy_mae.figures import ranked_galaxies  # matplotlib is slow to import

        lines, shown = [[first] for first in firsts] or [[]], about.get("rank_by", scores[0])
        for line, (_, result) in zip(lines, rankings, strict=True):
            for entry in result[:_MAX_SHEET].to_pylist():
                line.append(_tile(galaxies, entry, f"{entry['rank']}   {entry[shown]:.3f}"))
        files["contact sheet"] = sheet = options.sheet or Path(f"{about['command']}.png")
        ranked_galaxies(sheet, lines, title, query_first=bool(firsts))
    left_out = f" (left out: {everything.left_out})" if everything.left_out else ""
    formatters = dict.fromkeys(scores, "{:.4f}".format) | dict.fromkeys(("ra", "dec"), "{:.5f}".format)
    for heading, result in rankings:
        names = ["rank", "object_id", "row", "label", "predicted_class", *scores, "ra", "dec"]
        frame = result.select([name for name in names if name in result.column_names]).to_pandas()
        frame = frame.dropna(axis=1, how="all")  # positions that are not known
        print(heading + left_out)
        print(frame.to_string(index=False, formatters={key: x for key, x in formatters.items() if key in frame}), "\n")
    for name, path in files.items():
        print(f"{name}: {path}")


def _tile(galaxies: Galaxies, entry: dict[str, Any], heading: str) -> tuple[np.ndarray, list[str]]:
    """The image of a row of a catalogue, (S, S, 3) uint8, and the lines below it: its class and name."""
    class_name = entry.get("predicted_class") or entry.get("label")
    return galaxies.pixels[entry["row"]], [heading, *([class_name] if class_name else []), entry["object_id"]]

"""The page of a catalogue: `python -m galaxy_mae.catalogue page CATALOGUE`, with or without classes and labels.

It shows what there is: without embeddings no map, without images names alone, without labels no confusion matrix.
"""

import shlex
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from bokeh.models import Model

from galaxy_mae.data.cache import Galaxies
from galaxy_mae.errors import UserError
from galaxy_mae.evaluation.scores import accuracy, percent
from galaxy_mae.files import remove_leftovers
from galaxy_mae.predictions.formats import check_suffix, read_catalogue
from galaxy_mae.predictions.neighbors import knn_distance, neighbors, whiten
from galaxy_mae.predictions.schema import Predictions, column_names, to_numpy
from galaxy_mae.reports.document import Thumbnails, write_page
from galaxy_mae.reports.report import PER_CLASS_NOTE, per_class_table
from galaxy_mae.reports.sections import (
    MAX_GALAXIES,
    NEIGHBORS,
    Mapped,
    confusion_matrix,
    confusion_section,
    galaxies_section,
    listed_galaxies,
    map_section,
    page_content,
    sample,
    section,
    table,
)

_MAX_RANKED = 20_000  # galaxies whose oddity is computed: the time grows with the square of the number
_REQUIRED = {"row", "object_id", "flag"}
_ABOUT = {"model", "class_names", "dataset", "dataset_fingerprint", "image_size", "stretch", "versions", "created"}


@dataclass(frozen=True)
class _Predicted:
    """The M usable galaxies of a catalogue: neither unreadable nor blank.

    Attributes:
        row: (M,) int64, of the data set.
        name: (M,) str.
        class_names: of the classes; those of the labels if nothing is predicted.
        label: (M,) int64; None without labels, or if their classes are not the model's.
        predicted: (M,) int64; None if nothing is predicted.
        probabilities: (M, classes) float64; None if nothing is predicted.
        entropy: (M,) float64; None if nothing is predicted.
        embedding: (M, D) float32; None without embeddings.
    """

    row: np.ndarray
    name: np.ndarray
    class_names: list[str]
    label: np.ndarray | None
    predicted: np.ndarray | None
    probabilities: np.ndarray | None
    entropy: np.ndarray | None
    embedding: np.ndarray | None


def page(options: Namespace) -> None:
    """Write the page of a catalogue.

    Raises:
        UserError: no such catalogue or data set, or an output that exists.
    """
    path = _check_output(options)
    catalogue = read_catalogue(options.catalogue)
    contents, about = catalogue.table, catalogue.about
    names = about.get("class_names", ())
    required = _REQUIRED | {*column_names(names), *(["entropy"] if names else [])}
    if missing := (required - set(contents.column_names)) | (_ABOUT - set(about)):
        raise UserError(f"{options.catalogue}: it has no {min(missing)}; write it again with predict")
    galaxies, alerts = _open_images(catalogue, options)
    found = _predictions(contents, about, _usable(options.catalogue, contents, alerts), alerts)
    shown = sample(len(found.row), MAX_GALAXIES)
    if len(shown) < len(found.row):
        alerts.append(
            f"Map and cells show a random sample of {len(shown):,} of the {len(found.row):,} galaxies; all numbers are "
            "of all galaxies."
        )
    thumbnails, plots = Thumbnails(galaxies and galaxies.pixels), {}

    def add(i: int) -> int:
        return thumbnails.add(found.row[i], _lines(found, i))

    number = {i: add(i) for i in shown.tolist()}
    sections = [_overview(found)] if found.predicted is not None or found.label is not None else []
    if found.embedding is not None and len(found.row) > 1:
        part, plots["map"] = _map(found, number, thumbnails)
        sections.append(part)
    if found.label is not None and found.predicted is not None:
        sections.append(_confusion(found, number))
    if lists := listed_galaxies(found.probabilities, found.entropy, found.label, _distances(found)):
        sections.append(galaxies_section(lists, add, lambda positions: _near(found, positions, add), "the catalogue"))
    sections.append(_foot(options.catalogue, about))
    remove_leftovers(path.parent, recursive=False)
    described = [
        f"{contents.num_rows:,} galaxies of {about['dataset']}, by the model {about['model']['name']}.",
        f"Computed {about['created'][:16].replace('T', ' ')} UTC.",
    ]
    title = f"Catalogue {options.catalogue.name}"
    write_page(path, plots, thumbnails, **page_content(title, described, alerts, sections))
    print(f"page: {path}")


def _check_output(options: Namespace) -> Path:
    """Check the flags before any work, and return the path of the page."""
    path = options.output
    if path is None:
        check_suffix(options.catalogue, "catalogue")
        return options.catalogue.with_suffix(".html")
    if path.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--output {path}: it must be the path of an .html file")
    if path.is_dir() or not path.parent.is_dir():
        raise UserError(f"--output {path}: give the name of a file in a folder that exists")
    if path.exists() and not options.overwrite:
        raise UserError(f"--output {path}: it exists; choose another name, or set --overwrite to replace it")
    return path


def _open_images(catalogue: Predictions, options: Namespace) -> tuple[Galaxies | None, list[str]]:
    """The images of a catalogue, or a sentence why there are none, which is an error if `--dataset` was given."""
    try:
        return catalogue.open_images(options.catalogue, options.dataset), []
    except UserError as error:
        if options.dataset:
            raise
        return None, [f"Without images: {error}; where they are now: --dataset."]


def _usable(catalogue: Path, contents: pa.Table, alerts: list[str]) -> np.ndarray:
    """Positions of the galaxies that are neither unreadable nor blank; what is left out is added to the alerts."""
    everything = Predictions(contents, {})
    usable = np.flatnonzero(everything.usable)
    if not len(usable):
        raise UserError(f"{catalogue}: it has no readable galaxy that is not blank")
    if left_out := everything.left_out:
        alerts.append(f"Left out: {left_out}.")
    return usable


def _predictions(contents: pa.Table, about: dict[str, Any], usable: np.ndarray, alerts: list[str]) -> _Predicted:
    """What the catalogue says about its usable galaxies."""
    names, columns = about["class_names"], contents.column_names
    values = {name: to_numpy(contents[name])[usable] for name in columns if name != "pca"}
    probabilities = np.stack([values[x] for x in column_names(names)], axis=1).astype(float) if names else None
    label = None
    if "label" in columns:
        labels = values["label"].astype(str)
        of_data = sorted(set(labels.tolist()))
        if not names or set(of_data) <= set(names):
            names = names or of_data
            position = {name: i for i, name in enumerate(names)}
            label = np.array([position[x] for x in labels], np.int64)
        else:
            other = ", ".join(x for x in of_data if x not in names)
            alerts.append(f"The labels are not compared: the model has no class {other}.")
    embedding = values.get("embedding")
    if embedding is not None and not np.isfinite(embedding).all():
        alerts.append("Without map and neighbors: an embedding is not finite; write the catalogue again with predict.")
        embedding = None
    elif embedding is None:
        alerts.append("Without map and neighbors: the catalogue has no embeddings (predict --embeddings adds them).")
    return _Predicted(
        row=values["row"],
        name=values["object_id"].astype(str),
        class_names=list(names),
        label=label,
        predicted=None if probabilities is None else probabilities.argmax(axis=1),
        probabilities=probabilities,
        entropy=None if probabilities is None else values["entropy"].astype(float),
        embedding=embedding,
    )


def _lines(found: _Predicted, i: int) -> list[str]:
    """The text below the image of a galaxy."""
    lines = [str(found.name[i])]
    if found.label is not None:
        lines.append(f"class: {found.class_names[found.label[i]]}")
    if found.predicted is not None:
        c = found.predicted[i]
        lines.append(f"predicted: {found.class_names[c]}, {found.probabilities[i, c]:.0%}")
    return lines


def _overview(found: _Predicted) -> dict[str, Any]:
    """How many galaxies are in each class, and the accuracy if there are labels."""
    header, columns = ["Class"], [found.class_names]
    for title, classes in (("Galaxies with this label", found.label), ("Galaxies predicted", found.predicted)):
        if classes is not None:
            header.append(title)
            columns.append([f"{n:,}" for n in np.bincount(classes, minlength=len(found.class_names))])
    blocks = [table(header, list(zip(*columns, strict=True)))]
    if found.label is not None and found.predicted is not None:
        text = (
            f"Of the {len(found.label):,} galaxies {percent(accuracy(found.label, found.predicted[None]))} are in the "
            "predicted class. The model may have been trained on some of them: linear_probe_checkpoints.py evaluates "
            "it on others."
        )
        blocks.insert(0, {"kind": "text", "text": text})
    return section("classes", "Classes", blocks=blocks)


def _map(found: _Predicted, number: dict[int, int], thumbnails: Thumbnails) -> tuple[dict[str, Any], Model]:
    shown = np.array(list(number))
    mapped = Mapped(
        embedding=found.embedding[shown],
        number=list(number.values()),
        judged=np.ones(len(shown), bool),
        class_names=found.class_names,
        label=None if found.label is None else found.label[shown],
        predicted=None if found.predicted is None else found.predicted[shown],
    )
    return map_section(mapped, thumbnails, "Embeddings of the catalogue's model.")


def _confusion(found: _Predicted, number: dict[int, int]) -> dict[str, Any]:
    names, predicted = found.class_names, found.predicted[None]
    scores = per_class_table(found.label, predicted, names)
    matrix = confusion_matrix(
        "Labels and predicted classes", names, found.label, predicted, found.probabilities, number,
        table(scores.header, scores.rows),
    )  # fmt: skip
    return confusion_section("Confusion matrix", [matrix], PER_CLASS_NOTE)


def _distances(found: _Predicted) -> np.ndarray | None:
    """Mean distances to the nearest galaxies, -inf beyond a sample; None if the embeddings tell nothing."""
    if found.embedding is None:
        return None
    among, distance = sample(len(found.embedding), _MAX_RANKED), np.full(len(found.embedding), -np.inf)
    try:
        distance[among] = knn_distance(whiten(found.embedding[among]))
    except UserError:  # all embeddings are equal
        return None
    return distance


def _near(found: _Predicted, positions: np.ndarray, add: Callable[[int], int]) -> list[list[int]]:
    """Thumbnails of the nearest other galaxies of each position."""
    if found.embedding is None:
        return [[] for _ in positions]
    rows, _ = neighbors(found.embedding, found.embedding[positions], NEIGHBORS + 1)
    pairs = zip(positions, rows.tolist(), strict=True)
    return [[add(j) for j in [j for j in row if j != i][:NEIGHBORS]] for i, row in pairs]


def _foot(catalogue: Path, about: dict[str, Any]) -> dict[str, Any]:
    model = about["model"]
    entries = [
        ("Catalogue", str(catalogue)),
        ("Model", f"{model['name']}, SHA-256 {model['fingerprint']}"),
        ("Data", f"{about['dataset']}, SHA-256 {about['dataset_fingerprint']}"),
        ("Image size", str(about["image_size"])),
        ("Commit", about.get("commit") or "not known"),
        ("Versions", ", ".join(f"{key} {value}" for key, value in about["versions"].items())),
    ]
    command = shlex.join(["python", "-m", "galaxy_mae.catalogue", "page", str(catalogue)])
    return section("foot", "How this was made", "foot", entries=entries, command=command)

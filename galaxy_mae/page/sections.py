"""The sections of a page as data for `templates/page.html`, from arrays."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from bokeh.models import Model

from galaxy_mae.page import plots
from galaxy_mae.page.document import Thumbnails
from galaxy_mae.page.projection import project

MAX_GALAXIES = 3000  # of a test set or a catalogue; of more the page shows a sample
LISTED = 8  # galaxies of a list
NEIGHBORS = 6  # of each

_PATHS = {  # of the legend, as Bokeh's markers
    "circle": "M-6 0a6 6 0 1 0 12 0a6 6 0 1 0 -12 0",
    "square": "M-5 -5h10v10h-10z",
    "triangle": "M0 -6L6 5H-6z",
    "diamond": "M0 -7L5 0L0 7L-5 0z",
    "inverted_triangle": "M0 6L6 -5H-6z",
}


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> dict[str, Any]:
    """A block of a section."""
    return {"kind": "table", "header": header, "rows": rows}


def section(id_: str, title: str, kind: str = "blocks", **content: Any) -> dict[str, Any]:
    """A section of a page; `id_` is the anchor of its link."""
    return {"id": id_, "title": title, "kind": kind, **content}


def page_content(title: str, about: Sequence[str], alerts: Sequence[str], sections: Sequence[dict]) -> dict[str, Any]:
    """The variables of the template."""
    contents = [(part["id"], part["title"]) for part in sections]
    return {
        **{"title": title, "about": about, "alerts": alerts, "contents": contents, "sections": sections},
        "markers": _PATHS,
    }


def sample(count: int, maximum: int) -> np.ndarray:
    """Positions 0 to `count` - 1 in order, or a random sample of `maximum` of them; int64."""
    if count <= maximum:
        return np.arange(count)
    return np.sort(np.random.default_rng(0).permutation(count)[:maximum])


@dataclass(frozen=True)
class Mapped:
    """The N galaxies of a map.

    Attributes:
        embedding: (N, D) float32, finite.
        number: of their thumbnails.
        judged: (N,) bool, false for training galaxies, which are shown smaller.
        class_names: of the classes.
        label: (N,) int64, -1 where unknown; None without labels.
        predicted: (N,) int64, -1 where unknown; None without predictions.
    """

    embedding: np.ndarray
    number: list[int]
    judged: np.ndarray
    class_names: Sequence[str]
    label: np.ndarray | None
    predicted: np.ndarray | None


def map_section(galaxies: Mapped, thumbnails: Thumbnails, note: str) -> tuple[dict[str, Any], Model]:
    """The map with its colorings, its legends, and lists of galaxies that can be chosen with the keyboard."""
    xy, method = project(galaxies.embedding)
    columns = {
        "x": xy[:, 0].round(3).tolist(),
        "y": xy[:, 1].round(3).tolist(),
        "galaxy": galaxies.number,
        "text": ["\n".join(thumbnails.lines(number)) for number in galaxies.number],
        "size": np.where(galaxies.judged, 8, 5).tolist(),
        "alpha": np.where(galaxies.judged, 0.85, 0.35).tolist(),
    }
    colorings, choices = [], []
    names, label, predicted = galaxies.class_names, galaxies.label, galaxies.predicted
    for key, title, classes in (("class", "by class", label), ("predicted", "by predicted class", predicted)):
        if classes is None:
            continue
        _color(columns, key, [plots.class_style(c) for c in classes])
        known = [int(c) for c in np.unique(classes[classes >= 0])]
        entries = [(names[c], *plots.class_style(c)) for c in known]
        if (classes < 0).any():
            entries.append(("not known", *plots.UNKNOWN))
        colorings.append((key, title, entries))
        what = "class" if key == "class" else "predicted"
        choices += [(f"{what}: {names[c]}", (classes == c) & galaxies.judged) for c in known]
    if label is not None and predicted is not None:
        judged = (label >= 0) & (predicted >= 0) & galaxies.judged
        outcome = np.where(judged, (label != predicted).astype(int), -1)
        styles = [plots.CORRECTNESS[o][1:] if o >= 0 else plots.UNKNOWN for o in outcome]
        _color(columns, "correct", styles)
        entries = [*plots.CORRECTNESS, ("not judged", *plots.UNKNOWN)] if not judged.all() else [*plots.CORRECTNESS]
        colorings.append(("correct", "by correctness", entries))
        choices.insert(0, ("misclassified", outcome == 1))
    if not colorings:
        _color(columns, "none", [plots.class_style(0)] * len(galaxies.number))
        colorings.append(("none", "none", []))
        choices.append(("all", galaxies.judged))
    first = colorings[0][0]
    columns |= {"color": columns[f"color_{first}"], "marker": columns[f"marker_{first}"]}
    numbers = np.array(galaxies.number)
    listed = [
        (f"{title} ({members.sum():,})", numbers[members].tolist()) for title, members in choices if members.any()
    ]
    text = (
        f"Map of {galaxies.judged.sum():,} galaxies"
        + (f" and {np.sum(~galaxies.judged):,} training galaxies (smaller)" if not galaxies.judged.all() else "")
        + ", one point each. Hover or tap: the galaxy. Drag: a region, whose galaxies are listed below. "
        "The menu Select lists galaxies without a pointer."
    )
    content = {"note": f"{note} {method}", "text": text, "colorings": colorings, "choices": listed}
    return section("map", "The map", "map", **content), plots.galaxy_map(columns)


def _color(columns: dict[str, list], key: str, styles: Sequence[tuple[str, str]]) -> None:
    columns[f"color_{key}"], columns[f"marker_{key}"] = map(list, zip(*styles, strict=True))


def confusion_matrix(
    title: str,
    class_names: Sequence[str],
    label: np.ndarray,
    predicted: np.ndarray,
    probabilities: np.ndarray,
    number: dict[int, int],
    per_class: dict[str, Any],
) -> dict[str, Any]:
    """A confusion matrix, each cell with its galaxies, the most confident first.

    Args:
        title: of the matrix.
        class_names: of the classes.
        label: (N,) integers.
        predicted: (S, N) integers, one row per seed.
        probabilities: (N, classes) float, means over seeds.
        number: of the thumbnail, by position of the galaxy; of a sample.
        per_class: the table below it.
    """
    classes, seeds, rows = range(len(class_names)), len(predicted), []
    for true in classes:
        row, of_class = [], label == true
        total = max(1, seeds * int(of_class.sum()))
        for guess in classes:
            votes = (predicted == guess).sum(axis=0) * of_class
            members = np.flatnonzero(votes)
            members = members[np.argsort(-probabilities[members, guess], kind="stable")]
            galaxies = [
                [
                    number[i],
                    *([f"here: {probabilities[i, guess]:.0%}, {votes[i]} of {seeds} seeds"] if seeds > 1 else []),
                ]
                for i in members.tolist()
                if i in number
            ]
            count = int(votes.sum())
            unit = "galaxy" if seeds == 1 else "prediction"
            plural = {"galaxy": "galaxies", "prediction": "predictions"}[unit] if count != 1 else unit
            what = f"{count:,} {plural}" + (f" of {seeds} seeds" if seeds > 1 else "")
            part = count / total
            row.append(
                {"count": what, "percent": f"{100 * part:.0f}", "part": f"{0.75 * part:.2f}", "galaxies": galaxies}
            )
        rows.append(row)
    return {"title": title, "classes": class_names, "rows": rows, "per_class": per_class}


def ranked(score: np.ndarray, allowed: np.ndarray | None = None) -> np.ndarray:
    """Positions of the `LISTED` largest scores, of those that are allowed."""
    order = np.argsort(-score, kind="stable")
    return (order if allowed is None else order[allowed[order]])[:LISTED]


def entropy(probabilities: np.ndarray) -> np.ndarray:
    """Entropy in nats over the last axis."""
    return -np.sum(probabilities * np.log(np.maximum(probabilities, np.finfo(float).tiny)), axis=-1)


def spread_evenly(values: Sequence, maximum: int) -> list:
    """At most `maximum` of the values, the first and the last among them."""
    if len(values) <= maximum:
        return list(values)
    return [values[i] for i in np.linspace(0, len(values) - 1, maximum).round().astype(int)]

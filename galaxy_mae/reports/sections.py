"""The sections of a page as data for `templates/page.html`, from arrays."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from bokeh.models import Model

from galaxy_mae.reports import plots
from galaxy_mae.reports.document import Thumbnails
from galaxy_mae.reports.projection import project

MAX_GALAXIES = 3000  # of a test set or a catalogue; of more the page shows a sample
LISTED = 8  # galaxies of a list
NEIGHBORS = 6  # of each

_PATHS = {  # of the legend, as Bokeh's markers
    "circle": "M-6 0a6 6 0 1 0 12 0a6 6 0 1 0 -12 0",
    "square": "M-5 -5h10v10h-10z",
    "triangle": "M0 -6L6 5H-6z",
    "diamond": "M0 -7L5 0L0 7L-5 0z",
    "plus": "M-2 -6h4v4h4v4h-4v4h-4v-4h-4v-4h4z",
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
    colorings, choices = _colorings(galaxies, columns)
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


def _colorings(galaxies: Mapped, columns: dict[str, list]) -> tuple[list[tuple], list[tuple[str, np.ndarray]]]:
    """Add colors and markers to the columns of the map.

    Returns:
        Key, title and legend of each coloring; title and members, (N,) bool, of each list that can be chosen.
    """
    colorings, choices = [], []
    names, label, predicted, judged = galaxies.class_names, galaxies.label, galaxies.predicted, galaxies.judged
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
        choices += [(f"{what}: {names[c]}", (classes == c) & judged) for c in known]
    if label is not None and predicted is not None:
        compared = (label >= 0) & (predicted >= 0) & judged
        outcome = np.where(compared, (label != predicted).astype(int), -1)
        _color(columns, "correct", [plots.CORRECTNESS[o][1:] if o >= 0 else plots.UNKNOWN for o in outcome])
        entries = [*plots.CORRECTNESS, *([] if compared.all() else [("not judged", *plots.UNKNOWN)])]
        colorings.append(("correct", "by correctness", entries))
        choices.insert(0, ("misclassified", outcome == 1))
    if not colorings:
        _color(columns, "none", [plots.class_style(0)] * len(galaxies.number))
        colorings.append(("none", "none", []))
        choices.append(("all", judged))
    return colorings, choices


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
    classes = range(len(class_names))
    rows = [
        [_cell((predicted == guess) & (label == true), int((label == true).sum()), probabilities[:, guess], number)
         for guess in classes]
        for true in classes
    ]  # fmt: skip
    return {"title": title, "classes": class_names, "rows": rows, "per_class": per_class}


def _cell(members: np.ndarray, of_class: int, probability: np.ndarray, number: dict[int, int]) -> dict[str, Any]:
    """A cell of a confusion matrix.

    Args:
        members: (S, N) bool, of each seed.
        of_class: number of galaxies of the true class.
        probability: (N,) float, of the predicted class.
        number: of the thumbnail, by position of the galaxy; of a sample.
    """
    seeds, votes = len(members), members.sum(axis=0)
    found = np.flatnonzero(votes)
    found = [i for i in found[np.argsort(-probability[found], kind="stable")].tolist() if i in number]
    notes = [[f"here: {probability[i]:.0%}, {votes[i]} of {seeds} seeds"] if seeds > 1 else [] for i in found]
    count, fraction = int(votes.sum()), votes.sum() / max(1, seeds * of_class)
    if seeds == 1:
        what = f"{count:,} {'galaxy' if count == 1 else 'galaxies'}"
    else:
        what = f"{count:,} prediction{'s' * (count != 1)} of {seeds} seeds"
    return {
        "count": what,
        "percent": f"{100 * fraction:.0f}",
        "alpha": f"{0.75 * fraction:.2f}",  # of the color behind the number, which stays legible
        "galaxies": [[number[i], *note] for i, note in zip(found, notes, strict=True)],
    }


def confusion_section(title: str, matrices: Sequence[dict[str, Any]], per_class_note: str) -> dict[str, Any]:
    """Confusion matrices; the first is open."""
    note = "Rows are true classes, columns predicted ones, numbers % of the true class. A cell opens its galaxies."
    content = {"note": note, "matrices": matrices, "per_class_note": per_class_note}
    return section("confusion", title, "confusion", **content)


@dataclass(frozen=True)
class Listed:
    """A list of galaxies: title, what it holds, their positions, (K,) int64, and a note on each."""

    title: str
    note: str
    positions: np.ndarray
    notes: list[str]


def listed_galaxies(
    probabilities: np.ndarray | None,
    uncertainty: np.ndarray | None,
    label: np.ndarray | None,
    distance: np.ndarray | None,
    method: str = "",
) -> list[Listed]:
    """The most confidently wrong, the least certain and the oddest galaxies, as far as they can be told.

    Args:
        probabilities: (N, classes) float; None if nothing is predicted.
        uncertainty: (N,) float, their entropy in nats; None if nothing is predicted.
        label: (N,) integers; None without labels.
        distance: (N,) float, mean distance to the nearest galaxies in whitened embeddings, -inf where it was not
            computed; None without embeddings.
        method: that gave the probabilities, for the notes.
    """
    found = []
    by, of_method = (f", by {method}", f" of {method}") if method else ("", "")
    if probabilities is not None:
        if label is not None:
            wrong = _ranked(np.where(probabilities.argmax(axis=1) != label, probabilities.max(axis=1), -np.inf))
            note = f"The largest probabilities of another class than the label{by}."
            found.append(Listed("Most confidently wrong", note, wrong, [""] * len(wrong)))
        if probabilities.shape[1] > 1:
            note = f"The largest entropy of the probabilities{of_method}."
            least = _ranked(uncertainty)
            found.append(Listed("Least certain", note, least, [f"entropy {uncertainty[i]:.2f} nats" for i in least]))
    if distance is not None:
        count, odd = int(np.isfinite(distance).sum()), _ranked(distance)
        note = "The largest mean distance to the five nearest galaxies, in whitened embeddings"
        note += "." if count == len(distance) else f", of a random sample of {count:,} galaxies."
        found.append(Listed("Oddest", note, odd, [f"distance {distance[i]:.1f}" for i in odd]))
    return [listed for listed in found if len(listed.positions)]


def galaxies_section(
    lists: Sequence[Listed], number: Callable[[int], int], near: Callable[[np.ndarray], list[list[int]]], where: str
) -> dict[str, Any]:
    """The galaxies of the lists with their nearest neighbors.

    Args:
        lists: the positions of the galaxies.
        number: gives the thumbnail of a position.
        near: gives the thumbnails of the nearest neighbors of each of (K,) positions; empty lists without embeddings.
        where: the neighbors are from.
    """
    groups = []
    for listed in lists:
        rows = zip(listed.positions.tolist(), listed.notes, near(listed.positions), strict=True)
        items = [{"number": number(i), "note": note, "near": neighbors} for i, note, neighbors in rows]
        note = listed.note + (f" After each: its nearest neighbors in {where}." if items[0]["near"] else "")
        groups.append({"title": listed.title, "note": note, "items": items})
    return section("galaxies", "Galaxies", "galaxies", groups=groups, where=where)


def _ranked(score: np.ndarray) -> np.ndarray:
    """Positions of the `LISTED` largest finite scores."""
    order = np.argsort(-score, kind="stable")
    return order[np.isfinite(score[order])][:LISTED]


def spread_evenly(values: Sequence, maximum: int) -> list:
    """At most `maximum` of the values, the first and the last among them."""
    if len(values) <= maximum:
        return list(values)
    return [values[i] for i in np.linspace(0, len(values) - 1, maximum).round().astype(int)]

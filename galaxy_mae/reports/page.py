"""The sections that show galaxies with their predictions, and the page of a catalogue.

What is not there is left out: without embeddings there is no map, without images there are names alone, without labels
there is no confusion matrix. The page of an evaluation (`evaluation_page.py`) has the same sections.
"""

import shlex
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from galaxy_mae.errors import UserError
from galaxy_mae.evaluation.scores import accuracy, per_class_estimates, percent
from galaxy_mae.files import check_output
from galaxy_mae.predictions.formats import read_catalogue
from galaxy_mae.predictions.neighbors import knn_distance, neighbors, whiten
from galaxy_mae.predictions.schema import Predictions, column_names
from galaxy_mae.reports.document import Section, Table, as_percent, write_page

MAX_GALAXIES = 3000  # of a test set or a catalogue; of more the page shows a sample
LISTED = 8  # galaxies of a list
_NEIGHBORS = 6  # of each
_MAX_RANKED = 20_000  # galaxies whose oddity is computed: the time grows with the square of the number
PER_CLASS_NOTE = (
    "Means over seeds with 95 % intervals, which include the number of galaxies and the spread of the seeds. A dash: "
    "there is no galaxy to judge by."
)


@dataclass(frozen=True)
class GalaxySections:
    """The sections on N galaxies.

    Attributes:
        predictions: N usable galaxies.
        shown: (M,) int64, increasing: the positions of the galaxies of map and cells.
        listed: (L,) int64, increasing, with all of `shown`: the positions of those that lists choose from.
        embedding: (L, D) float32, of `listed`; None without map and neighbors.
        training: with labels and embeddings; its galaxies are the neighbors. None looks for them among `listed`.
        method: that predicted, for notes; empty for the model of a catalogue.
        lines: by the row of each galaxy on the page, what stands below its image.
    """

    predictions: Predictions
    shown: np.ndarray
    listed: np.ndarray
    embedding: np.ndarray | None
    training: Predictions | None = None
    method: str = ""
    lines: dict[int, list[str]] = field(default_factory=dict)

    def add(self, i: int, training: bool = False) -> int:
        """Put the galaxy, or training galaxy, at a position on the page, if it is not there. Returns its row."""
        p = self.training if training else self.predictions
        lines = [str(p.object_id[i])]
        if p.label is not None:
            lines.append(f"class: {p.class_names[p.label[i]]}")
        if training:
            lines.append("training set")
        elif p.probabilities is not None:
            c = p.probabilities[i].argmax()
            lines.append(f"predicted: {p.class_names[c]}, {as_percent(p.probabilities[i, c])}")
        self.lines.setdefault(row := int(p.row[i]), lines)
        return row

    @cached_property
    def rows(self) -> dict[int, int]:
        """The rows of the shown galaxies by their positions."""
        return {i: self.add(i) for i in self.shown.tolist()}

    def map(self, note: str, max_training: int = 0) -> list[Section]:
        """The map of the shown galaxies, and of so many training galaxies, if there are embeddings."""
        from galaxy_mae.reports.galaxy_map import map_block  # Bokeh is slow to import

        p, training = self.predictions, self.training
        if self.embedding is None or len(self.shown) < 2:
            return []
        embedding, rows = self.embedding[np.searchsorted(self.listed, self.shown)], list(self.rows.values())
        label = None if p.label is None else p.label[self.shown]
        predicted = None if p.probabilities is None else p.probabilities[self.shown].argmax(axis=1)
        if training is not None:
            picked = sample(len(training), max_training)
            embedding = np.concatenate([embedding, training.embedding[picked]])
            rows += [self.add(i, training=True) for i in picked]
            label = np.concatenate([label, training.label[picked]])
            predicted = np.concatenate([predicted, np.full(len(picked), -1)])
        text = ["\n".join(self.lines[row]) for row in rows]
        judged = np.arange(len(rows)) < len(self.shown)
        block = map_block(embedding, rows, text, judged, p.class_names, label, predicted, note)
        return [Section("The map", [block], "map")]

    def confusion(self, title: str, matrices: dict[str, Predictions]) -> list[Section]:
        """Confusion matrices of several predictions of these galaxies by their titles; the first is open."""
        matrices = {key: p for key, p in matrices.items() if p.label is not None and p.predicted is not None}
        if not matrices:
            return []
        note = "Rows are true classes, columns predicted ones, numbers % of the true class. A cell opens its galaxies."
        blocks = [_matrix(key, p, self.rows) | {"open": i == 0} for i, (key, p) in enumerate(matrices.items())]
        return [Section(title, [note, blocks[0], PER_CLASS_NOTE, *blocks[1:]], "confusion")]

    def lists(self, where: str) -> list[Section]:
        """The most confidently wrong, the least certain and the oddest galaxies; their neighbors are from `where`."""
        p, blocks = self.predictions, []
        by, of_method = (f", by {self.method}", f" of {self.method}") if self.method else ("", "")
        if p.probabilities is not None:
            probabilities = p.probabilities[self.listed]
            if p.label is not None:
                is_wrong = probabilities.argmax(axis=1) != p.label[self.listed]
                wrong = np.where(is_wrong, probabilities.max(axis=1), -np.inf)
                note = f"The largest probabilities of another class than the label{by}."
                blocks += self._list("Most confidently wrong", note, wrong, "", where)
            if len(p.class_names) > 1:
                note = f"The largest entropy of the probabilities{of_method}."
                blocks += self._list("Least certain", note, p.entropy[self.listed], "entropy {:.2f} nats", where)
        if (distance := self._distances()) is not None:
            count = int(np.isfinite(distance).sum())
            note = "The largest mean distance to the five nearest galaxies, in whitened embeddings"
            note += "." if count == len(distance) else f", of a random sample of {count:,} galaxies."
            blocks += self._list("Oddest", note, distance, "distance {:.1f}", where)
        return [Section("Galaxies", blocks, "galaxies")] if blocks else []

    def _list(self, title: str, note: str, score: np.ndarray, number_note: str, where: str) -> list[dict[str, Any]]:
        """The galaxies with the largest finite scores, (L,) float, and their nearest neighbors."""
        order = np.argsort(-score, kind="stable")
        order = order[np.isfinite(score[order])][:LISTED]
        if not len(order):
            return []
        items = [
            {"tile": [self.add(self.listed[i]), number_note.format(score[i])], "near": [[row] for row in near]}
            for i, near in zip(order, self._near(order), strict=True)
        ]
        note += f" After each: its nearest neighbors in {where}." if items[0]["near"] else ""
        return [{"kind": "galaxies", "title": title, "note": note, "galaxies": items, "where": where}]

    def _near(self, order: np.ndarray) -> list[list[int]]:
        """The rows of the nearest other galaxies of each of some `listed` ones."""
        if self.embedding is None:
            return [[] for _ in order]
        if self.training is not None:
            found, _ = neighbors(self.training.embedding, self.embedding[order], _NEIGHBORS)
            return [[self.add(j, training=True) for j in near] for near in found]
        found, _ = neighbors(self.embedding, self.embedding[order], _NEIGHBORS + 1)
        others = ([j for j in near if j != i][:_NEIGHBORS] for i, near in zip(order, found, strict=True))
        return [[self.add(j) for j in self.listed[near]] for near in others]

    def _distances(self) -> np.ndarray | None:
        """Mean distances of `listed` to the nearest galaxies, (L,), -inf beyond a sample; None if nothing is known."""
        if self.embedding is None:
            return None
        among, distance = sample(len(self.embedding), _MAX_RANKED), np.full(len(self.embedding), -np.inf)
        others = [] if self.training is None else [self.training.embedding]
        try:
            found = knn_distance(whiten(np.concatenate([self.embedding[among], *others])))
        except UserError:  # all embeddings are equal
            return None
        distance[among] = found[: len(among)]
        return distance


def sample(count: int, maximum: int) -> np.ndarray:
    """Positions 0 to `count` - 1 in order, or a random sample of `maximum` of them; int64."""
    return np.sort(np.random.default_rng(0).permutation(count)[:maximum])


def per_class_table(predictions: Predictions) -> Table:
    """Precision, recall and F1 of every class with intervals."""
    names = predictions.class_names
    estimates = per_class_estimates(predictions.label, predictions.predicted, len(names))
    counts = np.bincount(predictions.label, minlength=len(names))
    rows = [
        (name, *(percent(x) if x else "-" for x in scores), f"{count:,}")
        for name, scores, count in zip(names, estimates, counts, strict=True)
    ]
    header = ("Class", "Precision (95 % interval)", "Recall (95 % interval)", "F1 (95 % interval)", "Galaxies")
    return Table(header, rows)


def _matrix(title: str, p: Predictions, rows: dict[int, int]) -> dict[str, Any]:
    """A confusion matrix, each cell with its galaxies of `rows`, whose keys are positions, the most confident first."""
    seeds, cells = len(p.predicted), []
    for true, guess in np.ndindex(len(p.class_names), len(p.class_names)):
        votes, probability = ((p.predicted == guess) & (p.label == true)).sum(axis=0), p.probabilities[:, guess]
        found = np.flatnonzero(votes)
        found = [i for i in found[np.argsort(-probability[found], kind="stable")].tolist() if i in rows]
        notes = (f"here: {as_percent(probability[i])}, {votes[i]} of {seeds} seeds" if seeds > 1 else "" for i in found)
        count, total = int(votes.sum()), seeds * int(np.sum(p.label == true))
        cells.append(
            {
                "count": f"{count:,} of {total:,} predictions",
                "percent": f"{100 * count / max(1, total):.0f}",
                "alpha": f"{0.75 * (count / max(1, total)):.2f}",  # of the color behind the number, which stays legible
                "galaxies": [[rows[i], note] for i, note in zip(found, notes, strict=True)],
            }
        )
    lines = [cells[i : i + len(p.class_names)] for i in range(0, len(cells), len(p.class_names))]
    return {"kind": "matrix", "title": title, "classes": p.class_names, "rows": lines, "per_class": per_class_table(p)}


def page(options: Namespace) -> None:
    """Write the page of a catalogue: `python -m galaxy_mae.catalogue page CATALOGUE`."""
    catalogue = options.catalogue
    path = options.output or catalogue.parent / f"{catalogue.stem}.html"
    how = {"overwrite": options.overwrite, "replace_own": options.output is None, "inputs": [catalogue]}
    check_output(path, "--output", (".html", ".htm"), **how)
    everything = read_catalogue(catalogue)
    about, names = everything.about, everything.about.get("class_names", ())
    everything.check(catalogue, {"row", "object_id", *(["entropy", *column_names(names)] if names else [])})
    galaxies, missing = everything.open_images(catalogue, options.dataset)
    alerts = [f"{about['unlike'][:500]}."] if about.get("unlike") else []
    alerts += [f"Without images: {missing}."] if missing else []
    usable = everything.only_usable()
    if not len(usable):
        raise UserError(f"{catalogue}: it has no readable galaxy that is not blank")
    count, shown = len(usable), sample(len(usable), MAX_GALAXIES)
    embedding = usable.embedding if usable.embedding is not None and np.isfinite(usable.embedding).all() else None
    if everything.left_out:
        alerts.append(f"Left out: {everything.left_out}.")
    if usable.other_labels:
        alerts.append(f"The labels are not compared: the model has no class {', '.join(usable.other_labels)}.")
    if embedding is None:
        alerts.append(
            "Without map and neighbors: the catalogue has no embeddings (predict --embeddings adds them), or some are "
            "not finite."
        )
    if len(shown) < count:
        alerts.append(
            f"Map and cells show a random sample of {len(shown):,} of the {count:,} galaxies; all numbers are of all "
            "galaxies."
        )
    parts = GalaxySections(usable, shown, np.arange(count), embedding)
    sections = [
        *_overview(usable),
        *parts.map("Embeddings of the catalogue's model."),
        *parts.confusion("Confusion matrix", {"Labels and predicted classes": usable}),
        *parts.lists("the catalogue"),
        foot({"catalogue": str(catalogue)} | about, ["python", "-m", "galaxy_mae.catalogue", "page", str(catalogue)]),
    ]
    described = [
        f"{len(everything):,} galaxies of {about['dataset']}, by the model {about['model']['name']}.",
        f"Computed {about['created'][:16].replace('T', ' ')} UTC.",
    ]
    pixels = galaxies and galaxies.pixels
    write_page(path, f"Catalogue {catalogue.name}", described, alerts, sections, parts.lines, pixels)
    print(f"page: {path}")


def _overview(usable: Predictions) -> list[Section]:
    """How many galaxies are in each class, and the accuracy if there are labels."""
    predicted = None if usable.predicted is None else usable.probabilities.argmax(axis=1)
    header, columns, blocks = ["Class"], [usable.class_names], []
    for title, classes in (("Galaxies with this label", usable.label), ("Galaxies predicted", predicted)):
        if classes is not None:
            header.append(title)
            columns.append([f"{n:,}" for n in np.bincount(classes, minlength=len(usable.class_names))])
    if usable.label is not None and predicted is not None:
        blocks.append(
            f"Of the {len(usable):,} galaxies {percent(accuracy(usable.label, predicted[None]))} are in the "
            "predicted class. The model may have been trained on some of them: linear_probe_checkpoints.py evaluates "
            "it on others."
        )
    blocks.append(Table(header, list(zip(*columns, strict=True))))
    return [Section("Classes", blocks, "classes")] if len(columns) > 1 else []


def foot(about: Mapping[str, Any], command: Sequence[str]) -> Section:
    """What the numbers come from, and the command that repeats them."""
    entries = []
    for key, value in about.items():
        if isinstance(value, dict):
            value = [f"{name} {x}" for name, x in value.items() if x is not None]
        text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        entries += [(key.replace("_", " ").capitalize(), text)] if value not in (None, []) else []
    return Section("How this was made", [{"kind": "foot", "entries": entries, "command": shlex.join(command)}], "foot")

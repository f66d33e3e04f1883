"""Every picture of the project. Each function writes one PNG, whole, and returns nothing."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # clusters have no display
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from galaxy_mae.atomic import atomic_file
from galaxy_mae.scores import Estimate
from galaxy_mae.sources import Galaxies

_MOST_CLASSES = 40  # of a contact sheet: more make a picture that nobody can open


def contact_sheet(galaxies: Galaxies, path: Path, columns: int = 8, seed: int = 0) -> None:
    """Draw a row of random galaxies for each class (or four rows where there are no classes)."""
    rng = np.random.default_rng(seed)
    if galaxies.label is None:
        chosen = rng.permutation(len(galaxies))[: 4 * columns]
        rows = [(f"{len(galaxies):,} images", part) for part in np.array_split(chosen, max(1, len(chosen) // columns))]
    else:
        rows = [
            (f"{c} {name}\n{np.sum(galaxies.label == c):,}", rng.permutation(np.flatnonzero(galaxies.label == c)))
            for c, name in enumerate(galaxies.class_names)
            if np.any(galaxies.label == c)
        ][:_MOST_CLASSES]
    figure, axes = plt.subplots(
        len(rows), columns, layout="constrained", figsize=(1.4 * columns + 2, 1.4 * len(rows)), squeeze=False
    )
    for line, (title, members) in zip(axes, rows, strict=True):
        for axis, row in zip(line, members[:columns], strict=False):
            axis.imshow(galaxies.pixels[row])
        line[0].set_ylabel(title, rotation=0, ha="right", va="center", fontsize=10)
    _finish(figure, axes, path)


def reconstructions(
    path: Path,
    original: np.ndarray,
    prediction: np.ndarray,
    masked: np.ndarray,
    names: Sequence[str],
    title: str,
) -> None:
    """Draw what a masked autoencoder saw and made of it, one galaxy a column.

    Args:
        path: the PNG to write.
        original, prediction: (B, S, S, 3) float in 0 to 1.
        masked: (B, S, S) bool, true where the encoder saw nothing.
        names: a name for each column.
        title: over the whole picture.
    """
    original, prediction = original.clip(0, 1), prediction.clip(0, 1)
    rows = {
        "original": original,
        "what the encoder saw": masked_out(original, masked),
        "reconstruction\n(visible patches pasted)": pasted(original, prediction, masked),
        "error\n(mean over colours)": np.where(masked, np.abs(prediction - original).mean(axis=-1), 0),
    }
    figure, axes = plt.subplots(
        len(rows), len(names), layout="constrained", figsize=(1.6 * len(names) + 2, 1.65 * len(rows)), squeeze=False
    )
    for line, (label, images) in zip(axes, rows.items(), strict=True):
        for axis, image in zip(line, images, strict=True):
            shown = axis.imshow(image, cmap="magma", vmin=0, vmax=0.3)  # colour map and limits apply to the error alone
        line[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=9)
    for axis, name in zip(axes[0], names, strict=True):
        axis.set_title(textwrap.fill(name, 14), fontsize=9)
    figure.suptitle(title, fontsize=10)
    figure.colorbar(shown, ax=axes, shrink=0.9 / len(rows), anchor=(0, 0.02), pad=0.01, label="error, 0 to 1")
    _finish(figure, axes, path)


def masked_out(original: np.ndarray, masked: np.ndarray) -> np.ndarray:
    """Images (B, S, S, 3) with grey where `masked` (B, S, S)."""
    return np.where(masked[..., None], 0.35, original)


def pasted(original: np.ndarray, prediction: np.ndarray, masked: np.ndarray) -> np.ndarray:
    """The prediction where `masked` (B, S, S), the original elsewhere: (B, S, S, 3)."""
    return np.where(masked[..., None], prediction, original)


def reconstructions_by_cell(
    path: Path,
    original: np.ndarray,
    seen: Sequence[np.ndarray],
    painted: Sequence[np.ndarray],
    names: Sequence[str],
    cells: Sequence[str],
) -> None:
    """Draw what several autoencoders saw and made of the same galaxies: a cell a column, two lines a galaxy.

    Args:
        path: the PNG to write.
        original: (B, S, S, 3) float in 0 to 1.
        seen, painted: for each cell (B, S, S, 3), of that cell's image size.
        names: of the galaxies.
        cells: names of the cells.
    """
    columns = 1 + len(cells)
    figure, axes = plt.subplots(
        2 * len(names),
        columns,
        layout="constrained",
        figsize=(1.6 * columns + 1, 3.2 * len(names) + 0.5),
        squeeze=False,
    )
    for galaxy, name in enumerate(names):
        upper, lower = axes[2 * galaxy : 2 * galaxy + 2]
        upper[0].imshow(original[galaxy].clip(0, 1))
        lower[0].imshow(np.ones_like(original[galaxy]))
        upper[0].set_ylabel(textwrap.fill(name, 14), rotation=0, ha="right", va="center", fontsize=9)
        for column, (saw, made) in enumerate(zip(seen, painted, strict=True), start=1):
            upper[column].imshow(saw[galaxy].clip(0, 1))
            lower[column].imshow(made[galaxy].clip(0, 1))
    for axis, name in zip(axes[0], ("original", *cells), strict=True):
        axis.set_title(textwrap.fill(name, 16), fontsize=9)
    figure.suptitle("What each cell's encoder saw, and the reconstruction below it", fontsize=10)
    _finish(figure, axes, path)


def search_accuracies(
    path: Path, cells: Sequence[str], accuracies: dict[str, Sequence[Estimate | None]], parameter: str
) -> None:
    """Draw accuracies over the cells of a search, with their 95 % intervals; cells without one are said to be missing.

    Args:
        path: the PNG to write.
        cells: their values, as text, from left to right.
        accuracies: by the name of the classifier, as many as cells; None where a cell is not finished.
        parameter: what is searched.
    """
    figure, axis = plt.subplots(layout="constrained", figsize=(max(5, 0.9 * len(cells) + 2), 3.6))
    for shift, (name, estimates) in zip((-0.06, 0.06), accuracies.items(), strict=True):
        there = [(place + shift, estimate) for place, estimate in enumerate(estimates) if estimate]
        if there:
            value, low, high = (
                np.array([100 * getattr(e, part) for _, e in there]) for part in ("value", "low", "high")
            )
            places = [place for place, _ in there]
            axis.errorbar(places, value, yerr=[value - low, high - value], marker="o", capsize=3, label=name)
    for place in range(len(cells)):
        if not any(estimates[place] for estimates in accuracies.values()):
            axis.text(
                place, 0.5, "unfinished", transform=axis.get_xaxis_transform(), rotation=90, ha="center", color="0.4"
            )
    axis.set(xticks=range(len(cells)), xticklabels=cells, xlabel=parameter, xlim=(-0.5, len(cells) - 0.5))
    axis.set_ylabel("validation accuracy in %, 95 % intervals")
    if len(max(cells, key=len)) > 12:
        axis.tick_params(axis="x", rotation=30)
    axis.legend()
    axis.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def _finish(figure: Figure, axes: np.ndarray, path: Path) -> None:
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        for spine in axis.spines.values():
            spine.set_visible(False)
    _save(figure, path)


def accuracy_bars(
    path: Path, names: Sequence[str], estimates: Sequence[Estimate | None], pretrained: Sequence[bool], chance: float
) -> None:
    """Draw accuracies as bars with their 95 % intervals; a missing one is said to be missing.

    Args:
        path: the PNG to write.
        names: of the methods, from top to bottom.
        estimates: as many; None where there is no result.
        pretrained: whether a method starts from pre-trained weights; chooses the colour.
        chance: accuracy of guessing, drawn as a line.
    """
    figure, axis = plt.subplots(layout="constrained", figsize=(8, 0.6 * len(names) + 1))
    for place, (estimate, ssl) in enumerate(zip(estimates, pretrained, strict=True)):
        if estimate is None:
            axis.text(1, place, "missing", va="center", color="0.4", style="italic")
            continue
        value, low, high = (100 * x for x in (estimate.value, estimate.low, estimate.high))
        colour = "tab:blue" if ssl else "0.65"
        axis.barh(place, value, xerr=[[value - low], [high - value]], color=colour, capsize=4, height=0.65)
        axis.text(high + 1, place, f"{value:.1f}", va="center")
    axis.axvline(100 * chance, color="tab:red", linestyle=":", linewidth=1)
    axis.annotate(
        "chance",
        (100 * chance, 1),
        (3, 3),
        xycoords=("data", "axes fraction"),
        textcoords="offset points",
        color="tab:red",
        fontsize=9,
    )
    axis.set(yticks=range(len(names)), yticklabels=names, xlim=(0, 100), xlabel="test accuracy in %, 95 % intervals")
    axis.invert_yaxis()
    axis.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def confusion_matrix(path: Path, counts: np.ndarray, names: Sequence[str], title: str) -> None:
    """Draw a confusion matrix: rows are true classes and add up to 100 %, columns are predicted ones.

    Args:
        path: the PNG to write.
        counts: (classes, classes) galaxies.
        names: of the classes.
        title: over the picture.
    """
    totals = counts.sum(axis=1, keepdims=True)
    shares = 100 * counts / totals.clip(1)
    side = 0.62 * len(names) + 2.5
    figure, axis = plt.subplots(layout="constrained", figsize=(side, side))
    axis.imshow(shares, cmap="Blues", vmin=0, vmax=100)
    for row, column in np.ndindex(shares.shape):
        colour = "white" if shares[row, column] > 55 else "black"
        axis.text(column, row, f"{shares[row, column]:.0f}", ha="center", va="center", color=colour, fontsize=9)
    axis.set(xticks=range(len(names)), yticks=range(len(names)), xlabel="predicted class", ylabel="true class")
    axis.set_xticklabels(names, rotation=45, ha="right", rotation_mode="anchor")
    axis.set_yticklabels(names)
    axis.set_title(f"{title}\n% of the true class", fontsize=10)
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    with atomic_file(path) as aside:
        figure.savefig(aside, dpi=110, bbox_inches="tight")
    plt.close(figure)

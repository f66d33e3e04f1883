"""The figures of training, evaluation and sweeps: every figure is drawn here, for paper and page.

Each function draws one PNG to `path`, where it appears atomically, or to an open file.
"""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from galaxy_mae.files import atomic_file

Interval = tuple[float, float, float]  # a value and the ends of its 95 % interval, as fractions of 1
Target = Path | IO[bytes]  # of a PNG

_COLORS = {"random": ("0.5", "random weights"), "ssl": ("tab:blue", "SSL weights")}
_LAYER_PROBES = {"linear_probe": "linear probe", "knn": "k-NN"}
_GRAY = 0.35  # of masked patches
_FEW = 40  # points of a curve that get markers
_MAX_CLASSES = 40  # of a contact sheet; with more the figure is too large to open
_SHEET_COLUMNS = 7  # of ranked galaxies: images per line
_CAPTION_WIDTH, _HALF_CAPTION = 23, 11  # characters per line of a caption; of each end of a long one


def contact_sheet(path: Target, pixels: np.ndarray, label: np.ndarray | None, class_names: Sequence[str]) -> None:
    """Plot one row of random galaxies, (N, S, S, 3) uint8, per class, or four rows if there are no (N,) labels."""
    rng, columns = np.random.default_rng(0), 8
    if label is None:
        members = np.array_split(rng.permutation(len(pixels))[: 4 * columns], min(4, max(1, len(pixels) // columns)))
        titles = [f"{len(pixels):,} images"] * len(members)
    else:
        classes = [c for c in range(len(class_names)) if np.any(label == c)]
        members = [rng.permutation(np.flatnonzero(label == c)) for c in classes][:_MAX_CLASSES]
        titles = [f"{c} {class_names[c]}\n{np.sum(label == c):,}" for c in classes][:_MAX_CLASSES]
    lines = [[pixels[index] for index in part[:columns]] for part in members]
    figure, _ = _image_grid(lines, 1.4, titles)
    _save(figure, path)


def ranked_galaxies(
    path: Target, rankings: Sequence[Sequence[tuple[np.ndarray, Sequence[str]]]], title: str, query_first: bool = False
) -> None:
    """Plot galaxies in the order of one or several rankings, seven per line, with captions below them.

    Args:
        rankings: of each galaxy its (S, S, 3) uint8 image and the lines of its caption. Each ranking begins a line.
        query_first: whether the first galaxy of a ranking is the one that was asked for; it gets a frame.
    """
    columns = _SHEET_COLUMNS
    lines = [ranking[i : i + columns] for ranking in rankings for i in range(0, len(ranking), columns)]
    captions = max(len(caption) for line in lines for _, caption in line)
    figure, axis = _image_grid([[image for image, _ in line] for line in lines], 1.5, space=0.09 * captions)
    for y, line in enumerate(lines):
        for x, (_, caption) in enumerate(line):
            # Names of files and objects differ at their ends, so that the middle of a long one is left out.
            short = (x if len(x) <= _CAPTION_WIDTH else f"{x[:_HALF_CAPTION]}…{x[-_HALF_CAPTION:]}" for x in caption)
            at = x + 0.48, y * (1 + 0.09 * captions) + 1
            axis.text(*at, "\n".join(short), ha="center", va="top", fontsize=7, linespacing=1.3, parse_math=False)
    for start in np.cumsum([0, *(-(-len(ranking) // columns) for ranking in rankings)])[:-1] if query_first else ():
        corner = 0, start * (1 + 0.09 * captions)
        frame = Rectangle(corner, 0.96, 0.96, fill=False, color="tab:orange", linewidth=5)
        axis.add_patch(frame).set_clip_on(False)
    figure.suptitle(textwrap.fill(title, 110), fontsize=10, parse_math=False)
    _save(figure, path)


def reconstructions(
    path: Target,
    original: np.ndarray,
    prediction: np.ndarray,
    masked: np.ndarray,
    names: Sequence[str],
    title: str,
) -> None:
    """Plot original, visible patches, reconstruction and error, one named galaxy per column.

    Args:
        original, prediction: (B, S, S, 3) float in 0 to 1.
        masked: (B, S, S) bool, true in masked patches.
    """
    original, prediction = original.clip(0, 1), prediction.clip(0, 1)
    rows = {
        "original": original,
        "visible patches": np.where(masked[..., None], _GRAY, original),
        "reconstruction of the\nmasked patches": np.where(masked[..., None], prediction, original),
        "absolute error\n(mean over colors)": np.where(masked, np.abs(prediction - original).mean(axis=-1), 0),
    }
    figure, axis = _image_grid(list(rows.values()), 1.6, list(rows), names)
    figure.suptitle(title, fontsize=10, parse_math=False)
    options = {"shrink": 0.9 / len(rows), "anchor": (0, 0.02), "pad": 0.01, "label": "error, 0 to 1"}
    figure.colorbar(axis.images[-1], ax=axis, **options)
    _save(figure, path)


def sweep_accuracies(
    path: Target, trials: Sequence[str], accuracies: dict[str, Sequence[Interval | None]], parameter: str
) -> None:
    """Plot accuracies of each classifier over the trials of a sweep, and mark unfinished trials, which are None."""
    figure, ((axis,),) = _grid(1, 1, max(5, 0.9 * len(trials) + 2), 3.6)
    for shift, (name, estimates) in zip((-0.06, 0.06), accuracies.items(), strict=True):
        positions = [position + shift for position, estimate in enumerate(estimates) if estimate]
        if positions:
            value, low, high = 100 * np.array([estimate for estimate in estimates if estimate]).T
            axis.errorbar(positions, value, yerr=[value - low, high - value], marker="o", capsize=3, label=name)
    for position in range(len(trials)):
        if not any(estimates[position] for estimates in accuracies.values()):
            at = {"transform": axis.get_xaxis_transform(), "rotation": 90, "ha": "center"}
            axis.text(position, 0.5, "unfinished", color="0.4", **at)
    axis.set(xticks=range(len(trials)), xticklabels=trials, xlabel=parameter, xlim=(-0.5, len(trials) - 0.5))
    axis.set_ylabel("validation accuracy in %, 95 % intervals")
    if len(max(trials, key=len)) > 12:
        axis.tick_params(axis="x", rotation=30)
    axis.legend()
    _save(figure, path)


def accuracy_bars(
    path: Target, names: Sequence[str], estimates: Sequence[Interval | None], pretrained: Sequence[bool], chance: float
) -> None:
    """Plot accuracies of methods with their 95 % intervals, and mark missing results, which are None.

    Whether a method starts from pre-trained weights selects the color. A line is the accuracy of guessing.
    """
    figure, ((axis,),) = _grid(1, 1, 8, 0.6 * len(names) + 1)
    for position, (estimate, ssl) in enumerate(zip(estimates, pretrained, strict=True)):
        if estimate is None:
            axis.text(1, position, "missing", va="center", color="0.4", style="italic")
            continue
        value, low, high = (100 * x for x in estimate)
        color = "tab:blue" if ssl else "0.65"
        axis.barh(position, value, xerr=[[value - low], [high - value]], color=color, capsize=4, height=0.65)
        axis.text(high + 1, position, f"{value:.1f}", va="center")
    axis.axvline(100 * chance, color="tab:red", linestyle=":", linewidth=1)
    at = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points"}
    axis.annotate("chance", (100 * chance, 1), (3, 3), **at, color="tab:red", fontsize=9)
    axis.set(yticks=range(len(names)), yticklabels=names, xlim=(0, 100), xlabel="test accuracy in %, 95 % intervals")
    axis.invert_yaxis()
    _save(figure, path)


def layer_accuracies(path: Target, accuracies: dict[str, dict[str, Sequence[float]]]) -> None:
    """Plot validation accuracies of `linear_probe` and `knn` at every layer, for `random`, `ssl` or both."""
    figure, ((axis,),) = _grid(1, 1, 6, 4.2)
    for initialization, by_probe in accuracies.items():
        color, weights = _COLORS[initialization]
        for (name, title), style in zip(_LAYER_PROBES.items(), ("-o", "--s"), strict=True):
            layers = range(1, len(by_probe[name]) + 1)
            axis.plot(layers, 100 * np.array(by_probe[name]), style, color=color, label=f"{title}, {weights}")
    axis.set(xlabel="layer", ylabel="validation accuracy in %")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(loc="outside lower center", ncols=2, fontsize=9, frameon=False)
    _save(figure, path)


def label_efficiency(path: Target, panels: dict[str, dict[str, tuple[Sequence[int], Sequence[Interval]]]]) -> None:
    """Plot test accuracies over numbers of training labels with bands of 95 %, a panel per classifier."""
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    figure, axes = _grid(lines, columns, 4.2 * columns, 3.6 * lines, sharex=True, sharey=True)
    numbers = sorted({number for curves in panels.values() for labels, _ in curves.values() for number in labels})
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (title, curves) in zip(axes.flat, panels.items(), strict=False):
        for initialization, (labels, estimates) in curves.items():
            color, weights = _COLORS[initialization]
            value, low, high = 100 * np.array(estimates).T
            axis.plot(labels, value, "-o", color=color, label=weights)
            axis.fill_between(labels, low, high, color=color, alpha=0.2, linewidth=0)
        axis.set(xscale="log", xlabel="training labels", title=textwrap.fill(title, 38))
        axis.set_xticks(numbers, [f"{number:,}" for number in numbers])
        axis.tick_params(labelbottom=True)  # also above a panel that is left out
        axis.minorticks_off()
        axis.legend(fontsize=9)
    for axis in axes[:, 0]:
        axis.set_ylabel("test accuracy in %, 95 % intervals")
    _save(figure, path)


def training_curves(
    path: Target, panels: Sequence[tuple[str, dict[str, tuple[Sequence[float], Sequence[float]]]]]
) -> None:
    """Plot epochs and values by title over the epochs of a training, a named panel below the other.

    The axis is logarithmic for a loss above 0.
    """
    figure, axes = _grid(len(panels), 1, 8, 2.8 * len(panels), sharex=True)
    for axis, (y_label, curves) in zip(axes[:, 0], panels, strict=True):
        for title, (x, y) in curves.items():
            axis.plot(x, y, "-o" if len(x) <= _FEW else "-", markersize=4, label=title)
        positive = all(min(y) > 0 for _, y in curves.values())
        axis.set(ylabel=y_label, yscale="log" if y_label == "loss" and positive else "linear")
        axis.legend(fontsize=9)
    axes[-1, 0].set_xlabel("epoch")
    _save(figure, path)


def confusion_matrix(path: Target, counts: np.ndarray, names: Sequence[str], title: str) -> None:
    """Plot a confusion matrix of (classes, classes) galaxies. Rows are true classes and sum to 100 %."""
    from sklearn.metrics import ConfusionMatrixDisplay  # slow to import

    percentages = 100 * counts / counts.sum(axis=1, keepdims=True).clip(1)
    side = 0.62 * len(names) + 2.5
    figure, ((axis,),) = _grid(1, 1, side, side)
    options = {"values_format": ".0f", "im_kw": {"vmin": 0, "vmax": 100}, "text_kw": {"fontsize": 9}}
    ConfusionMatrixDisplay(percentages).plot(cmap="Blues", colorbar=False, ax=axis, **options)
    axis.set(xlabel="predicted class", ylabel="true class")
    axis.set_xticklabels(names, rotation=45, ha="right", rotation_mode="anchor", parse_math=False)
    axis.set_yticklabels(names, parse_math=False)  # a name may hold dollar signs
    axis.spines[:].set_visible(True)
    axis.set_title(f"{title}\n% of the true class", fontsize=10)
    _save(figure, path)


def reliability_diagrams(
    path: Target, panels: dict[str, Sequence[dict[str, float]]], number_of_bins: int, title: str
) -> None:
    """Plot accuracy over confidence, and below it how many galaxies have this confidence, one column per panel.

    Args:
        panels: for each title the bins that are not empty: `bin` (from 0), `galaxies`, `confidence`, `accuracy`.
        number_of_bins: of equal width, between 0 and 1.
    """
    options = {"height_ratios": (3, 1), "sharex": True, "sharey": "row"}
    figure, axes = _grid(2, len(panels), 4 * len(panels), 5.4, **options)
    for (upper, lower), (name, bins) in zip(axes.T, panels.items(), strict=True):
        left = [b["bin"] / number_of_bins for b in bins]
        bars = {"width": 1 / number_of_bins, "align": "edge", "edgecolor": "white", "linewidth": 0.5}
        upper.bar(left, [b["accuracy"] for b in bins], color="tab:blue", label="accuracy", **bars)
        confidences = [b["confidence"] for b in bins]
        upper.plot(confidences, confidences, "_", color="tab:red", markersize=9, markeredgewidth=2, label="confidence")
        upper.plot([0, 1], [0, 1], color="0.5", linestyle=":", linewidth=1, label="calibrated")
        lower.bar(left, [b["galaxies"] for b in bins], color="0.65", **bars)
        upper.set(xlim=(0, 1), ylim=(0, 1), title=name)
        lower.set(xlabel="confidence (probability of the predicted class)")
    axes[0, 0].set_ylabel("accuracy")
    axes[1, 0].set_ylabel("galaxies")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(title, fontsize=10)
    _save(figure, path)


def _image_grid(
    lines: Sequence[Sequence[np.ndarray]],
    inches: float,
    labels: Sequence[str] = (),
    titles: Sequence[str] = (),
    space: float = 0.0,
) -> tuple[Figure, Axes]:
    """A figure of lines of images, (S, S, 3), or of errors, (S, S) float, and its axes, in units of an image.

    All images are in the same axes, because layout and drawing take ten times as long with one for each. `inches` is
    the size of an image, `space` what is free below each line.
    """
    columns, height = max(map(len, lines)), len(lines) * (1 + space)
    figure, ((axis,),) = _grid(1, 1, inches * columns + 2, inches * height + 0.6)
    for y, images in enumerate(lines):
        for x, image in enumerate(images):
            top = y * (1 + space)  # color map and limits apply to errors alone
            axis.imshow(image, cmap="magma", vmin=0, vmax=0.3, extent=(x, x + 0.96, top + 0.96, top))
    for y, label in enumerate(labels):
        axis.text(-0.05, y * (1 + space) + 0.48, label, ha="right", va="center", fontsize=9, parse_math=False)
    for x, title in enumerate(titles):
        axis.text(x + 0.48, -0.05, textwrap.fill(title, 15), ha="center", va="bottom", fontsize=9, parse_math=False)
    axis.set(xlim=(0, columns), ylim=(height, 0))
    axis.set_axis_off()
    return figure, axis


def _grid(rows: int, columns: int, width: float, height: float, **options) -> tuple[Figure, np.ndarray]:
    """A figure of so many inches and its (rows, columns) axes. It is not pyplot's, which is the reader's notebook's."""
    with matplotlib.rc_context({"axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure((width, height), layout="constrained")
        return figure, figure.subplots(rows, columns, squeeze=False, **options)


def _save(figure: Figure, path: Target) -> None:
    options = {"dpi": 110, "bbox_inches": "tight", "format": "png", "metadata": {"Software": "galaxy_mae"}}
    if isinstance(path, Path):
        with atomic_file(path) as tmp_path:
            figure.savefig(tmp_path, **options)
    else:
        figure.savefig(path, **options)

"""The map of a page: embeddings in two dimensions, an interactive plot by Bokeh.

Colors are those of Okabe and Ito (2008, "Color universal design"), which the color-blind tell apart; classes also
differ by their markers.
"""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from bokeh.models import ColumnDataSource, CustomJS, HoverTool, Model
from bokeh.plotting import figure

from galaxy_mae.reports.document import as_percent

_NEIGHBORS = 15  # of UMAP, its default
_COLORS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442")
_MARKERS = {  # Bokeh's, and their paths in the legend
    "circle": "M-6 0a6 6 0 1 0 12 0a6 6 0 1 0 -12 0",
    "square": "M-5 -5h10v10h-10z",
    "triangle": "M0 -6L6 5H-6z",
    "diamond": "M0 -7L5 0L0 7L-5 0z",
    "plus": "M-2 -6h4v4h4v4h-4v4h-4v-4h-4v-4h4z",
}
_UNKNOWN = ("#8c8c8c", "circle")  # color and marker of galaxies without a class
_CORRECTNESS = (("correct", "#0072b2", "circle"), ("misclassified", "#d55e00", "triangle"))


@dataclass(frozen=True)
class Mapped:
    """The N galaxies of a map.

    Attributes:
        embedding: (N, D) float32, finite.
        number: (N,) int64, of their thumbnails.
        text: of each, below its image.
        judged: (N,) bool, false for training galaxies, which are shown smaller.
        class_names: of the classes.
        label: (N,) int64, -1 where unknown; None without labels.
        predicted: (N,) int64, -1 where unknown; None without predictions.
    """

    embedding: np.ndarray
    number: np.ndarray
    text: Sequence[str]
    judged: np.ndarray
    class_names: Sequence[str]
    label: np.ndarray | None
    predicted: np.ndarray | None


def map_block(galaxies: Mapped, note: str) -> dict[str, Any]:
    """The map with its colorings, its legends, and lists of galaxies that can be chosen with the keyboard."""
    xy, method = project(galaxies.embedding)
    judged, number = galaxies.judged, galaxies.number
    columns = {
        "x": xy[:, 0].round(3).tolist(),
        "y": xy[:, 1].round(3).tolist(),
        "galaxy": number.tolist(),
        "text": list(galaxies.text),
        "size": np.where(judged, 8, 5).tolist(),
        "alpha": np.where(judged, 0.85, 0.35).tolist(),
    }
    colorings, choices = _colorings(galaxies, columns)
    first = colorings[0][0]
    columns |= {"color": columns[f"color_{first}"], "marker": columns[f"marker_{first}"]}
    text = (
        f"Map of {judged.sum():,} galaxies"
        + (f" and {np.sum(~judged):,} training galaxies (smaller)" if not judged.all() else "")
        + ", one point each. Hover or tap: the galaxy. Drag: a region, whose galaxies are listed below. "
        "The menu Select lists galaxies without a pointer."
    )
    return {
        "kind": "map",
        "note": f"{note} {method}",
        "text": text,
        "colorings": colorings,
        "choices": [(f"{title} ({chosen.sum():,})", number[chosen].tolist()) for title, chosen in choices],
        "markers": _MARKERS,
        "plot": _plot(columns),
    }


def _colorings(galaxies: Mapped, columns: dict[str, list]) -> tuple[list[tuple], list[tuple[str, np.ndarray]]]:
    """Add colors and markers to the columns of the map.

    Returns:
        Key, title and legend of each coloring; title and members, (N,) bool, of each list that can be chosen.
    """
    colorings, choices = [], []
    names, label, predicted, judged = galaxies.class_names, galaxies.label, galaxies.predicted, galaxies.judged
    for key, title, what, classes in (
        ("class", "by class", "class", label),
        ("predicted", "by predicted class", "predicted", predicted),
    ):
        if classes is None:
            continue
        _color(columns, key, [_class_style(c) for c in classes])
        known = [int(c) for c in np.unique(classes[classes >= 0])]
        entries = [(names[c], *_class_style(c)) for c in known]
        if (classes < 0).any():
            entries.append(("not known", *_UNKNOWN))
        colorings.append((key, title, entries))
        choices += [(f"{what}: {names[c]}", (classes == c) & judged) for c in known]
    if label is not None and predicted is not None:
        compared = (label >= 0) & (predicted >= 0) & judged
        outcome = np.where(compared, (label != predicted).astype(int), -1)
        _color(columns, "correct", [_CORRECTNESS[o][1:] if o >= 0 else _UNKNOWN for o in outcome])
        entries = [*_CORRECTNESS, *([] if compared.all() else [("not judged", *_UNKNOWN)])]
        colorings.append(("correct", "by correctness", entries))
        choices.insert(0, ("misclassified", outcome == 1))
    if not colorings:
        _color(columns, "none", [_class_style(0)] * len(judged))
        colorings.append(("none", "none", []))
        choices.append(("all", judged))
    return colorings, [(title, members) for title, members in choices if members.any()]


def _class_style(c: int) -> tuple[str, str]:
    """Color and marker of a class; 35 differ."""
    return (_COLORS[c % len(_COLORS)], list(_MARKERS)[c % len(_MARKERS)]) if c >= 0 else _UNKNOWN


def _color(columns: dict[str, list], key: str, styles: Sequence[tuple[str, str]]) -> None:
    columns[f"color_{key}"], columns[f"marker_{key}"] = map(list, zip(*styles, strict=True))


def _plot(columns: dict[str, list]) -> Model:
    """The plot: hovering shows a galaxy, and a selected region's galaxies go to the page's gallery.

    Args:
        columns: `x`, `y`, `size`, `alpha`; `galaxy`, the number of its thumbnail; `text` for the tooltip; for each
            coloring NAME `color_NAME` and `marker_NAME`; `color` and `marker` are those of the first. The page's script
            adds `image`.
    """
    source = ColumnDataSource(columns | {"image": [""] * len(columns["x"])}, name="map-data")
    plot = figure(
        height=520,
        sizing_mode="stretch_width",
        min_width=200,
        tools="pan,wheel_zoom,box_select,lasso_select,tap,reset",
        active_drag="lasso_select",
        name="map-plot",
    )
    plot.background_fill_color = plot.border_fill_color = plot.outline_line_color = plot.toolbar.logo = None
    style = {"size": "size", "marker": "marker", "fill_color": "color", "fill_alpha": "alpha", "line_width": 0.4}
    style |= {"line_color": "#8c8c8c", "nonselection_fill_alpha": 0.15, "nonselection_line_alpha": 0.2}
    points = plot.scatter("x", "y", source=source, **style)
    tooltip = (  # styled here: it is in a shadow tree, which the page's style does not reach
        '<div class="tip" style="max-width: 220px; font: 12px system-ui, sans-serif; padding: 2px">'
        '<img src="@image" alt="" width="64" height="64"><div style="white-space: pre-line">@text</div></div>'
    )
    plot.add_tools(HoverTool(renderers=[points], tooltips=tooltip, limit=3))
    code = "showSelection(source.selected.indices.map(i => source.data.galaxy[i]))"
    source.selected.js_on_change("indices", CustomJS(args={"source": source}, code=code))
    plot.axis.visible = False
    plot.grid.visible = False
    return plot


def project(embedding: np.ndarray) -> tuple[np.ndarray, str]:
    """The two dimensions of a map, and how they were found.

    Each dimension of the embeddings is first scaled to unit variance. UMAP (McInnes et al. 2018, arXiv:1802.03426) is
    used if umap-learn is installed and there are enough galaxies, principal components otherwise.

    Args:
        embedding: (N, D) float32, finite.

    Returns:
        (N, 2) float64, and a sentence for the page.
    """
    embedding = np.asarray(embedding, np.float64)
    std = embedding.std(axis=0)
    scaled = (embedding - embedding.mean(axis=0)) / np.where(std > 0, std, 1)
    if importlib.util.find_spec("umap") is not None and len(scaled) > _NEIGHBORS + 1:
        import umap  # slow to import: it compiles

        # With a seed UMAP uses one thread; asking for that avoids its warning.
        found = umap.UMAP(n_neighbors=_NEIGHBORS, random_state=0, n_jobs=1).fit_transform(scaled.astype(np.float32))
        note = "UMAP of the standardized embeddings: near galaxies are alike, far ones say little."
        return found.astype(np.float64), note
    _, singular, vectors = np.linalg.svd(scaled, full_matrices=False)
    found = np.zeros((len(scaled), 2))
    kept = min(2, len(vectors))
    found[:, :kept] = scaled @ vectors[:kept].T
    explained = as_percent((singular[:kept] ** 2).sum() / max((singular**2).sum(), np.finfo(float).tiny))
    return found, (
        f"The first two principal components of the standardized embeddings, with {explained} of the variance. "
        "With umap-learn (pip install umap-learn) the map is UMAP's."
    )

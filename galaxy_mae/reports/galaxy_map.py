"""The map of a page: embeddings in two dimensions, an interactive plot by Bokeh.

Colors are those of Okabe and Ito (2008, "Color universal design"), which the color-blind tell apart; classes also
differ by their markers.
"""

import importlib.util
from collections.abc import Sequence
from typing import Any

import numpy as np
from bokeh.models import ColumnDataSource, CustomJS, HoverTool, Model
from bokeh.plotting import figure
from sklearn.preprocessing import StandardScaler

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


def map_block(
    embedding: np.ndarray,
    row: Sequence[int],
    text: Sequence[str],
    judged: np.ndarray,
    names: Sequence[str],
    label: np.ndarray | None,
    predicted: np.ndarray | None,
    note: str,
) -> dict[str, Any]:
    """The map of N galaxies, its colorings with legends, and lists of galaxies that can be chosen with the keyboard.

    Args:
        embedding: (N, D) float32, finite.
        row, text: N, of the data set; below the image.
        judged: (N,) bool, false for training galaxies, which are shown smaller.
        names: of the classes.
        label, predicted: (N,) int64, -1 where unknown; None if no galaxy has one.
        note: on the embeddings.
    """
    xy, method = project(embedding)
    columns = {
        "x": xy[:, 0].round(3).tolist(),
        "y": xy[:, 1].round(3).tolist(),
        "galaxy": list(row),
        "text": list(text),
        "size": np.where(judged, 8, 5).tolist(),
        "alpha": np.where(judged, 0.85, 0.35).tolist(),
    }
    colorings, choices = [], []  # key, title and legend; title and members, (N,) bool

    def color(key: str, title: str, styles: Sequence[tuple[str, str]], legend: list[tuple[str, str, str]]) -> None:
        columns[f"color_{key}"], columns[f"marker_{key}"] = map(list, zip(*styles, strict=True))
        colorings.append((key, title, legend))

    for key, what, classes in (("class", "class", label), ("predicted", "predicted class", predicted)):
        if classes is not None:
            known = [int(c) for c in np.unique(classes[classes >= 0])]
            legend = [(names[c], *_class_style(c)) for c in known]
            unknown = [("not known", *_UNKNOWN)] if (classes < 0).any() else []
            color(key, f"by {what}", [_class_style(c) for c in classes], legend + unknown)
            choices += [(f"{key}: {names[c]}", (classes == c) & judged) for c in known]
    if label is not None and predicted is not None:
        compared = (label >= 0) & (predicted >= 0) & judged
        outcome = np.where(compared, (label != predicted).astype(int), -1)
        legend = [*_CORRECTNESS, *([] if compared.all() else [("not judged", *_UNKNOWN)])]
        color("correct", "by correctness", [_CORRECTNESS[o][1:] if o >= 0 else _UNKNOWN for o in outcome], legend)
        choices.insert(0, ("misclassified", outcome == 1))
    if not colorings:
        color("none", "none", [_class_style(0)] * len(judged), [])
        choices.append(("all", judged))
    first = colorings[0][0]
    columns |= {"color": columns[f"color_{first}"], "marker": columns[f"marker_{first}"]}
    more = "" if judged.all() else f" and {np.sum(~judged):,} training galaxies (smaller)"
    rows = np.asarray(row)
    return {
        "kind": "map",
        "note": f"{note} {method}",
        "text": f"Map of {judged.sum():,} galaxies{more}, one point each. Hover or tap: the galaxy. Drag: a region, "
        "whose galaxies are listed below. The menu Select lists galaxies without a pointer.",
        "colorings": colorings,
        "choices": [(f"{title} ({x.sum():,})", rows[x].tolist()) for title, x in choices if x.any()],
        "markers": _MARKERS,
        "plot": _plot(columns),
    }


def _class_style(c: int) -> tuple[str, str]:
    """Color and marker of a class; 35 differ."""
    return (_COLORS[c % len(_COLORS)], list(_MARKERS)[c % len(_MARKERS)]) if c >= 0 else _UNKNOWN


def _plot(columns: dict[str, list]) -> Model:
    """The plot: hovering shows a galaxy, and a selected region's galaxies go to the page's gallery.

    The page's script fills the column `image`, and `color` and `marker` with those of another coloring.
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
    """The two dimensions of a map of (N, D) float32, finite: (N, 2) float64, and a sentence how they were found.

    Each dimension of the embeddings is first scaled to unit variance. UMAP (McInnes et al. 2018, arXiv:1802.03426) is
    used if umap-learn is installed and there are enough galaxies, principal components otherwise.
    """
    scaled = StandardScaler().fit_transform(np.asarray(embedding, np.float64))
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

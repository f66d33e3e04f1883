"""Interactive plots of pages. Those of the report take the arguments of their namesakes in `galaxy_mae.figures`.

Colors are those of Okabe and Ito (2008, "Color universal design"), which the color-blind tell apart; classes also
differ by their markers. The page's script sets color and font of
the text.
"""

from collections.abc import Sequence

import numpy as np
from bokeh.models import ColumnDataSource, CustomJS, HoverTool, Model, NumeralTickFormatter, Span, Whisker
from bokeh.plotting import figure

Interval = tuple[float, float, float]  # a value and the ends of its 95 % interval, as fractions of 1

COLORS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442")
MARKERS = ("circle", "square", "triangle", "diamond", "plus")
CORRECTNESS = (("correct", "#0072b2", "circle"), ("misclassified", "#d55e00", "triangle"))
UNKNOWN = ("#8c8c8c", "circle")  # color and marker of galaxies without a class
_WEIGHTS = {"random": ("#8c8c8c", "random weights"), "ssl": ("#2a8fd0", "SSL weights")}
_LAYER_PROBES = {"linear_probe": ("linear probe", "solid"), "knn": ("k-NN", "dashed")}
_FEW = 40  # points of a curve that get markers
_TOOLS = "pan,box_zoom,wheel_zoom,reset"


def class_style(c: int) -> tuple[str, str]:
    """Color and marker of a class; 35 differ."""
    return (COLORS[c % len(COLORS)], MARKERS[c % len(MARKERS)]) if c >= 0 else UNKNOWN


def _figure(height: int, tools: str = _TOOLS, **options) -> figure:
    """A figure without a background, as wide as the page allows."""
    plot = figure(height=height, sizing_mode="stretch_width", min_width=200, tools=tools, **options)
    plot.background_fill_color = plot.border_fill_color = None
    plot.outline_line_color = None
    plot.grid.grid_line_alpha = 0.25
    plot.toolbar.logo = None
    plot.toolbar.autohide = True
    if not tools:
        plot.toolbar_location = None
    return plot


def _add_legend(plot: figure, columns: int = 2) -> None:
    plot.add_layout(plot.legend[0], "below")
    plot.legend.location = "center"
    plot.legend.orientation = "horizontal"
    plot.legend.ncols, plot.legend.spacing = columns, 16
    plot.legend.background_fill_color = plot.legend.border_line_color = None


def accuracy_bars(
    names: Sequence[str], estimates: Sequence[Interval | None], pretrained: Sequence[bool], chance: float
) -> list[Model]:
    """Accuracies with intervals, from top to bottom. Missing ones have a row without a bar."""
    positions = list(range(len(names)))[::-1]
    plot = _figure(60 + 44 * len(names), x_range=(0, 100), y_range=(-0.5, len(names) - 0.5), tools="")
    plot.xaxis.axis_label = "test accuracy in %, 95 % intervals"
    rows = [
        (position, *(100 * x for x in estimate), _WEIGHTS["ssl" if ssl else "random"][0], name)
        for position, estimate, ssl, name in zip(positions, estimates, pretrained, names, strict=True)
        if estimate is not None
    ]
    columns = ("y", "value", "low", "high", "color", "name")
    source = ColumnDataSource(
        dict(zip(columns, map(list, zip(*rows, strict=True)), strict=True)) if rows else {x: [] for x in columns}
    )
    bars = plot.hbar(y="y", right="value", height=0.6, color="color", source=source)
    plot.add_layout(Whisker(dimension="width", base="y", upper="high", lower="low", source=source, level="overlay"))
    plot.add_layout(Span(location=100 * chance, dimension="height", line_dash="dotted", line_color="#d55e00"))
    plot.add_tools(HoverTool(renderers=[bars], tooltips="@name: @value{0.00} % (@low{0.00} to @high{0.00})"))
    plot.yaxis.ticker = positions
    plot.yaxis.major_label_overrides = {p: name.replace(" (", "\n(") for p, name in zip(positions, names, strict=True)}
    plot.ygrid.visible = False
    return [plot]


def layer_accuracies(accuracies: dict[str, dict[str, Sequence[float]]]) -> list[Model]:
    """Validation accuracies of linear probe and k-NN at every layer."""
    plot = _figure(360, x_axis_label="layer", y_axis_label="validation accuracy in %")
    for initialization, by_probe in accuracies.items():
        color, weights = _WEIGHTS[initialization]
        for name, (title, dash) in _LAYER_PROBES.items():
            layers = list(range(1, len(by_probe[name]) + 1))
            _line(plot, layers, 100 * np.array(by_probe[name]), color, f"{title}, {weights}", dash)
    plot.xaxis.ticker.desired_num_ticks = 6
    plot.xaxis.ticker.num_minor_ticks = 0
    plot.xaxis.ticker.min_interval = 1
    _add_legend(plot, columns=1)  # two are wider than a telephone
    return [plot]


def _line(plot: figure, x: Sequence[float], y: Sequence[float], color: str, title: str, dash: str = "solid") -> None:
    """A line with markers; hovering tells the numbers."""
    source = ColumnDataSource({"x": list(x), "y": [float(value) for value in y]})
    plot.line("x", "y", source=source, color=color, line_dash=dash, line_width=2, legend_label=title)
    marker = plot.scatter("x", "y", source=source, color=color, size=5, legend_label=title)
    plot.add_tools(HoverTool(renderers=[marker], tooltips=f"{title}: @y{{0.000}} at @x{{0.[000]}}"))


def label_efficiency(panels: dict[str, dict[str, tuple[Sequence[int], Sequence[Interval]]]]) -> list[Model]:
    """Test accuracy over the number of training labels, with bands of 95 %, one panel per classifier."""
    plots = []
    for title, curves in panels.items():
        plot = _figure(340, x_axis_type="log", x_axis_label="training labels", title=title)
        plot.yaxis.axis_label = "test accuracy in %, 95 % intervals"
        for initialization, (labels, estimates) in curves.items():
            color, weights = _WEIGHTS[initialization]
            value, low, high = 100 * np.array(estimates).T
            plot.varea(list(labels), low.tolist(), high.tolist(), color=color, alpha=0.2)
            _line(plot, labels, value, color, weights)
        plot.xaxis.ticker = sorted({n for labels, _ in curves.values() for n in labels})
        plot.xaxis.formatter = NumeralTickFormatter(format="0,0")
        _add_legend(plot)
        plots.append(plot)
    return plots


def reliability_diagrams(panels: dict[str, Sequence[dict[str, float]]], number_of_bins: int, title: str) -> list[Model]:
    """Accuracy over confidence, one panel each; hovering tells how many galaxies have this confidence."""
    plots = []
    for name, bins in panels.items():
        plot = _figure(320, x_range=(0, 1), y_range=(0, 1), title=name, tools="")
        plot.xaxis.axis_label, plot.yaxis.axis_label = "confidence (probability of the predicted class)", "accuracy"
        left = np.array([b["bin"] for b in bins]) / number_of_bins
        columns = {key: [b[key] for b in bins] for key in ("confidence", "accuracy", "galaxies")}
        source = ColumnDataSource(columns | {"left": left.tolist(), "right": (left + 0.95 / number_of_bins).tolist()})
        bars = plot.quad(left="left", right="right", bottom=0, top="accuracy", color="#2a8fd0", source=source)
        plot.line([0, 1], [0, 1], color="#8c8c8c", line_dash="dotted", line_width=2)
        ends = {"x0": "left", "x1": "right", "y0": "confidence", "y1": "confidence"}
        plot.segment(**ends, line_width=3, color="#d55e00", source=source)
        tooltips = "accuracy @accuracy{0.000}, confidence @confidence{0.000}, @galaxies galaxies"
        plot.add_tools(HoverTool(renderers=[bars], tooltips=tooltips))
        plots.append(plot)
    return plots


def training_curves(
    curves: dict[str, tuple[Sequence[float], Sequence[float]]], y_label: str, log: bool = False
) -> Model:
    """Numbers over the epochs of a training.

    Args:
        curves: by title, epochs and values.
        y_label: of the axis.
        log: whether its scale is logarithmic; all values are then positive.
    """
    plot = _figure(320, y_axis_type="log" if log else "linear", x_axis_label="epoch", y_axis_label=y_label)
    for (title, (x, y)), color in zip(curves.items(), COLORS, strict=False):
        source = ColumnDataSource({"x": list(x), "y": list(y)})
        drawn = plot.line("x", "y", source=source, color=color, line_width=2, legend_label=title)
        if len(x) <= _FEW:
            drawn = plot.scatter("x", "y", source=source, color=color, size=6, legend_label=title)
        plot.add_tools(HoverTool(renderers=[drawn], tooltips=f"{title}: @y{{0.0000}} at epoch @x{{0.0}}"))
    _add_legend(plot)
    return plot


def galaxy_map(columns: dict[str, list]) -> Model:
    """The map: hovering shows a galaxy, and a selected region's galaxies go to the page's gallery.

    Args:
        columns: `x`, `y`, `size`, `alpha`; `galaxy`, the number of its thumbnail; `text` for the tooltip; for each
            coloring NAME `color_NAME` and `marker_NAME`; `color` and `marker` are those of the first. The page's script
            adds `image`.
    """
    source = ColumnDataSource(columns | {"image": [""] * len(columns["x"])}, name="map-data")
    plot = _figure(520, "pan,wheel_zoom,box_select,lasso_select,tap,reset", active_drag="lasso_select", name="map-plot")
    plot.toolbar.autohide = False
    points = plot.scatter(
        "x", "y", source=source, size="size", marker="marker", fill_color="color", line_color="#8c8c8c", line_width=0.4,
        fill_alpha="alpha", nonselection_fill_alpha=0.15, nonselection_line_alpha=0.2,
    )  # fmt: skip
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

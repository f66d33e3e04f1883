"""Throughput of pre-training against batch size, image size, hidden size and number of images: tables and a figure.

    python benchmarks/growth.py growth.png                                around recipes/galaxy10.yaml, on a GPU
    python benchmarks/growth.py growth.png --config recipes/demo.yaml     around the small model, on a laptop

One parameter is varied at a time, by factors of a quarter to four of the recipe's value. Each measurement is a process
of its own that trains as main.py does. The dashed lines show constant FLOP/s: the throughput that would follow from the
FLOPs per image alone.
"""

import json
import sys
from argparse import Namespace
from pathlib import Path

import pretrain
from matplotlib.figure import Figure
from measurement import (
    WARM_UP,
    header,
    measurement_parser,
    precision,
    print_table,
    read_benchmark_recipe,
    run_measurement,
)

from galaxy_mae.errors import UserError, one_line_errors
from galaxy_mae.files import atomic_file
from galaxy_mae.training.recipe import Recipe, global_batch_size

AXES = ("batch size", "image size", "hidden size", "number of images")

Measurements = dict[int, dict[str, float]]  # by the value of the axis


def main(arguments: list[str]) -> None:
    parser = measurement_parser(__doc__, steps=10)
    parser.add_argument("figure", type=Path, help="the PNG to write")
    parser.add_argument("--axes", nargs="+", choices=AXES, default=AXES)
    parser.add_argument("--factors", type=float, nargs="+", default=(0.25, 0.5, 1, 2, 4), help="of the recipe's values")
    options, flags = parser.parse_known_args(arguments)
    recipe = read_benchmark_recipe(flags, WARM_UP + options.steps)
    results = {axis: measure_axis(axis, recipe, options, flags) for axis in options.axes}
    total = global_batch_size(recipe.training)
    title = f"{header(recipe, 'around ')}, batch size {total}, {precision(recipe.training.bf16)}"
    plot(options.figure, results, title)
    print(title)
    for axis, measurements in results.items():
        rows = []
        for value, measured in measurements.items():
            rate, gflop = measured["images_per_second"], measured["flops_per_image"] / 1e9
            rows.append((str(value), f"{rate:,.0f}", f"{gflop:.3g}", f"{rate * gflop:,.0f}"))
        print_table((axis, "images/s", "GFLOP per image", "GFLOP/s"), rows)


def measure_axis(axis: str, recipe: Recipe, options: Namespace, flags: list[str]) -> Measurements:
    """Measure all values of an axis. Values that fail, as for lack of memory, are reported and left out."""
    path = json.dumps({"path": pretrain.MAIN, "workers": 0, "bf16": recipe.training.bf16})
    measurements = {}
    for factor in options.factors:
        value, changed = vary(axis, recipe, factor)
        try:
            measurements[value] = run_measurement(pretrain.__file__, path, 0, options, [*flags, *changed])
        except UserError as error:
            print(f"{axis} {value}: {error}", file=sys.stderr)
    if not measurements:
        raise UserError(f"{axis}: no value could be measured, for the reasons above")
    return measurements


def vary(axis: str, recipe: Recipe, factor: float) -> tuple[int, list[str]]:
    """The value of an axis at a factor of the recipe's value, and the flags that set it."""
    model = recipe.model
    if axis == "batch size":
        value = int(global_batch_size(recipe.training) * factor)
        return value, ["--batch_size", str(value), "--dataset", f"synthetic:{max(1000, 2 * value)}"]
    if axis == "image size":  # the number of patches is varied by the factor
        value = round(recipe.galaxies.image_size * factor**0.5 / model.patch_size) * model.patch_size
        return value, ["--image_size", str(value), "--dataset", "synthetic:1000"]
    if axis == "hidden size":  # by the number of attention heads, whose size is kept
        heads = max(1, round(model.num_attention_heads * factor))
        value = heads * (model.hidden_size // model.num_attention_heads)
        return value, ["--hidden_size", str(value), "--num_attention_heads", str(heads)]
    value = int(4000 * factor)
    return value, ["--dataset", f"synthetic:{value}"]


def plot(path: Path, results: dict[str, Measurements], title: str) -> None:
    """Plot throughput against each axis, and the throughput at constant FLOP/s through the middle value."""
    figure = Figure(layout="constrained", figsize=(3.4 * len(results), 3.4))
    axes = figure.subplots(1, len(results), squeeze=False)[0]
    for axis, (name, measurements) in zip(axes, results.items(), strict=True):
        values = list(measurements)
        rates = [measured["images_per_second"] for measured in measurements.values()]
        flops = [measured["flops_per_image"] for measured in measurements.values()]
        middle = len(values) // 2
        expected = [rates[middle] * flops[middle] / each for each in flops]
        axis.plot(values, rates, marker="o", label="measured")
        for value, rate in zip(values, rates, strict=True):
            axis.annotate(f"{rate:,.0f}", (value, rate), (0, 7), textcoords="offset points", ha="center", fontsize=8)
        axis.plot(values, expected, linestyle="--", color="0.5", label="constant FLOP/s")
        axis.set(xscale="log", yscale="log", xlabel=name, ylim=(min(rates + expected) / 2, max(rates + expected) * 2))
        axis.set_xticks(values, list(map(str, values)))
        axis.minorticks_off()
        axis.margins(x=0.12)
        axis.set_yticks([])
    axes[0].set_ylabel("throughput, images/s (logarithmic)")
    axes[0].legend(fontsize=8)
    figure.suptitle(title, fontsize=8)
    with atomic_file(path) as tmp_path:
        figure.savefig(tmp_path, dpi=110)


if __name__ == "__main__":
    with one_line_errors(sys.argv[0]):
        main(sys.argv[1:])

"""How pre-training's images a second grow with batch, image size, width and the number of images: table and figure.

    python benchmarks/growth.py growth.png                                        around recipes/galaxy10.yaml, on a GPU
    python benchmarks/growth.py growth.png --config recipes/demo.yaml             around the small model, on a laptop

Each axis is varied alone, by factors of a quarter to four of the recipe's; each point is a process of its own that
trains by main.py's own path. The dashed line is what the operations alone would give, at constant FLOP/s.
Other flags are main.py's.
"""

import argparse
import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pretrain import WARM_UP, in_a_process, measure, read_benchmark

from galaxy_mae.atomic import atomic_file
from galaxy_mae.errors import UserError, one_line_errors
from galaxy_mae.mae import training_flops_per_image
from galaxy_mae.provenance import machine, session, short_commit
from galaxy_mae.recipe import Recipe, total_batch_size

AXES = ("batch size", "image size", "width", "number of images")


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("picture", type=Path, help="the PNG to write")
    parser.add_argument("--steps", type=int, default=10, help="timed steps of a point")
    parser.add_argument("--axes", nargs="+", choices=AXES, default=AXES)
    parser.add_argument("--factors", type=float, nargs="+", default=(0.25, 0.5, 1, 2, 4), help="of the recipe's values")
    parser.add_argument("--results", type=Path, help="a file that keeps what was measured: called again, it goes on")
    parser.add_argument("--point", action="store_true", help=argparse.SUPPRESS)  # a child: one point as JSON
    options, flags = parser.parse_known_args(arguments)
    recipe = read_benchmark(flags, WARM_UP + options.steps)
    if options.point:
        flops = training_flops_per_image(recipe.model.config(recipe.galaxies.image_size))
        rate = measure(recipe, "ours", 0, recipe.training.bf16)["images_per_second"]
        print(json.dumps({"rate": rate, "flops": flops}))
        return
    results = {axis: growth(axis, recipe, flags, options) for axis in options.axes}
    draw(options.picture, results, title(recipe))
    print(title(recipe))
    for axis, points in results.items():
        print(f"\n| {axis} | images/s | GFLOP an image | GFLOP/s |\n| --- | --- | --- | --- |")
        for value, point in points.items():
            print(f"| {value} | {point['rate']:,.0f} | {point['flops'] / 1e9:.3g} | ", end="")
            print(f"{point['rate'] * point['flops'] / 1e9:,.0f} |")


def growth(axis: str, recipe: Recipe, flags: list[str], options: argparse.Namespace) -> dict[int, dict[str, float]]:
    """The points along an axis: {value: {rate, flops}}; those that do not fit the device are left out, with a line."""
    points = {}
    for factor in options.factors:
        value, changed = vary(axis, recipe, factor)
        command = [sys.executable, __file__, str(options.picture), "--steps", str(options.steps), "--point"]
        try:
            points[value] = in_a_process([*command, *flags, *changed], f"{axis} {value}", options.results)
        except UserError as error:
            print(error, file=sys.stderr)
    if not points:
        raise UserError(f"{axis}: no point could be measured, for the reasons above")
    return points


def vary(axis: str, recipe: Recipe, factor: float) -> tuple[int, list[str]]:
    """The value of an axis at a factor of the recipe's, and the flags that set it."""
    if axis == "batch size":
        value = int(total_batch_size(recipe.training) * factor)
        return value, ["--batch_size", str(value), "--dataset", f"synthetic:{max(1000, 2 * value)}"]
    if axis == "image size":
        patch = recipe.model.patch_size
        value = round(recipe.galaxies.image_size * factor**0.5 / patch) * patch
        return value, ["--image_size", str(value), "--dataset", "synthetic:1000"]
    if axis == "width":  # of heads 64 wide, as in the recipes, or of as many as it has
        each = recipe.model.hidden_size // recipe.model.num_attention_heads
        heads = max(1, round(recipe.model.num_attention_heads * factor))
        return heads * each, ["--hidden_size", str(heads * each), "--num_attention_heads", str(heads)]
    value = int(4000 * factor)
    return value, ["--dataset", f"synthetic:{value}"]


def title(recipe: Recipe) -> str:
    """Where and of what this is."""
    model, training = recipe.model, recipe.training
    return (
        f"{machine()}; commit {short_commit(session())}; around {recipe.galaxies.image_size} pixels, "
        f"{model.hidden_size} wide, {model.num_hidden_layers} layers, batch {total_batch_size(training)}, "
        f"{'bfloat16' if training.bf16 else 'float32'}"
    )


def draw(path: Path, results: dict[str, dict[int, dict[str, float]]], text: str) -> None:
    """One panel an axis: images a second, and what constant FLOP/s would give."""
    figure, axes = plt.subplots(1, len(results), layout="constrained", figsize=(3.4 * len(results), 3.4), squeeze=False)
    for axis, (name, points) in zip(axes[0], results.items(), strict=True):
        values, rates = list(points), [point["rate"] for point in points.values()]
        middle = list(points.values())[len(points) // 2]
        expected = [middle["rate"] * middle["flops"] / point["flops"] for point in points.values()]
        axis.plot(values, rates, marker="o", label="measured")
        for value, rate in zip(values, rates, strict=True):
            axis.annotate(f"{rate:,.0f}", (value, rate), (0, 7), textcoords="offset points", ha="center", fontsize=8)
        axis.plot(values, expected, linestyle="--", color="0.5", label="constant FLOP/s")
        axis.set(xscale="log", yscale="log", xlabel=name, ylim=(min(rates + expected) / 2, max(rates + expected) * 2))
        axis.set_xticks(values, list(map(str, values)))
        axis.minorticks_off()
        axis.margins(x=0.12)
        axis.set_yticks([])
    axes[0, 0].set_ylabel("images a second, logarithmic")
    axes[0, 0].legend(fontsize=8)
    figure.suptitle(text, fontsize=8)
    with atomic_file(path) as aside:
        figure.savefig(aside, format="png", dpi=110)


if __name__ == "__main__":
    with one_line_errors(sys.argv[0]):
        main(sys.argv[1:])

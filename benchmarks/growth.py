"""How features grow with the number of galaxies that an encoder is pre-trained on.

    python benchmarks/growth.py growth/ --numbers 1404 5616 34898 --dataset LABELLED.parquet --unlabelled MORE.parquet

For each number and seed, main.py is run on that many galaxies, the labelled ones first, for the steps of
recipes/small.yaml or of `--max_steps`, or for as many `--epochs`, and frozen features are classified on the validation
set of `--dataset`; the test set is not read. The accuracies of a run are in its `growth.json`, and it is not repeated.
The printed table has all runs of the folder, and `growth.png` those of equal steps, with lines through the accuracies
over log2(number): their slope is the gain of a doubling.
"""

import logging
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from measurement import argument_parser, print_table
from scipy.stats import linregress

import main as pretraining
from galaxy_mae.data.batches import GalaxyBatches
from galaxy_mae.data.cache import Galaxies
from galaxy_mae.data.pretraining import PretrainingData
from galaxy_mae.errors import UserError, one_line_errors
from galaxy_mae.evaluation import features
from galaxy_mae.evaluation.few_labels import label_subsets
from galaxy_mae.evaluation.probes import COARSE_C_GRID, FeaturesAndLabels, knn_classifier, linear_probe
from galaxy_mae.files import read_json, write_json
from galaxy_mae.model.encoder import encoder_fingerprint, load_encoder
from galaxy_mae.training.recipe import global_batch_size, read_recipe

logger = logging.getLogger("galaxy_mae")
FEW_LABELS = (56, 168, 562)
PLOTTED = 5  # the first classifiers of `probe_accuracies`


@dataclass(frozen=True)
class FirstGalaxies(PretrainingData):
    """The first `number` training galaxies in a random order of each data set, the labelled ones first."""

    number: int = 0

    @property
    def train(self) -> list[tuple[Galaxies, np.ndarray]]:
        """The training galaxies of each data set, and their rows in it."""
        found, left = [], self.number
        for part, rows in super().train:
            chosen = np.sort(np.random.default_rng(0).permutation(rows)[:left])
            left -= len(chosen)
            found += [(part, chosen)] if len(chosen) else []
        return found


def main(arguments: list[str]) -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("folder", type=Path, help="for the runs, the table and the figure")
    parser.add_argument("--numbers", type=int, nargs="*", default=[], help="of galaxies; none: only the figure")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--epochs", type=int, help="as many for every number, in place of steps")
    options, flags = parser.parse_known_args(arguments)
    for seed in options.seeds:
        for number in options.numbers:
            train_and_probe(options.folder, number, seed, options.epochs, flags)
    runs = [read_json(path, "delete it") for path in sorted(options.folder.glob("*/growth.json"))]
    if not runs:
        raise UserError(f"{options.folder}: there are no runs: give --numbers")
    summarize(runs, options.folder / "growth.png")


def train_and_probe(folder: Path, number: int, seed: int, epochs: int | None, flags: list[str]) -> None:
    """Run main.py on so many galaxies, and write the accuracies of its encoder."""
    run = folder / f"{number}_{f'{epochs}_epochs_' if epochs else ''}{seed}"
    if (run / "growth.json").exists():
        return
    flags = ["--config", "recipes/small.yaml", "--probe_every", "0", "--reconstruct_every", "0", *flags]
    flags += ["--seed", str(seed), "--output_dir", str(run), "--report_to", "none"]
    if epochs:
        batch = global_batch_size(read_recipe(flags).training)
        flags += ["--max_steps", str(epochs * number // batch)]
    open_galaxies = pretraining.open_galaxies_of

    def open_first(*args) -> FirstGalaxies:
        data = open_galaxies(*args)
        return FirstGalaxies(data.galaxies, data.split, data.wide, data.unlabelled, number)

    pretraining.open_galaxies_of = open_first
    pretraining.main(flags)
    pretraining.open_galaxies_of = open_galaxies
    recipe = read_recipe(flags)
    data = open_first(recipe.galaxies, None)
    steps = read_json(run / "trainer_state.json", "delete the run")["global_step"]
    about = {"galaxies": len(data.train_dataset()), "seed": seed, "epochs": epochs, "steps": steps}
    write_json(run / "growth.json", about | probe_accuracies(run, data, recipe.training.bf16))


def probe_accuracies(run: Path, data: PretrainingData, bf16: bool) -> dict[str, float]:
    """Those of classifiers of an encoder's frozen features, learned from all labels and from few."""
    encoder, galaxies, label = load_encoder(str(run)), data.galaxies, data.galaxies.label
    batches = GalaxyBatches(galaxies.pixels, encoder.mean, encoder.std, encoder.image_size)
    fingerprint = encoder_fingerprint(encoder.model, encoder.mean, encoder.std, encoder.image_size)
    paths = [features.features_file(galaxies, fingerprint, bf16, kind) for kind in ("", "_orientations")]
    one = features.frozen_features(encoder.model, batches, paths[0], bf16)
    turned = features.orientation_features(encoder.model, batches, paths[1], bf16).astype(np.float32)
    rings = features.merge_rings(one.rings, features.rings_of_orientations(one.grid), one.grid)

    def sets(x: np.ndarray, rows: np.ndarray) -> list[FeaturesAndLabels]:
        return [FeaturesAndLabels(x[part], label[part]) for part in (rows, data.split["validation"])]

    def accuracy(x: np.ndarray, rows: np.ndarray = data.split["train"]) -> float:
        return linear_probe(*sets(x, rows), COARSE_C_GRID).best_params["validation_accuracy"]

    train, validation = sets(one.mean, data.split["train"])
    nearest = knn_classifier(train).probabilities(validation.features).argmax(axis=1)
    found = {"one view": accuracy(one.mean), "rings": accuracy(rings)}
    found |= {"orientations": max(accuracy(turned), accuracy(turned[:, : turned.shape[1] // 2]))}
    found |= {"k-NN": float(np.mean(nearest == validation.label))}
    few = defaultdict(list)
    for subset in label_subsets(data.split["train"], label[data.split["train"]], FEW_LABELS, 0):
        few[len(subset.rows)].append(accuracy(one.mean, subset.rows))
    return found | {f"{count} labels, one view": float(np.mean(x)) for count, x in few.items()}


def summarize(runs: list[dict], path: Path) -> None:
    """Print accuracies and gains of a doubling, and plot those of equally many steps."""
    names = [name for name in runs[0] if name not in ("galaxies", "seed", "epochs", "steps")]
    figure, axis = plt.subplots(figsize=(9, 4.6), layout="constrained")
    rows, order = [], sorted(runs, key=lambda run: (run["epochs"] or 0, run["galaxies"], run["seed"]))
    for run in order:
        about = f"{run['galaxies']:,}", f"{run['steps']:,}", str(run["seed"])
        rows.append((*about, *(f"{100 * run[name]:.1f}" for name in names)))
    print_table(("galaxies", "steps", "seed", *names), rows)
    slopes = []
    for epochs in sorted({run["epochs"] or 0 for run in runs}):
        chosen = [run for run in runs if (run["epochs"] or 0) == epochs]
        doublings = np.log2([run["galaxies"] for run in chosen])
        if len(set(doublings)) < 3:
            continue
        fits = {name: linregress(doublings, [100 * run[name] for run in chosen]) for name in names}
        cells = (f"{fit.slope:+.2f} ± {fit.stderr:.2f}" for fit in fits.values())
        slopes.append((f"{epochs} epochs" if epochs else "equal steps", *cells))
        for number, name in enumerate([] if epochs else names[:PLOTTED]):
            color, fit = f"C{number}", fits[name]
            axis.plot(2**doublings, [100 * run[name] for run in chosen], "o", color=color, markersize=5)
            ends = np.array([doublings.min(), doublings.max()])
            label = f"{name}: {fit.slope:+.1f} ± {fit.stderr:.1f} per doubling"
            axis.plot(2**ends, fit.intercept + fit.slope * ends, color=color, label=label)
    print_table(("gain of a doubling", *names), slopes)
    if not axis.lines:  # three numbers make a line
        return
    numbers = sorted({run["galaxies"] for run in runs})
    axis.set(xscale="log", xlabel="galaxies of pre-training", ylabel="validation accuracy in %")
    axis.set_xticks(numbers, [f"{number:,}" for number in numbers])
    axis.minorticks_off()
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(fontsize=8, frameon=False, loc="outside right upper")
    figure.savefig(path, dpi=110, bbox_inches="tight")
    logger.info("figure: %s", path)


if __name__ == "__main__":
    import sys

    with one_line_errors(sys.argv[0]):
        main(sys.argv[1:])

"""The linear probe's cost, side by side with scikit-learn's default solver, in one run.

    python benchmarks/probe.py --encoder runs/demo --dataset synthetic --bf16 False

Prints the images a second of the frozen encoder, and on its features (and, without an encoder, on random ones of
Galaxy10's size: 14,094 x 384) the seconds and the test accuracy of

    ours      the whole search over penalties, each fit started from the last one's weights
    default   scikit-learn's default solver and settings, started anew for every penalty
    once      scikit-learn's default solver and penalty, one fit
"""

import sys
import time
import warnings
from pathlib import Path

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from galaxy_mae.batches import GalaxyBatches
from galaxy_mae.classifier import load_encoder
from galaxy_mae.errors import one_line_errors
from galaxy_mae.evaluation import labelled_rows
from galaxy_mae.galaxy10 import split_galaxies
from galaxy_mae.probe import PENALTIES, Examples, encode, linear_probe
from galaxy_mae.provenance import machine
from galaxy_mae.recipe import read_evaluation
from galaxy_mae.sources import open_galaxies


def main(arguments: list[str]) -> None:
    print(machine())
    parts = encoded(arguments) if arguments else drawn()
    train, _, test = parts
    print(f"{len(train.label):,} training rows of {train.features.shape[1]} features, {len(test.label):,} test rows")
    for name, fit in (("ours", ours), ("default", default), ("once", once)):
        started = time.perf_counter()
        predicted, c = fit(*parts)
        seconds = time.perf_counter() - started
        print(f"{name:<8} {seconds:7.1f} s   test accuracy {100 * np.mean(predicted == test.label):.2f} %   C {c:g}")


def encoded(arguments: list[str]) -> list[Examples]:
    """Training, validation and test features of an encoder, and its images a second."""
    recipe = read_evaluation(arguments)
    encoder = load_encoder(recipe.evaluation.encoder)
    size = encoder.model.config.image_size
    galaxies = open_galaxies(recipe.evaluation.dataset, size)
    rows = split_galaxies(galaxies, recipe.evaluation.split_seed)
    labelled_rows(galaxies, rows)
    batches = GalaxyBatches(galaxies.pixels, encoder.mean, encoder.deviation, size, recipe.training.device)
    chosen = np.concatenate([rows[part] for part in ("train", "validation", "test")])
    for _ in encode(encoder.model, batches, chosen[:512], recipe.training.bf16):
        pass  # warm up
    started = time.perf_counter()
    pooled = [
        tokens[:, 1:].mean(dim=1).cpu().numpy()
        for tokens in encode(encoder.model, batches, chosen, recipe.training.bf16)
    ]
    print(f"encoder: {len(chosen) / (time.perf_counter() - started):,.0f} images/s")
    features = np.split(np.concatenate(pooled), np.cumsum([len(rows["train"]), len(rows["validation"])]))
    labels = [galaxies.label[rows[part]] for part in ("train", "validation", "test")]
    return [Examples(x, y) for x, y in zip(features, labels, strict=True)]


def drawn(width: int = 384, classes: int = 10) -> list[Examples]:
    """Overlapping classes in correlated features, as many as Galaxy10's rows."""
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(width, width)) * np.geomspace(1, 0.01, width)
    centres = rng.normal(scale=0.12, size=(classes, width))
    parts = []
    for count in (14_094, 1_762, 1_762):
        label = rng.integers(0, classes, count)
        features = (centres[label] + rng.normal(size=(count, width))) @ mixing.T
        parts.append(Examples(features.astype(np.float32), label))
    return parts


def ours(train: Examples, validation: Examples, test: Examples) -> tuple[np.ndarray, float]:
    """What the evaluation does."""
    probe = linear_probe(train, validation)
    return probe.probabilities(test.features).argmax(axis=1), probe.chosen["C"]


def default(train: Examples, validation: Examples, test: Examples) -> tuple[np.ndarray, float]:
    """All penalties, each fitted anew; its 100 iterations may end before it has converged."""
    scaler = StandardScaler().fit(train.features)
    x = scaler.transform(train.features)
    best = (-1.0, None)
    for c in PENALTIES:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            model = LogisticRegression(C=c).fit(x, train.label)
        accuracy = model.score(scaler.transform(validation.features), validation.label)
        best = max(best, (accuracy, model), key=lambda entry: entry[0])
    return best[1].predict(scaler.transform(test.features)), best[1].C


def once(train: Examples, validation: Examples, test: Examples) -> tuple[np.ndarray, float]:
    """One fit with the library's own settings."""
    scaler = StandardScaler().fit(train.features)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model = LogisticRegression().fit(scaler.transform(train.features), train.label)
    return model.predict(scaler.transform(test.features)), 1.0


if __name__ == "__main__":
    with one_line_errors(sys.argv[0]):
        main(sys.argv[1:])

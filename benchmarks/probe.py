"""The time of the linear probe, compared with scikit-learn's default solver.

    python benchmarks/probe.py                                                          random features
    python benchmarks/probe.py --encoder runs/demo --dataset synthetic --bf16 False     those of an encoder

The flags are those of linear_probe_checkpoints.py. Without them the features are random and as many as those of
Galaxy10: 14,094 x 384. Prints the encoder's throughput, and the time and the test accuracy of

    warm start   the evaluation's sweep over C, each fit started from the weights of the last one
    cold start   the same sweep with scikit-learn's default solver and settings
    single fit   one fit with scikit-learn's default solver and C
"""

import sys
import tempfile
import warnings
from collections.abc import Sequence
from functools import partial

import numpy as np
from measurement import timed
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from galaxy_mae.errors import one_line_errors
from galaxy_mae.evaluation.features import encode, mean_pool
from galaxy_mae.evaluation.preparation import prepare_evaluations
from galaxy_mae.evaluation.probes import C_GRID, FeaturesAndLabels, linear_probe
from galaxy_mae.provenance import machine
from galaxy_mae.training.recipe import read_evaluation_recipe

SPLITS = ("train", "validation", "test")


def main(arguments: list[str]) -> None:
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        return
    print(machine())
    train, validation, test = encoder_features(arguments) if arguments else random_features()
    print(
        f"{len(train.label):,} training galaxies with {train.features.shape[1]} features, "
        f"{len(test.label):,} test galaxies"
    )
    fits = {
        "warm start": fit_warm_start,
        "cold start": partial(fit_cold_start, c_grid=C_GRID),
        "single fit": partial(fit_cold_start, c_grid=[1.0]),
    }
    for name, fit in fits.items():
        seconds, (predicted, c) = timed(fit, train, validation, test)
        print(f"{name:<10} {seconds:7.1f} s   test accuracy {100 * np.mean(predicted == test.label):.2f} %   C {c:g}")


def encoder_features(arguments: list[str]) -> list[FeaturesAndLabels]:
    """Training, validation and test features of an encoder; prints its throughput."""
    with tempfile.TemporaryDirectory() as folder:
        evaluation, *_ = prepare_evaluations(read_evaluation_recipe([*arguments, "--output_dir", folder]))
    split, label = evaluation.split, evaluation.galaxies.label

    def features(indices: np.ndarray) -> np.ndarray:
        tokens = encode(evaluation.encoder.model, evaluation.batches, indices, evaluation.recipe.training.bf16)
        return np.concatenate([mean_pool(last) for *_, last in tokens])

    features(split["train"][:512])  # warm-up
    seconds, parts = timed(lambda: [FeaturesAndLabels(features(split[part]), label[split[part]]) for part in SPLITS])
    print(f"encoder: {sum(len(split[part]) for part in SPLITS) / seconds:,.0f} images/s")
    return parts


def random_features(hidden_size: int = 384, num_classes: int = 10) -> list[FeaturesAndLabels]:
    """Overlapping classes in correlated features, with the sizes of Galaxy10's splits."""
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(hidden_size, hidden_size)) * np.geomspace(1, 0.01, hidden_size)
    centers = rng.normal(scale=0.12, size=(num_classes, hidden_size))
    parts = []
    for count in (14_094, 1_762, 1_762):
        label = rng.integers(0, num_classes, count)
        features = (centers[label] + rng.normal(size=(count, hidden_size))) @ mixing.T
        parts.append(FeaturesAndLabels(features.astype(np.float32), label))
    return parts


def fit_warm_start(
    train: FeaturesAndLabels, validation: FeaturesAndLabels, test: FeaturesAndLabels
) -> tuple[np.ndarray, float]:
    """Predicted test classes and the selected C of the evaluation's linear probe."""
    probe = linear_probe(train, validation)
    return probe.probabilities(test.features).argmax(axis=1), probe.best_params["C"]


def fit_cold_start(
    train: FeaturesAndLabels, validation: FeaturesAndLabels, test: FeaturesAndLabels, c_grid: Sequence[float]
) -> tuple[np.ndarray, float]:
    """The same of scikit-learn's default solver, whose 100 iterations may be too few to converge."""
    scaler = StandardScaler().fit(train.features)
    x, x_validation = scaler.transform(train.features), scaler.transform(validation.features)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        models = [LogisticRegression(C=c).fit(x, train.label) for c in c_grid]
    best = max(models, key=lambda model: model.score(x_validation, validation.label))
    return best.predict(scaler.transform(test.features)), best.C


if __name__ == "__main__":
    with one_line_errors(sys.argv[0]):
        main(sys.argv[1:])

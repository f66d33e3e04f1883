"""Few labels: methods on nested, stratified subsets of a training set, and how many labels pre-training is worth."""

import contextlib
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from galaxy_mae.evaluation import frozen
from galaxy_mae.evaluation.methods import Method
from galaxy_mae.evaluation.preparation import Evaluation
from galaxy_mae.evaluation.results import Fit, is_finished, read_result
from galaxy_mae.files import read_json, write_json
from galaxy_mae.training.recipe import global_batch_size

TRANSFER_LABELS = (100, 600)  # training labels of a transfer to another data set
FEW_DRAWS, SOME_DRAWS, FEW = 5, 3, 0.1  # draws of subsets below a tenth of the training set, and of larger ones
# An epoch of fine-tuning on few labels repeats them until it is as long as this fraction of a complete epoch.
MIN_EPOCH = 0.2


class LabelSubset(NamedTuple):
    """Sample indices of training galaxies, (n,) int64; subsets of the same draw are nested."""

    rows: np.ndarray
    draw: int


def stratified_order(label: np.ndarray, seed: int, draw: int) -> np.ndarray:
    """An order, (M,) int64, of which every beginning that is long enough is a stratified subset.

    One galaxy of each class comes first. After that a beginning of n galaxies has n / M of each class, to within one,
    where that first galaxy is not already more. A function of its arguments alone.
    """
    rng = np.random.default_rng([seed, draw])
    rank, position = np.zeros(len(label), np.int64), np.zeros(len(label))
    for c in np.unique(label):
        members = rng.permutation(np.flatnonzero(label == c))
        rank[members] = np.arange(len(members))
        position[members] = (np.arange(len(members)) + 0.5) / len(members)
    return np.lexsort((rng.random(len(label)), position, rank > 0))


def label_subsets(train: np.ndarray, label: np.ndarray, sizes: Sequence[int], seed: int) -> list[LabelSubset]:
    """Subsets of a training set, from the smallest; several draws of each unless it is the complete set.

    `train` and `label` are (M,) int64 sample indices and classes. Sizes become at least one per class, at most M.
    """
    subsets = []
    for size in sorted({min(max(size, len(np.unique(label))), len(train)) for size in sizes}):
        draws = FEW_DRAWS if size / len(train) < FEW else SOME_DRAWS if size < len(train) else 1
        orders = [stratified_order(label, seed, draw) for draw in range(draws)]
        subsets += [LabelSubset(train[np.sort(order[:size])], draw) for draw, order in enumerate(orders)]
    return subsets


def run_few_labels(
    method: Method, evaluation: Evaluation, name: str, sizes: Sequence[int], fractions: Sequence[float] = ()
) -> None:
    """Train a method's classifiers on subsets of the training labels, of some sizes, and write the result `name`.

    The validation set, by which all is selected, stays complete. With `fractions`, which the sizes are of, a complete
    subset is the method itself, which is finished.
    """
    train, fits = evaluation.labelled.train, {}
    for subset in label_subsets(train, evaluation.labelled.label[train], sizes, evaluation.seeds[0]):
        if fractions and len(subset.rows) == len(train):
            found = _of_all_labels(method, evaluation)
        else:
            found = _of_subset(method, evaluation, name, subset)
        for classifier, fitted in found.items():
            fits.setdefault((classifier, len(subset.rows)), []).extend(fitted)
    evaluation.writer.write(name, fits, {"label_fractions": list(fractions), "training_galaxies": len(train)})


def _classifiers(method: Method, evaluation: Evaluation) -> list[Method]:
    """A method and those it writes too that are repeated on few labels."""
    return [each for each in evaluation.written_by(method) if each.few_labels]


def _of_all_labels(method: Method, evaluation: Evaluation) -> dict[str, list[Fit]]:
    """By classifier, what was predicted and selected from every seed with all labels."""
    found = {}
    for each in _classifiers(method, evaluation):
        if is_finished(evaluation.folder, each.name):
            result = read_result(evaluation.folder, each.name, evaluation.writer.config)
            by_seed = zip(result.about["seeds"], result.predictions.predicted, strict=True)
            params = result.about["best_params"]
            found[each.classifier] = [Fit(seed, predicted, params[str(seed)]) for seed, predicted in by_seed]
    return found


def _of_subset(method: Method, evaluation: Evaluation, name: str, subset: LabelSubset) -> dict[str, list[Fit]]:
    """By classifier, what was predicted and selected with the labels of a subset; kept in a file."""
    name = f"{method.name}/{name}/{len(subset.rows)}_{subset.draw}"
    folder, run_id = evaluation.folder / name, evaluation.writer.run_id(name)
    path, probe = folder.with_name(f"{folder.name}.json"), method.trained_on == "features"
    optional = {"radial_probe"}  # there are too few patches for rings
    expected = {each.classifier for each in _classifiers(method, evaluation)} - optional
    stored = read_json(path, "delete it", ("run", "fits")) if path.exists() else {"run": None}
    if stored["run"] != run_id or not expected <= set(stored["fits"]):
        fits = (_probe_subset if probe else _fine_tune_subset)(method, evaluation, name, subset)
        stored = {"run": run_id, "fits": {key: [fit.predicted.tolist(), fit.best_params] for key, fit in fits.items()}}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, stored)
    for file in filter(Path.is_file, folder.glob("*")):  # the classifier; logs are in folders beside it
        file.unlink()
    with contextlib.suppress(OSError):
        folder.rmdir()
    return {key: [Fit(subset.draw, np.array(predicted), x)] for key, (predicted, x) in stored["fits"].items()}


def _encoder_seed(evaluation: Evaluation, subset: LabelSubset) -> int:
    """Random encoders take turns, so that the spread of the draws includes theirs."""
    return evaluation.seeds[subset.draw % len(evaluation.seeds)]


def _probe_subset(method: Method, evaluation: Evaluation, name: str, subset: LabelSubset) -> dict[str, Fit]:
    model = evaluation.initial_encoder(method, _encoder_seed(evaluation, subset))
    encoder = frozen.FrozenEncoder(evaluation, model, [subset.draw], subset.rows)
    fits = {each.classifier: getattr(frozen, each.classifier)([encoder]) for each in _classifiers(method, evaluation)}
    return {classifier: fitted[0] for classifier, fitted in fits.items() if fitted}


def _fine_tune_subset(method: Method, evaluation: Evaluation, name: str, subset: LabelSubset) -> dict[str, Fit]:
    """As many epochs as with all labels, over a subset that is repeated."""
    epoch = max(global_batch_size(evaluation.recipe.training), MIN_EPOCH * len(evaluation.labelled.train))
    labelled = replace(evaluation.labelled, train=np.tile(subset.rows, math.ceil(epoch / len(subset.rows))))
    seed = evaluation.seeds[0] + subset.draw
    model, best_params = evaluation.fine_tune(method, name, _encoder_seed(evaluation, subset), seed, labelled)
    return {method.classifier: Fit.of(subset.draw, evaluation.classify(model), best_params)}


def labels_at_accuracy(labels: Sequence[int], accuracies: Sequence[float], accuracy: float) -> float | None:
    """How many labels a measured curve needs to reach an accuracy first, log-linearly interpolated.

    `labels` increase, and `accuracies` has one for each. None if the accuracy is below the first or above all of them.
    """
    if not accuracies[0] <= accuracy <= max(accuracies):
        return None
    i = int(np.argmax(np.asarray(accuracies) >= accuracy))
    if i == 0:
        return float(labels[0])
    part = (accuracy - accuracies[i - 1]) / (accuracies[i] - accuracies[i - 1])
    return float(np.exp(np.log(labels[i - 1]) + part * np.log(labels[i] / labels[i - 1])))


def value_of_pretraining(
    labels: Sequence[int], random: Sequence[float], ssl: Sequence[float], classifier: str = "Linear probe"
) -> str:
    """One sentence: how many times more labels random weights need for the same accuracy.

    `labels` are increasing numbers, at which the accuracies from `random` and from pre-trained weights were measured.
    """
    needed = [(n, labels_at_accuracy(labels, random, accuracy)) for n, accuracy in zip(labels, ssl, strict=True)]
    if reached := [(n, m) for n, m in needed if m is not None]:
        ratios = sorted(m / n for n, m in reached)
        span = " to ".join(dict.fromkeys(map(_two_digits, (ratios[0], ratios[-1]))))  # once if they are the same
        pairs = ", ".join(f"{n:,} labels reach what {m:,.0f} do from random weights" for n, m in reached)
        return f"{classifier}: pre-training is worth {span} times the labels ({pairs}; log-linear interpolation)."
    if ssl[0] > max(random):
        return (
            f"{classifier}: pre-training is worth more than {_two_digits(labels[-1] / labels[0])} times the labels: "
            f"{labels[0]:,} labels reach more ({100 * ssl[0]:.1f} %) than all {labels[-1]:,} do from random weights "
            f"({100 * max(random):.1f} %)."
        )
    return (
        f"{classifier}: how many labels pre-training is worth cannot be computed: no measured accuracy from "
        "pre-trained weights is within the range of those from random weights."
    )


def _two_digits(value: float) -> str:
    return f"{float(f'{value:.2g}'):,g}"

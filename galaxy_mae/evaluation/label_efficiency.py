"""Few labels: nested, stratified subsets of a training set, and how many labels pre-training is worth."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

TRANSFER_LABELS = (100, 600)  # training labels of a transfer to another data set
FEW_DRAWS, SOME_DRAWS, FEW = 5, 3, 0.1  # draws of subsets below a tenth of the training set, and of larger ones


@dataclass(frozen=True)
class LabelSubset:
    """A subset of the training galaxies.

    Attributes:
        rows: (n,) int64 sample indices.
        draw: number of the random order that it begins; the subsets of one draw are nested.
        fraction: of the training set.
    """

    rows: np.ndarray
    draw: int
    fraction: float


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

    Args:
        train: (M,) int64 sample indices.
        label: (M,) their classes.
        sizes: numbers of galaxies. Each is at least one per class and at most M; equal ones count once.
        seed: selects the subsets.
    """
    sizes = sorted({min(max(size, len(np.unique(label))), len(train)) for size in sizes})
    orders = [stratified_order(label, seed, draw) for draw in range(FEW_DRAWS)]
    subsets = []
    for size in sizes:
        fraction = size / len(train)
        draws = FEW_DRAWS if fraction < FEW else SOME_DRAWS if fraction < 1 else 1
        subsets += [LabelSubset(train[np.sort(orders[draw][:size])], draw, fraction) for draw in range(draws)]
    return subsets


def labels_at_accuracy(labels: Sequence[int], accuracies: Sequence[float], accuracy: float) -> float | None:
    """How many labels a measured curve needs to reach an accuracy first, log-linearly interpolated.

    Args:
        labels: increasing numbers.
        accuracies: one for each.
        accuracy: the one to reach.

    Returns:
        The number of labels; None if the accuracy is below the first or above all that were measured.
    """
    if accuracy < accuracies[0]:
        return None
    for i, reached in enumerate(accuracies):
        if reached >= accuracy:
            if i == 0:
                return float(labels[0])
            part = (accuracy - accuracies[i - 1]) / (reached - accuracies[i - 1])
            return float(np.exp(np.log(labels[i - 1]) + part * np.log(labels[i] / labels[i - 1])))
    return None


def value_of_pretraining(
    labels: Sequence[int], random: Sequence[float], ssl: Sequence[float], classifier: str = "Linear probe"
) -> str:
    """One sentence: how many times more labels random weights need for the same accuracy.

    Args:
        labels: increasing numbers, at which both curves were measured.
        random, ssl: accuracies from random and from pre-trained weights.
        classifier: its name, which begins the sentence.
    """
    needed = [(n, labels_at_accuracy(labels, random, accuracy)) for n, accuracy in zip(labels, ssl, strict=True)]
    ratios = [(m / n, n, m) for n, m in needed if m is not None]
    if ratios:
        (low, *_), (high, *_) = min(ratios), max(ratios)
        span = " to ".join(dict.fromkeys(map(_two_digits, (low, high))))  # once if they are the same
        pairs = ", ".join(f"{n:,} labels reach what {m:,.0f} do from random weights" for _, n, m in ratios)
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

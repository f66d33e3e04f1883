"""Scores of predictions, with intervals and paired tests.

Every accuracy has a 95 % interval that covers both sources of uncertainty: the size of the test set and, if a method
was run from several seeds, the spread between them. Classes are integers: `label` (N,) of the test galaxies,
`predicted` (S, N) and `baseline` (T, N) with a row per seed.
"""

import itertools
from typing import NamedTuple

import numpy as np
from numpy.polynomial import Polynomial
from scipy.special import ndtri

CONFIDENCE = 0.95


class Estimate(NamedTuple):
    """A number with its 95 % interval, as a fraction of 1."""

    value: float
    low: float
    high: float


def percent(estimate: Estimate) -> str:
    """An accuracy with its interval, as in `57.49 % (53.80 to 61.10)`."""
    return f"{100 * estimate.value:.2f} % ({100 * estimate.low:.2f} to {100 * estimate.high:.2f})"


def accuracy(label: np.ndarray, predicted: np.ndarray) -> Estimate:
    """Mean accuracy over seeds, for galaxies and seeds like these.

    The interval joins Wilson's score interval (Wilson 1927), for the test set's size, with Student's t interval of the
    mean over seeds in quadrature (method "square and add", Newcombe 1998, Statistics in Medicine 17, 873). With one
    seed it is Wilson's alone.
    """
    each = (predicted == label).mean(axis=1)  # (S,)
    value = float(each.mean())
    low, high = wilson(value, len(label))
    return _joined(value, low, high, _seed_ci_half_width(each))


def gain(label: np.ndarray, predicted: np.ndarray, baseline: np.ndarray) -> Estimate:
    """Difference of two mean accuracies on the same test galaxies, `predicted` less `baseline`.

    The interval joins Tango's score interval for paired proportions, for the test set's size, with Student's t
    intervals of the means over each side's seeds in quadrature, as in `accuracy`. With one seed on each side it is
    Tango's alone. With several, the discordant fractions are means over all pairs of seeds, so that the interval is
    never narrower than that of the average pair; a side with one seed says nothing about the spread of its seeds.
    """
    correct, correct_baseline = predicted == label, baseline == label
    fraction, fraction_baseline = correct.mean(axis=0), correct_baseline.mean(axis=0)  # (N,) each, over seeds
    only_this = float(np.mean(fraction * (1 - fraction_baseline)))
    only_baseline = float(np.mean(fraction_baseline * (1 - fraction)))
    value = only_this - only_baseline
    low, high = tango(only_this, only_baseline, len(label))
    seeds = np.hypot(*(_seed_ci_half_width(each.mean(axis=1)) for each in (correct, correct_baseline)))
    return _joined(value, low, high, seeds, minimum=-1.0)


def tango(first: float, second: float, count: int) -> tuple[float, float]:
    """Tango's score interval of the difference of two paired proportions (Tango 1998, Statistics in Medicine 17, 891).

    It has a width for every outcome, also without discordant pairs, and leaves out 0 exactly where McNemar's
    asymptotic test rejects equality.

    `first` and `second` are fractions of `count` pairs, in which only the first, or only the second, succeeds.
    """
    z, difference = ndtri((1 + CONFIDENCE) / 2), first - second
    # An end d of the interval is z standard errors away from the observed difference, at the variance that belongs to
    # q, the maximum-likelihood estimate of `second` if the true difference were d: both conditions hold at a root of a
    # quartic. Its other root of q has a smaller variance, and therefore roots inside the interval. As a function of the
    # distance from the difference in units of 1 / sqrt(count), so that the roots are well conditioned.
    x = Polynomial([0, 1])
    d = difference + x / np.sqrt(count)
    q = ((x / z) ** 2 - d * (1 - d)) / 2
    roots = (2 * q**2 + (2 * d - difference * d - first - second) * q - second * d * (1 - d)).roots()
    ends = difference + roots.real[abs(roots.imag) < 1e-6] / np.sqrt(count)
    return float(max(-1.0, ends.min(initial=difference))), float(min(1.0, ends.max(initial=difference)))


def wilson(fraction: float, count: int) -> tuple[float, float]:
    """Wilson's score interval of a fraction observed in `count` trials (Wilson 1927)."""
    z = ndtri((1 + CONFIDENCE) / 2)
    center = (fraction + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * np.sqrt(fraction * (1 - fraction) / count + z**2 / (4 * count**2))
    # The interval of no success begins at 0, and that of no failure ends at 1, but for rounding.
    return float(max(0.0, min(fraction, center - half))), float(min(1.0, max(fraction, center + half)))


def _joined(value: float, low: float, high: float, seeds: float, minimum: float = 0.0) -> Estimate:
    """An interval, widened by the half width of another one in quadrature and cut off at `minimum` and 1."""
    below, above = float(np.hypot(value - low, seeds)), float(np.hypot(high - value, seeds))
    return Estimate(value, max(minimum, value - below), min(1.0, value + above))


def _seed_ci_half_width(each: np.ndarray) -> float:
    """Half the width of Student's t interval of the mean of a few values; 0 for a single one."""
    from scipy import stats  # slow to import

    if len(each) == 1:
        return 0.0
    return float(stats.t.ppf((1 + CONFIDENCE) / 2, len(each) - 1) * each.std(ddof=1) / np.sqrt(len(each)))


def mcnemar(label: np.ndarray, predicted: np.ndarray, baseline: np.ndarray) -> dict[str, float]:
    """McNemar's exact paired test (McNemar 1947) of two classifiers on the same test galaxies.

    If there are several seeds, all pairs of seeds are tested, and the pair with the largest p-value is reported.

    Returns:
        `only_this` and `only_baseline`: galaxies that only one of the two classifies correctly; `p_value`, two-sided;
        `num_seed_pairs`: how many pairs were tested.
    """
    from scipy import stats

    tested = []
    for one, other in itertools.product(predicted == label, baseline == label):
        b, c = int(np.sum(one & ~other)), int(np.sum(~one & other))
        tested.append((float(stats.binomtest(b, b + c).pvalue) if b + c else 1.0, b, c))
    p_value, b, c = max(tested)
    return {"only_this": b, "only_baseline": c, "p_value": p_value, "num_seed_pairs": len(tested)}


def all_scores(label: np.ndarray, predicted: np.ndarray, class_names: tuple[str, ...]) -> dict:
    """All scores of a results file; means over seeds unless stated otherwise.

    Returns:
        `accuracy`, `interval` (95 %), `accuracy_per_seed`, `balanced_accuracy` (mean recall of the classes that occur),
        `macro_f1`, `per_class` (precision, recall, f1, test_images), `confusion_matrix` (true class by predicted class,
        galaxies summed over seeds), `test_images`. The precision of a class that is never predicted is 0.
    """
    from sklearn.metrics import confusion_matrix

    classes = np.arange(len(class_names))
    estimate = accuracy(label, predicted)
    precision, recall, f1 = _scores_per_seed(label, predicted, classes, average=None).mean(axis=0)  # (classes,) each
    _, balanced, macro_f1 = _scores_per_seed(label, predicted, np.unique(label), average="macro").mean(axis=0)
    return {
        "accuracy": estimate.value,
        "interval": [estimate.low, estimate.high],
        "accuracy_per_seed": [float(np.mean(p == label)) for p in predicted],
        "balanced_accuracy": float(balanced),
        "macro_f1": float(macro_f1),
        "per_class": {
            name: {
                "precision": float(precision[c]),
                "recall": float(recall[c]),
                "f1": float(f1[c]),
                "test_images": int(np.sum(label == c)),
            }
            for c, name in enumerate(class_names)
        },
        "confusion_matrix": sum(confusion_matrix(label, p, labels=classes) for p in predicted).tolist(),
        "test_images": len(label),
    }


def per_class_estimates(
    label: np.ndarray, predicted: np.ndarray, classes: int
) -> list[tuple[Estimate | None, Estimate | None, Estimate | None]]:
    """Precision, recall and F1 of every class, means over seeds, each with its 95 % interval.

    The intervals are joined of two parts as in `accuracy`. The part for the number of galaxies is Wilson's, of the
    precision among the galaxies that are predicted as the class, of the recall among those that are of the class. F1 is
    2 J / (1 + J), where J is the fraction of correct ones among the galaxies that are either (Jaccard's index); its
    interval is Wilson's of J, transformed alike. Numbers of galaxies are means over seeds.

    Returns:
        For each class the three scores; None for a score without galaxies, as the recall of a class that is not there
        and the precision of one that is never predicted.
    """
    each, found = _scores_per_seed(label, predicted, np.arange(classes), average=None), []
    means = each.mean(axis=0)  # (3, classes)
    for c in range(classes):
        true, guessed = np.sum(label == c), (predicted == c).sum(axis=1)
        union = true + guessed - ((label == c) & (predicted == c)).sum(axis=1)
        scores = []
        for score, count in enumerate((guessed.mean(), true, union.mean())):
            value, seeds = float(means[score, c]), _seed_ci_half_width(each[:, score, c])
            if not count:
                scores.append(None)
            elif score < 2:
                scores.append(_joined(value, *wilson(value, count), seeds))
            else:
                low, high = (2 * j / (1 + j) for j in wilson(value / (2 - value), count))
                scores.append(_joined(value, low, high, seeds))
        found.append(tuple(scores))
    return found


def _scores_per_seed(label: np.ndarray, predicted: np.ndarray, classes: np.ndarray, average: str | None) -> np.ndarray:
    """Precision, recall and F1 of each seed: (S, 3, classes), or (S, 3) averaged over the classes."""
    from sklearn.metrics import precision_recall_fscore_support as scores

    return np.array([scores(label, p, labels=classes, average=average, zero_division=0)[:3] for p in predicted])

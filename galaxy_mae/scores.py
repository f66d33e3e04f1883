"""How good predictions are, and how sure one can be of it.

Every accuracy carries a 95 % interval that holds both sources of doubt: the size of the test set and, where a method
was run from several seeds, the spread between them.
"""

from dataclasses import dataclass

import numpy as np
from scipy import stats
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
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
    mean over seeds by squares (method "square and add", Newcombe 1998, Statistics in Medicine 17, 873). With one seed
    it is Wilson's alone.

    Args:
        label: (N,) integers.
        predicted: (S, N) integers, one row a seed.
    """
    each = (predicted == label).mean(axis=1)  # (S,)
    value = float(each.mean())
    low, high = wilson(value, len(label))
    doubt = _seed_doubt(each)
    return Estimate(
        value, max(0.0, value - np.hypot(value - low, doubt)), min(1.0, value + np.hypot(high - value, doubt))
    )


def gain(label: np.ndarray, predicted: np.ndarray, baseline: np.ndarray) -> Estimate:
    """Difference of two mean accuracies on the same test galaxies, `predicted` less `baseline`.

    Galaxies are paired: what is normally distributed is the mean over galaxies of the difference in their share of
    right answers. The doubt of each side's seeds is added by squares.

    Args:
        label: (N,) integers.
        predicted, baseline: (S, N) and (T, N) integers.
    """
    right, right_baseline = predicted == label, baseline == label
    difference = right.mean(axis=0) - right_baseline.mean(axis=0)  # (N,)
    value = float(difference.mean())
    half = stats.norm.ppf((1 + CONFIDENCE) / 2) * difference.std(ddof=1) / np.sqrt(len(label))
    doubt = [_seed_doubt(each.mean(axis=1)) for each in (right, right_baseline)]
    half = float(np.sqrt(half**2 + doubt[0] ** 2 + doubt[1] ** 2))
    return Estimate(value, value - half, value + half)


def wilson(share: float, count: int) -> tuple[float, float]:
    """Wilson's score interval of a share seen in `count` trials."""
    z = stats.norm.ppf((1 + CONFIDENCE) / 2)
    centre = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * np.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return float(max(0.0, centre - half)), float(min(1.0, centre + half))


def _seed_doubt(each: np.ndarray) -> float:
    """Half the width of Student's t interval of the mean of a few values; 0 for a single one."""
    if len(each) == 1:
        return 0.0
    return float(stats.t.ppf((1 + CONFIDENCE) / 2, len(each) - 1) * each.std(ddof=1) / np.sqrt(len(each)))


def mcnemar(label: np.ndarray, predicted: np.ndarray, baseline: np.ndarray) -> dict[str, float]:
    """McNemar's exact paired test (McNemar 1947) of two classifiers on the same test galaxies.

    Where there are several seeds, all pairs of seeds are tested, and the pair with the largest p-value is reported.

    Args:
        label: (N,) integers.
        predicted, baseline: (S, N) and (T, N) integers.

    Returns:
        `only_this` and `only_baseline`: galaxies that one of the two alone has right; `p_value`, two-sided;
        `pairs_of_seeds`: how many pairs were tested.
    """
    pairs = [(_discordant(label, one, other)) for one in predicted for other in baseline]
    tested = [(float(stats.binomtest(b, b + c).pvalue) if b + c else 1.0, b, c) for b, c in pairs]
    p_value, only_this, only_baseline = max(tested)
    return {
        "only_this": only_this,
        "only_baseline": only_baseline,
        "p_value": p_value,
        "pairs_of_seeds": len(pairs),
    }


def _discordant(label: np.ndarray, one: np.ndarray, other: np.ndarray) -> tuple[int, int]:
    return int(np.sum((one == label) & (other != label))), int(np.sum((one != label) & (other == label)))


def all_scores(label: np.ndarray, predicted: np.ndarray, class_names: tuple[str, ...]) -> dict:
    """Everything a results file says about predictions; means over seeds where nothing else is said.

    Args:
        label: (N,) integers.
        predicted: (S, N) integers.
        class_names: of the classes 0, 1, ...

    Returns:
        `accuracy`, `interval` (95 %), `accuracy_per_seed`, `balanced_accuracy` (mean recall of the classes that occur),
        `macro_f1`, `per_class` (precision, recall, f1, test_images), `confusion_matrix` (true class by predicted class,
        galaxies summed over seeds), `test_images`. A precision of a class that was never predicted is 0.
    """
    classes = np.arange(len(class_names))
    estimate = accuracy(label, predicted)
    precision, recall, f1 = _mean_scores(label, predicted, classes, average=None)  # (classes,) each
    _, balanced, macro_f1 = _mean_scores(label, predicted, np.unique(label), average="macro")
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


def _mean_scores(label: np.ndarray, predicted: np.ndarray, classes: np.ndarray, average: str | None) -> np.ndarray:
    """Precision, recall and F1, means over seeds: (3, classes), or (3,) averaged over the classes."""
    each = [
        precision_recall_fscore_support(label, p, labels=classes, average=average, zero_division=0)[:3]
        for p in predicted
    ]
    return np.mean(each, axis=0)

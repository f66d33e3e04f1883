"""Calibration: whether of the galaxies that a classifier is 80 % sure of, 80 % are classified correctly.

The probability of the predicted class is called confidence, as in the literature. Everywhere `probabilities` are (N,
classes) float, or one such array per seed in a list, and `label` is (N,) integers.
"""

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax

BINS = 15  # of the confidence, as in Guo et al. 2017
MAX_TEMPERATURE = 1000.0  # and its inverse: the range in which a temperature is sought
_RESAMPLES, _QUANTILE = 1000, 0.95


def fit_temperature(logits: np.ndarray, label: np.ndarray) -> float:
    """The temperature T > 0 for which softmax(logits / T) has the smallest negative log-likelihood.

    (Temperature scaling, Guo et al. 2017, "On calibration of modern neural networks", section 4.2.) The likelihood has
    one maximum in 1 / T. It lies at T = 0 if every row is classified correctly, and at no finite T if the logits say
    nothing about the classes. Such rows, a single one among them, do not tell how sure to be: T is then 1. `logits` are
    (N, classes) float, up to a constant of each row, so log-probabilities as well.
    """
    logits = np.asarray(logits, np.float64)
    of_label = logits[np.arange(len(label)), label]
    separable = bool(np.all(of_label >= logits.max(axis=1)))
    uninformative = bool(of_label.mean() <= logits.mean())  # the likelihood's derivative in 1 / T at 0
    if separable or uninformative:
        return 1.0

    def negative_log_likelihood(log_temperature: float) -> float:
        scaled = log_softmax(logits / np.exp(log_temperature), axis=1)
        return -float(scaled[np.arange(len(label)), label].mean())

    end = np.log(MAX_TEMPERATURE)
    fitted = minimize_scalar(negative_log_likelihood, bounds=(-end, end), method="bounded", options={"xatol": 1e-6})
    return float(np.exp(fitted.x))


def at_temperature(probabilities: np.ndarray, temperature: float) -> np.ndarray:
    """Softmax of logits / temperature, from the probabilities (N, classes) at temperature 1: (N, classes) float64."""
    return softmax(log_probabilities(probabilities) / temperature, axis=1)


def log_probabilities(probabilities: np.ndarray) -> np.ndarray:
    """Logarithms (N, classes) float64 that are finite also where a probability was rounded to 0."""
    return np.log(np.maximum(probabilities, np.finfo(np.float64).tiny))


def expected_calibration_error(probabilities: np.ndarray, label: np.ndarray) -> float:
    """Mean difference of accuracy and confidence over bins of the confidence, weighted by their galaxies.

    (Guo et al. 2017, section 2, with bins of equal width.) It is above 0 also for a calibrated classifier, the more so
    the fewer the galaxies are: see `calibration_scores`.
    """
    confidence = probabilities.max(axis=1)
    return _binned_error(_bin_numbers(confidence), confidence, probabilities.argmax(axis=1) == label)


def reliability_bins(probabilities: list[np.ndarray], label: np.ndarray) -> list[dict[str, float]]:
    """What a reliability diagram shows of each bin that is not empty; `galaxies` are summed over seeds."""
    confidence = np.concatenate([p.max(axis=1) for p in probabilities])
    correct = np.concatenate([p.argmax(axis=1) == label for p in probabilities])
    number = _bin_numbers(confidence)
    return [
        {
            "bin": int(b),
            "galaxies": int(np.sum(number == b)),
            "confidence": float(confidence[number == b].mean()),
            "accuracy": float(correct[number == b].mean()),
        }
        for b in np.unique(number)
    ]


def calibration_scores(probabilities: list[np.ndarray], label: np.ndarray) -> dict:
    """The calibration entry of a results file.

    There is no interval of the error. The error of a finite test set is too large on average, and the bootstrap doubles
    this bias: of 700 galaxies of a calibrated classifier, its 95 % interval never contains 0. Instead the error is
    compared with those of a calibrated classifier of the same confidences (consistency resampling, Bröcker and Smith
    2007, Weather and Forecasting 22, 651).

    Returns:
        `ece`, mean over seeds; `ece_per_seed`; `ece_if_calibrated`, which 95 % of calibrated classifiers stay below;
        `ece_of_mean`, of the mean probabilities over seeds; `reliability`, as of `reliability_bins`.
    """
    each = [expected_calibration_error(p, label) for p in probabilities]
    return {
        "ece": float(np.mean(each)),
        "ece_per_seed": each,
        "ece_if_calibrated": _error_if_calibrated([p.max(axis=1) for p in probabilities]),
        "ece_of_mean": expected_calibration_error(np.mean(probabilities, axis=0), label),
        "reliability": reliability_bins(probabilities, label),
    }


def _error_if_calibrated(confidences: list[np.ndarray]) -> float:
    """The 95 % quantile of the mean error over seeds, if galaxies are correct with the probability of the confidence.

    A galaxy's random number is the same for all seeds, which mostly agree with each other.
    """
    rng, errors, bins = np.random.default_rng(0), [], [_bin_numbers(confidence) for confidence in confidences]
    for _ in range(_RESAMPLES):
        draws = rng.random(len(confidences[0]))
        errors.append(np.mean([_binned_error(b, c, draws < c) for b, c in zip(bins, confidences, strict=True)]))
    return float(np.quantile(errors, _QUANTILE))


def _bin_numbers(confidence: np.ndarray) -> np.ndarray:
    """From 0; the upper end of a bin belongs to it, as in the paper."""
    return np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)


def _binned_error(bins: np.ndarray, confidence: np.ndarray, correct: np.ndarray) -> float:
    differences = np.bincount(bins, correct - confidence)
    return float(np.abs(differences).sum() / len(confidence))

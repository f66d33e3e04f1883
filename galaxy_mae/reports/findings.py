"""Sentences that follow from the results of an evaluation, each only if the results that it needs are there."""

from collections.abc import Mapping
from itertools import product

import numpy as np

from galaxy_mae.evaluation.methods import ARRAY_METHODS, BY_NAME, METHODS, Method
from galaxy_mae.evaluation.results import Result
from galaxy_mae.evaluation.scores import Estimate, gain, mcnemar, percent
from galaxy_mae.reports.document import as_percent

MIN_IMAGES = 10_000  # of a pre-training, from which on it is judged, each counted as often as it is seen


def key_findings(results: Mapping[str, Result]) -> list[str]:
    """The key findings of the finished results, by the names of their methods."""
    finished = [method for method in METHODS if method.name in results]
    findings = [
        _effect_of_pretraining(method, results)
        for method in ARRAY_METHODS
        if method in finished and method.baseline in results
    ]
    named = [method for method in finished if method.phrase]
    pretrained = [method for method in named if method.initialization == "ssl"]
    from_scratch = [method for method in named if method.initialization == "random"]
    for method, other in product(pretrained, from_scratch):
        if method.baseline != other.name:
            difference = gain_over(results[method.name], results[other.name])
            verb = _compare(
                difference, "is more accurate than", "is less accurate than", "does not differ measurably from"
            )
            subject = method.phrase[0].upper() + method.phrase[1:]
            findings.append(f"{subject} {verb} {other.phrase}: {percentage_points(difference)} percentage points.")
    if "zero_shot" in results:
        zero = results["zero_shot"].about
        each, majority = zero["accuracy_per_seed"], zero["majority_class"]
        findings.append(
            f"Untrained networks reach {as_percent(np.mean(each), 1)} (min-max {100 * min(each):.1f} to "
            f"{100 * max(each):.1f}, {len(each)} random initializations); chance is {as_percent(zero['chance'])}, and "
            f"always predicting {majority['name']} gives {as_percent(majority['accuracy'], 1)}."
        )
    if best := best_method(results):
        findings.append(_best_method(results[best]))
        others = [method for method in ARRAY_METHODS if method in finished and method.name != best]
        equal = [m.title for m in others if gain_over(results[best], results[m.name]).low <= 0]
        if equal:
            findings.append(f"The best method cannot be told apart from: {'; '.join(equal)}.")
    return findings


def is_too_short(images_seen: int | None) -> bool:
    """Whether a pre-training saw so few images that nothing follows from it: see `verdict`."""
    return bool(images_seen and images_seen < MIN_IMAGES)


def verdict(pretraining: dict | None, images_seen: int | None, gains: Mapping[str, Mapping[int, Estimate]]) -> str:
    """Whether pre-training helps, in plain words; if it was too short, that alone.

    Args:
        pretraining: the recipe of the pre-training, or None if it is not known.
        images_seen: how many images it was trained on, each counted as often as it was seen.
        gains: of pre-trained over random weights, by the name of what is compared and the number of labels.
    """
    after, batch = "", (pretraining or {}).get("batch_size")
    if batch and images_seen:
        after = f" ({images_seen // batch:,} steps)"
        if is_too_short(images_seen):
            return (
                f"This pre-training{after} is too short to say whether it helps: it saw {images_seen:,} images, fewer "
                f"than {MIN_IMAGES:,}. Train longer; the numbers below only show that the commands work."
            )
    found: dict[str, list[str]] = {}
    for name, by_labels in gains.items():
        labels: dict[str, list[str]] = {}
        for count, difference in sorted(by_labels.items()):
            verb = _compare(difference, "helps", "harms", "cannot be told apart from random weights in")
            labels.setdefault(verb, []).append(f"{count:,}")
        for verb, counts in labels.items():
            found.setdefault(verb, []).append(f"{name} ({', '.join(counts)} labels)")
    sentences = [f"{verb} {' and '.join(names)}" for verb, names in found.items()]
    return f"Pre-training{after} {'; it '.join(sentences) or 'has not been compared with random weights yet'}."


def best_method(results: Mapping[str, Result]) -> str | None:
    """Name of the method with the highest accuracy, additional baselines aside."""
    finished = [method.name for method in ARRAY_METHODS if method.name in results]
    return max(finished, key=lambda name: results[name].estimate.value, default=None)


def gain_over(result: Result, baseline: Result) -> Estimate:
    """How much more accurate a result is than another one on the same galaxies."""
    return gain(result.predictions.label, result.predictions.predicted, baseline.predictions.predicted)


def paired_test(result: Result, baseline: Result) -> dict[str, float]:
    """McNemar's test of the same."""
    return mcnemar(result.predictions.label, result.predictions.predicted, baseline.predictions.predicted)


def percentage_points(estimate: Estimate) -> str:
    """A difference with its interval in percentage points, as in `+19.80 (16.10 to 23.50)`."""
    return f"{100 * estimate.value:+.2f} ({100 * estimate.low:+.2f} to {100 * estimate.high:+.2f})"


def _effect_of_pretraining(method: Method, results: Mapping[str, Result]) -> str:
    result, baseline = results[method.name], results[method.baseline]
    difference = gain_over(result, baseline)
    verb = _compare(difference, "raises", "lowers", "does not measurably change")
    name = "fine-tuning" if method.trained_on == "images" else f"the {method.classifier_title.lower()}"
    return (
        f"Pre-training {verb} the accuracy of {name}: {as_percent(baseline.estimate.value, 1)} from random weights, "
        f"{as_percent(result.estimate.value, 1)} from pre-trained weights, {percentage_points(difference)} percentage "
        f"points (McNemar's p = {paired_test(result, baseline)['p_value']:.2g})."
    )


def _compare(difference: Estimate, above: str, below: str, neither: str) -> str:
    return above if difference.low > 0 else below if difference.high < 0 else neither


def _best_method(best: Result) -> str:
    """The best method, its easiest and hardest class, and its most frequent error."""
    names = list(best.about["per_class"])
    recall = {name: scores["recall"] for name, scores in best.about["per_class"].items() if scores["test_images"]}
    easy, hard = max(recall, key=recall.get), min(recall, key=recall.get)
    if recall[easy] == recall[hard]:
        extremes = f"Recall is {as_percent(recall[easy])} for every class of the test set"
    else:
        extremes = f"Recall is highest for {easy} ({as_percent(recall[easy])}) "
        extremes += f"and lowest for {hard} ({as_percent(recall[hard])})"
    counts = np.array(best.about["confusion_matrix"], dtype=float)
    fractions = counts / counts.sum(axis=1, keepdims=True).clip(1)
    np.fill_diagonal(fractions, 0)
    true, predicted = np.unravel_index(fractions.argmax(), fractions.shape)
    worst = fractions[true, predicted]
    error = f"its most frequent error is {names[true]} misclassified as {names[predicted]} ({as_percent(worst)})"
    return (
        f"Best method: {BY_NAME[best.name].title}, {percent(best.estimate)}, macro-F1 {best.about['macro_f1']:.3f}. "
        f"{extremes}; {error if worst else 'it makes no error'}."
    )

"""Turns the results of a folder into a table, key findings computed from the numbers, and figures.

Reads what `results.py` wrote and nothing else, so the report can be written at any time, also while methods are
missing. Each gain names its baseline: chance for methods that start from random weights, the same method from random
weights for those that start from pre-trained weights.
"""

from pathlib import Path

import numpy as np
import pandas as pd
from filelock import FileLock

from galaxy_mae import provenance
from galaxy_mae.data.leakage import describe_seen
from galaxy_mae.evaluation.calibration import BINS
from galaxy_mae.evaluation.label_efficiency import value_of_pretraining
from galaxy_mae.evaluation.results import (
    FINE_TUNES,
    METHODS,
    FewLabels,
    Result,
    failure_file,
    is_finished,
    read_config,
    read_few_labels,
    read_result,
)
from galaxy_mae.evaluation.scores import Estimate, gain, mcnemar, percent
from galaxy_mae.figures import (
    accuracy_bars,
    confusion_matrix,
    label_efficiency,
    layer_accuracies,
    reliability_diagrams,
)
from galaxy_mae.files import atomic_file, remove_leftovers
from galaxy_mae.training.tracking import finish_run, log_report, start_evaluation

TITLES = {
    "zero_shot": "Zero-shot (random weights)",
    "random_linear_probe": "Linear probe (random weights)",
    "ssl_linear_probe": "Linear probe (SSL weights)",
    "random_fine_tune": "Fine-tune (random weights)",
    "ssl_fine_tune": "Fine-tune (SSL weights)",
    "resnet18_from_scratch": "ResNet-18 from scratch",
    "convnextv2_nano_from_scratch": "ConvNeXt V2 nano from scratch",
    "raw_pixels": "Logistic regression on raw 32 x 32 pixels",
    "random_radial_probe": "Linear probe of means over rings, random weights",
    "ssl_radial_probe": "Linear probe of means over rings, SSL weights",
    "random_best_layer": "Linear probe at the best layer, random weights",
    "ssl_best_layer": "Linear probe at the best layer, SSL weights",
    "random_knn": "k-NN (20), random weights",
    "ssl_knn": "k-NN (20), SSL weights",
    "random_nearest_centroid": "Nearest centroid, random weights",
    "ssl_nearest_centroid": "Nearest centroid, SSL weights",
    "random_attentive_probe": "Attentive probe, random weights",
    "ssl_attentive_probe": "Attentive probe, SSL weights",
    "random_fine_tune_tta": "Fine-tune with test-time augmentation (8 dihedral views), random weights",
    "ssl_fine_tune_tta": "Fine-tune with test-time augmentation (8 dihedral views), SSL weights",
    "resnet18_from_scratch_tta": "ResNet-18 from scratch with test-time augmentation (8 dihedral views)",
    "convnextv2_nano_from_scratch_tta": "ConvNeXt V2 nano from scratch with test-time augmentation (8 dihedral views)",
}
BASELINES = tuple(name for name in TITLES if name not in METHODS)
LEGEND = (
    "Zero-shot: random encoder and untrained head. Linear probe: logistic regression on frozen features. "
    "Fine-tune: encoder and head trained on the labels."
)
PAIRED_NOTE = (
    "Both methods of a pair classify the same test galaxies. McNemar's test is exact; the counts and p are those of "
    "the pair of seeds with the largest p."
)

CLASSIFIERS = {"linear_probe": "Linear probe", "radial_probe": "Linear probe of means over rings"}
CLASSIFIERS |= {"fine_tune": "Fine-tune"}
FEW_LABELS_NOTE = (
    "The subsets of the training labels are stratified, hold every class, and are nested within a draw; random and "
    "pre-trained weights get the same ones. The intervals include the test set's size and the spread of the draws. The "
    "validation set, by which all hyper-parameters are selected, is the complete one at every number of labels."
)
LAYERS_NOTE = (
    "Linear probe and k-NN of the mean patch token of every layer. These are accuracies on the validation set, which "
    "also selects the C of the linear probes, not on the test set. Of the random encoders, the first one."
)
CALIBRATION_NOTE = (
    "ECE is the expected calibration error (Guo et al. 2017): the mean difference of accuracy and confidence, the "
    f"probability of the predicted class, over {BINS} bins of the confidence. It is above 0 also for a calibrated "
    "classifier: 95 % of those with the same confidences stay below the limit on so many test galaxies. Fine-tuned "
    "classifiers are calibrated by a temperature, which is fitted to the validation galaxies and divides the head's "
    "weights. The numbers are means over seeds, but for the ECE of the seeds' mean probabilities; the diagrams have "
    "every galaxy once per seed."
)


def write_report(folder: Path) -> None:
    """Write `report.md`, `accuracy.png`, and figures of the finished methods.

    These are `confusion_METHOD.png`, and of fine-tuned classifiers `reliability_METHOD.png`.

    Args:
        folder: of the results.

    Raises:
        UserError: no results there, or a result that is damaged or of another evaluation.
    """
    config = read_config(folder)
    with FileLock(folder / ".report.lock"):  # the tasks of an array write it in turn, each with all results so far
        remove_leftovers(folder)
        results = {name: read_result(folder, name, config) for name in TITLES if is_finished(folder, name)}
        _write(folder, config, results)


def _write(folder: Path, config: dict, results: dict[str, Result]) -> None:
    unfinished = {name: _why_missing(folder, name) for name in METHODS if name not in results}
    table = _table(results, unfinished)
    findings = key_findings(results, config) + [f"{TITLES[name]}: {why}." for name, why in unfinished.items()]
    lines = [f"# Evaluation of {config['encoder_name']}", "", _describe(config, results), ""]
    lines += [describe_leakage(config), "", *table, "", LEGEND, ""]
    lines += ["![Accuracy of the five methods with 95 % intervals](accuracy.png)", ""]
    lines += ["## Key findings", "", *(f"- {finding}" for finding in findings), ""]
    lines += ["## Pre-trained against random weights, paired", "", *_paired(results), ""]
    lines += ["## Additional baselines", "", *_baselines(results), ""]
    lines += _layers(folder, results)
    lines += _label_efficiency(folder, config)
    lines += _transfer(folder, config)
    lines += ["## Calibration", "", *_calibration(folder, results), ""]
    lines += ["## Confusion matrices", "", *_confusion_matrices(folder, results, config)]
    accuracy_bars(
        folder / "accuracy.png",
        [TITLES[name] for name in METHODS],
        [results[name].estimate if name in results else None for name in METHODS],
        [name.startswith("ssl") for name in METHODS],
        1 / len(config["class_names"]),
    )
    with atomic_file(folder / "report.md") as tmp_path:
        tmp_path.write_text("\n".join(lines).rstrip() + "\n")
    print("\n".join(table) + "\n\n" + describe_leakage(config))
    print("\n" + "\n".join(f"- {finding}" for finding in findings))
    print(f"\nreport: {folder / 'report.md'}")


def _why_missing(folder: Path, method: str) -> str:
    """`missing`, or the error with which the method failed."""
    failure = failure_file(folder, method)
    return f"failed, {failure.read_text().strip()}" if failure.is_file() else "missing"


# -------------------------------------------------------------------------------------------------------- the sections


def _describe(config: dict, results: dict[str, Result]) -> str:
    """What was evaluated, on what data and device."""
    model = config["model"]
    text = (
        f"Encoder `{config['encoder_name']}` ({model['num_parameters'] / 1e6:.1f} M parameters: hidden size "
        f"{model['hidden_size']}{_layers_and_patches(model)}, image size {model['image_size']}"
    )
    if pretraining := config["pretraining"]:
        length = provenance.training_length(pretraining)
        text += f"; pre-trained for {length} at mask ratio {pretraining['mask_ratio']}"
    text += f"). Data `{config['dataset_name']}`, SHA-256 {config['dataset'][:12]}, split {config['split'][:12]}"
    if results:
        tests = next(iter(results.values())).about["test_images"]
        machines = sorted({result.about["device"] for result in results.values()})
        commits = sorted({provenance.short_commit(result.about) for result in results.values()})
        text += f", {tests:,} test galaxies. Computed on {'; '.join(machines)}; commit {', '.join(commits)}"
    return text + "."


def _layers_and_patches(model: dict[str, int]) -> str:
    """What not every architecture has."""
    layers = f", {model['num_hidden_layers']} layers" if "num_hidden_layers" in model else ""
    return layers + (f", patch size {model['patch_size']}" if "patch_size" in model else "")


def describe_leakage(config: dict) -> str:
    """Whether test galaxies were used in pre-training."""
    counts = config.get("seen_in_pretraining")
    if counts is None:
        return "It is not known what this encoder was pre-trained on: it may have seen the test galaxies."
    if not counts["seen"]:
        return f"None of the {counts['test_galaxies']:,} test galaxies was used in pre-training."
    effect = "The accuracies from SSL weights may be too high."
    return f"**Leakage: {describe_seen(counts)} were used in pre-training. {effect}**"


def percentage_points(estimate: Estimate) -> str:
    """A difference with its interval in percentage points, as in `+19.80 (16.10 to 23.50)`."""
    return f"{100 * estimate.value:+.2f} ({100 * estimate.low:+.2f} to {100 * estimate.high:+.2f})"


def _table(results: dict[str, Result], unfinished: dict[str, str]) -> list[str]:
    """The table of the five methods."""
    lines = ["| Method | Accuracy (95 % interval) | Gain over baseline (percentage points) |"]
    lines += ["| --- | --- | --- |"]
    for name in METHODS:
        columns = (percent(results[name].estimate), _gain(name, results)) if name in results else (unfinished[name], "")
        lines.append(f"| {TITLES[name]} | {columns[0]} | {columns[1]} |")
    return lines


def _gain(name: str, results: dict[str, Result]) -> str:
    result = results[name]
    if not name.startswith("ssl"):
        chance = 1 / len(result.about["per_class"])
        above = Estimate(*(x - chance for x in result.estimate))
        return f"{percentage_points(above)} over chance ({chance:.0%})"
    baseline = _random_baseline(name)
    if baseline not in results:
        return f"missing: {baseline}"
    return f"{percentage_points(_gain_over(result, results[baseline]))} over the same method from random weights"


def _random_baseline(name: str) -> str:
    """The same method from random weights."""
    return name.replace("ssl", "random", 1)


def _gain_over(result: Result, baseline: Result) -> Estimate:
    return gain(result.label, result.predicted, baseline.predicted)


def _paired(results: dict[str, Result]) -> list[str]:
    """Gains and McNemar's test of each pre-trained result against its random baseline."""
    header = ("Method", "Gain in percentage points (95 % interval)", "Only SSL correct", "Only random correct")
    header += ("McNemar's p", "Seed pairs")
    lines = [f"| {' | '.join(header)} |", f"|{' --- |' * len(header)}"]
    for name in TITLES:
        baseline = _random_baseline(name)
        if name.startswith("ssl") and name in results and baseline in results:
            one, other = results[name], results[baseline]
            test = mcnemar(one.label, one.predicted, other.predicted)
            columns = (test["only_this"], test["only_baseline"], f"{test['p_value']:.2g}", test["num_seed_pairs"])
            difference = percentage_points(_gain_over(one, other))
            lines.append(f"| {TITLES[name]} | {difference} | {' | '.join(map(str, columns))} |")
    return [*lines, "", PAIRED_NOTE]


def _baselines(results: dict[str, Result]) -> list[str]:
    lines = ["| Baseline | Accuracy (95 % interval) |", "| --- | --- |"]
    lines += [f"| {TITLES[name]} | {percent(results[name].estimate)} |" for name in BASELINES if name in results]
    if "zero_shot" in results:
        about = results["zero_shot"].about
        majority = about["majority_class"]
        lines.append(f"| Most frequent class, {majority['name']} | {100 * majority['accuracy']:.2f} % |")
        lines.append(f"| Chance | {100 * about['chance']:.2f} % |")
    return lines


def _layers(folder: Path, results: dict[str, Result]) -> list[str]:
    """The section on accuracies at every layer; empty if there are none."""
    found = [results[name] for name in ("random_best_layer", "ssl_best_layer") if name in results]
    if not found:
        return []
    scores = {result.name.removesuffix("_best_layer"): result.about["validation_accuracy_by_layer"] for result in found}
    layer_accuracies(folder / "layers.png", scores)
    lines = ["## Accuracy by layer", ""]
    for result in found:
        accuracies = result.about["validation_accuracy_by_layer"]["linear_probe"]
        (best,) = (params["layer"] for params in result.about["best_params"].values())
        lines.append(
            f"- {TITLES[result.name]}: layer {best} of {len(accuracies)}, with {100 * accuracies[best - 1]:.1f} % on "
            f"the validation set, {100 * accuracies[-1]:.1f} % at the last layer."
        )
    return [*lines, "", LAYERS_NOTE, "", "![Validation accuracy at every layer](layers.png)", ""]


def _label_efficiency(folder: Path, config: dict) -> list[str]:
    """The section on few labels; empty if there are none."""
    found = {}
    for method in METHODS:
        if is_finished(folder, f"label_efficiency_{method}"):
            initialization = method.split("_")[0]
            result = read_few_labels(folder, f"label_efficiency_{method}", config)
            for name in CLASSIFIERS:
                if points := result.points(name):
                    found.setdefault(name, {})[initialization] = points
    if not found:
        return []
    panels = {
        CLASSIFIERS[name]: {
            initialization: ([p["labels"] for p in points], [(p["accuracy"], *p["interval"]) for p in points])
            for initialization, points in curves.items()
        }
        for name, curves in found.items()
    }
    label_efficiency(folder / "label_efficiency.png", panels)
    lines = ["## Label efficiency", ""]
    lines += [f"- {sentence}" for name, curves in found.items() if (sentence := _value_of_pretraining(name, curves))]
    lines += ["", "| Method | Labels | Draws | Random weights | SSL weights |", "| --- | --- | --- | --- | --- |"]
    for name, curves in found.items():
        by_labels = [{p["labels"]: p for p in curves.get(key, [])} for key in ("random", "ssl")]
        for labels in sorted({*by_labels[0], *by_labels[1]}):
            points = [points.get(labels) for points in by_labels]
            draws = " / ".join(str(p["draws"]) for p in points if p)
            cells = (percent(Estimate(p["accuracy"], *p["interval"])) if p else "missing" for p in points)
            lines.append(f"| {CLASSIFIERS[name]} | {labels:,} | {draws} | {' | '.join(cells)} |")
    lines += ["", FEW_LABELS_NOTE, "", "![Test accuracy over the number of training labels](label_efficiency.png)", ""]
    return lines


def _value_of_pretraining(name: str, curves: dict[str, list[dict]]) -> str | None:
    """The sentence on a classifier, from the numbers of labels that both initializations have."""
    random, ssl = ({p["labels"]: p["accuracy"] for p in curves.get(key, [])} for key in ("random", "ssl"))
    labels = sorted(set(random) & set(ssl))
    if not labels:
        return None
    return value_of_pretraining(labels, [random[n] for n in labels], [ssl[n] for n in labels], CLASSIFIERS[name])


def _transfer(folder: Path, config: dict) -> list[str]:
    """The section on other data sets; empty if there are none."""
    names = [path.stem for path in sorted(folder.glob("transfer_*_ssl_linear_probe.json"))]
    if not names:
        return []
    header = ("Galaxies", "Method", "Labels", "Random weights", "SSL weights", "Gain in percentage points")
    lines = ["## Transfer to other galaxies", "", f"| {' | '.join(header)} |", f"|{' --- |' * len(header)}"]
    leakage = []
    for name in names:
        ssl, baseline = read_few_labels(folder, name, config), name.replace("_ssl_", "_random_")
        random = read_few_labels(folder, baseline, config) if is_finished(folder, baseline) else None
        leakage += ["", f"{ssl.about['dataset_name']}: {describe_leakage(ssl.about)}"]
        for point in (*ssl.points("linear_probe"), *ssl.points("radial_probe")):
            cells = (ssl.about["dataset_name"], CLASSIFIERS[point["classifier"]], f"{point['labels']:,}")
            lines.append(f"| {' | '.join((*cells, *_transfer_cells(point, ssl, random)))} |")
    return [*lines, "", FEW_LABELS_NOTE, *leakage, ""]


def _transfer_cells(point: dict, ssl: FewLabels, random: FewLabels | None) -> tuple[str, str, str]:
    """Accuracy from random weights, from pre-trained weights, and the gain."""
    accuracy = percent(Estimate(point["accuracy"], *point["interval"]))
    baseline = [p for p in random.points(point["classifier"]) if p["labels"] == point["labels"]] if random else []
    if not baseline:
        return "missing", accuracy, ""
    difference = gain(ssl.label, ssl.predicted(point), random.predicted(baseline[0]))
    return percent(Estimate(baseline[0]["accuracy"], *baseline[0]["interval"])), accuracy, percentage_points(difference)


def _calibration(folder: Path, results: dict[str, Result]) -> list[str]:
    """A table of calibration errors, and reliability diagrams of the fine-tuned classifiers."""
    header = ("Method", "ECE before the temperature", "ECE", "Limit (95 %)", "ECE of the mean", "Temperature per seed")
    lines, figures = [f"| {' | '.join(header)} |", f"|{' --- |' * len(header)}"], []
    for name in (*METHODS, *(f"{name}_tta" for name in FINE_TUNES)):
        if name not in results:
            continue
        about, before, temperatures = results[name].about, "", ""
        scores = about["calibration"]
        if name in FINE_TUNES:
            before = f"{100 * scores['before']['ece']:.1f} %"
            temperatures = ", ".join(f"{x['temperature']:.2f}" for x in about["best_params"].values())
            figures += ["", _reliability(folder, results[name])]
        errors = (f"{100 * scores[key]:.1f} %" for key in ("ece", "ece_if_calibrated", "ece_of_mean"))
        lines.append(f"| {' | '.join((TITLES[name], before, *errors, temperatures))} |")
    return [*lines, "", CALIBRATION_NOTE, *figures]


def _reliability(folder: Path, result: Result) -> str:
    figure, scores = f"reliability_{result.name}.png", result.about["calibration"]
    panels = {
        f"before the temperature: ECE {100 * scores['before']['ece']:.1f} %": scores["before"]["reliability"],
        f"with the temperature: ECE {100 * scores['ece']:.1f} %": scores["reliability"],
    }
    reliability_diagrams(folder / figure, panels, BINS, _figure_title(result))
    return f"![{TITLES[result.name]}: accuracy over confidence, before and with the temperature]({figure})"


def _figure_title(result: Result) -> str:
    seeds = len(result.about["seeds"])
    return f"{TITLES[result.name]}: {result.about['test_images']:,} test galaxies, {seeds} seed{'s' * (seeds > 1)}"


def _confusion_matrices(folder: Path, results: dict[str, Result], config: dict) -> list[str]:
    lines = []
    for name in METHODS:
        if name not in results:
            lines += [f"{TITLES[name]}: missing.", ""]
            continue
        figure, counts = f"confusion_{name}.png", np.array(results[name].about["confusion_matrix"])
        confusion_matrix(folder / figure, counts, config["class_names"], _figure_title(results[name]))
        lines += [f"![{TITLES[name]}]({figure})", ""]
    return lines


# ---------------------------------------------------------------------------------------------------- the key findings


def key_findings(results: dict[str, Result], config: dict) -> list[str]:
    """Sentences that follow from the numbers, each only if the results that it needs are there."""
    findings = []
    for name, method in (("ssl_linear_probe", "the linear probe"), ("ssl_fine_tune", "fine-tuning")):
        if name in results and _random_baseline(name) in results:
            findings.append(_effect_of_pretraining(results[name], results[_random_baseline(name)], method))
    if {"ssl_linear_probe", "random_fine_tune"} <= set(results):
        difference = _gain_over(results["ssl_linear_probe"], results["random_fine_tune"])
        verb = _compare(difference, "is more accurate than", "is less accurate than", "does not differ measurably from")
        findings.append(
            f"A linear probe on the frozen pre-trained encoder {verb} fine-tuning from random weights: "
            f"{percentage_points(difference)} percentage points."
        )
    if "zero_shot" in results:
        zero = results["zero_shot"].about
        each, majority = zero["accuracy_per_seed"], zero["majority_class"]
        findings.append(
            f"Untrained networks reach {100 * np.mean(each):.1f} % (min-max {100 * min(each):.1f} to "
            f"{100 * max(each):.1f}, {len(each)} random initializations); chance is {zero['chance']:.0%}, and always "
            f"predicting {majority['name']} gives {100 * majority['accuracy']:.1f} %."
        )
    finished = [results[name] for name in METHODS if name in results]
    if finished:
        findings.append(_best_method(max(finished, key=lambda result: result.estimate.value), config))
    return findings


def _effect_of_pretraining(result: Result, baseline: Result, method: str) -> str:
    difference = _gain_over(result, baseline)
    p_value = mcnemar(result.label, result.predicted, baseline.predicted)["p_value"]
    verb = _compare(difference, "raises", "lowers", "does not measurably change")
    return (
        f"Pre-training {verb} the accuracy of {method}: {100 * baseline.estimate.value:.1f} % from random weights, "
        f"{100 * result.estimate.value:.1f} % from pre-trained weights, {percentage_points(difference)} percentage "
        f"points (McNemar's p = {p_value:.2g})."
    )


def _compare(difference: Estimate, above: str, below: str, neither: str) -> str:
    return above if difference.low > 0 else below if difference.high < 0 else neither


def _best_method(best: Result, config: dict) -> str:
    """The best method, its easiest and hardest class, and its most frequent error."""
    recall = {name: scores["recall"] for name, scores in best.about["per_class"].items() if scores["test_images"]}
    easy, hard = max(recall, key=recall.get), min(recall, key=recall.get)
    if recall[easy] == recall[hard]:
        extremes = f"Recall is {recall[easy]:.0%} for every class of the test set"
    else:
        extremes = f"Recall is highest for {easy} ({recall[easy]:.0%}) and lowest for {hard} ({recall[hard]:.0%})"
    counts = np.array(best.about["confusion_matrix"], dtype=float)
    fractions = counts / counts.sum(axis=1, keepdims=True).clip(1)
    np.fill_diagonal(fractions, 0)
    true, predicted = np.unravel_index(fractions.argmax(), fractions.shape)
    names, worst = config["class_names"], fractions[true, predicted]
    error = f"its most frequent error is {names[true]} misclassified as {names[predicted]} ({worst:.0%})"
    return (
        f"Best method: {TITLES[best.name]}, {percent(best.estimate)}, macro-F1 {best.about['macro_f1']:.3f}. "
        f"{extremes}; {error if worst else 'it makes no error'}."
    )


def send_report(folder: Path, report_to: list[str]) -> None:
    """Send the table, the figures and the page of a results folder to the dashboards, when they are written."""
    if not report_to:
        return
    config = read_config(folder)
    with FileLock(folder / ".report.lock"):
        results = {name: read_result(folder, name, config) for name in TITLES if is_finished(folder, name)}
        rows = [
            (TITLES[name], *results[name].estimate, _gain(name, results))
            if name in results
            else (TITLES[name], None, None, None, "missing")
            for name in METHODS
        ]
        columns = ["method", "accuracy", "interval_low", "interval_high", "gain_over_baseline"]
        start_evaluation(report_to, folder, "report", config, "report")
        log_report(report_to, folder, pd.DataFrame(rows, columns=columns))
        finish_run()

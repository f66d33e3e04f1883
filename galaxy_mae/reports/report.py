"""Turns the results of a folder into a table, key findings computed from the numbers, and figures.

Reads what `results.py` wrote and nothing else, so the report can be written at any time, also while methods are
missing. Each gain names its baseline: chance for methods that start from random weights, the same method from random
weights for those that start from pre-trained weights.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd

from galaxy_mae import figures, provenance
from galaxy_mae.data.seen import describe_seen
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
from galaxy_mae.evaluation.scores import Estimate, gain, mcnemar, per_class_estimates, percent
from galaxy_mae.files import atomic_file, locked, remove_leftovers
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
    "random_orientation_probe": "Linear probe of mean and std over 16 orientations, random weights",
    "ssl_orientation_probe": "Linear probe of mean and std over 16 orientations, SSL weights",
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
CLASSIFIERS |= {"orientation_probe": "Linear probe of mean and std over 16 orientations", "fine_tune": "Fine-tune"}
FEW_LABELS_COLUMNS = ("Method", "Labels", "Draws", "Random weights", "SSL weights")
FEW_LABELS_NOTE = (
    "The subsets of the training labels are stratified, hold every class, and are nested within a draw; random and "
    "pre-trained weights get the same ones. The intervals include the test set's size and the spread of the draws. The "
    "validation set, by which all hyper-parameters are selected, is the complete one at every number of labels."
)
PER_CLASS_NOTE = (
    "Means over seeds with 95 % intervals, which include the number of galaxies and the spread of the seeds. A dash: "
    "there is no galaxy to judge by."
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


@dataclass(frozen=True)
class Table:
    """A header, and rows of as many texts."""

    header: tuple[str, ...]
    rows: list[tuple[str, ...]]


@dataclass(frozen=True)
class Bullets:
    """A list of sentences."""

    items: list[str]


@dataclass(frozen=True)
class Plot:
    """A figure as data: `report.md` shows it as a PNG, the page as an interactive plot.

    Attributes:
        name: of the file, without suffix.
        kind: name of the function that plots it, in `galaxy_mae.figures` and in `galaxy_mae.reports.plots`.
        arguments: of that function.
        text: what is seen, for those who cannot see it.
    """

    name: str
    kind: str
    arguments: tuple
    text: str


@dataclass(frozen=True)
class Section:
    """A title, and what is below it."""

    title: str
    blocks: list[str | Table | Bullets | Plot]


@dataclass(frozen=True)
class Report:
    """The report as data, from which `report.md` and the page are rendered.

    Attributes:
        folder: of the results.
        config: the content of `evaluation.json`.
        results: the finished ones, by name.
        table: of the five methods.
        accuracies: of the five methods.
        findings: what follows from the numbers, and which methods are missing.
        sections: the rest, in order.
        per_class: precision, recall and F1 of every class with intervals, by method.
        confusion: the matrices.
    """

    folder: Path
    config: dict
    results: dict[str, Result]
    table: Table
    accuracies: Plot
    findings: list[str]
    sections: list[Section]
    per_class: dict[str, Table]
    confusion: Section

    @property
    def best(self) -> str | None:
        """Name of the method with the highest accuracy."""
        return _best(self.results)


def write_report(folder: Path) -> Report:
    """Write `report.md`, `accuracy.png`, and figures of the finished methods.

    These are `confusion_METHOD.png`, and of fine-tuned classifiers `reliability_METHOD.png`.

    Args:
        folder: of the results.

    Returns:
        What the report says.

    Raises:
        UserError: no results there, or a result that is damaged or of another evaluation.
    """
    config = read_config(folder)
    with locked(folder / ".report.lock"):  # the tasks of an array write it in turn, each with all results so far
        remove_leftovers(folder)
        results = {name: read_result(folder, name, config) for name in TITLES if is_finished(folder, name)}
        report = _gather(folder, config, results)
        _write_markdown(report)
    return report


def _gather(folder: Path, config: dict, results: dict[str, Result]) -> Report:
    unfinished = {name: _why_missing(folder, name) for name in METHODS if name not in results}
    accuracies = (
        [TITLES[name] for name in METHODS],
        [results[name].estimate if name in results else None for name in METHODS],
        [name.startswith("ssl") for name in METHODS],
        1 / len(config["class_names"]),
    )
    sections = [
        Section("Pre-trained against random weights, paired", _paired(results)),
        Section("Additional baselines", [_baselines(results)]),
        _layers(results),
        _label_efficiency(folder, config),
        _transfer(folder, config),
        Section("Calibration", _calibration(results)),
    ]
    return Report(
        folder,
        config,
        results,
        _table(results, unfinished),
        Plot("accuracy", "accuracy_bars", accuracies, "Accuracy of the five methods with 95 % intervals"),
        key_findings(results, config) + [f"{TITLES[name]}: {why}." for name, why in unfinished.items()],
        [section for section in sections if section],
        {
            name: per_class_table(results[name].label, results[name].predicted, config["class_names"])
            for name in METHODS
            if name in results
        },
        Section("Confusion matrices", _confusion_matrices(results, config)),
    )


def _write_markdown(report: Report) -> None:
    folder, config = report.folder, report.config
    table, findings = _markdown(folder, report.table), _markdown(folder, Bullets(report.findings))
    lines = [f"# Evaluation of {config['encoder_name']}", "", describe(config, report.results, "`{}`".format), ""]
    lines += [describe_leakage(config), "", *table, "", LEGEND, ""]
    lines += [*_markdown(folder, report.accuracies), "", "## Key findings", "", *findings, ""]
    sections = list(report.sections)
    if report.best:
        title = f"Classes: {TITLES[report.best]}"
        sections.append(Section(title, [report.per_class[report.best], PER_CLASS_NOTE]))
    for section in (*sections, report.confusion):
        lines += [f"## {section.title}", ""]
        for block in section.blocks:
            lines += [*_markdown(folder, block), ""]
    with atomic_file(folder / "report.md") as tmp_path:
        tmp_path.write_text("\n".join(lines).rstrip() + "\n")
    print("\n".join(table) + "\n\n" + describe_leakage(config))
    print("\n" + "\n".join(findings))
    print(f"\nreport: {folder / 'report.md'}")


def _markdown(folder: Path, block: str | Table | Bullets | Plot) -> list[str]:
    """The lines of a block; a figure is written into the folder."""
    match block:
        case Table():
            return markdown_table(block.header, block.rows)
        case Bullets():
            return [f"- {item}" for item in block.items]
        case Plot():
            getattr(figures, block.kind)(folder / f"{block.name}.png", *block.arguments)
            return [f"![{block.text}]({block.name}.png)"]
    return [block]


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table whose cells may hold any text."""
    lines = (header, ("---",) * len(header), *rows)
    escaped = ([cell.replace("|", r"\|") for cell in line] for line in lines)
    return [f"| {' | '.join(line)} |" for line in escaped]


def _why_missing(folder: Path, method: str) -> str:
    """`missing`, or the error with which the method failed."""
    failure = failure_file(folder, method)
    return f"failed, {failure.read_text().strip()}" if failure.is_file() else "missing"


# -------------------------------------------------------------------------------------------------------- the sections


def describe(config: dict, results: dict[str, Result], quoted: Callable[[str], str] = str) -> str:
    """What was evaluated, on what data and device; `quoted` marks names."""
    model = config["model"]
    text = (
        f"Encoder {quoted(config['encoder_name'])} ({model['num_parameters'] / 1e6:.1f} M parameters: hidden size "
        f"{model['hidden_size']}{_layers_and_patches(model)}, image size {model['image_size']}"
    )
    if pretraining := config["pretraining"]:
        length = provenance.training_length(pretraining)
        text += f"; pre-trained for {length} at mask ratio {pretraining['mask_ratio']}"
    text += f"). Data {quoted(config['dataset_name'])}, SHA-256 {config['dataset'][:12]}, split {config['split'][:12]}"
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


def _table(results: dict[str, Result], unfinished: dict[str, str]) -> Table:
    """The table of the five methods."""
    rows = []
    for name in METHODS:
        columns = (percent(results[name].estimate), _gain(name, results)) if name in results else (unfinished[name], "")
        rows.append((TITLES[name], *columns))
    return Table(("Method", "Accuracy (95 % interval)", "Gain over baseline (percentage points)"), rows)


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


def _paired(results: dict[str, Result]) -> list[Table | str]:
    """Gains and McNemar's test of each pre-trained result against its random baseline."""
    header = ("Method", "Gain in percentage points (95 % interval)", "Only SSL correct", "Only random correct")
    header += ("McNemar's p", "Seed pairs")
    rows = []
    for name in TITLES:
        baseline = _random_baseline(name)
        if name.startswith("ssl") and name in results and baseline in results:
            one, other = results[name], results[baseline]
            test = mcnemar(one.label, one.predicted, other.predicted)
            columns = (test["only_this"], test["only_baseline"], f"{test['p_value']:.2g}", test["num_seed_pairs"])
            rows.append((TITLES[name], percentage_points(_gain_over(one, other)), *map(str, columns)))
    return [Table(header, rows), PAIRED_NOTE]


def _baselines(results: dict[str, Result]) -> Table:
    rows = [(TITLES[name], percent(results[name].estimate)) for name in BASELINES if name in results]
    if "zero_shot" in results:
        about = results["zero_shot"].about
        majority = about["majority_class"]
        rows.append((f"Most frequent class, {majority['name']}", f"{100 * majority['accuracy']:.2f} %"))
        rows.append(("Chance", f"{100 * about['chance']:.2f} %"))
    return Table(("Baseline", "Accuracy (95 % interval)"), rows)


def _layers(results: dict[str, Result]) -> Section | None:
    """The section on accuracies at every layer, if there are any."""
    found = [results[name] for name in ("random_best_layer", "ssl_best_layer") if name in results]
    if not found:
        return None
    scores = {result.name.removesuffix("_best_layer"): result.about["validation_accuracy_by_layer"] for result in found}
    sentences = []
    for result in found:
        accuracies = result.about["validation_accuracy_by_layer"]["linear_probe"]
        (best,) = (params["layer"] for params in result.about["best_params"].values())
        sentences.append(
            f"{TITLES[result.name]}: layer {best} of {len(accuracies)}, with {100 * accuracies[best - 1]:.1f} % on "
            f"the validation set, {100 * accuracies[-1]:.1f} % at the last layer."
        )
    plot = Plot("layers", "layer_accuracies", (scores,), "Validation accuracy at every layer")
    return Section("Accuracy by layer", [Bullets(sentences), LAYERS_NOTE, plot])


def _label_efficiency(folder: Path, config: dict) -> Section | None:
    """The section on few labels, if there are any."""
    found = {}
    for method in METHODS:
        if is_finished(folder, f"label_efficiency_{method}"):
            initialization = method.split("_")[0]
            result = read_few_labels(folder, f"label_efficiency_{method}", config)
            for name in CLASSIFIERS:
                if points := result.points(name):
                    found.setdefault(name, {})[initialization] = points
    baselines = [
        (TITLES[method], f"{p['labels']:,}", str(p["draws"]), percent(Estimate(p["accuracy"], *p["interval"])), "")
        for method in _FROM_SCRATCH
        if method not in METHODS and is_finished(folder, f"label_efficiency_{method}")
        for p in read_few_labels(folder, f"label_efficiency_{method}", config).points("fine_tune")
    ]
    if not found:
        blocks = [Table(FEW_LABELS_COLUMNS, baselines), FEW_LABELS_NOTE]
        return Section("Label efficiency", blocks) if baselines else None
    panels = {
        CLASSIFIERS[name]: {
            initialization: ([p["labels"] for p in points], [(p["accuracy"], *p["interval"]) for p in points])
            for initialization, points in curves.items()
        }
        for name, curves in found.items()
    }
    sentences = [sentence for name, curves in found.items() if (sentence := _value_of_pretraining(name, curves))]
    rows = []
    for name, curves in found.items():
        by_labels = [{p["labels"]: p for p in curves.get(key, [])} for key in ("random", "ssl")]
        for labels in sorted({*by_labels[0], *by_labels[1]}):
            points = [points.get(labels) for points in by_labels]
            draws = " / ".join(str(p["draws"]) for p in points if p)
            cells = (percent(Estimate(p["accuracy"], *p["interval"])) if p else "missing" for p in points)
            rows.append((CLASSIFIERS[name], f"{labels:,}", draws, *cells))
    table = Table(FEW_LABELS_COLUMNS, rows + baselines)
    text = "Test accuracy over the number of training labels"
    plot = Plot("label_efficiency", "label_efficiency", (panels,), text)
    return Section("Label efficiency", [Bullets(sentences), table, FEW_LABELS_NOTE, plot])


def _value_of_pretraining(name: str, curves: dict[str, list[dict]]) -> str | None:
    """The sentence on a classifier, from the numbers of labels that both initializations have."""
    random, ssl = ({p["labels"]: p["accuracy"] for p in curves.get(key, [])} for key in ("random", "ssl"))
    labels = sorted(set(random) & set(ssl))
    if not labels:
        return None
    return value_of_pretraining(labels, [random[n] for n in labels], [ssl[n] for n in labels], CLASSIFIERS[name])


def _transfer(folder: Path, config: dict) -> Section | None:
    """The section on other data sets, if there are any."""
    names = [path.stem for path in sorted(folder.glob("transfer_*_ssl_linear_probe.json"))]
    if not names:
        return None
    rows, leakage = [], []
    for name in names:
        ssl, baseline = read_few_labels(folder, name, config), name.replace("_ssl_", "_random_")
        random = read_few_labels(folder, baseline, config) if is_finished(folder, baseline) else None
        leakage.append(f"{ssl.about['dataset_name']}: {describe_leakage(ssl.about)}")
        for point in (point for classifier in CLASSIFIERS for point in ssl.points(classifier)):
            cells = (ssl.about["dataset_name"], CLASSIFIERS[point["classifier"]], f"{point['labels']:,}")
            rows.append((*cells, *_transfer_cells(point, ssl, random)))
    header = ("Galaxies", "Method", "Labels", "Random weights", "SSL weights", "Gain in percentage points")
    return Section("Transfer to other galaxies", [Table(header, rows), FEW_LABELS_NOTE, *leakage])


def _transfer_cells(point: dict, ssl: FewLabels, random: FewLabels | None) -> tuple[str, str, str]:
    """Accuracy from random weights, from pre-trained weights, and the gain."""
    accuracy = percent(Estimate(point["accuracy"], *point["interval"]))
    baseline = [p for p in random.points(point["classifier"]) if p["labels"] == point["labels"]] if random else []
    if not baseline:
        return "missing", accuracy, ""
    difference = gain(ssl.label, ssl.predicted(point), random.predicted(baseline[0]))
    return percent(Estimate(baseline[0]["accuracy"], *baseline[0]["interval"])), accuracy, percentage_points(difference)


def _calibration(results: dict[str, Result]) -> list[Table | str | Plot]:
    """A table of calibration errors, and reliability diagrams of the fine-tuned classifiers."""
    header = ("Method", "ECE before the temperature", "ECE", "Limit (95 %)", "ECE of the mean", "Temperature per seed")
    rows, plots = [], []
    for name in (*METHODS, *(f"{name}_tta" for name in FINE_TUNES)):
        if name not in results:
            continue
        about, before, temperatures = results[name].about, "", ""
        scores = about["calibration"]
        if name in FINE_TUNES:
            before = f"{100 * scores['before']['ece']:.1f} %"
            temperatures = ", ".join(f"{x['temperature']:.2f}" for x in about["best_params"].values())
            plots.append(_reliability(results[name]))
        errors = (f"{100 * scores[key]:.1f} %" for key in ("ece", "ece_if_calibrated", "ece_of_mean"))
        rows.append((TITLES[name], before, *errors, temperatures))
    return [Table(header, rows), CALIBRATION_NOTE, *plots]


def _reliability(result: Result) -> Plot:
    scores = result.about["calibration"]
    panels = {
        f"before the temperature: ECE {100 * scores['before']['ece']:.1f} %": scores["before"]["reliability"],
        f"with the temperature: ECE {100 * scores['ece']:.1f} %": scores["reliability"],
    }
    text = f"{TITLES[result.name]}: accuracy over confidence, before and with the temperature"
    arguments = (panels, BINS, _figure_title(result))
    return Plot(f"reliability_{result.name}", "reliability_diagrams", arguments, text)


def _figure_title(result: Result) -> str:
    seeds = len(result.about["seeds"])
    return f"{TITLES[result.name]}: {result.about['test_images']:,} test galaxies, {seeds} seed{'s' * (seeds > 1)}"


def _confusion_matrices(results: dict[str, Result], config: dict) -> list[str | Plot]:
    blocks = []
    for name in METHODS:
        if name not in results:
            blocks.append(f"{TITLES[name]}: missing.")
            continue
        counts = np.array(results[name].about["confusion_matrix"])
        arguments = (counts, config["class_names"], _figure_title(results[name]))
        blocks.append(Plot(f"confusion_{name}", "confusion_matrix", arguments, TITLES[name]))
    return blocks


def per_class_table(label: np.ndarray, predicted: np.ndarray, class_names: Sequence[str]) -> Table:
    """Precision, recall and F1 of every class with intervals.

    Args:
        label: (N,) integers.
        predicted: (S, N) integers, one row per seed.
        class_names: of the classes.
    """
    estimates = per_class_estimates(label, predicted, len(class_names))
    counts = np.bincount(label, minlength=len(class_names))
    rows = [
        (name, *(percent(x) if x else "-" for x in scores), f"{count:,}")
        for name, scores, count in zip(class_names, estimates, counts, strict=True)
    ]
    header = ("Class", "Precision (95 % interval)", "Recall (95 % interval)", "F1 (95 % interval)", "Galaxies")
    return Table(header, rows)


# ---------------------------------------------------------------------------------------------------- the key findings


_PROBE = "A linear probe on the frozen pre-trained encoder"
_PRETRAINED = {
    "ssl_linear_probe": _PROBE,
    "ssl_orientation_probe": f"{_PROBE}, of mean and std over 16 orientations of the images,",
    "ssl_fine_tune": "Fine-tuning the pre-trained encoder",
}
_FROM_SCRATCH = {
    "random_fine_tune": "fine-tuning from random weights",
    "resnet18_from_scratch": "training a ResNet-18 from scratch",
    "convnextv2_nano_from_scratch": "training a ConvNeXt V2 nano from scratch",
}


def key_findings(results: dict[str, Result], config: dict) -> list[str]:
    """Sentences that follow from the numbers, each only if the results that it needs are there."""
    findings = []
    for name, method in (("ssl_linear_probe", "the linear probe"), ("ssl_fine_tune", "fine-tuning")):
        if name in results and _random_baseline(name) in results:
            findings.append(_effect_of_pretraining(results[name], results[_random_baseline(name)], method))
    for (name, subject), (other, training) in product(_PRETRAINED.items(), _FROM_SCRATCH.items()):
        if {name, other} <= set(results) and _random_baseline(name) != other:
            findings.append(f"{subject} {_compared_with(results[name], results[other], training)}")
    if "zero_shot" in results:
        zero = results["zero_shot"].about
        each, majority = zero["accuracy_per_seed"], zero["majority_class"]
        findings.append(
            f"Untrained networks reach {100 * np.mean(each):.1f} % (min-max {100 * min(each):.1f} to "
            f"{100 * max(each):.1f}, {len(each)} random initializations); chance is {zero['chance']:.0%}, and always "
            f"predicting {majority['name']} gives {100 * majority['accuracy']:.1f} %."
        )
    if best := _best(results):
        findings.append(_best_method(results[best], config))
    return findings


def _best(results: dict[str, Result]) -> str | None:
    """The method with the highest accuracy."""
    return max(
        (name for name in METHODS if name in results), key=lambda name: results[name].estimate.value, default=None
    )


def _effect_of_pretraining(result: Result, baseline: Result, method: str) -> str:
    difference = _gain_over(result, baseline)
    p_value = mcnemar(result.label, result.predicted, baseline.predicted)["p_value"]
    verb = _compare(difference, "raises", "lowers", "does not measurably change")
    return (
        f"Pre-training {verb} the accuracy of {method}: {100 * baseline.estimate.value:.1f} % from random weights, "
        f"{100 * result.estimate.value:.1f} % from pre-trained weights, {percentage_points(difference)} percentage "
        f"points (McNemar's p = {p_value:.2g})."
    )


def _compared_with(result: Result, other: Result, what: str) -> str:
    difference = _gain_over(result, other)
    verb = _compare(difference, "is more accurate than", "is less accurate than", "does not differ measurably from")
    return f"{verb} {what}: {percentage_points(difference)} percentage points."


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


def send_report(report: Report, report_to: list[str]) -> None:
    """Send the table, the figures and the page of a report to the dashboards, when they are written."""
    if not report_to:
        return
    folder, results = report.folder, report.results
    with locked(folder / ".report.lock"):  # its run's id is kept in the folder
        rows = [
            (TITLES[name], *results[name].estimate, _gain(name, results))
            if name in results
            else (TITLES[name], None, None, None, "missing")
            for name in METHODS
        ]
        columns = ["method", "accuracy", "interval_low", "interval_high", "gain_over_baseline"]
        start_evaluation(report_to, folder, "report", report.config, "report")
        log_report(report_to, folder, pd.DataFrame(rows, columns=columns))
        finish_run()

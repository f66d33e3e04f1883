"""Turns the results of a folder into sections: tables, sentences computed from the numbers, and figures.

Reads what `results.py` wrote and nothing else, so the report can be written at any time, also while methods are
missing. Each gain names its baseline: chance for methods that start from random weights, the same method from random
weights for those that start from pre-trained weights. `report.md` and the page render the same sections; a new one is a
function in `Report.sections`.
"""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from galaxy_mae import figures, provenance
from galaxy_mae.data.seen import describe_seen
from galaxy_mae.evaluation.calibration import BINS
from galaxy_mae.evaluation.few_labels import value_of_pretraining
from galaxy_mae.evaluation.methods import ARRAY_METHODS, BY_NAME, METHODS, Method
from galaxy_mae.evaluation.results import (
    Result,
    failure_file,
    few_labels_name,
    is_finished,
    other_datasets,
    read_config,
    read_result,
)
from galaxy_mae.evaluation.scores import Estimate, gain, percent
from galaxy_mae.files import atomic_file, locked, remove_leftovers
from galaxy_mae.reports import findings
from galaxy_mae.reports.document import Block, Bullets, Figure, Section, Table, as_percent, render_markdown
from galaxy_mae.reports.page import PER_CLASS_NOTE, per_class_table
from galaxy_mae.training.tracking import finish_run, log_report, start_evaluation

LEGEND = (
    "Zero-shot: random encoder and untrained head. Linear probe: logistic regression on frozen features. "
    "Fine-tune: encoder and head trained on the labels."
)
PAIRED_NOTE = (
    "Both methods of a pair classify the same test galaxies. McNemar's test is exact; the counts and p are those of "
    "the pair of seeds with the largest p."
)
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
FEW_LABELS = {m.classifier: m.classifier_title for m in METHODS if m.few_labels and m.baseline}


@dataclass(frozen=True)
class Report:
    """The results of a folder and its `evaluation.json`, by the names of their methods.

    Of methods with an index of the array that are missing, `unfinished` says why. The best is the most accurate one.
    """

    folder: Path
    config: dict = field(repr=False)
    results: dict[str, Result] = field(repr=False)
    unfinished: dict[str, str] = field(repr=False)
    best: str | None

    @cached_property
    def sections(self) -> list[Section]:
        """All sections that there are results for."""
        of_all_labels = (_results, _findings, _paired, _baselines, _layers)
        functions = (*of_all_labels, _label_efficiency, _transfer, _calibration, _classes, _confusion_matrices)
        return [found for function in functions if (found := function(self)) and found.blocks]

    @property
    def verdict(self) -> str:
        """Whether pre-training helps, from how many labels on."""
        methods = [m for m in ARRAY_METHODS if m.baseline]
        names = {m: "fine-tuning" if m.trained_on == "images" else "the linear probe" for m in methods}
        gains = {names[m]: found for m in methods if (found := self._gains(m))}
        return findings.verdict(self.config["pretraining"], self.config.get("images_seen"), gains)

    def _gains(self, method: Method) -> dict[int, Estimate]:
        """Of a pre-trained method over its baseline, by the number of labels."""
        gains, baseline = {}, BY_NAME[method.baseline]
        few, few_of_baseline = self.few_labels(method), self.few_labels(baseline)
        if few and few_of_baseline:
            others = {point["labels"]: point for point in few_of_baseline.points(baseline.classifier)}
            for point in few.points(method.classifier):
                if other := others.get(point["labels"]):
                    predicted = few.predicted_at(point), few_of_baseline.predicted_at(other)
                    gains[point["labels"]] = gain(few.predictions.label, *predicted)
        if {method.name, baseline.name} <= set(self.results):
            all_labels = findings.gain_over(self.results[method.name], self.results[baseline.name])
            gains[self.config["split_sizes"]["train"]] = all_labels
        return gains

    @cached_property
    def table(self) -> pd.DataFrame:
        """The methods with an index of the array: title, accuracy, its interval, gain over the baseline in words."""
        columns = ["method", "accuracy", "interval_low", "interval_high", "gain_over_baseline"]
        rows = [(m.title, None, None, None, "missing") for m in ARRAY_METHODS]
        for i, m in enumerate(ARRAY_METHODS):
            if m.name in self.results:
                rows[i] = (m.title, *self.results[m.name].estimate, _gain(m, self.results))
        return pd.DataFrame(rows, columns=columns)

    def show(self) -> None:
        """Print the verdict, the accuracies, whether test galaxies were used in pre-training, and what follows."""
        blocks = {part.id: part.blocks[0] for part in self.sections}
        leakage, path = describe_leakage(self.config), self.folder / "report.md"
        print(self.verdict, blocks["results"], leakage, blocks["findings"], f"report: {path}", sep="\n\n")

    def _repr_html_(self) -> str:
        """In a notebook: the verdict, the table, and where the report is."""
        return f"<p>{self.verdict}</p>{self.table.to_html(index=False)}<p>{self.folder / 'report.md'}</p>"

    def few_labels(self, method: Method, dataset: str | None = None) -> Result | None:
        """A method's result of few labels, if it is there; on the galaxies of a transfer if their data set is given."""
        name = few_labels_name(method, dataset)
        if not is_finished(self.folder, name):
            return None
        return read_result(self.folder, name, self.config)


def write_report(folder: Path) -> Report:
    """Write `report.md` and its figures, as `accuracy.png` and `confusion_METHOD.png`. Returns what the report says.

    Raises:
        UserError: no results there, or a result that is damaged or of another evaluation.
    """
    with locked(folder / ".report.lock"):  # the tasks of an array write it in turn, each with all results so far
        remove_leftovers(folder)
        config, unfinished = read_config(folder), {}
        results = {m.name: read_result(folder, m.name, config) for m in METHODS if is_finished(folder, m.name)}
        for m in ARRAY_METHODS:
            if m.name not in results:
                failure = failure_file(folder, m.name)
                text = failure.read_text(encoding="utf-8").strip() if failure.is_file() else ""
                unfinished[m.name] = f"failed, {text}" if text else "missing"
        report = Report(folder, config, results, unfinished, findings.best_method(results))
        for block in (block for part in report.sections for block in part.blocks if isinstance(block, Figure)):
            with atomic_file(folder / f"{block.name}.png") as tmp_path:
                tmp_path.write_bytes(block.png)
        text = render_markdown("report.md", report=report, about=describe(report), leakage=describe_leakage(config))
        with atomic_file(folder / "report.md") as tmp_path:
            tmp_path.write_text(text, encoding="utf-8")
    return report


def send_report(report: Report, report_to: list[str]) -> None:
    """Send the table, the figures and the page of a report to the dashboards, when they are written."""
    if not report_to:
        return
    with locked(report.folder / ".report.lock"):  # its run's id is kept in the folder
        start_evaluation(report_to, report.folder, "report", report.config, "report")
        log_report(report_to, report.folder, report.table)
        finish_run()


def describe(report: Report) -> str:
    """What was evaluated, on what data and device, as Markdown."""
    config, abouts = report.config, [result.about for result in report.results.values()]
    commits = sorted({provenance.short_commit(about) for about in abouts})
    length = config["pretraining"] and provenance.training_length(config["pretraining"])
    content = {"config": config, "model": config["model"], "length": length, "abouts": abouts, "commits": commits}
    return render_markdown("about.md", **content).strip()


def describe_leakage(config: dict) -> str:
    """Whether test galaxies were used in pre-training."""
    counts = config.get("seen_in_pretraining")
    if counts is None:
        return "It is not known what this encoder was pre-trained on: it may have seen the test galaxies."
    if not counts["seen"]:
        return f"None of the {counts['test_galaxies']:,} test galaxies was used in pre-training."
    effect = "The accuracies from SSL weights may be too high."
    return f"**Leakage: {describe_seen(counts)} were used in pre-training. {effect}**"


def _results(report: Report) -> Section:
    """Accuracies and gains of the methods with an index of the array."""
    rows, results = [], [report.results.get(m.name) for m in ARRAY_METHODS]
    for m, result in zip(ARRAY_METHODS, results, strict=True):
        cells = (percent(result.estimate), _gain(m, report.results)) if result else (report.unfinished[m.name], "")
        rows.append((m.title, *cells))
    table = Table(("Method", "Accuracy (95 % interval)", "Gain over baseline (percentage points)"), rows)
    arguments = (
        [m.title for m in ARRAY_METHODS],
        [result and result.estimate for result in results],
        [m.initialization == "ssl" for m in ARRAY_METHODS],
        1 / len(report.config["class_names"]),
    )
    figure = Figure("accuracy", figures.accuracy_bars, arguments, "Accuracy of the methods with 95 % intervals")
    return Section("Results", [table, LEGEND, figure], "results")


def _gain(method: Method, results: dict[str, Result]) -> str:
    result = results[method.name]
    if method.baseline is None:
        chance = 1 / len(result.about["per_class"])
        above = Estimate(*(x - chance for x in result.estimate))
        return f"{findings.percentage_points(above)} over chance ({as_percent(chance)})"
    if method.baseline not in results:
        return f"missing: {method.baseline}"
    difference = findings.percentage_points(findings.gain_over(result, results[method.baseline]))
    return f"{difference} over the same method from random weights"


def _findings(report: Report) -> Section:
    """What follows from the numbers, and which methods are missing."""
    missing = [f"{BY_NAME[name].title}: {why}." for name, why in report.unfinished.items()]
    if findings.is_too_short(report.config.get("images_seen")):
        found = ["None: the pre-training was too short for the numbers to mean anything."]
    else:
        found = findings.key_findings(report.results)
    return Section("Key findings", [Bullets(found + missing)], "findings")


def _paired(report: Report) -> Section:
    """Gains and McNemar's test of each pre-trained result against its random baseline."""
    header = ("Method", "Gain in percentage points (95 % interval)", "Only SSL correct", "Only random correct")
    rows = []
    for m in METHODS:
        if m.name in report.results and m.baseline in report.results:
            result, baseline = report.results[m.name], report.results[m.baseline]
            test = findings.paired_test(result, baseline)
            columns = (test["only_this"], test["only_baseline"], f"{test['p_value']:.2g}", test["num_seed_pairs"])
            rows.append((m.title, findings.percentage_points(findings.gain_over(result, baseline)), *map(str, columns)))
    table = Table((*header, "McNemar's p", "Seed pairs"), rows)
    return Section("Pre-trained against random weights, paired", [table, PAIRED_NOTE], "paired")


def _baselines(report: Report) -> Section:
    others = [m for m in METHODS if m not in ARRAY_METHODS and m.name in report.results]
    rows = [(m.title, percent(report.results[m.name].estimate)) for m in others]
    if "zero_shot" in report.results:
        about = report.results["zero_shot"].about
        majority = about["majority_class"]
        rows.append((f"Most frequent class, {majority['name']}", as_percent(majority["accuracy"], 2)))
        rows.append(("Chance", as_percent(about["chance"], 2)))
    return Section("Additional baselines", [Table(("Baseline", "Accuracy (95 % interval)"), rows)], "baselines")


def _layers(report: Report) -> Section | None:
    found = [m for m in METHODS if m.classifier == "best_layer" and m.name in report.results]
    if not found:
        return None
    scores, sentences = {}, []
    for m in found:
        (params,) = report.results[m.name].about["best_params"].values()
        scores[m.initialization] = params["validation_accuracy_by_layer"]
        accuracies, best = scores[m.initialization]["linear_probe"], params["layer"]
        sentences.append(
            f"{m.title}: layer {best} of {len(accuracies)}, with {as_percent(accuracies[best - 1], 1)} on the "
            f"validation set, {as_percent(accuracies[-1], 1)} at the last layer."
        )
    figure = Figure("layers", figures.layer_accuracies, (scores,), "Validation accuracy at every layer")
    return Section("Accuracy by layer", [Bullets(sentences), LAYERS_NOTE, figure], "layers")


def _label_efficiency(report: Report) -> Section | None:
    measured = {m: result for m in METHODS if m.few_labels and (result := report.few_labels(m))}
    curves = {}  # by classifier and initialization, what was measured by the number of labels
    for classifier in FEW_LABELS:
        for m, result in measured.items():
            if m.network is None and (points := result.points(classifier)):
                curves.setdefault(classifier, {})[m.initialization] = {p["labels"]: p for p in points}
    rows, panels, sentences = [], {}, []
    for classifier, by_weights in curves.items():
        title = FEW_LABELS[classifier]
        panels[title] = {key: (list(x), [(*_estimate(p),) for p in x.values()]) for key, x in by_weights.items()}
        random, ssl = (by_weights.get(key, {}) for key in ("random", "ssl"))
        if shared := sorted(set(random) & set(ssl)):
            accuracies = ([x[labels]["accuracy"] for labels in shared] for x in (random, ssl))
            sentences.append(value_of_pretraining(shared, *accuracies, title))
        for labels in sorted({*random, *ssl}):
            points = [random.get(labels), ssl.get(labels)]
            draws = " / ".join(str(p["draws"]) for p in points if p)
            rows.append((title, f"{labels:,}", draws, *(percent(_estimate(p)) if p else "missing" for p in points)))
    for m, result in measured.items():
        if m.network is not None:
            points = result.points(m.classifier)
            rows += [(m.title, f"{p['labels']:,}", str(p["draws"]), percent(_estimate(p)), "") for p in points]
    if not rows:
        return None
    table = Table(("Method", "Labels", "Draws", "Random weights", "SSL weights"), rows)
    blocks: list[Block] = [*([Bullets(sentences)] if sentences else []), table, FEW_LABELS_NOTE]
    if panels:
        text = "Test accuracy over the number of training labels"
        blocks.append(Figure("label_efficiency", figures.label_efficiency, (panels,), text))
    return Section("Label efficiency", blocks, "label-efficiency")


def _estimate(point: dict) -> Estimate:
    return Estimate(point["accuracy"], *point["interval"])


def _transfer(report: Report) -> Section | None:
    """Few labels of other data sets."""
    rows, leakage = [], []
    probe = BY_NAME["ssl_linear_probe"]
    for dataset in other_datasets(report.folder):
        ssl, random = (report.few_labels(m, dataset) for m in (probe, BY_NAME[probe.baseline]))
        if ssl is None:
            continue
        name = ssl.about["dataset_name"]
        leakage.append(f"{name}: {describe_leakage(ssl.about)}")
        for classifier, title in FEW_LABELS.items():
            baselines = {p["labels"]: p for p in random.points(classifier)} if random else {}
            for point in ssl.points(classifier):
                of_random, difference = "missing", ""
                if baseline := baselines.get(point["labels"]):
                    predicted = ssl.predicted_at(point), random.predicted_at(baseline)
                    difference = findings.percentage_points(gain(ssl.predictions.label, *predicted))
                    of_random = percent(_estimate(baseline))
                rows.append((name, title, f"{point['labels']:,}", of_random, percent(_estimate(point)), difference))
    header = ("Galaxies", "Method", "Labels", "Random weights", "SSL weights", "Gain in percentage points")
    blocks = [Table(header, rows), FEW_LABELS_NOTE, *leakage]
    return Section("Transfer to other galaxies", blocks, "transfer") if rows else None


def _calibration(report: Report) -> Section:
    """A table of calibration errors, and reliability diagrams of the fine-tuned classifiers."""
    header = ("Method", "ECE before the temperature", "ECE", "Limit (95 %)", "ECE of the mean", "Temperature per seed")
    rows, diagrams = [], []
    for m in (m for m in METHODS if m in ARRAY_METHODS or (m.classifier == "fine_tune_tta" and m.network is None)):
        if m.name not in report.results:
            continue
        about, before, temperatures = report.results[m.name].about, "", ""
        scores = about["calibration"]
        if m.classifier == "fine_tune":
            before = as_percent(scores["before"]["ece"], 1)
            temperatures = ", ".join(f"{x['temperature']:.2f}" for x in about["best_params"].values())
            panels = {
                f"before the temperature: ECE {before}": scores["before"]["reliability"],
                f"with the temperature: ECE {as_percent(scores['ece'], 1)}": scores["reliability"],
            }
            text = f"{m.title}: accuracy over confidence, before and with the temperature"
            arguments = (panels, BINS, _figure_title(m, about))
            diagrams.append(Figure(f"reliability_{m.name}", figures.reliability_diagrams, arguments, text))
        errors = (as_percent(scores[key], 1) for key in ("ece", "ece_if_calibrated", "ece_of_mean"))
        rows.append((m.title, before, *errors, temperatures))
    return Section("Calibration", [Table(header, rows), CALIBRATION_NOTE, *diagrams], "calibration")


def _figure_title(method: Method, about: dict) -> str:
    seeds = len(about["seeds"])
    return f"{method.title}: {about['test_images']:,} test galaxies, {seeds} seed{'s' * (seeds > 1)}"


def _classes(report: Report) -> Section | None:
    if report.best is None:
        return None
    table = per_class_table(report.results[report.best].predictions)
    return Section(f"Classes: {BY_NAME[report.best].title}", [table, PER_CLASS_NOTE], "classes", markdown_only=True)


def _confusion_matrices(report: Report) -> Section:
    blocks = []
    for m in ARRAY_METHODS:
        if m.name in report.results:
            about = report.results[m.name].about
            arguments = (np.array(about["confusion_matrix"]), report.config["class_names"], _figure_title(m, about))
            blocks.append(Figure(f"confusion_{m.name}", figures.confusion_matrix, arguments, m.title))
        else:
            blocks.append(f"{m.title}: missing.")
    return Section("Confusion matrices", blocks, "confusion-matrices", markdown_only=True)

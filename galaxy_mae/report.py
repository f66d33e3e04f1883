"""The results of a folder -> a table, key findings computed from the numbers, and figures.

Reads what `evaluation.py` wrote and nothing else, so that it can be written again at any time, also while methods are
still missing. Each gain names its baseline: chance for what starts from random weights, the same protocol from random
weights for what starts from pre-trained ones.
"""

import logging
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from filelock import FileLock

from galaxy_mae import provenance
from galaxy_mae.atomic import atomic_file
from galaxy_mae.callbacks import finish_wandb, start_wandb
from galaxy_mae.errors import UserError
from galaxy_mae.evaluation import METHODS, failure_file, is_finished, read_json
from galaxy_mae.figures import accuracy_bars, confusion_matrix
from galaxy_mae.scores import Estimate, gain, mcnemar, percent

logger = logging.getLogger(__name__)

TITLES = {
    "zero_shot": "Zero-shot (random weights)",
    "random_linear_probe": "Linear probe (random weights)",
    "ssl_linear_probe": "Linear probe (SSL weights)",
    "random_fine_tune": "Fine-tune (random weights)",
    "ssl_fine_tune": "Fine-tune (SSL weights)",
    "raw_pixels": "Logistic regression on raw 32 x 32 pixels",
    "random_knn": "k-NN (20), random weights",
    "ssl_knn": "k-NN (20), SSL weights",
    "random_nearest_class_mean": "Nearest class mean, random weights",
    "ssl_nearest_class_mean": "Nearest class mean, SSL weights",
    "random_attention_probe": "Attention-pooled probe, random weights",
    "ssl_attention_probe": "Attention-pooled probe, SSL weights",
    "random_fine_tune_eightfold": "Fine-tune, mean of eight views (random weights)",
    "ssl_fine_tune_eightfold": "Fine-tune, mean of eight views (SSL weights)",
}
BESIDE = tuple(name for name in TITLES if name not in METHODS)


@dataclass(frozen=True)
class Result:
    """A result file and its predictions."""

    name: str
    about: dict
    path: Path

    @property
    def estimate(self) -> Estimate:
        """Accuracy with its interval."""
        return Estimate(self.about["accuracy"], *self.about["interval"])

    @cached_property
    def _table(self):
        try:
            return pq.read_table(self.path)
        except (OSError, ValueError) as error:
            raise UserError(f"{self.path}: cannot be read; run {self.name} again with --rerun") from error

    @property
    def label(self) -> np.ndarray:
        """(M,) int64: the classes of the test rows."""
        return self._table["label"].to_numpy()

    @property
    def predicted(self) -> np.ndarray:
        """(seeds, M) int64."""
        return np.stack([self._table[f"predicted_seed_{seed}"].to_numpy() for seed in self.about["seeds"]])


def write_report(folder: Path, report_to: list[str]) -> None:
    """Write `report.md`, `accuracy.png` and a `confusion_METHOD.png` for each method that is finished.

    Args:
        folder: of the results.
        report_to: where else: with "wandb", the table and figures go there.

    Raises:
        UserError: no results there, or a result that is damaged or of another evaluation.
    """
    if not (folder / "evaluation.json").is_file():
        raise UserError(
            f"--output_dir {folder}: no results there; run linear_probe_checkpoints.py without --report first"
        )
    with FileLock(folder / ".report.lock"):  # the tasks of an array write it in turn, each with all that is there
        _write(folder, report_to)


def _write(folder: Path, report_to: list[str]) -> None:
    about = read_json(folder / "evaluation.json")
    results = {name: _read(folder, name, about) for name in TITLES if is_finished(folder, name)}
    unfinished = {name: _why_missing(folder, name) for name in METHODS if name not in results}
    lines = [f"# Evaluation of {about['encoder_name']}", "", _what(about, results), ""]
    lines += [*_table(results, unfinished), "", "![Accuracy of the five methods with 95 % intervals](accuracy.png)", ""]
    findings = key_findings(results, about)
    findings += [f"{TITLES[name]}: {why}." for name, why in unfinished.items()]
    lines += ["## Key findings", "", *(f"- {finding}" for finding in findings), ""]
    lines += ["## Pre-trained against random weights, the same galaxies", "", *_paired(results), ""]
    lines += ["## Beside the five", "", *_beside(results), ""]
    lines += ["## Confusion matrices", "", *_matrices(folder, results, about)]
    accuracy_bars(
        folder / "accuracy.png",
        [TITLES[name] for name in METHODS],
        [results[name].estimate if name in results else None for name in METHODS],
        [name.startswith("ssl") for name in METHODS],
        1 / len(about["class_names"]),
    )
    with atomic_file(folder / "report.md") as aside:
        aside.write_text("\n".join(lines).rstrip() + "\n")
    print("\n".join(_table(results, unfinished)))
    print("\n" + "\n".join(f"- {finding}" for finding in findings))
    print(f"\nreport: {folder / 'report.md'}")
    if "wandb" in report_to:
        _log_to_wandb(folder, results, about)


def _why_missing(folder: Path, method: str) -> str:
    """`missing`, or the error that the method failed with."""
    failure = failure_file(folder, method)
    return f"failed, {failure.read_text().strip()}" if failure.is_file() else "missing"


def _read(folder: Path, name: str, about: dict) -> Result:
    result = read_json(folder / f"{name}.json")
    for key in ("dataset", "split", "encoder", "recipe"):
        if result.get(key) != about[key]:
            raise UserError(
                f"{folder / name}.json: of another {key} than evaluation.json; delete it and run {name} again"
            )
    return Result(name, result, folder / f"{name}.parquet")


# ---------------------------------------------------------------------------------------------------------- the pieces


def _what(about: dict, results: dict[str, Result]) -> str:
    """What was evaluated, on what, where."""
    model = about["model"]
    text = (
        f"Encoder `{about['encoder_name']}` ({model['parameters'] / 1e6:.1f} M parameters: {model['width']} wide, "
        f"{model['layers']} layers, patches of {model['patch_size']}, images of {model['image_size']} pixels"
    )
    pretraining = about["pretraining"]
    if pretraining:
        text += (
            f"; pre-trained for {pretraining['num_train_epochs']:g} epochs at mask ratio {pretraining['mask_ratio']}"
        )
    text += f"). Data `{about['dataset_name']}`, SHA-256 {about['dataset'][:12]}, split {about['split'][:12]}"
    if results:
        tests = next(iter(results.values())).about["test_images"]
        machines = sorted({result.about["device"] for result in results.values()})
        commits = sorted({provenance.short_commit(result.about) for result in results.values()})
        text += f", {tests:,} test galaxies. Computed on {'; '.join(machines)}; commit {', '.join(commits)}"
    return text + "."


def points(estimate: Estimate) -> str:
    """A difference with its interval in percentage points, as in `+19.80 (16.10 to 23.50)`."""
    return f"{100 * estimate.value:+.2f} ({100 * estimate.low:+.2f} to {100 * estimate.high:+.2f})"


def _table(results: dict[str, Result], unfinished: dict[str, str]) -> list[str]:
    """The five rows."""
    lines = ["| Method | Accuracy (95 % interval) | Gain over random, in points |", "| --- | --- | --- |"]
    for name in METHODS:
        cells = (percent(results[name].estimate), _gain(name, results)) if name in results else (unfinished[name], "")
        lines.append(f"| {TITLES[name]} | {cells[0]} | {cells[1]} |")
    return lines


def _gain(name: str, results: dict[str, Result]) -> str:
    result = results[name]
    if not name.startswith("ssl"):
        chance = 1 / len(result.about["per_class"])
        above = Estimate(*(x - chance for x in (result.estimate.value, result.estimate.low, result.estimate.high)))
        return f"{points(above)} over chance, {chance:.0%}"
    twin = _twin(name)
    if twin not in results:
        return f"missing: {twin}"
    return f"{points(_gain_over(result, results[twin]))} over the same from random weights"


def _twin(name: str) -> str:
    """The same protocol from random weights."""
    return name.replace("ssl", "random", 1)


def _gain_over(result: Result, baseline: Result) -> Estimate:
    return gain(result.label, result.predicted, baseline.predicted)


def _paired(results: dict[str, Result]) -> list[str]:
    """Gains and McNemar's test of each pre-trained result against its random twin."""
    lines = [
        "| | Gain, in points (95 % interval) | Only SSL right | Only random right | McNemar's p | Pairs of seeds |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name in TITLES:
        if name.startswith("ssl") and name in results and _twin(name) in results:
            one, other = results[name], results[_twin(name)]
            test = mcnemar(one.label, one.predicted, other.predicted)
            cells = (test["only_this"], test["only_baseline"], f"{test['p_value']:.2g}", test["pairs_of_seeds"])
            lines.append(f"| {TITLES[name]} | {points(_gain_over(one, other))} | {' | '.join(map(str, cells))} |")
    return [*lines, "", "McNemar's test is the exact one; counts and p are of the pair of seeds with the largest p."]


def _beside(results: dict[str, Result]) -> list[str]:
    lines = ["| | Accuracy (95 % interval) |", "| --- | --- |"]
    lines += [f"| {TITLES[name]} | {percent(results[name].estimate)} |" for name in BESIDE if name in results]
    if "zero_shot" in results:
        about = results["zero_shot"].about
        most = about["majority_class"]
        lines.append(f"| Always the most frequent class, {most['name']} | {100 * most['accuracy']:.2f} % |")
        lines.append(f"| Chance | {100 * about['chance']:.2f} % |")
    return lines


def _matrices(folder: Path, results: dict[str, Result], about: dict) -> list[str]:
    lines = []
    for name in METHODS:
        if name not in results:
            lines += [f"{TITLES[name]}: missing.", ""]
            continue
        picture = f"confusion_{name}.png"
        counts = np.array(results[name].about["confusion_matrix"])
        seeds = len(results[name].about["seeds"])
        title = f"{TITLES[name]}: {results[name].about['test_images']:,} test galaxies, {seeds} seed{'s' * (seeds > 1)}"
        confusion_matrix(folder / picture, counts, about["class_names"], title)
        lines += [f"![{TITLES[name]}]({picture})", ""]
    return lines


# ---------------------------------------------------------------------------------------------------- the key findings


def key_findings(results: dict[str, Result], about: dict) -> list[str]:
    """Sentences that follow from the numbers; one only where all that it needs is there."""
    findings = []
    for name in ("ssl_linear_probe", "ssl_fine_tune"):
        if name in results and _twin(name) in results:
            findings.append(_pretraining_helps(name, results))
    if {"ssl_linear_probe", "random_fine_tune"} <= set(results):
        frozen, trained = results["ssl_linear_probe"], results["random_fine_tune"]
        difference = _gain_over(frozen, trained)
        verb = _compared(difference, "beats", "falls short of", "cannot be told from")
        findings.append(
            f"A linear classifier on the frozen pre-trained encoder {verb} training all weights from scratch: "
            f"{points(difference)} points."
        )
    if "zero_shot" in results:
        zero = results["zero_shot"].about
        each, most = zero["accuracy_per_seed"], zero["majority_class"]
        findings.append(
            f"Untrained networks reach {100 * np.mean(each):.1f} % ({100 * min(each):.1f} to {100 * max(each):.1f}, "
            f"{len(each)} initialisations); chance is {zero['chance']:.0%}, and always saying {most['name']} gives "
            f"{100 * most['accuracy']:.1f} %."
        )
    finished = [results[name] for name in METHODS if name in results]
    if finished:
        findings.append(_best(max(finished, key=lambda result: result.estimate.value), about))
    return findings


def _pretraining_helps(name: str, results: dict[str, Result]) -> str:
    result, twin = results[name], results[_twin(name)]
    difference = _gain_over(result, twin)
    p_value = mcnemar(result.label, result.predicted, twin.predicted)["p_value"]
    what = _compared(difference, "raises", "lowers", "does not measurably change")
    return (
        f"Pre-training {what} the {TITLES[name].split(' (')[0].lower()}: {100 * twin.estimate.value:.1f} % from random "
        f"weights, {100 * result.estimate.value:.1f} % from pre-trained ones, {points(difference)} points "
        f"(McNemar's p = {p_value:.2g})."
    )


def _compared(difference: Estimate, above: str, below: str, neither: str) -> str:
    return above if difference.low > 0 else below if difference.high < 0 else neither


def _best(best: Result, about: dict) -> str:
    """The best method, its easiest and hardest class, and what is most often taken for what."""
    recall = {name: scores["recall"] for name, scores in best.about["per_class"].items() if scores["test_images"]}
    easy, hard = max(recall, key=recall.get), min(recall, key=recall.get)
    counts = np.array(best.about["confusion_matrix"], dtype=float)
    shares = counts / counts.sum(axis=1, keepdims=True).clip(1)
    np.fill_diagonal(shares, 0)
    true, taken = np.unravel_index(shares.argmax(), shares.shape)
    names, f1 = about["class_names"], best.about["macro_f1"]
    return (
        f"Best: {TITLES[best.name]}, {percent(best.estimate)}, macro-F1 {f1:.3f}. It finds {recall[easy]:.0%} of "
        f"{easy} and {recall[hard]:.0%} of {hard}; its commonest mistake is to take {names[true]} for {names[taken]} "
        f"({shares[true, taken]:.0%})."
    )


def _log_to_wandb(folder: Path, results: dict[str, Result], about: dict) -> None:
    start_wandb(folder / "report", f"{folder.name}/report", about, group=folder.name)
    import wandb  # only where it is reported to

    table = wandb.Table(columns=["method", "accuracy", "interval_low", "interval_high", "gain_over_random"])
    for name in METHODS:
        if name in results:
            estimate = results[name].estimate
            table.add_data(TITLES[name], estimate.value, estimate.low, estimate.high, _gain(name, results))
        else:
            table.add_data(TITLES[name], None, None, None, "missing")
    pictures = {path.stem: wandb.Image(str(path)) for path in sorted(folder.glob("*.png"))}
    wandb.log({"results": table} | pictures)
    finish_wandb()

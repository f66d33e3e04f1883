"""Sweeps over hyper-parameters: one recipe, one run per trial.

    python -m galaxy_mae.sweep trials recipes/sweep/mask_ratio.yaml     the trials, their progress, the sbatch command
    python -m galaxy_mae.sweep run recipes/sweep/mask_ratio.yaml        run them here, one after the other
    python -m galaxy_mae.sweep report recipes/sweep/*.yaml              table, figure and reconstructions

A sweep's file names the recipe that it varies, fields that differ from it in all trials, and under `sweep` the values
of one field, or of several, of which all combinations are trials. `main.py --config FILE --trial 3` runs a trial, and
so does a task of a Slurm array without `--trial`. Flags override the recipe in all trials: give each command the same.

Trials are compared by a linear probe and k-NN on the validation set: never by the loss, which cannot be compared
between mask ratios and keeps falling while features get worse, and never on test galaxies.
"""

import argparse
import itertools
import logging
import shlex
import signal
import subprocess
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from galaxy_mae import provenance
from galaxy_mae.errors import EXIT_REQUEUE, UserError, one_line_errors
from galaxy_mae.files import atomic_file, read_json, user_path
from galaxy_mae.training.checkpoints import find_checkpoint
from galaxy_mae.training.recipe import RESERVED, find_recipe, pop_flag, read_yaml, select_index, to_flags

if TYPE_CHECKING:
    from galaxy_mae.evaluation.scores import Estimate

logger = logging.getLogger(__name__)

CLASSIFIERS = {"linear_probe": "Linear probe", "knn": "k-NN (20)"}  # of frozen features, that compare trials


@dataclass(frozen=True)
class Trial:
    """One run of a sweep."""

    sweep: str  # its name
    index: int  # in the sweep, from 0
    values: dict[str, Any]  # of the swept fields
    arguments: list[str]  # of main.py
    folder: Path

    @property
    def name(self) -> str:
        """What distinguishes it, as in `mask_ratio 0.65`."""
        return ", ".join(f"{field} {value}" for field, value in self.values.items())

    @cached_property
    def run(self) -> dict[str, Any] | None:
        """The `run.json` of its folder; None if it was not started."""
        return provenance.read_run(self.folder)

    @cached_property
    def results(self) -> dict[str, float] | None:
        """The final metrics of a finished run, or None."""
        if not self.run or not self.run["finished"]:
            return None
        return read_json(self.folder / "eval_results.json", "delete the folder and run the trial again")

    @property
    def state(self) -> str:
        """In words: finished, unfinished at a step, not started."""
        if not self.run:
            return "not started"
        if self.results:
            return "finished"
        checkpoint = find_checkpoint(self.folder, self.run["id"])
        return f"unfinished, at step {checkpoint.name.split('-')[1]}" if checkpoint else "unfinished, no checkpoint yet"

    @cached_property
    def accuracy(self) -> "dict[str, Estimate]":
        """That of each of `CLASSIFIERS` on the validation set, with Wilson's 95 % interval; empty without results."""
        from galaxy_mae.evaluation.scores import Estimate, wilson

        results, keys = self.results or {}, {name: f"eval_{name}_accuracy" for name in CLASSIFIERS}
        found = {name: results[key] for name, key in keys.items() if key in results}
        count = int(results.get("eval_num_validation_images", 0))
        return {name: Estimate(value, *wilson(value, count)) for name, value in found.items()}

    @property
    def cells(self) -> list[str]:
        """The accuracies as cells of a table."""
        from galaxy_mae.evaluation.scores import percent

        return [percent(self.accuracy[name]) if name in self.accuracy else "" for name in CLASSIFIERS]


@dataclass(frozen=True)
class Sweep:
    """A parsed sweep file."""

    path: Path
    fields: tuple[str, ...]  # which are swept
    folder: Path  # the parent of the trials' folders
    trials: tuple[Trial, ...]

    @property
    def finished(self) -> list[Trial]:
        """The trials with results."""
        return [trial for trial in self.trials if trial.results]

    @property
    def best(self) -> Trial | None:
        """The trial with the best linear probe on the validation set, ties broken by k-NN; None if none is finished."""
        scored = [trial for trial in self.trials if trial.accuracy]
        return max(scored, key=lambda trial: [x.value for x in trial.accuracy.values()], default=None)

    @property
    def equal(self) -> list[Trial]:
        """The trials that the best one cannot be told apart from: their linear probe is within its interval."""
        probed = {trial.index: next(iter(trial.accuracy.values())) for trial in self.trials if trial.accuracy}
        others = (trial for trial in self.trials if trial.index in probed and trial is not self.best)
        return [trial for trial in others if probed[trial.index].value >= probed[self.best.index].low]

    @property
    def best_value(self) -> str:
        """That of the best trial, with those that it cannot be told apart from."""
        if self.best is None:
            return "not known yet"
        best, *equal = (", ".join(map(str, trial.values.values())) for trial in (self.best, *self.equal))
        return f"{best} (not told apart from {'; '.join(equal)})" if equal else best


def read_sweep(path: Path, flags: list[str]) -> Sweep | None:
    """Read a sweep's file; None if it is an ordinary recipe.

    `flags` of main.py are for all trials; an `--output_dir` among them overrides the file's.

    Raises:
        UserError: the file cannot be read, or is not a valid sweep.
    """
    content = read_yaml(path)
    if "sweep" not in content:
        return None
    grid, recipe, where = content.pop("sweep"), content.pop("recipe", None), f"--config {path}"
    lists = isinstance(grid, dict) and grid and all(isinstance(values, list) and values for values in grid.values())
    if not (lists and isinstance(recipe, str)):
        raise UserError(
            f"{where}: a sweep names the `recipe` that it varies, and under `sweep` fields with lists of values, as in "
            "`mask_ratio: [0.7, 0.8]`"
        )
    grid = {str(name).replace("-", "_"): values for name, values in grid.items()}
    if ours := sorted({*RESERVED, "output_dir", "run_name"} & set(grid)):
        raise UserError(f"{where}: {ours[0]} cannot be swept: it does not change what a trial computes")
    named = {flag.split("=")[0].removeprefix("--").replace("-", "_") for flag in flags if flag.startswith("--")}
    if fixed := sorted(set(grid) & (named | set(content))):
        raise UserError(f"{where}: {fixed[0]} is swept; it has no single value for all trials")
    from_flag, flags = pop_flag("--output_dir", flags)
    from_file = content.pop("output_dir", None)
    folder = user_path(from_flag or from_file or f"runs/sweep/{path.stem}")
    common = ["--config", str(path.parent / user_path(recipe)), *to_flags(content), *flags]
    trials = []
    for index, combination in enumerate(itertools.product(*grid.values())):
        values = dict(zip(grid, combination, strict=True))
        trial_folder = folder / "-".join(f"{name}_{value}" for name, value in values.items())
        arguments = [*common, *to_flags(values), "--output_dir", str(trial_folder)]
        trials.append(Trial(path.stem, index, values, arguments, trial_folder))
    return Sweep(path, tuple(grid), folder, tuple(trials))


def find_trial(arguments: list[str]) -> Trial | None:
    """The trial that main.py's arguments select, by `--trial` or by Slurm's array task; None without a sweep.

    Raises:
        UserError: no such trial, or none selected; `--trial` without a sweep.
    """
    config, flags = pop_flag("--config", arguments)
    value, flags = pop_flag("--trial", flags)
    sweep = read_sweep(find_recipe(config), flags) if config else None
    if sweep is None:
        if value is not None:
            raise UserError(f"--trial {value}: {config or 'the default recipe'} is not a sweep; see recipes/sweep/")
        return None
    index = select_index(value, "--trial", [trial.name for trial in sweep.trials])
    if index is None:
        raise UserError(
            f"--config {config}: a sweep of {len(sweep.trials)} trials; select one with --trial 0 to "
            f"{len(sweep.trials) - 1}, or run all with python -m galaxy_mae.sweep run {config}"
        )
    trial = sweep.trials[index]
    logger.info("sweep %s, trial %d: %s; in %s", trial.sweep, trial.index, trial.name, trial.folder)
    return trial


def show_trials(sweep: Sweep, flags: list[str]) -> None:
    """Print the trials, their progress, and how to run them."""
    print(f"{sweep.path}: {len(sweep.trials)} trials in {sweep.folder}")
    for trial in sweep.trials:
        accuracy = trial.cells[0] if trial.results else ""
        print(f"  {trial.index:3}  {trial.name}: {trial.state}" + (f", {accuracy}" if accuracy else ""))
    print(shlex.join(["sbatch", f"--array=0-{len(sweep.trials) - 1}", "run_ssl", str(sweep.path), *flags]))


def run_trials(sweep: Sweep, flags: list[str]) -> None:
    """Run the unfinished trials here, one after the other. A trial that fails does not end the sweep.

    Raises:
        UserError: trials failed; their errors were printed before.
    """
    failed = []
    for trial in sweep.trials:
        if trial.results:
            print(f"trial {trial.index}, {trial.name}: already finished", flush=True)
            continue
        command = [sys.executable, "-m", "galaxy_mae.main", "--config", sweep.path, "--trial", str(trial.index), *flags]
        with subprocess.Popen(command) as process:
            try:
                status = process.wait()
            except (KeyboardInterrupt, SystemExit):
                process.terminate()  # the trial saves a checkpoint
                process.wait()
                raise
        if status == EXIT_REQUEUE:
            sys.exit(status)
        if status:
            failed.append(str(trial.index))
    if failed:
        raise UserError(f"trials {', '.join(failed)} failed, see the errors above; the same command resumes them")


def write_report(sweeps: list[Sweep]) -> None:
    """Print the table of all sweeps, and write a table and a figure for each, with the trials' reconstructions."""
    from galaxy_mae.reports.document import Table

    rows = []
    for sweep in sweeps:
        tested = "; ".join(
            ", ".join(dict.fromkeys(str(trial.values[field]) for trial in sweep.trials)) for field in sweep.fields
        )
        if unfinished := len(sweep.trials) - len(sweep.finished):
            tested += f" ({unfinished} unfinished)"
        best = sweep.best
        rows.append((", ".join(sweep.fields), tested, sweep.best_value, *(best.cells if best else ("", ""))))
        if sweep.finished:
            _write_one(sweep)
            print(f"{sweep.path.stem}: {sweep.folder / 'sweep.md'}")
    print(Table(("Parameter", "Tested values", "Best value", *CLASSIFIERS.values()), rows))


def _write_one(sweep: Sweep) -> None:
    """sweep.md and sweep.png in a sweep's folder."""
    from galaxy_mae import figures
    from galaxy_mae.reports.document import Table

    rows, fields = [], ", ".join(sweep.fields)
    for trial in sweep.trials:
        results = (*trial.cells, f"{trial.results['eval_loss']:.4f}") if trial.results else (trial.state, "", "")
        rows.append((trial.name + " (best)" * (trial is sweep.best and not sweep.equal), *results))
    table = Table(("Trial", "Linear probe (95 % interval)", "k-NN (20)", "Validation loss"), rows)
    figures.sweep_accuracies(
        sweep.folder / "sweep.png",
        [trial.name if len(sweep.fields) > 1 else str(*trial.values.values()) for trial in sweep.trials],
        {title: [trial.accuracy.get(name) for trial in sweep.trials] for name, title in CLASSIFIERS.items()},
        fields,
    )
    paths = {trial.name: f"{trial.folder.name}/reconstruction_example.png" for trial in sweep.finished}
    shown = [f"\n![{name}](<{path}>)\n" for name, path in paths.items() if (sweep.folder / path).is_file()]
    with atomic_file(sweep.folder / "sweep.md") as tmp_path:
        tmp_path.write_text(
            f"# Sweep over {fields}\n\n{_describe(sweep.finished[0])}\n\n{table}\n\n"
            f"Best value: {sweep.best_value}.\n\n"
            "Accuracy on the validation set of classifiers of frozen features. The loss cannot be compared\n"
            "between mask ratios, nor with and without pixel normalization.\n\n"
            "![Accuracy of the trials](sweep.png)\n"
            + "\nReconstructions of the same galaxies:\n" * bool(shown)
            + "".join(shown)
        )


def _describe(trial: Trial) -> str:
    """What the trials have in common, from the record of one of them."""
    recipe, session = trial.run["recipe"], trial.run["sessions"][-1]
    return (
        f"{provenance.training_length(recipe)}, hidden size {recipe['hidden_size']}, {recipe['num_hidden_layers']} "
        f"layers, image size {recipe['image_size']}; data `{recipe['dataset']}`, SHA-256 {recipe['data'][:12]}; one "
        f"seed, {int(trial.results.get('eval_num_validation_images', 0)):,} validation galaxies. "
        f"{session['device']}; commit {provenance.short_commit(session)}."
    )


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m galaxy_mae.sweep",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("command", choices=("trials", "run", "report"))
    parser.add_argument("files", nargs="+", type=user_path, help="files of recipes/sweep/; flags of main.py may follow")
    options, flags = parser.parse_known_args(arguments)
    sweeps = []
    for path in options.files:
        sweep = read_sweep(find_recipe(str(path)), flags)
        if sweep is None:
            raise UserError(f"{path}: an ordinary recipe, not a sweep; see recipes/sweep/")
        sweeps.append(sweep)
    if options.command == "report":
        from galaxy_mae.training.tracking import setup_logging

        setup_logging()
        write_report(sweeps)
        return
    for sweep in sweeps:
        {"trials": show_trials, "run": run_trials}[options.command](sweep, flags)


if __name__ == "__main__":
    with one_line_errors("galaxy_mae.sweep"):
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(EXIT_REQUEUE))
        main(sys.argv[1:])

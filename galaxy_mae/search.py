"""Searches over hyper-parameters: a recipe of recipes, one cell a run.

    python -m galaxy_mae.search cells recipes/search/mask_ratio.yaml     the cells, how far they are, the sbatch line
    python -m galaxy_mae.search run recipes/search/mask_ratio.yaml       run them here, one after the other
    python -m galaxy_mae.search report recipes/search/*.yaml             table, figure and reconstructions

A search's file names the recipe that it varies, fields that differ from it in all cells, and under `search` the values
of one field, or of several, of which all combinations are cells. `main.py --config FILE --cell 3` runs a cell, and so
does a task of a Slurm array without `--cell`. Flags override the recipe in all cells: give each command the same ones.

Cells are judged by what a linear probe and k-NN make of the frozen encoder on validation rows: never by the loss, which
is not comparable between mask ratios and falls on while features get worse, and never on test rows.
"""

import argparse
import itertools
import json
import logging
import shlex
import subprocess
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from galaxy_mae import figures, provenance
from galaxy_mae.atomic import atomic_file
from galaxy_mae.batches import GalaxyBatches
from galaxy_mae.callbacks import galaxies_to_show, log_lines, reconstruct
from galaxy_mae.classifier import load_encoder
from galaxy_mae.errors import UserError, one_line_errors
from galaxy_mae.galaxy10 import split_galaxies
from galaxy_mae.mae import load_mae
from galaxy_mae.recipe import field_flags, read_recipe, read_yaml, take_flag
from galaxy_mae.scores import Estimate, percent, wilson
from galaxy_mae.sources import open_galaxies
from galaxy_mae.trainer import find_checkpoint

logger = logging.getLogger(__name__)

MAIN = Path(__file__).resolve().parents[1] / "main.py"
MOST_CELLS = 1000
SHOWN_GALAXIES = 4


@dataclass(frozen=True)
class Cell:
    """One run of a search.

    Attributes:
        search: the name of the search.
        index: from 0.
        values: of the fields that are searched.
        arguments: of main.py, for this run alone.
        folder: of the run.
    """

    search: str
    index: int
    values: dict[str, Any]
    arguments: list[str]
    folder: Path

    @property
    def name(self) -> str:
        """What distinguishes it, as in `mask_ratio 0.65`."""
        return ", ".join(f"{field} {value}" for field, value in self.values.items())

    @cached_property
    def results(self) -> dict[str, float] | None:
        """The final metrics of a finished run, or None."""
        run = provenance.read_run(self.folder) if self.folder.is_dir() else None
        if not run or not run["finished"]:
            return None
        return json.loads((self.folder / "eval_results.json").read_text())

    @property
    def state(self) -> str:
        """In words: finished, unfinished at a step, not started."""
        if self.results:
            return "finished"
        if not (self.folder / "run.json").is_file():
            return "not started"
        checkpoint = find_checkpoint(self.folder)
        return f"unfinished, at step {checkpoint.name.split('-')[1]}" if checkpoint else "unfinished, no checkpoint yet"

    def accuracy(self, classifier: str) -> Estimate | None:
        """Accuracy of a probe (`linear_probe` or `knn`) on validation rows, with Wilson's 95 % interval."""
        if not self.results or f"eval_{classifier}_accuracy" not in self.results:
            return None
        value = self.results[f"eval_{classifier}_accuracy"]
        return Estimate(value, *wilson(value, int(self.results["eval_probed_images"])))


@dataclass(frozen=True)
class Search:
    """A search's file, read.

    Attributes:
        path: the file.
        fields: the fields that are searched.
        folder: where the cells' folders lie.
        cells: the runs.
    """

    path: Path
    fields: tuple[str, ...]
    folder: Path
    cells: tuple[Cell, ...]


def read_search(path: Path, flags: list[str]) -> Search | None:
    """Read a search's file; None where it is an ordinary recipe.

    Args:
        path: a YAML file.
        flags: of main.py, for all cells; an `--output_dir` among them takes the place of the file's.

    Raises:
        UserError: the file cannot be read, or what it says makes no search.
    """
    content = read_yaml(path)
    if "search" not in content:
        return None
    grid, recipe = content.pop("search"), content.pop("recipe", None)
    where = f"--config {path}"
    if (
        not isinstance(grid, dict)
        or not grid
        or not all(isinstance(values, list) and values for values in grid.values())
    ):
        raise UserError(f"{where}: under `search` stand fields with lists of values, as in `mask_ratio: [0.7, 0.8]`")
    if recipe is None:
        raise UserError(f"{where}: a search names the recipe that it varies, as in `recipe: ../galaxy10.yaml`")
    given = {flag.split("=")[0].removeprefix("--").replace("-", "_") for flag in flags if flag.startswith("--")}
    for name in grid:
        if name in given or name in content:
            raise UserError(f"{where}: {name} is what is searched; it has no single value in all cells")
    combinations = list(itertools.islice(itertools.product(*grid.values()), MOST_CELLS + 1))
    if len(combinations) > MOST_CELLS:
        raise UserError(f"{where}: more than {MOST_CELLS:,} cells; search fewer values")
    output, flags = take_flag("--output_dir", flags)
    folder = Path(output or content.pop("output_dir", None) or Path("runs", "search", path.stem))
    content.pop("output_dir", None)
    common = ["--config", str(path.parent / recipe), *field_flags(content), *flags]
    cells = []
    for index, values in enumerate(combinations):
        point = dict(zip(grid, values, strict=True))
        place = folder / "-".join(f"{name}_{value}" for name, value in point.items())
        arguments = [*common, *field_flags(point), "--output_dir", str(place)]
        cells.append(Cell(path.stem, index, point, arguments, place))
    if len({cell.folder for cell in cells}) < len(cells):
        raise UserError(f"{where}: a value stands twice under `search`")
    return Search(path, tuple(grid), folder, tuple(cells))


def find_cell(arguments: list[str], task: str | None) -> Cell | None:
    """The cell that main.py's arguments mean; None where their recipe is no search.

    Args:
        arguments: with `--config`, and perhaps `--cell`.
        task: Slurm's array task id, if there is one: it chooses the cell where `--cell` does not.

    Raises:
        UserError: no such cell, or none chosen; `--cell` without a search.
    """
    config, flags = take_flag("--config", arguments)
    index, flags = take_flag("--cell", flags)
    search = read_search(Path(config), flags) if config else None
    if search is None:
        if index is not None:
            raise UserError(f"--cell {index}: {config or 'the default recipe'} is no search; see recipes/search/")
        return None
    name, said_by = (index, "--cell") if index is not None else (task, "SLURM_ARRAY_TASK_ID")
    last = len(search.cells) - 1
    if name is None:
        raise UserError(
            f"--config {config}: a search of {last + 1} cells; choose one by --cell 0 to {last}, or run them all: "
            f"python -m galaxy_mae.search run {config}"
        )
    if not name.isdigit() or int(name) > last:
        raise UserError(f"{said_by} {name}: no such cell; {config} has cells 0 to {last}")
    return search.cells[int(name)]


# -------------------------------------------------------------------------------------------------------- the commands


def show_cells(search: Search, flags: list[str]) -> None:
    """Print the cells, how far they are, and how to run them."""
    print(f"{search.path}: {len(search.cells)} cells in {search.folder}")
    for cell in search.cells:
        probe = cell.accuracy("linear_probe")
        print(f"  {cell.index:3}  {cell.name}: {cell.state}" + (f", {percent(probe)}" if probe else ""))
    print(shlex.join(["sbatch", f"--array=0-{len(search.cells) - 1}", "run_ssl", str(search.path), *flags]))


def run_cells(search: Search, flags: list[str]) -> None:
    """Run the cells that are not finished here, one after the other; a cell that fails does not end the search.

    Raises:
        UserError: cells failed; their errors stand above.
    """
    failed = []
    for cell in search.cells:
        if cell.results:
            logger.info("cell %d, %s: finished before", cell.index, cell.name)
            continue
        command = [sys.executable, MAIN, "--config", search.path, "--cell", str(cell.index), *flags]
        if subprocess.run(command).returncode:
            failed.append(str(cell.index))
    if failed:
        raise UserError(f"cells {', '.join(failed)} failed, for the reasons above; the same command goes on with them")


def write_report(searches: list[Search]) -> None:
    """Gather searches: the table of all, and for each its own table, figure and reconstructions."""
    lines = ["| Parameter | Tested range | Best value | Linear probe | k-NN (20) |", "| --- | --- | --- | --- | --- |"]
    for search in searches:
        best = best_cell(search)
        tested = "; ".join(_tested(search, field) for field in search.fields)
        unfinished = sum(cell.results is None for cell in search.cells)
        tested += f" ({unfinished} unfinished)" if unfinished else ""
        accuracies = [percent(best.accuracy(name)) for name in ("linear_probe", "knn")] if best else ["", ""]
        name = ", ".join(map(str, best.values.values())) if best else "unknown yet"
        lines.append(f"| {', '.join(search.fields)} | {tested} | {name} | {' | '.join(accuracies)} |")
        if any(cell.results for cell in search.cells):
            _write_one(search, best)
    print("\n".join(lines))
    for search in searches:
        if any(cell.results for cell in search.cells):
            print(f"{search.path.stem}: {search.folder / 'search.md'}")


def best_cell(search: Search) -> Cell | None:
    """The cell with the best linear probe on validation rows, k-NN deciding between equals; None before the first."""
    judged = [cell for cell in search.cells if cell.accuracy("linear_probe")]
    return max(judged, key=lambda c: (c.accuracy("linear_probe").value, c.accuracy("knn").value), default=None)


def _tested(search: Search, field: str) -> str:
    return ", ".join(dict.fromkeys(str(cell.values[field]) for cell in search.cells))


def _write_one(search: Search, best: Cell | None) -> None:
    """search.md, search.png and reconstructions.png in a search's folder."""
    finished = [cell for cell in search.cells if cell.results]
    lines = [f"# Search over {', '.join(search.fields)}", ""]
    lines += [_what(finished[0]), ""]
    lines += ["| | Linear probe (95 % interval) | k-NN (20) | Validation loss |", "| --- | --- | --- | --- |"]
    for cell in search.cells:
        if not cell.results:
            lines.append(f"| {cell.name} | {cell.state} | | |")
            continue
        shown = [percent(cell.accuracy(p)) if cell.accuracy(p) else "" for p in ("linear_probe", "knn")]
        mark = "**" if cell is best else ""
        lines.append(f"| {mark}{cell.name}{mark} | {shown[0]} | {shown[1]} | {cell.results['eval_loss']:.4f} |")
    lines += ["", "Accuracy on validation rows of classifiers of the frozen encoder's features. The loss is not"]
    lines += ["comparable between mask ratios, nor between pixels that are normalised and not.", ""]
    lines += ["![Accuracy of the cells](search.png)", "", "![Reconstructions of the cells](reconstructions.png)"]
    figures.search_accuracies(
        search.folder / "search.png",
        [cell.name if len(search.fields) > 1 else str(*cell.values.values()) for cell in search.cells],
        {
            "linear probe": [cell.accuracy("linear_probe") for cell in search.cells],
            "k-NN (20)": [cell.accuracy("knn") for cell in search.cells],
        },
        ", ".join(search.fields),
    )
    _draw_reconstructions(search, finished)
    with atomic_file(search.folder / "search.md") as aside:
        aside.write_text("\n".join(lines) + "\n")


def _what(cell: Cell) -> str:
    """What the cells have in common, from the record of one of them."""
    run = provenance.read_run(cell.folder)
    recipe, session = run["recipe"], run["sessions"][-1]
    return (
        f"{recipe['num_train_epochs']:g} epochs of {recipe['hidden_size']} wide, {recipe['num_hidden_layers']} layers, "
        f"{recipe['image_size']} pixels; data `{recipe['dataset']}`, SHA-256 {recipe['data'][:12]}; one seed, "
        f"{int(cell.results.get('eval_probed_images', 0)):,} validation galaxies. "
        f"{session['device']}; commit {provenance.short_commit(session)}."
    )


def _draw_reconstructions(search: Search, finished: list[Cell]) -> None:
    """The same galaxies with the same mask noise, as each finished cell saw and reconstructed them."""
    seen, painted, names = [], [], []
    for cell in finished:
        arguments = read_recipe(cell.arguments).galaxies
        encoder = load_encoder(str(cell.folder))
        galaxies = open_galaxies(arguments.dataset, arguments.image_size)
        rows = split_galaxies(galaxies, arguments.split_seed)["validation"]
        shown, names = galaxies_to_show(rows, galaxies.label, galaxies.class_names, SHOWN_GALAXIES)
        batches = GalaxyBatches(galaxies.pixels, encoder.mean, encoder.deviation, arguments.image_size)
        original, prediction, masked = reconstruct(load_mae(cell.folder), batches, shown)
        seen.append(figures.masked_out(original, masked))
        painted.append(figures.pasted(original, prediction, masked))
    figures.reconstructions_by_cell(
        search.folder / "reconstructions.png", original, seen, painted, names, [cell.name for cell in finished]
    )


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m galaxy_mae.search",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("command", choices=("cells", "run", "report"))
    parser.add_argument("recipes", nargs="+", type=Path, help="files of recipes/search/; flags of main.py may follow")
    words = list(itertools.takewhile(lambda word: not word.startswith("--") or word == "--help", arguments))
    options, flags = parser.parse_args(words), arguments[len(words) :]
    log_lines()
    searches = []
    for path in options.recipes:
        search = read_search(path, flags)
        if search is None:
            raise UserError(f"{path}: an ordinary recipe, not a search; see recipes/search/")
        searches.append(search)
    if options.command == "report":
        write_report(searches)
        return
    for search in searches:
        {"cells": show_cells, "run": run_cells}[options.command](search, flags)


if __name__ == "__main__":
    with one_line_errors("galaxy_mae.search"):
        main(sys.argv[1:])

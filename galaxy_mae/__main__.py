"""The command `galaxy-mae`: all commands of this package by one name, with or without its repository.

    galaxy-mae pretrain --config demo                       main.py
    galaxy-mae evaluate --encoder runs/demo                 linear_probe_checkpoints.py
    galaxy-mae predict --dataset my_galaxies/ --output catalogue.parquet

The names of recipes and of the small model (`demo`, `sweep/mask_ratio`, `pretrained`) are those of this package.
"""

import argparse
import json
import os
import platform
import re
import runpy
import shlex
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from galaxy_mae.errors import UserError, one_line_errors
from galaxy_mae.files import read_json, write_json

# By name: the module that is run, as by `python -m`, the arguments that come first, and what it does.
_CATALOGUE = {
    "predict": "class probabilities and embeddings of every galaxy of a data set",
    "similar": "the galaxies of a catalogue that are most similar to one of them",
    "odd": "the galaxies of a catalogue that are least like the others",
    "page": "one HTML file that shows a catalogue",
    "survey": "class probabilities and embeddings of a HATS catalogue, partition by partition",
    "index": "an index of the embeddings of a survey",
    "nearest": "the galaxies of a survey that are most similar to one, by its index",
}
COMMANDS: dict[str, tuple[str, list[str], str]] = {
    "pretrain": ("galaxy_mae.main", [], "pre-train a masked autoencoder: main.py"),
    "evaluate": ("galaxy_mae.linear_probe_checkpoints", [], "evaluate an encoder: linear_probe_checkpoints.py"),
    **{name: ("galaxy_mae.catalogue", [name], text) for name, text in _CATALOGUE.items()},
    "data": ("galaxy_mae.data", [], "describe a data set and plot a contact sheet of its classes"),
    "sweep": ("galaxy_mae.sweep", [], "several pre-trainings from one file"),
}
# What `make demo` runs, in a folder of one's own.
DEMO = (
    "data synthetic:2000 --image_size 64 --contact_sheet runs/demo_galaxies.png",
    "pretrain --config demo --report_to none",
    "evaluate --encoder runs/demo --config evaluation_demo",
    "predict --model runs/demo --labels synthetic:2000 --dataset synthetic:2000 --embeddings --overwrite"
    " --output results/demo/catalogue.parquet",
    "similar results/demo/catalogue.parquet --query row:1 row:5 row:9 -k 6 --dataset synthetic:2000 --overwrite"
    " --sheet results/demo/similar.png",
    "page results/demo/catalogue.parquet --dataset synthetic:2000",
)
COMPARE = "pre-train on a labelled data set for some minutes, and evaluate that by five methods"
_DEMO_FILES = """
galaxies:        runs/demo_galaxies.png
reconstructions: runs/demo/reconstruction_example.png, and during training in runs/demo/reconstructions/
evaluation:      results/demo/report.md, accuracy.png, and a confusion matrix for each method
catalogue:       results/demo/catalogue.parquet; similar galaxies: results/demo/similar.png
pages to look at in a browser: results/demo/report.html (evaluation), results/demo/catalogue.html

Fine-tuning has three epochs here and ends far behind the linear probe; on real galaxies, with 20, it is ahead."""


def main() -> None:
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in COMMANDS:
        module, first, _ = COMMANDS[name]
        sys.argv = ["galaxy-mae" if first else f"galaxy-mae {name}", *first, *arguments]
        runpy.run_module(module, run_name="__main__")
        return
    with one_line_errors("galaxy-mae"):
        if name in ("demo", "env") and not arguments:
            {"demo": demo, "env": env}[name]()
            return
        if name == "compare":
            compare(arguments)
            return
        if name not in ("-h", "--help", "demo", "env"):
            raise UserError(f"there is no command {name}; galaxy-mae --help lists them")
        names = {each: text for each, (*_, text) in COMMANDS.items()}
        names |= {"compare": COMPARE}
        names |= {"demo": "pre-train a small model on synthetic galaxies, evaluate it, apply it"}
        names |= {"env": "versions and hardware, for a report of a problem"}
        lines = "\n".join(f"  {each:<10} {text}" for each, text in names.items())
        print(f"{__doc__}\n{lines}\n\ngalaxy-mae COMMAND --help describes a command.")


def demo() -> None:
    """Run `DEMO`. A second call does again only what is not finished."""
    Path("runs").mkdir(exist_ok=True)
    for command in DEMO:
        _run(command.split())
    print(_DEMO_FILES)


def _run(command: list[str]) -> None:
    """Run a command of `COMMANDS`; if it fails, end with its status."""
    print(f"\ngalaxy-mae {shlex.join(command)}", flush=True)
    status = subprocess.run([sys.executable, "-m", "galaxy_mae", *command]).returncode
    if status:
        sys.exit(status)


def compare(arguments: list[str]) -> None:
    """Pre-train for as many epochs as fit into some minutes, by the speed of the first steps, and evaluate.

    The epochs are kept beside the run, so that the same command resumes.
    """
    parser = argparse.ArgumentParser("galaxy-mae compare", description=COMPARE, allow_abbrev=False)
    parser.add_argument("dataset", help="labelled, as --dataset of pretrain")
    parser.add_argument("--minutes", type=float, required=True, help="of the pre-training; evaluating comes on top")
    parser.add_argument("--config", default="demo", help="recipe of the pre-training (default: %(default)s)")
    options = parser.parse_args(arguments)
    name = "compare_" + re.sub(r"\W+", "_", options.dataset).strip("_")
    folder, plan = Path("runs", name), Path("runs", f"{name}.json")
    pretrain = ["pretrain", "--config", options.config, "--dataset", options.dataset, "--report_to", "none"]
    planned = read_json(plan, "delete it", ("epochs",)) if plan.is_file() else _plan(pretrain, vars(options))
    if planned | vars(options) != planned:
        raise UserError(f"{plan}: it is of another --minutes or --config; delete it and {folder} to begin again")
    plan.parent.mkdir(exist_ok=True)
    write_json(plan, planned)
    _run([*pretrain, "--num_train_epochs", str(planned["epochs"]), "--output_dir", str(folder)])
    _run(["evaluate", "--encoder", str(folder), "--config", "evaluation_demo", "--output_dir", f"results/{name}"])


def _plan(pretrain: list[str], options: dict[str, Any]) -> dict[str, Any]:
    """The options of `compare`, with the epochs that fit into its minutes: at least one, at most the recipe's."""
    with tempfile.TemporaryDirectory() as folder:
        trial = ["--max_steps", "12", "--probe_every", "0", "--reconstruct_every", "0", "--output_dir", folder]
        _run([*pretrain, *trial])
        recipe = read_json(Path(folder, "run.json"), "repeat it", ("recipe",))["recipe"]
        history = read_json(Path(folder, "trainer_state.json"), "repeat it", ("log_history",))["log_history"]
    rate, validation = (
        next(entry[name] for entry in history if name in entry) for name in ("images_per_second", "eval_runtime")
    )
    epoch = 12 * recipe["batch_size"] / history[-1]["epoch"] / rate  # seconds
    validation *= 22  # by default a run is evaluated every twentieth of its steps, before them and after them
    most = int(recipe["num_train_epochs"])
    epochs = min(max(1, int((60 * options["minutes"] - validation) / epoch)), most)
    took = f"{epochs} of the recipe's {most} epochs take {(epochs * epoch + validation) / 60:.1f} minutes"
    print(f"{rate:,.0f} images/s: {took}; evaluating by the five methods comes on top")
    return options | {"epochs": epochs}


def env() -> None:
    """Print what a report of a problem needs, as JSON. It names no folder, user or host."""
    from galaxy_mae import provenance

    memory = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)
    about = provenance.session() | {"platform": platform.platform(), "memory_GB": memory}
    for package in ("galaxy-mae", "wandb", "astroNN", "lsdb", "faiss-cpu", "umap-learn"):
        try:
            about["versions"][package] = version(package)
        except PackageNotFoundError:
            about["versions"][package] = None
    names = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "WANDB_MODE", "HF_HUB_OFFLINE")
    print(json.dumps(about | {"environment": {name: os.environ.get(name) for name in names}}, indent=2))


if __name__ == "__main__":
    main()

"""The command `galaxy-mae`: all commands of this package by one name, with or without its repository.

    galaxy-mae pretrain --config demo                       main.py
    galaxy-mae evaluate --encoder runs/demo                 linear_probe_checkpoints.py
    galaxy-mae predict --dataset my_galaxies/ --output catalogue.parquet

The names of recipes and of the small model (`demo`, `sweep/mask_ratio`, `pretrained`) are those of this package.
"""

import json
import os
import platform
import runpy
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from galaxy_mae.errors import UserError, one_line_errors

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
    "predict --model results/demo/ssl_fine_tune --dataset synthetic:2000 --embeddings --overwrite"
    " --output results/demo/catalogue.parquet",
    "similar results/demo/catalogue.parquet --query row:1 row:5 row:9 -k 6 --dataset synthetic:2000 --overwrite"
    " --sheet results/demo/similar.png",
    "page results/demo/catalogue.parquet --dataset synthetic:2000",
)
_DEMO_FILES = """
galaxies:        runs/demo_galaxies.png
reconstructions: runs/demo/reconstruction_example.png, and during training in runs/demo/reconstructions/
evaluation:      results/demo/report.md, accuracy.png, and a confusion matrix for each method
catalogue:       results/demo/catalogue.parquet; similar galaxies: results/demo/similar.png
pages to look at in a browser: results/demo/report.html (evaluation), results/demo/catalogue.html"""


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
        if name not in ("-h", "--help", "demo", "env"):
            raise UserError(f"there is no command {name}; galaxy-mae --help lists them")
        names = {each: text for each, (*_, text) in COMMANDS.items()}
        names |= {"demo": "pre-train a small model on synthetic galaxies, evaluate it, apply it"}
        names |= {"env": "versions and hardware, for a report of a problem"}
        lines = "\n".join(f"  {each:<10} {text}" for each, text in names.items())
        print(f"{__doc__}\n{lines}\n\ngalaxy-mae COMMAND --help describes a command.")


def demo() -> None:
    """Run `DEMO`. A second call does again only what is not finished."""
    Path("runs").mkdir(exist_ok=True)
    for command in DEMO:
        print(f"\ngalaxy-mae {command}", flush=True)
        status = subprocess.run([sys.executable, "-m", "galaxy_mae", *command.split()]).returncode
        if status:
            sys.exit(status)
    print(_DEMO_FILES)


def env() -> None:
    """Print what a report of a problem needs, as JSON. It names no folder, user or host."""
    from galaxy_mae import provenance

    about = provenance.session() | {"platform": platform.platform(), "memory_GB": _memory_gb()}
    for package in ("galaxy-mae", "wandb", "astroNN", "lsdb", "faiss-cpu", "umap-learn"):
        try:
            about["versions"][package] = version(package)
        except PackageNotFoundError:
            about["versions"][package] = None
    names = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "WANDB_MODE", "HF_HUB_OFFLINE")
    print(json.dumps(about | {"environment": {name: os.environ.get(name) for name in names}}, indent=2))


def _memory_gb() -> float:
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)


if __name__ == "__main__":
    main()

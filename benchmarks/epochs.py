"""Two promises of a long run: it starts soon, and its memory does not grow with the epochs.

    python benchmarks/epochs.py                                                   recipes/demo.yaml, 200 epochs
    python benchmarks/epochs.py --config recipes/galaxy10.yaml --start_only       a larger model's start alone

Prints the seconds from `python main.py` to its first step, on images that were decoded before, and the resident memory
of a training at the end of its epochs (of `--rows` galaxies, so that 200 epochs are short). Other flags are main.py's.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from transformers import TrainerCallback

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pretrain import our_trainer, read_benchmark

from galaxy_mae.errors import UserError, one_line_errors
from galaxy_mae.galaxy10 import split_galaxies
from galaxy_mae.provenance import machine
from galaxy_mae.recipe import total_batch_size
from galaxy_mae.sources import open_galaxies

MAIN = Path(__file__).resolve().parents[1] / "main.py"


class ResidentMemory(TrainerCallback):
    """Resident memory of this process in MB at the end of every epoch."""

    def __init__(self):
        self.megabytes: list[float] = []

    def on_epoch_end(self, args, state, control, **kwargs):
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        self.megabytes.append(pages * os.sysconf("SC_PAGE_SIZE") / 1e6)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--rows", type=int, default=512, help="training rows")
    parser.add_argument("--start_only", action="store_true")
    options, flags = parser.parse_known_args(arguments)
    given = {flag.split("=")[0] for flag in flags}
    if "--config" not in given:
        flags = ["--config", str(MAIN.parent / "recipes" / "demo.yaml"), *flags]
    if "--dataset" not in given:
        flags = [*flags, "--dataset", "synthetic:2000"]
    recipe = read_benchmark(flags, steps=1)
    galaxies = open_galaxies(recipe.galaxies.dataset, recipe.galaxies.image_size)
    rows = split_galaxies(galaxies, recipe.galaxies.split_seed)["train"]
    galaxies.channel_statistics(rows)
    print(machine())
    print(f"from `python main.py` to the first step: {seconds_to_first_step(flags):.1f} s")
    if options.start_only:
        return
    rows = rows[: options.rows]
    memory = ResidentMemory()
    recipe.training.max_steps = options.epochs * (len(rows) // total_batch_size(recipe.training))
    with tempfile.TemporaryDirectory() as folder:
        recipe.training.output_dir = folder
        trainer = our_trainer(recipe, galaxies, rows)
        trainer.add_callback(memory)
        trainer.train()
    shown = [epoch for epoch in (1, 10, 20, 50, 100, 150, 200) if epoch <= len(memory.megabytes)]
    text = ", ".join(f"{memory.megabytes[epoch - 1]:,.0f} MB after {epoch}" for epoch in shown)
    print(f"resident memory over {len(memory.megabytes)} epochs of {len(rows)} galaxies: {text}")


def seconds_to_first_step(flags: list[str]) -> float:
    """Start main.py and wait for the first loss that it prints."""
    with tempfile.TemporaryDirectory() as folder:
        quiet = ["--report_to", "none", "--disable_tqdm", "True", "--eval_on_start", "False", "--logging_steps", "1"]
        command = [sys.executable, "-u", MAIN, *flags, *quiet, "--max_steps", "1", "--output_dir", folder]
        started = time.perf_counter()
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            for line in process.stdout:
                if "'loss'" in line:
                    taken = time.perf_counter() - started
                    process.kill()
                    return taken
            raise UserError(f"main.py took no step: {process.stderr.read().strip().splitlines()[-1]}")


if __name__ == "__main__":
    with one_line_errors(sys.argv[0]):
        main(sys.argv[1:])

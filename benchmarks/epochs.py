"""The time until a run's first step, and its memory over many epochs.

    python benchmarks/epochs.py                                                   recipes/demo.yaml, 200 epochs
    python benchmarks/epochs.py --config recipes/galaxy10.yaml --start_only       a larger model, only the first step

Prints the seconds from `python main.py` to the first step, on images that are already cached, and the resident memory
(RSS) of a training at the end of its epochs.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measurement import argument_parser, open_split, read_benchmark_recipe
from transformers import TrainerCallback

from galaxy_mae.data.pretraining import PretrainingData
from galaxy_mae.errors import UserError, one_line_errors
from galaxy_mae.provenance import machine
from galaxy_mae.training.pretraining import build_trainer
from galaxy_mae.training.recipe import RECIPES, global_batch_size


class ResidentMemory(TrainerCallback):
    """Resident memory of this process in MB at the end of every epoch."""

    def __init__(self):
        self.megabytes: list[float] = []

    def on_epoch_end(self, args, state, control, **kwargs):
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        self.megabytes.append(pages * os.sysconf("SC_PAGE_SIZE") / 1e6)


def main(arguments: list[str]) -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--num_galaxies", type=int, default=512, help="per epoch; few, so that epochs are short")
    parser.add_argument("--start_only", action="store_true", help="do not measure the memory")
    options, flags = parser.parse_known_args(arguments)
    flags = ["--config", str(RECIPES / "demo.yaml"), *flags]
    recipe = read_benchmark_recipe(flags, steps=1)
    galaxies, split = open_split(recipe)
    print(machine())
    seconds = seconds_to_first_step([*flags, "--dataset", recipe.galaxies.dataset])
    print(f"from `python main.py` to the first step: {seconds:.1f} s")
    if options.start_only:
        return
    split["train"] = split["train"][: options.num_galaxies]
    num_galaxies, memory = len(split["train"]), ResidentMemory()
    recipe.training.max_steps = options.epochs * (num_galaxies // global_batch_size(recipe.training))
    with tempfile.TemporaryDirectory() as recipe.training.output_dir:
        trainer = build_trainer(recipe, PretrainingData(galaxies, split, galaxies), {"id": "benchmark"}, False)
        trainer.add_callback(memory)
        trainer.train()
    shown = [epoch for epoch in (1, 10, 20, 50, 100, 150, 200) if epoch <= len(memory.megabytes)]
    text = ", ".join(f"{memory.megabytes[epoch - 1]:,.0f} MB after {epoch}" for epoch in shown)
    print(f"resident memory (RSS) over {len(memory.megabytes)} epochs of {num_galaxies} galaxies: {text}")


def seconds_to_first_step(flags: list[str]) -> float:
    """Start main.py and wait for the first loss that it prints."""
    with tempfile.TemporaryDirectory() as folder:
        flags = [*flags, "--output_dir", folder, "--report_to", "none", "--disable_tqdm", "True"]
        flags += ["--eval_on_start", "False", "--logging_steps", "1", "--max_steps", "1"]
        command = [sys.executable, "-u", RECIPES.parent / "main.py", *flags]
        started = time.perf_counter()
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            for line in process.stdout:
                if "'loss'" in line:
                    seconds = time.perf_counter() - started
                    process.kill()
                    return seconds
            raise UserError(f"main.py took no step: {process.stderr.read().strip().splitlines()[-1]}")


if __name__ == "__main__":
    with one_line_errors(sys.argv[0]):
        main(sys.argv[1:])

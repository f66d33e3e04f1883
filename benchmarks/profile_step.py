"""Where the time of a pre-training step goes: the operators of main.py's own path, and the number of kernels launched.

    python benchmarks/profile_step.py                                 recipes/galaxy10.yaml on synthetic galaxies
    python benchmarks/profile_step.py --config recipes/demo.yaml --steps 10

Prints time by operator (GPU kernels where there is a GPU) and, on a GPU, the launches a step and the share of the time
in which no kernel ran. Flags are main.py's.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pretrain import our_trainer, read_benchmark, synchronise

from galaxy_mae.errors import one_line_errors
from galaxy_mae.galaxy10 import split_galaxies
from galaxy_mae.provenance import machine
from galaxy_mae.recipe import total_batch_size
from galaxy_mae.sources import open_galaxies

WARM_UP = 5  # steps that compile and allocate


class Profile(TrainerCallback):
    """Profiles all steps after the warm-up."""

    def __init__(self, profiler: profile, device: torch.device):
        self.profiler, self.device, self.seconds = profiler, device, 0.0

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == WARM_UP:
            synchronise(self.device)
            self.profiler.start()
            self.seconds = time.perf_counter()
        elif state.global_step == state.max_steps:
            synchronise(self.device)
            self.seconds = time.perf_counter() - self.seconds
            self.profiler.stop()


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--steps", type=int, default=10, help="profiled steps")
    parser.add_argument("--rows", type=int, default=25, help="of the table")
    options, flags = parser.parse_known_args(arguments)
    recipe = read_benchmark(flags, WARM_UP + options.steps)
    galaxies = open_galaxies(recipe.galaxies.dataset, recipe.galaxies.image_size)
    rows = split_galaxies(galaxies, recipe.galaxies.split_seed)["train"]
    cuda = recipe.training.device.type == "cuda"
    with tempfile.TemporaryDirectory() as folder:
        recipe.training.output_dir = folder
        trainer = our_trainer(recipe, galaxies, rows)
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
        watch = Profile(profile(activities=activities), recipe.training.device)
        trainer.add_callback(watch)
        trainer.train()
    table = watch.profiler.key_averages()
    order = "self_device_time_total" if cuda else "self_cpu_time_total"
    print(
        f"{machine()}; batch {total_batch_size(recipe.training)}, {1000 * watch.seconds / options.steps:.1f} ms a step "
        f"under the profiler, {options.steps} steps"
    )
    print(table.table(sort_by=order, row_limit=options.rows, max_name_column_width=60))
    if cuda:
        kernels = [
            event
            for event in watch.profiler.events()
            if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation
        ]
        busy = sum(event.self_device_time_total for event in kernels) / 1e6
        idle = 1 - busy / watch.seconds
        print(f"{len(kernels) / options.steps:.0f} kernels a step; no kernel ran in {idle:.0%} of the time")


if __name__ == "__main__":
    with one_line_errors(sys.argv[0]):
        main(sys.argv[1:])

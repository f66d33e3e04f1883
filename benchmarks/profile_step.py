"""Where the time of a pre-training step goes: a profile of the operators as main.py runs them.

    python benchmarks/profile_step.py                                 recipes/galaxy10.yaml on synthetic galaxies
    python benchmarks/profile_step.py --config recipes/demo.yaml --steps 10

Prints the time by operator, or by kernel on a GPU. On a GPU it also prints the number of kernels per step and the
fraction of the time in which none ran.
"""

import sys
import tempfile

import torch
from measurement import WARM_UP, Timer, argument_parser, open_split, read_benchmark_recipe
from torch.profiler import ProfilerActivity, profile

from galaxy_mae.data.pretraining import PretrainingData
from galaxy_mae.errors import one_line_errors
from galaxy_mae.provenance import machine
from galaxy_mae.training.pretraining import build_trainer
from galaxy_mae.training.recipe import global_batch_size


class ProfilingTimer(Timer):
    """A timer that profiles the steps which it times."""

    def __init__(self, profiler: profile):
        super().__init__()
        self.profiler = profiler

    def start(self) -> None:
        self.profiler.start()
        super().start()

    def stop(self) -> None:
        super().stop()
        self.profiler.stop()


def main(arguments: list[str]) -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--steps", type=int, default=10, help="profiled steps")
    parser.add_argument("--rows", type=int, default=25, help="of the table")
    options, flags = parser.parse_known_args(arguments)
    recipe = read_benchmark_recipe(flags, WARM_UP + options.steps)
    cuda = recipe.training.device.type == "cuda"
    timer = ProfilingTimer(profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda))
    with tempfile.TemporaryDirectory() as recipe.training.output_dir:
        trainer = build_trainer(recipe, PretrainingData(*open_split(recipe)), "benchmark")
        trainer.add_callback(timer)
        trainer.train()
    print(
        f"{machine()}; batch size {global_batch_size(recipe.training)}, {1000 * timer.seconds / options.steps:.1f} ms "
        f"per step under the profiler, {options.steps} steps"
    )
    order = "self_device_time_total" if cuda else "self_cpu_time_total"
    averages = timer.profiler.key_averages()
    print(averages.table(sort_by=order, row_limit=options.rows, max_name_column_width=60))
    if cuda:
        kernels = [
            event
            for event in timer.profiler.events()
            if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation
        ]
        idle = 1 - sum(event.self_device_time_total for event in kernels) / 1e6 / timer.seconds
        print(f"{len(kernels) / options.steps:.0f} kernels per step; no kernel ran for {idle:.0%} of the time")


if __name__ == "__main__":
    with one_line_errors(sys.argv[0]):
        main(sys.argv[1:])

"""What the benchmarks share: main.py's recipe for a few steps, timing, and measurements in child processes.

Benchmarks import it before galaxy_mae, which it makes importable from a checkout that is not installed.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Trainer, TrainerCallback, ViTMAEConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from galaxy_mae.data.cache import Galaxies, open_galaxies
from galaxy_mae.data.split import split_galaxies
from galaxy_mae.errors import UserError
from galaxy_mae.model.compute import num_patches
from galaxy_mae.provenance import machine, session, short_commit
from galaxy_mae.training.recipe import Recipe, read_recipe

WARM_UP = 3  # steps before the timer starts, in which models are compiled and memory is allocated


# ------------------------------------------------------------------------------------------------------ the arguments


def argument_parser(description: str) -> argparse.ArgumentParser:
    """The parser of a benchmark that passes unknown flags to `read_benchmark_recipe`."""
    return argparse.ArgumentParser(
        description=description,
        epilog="Other flags are those of main.py.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def measurement_parser(description: str, steps: int) -> argparse.ArgumentParser:
    """The parser of a benchmark that calls `run_measurement`; `steps` is a default."""
    parser = argument_parser(description)
    parser.add_argument("--steps", type=int, default=steps, help="timed steps of a measurement")
    parser.add_argument("--results", type=Path, help="file of finished measurements, which are not repeated")
    parser.add_argument("--measure", help=argparse.SUPPRESS)  # what a child process measures
    return parser


def read_benchmark_recipe(flags: list[str], steps: int) -> Recipe:
    """The recipe of main.py, by default on 2,000 synthetic galaxies, for training steps and nothing else."""
    training_only = ["--report_to", "none", "--disable_tqdm", "True", "--eval_strategy", "no", "--save_strategy", "no"]
    training_only += ["--eval_on_start", "False", "--max_steps", str(steps)]
    return read_recipe(["--dataset", "synthetic:2000", *flags, *training_only])


def open_split(recipe: Recipe) -> tuple[Galaxies, dict[str, np.ndarray]]:
    """A recipe's galaxies, and the sample indices of each split."""
    galaxies = open_galaxies(recipe.galaxies.dataset, recipe.galaxies.image_size)
    return galaxies, split_galaxies(galaxies, recipe.galaxies.split_seed)


def decoder_sizes(config: ViTMAEConfig, layers: int, hidden_size: int) -> dict[str, int]:
    """The fields of a decoder whose heads and MLP are to its hidden size as those of `config`."""
    head = config.decoder_hidden_size // config.decoder_num_attention_heads
    return {
        "decoder_num_hidden_layers": layers,
        "decoder_hidden_size": hidden_size,
        "decoder_num_attention_heads": hidden_size // head,
        "decoder_intermediate_size": hidden_size * config.decoder_intermediate_size // config.decoder_hidden_size,
    }


# ---------------------------------------------------------------------------------------------------------- the timing


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(work: Callable[..., Any], *arguments: Any, device: torch.device | None = None) -> tuple[float, Any]:
    """The seconds that a call takes, with its work on a device, and its result."""
    device = device or torch.device("cpu")
    synchronize(device)
    started = time.perf_counter()
    result = work(*arguments)
    synchronize(device)
    return time.perf_counter() - started, result


def step_throughput(step: Callable[[], None], images: int, steps: int, device: torch.device) -> float:
    """Throughput in images/s of a function that takes one training step on so many images."""

    def take(count: int) -> None:
        for _ in range(count):
            step()

    take(WARM_UP)
    seconds, _ = timed(take, steps, device=device)
    return steps * images / seconds


def model_throughput(trainer: Trainer, steps: int = 5) -> float:
    """Throughput of a Trainer's model and optimizer in images/s, on one batch on the device."""
    model, args, config = trainer.model_wrapped.train(), trainer.args, trainer.model.config
    size, count = config.image_size, args.per_device_train_batch_size
    images = torch.randn(count, config.num_channels, size, size, device=args.device)
    noise = torch.rand(count, num_patches(config), device=args.device)  # as main.py's; without it another graph

    def step() -> None:
        for _ in range(args.gradient_accumulation_steps):
            with trainer.compute_loss_context_manager():
                loss = model(pixel_values=images, noise=noise).loss / args.gradient_accumulation_steps
            loss.backward()
        trainer.optimizer.step()
        model.zero_grad()

    return step_throughput(step, count * args.gradient_accumulation_steps, steps, args.device)


class Timer(TrainerCallback):
    """Times the steps of a training after the warm-up; `seconds` is the result."""

    def __init__(self, warm_up: int = WARM_UP):
        self.warm_up, self.seconds = warm_up, 0.0

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.warm_up:
            synchronize(args.device)
            self.seconds = -time.perf_counter()
        elif state.global_step == state.max_steps:
            synchronize(args.device)
            self.seconds += time.perf_counter()


# ----------------------------------------------------------------------------------------------------- child processes


def run_measurement(
    script: str, measurement: str, repeat: int, options: argparse.Namespace, flags: list[str]
) -> dict[str, float]:
    """Run one measurement in a child process.

    Args:
        script: the benchmark that is called with `--measure` and prints JSON in its last line.
        measurement: the value of `--measure`.
        repeat: distinguishes measurements that are otherwise equal.
        options: of `measurement_parser`. A result in the file `--results` is returned without another measurement.
        flags: those of main.py.

    Raises:
        UserError: the measurement failed; with the last line of its standard error.
    """
    arguments = [*flags, "--steps", str(options.steps), "--measure", measurement]
    key = f"{machine()}; {Path(script).name} {' '.join(arguments)}; repeat {repeat}"
    if options.results and options.results.exists():
        finished = dict(map(json.loads, options.results.read_text().splitlines()))
        if key in finished:
            return finished[key]
    done = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{measurement}: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    measured = json.loads(done.stdout.splitlines()[-1])
    if options.results:
        with options.results.open("a") as file:
            print(json.dumps([key, measured]), file=file)
    return measured


# ---------------------------------------------------------------------------------------------------------- the output


def header(recipe: Recipe, prefix: str = "") -> str:
    """The machine, the commit and the model of a measurement. The prefix stands before the image size."""
    model = recipe.model
    return (
        f"{machine()}; commit {short_commit(session())}; {prefix}{recipe.galaxies.image_size} pixels, "
        f"hidden size {model.hidden_size}, {model.num_hidden_layers} layers"
    )


def precision(bf16: bool) -> str:
    """The name of a precision."""
    return "bfloat16" if bf16 else "float32"


def median_and_range(rates: list[float]) -> str:
    """The median of several measurements, with their extremes."""
    return f"{statistics.median(rates):,.1f} ({min(rates):,.1f} to {max(rates):,.1f})"


def print_table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    """Print a Markdown table after an empty line."""
    print()
    for row in (columns, ("---",) * len(columns), *rows):
        print(f"| {' | '.join(row)} |")

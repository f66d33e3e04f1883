"""Pre-training's images a second, side by side with the stock recipe on the same machine, in one run.

    python benchmarks/pretrain.py                                        recipes/galaxy10.yaml on synthetic galaxies
    python benchmarks/pretrain.py --config recipes/demo.yaml             the small model
    python benchmarks/pretrain.py --workers 4 16 --steps 100             on a GPU with many cores

    stock    the path of transformers' run_mae.py, written from its description: each image is decoded from PNG, cropped
             at random, resized bicubically with PIL, flipped, turned into a tensor and normalised, in DataLoader
             workers with pinned memory and the default prefetching; eager model; in float32, its default, and in the
             precision that main.py chooses
    ours     main.py's path, its Trainer and its choices

and, on the same path, the frozen features and the fine-tuning of the evaluation.

The first two train the same model from the same weights with the same batch through the Hugging Face Trainer. Each
measurement is a process of its own; they alternate, and the table shows the median and the extremes over the repeats,
of the steps after the warm-up. `model alone` is the rate of forward pass, backward pass and optimiser step on one batch
that lies on the device: what a path loses to it is the time outside of the model's own work.
"""

import argparse
import io
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import torch
from PIL import Image
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from galaxy_mae.batches import GalaxyBatches, Rows
from galaxy_mae.classifier import build_classifier, classifier_activation_bytes, random_encoder
from galaxy_mae.errors import UserError, one_line_errors
from galaxy_mae.galaxy10 import split_galaxies
from galaxy_mae.mae import activation_bytes_per_image, build_mae, encoder_config, training_flops_per_image
from galaxy_mae.probe import encode
from galaxy_mae.provenance import machine, session, short_commit
from galaxy_mae.recipe import Recipe, fit_batch, read_evaluation, read_recipe, total_batch_size
from galaxy_mae.sources import GALAXY10_CLASSES, Galaxies, open_galaxies
from galaxy_mae.trainer import FineTuningTrainer, PretrainingTrainer

WARM_UP = 3  # steps before the clock starts: compilation, allocators; and two more a worker, which it has prefetched
STOCK_FILES = 1024  # PNG files that the stock recipe reads in turn


# ----------------------------------------------------------------------------------------------------- the stock recipe


class StockImages(Dataset):
    """PNG files in memory -> cropped, resized, flipped, normalised tensors, one image at a time.

    Longer than the whole measurement: an epoch's end, at which the workers run dry, is none of a long run's costs, and
    while the clock runs they must decode as many images as are trained on.
    """

    def __init__(
        self, galaxies: Galaxies, rows: np.ndarray, length: int, size: int, mean: np.ndarray, deviation: np.ndarray
    ):
        self.length, self.size = length, size
        self.mean, self.deviation = (torch.tensor(x, dtype=torch.float32).view(3, 1, 1) for x in (mean, deviation))
        self.files = []
        for row in rows[: min(STOCK_FILES, length)]:
            file = io.BytesIO()
            Image.fromarray(np.array(galaxies.pixels[row])).save(file, "PNG")
            self.files.append(file.getvalue())

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        image = Image.open(io.BytesIO(self.files[index % len(self.files)])).convert("RGB")
        box = random_box(image.width)
        image = image.resize((self.size, self.size), Image.Resampling.BICUBIC, box=box)
        if torch.rand(()) < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div_(255)
        return {"pixel_values": pixels.sub_(self.mean).div_(self.deviation)}


def random_box(side: int) -> tuple[float, float, float, float]:
    """A random resized crop of an image: 0.2 to 1 of its area, aspect ratio 3/4 to 4/3."""
    area = side**2 * (0.2 + 0.8 * torch.rand(()).item())
    ratio = np.exp((2 * torch.rand(()).item() - 1) * np.log(4 / 3))
    width, height = min(side, (area * ratio) ** 0.5), min(side, (area / ratio) ** 0.5)
    left, upper = torch.rand(()).item() * (side - width), torch.rand(()).item() * (side - height)
    return left, upper, left + width, upper + height


def stack(items: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The stock recipe's collator."""
    return {"pixel_values": torch.stack([item["pixel_values"] for item in items])}


def stock_trainer(
    recipe: Recipe, galaxies: Galaxies, rows: np.ndarray, folder: str, workers: int, bf16: bool
) -> Trainer:
    """The Trainer as run_mae.py sets it up."""
    ours = recipe.training
    mean, deviation = galaxies.channel_statistics(rows)
    size = recipe.galaxies.image_size
    arguments = TrainingArguments(
        folder,
        max_steps=ours.max_steps + 2 * workers,
        per_device_train_batch_size=ours.per_device_train_batch_size,
        gradient_accumulation_steps=ours.gradient_accumulation_steps,
        learning_rate=ours.learning_rate,
        weight_decay=ours.weight_decay,
        bf16=bf16,
        use_cpu=ours.use_cpu,
        dataloader_num_workers=workers,
        dataloader_persistent_workers=workers > 0,
        dataloader_drop_last=True,
        dataloader_pin_memory=torch.cuda.is_available() and not ours.use_cpu,
        remove_unused_columns=False,
        logging_steps=10,
        save_strategy="no",
        disable_tqdm=True,
    )
    length = (arguments.max_steps + 2 * workers + 2) * total_batch_size(ours)  # two batches a worker are prefetched
    dataset = StockImages(galaxies, rows, length, size, mean, deviation)
    return Trainer(build_mae(recipe.model.config(size), 0), arguments, train_dataset=dataset, data_collator=stack)


# ------------------------------------------------------------------------------------------------------------ main.py's


def our_trainer(recipe: Recipe, galaxies: Galaxies, rows: np.ndarray) -> Trainer:
    """The Trainer as main.py sets it up."""
    model = build_mae(recipe.model.config(recipe.galaxies.image_size), 0)
    return PretrainingTrainer(model, recipe.training, train_dataset=Rows(rows), batches=our_batches(recipe, galaxies))


def our_batches(recipe: Recipe, galaxies: Galaxies) -> GalaxyBatches:
    """What main.py makes its images with."""
    rows = split_galaxies(galaxies, recipe.galaxies.split_seed)["train"]
    mean, deviation = galaxies.channel_statistics(rows)
    training = recipe.training
    return GalaxyBatches(galaxies.pixels, mean, deviation, recipe.galaxies.image_size, training.device, training.seed)


def fine_tuning_trainer(recipe: Recipe, galaxies: Galaxies, rows: np.ndarray, folder: str) -> Trainer:
    """The Trainer as the evaluation sets it up, for the recipe's encoder, batch and number of steps."""
    ours = recipe.training
    flags = ["--encoder", "none", "--output_dir", folder, "--report_to", "none", "--disable_tqdm", "True"]
    flags += ["--batch_size", str(total_batch_size(ours)), "--bf16", str(ours.bf16), "--use_cpu", str(ours.use_cpu)]
    arguments = read_evaluation(flags).training
    config = encoder_config(recipe.model.config(recipe.galaxies.image_size))
    fit_batch(arguments, set(), classifier_activation_bytes(config))
    arguments.max_steps, arguments.load_best_model_at_end = ours.max_steps, False
    arguments.eval_strategy, arguments.save_strategy = IntervalStrategy.NO, SaveStrategy.NO
    return FineTuningTrainer(
        build_classifier(random_encoder(config, 0), GALAXY10_CLASSES, 0),
        arguments,
        train_dataset=Rows(rows),
        batches=our_batches(recipe, galaxies),
        label=galaxies.label,
        layer_decay=arguments.layer_decay,
        label_smoothing=arguments.label_smoothing,
        mixup=arguments.mixup,
    )


# ---------------------------------------------------------------------------------------------------- one measurement


class Clock(TrainerCallback):
    """Times the steps after the warm-up."""

    def __init__(self, device: torch.device, workers: int):
        self.device, self.warm_up = device, WARM_UP + 2 * workers
        self.started, self.seconds, self.workers_memory = 0.0, 0.0, 0

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step in (self.warm_up, state.max_steps):
            synchronise(self.device)
        if state.global_step == self.warm_up:
            self.started = time.perf_counter()
        elif state.global_step == state.max_steps:
            self.seconds = time.perf_counter() - self.started
            if self.device.type != "cuda":  # whose column is the GPU's
                workers = psutil.Process().children(recursive=True)
                self.workers_memory = sum(worker.memory_full_info().uss for worker in workers)


def synchronise(device: torch.device) -> None:
    """Wait for the device's work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(recipe: Recipe, variant: str, workers: int, bf16: bool) -> dict[str, float]:
    """Images a second of one variant, peak memory in GB and, where it pre-trains, the rate of the model alone."""
    galaxies = open_galaxies(recipe.galaxies.dataset, recipe.galaxies.image_size)
    rows = split_galaxies(galaxies, recipe.galaxies.split_seed)["train"]
    device = recipe.training.device
    with tempfile.TemporaryDirectory() as folder:
        recipe.training.output_dir = folder
        if variant == "features":
            rate = rate_of_features(recipe, galaxies, rows)
            return {"images_per_second": rate, "gigabytes": peak_memory(device) / 1e9}
        if variant == "stock":
            trainer = stock_trainer(recipe, galaxies, rows, folder, workers, bf16)
        elif variant == "fine-tuning":
            trainer = fine_tuning_trainer(recipe, galaxies, rows, folder)
        else:
            trainer = our_trainer(recipe, galaxies, rows)
        clock = Clock(device, workers)
        trainer.add_callback(clock)
        trainer.train()
        steps = recipe.training.max_steps - WARM_UP
        rate = steps * total_batch_size(recipe.training) / clock.seconds
        measured = {"images_per_second": rate, "gigabytes": (peak_memory(device) + clock.workers_memory) / 1e9}
        if variant != "fine-tuning":
            measured["model"] = rate_of_model(trainer, recipe)
            measured["flops"] = rate * training_flops_per_image(recipe.model.config(recipe.galaxies.image_size))
        return measured


def rate_of_features(recipe: Recipe, galaxies: Galaxies, rows: np.ndarray) -> float:
    """Images a second through the frozen encoder, as many as the trainings take."""
    encoder = random_encoder(encoder_config(recipe.model.config(recipe.galaxies.image_size)), 0)
    batches, bf16 = our_batches(recipe, galaxies), recipe.training.bf16
    steps = recipe.training.max_steps - WARM_UP
    taken = np.resize(rows, steps * total_batch_size(recipe.training))
    for _ in encode(encoder, batches, taken[: total_batch_size(recipe.training)], bf16):
        pass  # warm up
    synchronise(batches.device)
    started = time.perf_counter()
    for _ in encode(encoder, batches, taken, bf16):
        pass
    synchronise(batches.device)
    return len(taken) / (time.perf_counter() - started)


def rate_of_model(trainer: Trainer, recipe: Recipe, steps: int = 5) -> float:
    """Images a second of forward, backward and optimiser step on one batch on the device, no Trainer around them."""
    model, device, each = trainer.model_wrapped, trainer.args.device, trainer.args.per_device_train_batch_size
    size, pieces = recipe.galaxies.image_size, trainer.args.gradient_accumulation_steps
    images = torch.randn(each, 3, size, size, device=device)
    model.train()
    for step in range(steps + 2):
        if step == 2:
            synchronise(device)
            started = time.perf_counter()
        for _ in range(pieces):
            with trainer.compute_loss_context_manager():
                loss = model(pixel_values=images).loss / pieces
            loss.backward()
        trainer.optimizer.step()
        model.zero_grad()
    synchronise(device)
    return steps * each * pieces / (time.perf_counter() - started)


def peak_memory(device: torch.device) -> int:
    """Bytes: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def matmul_rate(device: torch.device, bf16: bool, seconds: float = 2.0) -> float:
    """FLOP/s of a large matrix product, the hardware's limit."""
    size = 8192 if device.type == "cuda" else 2048
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16 if bf16 else torch.float32)
    a @ a
    synchronise(device)
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        a @ a
        synchronise(device)
        count += 1
    return count * 2 * size**3 / (time.perf_counter() - started)


# ------------------------------------------------------------------------------------------------------- the whole run


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="Other flags are main.py's.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--steps", type=int, default=20, help="timed steps of a measurement")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workers", type=int, nargs="+", default=None, help="of the stock recipe; default: all cores")
    parser.add_argument("--results", type=Path, help="a file that keeps what was measured: called again, it goes on")
    parser.add_argument("--measure", help=argparse.SUPPRESS)  # a child: a variant as JSON
    options, flags = parser.parse_known_args(arguments)
    recipe = read_benchmark(flags, WARM_UP + options.steps)
    if options.measure:
        print(json.dumps(measure(recipe, **json.loads(options.measure))))
        return
    precision = recipe.training.bf16
    workers = options.workers or [len(os.sched_getaffinity(0))]
    variants = [{"variant": "stock", "workers": w, "bf16": b} for w in workers for b in sorted({False, precision})]
    variants += [{"variant": name, "workers": 0, "bf16": precision} for name in ("ours", "features", "fine-tuning")]
    results: list[list[dict]] = [[] for _ in variants]
    for repeat in range(options.repeats):
        for variant, measured in zip(variants, results, strict=True):
            command = [sys.executable, __file__, *arguments, "--measure", json.dumps(variant)]
            measured.append(in_a_process(command, f"{variant}, repeat {repeat}", options.results))
    peaks = {bf16: matmul_rate(recipe.training.device, bf16) for bf16 in {v["bf16"] for v in variants}}
    print_table(recipe, variants, results, peaks)


def read_benchmark(flags: list[str], steps: int) -> Recipe:
    """main.py's recipe, on synthetic galaxies where no data set is given, for so many steps and nothing else."""
    if not any(flag.split("=")[0] == "--dataset" for flag in flags):
        flags = [*flags, "--dataset", "synthetic:2000"]
    quiet = ["--report_to", "none", "--disable_tqdm", "True", "--eval_strategy", "no", "--save_strategy", "no"]
    recipe = read_recipe([*flags, *quiet, "--max_steps", str(steps)])
    config = recipe.model.config(recipe.galaxies.image_size)
    fit_batch(recipe.training, recipe.given, activation_bytes_per_image(config))
    return recipe


def in_a_process(command: list[str], name: str, kept: Path | None) -> dict[str, float]:
    """The JSON that a command prints, in a process of its own.

    Args:
        command: what to run.
        name: of the measurement.
        kept: a file to look it up in, and to keep it in, by machine, command and name.
    """
    name = f"{machine()}; {' '.join(map(str, command[2:]))}; {name}"
    before = dict(map(json.loads, kept.read_text().splitlines())) if kept and kept.exists() else {}
    if name in before:
        return before[name]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{name}: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    measured = json.loads(done.stdout.strip().splitlines()[-1])
    if kept:
        with kept.open("a") as file:
            print(json.dumps([name, measured]), file=file)
    return measured


def print_table(recipe: Recipe, variants: list[dict], results: list[list[dict]], peaks: dict[bool, float]) -> None:
    """One row a variant: the median over repeats and the extremes."""
    model, training = recipe.model, recipe.training
    print(
        f"{machine()}; commit {short_commit(session())}; {recipe.galaxies.dataset}, {recipe.galaxies.image_size} "
        f"pixels, {model.hidden_size} wide, {model.num_hidden_layers} layers; batch {total_batch_size(training)} in "
        f"pieces of {training.per_device_train_batch_size}; {training.max_steps - WARM_UP} steps after {WARM_UP}, "
        f"{len(results[0])} repeats in turn"
    )
    rates = [statistics.median(each["images_per_second"] for each in measured) for measured in results]
    ours = next(rate for variant, rate in zip(variants, rates, strict=True) if variant["variant"] == "ours")
    print("| path | images/s (least to most) | ours / it | model alone | lost | memory, GB | share of matmul peak |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for variant, measured, rate in zip(variants, results, rates, strict=True):
        each = [m["images_per_second"] for m in measured]
        name = f"{variant['variant']}, {'bfloat16' if variant['bf16'] else 'float32'}"
        name += f", {variant['workers']} workers" if variant["variant"] == "stock" else ""
        memory = max(m["gigabytes"] for m in measured)
        ratio = alone = lost = share = ""
        if "model" in measured[0]:  # it pre-trains
            median = statistics.median(m["model"] for m in measured)
            ratio, alone, lost = f"{ours / rate:.2f}", f"{median:,.1f}", f"{1 - rate / median:.0%}"
            share = f"{statistics.median(m['flops'] for m in measured) / peaks[variant['bf16']]:.0%}"
        row = (name, f"{rate:,.1f} ({min(each):,.1f} to {max(each):,.1f})", ratio, alone, lost, f"{memory:.2f}", share)
        print(f"| {' | '.join(row)} |")
    for bf16, peak in sorted(peaks.items()):
        print(f"matrix products in {'bfloat16' if bf16 else 'float32'}: {peak / 1e12:.2f} TFLOP/s")


if __name__ == "__main__":
    with one_line_errors(sys.argv[0]):
        main(sys.argv[1:])

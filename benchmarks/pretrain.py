"""Throughput of pre-training, compared with the baseline (run_mae.py) on the same machine.

    python benchmarks/pretrain.py                                        recipes/galaxy10.yaml on synthetic galaxies
    python benchmarks/pretrain.py --config recipes/demo.yaml             the small model
    python benchmarks/pretrain.py --workers 4 16 --steps 100             on a GPU with many cores

The baseline follows the path of transformers' run_mae.py, written from its description: each image is decoded from PNG,
cropped at random, resized bicubically with PIL, flipped, converted to a tensor and normalized, in DataLoader workers
with pinned memory and the default prefetching. Its model is not compiled. It is measured in float32, its default, and
in the precision that main.py chooses. Model, initial weights, batch size and the Hugging Face Trainer are the same as
in main.py. Feature extraction and fine-tuning, as in the evaluation, are measured as well.

Each measurement is a process of its own and times the steps after the warm-up. Measurements alternate; the table shows
the median and the extremes over the repeats. "model only" is the throughput of the forward pass, backward pass and
optimizer step on one batch that is already on the device; the overhead is how far the throughput of a path is below it.
"""

import io
import json
import os
import resource
import sys
import tempfile
from argparse import Namespace
from pathlib import Path
from statistics import median

import numpy as np
import psutil
import torch
from measurement import (
    WARM_UP,
    Timer,
    header,
    measurement_parser,
    median_and_range,
    model_throughput,
    open_split,
    precision,
    print_table,
    read_benchmark_recipe,
    run_measurement,
    timed,
)
from PIL import Image
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from galaxy_mae.data.cache import Galaxies, channel_statistics
from galaxy_mae.data.pretraining import PretrainingData
from galaxy_mae.errors import one_line_errors
from galaxy_mae.evaluation.features import encode
from galaxy_mae.evaluation.fine_tuning import FineTuningTrainer, build_fine_tuning_trainer
from galaxy_mae.evaluation.preparation import Evaluation, prepare_evaluations
from galaxy_mae.model.compute import measure_matmul_rate
from galaxy_mae.model.mae import build_mae, measure_mae, save_encoder
from galaxy_mae.training.pretraining import build_trainer
from galaxy_mae.training.recipe import Recipe, global_batch_size, read_evaluation_recipe

BASELINE, MAIN, FEATURES, FINE_TUNING = "baseline (run_mae.py)", "main.py", "feature extraction", "fine-tuning"
NUM_FILES = 1024  # PNG files that the baseline reads in turn
COLUMNS = (
    *("path", "throughput, images/s (min-max)", "speedup of main.py", "model only, images/s", "overhead"),
    *("peak memory, GB", "MFU"),
)


# -------------------------------------------------------------------------------------------------------- the baseline


class PNGDataset(Dataset):
    """PNG files in memory, returned one by one as cropped, resized, flipped and normalized tensors.

    It is longer than the measurement. At the end of an epoch the workers have nothing to prefetch, which hardly matters
    in a long run and would dominate a short one. While the timer runs, they must decode as many images as are trained.
    """

    def __init__(
        self, galaxies: Galaxies, indices: np.ndarray, length: int, size: int, mean: np.ndarray, std: np.ndarray
    ):
        self.length, self.size = length, size
        self.mean, self.std = (torch.tensor(x, dtype=torch.float32).view(3, 1, 1) for x in (mean, std))
        self.files = []
        for index in indices[: min(NUM_FILES, length)]:
            file = io.BytesIO()
            Image.fromarray(np.array(galaxies.pixels[index])).save(file, "PNG")
            self.files.append(file.getvalue())

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, item: int) -> dict[str, torch.Tensor]:
        image = Image.open(io.BytesIO(self.files[item % len(self.files)])).convert("RGB")
        box = random_crop(image.width)
        image = image.resize((self.size, self.size), Image.Resampling.BICUBIC, box=box)
        if torch.rand(()) < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div_(255)
        return {"pixel_values": pixels.sub_(self.mean).div_(self.std)}


def random_crop(side: int) -> tuple[float, float, float, float]:
    """The box of a random resized crop of a square image: 0.2 to 1 of its area, aspect ratio 3/4 to 4/3."""
    area = side**2 * (0.2 + 0.8 * torch.rand(()).item())
    ratio = np.exp((2 * torch.rand(()).item() - 1) * np.log(4 / 3))
    width, height = min(side, (area * ratio) ** 0.5), min(side, (area / ratio) ** 0.5)
    left, upper = torch.rand(()).item() * (side - width), torch.rand(()).item() * (side - height)
    return left, upper, left + width, upper + height


def collate(items: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The collator of run_mae.py."""
    return {"pixel_values": torch.stack([item["pixel_values"] for item in items])}


def build_baseline_trainer(recipe: Recipe, workers: int, bf16: bool) -> Trainer:
    """The Trainer as in run_mae.py, for two more steps per worker: their prefetched batches belong to the warm-up."""
    training = recipe.training
    galaxies, split = open_split(recipe)
    mean, std = channel_statistics([(galaxies, split["train"])])
    arguments = TrainingArguments(
        training.output_dir,
        max_steps=training.max_steps + 2 * workers,
        per_device_train_batch_size=training.per_device_train_batch_size,
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        learning_rate=training.learning_rate,
        weight_decay=training.weight_decay,
        bf16=bf16,
        use_cpu=training.use_cpu,
        dataloader_num_workers=workers,
        dataloader_persistent_workers=workers > 0,
        dataloader_drop_last=True,
        dataloader_pin_memory=training.device.type == "cuda",
        remove_unused_columns=False,
        logging_steps=10,
        save_strategy="no",
        disable_tqdm=True,
    )
    length = (arguments.max_steps + 2 * workers + 2) * global_batch_size(training)
    dataset = PNGDataset(galaxies, split["train"], length, recipe.galaxies.image_size, mean, std)
    model = build_mae(recipe.model_config, training.seed)
    return Trainer(model, arguments, train_dataset=dataset, data_collator=collate)


# ------------------------------------------------------------------------------------------------------ the evaluation


def prepare_random_encoder(recipe: Recipe) -> Evaluation:
    """The evaluation of an untrained encoder, with the recipe's sizes, galaxies, batch size and precision."""
    training, folder = recipe.training, Path(recipe.training.output_dir)
    galaxies, split = open_split(recipe)
    mean, std = channel_statistics([(galaxies, split["train"])])
    save_encoder(build_mae(recipe.model_config), folder / "encoder", mean, std, galaxies.class_names)
    values = {
        "encoder": folder,
        "dataset": recipe.galaxies.dataset,
        "split_seed": recipe.galaxies.split_seed,
        "output_dir": folder / "results",
        "batch_size": global_batch_size(training),
        "bf16": training.bf16,
        "use_cpu": training.use_cpu,
        "report_to": "none",
        "disable_tqdm": True,
    }
    return prepare_evaluations(read_evaluation_recipe([f"--{name}={value}" for name, value in values.items()]))[0]


def feature_throughput(recipe: Recipe, count: int) -> float:
    """Throughput of feature extraction from so many images, in images/s."""
    evaluation = prepare_random_encoder(recipe)
    indices = np.resize(evaluation.split["train"], count)

    def encode_images(indices: np.ndarray) -> None:
        for _ in encode(evaluation.encoder.model, evaluation.batches, indices, evaluation.recipe.training.bf16):
            pass

    encode_images(indices[:512])  # warm-up
    seconds, _ = timed(encode_images, indices, device=evaluation.batches.device)
    return count / seconds


def random_encoder_fine_tuning(recipe: Recipe) -> FineTuningTrainer:
    """The Trainer of the evaluation's fine-tuning, for the recipe's number of steps and nothing else."""
    evaluation = prepare_random_encoder(recipe)
    arguments, encoder = evaluation.recipe.training, evaluation.encoder.model
    arguments.max_steps, arguments.load_best_model_at_end = recipe.training.max_steps, False
    arguments.eval_strategy = arguments.save_strategy = "no"
    folder = Path(arguments.output_dir)
    return build_fine_tuning_trainer(
        encoder, evaluation.batches, evaluation.labelled, arguments, folder, "benchmark", seed=0
    )


# ---------------------------------------------------------------------------------------------------- one measurement


def measure(recipe: Recipe, path: str, workers: int, bf16: bool) -> dict[str, float]:
    """Measure one path in this process.

    Returns:
        `images_per_second` and the peak memory in `gigabytes`; for pre-training also the throughput `model_only` and
        `flops_per_image`.
    """
    training = recipe.training
    num_images = (training.max_steps - WARM_UP) * global_batch_size(training)
    with tempfile.TemporaryDirectory() as training.output_dir:
        if path == FEATURES:
            rate = feature_throughput(recipe, num_images)
            return {"images_per_second": rate, "gigabytes": peak_memory(training.device) / 1e9}
        if path == FINE_TUNING:
            trainer = random_encoder_fine_tuning(recipe)
        elif path == BASELINE:
            trainer = build_baseline_trainer(recipe, workers, bf16)
        else:
            galaxies, split = open_split(recipe)
            trainer = build_trainer(recipe, PretrainingData(galaxies, split, galaxies), {"id": "benchmark"}, False)
        timer = TimerAndMemory(WARM_UP + 2 * workers)
        trainer.add_callback(timer)
        trainer.train()
        measured = {"images_per_second": num_images / timer.seconds, "gigabytes": timer.peak_memory / 1e9}
        if path != FINE_TUNING:
            measured["model_only"] = model_throughput(trainer)
            measured["flops_per_image"] = measure_mae(recipe.model_config)[0]
        return measured


class TimerAndMemory(Timer):
    """A timer that also takes the peak memory in bytes, on a CPU with that of the DataLoader workers."""

    def on_step_end(self, args, state, control, **kwargs):
        super().on_step_end(args, state, control, **kwargs)
        if state.global_step == state.max_steps:
            self.peak_memory = peak_memory(args.device)
            if args.device.type != "cuda":
                workers = psutil.Process().children(recursive=True)
                self.peak_memory += sum(worker.memory_full_info().uss for worker in workers)


def peak_memory(device: torch.device) -> int:
    """Bytes of the GPU's memory, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


# --------------------------------------------------------------------------------------------------- all measurements


def main(arguments: list[str]) -> None:
    parser = measurement_parser(__doc__, steps=20)
    parser.add_argument("--repeats", type=int, default=3, help="of each measurement")
    parser.add_argument("--workers", type=int, nargs="+", help="of the baseline; default: one per core")
    options, flags = parser.parse_known_args(arguments)
    recipe = read_benchmark_recipe(flags, WARM_UP + options.steps)
    if options.measure:
        print(json.dumps(measure(recipe, **json.loads(options.measure))))
        return
    bf16, device = recipe.training.bf16, recipe.training.device
    workers = options.workers or [len(os.sched_getaffinity(0))]
    paths = [{"path": BASELINE, "workers": w, "bf16": b} for w in workers for b in sorted({False, bf16})]
    paths += [{"path": path, "workers": 0, "bf16": bf16} for path in (MAIN, FEATURES, FINE_TUNING)]
    results: list[list[dict]] = [[] for _ in paths]
    for repeat in range(options.repeats):
        for path, measured in zip(paths, results, strict=True):
            measured.append(run_measurement(__file__, json.dumps(path), repeat, options, flags))
    matmul_rates = {b: measure_matmul_rate(device, getattr(torch, precision(b))) for b in sorted({False, bf16})}
    print_report(recipe, options, paths, results, matmul_rates)


def print_report(
    recipe: Recipe, options: Namespace, paths: list[dict], results: list[list[dict]], matmul_rates: dict[bool, float]
) -> None:
    """Print one row per path, with the median over its repeats and the extremes."""
    training = recipe.training
    print(
        f"{header(recipe, f'{recipe.galaxies.dataset}, ')}; global batch size {global_batch_size(training)}, "
        f"micro-batch size {training.per_device_train_batch_size}; {options.steps} steps after {WARM_UP} warm-up "
        f"steps, {options.repeats} repeats"
    )
    rates = [[repeat["images_per_second"] for repeat in measured] for measured in results]
    main_rate = next(median(each) for path, each in zip(paths, rates, strict=True) if path["path"] == MAIN)
    rows = []
    for path, measured, each in zip(paths, results, rates, strict=True):
        rate = median(each)
        name = f"{path['path']}, {precision(path['bf16'])}"
        if path["path"] == BASELINE:
            name += f", {path['workers']} workers"
        speedup = model_only = overhead = mfu = ""
        if "model_only" in measured[0]:  # it is a pre-training
            model_rate = median(repeat["model_only"] for repeat in measured)
            speedup, model_only = f"{main_rate / rate:.2f}", f"{model_rate:,.1f}"
            overhead = f"{1 - rate / model_rate:.0%}"
            mfu = f"{rate * measured[0]['flops_per_image'] / matmul_rates[path['bf16']]:.0%}"
        memory = f"{max(repeat['gigabytes'] for repeat in measured):.2f}"
        rows.append((name, median_and_range(each), speedup, model_only, overhead, memory, mfu))
    print_table(COLUMNS, rows)
    print()
    for bf16, rate in matmul_rates.items():
        print(f"Matmul rate in {precision(bf16)}: {rate / 1e12:.2f} TFLOP/s.")


if __name__ == "__main__":
    with one_line_errors(sys.argv[0]):
        main(sys.argv[1:])

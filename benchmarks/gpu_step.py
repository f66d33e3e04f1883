"""Where the time of a pre-training step goes: one process, eight minutes on a GPU, no data set.

    python benchmarks/gpu_step.py step.jsonl                                   recipes/galaxy10.yaml; 75: out of time
    python benchmarks/gpu_step.py step.jsonl --seconds 900                     the same command resumes
    python benchmarks/gpu_step.py step.jsonl --config recipes/demo.yaml        on a CPU: the stages that need no GPU

Images are random uint8 values, made on the device. Every result is a line of JSON that is on the disk before the next
stage begins. A stage begins only if its budget of seconds is left, and is skipped if the file has its result from the
same commit, device, versions and flags. A stage that fails is reported as a result and does not end the others.

The trainings are cumulative: "as before" is transformers' model with torch's own choice of attention and the warp of
PyTorch's operators; "+ host" does not wait for copies and compiles crops and masks; "+ warp" is one kernel; "+ model"
selects the attention and returns the loss alone; "+ q, k, v" computes these in one product. All that follow include
these. Their times are those of the Trainer's steps after the warm-up; kernels, synchronizations and the
fraction of the time without any kernel are those of five more steps under the profiler.
"""

import gc
import json
import os
import re
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import psutil
import torch
import transformers
from measurement import (
    WARM_UP,
    argument_parser,
    decoder_sizes,
    header,
    model_throughput,
    print_table,
    read_benchmark_recipe,
    synchronize,
    timed,
)
from torch.autograd import DeviceType
from torch.nn.attention import SDPBackend
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback, ViTMAEConfig

from galaxy_mae.data.batches import GalaxyBatches, IndexDataset, random_transforms, select_fused_warp, warp
from galaxy_mae.data.random_numbers import compiled, mask_noise
from galaxy_mae.errors import one_line_errors
from galaxy_mae.model.attention import fuse_qkv
from galaxy_mae.model.compute import measure_matmul_rate, num_patches, time_attention
from galaxy_mae.model.mae import attention_layers, build_mae, encoder_of
from galaxy_mae.training.pretraining import PretrainingTrainer
from galaxy_mae.training.recipe import Recipe, global_batch_size

PROFILED = 5  # steps
OUT_OF_TIME = 75
# Kernels by their names, the first that matches; operators on a CPU.
KERNELS = {
    "attention": r"flash|fmha|sdpa|attention",
    "matrix products": r"gemm|nvjet|cutlass|xmma|splitk|conv|::mm$|::addmm$|::bmm$",
    "AdamW": r"adam|multi_tensor",
    "crops, masks and warp": r"grid_sampler|affine_grid|warp_kernel|_fused_warp",
    "fused elementwise and reductions": r"triton",
    "copies": r"memcpy|memset|copy_|index|gather",
    "other": r"",
}


class Stage(NamedTuple):
    name: str
    budget: int  # seconds
    measure: Callable[[Recipe], dict[str, Any]]
    needs_cuda: bool = False


class Choices(NamedTuple):
    """How a training differs from one as before; `decoder` changes fields of the model's configuration."""

    host: bool = False
    warp: bool = False
    model: bool = False
    qkv: bool = False
    decoder: Callable[[ViTMAEConfig], dict[str, int]] = lambda config: {}
    mode: str = "default"
    regional: bool = False


def main(arguments: list[str], started: float | None = None) -> int:
    """Measure what the file lacks, print all of it, and return the exit status. `started`: of the process, in s."""
    started = started or time.time()
    parser = argument_parser(__doc__)
    parser.add_argument("results", type=Path, help="file of results, one line of JSON each")
    parser.add_argument("--seconds", type=float, default=480, help="since the start of the process")
    parser.add_argument("--steps", type=int, default=60, help="timed steps of a training")
    options, flags = parser.parse_known_args(arguments)
    recipe = read_benchmark_recipe(flags, WARM_UP + options.steps + PROFILED)
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(options.results.resolve().with_suffix(".inductor")))
    key = f"{header(recipe)}; torch {torch.__version__}; {options.steps} steps; {' '.join(flags)}"
    lines = options.results.read_text().splitlines() if options.results.exists() else []
    results = {entry["stage"]: entry for entry in map(json.loads, lines) if entry["key"] == key}
    late = False
    for stage in STAGES:
        if stage.name in results:
            continue
        left = options.seconds - (time.time() - started)
        if stage.needs_cuda and recipe.training.device.type != "cuda":
            result = {"skipped": "needs CUDA"}
        elif left < stage.budget:
            print(f"{stage.name}: out of time, needs {stage.budget} s, {max(left, 0):.0f} s left", flush=True)
            late = True
            continue
        else:
            print(f"{stage.name}: {left:.0f} s left", flush=True)
            result = run_stage(stage, recipe)
        results[stage.name] = {"key": key, "stage": stage.name, **result}
        with options.results.open("a") as file:
            print(json.dumps(results[stage.name]), file=file, flush=True)
            os.fsync(file.fileno())
    print_report(recipe, options, results)
    return OUT_OF_TIME if late else 0


def run_stage(stage: Stage, recipe: Recipe) -> dict[str, Any]:
    """What a stage measures, and how long it took; of one that fails, the reason."""
    if recipe.training.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    try:
        result = stage.measure(recipe)
    except Exception as error:  # anything: the other stages have their turn
        result = {"failed": f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"}
    gc.collect()
    torch.cuda.empty_cache()
    return {**result, "stage_seconds": round(time.perf_counter() - started, 1)}


# ----------------------------------------------------------------------------------------------------- the small stages


def measure_rates(recipe: Recipe) -> dict[str, Any]:
    """Versions, and the rates of matrix products and of a copy within the device's memory."""
    device = recipe.training.device
    size = 2**31 if device.type == "cuda" else 2**26
    source, target = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    return {
        "transformers": transformers.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "matmul_tflops": measure_matmul_rate(device, dtype_of(recipe)) / 1e12,
        "copy_tb_per_s": 2 * size / milliseconds(lambda: target.copy_(source), device) / 1e9,
    }


def measure_attention(recipe: Recipe) -> dict[str, Any]:
    """Milliseconds of a layer's attention, forward and backward, by shape and backend; with half the heads as well."""
    config, size = recipe.model_config, recipe.training.per_device_train_batch_size
    shapes = dict.fromkeys(attention_layers(config, size))
    halved = ViTMAEConfig(**config.to_dict() | half_the_heads(config))
    shapes |= dict.fromkeys(attention_layers(halved, size))
    result = {}
    for shape in shapes:
        for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
            try:
                seconds = time_attention(backend, shape, recipe.training.device, dtype_of(recipe))
                result[f"{shape} {backend.name}"] = 1e3 * seconds
            except RuntimeError as error:
                result[f"{shape} {backend.name}"] = str(error).splitlines()[0]
    return result


def measure_data_path(recipe: Recipe) -> dict[str, Any]:
    """Milliseconds of a batch's way from sample indices to images and masks, by parts."""
    batches, device = synthetic_batches(recipe), recipe.training.device
    size, patches = batches.image_size, num_patches(recipe.model_config)
    index = torch.arange(recipe.training.per_device_train_batch_size, device=device)
    pixels = torch.as_tensor(batches.pixels)
    images, transforms = pixels[index], random_transforms(index, seed=0, step=7, min_crop_scale=0.2)
    warped = warp(images, transforms, size)
    normalize = partial(GalaxyBatches._normalize, batches)
    parts = {
        "gather": lambda: pixels[index],
        "crops": lambda: random_transforms(index, seed=0, step=7, min_crop_scale=0.2),
        "masks": lambda: mask_noise(index, patches, seed=0, step=7),
        "warp": lambda: warp(images, transforms, size),
        "normalize": lambda: normalize(warped),
    }
    difference = {}
    if device.type == "cuda":
        parts["crops, compiled"] = lambda: compiled(random_transforms)(index, seed=0, step=7, min_crop_scale=0.2)
        parts["masks, compiled"] = lambda: compiled(mask_noise)(index, patches, seed=0, step=7)
        if fused_warp := select_fused_warp(device, images.shape[1], size):
            arguments = (pixels, index, transforms, batches.mean, batches.std, size)
            parts["gather, warp and normalize as one kernel"] = lambda: fused_warp(*arguments)
            error = (fused_warp(*arguments) - normalize(warp(images, transforms, size))).abs().max()
            difference = {"largest_difference_of_the_kernel": float(error)}
    return {name: milliseconds(part, device) for name, part in parts.items()} | difference


def measure_probe(recipe: Recipe) -> dict[str, Any]:
    """Seconds of the online probe's parts for 2,000 galaxies, with one BLAS thread and, on CUDA, with one per core."""
    from threadpoolctl import threadpool_limits

    from galaxy_mae.evaluation.features import encode
    from galaxy_mae.evaluation.probes import FeaturesAndLabels, knn_classifier, linear_probe

    batches, rng = synthetic_batches(recipe), np.random.default_rng(0)
    encoder = encoder_of(build_mae(recipe.model_config)).to(recipe.training.device)
    indices = np.resize(np.arange(batches.num_images), 2000)
    work = partial(encode, encoder, batches, indices, recipe.training.bf16)
    result = {"encode": timed(lambda: [None for _ in work()], device=recipe.training.device)[0]}
    label = rng.integers(0, 10, 2500)
    features = rng.normal(label[:, None] / 10, size=(2500, recipe.model.hidden_size)).astype(np.float32)
    train, validation = (
        FeaturesAndLabels(features[p].astype(np.float32), label[p]) for p in np.split(range(2500), [2000])
    )
    for threads in (1, os.cpu_count())[: 1 + (recipe.training.device.type == "cuda")]:  # minutes where cores are busy
        with threadpool_limits(limits=threads):
            fit, neighbors = (getattr(function, "__wrapped__", function) for function in (linear_probe, knn_classifier))
            result[f"linear probe, {threads} threads"] = timed(fit, train, validation)[0]
            result[f"k-NN, {threads} threads"] = timed(
                lambda neighbors=neighbors: neighbors(train).probabilities(validation.features)
            )[0]
    return result


def milliseconds(work: Callable[[], Any], device: torch.device, repeats: int = 10) -> float:
    """Milliseconds of a call, the mean of ten after two."""
    for _ in range(2):
        work()
    return 1e3 * timed(lambda: [None for _ in range(repeats) if work() is None], device=device)[0] / repeats


def dtype_of(recipe: Recipe) -> torch.dtype:
    """The precision of a recipe's products."""
    return torch.bfloat16 if recipe.training.bf16 else torch.float32


def synthetic_batches(recipe: Recipe) -> GalaxyBatches:
    """Batches of random pixels that are on the device."""
    size, device = recipe.galaxies.image_size, recipe.training.device
    batches = GalaxyBatches(np.zeros((1, size, size, 3), np.uint8), np.full(3, 0.5), np.full(3, 0.3), size, device)
    batches.num_images = 16 * global_batch_size(recipe.training)
    pixels = torch.randint(0, 256, (batches.num_images, size, size, 3), dtype=torch.uint8, device=device)
    batches.pixels = pixels if device.type == "cuda" else pixels.numpy()
    return batches


# -------------------------------------------------------------------------------------------------------- the trainings


class StepProfiler(TrainerCallback):
    """Takes the time of the first step, of those after the warm-up, and profiles the last ones."""

    def __init__(self, cuda: bool):
        self.profiler = profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda)
        self.times: dict[int, float] = {}

    def on_train_begin(self, args, state, control, **kwargs):
        self.times[0] = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        step = state.global_step
        if step in (1, WARM_UP, state.max_steps - PROFILED, state.max_steps):
            synchronize(args.device)
            self.times[step] = time.perf_counter()
        if step == state.max_steps - PROFILED:
            self.profiler.start()
            self.profile_started = time.perf_counter()
        elif step == state.max_steps:
            self.profiler.stop()


def train(recipe: Recipe, choices: Choices) -> dict[str, Any]:
    """Train for a few steps and return throughputs in images/s, times, memory and the profile."""
    training, config = recipe.training, recipe.model_config
    config = ViTMAEConfig(**config.to_dict() | choices.decoder(config))
    training.accelerator_config = {"non_blocking": choices.host and training.device.type == "cuda"}
    if training.torch_compile:  # a mode switches it on
        training.torch_compile_mode = choices.mode
    batches, profiler = synthetic_batches(recipe), StepProfiler(training.device.type == "cuda")
    dataset = IndexDataset(np.arange(batches.num_images))
    old_warp = patch("galaxy_mae.data.batches.select_fused_warp", lambda *args: None)
    regional = {"ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION": str(choices.regional).lower()}
    torch._dynamo.reset()  # it would not see another attention, and compiles nothing after eight variants
    with (
        tempfile.TemporaryDirectory() as training.output_dir,
        nullcontext() if choices.warp else old_warp,
        patch.dict(os.environ, regional),
    ):
        model = build_mae(config)
        trainer = PretrainingTrainer(model, training, train_dataset=dataset, batches=batches, run_id="benchmark")
        fuse_qkv(model, choices.qkv)
        if not choices.model:
            del model.forward
            trainer.attention_order = []
        batches.compiled = choices.host and training.torch_compile
        trainer.add_callback(profiler)
        trainer.train()
        gigabytes = torch.cuda.max_memory_reserved() / 1e9 if training.device.type == "cuda" else None
        images, times = global_batch_size(training), profiler.times
        steps = training.max_steps - PROFILED - WARM_UP
        seconds = (times[WARM_UP + steps] - times[WARM_UP]) / steps
        return {
            "images_per_second": images / seconds,
            "milliseconds": 1e3 * seconds,
            "model_only": model_throughput(trainer),
            "first_step_seconds": times[1] - times[0],
            "gigabytes": gigabytes,
            **summarize(profiler.profiler, times[training.max_steps] - profiler.profile_started),
        }


def summarize(profiler: profile, seconds: float) -> dict[str, Any]:
    """Of a step under the profiler: launches, synchronizations, idle time, and milliseconds by kind of kernel."""
    averages = profiler.key_averages()
    cuda = any(event.device_type == DeviceType.CUDA for event in averages)
    kernels = {}
    for event in averages:
        if not event.is_user_annotation and (event.device_type == DeviceType.CUDA) == cuda:
            busy = event.self_device_time_total if cuda else event.self_cpu_time_total
            kernels[event.key] = (busy / 1e3 / PROFILED, event.count / PROFILED)
    kinds = dict.fromkeys(KERNELS, 0.0)
    for name, (busy, _) in kernels.items():
        kinds[next(kind for kind, pattern in KERNELS.items() if re.search(pattern, name.lower()))] += busy
    largest = sorted(kernels.items(), key=lambda item: -item[1][0])[:25]
    waits = sum(event.count for event in averages if re.match("cuda.*Synchronize", event.key))
    return {
        "launches": sum(count for _, count in kernels.values()),
        "synchronizations": waits / PROFILED,
        "idle": 1 - sum(busy for busy, _ in kernels.values()) * PROFILED / 1e3 / seconds if cuda else None,
        "kinds": kinds,
        "largest": [(name[:100], busy, count) for name, (busy, count) in largest],
    }


def half_the_heads(config: ViTMAEConfig) -> dict[str, int]:
    """A decoder with half as many heads, twice as wide."""
    return {"decoder_num_attention_heads": config.decoder_num_attention_heads // 2}


def half_the_layers(config: ViTMAEConfig) -> dict[str, int]:
    """A decoder of half the depth."""
    return decoder_sizes(config, config.decoder_num_hidden_layers // 2, config.decoder_hidden_size)


def half_the_hidden_size(config: ViTMAEConfig) -> dict[str, int]:
    """A decoder of half the hidden size."""
    return decoder_sizes(config, config.decoder_num_hidden_layers, config.decoder_hidden_size // 2)


ALL = Choices(host=True, warp=True, model=True, qkv=True)
TRAININGS = {  # with the budget, and whether they need CUDA
    "as before": (Choices(), 90, False),
    "+ host": (Choices(host=True), 30, True),
    "+ warp": (Choices(host=True, warp=True), 30, True),
    "+ model": (ALL._replace(qkv=False), 45, False),
    "+ q, k, v": (ALL, 30, False),
    "half the decoder's heads": (ALL._replace(decoder=half_the_heads), 30, False),
    "half its layers": (ALL._replace(decoder=half_the_layers), 30, False),
    "half its hidden size": (ALL._replace(decoder=half_the_hidden_size), 30, False),
    "max-autotune": (ALL._replace(mode="max-autotune-no-cudagraphs"), 110, True),
    "regional compilation": (ALL._replace(regional=True), 45, True),
}
STAGES = (
    Stage("rates", 30, measure_rates),
    Stage("attention", 15, measure_attention, needs_cuda=True),
    Stage("data path", 15, measure_data_path),
    Stage("probe", 15, measure_probe),
    *(
        Stage(name, budget, partial(train, choices=choices), needs_cuda)
        for name, (choices, budget, needs_cuda) in TRAININGS.items()
    ),
)


# ----------------------------------------------------------------------------------------------------------- the report


def print_report(recipe: Recipe, options: Namespace, results: dict[str, dict[str, Any]]) -> None:
    """Print all results: one row per training, the kinds of kernels of the first and the last step, and the rest."""
    print(f"\n{header(recipe)}; batch size {global_batch_size(recipe.training)}; torch {torch.__version__}")
    trainings = {name: results[name] for name in TRAININGS if "milliseconds" in results.get(name, {})}
    columns = ("images_per_second", "model_only", "milliseconds", "first_step_seconds", "gigabytes")
    columns += ("launches", "synchronizations", "idle")
    rows = [(name, *(_text(result[column]) for column in columns)) for name, result in trainings.items()]
    print_table(("training", *(column.replace("_", " ") for column in columns)), rows)
    kinds = [(name, *(_text(result["kinds"][kind]) for kind in KERNELS)) for name, result in trainings.items()]
    print_table(("milliseconds of a step", *KERNELS), kinds)
    for name in ("as before", "+ q, k, v"):
        if name in trainings:
            largest = [(f"`{kernel}`", _text(busy), _text(count)) for kernel, busy, count in trainings[name]["largest"]]
            print_table((f"{name}: largest kernels", "milliseconds of a step", "launches"), largest)
    others = [(name, entry) for name, entry in results.items() if name not in trainings]
    details = [
        (name, what, _text(value))
        for name, entry in others
        for what, value in entry.items()
        if what not in ("key", "stage")
    ]
    print_table(("stage", "what", "value"), details)


def _text(value: float | str | None) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else "" if value is None else str(value)


if __name__ == "__main__":
    with one_line_errors(sys.argv[0]):
        sys.exit(main(sys.argv[1:], started=psutil.Process().create_time()))

"""What each choice is worth: one training step of the model alone, with one choice changed, side by side in one run.

    python benchmarks/variants.py --batch_size 8                          recipes/galaxy10.yaml's model, 8 images a step
    python benchmarks/variants.py --config recipes/demo.yaml              the small model

A step is forward pass, backward pass and optimiser step on one batch that lies on the device; `base` is what main.py
does there. Each measurement is a process of its own; they alternate, and the table shows the median over the repeats,
the extremes, and the ratio to the base. Other flags are main.py's.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pretrain import in_a_process, read_benchmark, synchronise

from galaxy_mae.errors import UserError, one_line_errors
from galaxy_mae.mae import build_mae, choose_attention
from galaxy_mae.provenance import machine, session, short_commit
from galaxy_mae.recipe import Recipe

VARIANTS = {
    "base": "as main.py",
    "other_precision": "float32 where main.py takes bfloat16, and the other way round",
    "sdpa": "PyTorch's fused attention",
    "eager": "transformers' plain attention",
    "channels_last": "images and patch projection with channels last",
    "gradient_norm": "the gradients' norm at every step, as the Trainer computes it for its log",
    "unfused": "AdamW as one kernel a tensor",
    "compiled": "torch.compile where main.py does not, and the other way round",
    "reduce_overhead": "torch.compile with CUDA graphs",
    "max_autotune": "torch.compile that tries kernels",
}
ON_GPUS_ALONE = ("reduce_overhead", "max_autotune")
WARM_UP = 3  # steps


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--steps", type=int, default=10, help="timed steps of a measurement")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS)
    parser.add_argument("--results", type=Path, help="a file that keeps what was measured: called again, it goes on")
    parser.add_argument("--measure", help=argparse.SUPPRESS)  # a child: one variant as JSON
    options, flags = parser.parse_known_args(arguments)
    recipe = read_benchmark(flags, steps=1)
    if options.measure:
        print(json.dumps({"images_per_second": rate(recipe, options.measure, options.steps)}))
        return
    cuda = recipe.training.device.type == "cuda"
    chosen = [name for name in options.variants or VARIANTS if cuda or name not in ON_GPUS_ALONE]
    rates: dict[str, list[float]] = {name: [] for name in dict.fromkeys(["base", *chosen])}
    for repeat in range(options.repeats):
        for name in list(rates):
            command = [sys.executable, __file__, *flags, "--steps", str(options.steps), "--measure", name]
            try:
                measured = in_a_process(command, f"{name}, repeat {repeat}", options.results)
                rates[name].append(measured["images_per_second"])
            except UserError as error:  # one that this machine cannot do
                print(error, file=sys.stderr)
    print_table(recipe, rates)


def rate(recipe: Recipe, variant: str, steps: int) -> float:
    """Images a second of one variant."""
    training, size = recipe.training, recipe.galaxies.image_size
    device, bf16, compiled = training.device, training.bf16, training.torch_compile
    if variant == "other_precision":
        bf16 = not bf16
    model = build_mae(recipe.model.config(size), 0).to(device).train()
    choose_attention(model, device, bf16)
    if variant in ("sdpa", "eager"):
        model.set_attn_implementation(variant)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    images = torch.randn(training.per_device_train_batch_size, 3, size, size, device=device)
    if variant == "channels_last":
        model, images = (x.to(memory_format=torch.channels_last) for x in (model, images))
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=variant != "unfused")
    mode = {"reduce_overhead": "reduce-overhead", "max_autotune": "max-autotune"}.get(variant)
    run = torch.compile(model, mode=mode) if mode or compiled != (variant == "compiled") else model
    for step in range(WARM_UP + steps):
        if step == WARM_UP:
            synchronise(device)
            started = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            loss = run(images).loss
        loss.backward()
        if variant == "gradient_norm":
            nn.utils.clip_grad_norm_(trained, torch.inf)
        optimizer.step()
        optimizer.zero_grad()
    synchronise(device)
    return steps * len(images) / (time.perf_counter() - started)


def print_table(recipe: Recipe, rates: dict[str, list[float]]) -> None:
    """A row a variant."""
    model, training = recipe.model, recipe.training
    precision = f"{'bfloat16' if training.bf16 else 'float32'}{', compiled' if training.torch_compile else ''}"
    print(
        f"{machine()}; commit {short_commit(session())}; {recipe.galaxies.image_size} pixels, "
        f"{model.hidden_size} wide, {model.num_hidden_layers} layers, "
        f"{training.per_device_train_batch_size} images a step, base in {precision}"
    )
    print("| variant | what | images/s (least to most) | ratio to base |\n| --- | --- | --- | --- |")
    base = statistics.median(rates["base"])
    for name, each in rates.items():
        if each:
            median = statistics.median(each)
            print(f"| {name} | {VARIANTS[name]} | {median:,.1f} ({min(each):,.1f} to {max(each):,.1f}) | ", end="")
            print(f"{median / base:.2f} |")


if __name__ == "__main__":
    with one_line_errors(sys.argv[0]):
        main(sys.argv[1:])

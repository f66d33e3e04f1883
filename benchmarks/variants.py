"""The effect of single choices on the training step, model only.

    python benchmarks/variants.py --batch_size 8                          the model of recipes/galaxy10.yaml
    python benchmarks/variants.py --config recipes/demo.yaml              the small model
    python benchmarks/variants.py --batch_size 8 --variants sdpa eager fused_qkv                  attention alone

A step is forward pass, backward pass and optimizer step on one batch that is already on the device. The variant "base"
does what main.py does, every other variant changes one choice. Each measurement is a process of its own. Measurements
alternate; the table shows the median over the repeats, the extremes, and the ratio to the base.
"""

import json
import sys
from statistics import median

import torch
from measurement import (
    header,
    measurement_parser,
    median_and_range,
    precision,
    print_table,
    read_benchmark_recipe,
    run_measurement,
    step_throughput,
)

from galaxy_mae.errors import UserError, one_line_errors
from galaxy_mae.model.attention import fuse_qkv
from galaxy_mae.model.compute import select_attn_implementation
from galaxy_mae.model.mae import build_mae
from galaxy_mae.training.recipe import Recipe

VARIANTS = {
    "base": "as in main.py",
    "other_precision": "float32 where main.py uses bfloat16, and vice versa",
    "sdpa": "SDPA attention, as transformers chooses by itself",
    "eager": "transformers' eager attention in the encoder, SDPA in the decoder",
    "fused_qkv": "queries, keys and values as one product where main.py computes three, and vice versa",
    "compiled": "torch.compile where main.py does not use it, and vice versa",
}


def main(arguments: list[str]) -> None:
    parser = measurement_parser(__doc__, steps=10)
    parser.add_argument("--repeats", type=int, default=3, help="of each measurement")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, help="besides the base; default: all")
    options, flags = parser.parse_known_args(arguments)
    recipe = read_benchmark_recipe(flags, steps=1)
    if options.measure:
        print(json.dumps({"images_per_second": throughput(recipe, options.measure, options.steps)}))
        return
    rates: dict[str, list[float]] = {name: [] for name in ("base", *(options.variants or VARIANTS))}
    for repeat in range(options.repeats):
        for name, measured in rates.items():
            try:
                measured.append(run_measurement(__file__, name, repeat, options, flags)["images_per_second"])
            except UserError as error:  # this machine does not support the variant
                print(error, file=sys.stderr)
    if not rates["base"]:
        raise UserError("base: it could not be measured, for the reason above")
    print_report(recipe, rates)


def throughput(recipe: Recipe, variant: str, steps: int) -> float:
    """Throughput of one variant in images/s."""
    training, size = recipe.training, recipe.galaxies.image_size
    device, bf16 = training.device, training.bf16 != (variant == "other_precision")
    model = build_mae(recipe.model_config).to(device).train()
    select_attn_implementation(model, device, bf16)
    fuse_qkv(model, (device.type == "cuda") != (variant == "fused_qkv"))
    if variant in ("sdpa", "eager"):
        model.set_attn_implementation(variant)  # does not reach the decoder
        model.decoder.config._attn_implementation = "sdpa"
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    images = torch.randn(training.per_device_train_batch_size, 3, size, size, device=device)
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    forward = torch.compile(model) if training.torch_compile != (variant == "compiled") else model

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            loss = forward(images).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step_throughput(step, len(images), steps, device)


def print_report(recipe: Recipe, rates: dict[str, list[float]]) -> None:
    """Print one row per variant that was measured."""
    training = recipe.training
    print(
        f"{header(recipe)}, batch size {training.per_device_train_batch_size}, base in {precision(training.bf16)}"
        f"{', compiled' if training.torch_compile else ''}"
    )
    columns = ("variant", "change", "throughput, images/s (min-max)", "ratio to base")
    base = median(rates["base"])
    rows = [
        (name, VARIANTS[name], median_and_range(each), f"{median(each) / base:.2f}")
        for name, each in rates.items()
        if each
    ]
    print_table(columns, rows)


if __name__ == "__main__":
    with one_line_errors(sys.argv[0]):
        main(sys.argv[1:])

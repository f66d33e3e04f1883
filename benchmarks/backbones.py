"""The cost of frozen features and of fine-tuning: this project's encoders and other backbones, with random weights.

    python benchmarks/backbones.py

Prints for each the throughput of frozen features of one view, the sixteen orientations in their place, and their ratio;
and of a training step per image its FLOPs and the memory kept for it. Everything is in float32; a throughput is the
median of three.
"""

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from measurement import median_and_range, print_table, read_benchmark_recipe, timed
from transformers import Dinov2Config, PreTrainedConfig, PreTrainedModel

from galaxy_mae.data.batches import GalaxyBatches
from galaxy_mae.errors import one_line_errors
from galaxy_mae.evaluation.features import frozen_features, orientation_features
from galaxy_mae.model.backbone import baseline_config
from galaxy_mae.model.compute import measure_classifier
from galaxy_mae.model.encoder import random_encoder
from galaxy_mae.model.mae import encoder_config
from galaxy_mae.provenance import machine, session, short_commit

REPEATS = 3
TOTAL_PIXELS = 16 * 224**2  # of the images of a measurement


def backbones() -> dict[str, tuple[PreTrainedConfig, int]]:
    """Configuration and image size of each row."""
    folder = Path(__file__).resolve().parents[1] / "recipes"
    recipes = {n: read_benchmark_recipe(["--config", str(folder / f"{n}.yaml")], 1) for n in ("demo", "galaxy10")}
    own = {
        f"ViT of {name}.yaml": (encoder_config(recipe.model_config), recipe.galaxies.image_size)
        for name, recipe in recipes.items()
    }
    dinov2 = Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=518, patch_size=14)
    return own | {"DINOv2-S": (dinov2, 224), "ResNet-18": (baseline_config("resnet18"), 224)}


def main(arguments: list[str]) -> None:
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        return
    print(f"{machine()}; commit {short_commit(session())}; float32, {torch.get_num_threads()} threads")
    rows = []
    for name, (config, size) in backbones().items():
        model = random_encoder(config, seed=0)
        pixels = np.random.default_rng(0).integers(256, size=(TOTAL_PIXELS // size**2, size, size, 3), dtype=np.uint8)
        batches = GalaxyBatches(pixels, np.full(3, 0.5), np.full(3, 0.3), size)
        one, sixteen = throughput(frozen_features, model, batches), throughput(orientation_features, model, batches)
        flops, kept = measure_classifier(model, size)
        rows.append(
            (
                name,
                str(size),
                f"{model.num_parameters() / 1e6:.1f} M",
                median_and_range(one),
                median_and_range(sixteen),
                f"{np.median(one) / np.median(sixteen):.1f}",
                f"{flops / 1e9:.1f} GFLOP",
                f"{kept / 1e6:.0f} MB",
            )
        )
    columns = ("backbone", "pixels", "parameters", "frozen features, images/s", "over orientations, images/s", "ratio")
    print_table((*columns, "training step per image", "memory kept per image"), rows)


def throughput(features: Callable, model: PreTrainedModel, batches: GalaxyBatches) -> list[float]:
    """Images/s of a function of `evaluation.features` that computes and writes them, after a warm-up."""
    with tempfile.TemporaryDirectory() as folder:
        seconds = [timed(features, model, batches, Path(folder, f"{i}.npz"))[0] for i in range(REPEATS + 1)]
    return [batches.num_images / each for each in seconds[1:]]


if __name__ == "__main__":
    with one_line_errors(sys.argv[0]):
        main(sys.argv[1:])

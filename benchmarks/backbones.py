"""The cost of other backbones than this project's at 224 pixels, with random weights.

    python benchmarks/backbones.py

Prints images/s of frozen features in float32, FLOPs of a training step per image, and memory kept per image for it.
"""

import sys

import torch
from measurement import timed
from transformers import Dinov2Config

from galaxy_mae.errors import one_line_errors
from galaxy_mae.model.backbone import baseline_config, build_backbone, hidden_states
from galaxy_mae.model.compute import measure_classifier
from galaxy_mae.provenance import machine

BACKBONES = {
    "DINOv2-S": Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=518, patch_size=14),
    "ResNet-18": baseline_config("resnet18"),
}


@torch.no_grad()
def main(arguments: list[str]) -> None:
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        return
    print(machine())
    images = torch.zeros(16, 3, 224, 224)
    for name, config in BACKBONES.items():
        model = build_backbone(config, seed=0)
        hidden_states(model, images[:4])  # warm-up
        seconds, _ = timed(hidden_states, model, images)
        with torch.enable_grad():
            flops, kept = measure_classifier(model, 224)
        print(
            f"{name:<10} {model.num_parameters() / 1e6:5.1f} M   {len(images) / seconds:6.1f} images/s   "
            f"{flops / 1e9:5.1f} GFLOP   {kept / 1e6:5.0f} MB"
        )


if __name__ == "__main__":
    with one_line_errors(sys.argv[0]):
        main(sys.argv[1:])

"""The second stage of pre-training: from one view of a galaxy, what a frozen encoder says of sixteen orientations.

A student, an encoder with a linear head on the means of its tokens over rings, sees one crop of a galaxy, turned by any
angle, and predicts the features of a frozen teacher over all orientations of the complete image
(`evaluation.features.distillation_targets`). The targets are fixed, so that nothing can collapse, and they are computed
once. What remains is a plain encoder, whose one forward pass stands for sixteen.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import ViTConfig, ViTModel, ViTPreTrainedModel
from transformers.utils import ModelOutput

from galaxy_mae.model.compute import measure_cost
from galaxy_mae.training.pretraining import PretrainingTrainer


@dataclass(frozen=True)
class Targets:
    """What is learned: (N, K) float32, a row for each galaxy of the run; and how tokens are pooled for it.

    `pooling` is (patches, rings) float32, whose columns have the weights of the patches in a ring.
    """

    values: np.ndarray
    pooling: np.ndarray


@dataclass
class StudentOutput(ModelOutput):
    """The mean squared error, and that of each image, (B,)."""

    loss: torch.Tensor | None = None
    losses: torch.Tensor | None = None


class Student(ViTPreTrainedModel):
    """An encoder, and a LayerNorm and a linear layer on the means of its patch tokens over rings."""

    config_class = ViTConfig

    def __init__(self, encoder: ViTModel, targets: Targets, seed: int):
        super().__init__(encoder.config)
        rings, numbers = targets.pooling.shape[1], targets.values.shape[1]
        self.vit, self.norm = encoder, nn.LayerNorm(rings * encoder.config.hidden_size)
        self.head = nn.Linear(rings * encoder.config.hidden_size, numbers)
        generator = torch.Generator().manual_seed(seed)
        nn.init.xavier_uniform_(self.head.weight, generator=generator)
        nn.init.zeros_(self.head.bias)
        self.register_buffer("pooling", torch.from_numpy(targets.pooling), persistent=False)

    def forward(self, pixel_values: torch.Tensor, targets: torch.Tensor) -> StudentOutput:
        """Compare the predictions of (B, 3, S, S) images with (B, K) targets."""
        tokens = self.vit(pixel_values).last_hidden_state[:, 1:]
        means = torch.einsum("bpc,pr->brc", tokens, self.pooling.to(tokens.dtype)).flatten(1)
        losses = F.mse_loss(self.head(self.norm(means)).float(), targets, reduction="none").mean(dim=1)
        return StudentOutput(loss=losses.mean(), losses=losses)


class DistillationTrainer(PretrainingTrainer):
    """Trains a `Student`; what is not here is as in the first stage."""

    def __init__(self, model: Student, *args, targets: Targets, **kwargs):
        config, values = model.config, torch.from_numpy(targets.values)
        image = torch.zeros(1, config.num_channels, config.image_size, config.image_size)
        super().__init__(model, *args, flops_per_image=measure_cost(model, image, values[:1])[0], **kwargs)
        self.targets, self.attention_order = values.to(self.args.device), []

    def prepare_batch(self, batch: dict[str, torch.Tensor], training: bool) -> dict[str, torch.Tensor]:
        """`pixel_values` (B, 3, S, S) and `targets` (B, K), both float32."""
        step = self.sampler.random_step(self.state.global_step)
        transform = self.batches.train_transform(batch, step) if training else self.batches.eval_transform(batch)
        return {"pixel_values": transform, "targets": self.targets[batch["index"].to(self.args.device)]}

    def losses_of(self, prepared: dict[str, torch.Tensor], output: StudentOutput) -> torch.Tensor:
        """The loss of each image, (B,)."""
        return output.losses

"""The Trainer of fine-tuning: sample indices in, pixels and soft targets out; learning rates that differ by layer."""

import re

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.trainer_utils import EvalPrediction

from galaxy_mae.data.batches import GalaxyBatches
from galaxy_mae.model.compute import measure_classifier
from galaxy_mae.training.arguments import FineTuningArguments
from galaxy_mae.training.trainer import GalaxyTrainer

_LAYER = re.compile(r"\.(?:layers?|stages)\.(\d+)\.")  # the first match is the outermost
_NO_WEIGHT_DECAY = ("_token", "_tokens", "position_embeddings", "position_embedding.weight", "position_bias_table")


class FineTuningTrainer(GalaxyTrainer):
    """Trains a classifier on a labelled `IndexDataset`; `label` (N,) int64 has the class of each of its images."""

    def __init__(
        self, model: nn.Module, options: FineTuningArguments, *, batches: GalaxyBatches, label: np.ndarray, **kwargs
    ):
        def collate(indices: list[int]) -> dict[str, torch.Tensor]:
            return batches.collate(indices) | {"labels": torch.from_numpy(label[indices])}

        super().__init__(
            model,
            options,
            batches=batches,
            data_collator=collate,
            flops_per_image=measure_classifier(model, batches.image_size)[0],
            compute_metrics=_validation_accuracy,
            **kwargs,
        )
        self.model_accepts_loss_kwargs = False  # `compute_loss` returns the mean over a micro-batch

    def prepare_batch(self, batch: dict[str, torch.Tensor], training: bool) -> dict[str, torch.Tensor]:
        """`pixel_values` (B, 3, S, S) float32 and `labels`.

        In training the labels are (B, K) float32, smoothed, and mixed as the images are; otherwise (B,) int64.
        """
        labels = batch["labels"].to(self.args.device)
        if not training:
            return {"pixel_values": self.batches.eval_transform(batch), "labels": labels}
        step = self.state.global_step
        images = self.batches.train_transform(batch, step)
        targets = smooth_targets(labels, self.model.config.num_labels, self.options.label_smoothing)
        images, targets = mix_up(images, targets, self.options.mixup, self.args.seed, step)
        return {"pixel_values": images, "labels": targets}

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, torch.Tensor], return_outputs: bool = False, num_items_in_batch=None
    ) -> torch.Tensor | tuple[torch.Tensor, ImageClassifierOutput]:
        """The mean cross-entropy, also with probabilities as labels, where transformers' own loss is another one."""
        outputs = model(pixel_values=inputs["pixel_values"])
        loss = F.cross_entropy(outputs.logits.float(), inputs["labels"])
        return (loss, outputs) if return_outputs else loss

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW with learning rates that fall from the head to the patches."""
        if self.optimizer is None:
            model = self.model if model is None else model
            optimizer, options = self.get_optimizer_cls_and_kwargs(self.args, model)
            groups = layer_wise_groups(model, self.args.learning_rate, self.args.weight_decay, self.options.layer_decay)
            self.optimizer = optimizer(groups, **options)
        return self.optimizer


def smooth_targets(labels: torch.Tensor, classes: int, smoothing: float) -> torch.Tensor:
    """(B,) int64 classes to (B, classes) float32 probabilities, with `smoothing` spread over all classes."""
    return F.one_hot(labels, classes).float() * (1 - smoothing) + smoothing / classes


def mix_up(
    images: torch.Tensor, targets: torch.Tensor, alpha: float, seed: int, step: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Blend a batch of images and targets with the same batch in reverse order (mixup, Zhang et al. 2018).

    The weight is Beta(alpha, alpha), one per micro-batch, and a function of (seed, step). Alpha 0 blends nothing.
    """
    if alpha == 0:
        return images, targets
    weight = np.random.default_rng([seed, step]).beta(alpha, alpha)
    return tuple(torch.lerp(x.flip(0), x, weight) for x in (images, targets))


def _validation_accuracy(prediction: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float(np.mean(prediction.predictions.argmax(axis=1) == prediction.label_ids))}


def layer_wise_groups(
    model: PreTrainedModel, learning_rate: float, weight_decay: float, layer_decay: float
) -> list[dict]:
    """Parameter groups whose learning rates fall by a factor of `layer_decay` per layer, from the head to the patches.

    As facebookresearch/mae (util/lr_decay.py): embeddings are layer 0, the head and the norm before it the last one.
    The layers of a hierarchical model are its stages. A model without layers that are known has one learning rate. No
    weight decay on vectors, tokens and position embeddings. The head's groups come first.
    """
    layers = {name: _LAYER.search(name) for name, _ in model.named_parameters()}
    numbers = [int(layer[1]) for layer in layers.values() if layer]
    last = max(numbers, default=-1) + 2
    outside = 0 if numbers else last
    groups: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if layer := layers[name]:
            outside = last  # what is defined before the layers are embeddings, what comes after them norm and head
        depth = int(layer[1]) + 1 if layer else outside
        decayed = parameter.squeeze().ndim > 1 and not name.endswith(_NO_WEIGHT_DECAY)
        groups.setdefault((depth, decayed), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": learning_rate * layer_decay ** (last - depth),
            "weight_decay": weight_decay if decayed else 0.0,
        }
        for (depth, decayed), parameters in sorted(groups.items(), key=lambda item: -item[0][0])
    ]

"""Fine-tuning: an encoder and a head, trained together on labelled galaxies, and the predictions of the result.

The Trainer gets sample indices, and makes pixels and soft targets of them; its learning rates differ by layer.
"""

import copy
import logging
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel, set_seed
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.trainer_utils import EvalPrediction

from galaxy_mae.data.batches import GalaxyBatches, IndexDataset, dihedral_views
from galaxy_mae.data.cache import Galaxies
from galaxy_mae.data.frame import Frame
from galaxy_mae.data.seen import TrainingImages
from galaxy_mae.data.split import ALL_TEST
from galaxy_mae.errors import UserError
from galaxy_mae.evaluation import calibration
from galaxy_mae.evaluation.features import iterate_images
from galaxy_mae.files import write_json
from galaxy_mae.model.backbone import check_finite, head_of
from galaxy_mae.model.classifier import build_classifier, load_classifier
from galaxy_mae.model.compute import measure_classifier, select_attn_implementation
from galaxy_mae.model.saved_model import TRAINING_IMAGES, save_model
from galaxy_mae.training.arguments import FineTuningArguments
from galaxy_mae.training.checkpoints import find_checkpoint, read_manifest, write_manifest
from galaxy_mae.training.trainer import GalaxyTrainer

logger = logging.getLogger(__name__)

FINISHED = "fine_tuning.json"  # the manifest of a finished fine-tuning, with what was selected
_LAYER = re.compile(r"\.(?:layers?|stages)\.(\d+)\.")  # the first match is the outermost
_NO_WEIGHT_DECAY = ("_token", "_tokens", "position_embeddings", "position_embedding.weight", "position_bias_table")


@dataclass(frozen=True)
class LabelledSplit:
    """What a method may learn from: int64 sample indices, and the classes of these galaxies alone."""

    train: np.ndarray
    validation: np.ndarray
    label: np.ndarray  # (N,) int64; -1 for galaxies of neither
    class_names: tuple[str, ...]
    frame: Frame = Frame()  # noqa: RUF009 (frozen); of their images


def labelled_split(galaxies: Galaxies, split: dict[str, np.ndarray], flag: str = "--dataset") -> LabelledSplit:
    """Training and validation galaxies with their classes; a `UserError` if nothing can be learned from them."""
    names, name = galaxies.class_names, f"{flag} {galaxies.name}"
    if galaxies.label is None:
        raise UserError(f"{name}: it has no labels; an evaluation needs the class of each galaxy")
    for part in ("train", "validation", "test"):
        if len(split[part]) == 0:
            fix = ALL_TEST if galaxies.predefined_test.all() else "use more galaxies"
            raise UserError(f"{name}: the split leaves no {part} galaxies; {fix}")
    known = np.full(len(galaxies), -1)
    for part in ("train", "validation"):
        known[split[part]] = galaxies.label[split[part]]
    if missing := sorted(set(range(len(names))) - set(known[split["train"]].tolist())):
        c = missing[0]
        raise UserError(f"{name}: class {c} ({names[c]}) has no training galaxies; add some, or remove the class")
    if len(names) < 2:
        raise UserError(f"{name}: it has a single class; there is nothing to classify")
    return LabelledSplit(split["train"], split["validation"], known, names, galaxies.frame)


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


def build_fine_tuning_trainer(
    encoder: PreTrainedModel,
    batches: GalaxyBatches,
    labelled: LabelledSplit,
    arguments: FineTuningArguments,
    folder: Path,
    run_id: str,
    seed: int,
) -> FineTuningTrainer:
    """The Trainer of `fine_tune`, of the same arguments: a new classifier, and batches with its own augmentation."""
    arguments = copy.copy(arguments)
    arguments.seed, arguments.output_dir = seed, str(folder)
    set_seed(seed)
    return FineTuningTrainer(
        build_classifier(encoder, labelled.class_names, seed),
        arguments,
        train_dataset=IndexDataset(labelled.train),
        eval_dataset=IndexDataset(labelled.validation),
        batches=batches.with_augmentation(seed, arguments.min_crop_scale, arguments.photometric_jitter),
        run_id=run_id,
        label=labelled.label,
    )


def fine_tune(
    encoder: PreTrainedModel,
    batches: GalaxyBatches,
    labelled: LabelledSplit,
    arguments: FineTuningArguments,
    folder: Path,
    run_id: str,
    seed: int,
) -> tuple[PreTrainedModel, dict]:
    """Fine-tune a copy of an encoder and keep the epoch with the best accuracy on the validation set.

    The folder holds checkpoints first and the classifier at the end. Called again, this returns the classifier or
    resumes from the last checkpoint, unless they are damaged or of another fine-tuning. `seed` is that of the head, the
    sample order and the augmentation.

    Returns:
        The classifier, and what was selected: `best_epoch`, `validation_accuracy`, `epochs`, and what
        `fold_temperature_into_head` returns.
    """
    try:
        best_params = read_manifest(folder / FINISHED, run_id)["best_params"]
        model = load_classifier(str(folder), "--output_dir").model
    except UserError as error:
        if (folder / FINISHED).exists():
            logger.warning("%s: fine-tuned again", error)
        trainer = build_fine_tuning_trainer(encoder, batches, labelled, arguments, folder, run_id, seed)
        model, best_params = _train(trainer, labelled)
    for path in folder.glob("*checkpoint-*"):
        shutil.rmtree(path)
    return model.to(batches.device).eval(), best_params


def _train(trainer: FineTuningTrainer, labelled: LabelledSplit) -> tuple[PreTrainedModel, dict]:
    """Train, resuming if there is a checkpoint, and save the classifier. Returns it, and what was selected."""
    folder = Path(trainer.args.output_dir)
    if checkpoint := find_checkpoint(folder, trainer.run_id):
        logger.info("resuming from %s", checkpoint)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    trainer.save_state()
    steps_per_epoch = trainer.state.max_steps / trainer.state.num_train_epochs
    model, batches = trainer.unwrapped_model, trainer.batches
    best_params = {
        "best_epoch": round(trainer.state.best_global_step / steps_per_epoch),
        "epochs": trainer.state.num_train_epochs,
        "validation_accuracy": trainer.state.best_metric,
        **fold_temperature_into_head(model, batches, labelled, trainer.args.bf16),
    }
    save_model(model, folder, batches.channel_mean, batches.channel_std, batches.image_size)
    split = {"train": labelled.train, "validation": labelled.validation}
    write_json(folder / TRAINING_IMAGES, TrainingImages.of(batches.pixels, split, labelled.frame).as_json())
    names = ("config.json", "model.safetensors", "preprocessor_config.json", TRAINING_IMAGES)
    files = (folder / name for name in names)
    write_manifest(folder / FINISHED, trainer.run_id, files, best_params=best_params)
    return model, best_params


@torch.no_grad()
def fold_temperature_into_head(
    model: PreTrainedModel, batches: GalaxyBatches, labelled: LabelledSplit, bf16: bool
) -> dict[str, float]:
    """Divide the head's weight and bias by the temperature that fits the validation galaxies best.

    The classifier's probabilities are then calibrated wherever it is opened, and it predicts the same classes.

    Returns:
        `temperature`, and the expected calibration errors of the validation galaxies without and with it:
        `validation_ece_before`, `validation_ece`.
    """
    label = labelled.label[labelled.validation]
    before = classify(model.eval(), batches, labelled.validation, bf16)
    temperature = calibration.fit_temperature(calibration.log_probabilities(before), label)
    head = head_of(model)
    head.weight.div_(temperature)
    head.bias.div_(temperature)
    return {
        "temperature": temperature,
        "validation_ece_before": calibration.expected_calibration_error(before, label),
        "validation_ece": calibration.expected_calibration_error(
            calibration.at_temperature(before, temperature), label
        ),
    }


@torch.no_grad()
def classify(
    model: PreTrainedModel, batches: GalaxyBatches, indices: np.ndarray, bf16: bool = False, tta: bool = False
) -> np.ndarray:
    """Probabilities of the classes, (M, classes) float64, by a classifier in evaluation mode on the batches' device.

    `tta` is test-time augmentation: the mean of the probabilities over the eight `dihedral_views` of an image.
    """
    probabilities = []
    select_attn_implementation(model, batches.device, bf16)
    for images in iterate_images(batches, indices):
        views = dihedral_views(images) if tta else [images]
        mean = torch.stack([pool_and_classify(model, view, bf16)[1] for view in views]).mean(dim=0)
        probabilities.append(mean.cpu().numpy())
    return np.concatenate(probabilities)


def pool_and_classify(
    model: PreTrainedModel, images: torch.Tensor, bf16: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """One forward pass of a classifier in evaluation mode, of (B, 3, S, S) normalized images on its device.

    Returns:
        What its head sees, (B, features) float32; of a fine-tuned ViT this is the LayerNorm of the mean patch token.
        And the probabilities of the classes, (B, classes) float64. A `UserError` if they are not finite.
    """
    seen = []
    with (
        head_of(model).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0])),
        torch.autocast(images.device.type, torch.bfloat16, enabled=bf16),
    ):
        logits = model(images).logits
    check_finite(model, logits)
    return seen[0].float(), torch.softmax(logits.double(), dim=1)

"""Fine-tuning: an encoder and a head, trained together on labelled galaxies, and what the result says of others."""

import copy
import json
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import ViTModel, set_seed

from galaxy_mae.atomic import write_json
from galaxy_mae.batches import GalaxyBatches, Rows
from galaxy_mae.callbacks import show_progress
from galaxy_mae.classifier import MeanPooledViTForImageClassification, build_classifier
from galaxy_mae.mae import choose_attention
from galaxy_mae.recipe import FineTuningArguments
from galaxy_mae.trainer import FineTuningTrainer, find_checkpoint

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LabelledRows:
    """What fine-tuning may see: row numbers, and the classes of these rows alone.

    Attributes:
        train, validation: int64 row numbers.
        label: (N,) int64; -1 in every row that is neither.
        class_names: of the classes 0, 1, ...
    """

    train: np.ndarray
    validation: np.ndarray
    label: np.ndarray
    class_names: tuple[str, ...]


def fine_tune(
    encoder: ViTModel,
    batches: GalaxyBatches,
    rows: LabelledRows,
    arguments: FineTuningArguments,
    folder: Path,
    seed: int,
) -> tuple[MeanPooledViTForImageClassification, dict]:
    """Fine-tune a copy of an encoder and keep the epoch with the best accuracy on validation rows.

    The folder holds the classifier when it is done, and checkpoints before: called again, it returns the classifier or
    goes on from the last checkpoint.

    Args:
        encoder: the weights to start from; left as they are.
        batches: makes the images.
        rows: training and validation rows.
        arguments: of the training; `batch_size` and so on.
        folder: of this one fine-tuning.
        seed: of the head, the order and the augmentation.

    Returns:
        The classifier, and what was chosen: `best_epoch`, `validation_accuracy`, `epochs`.
    """
    done = folder / "fine_tuning.json"
    if done.is_file():
        model = MeanPooledViTForImageClassification.from_pretrained(folder)
        return model.to(batches.device).eval(), json.loads(done.read_text())
    arguments = copy.deepcopy(arguments)
    arguments.seed, arguments.output_dir = seed, str(folder)
    set_seed(seed)
    trainer = FineTuningTrainer(
        build_classifier(encoder, rows.class_names, seed),
        arguments,
        train_dataset=Rows(rows.train),
        eval_dataset=Rows(rows.validation),
        batches=batches.augmented_by(seed, arguments.smallest_crop),
        label=rows.label,
        layer_decay=arguments.layer_decay,
        label_smoothing=arguments.label_smoothing,
        mixup=arguments.mixup,
    )
    show_progress(trainer)
    checkpoint = find_checkpoint(folder)
    if checkpoint:
        logger.info("going on from %s", checkpoint)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    trainer.save_state()
    steps_an_epoch = trainer.state.max_steps / trainer.state.num_train_epochs
    chosen = {
        "best_epoch": round(trainer.state.best_global_step / steps_an_epoch),
        "epochs": trainer.state.num_train_epochs,
        "validation_accuracy": trainer.state.best_metric,
    }
    model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    model.save_pretrained(folder, save_original_format=False)
    write_json(done, chosen)
    for path in folder.glob("checkpoint-*"):
        shutil.rmtree(path)
    return model.to(batches.device).eval(), chosen


@torch.inference_mode()
def classify(
    model: MeanPooledViTForImageClassification,
    batches: GalaxyBatches,
    rows: np.ndarray,
    bf16: bool = False,
    eightfold: bool = False,
) -> np.ndarray:
    """Probabilities of the classes: (M, classes) float64.

    Args:
        model: a classifier in evaluation mode, on the batches' device.
        batches: makes the images.
        rows: (M,) int64.
        bf16: compute in bfloat16 where autocast does.
        eightfold: average the probabilities over the four quarter turns of an image and of its mirror image.
    """
    parts = []
    choose_attention(model, batches.device, bf16)
    for start in range(0, len(rows), batches.at_a_time):
        images = batches.plain(batches.collate([int(row) for row in rows[start : start + batches.at_a_time]]))
        views = eight_views(images) if eightfold else [images]
        with torch.autocast(batches.device.type, torch.bfloat16, enabled=bf16):
            logits = [model(view).logits for view in views]
        parts.append(torch.stack([torch.softmax(x.double(), dim=1) for x in logits]).mean(dim=0).cpu().numpy())
    return np.concatenate(parts)


def eight_views(images: torch.Tensor) -> list[torch.Tensor]:
    """The four quarter turns of (B, C, S, S) images and of their mirror images."""
    return [torch.rot90(x, turns, dims=(2, 3)) for x in (images, images.flip(3)) for turns in range(4)]

"""The probe that ends a pre-training: what the exported encoder's frozen features are worth on validation galaxies."""

import logging
from pathlib import Path

import numpy as np

from galaxy_mae.data.cache import Galaxies
from galaxy_mae.evaluation.probes import validation_accuracies
from galaxy_mae.model.encoder import load_encoder
from galaxy_mae.training.pretraining import PretrainingTrainer

logger = logging.getLogger(__name__)


def probe_encoder(
    trainer: PretrainingTrainer, folder: Path, galaxies: Galaxies, split: dict[str, np.ndarray]
) -> dict[str, float]:
    """Log and return probe accuracies of the encoder in a run's folder on the validation set; empty without labels."""
    if galaxies.label is None:
        return {}
    encoder = load_encoder(str(folder)).model
    accuracies = validation_accuracies(encoder, trainer.batches, split, galaxies.label, trainer.args.bf16)
    metrics = {f"eval_{name}": value for name, value in accuracies.items()}
    if metrics:
        trainer.log(dict(metrics))
        logger.info(
            "on %d validation galaxies: linear probe %.1f %%, k-NN %.1f %%",
            metrics["eval_num_validation_images"],
            100 * metrics["eval_linear_probe_accuracy"],
            100 * metrics["eval_knn_accuracy"],
        )
    return metrics

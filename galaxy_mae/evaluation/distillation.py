"""The targets of the second stage: what a frozen teacher says of each galaxy over all orientations, decorrelated."""

import logging
from pathlib import Path

import numpy as np
from accelerate import PartialState
from sklearn.decomposition import PCA
from sklearn.preprocessing import StandardScaler

from galaxy_mae.data.batches import GalaxyBatches
from galaxy_mae.data.pretraining import PretrainingData, framed
from galaxy_mae.errors import UserError
from galaxy_mae.evaluation.features import (
    MAX_ORIENTED_RINGS,
    features_file,
    orientation_features,
    ring_choices,
    ring_weights,
)
from galaxy_mae.files import atomic_file
from galaxy_mae.model.encoder import Encoder, encoder_fingerprint, load_encoder
from galaxy_mae.model.saved_model import SavedModel
from galaxy_mae.provenance import is_main_process
from galaxy_mae.training.distillation import Targets
from galaxy_mae.training.pretraining import DISTILL, note_origin
from galaxy_mae.training.recipe import Recipe

logger = logging.getLogger(__name__)

TARGETS = "targets.npy"  # in the folder of a run
NUM_TARGETS = 256  # principal components
_FITTED_ON = 20_000  # training galaxies at most


def open_targets(recipe: Recipe, data: PretrainingData, run: dict, folder: Path) -> Targets | None:
    """The targets of `--distill`, None without it; a run keeps them until it ends. The teacher is noted in `run`.

    Raises:
        UserError: no such teacher, or the galaxies are streamed.
    """
    source, path = recipe.model.distill, folder / TARGETS
    if not source:
        return None
    if data.is_streamed:
        raise UserError("--distill: the targets of a stream would not fit into memory: set --stream False")
    with PartialState().main_process_first():
        if is_main_process() and not (path.exists() and DISTILL in run):
            teacher = load_encoder(source, "--distill")
            run[DISTILL] = note_origin(SavedModel.find(source, "--distill"), folder / DISTILL)
            logger.info("--distill %s: its features over sixteen orientations of %s images", source, len(data.pixels))
            with atomic_file(path) as tmp_path, tmp_path.open("wb") as out:
                np.save(out, _targets(teacher, data, recipe.training.device.type, recipe.training.bf16))
    side = recipe.galaxies.image_size // recipe.model.patch_size
    choices = [n for n in ring_choices((side, side)) if n <= MAX_ORIENTED_RINGS]
    return Targets(np.load(path).astype(np.float32), ring_weights(choices[-1] if choices else 1, (side, side)))


def _targets(teacher: Encoder, data: PretrainingData, device: str, bf16: bool) -> np.ndarray:
    """(N, `NUM_TARGETS`) float16, at most: principal components of the standardized features, half whitened.

    Each is divided by the fourth root of its variance, so that those with little of it count, but less than in full
    whitening; and all by one number, so that their mean square is 1.
    """
    fingerprint = encoder_fingerprint(teacher.model, teacher.mean, teacher.std, teacher.image_size)
    parts = []
    for part, _ in data.train:
        galaxies = framed(part, data.galaxies.image_size, data.galaxies.frame)
        batches = GalaxyBatches(galaxies.pixels, teacher.mean, teacher.std, teacher.image_size, device)
        path = features_file(galaxies, fingerprint, bf16, "_orientations")
        parts.append(orientation_features(teacher.model, batches, path, bf16))
    rows, features = data.train_dataset().indices, np.concatenate(parts)
    rows = np.random.default_rng(0).permutation(rows)[:_FITTED_ON]
    scaler = StandardScaler().fit(features[rows].astype(np.float32))
    known = scaler.transform(features[rows].astype(np.float32))
    pca = PCA(min(NUM_TARGETS, *known.shape), svd_solver="covariance_eigh").fit(known)
    scale = pca.explained_variance_.clip(1e-6) ** 0.25
    scale *= np.sqrt(np.mean((pca.transform(known) / scale) ** 2))
    logger.info("%d targets have %.0f %% of the variance", len(scale), 100 * pca.explained_variance_ratio_.sum())
    chunks = (features[i : i + 4096].astype(np.float32) for i in range(0, len(features), 4096))
    return np.concatenate([(pca.transform(scaler.transform(x)) / scale).astype(np.float16) for x in chunks])

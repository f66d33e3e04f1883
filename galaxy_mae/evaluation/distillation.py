"""The second stage of pre-training: from one view of a galaxy, what a frozen encoder says of eight orientations.

A student, an encoder with a linear head on the means of its tokens over rings, sees one crop of a galaxy, turned by any
angle, and predicts the features of a frozen teacher over all orientations of the complete image, decorrelated. The
targets are fixed, so that nothing can collapse, and they are computed once. What remains is a plain encoder, whose one
forward pass stands for eight.
"""

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import PartialState
from sklearn.decomposition import PCA
from sklearn.preprocessing import StandardScaler
from torch import nn
from transformers import ViTConfig, ViTMAEForPreTraining, ViTModel, ViTPreTrainedModel
from transformers.utils import ModelOutput

from galaxy_mae.data.batches import GalaxyBatches, dihedral_views
from galaxy_mae.data.pretraining import PretrainingData, framed
from galaxy_mae.errors import UserError
from galaxy_mae.evaluation.features import features_file, orientation_features, ring_weights, rings_of_orientations
from galaxy_mae.files import atomic_file
from galaxy_mae.model.compute import measure_cost
from galaxy_mae.model.encoder import Encoder, encoder_fingerprint, load_encoder
from galaxy_mae.model.mae import encoder_of
from galaxy_mae.model.saved_model import SavedModel
from galaxy_mae.provenance import is_main_process
from galaxy_mae.training.arguments import PretrainingArguments
from galaxy_mae.training.pretraining import DISTILL, PretrainingTrainer, note_origin
from galaxy_mae.training.recipe import Recipe

logger = logging.getLogger(__name__)

TARGETS = "targets.npy"  # in the folder of a run
NUM_TARGETS = 256  # principal components
_FITTED_ON = 20_000  # training galaxies at most


@dataclass(frozen=True)
class Targets:
    """What is learned: (N, K) float32, a row for each galaxy of the run; and how tokens are pooled for it.

    `pooling` is (patches, rings) float32, whose columns have the weights of the patches in a ring.
    """

    values: np.ndarray
    pooling: np.ndarray


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
            logger.info("--distill %s: its features over eight orientations of %s images", source, len(data.pixels))
            with atomic_file(path) as tmp_path, tmp_path.open("wb") as out:
                np.save(out, _targets(teacher, data, recipe.training.device.type, recipe.training.bf16))
    grid = (recipe.galaxies.image_size // recipe.model.patch_size,) * 2
    return Targets(np.load(path).astype(np.float32), ring_weights(rings_of_orientations(grid), grid))


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
        path = features_file(galaxies, fingerprint, bf16, "_dihedral")
        parts.append(orientation_features(teacher.model, batches, path, bf16, dihedral_views))
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
    """Trains a `Student` with the encoder of an autoencoder; what is not here is as in the first stage."""

    def __init__(self, model: ViTMAEForPreTraining, options: PretrainingArguments, *, targets: Targets, **kwargs):
        student, values = Student(encoder_of(model), targets, options.seed), torch.from_numpy(targets.values)
        image = torch.zeros(1, model.config.num_channels, model.config.image_size, model.config.image_size)
        super().__init__(student, options, flops_per_image=measure_cost(student, image, values[:1])[0], **kwargs)
        self.targets, self.attention_order = values.to(self.args.device), []

    def prepare_batch(self, batch: dict[str, torch.Tensor], training: bool) -> dict[str, torch.Tensor]:
        """`pixel_values` (B, 3, S, S) and `targets` (B, K), both float32."""
        step = self.sampler.random_step(self.state.global_step)
        transform = self.batches.train_transform(batch, step) if training else self.batches.eval_transform(batch)
        return {"pixel_values": transform, "targets": self.targets[batch["index"].to(self.args.device)]}

    def losses_of(self, prepared: dict[str, torch.Tensor], output: StudentOutput) -> torch.Tensor:
        """The loss of each image, (B,)."""
        return output.losses

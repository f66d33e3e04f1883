"""Classifiers of frozen features. `methods.METHODS` names each of them; its function here has that name.

A function gets the encoders of one initialization and returns what its classifiers say of the test galaxies. It must
not see a test label. One more classifier is one more function, and its row in the table.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TypeVar

import numpy as np
from transformers import PreTrainedModel

from galaxy_mae.data.images import area_average
from galaxy_mae.errors import UserError
from galaxy_mae.evaluation import probes
from galaxy_mae.evaluation.features import (
    Features,
    cache_patch_tokens,
    features_file,
    frozen_features,
    merge_rings,
    orientation_features,
    ring_choices,
)
from galaxy_mae.evaluation.preparation import Evaluation
from galaxy_mae.evaluation.probes import C_GRID, COARSE_C_GRID, FeaturesAndLabels, Probe
from galaxy_mae.evaluation.results import Fit
from galaxy_mae.files import temporary_folder
from galaxy_mae.model.encoder import encoder_fingerprint

logger = logging.getLogger(__name__)
T = TypeVar("T")

RAW_SIZE = 32  # image width of the baseline on raw pixels


@dataclass(frozen=True)
class FrozenEncoder:
    """An encoder whose features are classified."""

    evaluation: Evaluation
    model: PreTrainedModel
    seeds: Sequence[int]  # those for which it stands: its own if it is random, all if it is pre-trained
    train: np.ndarray  # (n,) int64, sample indices of the galaxies that are learned from

    def cached(self, compute: Callable[..., T], kind: str) -> T:
        """Features of all galaxies, from the cache if they were computed before."""
        evaluation, encoder = self.evaluation, self.evaluation.encoder
        fingerprint = encoder_fingerprint(self.model, encoder.mean, encoder.std, encoder.image_size)
        path = features_file(evaluation.galaxies, fingerprint, evaluation.recipe.training.bf16, kind)
        return compute(self.model, evaluation.batches, path, evaluation.recipe.training.bf16)

    @cached_property
    def features(self) -> Features:
        """Of one view of all galaxies."""
        return self.cached(frozen_features, "")

    def sets(self, features: np.ndarray) -> list[FeaturesAndLabels]:
        """What is learned from, and the complete validation set; `features` are of all galaxies, here and below."""
        rows, label = (self.train, self.evaluation.labelled.validation), self.evaluation.labelled.label
        return [FeaturesAndLabels(features[x], label[x]) for x in rows]

    def fit_linear_probe(self, features: np.ndarray, c_grid: Sequence[float] = C_GRID) -> Probe:
        """A linear probe of features."""
        return probes.linear_probe(*self.sets(features), c_grid)

    def fit_best(self, name: str, choices: dict[T, Callable[[], np.ndarray]]) -> tuple[Probe, np.ndarray]:
        """The linear probe of the features that are best on the validation set, and these, the first of equally good.

        `choices` make the features. Which one was selected is `name` in the hyper-parameters.
        """
        scores = {
            choice: self.fit_linear_probe(compute(), COARSE_C_GRID).best_params["validation_accuracy"]
            for choice, compute in choices.items()
        }
        best = max(scores, key=scores.get)
        features = choices[best]()
        probe = self.fit_linear_probe(features)
        probe.best_params.update({name: best, f"validation_scores_by_{name}": {str(x): y for x, y in scores.items()}})
        return probe, features

    @cached_property
    def linear(self) -> tuple[Probe, np.ndarray]:
        """The linear probe of the features of `--pooling`, and these features."""
        pooling = self.evaluation.recipe.evaluation.pooling
        if pooling == "radial":
            return self.radial
        features = self.features.pooled(pooling)
        return self.fit_linear_probe(features), features

    @cached_property
    def radial(self) -> tuple[Probe, np.ndarray]:
        """The linear probe of means over rings about the center, whose number is selected, and these means.

        Raises:
            UserError: the patches are too few for rings.
        """
        rings, grid = self.features.rings, self.features.grid
        if not ring_choices(grid):
            raise UserError(f"--pooling radial: {grid[0]} x {grid[1]} patches are too few for rings")
        return self.fit_best("num_rings", {n: partial(merge_rings, rings, n, grid) for n in ring_choices(grid)})

    def classify(self, probe: Probe, features: np.ndarray) -> Fit:
        """What a probe that does not depend on a seed says of the test galaxies."""
        return Fit.of(self.seeds[0], probe.probabilities(features[self.evaluation.split["test"]]), probe.best_params)


def linear_probe(encoders: Sequence[FrozenEncoder]) -> list[Fit]:
    """Of the features of `--pooling`."""
    return [encoder.classify(*encoder.linear) for encoder in encoders]


def radial_probe(encoders: Sequence[FrozenEncoder]) -> list[Fit]:
    """Of means over rings; nothing if there are too few patches for rings."""
    grid = encoders[0].features.grid
    if not ring_choices(grid):
        logger.info("%d x %d patches are too few for rings: no radial probe", *grid)
        return []
    return [encoder.classify(*encoder.radial) for encoder in encoders]


def orientation_probe(encoders: Sequence[FrozenEncoder]) -> list[Fit]:
    """Of the mean over orientations, or of mean and std, whichever is better on the validation set.

    The std of an encoder that has learned to give all orientations the same features is noise.
    """
    fits = []
    for encoder in encoders:
        both = encoder.cached(orientation_features, "_orientations")
        choices = {"mean": lambda both=both: both[:, : both.shape[1] // 2], "mean and std": lambda both=both: both}
        fits.append(encoder.classify(*encoder.fit_best("orientations", choices)))
    return fits


def best_layer(encoders: Sequence[FrozenEncoder]) -> list[Fit]:
    """Linear probe at the layer of the first encoder that is best on the validation set; k-NN of every layer, too."""
    encoder = encoders[0]
    layers = [*encoder.features.layers, encoder.features.mean]
    scores = {"linear_probe": [], "knn": []}
    for features in layers:
        probe = encoder.fit_linear_probe(features, COARSE_C_GRID)
        train, validation = encoder.sets(features)
        predicted = probes.knn_classifier(train).probabilities(validation.features).argmax(axis=1)
        scores["linear_probe"].append(probe.best_params["validation_accuracy"])
        scores["knn"].append(float(np.mean(predicted == validation.label)))
    best = int(np.argmax(scores["linear_probe"]))
    probe = encoder.fit_linear_probe(layers[best])
    probe.best_params.update({"layer": best + 1, "validation_accuracy_by_layer": scores})
    return [encoder.classify(probe, layers[best])]


def knn(encoders: Sequence[FrozenEncoder]) -> list[Fit]:
    """Of the features of the linear probe."""
    pooled = [(encoder, encoder.linear[1]) for encoder in encoders]
    return [encoder.classify(probes.knn_classifier(encoder.sets(x)[0]), x) for encoder, x in pooled]


def nearest_centroid(encoders: Sequence[FrozenEncoder]) -> list[Fit]:
    """Of the features of the linear probe."""
    pooled = [(encoder, encoder.linear[1]) for encoder in encoders]
    return [encoder.classify(probes.nearest_centroid(encoder.sets(x)[0]), x) for encoder, x in pooled]


def raw_pixels(encoders: Sequence[FrozenEncoder]) -> list[Fit]:
    """A linear probe of images averaged over areas to 32 x 32 (or as they are, if smaller), without an encoder."""
    encoder, galaxies = encoders[0], encoders[0].evaluation.galaxies
    pixels, size = galaxies.pixels, min(RAW_SIZE, galaxies.image_size)
    chunks = [area_average(np.array(pixels[start : start + 256]), size) for start in range(0, len(pixels), 256)]
    features = np.concatenate(chunks).reshape(len(pixels), -1).astype(np.float32)
    return [encoder.classify(encoder.fit_linear_probe(features), features)]


def attentive_probe(encoders: Sequence[FrozenEncoder]) -> list[Fit]:
    """Of the patch tokens, from every seed."""
    evaluation, parts, fits = encoders[0].evaluation, ("train", "validation", "test"), []
    rows, label = [evaluation.split[part] for part in parts], evaluation.labelled.label
    for encoder in encoders:
        with temporary_folder(evaluation.folder) as folder:
            bf16, indices = evaluation.recipe.training.bf16, np.concatenate(rows)
            tokens = cache_patch_tokens(encoder.model, evaluation.batches, indices, folder, bf16)
            *learned, test = np.split(tokens, np.cumsum([len(x) for x in rows])[:-1])
            train, validation = (FeaturesAndLabels(x, label[y]) for x, y in zip(learned, rows, strict=False))
            queries = probes.attention_queries(encoder.model.config, tokens.shape[2])
            for seed in encoder.seeds:
                probe = probes.attentive_probe(train, validation, queries, seed, evaluation.batches.device)
                fits.append(Fit.of(seed, probe.probabilities(test), probe.best_params))
    return fits

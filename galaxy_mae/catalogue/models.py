"""What a catalogue is computed with: one or several classifiers, or an encoder with or without a linear probe."""

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from transformers import PreTrainedModel

from galaxy_mae.data.batches import GalaxyBatches
from galaxy_mae.data.cache import open_galaxies
from galaxy_mae.data.fits import Stretch
from galaxy_mae.data.frame import Frame
from galaxy_mae.data.images import image_statistics
from galaxy_mae.data.seen import TrainingImages, frame_of
from galaxy_mae.data.split import split_galaxies
from galaxy_mae.errors import UserError, first_line
from galaxy_mae.evaluation.features import encode, encode_orientations, iterate_images, mean_pool
from galaxy_mae.evaluation.fine_tuning import FINISHED, labelled_split, pool_and_classify
from galaxy_mae.evaluation.probes import FeaturesAndLabels, Probe, linear_probe
from galaxy_mae.model.classifier import Classifier, load_classifier
from galaxy_mae.model.compute import select_attn_implementation
from galaxy_mae.model.encoder import Encoder, encoder_fingerprint, load_encoder
from galaxy_mae.model.saved_model import TRAINING_IMAGES, LoadedModel, SavedModel, model_path
from galaxy_mae.predictions.schema import add_predictions, flags

_SPLIT_SEED = 0  # of the data set of a linear probe


@dataclass(frozen=True)
class CatalogueModel(LoadedModel):
    """Classifiers that differ in their seed, the first of which is `model`; or an encoder.

    Attributes:
        fingerprint: hex SHA-256 of everything that its outputs depend on besides the pixels.
        embedding_fingerprint: of an encoder, the same without its probe; of classifiers, `fingerprint`.
        class_names: of the classes 0, 1, ...; empty for an encoder without a probe.
        seeds: of the classifiers; empty if there is one, or none.
        classifiers: in the order of the seeds; empty for an encoder.
        probe: classifies the features of the encoder; None without labels.
        orientations: whether these are mean and std over orientations, not the mean patch token.
        device, bf16: where it runs, and whether in bfloat16.
    """

    fingerprint: str
    embedding_fingerprint: str
    device: str
    bf16: bool
    class_names: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()
    classifiers: tuple[PreTrainedModel, ...] = ()
    probe: Probe | None = None
    orientations: bool = False

    @cached_property
    def looks(self) -> TrainingImages | None:
        """How the images look that it was trained on; None if its files do not say so."""
        try:
            return self.training_images and TrainingImages.parse(self.training_images)
        except (ArithmeticError, ValueError, TypeError) as error:
            fix = "copy the model again, or delete that file to go without its warnings"
            raise UserError(f"--model {self.name}: {TRAINING_IMAGES}: {first_line(error)[:200]}; {fix}") from error

    @property
    def frame(self) -> Frame:
        """In which it was trained."""
        return frame_of(self.training_images)

    @property
    def looks_fingerprint(self) -> str | None:
        """Of `training_images`, on which a column and a flag of the predictions depend."""
        return self.training_images and _combined([json.dumps(self.training_images)], ())[:16]

    @property
    def num_features(self) -> int:
        """The length of an embedding."""
        _, features = next(self.outputs(np.zeros((1, self.image_size, self.image_size, 3), np.uint8)))
        return features.shape[1]

    def predict(
        self,
        galaxies: pa.Table,
        pixels: np.ndarray,
        problem: np.ndarray,
        blank: np.ndarray,
        embedding_type: type[np.floating] | None,
        nan_fraction: np.ndarray | None = None,
    ) -> pa.Table:
        """The predictions of N galaxies, whose known columns come first.

        Args:
            galaxies: N rows, with the column `radius` of `frame.geometry` if it was measured.
            pixels: (N, S, S, 3) uint8.
            problem, blank, nan_fraction: (N,) str, bool and float32, as of `Galaxies`.
            embedding_type: of the column `embedding`; None leaves it out.
        """
        probabilities, features = zip(*self.outputs(pixels), strict=True)
        measured = galaxies["radius"].to_numpy() if "radius_arcsec" in galaxies.column_names else None
        statistics = image_statistics(pixels)
        far = self.looks and self.looks.distance(statistics)
        return add_predictions(
            galaxies,
            self.class_names,
            np.concatenate(probabilities, axis=1) if self.class_names else None,
            flag=flags(statistics, problem, blank, nan_fraction, measured, far),
            problem=problem,
            nan_fraction=nan_fraction,
            far_from_training=far,
            embedding=np.concatenate(features).astype(embedding_type) if embedding_type else None,
        )

    def batches(self, pixels: np.ndarray) -> GalaxyBatches:
        """Images, (N, S, S, 3) uint8, as the network takes them."""
        return GalaxyBatches(pixels, self.mean, self.std, self.image_size, self.device)

    @torch.no_grad()
    def outputs(self, pixels: np.ndarray) -> Iterator[tuple[np.ndarray | None, np.ndarray]]:
        """Yield class probabilities and features of images, (N, S, S, 3) uint8, in order.

        Probabilities are (classifiers, b, classes) float64, or None for an encoder without a probe. Features, (b,
        features) float32, are what the head of the first classifier sees, or the encoder's.
        """
        # All batches are full: the last bits of an image's outputs depend on the size of its batch, else on no other.
        batches, left = self.batches(pixels), len(pixels)
        size = batches.inference_batch_size
        indices = np.minimum(np.arange(-(-left // size) * size), left - 1)
        for probabilities, features in self._outputs(batches, indices):
            yield None if probabilities is None else probabilities[:, :left], features[:left]
            left -= len(features)

    def features(self, batches: GalaxyBatches, indices: np.ndarray) -> Iterator[np.ndarray]:
        """Yield an encoder's features of images in order: mean and std over orientations, or the mean patch token."""
        if self.orientations:
            yield from encode_orientations(self.model, batches, indices, self.bf16)
        else:
            for *_, last in encode(self.model, batches, indices, self.bf16):
                yield mean_pool(last)

    def _outputs(self, batches: GalaxyBatches, indices: np.ndarray) -> Iterator[tuple[np.ndarray | None, np.ndarray]]:
        if not self.classifiers:
            for features in self.features(batches, indices):
                yield self.probe and self.probe.probabilities(features)[None], features
            return
        for model in self.classifiers:
            select_attn_implementation(model.to(batches.device), batches.device, self.bf16)
        for images in iterate_images(batches, indices):
            pooled, probabilities = zip(
                *(pool_and_classify(m, images, self.bf16) for m in self.classifiers), strict=True
            )
            yield torch.stack(probabilities).cpu().numpy(), pooled[0].cpu().numpy()


def open_model(
    source: str | Encoder,
    labels: str | None = None,
    stretch: Stretch = Stretch(),  # noqa: B008 (frozen)
    frame: Frame | None = None,
    device: str = "cpu",
    bf16: bool = False,
    orientations: bool = False,
) -> CatalogueModel:
    """Open what `--model` names.

    Args:
        source: the folder of a fine-tuned classifier, of a fine-tuning method (`seed_0`, `seed_1`, ...), one with
            `classifier/` in it, of an encoder or of a run of main.py; or a Hub id. Or an encoder that was loaded.
        labels: a labelled data set, to whose training and validation galaxies a linear probe of the encoder is fitted.
        stretch, frame: of its images; None is the model's own frame.
        device, bf16, orientations: as of `CatalogueModel`.

    Raises:
        UserError: no such model, one that cannot be loaded, seeds that are unfinished or do not fit together; labels
            or orientations for a classifier, or labels that no probe can be fitted to.
    """
    encoder, source = (source, source.name) if isinstance(source, Encoder) else (None, source)
    folder = model_path(source)
    seeds = sorted(int(path.name[5:]) for path in folder.glob("seed_*") if path.name[5:].isdecimal())
    locations = [str(folder / f"seed_{seed}") for seed in seeds]
    if (folder / "classifier").is_dir():
        locations = [str(folder / "classifier")]
    location = str(folder) if folder.is_dir() else source
    if not encoder and (locations or SavedModel.find(location, "--model").is_classifier):
        for flag, given in (("--orientations", orientations), ("--labels", labels)):
            if given:
                raise UserError(f"{flag}: --model {source} is a classifier; this is for an encoder")
        classifiers = _load_classifiers(source, locations or [location], bool(seeds))
        first, class_names = classifiers[0], classifiers[0].class_names
        more = {"seeds": tuple(seeds), "classifiers": tuple(c.model for c in classifiers)}
        fingerprint = _combined([_fingerprint(c) for c in classifiers], class_names)
    else:
        first, class_names = encoder or load_encoder(location, flag="--model"), ()
        more = {"orientations": orientations}
        fingerprint = _combined([_fingerprint(first), "orientations"], ()) if orientations else _fingerprint(first)
    loaded = {f.name: getattr(first, f.name) for f in dataclasses.fields(LoadedModel)} | {"name": source}
    model = CatalogueModel(
        **loaded,
        **more,
        class_names=class_names,
        fingerprint=fingerprint,
        embedding_fingerprint=fingerprint,
        device=device,
        bf16=bf16,
    )
    return _with_probe(model, labels, stretch, frame or model.frame) if labels else model


def _load_classifiers(source: str, locations: list[str], are_seeds: bool) -> list[Classifier]:
    """The classifiers in some folders, which must be finished and alike if they are seeds of a method."""
    for path in map(Path, locations if are_seeds else ()):
        if not (path / FINISHED).is_file():
            raise UserError(
                f"--model {source}: {path.name} is not finished; run linear_probe_checkpoints.py again, or give the "
                "folder of one seed"
            )
    first, *others = classifiers = [load_classifier(location) for location in locations]
    for other in others:
        settings = ((c.class_names, c.image_size, c.mean.tolist(), c.std.tolist()) for c in (first, other))
        if len(set(map(str, settings))) > 1:
            raise UserError(
                f"--model {source}: {Path(other.name).name} has other classes, another image size or another "
                f"normalization than {Path(first.name).name}"
            )
    return classifiers


def _fingerprint(loaded: LoadedModel) -> str:
    return encoder_fingerprint(loaded.model, loaded.mean, loaded.std, loaded.image_size)


def _with_probe(model: CatalogueModel, labels: str, stretch: Stretch, frame: Frame) -> CatalogueModel:
    """Fit a linear probe to the training galaxies of a data set, its penalty chosen on the validation galaxies."""
    galaxies = open_galaxies(labels, model.image_size, stretch=stretch, frame=frame, flag="--labels")
    labelled = labelled_split(galaxies, split_galaxies(galaxies, _SPLIT_SEED), "--labels")
    batches, parts = model.batches(galaxies.pixels), []
    for indices in (labelled.train, labelled.validation):
        features = np.concatenate(list(model.features(batches, indices)))
        parts.append(FeaturesAndLabels(features, labelled.label[indices]))
    names, fingerprints = galaxies.class_names, [model.fingerprint, galaxies.fingerprint]
    return replace(model, probe=linear_probe(*parts), class_names=names, fingerprint=_combined(fingerprints, names))


def _combined(fingerprints: list[str], class_names: tuple[str, ...]) -> str:
    return hashlib.sha256(json.dumps([fingerprints, class_names]).encode()).hexdigest()

"""The five methods: an encoder, labelled galaxies and a method's name -> scores and predictions.

What is learnt or chosen comes from training and validation rows; the classes of the test rows are looked at in one
place, `Evaluation.write`, when everything else is done. A method's result is a JSON file and a Parquet file of its own,
so that the tasks of an array can share a folder; the JSON is written last and says that the method is finished.
"""

import json
import logging
import shutil
import tempfile
import time
from dataclasses import dataclass, field
from json import JSONDecodeError
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock
from transformers import ViTModel

from galaxy_mae import provenance
from galaxy_mae.atomic import atomic_file, write_json
from galaxy_mae.batches import GalaxyBatches
from galaxy_mae.callbacks import finish_wandb, start_wandb
from galaxy_mae.classifier import Encoder, build_classifier, encoder_fingerprint, random_encoder
from galaxy_mae.download import cache_folder
from galaxy_mae.errors import UserError
from galaxy_mae.fine_tuning import LabelledRows, classify, fine_tune
from galaxy_mae.galaxy10 import split_fingerprint
from galaxy_mae.probe import (
    Examples,
    Probe,
    attention_probe,
    choose_pooling,
    linear_probe,
    nearest_class_mean,
    nearest_neighbours,
    pooled_features,
    tokens_on_disk,
)
from galaxy_mae.recipe import EvaluationRecipe
from galaxy_mae.scores import all_scores
from galaxy_mae.sources import Galaxies, area_average

logger = logging.getLogger(__name__)

METHODS = ("zero_shot", "random_linear_probe", "ssl_linear_probe", "random_fine_tune", "ssl_fine_tune")
UNTRAINED_DRAWS = 10  # initialisations of the zero-shot method
RAW_SIZE = 32  # pixels across, of the baseline that sees no encoder


@dataclass
class Evaluation:
    """An encoder, a split, and the folder of the results.

    Attributes:
        recipe: all that was asked for.
        encoder: the pre-trained one.
        galaxies: the opened source, with labels.
        rows: the split.
        batches: makes the images.
        folder: where results are written.
        identity: what the results depend on, as in the folder's `evaluation.json`.
        results: of the method that runs, by name.
    """

    recipe: EvaluationRecipe
    encoder: Encoder
    galaxies: Galaxies
    rows: dict[str, np.ndarray]
    batches: GalaxyBatches
    folder: Path
    identity: dict[str, Any]
    results: dict[str, dict] = field(default_factory=dict)

    def __post_init__(self) -> None:
        first = self.recipe.training.seed
        self.seeds = list(range(first, first + self.recipe.evaluation.seeds))
        self.bf16 = self.recipe.training.bf16
        self.labelled = labelled_rows(self.galaxies, self.rows)

    # ------------------------------------------------------------------------------------------------- the five methods

    def run(self, method: str) -> None:
        """Run a method and write its results, unless they are there."""
        if is_finished(self.folder, method) and not self.recipe.evaluation.rerun:
            logger.info("%s: finished before; --rerun runs it again", method)
            return
        provenance.wait_for_forerunner(self.folder / f".{method}.lock")
        lock = provenance.lock(self.folder / f".{method}.lock")
        logger.info("%s", method)
        self.started, self.results = time.monotonic(), {}
        work = self.folder / method
        if self.recipe.evaluation.rerun:
            (self.folder / f"{method}.json").unlink(missing_ok=True)
            shutil.rmtree(work, ignore_errors=True)
        failure = failure_file(self.folder, method)
        failure.unlink(missing_ok=True)
        try:
            arm = method.split("_")[0]
            if method == "zero_shot":
                self._zero_shot()
            elif method.endswith("linear_probe"):
                self._frozen(arm)
            else:
                self._fine_tune(arm)
            self._log_to_wandb(method)
        except Exception as error:
            failure.write_text(f"{type(error).__name__}: {' '.join(str(error).split())}\n")  # for the report
            raise
        lock.release()

    def _zero_shot(self) -> None:
        """Random encoders with untrained heads classify the test galaxies."""
        seeds = list(range(self.seeds[0], self.seeds[0] + UNTRAINED_DRAWS))
        probabilities = []
        for seed in seeds:
            model = build_classifier(self._random_encoder(seed), self.galaxies.class_names, seed)
            model = model.to(self.batches.device).eval()
            probabilities.append(classify(model, self.batches, self.rows["test"], self.bf16))
        self.write("zero_shot", probabilities, seeds, {}, self._without_learning())

    def _without_learning(self) -> dict:
        """What needs no network: chance, and the most frequent class of the training rows."""
        most = int(np.bincount(self.labelled.label[self.rows["train"]]).argmax())
        accuracy = float(np.mean(self.galaxies.label[self.rows["test"]] == most))
        return {
            "chance": 1 / len(self.galaxies.class_names),
            "majority_class": {"name": self.galaxies.class_names[most], "accuracy": accuracy},
        }

    def _frozen(self, arm: str) -> None:
        """k-NN, nearest class mean, attention probe and linear probe on the frozen features of an arm's encoders."""
        encoders = [self._random_encoder(seed) for seed in self.seeds] if arm == "random" else [self.encoder.model]
        features = [self._features(encoder) for encoder in encoders]
        self._probe(f"{arm}_knn", [nearest_neighbours(self._train(x)) for x in features], features)
        self._probe(f"{arm}_nearest_class_mean", [nearest_class_mean(self._train(x)) for x in features], features)
        if arm == "random":
            raw = self._raw_pixels()
            self._probe("raw_pixels", [linear_probe(self._train(raw), self._validation(raw))], [raw])
        self._attention_probe(arm, encoders)
        fitted = [linear_probe(self._train(x), self._validation(x)) for x in features]
        self._probe(f"{arm}_linear_probe", fitted, features)

    def _fine_tune(self, arm: str) -> None:
        """Fine-tune from every seed; only then classify the test galaxies, as they are and in eight views."""
        method = f"{arm}_fine_tune"
        fitted = []
        for seed in self.seeds:
            encoder = self._random_encoder(seed) if arm == "random" else self.encoder.model
            name, folder = f"{method}/seed_{seed}", self.folder / method / f"seed_{seed}"
            self._start_wandb(name)
            fitted.append(fine_tune(encoder, self.batches, self.labelled, self.recipe.training, folder, seed))
            finish_wandb()
        chosen = {str(seed): choice for seed, (_, choice) in zip(self.seeds, fitted, strict=True)}
        for name, eightfold in ((f"{method}_eightfold", True), (method, False)):
            probabilities = [
                classify(model, self.batches, self.rows["test"], self.bf16, eightfold) for model, _ in fitted
            ]
            self.write(name, probabilities, self.seeds, chosen)

    # ------------------------------------------------------------------------------------------------- frozen features

    def _random_encoder(self, seed: int) -> ViTModel:
        return random_encoder(self.encoder.model.config, seed)

    def _features(self, encoder: ViTModel) -> np.ndarray:
        """Frozen features of all rows, from the cache if they were computed before."""
        name = encoder_fingerprint(encoder, self.encoder.mean, self.encoder.deviation)[:16]
        folder = cache_folder() / self.galaxies.fingerprint[:16] / "features"
        path = folder / f"{name}_{'bfloat16' if self.bf16 else 'float32'}.npz"
        return choose_pooling(pooled_features(encoder, self.batches, path, self.bf16), self.recipe.evaluation.pooling)

    def _raw_pixels(self) -> np.ndarray:
        """(N, 3072) float32: the images area-averaged to 32 x 32 (as they are, where smaller)."""
        pixels, size = self.galaxies.pixels, min(RAW_SIZE, self.galaxies.image_size)
        slabs = [area_average(np.array(pixels[start : start + 256]), size) for start in range(0, len(pixels), 256)]
        return np.concatenate(slabs).reshape(len(pixels), -1).astype(np.float32)

    def _train(self, features: np.ndarray) -> Examples:
        return Examples(features[self.labelled.train], self.labelled.label[self.labelled.train])

    def _validation(self, features: np.ndarray) -> Examples:
        return Examples(features[self.labelled.validation], self.labelled.label[self.labelled.validation])

    def _probe(self, name: str, fitted: list[Probe], features: list[np.ndarray]) -> None:
        """Write what fitted probes say of the test rows of their features."""
        seeds = self.seeds[: len(fitted)]
        chosen = {str(seed): probe.chosen for seed, probe in zip(seeds, fitted, strict=True)}
        test = self.rows["test"]
        self.write(name, [p.probabilities(x[test]) for p, x in zip(fitted, features, strict=True)], seeds, chosen)

    def _attention_probe(self, arm: str, encoders: list[ViTModel]) -> None:
        """An attention probe from every seed: on its own random encoder, or on the one pre-trained encoder."""
        probabilities, chosen = [], {}
        seeds_of = [[seed] for seed in self.seeds] if arm == "random" else [self.seeds]
        for encoder, seeds in zip(encoders, seeds_of, strict=True):
            with tempfile.TemporaryDirectory(dir=self.folder, prefix=".tokens.") as folder:
                tokens = tokens_on_disk(encoder, self.batches, self._all_rows(), Path(folder), self.bf16)
                train, validation, test = self._parts(tokens)
                for seed in seeds:
                    probe = attention_probe(
                        Examples(train, self.labelled.label[self.labelled.train]),
                        Examples(validation, self.labelled.label[self.labelled.validation]),
                        encoder.config.num_attention_heads,
                        seed,
                        self.batches.device,
                    )
                    probabilities.append(probe.probabilities(test))
                    chosen[str(seed)] = probe.chosen
        self.write(f"{arm}_attention_probe", probabilities, self.seeds, chosen)

    def _all_rows(self) -> np.ndarray:
        return np.concatenate([self.rows[part] for part in ("train", "validation", "test")])

    def _parts(self, values: np.ndarray) -> list[np.ndarray]:
        """What belongs to training, validation and test rows, of an array in the order of `_all_rows`."""
        return np.split(values, np.cumsum([len(self.rows["train"]), len(self.rows["validation"])]))

    # ------------------------------------------------------------------------------------------------------ the results

    def write(
        self,
        name: str,
        probabilities: list[np.ndarray],
        seeds: list[int],
        chosen: dict[str, dict],
        more: dict | None = None,
    ) -> None:
        """Score predictions of the test rows and write them: NAME.parquet, then NAME.json.

        Args:
            name: of the result.
            probabilities: (M, classes) float64 of the M test rows, one a seed.
            seeds: as many.
            chosen: hyper-parameters by seed.
            more: other entries of the JSON file.
        """
        test = self.rows["test"]
        predicted = np.stack([p.argmax(axis=1) for p in probabilities])
        with atomic_file(self.folder / f"{name}.parquet") as aside:
            pq.write_table(self._table(predicted, probabilities, seeds), aside)
        result = {
            "method": name,
            **all_scores(self.galaxies.label[test], predicted, self.galaxies.class_names),
            "seeds": seeds,
            "chosen": chosen,
            **(more or {}),
            **self.identity,
            **provenance.session(),
            "seconds": round(time.monotonic() - self.started, 1),
        }
        write_json(self.folder / f"{name}.json", result)
        self.results[name] = result
        low, high = result["interval"]
        logger.info("  %-28s %.2f %% (%.2f to %.2f)", name, *(100 * x for x in (result["accuracy"], low, high)))

    def _table(self, predicted: np.ndarray, probabilities: list[np.ndarray], seeds: list[int]) -> pa.Table:
        """A row a test galaxy: where it is, its class, the predicted class of every seed, mean probabilities."""
        test, galaxies = self.rows["test"], self.galaxies
        nowhere = np.full(len(test), np.nan)
        columns = {
            "row": test,
            "ra": nowhere if galaxies.ra is None else galaxies.ra[test],
            "dec": nowhere if galaxies.dec is None else galaxies.dec[test],
            "label": galaxies.label[test],
        }
        columns |= {f"predicted_seed_{seed}": p for seed, p in zip(seeds, predicted, strict=True)}
        mean = np.mean(probabilities, axis=0)
        columns |= {f"probability_{c}": mean[:, c] for c in range(mean.shape[1])}
        return pa.table(columns)

    def _start_wandb(self, name: str) -> bool:
        if "wandb" not in self.recipe.training.report_to:
            return False
        start_wandb(self.folder / name, f"{self.folder.name}/{name}", self.identity, group=self.folder.name)
        return True

    def _log_to_wandb(self, method: str) -> None:
        """One W&B run a method: the scores and the confusion matrix of every result that it wrote."""
        if not self._start_wandb(method):
            return
        import wandb  # only where it is reported to

        test = self.galaxies.label[self.rows["test"]]
        for name, result in self.results.items():
            scores = {key: result[key] for key in ("accuracy", "balanced_accuracy", "macro_f1")}
            scores |= {"interval_low": result["interval"][0], "interval_high": result["interval"][1]}
            table = pq.read_table(self.folder / f"{name}.parquet")
            matrix = wandb.plot.confusion_matrix(
                y_true=test.tolist(),
                preds=table[f"predicted_seed_{result['seeds'][0]}"].to_pylist(),
                class_names=list(self.galaxies.class_names),
                title=f"{name}, seed {result['seeds'][0]}",
            )
            wandb.log({f"{name}/{key}": value for key, value in scores.items()} | {f"{name}/confusion_matrix": matrix})
        finish_wandb()


# ------------------------------------------------------------------------------------------- what goes in, and where to


def labelled_rows(galaxies: Galaxies, rows: dict[str, np.ndarray]) -> LabelledRows:
    """Training and validation rows with their classes, and nobody else's.

    Raises:
        UserError: no labels, a part without rows, or a class without training rows.
    """
    if galaxies.label is None:
        raise UserError(f"--dataset {galaxies.name}: it has no labels; an evaluation needs the class of each galaxy")
    for part in ("train", "validation", "test"):
        if len(rows[part]) == 0:
            raise UserError(f"--dataset {galaxies.name}: the split leaves no {part} rows; use more galaxies")
    known = np.full(len(galaxies), -1)
    for part in ("train", "validation"):
        known[rows[part]] = galaxies.label[rows[part]]
    counts = np.bincount(known[rows["train"]], minlength=len(galaxies.class_names))
    for c in np.flatnonzero(counts == 0):
        raise UserError(
            f"--dataset {galaxies.name}: class {c} ({galaxies.class_names[c]}) has no training rows: nothing can learn "
            "it; add galaxies of it, or leave the class out of the labels"
        )
    if len(counts) < 2:
        raise UserError(f"--dataset {galaxies.name}: it has a single class; there is nothing to tell apart")
    return LabelledRows(rows["train"], rows["validation"], known, galaxies.class_names)


def refuse_unfit(encoder: Encoder, galaxies: Galaxies, rows: dict[str, np.ndarray]) -> None:
    """Raise a `UserError` where an encoder cannot be judged by these galaxies.

    Their images are smaller than the encoder's; or it was pre-trained on another split of the same galaxies, and so
    perhaps on those it would now be tested on.
    """
    size = encoder.model.config.image_size
    if galaxies.native_size < size:
        raise UserError(
            f"--encoder {encoder.name}: it takes images of {size} x {size}, and those of {galaxies.name} are only "
            f"{galaxies.native_size} x {galaxies.native_size}; pre-train with --image_size {galaxies.native_size}"
        )
    trained = encoder.pretraining
    if trained and trained.get("data") == galaxies.fingerprint and trained.get("split") != split_fingerprint(rows):
        raise UserError(
            f"--encoder {encoder.name}: it was pre-trained on another split of these galaxies (--split_seed "
            f"{trained.get('split_seed')}), and would be tested on galaxies that it has seen; use that --split_seed"
        )


def claim_folder(folder: Path, identity: dict[str, Any]) -> None:
    """Keep a results folder to one encoder, data set, split and recipe: write `evaluation.json`, or compare with it.

    Raises:
        UserError: the folder holds results of another one.
    """
    path = folder / "evaluation.json"
    with FileLock(folder / ".evaluation.lock"):  # the tasks of an array start at once
        if not path.exists():
            write_json(path, identity)
            return
        before = read_json(path)
    names = {"dataset_name", "encoder_name", "class_names"}  # data and weights are known by their fingerprints
    changed = [
        f"{key} {before.get(key)} there, {identity.get(key)} here"
        for key in sorted((set(before) | set(identity)) - names)
        if before.get(key) != identity.get(key)
    ]
    if changed:
        raise UserError(
            f"{folder} holds results of another evaluation: {'; '.join(changed)}; choose another --output_dir"
        )


def is_finished(folder: Path, method: str) -> bool:
    """Whether a method's result is there."""
    return (folder / f"{method}.json").is_file()


def failure_file(folder: Path, method: str) -> Path:
    """Where a method that failed leaves its error, until it is started again."""
    return folder / f"{method}.failed"


def read_json(path: Path) -> dict:
    """A file that this package wrote, or a `UserError` where it was damaged."""
    try:
        return json.loads(path.read_text())
    except (JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); delete it and run the method again") from error

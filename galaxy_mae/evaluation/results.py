"""What a results folder holds: one JSON and one Parquet file per result, and the configuration that they share.

`evaluation.json` restricts a folder to one encoder, data set, split and recipe. A method's JSON file is written last
and marks the method as finished, so the tasks of an array can share a folder.
"""

import hashlib
import json
import logging
import time
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from galaxy_mae import provenance
from galaxy_mae.data.cache import Galaxies
from galaxy_mae.errors import UserError
from galaxy_mae.evaluation.calibration import at_temperature, calibration_scores
from galaxy_mae.evaluation.scores import Estimate, accuracy, all_scores, percent
from galaxy_mae.files import atomic_file, locked, read_json, write_json

logger = logging.getLogger(__name__)

METHODS = ("zero_shot", "random_linear_probe", "ssl_linear_probe", "random_fine_tune", "ssl_fine_tune")
FINE_TUNES = tuple(name for name in METHODS if name.endswith("_fine_tune"))

_FIX = "delete it and run a method again"
_IDENTITY = {"dataset": str, "split": str, "encoder": str, "recipe": dict}  # what a result depends on, with its types
_CONFIG = _IDENTITY | {"class_names": [str], "encoder_name": str, "dataset_name": str, "pretraining": dict | None}
_CONFIG |= {"model": {str: int}, "split_sizes": {str: int}}
_CONFIG |= {"hub_ids": {"dataset": str | None, "encoder": str | None}}
_CALIBRATION = {"ece": float, "ece_per_seed": [float], "ece_if_calibrated": float, "ece_of_mean": float}
_CALIBRATION |= {"reliability": [{"bin": int, "galaxies": int, "confidence": float, "accuracy": float}]}
_RESULT = _IDENTITY | {
    "accuracy": float,
    "interval": [float],
    "macro_f1": float,
    "per_class": {str: {"recall": float, "test_images": int}},
    "confusion_matrix": [[int]],
    "test_images": int,
    "seeds": [int],
    "device": str,
    "commit": str | None,
    "versions": {str: str},
    "calibration": _CALIBRATION,
}
_FINE_TUNE = {"calibration": _CALIBRATION | {"before": _CALIBRATION}, "best_params": {str: {"temperature": float}}}
_BEST_LAYER = {"validation_accuracy_by_layer": {"linear_probe": [float], "knn": [float]}}
_BEST_LAYER |= {"best_params": {str: {"layer": int}}}
_ZERO_SHOT = {"accuracy_per_seed": [float], "chance": float, "majority_class": {"name": str, "accuracy": float}}
_POINT = {"classifier": str, "labels": int, "draws": int, "accuracy": float, "interval": [float]}
_FEW_LABELS = _IDENTITY | {"dataset_name": str, "training_galaxies": int, "label_fractions": list, "points": [_POINT]}
_FEW_LABELS |= {"seen_in_pretraining": dict | None}


def check_or_write_config(folder: Path, config: dict[str, Any]) -> None:
    """Write `evaluation.json`, or compare the configuration with the one in the folder.

    Raises:
        UserError: the folder holds results of another evaluation.
    """
    path = folder / "evaluation.json"
    with locked(folder / ".evaluation.lock"):  # the tasks of an array start at the same time
        if not path.exists():
            write_json(path, config)
            return
        before = read_json(path, _FIX, _CONFIG)
    # Data and weights are compared by their fingerprints, recipes field by field. An encoder may have lost its origin.
    names = ("dataset", "split", "encoder", "seen_in_pretraining")
    identities = ({name: about.get(name) for name in names} | about["recipe"] for about in (before, config))
    if changed := provenance.differences(*identities, set()):
        raise UserError(f"{folder} holds results of another evaluation: {changed}; choose another --output_dir")


def is_finished(folder: Path, name: str) -> bool:
    """Whether a result is there."""
    return (folder / f"{name}.json").is_file()


def failure_file(folder: Path, method: str) -> Path:
    """Where a failed method leaves its error, until it is started again."""
    return folder / f"{method}.failed"


def rerun_file(folder: Path, method: str) -> Path:
    """Is there from the deletion of a method's old results, for `--rerun`, until it is finished again."""
    return folder / f".{method}.rerun"


@dataclass
class ResultWriter:
    """Scores predictions of the test galaxies and writes them. Nothing else compares with the labels of the test set.

    Attributes:
        folder: of the results.
        galaxies: the opened data set, with labels.
        test: (M,) int64, sample indices of the test set.
        config: what the results depend on, as in `evaluation.json`.
        written: the results of the method that runs, by name.
        started: when that method started, by `time.monotonic`.
    """

    folder: Path
    galaxies: Galaxies
    test: np.ndarray
    config: dict[str, Any]
    written: dict[str, dict] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)

    def begin_method(self) -> None:
        """Start the clock of a method, which may write several results."""
        self.started, self.written = time.monotonic(), {}

    def run_id(self, name: str) -> str:
        """The id of a fine-tuning, such as `ssl_fine_tune/seed_0`: a hash of its name and all that it depends on."""
        identity = json.dumps([name, *(self.config[key] for key in _IDENTITY)], sort_keys=True)
        return hashlib.sha256(identity.encode()).hexdigest()[:16]

    @property
    def label(self) -> np.ndarray:
        """(M,) int64: the classes of the test galaxies."""
        return self.galaxies.label[self.test]

    def fraction_of_class(self, c: int) -> float:
        """The fraction of test galaxies of a class: the accuracy of always predicting it."""
        return float(np.mean(self.label == c))

    def write(
        self,
        name: str,
        probabilities: list[np.ndarray],
        seeds: list[int],
        best_params: dict[str, dict],
        more: dict | None = None,
        temperatures: list[float] | None = None,
    ) -> Estimate:
        """Write NAME.parquet, then NAME.json.

        Args:
            name: of the result.
            probabilities: (M, classes) float64 of the test galaxies, one per seed.
            seeds: the seed of each.
            best_params: selected hyper-parameters by seed.
            more: other entries of the JSON file.
            temperatures: by which the logits of each seed were divided. With them the file also says how the
                probabilities were calibrated before.

        Returns:
            The accuracy.
        """
        predicted = np.stack([p.argmax(axis=1) for p in probabilities])
        calibration = calibration_scores(probabilities, self.label)
        if temperatures is not None:
            before = [at_temperature(p, 1 / t) for p, t in zip(probabilities, temperatures, strict=True)]
            calibration["before"] = calibration_scores(before, self.label)
        with atomic_file(self.folder / f"{name}.parquet") as tmp_path:
            pq.write_table(self._table(predicted, probabilities, seeds), tmp_path)
        result = {
            "method": name,
            **all_scores(self.label, predicted, self.galaxies.class_names),
            "calibration": calibration,
            "seeds": seeds,
            "best_params": best_params,
            **(more or {}),
            **self.config,
            **provenance.session(),
            "seconds": round(time.monotonic() - self.started, 1),
        }
        write_json(self.folder / f"{name}.json", result)
        self.written[name] = result
        return Estimate(result["accuracy"], *result["interval"])

    def write_few_labels(
        self, name: str, predictions: dict[tuple[str, int], list[tuple[np.ndarray, dict]]], more: dict
    ) -> None:
        """Write NAME.parquet and NAME.json of classifiers that learned from few labels.

        Args:
            name: of the result.
            predictions: by classifier and number of labels, of each draw of the labels: (M,) predicted classes, and
                selected hyper-parameters.
            more: other entries of the JSON file.
        """
        columns, points = {"index": self.test, "label": self.label}, []
        for (classifier, labels), draws in predictions.items():
            predicted = np.stack([p for p, _ in draws])
            estimate = accuracy(self.label, predicted)
            columns |= {f"{classifier}_{labels}_draw_{i}": p for i, p in enumerate(predicted)}
            points.append(
                {
                    "classifier": classifier,
                    "labels": labels,
                    "draws": len(draws),
                    "accuracy": estimate.value,
                    "interval": [estimate.low, estimate.high],
                    "accuracy_per_draw": [float(np.mean(p == self.label)) for p in predicted],
                    "best_params": [best_params for _, best_params in draws],
                }
            )
            logger.info("  %s, %s, %s labels: %s", name, classifier, f"{labels:,}", percent(estimate))
        with atomic_file(self.folder / f"{name}.parquet") as tmp_path:
            pq.write_table(pa.table(columns), tmp_path)
        write_json(self.folder / f"{name}.json", {**more, "points": points, **self.config, **provenance.session()})

    def _table(self, predicted: np.ndarray, probabilities: list[np.ndarray], seeds: list[int]) -> pa.Table:
        """One row per test galaxy: index, position, class, predicted class of each seed, mean probabilities."""
        galaxies = self.galaxies
        unknown = np.full(len(self.test), np.nan)
        columns = {
            "index": self.test,
            "ra": unknown if galaxies.ra is None else galaxies.ra[self.test],
            "dec": unknown if galaxies.dec is None else galaxies.dec[self.test],
            "label": self.label,
        }
        columns |= {f"predicted_seed_{seed}": p for seed, p in zip(seeds, predicted, strict=True)}
        mean = np.mean(probabilities, axis=0)
        columns |= {f"probability_{c}": mean[:, c] for c in range(mean.shape[1])}
        return pa.table(columns)


@dataclass(frozen=True)
class Result:
    """A result file and its predictions."""

    name: str
    about: dict
    path: Path

    @property
    def estimate(self) -> Estimate:
        """Accuracy with its interval."""
        return Estimate(self.about["accuracy"], *self.about["interval"])

    @cached_property
    def _table(self) -> pa.Table:
        try:
            return pq.read_table(self.path)
        except (OSError, ValueError) as error:
            raise UserError(f"{self.path}: cannot be read; {_write_again(self.path.parent, self.name)}") from error

    @property
    def label(self) -> np.ndarray:
        """(M,) int64: the classes of the test galaxies."""
        return self._table["label"].to_numpy()

    @property
    def rows(self) -> np.ndarray:
        """(M,) int64: the test galaxies' rows of the data set."""
        return self._table["index"].to_numpy()

    @property
    def probabilities(self) -> np.ndarray:
        """(M, classes) float64, means over seeds."""
        columns = (self._table[f"probability_{c}"].to_numpy() for c in range(len(self.about["per_class"])))
        return np.stack(list(columns), axis=1)

    @property
    def positions(self) -> np.ndarray:
        """(M, 2) float64: right ascension and declination of the test galaxies in degrees, NaN if unknown."""
        return np.stack([self._table[name].to_numpy() for name in ("ra", "dec")], axis=1)

    @property
    def predicted(self) -> np.ndarray:
        """(seeds, M) int64."""
        return np.stack([self._table[f"predicted_seed_{seed}"].to_numpy() for seed in self.about["seeds"]])


def read_config(folder: Path) -> dict[str, Any]:
    """The configuration of a results folder.

    Raises:
        UserError: there are no results, or the file is damaged.
    """
    path = folder / "evaluation.json"
    if not path.is_file():
        raise UserError(
            f"--output_dir {folder}: no results there; run linear_probe_checkpoints.py without --report first"
        )
    return read_json(path, _FIX, _CONFIG)


def read_result(folder: Path, name: str, config: dict[str, Any]) -> Result:
    """Read a result and check that it belongs to the folder's configuration.

    Raises:
        UserError: it is damaged or belongs to another evaluation.
    """
    path, fix = folder / f"{name}.json", _write_again(folder, name)
    special = {"zero_shot": _ZERO_SHOT, "random_best_layer": _BEST_LAYER, "ssl_best_layer": _BEST_LAYER}
    special |= dict.fromkeys(FINE_TUNES, _FINE_TUNE)
    about = read_json(path, fix, _RESULT | special.get(name, {}))
    for key in _IDENTITY:
        if about[key] != config[key]:
            raise UserError(f"{path}: its {key} is not that of evaluation.json; {fix}")
    return Result(name, about, folder / f"{name}.parquet")


@dataclass(frozen=True)
class FewLabels:
    """A result of `ResultWriter.write_few_labels`."""

    about: dict
    path: Path

    def points(self, classifier: str) -> list[dict]:
        """What was measured with a classifier, by increasing number of labels."""
        found = (point for point in self.about["points"] if point["classifier"] == classifier)
        return sorted(found, key=lambda point: point["labels"])

    @cached_property
    def _table(self) -> pa.Table:
        try:
            return pq.read_table(self.path)
        except (OSError, ValueError) as error:
            raise UserError(f"{self.path}: cannot be read; {_few_labels_again(self.path)}") from error

    @property
    def label(self) -> np.ndarray:
        """(M,) int64: the classes of the test galaxies."""
        return self._table["label"].to_numpy()

    def predicted(self, point: dict) -> np.ndarray:
        """(draws, M) int64."""
        name = f"{point['classifier']}_{point['labels']}_draw"
        return np.stack([self._table[f"{name}_{draw}"].to_numpy() for draw in range(point["draws"])])


def read_few_labels(folder: Path, name: str, config: dict[str, Any]) -> FewLabels:
    """Read a result of few labels.

    Args:
        folder: of the results.
        name: of the result.
        config: of the folder, to which the result must belong; a transfer has another data set.

    Raises:
        UserError: it is damaged or belongs to another evaluation.
    """
    path = folder / f"{name}.json"
    about = read_json(path, _few_labels_again(path), _FEW_LABELS)
    for key in ("encoder", "recipe") if name.startswith("transfer") else _IDENTITY:
        if about[key] != config[key]:
            raise UserError(f"{path}: its {key} is not that of evaluation.json; {_few_labels_again(path)}")
    return FewLabels(about, path.with_suffix(".parquet"))


def _few_labels_again(path: Path) -> str:
    return f"delete {path.with_suffix('.json')} and run its method again with --label_fractions or --transfer"


def _write_again(folder: Path, name: str) -> str:
    """How a result is written again: its method is run, which for an additional baseline has another name."""
    method = "random_linear_probe" if name == "raw_pixels" else name.removesuffix("_tta")
    if method.endswith("_from_scratch"):
        flag = f"--baseline {method.removesuffix('_from_scratch')}"
        return f"delete {folder / method}.json and run linear_probe_checkpoints.py {flag} again"
    if method not in METHODS:
        method = f"{method.split('_')[0]}_linear_probe"
    return f"delete {folder / method}.json and run linear_probe_checkpoints.py --method {method} again"

"""What a results folder holds: one JSON and one Parquet file per result, and the configuration that they share.

`evaluation.json` restricts a folder to one encoder, data set, split and recipe. A method's JSON file is written last
and marks the method as finished, so the tasks of an array can share a folder.
"""

import hashlib
import json
import logging
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from galaxy_mae import provenance
from galaxy_mae.data.cache import Galaxies
from galaxy_mae.data.images import image_statistics
from galaxy_mae.errors import UserError
from galaxy_mae.evaluation.calibration import at_temperature, calibration_scores
from galaxy_mae.evaluation.methods import BY_NAME, Method, command_of
from galaxy_mae.evaluation.scores import Estimate, accuracy, all_scores, percent
from galaxy_mae.files import locked, read_json, write_json
from galaxy_mae.predictions.formats import read_catalogue, write_catalogue
from galaxy_mae.predictions.schema import Predictions, add_predictions, class_column, flags, galaxy_table

logger = logging.getLogger(__name__)

_FIX = "delete it and run a method again"
_IDENTITY = ("dataset", "split", "encoder", "recipe")  # what a result depends on


def check_or_write_config(folder: Path, config: dict[str, Any]) -> None:
    """Write `evaluation.json`, or raise a `UserError` if the one in the folder is of another evaluation."""
    path = folder / "evaluation.json"
    with locked(folder / ".evaluation.lock"):  # the tasks of an array start at the same time
        if not path.exists():
            write_json(path, config)
            return
        before = read_json(path, _FIX, _IDENTITY)
    # Data and weights are compared by their fingerprints, recipes field by field. An encoder may have lost its origin.
    names = ("dataset", "split", "encoder", "seen_in_pretraining")
    identities = ({name: about.get(name) for name in names} | about["recipe"] for about in (before, config))
    if changed := provenance.differences(*identities, set()):
        raise UserError(f"{folder} holds results of another evaluation: {changed}; choose another --output_dir")


def is_finished(folder: Path, name: str) -> bool:
    """Whether a result is there."""
    return (folder / f"{name}.json").is_file()


def few_labels_name(method: Method, dataset: str | None = None) -> str:
    """The name of a method's result of few labels; on other galaxies if the fingerprint of their data set is given."""
    return f"transfer_{dataset[:12]}_{method.name}" if dataset else f"label_efficiency_{method.name}"


def failure_file(folder: Path, method: str) -> Path:
    """Where a failed method leaves its error, until it is started again."""
    return folder / f"{method}.failed"


def other_datasets(folder: Path) -> list[str]:
    """Beginnings of the fingerprints of the data sets of `--transfer`, of which results are there."""
    return sorted({path.name.split("_")[1] for path in folder.glob("transfer_*.json")})


@dataclass(frozen=True)
class Fit:
    """A classifier that was fitted once, and what it says of the M test galaxies."""

    seed: int  # or the number of the draw of the labels
    predicted: np.ndarray  # (M,) int64
    best_params: dict[str, Any] | None  # selected hyper-parameters; None if nothing was learned
    probabilities: np.ndarray | None = None  # (M, classes) float64; None where only the predicted classes were kept

    @classmethod
    def of(cls, seed: int, probabilities: np.ndarray, best_params: dict[str, Any] | None) -> "Fit":
        """A fit that predicts the most probable classes."""
        return cls(seed, probabilities.argmax(axis=1), best_params, probabilities)


@dataclass(frozen=True)
class ResultWriter:
    """Scores predictions of the test galaxies and writes them. Nothing else compares with the labels of the test set.

    `test` holds their sample indices, (M,) int64; `config` is what the results depend on, as in `evaluation.json`;
    `reading` how their images were made, as the provenance of predictions has it.
    """

    folder: Path
    galaxies: Galaxies
    test: np.ndarray
    config: dict[str, Any]
    reading: dict[str, Any] = field(default_factory=dict)

    def run_id(self, name: str) -> str:
        """The id of a fine-tuning, such as `ssl_fine_tune/seed_0`: a hash of its name and all that it depends on."""
        identity = json.dumps([name, *(self.config[key] for key in _IDENTITY)], sort_keys=True)
        return hashlib.sha256(identity.encode()).hexdigest()[:16]

    @property
    def label(self) -> np.ndarray:
        """(M,) int64."""
        return self.galaxies.label[self.test]

    def fraction_of_class(self, c: int) -> float:
        """The fraction of test galaxies of a class: the accuracy of always predicting it."""
        return float(np.mean(self.label == c))

    def write(self, name: str, fits: dict[tuple[str, int], list[Fit]], more: dict[str, Any]) -> None:
        """Write NAME.parquet, then NAME.json.

        Args:
            name: of a method, or of a result of few labels.
            fits: by classifier and number of labels, one from each seed or on each draw of the labels. Of a method it
                is a single entry, with probabilities.
            more: other entries of the JSON file.
        """
        if method := BY_NAME.get(name):
            (fitted,) = fits.values()
            result, table = self._scores(method, fitted), self._predictions(fitted)
            logger.info("  %-28s %s", name, percent(Estimate(result["accuracy"], *result["interval"])))
        else:
            result = {"points": [self._point(name, *key, fitted) for key, fitted in fits.items()]}
            table = self._predictions_of_draws(fits)
        result |= more | self.config | provenance.session()
        write_catalogue(self.folder / f"{name}.parquet", [table], self._about(name, result))
        write_json(self.folder / f"{name}.json", result)

    def _scores(self, method: Method, fits: list[Fit]) -> dict[str, Any]:
        probabilities = [fit.probabilities for fit in fits]
        calibration = calibration_scores(probabilities, self.label)
        if method.classifier == "fine_tune":  # its logits were divided by a temperature
            temperatures = [fit.best_params["temperature"] for fit in fits]
            before = [at_temperature(p, 1 / t) for p, t in zip(probabilities, temperatures, strict=True)]
            calibration["before"] = calibration_scores(before, self.label)
        return {
            "method": method.name,
            **all_scores(self.label, np.stack([fit.predicted for fit in fits]), self.galaxies.class_names),
            "calibration": calibration,
            "seeds": [fit.seed for fit in fits],
            "best_params": {str(fit.seed): fit.best_params for fit in fits if fit.best_params is not None},
        }

    def _point(self, name: str, classifier: str, labels: int, fits: list[Fit]) -> dict[str, Any]:
        predicted = np.stack([fit.predicted for fit in fits])
        estimate = accuracy(self.label, predicted)
        logger.info("  %s, %s, %s labels: %s", name, classifier, f"{labels:,}", percent(estimate))
        return {
            "classifier": classifier,
            "labels": labels,
            "draws": len(fits),
            "accuracy": estimate.value,
            "interval": [estimate.low, estimate.high],
            "accuracy_per_draw": [float(np.mean(p == self.label)) for p in predicted],
            "best_params": [fit.best_params for fit in fits],
        }

    def _predictions(self, fits: list[Fit]) -> pa.Table:
        probabilities, seeds = np.stack([fit.probabilities for fit in fits]), [fit.seed for fit in fits]
        names, table = self.galaxies.class_names, galaxy_table(self.galaxies, self.test)
        more = {"flag": self._flag, "problem": self.galaxies.problem[self.test], "nan_fraction": self._nan_fraction}
        return add_predictions(table, names, probabilities, seeds=seeds, **more)

    def _predictions_of_draws(self, fits: dict[tuple[str, int], list[Fit]]) -> pa.Table:
        """The test galaxies with a column for every draw of the labels."""
        table, names = galaxy_table(self.galaxies, self.test), self.galaxies.class_names
        for (classifier, labels), draws in fits.items():
            for i, fit in enumerate(draws):
                description = f"the most probable class by {classifier}, draw {i} of {labels} labels"
                column, values = class_column(_column(classifier, labels, i), description, fit.predicted, names)
                table = table.append_column(column, pa.array(values, pa.string()))
        return table

    @cached_property
    def _flag(self) -> np.ndarray:
        pixels, *known = (x[self.test] for x in (self.galaxies.pixels, self.galaxies.problem, self.galaxies.blank))
        return flags(image_statistics(pixels), *known, self._nan_fraction)

    @property
    def _nan_fraction(self) -> np.ndarray | None:
        return None if self.galaxies.nan_fraction is None else self.galaxies.nan_fraction[self.test]

    def _about(self, name: str, result: dict[str, Any]) -> dict[str, Any]:
        """The provenance of the predictions."""
        model = {"name": f"{name} of {result['encoder_name']}", "fingerprint": result["encoder"]}
        return {
            "model": model | {"seeds": result.get("seeds", [])},
            "class_names": list(self.galaxies.class_names),
            "dataset": self.galaxies.name,
            "dataset_fingerprint": self.galaxies.fingerprint,
            "image_size": result["model"]["image_size"],
            **self.reading,
            "commit": result["commit"],
            "versions": result["versions"],
            "created": result["started"],
        }


def _column(classifier: str, labels: int, draw: int) -> str:
    """Name of the column of what a classifier predicts that learned from a draw of the labels."""
    return f"predicted_class_{classifier}_{labels}_draw_{draw}"


@dataclass(frozen=True)
class Result:
    """The result of a method, or of few labels: the content of its JSON file, and the predictions beside it."""

    name: str
    about: dict
    folder: Path

    @property
    def estimate(self) -> Estimate:
        """Accuracy of a method with its interval."""
        return Estimate(self.about["accuracy"], *self.about["interval"])

    @cached_property
    def predictions(self) -> Predictions:
        """Of the test galaxies. Raises a `UserError` if the file is damaged."""
        return read_catalogue(self.folder / f"{self.name}.parquet", _write_again(self.folder, self.name))

    def points(self, classifier: str) -> list[dict]:
        """What was measured with a classifier and few labels, by increasing number of labels."""
        found = (point for point in self.about["points"] if point["classifier"] == classifier)
        return sorted(found, key=lambda point: point["labels"])

    def predicted_at(self, point: dict) -> np.ndarray:
        """What was predicted at one of the points: (draws, M) int64."""
        names = (_column(point["classifier"], point["labels"], draw) for draw in range(point["draws"]))
        return np.stack([self.predictions.codes(name) for name in names])


def read_config(folder: Path) -> dict[str, Any]:
    """The configuration of a results folder; a `UserError` if it holds no results, or the file is damaged."""
    path = folder / "evaluation.json"
    if not path.is_file():
        raise UserError(f"--output_dir {folder}: no results there; run linear_probe_checkpoints.py without --report")
    return read_json(path, _FIX, _IDENTITY)


def read_result(folder: Path, name: str, config: dict[str, Any]) -> Result:
    """Read a result, of a method or of few labels; a `UserError` if it is damaged or of another configuration."""
    path, fix = folder / f"{name}.json", _write_again(folder, name)
    about = read_json(path, fix, _IDENTITY)
    for key in ("encoder", "recipe") if name.startswith("transfer_") else _IDENTITY:
        if about[key] != config[key]:
            raise UserError(f"{path}: its {key} is not that of evaluation.json; {fix}")
    return Result(name, about, folder)


def _write_again(folder: Path, name: str) -> str:
    """How a result is written again: its method is run, which for an additional baseline has another name."""
    if name not in BY_NAME:
        return f"delete {folder / name}.json and run its method again with --label_fractions or --transfer"
    method = BY_NAME[name]
    return f"delete {folder / method.run_by}.json and run linear_probe_checkpoints.py {command_of(method)} again"

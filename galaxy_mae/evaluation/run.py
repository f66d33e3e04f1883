"""The five methods, which turn an encoder and labelled galaxies into scores and predictions.

Everything that is learned or selected comes from the training and validation set. Only `results.ResultWriter` compares
predictions with the classes of the test galaxies.
"""

import contextlib
import copy
import logging
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from transformers import PreTrainedModel

from galaxy_mae import provenance
from galaxy_mae.data.batches import GalaxyBatches
from galaxy_mae.data.cache import Galaxies, open_galaxies
from galaxy_mae.data.download import cache_folder
from galaxy_mae.data.images import area_average
from galaxy_mae.data.seen import describe_seen, find_seen_galaxies
from galaxy_mae.data.split import split_fingerprint, split_galaxies
from galaxy_mae.errors import UserError
from galaxy_mae.evaluation.features import (
    Features,
    cache_patch_tokens,
    check_image_size,
    frozen_features,
    merge_rings,
    orientation_features,
    ring_choices,
)
from galaxy_mae.evaluation.fine_tuning import LabelledSplit, classify, fine_tune, labelled_split
from galaxy_mae.evaluation.label_efficiency import TRANSFER_LABELS, LabelSubset, label_subsets
from galaxy_mae.evaluation.probes import (
    C_GRID,
    COARSE_C_GRID,
    FeaturesAndLabels,
    Probe,
    attention_queries,
    attentive_probe,
    knn_classifier,
    linear_probe,
    nearest_centroid,
)
from galaxy_mae.evaluation.results import (
    ResultWriter,
    check_or_write_config,
    failure_file,
    is_finished,
    read_few_labels,
    read_result,
    rerun_file,
)
from galaxy_mae.evaluation.scores import percent
from galaxy_mae.files import claim, make_output_folder, read_json, remove_leftovers, temporary_folder, write_json
from galaxy_mae.model.backbone import baseline_config, has_classifier, num_channels
from galaxy_mae.model.classifier import build_classifier
from galaxy_mae.model.compute import measure_classifier
from galaxy_mae.model.encoder import Encoder, encoder_fingerprint, load_encoder, random_encoder
from galaxy_mae.training.arguments import FineTuningArguments
from galaxy_mae.training.recipe import EvaluationRecipe, global_batch_size, set_batch_and_learning_rate
from galaxy_mae.training.tracking import finish_run, log_scores, start_evaluation

logger = logging.getLogger(__name__)

NUM_RANDOM_INITS = 10  # of the zero-shot method
# An epoch of fine-tuning on few labels repeats them until it is as long as this fraction of a complete epoch.
MIN_EPOCH = 0.2
RAW_SIZE = 32  # image width of the baseline on raw pixels


@dataclass
class Evaluation:
    """An encoder, a split, and the methods that can be run on them.

    Attributes:
        recipe: the configuration.
        encoder: the pre-trained one.
        galaxies: the opened data set, with labels.
        split: sample indices.
        labelled: what may be learned from.
        batches: makes the images.
        writer: scores and writes predictions of the test galaxies.
        transfer: the same encoder and folder with the galaxies of `--transfer`; None without it.
    """

    recipe: EvaluationRecipe
    encoder: Encoder
    galaxies: Galaxies
    split: dict[str, np.ndarray]
    labelled: LabelledSplit
    batches: GalaxyBatches
    writer: ResultWriter
    transfer: "Evaluation | None" = None

    def __post_init__(self) -> None:
        first = self.recipe.training.seed
        self.seeds = list(range(first, first + self.recipe.evaluation.seeds))
        self.bf16 = self.recipe.training.bf16
        self.folder = self.writer.folder

    # ------------------------------------------------------------------------------------------------- the five methods

    def begin_rerun(self, methods: Sequence[str]) -> None:
        """Delete the results of methods, unless a rerun of them was begun and not ended: that one is resumed."""
        for method in methods:
            begun = rerun_file(self.folder, method)
            with claim(self._lock_file(method)):
                if begun.exists():
                    logger.info("%s: resuming the rerun that was begun", method)
                    continue
                for path in (self.folder / f"{method}.json", *self.folder.glob(f"*_{method}.json")):
                    path.unlink(missing_ok=True)
                shutil.rmtree(self.folder / method, ignore_errors=True)
                begun.touch()  # last: what is there from now on belongs to the rerun

    def end_rerun(self, methods: Sequence[str]) -> None:
        """Note that methods were rerun: the next `begin_rerun` deletes their results again."""
        for method in methods:
            rerun_file(self.folder, method).unlink(missing_ok=True)

    def supported(self, methods: Sequence[str]) -> tuple[str, ...]:
        """The methods that this architecture has; a line in the log names the others."""
        if has_classifier(self.encoder.model.config):
            return tuple(methods)
        probes = tuple(method for method in methods if method.endswith("linear_probe"))
        kind, left_out = self.encoder.model.config.model_type, ", ".join(x for x in methods if x not in probes)
        logger.info("transformers has no classifier of a %s: it is not fine-tuned (%s)", kind, left_out)
        return probes

    def run(self, method: str) -> None:
        """Run a method and write its results, or what of them is missing."""
        with claim(self._lock_file(method)):
            unfinished = self._unfinished(method)
            if not unfinished:
                logger.info("%s: already finished; --rerun runs it again", method)
                return
            logger.info("%s", method)
            remove_leftovers(self.folder)
            self.writer.begin_method()
            failure = failure_file(self.folder, method)
            failure.unlink(missing_ok=True)
            try:
                for part in unfinished:
                    part()
                self._log_scores(method)
            except Exception as error:
                failure.write_text(f"{type(error).__name__}: {' '.join(str(error).split())}\n")  # for the report
                raise

    def _unfinished(self, method: str) -> list[Callable[[], None]]:
        """What is to be run: the method, and what goes with it on few labels."""
        parts = [] if is_finished(self.folder, method) else [partial(self._run, method)]
        name, fractions = f"label_efficiency_{method}", sorted(self.recipe.evaluation.label_fractions or [])
        if fractions and method != "zero_shot":
            found = is_finished(self.folder, name) and read_few_labels(self.folder, name, self.writer.config)
            if not found or found.about["label_fractions"] != fractions:
                sizes = [round(fraction * len(self.labelled.train)) for fraction in fractions]
                parts.append(partial(self._few_labels, name, method, sizes, fractions))
        if self.transfer and method.endswith("linear_probe"):
            name = f"transfer_{self.transfer.galaxies.fingerprint[:12]}_{method}"
            if not is_finished(self.folder, name):
                parts.append(partial(self.transfer._few_labels, name, method, TRANSFER_LABELS, []))
        return parts

    def _lock_file(self, method: str) -> Path:
        return self.folder / f".{method}.lock"

    def _run(self, method: str) -> None:
        initialization = method.split("_")[0]  # of the encoder: "random" or "ssl"
        if method == "zero_shot":
            self._zero_shot()
        elif method.endswith("linear_probe"):
            self._frozen(initialization)
        else:
            self._fine_tune(method)

    def _zero_shot(self) -> None:
        """Random encoders with untrained heads classify the test galaxies."""
        seeds = list(range(self.seeds[0], self.seeds[0] + NUM_RANDOM_INITS))
        probabilities = []
        for seed in seeds:
            model = build_classifier(self._random_encoder(seed), self.galaxies.class_names, seed)
            model = model.to(self.batches.device).eval()
            probabilities.append(classify(model, self.batches, self.split["test"], self.bf16))
        majority = int(np.bincount(self.labelled.label[self.labelled.train]).argmax())
        without_network = {
            "chance": 1 / len(self.galaxies.class_names),
            "majority_class": {
                "name": self.galaxies.class_names[majority],
                "accuracy": self.writer.fraction_of_class(majority),
            },
        }
        self._write("zero_shot", probabilities, seeds, {}, without_network)

    def _frozen(self, initialization: str) -> None:
        """Frozen features of encoders of one initialization: k-NN, nearest centroid, attentive and linear probe."""
        encoders = [self.encoder.model]
        if initialization == "random":
            encoders = [self._random_encoder(seed) for seed in self.seeds]
        frozen = [self._features(encoder) for encoder in encoders]
        self._best_layer(initialization, frozen[0])
        pooling = self.recipe.evaluation.pooling
        if pooling == "radial" or ring_choices(frozen[0].grid):
            radial = [self._linear_probe(x, "radial") for x in frozen]
            self._write_probes(f"{initialization}_radial_probe", radial)
        else:
            logger.info("%d x %d patches are too few for rings: no radial probe", *frozen[0].grid)
        if self.recipe.evaluation.orientations:
            oriented = [self._oriented(encoder) for encoder in encoders]
            probes = [(self._fit_linear_probe(x), x) for x in oriented]
            self._write_probes(f"{initialization}_orientation_probe", probes)
        else:  # a rerun without them must not leave those of the run before
            for path in self.folder.glob(f"{initialization}_orientation_probe.*"):
                path.unlink()
        linear = radial if pooling == "radial" else [self._linear_probe(x, pooling) for x in frozen]
        features = [x for _, x in linear]
        training = [self._select(x, "train") for x in features]
        for name, fit in (("knn", knn_classifier), ("nearest_centroid", nearest_centroid)):
            fitted = [(fit(examples), x) for examples, x in zip(training, features, strict=True)]
            self._write_probes(f"{initialization}_{name}", fitted)
        if initialization == "random":
            raw = self._raw_pixels()
            self._write_probes("raw_pixels", [(self._fit_linear_probe(raw), raw)])
        self._attentive_probe(initialization, encoders)
        self._write_probes(f"{initialization}_linear_probe", linear)

    def _fine_tune(self, method: str) -> None:
        """Fine-tune from every seed. Only then classify the test galaxies, without and with test-time augmentation."""
        models, best_params = [], {}
        training = self._training(method)
        for seed in self.seeds:
            encoder = self._encoder_of_seed(method, seed)
            name, folder = f"{method}/seed_{seed}", self.folder / method / f"seed_{seed}"
            self._start_run(name, "fine-tuning")
            model, best_params[str(seed)] = fine_tune(
                encoder, self.batches, self.labelled, training, folder, self.writer.run_id(name), seed
            )
            models.append(model)
            finish_run()
        for name, tta in ((f"{method}_tta", True), (method, False)):
            probabilities = [classify(m, self.batches, self.split["test"], self.bf16, tta) for m in models]
            # The mean over eight views of calibrated probabilities is not itself that of a temperature.
            temperatures = None if tta else [x["temperature"] for x in best_params.values()]
            self._write(name, probabilities, self.seeds, best_params, None, temperatures)

    # ------------------------------------------------------------------------------------------------------ few labels

    def _few_labels(self, name: str, method: str, sizes: Sequence[int], fractions: list[float]) -> None:
        """Train a method's classifiers on subsets of the training labels and write the result.

        A complete subset is the method itself. The validation set, by which all is selected, stays complete.
        """
        train, predictions = self.labelled.train, {}
        for subset in label_subsets(train, self.labelled.label[train], sizes, self.seeds[0]):
            if fractions and len(subset.rows) == len(train):
                results = self._complete(method)
            else:
                results = [self._subset(name, method, subset)]
            for by_classifier in results:
                for classifier, found in by_classifier.items():
                    predictions.setdefault((classifier, len(subset.rows)), []).append(found)
        self.writer.write_few_labels(name, predictions, {"label_fractions": fractions, "training_galaxies": len(train)})

    def _complete(self, method: str) -> list[dict[str, tuple[np.ndarray, dict]]]:
        """For every seed, by classifier, what was predicted and selected with all labels."""
        initialization, _, classifier = method.partition("_")
        names = {classifier if classifier == "linear_probe" else "fine_tune": method}
        if classifier == "linear_probe":
            more = {key: f"{initialization}_{key}" for key in ("radial_probe", "orientation_probe")}
            names |= {key: name for key, name in more.items() if is_finished(self.folder, name)}
        results = {key: read_result(self.folder, name, self.writer.config) for key, name in names.items()}
        return [
            {key: (result.predicted[i], result.about["best_params"][str(seed)]) for key, result in results.items()}
            for i, seed in enumerate(next(iter(results.values())).about["seeds"])
        ]

    def _subset(self, name: str, method: str, subset: LabelSubset) -> dict[str, tuple[np.ndarray, dict]]:
        """By classifier, what is predicted for the test galaxies and what was selected; kept in a file."""
        name = f"{name}/{len(subset.rows)}_{subset.draw}"
        folder, run_id = self.folder / method / name, self.writer.run_id(name)
        path = folder.with_name(f"{folder.name}.json")
        try:
            stored = read_json(path, "", {"run": str, "predicted": {str: [int]}, "best_params": {str: dict}})
        except (FileNotFoundError, UserError):
            stored = {"run": None}
        probe = method.endswith("linear_probe")
        oriented = probe and self.recipe.evaluation.orientations
        if stored["run"] != run_id or (oriented and "orientation_probe" not in stored["predicted"]):
            train = self._probe_subset if probe else self._fine_tune_subset
            found = train(method, subset, folder, run_id)
            stored = {
                "run": run_id,
                "predicted": {key: predicted.tolist() for key, (predicted, _) in found.items()},
                "best_params": {key: best_params for key, (_, best_params) in found.items()},
            }
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, stored)
        for file in filter(Path.is_file, folder.glob("*")):  # the classifier; logs are in folders beside it
            file.unlink()
        with contextlib.suppress(OSError):
            folder.rmdir()
        return {key: (np.array(p), stored["best_params"][key]) for key, p in stored["predicted"].items()}

    def _probe_subset(
        self, method: str, subset: LabelSubset, folder: Path, run_id: str
    ) -> dict[str, tuple[np.ndarray, dict]]:
        encoder = self._encoder_of_draw(method, subset.draw)
        frozen = self._features(encoder)
        fitted = {"linear_probe": self._linear_probe(frozen, self.recipe.evaluation.pooling, subset.rows)}
        if ring_choices(frozen.grid):
            fitted["radial_probe"] = self._linear_probe(frozen, "radial", subset.rows)
        if self.recipe.evaluation.orientations:
            features = self._oriented(encoder)
            fitted["orientation_probe"] = self._fit_linear_probe(features, subset.rows), features
        return {
            classifier: (probe.probabilities(features[self.split["test"]]).argmax(axis=1), probe.best_params)
            for classifier, (probe, features) in fitted.items()
        }

    def _fine_tune_subset(
        self, method: str, subset: LabelSubset, folder: Path, run_id: str
    ) -> dict[str, tuple[np.ndarray, dict]]:
        """As many epochs as with all labels, over a subset that is repeated."""
        training, seed = self._training(method), self.seeds[0] + subset.draw
        epoch = max(global_batch_size(training), MIN_EPOCH * len(self.labelled.train))
        rows = np.tile(subset.rows, math.ceil(epoch / len(subset.rows)))
        self._start_run(str(folder.relative_to(self.folder)), "fine-tuning")
        encoder, labelled = self._encoder_of_draw(method, subset.draw), replace(self.labelled, train=rows)
        model, best_params = fine_tune(encoder, self.batches, labelled, training, folder, run_id, seed)
        finish_run()
        predicted = classify(model, self.batches, self.split["test"], self.bf16).argmax(axis=1)
        return {"fine_tune": (predicted, best_params)}

    def _encoder_of_draw(self, method: str, draw: int) -> PreTrainedModel:
        """Random encoders take turns, so that the spread of the draws includes theirs."""
        return self._encoder_of_seed(method, self.seeds[draw % len(self.seeds)])

    # --------------------------------------------------------------------------------------- what a method starts from

    def _encoder_of_seed(self, method: str, seed: int) -> PreTrainedModel:
        if method.endswith("_from_scratch"):
            return random_encoder(baseline_config(method.removesuffix("_from_scratch")), seed)
        return self._random_encoder(seed) if method.startswith("random") else self.encoder.model

    def _training(self, method: str) -> FineTuningArguments:
        training = copy.copy(self.recipe.training)
        if method.endswith("_from_scratch"):
            training.layer_decay = 1.0  # it protects pre-trained layers, and there are none
        return training

    # ------------------------------------------------------------------------------------------------- frozen features

    def _random_encoder(self, seed: int) -> PreTrainedModel:
        return random_encoder(self.encoder.model.config, seed)

    def _features(self, encoder: PreTrainedModel) -> Features:
        """Frozen features of all galaxies, from the cache if they were computed before."""
        return frozen_features(encoder, self.batches, self._cache_file(encoder), self.bf16)

    def _oriented(self, encoder: PreTrainedModel) -> np.ndarray:
        """Frozen features over the orientations of all galaxies: (N, features) float16, cached as well."""
        path = self._cache_file(encoder)
        return orientation_features(encoder, self.batches, path.with_stem(f"{path.stem}_orientations"), self.bf16)

    def _cache_file(self, encoder: PreTrainedModel) -> Path:
        name = encoder_fingerprint(encoder, self.encoder.mean, self.encoder.std, self.encoder.image_size)[:16]
        folder = cache_folder() / self.galaxies.fingerprint[:16] / "features"
        return folder / f"{name}_{'bfloat16' if self.bf16 else 'float32'}.npz"

    def _raw_pixels(self) -> np.ndarray:
        """(N, 3072) float32: the images averaged over areas to 32 x 32 (or as they are, if smaller)."""
        pixels, size = self.galaxies.pixels, min(RAW_SIZE, self.galaxies.image_size)
        chunks = [area_average(np.array(pixels[start : start + 256]), size) for start in range(0, len(pixels), 256)]
        return np.concatenate(chunks).reshape(len(pixels), -1).astype(np.float32)

    def _select(self, features: np.ndarray, part: str) -> FeaturesAndLabels:
        """Features and labels of the training or validation set."""
        return FeaturesAndLabels(features[self.split[part]], self.labelled.label[self.split[part]])

    def _fit_linear_probe(
        self, features: np.ndarray, train: np.ndarray | None = None, c_grid: Sequence[float] = C_GRID
    ) -> Probe:
        """A linear probe; `train` are sample indices, by default those of the training set."""
        rows = self.labelled.train if train is None else train
        examples = FeaturesAndLabels(features[rows], self.labelled.label[rows])
        return linear_probe(examples, self._select(features, "validation"), c_grid)

    def _linear_probe(
        self, frozen: Features, pooling: str, train: np.ndarray | None = None
    ) -> tuple[Probe, np.ndarray]:
        """A linear probe of pooled features, and these features.

        Of `radial`, means over rings about the center, the number of rings is selected on the validation set.
        """
        if pooling != "radial":
            features = frozen.pooled(pooling)
            return self._fit_linear_probe(features, train), features
        if not ring_choices(frozen.grid):
            raise UserError(f"--pooling radial: {frozen.grid[0]} x {frozen.grid[1]} patches are too few for rings")
        scores = {}
        for num_rings in ring_choices(frozen.grid):
            features = merge_rings(frozen.rings, num_rings, frozen.grid)
            probe = self._fit_linear_probe(features, train, COARSE_C_GRID)
            scores[num_rings] = probe.best_params["validation_accuracy"]
        best = max(scores, key=scores.get)  # the fewest of equally good ones
        features = merge_rings(frozen.rings, best, frozen.grid)
        probe = self._fit_linear_probe(features, train)
        rings = {"num_rings": best, "validation_scores_by_rings": {str(n): score for n, score in scores.items()}}
        probe.best_params.update(rings)
        return probe, features

    def _best_layer(self, initialization: str, frozen: Features) -> None:
        """Linear probe and k-NN at every layer; the linear probe at the layer that is best on the validation set."""
        layers = [*frozen.layers, frozen.mean]
        scores = {"linear_probe": [], "knn": []}
        for x in layers:
            probe = self._fit_linear_probe(x, c_grid=COARSE_C_GRID)
            neighbors, validation = knn_classifier(self._select(x, "train")), self._select(x, "validation")
            correct = neighbors.probabilities(validation.features).argmax(axis=1) == validation.label
            scores["linear_probe"].append(probe.best_params["validation_accuracy"])
            scores["knn"].append(float(np.mean(correct)))
        best = int(np.argmax(scores["linear_probe"]))
        selected = self._fit_linear_probe(layers[best])
        selected.best_params["layer"] = best + 1
        more = {"validation_accuracy_by_layer": scores}
        self._write_probes(f"{initialization}_best_layer", [(selected, layers[best])], more)

    def _attentive_probe(self, initialization: str, encoders: list[PreTrainedModel]) -> None:
        """An attentive probe from every seed, each on its own random encoder or all on the pre-trained one."""
        probabilities, best_params = [], {}
        seeds_per_encoder = [[seed] for seed in self.seeds] if initialization == "random" else [self.seeds]
        parts = ("train", "validation", "test")
        indices = np.concatenate([self.split[part] for part in parts])
        ends = np.cumsum([len(self.split[part]) for part in parts])[:-1]
        for encoder, seeds in zip(encoders, seeds_per_encoder, strict=True):
            with temporary_folder(self.folder) as folder:
                tokens = cache_patch_tokens(encoder, self.batches, indices, folder, self.bf16)
                train, validation, test = np.split(tokens, ends)
                for seed in seeds:
                    probe = attentive_probe(
                        FeaturesAndLabels(train, self.labelled.label[self.labelled.train]),
                        FeaturesAndLabels(validation, self.labelled.label[self.labelled.validation]),
                        attention_queries(encoder.config, tokens.shape[2]),
                        seed,
                        self.batches.device,
                    )
                    probabilities.append(probe.probabilities(test))
                    best_params[str(seed)] = probe.best_params
        self._write(f"{initialization}_attentive_probe", probabilities, self.seeds, best_params)

    # ------------------------------------------------------------------------------------------------------ the results

    def _write_probes(self, name: str, fitted: list[tuple[Probe, np.ndarray]], more: dict | None = None) -> None:
        """Write the predictions of probes for the test galaxies, each with the features that it was fitted to."""
        seeds, test = self.seeds[: len(fitted)], self.split["test"]
        best_params = {str(seed): probe.best_params for seed, (probe, _) in zip(seeds, fitted, strict=True)}
        self._write(name, [probe.probabilities(x[test]) for probe, x in fitted], seeds, best_params, more)

    def _write(self, name: str, *result) -> None:
        logger.info("  %-28s %s", name, percent(self.writer.write(name, *result)))

    def _start_run(self, name: str, job_type: str) -> None:
        start_evaluation(self.recipe.training.report_to, self.folder, name, self.writer.config, job_type)

    def _log_scores(self, method: str) -> None:
        """One run per method: scores and confusion matrix of every result that it wrote."""
        self._start_run(method, "evaluation")
        for name, result in self.writer.written.items():
            table = pq.read_table(self.folder / f"{name}.parquet")
            predicted = table[f"predicted_seed_{result['seeds'][0]}"].to_pylist()
            log_scores(self.recipe.training.report_to, self.folder, name, result, table["label"].to_pylist(), predicted)
        finish_run()


# --------------------------------------------------------------------------------------------------------- preparation


def prepare_evaluation(recipe: EvaluationRecipe) -> Evaluation:
    """Open the encoder and the galaxies, check that they fit together, and reserve the results folder.

    Raises:
        UserError: more than one process or GPU; no such encoder or data set, or one that does not fit the other; test
            galaxies that were used in pre-training; too few galaxies; a folder with results of another evaluation.
    """
    training = recipe.training
    if training.world_size > 1:
        raise UserError("an evaluation runs in one process; run several methods at once as the tasks of an array")
    training.check_gpus()
    encoder = load_encoder(recipe.evaluation.encoder)
    _, activation_bytes = measure_classifier(encoder.model, encoder.image_size)
    set_batch_and_learning_rate(training, recipe.explicitly_set, activation_bytes)
    galaxies, split, labelled, seen, batches = _open(recipe, recipe.evaluation.dataset, encoder)
    if len(split["train"]) < (batch := global_batch_size(training)):
        raise UserError(f"{len(split['train'])} training galaxies are fewer than a batch of {batch}")
    folder, run_config = Path(training.output_dir), _run_config(recipe, encoder, galaxies, split, seen)
    transfer = _prepare_transfer(recipe, encoder, folder) if recipe.evaluation.transfer else None
    check_or_write_config(make_output_folder(folder, "--output_dir"), run_config)
    logger.info(
        "%s: %s training, %s validation, %s test galaxies; encoder %s, %.1f M parameters; on %s",
        galaxies.name,
        *(f"{len(split[part]):,}" for part in ("train", "validation", "test")),
        encoder.name,
        encoder.model.num_parameters() / 1e6,
        training.device,
    )
    writer = ResultWriter(folder, galaxies, split["test"], run_config)
    return Evaluation(recipe, encoder, galaxies, split, labelled, batches, writer, transfer)


def _open(
    recipe: EvaluationRecipe, dataset: str, encoder: Encoder
) -> tuple[Galaxies, dict[str, np.ndarray], LabelledSplit, dict[str, int] | None, GalaxyBatches]:
    """A labelled data set that fits an encoder: galaxies, split, what may be learned from, seen galaxies, batches."""
    size = encoder.image_size
    galaxies = open_galaxies(dataset, size, stretch=recipe.evaluation.stretch)
    split = split_galaxies(galaxies, recipe.evaluation.split_seed)
    labelled = labelled_split(galaxies, split)
    check_image_size(f"--encoder {encoder.name}", size, galaxies, encoder.enlarges)
    seen = count_seen_galaxies(encoder, galaxies, split["test"], recipe.evaluation.allow_seen)
    training = recipe.training
    batches = GalaxyBatches(galaxies.pixels, encoder.mean, encoder.std, size, training.device, training.seed)
    return galaxies, split, labelled, seen, batches


def _prepare_transfer(recipe: EvaluationRecipe, encoder: Encoder, folder: Path) -> Evaluation:
    """The evaluation of the same encoder on the galaxies of `--transfer`."""
    try:
        galaxies, split, labelled, seen, batches = _open(recipe, recipe.evaluation.transfer, encoder)
    except UserError as error:
        raise UserError(str(error).replace("--dataset", "--transfer")) from error
    config = _run_config(recipe, encoder, galaxies, split, seen)
    config["hub_ids"]["dataset"] = provenance.hub_id(recipe.evaluation.transfer)
    writer = ResultWriter(folder, galaxies, split["test"], config)
    return Evaluation(recipe, encoder, galaxies, split, labelled, batches, writer)


def count_seen_galaxies(
    encoder: Encoder, galaxies: Galaxies, test: np.ndarray, allow_seen: bool
) -> dict[str, int] | None:
    """Count the test galaxies that were used in the encoder's pre-training.

    Returns:
        `SeenGalaxies.counts`; None if it is not known what the encoder was pre-trained on.

    Raises:
        UserError: there are some, and they are not allowed.
    """
    if encoder.pretraining is None:
        return None
    found = find_seen_galaxies(galaxies, test, encoder.pretraining.galaxies)
    counts, rows = found.counts(), test[found.seen]
    if counts["seen"] and not allow_seen:
        recipe = encoder.pretraining.recipe
        fix = f"remove them from the data set (rows {', '.join(map(str, rows[:5]))}{', ...' * (len(rows) > 5)})"
        if recipe["data"] == galaxies.fingerprint:
            fix = f"use the pre-training's --split_seed {recipe['split_seed']}"
        raise UserError(
            f"--encoder {encoder.name}: {describe_seen(counts)} were used in its pre-training; {fix}, or set "
            "--allow_seen, which marks the report"
        )
    return counts


def _run_config(
    recipe: EvaluationRecipe,
    encoder: Encoder,
    galaxies: Galaxies,
    split: dict[str, np.ndarray],
    seen: dict[str, int] | None,
) -> dict:
    """What the results depend on."""
    config = encoder.model.config
    names = ("num_hidden_layers", "num_attention_heads", "patch_size")
    sizes = {name: value for name in names if isinstance(value := getattr(config, name, None), int)}
    sizes |= {"hidden_size": num_channels(config), "image_size": encoder.image_size}
    sizes |= {"num_parameters": encoder.model.num_parameters()}
    return {
        "dataset_name": galaxies.name,
        "dataset": galaxies.fingerprint,
        "split": split_fingerprint(split),
        "split_sizes": {part: len(rows) for part, rows in split.items()},
        "class_names": list(galaxies.class_names),
        "encoder_name": encoder.name,
        "encoder": encoder_fingerprint(encoder.model, encoder.mean, encoder.std, encoder.image_size),
        "model": sizes,
        "architecture": config.model_type,
        "hub_ids": {
            "dataset": provenance.hub_id(recipe.evaluation.dataset),
            "encoder": provenance.hub_id(recipe.evaluation.encoder),
        },
        "pretraining": encoder.pretraining and encoder.pretraining.recipe,
        "seen_in_pretraining": seen,
        "recipe": recipe.as_dict(),
    }

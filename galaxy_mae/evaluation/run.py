"""Runs the methods: turns an encoder and labelled galaxies into scores and predictions.

A method that is finished is skipped, an interrupted one is resumed, and the error of a failed one is left for the
report. A lock for each method lets the tasks of an array share the folder of the results.
"""

import logging
import shutil
import time
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from galaxy_mae.errors import UserError
from galaxy_mae.evaluation import frozen
from galaxy_mae.evaluation.few_labels import TRANSFER_LABELS, run_few_labels
from galaxy_mae.evaluation.frozen import FrozenEncoder
from galaxy_mae.evaluation.methods import ARRAY_METHODS, BASELINES, Method, written_by
from galaxy_mae.evaluation.preparation import Evaluation
from galaxy_mae.evaluation.results import Fit, failure_file, few_labels_name, is_finished, read_result
from galaxy_mae.files import claim, remove_leftovers
from galaxy_mae.model.backbone import has_classifier
from galaxy_mae.model.classifier import build_classifier
from galaxy_mae.progress import stage
from galaxy_mae.training.arguments import EvaluationArguments
from galaxy_mae.training.recipe import select_index
from galaxy_mae.training.tracking import finish_run, log_scores

logger = logging.getLogger(__name__)

NUM_RANDOM_INITS = 10  # of the zero-shot method


def selected_methods(arguments: EvaluationArguments) -> tuple[Method, ...]:
    """The method that `--baseline`, `--method` or Slurm's array task selects; empty without them, which means all."""
    if network := arguments.baseline:
        if network not in BASELINES:
            raise UserError(f"--baseline {network}: choose one of {', '.join(BASELINES)}")
        return (BASELINES[network],)
    index = select_index(arguments.method, "--method", [method.name for method in ARRAY_METHODS])
    return () if index is None else (ARRAY_METHODS[index],)


def supported_methods(evaluation: Evaluation) -> tuple[Method, ...]:
    """The array's methods that the encoder's architecture has; a line in the log names the others."""
    config = evaluation.encoder.model.config
    if has_classifier(config):
        return ARRAY_METHODS
    probes = tuple(method for method in ARRAY_METHODS if method.trained_on == "features")
    left_out = ", ".join(method.name for method in ARRAY_METHODS if method not in probes)
    logger.info("transformers has no classifier of a %s: it is not fine-tuned (%s)", config.model_type, left_out)
    return probes


def begin_rerun(folder: Path, methods: Sequence[Method]) -> None:
    """Delete the results of methods, unless a rerun of them was begun and not ended: that one is resumed."""
    for name in (method.name for method in methods):
        begun = folder / f".{name}.rerun"
        with claim(folder / f".{name}.lock"):
            if begun.exists():
                logger.info("%s: resuming the rerun that was begun", name)
                continue
            for path in (folder / f"{name}.json", *folder.glob(f"*_{name}.json")):
                path.unlink(missing_ok=True)
            shutil.rmtree(folder / name, ignore_errors=True)
            begun.touch()  # last: what is there from now on belongs to the rerun


def end_rerun(folder: Path, methods: Sequence[Method]) -> None:
    """Note that methods were rerun: the next `begin_rerun` deletes their results again."""
    for method in methods:
        (folder / f".{method.name}.rerun").unlink(missing_ok=True)


def run(method: Method, evaluation: Evaluation, *transfers: Evaluation) -> None:
    """Run a method that is not written by another one's run, and write its results, or what of them is missing.

    `transfers` are other galaxies, on which its frozen features are probed with few labels.
    """
    folder = evaluation.folder
    with claim(folder / f".{method.name}.lock"):
        complete, few_labels = is_finished(folder, method.name), _missing_few_labels(method, evaluation, transfers)
        if complete and not few_labels:
            logger.info("%s: already finished; --rerun runs it again", method.name)
            return
        logger.info("%s", method.name)
        remove_leftovers(folder)
        failure = failure_file(folder, method.name)
        failure.unlink(missing_ok=True)
        try:
            with stage(method.name):
                if not complete:
                    run_complete(method, evaluation)
                for arguments in few_labels:
                    run_few_labels(method, *arguments)
        except Exception as error:
            text = f"{type(error).__name__}: {' '.join(str(error).split())}\n"
            failure.write_text(text, encoding="utf-8")  # for the report
            raise


def _missing_few_labels(method: Method, evaluation: Evaluation, transfers: Sequence[Evaluation]) -> list[tuple]:
    """What is to be run on few labels: arguments of `run_few_labels`."""
    folder, missing = evaluation.folder, []
    name, fractions = few_labels_name(method), sorted(evaluation.recipe.evaluation.label_fractions or [])
    if fractions and method.few_labels:
        found = is_finished(folder, name) and read_result(folder, name, evaluation.writer.config)
        if not found or found.about["label_fractions"] != fractions:
            sizes = [round(fraction * len(evaluation.labelled.train)) for fraction in fractions]
            missing.append((evaluation, name, sizes, fractions))
    for other in transfers if method.trained_on == "features" else ():
        name = few_labels_name(method, other.galaxies.fingerprint)
        if not is_finished(folder, name):
            missing.append((other, name, TRANSFER_LABELS))
    return missing


def run_complete(method: Method, evaluation: Evaluation) -> None:
    """Run a method with all labels, write its result and those that go with it, and show their scores."""
    started, labels, folder = time.monotonic(), len(evaluation.labelled.train), evaluation.folder
    fitted = {"nothing": _zero_shot, "features": _frozen, "images": _fine_tune}[method.trained_on]
    left_out = ((each, []) for each in written_by(method) if each not in evaluation.written_by(method))
    for each, fits in chain(left_out, fitted(method, evaluation)):
        if fits:
            more = _chance(evaluation) if method.trained_on == "nothing" else {}
            more["seconds"] = round(time.monotonic() - started, 1)
            evaluation.writer.write(each.name, {(each.classifier, labels): fits}, more)
        else:  # a run without it must not leave that of the run before
            for path in folder.glob(f"{each.name}.*"):
                path.unlink()
    evaluation.start_tracking(method.name, "evaluation")
    for name in (each.name for each in written_by(method) if is_finished(folder, each.name)):
        result = read_result(folder, name, evaluation.writer.config)
        label, predicted = result.predictions.label.tolist(), result.predictions.predicted[0].tolist()
        log_scores(evaluation.recipe.training.report_to, folder, name, result.about, label, predicted)
    finish_run()


def _zero_shot(method: Method, evaluation: Evaluation) -> Iterator[tuple[Method, list[Fit]]]:
    """Random encoders with untrained heads."""
    names, fits = evaluation.labelled.class_names, []
    for seed in range(evaluation.seeds[0], evaluation.seeds[0] + NUM_RANDOM_INITS):
        model = build_classifier(evaluation.initial_encoder(method, seed), names, seed)
        model = model.to(evaluation.batches.device).eval()
        fits.append(Fit.of(seed, evaluation.classify(model), None))
    yield method, fits


def _chance(evaluation: Evaluation) -> dict[str, Any]:
    """Accuracies without a look at an image: of chance, and of the most frequent class of the training set."""
    labelled = evaluation.labelled
    majority = int(np.bincount(labelled.label[labelled.train]).argmax())
    most_frequent = {"name": labelled.class_names[majority], "accuracy": evaluation.writer.fraction_of_class(majority)}
    return {"chance": 1 / len(labelled.class_names), "majority_class": most_frequent}


def _frozen(method: Method, evaluation: Evaluation) -> Iterator[tuple[Method, list[Fit]]]:
    """Classifiers of the frozen features of encoders of one initialization, each a function of `evaluation.frozen`."""
    seeds = evaluation.seeds
    encoders = [
        FrozenEncoder(evaluation, evaluation.initial_encoder(method, group[0]), group, evaluation.labelled.train)
        for group in ([seeds] if method.initialization == "ssl" else [[seed] for seed in seeds])
    ]
    for each in evaluation.written_by(method):
        yield each, getattr(frozen, each.classifier)(encoders)


def _fine_tune(method: Method, evaluation: Evaluation) -> Iterator[tuple[Method, list[Fit]]]:
    """Fine-tune from every seed. Only then classify the test galaxies, without and with test-time augmentation."""
    models = {
        seed: evaluation.fine_tune(method, f"{method.name}/seed_{seed}", seed, seed, evaluation.labelled)
        for seed in evaluation.seeds
    }
    for each in evaluation.written_by(method):
        tta = each.classifier == "fine_tune_tta"
        yield each, [Fit.of(seed, evaluation.classify(model, tta), x) for seed, (model, x) in models.items()]

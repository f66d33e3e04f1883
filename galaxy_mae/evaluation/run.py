"""Runs the methods: turns an encoder and labelled galaxies into scores and predictions.

A method that is finished is skipped, an interrupted one is resumed, and the error of a failed one is left for the
report. A lock for each method lets the tasks of an array share the folder of the results.
"""

import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from galaxy_mae.errors import UserError
from galaxy_mae.evaluation import frozen
from galaxy_mae.evaluation.few_labels import TRANSFER_LABELS, run_few_labels
from galaxy_mae.evaluation.frozen import FrozenEncoder
from galaxy_mae.evaluation.methods import ARRAY_METHODS, BASELINES, Method, written_by
from galaxy_mae.evaluation.preparation import Evaluation
from galaxy_mae.evaluation.results import (
    Fit,
    Outcome,
    failure_file,
    few_labels_name,
    is_finished,
    read_result,
    rerun_file,
)
from galaxy_mae.files import claim, remove_leftovers
from galaxy_mae.model.backbone import has_classifier
from galaxy_mae.model.classifier import build_classifier
from galaxy_mae.training.arguments import EvaluationArguments
from galaxy_mae.training.recipe import select_index
from galaxy_mae.training.tracking import finish_run, log_scores

logger = logging.getLogger(__name__)

NUM_RANDOM_INITS = 10  # of the zero-shot method


# ------------------------------------------------------------------------------------------------------- which and when


def selected_methods(arguments: EvaluationArguments) -> tuple[Method, ...]:
    """The method that `--baseline`, `--method` or Slurm's array task selects; empty without them, which means all.

    Raises:
        UserError: there is no such method.
    """
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
        begun = rerun_file(folder, name)
        with claim(_lock_file(folder, name)):
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
        rerun_file(folder, method.name).unlink(missing_ok=True)


def _lock_file(folder: Path, name: str) -> Path:
    return folder / f".{name}.lock"


def run(method: Method, evaluation: Evaluation, *transfers: Evaluation) -> None:
    """Run a method and write its results, or what of them is missing.

    Args:
        method: one that is not written by another one's run.
        evaluation: what it is run on.
        transfers: other galaxies, on which its frozen features are probed with few labels.
    """
    folder, writer = evaluation.folder, evaluation.writer
    with claim(_lock_file(folder, method.name)):
        unfinished = _unfinished(method, evaluation, transfers)
        if not unfinished:
            logger.info("%s: already finished; --rerun runs it again", method.name)
            return
        logger.info("%s", method.name)
        remove_leftovers(folder)
        writer.begin_method()
        failure = failure_file(folder, method.name)
        failure.unlink(missing_ok=True)
        try:
            for part in unfinished:
                part()
            _log_scores(method, evaluation)
        except Exception as error:
            failure.write_text(f"{type(error).__name__}: {' '.join(str(error).split())}\n")  # for the report
            raise


def _unfinished(method: Method, evaluation: Evaluation, transfers: Sequence[Evaluation]) -> list[Callable[[], None]]:
    """What is to be run: the method, and what goes with it on few labels."""
    folder, labels = evaluation.folder, len(evaluation.labelled.train)
    parts = [] if is_finished(folder, method.name) else [partial(run_complete, method, evaluation)]
    name, fractions = few_labels_name(method), sorted(evaluation.recipe.evaluation.label_fractions or [])
    if fractions and method.few_labels:
        found = is_finished(folder, name) and read_result(folder, name, evaluation.writer.config)
        if not found or found.about["label_fractions"] != fractions:
            sizes = [round(fraction * labels) for fraction in fractions]
            parts.append(partial(run_few_labels, method, evaluation, name, sizes, fractions))
    for other in transfers if method.trained_on == "features" else ():
        name = few_labels_name(method, other.galaxies.fingerprint)
        if not is_finished(folder, name):
            parts.append(partial(run_few_labels, method, other, name, TRANSFER_LABELS))
    return parts


def _log_scores(method: Method, evaluation: Evaluation) -> None:
    """One run per method: scores and confusion matrix of every result that it wrote."""
    evaluation.start_tracking(method.name, "evaluation")
    for result in evaluation.writer.written:
        label, predicted = result.predictions.label.tolist(), result.predictions.predicted[0].tolist()
        log_scores(evaluation.recipe.training.report_to, evaluation.folder, result.name, result.about, label, predicted)
    finish_run()


# ---------------------------------------------------------------------------------------------------------- the methods


def run_complete(method: Method, evaluation: Evaluation) -> None:
    """Run a method with all labels, and write its result and those that go with it."""
    outcomes = {"nothing": _zero_shot, "features": _frozen, "images": _fine_tune}[method.trained_on]
    labels = len(evaluation.labelled.train)
    for each, outcome in outcomes(method, evaluation):
        if outcome:
            evaluation.writer.write(each.name, {(each.classifier, labels): outcome.fits}, outcome.more)
        else:  # a run without it must not leave that of the run before
            for path in evaluation.folder.glob(f"{each.name}.*"):
                path.unlink()


def _zero_shot(method: Method, evaluation: Evaluation) -> Iterator[tuple[Method, Outcome]]:
    """Random encoders with untrained heads."""
    names, labelled, fits = evaluation.galaxies.class_names, evaluation.labelled, []
    for seed in range(evaluation.seeds[0], evaluation.seeds[0] + NUM_RANDOM_INITS):
        model = build_classifier(evaluation.initial_encoder(method, seed), names, seed)
        model = model.to(evaluation.batches.device).eval()
        fits.append(Fit.of(seed, evaluation.classify(model), None))
    majority = int(np.bincount(labelled.label[labelled.train]).argmax())
    most_frequent = {"name": names[majority], "accuracy": evaluation.writer.fraction_of_class(majority)}
    yield method, Outcome(fits, {"chance": 1 / len(names), "majority_class": most_frequent})


def _frozen(method: Method, evaluation: Evaluation) -> Iterator[tuple[Method, Outcome | None]]:
    """Classifiers of the frozen features of encoders of one initialization, each a function of `evaluation.frozen`."""
    seeds = evaluation.seeds
    encoders = [
        FrozenEncoder(evaluation, evaluation.initial_encoder(method, group[0]), group, evaluation.labelled.train)
        for group in ([seeds] if method.initialization == "ssl" else [[seed] for seed in seeds])
    ]
    for each in written_by(method):
        yield each, getattr(frozen, each.classifier)(encoders)


def _fine_tune(method: Method, evaluation: Evaluation) -> Iterator[tuple[Method, Outcome]]:
    """Fine-tune from every seed. Only then classify the test galaxies, without and with test-time augmentation."""
    models = {
        seed: evaluation.fine_tune(method, f"{method.name}/seed_{seed}", seed, seed, evaluation.labelled)
        for seed in evaluation.seeds
    }
    for each in written_by(method):
        tta = each.classifier == "fine_tune_tta"
        yield each, Outcome([Fit.of(seed, evaluation.classify(x, tta), params) for seed, (x, params) in models.items()])

"""Evaluate an encoder by five methods.

    python linear_probe_checkpoints.py --encoder runs/galaxy10                      all five, then the report
    python linear_probe_checkpoints.py --encoder runs/galaxy10 --method ssl_fine_tune
    python linear_probe_checkpoints.py --encoder runs/galaxy10 --report             only the report, of what is there

    0 zero_shot             random encoder and head, nothing is trained
    1 random_linear_probe   random encoder, frozen; logistic regression on its features
    2 ssl_linear_probe      pre-trained encoder, frozen; the same
    3 random_fine_tune      random encoder, trained with a head on the labels
    4 ssl_fine_tune         pre-trained encoder; the same

Arguments -> encoder -> galaxies -> methods -> report. Under Slurm the array's task id chooses the method. A finished
method is not run twice, an interrupted one goes on; README.md says what is written.
"""

import logging
import os
import sys
from pathlib import Path

from galaxy_mae import preemption, provenance
from galaxy_mae.batches import GalaxyBatches
from galaxy_mae.callbacks import log_lines
from galaxy_mae.classifier import classifier_activation_bytes, encoder_fingerprint, load_encoder
from galaxy_mae.errors import UserError, one_line_errors
from galaxy_mae.evaluation import METHODS, Evaluation, claim_folder, labelled_rows, refuse_unfit
from galaxy_mae.galaxy10 import split_fingerprint, split_galaxies
from galaxy_mae.recipe import EvaluationRecipe, fit_batch, read_evaluation, show_help
from galaxy_mae.report import write_report
from galaxy_mae.sources import open_galaxies

logger = logging.getLogger("galaxy_mae")


def main(arguments: list[str]) -> None:
    if show_help(arguments, evaluation=True):
        return
    recipe = read_evaluation(arguments)
    log_lines()
    folder = Path(recipe.training.output_dir)
    if recipe.evaluation.report:
        write_report(folder, recipe.training.report_to)
        return
    methods = chosen_methods(recipe.evaluation.method, os.environ.get("SLURM_ARRAY_TASK_ID"))
    if recipe.training.world_size > 1:
        raise UserError("an evaluation runs in one process; several methods run side by side as tasks of an array")

    evaluation = prepare(recipe, folder)
    for method in methods:
        evaluation.run(method)
    if methods == METHODS:
        write_report(folder, recipe.training.report_to)


def chosen_methods(method: str | None, task: str | None) -> tuple[str, ...]:
    """The method that `--method`, or else Slurm's array task, names by name or index; without both, all five.

    Raises:
        UserError: no such method.
    """
    name, said_by = (method, "--method") if method is not None else (task, "SLURM_ARRAY_TASK_ID")
    if name is None:
        return METHODS
    if name in METHODS:
        return (name,)
    if name.isdigit() and int(name) < len(METHODS):
        return (METHODS[int(name)],)
    known = ", ".join(f"{i} {method}" for i, method in enumerate(METHODS))
    raise UserError(f"{said_by} {name}: no such method; there are {known}")


def prepare(recipe: EvaluationRecipe, folder: Path) -> Evaluation:
    """Open the encoder and the galaxies, refuse what does not fit together, and claim the results' folder."""
    training = recipe.training
    encoder = load_encoder(recipe.evaluation.encoder)
    config = encoder.model.config
    fit_batch(training, recipe.given, classifier_activation_bytes(config))
    galaxies = open_galaxies(recipe.evaluation.dataset, config.image_size)
    rows = split_galaxies(galaxies, recipe.evaluation.split_seed)
    labelled_rows(galaxies, rows)
    refuse_unfit(encoder, galaxies, rows)
    if len(rows["train"]) < training.batch_size:
        raise UserError(f"{len(rows['train'])} training rows are fewer than a batch of {training.batch_size}")
    identity = {
        "dataset_name": galaxies.name,
        "dataset": galaxies.fingerprint,
        "split": split_fingerprint(rows),
        "class_names": list(galaxies.class_names),
        "encoder_name": encoder.name,
        "encoder": encoder_fingerprint(encoder.model, encoder.mean, encoder.deviation),
        "model": {
            "width": config.hidden_size,
            "layers": config.num_hidden_layers,
            "heads": config.num_attention_heads,
            "patch_size": config.patch_size,
            "image_size": config.image_size,
            "parameters": encoder.model.num_parameters(),
        },
        "pretraining": encoder.pretraining,
        "recipe": recipe.as_dict(),
    }
    claim_folder(provenance.prepare_folder(folder), identity)
    batches = GalaxyBatches(
        galaxies.pixels, encoder.mean, encoder.deviation, config.image_size, training.device, training.seed
    )
    logger.info(
        "%s: %s training, %s validation, %s test rows; encoder %s, %.1f M parameters; on %s",
        galaxies.name,
        *(f"{len(rows[part]):,}" for part in ("train", "validation", "test")),
        encoder.name,
        encoder.model.num_parameters() / 1e6,
        training.device,
    )
    return Evaluation(recipe, encoder, galaxies, rows, batches, folder, identity)


if __name__ == "__main__":
    with one_line_errors(sys.argv[0]):
        preemption.listen()
        main(sys.argv[1:])

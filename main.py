"""Pre-train a masked autoencoder on galaxy images.

    python main.py                                    Galaxy10 DECaLS, full size, on a GPU
    python main.py --config recipes/demo.yaml         synthetic galaxies, small, on a laptop
    python main.py --mask_ratio 0.8 --output_dir runs/masked80

Arguments -> galaxies -> masked autoencoder -> Trainer -> encoder. The same command resumes an interrupted run.
`python main.py --help` lists the arguments; docs/pretraining.md describes what a run writes.
"""

import sys

from galaxy_mae.training.recipe import PRETRAINING, show_help

if __name__ == "__main__" and show_help(sys.argv[1:], PRETRAINING):
    sys.exit()  # without the seconds that the imports below take

import logging
from pathlib import Path

import numpy as np
from accelerate.utils import broadcast_object_list

from galaxy_mae import provenance
from galaxy_mae.catalogue.card import write_encoder_card
from galaxy_mae.data.leakage import pretraining_catalogue, streamed_catalogue
from galaxy_mae.data.sources import Galaxies, open_galaxies
from galaxy_mae.data.split import check_split_sizes, split_fingerprint, split_galaxies
from galaxy_mae.data.streaming import GalaxyStream, is_too_large, open_stream
from galaxy_mae.errors import one_line_errors
from galaxy_mae.evaluation.final_probe import probe_encoder
from galaxy_mae.evaluation.probes import validation_accuracies
from galaxy_mae.files import remove_leftovers
from galaxy_mae.model.mae import save_encoder, save_mae
from galaxy_mae.sweep import Trial, find_trial
from galaxy_mae.training import preemption
from galaxy_mae.training.checkpoints import check_disk_space, find_checkpoint
from galaxy_mae.training.pretraining import PretrainingTrainer, build_trainer, log_run_summary
from galaxy_mae.training.probe import OnlineProbe
from galaxy_mae.training.recipe import Recipe, global_batch_size, read_recipe
from galaxy_mae.training.reconstruction import (
    Examples,
    ReconstructionCallback,
    plot_final_reconstructions,
    select_example_galaxies,
)
from galaxy_mae.training.tracking import log_encoder, setup_logging, show_progress, start_run, use_trackers

logger = logging.getLogger("galaxy_mae")


def main(arguments: list[str]) -> None:
    setup_logging()
    trial = find_trial(arguments)
    recipe = read_recipe(trial.arguments if trial else arguments)
    folder = provenance.make_output_dir(Path(recipe.training.output_dir))
    galaxies, split, stream = open_data(recipe, folder)
    run_config = recipe.as_dict() | {"data": galaxies.fingerprint, "split": split_fingerprint(split)}

    with provenance.run_lock(folder):
        remove_leftovers(folder)
        run = provenance.read_run(folder) or provenance.new_run(run_config)
        provenance.check_same_recipe(folder, run, run_config, recipe.explicitly_set)
        if run["finished"]:
            logger.info("%s: this run is finished; nothing to do", folder)
            return
        checkpoint = find_checkpoint(folder, run["id"])

        trainer = build_trainer(recipe, galaxies, split, run["id"], stream)
        examples = select_example_galaxies(split["validation"], galaxies.label, galaxies.class_names)
        trainer.add_callback(OnlineProbe(trainer, galaxies, split, validation_accuracies))
        check_disk_space(recipe.training, trainer.model.num_parameters())
        log_run_summary(recipe, galaxies, split, trainer, checkpoint)
        provenance.begin_session(folder, run, checkpoint)
        show_training(trainer, recipe, run_config, trial, galaxies, examples)

        result = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        trainer.save_metrics("train", result.metrics)
        metrics = trainer.evaluate()
        if trainer.is_world_process_zero():
            export_artifacts(trainer, folder, galaxies, split, stream, examples)
            trainer.save_metrics("eval", metrics | probe_encoder(trainer, folder, galaxies, split))
            trainer.save_state()
            write_encoder_card(folder)
            if "wandb" in recipe.training.report_to:
                log_encoder(folder / "encoder")
            provenance.finish_run(folder)
        trainer.end()


def open_data(recipe: Recipe, folder: Path) -> tuple[Galaxies, dict[str, np.ndarray], GalaxyStream | None]:
    """The galaxies, their split, and the stream of the training galaxies if they are not cached.

    Raises:
        UserError: no such data set, or too few galaxies.
    """
    stream = open_stream_if_needed(recipe, folder)
    if stream:
        galaxies, split, num_train = stream.sample, stream.split, stream.num_train
    else:
        galaxies = open_galaxies(recipe.galaxies.dataset, recipe.galaxies.image_size, stretch=recipe.galaxies.stretch)
        split = split_galaxies(galaxies, recipe.galaxies.split_seed)
        num_train = len(split["train"])
    check_split_sizes(num_train, len(split["validation"]), global_batch_size(recipe.training))
    return galaxies, split, stream


def open_stream_if_needed(recipe: Recipe, folder: Path) -> GalaxyStream | None:
    """The stream of a run that was or is to be streamed, or None; `--stream` becomes part of the recipe."""
    options, run = recipe.galaxies, provenance.read_run(folder)
    stream = options.stream
    if stream is None and run:
        stream = run["recipe"].get("stream")
    elif stream is None:
        stream = is_too_large(options.dataset, options.image_size)
    (stream,) = broadcast_object_list([stream])  # the disk may look different to another process
    options.stream = stream or None  # as in the recipes of runs that are older than the flag
    return open_stream(options.dataset, options.image_size, options.split_seed) if stream else None


def show_training(
    trainer: PretrainingTrainer,
    recipe: Recipe,
    run_config: dict[str, object],
    trial: Trial | None,
    galaxies: Galaxies,
    examples: Examples,
) -> None:
    """Show the training while it runs: on dashboards, by figures of reconstructions, by a progress bar."""
    training, folder = recipe.training, Path(recipe.training.output_dir)
    name, tags, group = training.run_name or folder.name, [Path(galaxies.name).name], trial.sweep if trial else None
    start_run(training.report_to, folder, name, run_config, "pre-training", tags, group)
    trackers, figures = use_trackers(trainer), folder / "reconstructions"
    trainer.add_callback(
        ReconstructionCallback(trainer.batches, examples, figures, training.reconstruct_every, trackers)
    )
    show_progress(trainer)


def export_artifacts(
    trainer: PretrainingTrainer,
    folder: Path,
    galaxies: Galaxies,
    split: dict[str, np.ndarray],
    stream: GalaxyStream | None,
    examples: Examples,
) -> None:
    """Write the autoencoder, the encoder with its provenance, and figures of reconstructions."""
    model, batches = trainer.unwrapped_model, trainer.batches
    save_mae(model, folder)
    run = provenance.read_run(folder)
    used = streamed_catalogue(stream) if stream else pretraining_catalogue(galaxies, split)
    pretraining = provenance.Pretraining(run["recipe"], run["sessions"], used)
    mean, std = batches.channel_mean, batches.channel_std
    save_encoder(model, folder / "encoder", mean, std, galaxies.class_names, pretraining)
    figure = plot_final_reconstructions(model, batches, examples, folder, Path(galaxies.name).name)
    logger.info("encoder: %s; reconstructions: %s", folder / "encoder", figure)


if __name__ == "__main__":
    with one_line_errors(sys.argv[0]):
        preemption.install_signal_handlers()
        main(sys.argv[1:])

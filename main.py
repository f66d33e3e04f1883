"""Pre-train a masked autoencoder on galaxy images.

    python main.py                                    Galaxy10 DECaLS, full size, on a GPU
    python main.py --config recipes/demo.yaml         synthetic galaxies, small, on a laptop
    python main.py --mask_ratio 0.8 --output_dir runs/masked80

Arguments -> galaxies -> masked autoencoder -> Trainer -> encoder. The same command resumes an interrupted run.
`python main.py --help` lists the arguments; docs/pretraining.md describes what a run writes.
"""

import sys

from galaxy_mae import progress
from galaxy_mae.training.recipe import PRETRAINING, show_help

if __name__ == "__main__":
    if show_help(sys.argv[1:], PRETRAINING):
        sys.exit()  # without the seconds that the imports below take
    progress.start("pre-training")

import functools
import logging
from pathlib import Path

from transformers import ViTMAEForPreTraining

from galaxy_mae import provenance
from galaxy_mae.data.pretraining import PretrainingData
from galaxy_mae.data.seen import TrainingImages
from galaxy_mae.data.split import check_split_sizes, split_fingerprint
from galaxy_mae.errors import one_line_errors
from galaxy_mae.evaluation.distillation import TARGETS, DistillationTrainer, open_targets
from galaxy_mae.evaluation.probes import OnlineProbe, probe_encoder
from galaxy_mae.files import make_output_folder, remove_leftovers
from galaxy_mae.model.compute import use_free_cores
from galaxy_mae.model.mae import save_encoder, save_mae
from galaxy_mae.reports.card import write_encoder_card
from galaxy_mae.sweep import find_trial
from galaxy_mae.training import preemption, reconstruction
from galaxy_mae.training.checkpoints import find_checkpoint
from galaxy_mae.training.pretraining import (
    PretrainingTrainer,
    build_trainer,
    log_run_summary,
    open_galaxies_of,
    seen_galaxies,
)
from galaxy_mae.training.recipe import Recipe, global_batch_size, read_recipe
from galaxy_mae.training.tracking import log_encoder, push_encoder, setup_logging, start_run

logger = logging.getLogger("galaxy_mae")


def main(arguments: list[str]) -> None:
    setup_logging()
    trial = find_trial(arguments)
    recipe = read_recipe(trial.arguments if trial else arguments)
    folder = make_output_folder(Path(recipe.training.output_dir), "--output_dir", markers=["run.json"])
    data = open_data(recipe, folder)
    galaxies, split = data.galaxies, data.split
    run_config = recipe.as_dict() | {"data": data.fingerprint, "split": split_fingerprint(split)}

    with provenance.run_lock(folder):
        remove_leftovers(folder)
        run = provenance.read_run(folder) or provenance.new_run(run_config)
        use_free_cores(*(session.get("threads") for session in run["sessions"][-1:]))
        provenance.check_same_recipe(folder, run, run_config, recipe.explicitly_set)
        if run["finished"]:
            logger.info("%s: this run is finished; nothing to do", folder)
            return
        checkpoint = find_checkpoint(folder, run["id"])

        targets = open_targets(recipe, data, run, folder)
        kind = functools.partial(DistillationTrainer, targets=targets) if targets else PretrainingTrainer
        trainer = build_trainer(recipe, data, run, checkpoint is not None, kind)
        examples = reconstruction.select_example_galaxies(split["validation"], galaxies.label, galaxies.class_names)
        trainer.add_callback(OnlineProbe(trainer, galaxies, split))
        if not targets:
            trainer.add_callback(reconstruction.ReconstructionCallback(trainer, examples))
        log_run_summary(recipe, data, trainer, checkpoint)
        provenance.begin_session(folder, run, checkpoint)
        name, tags, group = recipe.training.run_name or folder.name, [Path(galaxies.name).name], trial and trial.sweep
        start_run(recipe.training.report_to, folder, name, run_config, "pre-training", tags, group)

        result = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        trainer.save_metrics("train", result.metrics)
        metrics = trainer.evaluate()
        if trainer.is_world_process_zero():
            export_artifacts(trainer, folder, data, examples)
            trainer.save_metrics("eval", metrics | probe_encoder(trainer, folder, galaxies, split))
            trainer.save_state()
            write_encoder_card(folder)
            if "wandb" in recipe.training.report_to:
                log_encoder(folder / "encoder")
            provenance.finish_run(folder)
        trainer.end()
        if recipe.training.push_to_hub and trainer.is_world_process_zero():
            push_encoder(folder / "encoder", recipe.training.hub_model_id, recipe.training.hub_private_repo)


def open_data(recipe: Recipe, folder: Path) -> PretrainingData:
    """Open the galaxies of a run. Whether they are streamed becomes part of the recipe, and stays as it was.

    Raises:
        UserError: no such data set, or too few galaxies.
    """
    data = open_galaxies_of(recipe.galaxies, provenance.read_run(folder))
    recipe.galaxies.stream = data.is_streamed
    check_split_sizes(len(data.train_dataset()), len(data.split["validation"]), global_batch_size(recipe.training))
    return data


def export_artifacts(
    trainer: PretrainingTrainer, folder: Path, data: PretrainingData, examples: reconstruction.Examples
) -> None:
    """Write the autoencoder, the encoder with its provenance, and figures of reconstructions."""
    model, batches = trainer.unwrapped_model, trainer.batches
    run = provenance.read_run(folder)
    pretraining = provenance.Pretraining(run["recipe"], run["sessions"], seen_galaxies(data, folder))
    mean, std, names = batches.channel_mean, batches.channel_std, data.galaxies.class_names
    looks = TrainingImages.of(data.galaxies.pixels, data.split, data.galaxies.frame).as_json()
    save_encoder(model, folder / "encoder", mean, std, names, pretraining, looks)
    logger.info("encoder: %s", folder / "encoder")
    if isinstance(model, ViTMAEForPreTraining):
        save_mae(model, folder)
        name = Path(data.galaxies.name).name
        figure = reconstruction.plot_final_reconstructions(model, batches, examples, folder, name)
        logger.info("reconstructions: %s", figure)
    else:
        (folder / TARGETS).unlink()


if __name__ == "__main__":
    with one_line_errors(sys.argv[0]):
        preemption.install_signal_handlers()
        main(sys.argv[1:])

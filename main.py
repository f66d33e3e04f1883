"""Pre-train a masked autoencoder on galaxy images.

    python main.py                                    Galaxy10 DECaLS, full size, on a GPU
    python main.py --config recipes/demo.yaml         synthetic galaxies, small, on a laptop
    python main.py --mask_ratio 0.8 --output_dir runs/masked80

Arguments -> galaxies -> masked autoencoder -> Trainer -> encoder. The same command resumes an interrupted run.
`python main.py --help` lists the arguments; docs/pretraining.md describes what a run writes.
"""

import logging
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
from accelerate.utils import broadcast_object_list
from transformers import ViTMAEForPreTraining

from galaxy_mae import provenance
from galaxy_mae.data.leakage import pretraining_catalogue, streamed_catalogue
from galaxy_mae.data.sources import Galaxies, open_galaxies
from galaxy_mae.data.split import check_split_sizes, split_fingerprint, split_galaxies
from galaxy_mae.data.streaming import GalaxyStream, is_too_large, open_stream
from galaxy_mae.errors import UserError, one_line_errors
from galaxy_mae.evaluation.probes import validation_accuracies
from galaxy_mae.files import make_output_folder, remove_leftovers
from galaxy_mae.model.encoder import load_encoder
from galaxy_mae.model.mae import encoder_of, save_encoder, save_mae
from galaxy_mae.reports.card import write_encoder_card
from galaxy_mae.sweep import find_trial
from galaxy_mae.training import preemption
from galaxy_mae.training.arguments import ONLINE_PROBES
from galaxy_mae.training.checkpoints import check_disk_space, find_checkpoint
from galaxy_mae.training.recipe import PRETRAINING, Recipe, global_batch_size, read_recipe, show_help
from galaxy_mae.training.reconstruction import (
    ReconstructionCallback,
    plot_final_reconstructions,
    select_example_galaxies,
)
from galaxy_mae.training.tracking import log_encoder, setup_logging, show_progress, start_run, use_trackers
from galaxy_mae.training.trainer import PretrainingTrainer, build_trainer

logger = logging.getLogger("galaxy_mae")

ONLINE_C = (0.1,)  # of the linear probe during the training: the sweep over C takes longer than an epoch
PROBE_SAMPLE = 2_000  # galaxies at most of the training and of the validation set, for probes during the training


def main(arguments: list[str]) -> None:
    if show_help(arguments, PRETRAINING):
        return
    setup_logging()
    trial = find_trial(arguments)
    recipe = read_recipe(trial.arguments if trial else arguments)
    training, folder = recipe.training, make_output_folder(Path(recipe.training.output_dir), "--output_dir")

    stream = open_stream_if_needed(recipe, folder)
    if stream:
        galaxies, split, num_train = stream.sample, stream.split, stream.num_train
    else:
        galaxies = open_galaxies(recipe.galaxies.dataset, recipe.galaxies.image_size, stretch=recipe.galaxies.stretch)
        split = split_galaxies(galaxies, recipe.galaxies.split_seed)
        num_train = len(split["train"])
    check_split_sizes(num_train, len(split["validation"]), global_batch_size(training))
    run_config = recipe.as_dict() | {"data": galaxies.fingerprint, "split": split_fingerprint(split)}

    with provenance.run_lock(folder, training):
        remove_leftovers(folder)
        run = provenance.read_run(folder) or provenance.new_run(run_config)
        provenance.check_same_recipe(folder, run, run_config, recipe.explicitly_set)
        if run["finished"]:
            logger.info("%s: this run is finished; nothing to do", folder)
            return
        checkpoint = find_checkpoint(folder, run["id"])

        trainer = build_trainer(recipe, galaxies, split, run["id"], stream)
        trainer.probe = online_probe(trainer, galaxies, split)
        check_disk_space(training, trainer.model.num_parameters())
        log_run_summary(recipe, galaxies, split, trainer, checkpoint)
        provenance.begin_session(folder, run, checkpoint)
        name, tags = training.run_name or folder.name, [Path(galaxies.name).name]
        group = trial.sweep if trial else None
        start_run(training.report_to, folder, name, run_config, "pre-training", tags, group)
        trackers = use_trackers(trainer)
        examples = select_example_galaxies(split["validation"], galaxies.label, galaxies.class_names)
        reconstructions = folder / "reconstructions"
        trainer.add_callback(
            ReconstructionCallback(trainer.batches, *examples, reconstructions, training.reconstruct_every, trackers)
        )
        show_progress(trainer)

        result = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        trainer.save_metrics("train", result.metrics)
        metrics = trainer.evaluate()
        if trainer.is_world_process_zero():
            used = streamed_catalogue(stream) if stream else pretraining_catalogue(galaxies, split)
            export_artifacts(trainer, folder, galaxies, used, *examples)
            metrics |= probe_encoder(trainer, folder, galaxies, split)
            trainer.save_metrics("eval", metrics)
            trainer.save_state()
            write_encoder_card(folder)
            if "wandb" in training.report_to:
                log_encoder(folder / "encoder")
            provenance.finish_run(folder)
        trainer.end()


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


def log_run_summary(
    recipe: Recipe,
    galaxies: Galaxies,
    split: dict[str, np.ndarray],
    trainer: PretrainingTrainer,
    checkpoint: Path | None,
) -> None:
    """Log what is trained on what."""
    training = recipe.training
    logger.info(
        "%s: %s training, %s validation, %s test galaxies, %s dropped; image size %s",
        galaxies.name,
        f"{len(trainer.train_dataset):,}",
        *(f"{len(split[part]):,}" for part in ("validation", "test", "dropped")),
        recipe.galaxies.image_size,
    )
    logger.info(
        "model: %.1f M parameters; batch size %d (%d per device x %d accumulation steps); learning rate %.3g; %s on %s",
        trainer.model.num_parameters() / 1e6,
        global_batch_size(training),
        training.per_device_train_batch_size,
        training.gradient_accumulation_steps,
        training.learning_rate,
        "bfloat16" if training.bf16 else "float16" if training.fp16 else "float32",
        training.device,
    )
    if checkpoint:
        logger.info("resuming from %s", checkpoint)


def export_artifacts(
    trainer: PretrainingTrainer,
    folder: Path,
    galaxies: Galaxies,
    used: pa.Table,
    examples: np.ndarray,
    names: list[str],
) -> None:
    """Write the autoencoder, the encoder with its provenance, and figures of reconstructions."""
    model, batches = trainer.unwrapped_model, trainer.batches
    save_mae(model, folder)
    run = provenance.read_run(folder)
    pretraining = provenance.Pretraining(run["recipe"], run["sessions"], used)
    mean, std = batches.channel_mean, batches.channel_std
    save_encoder(model, folder / "encoder", mean, std, galaxies.class_names, pretraining)
    figure = plot_final_reconstructions(model, batches, examples, names, folder, Path(galaxies.name).name)
    logger.info("encoder: %s; reconstructions: %s", folder / "encoder", figure)


def online_probe(
    trainer: PretrainingTrainer, galaxies: Galaxies, split: dict[str, np.ndarray]
) -> Callable[[ViTMAEForPreTraining], dict[str, float]] | None:
    """What the Trainer calls during the training: probes of a sample of the frozen features. None without classes.

    The loss says little about the features: it falls on while they get worse.

    Raises:
        UserError: no classes, and the best checkpoint was to be found by a probe.
    """
    if galaxies.label is None or len(np.unique(galaxies.label[split["train"]])) < 2:
        metric = trainer.args.metric_for_best_model or ""
        if metric.removeprefix("eval_") in ONLINE_PROBES:
            raise UserError(f"--metric_for_best_model {metric}: {galaxies.name} has no two classes; use loss")
        return None
    train = np.random.default_rng(0).permutation(split["train"])[:PROBE_SAMPLE]
    sample = {"train": np.sort(train), "validation": split["validation"][:PROBE_SAMPLE]}

    def probe(model: ViTMAEForPreTraining) -> dict[str, float]:
        encoder = encoder_of(model)
        accuracies = validation_accuracies(
            encoder, trainer.batches, sample, galaxies.label, trainer.args.bf16, ONLINE_C
        )
        return {name: value for name, value in accuracies.items() if name.endswith("accuracy")}

    return probe


def probe_encoder(
    trainer: PretrainingTrainer, folder: Path, galaxies: Galaxies, split: dict[str, np.ndarray]
) -> dict[str, float]:
    """Log and return probe accuracies of the exported encoder on the validation set; empty without labels."""
    if galaxies.label is None:
        return {}
    encoder = load_encoder(str(folder)).model
    accuracies = validation_accuracies(encoder, trainer.batches, split, galaxies.label, trainer.args.bf16)
    metrics = {f"eval_{name}": value for name, value in accuracies.items()}
    if metrics:
        trainer.log(dict(metrics))
        logger.info(
            "on %d validation galaxies: linear probe %.1f %%, k-NN %.1f %%",
            metrics["eval_num_validation_images"],
            100 * metrics["eval_linear_probe_accuracy"],
            100 * metrics["eval_knn_accuracy"],
        )
    return metrics


if __name__ == "__main__":
    with one_line_errors(sys.argv[0]):
        preemption.install_signal_handlers()
        main(sys.argv[1:])

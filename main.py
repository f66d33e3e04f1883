"""Pre-train a masked autoencoder on galaxy images.

    python main.py                                    Galaxy10 DECaLS, full size, on a GPU
    python main.py --config recipes/demo.yaml         synthetic galaxies, small, on a laptop
    python main.py --mask_ratio 0.8 --output_dir runs/masked80

Arguments -> galaxies -> masked autoencoder -> Trainer -> encoder. Typed again, the same command goes on where the run
stopped. `python main.py --help` lists the fields; README.md says what a run leaves behind.
"""

import logging
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import set_seed

from galaxy_mae import preemption, provenance
from galaxy_mae.atomic import atomic_folder
from galaxy_mae.batches import GalaxyBatches, Rows
from galaxy_mae.callbacks import (
    Reconstructions,
    draw_reconstructions,
    galaxies_to_show,
    log_lines,
    measure_matmul_rate,
    show_progress,
    start_wandb,
)
from galaxy_mae.classifier import load_encoder
from galaxy_mae.errors import UserError, one_line_errors
from galaxy_mae.galaxy10 import split_fingerprint, split_galaxies
from galaxy_mae.mae import activation_bytes_per_image, build_mae, check_mae, check_sizes, save_encoder
from galaxy_mae.probe import validation_accuracies
from galaxy_mae.recipe import PretrainingArguments, Recipe, fit_batch, read_recipe, show_help, total_batch_size
from galaxy_mae.search import find_cell
from galaxy_mae.sources import Galaxies, open_galaxies
from galaxy_mae.trainer import PretrainingTrainer, find_checkpoint

logger = logging.getLogger("galaxy_mae")


def main(arguments: list[str]) -> None:
    if show_help(arguments):
        return
    cell = find_cell(arguments, os.environ.get("SLURM_ARRAY_TASK_ID"))
    recipe = read_recipe(cell.arguments if cell else arguments)
    training = recipe.training
    log_lines(main_process=training.process_index == 0)
    if cell:
        logger.info("search %s, cell %d: %s; in %s", cell.search, cell.index, cell.name, cell.folder)

    config = recipe.model.config(recipe.galaxies.image_size)
    check_sizes(config)
    fit_batch(training, recipe.given, activation_bytes_per_image(config))
    folder = provenance.prepare_folder(Path(training.output_dir))
    with training.main_process_first(local=False):  # the others would wait for the first one's own lock
        if training.process_index == 0:
            provenance.wait_for_forerunner(folder / "run.lock")

    galaxies = open_galaxies(recipe.galaxies.dataset, recipe.galaxies.image_size)
    rows = split_galaxies(galaxies, recipe.galaxies.split_seed)
    refuse_small(rows, training)
    identity = recipe.as_dict() | {"data": galaxies.fingerprint, "split": split_fingerprint(rows)}

    run = provenance.read_run(folder)
    if run is not None:
        provenance.refuse_other_recipe(folder, run, identity, recipe.given)
        if run["finished"]:
            logger.info("%s: this run is finished; there is nothing to do", folder)
            return
    checkpoint = find_checkpoint(folder)

    set_seed(training.seed)
    model = build_mae(config, training.seed)
    check_mae(model)
    if training.process_index == 0:  # which alone writes: another would see files come and go while it adds them up
        refuse_full_disk(folder, 4 * model.num_parameters(), training)
    mean, deviation = galaxies.channel_statistics(rows["train"])
    refuse_constant_channel(deviation)
    batches = GalaxyBatches(
        galaxies.pixels,
        mean,
        deviation,
        recipe.galaxies.image_size,
        training.device,
        training.seed,
        recipe.galaxies.smallest_crop,
    )
    announce(recipe, galaxies, rows, model, checkpoint)
    if training.process_index == 0:
        lock = provenance.lock(folder / "run.lock")
        provenance.begin_session(folder, run, identity, checkpoint)
        if "wandb" in training.report_to:
            start_wandb(folder, training.run_name or folder.name, identity, group=cell.search if cell else None)

    shown, names = galaxies_to_show(rows["validation"], galaxies.label, galaxies.class_names)
    training.eval_on_start = checkpoint is None and ("eval_on_start" not in recipe.given or training.eval_on_start)
    trainer = PretrainingTrainer(
        model,
        training,
        train_dataset=Rows(rows["train"]),
        eval_dataset=Rows(rows["validation"]),
        batches=batches,
        peak_flops=peak_flops(training),
        callbacks=[Reconstructions(batches, shown, names, folder / "reconstructions", training.reconstruct_every)],
    )
    show_progress(trainer)
    result = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)

    trainer.save_metrics("train", result.metrics)
    metrics = trainer.evaluate()
    if training.process_index == 0:
        leave_behind(trainer, folder, galaxies, mean, deviation, shown, names)
        metrics |= probe(trainer, folder, galaxies, rows)
        trainer.save_metrics("eval", metrics)
        trainer.save_state()
        provenance.finish_run(folder)
        logger.info("encoder: %s; picture: %s", folder / "encoder", folder / "reconstruction_example.png")
        lock.release()
    # A process that is gone while the others work, or whose group is not taken down, may be ended by SIGABRT: gloo's
    # threads then still hold tensors while the interpreter goes down (pytorch/pytorch#179291).
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


def refuse_constant_channel(deviation: np.ndarray) -> None:
    """Raise a `UserError` where a colour is the same in all training pixels: it cannot be normalised."""
    for name, value in zip(("red", "green", "blue"), deviation, strict=True):
        if not value > 0:
            raise UserError(f"the {name} channel has one value in all training images; give images with three channels")


def refuse_small(rows: dict[str, np.ndarray], training: PretrainingArguments) -> None:
    """Raise a `UserError` where there are fewer galaxies than a run needs."""
    batch = total_batch_size(training)
    if len(rows["train"]) == 0:
        raise UserError("no training rows: the images are too few, all alike, or all in the source's own test set")
    if len(rows["train"]) < batch:
        raise UserError(
            f"{len(rows['train'])} training rows are fewer than a batch of {batch}; "
            f"use more galaxies, or --batch_size {max(1, len(rows['train']) // 4)}"
        )
    if len(rows["validation"]) == 0:
        raise UserError(f"{len(rows['train'])} training rows leave none for validation; use more galaxies")


def refuse_full_disk(folder: Path, weight_bytes: int, training: PretrainingArguments) -> None:
    """Raise a `UserError` where the disk cannot hold what the run will write: weights and two moments each time."""
    checkpoints = (training.save_total_limit or 2) + 1 if training.save_strategy != "no" else 0
    needed = weight_bytes * (3 * checkpoints + 2)
    free = shutil.disk_usage(folder).free + sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
    if free < needed:
        raise UserError(
            f"--output_dir {folder}: the run needs {needed / 1e6:,.0f} MB for {checkpoints} checkpoints and results, "
            f"and the disk has {free / 1e6:,.0f} MB left; free some space or choose another folder"
        )


def announce(recipe: Recipe, galaxies: Galaxies, rows: dict, model, checkpoint: Path | None) -> None:
    """Say what will be done."""
    training = recipe.training
    logger.info(
        "%s: %s training, %s validation, %s test rows, %s dropped; %s pixels",
        galaxies.name,
        *(f"{len(rows[part]):,}" for part in ("train", "validation", "test", "dropped")),
        recipe.galaxies.image_size,
    )
    logger.info(
        "model: %.1f M parameters; batch %d (%d a device, accumulated %d times); learning rate %.3g; %s on %s",
        model.num_parameters() / 1e6,
        total_batch_size(training),
        training.per_device_train_batch_size,
        training.gradient_accumulation_steps,
        training.learning_rate,
        "bfloat16" if training.bf16 else "float16" if training.fp16 else "float32",
        training.device,
    )
    if checkpoint:
        logger.info("going on from %s", checkpoint)


def peak_flops(training: PretrainingArguments) -> float | None:
    """The matrix-product rate of all GPUs together in FLOP/s, measured on this one; None on other devices."""
    if training.device.type != "cuda":
        return None
    dtype = torch.bfloat16 if training.bf16 else torch.float16 if training.fp16 else torch.float32
    return measure_matmul_rate(training.device, dtype) * training.world_size * max(1, training.n_gpu)


def leave_behind(
    trainer: PretrainingTrainer,
    folder: Path,
    galaxies: Galaxies,
    mean: np.ndarray,
    deviation: np.ndarray,
    shown: np.ndarray,
    names: list[str],
) -> None:
    """Write the autoencoder, the encoder and the pictures."""
    model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    with atomic_folder(folder / ".mae") as aside:
        model.save_pretrained(aside, save_original_format=False)
    for file in (folder / ".mae").iterdir():
        file.replace(folder / file.name)
    (folder / ".mae").rmdir()
    save_encoder(model, folder / "encoder", mean, deviation, galaxies.class_names)

    title = f"{Path(galaxies.name).name}: validation galaxies, {model.config.mask_ratio:.0%} masked"
    pictures = {"reconstruction_example.png": ("visible", title)}
    if model.config.norm_pix_loss:
        nearest = f"{title}; brightness and contrast of each patch are those of the nearest visible one"
        true = f"{title}; brightness and contrast of each patch are the true ones, which the model does not know"
        pictures = {"reconstruction_example.png": ("visible", nearest), "reconstruction_example2.png": ("true", true)}
    for name, (statistics, text) in pictures.items():
        draw_reconstructions(model, trainer.batches, shown, names, folder / name, text, statistics)


def probe(
    trainer: PretrainingTrainer, folder: Path, galaxies: Galaxies, rows: dict[str, np.ndarray]
) -> dict[str, float]:
    """Metrics of the finished encoder's frozen features on validation rows, logged too; none without labels."""
    if galaxies.label is None:
        return {}
    encoder = load_encoder(str(folder)).model
    accuracies = validation_accuracies(encoder, trainer.batches, rows, galaxies.label, trainer.args.bf16)
    metrics = {f"eval_{name}": value for name, value in accuracies.items()}
    if metrics:
        trainer.log(dict(metrics))
        logger.info(
            "on %d validation galaxies: linear probe %.1f %%, k-NN %.1f %%",
            metrics["eval_probed_images"],
            100 * metrics["eval_linear_probe_accuracy"],
            100 * metrics["eval_knn_accuracy"],
        )
    return metrics


if __name__ == "__main__":
    with one_line_errors(sys.argv[0]):
        preemption.listen()
        main(sys.argv[1:])

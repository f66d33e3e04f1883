"""The Trainer of pre-training: sample indices in, pixels and masks out."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import nn
from torch.nn.attention import SDPBackend
from transformers import TrainingArguments, ViTMAEConfig, ViTMAEForPreTraining, set_seed
from transformers.trainer_utils import EvalPrediction, TrainOutput
from transformers.utils import ModelOutput, cached_file

from galaxy_mae.data.batches import GalaxyBatches, IndexDataset
from galaxy_mae.data.fits import Stretch
from galaxy_mae.data.pretraining import PretrainingData, open_pretraining_data
from galaxy_mae.data.random_numbers import compiled, mask_noise
from galaxy_mae.files import atomic_folder, sha256
from galaxy_mae.model.compute import measure_matmul_rate, num_patches, prefer_attention, rank_attention_backends
from galaxy_mae.model.mae import (
    attention_layers,
    build_mae,
    check_mae,
    init_mae,
    loss_per_image,
    measure_mae,
    return_only_loss_in_training,
)
from galaxy_mae.model.saved_model import SavedModel
from galaxy_mae.provenance import is_main_process, read_pretraining
from galaxy_mae.training.arguments import GalaxyArguments, PretrainingArguments
from galaxy_mae.training.checkpoints import MANIFEST
from galaxy_mae.training.recipe import Recipe, global_batch_size
from galaxy_mae.training.trainer import GalaxyTrainer

logger = logging.getLogger(__name__)

# In `run.json`, in a run's folder, and as a split of the galaxies that it has seen.
INIT_FROM, DISTILL = "init_from", "distill"


class PretrainingTrainer(GalaxyTrainer):
    """Trains a `ViTMAEForPreTraining` on the galaxies of a `PretrainingData`."""

    def __init__(
        self,
        model: ViTMAEForPreTraining,
        options: PretrainingArguments,
        *,
        batches: GalaxyBatches,
        flops_per_image: float | None = None,
        **kwargs,
    ):
        super().__init__(
            model,
            options,
            batches=batches,
            data_collator=batches.collate,
            flops_per_image=flops_per_image or measure_mae(model.config)[0],
            compute_metrics=_mean_loss,
            **kwargs,
        )
        return_only_loss_in_training(self.model)
        self.attention_order: list[SDPBackend] | None = None  # of SDPA's backends; None: as measured, [] as torch's

    def train(self, *args, **kwargs) -> TrainOutput:
        """As `GalaxyTrainer`'s, on CUDA with the backends of attention that are the fastest there."""
        if self.attention_order is None:
            self.attention_order = _measure_attention(self.model.config, self.args)
        with prefer_attention(self.attention_order):
            return super().train(*args, **kwargs)

    def prepare_batch(self, batch: dict[str, torch.Tensor], training: bool) -> dict[str, torch.Tensor]:
        """`pixel_values` (B, 3, S, S) and `noise` (B, patches), both float32."""
        index, patches = batch["index"].to(self.args.device), num_patches(self.model.config)
        if not training:
            return {"pixel_values": self.batches.eval_transform(batch), "noise": mask_noise(index, patches)}
        step = self.sampler.random_step(self.state.global_step)
        draw = compiled(mask_noise) if self.batches.compiled else mask_noise
        noise = draw(index, patches, seed=self.args.seed, step=step)
        return {"pixel_values": self.batches.train_transform(batch, step), "noise": noise}

    def prediction_step(
        self, model: nn.Module, inputs: dict, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[None, torch.Tensor, torch.Tensor]:
        """Loss of each image (B,) and its index (B,); `_mean_loss` makes `eval_loss` of them.

        The Trainer's own mean is over batches. With several processes the last batch is filled up with images from the
        beginning, which would count twice.
        """
        prepared = self.prepare_batch(inputs, training=False)
        with torch.no_grad(), self.compute_loss_context_manager():
            output = model(**prepared)
        losses = self.losses_of(prepared, output)
        return None, losses, inputs["index"].to(losses.device)

    def losses_of(self, prepared: dict[str, torch.Tensor], output: ModelOutput) -> torch.Tensor:
        """The loss of each image, (B,)."""
        return loss_per_image(self.unwrapped_model, prepared["pixel_values"], output.logits, output.mask)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Weight decay on matrices, not on biases, LayerNorms or tokens."""
        return [name for name, parameter in model.named_parameters() if parameter.squeeze().ndim > 1]


def open_galaxies_of(options: GalaxyArguments, run: dict[str, Any] | None) -> PretrainingData:
    """Open the galaxies of a run, streamed if the flag says so, or else as they were when the run began.

    Raises:
        UserError: no such data set, or too few galaxies.
    """
    stream = run["recipe"].get("stream") if run and options.stream is None else options.stream
    dataset = options.dataset, options.image_size, options.split_seed
    how = {"stretch": Stretch.named(options.stretch), "frame": options.frame, "columns": options.columns}
    how |= {"max_crop_scale": options.max_crop_scale, "unlabelled": options.unlabelled or ()}
    return open_pretraining_data(*dataset, **how, stream=stream)


def start_from(model: ViTMAEForPreTraining, source: str, folder: Path) -> dict[str, str]:
    """Start from saved weights: see `mae.init_mae`. Returns what `run.json` says of them."""
    saved = SavedModel.find(source, "--init_from", ("", "encoder"))
    about = note_origin(saved, folder / INIT_FROM)
    words = init_mae(model, saved)
    logger.info("--init_from %s: %s", source, words)
    return about | {"taken": words}


def note_origin(saved: SavedModel, folder: Path) -> dict[str, str]:
    """Keep the galaxies that a model has seen in a folder of the run that uses it.

    Returns:
        Its source and the hash of its weights.

    Raises:
        UserError: it is of a run that is not finished.
    """
    encoder = Path(saved.location, "encoder")
    seen = read_pretraining(str(encoder) if encoder.is_dir() else saved.location)
    if seen is None and any(Path(saved.location, name).is_file() for name in ("run.json", MANIFEST)):
        raise saved.error("the run is not finished: it does not say yet which galaxies it has seen")
    if seen and is_main_process():
        with atomic_folder(folder) as staging:
            seen.write(staging)
    return {"source": saved.source, "sha256": sha256(Path(cached_file(saved.location, "model.safetensors")))}


def seen_galaxies(data: PretrainingData, folder: Path) -> pa.Table:
    """The galaxies of a run, and others that its teacher and the weights had seen from which it started.

    A table of `provenance.CATALOGUE`.
    """
    own = data.catalogue()
    tables = [own]
    for origin in (INIT_FROM, DISTILL):
        if (folder / origin).is_dir():
            seen = read_pretraining(str(folder / origin)).galaxies
            split = seen.schema.get_field_index("split")
            tables.append(seen.set_column(split, "split", pa.repeat(origin, len(seen))))
    table = pa.concat_tables(tables)
    again = table.drop_columns(["index", "split"]).to_pandas().duplicated().to_numpy(copy=True)  # NaN are equal
    again[: len(own)] = False
    return table.filter(pa.array(~again))


def build_trainer(
    recipe: Recipe,
    data: PretrainingData,
    run: dict[str, Any],
    resumed: bool,
    trainer_class: Callable[..., PretrainingTrainer] = PretrainingTrainer,
) -> PretrainingTrainer:
    """Build the Trainer of a recipe: a new model, batches of the galaxies, and the measured peak of the GPUs.

    The model of a run that is not `resumed` starts from `--init_from`, which is noted in `run`.

    Raises:
        UserError: several GPUs in one process; a color channel that is constant over the training images; weights that
            do not fit.
    """
    training, options, split = recipe.training, recipe.galaxies, data.split
    training.dataloader_num_workers = data.loader_workers(training.dataloader_num_workers, training.device.type)
    training.check_gpus()
    set_seed(training.seed)
    model = build_mae(recipe.model_config, training.seed)
    if recipe.model.init_from and not resumed:
        run[INIT_FROM] = start_from(model, recipe.model.init_from, Path(training.output_dir))
    check_mae(model)
    mean, std = data.channel_statistics()
    cuda = training.device.type == "cuda"
    names = ("min_crop_scale", "max_crop_scale", "photometric_jitter")
    augmentation = {name: getattr(options, name) for name in names}
    batches = GalaxyBatches(data.pixels, mean, std, options.image_size, training.device, training.seed, **augmentation)
    return trainer_class(
        model,
        training,
        train_dataset=data.train_dataset(recipe.galaxies.stream_buffer),
        eval_dataset=IndexDataset(split["validation"]),
        batches=batches,
        run_id=run["id"],
        peak_flops=training.world_size * measure_matmul_rate(training.device, _dtype(training)) if cuda else None,
    )


def log_run_summary(
    recipe: Recipe, data: PretrainingData, trainer: PretrainingTrainer, checkpoint: Path | None
) -> None:
    """Log what is trained on what."""
    training, size = recipe.training, recipe.galaxies.image_size
    counts = {"training": len(trainer.train_dataset)}
    counts |= {part: len(data.split[part]) for part in ("validation", "test", "dropped")}
    listed = ", ".join(f"{count:,} {part}" for part, count in counts.items())
    logger.info("%s: %s galaxies; image size %d", data.galaxies.name, listed, size)
    batch = f"{training.per_device_train_batch_size} per device x {training.gradient_accumulation_steps} accumulation"
    precision = str(_dtype(training)).removeprefix("torch.")
    logger.info(
        f"model: {trainer.model.num_parameters() / 1e6:.1f} M parameters; batch size {global_batch_size(training)} "
        f"({batch} steps); learning rate {training.learning_rate:.3g}; {precision} on {training.device}"
    )
    if checkpoint:
        logger.info("resuming from %s", checkpoint)


def _dtype(training: PretrainingArguments | TrainingArguments) -> torch.dtype:
    """The precision of products and attention."""
    return torch.bfloat16 if training.bf16 else torch.float16 if training.fp16 else torch.float32


def _measure_attention(config: ViTMAEConfig, args: TrainingArguments) -> list[SDPBackend]:
    """SDPA's backends for the micro-batches of a training, the fastest first; those of other devices need no order."""
    if args.device.type != "cuda" or args.full_determinism:  # another session might measure another order
        return []
    layers = attention_layers(config, args.per_device_train_batch_size)
    ranked = rank_attention_backends(layers, args.device, _dtype(args))
    seconds = ", ".join(f"{backend.name} {1e3 * total:.1f} ms" for backend, total in ranked.items())
    logger.info("attention of a micro-batch, forward and backward: %s", seconds or "no fused kernel can compute it")
    return list(ranked)


def _mean_loss(prediction: EvalPrediction) -> dict[str, float]:
    return {"loss": float(np.mean(prediction.predictions, dtype=np.float64))}

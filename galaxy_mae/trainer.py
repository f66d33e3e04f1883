"""The Hugging Face Trainer, with this project's data path, and made safe to kill and resume.

The Trainer keeps its loader, its sharding over processes, its schedule and its resume; they work on row numbers. Two
subclasses turn row numbers into pixels and masks (pre-training) or pixels and targets (fine-tuning). What they share
closes four gaps of transformers 5:

- its checkpoints hold tensor names that its own resume and `load_best_model_at_end` do not recognise (only a warning
  says so): ours hold the model's own names, and are loaded strictly and then checked;
- a checkpoint half-written at a kill looks whole: ours are written aside and renamed;
- a loss that is not finite is averaged away or saved: ours stops the run and keeps the last good checkpoint;
- the order of the rows depends on the random state: ours is a function of the seed and the epoch.
"""

import logging
import math
import shutil
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import Trainer, TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import EvalPrediction, TrainOutput, rotate_checkpoints

from galaxy_mae.batches import GalaxyBatches, mask_noise
from galaxy_mae.classifier import classifier_flops_per_image, layer_wise_groups
from galaxy_mae.errors import UserError, means_full_disk
from galaxy_mae.mae import check_mae, choose_attention, loss_per_image, patch_count, training_flops_per_image
from galaxy_mae.preemption import StopAtSignal, ignore_in_worker, may_fail_at_a_signal
from galaxy_mae.recipe import total_batch_size

logger = logging.getLogger(__name__)


class EpochOrder(Sampler):
    """A random order of `length` items, a function of (seed, epoch), cut to whole batches.

    Cut, because a last small batch would take an optimiser step of its own with a noisier gradient.
    """

    def __init__(self, length: int, batch_size: int, seed: int):
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order; the loader and the Trainer call this."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length // self.batch_size * self.batch_size

    def __iter__(self) -> Iterator[int]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.length)
        return iter(order[: len(self)].tolist())


class _SetEpoch(TrainerCallback):
    """Tells the sampler the epoch also where accelerate's wrappers (a resumed loader) do not pass it on."""

    def __init__(self, sampler: EpochOrder):
        self.sampler = sampler

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.sampler.set_epoch(state.global_step * self.sampler.batch_size // len(self.sampler))


class GalaxyTrainer(Trainer):
    """What both trainings share: the order of the rows, the clock, checkpoints that are whole, and resuming.

    Args:
        batches: turns row numbers into pixels.
        flops_per_image: floating-point operations of one image's forward and backward pass.
        peak_flops: rate of the devices' matrix products in FLOP/s, for the share of it that is reached; None where it
            is not measured.
        Others as for `transformers.Trainer`.
    """

    def __init__(
        self, *args, batches: GalaxyBatches, flops_per_image: float, peak_flops: float | None = None, **kwargs
    ):
        super().__init__(*args, **kwargs)
        choose_attention(self.model, self.args.device, self.args.bf16)
        self.batches = batches
        self.peak_flops = peak_flops
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        self.order = EpochOrder(len(self.train_dataset), total_batch_size(self.args), seed)
        self.add_callback(_SetEpoch(self.order))
        self.add_callback(StopAtSignal())
        self._flops_per_image = flops_per_image
        self._first_step: int | None = None
        self._measured_from: tuple[float, int] | None = None  # time and step from which images a second are counted
        self._writing_aside: Path | None = None

    # ------------------------------------------------------------------------------------------------------- the data

    def _get_train_sampler(self, train_dataset=None) -> EpochOrder:
        return self.order

    def get_train_dataloader(self) -> DataLoader:
        """As the Trainer's; its workers outlive the signals that Slurm sends to all of a job's processes."""
        return _deaf(super().get_train_dataloader())

    def get_eval_dataloader(self, eval_dataset: Dataset | None = None) -> DataLoader:
        """As `get_train_dataloader`."""
        return _deaf(super().get_eval_dataloader(eval_dataset))

    def floating_point_ops(self, inputs: dict) -> float:
        """Floating-point operations of a batch's forward and backward pass."""
        return self._flops_per_image * len(inputs["rows"])

    # --------------------------------------------------------------------------------------------------- the training

    def train(self, resume_from_checkpoint: str | None = None, **kwargs) -> TrainOutput:
        """As the Trainer's, with two repairs for runs of several sessions.

        Resumed from a checkpoint of the last step, the Trainer would take one step more; here it takes none. Its
        `train_loss` is the mean over this session; here it is the mean over the run, from the log.
        """
        if resume_from_checkpoint:
            state = TrainerState.load_from_json(Path(resume_from_checkpoint) / TRAINER_STATE_NAME)
            if state.global_step >= state.max_steps:
                self._load_weights(Path(resume_from_checkpoint))
                self.state = state
                if self.args.load_best_model_at_end and state.best_global_step:
                    self._load_best_model()
                return TrainOutput(state.global_step, *self._run_loss({}))
        output = super().train(resume_from_checkpoint, **kwargs)
        return TrainOutput(output.global_step, *self._run_loss(output.metrics))

    def _run_loss(self, metrics: dict[str, float]) -> tuple[float, dict[str, float]]:
        losses = [entry["loss"] for entry in self.state.log_history if "loss" in entry]
        loss = float(np.mean(losses)) if losses else metrics.get("train_loss", math.nan)
        return loss, metrics | {"train_loss": loss}

    def training_step(self, *args, **kwargs) -> torch.Tensor:
        """As the Trainer's; starts the clock after the first step, which compiles and warms up."""
        if self._first_step is None:
            self._first_step = self.state.global_step
        elif self._measured_from is None and self.state.global_step > self._first_step:
            self._measured_from = (time.perf_counter(), self.state.global_step)
        return super().training_step(*args, **kwargs)

    def _get_grad_norm(self, model: nn.Module, grad_norm: torch.Tensor | None = None) -> torch.Tensor | float | None:
        """Only for the steps that are logged: the Trainer passes over all gradients at every step for it."""
        if grad_norm is None and (self.state.global_step + 1) % self.state.logging_steps:
            return None
        return super()._get_grad_norm(model, grad_norm)

    # -------------------------------------------------------------------------------------------------------- the log

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add images a second and the share of the peak; stop at a loss that is not finite."""
        for name in ("loss", "grad_norm", "eval_loss"):
            if name in logs and not math.isfinite(logs[name]):
                self._stop_not_finite(f"{name} is {logs[name]}")
        if "loss" in logs and self._measured_from is not None:
            started, step = self._measured_from
            now = time.perf_counter()
            if self.state.global_step > step:
                images = (self.state.global_step - step) * total_batch_size(self.args)
                logs["images_per_second"] = images / (now - started)
                if self.peak_flops:
                    logs["share_of_peak"] = logs["images_per_second"] * self._flops_per_image / self.peak_flops
            self._measured_from = (now, self.state.global_step)
        with may_fail_at_a_signal():  # before the checkpoint is written
            super().log(logs, start_time)

    @contextmanager
    def _off_the_clock(self) -> Iterator[None]:
        """Keep evaluation and saving out of the images a second."""
        started = time.perf_counter()
        try:
            yield
        finally:
            if self._measured_from is not None:
                clock, step = self._measured_from
                self._measured_from = (clock + time.perf_counter() - started, step)

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        """As the Trainer's."""
        with self._off_the_clock():
            return super().evaluate(*args, **kwargs)

    def _stop_not_finite(self, what: str) -> None:
        last = find_checkpoint(Path(self.args.output_dir))
        kept = f"the last good checkpoint is {last}" if last else "there is no checkpoint yet"
        raise UserError(
            f"step {self.state.global_step}: {what}; stopped, {kept}; "
            "choose a new --output_dir with a lower --learning_rate, or --bf16 False if it was on"
        )

    # ---------------------------------------------------------------------------------------------------- checkpoints

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Write the model under its own tensor names: the names that resuming looks for."""
        if not self.args.should_save:  # the Trainer calls this on every process, and two writers destroy each other
            return
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        model.save_pretrained(output_dir or self.args.output_dir, save_original_format=False)

    def _get_output_dir(self, trial) -> str:
        return str(self._writing_aside or super()._get_output_dir(trial))

    def _save_checkpoint(self, model, trial) -> None:
        """Write a checkpoint aside, rename it when all processes are done, and then delete the oldest."""
        if not all(bool(torch.isfinite(parameter).all()) for parameter in self.model.parameters()):
            self._stop_not_finite("a weight is not finite")
        folder = Path(self.args.output_dir)
        name = f"checkpoint-{self.state.global_step}"
        aside = folder / ".checkpoint"
        with self._off_the_clock():
            if self.args.should_save:
                shutil.rmtree(aside, ignore_errors=True)  # of a process killed while it wrote
            self.accelerator.wait_for_everyone()
            self._writing_aside = aside
            try:
                super()._save_checkpoint(model, trial)
            except (OSError, RuntimeError, SafetensorError) as error:
                full = means_full_disk(error) or shutil.disk_usage(folder).free < 1 << 20
                shutil.rmtree(aside, ignore_errors=True)
                if full:
                    last = find_checkpoint(folder)
                    kept = f"the last whole checkpoint is {last}" if last else "there is no checkpoint yet"
                    raise UserError(
                        f"{folder}: the disk or quota is full; {kept}; free some space and type the same command again"
                    ) from error
                raise
            finally:
                self._writing_aside = None
            self.accelerator.wait_for_everyone()
            if self.state.best_global_step:  # by its final place: the Trainer looked for it in the folder aside
                self.state.best_model_checkpoint = str(folder / f"checkpoint-{self.state.best_global_step}")
            if self.args.should_save:
                self.state.save_to_json(str(aside / name / TRAINER_STATE_NAME))
                shutil.rmtree(folder / name, ignore_errors=True)
                (aside / name).rename(folder / name)
                shutil.rmtree(aside, ignore_errors=True)
                rotate_checkpoints(
                    str(folder), self.args.save_total_limit, self.state.best_model_checkpoint, use_mtime=False
                )
            self.accelerator.wait_for_everyone()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        self._load_weights(Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        # By its step: the path that the state holds is of the folder's place when it was written.
        self._load_weights(Path(self.args.output_dir) / f"checkpoint-{self.state.best_global_step}")

    def _load_weights(self, checkpoint: Path) -> None:
        """Load every tensor of a checkpoint into the model, or fail."""
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        try:
            model.load_state_dict(load_file(checkpoint / "model.safetensors"), strict=True)
        except (RuntimeError, OSError, SafetensorError) as error:
            reason = str(error).strip().splitlines()[-1].strip()
            raise UserError(f"{checkpoint}: does not hold this model's weights ({reason}); delete it") from error
        self.check_model(model)

    def check_model(self, model: nn.Module) -> None:
        """Raise a `UserError` if weights that were just loaded cannot be right."""


def _deaf(loader: DataLoader) -> DataLoader:
    """A loader, accelerate's or a plain one, whose workers ignore signals."""
    inner = getattr(loader, "base_dataloader", loader)
    inner.worker_init_fn = partial(ignore_in_worker, inner.worker_init_fn)
    return loader


class PretrainingTrainer(GalaxyTrainer):
    """Trains a `ViTMAEForPreTraining` on `Rows`."""

    def __init__(self, model, args, *, batches: GalaxyBatches, **kwargs):
        super().__init__(
            model,
            args,
            batches=batches,
            data_collator=batches.collate,
            flops_per_image=training_flops_per_image(model.config),
            compute_metrics=_mean_loss,
            **kwargs,
        )

    def _prepare_inputs(self, inputs: dict) -> dict[str, torch.Tensor]:
        """Row numbers to `pixel_values` (B, 3, S, S) and `noise` (B, patches), both float32 on the device."""
        rows = inputs["rows"].to(self.args.device)
        patches = patch_count(self.model.config)
        if self.model.training:
            step = self.state.global_step
            return {
                "pixel_values": self.batches.augmented(inputs, step),
                "noise": mask_noise(rows, self.args.seed, step, patches),
            }
        return {"pixel_values": self.batches.plain(inputs), "noise": evaluation_masks(rows, patches)}

    def prediction_step(
        self, model: nn.Module, inputs: dict, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[None, torch.Tensor, torch.Tensor]:
        """Losses (B,) of the single images, and their rows; `_mean_loss` makes `eval_loss` of them.

        The Trainer's own mean is over batches. Where several processes share the rows, the last batch is filled up with
        galaxies from the beginning, and they would count twice.
        """
        prepared = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            output = model(**prepared)
        mae = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        losses = loss_per_image(mae, prepared["pixel_values"], output.logits, output.mask)
        return None, losses, inputs["rows"].to(losses.device)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Weight decay on matrices only: not on biases, LayerNorms or tokens."""
        return [name for name, parameter in model.named_parameters() if parameter.squeeze().ndim > 1]

    def check_model(self, model: nn.Module) -> None:
        """Refuse an autoencoder without positions or with one prediction for every patch."""
        check_mae(model)


class FineTuningTrainer(GalaxyTrainer):
    """Trains a `MeanPooledViTForImageClassification` on labelled `Rows`.

    Args:
        label: (N,) int64, the class of every row of the source.
        layer_decay, label_smoothing, mixup: as in `recipe.FineTuningArguments`.
        Others as for `GalaxyTrainer`.
    """

    def __init__(
        self,
        model,
        args,
        *,
        batches: GalaxyBatches,
        label: np.ndarray,
        layer_decay: float,
        label_smoothing: float,
        mixup: float,
        **kwargs,
    ):
        self.layer_decay, self.label_smoothing, self.mixup = layer_decay, label_smoothing, mixup

        def collate(rows: list[int]) -> dict[str, torch.Tensor]:
            return batches.collate(rows) | {"labels": torch.from_numpy(label[rows])}

        flops = classifier_flops_per_image(model.config)
        super().__init__(
            model,
            args,
            batches=batches,
            data_collator=collate,
            flops_per_image=flops,
            compute_metrics=_validation_accuracy,
            **kwargs,
        )

    def _prepare_inputs(self, inputs: dict) -> dict[str, torch.Tensor]:
        """Row numbers and classes to `pixel_values` (B, 3, S, S) float32 and `labels`, on the device.

        In training the labels are (B, K) float32: smoothed, and mixed as the images are; otherwise (B,) int64.
        """
        labels = inputs["labels"].to(self.args.device)
        if not self.model.training:
            return {"pixel_values": self.batches.plain(inputs), "labels": labels}
        step = self.state.global_step
        images = self.batches.augmented(inputs, step)
        targets = smooth_targets(labels, self.model.config.num_labels, self.label_smoothing)
        images, targets = mix_up(images, targets, self.mixup, self.args.seed, step)
        return {"pixel_values": images, "labels": targets}

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW whose learning rate falls from the head down to the patches."""
        if self.optimizer is None:
            model = self.model if model is None else model
            optimizer, options = self.get_optimizer_cls_and_kwargs(self.args, model)
            groups = layer_wise_groups(model, self.args.learning_rate, self.args.weight_decay, self.layer_decay)
            self.optimizer = optimizer(groups, **options)
        return self.optimizer


def smooth_targets(labels: torch.Tensor, classes: int, smoothing: float) -> torch.Tensor:
    """(B,) int64 classes to (B, classes) float32 probabilities, `smoothing` of which is spread over all classes."""
    return F.one_hot(labels, classes).float() * (1 - smoothing) + smoothing / classes


def mix_up(
    images: torch.Tensor, targets: torch.Tensor, alpha: float, seed: int, step: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Blend each image, and its target, with that of the batch's mirror place (Zhang et al. 2018, mixup).

    The share is Beta(alpha, alpha), one for a batch, and a function of (seed, step); alpha 0 blends nothing.
    """
    if alpha == 0:
        return images, targets
    share = np.random.default_rng([seed, step]).beta(alpha, alpha)
    return tuple(torch.lerp(x.flip(0), x, share) for x in (images, targets))


def _mean_loss(prediction: EvalPrediction) -> dict[str, float]:
    return {"loss": float(np.mean(prediction.predictions, dtype=np.float64))}


def _validation_accuracy(prediction: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float(np.mean(prediction.predictions.argmax(axis=1) == prediction.label_ids))}


def evaluation_masks(rows: torch.Tensor, patches: int) -> torch.Tensor:
    """The noise that fixes the masks of validation images, the same in every run: (B, patches) float32."""
    return mask_noise(rows, seed=0, step=0, patches=patches)


def find_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint of a run, or None.

    One that is being written has another name and is never found; one that was damaged later is passed over with a
    line that says so.
    """
    checkpoints = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    for checkpoint in sorted(checkpoints, key=lambda path: -int(path.name.removeprefix("checkpoint-"))):
        if _is_whole(checkpoint):
            return checkpoint
        logger.warning("%s is damaged: passed over", checkpoint)
    return None


def _is_whole(checkpoint: Path) -> bool:
    """Whether all that resuming needs is there and not cut short: weights, optimiser, schedule, state, random state."""
    try:
        with safe_open(checkpoint / "model.safetensors", "pt") as weights:
            weights.keys()
        TrainerState.load_from_json(checkpoint / TRAINER_STATE_NAME)
    except (OSError, ValueError, TypeError, SafetensorError):
        return False
    pickled = [checkpoint / "optimizer.pt", checkpoint / "scheduler.pt", *checkpoint.glob("rng_state*.pth")]
    return len(pickled) > 2 and all(zipfile.is_zipfile(path) for path in pickled)  # torch's files are zip archives

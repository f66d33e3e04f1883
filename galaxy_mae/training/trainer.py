"""The Hugging Face Trainer with this project's data path, safe to kill and resume: pre-training and fine-tuning.

The Trainer keeps its loader, its sharding over processes, its schedule and its resume, all over sample indices. Two
subclasses turn indices into pixels and masks (pre-training) or pixels and targets (fine-tuning). Their base class
closes four gaps of the Trainer (docs/transformers5.md describes the first two):

- default checkpoints hold tensor names that resuming and `load_best_model_at_end` do not know, with just a warning:
  ours hold the model's own names, and are loaded strictly and then checked;
- an incomplete checkpoint looks like a complete one: ours end with a manifest (`checkpoints.py`);
- a loss that is not finite is averaged away or saved: ours stops the run and keeps the last good checkpoint;
- the sample order depends on the random state: ours is a function of the seed and the epoch.

Private methods of the Trainer that are overridden here, with the reason. `tests/test_trainer.py` fails if a release of
transformers no longer has one or no longer calls it:

- `_get_grad_norm`: the Trainer computes the norm of all gradients at every step, also if nothing is clipped, at 5 % of
  the small model's throughput (docs/performance.md). It has no public option to do so only for logged steps.
"""

import copy
import logging
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers import (
    BeitForImageClassification,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
    ViTMAEForPreTraining,
    set_seed,
)
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.models.vit_mae.modeling_vit_mae import ViTMAEForPreTrainingOutput
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import EvalLoopOutput, EvalPrediction, TrainOutput

from galaxy_mae.data.batches import EpochSampler, GalaxyBatches, IndexDataset
from galaxy_mae.data.pretraining import PretrainingData
from galaxy_mae.data.random_numbers import evaluation_mask_noise, light_mask_noise, mask_noise
from galaxy_mae.errors import UserError, is_disk_full
from galaxy_mae.files import atomic_file, follow_umask, write_json
from galaxy_mae.model.compute import (
    classifier_flops_per_image,
    measure_classifier,
    measure_matmul_rate,
    num_patches,
    select_attn_implementation,
    training_flops_per_image,
)
from galaxy_mae.model.mae import build_mae, check_mae, loss_per_image, patch_statistics
from galaxy_mae.training.arguments import ONLINE_PROBES, FineTuningArguments, ObjectiveArguments
from galaxy_mae.training.checkpoints import (
    MANIFEST,
    CompleteCheckpoints,
    checkpoint_folder,
    find_checkpoint,
    load_weights,
    read_manifest,
    remove_unusable_checkpoints,
)
from galaxy_mae.training.parameter_groups import decayed_parameter_names, layer_wise_groups
from galaxy_mae.training.preemption import StopAtSignal, ignore_signals_in_worker, suppress_errors_after_signal
from galaxy_mae.training.recipe import Recipe, global_batch_size
from galaxy_mae.training.tracking import StepTimer

logger = logging.getLogger(__name__)


class _SetEpoch(TrainerCallback):
    """Passes the epoch to the sampler also where accelerate's wrappers of a resumed loader do not."""

    def __init__(self, sampler: EpochSampler):
        self.sampler = sampler

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.sampler.set_epoch(state.global_step * self.sampler.batch_size // len(self.sampler))


class GalaxyTrainer(Trainer):
    """What pre-training and fine-tuning share: sample order, throughput, complete checkpoints, resuming.

    Args:
        batches: turns sample indices into pixels.
        run_id: of this run; only its own checkpoints are resumed from. The main process's counts.
        flops_per_image: FLOPs of one image's forward and backward pass.
        peak_flops: rate of the devices' matrix products in FLOP/s, for the MFU; None where it is not measured.
        Others as for `transformers.Trainer`.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *,
        batches: GalaxyBatches,
        run_id: str,
        flops_per_image: float,
        peak_flops: float | None = None,
        **kwargs,
    ):
        args, limit = copy.copy(args), args.save_total_limit
        args.save_total_limit = None  # `CompleteCheckpoints` keeps the limit
        super().__init__(model, args, **kwargs)
        self.saving = False
        self.all_metrics: dict[str, float] = {}
        (self.run_id,) = broadcast_object_list([run_id])
        select_attn_implementation(self.model, self.args.device, self.args.bf16)
        self.batches = batches
        self.peak_flops = peak_flops
        self.flops_per_image = flops_per_image
        self.timer = StepTimer()
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        self.sampler = self.train_dataset.sampler(global_batch_size(self.args), seed)
        self.add_callback(_SetEpoch(self.sampler))
        # First, so that a checkpoint is complete before a tracker uploads it or fails; and the exit at a signal last.
        complete_checkpoints = CompleteCheckpoints(self, self.run_id, limit, on_complete=self._end_saving)
        self.callback_handler.callbacks.insert(0, complete_checkpoints)
        self.add_callback(StopAtSignal())

    def prepare_batch(self, batch: dict[str, torch.Tensor], training: bool) -> dict[str, torch.Tensor]:
        """The loader's batch to the model's inputs, on the device. Subclasses implement it."""
        raise NotImplementedError

    def check_model(self, model: nn.Module) -> None:
        """Raise a `UserError` if weights that were just loaded cannot be right."""

    # ------------------------------------------------------------------------------------------------------- the data

    def get_train_dataloader(self) -> DataLoader:
        """Samples in the order of `sampler`, in workers that ignore the signals that Slurm sends to a job."""
        loader = DataLoader(
            self.train_dataset,
            self.args.train_batch_size,
            sampler=self.sampler,
            collate_fn=getattr(self.train_dataset, "collate", self.data_collator),
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            prefetch_factor=self.args.dataloader_prefetch_factor,
            worker_init_fn=ignore_signals_in_worker,
        )
        return self.accelerator.prepare(loader)

    def get_eval_dataloader(self, eval_dataset: Dataset | None = None) -> DataLoader:
        """As the Trainer's, with such workers."""
        loader = super().get_eval_dataloader(eval_dataset)
        getattr(loader, "base_dataloader", loader).worker_init_fn = ignore_signals_in_worker
        return loader

    def floating_point_ops(self, inputs: dict) -> float:
        """FLOPs of a batch's forward and backward pass."""
        return self.flops_per_image * len(inputs["index"])

    # --------------------------------------------------------------------------------------------------- the training

    def train(self, resume_from_checkpoint: str | None = None, **kwargs) -> TrainOutput:
        """As the Trainer's, with strict loading and with two fixes for runs of several sessions.

        Resumed from a checkpoint of the last step, the Trainer would take one step more; this takes none. The Trainer's
        `train_loss` is the mean over this session; here it is the mean over the run, from the log.

        Raises:
            UserError: weights that do not fit the model, a loss that is not finite, a model that cannot be compiled, or
                a full disk.
        """
        if resume_from_checkpoint:
            self.args.eval_on_start = False
            self._load_and_check(Path(resume_from_checkpoint))
            state = TrainerState.load_from_json(Path(resume_from_checkpoint) / TRAINER_STATE_NAME)
            if state.global_step >= state.max_steps:
                self.state = state
                if self.args.should_save:
                    remove_unusable_checkpoints(Path(self.args.output_dir), self.run_id, state.global_step)
                self._load_best()
                return TrainOutput(state.global_step, *self._run_loss({}))
        try:
            output = super().train(resume_from_checkpoint, **kwargs)
        except UserError as error:  # of a loader's worker, with its traceback in the message
            raise UserError(
                str(error).strip().splitlines()[-1].removeprefix("galaxy_mae.errors.UserError: ")
            ) from error
        except (OSError, RuntimeError, SafetensorError) as error:
            self._check_disk_full(error)
            _check_compiler(error)
            raise
        self._load_best()
        return TrainOutput(output.global_step, *self._run_loss(output.metrics))

    def end(self) -> None:
        """Wait for all processes, then take down the process group and its threads; the last thing that a script does.

        A thread of gloo that drops a tensor while the interpreter shuts down aborts the process
        (pytorch/pytorch#179291). These threads end with the last reference to the process group, not with
        `destroy_process_group`, and DDP's wrapper of the model holds such references.
        """
        self.accelerator.wait_for_everyone()
        self.model_wrapped = self.model
        self.accelerator.free_memory()
        self.accelerator.end_training()

    def _run_loss(self, metrics: dict[str, float]) -> tuple[float, dict[str, float]]:
        losses = [entry["loss"] for entry in self.state.log_history if "loss" in entry]
        loss = float(np.mean(losses)) if losses else metrics.get("train_loss", math.nan)
        return loss, metrics | {"train_loss": loss}

    def training_step(self, model: nn.Module, inputs: dict, num_items_in_batch=None) -> torch.Tensor:
        """As the Trainer's, on a batch of sample indices."""
        self.timer.begin_step(self.state.global_step)
        return super().training_step(model, self.prepare_batch(inputs, training=True), num_items_in_batch)

    def prediction_step(
        self, model: nn.Module, inputs: dict, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """As the Trainer's, on a batch of sample indices."""
        prepared = self.prepare_batch(inputs, training=False)
        return super().prediction_step(model, prepared, prediction_loss_only, ignore_keys)

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        """As the Trainer's, excluded from the throughput."""
        self.timer.pause()
        try:
            return super().evaluate(*args, **kwargs)
        finally:
            self.timer.resume()

    def _get_grad_norm(self, model: nn.Module, grad_norm: torch.Tensor | None = None) -> torch.Tensor | float | None:
        """Only for logged steps; see the list at the top of this file."""
        if grad_norm is None and (self.state.global_step + 1) % self.state.logging_steps:
            return None
        return super()._get_grad_norm(model, grad_norm)

    # -------------------------------------------------------------------------------------------------------- the log

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add images per second and MFU; stop at a loss that is not finite."""
        for name in ("loss", "grad_norm", "eval_loss"):
            if name in logs and not math.isfinite(logs[name]):
                self._stop_not_finite(f"{name} is {logs[name]}")
        if "loss" in logs and (rate := self.timer.steps_per_second(self.state.global_step)):
            logs["images_per_second"] = rate * global_batch_size(self.args)
            if self.peak_flops:
                logs["mfu"] = logs["images_per_second"] * self.flops_per_image / self.peak_flops
        with suppress_errors_after_signal():  # they must not prevent the checkpoint
            super().log(logs, start_time)

    def _stop_not_finite(self, what: str) -> None:
        raise UserError(
            f"step {self.state.global_step}: {what}; stopped, {self._last_checkpoint()}; "
            "choose a new --output_dir with a lower --learning_rate, or --bf16 False if it was on"
        )

    def _last_checkpoint(self) -> str:
        last = find_checkpoint(Path(self.args.output_dir), self.run_id)
        return f"the last good checkpoint is {last}" if last else "there is no checkpoint yet"

    def save_metrics(self, split: str, metrics: dict[str, float], combined: bool = True) -> None:
        """As the Trainer's, atomically: it reads `all_results.json` again, which a killed process left half-written."""
        if not self.is_world_process_zero():
            return
        folder = Path(self.args.output_dir)
        write_json(folder / f"{split}_results.json", dict(sorted(metrics.items())))
        if combined:
            self.all_metrics |= metrics
            write_json(folder / "all_results.json", dict(sorted(self.all_metrics.items())))

    def save_state(self) -> None:
        """As the Trainer's, atomically."""
        if self.is_world_process_zero():
            with atomic_file(Path(self.args.output_dir) / TRAINER_STATE_NAME) as tmp_path:
                self.state.save_to_json(str(tmp_path))

    # ---------------------------------------------------------------------------------------------------- checkpoints

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the model under its own tensor names, which resuming looks for. A checkpoint begins with this."""
        self.timer.pause()  # until the checkpoint is complete
        self.saving = True
        if not all(bool(torch.isfinite(parameter).all()) for parameter in self.model.parameters()):
            self._stop_not_finite("a weight is not finite")
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            (folder / MANIFEST).unlink(missing_ok=True)
            self.unwrapped_model.save_pretrained(folder, save_original_format=False)
            follow_umask(folder / "model.safetensors")

    def _end_saving(self) -> None:
        self.saving = False
        self.timer.resume()

    @property
    def unwrapped_model(self) -> nn.Module:
        """The model without the wrappers of `torch.compile` and DistributedDataParallel."""
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    def _load_and_check(self, checkpoint: Path) -> None:
        load_weights(self.unwrapped_model, checkpoint)
        self.check_model(self.unwrapped_model)

    def _load_best(self) -> None:
        """Load the best checkpoint if that is wanted."""
        if self.args.load_best_model_at_end and self.state.best_global_step:
            best = checkpoint_folder(self.args, self.state.best_global_step)
            try:
                read_manifest(best / MANIFEST, self.run_id)
            except UserError as error:
                raise UserError(f"{error}: the best one is lost; delete {best.parent} and train again") from error
            self._load_and_check(best)
            self.state.best_model_checkpoint = str(best)
        elif self.args.load_best_model_at_end:
            logger.warning("there was no evaluation that could tell the best weights: the last ones are kept")

    def _check_disk_full(self, error: Exception) -> None:
        """Raise a `UserError` if a full disk is the reason why saving failed, and remove the incomplete checkpoint."""
        folder = Path(self.args.output_dir)
        if self.saving and (is_disk_full(error) or shutil.disk_usage(folder).free < 1 << 20):  # torch does not say so
            remove_unusable_checkpoints(folder, self.run_id, self.state.global_step)
            raise UserError(
                f"{folder}: the disk or quota is full; {self._last_checkpoint()}; free space and repeat the command"
            ) from error


class PretrainingTrainer(GalaxyTrainer):
    """Trains a `ViTMAEForPreTraining` on the data set of a `PretrainingData`.

    Args:
        objective: which patches are masked, and how much their errors count.
        probe: an attribute that is None at first: returns accuracies of the model's frozen features, by name.
        Others as for `GalaxyTrainer`.
    """

    def __init__(
        self,
        model: ViTMAEForPreTraining,
        args: TrainingArguments,
        *,
        batches: GalaxyBatches,
        objective: ObjectiveArguments,
        **kwargs,
    ):
        self.objective = objective
        self.probe: Callable[[ViTMAEForPreTraining], dict[str, float]] | None = None
        super().__init__(
            model,
            args,
            batches=batches,
            data_collator=batches.collate,
            flops_per_image=training_flops_per_image(model.config),
            compute_metrics=_mean_loss,
            **kwargs,
        )

    def prepare_batch(self, batch: dict[str, torch.Tensor], training: bool) -> dict[str, torch.Tensor]:
        """`pixel_values` (B, 3, S, S) and `noise` (B, patches), both float32."""
        index, patches = batch["index"].to(self.args.device), num_patches(self.model.config)
        if not training:
            return {"pixel_values": self.batches.eval_transform(batch), "noise": evaluation_mask_noise(index, patches)}
        step = self.sampler.random_step(self.state.global_step)
        pixels, noise = self.batches.train_transform(batch, step), mask_noise(index, self.args.seed, step, patches)
        if self.objective.masking == "light":
            _, std = patch_statistics(self.unwrapped_model.patchify(pixels))
            counts = self.objective.patch_counts(patches, self.model.config.mask_ratio)
            noise = light_mask_noise(noise, std.squeeze(-1), *counts)
        return {"pixel_values": pixels, "noise": noise}

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, ViTMAEForPreTrainingOutput]:
        """The model's own loss, or that of weighted patches."""
        if self.objective.loss_weighting == "none":
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        outputs = model(**inputs)
        images, weighting = inputs["pixel_values"], self.objective.loss_weighting
        loss = loss_per_image(self.unwrapped_model, images, outputs.logits, outputs.mask, weighting).mean()
        return (loss, outputs) if return_outputs else loss

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
        losses = loss_per_image(self.unwrapped_model, prepared["pixel_values"], output.logits, output.mask)
        return None, losses, inputs["index"].to(losses.device)

    def evaluation_loop(self, *args, **kwargs) -> EvalLoopOutput:
        """As the Trainer's; the metrics have the accuracies of the online probes where these are due."""
        output = super().evaluation_loop(*args, **kwargs)
        if self.probe is not None and self._probe_is_due():
            accuracies = [self.probe(self.unwrapped_model) if self.is_world_process_zero() else None]
            (accuracies,) = broadcast_object_list(accuracies)  # all processes must agree on the best checkpoint
            output.metrics.update({f"eval_online_{name}": value for name, value in accuracies.items()})
        return output

    def _probe_is_due(self) -> bool:
        """Before the first step, and when enough epochs have passed since the last probe in the log of the run."""
        if (self.args.metric_for_best_model or "").removeprefix("eval_") in ONLINE_PROBES:
            return True
        probed = [entry["epoch"] for entry in self.state.log_history if f"eval_{ONLINE_PROBES[0]}" in entry]
        passed = (self.state.epoch or 0) - probed[-1] if probed else math.inf
        return self.args.probe_every > 0 and passed > self.args.probe_every - 1e-6

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Weight decay on matrices only."""
        return decayed_parameter_names(model)

    def check_model(self, model: nn.Module) -> None:
        """Refuse an autoencoder without position embeddings, or with one prediction for every patch."""
        check_mae(model)


def build_trainer(recipe: Recipe, data: PretrainingData, run_id: str) -> PretrainingTrainer:
    """Build the Trainer of a recipe: a new model, batches of the galaxies, and the measured peak of the GPUs.

    Args:
        recipe: the resolved configuration.
        data: the opened data set, of which training and validation galaxies are used.
        run_id: as in `run.json`.

    Raises:
        UserError: several GPUs in one process; a color channel that is constant over the training images.
    """
    training, galaxies, split = recipe.training, data.galaxies, data.split
    training.dataloader_num_workers = data.loader_workers(training.dataloader_num_workers, training.device.type)
    training.check_gpus()
    set_seed(training.seed)
    model = build_mae(recipe.model_config, training.seed)
    check_mae(model)
    mean, std = galaxies.channel_statistics(split["train"])
    size, min_crop_scale = recipe.galaxies.image_size, recipe.galaxies.min_crop_scale
    batches = GalaxyBatches(galaxies.pixels, mean, std, size, training.device, training.seed, min_crop_scale)
    return PretrainingTrainer(
        model,
        training,
        train_dataset=data.train_dataset(recipe.galaxies.stream_buffer),
        eval_dataset=IndexDataset(split["validation"]),
        batches=batches,
        objective=recipe.objective,
        run_id=run_id,
        peak_flops=_measure_peak_flops(training),
    )


def _check_compiler(error: Exception) -> None:
    """Raise a `UserError` if `torch.compile` failed, which it does at the first step."""
    if type(error).__module__.startswith(("torch._dynamo.", "torch._inductor.")):  # slow to import, so not by class
        reason = str(error).split("\n\n")[0]  # what follows are a stack and advice for developers
        raise UserError(f"--torch_compile: {reason}; --torch_compile False trains without it") from error


def _measure_peak_flops(training: TrainingArguments) -> float | None:
    """The matrix-product rate of all GPUs together in FLOP/s, measured on this one; None on other devices."""
    if training.device.type != "cuda":
        return None
    dtype = torch.bfloat16 if training.bf16 else torch.float16 if training.fp16 else torch.float32
    return measure_matmul_rate(training.device, dtype) * training.world_size


class FineTuningTrainer(GalaxyTrainer):
    """Trains a classifier on a labelled `IndexDataset`.

    Args:
        args: of the training.
        label: (N,) int64, the class of every training and validation image.
        Others as for `GalaxyTrainer`.
    """

    def __init__(
        self,
        model: nn.Module,
        args: FineTuningArguments,
        *,
        batches: GalaxyBatches,
        label: np.ndarray,
        **kwargs,
    ):
        def collate(indices: list[int]) -> dict[str, torch.Tensor]:
            return batches.collate(indices) | {"labels": torch.from_numpy(label[indices])}

        super().__init__(
            model,
            args,
            batches=batches,
            data_collator=collate,
            flops_per_image=_classifier_flops(model, batches.image_size),
            compute_metrics=_validation_accuracy,
            **kwargs,
        )
        self.model_accepts_loss_kwargs = False  # `compute_loss` returns the mean over a micro-batch

    def prepare_batch(self, batch: dict[str, torch.Tensor], training: bool) -> dict[str, torch.Tensor]:
        """`pixel_values` (B, 3, S, S) float32 and `labels`.

        In training the labels are (B, K) float32, smoothed, and mixed as the images are; otherwise (B,) int64.
        """
        labels = batch["labels"].to(self.args.device)
        if not training:
            return {"pixel_values": self.batches.eval_transform(batch), "labels": labels}
        step = self.state.global_step
        images = self.batches.train_transform(batch, step)
        targets = smooth_targets(labels, self.model.config.num_labels, self.args.label_smoothing)
        images, targets = mix_up(images, targets, self.args.mixup, self.args.seed, step)
        return {"pixel_values": images, "labels": targets}

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, ImageClassifierOutput]:
        """The mean cross-entropy, also with probabilities as labels, where transformers' own loss is another one."""
        outputs = model(pixel_values=inputs["pixel_values"])
        loss = F.cross_entropy(outputs.logits.float(), inputs["labels"])
        return (loss, outputs) if return_outputs else loss

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW with learning rates that fall from the head to the patches."""
        if self.optimizer is None:
            model = self.model if model is None else model
            optimizer, options = self.get_optimizer_cls_and_kwargs(self.args, model)
            groups = layer_wise_groups(model, self.args.learning_rate, self.args.weight_decay, self.args.layer_decay)
            self.optimizer = optimizer(groups, **options)
        return self.optimizer


def _classifier_flops(model: nn.Module, image_size: int) -> float:
    if isinstance(model, BeitForImageClassification):
        return classifier_flops_per_image(model.config)
    return measure_classifier(model, image_size)[0]


def smooth_targets(labels: torch.Tensor, classes: int, smoothing: float) -> torch.Tensor:
    """(B,) int64 classes to (B, classes) float32 probabilities, with `smoothing` spread over all classes."""
    return F.one_hot(labels, classes).float() * (1 - smoothing) + smoothing / classes


def mix_up(
    images: torch.Tensor, targets: torch.Tensor, alpha: float, seed: int, step: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Blend a batch of images and targets with the same batch in reverse order (mixup, Zhang et al. 2018).

    The weight is Beta(alpha, alpha), one per micro-batch, and a function of (seed, step). Alpha 0 blends nothing.
    """
    if alpha == 0:
        return images, targets
    weight = np.random.default_rng([seed, step]).beta(alpha, alpha)
    return tuple(torch.lerp(x.flip(0), x, weight) for x in (images, targets))


def _mean_loss(prediction: EvalPrediction) -> dict[str, float]:
    return {"loss": float(np.mean(prediction.predictions, dtype=np.float64))}


def _validation_accuracy(prediction: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float(np.mean(prediction.predictions.argmax(axis=1) == prediction.label_ids))}

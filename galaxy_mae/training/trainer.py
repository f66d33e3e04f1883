"""The Hugging Face Trainer with this project's data path, safe to kill and resume.

The Trainer keeps its loader, its sharding over processes, its schedule and its resume, all over sample indices. Two
subclasses turn indices into pixels and masks (`pretraining.py`) or pixels and targets (in `evaluation`). Their base
class closes four gaps of the Trainer (docs/transformers5.md describes the first two):

- default checkpoints hold tensor names that resuming and `load_best_model_at_end` do not know, with just a warning:
  ours hold the model's own names, and are loaded strictly;
- an incomplete checkpoint looks like a complete one: ours end with a manifest (`checkpoints.py`);
- a loss that is not finite is averaged away or saved: ours stops the run and keeps the last good checkpoint;
- the sample order depends on the random state: ours is a function of the seed and the epoch.

Private methods of the Trainer that are overridden here, with the reason. `tests/test_trainer.py` fails if a release of
transformers no longer has one or no longer calls it:

- `_get_grad_norm`: the Trainer computes the norm of all gradients at every step, also if nothing is clipped, at 5 % of
  the small model's throughput (docs/performance.md). It has no public option to do so only for logged steps.
"""

import math
import os
import shutil
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import TrainOutput

from galaxy_mae.data.batches import EpochSampler, GalaxyBatches
from galaxy_mae.data.download import cache_folder
from galaxy_mae.errors import DISK_FULL, UserError, is_disk_full
from galaxy_mae.files import atomic_file, follow_umask, write_json
from galaxy_mae.model.attention import fuse_qkv
from galaxy_mae.model.compute import select_attn_implementation
from galaxy_mae.training import checkpoints
from galaxy_mae.training.arguments import FineTuningArguments, PretrainingArguments
from galaxy_mae.training.preemption import StopAtSignal, ignore_signals_in_worker, suppress_errors_after_signal
from galaxy_mae.training.recipe import global_batch_size
from galaxy_mae.training.tracking import ShowProgress, StepTimer, use_trackers


class _SetEpoch(TrainerCallback):
    """Passes the epoch to the sampler also where accelerate's wrappers of a resumed loader do not."""

    def __init__(self, sampler: EpochSampler):
        self.sampler = sampler

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.sampler.set_epoch(state.global_step * self.sampler.batch_size // len(self.sampler))


class CompleteCheckpoints(TrainerCallback):
    """Marks a checkpoint as complete once all processes have written it, and then deletes the oldest.

    The Trainer's own deletion, by `save_total_limit`, comes before the new checkpoint is marked: a kill between the two
    could leave none. It is therefore switched off, and this callback keeps the limit. The Trainer's own loading of the
    best model is not strict. It is skipped, because the state never names a checkpoint for it.
    """

    def __init__(self, trainer: "GalaxyTrainer"):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        """Delete what an earlier process left incomplete."""
        if args.should_save:
            checkpoints.remove_unusable_checkpoints(Path(args.output_dir), self.trainer.run_id, state.global_step)
        state.best_model_checkpoint = None

    def on_save(self, args, state, control, **kwargs):
        """Write the manifest."""
        self.trainer.accelerator.wait_for_everyone()  # each process writes its own random state
        if args.should_save:
            checkpoint = checkpoint_folder(args, state.global_step)
            checkpoints.write_manifest(
                checkpoint / checkpoints.MANIFEST, self.trainer.run_id, filter(Path.is_file, checkpoint.iterdir())
            )
            best = checkpoint_folder(args, state.best_global_step) if state.best_global_step else None
            checkpoints.remove_old_checkpoints(Path(args.output_dir), self.trainer.options.save_total_limit, best)
        self.trainer.accelerator.wait_for_everyone()
        state.best_model_checkpoint = None
        self.trainer.saving = False
        self.trainer.timer.restart(state.global_step)


def checkpoint_folder(args: TrainingArguments, step: int) -> Path:
    """Where the Trainer writes the checkpoint of a step."""
    return Path(args.output_dir) / f"checkpoint-{step}"


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
        options: PretrainingArguments | FineTuningArguments,
        *,
        batches: GalaxyBatches,
        run_id: str,
        flops_per_image: float,
        peak_flops: float | None = None,
        **kwargs,
    ):
        super().__init__(model, options.trainer_arguments(), **kwargs)
        self.options, self.batches = options, batches
        self.flops_per_image, self.peak_flops = flops_per_image, peak_flops
        self.saving = False
        self.all_metrics: dict[str, float] = {}
        (self.run_id,) = broadcast_object_list([run_id])
        select_attn_implementation(self.model, self.args.device, self.args.bf16)
        if self.args.device.type == "cuda":  # on a CPU it is as fast as three products
            fuse_qkv(self.model)
        batches.compiled = self.args.torch_compile and self.args.device.type == "cuda"
        if self.args.torch_compile:
            _keep_compiled_code()
        self.timer = StepTimer()
        self.sampler = self.train_dataset.sampler(global_batch_size(self.args), self.args.seed)
        self.add_callback(_SetEpoch(self.sampler))
        self.trackers = use_trackers(self)
        # First, so that a checkpoint is complete before a tracker uploads it or fails; and the exit at a signal last.
        self.callback_handler.callbacks.insert(0, CompleteCheckpoints(self))
        self.progress = ShowProgress()
        self.add_callback(self.progress)
        self.add_callback(StopAtSignal())

    def prepare_batch(self, batch: dict[str, torch.Tensor], training: bool) -> dict[str, torch.Tensor]:
        """The loader's batch to the model's inputs, on the device. Subclasses implement it."""
        raise NotImplementedError

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
            self._load(Path(resume_from_checkpoint))
            state = TrainerState.load_from_json(Path(resume_from_checkpoint) / TRAINER_STATE_NAME)
            if state.global_step >= state.max_steps:
                self.state = state
                if self.args.should_save:
                    checkpoints.remove_unusable_checkpoints(Path(self.args.output_dir), self.run_id, state.global_step)
                self._load_best()
                return TrainOutput(state.global_step, *self._run_loss({}))
        try:
            output = super().train(resume_from_checkpoint, **kwargs)
        except UserError as error:  # of a loader's worker, with its traceback in the message
            last_line = str(error).strip().splitlines()[-1]
            raise UserError(last_line.removeprefix("galaxy_mae.errors.UserError: ")) from error
        except (OSError, RuntimeError, SafetensorError) as error:
            self._check_disk_full(error)
            _check_compiler(error)
            raise
        finally:
            self.progress.close()
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
        metrics = super().evaluate(*args, **kwargs)
        self.timer.restart(self.state.global_step)
        return metrics

    def _get_grad_norm(self, model: nn.Module, grad_norm: torch.Tensor | None = None) -> torch.Tensor | float | None:
        """Only for logged steps; see the list at the top of this file."""
        if grad_norm is None and (self.state.global_step + 1) % self.state.logging_steps:
            return None
        return super()._get_grad_norm(model, grad_norm)

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
        last = checkpoints.find_checkpoint(Path(self.args.output_dir), self.run_id)
        return f"the last good checkpoint is {last}" if last else "there is no checkpoint yet"

    def save_metrics(self, split: str, metrics: dict[str, float], combined: bool = True) -> None:
        """As the Trainer's, atomically: it reads `all_results.json` again, which a killed process left half-written."""
        if self.is_world_process_zero():
            self.all_metrics |= metrics
            for name, values in ((split, metrics), ("all", self.all_metrics)):
                write_json(Path(self.args.output_dir) / f"{name}_results.json", dict(sorted(values.items())))

    def save_state(self) -> None:
        """As the Trainer's, atomically."""
        if self.is_world_process_zero():
            with atomic_file(Path(self.args.output_dir) / TRAINER_STATE_NAME) as tmp_path:
                self.state.save_to_json(str(tmp_path))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the model under its own tensor names, which resuming looks for. A checkpoint begins with this."""
        self.saving = True
        if not all(bool(torch.isfinite(parameter).all()) for parameter in self.model.parameters()):
            self._stop_not_finite("a weight is not finite")
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            (folder / checkpoints.MANIFEST).unlink(missing_ok=True)
            self.unwrapped_model.save_pretrained(folder, save_original_format=False)
            follow_umask(folder / "model.safetensors")

    @property
    def unwrapped_model(self) -> nn.Module:
        """The model without the wrappers of `torch.compile` and DistributedDataParallel."""
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    def _load(self, checkpoint: Path) -> None:
        """Load every tensor of a checkpoint. A missing, unexpected or mismatched one is an error."""
        try:
            self.unwrapped_model.load_state_dict(load_file(checkpoint / "model.safetensors"), strict=True)
        except (RuntimeError, OSError, SafetensorError) as error:
            reason = str(error).strip().splitlines()[-1].strip()
            raise UserError(f"{checkpoint}: does not hold this model's weights ({reason}); delete it") from error

    def _load_best(self) -> None:
        """Load the best checkpoint if that is wanted."""
        if self.args.load_best_model_at_end and self.state.best_global_step:
            best = checkpoint_folder(self.args, self.state.best_global_step)
            try:
                checkpoints.read_manifest(best / checkpoints.MANIFEST, self.run_id)
            except UserError as error:
                raise UserError(f"{error}: the best one is lost; delete {best.parent} and train again") from error
            self._load(best)
            self.state.best_model_checkpoint = str(best)

    def _check_disk_full(self, error: Exception) -> None:
        """Raise a `UserError` if a full disk is the reason why saving failed, and remove the incomplete checkpoint."""
        folder = Path(self.args.output_dir)
        if self.saving and (is_disk_full(error) or shutil.disk_usage(folder).free < 1 << 20):  # torch does not say so
            checkpoints.remove_unusable_checkpoints(folder, self.run_id, self.state.global_step)
            raise UserError(
                f"{folder}: {DISK_FULL}; {self._last_checkpoint()}; free space and repeat the command"
            ) from error


def _keep_compiled_code() -> None:
    """Let inductor keep what it compiles in this project's cache, unless the user chose a folder.

    Its own choice is the node's /tmp, and a requeued job would compile everything again on another node. It is not the
    run's folder: that is copied and handed on, and inductor runs and unpickles what it finds. So the folder must be
    writable by this user alone. Where it cannot be, or has no locks, which inductor uses, its choice stays.
    """
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir  # slow to import

    default = default_cache_dir()  # dynamo sets the variable to this when it is imported
    if os.environ.get("TORCHINDUCTOR_CACHE_DIR", default) != default:
        return
    folder = cache_folder() / f"inductor-{os.getuid()}"
    with suppress(OSError, NotImplementedError):
        folder.mkdir(mode=0o700, exist_ok=True)
        with FileLock(folder / ".lock", timeout=10):
            status = folder.stat()
        if status.st_uid == os.getuid() and not status.st_mode & 0o022:
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)


def _check_compiler(error: Exception) -> None:
    """Raise a `UserError` if `torch.compile` failed, which it does at the first step."""
    if type(error).__module__.startswith(("torch._dynamo.", "torch._inductor.")):  # slow to import, so not by class
        reason = str(error).split("\n\n")[0]  # what follows are a stack and advice for developers
        raise UserError(f"--torch_compile: {reason}; --torch_compile False trains without it") from error

"""Complete checkpoints: recognize them, load their weights strictly, keep the newest ones.

The Trainer writes the files of a checkpoint one after another, so a killed process leaves an incomplete folder that
transformers' `get_last_checkpoint` would return. Here the last file of a checkpoint is `complete.json`, the SHA-256 of
all its files. A folder without it, or whose files do not agree with it, is never resumed from.
"""

import hashlib
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from galaxy_mae.errors import UserError, first_line
from galaxy_mae.files import read_json, write_json
from galaxy_mae.provenance import is_main_process

logger = logging.getLogger(__name__)

MANIFEST = "complete.json"


def find_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint of a run that is complete and undamaged, or None. Others are skipped, with a warning."""
    for checkpoint in _checkpoints(folder):
        if _is_complete(checkpoint) and _is_undamaged(checkpoint):
            return checkpoint
        logger.warning("%s is incomplete or damaged: skipped", checkpoint)
    return None


def _checkpoints(folder: Path) -> list[Path]:
    """The checkpoint folders of a run, complete or not, newest first."""
    steps = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    return sorted(steps, key=lambda path: -int(path.name.removeprefix("checkpoint-")))


def _is_complete(checkpoint: Path) -> bool:
    return (checkpoint / MANIFEST).is_file()


def _is_undamaged(checkpoint: Path) -> bool:
    """Whether every file of the manifest still has its content."""
    try:
        manifest = read_json(checkpoint / MANIFEST, "")
        return bool(manifest) and all(_sha256(checkpoint / name) == digest for name, digest in manifest.items())
    except (OSError, AttributeError, UserError):
        return False


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remove_incomplete_checkpoints(folder: Path, step: int) -> None:
    """Delete what a killed process or a full disk left, before a training that is at `step`.

    A damaged checkpoint of a later step is deleted as well: it would count as the newest one.
    """
    for checkpoint in _checkpoints(folder):
        later = int(checkpoint.name.removeprefix("checkpoint-")) > step
        if not _is_complete(checkpoint) or (later and not _is_undamaged(checkpoint)):
            shutil.rmtree(checkpoint, ignore_errors=True)


def _remove_old_checkpoints(folder: Path, limit: int | None, best: Path | None) -> None:
    """Keep the newest `limit` complete checkpoints; among them the best one, and always the last one."""
    if not limit or limit < 0:
        return
    complete = [checkpoint for checkpoint in _checkpoints(folder) if _is_complete(checkpoint)]
    kept = complete[:limit]
    if best in complete and best not in kept:
        kept = [*complete[: max(1, limit - 1)], best]
    for checkpoint in complete:
        if checkpoint not in kept:
            shutil.rmtree(checkpoint, ignore_errors=True)


def load_weights(model: nn.Module, checkpoint: Path) -> None:
    """Load every tensor of a checkpoint into a model.

    Raises:
        UserError: a missing, unexpected or mismatched tensor, or a file that cannot be read.
    """
    try:
        model.load_state_dict(load_file(checkpoint / "model.safetensors"), strict=True)
    except (RuntimeError, OSError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[-1].strip() if str(error).strip() else first_line(error)
        raise UserError(f"{checkpoint}: does not hold this model's weights ({reason}); delete it") from error


class CompleteCheckpoints(TrainerCallback):
    """Marks a checkpoint as complete once all processes have written it, and then deletes the oldest.

    The Trainer's own deletion, by `save_total_limit`, comes before the new checkpoint is marked: a kill between the two
    could leave none. It is therefore switched off, and this callback keeps the limit. The Trainer's own loading of the
    best model is not strict. It is skipped, because the state never names a checkpoint for it.

    Args:
        trainer: whose checkpoints these are.
        limit: number of checkpoints to keep; None keeps all.
        on_complete: called last.
    """

    def __init__(self, trainer: Trainer, limit: int | None, on_complete: Callable[[], None]):
        self.trainer, self.limit, self.on_complete = trainer, limit, on_complete

    def on_train_begin(self, args, state, control, **kwargs):
        """Delete what an earlier process left incomplete or damaged."""
        if args.should_save:
            remove_incomplete_checkpoints(Path(args.output_dir), state.global_step)
        state.best_model_checkpoint = None

    def on_save(self, args, state, control, **kwargs):
        """Write the manifest: the checksums of all files."""
        self.trainer.accelerator.wait_for_everyone()  # each process writes its own random state
        if args.should_save:
            checkpoint = checkpoint_folder(args, state.global_step)
            files = sorted(path for path in checkpoint.iterdir() if path.is_file())
            write_json(checkpoint / MANIFEST, {path.name: _sha256(path) for path in files})
            best = checkpoint_folder(args, state.best_global_step) if state.best_global_step else None
            _remove_old_checkpoints(Path(args.output_dir), self.limit, best)
        self.trainer.accelerator.wait_for_everyone()
        state.best_model_checkpoint = None
        self.on_complete()


def checkpoint_folder(args: TrainingArguments, step: int) -> Path:
    """Where the Trainer writes the checkpoint of a step."""
    return Path(args.output_dir) / f"checkpoint-{step}"


def check_disk_space(training: TrainingArguments, num_parameters: int) -> None:
    """Raise a `UserError` if the disk cannot hold what a run will write: weights and two AdamW moments per checkpoint.

    Only the main process checks: it alone writes, and others would see files come and go while they add up sizes.
    """
    if not is_main_process():
        return
    folder = Path(training.output_dir)
    checkpoints = (training.save_total_limit or 2) + 1 if training.save_strategy != "no" else 0
    needed = 4 * num_parameters * (3 * checkpoints + 2)
    free = shutil.disk_usage(folder).free + sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
    if free < needed:
        raise UserError(
            f"--output_dir {folder}: the run needs {needed / 1e6:,.0f} MB for {checkpoints} checkpoints and results, "
            f"and the disk has {free / 1e6:,.0f} MB left; free some space or choose another folder"
        )

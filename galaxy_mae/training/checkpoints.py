"""Complete checkpoints: recognize them, load their weights strictly, keep the newest ones.

The Trainer writes the files of a checkpoint one after another, so a killed process leaves an incomplete folder that
transformers' `get_last_checkpoint` would return. Here the last file of a checkpoint is `complete.json`, a list of all
its files and their sizes. A folder without it, or whose files do not agree with it, is never resumed from.
"""

import logging
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import rotate_checkpoints

from galaxy_mae.errors import UserError, first_line
from galaxy_mae.files import read_json, write_json
from galaxy_mae.provenance import is_main_process

logger = logging.getLogger(__name__)

MANIFEST = "complete.json"


def find_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint of a run, or None. Incomplete and damaged ones are skipped, with a warning."""
    for checkpoint in _checkpoints(folder):
        if _is_complete(checkpoint):
            return checkpoint
        logger.warning("%s is incomplete or damaged: skipped", checkpoint)
    return None


def _checkpoints(folder: Path) -> list[Path]:
    """The checkpoint folders of a run, complete or not, newest first."""
    steps = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    return sorted(steps, key=lambda path: -int(path.name.removeprefix("checkpoint-")))


def _is_complete(checkpoint: Path) -> bool:
    try:
        return read_json(checkpoint / MANIFEST, "") == _file_sizes(checkpoint)
    except (OSError, UserError):
        return False


def _file_sizes(checkpoint: Path) -> dict[str, int]:
    """Bytes of each file of a checkpoint but the manifest itself."""
    files = sorted(path for path in checkpoint.iterdir() if path.is_file())
    return {path.name: path.stat().st_size for path in files if path.name != MANIFEST}


def remove_incomplete_checkpoints(folder: Path) -> None:
    """Delete what a killed process or a full disk left: the run that resumes from an older one writes them again."""
    for checkpoint in _checkpoints(folder):
        if not _is_complete(checkpoint):
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
    could leave none. It is therefore switched off, and this callback keeps the limit.

    Args:
        trainer: whose checkpoints these are.
        limit: number of checkpoints to keep besides the best; None keeps all.
        on_complete: called last.
    """

    def __init__(self, trainer: Trainer, limit: int | None, on_complete: Callable[[], None]):
        self.trainer, self.limit, self.on_complete = trainer, limit, on_complete

    def on_train_begin(self, args, state, control, **kwargs):
        """Delete incomplete checkpoints; find the best one by its step, since the folder may have been moved."""
        if args.should_save:
            remove_incomplete_checkpoints(Path(args.output_dir))
        if state.best_global_step:
            state.best_model_checkpoint = str(checkpoint_folder(args, state.best_global_step))

    def on_save(self, args, state, control, **kwargs):
        """Write the manifest."""
        self.trainer.accelerator.wait_for_everyone()  # each process writes its own random state
        if args.should_save:
            checkpoint = checkpoint_folder(args, state.global_step)
            write_json(checkpoint / MANIFEST, _file_sizes(checkpoint))
            best = str(checkpoint_folder(args, state.best_global_step)) if state.best_global_step else None
            rotate_checkpoints(args.output_dir, self.limit, best, use_mtime=False)
        self.trainer.accelerator.wait_for_everyone()
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

"""What a run shows while it runs: a progress bar, Weights & Biases, reconstructions, its share of the hardware."""

import logging
import netrc
import os
import secrets
import sys
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import numpy as np
import torch
from transformers import TrainerCallback, ViTMAEForPreTraining
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.utils import logging as transformers_logging

from galaxy_mae.atomic import atomic_file
from galaxy_mae.batches import GalaxyBatches
from galaxy_mae.figures import reconstructions
from galaxy_mae.mae import patch_count, patch_statistics
from galaxy_mae.preemption import may_fail_at_a_signal
from galaxy_mae.trainer import GalaxyTrainer, evaluation_masks

logger = logging.getLogger(__name__)


def log_lines(main_process: bool = True) -> None:
    """Our lines from the first process; from transformers only warnings, and none of its file progress bars."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("galaxy_mae").setLevel(logging.INFO if main_process else logging.WARNING)
    transformers_logging.disable_progress_bar()


class ProgressBar(ProgressCallback):
    """The Trainer's progress bar, with the latest loss and images a second behind it instead of a line a log."""

    def on_prediction_step(self, args, state, control, **kwargs):
        """No second bar for the few seconds of an evaluation."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Show the newest numbers."""
        if self.training_bar is None or not logs:
            return
        shown = {"loss": "loss", "eval_loss": "validation", "images_per_second": "images/s"}
        self.numbers = getattr(self, "numbers", {})
        self.numbers |= {shown[name]: f"{value:.4g}" for name, value in logs.items() if name in shown}
        self.training_bar.set_postfix(self.numbers)


def show_progress(trainer: GalaxyTrainer) -> None:
    """Our progress bar instead of the Trainer's, if bars are wanted at all."""
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(PrinterCallback if trainer.args.disable_tqdm else ProgressBar)


# --------------------------------------------------------------------------------------------------- Weights & Biases


def start_wandb(folder: Path, name: str, recipe: dict[str, Any], group: str | None = None) -> None:
    """Start, or go on with, the W&B run of a folder: online where somebody is logged in, otherwise offline.

    The run's id lies in the folder, so that a run which is killed and started again stays one run. Runs of one group
    stand together on the site.
    """
    import wandb  # only where it is reported to

    identity = folder / "wandb_run_id"
    if not identity.exists():
        with atomic_file(identity) as aside:
            aside.write_text(secrets.token_hex(4))
    options = {
        "project": os.environ.get("WANDB_PROJECT", "galaxy-mae"),
        "name": name,
        "group": group,
        "id": identity.read_text().strip(),
        "dir": str(folder),
        "config": recipe,
    }
    mode = os.environ.get("WANDB_MODE") or ("online" if _logged_in() else "offline")
    if mode == "online":
        try:
            wandb.init(**options, resume="allow", mode="online", settings=wandb.Settings(init_timeout=60))
            return
        except wandb.errors.Error as error:
            logger.warning("W&B cannot be reached (%s)", str(error).splitlines()[0])
            mode = "offline"
    run = wandb.init(**options, mode=mode, settings=wandb.Settings(silent=True))
    if mode == "offline":
        logger.info("W&B logs offline; `wandb sync %s` sends it", Path(run.dir).parent)


def finish_wandb() -> None:
    """End the W&B run that is open, if one is."""
    if "wandb" in sys.modules and sys.modules["wandb"].run is not None:
        sys.modules["wandb"].finish()


def _logged_in() -> bool:
    """Whether `wandb login` was done: a key in the environment or in the netrc file."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (FileNotFoundError, netrc.NetrcParseError):
        return False


# ----------------------------------------------------------------------------------------------------- reconstructions


class Reconstructions(TrainerCallback):
    """Draws the same galaxies with the same masks every few epochs, into the run's folder and to W&B.

    It draws after an evaluation, when the clock that counts images a second stands still.
    """

    def __init__(self, batches: GalaxyBatches, rows: np.ndarray, names: list[str], folder: Path, every: float):
        self.batches, self.rows, self.names, self.folder, self.every = batches, rows, names, folder, every
        self._drawn = 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        """A run that goes on keeps its rhythm."""
        self._drawn = (state.epoch or 0.0) // self.every * self.every if self.every else 0.0

    def on_evaluate(self, args, state, control, model=None, **kwargs):
        """Draw, if enough epochs have passed since the last time."""
        epoch = state.epoch or 0.0
        if not state.is_world_process_zero or not self.every or epoch - self._drawn < self.every:
            return
        self._drawn = state.epoch
        path = self.folder / f"step_{state.global_step:06d}.png"
        title = f"epoch {state.epoch:g}: validation galaxies, {model.config.mask_ratio:.0%} masked"
        draw_reconstructions(model, self.batches, self.rows, self.names, path, title)
        if "wandb" in args.report_to:
            import wandb

            with may_fail_at_a_signal():
                wandb.log({"reconstructions": wandb.Image(str(path)), "train/global_step": state.global_step})


def draw_reconstructions(
    model: ViTMAEForPreTraining,
    batches: GalaxyBatches,
    rows: np.ndarray,
    names: list[str],
    path: Path,
    title: str,
    brightness: str = "visible",
) -> None:
    """Reconstruct galaxies with the masks of evaluation and draw them in their own colours.

    Args:
        model, batches, rows, brightness: as for `reconstruct`.
        names: of the galaxies.
        path, title: of the picture.
    """
    reconstructions(path, *reconstruct(model, batches, rows, brightness), names, title)


def reconstruct(
    model: ViTMAEForPreTraining, batches: GalaxyBatches, rows: np.ndarray, brightness: str = "visible"
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What an autoencoder makes of galaxies under the masks of evaluation.

    Args:
        model: the autoencoder; it is left in the mode it was in.
        batches, rows: the galaxies.
        brightness: with pixel normalisation the model predicts no brightness or contrast of a patch. `visible`
            gives each masked patch those of the nearest visible one, which is all that a user of the model would have;
            `true` gives it its own, and so shows more than the model knows.

    Returns:
        The galaxies and the predictions, (B, S, S, 3) float32 in units of 0 to 1, and what was masked, (B, S, S) bool.
    """
    model = getattr(model, "_orig_mod", model)  # compiled models would compile once more for this batch
    batch = batches.collate([int(row) for row in rows])
    was_training = model.training
    model.eval()
    with torch.no_grad():
        pixels = batches.plain(batch)
        noise = evaluation_masks(batch["rows"].to(pixels.device), patch_count(model.config))
        output = model(pixels, noise=noise)
        patches = output.logits.float()
        if model.config.norm_pix_loss:
            patches = _with_patch_statistics(model, pixels, patches, output.mask.bool(), brightness)
        prediction = model.unpatchify(patches)
        hidden = output.mask[:, :, None].expand(-1, -1, patches.shape[-1])
        masked = model.unpatchify(hidden)[:, 0].bool()
    model.train(was_training)

    def in_colour(images: torch.Tensor) -> np.ndarray:
        return (images * batches.deviation + batches.mean).permute(0, 2, 3, 1).float().cpu().numpy()

    return in_colour(pixels), in_colour(prediction), masked.cpu().numpy()


def _with_patch_statistics(
    model: ViTMAEForPreTraining, pixels: torch.Tensor, patches: torch.Tensor, masked: torch.Tensor, whose: str
) -> torch.Tensor:
    """Undo the pixel normalisation of predicted patches (B, N, P) with the mean and deviation of true patches."""
    target = model.patchify(pixels)
    mean, deviation = patch_statistics(target)
    if whose == "visible":
        grid = model.config.image_size // model.config.patch_size
        places = torch.cartesian_prod(torch.arange(grid), torch.arange(grid)).float().to(pixels.device)
        distance = torch.cdist(places, places)  # (N, N)
        nearest = distance.expand(len(masked), -1, -1).masked_fill(masked[:, None, :], torch.inf).argmin(dim=-1)
        mean, deviation = (x.gather(1, nearest[..., None]) for x in (mean, deviation))
    return patches * deviation + mean


def galaxies_to_show(rows: np.ndarray, label: np.ndarray | None, class_names: tuple[str, ...], count: int = 8):
    """Choose rows of different classes, in turn, and their names: ((count,) int64, list of str)."""
    if label is None:
        return rows[:count], [f"row {row}" for row in rows[:count]]
    turn = np.empty(len(rows), np.int64)  # how many of the row's class come before it
    for c in np.unique(label[rows]):
        of_class = np.flatnonzero(label[rows] == c)
        turn[of_class] = np.arange(len(of_class))
    chosen = rows[np.lexsort((label[rows], turn))[:count]]
    return chosen, [class_names[label[row]] for row in chosen]


# ------------------------------------------------------------------------------------------------------- the hardware


def measure_matmul_rate(device: torch.device, dtype: torch.dtype, size: int = 8192, repeats: int = 8) -> float:
    """Rate of a large square matrix product in FLOP/s: the peak that the run's own rate is a share of."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    for _ in range(2):
        a @ b
    torch.cuda.synchronize(device)
    started = time.perf_counter()
    for _ in range(repeats):
        a @ b
    torch.cuda.synchronize(device)
    return repeats * 2 * size**3 / (time.perf_counter() - started)

"""What a run shows while it runs: log lines, a progress bar, throughput, and everything that is sent to W&B.

During training the Trainer's own callback sends every logged value to W&B. The functions here start its runs and send
figures, scores and tables.
"""

import logging
import netrc
import os
import re
import secrets
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from transformers import Trainer
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.utils import logging as transformers_logging

from galaxy_mae.errors import first_line
from galaxy_mae.files import atomic_file
from galaxy_mae.provenance import is_main_process

logger = logging.getLogger(__name__)


def setup_logging() -> None:
    """Log this project's lines from the main process, and only warnings from transformers."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("galaxy_mae").setLevel(logging.INFO if is_main_process() else logging.WARNING)
    transformers_logging.disable_progress_bar()


class StepTimer:
    """Measures throughput over training steps. Evaluation and saving are excluded, and so is the first step."""

    def __init__(self) -> None:
        self._first_step: int | None = None
        self._timer_start: tuple[float, int] | None = None  # seconds and step
        self._paused_at: float | None = None

    def begin_step(self, step: int) -> None:
        """Start the timer after the first step, which compiles and warms up."""
        if self._first_step is None:
            self._first_step = step
        elif self._timer_start is None and step > self._first_step:
            self._timer_start = (time.perf_counter(), step)

    def pause(self) -> None:
        """Exclude the time until `resume`."""
        self._paused_at = time.perf_counter()

    def resume(self) -> None:
        """Continue after `pause`."""
        if self._timer_start is not None and self._paused_at is not None:
            seconds, step = self._timer_start
            self._timer_start = (seconds + time.perf_counter() - self._paused_at, step)
        self._paused_at = None

    def steps_per_second(self, step: int) -> float | None:
        """Since the last call, or None if no step was timed."""
        if self._timer_start is None:
            return None
        (started, first), now = self._timer_start, time.perf_counter()
        self._timer_start = (now, step)
        return (step - first) / (now - started) if step > first else None


class ProgressBar(ProgressCallback):
    """The Trainer's progress bar, with the latest loss and throughput behind it instead of separate lines."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.numbers: dict[str, str] = {}

    def on_prediction_step(self, args, state, control, **kwargs):
        """No second bar for the few seconds of an evaluation."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Show the newest numbers."""
        if self.training_bar is None or not logs:
            return
        shown = {"loss": "loss", "eval_loss": "validation", "images_per_second": "images/s"}
        self.numbers |= {shown[name]: f"{value:.4g}" for name, value in logs.items() if name in shown}
        self.training_bar.set_postfix(self.numbers)


def show_progress(trainer: Trainer) -> None:
    """Use this project's progress bar instead of the Trainer's, or printed lines if bars are disabled."""
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(PrinterCallback if trainer.args.disable_tqdm else ProgressBar)


# --------------------------------------------------------------------------------------------------- Weights & Biases


def start_wandb(folder: Path, name: str, config: dict[str, Any], group: str | None = None) -> None:
    """Start or resume the W&B run of a folder: online if somebody is logged in, otherwise offline.

    Only the main process does. The run's id is kept in the folder, so that a run of several sessions is one run on W&B.

    Args:
        folder: the output folder of the run.
        name: shown on W&B.
        config: the resolved recipe.
        group: name of a group of runs, such as the trials of a sweep.
    """
    if not is_main_process():
        return
    import wandb  # slow to import

    options = {
        "project": os.environ.get("WANDB_PROJECT", "galaxy-mae"),
        "name": name,
        "group": group,
        "id": _wandb_run_id(folder / "wandb_run_id"),
        "dir": str(folder),
        "config": config,
    }
    mode = os.environ.get("WANDB_MODE") or ("online" if _logged_in() else "offline")
    if mode == "online":
        try:
            wandb.init(**options, resume="allow", mode="online", settings=wandb.Settings(init_timeout=60))
            return
        except wandb.errors.Error as error:
            logger.warning("W&B cannot be reached (%s)", first_line(error))
            mode = "offline"
    run = wandb.init(**options, mode=mode, settings=wandb.Settings(silent=True))
    if mode == "offline":
        logger.info("W&B logs offline; upload with `wandb sync %s`", Path(run.dir).parent)


def _wandb_run_id(path: Path) -> str:
    """The id that a file holds, or a new one, which is written there, if it holds none."""
    try:
        run_id = path.read_bytes().decode("ascii", "replace").strip()
    except FileNotFoundError:
        run_id = ""
    if not re.fullmatch(r"[\w-]{1,128}", run_id, re.ASCII):
        run_id = secrets.token_hex(4)
        with atomic_file(path) as tmp_path:
            tmp_path.write_text(run_id)
    return run_id


def finish_wandb() -> None:
    """End the open W&B run, if there is one."""
    if "wandb" in sys.modules and sys.modules["wandb"].run is not None:
        sys.modules["wandb"].finish()


def log_figure(name: str, path: Path, global_step: int) -> None:
    """Send a figure of a training step to the open W&B run."""
    import wandb

    wandb.log({name: wandb.Image(str(path)), "train/global_step": global_step})


def log_scores(name: str, result: dict[str, Any], label: Sequence[int], predicted: Sequence[int]) -> None:
    """Send the scores of an evaluation result, and the confusion matrix of its first seed, to the open W&B run.

    Args:
        name: of the result.
        result: the content of its JSON file.
        label, predicted: classes of the test galaxies.
    """
    import wandb

    scores = {key: result[key] for key in ("accuracy", "balanced_accuracy", "macro_f1")}
    scores |= {"interval_low": result["interval"][0], "interval_high": result["interval"][1]}
    matrix = wandb.plot.confusion_matrix(
        y_true=label,
        preds=predicted,
        class_names=result["class_names"],
        title=f"{name}, seed {result['seeds'][0]}",
    )
    wandb.log({f"{name}/{key}": value for key, value in scores.items()} | {f"{name}/confusion_matrix": matrix})


def log_report(columns: list[str], rows: list[tuple], figures: list[Path]) -> None:
    """Send the table and the figures of a report to the open W&B run."""
    import wandb

    images = {path.stem: wandb.Image(str(path)) for path in figures}
    wandb.log({"results": wandb.Table(columns=columns, data=[list(row) for row in rows])} | images)


def _logged_in() -> bool:
    """Whether `wandb login` was done: a key in the environment or in the netrc file."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (FileNotFoundError, netrc.NetrcParseError):
        return False

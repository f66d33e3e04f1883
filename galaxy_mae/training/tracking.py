"""What a run shows while it runs: log lines, throughput, and all that goes to the dashboards.

These are W&B and TensorBoard (docs/dashboards.md). During training the Trainer's own callbacks send what is logged; the
subclasses here add figures. The functions start the runs of W&B, and send scores, reports and encoders.
"""

import logging
import os
import secrets
import shlex
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from PIL import Image
from transformers import Trainer
from transformers.integrations import TensorBoardCallback, WandbCallback
from transformers.integrations.integration_utils import WandbLogModel, rewrite_logs
from transformers.trainer_callback import PrinterCallback, ProgressCallback, TrainerCallback, TrainerState
from transformers.utils import logging as transformers_logging

from galaxy_mae import progress
from galaxy_mae.errors import UserError, first_line
from galaxy_mae.files import atomic_file
from galaxy_mae.provenance import is_main_process
from galaxy_mae.training.arguments import ONLINE_PROBES

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

logger = logging.getLogger(__name__)


def setup_logging() -> None:
    """Log this project's lines from the main process, and only warnings from transformers."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING, handlers=[progress.LineHandler()])
    logging.getLogger("galaxy_mae").setLevel(logging.INFO if is_main_process() else logging.WARNING)
    transformers_logging.disable_progress_bar()


class StepTimer:
    """Measures throughput over training steps, without the first one, evaluations and checkpoints."""

    def __init__(self) -> None:
        self._first_step: int | None = None
        self._since: tuple[float, int] | None = None  # seconds and step

    def begin_step(self, step: int) -> None:
        """Start the timer after the first step, which compiles and warms up."""
        if self._first_step is None:
            self._first_step = step
        elif self._since is None and step > self._first_step:
            self._since = (time.perf_counter(), step)

    def restart(self, step: int) -> None:
        """Leave out what came before, such as an evaluation."""
        self._since = self._since and (time.perf_counter(), step)

    def steps_per_second(self, step: int) -> float | None:
        """Since the last call or restart, or None if no step was timed."""
        (started, first), now = self._since or (0.0, step), time.perf_counter()
        self.restart(step)
        return (step - first) / (now - started) if step > first else None


def best_values(history: list[dict[str, float]]) -> dict[str, float]:
    """The best of the validation losses and accuracies in the Trainer's log, which is that of all sessions of a run."""
    table = pd.DataFrame(history).filter(regex="^eval_(loss|accuracy|online_.*)$")
    best = {name: table[name].min() if name == "eval_loss" else table[name].max() for name in table}
    return {f"best/{name}": float(value) for name, value in rewrite_logs(best).items()}


class WandbTracker(WandbCallback):
    """The Trainer's callback for W&B, with best values and figures.

    Offline, W&B would count the rows of a resumed run from 0 again. Here a row's `_step` follows from its place in the
    Trainer's log, which a checkpoint keeps: twice the number of entries, and one more for a figure. What was logged
    after the last checkpoint of a killed session is logged again under the same `_step`.
    """

    def on_log(self, args, state, control, model=None, logs=None, **kwargs):
        """Send the values, and the best ones so far to the run's summary."""
        if not self._initialized:
            self.setup(args, state, model)
        if state.is_world_process_zero:
            self._log_row(rewrite_logs(logs), state, 0)
            self._wandb.run.summary.update(best_values(state.log_history))

    def log_figure(self, name: str, path: Path, caption: str, state: TrainerState) -> None:
        """Send a figure of the current step."""
        self._log_row({name: self._wandb.Image(str(path), caption=caption)}, state, 1)

    def on_train_end(self, args, state, control, **kwargs):
        """No model: `log_encoder` sends the encoder once it is exported."""

    def _log_row(self, values: dict[str, Any], state: TrainerState, offset: int) -> None:
        row = 2 * len(state.log_history) + offset
        self._wandb.log(values | {"train/global_step": state.global_step}, step=row, commit=True)


class TensorBoardTracker(TensorBoardCallback):
    """The Trainer's callback for TensorBoard, with figures, in the run's folder `tensorboard`."""

    def on_train_begin(self, args, state, control, **kwargs):
        """TensorBoard drops what a killed session logged after the checkpoint that is resumed from."""
        if state.is_world_process_zero:
            self.logging_dir = self.logging_dir or str(Path(args.output_dir) / "tensorboard")
            step = state.global_step + 1 if state.global_step else 0
            self.tb_writer = self._SummaryWriter(self.logging_dir, purge_step=step)
        super().on_train_begin(args, state, control, **kwargs)

    def log_figure(self, name: str, path: Path, caption: str, state: TrainerState) -> None:
        """Write a figure of the current step. TensorBoard has no captions."""
        _add_figure(self.tb_writer, name, path, state.global_step)
        self.tb_writer.flush()


_ONLINE = [f"eval_{name}" for name in (*ONLINE_PROBES, "online_rankme")]
_SHOWN = {  # of what the Trainer logs, in this order
    "epoch": "epoch {:.3g}",
    "loss": "loss on crops {:.4g}",
    "eval_loss": "validation loss on complete images {:.4g}",
    "eval_accuracy": "validation accuracy {:.1%}",
    _ONLINE[0]: "linear probe {:.1%}",
    _ONLINE[1]: "k-NN {:.1%}",
    _ONLINE[2]: "effective rank {:.1f}",
    "images_per_second": "{:,.0f} images/s",
}


class ShowProgress(TrainerCallback):
    """The stage of a training: steps, losses and times, in place of the Trainer's bars and dictionaries."""

    def __init__(self) -> None:
        self.shown, self.stage, self._open = {}, None, ExitStack()

    def on_train_begin(self, args, state, control, **kwargs):
        """From here on there is a number of steps."""
        counted = progress.stage("training", state.max_steps, "steps", state.global_step, not args.disable_tqdm)
        self.stage = self._open.enter_context(counted)

    def on_step_end(self, args, state, control, **kwargs):
        """Count."""
        self.stage.advance(state.global_step - self.stage.done)

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Keep the last value of each kind; write a line at an evaluation, or else at the end."""
        last = "eval_loss" if "eval_loss" in self.shown else "train_loss"
        self.shown = {name: x for name, x in self.shown.items() if name not in _ONLINE} | logs
        if self.stage is not None and state.is_world_process_zero:
            words = (text.format(self.shown[name]) for name, text in _SHOWN.items() if name in self.shown)
            self.stage.describe(", ".join(words))
            if {last, "eval_loss", *_ONLINE} & set(logs):
                logger.info("%s", self.stage)

    def close(self) -> None:
        """The training has ended, or failed."""
        self._open.close()
        self.stage = None


def use_trackers(trainer: Trainer) -> list[WandbTracker | TensorBoardTracker]:
    """Use this project's subclasses instead of the Trainer's own callbacks of `--report_to`, and return them."""
    for printer in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(printer)
    kinds = {WandbCallback: WandbTracker, TensorBoardCallback: TensorBoardTracker}
    trackers = [ours() for kind, ours in kinds.items() if trainer.pop_callback(kind) is not None]
    trainer.callback_handler.callbacks[:0] = trackers
    return trackers


def _add_figure(writer: "SummaryWriter", name: str, path: Path, step: int) -> None:
    with Image.open(path) as image:
        writer.add_image(name, np.array(image.convert("RGB")), step, dataformats="HWC")


def check_wandb() -> None:
    """Raise a `UserError` that names the environment variable if W&B would not take its value."""
    import wandb  # slow to import

    for name in ("mode", "project"):
        variable = f"WANDB_{name.upper()}"
        if value := os.environ.get(variable):
            try:
                wandb.Settings(**{name: value})
            except (ValueError, wandb.errors.Error) as error:  # the first one of pydantic, in several lines
                reason = error.errors()[0]["msg"] if hasattr(error, "errors") else error
                raise UserError(f"{variable}={value}: {reason}") from error


def start_run(
    report_to: Sequence[str],
    folder: Path,
    name: str,
    config: dict[str, Any],
    job_type: str,
    tags: Sequence[str],
    group: str | None = None,
) -> None:
    """Start or resume the run of a folder on W&B, from the main process. Other dashboards need no start.

    It is online if somebody is logged in. The run's id is kept in the folder, so that several sessions are one run.

    Args:
        report_to: the dashboards.
        folder, name, config: of the run: its output folder, the name that is shown, and the resolved recipe.
        job_type: what the run does, such as "pre-training".
        tags: words to find it by; those of WANDB_TAGS are added.
        group: name of a group of runs, such as the trials of a sweep.
    """
    if not is_main_process() or "wandb" not in report_to:
        return
    import wandb  # slow to import

    run_id = folder / "wandb_run_id"
    if not run_id.exists():
        with atomic_file(run_id) as tmp_path:
            tmp_path.write_text(secrets.token_hex(4), encoding="utf-8")
    options = {
        "project": os.environ.get("WANDB_PROJECT", "galaxy-mae"),
        "name": name,
        "group": group,
        "job_type": job_type,
        "tags": [tag[:64] for tag in (*tags, *os.environ.get("WANDB_TAGS", "").split(",")) if tag],
        "id": run_id.read_text(encoding="utf-8"),
        "dir": str(folder),
        "config": config,
    }
    mode = os.environ.get("WANDB_MODE") or "online"
    if mode == "online":
        try:
            if wandb.login(prompt=False, verify=False):
                wandb.init(**options, resume="allow", mode="online", settings=wandb.Settings(init_timeout=60))
                return
        except wandb.errors.Error as error:
            logger.warning("W&B cannot be reached (%s)", first_line(error))
        mode = "offline"
    run = wandb.init(**options, mode=mode, settings=wandb.Settings(silent=True))
    if mode == "offline":
        logger.info("W&B logs offline; upload with `wandb sync %s`", shlex.quote(str(Path(run.dir).parent)))


def finish_run() -> None:
    """End the open run of W&B, if there is one."""
    wandb = sys.modules.get("wandb")
    if wandb is not None and wandb.run is not None:
        wandb.finish()


def log_encoder(folder: Path) -> None:
    """Send an exported encoder to the open W&B run as an artifact, if WANDB_LOG_MODEL asks for it."""
    import wandb

    if wandb.run is not None and WandbLogModel(os.environ.get("WANDB_LOG_MODEL", "false")).is_enabled:
        artifact = wandb.Artifact(f"encoder-{wandb.run.id}", type="model")
        artifact.add_dir(str(folder))
        wandb.log_artifact(artifact)


def push_encoder(folder: Path, repository: str, private: bool) -> None:
    """Upload an exported encoder with its card to the Hugging Face Hub. What fails is a warning: the run is finished.

    Args:
        folder: of the encoder.
        repository: `NAME`, or `USER/NAME`; it is made if it does not exist.
        private: whether a new one is.
    """
    from huggingface_hub import HfApi  # slow to import

    api = HfApi()
    try:
        with progress.stage(f"uploading the encoder to {repository}"):
            url = api.create_repo(repository, private=private, exist_ok=True)
            api.upload_folder(repo_id=url.repo_id, folder_path=folder, commit_message="Encoder of galaxy-mae")
        logger.info("encoder uploaded: %s", url)
    except Exception as error:  # of the network, the server, or the disk: the encoder itself is safe
        command = ["hf", "upload", repository, str(folder), ".", *["--private"] * private]
        logger.warning("encoder not uploaded (%s); to repeat: %s", first_line(error), shlex.join(command))


def start_evaluation(report_to: Sequence[str], folder: Path, name: str, config: dict[str, Any], job_type: str) -> None:
    """Start or resume the run of a part, `name`, of a results folder, in the group of the folder: see `start_run`."""
    tags = [Path(config[key]).name for key in ("dataset_name", "encoder_name")]
    start_run(report_to, folder / name, f"{folder.name}/{name}", config, job_type, tags, group=folder.name)


def log_scores(
    report_to: Sequence[str], folder: Path, name: str, result: dict[str, Any], label: list[int], predicted: list[int]
) -> None:
    """Send the scores of an evaluation result; to the open W&B run also the confusion matrix of its first seed.

    `result` is the content of its JSON file, `label` and `predicted` are classes of the test galaxies. TensorBoard's
    files go into `tensorboard` in the folder of all results.
    """
    scores = {f"{name}/{key}": result[key] for key in ("accuracy", "balanced_accuracy", "macro_f1")}
    scores |= {f"{name}/interval_{end}": x for end, x in zip(("low", "high"), result["interval"], strict=True)}
    if "wandb" in report_to:
        import wandb

        names, title = result["class_names"], f"{name}, seed {result['seeds'][0]}"
        matrix = wandb.plot.confusion_matrix(y_true=label, preds=predicted, class_names=names, title=title)
        wandb.log(scores | {f"{name}/confusion_matrix": matrix})
    if "tensorboard" in report_to:
        with _summary_writer(folder, name) as writer:
            for key, value in scores.items():
                writer.add_scalar(key, value, 0)


def log_report(report_to: Sequence[str], folder: Path, table: pd.DataFrame) -> None:
    """Send the table and the figures of a results folder, and `report.html`, if it was written."""
    figures = sorted(folder.glob("*.png"))
    if "wandb" in report_to:
        import wandb

        media = {f"report/{x.stem}": wandb.Image(str(x), caption=x.stem.replace("_", " ")) for x in figures}
        if (folder / "report.html").is_file():
            media["report/page"] = wandb.Html(str(folder / "report.html"), inject=False)
        wandb.log({"report/results": wandb.Table(dataframe=table)} | media)
    if "tensorboard" in report_to:
        with _summary_writer(folder, "report") as writer:
            writer.add_text("report", (folder / "report.md").read_text(encoding="utf-8"), 0)
            for path in figures:
                _add_figure(writer, f"report/{path.stem}", path, 0)


def _summary_writer(folder: Path, name: str) -> "SummaryWriter":
    """For values without a step, instead of those that are there."""
    from torch.utils.tensorboard import SummaryWriter  # slow to import

    return SummaryWriter(folder / "tensorboard" / name, purge_step=0)

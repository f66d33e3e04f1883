"""Where results come from: `run.json` beside the weights, and the lock that restricts a folder to one process.

`run.json` holds the run's id, the resolved recipe, the fingerprints of the data and its split, and the versions, commit
and device of every session. It also restricts an output folder to one recipe. An encoder carries the recipe, the
sessions and the galaxies that it was pre-trained on in its own folder, which may be copied or uploaded.
"""

import logging
import os
import platform
import re
import secrets
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from galaxy_mae.errors import UserError, first_line
from galaxy_mae.files import claim, read_json, write_json

logger = logging.getLogger(__name__)

_PACKAGES = ("torch", "transformers", "accelerate", "datasets", "scikit-learn", "h5py", "numpy")
_PRETRAINING, _PRETRAINING_GALAXIES = "pretraining.json", "pretraining_galaxies.parquet"
CATALOGUE = pa.schema(  # of the galaxies of a pre-training, one row each
    {
        "index": pa.int64(),  # row of the data set; of a stream's validation galaxies, row of its sample
        "split": pa.string(),  # train or validation; init_from: seen by the weights that the run started from
        "frame": pa.string(),  # of the position: ICRS, or synthetic for galaxies that are not on the sky
        "ra": pa.float64(),  # degrees, NaN if unknown
        "dec": pa.float64(),
        "cutout_arcsec": pa.float64(),  # width of the cut-out
        "image_hash": pa.uint64(),  # null, as the next one, for the training galaxies of a stream
        "perceptual_hash": pa.binary(32),
    }
)


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Hold the lock of a run within the block. The main process acquires it, the others wait until it has."""
    from accelerate import PartialState  # slow to import, as all that this module imports in functions

    with ExitStack() as stack:
        with PartialState().main_process_first():
            if is_main_process():
                stack.enter_context(claim(folder / "run.lock"))
        yield


def is_main_process() -> bool:
    """Whether this is torchrun's process of rank 0, or not one of torchrun's. It alone writes and logs."""
    return "LOCAL_RANK" not in os.environ or int(os.environ.get("RANK") or 0) == 0


def new_run(recipe: dict[str, Any]) -> dict[str, Any]:
    """The content of `run.json` before the first session. The random id is also in the run's checkpoints."""
    return {"id": secrets.token_hex(8), "recipe": recipe, "finished": False, "sessions": []}


def read_run(folder: Path) -> dict[str, Any] | None:
    """Read the `run.json` of a folder, or return None if no run was started there.

    Raises:
        UserError: the file cannot be read.
    """
    path, fix = folder / "run.json", f"choose another folder, or delete {folder} and train again"
    try:
        return read_json(path, fix, new_run({}))
    except FileNotFoundError:
        return None


def check_same_recipe(folder: Path, run: dict[str, Any], recipe: dict[str, Any], explicitly_set: set[str]) -> None:
    """Raise a `UserError` that names the fields in which a recipe differs from the one of the folder's run.

    A precision that was not set explicitly follows the device, and a run may resume on another one.
    """
    # The data are compared by their fingerprint.
    ignored = {"dataset", "unlabelled"} | ({"bf16", "fp16"} - explicitly_set)
    if changed := differences(run["recipe"], recipe, ignored):
        raise UserError(f"{folder} holds a run of another recipe: {changed}; choose another --output_dir, or delete it")


def differences(before: dict[str, Any], now: dict[str, Any], ignored: set[str]) -> str:
    """Name the keys whose values differ, with both values, as in `seed is 0 there and 1 here`; empty if none does."""
    return "; ".join(
        f"{key} is {before.get(key)} there and {now.get(key)} here"
        for key in sorted((set(before) | set(now)) - ignored)
        if before.get(key) != now.get(key)
    )


def begin_session(folder: Path, run: dict[str, Any], resumed_from: Path | None) -> None:
    """Write `run.json` with this session added, in the main process."""
    if not is_main_process():
        return
    run["sessions"].append(session() | {"resumed_from": resumed_from.name if resumed_from else None})
    write_json(folder / "run.json", run)


def finish_run(folder: Path) -> None:
    """Mark the run as finished. This is the last thing that a run writes."""
    write_json(folder / "run.json", read_run(folder) | {"finished": True})


@dataclass(frozen=True)
class Pretraining:
    """How an encoder was pre-trained: `pretraining.json` and `pretraining_galaxies.parquet` in its folder.

    The resolved recipe with the fingerprints of data and split, what `session` gives for each session, and the training
    and validation galaxies as a table of `CATALOGUE`.
    """

    recipe: dict[str, Any]
    sessions: list[dict[str, Any]]
    galaxies: pa.Table

    @property
    def images_seen(self) -> int:
        """How many images it was trained on, each counted as often as it was seen."""
        if (steps := self.recipe.get("max_steps", -1)) > 0:
            return steps * self.recipe["batch_size"]
        galaxies = pc.sum(pc.equal(self.galaxies["split"], "train")).as_py()
        return round(galaxies * self.recipe["num_train_epochs"])

    def write(self, folder: Path) -> None:
        """Write both files into an existing folder."""
        write_json(folder / _PRETRAINING, {"recipe": self.recipe, "sessions": self.sessions})
        pq.write_table(self.galaxies, folder / _PRETRAINING_GALAXIES)


def read_pretraining(location: str) -> Pretraining | None:
    """Read how an encoder in a folder or on the Hugging Face Hub was pre-trained; None if it does not say.

    Raises:
        UserError: a file is damaged, or one of the two is missing.
    """
    from huggingface_hub.errors import LocalEntryNotFoundError
    from transformers.utils import cached_file

    try:
        path = Path(cached_file(location, _PRETRAINING))
    except OSError as error:
        if isinstance(error.__cause__, LocalEntryNotFoundError):
            logger.warning("%s: the Hub cannot be asked what it was pre-trained on: no network", location)
        return None
    fix = f"copy the encoder again, or delete {_PRETRAINING} if its origin does not matter"
    about = read_json(path, fix, ("recipe", "sessions"))
    try:
        galaxies = pq.read_table(cached_file(location, _PRETRAINING_GALAXIES)).select(CATALOGUE.names).cast(CATALOGUE)
    except (OSError, KeyError, pa.ArrowException) as error:
        raise UserError(f"{path.parent}: {_PRETRAINING_GALAXIES}: {first_line(error)}; {fix}") from error
    return Pretraining(about["recipe"], about["sessions"], galaxies)


def session() -> dict[str, Any]:
    """When, from which commit, on which device and with which versions something is computed."""
    import torch

    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "device": machine(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {package: version(package) for package in _PACKAGES},
    }


def machine() -> str:
    """The name of the GPU, or of the processor with the number of cores that this process may use."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text(encoding="utf-8") if cpuinfo.exists() else ""
    name = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return f"{name[1] if name else platform.processor() or platform.machine()}, {num_cores()} cores"


def num_cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def commit() -> str | None:
    """The repository's commit, with `+changes` if the working tree differs from it; None outside a repository."""
    folder = Path(__file__).resolve().parent
    if not (folder.parent / "pyproject.toml").is_file():
        return None  # installed: a repository around it is somebody's project
    git = ["git", "-C", folder, "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+changes"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def hub_id(source: str) -> str | None:
    """An encoder or data set that was opened, if it is an id on the Hugging Face Hub and not a path."""
    is_id = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source) and not Path(source).exists()
    return source if is_id else None


def training_length(recipe: dict[str, Any]) -> str:
    """How long a recipe trains, as in `80 epochs`; `max_steps`, if it is set, takes the place of the epochs."""
    steps = recipe.get("max_steps", -1)  # which a fine-tuning has not
    return f"{steps:,} steps" if steps > 0 else f"{recipe['num_train_epochs']:g} epochs"


def short_commit(session: dict[str, Any]) -> str:
    """A session's commit as reports show it, as in `3e7617a1b2c3+changes`."""
    if not session["commit"]:
        return "unknown (not a git repository)"
    number, plus, changes = session["commit"].partition("+")
    return number[:12] + plus + changes

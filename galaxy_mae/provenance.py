"""Where a run's numbers come from: `run.json`, beside the weights.

It holds the resolved recipe, the fingerprints of the data and of its split, and for every session of the run the
versions, the commit and the device. It is also what keeps a folder to one recipe.
"""

import os
import platform
import re
import subprocess
from datetime import UTC, datetime
from importlib.metadata import version
from json import JSONDecodeError, loads
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from galaxy_mae.atomic import write_json
from galaxy_mae.errors import UserError

_PACKAGES = ("torch", "transformers", "accelerate", "datasets", "scikit-learn", "h5py", "numpy")


def prepare_folder(folder: Path) -> Path:
    """Create an output folder, or raise a `UserError` where that cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise UserError(f"--output_dir {folder}: a file is in the way; choose another folder") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"--output_dir {folder}: permission denied; choose a folder you may write to")
    return folder


def lock(path: Path) -> FileLock:
    """Keep a second process out of a folder's work, or raise a `UserError`; the system frees the lock at death."""
    return _acquire(path, seconds=0)


def wait_for_forerunner(path: Path) -> None:
    """A job that Slurm put back into the queue may start while its forerunner still ends: wait until the lock is free.

    Raises:
        UserError: it is not free after ten minutes.
    """
    if int(os.environ.get("SLURM_RESTART_COUNT", 0)) and path.exists():
        _acquire(path, seconds=600).release()


def _acquire(path: Path, seconds: float) -> FileLock:
    held = FileLock(path)
    try:
        held.acquire(timeout=seconds)
    except Timeout as error:
        raise UserError(f"{path.parent}: another process is writing this run; wait for it or end it") from error
    return held


def read_run(folder: Path) -> dict[str, Any] | None:
    """The `run.json` of a folder, or None where no run has begun.

    Raises:
        UserError: the file is there and cannot be read, or the folder holds checkpoints without it.
    """
    path = folder / "run.json"
    try:
        run = loads(path.read_text())
        if not isinstance(run, dict) or not {"recipe", "finished", "sessions"} <= set(run):
            raise UserError(f"{path}: not written by main.py; choose another --output_dir, or delete the folder")
        return run
    except FileNotFoundError:
        if list(folder.glob("checkpoint-*")):
            raise UserError(
                f"{folder}: holds checkpoints and no run.json: not a run of main.py; choose another --output_dir"
            ) from None
        return None
    except (JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); choose another --output_dir, or delete it") from error


def refuse_other_recipe(folder: Path, run: dict[str, Any], recipe: dict[str, Any], given: set[str]) -> None:
    """Raise a `UserError` naming the fields by which a recipe differs from the folder's.

    The precision that nobody chose is the device's, and a job may go on on a node with another one.
    """
    before, precision = run["recipe"], {"bf16", "fp16"}
    changed = [  # the data are known by their fingerprint
        f"{name} {before.get(name)} there, {recipe.get(name)} here"
        for name in sorted((set(before) | set(recipe)) - {"dataset"} - (precision - given))
        if before.get(name) != recipe.get(name)
    ]
    if changed:
        raise UserError(
            f"{folder} holds a run of another recipe: {'; '.join(changed)}; choose another --output_dir, or delete it"
        )


def begin_session(folder: Path, run: dict[str, Any] | None, recipe: dict[str, Any], resumed_from: Path | None) -> None:
    """Write `run.json` with this session added."""
    run = run or {"recipe": recipe, "finished": False, "sessions": []}
    run["sessions"].append(session() | {"resumed_from": resumed_from.name if resumed_from else None})
    write_json(folder / "run.json", run)


def session() -> dict[str, Any]:
    """When, from which commit, on which machine and with which versions something is computed."""
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "device": machine(),
        "python": platform.python_version(),
        "versions": {package: version(package) for package in _PACKAGES},
    }


def machine() -> str:
    """The GPU, or the processor and the number of cores this process may use."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        names = re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        names = []
    return f"{names[0] if names else platform.processor() or platform.machine()}, {cores} cores"


def finish_run(folder: Path) -> None:
    """Mark the run as finished: the last thing that it writes."""
    run = read_run(folder)
    write_json(folder / "run.json", run | {"finished": True})


def short_commit(session: dict[str, Any]) -> str:
    """A session's commit as a report shows it, as in `3e7617a1b2c3+changes`."""
    if not session["commit"]:
        return "of no repository"
    number, *changes = session["commit"].partition("+")
    return number[:12] + "".join(changes)


def commit() -> str | None:
    """The repository's commit, with `+changes` where the working tree differs from it; None outside a repository."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", here, *arguments], capture_output=True, text=True, check=True, timeout=20)
        return done.stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None

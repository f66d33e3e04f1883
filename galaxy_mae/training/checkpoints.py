"""Complete checkpoints: recognize them, keep the newest ones.

The Trainer writes the files of a checkpoint one after another, so a killed process leaves an incomplete folder that
transformers' `get_last_checkpoint` would return. Here the last file of a checkpoint is its manifest `complete.json`:
the id of the run, and the SHA-256 of all files. A folder without it, of another run, or whose files do not agree with
it is never resumed from.
"""

import logging
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from galaxy_mae.errors import UserError
from galaxy_mae.files import flush, read_json, sha256, write_json

logger = logging.getLogger(__name__)

MANIFEST = "complete.json"


def write_manifest(path: Path, run_id: str, files: Iterable[Path], **more) -> None:
    """Write a manifest, with `more` entries, beside the files of a run. These survive a power loss if it does."""
    files = sorted(files)
    flush(*files)
    write_json(path, {"run": run_id, "files": {file.name: sha256(file) for file in files}, **more})
    flush(path.parent.parent)  # which names the folder


def read_manifest(path: Path, run_id: str) -> dict[str, Any]:
    """Read a manifest and check that its files are those that a run wrote.

    Raises:
        UserError: it is missing or damaged, a file is, or they belong to another run; the message has no fix.
    """
    try:
        manifest = read_json(path, "", ("run", "files"))
    except FileNotFoundError:
        raise UserError(f"{path.parent} is incomplete (no {path.name})") from None
    except UserError:
        manifest = {}
    if not manifest.get("files"):
        raise UserError(f"{path.parent} is damaged ({path.name} holds no run id and checksums)")
    if manifest["run"] != run_id:
        raise UserError(f"{path.parent} belongs to another run (id {manifest['run']}, this one is {run_id})")
    for name, digest in manifest["files"].items():
        file = path.parent / name
        if not file.is_file() or sha256(file) != digest:
            raise UserError(f"{path.parent} is damaged (the checksum of {name} is wrong)")
    return manifest


def find_checkpoint(folder: Path, run_id: str) -> Path | None:
    """The newest complete, undamaged checkpoint of this run, or None. Others are skipped, with a warning."""
    for checkpoint in _checkpoints(folder):
        try:
            read_manifest(checkpoint / MANIFEST, run_id)
        except UserError as error:
            logger.warning("%s: skipped", error)
        else:
            return checkpoint
    return None


def _checkpoints(folder: Path) -> list[Path]:
    """The checkpoint folders of a run, complete or not, newest first."""
    steps = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdecimal()]
    return sorted(steps, key=lambda path: -int(path.name.removeprefix("checkpoint-")))


def remove_unusable_checkpoints(folder: Path, run_id: str, step: int) -> None:
    """Make room for the checkpoints of a training that is at `step`.

    What a killed process or a full disk left incomplete is deleted. A damaged checkpoint of a later step, or one of
    another run, would count as the newest one: it is renamed to `skipped-checkpoint-STEP`.
    """
    for checkpoint in _checkpoints(folder):
        if not (checkpoint / MANIFEST).is_file():
            shutil.rmtree(checkpoint, ignore_errors=True)
        elif int(checkpoint.name.removeprefix("checkpoint-")) > step:
            skipped = checkpoint.with_name(f"skipped-{checkpoint.name}")
            try:
                read_manifest(checkpoint / MANIFEST, run_id)
            except UserError:
                shutil.rmtree(skipped, ignore_errors=True)
                checkpoint.rename(skipped)


def remove_old_checkpoints(folder: Path, limit: int | None, best: Path | None) -> None:
    """Keep the newest `limit` complete checkpoints; among them the best one, and always the last one."""
    if not limit or limit < 0:
        return
    complete = [checkpoint for checkpoint in _checkpoints(folder) if (checkpoint / MANIFEST).is_file()]
    kept = complete[:limit]
    if best in complete and best not in kept:
        kept = [*complete[: max(1, limit - 1)], best]
    for checkpoint in complete:
        if checkpoint not in kept:
            (checkpoint / MANIFEST).unlink()  # first: a kill now leaves an incomplete one, which the next start deletes
            shutil.rmtree(checkpoint, ignore_errors=True)

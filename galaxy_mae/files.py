"""Files and folders that appear complete or not at all.

Whatever other processes may read is first written to a temporary path beside it and then renamed. A killed process
or a full disk can then never leave half a file where a complete one is expected.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from galaxy_mae.errors import UserError


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`. On success it replaces `path`, on any exception it is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    tmp_path = Path(name)
    try:
        yield tmp_path
        follow_umask(tmp_path)
        tmp_path.replace(path)
    finally:
        tmp_path.unlink(missing_ok=True)


def follow_umask(file: Path) -> None:
    """Give a file the permissions of any new file: mkstemp and safetensors make files private to their owner."""
    umask = os.umask(0)
    os.umask(umask)
    file.chmod(0o666 & ~umask)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield an empty temporary folder beside `path`, for files. On success it replaces `path`, else it is removed.

    A folder cannot be replaced in one step. The old `path` is renamed first, so a kill between the two renames leaves
    no `path`, but never half of one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        new = staging / "new"
        new.mkdir()
        yield new
        for file in new.iterdir():
            follow_umask(file)
        if path.exists():
            path.rename(staging / "old")
        new.rename(path)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def write_json(path: Path, content: Any) -> None:
    """Write `content` as indented JSON, atomically."""
    with atomic_file(path) as tmp_path:
        tmp_path.write_text(json.dumps(content, indent=2) + "\n")


def read_json(path: Path, fix: str) -> Any:
    """Read a JSON file that this package wrote.

    Args:
        path: the file.
        fix: what the user can do if the file is damaged; it ends the error message.

    Raises:
        UserError: the file is not valid JSON.
        FileNotFoundError: there is no such file.
    """
    try:
        return json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); {fix}") from error

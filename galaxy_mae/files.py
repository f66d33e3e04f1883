"""Files and folders that appear complete or not at all, also after a kill or a power loss.

Whatever other processes may read is first written to a temporary folder beside it, then flushed to the disk, and then
renamed. A killed process or a full disk can then never leave half a file where a complete one is expected. What it does
leave, `remove_leftovers` deletes.
"""

import errno
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock

from galaxy_mae.errors import UserError, first_line

T = TypeVar("T")

_TEMPORARY, _LOCK = ".tmp-", ".lock"  # how the names of temporary folders begin, and what their locks' names add


# ---------------------------------------------------------------------------------------------------- temporary folders


@contextmanager
def temporary_folder(parent: Path) -> Iterator[Path]:
    """Yield an empty folder in `parent`, which is removed at the end.

    This process holds a lock file beside it, which the operating system releases when the process dies. The lock is
    there before the folder, and is removed after it, so a temporary folder always has one.
    """
    parent.mkdir(parents=True, exist_ok=True)
    folder = parent / f"{_TEMPORARY}{secrets.token_hex(6)}"
    with FileLock(_lock_file(folder)):
        try:
            folder.mkdir()
            yield folder
        finally:
            _remove(folder)


def remove_leftovers(folder: Path, *, recursive: bool = True) -> None:
    """Delete what killed processes left in a folder and its subfolders; what a living process works in stays.

    Args:
        folder: where to look.
        recursive: whether to look in subfolders too; not where a user's folder may hold anything.
    """
    for parent, _, names in os.walk(folder):  # which, unlike rglob, accepts that folders disappear meanwhile
        for name in names:
            if name.startswith(_TEMPORARY) and name.endswith(_LOCK):
                left = Path(parent, name.removesuffix(_LOCK))
                # Its lock is held by a living process, or it belongs to another user: both raise an OSError.
                with suppress(OSError), FileLock(_lock_file(left), blocking=False):
                    _remove(left)
        if not recursive:
            return


def _lock_file(folder: Path) -> Path:
    return folder.with_name(folder.name + _LOCK)


def _remove(folder: Path) -> None:
    """Delete a temporary folder and then its lock, which must be held."""
    shutil.rmtree(folder, ignore_errors=True)
    if not folder.exists():
        _lock_file(folder).unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------------------- atomic writing


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path of the same name. On success it replaces `path`, on any exception it is removed."""
    with temporary_folder(path.parent) as staging:
        yield staging / path.name
        move_files(staging, path.parent)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield an empty temporary folder, for files. On success it replaces `path`, on any exception it is removed.

    A folder cannot be replaced in one step. The old `path` is renamed first, so a kill between the two renames leaves
    no `path`, but never half of one.
    """
    with temporary_folder(path.parent) as staging:
        new = staging / "new"
        new.mkdir()
        yield new
        for file in new.iterdir():
            follow_umask(file)
        flush(*new.iterdir(), new)
        if path.exists():
            path.rename(staging / "old")
        new.rename(path)
        flush(path.parent)


def move_files(staging: Path, folder: Path) -> None:
    """Move the files of a temporary folder into another folder of its file system, where they replace older ones."""
    files = list(staging.iterdir())
    for file in files:
        follow_umask(file)
    flush(*files)
    for file in files:
        file.replace(folder / file.name)
    flush(folder)


def flush(*paths: Path) -> None:
    """Return when the content of these files, and the names in these folders, would survive a power loss."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in (errno.EBADF, errno.EINVAL):  # some file systems cannot flush folders
                raise
        finally:
            os.close(descriptor)


def sha256(file: Path) -> str:
    """The SHA-256 of a file's content in lower-case hexadecimal. Raises OSError if it cannot be read."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def follow_umask(file: Path) -> None:
    """Give a file the permissions of any new file: safetensors makes its files private to their owner."""
    umask = os.umask(0)
    os.umask(umask)
    file.chmod(0o666 & ~umask)


# ------------------------------------------------------------------------------------------------------ caches, outputs


def cached(lock: Path, read: Callable[[], T | None], write: Callable[[], None]) -> T:
    """What `read` finds in a cache. If it finds nothing, one process writes it, and the others wait for that.

    Args:
        lock: path of the lock file, in the folder that is written to, which is created.
        read: returns None if nothing is there, or what is there is damaged.
        write: writes it, atomically.
    """
    if (found := read()) is not None:
        return found
    lock.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(lock):
        if (found := read()) is not None:
            return found
        remove_leftovers(lock.parent)
        write()
        return read()


def check_output(
    path: Path, flag: str, suffixes: Collection[str] = (), *, overwrite: bool = False, inputs: Iterable[Path] = ()
) -> None:
    """Check, before any work, that a command may write a file.

    Args:
        path: the file.
        flag: that named it, for messages.
        suffixes: which it may have, in lower case; any if there is none.
        overwrite: whether it may be there already.
        inputs: files that the command reads, and must not replace.

    Raises:
        UserError: another suffix, a folder in its way, no folder that may be written to, an input of the command, or a
            file that is there and may not be replaced.
    """
    if suffixes and path.suffix.lower() not in suffixes:
        raise UserError(f"{flag} {path}: its suffix names no format; use one of {', '.join(suffixes)}")
    if path.is_dir():
        raise UserError(f"{flag} {path}: a folder is in the way; rename it, or choose another name")
    if not path.parent.is_dir():
        raise UserError(f"{flag} {path}: there is no folder {path.parent}; create it first")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise UserError(f"{flag} {path}: permission denied; choose a folder that you may write to")
    if not path.exists():
        return
    if any(other.exists() and path.samefile(other) for other in inputs):
        raise UserError(f"{flag} {path}: it would replace the input of this command; choose another name")
    if not overwrite:
        raise UserError(f"{flag} {path}: it exists; choose another name, or set --overwrite to replace it")


# ----------------------------------------------------------------------------------------------------------------- JSON


def write_json(path: Path, content: Any) -> None:
    """Write `content` as indented JSON, atomically."""
    with atomic_file(path) as tmp_path:
        tmp_path.write_text(json.dumps(content, indent=2) + "\n")


def read_json(path: Path, fix: str, shape: Any = object) -> Any:
    """Read a JSON file that this package wrote.

    Args:
        path: the file.
        fix: what the user can do if the file is damaged; it ends the error message.
        shape: types of what it must hold, as in `{"finished": bool, "sessions": [dict]}`; a dict may hold other keys.

    Raises:
        UserError: the file cannot be read, is not valid JSON or has another shape.
        FileNotFoundError, NotADirectoryError: there is no such file.
    """
    try:
        content = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({first_line(error)}); {fix}") from error
    if not _has_shape(content, shape):
        raise UserError(f"{path}: does not hold what was written there; {fix}")
    return content


def _has_shape(content: Any, shape: Any) -> bool:
    """Whether JSON has a shape: a type, a list of one shape for all elements, or a dict of shapes.

    In a dict, the key `str` stands for all keys. Whole numbers are floats too.
    """
    if isinstance(shape, list):
        return isinstance(content, list) and all(_has_shape(element, shape[0]) for element in content)
    if isinstance(shape, dict):
        if not isinstance(content, dict):
            return False
        if str in shape:
            return all(_has_shape(value, shape[str]) for value in content.values())
        return all(key in content and _has_shape(content[key], expected) for key, expected in shape.items())
    return isinstance(content, int | float if shape is float else shape)

"""Files and folders that appear complete or not at all, also after a kill or a power loss; and their locks.

Whatever other processes may read is first written to a temporary folder beside it, then flushed to the disk, and then
renamed. A killed process or a full disk can then never leave half a file where a complete one is expected. What it does
leave, `remove_leftovers` deletes.

Locks are files that the operating system releases when their process dies. A process that works in a folder for long
claims it, and a second one ends with an error (`claim`). What takes short, or is wanted by all, is waited for
(`locked`). A temporary folder has a lock for as long as its process lives.
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

from filelock import FileLock, Timeout

from galaxy_mae.errors import UserError, first_line

T = TypeVar("T")

_TEMPORARY, _LOCK = ".tmp-", ".lock"  # how the names of temporary folders begin, and what their locks' names add
_PREVIOUS_JOB_TIMEOUT = 600  # seconds


@contextmanager
def locked(path: Path, before_waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Hold a lock file within the block. Calls `before_waiting` and waits if another process holds it."""
    try:
        held = FileLock(path).acquire(blocking=False)
    except Timeout:
        before_waiting()
        held = FileLock(path).acquire()
    with held:
        yield


@contextmanager
def claim(path: Path) -> Iterator[None]:
    """Hold a lock file within the block, so that one process works in its folder.

    Slurm may start a requeued job while its previous job is still ending; a requeued job waits for it.

    Raises:
        UserError: another process holds the lock, for a requeued job after ten minutes.
    """
    requeued = os.environ.get("SLURM_RESTART_COUNT", "0") != "0"
    try:
        held = FileLock(path).acquire(timeout=_PREVIOUS_JOB_TIMEOUT if requeued else 0)
    except Timeout as error:
        raise UserError(f"{path.parent}: another process is writing to this folder; wait for it or stop it") from error
    with held:
        yield


@contextmanager
def temporary_folder(parent: Path) -> Iterator[Path]:
    """Yield an empty folder in `parent`, which is removed at the end.

    This process holds a lock file beside it, from before the folder is made until after it is removed.
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

    `recursive` is False where a user's folder may hold anything.
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
        _finish(new)
        flush(new)
        if path.exists():
            path.rename(staging / "old")
        new.rename(path)
        flush(path.parent)


def move_files(staging: Path, folder: Path) -> None:
    """Move the files of a temporary folder into another folder of its file system, where they replace older ones."""
    for file in _finish(staging):
        file.replace(folder / file.name)
    flush(folder)


def _finish(staging: Path) -> list[Path]:
    """Give files that are written their permissions, flush them, and return them."""
    files = list(staging.iterdir())
    for file in files:
        follow_umask(file)
    flush(*files)
    return files


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


def user_path(text: str) -> Path:
    """A path that a user wrote, with `~` for the home folder as the shell has it: in a recipe, or after `--flag=`."""
    return Path(os.path.expanduser(text))  # noqa: PTH111 (that of pathlib raises for an unknown user)


def sha256(file: Path) -> str:
    """The SHA-256 of a file's content in lower-case hexadecimal. Raises OSError if it cannot be read."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def follow_umask(file: Path) -> None:
    """Give a file the permissions of any new file: safetensors makes its files private to their owner."""
    umask = os.umask(0)
    os.umask(umask)
    file.chmod(0o666 & ~umask)


def cached(lock: Path, read: Callable[[], T | None], write: Callable[[], None]) -> T:
    """What `read` finds in a cache. If that is None, one process writes it, atomically, and the others wait for that.

    The lock file is in the folder that is written to, which is created.
    """
    if (found := read()) is not None:
        return found
    lock.parent.mkdir(parents=True, exist_ok=True)
    with locked(lock):
        if (found := read()) is not None:
            return found
        remove_leftovers(lock.parent)
        write()
        return read()


def check_output(
    path: Path,
    flag: str,
    suffixes: Collection[str] = (),
    *,
    overwrite: bool = False,
    inputs: Iterable[Path] = (),
    marker: str = "",
) -> None:
    """Check, before any work, that a command may write a file, or a folder that is replaced as one.

    Args:
        path, flag: the output, and what named it.
        suffixes: which it may have, in lower case; any if there is none.
        overwrite: whether it may be there already.
        inputs: files that the command reads, and must not replace.
        marker: of a folder, the file by which one that the command wrote before is known; empty for a file.

    Raises:
        UserError: it may not.
    """
    if suffixes and path.suffix.lower() not in suffixes:
        raise UserError(f"{flag} {path}: its suffix names no format; use one of {', '.join(suffixes)}")
    if path.is_dir() and not (marker and (path / marker).is_file()):
        raise UserError(f"{flag} {path}: a folder is in the way; rename it, or choose another name")
    if not (path.parent.is_dir() and os.access(path.parent, os.W_OK | os.X_OK)):
        raise UserError(f"{flag} {path}: there is no folder {path.parent} that you may write to; create it first")
    if not path.exists():
        return
    if any(other.exists() and path.samefile(other) for other in inputs):
        raise UserError(f"{flag} {path}: it would replace the input of this command; choose another name")
    if not overwrite:
        raise UserError(f"{flag} {path}: it exists; choose another name, or set --overwrite to replace it")


def make_output_folder(
    folder: Path, flag: str, *, parents: bool = True, marker: str = "", inputs: Iterable[Path] = ()
) -> Path:
    """Create the folder that a command writes into and resumes from, and return it.

    Args:
        folder, flag: the output, and what named it.
        parents: whether to create the folders that it is in.
        marker: a file that each folder of the command has; one with other files, and without it, is not the command's.
            Empty: files that are there are compared later.
        inputs: folders that the command reads, and must not write into.

    Raises:
        UserError: it cannot be created, is not writable, is in an input, or is not the command's.
    """
    for other in inputs:
        if other.resolve() in (folder.resolve(), *folder.resolve().parents):
            raise UserError(f"{flag} {folder}: this is the input, or in it; choose another folder")
    try:
        folder.mkdir(parents=parents, exist_ok=True)
    except OSError as error:
        raise UserError(f"{flag} {folder}: cannot be created ({error.strerror}); choose another folder") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"{flag} {folder}: permission denied; choose a folder that you may write to")
    other_files = (path for path in folder.iterdir() if not path.name.startswith(_TEMPORARY) and not path.is_dir())
    if marker and not (folder / marker).is_file() and any(other_files):
        raise UserError(f"{flag} {folder}: holds other files and no {marker}; choose an empty or new folder")
    return folder


def write_json(path: Path, content: Any) -> None:
    """Write `content` as indented JSON, atomically."""
    with atomic_file(path) as tmp_path:
        tmp_path.write_text(json.dumps(content, indent=2) + "\n")


def read_json(path: Path, fix: str, keys: Iterable[str] = ()) -> dict[str, Any]:
    """Read a JSON object that this package wrote.

    Raises:
        UserError: the file cannot be read, or holds no object with these keys. `fix` ends the message.
        FileNotFoundError, NotADirectoryError: there is no such file.
    """
    try:
        content = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({first_line(error)}); {fix}") from error
    if not isinstance(content, dict) or not content.keys() >= set(keys):
        raise UserError(f"{path}: does not hold what was written there; {fix}")
    return content

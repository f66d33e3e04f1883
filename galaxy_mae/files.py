"""Files and folders that appear complete or not at all, also after a kill or a power loss; and their locks.

Whatever other processes may read is first written to a temporary folder beside it, then flushed to the disk, and then
renamed. A killed process or a full disk can then never leave half a file where a complete one is expected. What it does
leave, `remove_leftovers` deletes.

Locks are files that the operating system releases when their process dies. A process that works in a folder for long
claims it, and a second one ends with an error (`claim`). What takes short, or is wanted by all, is waited for
(`locked`). A temporary folder has a lock for as long as its process lives. On a file system without locks, a file
`NAME.lease` takes their place: it names its host and process, which touches it every 20 seconds. Another process takes
it over when its process is known to be dead, or when it was not touched for a minute.
"""

import errno
import hashlib
import json
import logging
import math
import os
import re
import secrets
import shutil
import socket
import stat
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from filelock import BaseFileLock, FileLock, LeaseCompromise, SoftFileLease, Timeout

from galaxy_mae.errors import UserError, first_line

T = TypeVar("T")

logger = logging.getLogger(__name__)

_TEMPORARY, _LOCK = re.compile(r"\.tmp-[0-9a-f]{12}"), ".lock"  # names of temporary folders; what their locks add
_PREVIOUS_JOB_TIMEOUT = 600  # seconds
MAX_DECODED_BYTES = 1 << 30  # that a file may always take in memory
_MAX_EXPANSION = 16  # times what it takes on the disk, else; images and tables of galaxies compress to about a half
_MAX_SETTINGS_BYTES = 64 << 20  # of a JSON, YAML or properties file, which are read at once
_LEASE = 60  # seconds without a sign of life after which another process takes a lock over, where there is no flock
_ABANDONED = 24 * 3600  # seconds, by which clocks do not differ, after which a temporary folder is deleted there
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EIO)  # of flock, as on NFS or Lustre without locks
_HARMLESS = (".lock", ".lease", ".log", ".out", ".err")  # suffixes in a folder that is not taken for somebody else's


def _lock(path: Path, timeout: float = -1) -> BaseFileLock:
    """Acquire a lock, or a lease where the file system has none; a `Timeout` after so many seconds, -1 for never."""
    try:
        return FileLock(path, fallback_to_soft=False).acquire(timeout)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    path, started, seen, since = Path(f"{path}.lease"), time.monotonic(), None, 0.0
    while True:
        now = time.monotonic()
        try:
            return SoftFileLease(path, lease_duration=_LEASE, on_compromise=_stop).acquire(timeout=0)
        except Timeout:
            if 0 <= timeout <= now - started:
                raise
        with suppress(FileNotFoundError):  # it is released
            found = path.stat()
            if (state := (found.st_ino, found.st_mtime_ns)) != seen:
                seen, since = state, now
            elif now - since > _LEASE:  # which filelock does not take over where names cannot be exchanged, as on NFS
                path.rename(taken := Path(f"{path}.{secrets.token_hex(6)}"))
                if taken.stat().st_mtime_ns != found.st_mtime_ns:  # its process came back, or another was faster
                    with suppress(OSError):
                        path.hardlink_to(taken)
                taken.unlink()
        time.sleep(min(0.5, _LEASE / 10))


def _stop(lost: LeaseCompromise) -> None:
    """End this process, before it writes beside one that took its lease over; Slurm's scripts requeue it."""
    print(f"error: {lost.lock_file}: this process was held up, and lost its lock: stopped", file=sys.stderr, flush=True)
    os._exit(os.EX_TEMPFAIL)


@contextmanager
def locked(path: Path, before_waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Hold a lock file within the block. Calls `before_waiting` and waits if another process holds it."""
    try:
        held = _lock(path, timeout=0)
    except Timeout:
        before_waiting()
        held = _lock(path)
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
    timeout = _PREVIOUS_JOB_TIMEOUT if requeued else 0
    owner = SoftFileLease(f"{path}.lease", lease_duration=_LEASE).owner  # None, but where there are no locks
    if owner and not (owner.hostname == socket.gethostname() and Path("/proc", str(owner.pid)).exists()):
        who = f"process {owner.pid} on {owner.hostname}"
        logger.warning("%s: locked by %s: waiting up to %d s for a sign of life", path.parent, who, 1.5 * _LEASE)
        timeout = max(timeout, 1.5 * _LEASE)
    try:
        held = _lock(path, timeout)
    except Timeout as error:
        raise UserError(f"{path.parent}: another process is writing to this folder; wait for it or stop it") from error
    with held:
        yield


@contextmanager
def temporary_folder(parent: Path) -> Iterator[Path]:
    """Yield an empty folder in `parent`, which is removed at the end.

    This process holds a lock file beside it, from before the folder is made until after it is removed. What killed
    processes left in `parent` is deleted.
    """
    parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(parent, recursive=False)
    folder = parent / f".tmp-{secrets.token_hex(6)}"
    with _lock(_lock_file(folder)):
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
            if name.endswith(_LOCK) and _TEMPORARY.fullmatch(name.removesuffix(_LOCK)):
                left = Path(parent, name.removesuffix(_LOCK))
                # Its lock is held by a living process, or it belongs to another user: both raise an OSError.
                with suppress(OSError):
                    lease = Path(parent, f"{name}.lease")
                    if lease.exists() and time.time() - lease.stat().st_mtime > _ABANDONED:
                        lease.unlink()
                    with _lock(_lock_file(left), timeout=0):
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
    """Yield a temporary path of the same name. On success it replaces `path`, on any exception it is removed.

    Of a link, what it points to is replaced.
    """
    with temporary_folder(Path(os.path.realpath(path)).parent) as staging:
        yield staging / path.name
        move_files(staging, path.parent)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield an empty temporary folder, for files. On success it replaces `path`, on any exception it is removed.

    A folder cannot be replaced in one step. The old `path` is renamed first, so a kill between the two renames leaves
    no `path`, but never half of one. Of a link, what it points to is replaced.
    """
    path = Path(os.path.realpath(path))
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
    """Move the files of a temporary folder into another folder, where they replace older ones, or what links name."""
    for file in _finish(staging):
        replace(file, folder / file.name)


def replace(file: Path, path: Path) -> None:
    """Rename a file to `path`, which may be there, or a link, of which what it points to is replaced."""
    target = Path(os.path.realpath(path))
    if target.is_symlink():
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
    try:
        file.replace(target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        with atomic_file(target) as tmp_path:  # on the other file system
            shutil.copyfile(file, tmp_path)
    flush(target.parent)


def _finish(staging: Path) -> list[Path]:
    """Give files that are written their permissions, flush them, and return them."""
    files = list(staging.iterdir())
    follow_umask(*files)
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


def follow_umask(*files: Path) -> None:
    """Give files of one folder the permissions of a new file there: safetensors makes its files private to their owner.

    A folder may have a default ACL, so such a file is made. Some file systems, such as CIFS, cannot change permissions.
    """
    for file in files[:1]:
        with suppress(OSError):
            new = file.with_name(f".new-{secrets.token_hex(6)}")
            new.touch(exist_ok=False)
            mode = new.stat().st_mode
            new.unlink()
            for other in files:
                if other.stat().st_mode != mode:
                    other.chmod(mode & 0o777)


def cached(lock: Path, read: Callable[[], T | None], write: Callable[[], None]) -> T:
    """What `read` finds in a cache. If that is None, one process writes it, atomically, and the others wait for that.

    The lock file is in the folder that is written to, which is created.
    """
    remove_leftovers(lock.parent)  # also of a process that was killed when what it wrote was complete
    if (found := read()) is not None:
        return found
    lock.parent.mkdir(parents=True, exist_ok=True)
    with locked(lock):
        if (found := read()) is not None:
            return found
        write()
        return read()


def check_output(
    path: Path,
    flag: str,
    suffixes: Collection[str] = (),
    *,
    overwrite: bool = False,
    replace_own: bool = False,
    inputs: Iterable[str | Path] = (),
    contents: Collection[str] = (),
) -> None:
    """Check, before any work, that a command may write a file, or a folder that is replaced as one.

    Args:
        path, flag: the output, and what named it.
        suffixes: which it may have, in lower case; any if there is none.
        overwrite: whether it may be there already.
        replace_own: whether it may be if it says that this program wrote it, as figures and pages do.
        inputs: files and folders that the command reads, and must not replace, nor a file in them.
        contents: the names of all files of a folder, by which one that the command wrote before is known; empty for a
            file.

    Raises:
        UserError: it may not.
    """
    if suffixes and path.suffix.lower() not in suffixes:
        raise UserError(f"{flag} {path}: its suffix names no format; use one of {', '.join(suffixes)}")
    parent = Path(os.path.realpath(path)).parent if path.is_symlink() else path.parent
    if not (parent.is_dir() and os.access(parent, os.W_OK | os.X_OK)):
        raise UserError(f"{flag} {path}: there is no folder {parent} that you may write to; create it first")
    if not path.exists():
        return
    if path.is_dir() and not (contents and {file.name for file in path.iterdir()} == set(contents)):
        raise UserError(f"{flag} {path}: a folder is in the way; rename it, or choose another name")
    if not path.is_dir() and (contents or not path.is_file()):
        raise UserError(f"{flag} {path}: something else is in the way; choose another name")
    real = path.resolve()
    there = [Path(other) for other in inputs if os.path.exists(other)]  # noqa: PTH110 (false for names of no file)
    if any(each.samefile(other) for other in there for each in (real, *real.parents)):
        raise UserError(f"{flag} {path}: it would replace the input of this command; choose another name")
    if replace_own and not overwrite:
        with path.open("rb") as file:
            if b"galaxy_mae" not in file.read(1024):
                raise UserError(f"{flag} {path}: it exists, and this program did not write it; choose another name")
    elif not overwrite:
        raise UserError(f"{flag} {path}: it exists; choose another name, or set --overwrite to replace it")


def make_output_folder(
    folder: Path, flag: str, *, markers: Sequence[str], parents: bool = True, inputs: Iterable[Path] = ()
) -> Path:
    """Create the folder that a command writes into and resumes from, and return it.

    Args:
        folder, flag: the output, and what named it.
        markers: files of which each folder of the command has one; a folder without that holds other files than hidden
            ones, locks, and logs of a job, is not the command's.
        parents: whether to create the folders that it is in.
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
    others = [file for file in folder.iterdir() if not (file.name.startswith(".") or file.suffix in _HARMLESS)]
    is_empty = (file.is_dir() and all(x.name.startswith(".") for x in file.iterdir()) for file in others)
    if not (all(is_empty) or any((folder / marker).exists() for marker in markers)):  # which may appear meanwhile
        raise UserError(f"{flag} {folder}: holds other files and no {markers[0]}; choose an empty or new folder")
    return folder


def check_regular(path: Path, max_bytes: float = math.inf, fix: str = "copy the right file there") -> None:
    """Check, before a file is opened, that reading it ends: it is no pipe or device, and of at most so many bytes.

    Raises:
        UserError: it is. `fix` ends the message.
        OSError: there is no such file.
    """
    state = path.stat()
    if not stat.S_ISREG(state.st_mode) or state.st_size > max_bytes:
        wrong = f"{state.st_size:,} bytes" if stat.S_ISREG(state.st_mode) else "a folder, pipe or device"
        raise UserError(f"{path}: it is {wrong}, no file that is expected there; {fix}")


def read_settings(path: Path, fix: str = "copy the right file there") -> bytes:
    """The content of a small file, such as a recipe; a `UserError` or OSError as of `check_regular`."""
    check_regular(path, _MAX_SETTINGS_BYTES, fix)
    return path.read_bytes()


def bytes_on_disk(file: Path) -> int:
    """What a file takes on the disk, without its holes."""
    return 512 * file.stat().st_blocks


def check_decoded(size: int, file: Path, stored: int = 0) -> None:
    """Raise a `UserError` if `size` bytes in memory, which a file declares, are over 1 GiB and far over its size.

    With the files that were read before it, they take `stored` bytes on the disk.
    Sparse files, constant compressed data, and values that many rows refer to take next to no space there.
    """
    if size > MAX_DECODED_BYTES and size > _MAX_EXPANSION * (stored or bytes_on_disk(file)):
        raise UserError(f"{file}: it declares {size:,} bytes, far more than it can hold: create the file again")


def write_json(path: Path, content: Any) -> None:
    """Write `content` as indented JSON, atomically."""
    with atomic_file(path) as tmp_path:
        tmp_path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_json(path: Path, fix: str, keys: Iterable[str] = ()) -> dict[str, Any]:
    """Read a JSON object that this package wrote.

    Raises:
        UserError: the file cannot be read, or holds no object with these keys. `fix` ends the message.
        FileNotFoundError, NotADirectoryError: there is no such file.
    """
    try:
        content = json.loads(read_settings(path, fix))
    except (FileNotFoundError, NotADirectoryError, UserError):
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({first_line(error)}); {fix}") from error
    if not isinstance(content, dict) or not content.keys() >= set(keys):
        raise UserError(f"{path}: does not hold what was written there; {fix}")
    return content

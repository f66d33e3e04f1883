"""Errors that a user can fix: one line that names the cause and the fix, and exit status 2.

Everything that a user can cause raises `UserError`. The entry points run inside `one_line_errors`, which prints the
line and exits. Anything else is a bug and keeps its traceback.
"""

import errno
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class UserError(ValueError):
    """A mistake or a condition that the user can fix. The message names the cause and the fix in one line."""


DISK_FULL = "the disk or quota is full, or ulimit -f too small"
_DISK_FULL_MESSAGES = (
    *("os error 28", "os error 122", "No space left on device", "Disk quota exceeded"),
    *("os error 27", "File too large", "inline_container"),  # the last is where torch.save fails
)
_SHARED_MEMORY = ("</torch_", "out of shared memory", "insufficient shared memory", "multiprocessing/synchronize.py")
_OF_PATHS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the name of its type if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].strip()


def root_cause(error: BaseException) -> BaseException:
    """The error that a library's error was raised from: the system's, with an errno, or else the first one."""
    chain = [error]
    while (earlier := chain[-1].__cause__ or chain[-1].__context__) is not None and earlier not in chain:
        chain.append(earlier)
    return next((earlier for earlier in chain if getattr(earlier, "errno", None)), chain[-1])


def is_disk_full(error: BaseException) -> bool:
    """Whether an error is `DISK_FULL`. Writers wrap the system's error in types of their own."""
    return any(message in str(error) for message in _DISK_FULL_MESSAGES)


@contextmanager
def one_line_errors(program: str) -> Iterator[None]:
    """Turn a `UserError`, a full or read-only disk, or a path that cannot be used into one line and exit status 2."""
    while os.open(os.devnull, os.O_RDWR) < 3:  # closed, as by >&-: else the next file gets its number, and what is
        pass  # printed
    sys.stdout, sys.stderr = (x or Path(os.devnull).open("w", encoding="utf-8") for x in (sys.stdout, sys.stderr))  # noqa: SIM115
    try:
        yield
        return
    except UserError as error:
        message = " ".join(str(error).split())
    except KeyboardInterrupt:
        print(f"{Path(program).name}: interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        name = getattr(error, "filename", None)
        where = f"{name}: " if name else ""
        if any(word in f"{error} {traceback.format_tb(error.__traceback__)}" for word in _SHARED_MEMORY):
            fix = "free or enlarge it, or set --dataloader_num_workers 0"
            message = f"/dev/shm, the shared memory, is full or cannot be used ({first_line(error)}): {fix}"
        elif is_disk_full(error):
            message = f"{where}{DISK_FULL}: free some space, or write to another disk"
        elif isinstance(error, OSError) and error.errno in _OF_PATHS:
            message = f"{where}{error.strerror}: choose a file or folder that you may read, or write to"
        elif isinstance(error, UnicodeEncodeError) and error.reason == "surrogates not allowed":  # of a Latin-1 name
            message = f"{ascii(error.object)[:300]}: the name is not UTF-8, which a library needs: rename it"
        elif "Could not determine home directory" in str(error):  # pathlib, as in a container without this user
            message = "the home folder is not known: set HOME to a folder that you may write to"
        else:
            raise
    print(f"{Path(program).name}: error: {message}", file=sys.stderr)
    sys.exit(2)

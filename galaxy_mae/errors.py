"""Errors a user can mend: one line that names the cause and the mend, exit status 2.

Everything that a user can cause raises `UserError`; the entry points run inside `one_line_errors`, which prints the
line and exits. Whatever else goes wrong is a bug of ours and keeps its traceback.
"""

import errno
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class UserError(Exception):
    """Something the user can mend. The message names the cause and the mend in one line."""


_FULL_DISK = ("os error 28", "os error 122", "No space left on device", "Disk quota exceeded")
_UNWRITABLE = {
    errno.EACCES: "permission denied",
    errno.EPERM: "operation not permitted",
    errno.EROFS: "the file system is read-only",
}


def means_full_disk(error: BaseException) -> bool:
    """Whether an error says that a disk or a quota is full. Writers wrap the system's error in many types of theirs."""
    return any(sign in str(error) for sign in _FULL_DISK)


@contextmanager
def one_line_errors(program: str) -> Iterator[None]:
    """Turn a `UserError`, or a full or unwritable disk, into one line on standard error and exit status 2."""
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
        if means_full_disk(error):
            message = f"{where}the disk or quota is full: free some space, or write somewhere else"
        elif isinstance(error, OSError) and error.errno in _UNWRITABLE:
            message = f"{where}{_UNWRITABLE[error.errno]}: choose a place that you may write to"
        else:
            raise
    print(f"{Path(program).name}: error: {message}", file=sys.stderr)
    sys.exit(2)

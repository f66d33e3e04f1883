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


# Conditions of the machine rather than of the program: told in the system's own words, with the path they concern.
_MENDS = {
    errno.ENOSPC: "the disk is full: free some space, or write somewhere else",
    errno.EDQUOT: "the disk quota is used up: free some space, or write somewhere else",
    errno.EACCES: "permission denied: choose a folder you may write to",
    errno.EPERM: "operation not permitted: choose a folder you may write to",
    errno.EROFS: "the file system is read-only: choose a folder you may write to",
}


@contextmanager
def one_line_errors(program: str) -> Iterator[None]:
    """Turn a `UserError` or a full or unwritable disk into one line on standard error and exit status 2."""
    try:
        yield
    except UserError as error:
        message = " ".join(str(error).split())
    except OSError as error:
        if error.errno not in _MENDS:
            raise
        where = f"{error.filename}: " if error.filename else ""
        message = where + _MENDS[error.errno]
    else:
        return
    print(f"{Path(program).name}: error: {message}", file=sys.stderr)
    sys.exit(2)

"""Errors that a user can fix: one line that names the cause and the fix, and exit status 2.

Everything that a user can cause raises `UserError`. The entry points run inside `one_line_errors`, which prints the
line and exits. Anything else is a bug and keeps its traceback.
"""

import errno
import os
import select
import shlex
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class UserError(ValueError):
    """A mistake or a condition that the user can fix. The message names the cause and the fix in one line."""


EXIT_REQUEUE = 75  # exit status; EX_TEMPFAIL of sysexits.h: "the user is invited to retry"
_NOT_UTF8 = "it has characters that this locale has not: set PYTHONUTF8=1"
DISK_FULL = "the disk or quota is full, or ulimit -f too small"
_DISK_FULL_MESSAGES = (
    *("os error 28", "os error 122", "No space left on device", "Disk quota exceeded"),
    *("os error 27", "File too large", "inline_container.cc"),  # the last is where torch.save fails
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
def full_disk_named(where: str, otherwise: str = "; the same command resumes") -> Iterator[None]:
    """Say within the block which disk is full, by a `UserError` with what can be done but to free some space."""
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or not is_disk_full(error):
            raise
        raise UserError(f"{where}: {DISK_FULL}: free some space{otherwise}") from error


def _lost_its_reader(descriptor: int) -> bool:
    """Whether a descriptor is that of a pipe from which nobody reads any more."""
    poll = select.poll()
    poll.register(descriptor, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


@contextmanager
def one_line_errors(program: str) -> Iterator[None]:
    """Turn a `UserError`, a full or read-only disk, or a path that cannot be used into one line and exit status 2.

    What is stopped by Ctrl-C or a signal ends with the command that resumes it.
    Output to a pipe whose reader has ended, as of `| head`, ends the program without a word, as the signal would.
    """
    # Of one that is closed, as by >&-, the next file would get the number, and what is printed.
    while os.open(os.devnull, os.O_RDWR) < 3:
        pass
    sys.stdout, sys.stderr = (x or Path(os.devnull).open("w", encoding="utf-8") for x in (sys.stdout, sys.stderr))  # noqa: SIM115
    is_utf8 = sys.getfilesystemencoding() == "utf-8"
    if hasattr(sys.stdout, "reconfigure"):  # not a test's
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr
    try:
        if not is_utf8 and (names := [text for text in sys.argv[1:] if not text.isascii()]):
            raise UserError(f"{names[0]!a}: {_NOT_UTF8}")
        try:
            yield
        except SystemExit:  # as of --help
            print(end="", flush=True)
            raise
        print(end="", flush=True)  # when Python ends, it would be too late
        return
    except UserError as error:
        message = " ".join(str(error).split())
    except (KeyboardInterrupt, SystemExit) as error:
        status = error.code if isinstance(error, SystemExit) else 130
        if status in (130, EXIT_REQUEUE):
            print(f"{Path(program).name}: stopped; to resume: {shlex.join(sys.orig_argv)}", file=sys.stderr)
        sys.exit(status)
    except Exception as error:
        closed = [descriptor for descriptor in (1, 2) if _lost_its_reader(descriptor)]
        if closed and isinstance(error, BrokenPipeError):
            for descriptor in closed:  # Python would report it again when it ends
                os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
            sys.exit(128 + signal.SIGPIPE)
        name = getattr(error, "filename", None)
        where = f"{name}: " if name else ""
        if any(word in f"{error} {traceback.format_tb(error.__traceback__)}" for word in _SHARED_MEMORY):
            fix = "free or enlarge it, or set --dataloader_num_workers 0"
            message = f"/dev/shm, the shared memory, is full or cannot be used ({first_line(error)}): {fix}"
        elif is_disk_full(error):
            message = f"{where}{DISK_FULL}: free some space, or write to another disk"
        elif isinstance(error, OSError) and error.errno in _OF_PATHS:
            message = f"{where}{error.strerror}: choose a file or folder that you may read, or write to"
        elif isinstance(error, UnicodeEncodeError) and not is_utf8:
            message = f"{ascii(error.object)[:300]}: {_NOT_UTF8}"
        elif isinstance(error, UnicodeEncodeError) and error.reason == "surrogates not allowed":  # of a Latin-1 name
            message = f"{ascii(error.object)[:300]}: the name is not UTF-8, which a library needs: rename it"
        elif "Could not determine home directory" in str(error):  # pathlib, as in a container without this user
            message = "the home folder is not known: set HOME to a folder that you may write to"
        else:
            raise
    print(f"{Path(program).name}: error: {message}", file=sys.stderr)
    sys.exit(2)

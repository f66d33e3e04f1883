"""How far a command is: one bar in a terminal, elsewhere a line where nothing was written for a while.

What may take more than a few seconds is a `stage`. A thread writes how far it is, so that no stage needs to look at the
clock, and a fit inside a library is not silent either.
"""

import atexit
import logging
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache

from tqdm import tqdm

from galaxy_mae.provenance import is_main_process

INTERVAL = 15.0  # seconds without a line

_stages: list["Stage"] = []  # the outermost first
_command: "Stage | None" = None
_last_line = time.monotonic()
_ended = threading.Event()


class Stage:
    """Something that takes long, of which `done` of `total` units are done; `total` None: that is not known."""

    def __init__(self, what: str, total: int | None, unit: str, done: int, bar: bool):
        self.what, self.total, self.unit, self.done, self.note = what, total, unit, done, ""
        self.first, self.started = done, time.monotonic()
        options = {"unit": f" {unit}", "initial": done, "dynamic_ncols": True, "leave": False, "delay": 0.5}
        self.bar = tqdm(total=total, desc=what, disable=not bar, **options)

    def advance(self, count: int = 1) -> None:
        """So many units more are done."""
        self.done += count
        self.bar.update(count)

    def describe(self, note: str) -> None:
        """Set what is also said of it, such as its loss."""
        self.note = note
        self.bar.set_postfix_str(note, refresh=False)

    def __str__(self) -> str:
        elapsed, counted, left = time.monotonic() - self.started, "", ""
        if self.total is not None:
            counted = f"{self.done:,} of {self.total:,} {self.unit}"
            if self.first < self.done < self.total:
                left = f"about {duration(elapsed * (self.total - self.done) / (self.done - self.first))} left"
        return f"{self.what}: {', '.join(filter(None, (counted, self.note, duration(elapsed), left)))}"


@contextmanager
def stage(
    what: str, total: int | None = None, unit: str = "images", done: int = 0, bar: bool = True
) -> Iterator[Stage]:
    """Say how far something is within the block. In a terminal the outermost stage with a total has a bar."""
    _start_watching()
    counted = total is not None and all(outer.total is None for outer in _stages)
    this = Stage(what, total, unit, done, bar and counted and is_main_process() and sys.stderr.isatty())
    _stages.append(this)
    try:
        yield this
    finally:
        _stages.remove(this)
        this.bar.close()


def duration(seconds: float) -> str:
    """As in `40 s`, `3 min 20 s`, `2 h 5 min`."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes == 0:
        return f"{rest} s"
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


class LineHandler(logging.Handler):
    """Writes the lines of a log, above a bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line."""
        _write(self.format(record))


def _write(line: str) -> None:
    global _last_line
    _last_line = time.monotonic()
    with suppress(OSError, ValueError):  # whoever read it is gone: the work continues
        tqdm.write(line, file=sys.stderr)
        sys.stderr.flush()


def start(what: str) -> None:
    """Say that a command is at work also where it is in no stage, as while it imports libraries."""
    global _command
    _command = Stage(what, None, "", 0, False)
    _start_watching()


@cache
def _start_watching() -> None:
    if is_main_process():
        thread = threading.Thread(target=_watch, name="progress", daemon=True)
        thread.start()
        atexit.register(thread.join)  # a thread that writes while the interpreter shuts down would abort it
        atexit.register(_ended.set)  # before that


def _watch() -> None:
    while not _ended.wait(min(1, INTERVAL)):
        stages = list(_stages) or [_command]
        if time.monotonic() - _last_line > INTERVAL and stages != [None] and all(each.bar.disable for each in stages):
            counted = next((i for i, each in enumerate(stages) if each.total is not None), len(stages) - 1)
            _write(", ".join([*(each.what for each in stages[:counted]), str(stages[counted])]))

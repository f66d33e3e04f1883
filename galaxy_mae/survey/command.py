"""`python -m galaxy_mae.catalogue survey`: one of several tasks, or all of them, or the last step."""

import os
import sys
import time
from argparse import Namespace
from pathlib import Path

from galaxy_mae.catalogue.predict import counts_of
from galaxy_mae.data.frame import Frame
from galaxy_mae.data.hats import open_hats
from galaxy_mae.errors import UserError, full_disk_named
from galaxy_mae.survey.embedder import open_embedder
from galaxy_mae.survey.output import Output, finish, provenance_of
from galaxy_mae.survey.partitions import embed_partitions, share_of_task
from galaxy_mae.training.preemption import install_signal_handlers
from galaxy_mae.training.tracking import setup_logging

# Flags that `open_embedder` takes.
_HOW = ("image_column", "bands", "stretch", "bf16", "float16", "orientations", "use_cpu")


def run(options: Namespace) -> None:
    """Compute the partitions of a task, or all of them, and finish the output as the command line says.

    Raises:
        SystemExit: status 2, if a partition cannot be read.
    """
    if "SLURM_JOB_ID" in os.environ:
        install_signal_handlers()  # a job that is stopped by a signal is requeued
    setup_logging()
    catalogue = open_hats(options.catalog)
    if options.finish:
        print(finish(catalogue, options.output))
        return
    if not options.model:
        raise UserError("--model is missing; only --finish goes without it")
    task, tasks = _task(options)
    how = {name: getattr(options, name) for name in _HOW}
    how["frame"] = Frame.chosen(options.fit, options.arcsec)
    where = f"--catalog {options.catalog}"
    embedder = open_embedder(options.model, catalogue.schema, catalogue.properties, where, **how)
    partitions = share_of_task(catalogue.rows, task, tasks)
    started = time.monotonic()
    with full_disk_named(f"--output {options.output}"):
        output = Output(options.output, catalogue, provenance_of(catalogue, embedder))
        output.begin(Path(options.catalog))
        flags, errors = embed_partitions(output, partitions, embedder)
    counts = f"{counts_of(flags)}; {flags.total() / (time.monotonic() - started):,.1f} images/s"
    done = f"{len(partitions) - len(errors):,} of {len(partitions):,} partitions"
    print(f"task {task} of {tasks}: {done}; {flags.total():,} galaxies: {counts}; {options.output}")
    for partition, error in errors.items():
        print(f"error: partition {partition}: {error}", file=sys.stderr)
    if errors:
        sys.exit(2)
    if tasks == 1:
        print(finish(catalogue, options.output))


def _task(options: Namespace) -> tuple[int, int]:
    """This task, from 0, and how many there are: by the flags, by Slurm's array, or one."""
    if (options.task, options.tasks) != (None, None):
        if None in (options.task, options.tasks) or not 0 <= options.task < options.tasks:
            raise UserError(f"--task {options.task} --tasks {options.tasks}: set both, --task from 0 to --tasks less 1")
        return options.task, options.tasks
    array = [os.environ.get(f"SLURM_ARRAY_TASK_{name}") for name in ("ID", "MIN", "MAX", "COUNT")]
    if None in array:
        return 0, 1
    task, first, last, count = (int(text) if text.isdecimal() else -1 for text in array)
    if not 0 <= first <= task <= last == first + count - 1:
        given = f"task {array[0]} of {array[1]} to {array[2]}, {array[3]} in all"
        fix = "submit consecutive indices, as in --array=0-15; finished work is skipped"
        raise UserError(f"the array has gaps, or its variables are wrong ({given}): {fix}")
    return task - first, count

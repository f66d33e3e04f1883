"""The partitions of one task: read in record batches, decoded ahead of the model, each written and then renamed.

Batches run across partitions, so memory does not grow with the partitions, and small ones fill the model's batches.
"""

import heapq
import json
import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from galaxy_mae.data.fits import UnreadableImage
from galaxy_mae.data.hats import Partition
from galaxy_mae.data.images import decoding
from galaxy_mae.errors import UserError
from galaxy_mae.files import flush, temporary_folder
from galaxy_mae.predictions.formats import ABOUT
from galaxy_mae.provenance import num_cores
from galaxy_mae.survey.embedder import Embedder
from galaxy_mae.survey.output import Output

logger = logging.getLogger(__name__)

_READ_ROWS = 64  # of a record batch; multi-band images of 160 x 160 in four bands are then 26 MB
_SECONDS_PER_LINE = 60  # of progress
_GROUP_ROWS = 16_384  # of a Parquet row group of the output


def share_of_task(rows: dict[Partition, int | UserError], task: int, tasks: int) -> list[Partition]:
    """The partitions of one of several tasks, in the order of the catalogue: about the same number of rows for each.

    The largest partition that is left goes to the task with the fewest rows (Graham 1969, SIAM J. Appl. Math. 17, 416).
    """
    counts = {partition: 0 if isinstance(count, UserError) else count for partition, count in rows.items()}
    load = [(0, i) for i in range(tasks)]
    chosen = set()
    for partition in sorted(counts, key=lambda partition: -counts[partition]):
        total, i = heapq.heappop(load)
        heapq.heappush(load, (total + counts[partition] + 1, i))
        if i == task:
            chosen.add(partition)
    return [partition for partition in counts if partition in chosen]


def embed_partitions(
    output: Output, partitions: Sequence[Partition], embedder: Embedder
) -> tuple[Counter[str], dict[Partition, UserError]]:
    """Write the files of those of some partitions that an output does not have.

    Args:
        output: where they go.
        partitions: of the input.
        embedder: what computes the rows.

    Returns:
        How many of the new rows have each flag, and the partitions that cannot be read, with the reason.
    """
    flags: Counter[str] = Counter()
    errors = {p: rows for p in partitions if isinstance(rows := output.catalogue.rows[p], UserError)}
    left = [p for p in partitions if p not in errors and not output.is_done(p)]
    logger.info("%d of %d partitions are left to this task", len(left), len(partitions))
    if not left:
        return flags, errors
    schema = embedder.empty(output.catalogue.schema).schema
    writers: dict[Partition, _Writer] = {}
    done, last_line = 0, time.monotonic()
    with temporary_folder(output.primary) as staging:
        for rows in _embedded(_in_runs(_decoded(left, embedder), embedder.images_per_run), embedder):
            partition = rows.partition
            if partition not in writers:
                about = json.dumps(output.about_partition(partition))
                path = output.file_of(partition)
                writers[partition] = _Writer(staging, path, schema.with_metadata({ABOUT: about}))
            if rows.table is not None:
                if not flags["unreadable"] and (problems := list(filter(None, rows.table["problem"].to_pylist()))):
                    logger.warning("unreadable images are flagged; the first of them %s", problems[0])
                flags.update(rows.table["flag"].to_pylist())
                writers[partition].write(rows.table)
            if rows.last:
                if rows.error:
                    errors[partition] = rows.error
                    writers.pop(partition).discard()
                else:
                    writers.pop(partition).finish()
                done += 1
                if time.monotonic() - last_line > _SECONDS_PER_LINE:
                    last_line = time.monotonic()
                    logger.info("%d of %d partitions, %d galaxies", done, len(left), flags.total())
    return flags, errors


@dataclass
class _Rows:
    """Rows of a partition: of the input, with their decoded images, or of the output.

    An item without a table follows the last rows of a partition: `last` is set, and `error` if it could not be read.
    """

    partition: Partition
    table: pa.Table | None = None
    images: Sequence[np.ndarray | UnreadableImage] = ()
    last: bool = False
    error: UserError | None = None


def _decoded(partitions: Iterable[Partition], embedder: Embedder) -> Iterator[_Rows]:
    """All rows of some partitions, decoded by threads ahead of the consumer."""

    def decode(partition: Partition, batch: pa.RecordBatch) -> _Rows:
        table = pa.Table.from_batches([batch])
        return _Rows(partition, table.select(list(embedder.kept)), embedder.images(table))

    def calls() -> Iterator[Callable[[], _Rows]]:
        for partition in partitions:
            error = None
            try:
                for batch in partition.read(embedder.columns, _READ_ROWS):
                    yield partial(decode, partition, batch)
            except UserError as problem:
                error = problem
            yield partial(_Rows, partition, last=True, error=error)

    ahead = num_cores() + embedder.images_per_run // _READ_ROWS
    pending: deque[Future[_Rows]] = deque()
    with decoding(), ThreadPoolExecutor(num_cores()) as pool:
        for call in calls():
            pending.append(pool.submit(call))
            if len(pending) > ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def _in_runs(rows: Iterable[_Rows], size: int) -> Iterator[list[_Rows]]:
    """The same rows in lists of `size` images, but for the last one."""
    run, room = [], size
    for item in rows:
        while len(item.images) >= room:
            yield [*run, _Rows(item.partition, item.table.slice(0, room), item.images[:room])]
            item = _Rows(item.partition, item.table.slice(room), item.images[room:])
            run, room = [], size
        if item.images or item.last:
            run.append(item)
            room -= len(item.images)
    yield run


def _embedded(runs: Iterable[list[_Rows]], embedder: Embedder) -> Iterator[_Rows]:
    """The output's rows of runs."""
    for run in runs:
        images = [image for rows in run for image in rows.images]
        if images:
            output = embedder.rows(pa.concat_tables([rows.table for rows in run if rows.table is not None]), images)
        start = 0
        for rows in run:
            count = len(rows.images)
            yield _Rows(rows.partition, output.slice(start, count)) if count else rows
            start += count


class _Writer:
    """Writes the file of one partition, in a staging folder; `finish` puts it in place."""

    def __init__(self, staging: Path, path: Path, schema: pa.Schema):
        self.path, self.staged = path, staging / f"{path.parent.parent.name}_{path.name}"
        self.tables: list[pa.Table] = []
        self.writer = pq.ParquetWriter(self.staged, schema)

    def write(self, table: pa.Table) -> None:
        self.tables.append(table.cast(self.writer.schema))
        if sum(map(len, self.tables)) >= _GROUP_ROWS:
            self._write_group()

    def _write_group(self) -> None:
        if self.tables:
            self.writer.write_table(pa.concat_tables(self.tables).combine_chunks())
            self.tables = []

    def finish(self) -> None:
        self._write_group()
        self.writer.close()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        flush(self.staged)
        self.staged.replace(self.path)
        flush(self.path.parent)

    def discard(self) -> None:
        self.writer.close()
        self.staged.unlink()

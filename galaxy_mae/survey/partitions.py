"""The partitions of one task: read in record batches, decoded ahead of the model, each written and then renamed.

Batches run across partitions, so memory does not grow with the partitions, and small ones fill the model's batches.
"""

import itertools
import json
import logging
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from galaxy_mae.data.fits import UnreadableImage
from galaxy_mae.data.hats import Partition
from galaxy_mae.data.images import decoding
from galaxy_mae.errors import UserError
from galaxy_mae.files import flush, replace, temporary_folder
from galaxy_mae.predictions.formats import ABOUT
from galaxy_mae.progress import stage
from galaxy_mae.provenance import num_cores
from galaxy_mae.survey.embedder import IMAGES_PER_RUN, Embedder
from galaxy_mae.survey.output import Output

logger = logging.getLogger(__name__)

_READ_ROWS = 64  # of a record batch; multi-band images of 160 x 160 in four bands are then 26 MB
_GROUP_ROWS = 16_384  # of a Parquet row group of the output

_Rows = tuple[Partition, pa.Table, list[np.ndarray | UnreadableImage]]  # consecutive ones, with their decoded images


def share_of_task(rows: dict[Partition, int | UserError], task: int, tasks: int) -> list[Partition]:
    """The partitions of one of several tasks, in the order of the catalogue: about the same number of rows for each.

    The largest partition that is left goes to the task with the fewest rows (Graham 1969, SIAM J. Appl. Math. 17, 416).
    """
    counts = {partition: 0 if isinstance(count, UserError) else count for partition, count in rows.items()}
    load, chosen = np.zeros(min(tasks, len(counts)), np.int64), set()  # each task beyond these has none
    for partition in sorted(counts, key=counts.get, reverse=True):
        i = load.argmin()
        load[i] += counts[partition] + 1
        if i == task:
            chosen.add(partition)
    return [partition for partition in counts if partition in chosen]


def embed_partitions(
    output: Output, partitions: Sequence[Partition], embedder: Embedder
) -> tuple[Counter[str], dict[Partition, UserError]]:
    """Write the files of those of some partitions that an output does not have.

    Returns:
        How many of the new rows have each flag, and the partitions that cannot be read, with the reason.
    """
    flags: Counter[str] = Counter()
    rows = output.catalogue.rows
    errors = {partition: rows[partition] for partition in partitions if isinstance(rows[partition], UserError)}
    left = [partition for partition in partitions if partition not in errors and not output.is_done(partition)]
    logger.info("%d of %d partitions are left to this task", len(left), len(partitions))
    if not left:
        return flags, errors
    schema = embedder.empty(output.catalogue.schema).schema
    writers: dict[Partition, _Writer] = {}
    total = sum(rows[partition] for partition in left)
    with temporary_folder(output.primary) as staging, stage("embedding", total, "galaxies") as progress:
        for partition in left:
            if rows[partition] == 0:
                _Writer(staging, output, partition, schema).write(schema.empty_table())
        for run in _runs(_decoded(left, embedder, errors), IMAGES_PER_RUN[embedder.model.device]):
            _, tables, images = zip(*run, strict=True)
            computed = embedder.rows(pa.concat_tables(tables), list(itertools.chain(*images)))
            if not flags["unreadable"] and (problems := list(filter(None, computed["problem"].to_pylist()))):
                logger.warning("unreadable images are flagged; the first of them %s", problems[0])
            start = 0
            for partition, table, _ in run:
                part, start = computed.slice(start, len(table)), start + len(table)
                writer = writers.pop(partition, None) or _Writer(staging, output, partition, schema)
                if partition not in errors:
                    flags.update(part["flag"].to_pylist())
                    writer.write(part)
                    if writer.left:
                        writers[partition] = writer
            progress.advance(flags.total() - progress.done)
    return flags, errors


def _decoded(
    partitions: Iterable[Partition], embedder: Embedder, errors: dict[Partition, UserError]
) -> Iterator[_Rows]:
    """All rows of some partitions, decoded by threads ahead of the consumer. What cannot be read goes to `errors`."""

    columns = [*embedder.kept, *embedder.image.columns]

    def batches() -> Iterator[tuple[Partition, pa.Table]]:
        for partition in partitions:
            try:
                for batch in partition.read(columns, _READ_ROWS):
                    yield partition, pa.Table.from_batches([batch])
            except UserError as error:
                errors[partition] = error

    def decode(partition: Partition, table: pa.Table) -> _Rows:
        return partition, table.select(list(embedder.kept)), embedder.images(table)

    ahead = num_cores() + IMAGES_PER_RUN[embedder.model.device] // _READ_ROWS
    pending: deque[Future[_Rows]] = deque()
    with decoding(), ThreadPoolExecutor(num_cores()) as pool:
        for batch in batches():
            pending.append(pool.submit(decode, *batch))
            if len(pending) > ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def _runs(rows: Iterable[_Rows], size: int) -> Iterator[list[_Rows]]:
    """The same rows in lists of `size` images, but for the last one."""
    run, room = [], size
    for partition, table, images in rows:
        while images:
            run.append((partition, table.slice(0, room), images[:room]))
            table, images, room = table.slice(room), images[room:], max(0, room - len(images))
            if room == 0:
                yield run
                run, room = [], size
    if run:
        yield run


class _Writer:
    """Writes the file of a partition into a staging folder, and puts it in place when no rows are `left` to write."""

    def __init__(self, staging: Path, output: Output, partition: Partition, schema: pa.Schema):
        self.path, self.left, self.tables = output.file_of(partition), output.catalogue.rows[partition], []
        self.staged = staging / str(partition)
        about = json.dumps(output.about_partition(partition))
        self.file = pq.ParquetWriter(self.staged, schema.with_metadata({ABOUT: about}))

    def write(self, table: pa.Table) -> None:
        self.tables.append(table.cast(self.file.schema))
        self.left -= len(table)
        if self.left == 0 or sum(map(len, self.tables)) >= _GROUP_ROWS:
            self.file.write_table(pa.concat_tables(self.tables).combine_chunks())
            self.tables = []
        if self.left == 0:
            self.file.close()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            flush(self.staged)
            replace(self.staged, self.path)

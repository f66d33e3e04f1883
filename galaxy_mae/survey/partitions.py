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

from galaxy_mae.data.columns import is_text
from galaxy_mae.data.hats import Partition
from galaxy_mae.data.images import decoding
from galaxy_mae.errors import UserError, first_line, is_disk_full
from galaxy_mae.files import flush, replace, temporary_folder
from galaxy_mae.predictions.formats import ABOUT
from galaxy_mae.progress import stage
from galaxy_mae.provenance import num_cores
from galaxy_mae.survey.embedder import IMAGES_PER_RUN, Decoded, Embedder
from galaxy_mae.survey.output import UNSEALED, Output, seal, state_of

logger = logging.getLogger(__name__)

_READ_ROWS = 64  # of a record batch; multi-band images of 160 x 160 in four bands are then 26 MB
_GROUP_ROWS = 16_384  # of a Parquet row group of the output

_Rows = tuple["_Writer", pa.Table, list[Decoded]]  # consecutive ones of a partition, with their decoded images


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
    total = sum(rows[partition] for partition in left)
    with temporary_folder(output.primary) as staging, stage("embedding", total, "galaxies") as progress:
        decoded = _decoded(left, output, embedder, staging, errors)
        for run in _runs(decoded, IMAGES_PER_RUN[embedder.model.device]):
            _, tables, images = zip(*run, strict=True)
            computed = embedder.rows(pa.concat_tables(tables), list(itertools.chain(*images)))
            if not flags["unreadable"] and (problems := list(filter(None, computed["problem"].to_pylist()))):
                logger.warning("unreadable images are flagged; the first of them %s", problems[0])
            start = 0
            for writer, table, _ in run:
                part, start = computed.slice(start, len(table)), start + len(table)
                if writer.partition not in errors:
                    flags.update(part["flag"].to_pylist())
                    writer.write(part)
            progress.advance(flags.total() - progress.done)
    return flags, errors


def _decoded(
    partitions: Iterable[Partition],
    output: Output,
    embedder: Embedder,
    staging: Path,
    errors: dict[Partition, UserError],
) -> Iterator[_Rows]:
    """All rows of some partitions, decoded by threads ahead of the consumer. What cannot be read goes to `errors`."""
    columns, empty = [*embedder.kept, *embedder.image.columns], embedder.empty(output.catalogue.schema)
    kept = pa.schema([output.catalogue.schema.field(name).remove_metadata() for name in embedder.kept])

    def batches() -> Iterator[tuple[_Writer, pa.Table]]:
        for partition in partitions:
            try:
                about, left = output.about_partition(partition), output.catalogue.rows[partition]  # before it is read
                schema = empty.schema.with_metadata({ABOUT: json.dumps(about)})
                writer = _Writer(staging, output, partition, schema)
                for batch in partition.read(columns, _READ_ROWS):
                    left -= len(batch)
                    if partition in errors or left < 0:
                        break
                    yield writer, pa.Table.from_batches([batch])
                if about["source_state"] != state_of(partition):
                    raise UserError(f"{partition.location}: it was changed while it was read: start again")
                if left:
                    raise UserError("it has not as many rows as it declares: copy it again")
                if writer.left == 0:  # nor will any row be written
                    writer.write(empty)
            except (UserError, OSError) as error:
                if is_disk_full(error):  # of the output
                    raise
                errors.setdefault(partition, error)

    def decode(writer: _Writer, table: pa.Table) -> _Rows:
        try:
            rows = table.select(kept.names)
            for old, new in zip(rows.schema, kept, strict=True):  # "0012" is not 12
                if is_text(old.type) != is_text(new.type) and old.type != pa.null():
                    raise UserError(f"`{new.name}` is {str(old.type)[:60]} in it")
            return writer, rows.cast(kept), embedder.images(table)
        except Exception as error:  # whatever a table leads pyarrow to
            fix = f"write it with the columns of the catalogue ({', '.join(embedder.kept)[:200]})"
            error = UserError(f"{writer.partition.location}: {first_line(error)[:200]}; {fix}")
            errors.setdefault(writer.partition, error)
            return writer, table.slice(0, 0), []

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
    for writer, table, images in rows:
        while images:
            run.append((writer, table.slice(0, room), images[:room]))
            table, images, room = table.slice(room), images[room:], max(0, room - len(images))
            if room == 0:
                yield run
                run, room = [], size
    if run:
        yield run


class _Writer:
    """Writes the file of a partition into a staging folder, and puts it in place when no rows are `left` to write."""

    def __init__(self, staging: Path, output: Output, partition: Partition, schema: pa.Schema):
        self.partition, self.left, self.tables = partition, output.catalogue.rows[partition], []
        self.path, self.staged = output.file_of(partition), staging / str(partition)
        self.file = pq.ParquetWriter(self.staged, schema, write_page_checksum=True)

    def write(self, table: pa.Table) -> None:
        self.tables.append(table.cast(self.file.schema))
        self.left -= len(table)
        if self.left == 0 or sum(map(len, self.tables)) >= _GROUP_ROWS:
            self.file.write_table(pa.concat_tables(self.tables).combine_chunks())
            self.tables = []
        if self.left == 0:
            self.file.add_key_value_metadata({f"{ABOUT}_seal": UNSEALED})
            self.file.close()
            seal(self.staged, write=True)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            flush(self.staged)
            replace(self.staged, self.path)

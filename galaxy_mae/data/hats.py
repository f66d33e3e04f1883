"""HATS catalogues: sky-partitioned Parquet, opened with pyarrow alone.

A catalogue is a folder with `hats.properties`, `partition_info.csv` and one Parquet file per HEALPix pixel:
`dataset/Norder=K/Dir=D/Npix=P.parquet` (HATS: https://www.ivoa.net/documents/Notes/HATS). A collection is a folder with
`collection.properties`, which names its primary catalogue; the margin catalogues beside it repeat galaxies and are not
read.
"""

import csv
import hashlib
import io
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from galaxy_mae.data.columns import plain_rows, plain_schema
from galaxy_mae.errors import UserError, first_line
from galaxy_mae.files import MAX_DECODED_BYTES, check_decoded, check_regular, read_settings

COLLECTION, PARTITIONS = "collection.properties", "partition_info.csv"
PROPERTIES = ("hats.properties", "properties")  # the second of older catalogues
COMMON_METADATA = "dataset/_common_metadata"
READERS = 16  # threads that read the footers of partitions: file systems of clusters answer slowly
TABLE_ROWS = 8192  # of a batch without images
_BUFFER_BYTES = 1 << 20  # of a column that is read at once, in place of all of a row group
_BATCH_BYTES = MAX_DECODED_BYTES // 16  # of texts and images, which rows of a batch may take from a dictionary


@dataclass(frozen=True)
class Partition:
    """A HEALPix pixel of a catalogue.

    Attributes:
        order, pixel: the pixel, in nested numbering.
        location: of its Parquet file, or of its folder of Parquet files, relative to the catalogue.
        files: absolute paths, sorted; none if there is no such file.
        is_test: whether its galaxies are the test split of their source.
    """

    order: int
    pixel: int
    location: str
    files: tuple[Path, ...]
    is_test: bool = False

    def __str__(self) -> str:
        return f"Norder={self.order} Npix={self.pixel}"

    def count_rows(self) -> int:
        """The number of rows, from the footers. Raises a `UserError` if a file declares more than it can hold."""
        rows = 0
        for file in self.existing():
            with self.open(file) as parquet:
                rows += _count_rows(parquet, file)
        return rows

    def read(self, columns: Sequence[str], batch_rows: int) -> Iterator[pa.RecordBatch]:
        """Yield record batches in the order of the rows, in memory that does not grow with the partition.

        Args:
            columns: names; of a struct also a field of it, as in `image.flux`.
            batch_rows: rows of a batch, at most.
        """
        for file in self.existing():
            with self.open(file) as parquet:
                yield from read_batches(parquet, file, list(columns), batch_rows)

    def existing(self) -> tuple[Path, ...]:
        """Its files. Raises a `UserError` if there is none."""
        if not self.files:
            raise UserError(f"{self.location}: there is no such file; copy or download the partition again")
        return self.files

    @contextmanager
    def open(self, file: Path) -> Iterator[pq.ParquetFile]:
        """One of its files, within the block. What fails there, too, is a `UserError` that names it."""
        try:
            check_regular(file)
            # A row group is read page by page: pyarrow's default reads each of its columns at once. The name may be any
            # bytes: as text it would have to be UTF-8.
            with (
                pa.OSFile(os.fsencode(file)) as stream,
                nullcontext(_ArrowFile(stream))
                if file.suffix.lower() == ".arrow"
                else pq.ParquetFile(stream, pre_buffer=False, buffer_size=_BUFFER_BYTES) as parquet,
            ):
                yield parquet
        except UserError:
            raise
        except Exception as error:  # whatever a damaged file leads pyarrow to
            wrong = f"cannot be read as {file.suffix[1:].capitalize() or 'Parquet'} ({first_line(error)})"
            raise UserError(f"{file}: {wrong}; copy or download it again") from error


def _count_rows(parquet: pq.ParquetFile, file: Path) -> int:
    footer = parquet.metadata
    groups = [footer.row_group(i) for i in range(footer.num_row_groups)]
    rows, size = sum(group.num_rows for group in groups), file.stat().st_size
    if rows > size:  # runs of nulls take no space
        wrong = f"declares {rows:,} rows, but has {size:,} bytes"
        raise UserError(f"{file}: {wrong}: these cannot be images; create the file again")
    columns = (group.column(j) for group in groups for j in range(group.num_columns))
    nested = sum(4 * column.num_values for column in columns if "." in column.path_in_schema)  # as of fluxes
    check_decoded(max(nested, sum(group.total_byte_size for group in groups)), file)
    return rows


def read_batches(
    parquet: pq.ParquetFile, file: Path, columns: list[str] | None, batch_rows: int
) -> Iterator[pa.RecordBatch]:
    """Yield batches of at most so many rows; fewer, where values of a dictionary may make them larger than 64 MiB."""
    footer, largest = parquet.metadata, 1
    names = tuple(f"{name}." for name in columns) if columns is not None else ("",)
    with file.open("rb") as stream:
        for group in map(footer.row_group, range(footer.num_row_groups)):
            chunks = (group.column(j) for j in range(group.num_columns))
            used = (chunk for chunk in chunks if f"{chunk.path_in_schema}.".startswith(names))
            largest = max(largest, sum(_dictionary_bytes(stream, chunk) for chunk in used))
    rows = max(1, min(batch_rows, _BATCH_BYTES // largest))
    yield from map(plain_rows, parquet.iter_batches(rows, columns=columns, use_threads=False))


def read_table(parquet: pq.ParquetFile, file: Path, columns: list[str] | None = None) -> pa.Table:
    """All rows of an open file; a `UserError` if they are far larger than the file."""
    _count_rows(parquet, file)
    size, batches = 0, []
    for batch in read_batches(parquet, file, columns, TABLE_ROWS):
        size += batch.nbytes
        check_decoded(size, file)
        batches.append(batch)
    if not batches:
        return plain_rows(parquet.read(columns, use_threads=False))
    return pa.Table.from_batches(batches).replace_schema_metadata(parquet.schema_arrow.metadata)


def _dictionary_bytes(stream: BinaryIO, chunk: pq.ColumnChunkMetaData) -> int:
    """The size of texts in a dictionary, the second field of its page's header (Thrift's compact protocol); or 0."""
    if not (chunk.has_dictionary_page and chunk.physical_type == "BYTE_ARRAY"):
        return 0
    stream.seek(chunk.dictionary_page_offset)
    header, size = stream.read(8), 0
    if header[:1] + header[2:3] != b"\x15\x15":  # 32-bit integers, the first of them, its kind, of one byte
        return _BATCH_BYTES
    for i, byte in enumerate(header[3:]):
        size |= (byte & 127) << 7 * i
        if byte < 128:
            break
    return size >> 1


class _ArrowFile:
    """Batches of Arrow, as `save_to_disk` writes them, with the members of `pq.ParquetFile` that are used here."""

    def __init__(self, stream: pa.NativeFile):
        self._stream = stream
        self.schema_arrow = self._batches().schema

    def _batches(self) -> pa.RecordBatchStreamReader:
        self._stream.seek(0)
        return pa.ipc.open_stream(self._stream)

    @cached_property
    def metadata(self) -> SimpleNamespace:
        group = SimpleNamespace(num_rows=sum(map(len, self._batches())), num_columns=0, total_byte_size=0)
        return SimpleNamespace(num_rows=group.num_rows, num_row_groups=1, row_group=lambda _: group)

    def read(self, columns: list[str] | None, use_threads: bool) -> pa.Table:
        return self._batches().read_all().select(columns or self.schema_arrow.names)

    def iter_batches(self, batch_size: int, columns: list[str] | None, use_threads: bool) -> Iterator[pa.RecordBatch]:
        names = self.schema_arrow.names
        roots = names if columns is None else {*columns, *(column.partition(".")[0] for column in columns)}
        for batch in self._batches():
            rows = batch.select([name for name in names if name in roots])
            yield from (rows.slice(start, batch_size) for start in range(0, len(rows), batch_size))


@dataclass(frozen=True)
class HatsCatalogue:
    """An opened catalogue, or the primary one of a collection. Its partitions are in the order of its list."""

    path: Path
    in_collection: bool
    properties: dict[str, str]
    schema: pa.Schema
    partitions: tuple[Partition, ...]

    @property
    def name(self) -> str:
        """As the catalogue calls itself."""
        return self.properties.get("obs_collection", self.path.name)

    @cached_property
    def rows(self) -> dict[Partition, int | UserError]:
        """The number of rows of each partition, or why it cannot be read."""
        with ThreadPoolExecutor(READERS) as pool:
            return dict(zip(self.partitions, pool.map(_rows_or_error, self.partitions), strict=True))

    @cached_property
    def fingerprint(self) -> str:
        """Hex SHA-256 of the catalogue's properties, schema and list of partitions, not of its images."""
        pixels = [(partition.order, partition.pixel) for partition in self.partitions]
        content = [dict(sorted(self.properties.items())), self.schema.remove_metadata().to_string(), pixels]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _rows_or_error(partition: Partition) -> int | UserError:
    try:
        return partition.count_rows()
    except UserError as error:
        return error


def is_hats(path: Path) -> bool:
    """Whether a folder is a HATS catalogue or collection."""
    return any((path / name).is_file() for name in (COLLECTION, *PROPERTIES))


def open_hats(source: str, flag: str = "--catalog") -> HatsCatalogue:
    """Open the HATS catalogue in a folder, or the primary catalogue of a collection; `flag` named it.

    Raises:
        UserError: it is none, or its metadata cannot be read.
    """
    where, path = f"{flag} {source}", Path(source).expanduser()
    try:
        if in_collection := (path / COLLECTION).is_file():
            path = path / read_properties(path / COLLECTION)["hats_primary_table_url"]
        if not (described := [path / name for name in PROPERTIES if (path / name).is_file()]):
            fix = "import it with hats-import, or copy it again"
            raise UserError(f"{where}: not a HATS catalogue: {path} has no {PROPERTIES[0]}; {fix}")
        properties = read_properties(described[0])
        if (kind := properties.get("dataproduct_type", "object")) not in ("object", "source"):
            raise UserError(f"{where}: a HATS table of type {kind!r}, not of objects; give the primary catalogue")
        listed = io.StringIO(read_settings(path / PARTITIONS).decode())
        pixels = [(int(row["Norder"]), int(row["Npix"])) for row in csv.DictReader(listed)]
        check_regular(path / COMMON_METADATA)
        schema = plain_schema(pq.read_schema(path / COMMON_METADATA))
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise UserError(f"{where}: not a complete HATS catalogue ({first_line(error)}); copy it again") from error
    if not pixels:
        raise UserError(f"{where}: the catalogue has no partition")
    suffix = properties.get("hats_npix_suffix", ".parquet")
    partitions = tuple(_partition(path, *pixel, suffix) for pixel in pixels)
    return HatsCatalogue(path, in_collection, properties, schema, partitions)


def read_properties(path: Path) -> dict[str, str]:
    """Read a `.properties` file, a `key=value` per line."""
    lines = read_settings(path).decode().splitlines()
    pairs = (line.partition("=") for line in lines if not line.lstrip().startswith(("#", "!")))
    return {key.strip(): value.strip() for key, separator, value in pairs if separator}


def pixel_location(order: int, pixel: int, suffix: str = ".parquet") -> str:
    """Where a partition is, relative to its catalogue."""
    return f"dataset/Norder={order}/Dir={pixel // 10_000 * 10_000}/Npix={pixel}{suffix}"


def _partition(path: Path, order: int, pixel: int, suffix: str) -> Partition:
    location = pixel_location(order, pixel, suffix)
    found = (path / location).glob("*.parquet") if suffix == "/" else [path / location]  # a folder of files, or one
    return Partition(order, pixel, location, tuple(sorted(file for file in found if file.exists())))

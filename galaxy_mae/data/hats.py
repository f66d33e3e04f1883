"""HATS catalogues: sky-partitioned Parquet, opened with pyarrow alone.

A catalogue is a folder with `hats.properties`, `partition_info.csv` and one Parquet file per HEALPix pixel:
`dataset/Norder=K/Dir=D/Npix=P.parquet` (HATS: https://www.ivoa.net/documents/Notes/HATS). A collection is a folder with
`collection.properties`, which names its primary catalogue; the margin catalogues beside it repeat galaxies and are not
read.
"""

import csv
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from galaxy_mae.data.columns import plain_rows, plain_schema
from galaxy_mae.errors import UserError, first_line

COLLECTION, PARTITIONS = "collection.properties", "partition_info.csv"
PROPERTIES = ("hats.properties", "properties")  # the second of older catalogues
COMMON_METADATA = "dataset/_common_metadata"
READERS = 16  # threads that read the footers of partitions: file systems of clusters answer slowly
MAX_COMPRESSION = 1100  # times; deflate reaches 1032 on constant data, and images of galaxies about 2
_BUFFER_BYTES = 1 << 20  # of a column that is read at once, in place of all of a row group


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
        rows = size = declared = 0
        for file in self.existing():
            with self.open(file) as parquet:
                footer = parquet.metadata
            rows, size = rows + footer.num_rows, size + file.stat().st_size
            declared += sum(footer.row_group(i).total_byte_size for i in range(footer.num_row_groups))
        if rows > size or declared > MAX_COMPRESSION * size:  # runs of nulls take no space
            wrong = f"declares {rows:,} rows of {declared:,} bytes, but has {size:,} bytes"
            raise UserError(f"{file}: {wrong}: these cannot be images; create the file again")
        return rows

    def read(self, columns: Sequence[str], batch_rows: int) -> Iterator[pa.RecordBatch]:
        """Yield record batches in the order of the rows, in memory that does not grow with the partition.

        Args:
            columns: names; of a struct also a field of it, as in `image.flux`.
            batch_rows: rows of a batch, at most.
        """
        for file in self.existing():
            with self.open(file) as parquet:
                yield from map(plain_rows, parquet.iter_batches(batch_rows, columns=list(columns), use_threads=False))

    def existing(self) -> tuple[Path, ...]:
        """Its files. Raises a `UserError` if there is none."""
        if not self.files:
            raise UserError(f"{self.location}: there is no such file; copy or download the partition again")
        return self.files

    @contextmanager
    def open(self, file: Path) -> Iterator[pq.ParquetFile]:
        """One of its files, within the block. What fails there, too, is a `UserError` that names it."""
        try:
            # A row group is read page by page: pyarrow's default reads each of its columns at once. The name may be any
            # bytes: as text it would have to be UTF-8.
            with (
                pa.OSFile(os.fsencode(file)) as stream,
                pq.ParquetFile(stream, pre_buffer=False, buffer_size=_BUFFER_BYTES) as parquet,
            ):
                yield parquet
        except (OSError, pa.ArrowException) as error:
            wrong = f"cannot be read as Parquet ({first_line(error)})"
            raise UserError(f"{file}: {wrong}; copy or download it again") from error


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
        with (path / PARTITIONS).open(newline="", encoding="utf-8") as file:
            pixels = [(int(row["Norder"]), int(row["Npix"])) for row in csv.DictReader(file)]
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
    lines = path.read_text(encoding="utf-8").splitlines()
    pairs = (line.partition("=") for line in lines if not line.lstrip().startswith(("#", "!")))
    return {key.strip(): value.strip() for key, separator, value in pairs if separator}


def pixel_location(order: int, pixel: int, suffix: str = ".parquet") -> str:
    """Where a partition is, relative to its catalogue."""
    return f"dataset/Norder={order}/Dir={pixel // 10_000 * 10_000}/Npix={pixel}{suffix}"


def _partition(path: Path, order: int, pixel: int, suffix: str) -> Partition:
    location = pixel_location(order, pixel, suffix)
    found = (path / location).glob("*.parquet") if suffix == "/" else [path / location]  # a folder of files, or one
    return Partition(order, pixel, location, tuple(sorted(file for file in found if file.exists())))

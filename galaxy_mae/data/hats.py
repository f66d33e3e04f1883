"""HATS catalogues: sky-partitioned Parquet, opened with pyarrow alone.

A catalogue is a folder with `hats.properties`, `partition_info.csv` and one Parquet file per HEALPix pixel:
`dataset/Norder=K/Dir=D/Npix=P.parquet` (HATS: https://www.ivoa.net/documents/Notes/HATS). A collection is a folder with
`collection.properties`, which names its primary catalogue; the margin catalogues beside it repeat galaxies and are not
read.
"""

import csv
import hashlib
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

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
        """The number of rows, from the footers.

        Raises:
            UserError: a file is missing or damaged, or declares more than it can hold.
        """
        rows = 0
        for file in self.existing():
            with self.open(file) as parquet:
                footer, size = parquet.metadata, file.stat().st_size
            declared = sum(footer.row_group(i).total_byte_size for i in range(footer.num_row_groups))
            if footer.num_rows > size or declared > MAX_COMPRESSION * size:  # runs of nulls take no space
                raise UserError(
                    f"{file}: has {size:,} bytes but declares {footer.num_rows:,} rows of {declared:,} bytes: these "
                    "cannot be images; create the file again"
                )
            rows += footer.num_rows
        return rows

    def read(self, columns: Sequence[str], batch_rows: int) -> Iterator[pa.RecordBatch]:
        """Yield record batches in the order of the rows, in memory that does not grow with the partition.

        Args:
            columns: names; of a struct also a field of it, as in `image.flux`.
            batch_rows: rows of a batch, at most.

        Raises:
            UserError: a file is missing or damaged.
        """
        for file in self.existing():
            with self.open(file) as parquet:
                yield from parquet.iter_batches(batch_rows, columns=list(columns), use_threads=False)

    def existing(self) -> tuple[Path, ...]:
        """Its files.

        Raises:
            UserError: there is none.
        """
        if not self.files:
            raise UserError(f"{self.location}: there is no such file; copy or download the partition again")
        return self.files

    @contextmanager
    def open(self, file: Path) -> Iterator[pq.ParquetFile]:
        """One of its files, within the block. What fails there, too, is a `UserError` that names it."""
        try:
            # A row group is read page by page: pyarrow's default reads each of its columns at once.
            with pq.ParquetFile(file, pre_buffer=False, buffer_size=_BUFFER_BYTES) as parquet:
                yield parquet
        except (OSError, pa.ArrowException) as error:
            reason = first_line(error)
            raise UserError(f"{file}: cannot be read as Parquet ({reason}); copy or download it again") from error


@dataclass(frozen=True)
class HatsCatalogue:
    """An opened catalogue.

    Attributes:
        path: of the primary catalogue.
        in_collection: whether it was opened as part of one.
        properties: the keys and values of `hats.properties`.
        schema: of the partitions.
        partitions: in the order of `partition_info.csv`.
    """

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

        def count(partition: Partition) -> int | UserError:
            try:
                return partition.count_rows()
            except UserError as error:
                return error

        with ThreadPoolExecutor(READERS) as pool:
            return dict(zip(self.partitions, pool.map(count, self.partitions), strict=True))

    @cached_property
    def fingerprint(self) -> str:
        """Hex SHA-256 of the catalogue's properties, schema and list of partitions, not of its images."""
        content = [
            dict(sorted(self.properties.items())),
            self.schema.remove_metadata().to_string(),
            [(partition.order, partition.pixel) for partition in self.partitions],
        ]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def is_hats(path: Path) -> bool:
    """Whether a folder is a HATS catalogue or collection."""
    return any((path / name).is_file() for name in (COLLECTION, *PROPERTIES))


def open_hats(source: str, flag: str = "--catalog") -> HatsCatalogue:
    """Open a HATS catalogue, or the primary catalogue of a collection.

    Args:
        source: its folder.
        flag: of the command line, for messages.

    Raises:
        UserError: it is none, or its metadata cannot be read.
    """
    path = Path(source).expanduser()
    if not path.is_dir():
        raise UserError(f"{flag} {source}: no such folder; give the folder of a HATS catalogue on a disk")
    if in_collection := (path / COLLECTION).is_file():
        primary = read_properties(path / COLLECTION).get("hats_primary_table_url", "")
        if not primary or not is_hats(path / primary):
            raise UserError(f"{flag} {source}: its primary catalogue {primary!r} ({COLLECTION}) is not there: copy it")
        path = path / primary
    described = next((path / name for name in PROPERTIES if (path / name).is_file()), None)
    if described is None:
        raise UserError(f"{flag} {source}: not a HATS catalogue: it has no {PROPERTIES[0]}; import it with hats-import")
    properties = read_properties(described)
    if (kind := properties.get("dataproduct_type", "object")) not in ("object", "source"):
        raise UserError(f"{flag} {source}: a HATS table of type {kind!r}, not of objects; give the primary catalogue")
    try:
        with (path / PARTITIONS).open(newline="") as file:
            pixels = [(int(row["Norder"]), int(row["Npix"])) for row in csv.DictReader(file)]
        schema = pq.read_schema(path / COMMON_METADATA)
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise UserError(
            f"{flag} {source}: not a complete HATS catalogue ({first_line(error)}); copy it again"
        ) from error
    if not pixels:
        raise UserError(f"{flag} {source}: the catalogue has no partition")
    suffix = properties.get("hats_npix_suffix", ".parquet")
    partitions = tuple(_partition(path, *pixel, suffix) for pixel in pixels)
    return HatsCatalogue(path, in_collection, properties, schema, partitions)


def read_properties(path: Path) -> dict[str, str]:
    """Read a `.properties` file, a `key=value` per line.

    Raises:
        UserError: it is not text.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not text in UTF-8; copy it again") from error
    lines = (line.partition("=") for line in text.splitlines() if not line.lstrip().startswith(("#", "!")))
    return {key.strip(): value.strip() for key, separator, value in lines if separator}


def pixel_location(order: int, pixel: int, suffix: str = ".parquet") -> str:
    """Where a partition is, relative to its catalogue."""
    return f"dataset/Norder={order}/Dir={pixel // 10_000 * 10_000}/Npix={pixel}{suffix}"


def _partition(path: Path, order: int, pixel: int, suffix: str) -> Partition:
    location = pixel_location(order, pixel, suffix)
    if suffix == "/":  # a folder of files
        files = tuple(sorted((path / location).glob("*.parquet")))
    else:
        files = (path / location,) if (path / location).exists() else ()
    return Partition(order, pixel, location, files)

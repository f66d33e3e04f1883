"""The shards of a source that is streamed, and the split of their galaxies.

The split is by HEALPix cells: a hash of the cell decides for all galaxies in it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
from astropy import units
from astropy_healpix import lonlat_to_healpix
from pandas.util import hash_array

from galaxy_mae.data.arrow import IMAGE_ROWS, ParquetSource
from galaxy_mae.data.columns import SKY_FIELDS, find_column, is_text, numbers, plain_schema
from galaxy_mae.data.hats import Partition
from galaxy_mae.data.images import Encoded
from galaxy_mae.data.kinds import find_source
from galaxy_mae.data.split import SPLITS
from galaxy_mae.errors import UserError

CELL_ORDER = 5  # of the HEALPix cells by which galaxies are split: 12,288 cells, 1.8 degrees wide
HELD_OUT = 0.05  # fraction of the cells for validation, and for test
_ROWS = 8192  # read at once without images
_HEALPIX = "_healpix_29"  # the column of HATS: the nested HEALPix index at order 29


@dataclass(frozen=True)
class Shards:
    """The shards of a source, and how their rows are split: `split_seed` selects the cells that are held out."""

    source: ParquetSource
    split_seed: int

    @cached_property
    def object_id(self) -> str | None:
        """The column that names the galaxies."""
        name = find_column(self.source.schema.names, "object_id")
        kind = self.source.schema.field(name).type if name else pa.null()
        return name if pa.types.is_integer(kind) or is_text(kind) else None

    @cached_property
    def position(self) -> tuple[str, ...]:
        """The columns of the position: of HATS, or right ascension and declination, or none."""
        if _HEALPIX in self.source.schema.names and pa.types.is_integer(self.source.schema.field(_HEALPIX).type):
            return (_HEALPIX,)
        names = tuple(find_column(self.source.schema.names, field) for field in ("ra", "dec"))
        return names if all(names) else ()

    @property
    def key_columns(self) -> list[str]:
        """What keys and splits depend on."""
        return [*self.position, *([self.object_id] if self.object_id else [])]

    @property
    def sample_columns(self) -> list[str]:
        """What the sample keeps: encoded images and, where they are there, what describes the galaxies."""
        described = (find_column(self.source.schema.names, field) for field in ("label", *SKY_FIELDS, "object_id"))
        return list(dict.fromkeys([self.source.image.name, *filter(None, described)]))

    def _cells(self, rows: pa.Table) -> np.ndarray:
        """(N,) int64, the HEALPix cell of each row in nested numbering, -1 where the position is not known."""
        if not self.position:
            return np.full(len(rows), -1)
        if self.position == (_HEALPIX,):
            return rows[_HEALPIX].cast(pa.int64()).fill_null(-1).to_numpy() >> 2 * (29 - CELL_ORDER)
        ra, dec = (numbers(self.source.where, name, rows[name]) for name in self.position)
        known = np.isfinite(ra) & (np.abs(dec) <= 90)
        cell = np.full(len(rows), -1)
        degrees = ra[known] * units.deg, dec[known] * units.deg
        cell[known] = lonlat_to_healpix(*degrees, nside=2**CELL_ORDER, order="nested")
        return cell

    def read(
        self, shard: int, columns: list[str], batch_rows: int = _ROWS
    ) -> Iterator[tuple[pa.Table, np.ndarray, np.ndarray]]:
        """Yield N consecutive rows with `columns` and `key_columns`, a random key of each, and its split.

        Yields:
            The rows, (N,) int64 keys, which do not depend on the shards where galaxies have names, and (N,) int8
            indices of `SPLITS`.
        """
        partition, first_row = self.source.shards[shard], 0
        known_cell = _cell(partition)
        for batch in partition.read(list(dict.fromkeys([*columns, *self.key_columns])), batch_rows):
            rows = pa.Table.from_batches([batch])
            names = rows[self.object_id].cast(pa.large_string()).to_pylist() if self.object_id else [None] * len(rows)
            names = [name or f"{partition.location}:{row}" for row, name in enumerate(names, first_row)]
            key = hash_array(np.array(names, object), categorize=False)
            cell = np.full(len(rows), known_cell) if known_cell >= 0 else self._cells(rows)
            part = _part(np.where(cell >= 0, hash_array(cell), key), self.split_seed)
            yield rows, key.view(np.int64), np.full_like(part, SPLITS.index("test")) if partition.is_test else part
            first_row += len(rows)

    def training_images(self, shard: int) -> Iterator[tuple[np.ndarray, list[Encoded]]]:
        """Yield the keys of consecutive training galaxies, (n,) int64, and their n images."""
        image = self.source.image
        for rows, key, part in self.read(shard, list(image.columns), IMAGE_ROWS):
            selected = np.flatnonzero(part == SPLITS.index("train"))
            yield key[selected], image.encoded(rows[image.name].take(selected))

    def count(self, shard: int) -> np.ndarray:
        """(3,) int64: how many rows are in each of `SPLITS`. Images are not read, and no column if one cell has all.

        Raises:
            UserError: a file is missing or damaged, or a column is missing or has another type than in the first file.
        """
        partition = self.source.shards[shard]
        num_rows, cell = partition.count_rows(), _cell(partition)
        for file in partition.files:
            with partition.open(file) as parquet:
                schema = plain_schema(parquet.schema_arrow)
            for name in {*self.key_columns, *self.sample_columns}:
                kind = self.source.schema.field(name).type
                if name not in schema.names or schema.field(name).type != kind:
                    wrong = f"has no column `{name}` of type {str(kind)[:60]}, as the first file"
                    raise UserError(f"{file}: {wrong}: write all files with the same columns")
        if cell < 0:
            counts = (np.bincount(part, minlength=len(SPLITS)) for _, _, part in self.read(shard, []))
            return sum(counts, np.zeros(len(SPLITS), np.int64))
        part = _part(hash_array(np.array([cell])), self.split_seed)
        return np.where(np.arange(len(SPLITS)) == part, num_rows, 0)


def _cell(partition: Partition) -> int:
    """The HEALPix cell that contains a partition, or -1 if there is none."""
    return partition.pixel >> 2 * (partition.order - CELL_ORDER) if partition.order >= CELL_ORDER else -1


def _part(group: np.ndarray, seed: int) -> np.ndarray:
    """The split of groups of galaxies, (N,) int8, from the hashes of the groups, (N,) uint64."""
    uniform = hash_array(group + np.uint64(seed + 1)) / 2.0**64
    return np.digitize(-uniform, [-2 * HELD_OUT, -HELD_OUT]).astype(np.int8)  # train, validation, test


def find_shards(name: str, split_seed: int = 0) -> Shards:
    """The shards of a HATS catalogue or of Parquet files. Raises a `UserError` if it is another source."""
    source = find_source(name)
    if not isinstance(source, ParquetSource):
        raise UserError(f"--stream True: --dataset {name} is no HATS catalogue and not Parquet: leave --stream out")
    return Shards(source, split_seed)

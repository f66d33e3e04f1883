"""The shards of a source that is streamed, and the split of their galaxies.

The split is by HEALPix cells: a hash of the cell decides for all galaxies in it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from astropy import units
from astropy_healpix import lonlat_to_healpix
from pandas.util import hash_array

from galaxy_mae.data.arrow import IMAGE_ROWS, ParquetSource
from galaxy_mae.data.columns import SKY_FIELDS, find_column, is_text, numbers
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
    """The shards of a source, and how their rows are split.

    Attributes:
        source: what is streamed.
        split_seed: selects the cells that are held out.
    """

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
        """What `keys` needs."""
        return [*self.position, *([self.object_id] if self.object_id else [])]

    @property
    def sample_columns(self) -> list[str]:
        """What the sample keeps: encoded images and, where they are there, what describes the galaxies."""
        described = (find_column(self.source.schema.names, field) for field in ("label", *SKY_FIELDS, "object_id"))
        return list(dict.fromkeys([self.source.image.name, *filter(None, described)]))

    def check_schema(self, shard: int) -> None:
        """Raise a `UserError` if a file's columns have other types than those of the first shard, or are missing."""
        for file in self.source.shards[shard].files:
            schema = pq.read_schema(file)
            for name in {*self.key_columns, *self.sample_columns}:
                found = schema.field(name).type if name in schema.names else "missing"
                if found != (expected := self.source.schema.field(name).type):
                    raise UserError(
                        f"{file}: its column `{name}` is {str(found)[:60]}, in the first file {str(expected)[:60]}: "
                        "write all files with the same columns"
                    )

    def keys(self, shard: int, rows: pa.Table, first_row: int) -> tuple[np.ndarray, np.ndarray]:
        """The random key of each row, (N,) int64, and its split, (N,) int8, an index of `SPLITS`.

        Args:
            shard: number of the shard.
            rows: consecutive rows with `key_columns`.
            first_row: number of the first one in its shard.
        """
        partition = self.source.shards[shard]
        if self.object_id:
            name = rows[self.object_id].cast(pa.large_string()).fill_null("").to_numpy()
        else:
            name = np.full(len(rows), "", object)
        nameless = np.flatnonzero(name == "")
        if len(nameless):
            name = name.astype(object)
            name[nameless] = [f"{partition.location}:{first_row + row}" for row in nameless]
        key = hash_array(np.asarray(name, object), categorize=False)
        if partition.is_test:
            return key.view(np.int64), np.full(len(rows), SPLITS.index("test"), np.int8)
        cell = np.full(len(rows), known) if (known := _cell(partition)) >= 0 else self._cells(rows)
        group = np.where(cell >= 0, hash_array(cell), key)
        return key.view(np.int64), _part(group, self.split_seed)

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
        """Yield consecutive rows with `columns` and `key_columns`, at most `batch_rows`, and what `keys` says of them.

        Raises:
            UserError: a file is missing or damaged.
        """
        first_row = 0
        for batch in self.source.shards[shard].read(list(dict.fromkeys([*columns, *self.key_columns])), batch_rows):
            rows = pa.Table.from_batches([batch])
            yield rows, *self.keys(shard, rows, first_row)
            first_row += len(rows)

    def training_images(self, shard: int) -> Iterator[tuple[np.ndarray, list[Encoded]]]:
        """Yield the keys of consecutive training galaxies, (n,) int64, and their n images."""
        image = self.source.image
        for rows, key, part in self.read(shard, list(image.columns), IMAGE_ROWS):
            selected = np.flatnonzero(part == SPLITS.index("train"))
            yield key[selected], image.encoded(rows[image.name].take(selected))

    def count(self, shard: int) -> np.ndarray:
        """(3,) int64: how many rows are in each of `SPLITS`. Images are not read, and no column if one cell has all."""
        counts, partition = np.zeros(len(SPLITS), np.int64), self.source.shards[shard]
        num_rows = partition.count_rows()
        if partition.is_test:
            counts[SPLITS.index("test")] = num_rows
        elif (cell := _cell(partition)) >= 0:
            counts[_part(hash_array(np.array([cell])), self.split_seed)] = num_rows
        elif not self.key_columns:
            rows = pa.table({"row": pa.nulls(num_rows)})
            counts += np.bincount(self.keys(shard, rows, 0)[1], minlength=len(SPLITS))
        else:
            for _, _, part in self.read(shard, []):
                counts += np.bincount(part, minlength=len(SPLITS))
        return counts


def _cell(partition: Partition) -> int:
    """The HEALPix cell that contains a partition, or -1 if there is none."""
    return partition.pixel >> 2 * (partition.order - CELL_ORDER) if partition.order >= CELL_ORDER else -1


def _part(group: np.ndarray, seed: int) -> np.ndarray:
    """The split of groups of galaxies, (N,) int8, from the hashes of the groups, (N,) uint64."""
    uniform = hash_array(group + np.uint64(seed + 1)) / 2.0**64
    return np.digitize(-uniform, [-2 * HELD_OUT, -HELD_OUT]).astype(np.int8)  # train, validation, test


def find_shards(name: str, split_seed: int = 0) -> Shards:
    """The shards of a HATS catalogue, of a folder of Parquet files, or of a Parquet file.

    Raises:
        UserError: it is another source.
    """
    source = find_source(name)
    if not isinstance(source, ParquetSource):
        raise UserError(
            f"--stream True: --dataset {name} is no HATS catalogue, Parquet file or folder of Parquet files: leave "
            "--stream out"
        )
    return Shards(source, split_seed)

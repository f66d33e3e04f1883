"""Galaxies streamed from Parquet shards that are larger than memory and than the cache's disk.

Every other source is decoded once, into one array (`cache.py`). Here the shards of a HATS catalogue, or of a folder
of Parquet files, are read again in every epoch, in sequence, and images are decoded when a batch needs them. What a
batch holds is a function of the seed and of the step. A resumed run therefore needs no state of a reader: it starts
reading at its step, and gets the batches of an uninterrupted one, bit for bit.

- An epoch takes the shards in a random order, which makes one long sequence of all training galaxies.
- The sequence is cut into lanes of equal length. Every batch takes the same number of galaxies from each lane, so it
  mixes as many regions of the sky as there are lanes, and processes read different lanes.
- Within a lane the galaxies are shuffled in windows. All windows together are the shuffle buffer.

The split is by HEALPix cells: a hash of the cell decides for all galaxies in it. Of each split, a bounded sample is
cached as any other data set. It serves for channel statistics, evaluations and reconstructions.
"""

import dataclasses
import hashlib
import json
import logging
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cached_property
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from astropy import units
from astropy_healpix import lonlat_to_healpix
from pandas.util import hash_array
from torch.utils.data import Dataset

from galaxy_mae.data.arrow import IMAGE_ROWS, ParquetSource
from galaxy_mae.data.batches import EpochSampler
from galaxy_mae.data.cache import OTHER_DISK, open_galaxies
from galaxy_mae.data.columns import SKY_FIELDS, find_column, is_text, numbers, plain_schema
from galaxy_mae.data.download import cache_folder
from galaxy_mae.data.fits import UnreadableImage
from galaxy_mae.data.frame import Frame
from galaxy_mae.data.hats import READERS, TABLE_ROWS, Partition
from galaxy_mae.data.images import Encoded, decode, decoding
from galaxy_mae.data.kinds import find_source
from galaxy_mae.data.pretraining import PretrainingData, framed
from galaxy_mae.data.seen import catalogue_rows, pretraining_catalogue
from galaxy_mae.data.split import CUTOUT_ARCSEC, SPLITS
from galaxy_mae.errors import UserError, full_disk_named
from galaxy_mae.files import atomic_file, cached
from galaxy_mae.provenance import num_cores

logger = logging.getLogger(__name__)

SAMPLE_SIZE = 2_000  # galaxies at most of training, validation and test set that are cached
BUFFER_SIZE = 8192  # galaxies in the shuffle buffer, over all processes
CELL_ORDER = 5  # of the HEALPix cells by which galaxies are split: 12,288 cells, 1.8 degrees wide
HELD_OUT = 0.05  # fraction of the cells for validation, and for test
_HEALPIX = "_healpix_29"  # the column of HATS: the nested HEALPix index at order 29

_SAMPLE_SHARDS = 256  # over which the sample of a split is spread, at most
_MAX_LANES = 64
_SPLIT = "_galaxy_mae_split"  # the column of a sample
_FORMAT = 5  # changes with the content of a cached stream


@dataclasses.dataclass(frozen=True)
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
        self, shard: int, columns: list[str], batch_rows: int = TABLE_ROWS
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class GalaxyStream(PretrainingData):
    """A source that is streamed. `counts` are (P, 3) int64, galaxies of each shard in each of `SPLITS`.

    `galaxies` is a sample of each split, opened as any data set, with the fingerprint of the source, and `states` are
    those of the shards' files when it was opened: both of `_state`.
    """

    shards: Shards
    counts: np.ndarray
    states: list[tuple[str, list[int]]]
    is_streamed = True

    def train_dataset(self, buffer_size: int | None = None) -> "StreamDataset":
        return StreamDataset(self, buffer_size or BUFFER_SIZE)

    def loader_workers(self, requested: int, device: str) -> int:
        if requested > 1:
            raise UserError("--dataloader_num_workers: a process reads its part of a stream in one worker, or in none")
        return 1 if device == "cuda" else requested  # which reads and decodes while the GPU computes

    def catalogue(self) -> pa.Table:
        """Without hashes of training galaxies, which would need one more pass; validation galaxies of the sample."""
        source = self.shards.source
        columns = [find_column(source.schema.names, field) for field in SKY_FIELDS]
        tables, first_row = [], 0
        for shard in range(len(self.counts)):
            for rows, _, part in self.shards.read(shard, list(filter(None, columns))):
                train = np.flatnonzero(part == SPLITS.index("train"))
                unknown = pa.chunked_array([pa.nulls(len(rows))])
                sky = (numbers(source.where, str(name), rows[name] if name else unknown)[train] for name in columns)
                ra, dec, pixel_scale = sky
                width = pixel_scale * self.galaxies.native_size
                width[np.isnan(width)] = CUTOUT_ARCSEC
                tables.append(catalogue_rows(self.galaxies, "train", first_row + train, ra, dec, width))
                first_row += len(rows)
        validation = {"train": np.empty(0, np.int64), "validation": self.split["validation"]}
        return pa.concat_tables([*tables, pretraining_catalogue(self.galaxies, validation)])


def open_stream(
    name: str,
    image_size: int,
    split_seed: int = 0,
    frame: Frame = Frame(),  # noqa: B008 (frozen)
    width: int | None = None,
    around: Frame | None = None,
) -> GalaxyStream:
    """Count the galaxies of the splits and cache the sample, the first time; open both.

    `width` and `around` are of the images with a margin for larger crops, where there is one.

    Raises:
        UserError: the source has no shards, a file cannot be read, the disk is full, or the sample has no image; or the
            frame needs the scale of each image.
    """
    if frame.arcsec:
        raise UserError("--arcsec: a stream does not read the scale of its images: set --stream False, or leave it out")
    shards = find_shards(name, split_seed)
    with ThreadPoolExecutor(READERS) as pool:
        states = list(pool.map(_state, shards.source.shards))
    footers = "\n".join(sorted(footer for footer, _ in states))
    key = hashlib.sha256(f"{split_seed} {shards.source.image.name}\n{footers}".encode()).hexdigest()
    width, around = width or image_size, around or frame
    about = footers if around == Frame() else f"{footers} {around}"
    folder = cache_folder() / f"stream_{key[:16]}_format{_FORMAT}"
    path = folder / "sample.parquet"

    def read() -> GalaxyStream | None:
        try:
            stored = pq.read_table(path, columns=[_SPLIT])
        except (OSError, pa.ArrowException):  # absent or damaged
            cache_folder(writable=True)
            return None
        sample = open_galaxies(str(path), width, frame=around, skip_unreadable=True)
        part = stored[_SPLIT].to_numpy()
        split = {name: np.flatnonzero((part == i) & ~sample.blank) for i, name in enumerate(SPLITS)}
        split["dropped"] = np.flatnonzero(sample.blank)
        sample = dataclasses.replace(sample, name=name, fingerprint=hashlib.sha256(about.encode()).hexdigest())
        counts = np.array(json.loads(stored.schema.metadata[b"counts"]))
        stream = {"shards": shards, "counts": counts, "states": states}
        return GalaxyStream(framed(sample, image_size, frame), split, sample, **stream)

    def write() -> None:
        with full_disk_named(str(folder.parent), OTHER_DISK):
            _write_sample(shards, path)

    return cached(folder / ".lock", read, write)


def _state(partition: Partition) -> tuple[str, list[int]]:
    """The location of a partition, with the sizes and hashes of the footers of its files, and their times in ns.

    A footer holds the sizes and the extreme values of all columns: almost any change of the content changes it, but
    not another order of rows that are not compressed. The times are not part of a fingerprint: a copy has others.
    """
    words, times = [partition.location], []
    for file in partition.files:
        status = file.stat()
        size = status.st_size
        times.append(status.st_mtime_ns)
        with file.open("rb") as stream:
            stream.seek(max(0, size - 8))
            length = int.from_bytes(stream.read(4), "little")
            stream.seek(max(0, size - 8 - length))
            words.append(f"{size} {hashlib.sha256(stream.read(length)).hexdigest()}")
    return " ".join(words), times


def _write_sample(shards: Shards, path: Path) -> None:
    """Write the first galaxies of each split of some shards, selected at random by the split's seed.

    The counts of all shards are in the file's metadata.
    """
    with ThreadPoolExecutor(READERS) as pool:
        counts = np.stack(list(pool.map(shards.count, range(len(shards.source.shards)))))
    if not counts.any():
        raise UserError(f"{shards.source.where}: the dataset is empty")
    quota = np.zeros_like(counts)
    for part in range(len(SPLITS)):
        having = np.flatnonzero(counts[:, part])
        chosen = np.random.default_rng([shards.split_seed, part]).permutation(having)[:_SAMPLE_SHARDS]
        if len(chosen):
            each = np.minimum(counts[chosen, part], math.ceil(SAMPLE_SIZE / len(chosen)))
            quota[chosen, part] = np.diff(np.minimum(np.cumsum(each), SAMPLE_SIZE), prepend=0)
    schema = pa.schema([(name, shards.source.schema.field(name).type) for name in shards.sample_columns])
    stored = schema.append(pa.field(_SPLIT, pa.int8())).with_metadata({"counts": json.dumps(counts.tolist())})
    with atomic_file(path) as tmp_path, pq.ParquetWriter(tmp_path, stored) as out:
        for shard in np.flatnonzero(quota.any(axis=1)):
            left = quota[shard].copy()
            for rows, _, part in shards.read(shard, schema.names, IMAGE_ROWS):
                selected = np.sort(np.concatenate([np.flatnonzero(part == i)[:n] for i, n in enumerate(left)]))
                if len(selected):
                    taken = rows.select(schema.names).take(selected).cast(schema)
                    out.write_table(taken.append_column(_SPLIT, pa.array(part[selected])))
                left -= np.bincount(part[selected], minlength=len(SPLITS))
                if not left.any():
                    break


class StreamSampler(EpochSampler):
    """The places of an epoch in sequence, each with the number of the epoch; `StreamDataset` shuffles."""

    def random_step(self, step: int) -> int:
        return step * self.batch_size // len(self)  # the epoch: a galaxy's crop and mask do not depend on its place

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return ((self.epoch, place) for place in range(len(self)))


class StreamDataset(Dataset):
    """The training galaxies of a stream. Its items are places in an epoch, which are best asked for in sequence.

    `buffer_size` galaxies are in the shuffle buffer, over all processes.
    """

    def __init__(self, stream: GalaxyStream, buffer_size: int = BUFFER_SIZE):
        self.shards, self.states, self.counts = stream.shards, stream.states, stream.counts[:, SPLITS.index("train")]
        self.frame, self.image_size = stream.wide.frame, stream.wide.image_size
        self.buffer_size = buffer_size
        self._windows: dict[int, tuple[tuple[int, int], list]] = {}  # of each lane, in which order they are taken
        self._readers: dict[int, tuple[tuple[int, int], Iterator]] = {}  # of each lane, with what comes next
        self._warned = False

    def __len__(self) -> int:
        return int(self.counts.sum())

    def sampler(self, batch_size: int, seed: int) -> StreamSampler:
        """The order of its items in training; this also divides the sequence into lanes."""
        self.seed, self.batch_size = seed, batch_size
        # A lane begins within a shard, of which it reads the rows before its own, too: so not more lanes than shards.
        most = min(_MAX_LANES, len(self.counts))
        self.lanes = max(lanes for lanes in range(1, most + 1) if batch_size % lanes == 0)
        self.per_step = batch_size // self.lanes
        self.lane_length = len(self) // batch_size * self.per_step
        self.window_size = max(1, self.buffer_size // self.lanes)
        return StreamSampler(len(self), batch_size, seed)

    def __getitems__(self, places: list[tuple[int, int]]) -> list[tuple[int, np.ndarray]]:
        """The key and the image, (S, S, 3) uint8, of galaxies at places of epochs."""
        keys, encoded = zip(*(self._row(epoch, place) for epoch, place in places), strict=True)
        with decoding():
            images = list(self._pool.map(self._decode, encoded))
        return list(zip(keys, images, strict=True))

    @staticmethod
    def collate(items: list[tuple[int, np.ndarray]]) -> dict[str, torch.Tensor]:
        """A batch as of `GalaxyBatches.collate`; its `index` holds the keys of the galaxies."""
        keys, images = zip(*items, strict=True)
        return {"index": torch.tensor(keys, dtype=torch.int64), "images": torch.from_numpy(np.stack(images))}

    def _row(self, epoch: int, place: int) -> tuple[int, Encoded]:
        """The key and the encoded image at a place of an epoch."""
        step, place = divmod(place, self.batch_size)
        lane, place = divmod(place, self.per_step)
        offset = step * self.per_step + place
        # The windows of lanes end at different steps, so that there is something to read in every step.
        shift = lane * self.window_size // self.lanes
        window = (offset + shift) // self.window_size
        start = max(0, window * self.window_size - shift)
        held, rows = self._windows.get(lane, (None, []))
        if held != (epoch, window):
            self._windows.pop(lane, None)
            del rows  # with the line above: there is memory for one of them
            stop = min(self.lane_length, (window + 1) * self.window_size - shift)
            rows = self._read(lane, epoch, start, stop)
            order = np.random.default_rng([self.seed, epoch, lane, window]).permutation(len(rows))
            rows = [rows[i] for i in order]
            self._windows[lane] = (epoch, window), rows
        return rows[offset - start]

    def _read(self, lane: int, epoch: int, start: int, stop: int) -> list[tuple[int, Encoded]]:
        """The rows of a lane from `start` to `stop`, in the order of the shards."""
        following, reader = self._readers.pop(lane, (None, None))
        if following != (epoch, start):
            reader = self._sequence(epoch, lane * self.lane_length + start)
        rows = list(islice(reader, stop - start))
        self._readers[lane] = (epoch, stop), reader
        return rows

    def _sequence(self, epoch: int, start: int) -> Iterator[tuple[int, Encoded]]:
        """The training galaxies of an epoch from `start` on, in the order of the shards."""
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.counts))
        ends = np.cumsum(self.counts[order])
        first = int(np.searchsorted(ends, start, side="right"))
        skipped = start - (ends[first] - self.counts[order[first]])
        for shard in order[first:]:
            self._check(shard)
            for keys, images in self.shards.training_images(shard):
                yield from zip(keys[skipped:].tolist(), images[skipped:], strict=True)
                skipped = max(0, skipped - len(keys))
            self._check(shard)

    def _check(self, shard: int) -> None:
        """Raise a `UserError` unless a shard is there as it was when the stream was opened."""
        partition = self.shards.source.shards[shard]
        with suppress(OSError):
            if _state(partition) == self.states[shard]:
                return
        where = f"{self.shards.source.name}: {partition.location}"
        raise UserError(f"{where} was changed during the training; restore it and start again")

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:  # not in __init__: a worker process gets the dataset as a copy
        return ThreadPoolExecutor(num_cores())

    def _decode(self, encoded: Encoded) -> np.ndarray:
        """(S, S, 3) uint8, zero if the image is not readable."""
        try:
            return self.frame.apply(decode(encoded), self.image_size).pixels
        except UnreadableImage as problem:
            if not self._warned:
                self._warned = True
                logger.warning("%s: an image %s; such images are blank in training", self.shards.source.name, problem)
            return np.zeros((self.image_size, self.image_size, 3), np.uint8)

"""What pre-training reads: galaxies of the cache, or a stream of shards that are too large for it."""

import hashlib
import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import pyarrow as pa
from torch.utils.data import Dataset

from galaxy_mae.data.arrow import ParquetSource
from galaxy_mae.data.batches import ImageStack, IndexDataset, center, width_of_crops
from galaxy_mae.data.cache import Galaxies, channel_statistics, has_entry_of, open_galaxies
from galaxy_mae.data.download import cache_folder
from galaxy_mae.data.fits import Stretch
from galaxy_mae.data.frame import Frame
from galaxy_mae.data.kinds import find_source
from galaxy_mae.data.seen import catalogue_rows, find_seen_galaxies, pretraining_catalogue
from galaxy_mae.data.split import sky_positions, split_galaxies
from galaxy_mae.errors import UserError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PretrainingData:
    """The galaxies of a pre-training: here those of the cache, in `stream.GalaxyStream` those of shards.

    Attributes:
        galaxies: the opened data set, its images in the frame of the model; of a stream, a sample of it.
        split: sample indices of `galaxies`.
        wide: the same with the margin in which random crops may lie.
        unlabelled: more galaxies, all for training, as `wide`. Their indices follow those of `galaxies`.
    """

    galaxies: Galaxies
    split: dict[str, np.ndarray]
    wide: Galaxies
    unlabelled: tuple[Galaxies, ...] = ()
    is_streamed: ClassVar[bool] = False

    @property
    def pixels(self) -> np.ndarray | ImageStack:
        """Of all images, with the margin."""
        parts = [self.wide, *self.unlabelled]
        return ImageStack([part.pixels for part in parts]) if self.unlabelled else self.wide.pixels

    @property
    def fingerprint(self) -> str:
        """Of all data sets."""
        parts = [part.fingerprint for part in (self.wide, *self.unlabelled)]
        return hashlib.sha256(" ".join(parts).encode()).hexdigest() if self.unlabelled else parts[0]

    @property
    def train(self) -> list[tuple[Galaxies, np.ndarray]]:
        """The training galaxies of each data set, and their rows in it."""
        return [(self.wide, self.split["train"]), *((part, np.flatnonzero(~part.blank)) for part in self.unlabelled)]

    def channel_statistics(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and std of each channel over the training galaxies, (3,) float64 each, scaled to 0-1."""
        return channel_statistics(self.train)

    def train_dataset(self, buffer_size: int | None = None) -> Dataset:
        """The training galaxies; where they are streamed, `buffer_size` of them are shuffled at a time."""
        starts = np.cumsum([0, *(len(part) for part, _ in self.train[:-1])])
        rows = [start + rows for start, (_, rows) in zip(starts, self.train, strict=True)]
        return IndexDataset(np.concatenate(rows))

    def loader_workers(self, requested: int, device: str) -> int:
        """The number of processes of the loader."""
        return requested

    def catalogue(self) -> pa.Table:
        """The training and validation galaxies: a table of `provenance.CATALOGUE`."""
        tables, size = [pretraining_catalogue(self.galaxies, self.split)], self.galaxies.image_size
        for part, rows in self.train[1:]:
            split = {"train": rows, "validation": np.empty(0, np.int64)}
            tables.append(pretraining_catalogue(framed(part, size, self.galaxies.frame), split))
        return pa.concat_tables(tables)


def open_pretraining_data(
    name: str,
    image_size: int,
    split_seed: int = 0,
    *,
    stretch: Stretch = Stretch(),  # noqa: B008 (frozen)
    frame: Frame = Frame(),  # noqa: B008 (frozen)
    columns: Sequence[str] | None = None,
    stream: bool | None = None,
    max_crop_scale: float = 1.0,
    unlabelled: Sequence[str] = (),
) -> PretrainingData:
    """Open the galaxies of a pre-training, as `cache.open_galaxies` or `stream.open_stream`.

    Args:
        name, image_size, stretch, frame, columns: as for `cache.open_galaxies`.
        split_seed: selects the split.
        stream: whether the shards of a source are streamed; None does so if the cache's disk is too small.
        max_crop_scale: largest area of random crops, as a fraction of the frame's.
        unlabelled: names of more data sets, of which all galaxies are trained on.

    Raises:
        UserError: as `cache.open_galaxies`; the frame has nothing around it; unlabelled galaxies beside a stream.
    """
    from accelerate.utils import broadcast_object_list

    width = width_of_crops(image_size, max_crop_scale)
    around = frame.widened(width / image_size) if max_crop_scale > 1 else frame
    # The disk may look different to another process.
    if broadcast_object_list([is_too_large(name, width) if stream is None else stream])[0]:
        from galaxy_mae.data.stream import open_stream  # slow to import

        if columns:
            raise UserError("--columns: a stream finds its columns by their names: set --stream False, or leave it out")
        if unlabelled:
            raise UserError("--unlabelled: a stream is all that is trained on: put the files into one folder")
        return open_stream(name, image_size, split_seed, frame, width, around)
    how = {"stretch": stretch, "frame": around}
    wide = open_galaxies(name, width, **how, columns=columns)
    split = split_galaxies(wide, split_seed)
    more = (open_galaxies(other, width, **how, flag="--unlabelled") for other in unlabelled)
    more = tuple(_without_held_out(part, wide, split) for part in more)
    return PretrainingData(framed(wide, image_size, frame), split, wide, more)


def _without_held_out(part: Galaxies, galaxies: Galaxies, split: dict[str, np.ndarray]) -> Galaxies:
    """Unlabelled galaxies, of which those are not used that are held out in the labelled ones, or overlap with them."""
    rows = np.concatenate([split["validation"], split["test"]])
    sky = (values[rows] for values in sky_positions(galaxies))
    held_out = catalogue_rows(galaxies, "held out", rows, *sky, image_hash=galaxies.image_hash[rows])
    same = find_seen_galaxies(part, np.arange(len(part)), held_out, look_alike=False)["seen"]
    if same.any():
        logger.info("%s: %d galaxies are held out in %s: not trained on", part.name, same.sum(), galaxies.name)
    return replace(part, blank=part.blank | same)


def framed(wide: Galaxies, image_size: int, frame: Frame) -> Galaxies:
    """Galaxies without the margin around the model's frame. Features of them are cached under another fingerprint."""
    if wide.image_size == image_size:
        return wide
    fingerprint = hashlib.sha256(f"{wide.fingerprint} {image_size}".encode()).hexdigest()
    return replace(wide, pixels=center(wide.pixels, image_size), frame=frame, fingerprint=fingerprint)


def is_too_large(name: str, image_size: int) -> bool:
    """Whether the decoded images of a source of shards are not cached, and would not fit on the cache's disk."""
    if not isinstance(source := find_source(name), ParquetSource):
        return False
    needed, free = source.num_rows * image_size**2 * 3, shutil.disk_usage(cache_folder()).free
    if needed <= free or has_entry_of(source.num_rows, image_size):
        return False
    sizes = f"take {needed / 1e9:.1f} GB, and the cache's disk has {free / 1e9:.1f} GB left"
    logger.info("%s: %d images of %d pixels %s: they are streamed", name, source.num_rows, image_size, sizes)
    return True

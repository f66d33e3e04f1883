"""What pre-training reads: galaxies of the cache, or a stream of shards that are too large for it."""

import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pyarrow as pa
from torch.utils.data import Dataset

from galaxy_mae.data.arrow import ParquetSource
from galaxy_mae.data.batches import IndexDataset
from galaxy_mae.data.cache import Galaxies, has_entry_of, open_galaxies
from galaxy_mae.data.download import cache_folder
from galaxy_mae.data.fits import Stretch
from galaxy_mae.data.frame import Frame
from galaxy_mae.data.kinds import find_source
from galaxy_mae.data.seen import pretraining_catalogue
from galaxy_mae.data.split import split_galaxies
from galaxy_mae.errors import UserError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PretrainingData:
    """The galaxies of a pre-training: here those of the cache, in `stream.GalaxyStream` those of shards.

    Attributes:
        galaxies: the opened data set; of a stream, a sample of it.
        split: sample indices of `galaxies`.
    """

    galaxies: Galaxies
    split: dict[str, np.ndarray]
    is_streamed: ClassVar[bool] = False

    def train_dataset(self, buffer_size: int | None = None) -> Dataset:
        """The training galaxies; where they are streamed, `buffer_size` of them are shuffled at a time."""
        return IndexDataset(self.split["train"])

    def loader_workers(self, requested: int, device: str) -> int:
        """The number of processes of the loader."""
        return requested

    def catalogue(self) -> pa.Table:
        """The training and validation galaxies: a table of `provenance.CATALOGUE`."""
        return pretraining_catalogue(self.galaxies, self.split)


def open_pretraining_data(
    name: str,
    image_size: int,
    split_seed: int = 0,
    *,
    stretch: Stretch = Stretch(),  # noqa: B008 (frozen)
    frame: Frame = Frame(),  # noqa: B008 (frozen)
    columns: Sequence[str] | None = None,
    stream: bool | None = None,
) -> PretrainingData:
    """Open the galaxies of a pre-training, as `cache.open_galaxies` or `stream.open_stream`.

    Args:
        name, image_size, stretch, frame, columns: as for `cache.open_galaxies`.
        split_seed: selects the split.
        stream: whether the shards of a source are streamed; None does so if the cache's disk is too small.
    """
    from accelerate.utils import broadcast_object_list

    # The disk may look different to another process.
    if broadcast_object_list([is_too_large(name, image_size) if stream is None else stream])[0]:
        from galaxy_mae.data.stream import open_stream  # slow to import

        if columns:
            raise UserError("--columns: a stream finds its columns by their names: set --stream False, or leave it out")
        return open_stream(name, image_size, split_seed, frame)
    galaxies = open_galaxies(name, image_size, stretch=stretch, frame=frame, columns=columns)
    return PretrainingData(galaxies, split_galaxies(galaxies, split_seed))


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

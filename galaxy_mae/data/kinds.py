"""Which kind of input the value of `--dataset` is: the one place that recognizes it.

A new kind is a class with the members of `Source`, and a line in `KINDS`.
"""

import hashlib
import re
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa

from galaxy_mae.data import synthetic
from galaxy_mae.data.arrow import HatsSource, ParquetFiles
from galaxy_mae.data.columns import GALAXY10_CLASSES
from galaxy_mae.data.download import content_fingerprint, find_galaxy10
from galaxy_mae.data.fits import galaxies_in, is_fits
from galaxy_mae.data.hats import is_hats
from galaxy_mae.data.hdf5 import Hdf5
from galaxy_mae.data.hub import Hub
from galaxy_mae.data.images import BATCH_BYTES
from galaxy_mae.data.path_tables import FitsImages, ImageFolder, PathTable
from galaxy_mae.data.source import Options, Source
from galaxy_mae.errors import UserError
from galaxy_mae.files import user_path

DEFAULT_SYNTHETIC_COUNT = 4000  # galaxies; `synthetic:COUNT` sets another number


class Galaxy10(Hdf5):
    """Galaxy10 DECaLS, which is downloaded if it is not there."""

    def __init__(self, name: str, path: Path, options: Options):
        self.name, self.options = name, options

    @cached_property
    def path(self) -> Path:
        return find_galaxy10()


class Synthetic(Source):
    """Procedural galaxies: `synthetic` or `synthetic:COUNT`."""

    class_names = GALAXY10_CLASSES

    @cached_property
    def num_rows(self) -> int:
        count = self.name.partition(":")[2] or str(DEFAULT_SYNTHETIC_COUNT)
        if not (count.isdecimal() and int(count) > 0):
            raise UserError(f"{self.where}: a number of galaxies must follow the colon, as in synthetic:4000")
        return int(count)

    @property
    def size(self) -> int:
        return self.options.image_size or 256

    @property
    def fingerprint(self) -> str:
        code_hash = content_fingerprint([Path(synthetic.__file__)])
        return hashlib.sha256(f"{code_hash} {self.num_rows} {self.size}".encode()).hexdigest()

    @property
    def table(self) -> pa.Table:
        columns = synthetic.catalogue(self.num_rows, self.size)
        return pa.table({"pxscale" if name == "pixel_scale" else name: values for name, values in columns.items()})

    def images(self) -> Iterator[np.ndarray]:
        step = max(1, BATCH_BYTES // (3 * self.size**2))
        for start in range(0, self.num_rows, step):
            yield synthetic.render(np.arange(start, min(start + step, self.num_rows)), self.size)


def _has_parquet(path: Path) -> bool:
    found = (file for file in path.rglob("*") if file.suffix.lower() == ".parquet" and file.stem != "metadata")
    return any(not any(part.startswith(".") for part in file.relative_to(path).parts) for file in found)


def _is_hub_id(name: str) -> bool:
    is_file_name = name.lower().endswith(tuple(suffix for _, kind in KINDS for suffix in kind.suffixes))
    return bool(re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name)) and not is_file_name


# What is asked of the value of `--dataset` and of its path, and who reads it if that is so. The first one counts.
KINDS: tuple[tuple[Callable[[str, Path], bool], type[Source]], ...] = (
    (lambda name, path: name == "galaxy10", Galaxy10),
    (lambda name, path: name.split(":")[0] == "synthetic", Synthetic),
    (lambda name, path: path.is_file() and path.suffix.lower() in ParquetFiles.suffixes, ParquetFiles),
    (lambda name, path: path.is_file() and is_fits(path) and bool(galaxies_in(path)), FitsImages),
    (lambda name, path: path.is_file() and name.lower().endswith(PathTable.suffixes), PathTable),
    (lambda name, path: path.is_file(), Hdf5),
    (lambda name, path: path.is_dir() and is_hats(path), HatsSource),
    (lambda name, path: path.is_dir() and _has_parquet(path), ParquetFiles),
    (lambda name, path: path.is_dir(), ImageFolder),
    (lambda name, path: _is_hub_id(name), Hub),
)


def find_source(name: str, options: Options = Options()) -> Source:  # noqa: B008 (frozen)
    """The source that a value of `--dataset` names. Raises a `UserError` if there is none."""
    path = user_path(name)
    kind = next((kind for is_kind, kind in KINDS if is_kind(name, path)), None)
    if kind is None:
        fix = "use an existing path, galaxy10, synthetic, or a Hub id"
        raise UserError(f"{options.flag} {name}: no such file or folder; {fix}")
    return kind(name, path, options)

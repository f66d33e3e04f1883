"""Which kind of input the value of `--dataset` is: the one place that recognizes it.

A new kind is a class with the members of `Source`, and its line in `KINDS`.
"""

import hashlib
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa

from galaxy_mae.data import synthetic
from galaxy_mae.data.arrow import HatsSource, ParquetFile, ParquetFolder
from galaxy_mae.data.columns import GALAXY10_CLASSES
from galaxy_mae.data.download import content_fingerprint, find_galaxy10
from galaxy_mae.data.hdf5 import Hdf5
from galaxy_mae.data.hub import Hub, ImageFolder
from galaxy_mae.data.images import BATCH_BYTES
from galaxy_mae.data.path_tables import PathTable
from galaxy_mae.data.source import Options, Source
from galaxy_mae.errors import UserError, first_line

DEFAULT_SYNTHETIC_COUNT = 4000  # galaxies; `synthetic:COUNT` sets another number
_MAX_SYNTHETIC_COUNT = 10**8


class Galaxy10(Hdf5):
    """Galaxy10 DECaLS, which is downloaded if it is not there."""

    @staticmethod
    def recognizes(name: str, path: Path) -> bool:
        return name == "galaxy10"

    def __init__(self, name: str, path: Path, options: Options):
        super().__init__(name, find_galaxy10(), options)


class Synthetic(Source):
    """Procedural galaxies: `synthetic` or `synthetic:COUNT`."""

    class_names = GALAXY10_CLASSES

    @staticmethod
    def recognizes(name: str, path: Path) -> bool:
        return name.split(":")[0] == "synthetic"

    @cached_property
    def num_rows(self) -> int:
        _, colon, count = self.name.partition(":")
        if colon and not (count.isdecimal() and 0 < int(count) <= _MAX_SYNTHETIC_COUNT):
            raise UserError(
                f"{self.where}: a number of galaxies up to {_MAX_SYNTHETIC_COUNT:,} must follow the colon, as in "
                "synthetic:4000"
            )
        return int(count) if colon else DEFAULT_SYNTHETIC_COUNT

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


# The first that recognizes a name reads it.
KINDS: tuple[type[Source], ...] = (
    Galaxy10,
    Synthetic,
    ParquetFile,
    PathTable,
    HatsSource,
    ParquetFolder,
    ImageFolder,
    Hdf5,  # any other file
    Hub,
)


def find_source(name: str, options: Options = Options()) -> Source:  # noqa: B008 (frozen)
    """The source that a value of `--dataset` names.

    Raises:
        UserError: there is none.
    """
    try:
        path = Path(name).expanduser()
        kind = next((kind for kind in KINDS if kind.recognizes(name, path)), None)
    except (OSError, RuntimeError) as error:  # a name that is too long, a folder that may not be entered, no such user
        reason = getattr(error, "strerror", None) or first_line(error)
        fix = "use the path of a file or folder that you can read"
        raise UserError(f"--dataset {name[:200]}: {reason}; {fix}") from error
    if kind:
        return kind(name, path, options)
    raise UserError(f"--dataset {name}: no such file or folder; use an existing path, galaxy10, synthetic, or a Hub id")

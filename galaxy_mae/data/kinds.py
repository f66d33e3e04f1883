"""Which kind of input the value of `--dataset` is: the one place that recognizes it.

A new kind is a subclass of `Source`, and a line in `KINDS`.
"""

import hashlib
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa

from galaxy_mae.data import synthetic
from galaxy_mae.data.arrays import Hdf5, NumpyArrays
from galaxy_mae.data.arrow import HatsSource, Hub, ParquetFiles, ParquetSource
from galaxy_mae.data.columns import GALAXY10_CLASSES, find_column, is_text
from galaxy_mae.data.download import content_fingerprint, find_galaxy10
from galaxy_mae.data.fits import galaxies_in, is_fits
from galaxy_mae.data.hats import is_hats
from galaxy_mae.data.images import IMAGE_SUFFIXES
from galaxy_mae.data.path_tables import FitsImages, ImageFolder, PathTable, WebDataset
from galaxy_mae.data.source import Options, Source
from galaxy_mae.errors import UserError
from galaxy_mae.files import user_path

DEFAULT_SYNTHETIC_COUNT = 4000  # galaxies; `synthetic:COUNT` sets another number


class Galaxy10(Hdf5):
    """Galaxy10 DECaLS, which is downloaded if it is not there."""

    class_names = GALAXY10_CLASSES

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
        step = 32  # 10 ms each: whoever looks at the first one makes as many
        for start in range(0, self.num_rows, step):
            yield synthetic.render(np.arange(start, min(start + step, self.num_rows)), self.size)


def _is_parquet(given: Source) -> bool:
    """Whether a file is Parquet, and not a table of paths."""
    if given.path.suffix.lower() not in ParquetFiles.suffixes:
        return False
    source, image = ParquetFiles(given.name, given.path, given.options), given.options.image_column
    if not image and source.has_images:
        return True
    texts = [field.name for field in source.schema if is_text(field.type)]
    return image not in texts if image else not any(find_column(texts, field) for field in ("path", "image"))


def _has(given: Source, suffixes: tuple[str, ...]) -> bool:
    """Whether a file, or one in a folder, has such a name."""
    return any(file.name.lower().endswith(suffixes) for file in given.files)


def _is_parquet_folder(given: Source) -> bool:
    """Whether a folder has Parquet files with images in them, or no other images."""
    found = [file for file in given.files if file.suffix.lower() in ParquetFiles.suffixes and file.stem != "metadata"]
    if any(ParquetFiles(str(file), file, Options()).has_images for file in found if file.is_file()):
        return True
    return bool(found) and not _has(given, IMAGE_SUFFIXES)


# How files begin that are of another kind than their name says, what they are, and what to do.
_BEGINNINGS = (
    ((b"\x89HDF",), "HDF5", "end its name with .h5"),
    ((b"PAR1",), "Parquet", "end its name with .parquet"),
    ((b"\x93NUMPY",), "a NumPy array", "end its name with .npy"),
    ((b"SIMPLE  =",), "FITS", "end its name with .fits, and pass a table itself, or the folder that images are in"),
    ((b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"II*\0", b"MM\0*", b"RIFF", b"BM"), "one image", "pass its folder"),
    ((b"PK\3\4",), "a zip archive, as .xlsx is", "unpack it, or save the spreadsheet as CSV"),
    ((b"\xd0\xcf\x11\xe0",), "a spreadsheet (.xls)", "save it as CSV"),
    ((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"7z\xbc\xaf", b"Rar!", b"(\xb5/\xfd"), "a compressed file", "unpack it"),
    ((b"\x80",), "a Python pickle", "it may run code and is never opened: write .npz, HDF5 or Parquet"),
    ((b"SQLite format 3",), "an SQLite database", "export a table of image paths as CSV"),
    ((b"%PDF", b"<!DOCTYPE", b"<html"), "a document", "if a download failed, download it again"),
)


def _format(path: Path) -> tuple[str, str]:
    """What a file is by its first bytes, and what to do if it is not read; of another one "of an unknown format"."""
    start = b""
    with suppress(OSError), path.open("rb") as stream:  # what reads it says why it cannot be read
        start = stream.read(16)
    fix = "tables of paths end with .csv, .tsv, .vot, .ecsv or .fits; write Parquet, HDF5 or a folder of images"
    found = ((what, do) for beginnings, what, do in _BEGINNINGS if start.startswith(beginnings))
    return next(found, ("of an unknown format", fix))


def _is_hdf5(path: Path) -> bool:
    what = _format(path)[0]
    return what == "HDF5" or (path.suffix.lower() in Hdf5.suffixes and what == "of an unknown format")


def _is_hub_id(name: str) -> bool:
    is_file_name = name.lower().endswith(tuple(suffix for _, kind in KINDS for suffix in kind.suffixes))
    return bool(re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name)) and not is_file_name


# What is asked of a source of which only the name is known, and who reads it if that is so. The first one counts.
KINDS: tuple[tuple[Callable[[Source], bool], type[Source]], ...] = (
    (lambda given: given.name == "galaxy10", Galaxy10),
    (lambda given: given.name.split(":")[0] == "synthetic", Synthetic),
    (lambda given: given.path.is_file() and _is_parquet(given), ParquetFiles),
    (lambda given: given.path.is_file() and is_fits(given.path) and bool(galaxies_in(given.path)), FitsImages),
    (lambda given: given.path.is_file() and _has(given, PathTable.suffixes), PathTable),
    (lambda given: given.path.is_file() and _has(given, NumpyArrays.suffixes), NumpyArrays),
    (lambda given: given.path.is_file() and _has(given, WebDataset.suffixes), WebDataset),
    (lambda given: given.path.is_file() and _is_hdf5(given.path), Hdf5),
    (lambda given: given.path.is_dir() and is_hats(given.path), HatsSource),
    (lambda given: given.path.is_dir() and _is_parquet_folder(given), ParquetFiles),
    (lambda given: given.path.is_dir() and _has(given, (".tar",)) and not _has(given, IMAGE_SUFFIXES), WebDataset),
    (lambda given: given.path.is_dir(), ImageFolder),
    (lambda given: _is_hub_id(given.name), Hub),
)


def find_source(name: str, options: Options = Options()) -> Source:  # noqa: B008 (frozen)
    """The source that a value of `--dataset` names. Raises a `UserError` if there is none."""
    given = Source(name, path := user_path(name), options)
    kind = next((kind for is_kind, kind in KINDS if is_kind(given)), None)
    if kind is None and path.is_file():
        raise UserError(f"{options.flag} {name}: it is {': '.join(_format(path))}")
    if kind is None:
        fix = "use an existing path, galaxy10, synthetic, or a Hub id"
        raise UserError(f"{options.flag} {name}: no such file or folder; {fix}")
    if (image := options.image_column) and not issubclass(kind, (ParquetSource, PathTable, Hub)):
        raise UserError(f"--columns image={image}: only a table has columns of images, and {name} is none")
    return kind(name, path, options)

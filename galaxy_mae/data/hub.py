"""Data sets of the Hugging Face Hub, and folders of images, through the `datasets` library.

The library finds the files, the splits and the features; `images.py` decodes the images. An image is read from the
bytes in the table, or from a file whose content is in the fingerprint. No code that comes with a data set is run.
"""

import glob
import hashlib
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from galaxy_mae.data.arrow import ImageColumn, image_column
from galaxy_mae.data.columns import descriptive_columns
from galaxy_mae.data.download import content_fingerprint
from galaxy_mae.data.fits import Stretch, is_fits
from galaxy_mae.data.images import Encoded
from galaxy_mae.data.source import Source, files_in_folder
from galaxy_mae.errors import UserError, first_line, is_disk_full

_ROWS = 256  # whose images are read at once


class DatasetsSource(Source):
    """What the `datasets` library opens: what a Hub id and a folder of images share.

    They have `splits`, a `datasets.DatasetDict`, and `is_fingerprinted`: whether the content of the file at a path is
    part of the fingerprint. Only such images are read.
    """

    @cached_property
    def _rows(self):
        """All rows as a `datasets.Dataset` in Arrow's format: never decoded by the library, which would open URLs."""
        import datasets

        with _library_errors(self.where):
            return datasets.concatenate_datasets([rows for _, rows in self._sorted_splits]).with_format("arrow")

    @property
    def _sorted_splits(self) -> list[tuple]:
        """The test split is the last one."""
        return sorted(self.splits.items(), key=lambda split: (split[0] == "test", split[0]))

    @cached_property
    def _schema(self) -> pa.Schema:
        return self._rows.features.arrow_schema

    @cached_property
    def _image(self) -> ImageColumn:
        return image_column(self.where, self._schema)

    @property
    def num_rows(self) -> int:
        return len(self._rows)

    @property
    def predefined_test(self) -> np.ndarray:
        return np.concatenate([np.full(len(rows), name == "test") for name, rows in self._sorted_splits])

    @property
    def table(self) -> pa.Table:
        table = self._rows.select_columns(descriptive_columns(self._schema))[:]
        return table.replace_schema_metadata(self._schema.metadata)

    def images(self) -> Iterator[Sequence[Encoded]]:
        images = self._rows.select_columns([self._image.name])
        for start in range(0, len(images), _ROWS):
            yield self._image.encoded(images[start : start + _ROWS][self._image.name], self.is_fingerprinted)


class ImageFolder(DatasetsSource):
    """A folder of images or FITS cut-outs, with or without one subfolder per class, and perhaps `metadata.csv`."""

    @cached_property
    def _files(self) -> list[Path]:
        return files_in_folder(self.where, self.path)

    @property
    def fingerprint(self) -> str:
        fingerprint = content_fingerprint(self._files, root=self.path)
        if any(map(is_fits, self._files)):
            fingerprint = hashlib.sha256(f"{fingerprint} {self.options.stretch}".encode()).hexdigest()
        return fingerprint

    @cached_property
    def splits(self):
        return _load(self.where, "imagefolder", data_files=files_by_split(self.where, self.path.resolve()))

    @cached_property
    def _known(self) -> set[Path]:
        return {self.path.resolve() / file.relative_to(self.path) for file in self._files}

    def is_fingerprinted(self, path: str) -> bool:
        return Path(path) in self._known

    @property
    def file_names(self) -> list[str]:
        column = self._image.name
        files = pc.struct_field(self._rows.select_columns([column])[:][column], "path").to_pylist()
        return [Path(file).relative_to(self.path.resolve()).as_posix() for file in files]


class Hub(DatasetsSource):
    """A data set on the Hugging Face Hub: `OWNER/NAME`."""

    @cached_property
    def splits(self):
        return _load(self.where, self.name)

    @property
    def fingerprint(self) -> str:
        # The library's own fingerprint covers the revision of the files and the reading options.
        parts = " ".join(f"{split} {part._fingerprint}" for split, part in sorted(self.splits.items()))
        if self.options.stretch != Stretch():
            parts += f" {self.options.stretch}"
        return hashlib.sha256(parts.encode()).hexdigest()

    def is_fingerprinted(self, path: str) -> bool:
        """Whether the library downloaded it, at a revision that is in the fingerprint."""
        import datasets
        from huggingface_hub.constants import HF_HUB_CACHE

        caches = (datasets.config.HF_DATASETS_CACHE, datasets.config.HF_CACHE_HOME, HF_HUB_CACHE)
        return any(Path(path).resolve().is_relative_to(Path(cache).resolve()) for cache in caches)


def files_by_split(where: str, root: Path, suffixes: list[str] | None = None) -> dict[str, list[str]]:
    """The files of a resolved folder by the split that their names tell, such as `test`; `train` without one."""
    from datasets.data_files import DataFilesDict, get_data_patterns

    pattern = glob.escape(str(root))
    with _library_errors(where):
        return DataFilesDict.from_patterns(get_data_patterns(pattern), base_path=pattern, allowed_extensions=suffixes)


def _load(where: str, path: str, **options):
    """Call `datasets.load_dataset(path, **options)`, which never runs code that comes with a data set."""
    import datasets  # slow to import

    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # else a local file is reported to the Hub
    with _library_errors(where):
        return datasets.load_dataset(path, trust_remote_code=False, **options)


@contextmanager
def _library_errors(where: str) -> Iterator[None]:
    """Silence the `datasets` library, and turn its failures into a `UserError`."""
    import datasets

    verbosity = datasets.utils.logging.get_verbosity()
    datasets.utils.logging.set_verbosity_error()
    try:
        yield
    except Exception as error:  # the library raises whatever its readers and the network raise
        causes = "".join(traceback.format_exception(error))  # of its own errors, those of its writers
        if is_disk_full(Exception(causes)) or "Not enough disk space" in causes:
            fix = "free some space, or set HF_DATASETS_CACHE to a folder on another disk"
            folder = datasets.config.HF_DATASETS_CACHE
            raise UserError(f"{folder}: the disk or quota is full, and the table does not fit: {fix}") from error
        wrong = f"cannot be read as a folder of images or tables, or a data set of the Hub ({first_line(error)})"
        raise UserError(f"{where}: {wrong}; check the spelling, the files and the network") from error
    finally:
        datasets.utils.logging.set_verbosity(verbosity)

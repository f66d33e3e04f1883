"""Data sets of the Hugging Face Hub, through the `datasets` library.

The library finds the files, the splits and the features, and keeps them in a folder that is named by the revision of
the data set, which is part of the fingerprint. `images.py` decodes the images. No code that comes with a data set is
run.
"""

import errno
import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa

from galaxy_mae.data.arrow import ImageColumn, image_column
from galaxy_mae.data.columns import descriptive_columns, plain_rows, plain_schema
from galaxy_mae.data.fits import Stretch
from galaxy_mae.data.images import Encoded
from galaxy_mae.data.source import Source
from galaxy_mae.errors import DISK_FULL, UserError, first_line, is_disk_full, root_cause

_ROWS = 256  # whose images are read at once


class Hub(Source):
    """A data set on the Hugging Face Hub: `OWNER/NAME`."""

    @cached_property
    def splits(self):
        """A `datasets.DatasetDict`."""
        import datasets  # slow to import

        with _library_errors(self.where):
            return datasets.load_dataset(self.name, trust_remote_code=False)

    @property
    def fingerprint(self) -> str:
        # The library's own fingerprint covers the revision of the files and the reading options.
        parts = " ".join(f"{split} {part._fingerprint}" for split, part in sorted(self.splits.items()))
        if self.options.stretch != Stretch():
            parts += f" {self.options.stretch}"
        return hashlib.sha256(parts.encode()).hexdigest()

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
        return plain_schema(self._rows.features.arrow_schema)

    @cached_property
    def _image(self) -> ImageColumn:
        return image_column(self.where, self._schema, self.options.image_column)

    @property
    def num_rows(self) -> int:
        return len(self._rows)

    @property
    def predefined_test(self) -> np.ndarray:
        return np.concatenate([np.full(len(rows), name == "test") for name, rows in self._sorted_splits])

    @property
    def table(self) -> pa.Table:
        table = self._rows.select_columns(descriptive_columns(self._schema))[:]
        return plain_rows(table.replace_schema_metadata(self._schema.metadata))

    def images(self) -> Iterator[Sequence[Encoded]]:
        images = self._rows.select_columns([self._image.name])
        for start in range(0, len(images), _ROWS):
            yield self._image.encoded(images[start : start + _ROWS][self._image.name], _is_downloaded)


def _is_downloaded(path: str) -> bool:
    """Whether the library downloaded an image, at a revision that is in the fingerprint."""
    import datasets
    from huggingface_hub.constants import HF_HUB_CACHE

    caches = (datasets.config.HF_DATASETS_CACHE, datasets.config.HF_CACHE_HOME, HF_HUB_CACHE)
    return any(Path(path).resolve().is_relative_to(Path(cache).resolve()) for cache in caches)


@contextmanager
def _library_errors(where: str) -> Iterator[None]:
    """Silence the `datasets` library, and turn its failures into a `UserError` that names the first cause."""
    import datasets

    verbosity = datasets.utils.logging.get_verbosity()
    datasets.utils.logging.set_verbosity_error()
    try:
        yield
    except Exception as error:  # the library raises whatever its readers and the network raise
        cause = root_cause(error)
        folder = getattr(cause, "filename", None) or datasets.config.HF_DATASETS_CACHE
        if is_disk_full(cause) or "Not enough disk space" in str(cause):
            fix = "free some space, or set HF_HOME to a folder on another disk"
            raise UserError(f"{folder}: {DISK_FULL}, and the table does not fit: {fix}") from error
        if getattr(cause, "errno", None) in (errno.EROFS, errno.EACCES, errno.EPERM):
            fix = "set HF_HOME to a folder that you may write to"
            raise UserError(f"{where}: {folder}: {cause.strerror}: {fix}") from error
        reasons = ": ".join(dict.fromkeys(first_line(reason)[:300] for reason in (error, cause)))
        wrong = f"cannot be read as a data set of the Hub ({reasons})"
        raise UserError(f"{where}: {wrong}; check the spelling, the files and the network") from error
    finally:
        datasets.utils.logging.set_verbosity(verbosity)

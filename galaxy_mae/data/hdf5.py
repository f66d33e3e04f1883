"""HDF5 files in Galaxy10's schema.

Links from an HDF5 file to other files are refused, because what they point to can change while the cached pixels stay.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from galaxy_mae.data.columns import GALAXY10_CLASSES, check_labels
from galaxy_mae.data.download import content_fingerprint
from galaxy_mae.data.fits import MAX_IMAGE_SIZE, UnreadableImage
from galaxy_mae.data.hats import MAX_COMPRESSION
from galaxy_mae.data.images import BATCH_BYTES, Encoded
from galaxy_mae.data.source import Source
from galaxy_mae.errors import UserError, first_line

if TYPE_CHECKING:
    import h5py

_SCHEMA = "it should be an HDF5 file with `images` (N, S, S, 3) uint8 and `ans` (N,), like Galaxy10_DECals.h5"
_OPTIONAL = {"ra", "dec", "pxscale", "object_id"}  # what is wrong in them is refused, as in `ans`
_MAX_CHUNK_BYTES = 1 << 30  # of a file, which are decompressed at once
_MAX_LINKS = 16  # soft links that are followed, as in HDF5's own limit


class Hdf5(Source):
    """A file in the schema of Galaxy10_DECals.h5; other one-dimensional data sets are columns, too."""

    class_names = GALAXY10_CLASSES

    @property
    def where(self) -> str:
        return str(self.path)

    @property
    def fingerprint(self) -> str:
        return content_fingerprint([self.path])

    @property
    def num_rows(self) -> int:
        return len(self._images)

    @cached_property
    def _file(self) -> "h5py.File":
        import h5py

        try:
            return h5py.File(self.path, "r")
        except OSError as error:
            if "truncated" in str(error):
                raise UserError(f"{self.path}: the file is truncated: copy or download it again") from error
            raise UserError(f"{self.path}: not an HDF5 file; {_SCHEMA}") from error

    @cached_property
    def _images(self) -> "h5py.Dataset":
        with self._damage():
            images = self._dataset("images")
            if images.ndim != 4 or images.shape[1] != images.shape[2] or images.shape[3] != 3:
                raise UserError(f"{self.path}: `images` has shape {images.shape}; {_SCHEMA}")
            if images.dtype != np.uint8:
                raise UserError(f"{self.path}: `images` has dtype {images.dtype}; {_SCHEMA}")
            count, size = images.shape[:2]
            if count == 0:
                raise UserError(f"{self.path}: the file is empty: `images` has no rows")
            if not 1 <= size <= MAX_IMAGE_SIZE:
                fix = f"crop or resize them to between 1 and {MAX_IMAGE_SIZE}"
                raise UserError(f"{self.path}: the images are {size} x {size} pixels; {fix}")
            self._check_storage("images", images)
            return images

    @cached_property
    def table(self) -> pa.Table:
        with self._damage():
            keys = set(self._file)  # without opening what they link to
            columns = {key: self._column(key) for key in {"ans", *_OPTIONAL & keys}}
        for key in keys - {"images", *columns}:
            with suppress(UserError, OSError, RuntimeError, pa.ArrowException):  # what is no column passes by
                columns[key] = self._column(key)
        check_labels(self.where, np.asarray(columns["ans"]), len(GALAXY10_CLASSES))
        return pa.table(dict(sorted(columns.items())))

    def _column(self, key: str) -> pa.Array:
        """A data set of one number or text per image."""
        import h5py

        values = self._dataset(key)
        is_text = h5py.check_string_dtype(values.dtype) is not None
        if values.shape != (self.num_rows,) or not (is_text or values.dtype.kind in "iuf"):
            raise UserError(
                f"{self.path}: `{key}` is {values.dtype} {values.shape}; it must have one number per image, and there "
                f"are {self.num_rows} images"
            )
        self._check_storage(key, values)
        if is_text:
            return pa.array(values.asstr(errors="replace")[()].tolist(), pa.string())
        return pa.array(values[()].astype(values.dtype.newbyteorder("=")))

    def images(self) -> Iterator[Sequence[Encoded]]:
        """Batches whose length is a multiple of the chunk length, so that no chunk is decompressed twice."""
        images = self._images
        chunk_length = images.chunks[0] if images.chunks else 1
        target_length = max(1, BATCH_BYTES // int(np.prod(images.shape[1:])))
        step = chunk_length * max(1, target_length // chunk_length)
        for start in range(0, len(images), step):
            try:
                yield images[start : start + step]
            except OSError:
                yield self._readable_chunks(start, min(start + step, len(images)), chunk_length)

    def _readable_chunks(self, start: int, stop: int, chunk_length: int) -> list[Encoded]:
        """The rows from `start` to `stop`, chunk by chunk, with a reason for the rows of chunks that cannot be read."""
        rows: list[Encoded] = []
        for first in range(start, stop, chunk_length):
            last = min(first + chunk_length, stop)
            try:
                rows += list(self._images[first:last])
            except OSError as error:
                reason = f"cannot be read ({first_line(error)[:200]}): copy or download the file again"
                rows += [UnreadableImage(reason)] * (last - first)
        return rows

    @contextmanager
    def _damage(self) -> Iterator[None]:
        """Turn what h5py makes of damaged metadata into a `UserError`."""
        try:
            yield
        except UserError:
            raise
        except (OSError, RuntimeError, KeyError, TypeError, ValueError) as error:
            reason = first_line(error)
            raise UserError(f"{self.path}: cannot be read ({reason}): copy or download the file again") from error

    def _dataset(self, key: str) -> "h5py.Dataset":
        """Return the data set `key`, whose values must all be in this file.

        Soft links are followed here, one step at a time, because h5py would open the file behind an external link.
        """
        import h5py

        found, parts, links = self._file, key.split("/"), 0
        while parts:
            part = parts.pop(0)
            link = found.get(part, getlink=True) if isinstance(found, h5py.Group) else None
            if link is None:
                keys = ", ".join(itertools.islice(self._file, 20)) or "nothing"
                dangling = f" (it links to {part}, which is not there)" if links else ""
                raise UserError(f"{self.path}: no key `{key}`{dangling} (it has: {keys}); {_SCHEMA}")
            if isinstance(link, h5py.SoftLink):
                links += 1
                if links > _MAX_LINKS:
                    raise UserError(f"{self.path}: `{key}` is a link that leads to itself; {_SCHEMA}")
                found = self._file if link.path.startswith("/") else found
                parts = [name for name in link.path.split("/") if name not in ("", ".")] + parts
            elif isinstance(link, h5py.HardLink):
                found = found[part]
            else:
                raise UserError(
                    f"{self.path}: `{key}` is a link to another file: copy the data into this file (h5repack)"
                )
        if not isinstance(found, h5py.Dataset) or found.shape is None:
            raise UserError(f"{self.path}: `{key}` is not a data set with values; {_SCHEMA}")
        if found.is_virtual or found.external:
            raise UserError(
                f"{self.path}: the values of `{key}` are in other files: copy the data into this file (h5repack)"
            )
        return found

    def _check_storage(self, key: str, values: "h5py.Dataset") -> None:
        """Compare what a data set declares with what is stored of it: HDF5 makes up what was never written."""
        stored = values.id.get_storage_size()
        if values.nbytes > MAX_COMPRESSION * stored:
            raise UserError(
                f"{self.path}: `{key}` declares {values.nbytes:,} bytes, but {stored:,} are stored: the file was not "
                "completely written; copy or create it again"
            )
        if values.chunks is None:
            return
        chunk_bytes = math.prod(values.chunks) * values.dtype.itemsize
        if chunk_bytes > _MAX_CHUNK_BYTES:
            raise UserError(
                f"{self.path}: `{key}` has chunks of {chunk_bytes:,} bytes: write it with one image per chunk"
            )
        expected = math.prod(-(-n // chunk) for n, chunk in zip(values.shape, values.chunks, strict=True))
        if values.id.get_num_chunks() < expected:
            raise UserError(
                f"{self.path}: only {values.id.get_num_chunks():,} of {expected:,} chunks of `{key}` were written: "
                "copy or create the file again"
            )

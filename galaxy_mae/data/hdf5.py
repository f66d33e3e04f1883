"""HDF5 files with an array of images, like Galaxy10's and those of the Multimodal Universe.

All values must be in the file itself: what a link, a virtual data set or external storage points to can change while
the cached pixels stay.
"""

import errno
import hashlib
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from galaxy_mae.data.arrays import about_images, check_images, find_images, table_of_arrays
from galaxy_mae.data.arrow import BANDS, letter
from galaxy_mae.data.columns import LABELS
from galaxy_mae.data.download import content_fingerprint
from galaxy_mae.data.fits import UnreadableImage
from galaxy_mae.data.images import BATCH_BYTES, Encoded, from_array
from galaxy_mae.data.source import Source
from galaxy_mae.errors import UserError, first_line
from galaxy_mae.files import MAX_DECODED_BYTES

if TYPE_CHECKING:
    import h5py

_KNOWN = {*LABELS, "ra", "dec", "pxscale", "object_id"}  # what is wrong in them is refused
_MAX_COMPRESSION = 1100  # times; deflate reaches 1032 on constant data, and images of galaxies about 2
_FIX = "copy or download the file again"


class Hdf5(Source):
    """A file like Galaxy10_DECals.h5; all one-dimensional data sets are columns."""

    suffixes = (".h5", ".hdf5", ".hdf")

    @property
    def where(self) -> str:
        return str(self.path)

    @property
    def fingerprint(self) -> str:
        content = content_fingerprint([self.path])
        if self._images.dtype == np.uint8:
            return content
        return hashlib.sha256(f"{content} {self.options.stretch}".encode()).hexdigest()

    @property
    def num_rows(self) -> int:
        return len(self._images)

    @cached_property
    def _file(self) -> "h5py.File":
        import h5py

        with self._damage():
            return h5py.File(self.path, "r")

    @cached_property
    def _images(self) -> "h5py.Dataset":
        with self._damage():
            images = self._dataset(key := find_images(self.where, list(self._file)))
            check_images(self.where, key, images.shape, images.dtype)
            self._check_storage(key, images)
            return images

    @property
    def notes(self) -> list[str]:
        return about_images(self._images.name[1:], self._images.shape, self._images.dtype)

    @cached_property
    def _planes(self) -> list[int] | slice:
        """Those of g, r and z, where `image_band` names the planes, as in the Multimodal Universe; else all."""
        if "image_band" not in self._file or self._images.dtype == np.uint8:
            return slice(None)
        with self._damage():
            found = [letter(str(name)) for name in self._dataset("image_band").asstr()[0]]
        planes = [found.index(band) for band in BANDS if band in found]
        return planes if len(planes) == len(BANDS) else slice(None)

    @cached_property
    def table(self) -> pa.Table:
        with self._damage():
            keys = list(self._file)  # without opening what they link to
        columns = {}
        for key in sorted({*keys} - {self._images.name[1:]}):
            try:
                with self._damage():
                    columns[key] = self._column(key)
            except UserError:
                if key in _KNOWN:  # another one that is no column passes by
                    raise
        return table_of_arrays(columns)

    def _column(self, key: str) -> pa.Array:
        """A data set of one number or text per image."""
        import h5py

        values = self._dataset(key)
        is_text = h5py.check_string_dtype(values.dtype) is not None
        if values.shape != (self.num_rows,) or not (is_text or values.dtype.kind in "iuf"):
            wrong = f"is {values.dtype} {values.shape}, not one number or text for each of {self.num_rows} images"
            raise UserError(f"{self.path}: `{key}` {wrong}")
        self._check_storage(key, values)
        if is_text:
            return pa.array(values.asstr(errors="replace")[()].tolist(), pa.string())
        return pa.array(values[()].astype(values.dtype.newbyteorder("=")))

    def images(self) -> Iterator[Sequence[Encoded]]:
        """Batches of one chunk, so that none is decompressed twice; a damaged one is a reason for its rows alone."""
        images = self._images
        length = images.chunks[0] if images.chunks else max(1, BATCH_BYTES // math.prod(images.shape[1:]))
        for start in range(0, len(images), length):
            stop = min(start + length, len(images))
            try:
                yield [image[self._planes] for image in map(from_array, images[start:stop])]
            except OSError as error:
                yield [UnreadableImage(f"cannot be read ({first_line(error)[:200]}): {_FIX}")] * (stop - start)

    @contextmanager
    def _damage(self) -> Iterator[None]:
        """Turn what h5py makes of damaged metadata into a `UserError`."""
        try:
            yield
        except UserError:
            raise
        except (OSError, RuntimeError, KeyError, TypeError, ValueError, pa.ArrowException) as error:
            number = getattr(error, "errno", None)
            if "unable to lock" in str(error):
                wrong = "locked by another program, which has it open for writing: wait for it"
                if number not in (errno.EAGAIN, errno.EACCES):
                    wrong = f"on a file system without locks ({os.strerror(number or errno.ENOLCK)}): copy it elsewhere"
                fix = "or set HDF5_USE_FILE_LOCKING=FALSE if nothing writes to it"
                raise UserError(f"{self.path}: it is {wrong}, {fix}") from error
            if number:
                raise UserError(f"{self.path}: cannot be read: {os.strerror(number)}") from error
            raise UserError(f"{self.path}: cannot be read as HDF5 ({first_line(error)}): {_FIX}") from error

    def _dataset(self, key: str) -> "h5py.Dataset":
        """Return the data set `key`, whose values must all be in this file."""
        import h5py

        link = self._file.get(key, getlink=True)
        found = self._file[key] if isinstance(link, h5py.HardLink) else None  # h5py opens what other links point to
        if not isinstance(found, h5py.Dataset) or found.shape is None or found.is_virtual or found.external:
            fix = "copy the values into one (h5repack)"
            raise UserError(f"{self.path}: `{key}` is a link, or no data set with all its values in this file: {fix}")
        return found

    def _check_storage(self, key: str, values: "h5py.Dataset") -> None:
        """Compare what a data set declares with what is stored of it: HDF5 makes up what was never written.

        Its compression must be known here: else each of its chunks would be called damaged.
        """
        import h5py

        created = values.id.get_create_plist()
        for number, _, _, name in map(created.get_filter, range(created.get_nfilters())):
            if not h5py.h5z.filter_avail(number):
                fix = "install it (hdf5plugin) and set HDF5_PLUGIN_PATH, or write it with gzip (h5repack -f GZIP=4)"
                filter_name = f"{name.decode(errors='replace')} ({number})".strip()
                raise UserError(f"{self.path}: `{key}` needs the HDF5 filter {filter_name}, which is not here: {fix}")
        if values.chunks and math.prod(values.chunks) * values.dtype.itemsize > MAX_DECODED_BYTES:
            raise UserError(f"{self.path}: `{key}` has chunks of over 1 GiB: write it with one image per chunk")
        is_written = values.nbytes <= _MAX_COMPRESSION * values.id.get_storage_size()
        if chunk := values.chunks:
            expected = math.prod(-(-n // length) for n, length in zip(values.shape, chunk, strict=True))
            is_written &= values.id.get_num_chunks() >= expected
        if not is_written:
            missing = f"declares {values.nbytes:,} bytes, and not all of them were written"
            raise UserError(f"{self.path}: `{key}` {missing}: copy or create the file again")

"""Arrays of images in HDF5, .npy and .npz files, and which of the arrays in a file are the images and the labels."""

import errno
import math
import os
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from galaxy_mae.data.arrow import BANDS, letter
from galaxy_mae.data.columns import LABELS, find_column
from galaxy_mae.data.fits import UnreadableImage
from galaxy_mae.data.images import BATCH_BYTES, Encoded, from_array
from galaxy_mae.data.source import Source
from galaxy_mae.errors import UserError, first_line
from galaxy_mae.files import MAX_DECODED_BYTES, check_decoded

if TYPE_CHECKING:
    import h5py

# Names of arrays, in lower case; the first one that is there is taken. `image_array` is of the Multimodal Universe.
IMAGE_KEYS = ("images", "image", "image_array", "rgb_image", "data", "img", "x", "arr_0")
_LABEL_KEYS = ("y", "target", "targets", "arr_1")  # beside those of columns of tables
_KNOWN = {*LABELS, "ra", "dec", "pxscale", "object_id"}  # what is wrong in them is refused
_MAX_COMPRESSION = 1100  # times; deflate reaches 1032 on constant data, and images of galaxies about 2
_FIX = "copy or download the file again"


def find_images(where: str, keys: Sequence[str]) -> str:
    """The name of the array of images. Raises a `UserError` if there is none."""
    found = {key.lower(): key for key in reversed(keys)}
    key = next((found[key] for key in IMAGE_KEYS if key in found), None)
    if key is None:
        listed = ", ".join(keys[:20])[:500]
        raise UserError(f"{where}: no key `images` (it has: {listed}); it should be one of {', '.join(IMAGE_KEYS)}")
    return key


def check_images(where: str, name: str, shape: Sequence[int], dtype: np.dtype) -> None:
    """Raise a `UserError` if an array of N images is none, as `from_array`."""
    try:
        from_array(np.broadcast_to(np.zeros((), dtype), shape[1:]))
    except UnreadableImage as problem:
        raise UserError(f"{where}: `{name}` is {dtype} {tuple(shape)}: each image {problem}") from problem


def about_images(name: str, shape: Sequence[int], dtype: np.dtype) -> list[str]:
    """`Source.notes` of the images' type."""
    if dtype != np.uint8:
        first = "the first band becomes blue, the first row is the lowest; RGB images are uint8"
        return [f"`{name}` is {dtype}: fluxes, which take the stretch ({first})"]
    return [f"`{name}` has 4 channels: the last is taken for transparency"] * (len(shape) == 4 and 4 in shape[1::2])


def table_of_arrays(columns: dict[str, pa.Array]) -> pa.Table:
    """A table of arrays, in which labels have the name of a column of labels."""
    key = next((key for key in _LABEL_KEYS if key in columns), None)
    if key and not find_column(columns, "label"):
        columns = {"label" if name == key else name: values for name, values in columns.items()}
    return pa.table(columns)


class NumpyArrays(Source):
    """N images in an .npy file, or in an .npz file with columns of N values, which is held in memory."""

    suffixes = (".npy", ".npz")
    takes_stretch = True

    @cached_property
    def _arrays(self) -> dict[str, np.ndarray]:
        try:
            if self.path.suffix.lower() == ".npy":
                array = np.load(self.path, mmap_mode="r", allow_pickle=False)
                is_one = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (1, 3, 4) and len(array) > 4)
                return {"images": array[None] if is_one else array}
            with self.path.open("rb") as stream, np.load(stream, allow_pickle=False) as loaded:
                check_decoded(sum(each.file_size for each in loaded.zip.infolist()), self.path)
                return {key: loaded[key] for key in loaded.files}
        except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise UserError(f"{self.where}: cannot be read as arrays of numbers ({first_line(error)[:200]})") from error

    @cached_property
    def _key(self) -> str:
        key = find_images(self.where, list(self._arrays))
        check_images(self.where, key, self._arrays[key].shape, self._arrays[key].dtype)
        return key

    @property
    def num_rows(self) -> int:
        return len(self._arrays[self._key])

    @property
    def table(self) -> pa.Table:
        columns = {}
        for key, values in self._arrays.items():
            if key != self._key and values.shape == (self.num_rows,) and values.dtype.kind in "biufUS":
                texts = np.char.decode(values, "utf-8", "backslashreplace") if values.dtype.kind == "S" else values
                columns[key] = pa.array(texts.tolist())
        return table_of_arrays(columns)

    @property
    def notes(self) -> list[str]:
        images, shape = self._arrays[self._key], (self.num_rows,)
        about = about_images(self._key, images.shape, images.dtype)
        others = ", ".join(key for key, values in self._arrays.items() if key != self._key and values.shape != shape)
        return about + [f"arrays that are not read: {others[:200]}"] * bool(others)

    def images(self) -> Iterator[Sequence[Encoded]]:
        images = self._arrays[self._key]
        step = max(1, BATCH_BYTES // max(1, images[:1].nbytes))
        for start in range(0, len(images), step):
            yield list(map(from_array, images[start : start + step]))


class Hdf5(Source):
    """A file like Galaxy10_DECals.h5 or those of the Multimodal Universe; all one-dimensional data sets are columns.

    All values must be in the file itself: what a link, a virtual data set or external storage points to can change
    while the cached pixels stay.
    """

    suffixes = (".h5", ".hdf5", ".hdf")

    @property
    def where(self) -> str:
        return str(self.path)

    @property
    def takes_stretch(self) -> bool:
        return self._images.dtype != np.uint8

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
        if "image_band" not in self._file or not self.takes_stretch:
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

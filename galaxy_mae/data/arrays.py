"""Arrays of images in .npy and .npz files, and which of the arrays in a file are the images and the labels."""

import hashlib
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from functools import cached_property

import numpy as np
import pyarrow as pa

from galaxy_mae.data.columns import find_column
from galaxy_mae.data.download import content_fingerprint
from galaxy_mae.data.fits import UnreadableImage
from galaxy_mae.data.images import BATCH_BYTES, Encoded, from_array
from galaxy_mae.data.source import Source
from galaxy_mae.errors import UserError, first_line
from galaxy_mae.files import check_decoded

# Names of arrays, in lower case; the first one that is there is taken. `image_array` is of the Multimodal Universe.
IMAGE_KEYS = ("images", "image", "image_array", "rgb_image", "data", "img", "x", "arr_0")
_LABEL_KEYS = ("y", "target", "targets", "arr_1")  # beside those of columns of tables


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
    def fingerprint(self) -> str:
        return hashlib.sha256(f"{content_fingerprint([self.path])} {self.options.stretch}".encode()).hexdigest()

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

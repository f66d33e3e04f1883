"""Readers of files in Galaxy10's schema and of synthetic galaxies, and the checks that every reader shares.

A reader checks what a file declares before it reads it, so that a damaged or hostile file ends in one line, without
minutes of work or gigabytes of memory. It reads nothing but what the fingerprint covers: links from an HDF5 file to
other files are refused, because what they point to can change while the cached pixels stay.
"""

import itertools
import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

from galaxy_mae.data import synthetic
from galaxy_mae.errors import UserError, first_line

logger = logging.getLogger(__name__)

GALAXY10_CLASSES = (
    "Disturbed",
    "Merging",
    "Round Smooth",
    "In-between Round Smooth",
    "Cigar Shaped Smooth",
    "Barred Spiral",
    "Unbarred Tight Spiral",
    "Unbarred Loose Spiral",
    "Edge-on without Bulge",
    "Edge-on with Bulge",
)
_MAX_SYNTHETIC_COUNT = 10**8
DEFAULT_SYNTHETIC_COUNT = 4000  # galaxies; `synthetic:COUNT` sets another number
MAX_IMAGE_SIZE = 4096  # pixels, as for --image_size: 50 MB decoded, more than any cut-out of one galaxy needs
SKY_COLUMNS = {"ra": "ra", "dec": "dec", "pixel_scale": "pxscale"}  # field of `Galaxies`: column in the source
# What a column of a table may be called, in any case; the first name that is there is taken. `gz10_label` and
# `rgb_pixel_scale` are of the Multimodal Universe, `iauname`, `dr7objid` and `GalaxyID` of Galaxy Zoo.
COLUMN_NAMES = {
    "image": ("image", "img", "images", "rgb_image", "rgb"),
    "path": ("path", "file_loc", "image_path", "file_path", "filename", "file_name", "file"),
    "label": ("label", "labels", "ans", "gz10_label"),
    "ra": ("ra",),
    "dec": ("dec",),
    "pixel_scale": ("pxscale", "rgb_pixel_scale"),
    "object_id": (
        *("object_id", "objid", "galaxy_id", "galaxyid", "source_id"),
        *("iauname", "dr7objid", "dr8objid", "id_str", "id"),
    ),
}
_SKY_RANGES = {  # lowest and highest value of a column, and the words for them
    "ra": (-180.0, 360.0, "from 0 to 360 degrees (or from -180 to 180)"),
    "dec": (-90.0, 90.0, "from -90 to 90 degrees"),
    "pixel_scale": (np.finfo(np.float64).tiny, 60.0, "above 0 and at most 60 arcsec per pixel"),
}
_HDF5_SCHEMA = "it should be an HDF5 file with `images` (N, S, S, 3) uint8 and `ans` (N,), like Galaxy10_DECals.h5"
MAX_COMPRESSION = 1100  # times; deflate reaches 1032 on constant data, and images of galaxies about 2
_MAX_CHUNK_BYTES = 1 << 30  # of an HDF5 file, which are decompressed at once
_MAX_LINKS = 16  # soft links that are followed, as in HDF5's own limit
BATCH_BYTES = 16 << 20  # pixels read at once; the process needs a few times this much memory


class UnreadableImage(ValueError):
    """An image that cannot be used. The message says why, and continues "the image of row 3"."""


# (b, native_size, native_size, 3) uint8, zero where an image cannot be read, and the reasons by the index in the batch
Batch = tuple[np.ndarray, dict[int, str]]


@dataclass
class RawDataset:
    """An opened source before ingestion: its catalogue, and an iterator that reads its images in order."""

    class_names: tuple[str, ...]
    count: int
    native_size: int
    columns: dict[str, np.ndarray]  # any of label, ra, dec, pixel_scale, predefined_test
    batches: Iterator[Batch]
    object_id: Sequence[str] | None = None


def find_column(names: Iterable[str], field: str) -> str | None:
    """The column that holds a field of `COLUMN_NAMES`, or None."""
    found = {name.lower(): name for name in reversed(list(names))}
    return next((found[name] for name in COLUMN_NAMES[field] if name in found), None)


def unreadable(source: str, row: int, problem: str, object_id: Sequence[str] | None) -> UserError:
    """The error of a source of which a row has no usable image."""
    name = f" {object_id[row][:200]!r}" if object_id is not None and object_id[row] else ""
    return UserError(f"--dataset {source}: the image{name} of row {row} {problem}")


def none_readable(source: str, count: int, problem: str) -> UserError:
    """The error of a source without any usable image; `problem` is that of the first row."""
    return UserError(f"--dataset {source}: none of the {count:,} images is readable; the image of row 0 {problem}")


# ------------------------------------------------------------------------------------------------------------ synthetic


def synthetic_count(source: str) -> int:
    _, colon, count = source.partition(":")
    if colon and not (count.isdecimal() and 0 < int(count) <= _MAX_SYNTHETIC_COUNT):
        raise UserError(
            f"--dataset {source}: a number of galaxies up to {_MAX_SYNTHETIC_COUNT:,} must follow the colon, as in "
            "synthetic:4000"
        )
    return int(count) if colon else DEFAULT_SYNTHETIC_COUNT


def open_synthetic(count: int, size: int) -> RawDataset:
    step = max(1, BATCH_BYTES // (3 * size * size))
    starts = range(0, count, step)
    batches = ((synthetic.render(np.arange(start, min(start + step, count)), size), {}) for start in starts)
    return RawDataset(GALAXY10_CLASSES, count, size, synthetic.catalogue(count, size), batches)


# ----------------------------------------------------------------------------------------------------------------- HDF5


def open_hdf5(path: Path) -> RawDataset:
    """Open a file in the schema of Galaxy10_DECals.h5 and check its content."""
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        if "truncated" in str(error):
            raise UserError(f"{path}: the file is truncated: copy or download it again") from error
        raise UserError(f"{path}: not an HDF5 file; {_HDF5_SCHEMA}") from error
    try:
        return _read_hdf5_catalogue(path, file)
    except UserError:
        raise
    except (OSError, RuntimeError, KeyError, TypeError, ValueError) as error:  # what h5py makes of damaged metadata
        raise UserError(f"{path}: cannot be read ({first_line(error)}): copy or download the file again") from error


def _read_hdf5_catalogue(path: Path, file: h5py.File) -> RawDataset:
    images = _hdf5_dataset(path, file, "images")
    if images.ndim != 4 or images.shape[1] != images.shape[2] or images.shape[3] != 3:
        raise UserError(f"{path}: `images` has shape {images.shape}; {_HDF5_SCHEMA}")
    if images.dtype != np.uint8:
        raise UserError(f"{path}: `images` has dtype {images.dtype}; {_HDF5_SCHEMA}")
    count, size = images.shape[:2]
    if count == 0:
        raise UserError(f"{path}: the file is empty: `images` has no rows")
    if not 1 <= size <= MAX_IMAGE_SIZE:
        raise UserError(
            f"{path}: the images are {size} x {size} pixels; crop or resize them to between 1 and {MAX_IMAGE_SIZE}"
        )
    _check_storage(path, "images", images)
    columns = {}
    for name, key in {"label": "ans", **SKY_COLUMNS}.items():
        if name != "label" and file.get(key, getlink=True) is None:
            continue
        values = _hdf5_dataset(path, file, key)
        if values.shape != (count,) or values.dtype.kind not in "iuf":
            raise UserError(f"{path}: `{key}` is {values.dtype} {values.shape}, but there are {count} images")
        _check_storage(path, key, values)
        columns[name] = values[()]
    check_labels(path, columns["label"], len(GALAXY10_CLASSES))
    columns = checked_sky(path, columns)
    return RawDataset(GALAXY10_CLASSES, count, size, columns, _hdf5_batches(images), _hdf5_object_id(path, file, count))


def _hdf5_object_id(path: Path, file: h5py.File, count: int) -> list[str] | None:
    """The names in `object_id`, texts or integers, or None if there is no such data set."""
    if file.get("object_id", getlink=True) is None:
        return None
    values = _hdf5_dataset(path, file, "object_id")
    is_text = h5py.check_string_dtype(values.dtype) is not None
    if values.shape != (count,) or not (is_text or values.dtype.kind in "iu"):
        raise UserError(
            f"{path}: `object_id` is {values.dtype} {values.shape}; it must be {count} texts or integers, one per image"
        )
    _check_storage(path, "object_id", values)
    return values.asstr(errors="replace")[()].tolist() if is_text else list(map(str, values[()].tolist()))


def _hdf5_dataset(path: Path, file: h5py.File, key: str) -> h5py.Dataset:
    """Return the data set `key`, whose values must all be in this file.

    Soft links are followed here, one step at a time, because h5py would open the file behind an external link.
    """
    found, parts, links = file, key.split("/"), 0
    while parts:
        part = parts.pop(0)
        link = found.get(part, getlink=True) if isinstance(found, h5py.Group) else None
        if link is None:
            keys = ", ".join(itertools.islice(file, 20)) or "nothing"
            dangling = f" (it links to {part}, which is not there)" if links else ""
            raise UserError(f"{path}: no key `{key}`{dangling} (it has: {keys}); {_HDF5_SCHEMA}")
        if isinstance(link, h5py.SoftLink):
            links += 1
            if links > _MAX_LINKS:
                raise UserError(f"{path}: `{key}` is a link that leads to itself; {_HDF5_SCHEMA}")
            found = file if link.path.startswith("/") else found
            parts = [name for name in link.path.split("/") if name not in ("", ".")] + parts
        elif isinstance(link, h5py.HardLink):
            found = found[part]
        else:
            raise UserError(f"{path}: `{key}` is a link to another file: copy the data into this file (h5repack)")
    if not isinstance(found, h5py.Dataset) or found.shape is None:
        raise UserError(f"{path}: `{key}` is not a data set with values; {_HDF5_SCHEMA}")
    if found.is_virtual or found.external:
        raise UserError(f"{path}: the values of `{key}` are in other files: copy the data into this file (h5repack)")
    return found


def _check_storage(path: Path, key: str, values: h5py.Dataset) -> None:
    """Compare what a data set declares with what is stored of it: HDF5 makes up what was never written."""
    stored = values.id.get_storage_size()
    if values.nbytes > MAX_COMPRESSION * stored:
        raise UserError(
            f"{path}: `{key}` declares {values.nbytes:,} bytes, but {stored:,} are stored: the file was not completely "
            "written; copy or create it again"
        )
    if values.chunks is None:
        return
    chunk_bytes = math.prod(values.chunks) * values.dtype.itemsize
    if chunk_bytes > _MAX_CHUNK_BYTES:
        raise UserError(f"{path}: `{key}` has chunks of {chunk_bytes:,} bytes: write it with one image per chunk")
    expected = math.prod(-(-n // chunk) for n, chunk in zip(values.shape, values.chunks, strict=True))
    if values.id.get_num_chunks() < expected:
        raise UserError(
            f"{path}: only {values.id.get_num_chunks():,} of {expected:,} chunks of `{key}` were written: copy or "
            "create the file again"
        )


def _hdf5_batches(images: h5py.Dataset) -> Iterator[Batch]:
    """Yield batches whose length is a multiple of the chunk length, so that no chunk is decompressed twice."""
    chunk_length = images.chunks[0] if images.chunks else 1
    target_length = max(1, BATCH_BYTES // int(np.prod(images.shape[1:])))
    step = chunk_length * max(1, target_length // chunk_length)
    for start in range(0, len(images), step):
        try:
            yield images[start : start + step], {}
        except OSError:
            yield _readable_chunks(images, start, min(start + step, len(images)), chunk_length)


def _readable_chunks(images: h5py.Dataset, start: int, stop: int, chunk_length: int) -> Batch:
    """The rows from `start` to `stop`, chunk by chunk, with a reason for the rows of chunks that cannot be read."""
    pixels = np.zeros((stop - start, *images.shape[1:]), np.uint8)
    problems = {}
    for first in range(start, stop, chunk_length):
        rows = slice(first - start, min(first + chunk_length, stop) - start)
        try:
            pixels[rows] = images[first : first + chunk_length]
        except OSError as error:
            reason = f"cannot be read ({first_line(error)[:200]}): copy or download the file again"
            problems |= dict.fromkeys(range(rows.start, rows.stop), reason)
    return pixels, problems


# ----------------------------------------------------------------------------------------------- labels and coordinates


def checked_sky(
    where: str | Path, columns: dict[str, np.ndarray], names: dict[str, str] = SKY_COLUMNS
) -> dict[str, np.ndarray]:
    """Return the columns with valid coordinates, or without any: one of `ra` and `dec` alone is left out.

    Args:
        where: the file or flag, for messages.
        columns: by the field of `Galaxies`.
        names: what the columns are called in the source, for messages.

    Raises:
        UserError: a coordinate or pixel scale is impossible. NaN is not: it says that the value is not known.
    """
    columns = dict(columns)
    for name, other in (("ra", "dec"), ("dec", "ra")):
        if name in columns and other not in columns:
            logger.warning("%s: `%s` is not used, because there is no `%s`: overlaps are not known", where, name, other)
            del columns[name]
    for name, (lowest, highest, words) in _SKY_RANGES.items():
        if name not in columns:
            continue
        values = np.asarray(columns[name], np.float64)
        wrong = np.flatnonzero(~np.isnan(values) & ~((values >= lowest) & (values <= highest)))
        if len(wrong):
            raise UserError(
                f"{where}: row {wrong[0]} has `{names[name]}` {values[wrong[0]]:g}; it must be {words}, or NaN "
                "if it is not known"
            )
        columns[name] = np.where(values < 0, values + 360, values) if name == "ra" else values
    return columns


def check_labels(source: str | Path, labels: np.ndarray, num_classes: int) -> None:
    wrong = np.flatnonzero((labels < 0) | (labels >= num_classes) | (labels != np.floor(labels)))
    if len(wrong):
        raise UserError(
            f"{source}: row {wrong[0]} has label {labels[wrong[0]]}; labels must be integers from 0 to "
            f"{num_classes - 1}"
        )

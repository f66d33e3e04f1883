"""Any source of galaxy images, decoded once into one memory-mapped uint8 array and a catalogue.

Training touches every image hundreds of times in random order, and the survey's file is compressed, so reading it row
by row would cost more than the model. Every source is therefore decoded once, in the order of its rows, into the cache
folder, as `<fingerprint>/<size>.npy` (pixels) and `<size>.npz` (catalogue); `source.json` says what it is. Later runs
open these in milliseconds, and the pixels are shared between all processes of a machine by its page cache. Folders
are named by the content's SHA-256, so a changed file is decoded anew and a moved or copied one is recognised.

This module does not import torch: a catalogue can be looked at on a login node.
"""

import glob
import hashlib
import json
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
from filelock import FileLock
from PIL import Image
from tqdm import tqdm

from galaxy_mae import synthetic
from galaxy_mae.atomic import atomic_file, write_json
from galaxy_mae.download import cache_folder, content_fingerprint, find_galaxy10
from galaxy_mae.errors import UserError, means_full_disk

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
DEFAULT_SYNTHETIC = 4000  # galaxies; `synthetic:COUNT` takes another number
SKY_COLUMNS = ("ra", "dec", "redshift", "pixel_scale")
_COLUMN_IN_FILE = {"ra": "ra", "dec": "dec", "redshift": "redshift", "pixel_scale": "pxscale"}
_HDF5_SUFFIXES = (".h5", ".hdf5", ".hdf")
_MOST_CLASSES = 1000
_BATCH_BYTES = 16 << 20  # images decoded at a time: the resident memory of decoding is a few times this


@dataclass(frozen=True)
class Galaxies:
    """A decoded source. All arrays have one entry a row of the source, in its order.

    Attributes:
        name: what `--dataset` said.
        fingerprint: hex SHA-256 of the source's content.
        class_names: names of the classes 0, 1, ...; empty where the source has no labels.
        pixels: (N, S, S, 3) uint8, read-only memory map; S is the smaller of the size asked for and the native one.
        native_size: width and height of the source's images in pixels.
        label: (N,) int64, or None.
        ra, dec: (N,) float64 degrees, J2000, or None.
        redshift: (N,) float64, NaN where unknown, or None.
        pixel_scale: (N,) float64 arcsec per pixel of the native image, or None.
        image_hash: (N,) uint64; equal where the native pixels are.
        constant: (N,) bool; true where an image holds one single value.
        source_test: (N,) bool; true in the source's own test set, all false where it has none.
        channel_sum, channel_square_sum: (N, 3) int64, sums over the pixels of each row and of their squares.
    """

    name: str
    fingerprint: str
    class_names: tuple[str, ...]
    pixels: np.ndarray
    native_size: int
    label: np.ndarray | None
    ra: np.ndarray | None
    dec: np.ndarray | None
    redshift: np.ndarray | None
    pixel_scale: np.ndarray | None
    image_hash: np.ndarray
    constant: np.ndarray
    source_test: np.ndarray
    channel_sum: np.ndarray
    channel_square_sum: np.ndarray

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def image_size(self) -> int:
        """Width and height of `pixels`."""
        return self.pixels.shape[1]

    def channel_statistics(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation of each colour over the given rows, (3,) float64 each, in units of 0 to 1."""
        count = len(rows) * self.image_size**2
        mean = self.channel_sum[rows].sum(axis=0) / count
        variance = self.channel_square_sum[rows].sum(axis=0) / count - mean**2
        return mean / 255, np.sqrt(variance) / 255


@dataclass
class _Opened:
    """A source whose rows are known and whose images are still to be decoded, in order, by `batches`."""

    class_names: tuple[str, ...]
    count: int
    native_size: int
    columns: dict[str, np.ndarray]  # any of label, ra, dec, redshift, pixel_scale, source_test
    batches: Iterator[np.ndarray]  # (b, native_size, native_size, 3) uint8


def open_galaxies(source: str, image_size: int | None = None) -> Galaxies:
    """Open a source, decoding it first if this was never done.

    Args:
        source: `galaxy10`; `synthetic` or `synthetic:COUNT`; the path of an HDF5 file in Galaxy10's schema, of a
            Parquet file, or of a folder of Parquet files or of images in one folder a class; or a dataset's id on
            the Hugging Face Hub.
        image_size: where smaller than the source's images, these are area-averaged to it; None keeps their size.

    Raises:
        UserError: no such source, no network, or a file that does not hold what it should.
    """
    fingerprint, opener = _identify(source, image_size)
    folder = cache_folder() / fingerprint[:16]
    if _stored_size(folder, image_size) is None:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock"):  # several tasks of one array start at once: one decodes, the others wait
            if _stored_size(folder, image_size) is None:
                try:
                    _decode(source, opener(), folder, image_size)
                except OSError as error:
                    if not means_full_disk(error):
                        raise
                    raise UserError(
                        f"{folder.parent}: the disk or quota is full, and the decoded images do not fit: "
                        "free some space, or set GALAXY_MAE_CACHE to a folder elsewhere"
                    ) from error
    return _load(source, fingerprint, folder, _stored_size(folder, image_size))


def _identify(source: str, image_size: int | None):
    """Tell what kind of source this is: its fingerprint and a function that opens it."""
    if source == "galaxy10":
        path = find_galaxy10()
        return content_fingerprint([path]), lambda: _open_hdf5(path)
    if source.split(":")[0] == "synthetic":
        count = _synthetic_count(source)
        size = image_size or 256
        drawn_by = content_fingerprint([Path(synthetic.__file__)])
        fingerprint = hashlib.sha256(f"{drawn_by} {count} {size}".encode()).hexdigest()
        return fingerprint, lambda: _open_synthetic(count, size)
    path = Path(source).expanduser()
    if path.is_file() and path.suffix.lower() == ".parquet":
        literal = glob.escape(str(path))  # the library takes brackets in a path for a pattern
        return content_fingerprint([path]), lambda: _open_images(
            source, _load_dataset(source, "parquet", data_files=literal)
        )
    if path.is_file():
        return content_fingerprint([path]), lambda: _open_hdf5(path)
    if path.is_dir():
        files = sorted(f for f in path.rglob("*") if f.is_file() and not f.name.startswith("."))
        if not files:
            raise UserError(f"--dataset {source}: the folder is empty; it should hold Parquet files or images")
        return content_fingerprint(files, root=path), lambda: _open_images(
            source, _load_dataset(source, glob.escape(str(path)))
        )
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source) and path.suffix.lower() not in (*_HDF5_SUFFIXES, ".parquet"):
        dataset = _load_dataset(source, source)
        # The library's own fingerprint covers the files' revision and the way they were read.
        parts = " ".join(f"{split} {part._fingerprint}" for split, part in sorted(dataset.items()))
        return hashlib.sha256(parts.encode()).hexdigest(), lambda: _open_images(source, dataset)
    raise UserError(
        f"--dataset {source}: no such file or folder; give a path that exists, galaxy10, synthetic, or a Hub id"
    )


# ---------------------------------------------------------------------------------------------- the kinds of sources


def _synthetic_count(source: str) -> int:
    _, colon, count = source.partition(":")
    if colon and not (count.isdigit() and int(count) > 0):
        raise UserError(f"--dataset {source}: after the colon stands a number of galaxies, as in synthetic:4000")
    return int(count) if colon else DEFAULT_SYNTHETIC


def _open_synthetic(count: int, size: int) -> _Opened:
    step = max(1, _BATCH_BYTES // (3 * size * size))
    batches = (synthetic.draw(np.arange(start, min(start + step, count)), size) for start in range(0, count, step))
    return _Opened(GALAXY10_CLASSES, count, size, synthetic.catalogue(count, size), batches)


def _open_hdf5(path: Path) -> _Opened:
    """Open a file in the schema of Galaxy10_DECals.h5, checking all that it must hold."""
    mend = "it should be an HDF5 file with `images` (N, S, S, 3) uint8 and `ans` (N,), like Galaxy10_DECals.h5"
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        if "truncated" in str(error):
            raise UserError(f"{path}: the file is truncated: copy or download it again") from error
        raise UserError(f"{path}: not an HDF5 file; {mend}") from error
    missing = [key for key in ("images", "ans") if key not in file]
    if missing:
        raise UserError(f"{path}: no key `{missing[0]}` (it has: {', '.join(file) or 'nothing'}); {mend}")
    images = file["images"]
    if images.ndim != 4 or images.shape[1] != images.shape[2] or images.shape[3] != 3:
        raise UserError(f"{path}: `images` has shape {images.shape}; {mend}")
    if images.dtype != np.uint8:
        raise UserError(f"{path}: `images` has dtype {images.dtype}; {mend}")
    if len(images) == 0:
        raise UserError(f"{path}: the file is empty: `images` has no rows")
    columns = {"label": np.asarray(file["ans"])}
    columns |= {ours: np.asarray(file[key]) for ours, key in _COLUMN_IN_FILE.items() if key in file}
    for name, values in columns.items():
        if values.shape != (len(images),) or not np.issubdtype(values.dtype, np.number):
            key = _COLUMN_IN_FILE.get(name, "ans")
            raise UserError(f"{path}: `{key}` is {values.dtype} {values.shape}, but there are {len(images)} images")
    _check_labels(path, columns["label"], len(GALAXY10_CLASSES))
    return _Opened(GALAXY10_CLASSES, len(images), images.shape[1], columns, _hdf5_batches(path, images))


def _hdf5_batches(path: Path, images: h5py.Dataset) -> Iterator[np.ndarray]:
    """Yield the images in slabs that hold whole chunks, so that none is decompressed twice."""
    rows_a_chunk = images.chunks[0] if images.chunks else 1
    wanted = max(1, _BATCH_BYTES // int(np.prod(images.shape[1:])))
    step = rows_a_chunk * max(1, wanted // rows_a_chunk)
    for start in range(0, len(images), step):
        try:
            yield images[start : start + step]
        except OSError as error:
            raise UserError(
                f"{path}: rows {start} to {start + step} cannot be read: copy or download it again"
            ) from error


def _load_dataset(source: str, what: str, **options):
    """`datasets.load_dataset`, quiet, with its failures told in one line."""
    import datasets  # slow to import, and most runs do not need it

    quiet = datasets.utils.logging
    verbosity = quiet.get_verbosity()
    quiet.set_verbosity_error()
    try:
        return datasets.load_dataset(what, **options)
    except Exception as error:  # the library raises whatever its readers and the network raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if Path(source).exists():
            raise UserError(
                f"--dataset {source}: cannot be read as Parquet or as a folder of images ({reason})"
            ) from error
        raise UserError(
            f"--dataset {source}: neither a path here nor a dataset that could be had from the Hugging Face Hub "
            f"({reason}); check the spelling and the network, or give a local file"
        ) from error
    finally:
        quiet.set_verbosity(verbosity)


def _open_images(source: str, splits) -> _Opened:
    """Open a `datasets.DatasetDict` that has a column of images and, maybe, labels and coordinates."""
    import datasets

    names = sorted(splits, key=lambda split: (split == "test", split))
    table = datasets.concatenate_datasets([splits[name] for name in names])
    if len(table) == 0:
        raise UserError(f"--dataset {source}: the dataset is empty")
    image_column = _image_column(source, table)
    try:
        table = table.cast_column(image_column, datasets.Image())
    except Exception as error:  # pyarrow's own types
        raise UserError(f"--dataset {source}: its column `{image_column}` does not hold images") from error
    columns = {ours: _numbers(source, table, key) for ours, key in _COLUMN_IN_FILE.items() if key in table.column_names}
    columns["source_test"] = np.concatenate([np.full(len(splits[name]), name == "test") for name in names])
    class_names: tuple[str, ...] = ()
    label_column = next((name for name in ("label", "labels", "ans") if name in table.column_names), None)
    if label_column:
        label, class_names = _labels_and_names(source, table, label_column)
        if label is not None:
            columns["label"] = label
    size = _decode_image(source, table, image_column, 0).width
    return _Opened(class_names, len(table), size, columns, _image_batches(source, table, image_column, size))


def _image_column(source: str, table) -> str:
    """The name of the column that holds the images: declared so, or (plain Parquet) called so."""
    import datasets

    declared = [name for name, feature in table.features.items() if isinstance(feature, datasets.Image)]
    called = [name for name in ("image", "img", "images") if name in table.column_names]
    if not declared + called:
        raise UserError(f"--dataset {source}: no column of images (it has: {', '.join(table.column_names)})")
    return (declared + called)[0]


def _numbers(source: str, table, key: str) -> np.ndarray:
    try:
        return np.asarray(table[key], dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise UserError(f"--dataset {source}: its column `{key}` does not hold numbers (degrees, arcsec)") from error


def _labels_and_names(source: str, table, column: str) -> tuple[np.ndarray | None, tuple[str, ...]]:
    """Labels as whole numbers and the names of the classes: the source's own, or, for ten classes, Galaxy10's.

    Strings are classes by their names in alphabetical order. Labels that are partly missing, or no whole numbers, are
    left aside with a line that says so: pre-training needs none.
    """
    values, feature = np.asarray(table[column]), table.features[column]
    if values.dtype.kind in "UT":
        names, values = np.unique(values, return_inverse=True)
        class_names = tuple(map(str, names))
    elif values.dtype.kind not in "iu":
        logger.warning("%s: its labels are missing in places, or no whole numbers: they are not used", source)
        return None, ()
    elif getattr(feature, "names", None):
        class_names = tuple(feature.names)
    elif len(np.unique(values)) == len(GALAXY10_CLASSES) == values.max() + 1:
        class_names = GALAXY10_CLASSES
    else:
        class_names = tuple(f"class {i}" for i in range(min(int(values.max()), _MOST_CLASSES) + 1))
    if len(class_names) > _MOST_CLASSES:
        raise UserError(
            f"--dataset {source}: more than {_MOST_CLASSES} classes in column `{column}`: these are no class labels; "
            "rename that column"
        )
    _check_labels(source, values, len(class_names))
    return values.astype(np.int64), class_names


def _check_labels(source: str | Path, labels: np.ndarray, classes: int) -> None:
    wrong = np.flatnonzero((labels < 0) | (labels >= classes) | (labels != np.floor(labels)))
    if len(wrong):
        raise UserError(f"{source}: row {wrong[0]} has label {labels[wrong[0]]}; labels go from 0 to {classes - 1}")


def _decode_image(source: str, table, column: str, row: int) -> Image.Image:
    """The image of a row in RGB; only images of 8 bits a channel, because PIL clips all others."""
    try:
        image = table[row][column]
        if image.mode == "F" or image.mode.startswith("I"):
            raise UserError(
                f"--dataset {source}: the image of row {row} has more than 8 bits a channel (mode {image.mode}): "
                "scale the images to 0-255 first, by a stretch that suits them"
            )
        return image.convert("RGB")
    except (OSError, AttributeError, SyntaxError) as error:
        raise UserError(f"--dataset {source}: the image of row {row} cannot be decoded") from error


def _image_batches(source: str, table, column: str, size: int) -> Iterator[np.ndarray]:
    step = max(1, _BATCH_BYTES // (3 * size * size))
    for start in range(0, len(table), step):
        batch = np.empty((min(step, len(table) - start), size, size, 3), np.uint8)
        for i in range(len(batch)):
            image = _decode_image(source, table, column, start + i)
            if image.size != (size, size):
                raise UserError(
                    f"--dataset {source}: the image of row {start + i} is {image.width} x {image.height} and the "
                    f"first is {size} wide; images must be square and of one size: crop or resize them first"
                )
            batch[i] = image
        yield batch


# ------------------------------------------------------------------------------------------------- decoding and cache


def _stored_size(folder: Path, image_size: int | None) -> int | None:
    """The size under which the cache holds what is asked for, or None if it does not hold it yet."""
    try:
        native = json.loads((folder / "source.json").read_text())["native_size"]
    except FileNotFoundError:
        return None
    size = min(image_size or native, native)
    return size if (folder / f"{size}.npz").exists() else None


def _decode(source: str, opened: _Opened, folder: Path, image_size: int | None) -> None:
    """Write pixels and catalogue into the cache; the catalogue last, because its presence says that all is there."""
    size = min(image_size or opened.native_size, opened.native_size)
    shape = (opened.count, size, size, 3)
    image_hash = np.empty(opened.count, np.uint64)
    constant = np.empty(opened.count, bool)
    sums = np.empty((2, opened.count, 3), np.int64)
    progress = tqdm(total=opened.count, desc=f"decoding {source}", unit=" images", leave=False)
    with atomic_file(folder / f"{size}.npy") as aside, aside.open("wb") as out, progress:
        # Written, not memory-mapped: a full disk is then an error that can be told instead of a bus error.
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(out, header)
        start = 0
        for batch in opened.batches:
            rows = slice(start, start + len(batch))
            image_hash[rows] = [_hash(image) for image in batch]
            constant[rows] = batch.reshape(len(batch), -1).min(axis=1) == batch.reshape(len(batch), -1).max(axis=1)
            stored = batch if size == opened.native_size else area_average(batch, size)
            for i, image in enumerate(stored, start):
                sums[:, i] = _channel_sums(image)
            out.write(stored.data)
            start += len(batch)
            progress.update(len(batch))
        if start != opened.count:
            raise UserError(f"--dataset {source}: {opened.count} rows were announced and {start} images found")
    columns = dict(opened.columns)
    columns.setdefault("source_test", np.zeros(opened.count, bool))
    with atomic_file(folder / f"{size}.npz") as aside:
        np.savez(
            aside,
            image_hash=image_hash,
            constant=constant,
            channel_sum=sums[0],
            channel_square_sum=sums[1],
            **columns,
        )
    about = {"source": source, "native_size": opened.native_size, "class_names": list(opened.class_names)}
    write_json(folder / "source.json", about)


def _load(source: str, fingerprint: str, folder: Path, size: int) -> Galaxies:
    about = json.loads((folder / "source.json").read_text())
    with np.load(folder / f"{size}.npz", allow_pickle=False) as stored:
        columns = {name: stored[name] for name in stored.files}
    label = columns.pop("label", None)
    return Galaxies(
        name=source,
        fingerprint=fingerprint,
        class_names=tuple(about["class_names"]),
        pixels=np.load(folder / f"{size}.npy", mmap_mode="r", allow_pickle=False),
        native_size=about["native_size"],
        label=None if label is None else label.astype(np.int64),
        **{name: columns.pop(name).astype(np.float64) if name in columns else None for name in SKY_COLUMNS},
        **columns,
    )


def _hash(image: np.ndarray) -> int:
    return int.from_bytes(hashlib.sha256(image.data).digest()[:8], "little")


def _channel_sums(image: np.ndarray) -> np.ndarray:
    """Sums over the pixels of an (S, S, 3) uint8 image and of their squares, (2, 3) int64, exact."""
    values = image.reshape(len(image), -1).astype(np.float64)  # whole numbers, far below 2**53
    ones = np.ones(len(image))
    columns = np.stack([ones @ values, ones @ values**2])  # (2, S * 3)
    return columns.reshape(2, -1, 3).sum(axis=1).astype(np.int64)


def area_average(images: np.ndarray, size: int) -> np.ndarray:
    """Average (b, S, S, 3) uint8 images over the area of each new pixel, to (b, size, size, 3) uint8.

    Exact also where S is no multiple of size: Pillow's box filter takes an old pixel wholly or not at all.
    """
    old = images.shape[1]
    edges = np.arange(size + 1) * old / size
    pixel = np.arange(old)
    overlap = np.minimum(edges[1:, None], pixel + 1) - np.maximum(edges[:-1, None], pixel)
    weights = (overlap.clip(0) * size / old).astype(np.float32)  # (size, S): share of each old pixel in each new one
    rows = weights @ images.reshape(len(images), old, old * 3).astype(np.float32)  # (b, size, S * 3)
    average = weights @ rows.reshape(len(images), size, old, 3)  # (b, size, size, 3)
    return np.rint(average).astype(np.uint8)

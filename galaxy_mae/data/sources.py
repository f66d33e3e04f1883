"""Any source of galaxy images, cached as one memory-mapped uint8 array and a catalogue.

Training reads every image hundreds of times in random order, and the survey's file is compressed. Reading it image by
image would cost more time than the model. Every source is therefore ingested once, in the order of its rows, into the
cache folder: `<fingerprint>/<size>.npy` holds the pixels, `<size>.npz` the catalogue, and `source.json` describes the
source. Later runs open these files in milliseconds, and the page cache shares the pixels between all processes of a
machine. A cache entry is named by the SHA-256 of the content, so a changed file is ingested again and a moved or copied
file is recognized.

This module does not import torch, so a catalogue can be inspected on a login node.
"""

import glob
import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
from filelock import FileLock
from PIL import Image
from tqdm import tqdm

from galaxy_mae.data import synthetic
from galaxy_mae.data.download import cache_folder, content_fingerprint, find_galaxy10
from galaxy_mae.errors import UserError, first_line, is_disk_full
from galaxy_mae.files import atomic_file, write_json

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
DEFAULT_SYNTHETIC_COUNT = 4000  # galaxies; `synthetic:COUNT` sets another number
_SKY_COLUMNS = {"ra": "ra", "dec": "dec", "pixel_scale": "pxscale"}  # field of `Galaxies`: column in the source
_HDF5_SUFFIXES = (".h5", ".hdf5", ".hdf")
_CACHE_FORMAT = 2  # changes with the columns of the cached catalogue
_MAX_CLASSES = 1000
_BATCH_BYTES = 16 << 20  # pixels ingested at once; the process needs a few times this much memory


@dataclass(frozen=True)
class Galaxies:
    """A cached dataset. All arrays have one entry per row of the source, in its order.

    Attributes:
        name: the value of `--dataset`.
        fingerprint: hex SHA-256 of the source's content.
        class_names: names of the classes 0, 1, ...; empty if the source has no labels.
        pixels: (N, S, S, 3) uint8, read-only memory map; S is the smaller of the requested and the native size.
        native_size: width and height of the source's images in pixels.
        label: (N,) int64, or None.
        ra, dec: (N,) float64 degrees, J2000, or None.
        pixel_scale: (N,) float64 arcsec per pixel of the native image, or None.
        image_hash: (N,) uint64; equal for images with equal native pixels.
        blank: (N,) bool; True for an image in which all values are equal.
        predefined_test: (N,) bool; True in the source's own test split; all False if it has none.
        channel_sum, channel_square_sum: (N, 3) int64, sums over each image's pixel values and over their squares.
    """

    name: str
    fingerprint: str
    class_names: tuple[str, ...]
    pixels: np.ndarray
    native_size: int
    label: np.ndarray | None
    ra: np.ndarray | None
    dec: np.ndarray | None
    pixel_scale: np.ndarray | None
    image_hash: np.ndarray
    blank: np.ndarray
    predefined_test: np.ndarray
    channel_sum: np.ndarray
    channel_square_sum: np.ndarray

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def image_size(self) -> int:
        """Width and height of `pixels`."""
        return self.pixels.shape[1]

    def channel_statistics(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation of each channel over the given images, (3,) float64 each, scaled to 0-1."""
        count = len(indices) * self.image_size**2
        mean = self.channel_sum[indices].sum(axis=0) / count
        variance = self.channel_square_sum[indices].sum(axis=0) / count - mean**2
        return mean / 255, np.sqrt(variance) / 255


@dataclass
class _RawDataset:
    """An opened source before ingestion: its catalogue, and an iterator that reads its images in order."""

    class_names: tuple[str, ...]
    count: int
    native_size: int
    columns: dict[str, np.ndarray]  # any of label, ra, dec, pixel_scale, predefined_test
    batches: Iterator[np.ndarray]  # (b, native_size, native_size, 3) uint8


def open_galaxies(source: str, image_size: int | None = None) -> Galaxies:
    """Open a source. The first time, it is ingested into the cache.

    Args:
        source: `galaxy10`; `synthetic` or `synthetic:COUNT`; the path of an HDF5 file in Galaxy10's schema, of a
            Parquet file, of a folder of Parquet files, or of a folder with one subfolder of images per class; or the id
            of a dataset on the Hugging Face Hub.
        image_size: images larger than this are area-averaged to it; None keeps their size.

    Raises:
        UserError: there is no such source, the network fails, or a file does not have the expected content.
    """
    fingerprint, opener = _identify(source, image_size)
    folder = cache_folder() / f"{fingerprint[:16]}_format{_CACHE_FORMAT}"
    if _stored_size(folder, image_size) is None:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock"):  # tasks of one array start together: one ingests, the others wait
            if _stored_size(folder, image_size) is None:
                try:
                    _ingest(source, opener(), folder, image_size)
                except OSError as error:
                    if not is_disk_full(error):
                        raise
                    raise UserError(
                        f"{folder.parent}: the disk or quota is full, and the images do not fit: "
                        "free some space, or set GALAXY_MAE_CACHE to a folder on another disk"
                    ) from error
    return _load(source, fingerprint, folder, _stored_size(folder, image_size))


def _identify(source: str, image_size: int | None) -> tuple[str, Callable[[], _RawDataset]]:
    """Return the fingerprint of a source and a function that opens it."""
    if source == "galaxy10":
        path = find_galaxy10()
        return content_fingerprint([path]), lambda: _open_hdf5(path)
    if source.split(":")[0] == "synthetic":
        count = _synthetic_count(source)
        size = image_size or 256
        code_hash = content_fingerprint([Path(synthetic.__file__)])
        fingerprint = hashlib.sha256(f"{code_hash} {count} {size}".encode()).hexdigest()
        return fingerprint, lambda: _open_synthetic(count, size)
    path = Path(source).expanduser()
    if path.is_file() and path.suffix.lower() == ".parquet":
        escaped = glob.escape(str(path))  # the library interprets brackets in a path as a pattern
        return content_fingerprint([path]), lambda: _open_images(
            source, _load_dataset(source, "parquet", data_files=escaped)
        )
    if path.is_file():
        return content_fingerprint([path]), lambda: _open_hdf5(path)
    if path.is_dir():
        files = sorted(f for f in path.rglob("*") if f.is_file() and not f.name.startswith("."))
        if not files:
            raise UserError(f"--dataset {source}: the folder is empty; it should contain Parquet files or images")
        return content_fingerprint(files, root=path), lambda: _open_images(
            source, _load_dataset(source, glob.escape(str(path)))
        )
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source) and path.suffix.lower() not in (*_HDF5_SUFFIXES, ".parquet"):
        dataset = _load_dataset(source, source)
        # The library's own fingerprint covers the revision of the files and the reading options.
        parts = " ".join(f"{split} {part._fingerprint}" for split, part in sorted(dataset.items()))
        return hashlib.sha256(parts.encode()).hexdigest(), lambda: _open_images(source, dataset)
    raise UserError(
        f"--dataset {source}: no such file or folder; use an existing path, galaxy10, synthetic, or a Hub id"
    )


# ----------------------------------------------------------------------------------------------------- kinds of sources


def _synthetic_count(source: str) -> int:
    _, colon, count = source.partition(":")
    if colon and not (count.isdigit() and int(count) > 0):
        raise UserError(f"--dataset {source}: a number of galaxies must follow the colon, as in synthetic:4000")
    return int(count) if colon else DEFAULT_SYNTHETIC_COUNT


def _open_synthetic(count: int, size: int) -> _RawDataset:
    step = max(1, _BATCH_BYTES // (3 * size * size))
    batches = (synthetic.render(np.arange(start, min(start + step, count)), size) for start in range(0, count, step))
    return _RawDataset(GALAXY10_CLASSES, count, size, synthetic.catalogue(count, size), batches)


def _open_hdf5(path: Path) -> _RawDataset:
    """Open a file in the schema of Galaxy10_DECals.h5 and check its content."""
    expected = "it should be an HDF5 file with `images` (N, S, S, 3) uint8 and `ans` (N,), like Galaxy10_DECals.h5"
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        if "truncated" in str(error):
            raise UserError(f"{path}: the file is truncated: copy or download it again") from error
        raise UserError(f"{path}: not an HDF5 file; {expected}") from error
    missing = [key for key in ("images", "ans") if key not in file]
    if missing:
        raise UserError(f"{path}: no key `{missing[0]}` (it has: {', '.join(file) or 'nothing'}); {expected}")
    images = file["images"]
    if images.ndim != 4 or images.shape[1] != images.shape[2] or images.shape[3] != 3:
        raise UserError(f"{path}: `images` has shape {images.shape}; {expected}")
    if images.dtype != np.uint8:
        raise UserError(f"{path}: `images` has dtype {images.dtype}; {expected}")
    if len(images) == 0:
        raise UserError(f"{path}: the file is empty: `images` has no rows")
    columns = {"label": np.asarray(file["ans"])}
    columns |= {name: np.asarray(file[key]) for name, key in _SKY_COLUMNS.items() if key in file}
    for name, values in columns.items():
        if values.shape != (len(images),) or not np.issubdtype(values.dtype, np.number):
            key = _SKY_COLUMNS.get(name, "ans")
            raise UserError(f"{path}: `{key}` is {values.dtype} {values.shape}, but there are {len(images)} images")
    _check_labels(path, columns["label"], len(GALAXY10_CLASSES))
    return _RawDataset(GALAXY10_CLASSES, len(images), images.shape[1], columns, _hdf5_batches(path, images))


def _hdf5_batches(path: Path, images: h5py.Dataset) -> Iterator[np.ndarray]:
    """Yield batches whose length is a multiple of the chunk length, so that no chunk is decompressed twice."""
    chunk_length = images.chunks[0] if images.chunks else 1
    target_length = max(1, _BATCH_BYTES // int(np.prod(images.shape[1:])))
    step = chunk_length * max(1, target_length // chunk_length)
    for start in range(0, len(images), step):
        try:
            yield images[start : start + step]
        except OSError as error:
            raise UserError(
                f"{path}: rows {start} to {start + step} cannot be read: copy or download the file again"
            ) from error


def _load_dataset(source: str, path: str, **options):
    """Call `datasets.load_dataset(path, **options)` silently. A failure becomes a `UserError` of one line."""
    import datasets  # slow to import, and most runs do not need it

    verbosity = datasets.utils.logging.get_verbosity()
    datasets.utils.logging.set_verbosity_error()
    try:
        return datasets.load_dataset(path, **options)
    except Exception as error:  # the library raises whatever its readers and the network raise
        if Path(source).exists():
            raise UserError(
                f"--dataset {source}: cannot be read as Parquet or as a folder of images ({first_line(error)})"
            ) from error
        raise UserError(
            f"--dataset {source}: there is no such file, and it cannot be loaded from the Hugging Face Hub "
            f"({first_line(error)}); check the spelling and the network, or use a local file"
        ) from error
    finally:
        datasets.utils.logging.set_verbosity(verbosity)


def _open_images(source: str, splits) -> _RawDataset:
    """Open a `datasets.DatasetDict` with a column of images and, optionally, labels and coordinates."""
    import datasets

    split_names = sorted(splits, key=lambda split: (split == "test", split))
    table = datasets.concatenate_datasets([splits[split] for split in split_names])
    if len(table) == 0:
        raise UserError(f"--dataset {source}: the dataset is empty")
    image_column = _image_column(source, table)
    try:
        table = table.cast_column(image_column, datasets.Image())
    except Exception as error:  # pyarrow's own types
        raise UserError(f"--dataset {source}: its column `{image_column}` does not contain images") from error
    columns = {name: _numbers(source, table, key) for name, key in _SKY_COLUMNS.items() if key in table.column_names}
    columns["predefined_test"] = np.concatenate([np.full(len(splits[split]), split == "test") for split in split_names])
    class_names: tuple[str, ...] = ()
    label_column = next((name for name in ("label", "labels", "ans") if name in table.column_names), None)
    if label_column:
        label, class_names = _labels_and_names(source, table, label_column)
        if label is not None:
            columns["label"] = label
    size = _decode_image(source, table, image_column, 0).width
    return _RawDataset(class_names, len(table), size, columns, _image_batches(source, table, image_column, size))


def _image_column(source: str, table) -> str:
    """Return the name of the image column: the declared one, or, in Parquet without such metadata, a usual name."""
    import datasets

    declared = [name for name, feature in table.features.items() if isinstance(feature, datasets.Image)]
    usual = [name for name in ("image", "img", "images") if name in table.column_names]
    if not declared + usual:
        raise UserError(f"--dataset {source}: no column of images (it has: {', '.join(table.column_names)})")
    return (declared + usual)[0]


def _numbers(source: str, table, key: str) -> np.ndarray:
    try:
        return np.asarray(table[key], dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise UserError(f"--dataset {source}: its column `{key}` must contain numbers (degrees, arcsec)") from error


def _labels_and_names(source: str, table, column: str) -> tuple[np.ndarray | None, tuple[str, ...]]:
    """Return integer labels and the names of the classes: the source's own names or, for ten classes, Galaxy10's.

    Strings become classes in alphabetical order. Labels that are partly missing or not integers are ignored with a
    warning, because pre-training does not need labels.
    """
    values, feature = np.asarray(table[column]), table.features[column]
    if values.dtype.kind in "UT":
        names, values = np.unique(values, return_inverse=True)
        class_names = tuple(map(str, names))
    elif values.dtype.kind not in "iu":
        logger.warning("%s: the labels are partly missing or not integers: they are not used", source)
        return None, ()
    elif getattr(feature, "names", None):
        class_names = tuple(feature.names)
    elif len(np.unique(values)) == len(GALAXY10_CLASSES) == values.max() + 1:
        class_names = GALAXY10_CLASSES
    else:
        class_names = tuple(f"class {i}" for i in range(min(int(values.max()), _MAX_CLASSES) + 1))
    if len(class_names) > _MAX_CLASSES:
        raise UserError(
            f"--dataset {source}: column `{column}` has more than {_MAX_CLASSES} classes, so it does not contain class "
            "labels; rename that column"
        )
    _check_labels(source, values, len(class_names))
    return values.astype(np.int64), class_names


def _check_labels(source: str | Path, labels: np.ndarray, num_classes: int) -> None:
    wrong = np.flatnonzero((labels < 0) | (labels >= num_classes) | (labels != np.floor(labels)))
    if len(wrong):
        raise UserError(
            f"{source}: row {wrong[0]} has label {labels[wrong[0]]}; labels must be integers from 0 to "
            f"{num_classes - 1}"
        )


def _decode_image(source: str, table, column: str, row: int) -> Image.Image:
    """Return the image of a row in RGB. More than 8 bits per channel are an error, because PIL would clip them."""
    try:
        image = table[row][column]
        if image.mode == "F" or image.mode.startswith("I"):
            raise UserError(
                f"--dataset {source}: the image of row {row} has more than 8 bits per channel (mode {image.mode}): "
                "convert the images to 0-255 first, with a suitable stretch"
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
                    f"--dataset {source}: the image of row {start + i} is {image.width} x {image.height} pixels, not "
                    f"{size} x {size}; crop or resize the images to squares of one size first"
                )
            batch[i] = image
        yield batch


# ---------------------------------------------------------------------------------------------------------------- cache


def _stored_size(folder: Path, image_size: int | None) -> int | None:
    """Return the size of the images in the cache for a requested size, or None if they are not cached yet."""
    try:
        native = json.loads((folder / "source.json").read_text())["native_size"]
    except FileNotFoundError:
        return None
    size = min(image_size or native, native)
    return size if (folder / f"{size}.npz").exists() else None


def _ingest(source: str, raw: _RawDataset, folder: Path, image_size: int | None) -> None:
    """Write a source into the cache. The catalogue follows the pixels, so if it exists, the pixels are complete."""
    size = min(image_size or raw.native_size, raw.native_size)
    shape = (raw.count, size, size, 3)
    image_hash = np.empty(raw.count, np.uint64)
    blank = np.empty(raw.count, bool)
    sums = np.empty((2, raw.count, 3), np.int64)
    progress = tqdm(total=raw.count, desc=f"caching {source}", unit=" images", leave=False)
    with atomic_file(folder / f"{size}.npy") as tmp_path, tmp_path.open("wb") as out, progress:
        # Written, not memory-mapped, so that a full disk raises an exception and not a bus error.
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(out, header)
        start = 0
        for batch in raw.batches:
            rows = slice(start, start + len(batch))
            image_hash[rows] = [_hash(image) for image in batch]
            blank[rows] = batch.reshape(len(batch), -1).min(axis=1) == batch.reshape(len(batch), -1).max(axis=1)
            stored = batch if size == raw.native_size else area_average(batch, size)
            for i, image in enumerate(stored, start):
                sums[:, i] = _channel_sums(image)
            out.write(stored.data)
            start += len(batch)
            progress.update(len(batch))
        if start != raw.count:
            raise UserError(f"--dataset {source}: expected {raw.count} images, found {start}")
    columns = dict(raw.columns)
    columns.setdefault("predefined_test", np.zeros(raw.count, bool))
    with atomic_file(folder / f"{size}.npz") as tmp_path:
        np.savez(
            tmp_path,
            image_hash=image_hash,
            blank=blank,
            channel_sum=sums[0],
            channel_square_sum=sums[1],
            **columns,
        )
    metadata = {"source": source, "native_size": raw.native_size, "class_names": list(raw.class_names)}
    write_json(folder / "source.json", metadata)


def _load(source: str, fingerprint: str, folder: Path, size: int) -> Galaxies:
    metadata = json.loads((folder / "source.json").read_text())
    with np.load(folder / f"{size}.npz", allow_pickle=False) as stored:
        columns = {name: stored[name] for name in stored.files}
    label = columns.pop("label", None)
    return Galaxies(
        name=source,
        fingerprint=fingerprint,
        class_names=tuple(metadata["class_names"]),
        pixels=np.load(folder / f"{size}.npy", mmap_mode="r", allow_pickle=False),
        native_size=metadata["native_size"],
        label=None if label is None else label.astype(np.int64),
        **{name: columns.pop(name).astype(np.float64) if name in columns else None for name in _SKY_COLUMNS},
        **columns,
    )


def _hash(image: np.ndarray) -> int:
    return int.from_bytes(hashlib.sha256(image.data).digest()[:8], "little")


def _channel_sums(image: np.ndarray) -> np.ndarray:
    """Return the exact sums of an (S, S, 3) uint8 image and of its squares over the pixels, (2, 3) int64."""
    values = image.reshape(len(image), -1).astype(np.float64)  # integers far below 2**53, so the sums are exact
    ones = np.ones(len(image))
    columns = np.stack([ones @ values, ones @ values**2])  # (2, S * 3)
    return columns.reshape(2, -1, 3).sum(axis=1).astype(np.int64)


def area_average(images: np.ndarray, size: int) -> np.ndarray:
    """Average (b, S, S, 3) uint8 images over the area of each new pixel, to (b, size, size, 3) uint8.

    It is exact even if S is not a multiple of `size`. Pillow's box filter would never split an old pixel.
    """
    old = images.shape[1]
    edges = np.arange(size + 1) * old / size
    pixel = np.arange(old)
    overlap = np.minimum(edges[1:, None], pixel + 1) - np.maximum(edges[:-1, None], pixel)
    weights = (overlap.clip(0) * size / old).astype(np.float32)  # (size, S): fraction of each new pixel in each old one
    rows = weights @ images.reshape(len(images), old, old * 3).astype(np.float32)  # (b, size, S * 3)
    average = weights @ rows.reshape(len(images), size, old, 3)  # (b, size, size, 3)
    return np.rint(average).astype(np.uint8)

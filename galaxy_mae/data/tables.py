"""Readers of tables and folders of images, through the `datasets` library.

The library finds the files, the splits and the features. The images are decoded here, because the library would open
whatever path or URL a table names, and decode images of any size and format. An image is read from the bytes in the
table, or from a file whose content is in the fingerprint. No code that comes with a data set is run.
"""

import glob
import hashlib
import io
import logging
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from galaxy_mae.data.readers import (
    BATCH_BYTES,
    GALAXY10_CLASSES,
    MAX_COMPRESSION,
    MAX_IMAGE_SIZE,
    SKY_COLUMNS,
    RawDataset,
    check_labels,
    checked_sky,
)
from galaxy_mae.errors import UserError, first_line, is_disk_full

logger = logging.getLogger(__name__)

# Formats that hold nothing but pixels of at most 8 bits, or say that they hold more. EPS, for example, is a program.
_IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP")
_BATCH_ROWS = 1024  # encoded images read at once, at most
_MAX_CLASSES = 1000


def open_parquet(source: str, path: Path) -> RawDataset:
    _check_parquet(source, path)
    escaped = glob.escape(str(path))  # the library interprets brackets in a path as a pattern
    return _open_table(source, _load_dataset(source, "parquet", data_files=escaped), lambda _path: False)


def _check_parquet(source: str, path: Path) -> None:
    """Compare what a Parquet file declares with its size. Runs of nulls take no space, whatever their length."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        metadata = pq.read_metadata(path)
    except (OSError, pa.ArrowException) as error:
        reason = first_line(error)
        raise UserError(f"--dataset {source}: {path.name} cannot be read as Parquet ({reason})") from error
    size = path.stat().st_size
    declared = sum(metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups))
    if metadata.num_rows > size or declared > MAX_COMPRESSION * size:
        raise UserError(
            f"--dataset {source}: {path.name} has {size:,} bytes but declares {metadata.num_rows:,} rows of "
            f"{declared:,} bytes: these cannot be images; create the file again"
        )


def files_in_folder(source: str, folder: Path) -> list[Path]:
    """Return all files of a folder that are not hidden, sorted.

    Raises:
        UserError: there is none, or there is a link to a folder. Links to files are fine: their content is hashed.
    """
    files = []
    for path in sorted(folder.rglob("*")):
        if any(part.startswith(".") for part in path.relative_to(folder).parts):
            continue
        if path.is_symlink() and path.is_dir():
            raise UserError(
                f"--dataset {source}: {path} is a link to a folder, in which changes would not be noticed: link the "
                "files in it one by one, or copy them"
            )
        if path.is_file():
            files.append(path)
    if not files:
        raise UserError(f"--dataset {source}: the folder is empty; it should contain Parquet files or images")
    return files


def open_folder(source: str, folder: Path, files: list[Path]) -> RawDataset:
    """Open a folder of Parquet files, else of images. Scripts and the settings in a README are not read."""
    from datasets.data_files import DataFilesDict, get_data_patterns

    parquet_files = [file for file in files if file.suffix.lower() == ".parquet" and file.stem != "metadata"]
    for file in parquet_files:
        _check_parquet(source, file)
    root = folder.resolve()
    pattern = glob.escape(str(root))
    with _library_errors(source):
        data_files = DataFilesDict.from_patterns(
            get_data_patterns(pattern), base_path=pattern, allowed_extensions=[".parquet"] if parquet_files else None
        )
    splits = _load_dataset(source, "parquet" if parquet_files else "imagefolder", data_files=data_files)
    known = set() if parquet_files else {str(root / file.relative_to(folder)) for file in files}
    return _open_table(source, splits, known.__contains__)


def load_from_hub(source: str) -> tuple[str, Callable[[], RawDataset]]:
    """Return the fingerprint of a dataset on the Hub, 64 hexadecimal digits, and a function that opens it."""
    splits = _load_dataset(source, source)
    # The library's own fingerprint covers the revision of the files and the reading options.
    parts = " ".join(f"{split} {part._fingerprint}" for split, part in sorted(splits.items()))
    return hashlib.sha256(parts.encode()).hexdigest(), lambda: _open_table(source, splits, _is_in_hub_cache)


def _load_dataset(source: str, path: str, **options):
    """Call `datasets.load_dataset(path, **options)`, which never runs code that comes with a data set."""
    with _library_errors(source):
        import datasets  # slow to import, and most runs do not need it

        datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # else a local file is reported to the Hub
        return datasets.load_dataset(path, trust_remote_code=False, **options)


@contextmanager
def _library_errors(source: str) -> Iterator[None]:
    """Silence the `datasets` library, and turn its failures into a `UserError`."""
    import datasets

    verbosity = datasets.utils.logging.get_verbosity()
    datasets.utils.logging.set_verbosity_error()
    try:
        yield
    except Exception as error:  # the library raises whatever its readers and the network raise
        if _is_full_in_chain(error):
            folder = datasets.config.HF_DATASETS_CACHE
            raise UserError(
                f"{folder}: the disk or quota is full, and the table does not fit: free some space, or set "
                "HF_DATASETS_CACHE to a folder on another disk"
            ) from error
        if Path(source).expanduser().exists():
            raise UserError(
                f"--dataset {source}: cannot be read as Parquet or as a folder of images ({first_line(error)})"
            ) from error
        raise UserError(
            f"--dataset {source}: there is no such file, and it cannot be loaded from the Hugging Face Hub "
            f"({first_line(error)}); check the spelling and the network, or use a local file"
        ) from error
    finally:
        datasets.utils.logging.set_verbosity(verbosity)


def _is_full_in_chain(error: BaseException | None) -> bool:
    """Whether a full disk caused an error. The library raises errors of its own from those of its writers."""
    while error is not None:
        if is_disk_full(error) or "Not enough disk space" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _is_in_hub_cache(path: str) -> bool:
    """Whether a path is a file that the library downloaded from the Hub, at a revision that is in the fingerprint."""
    import datasets
    from huggingface_hub.constants import HF_HUB_CACHE

    caches = (datasets.config.HF_DATASETS_CACHE, datasets.config.HF_CACHE_HOME, HF_HUB_CACHE)
    return any(Path(path).resolve().is_relative_to(Path(cache).resolve()) for cache in caches)


def _open_table(source: str, splits, is_fingerprinted: Callable[[str], bool]) -> RawDataset:
    """Open a `datasets.DatasetDict` with a column of images and, optionally, labels and coordinates.

    Args:
        is_fingerprinted: whether the content of the file at a path is part of the fingerprint. Images that are stored
            as paths are only read if it is.
    """
    import datasets

    split_names = sorted(splits, key=lambda split: (split == "test", split))
    with _library_errors(source):
        table = datasets.concatenate_datasets([splits[split] for split in split_names])
    if len(table) == 0:
        raise UserError(f"--dataset {source}: the dataset is empty")
    table = table.with_format("arrow")  # never decoded by the library, which would open URLs
    image_column = _image_column(source, table)
    _check_encoded(source, image_column, _column(table, image_column), is_fingerprinted)
    columns = {name: _numbers(source, table, key) for name, key in SKY_COLUMNS.items() if key in table.column_names}
    columns["predefined_test"] = np.concatenate([np.full(len(splits[split]), split == "test") for split in split_names])
    class_names: tuple[str, ...] = ()
    label_column = next((name for name in ("label", "labels", "ans") if name in table.column_names), None)
    if label_column:
        label, class_names = _labels_and_names(source, table, label_column)
        if label is not None:
            columns["label"] = label
    images = table.select_columns([image_column])
    size = _decode_image(source, 0, images[0:1][image_column][0].as_py(), Counter()).width
    batches = _image_batches(source, images, image_column, size)
    return RawDataset(class_names, len(table), size, checked_sky(f"--dataset {source}", columns), batches)


def _column(table, name: str):
    """Return a column of a `datasets.Dataset` in Arrow's format as a `pyarrow.ChunkedArray`."""
    return table.select_columns([name])[:][name]


def _image_column(source: str, table) -> str:
    """Return the name of the image column: the declared one, or, in Parquet without such metadata, a usual name."""
    import datasets

    declared = [name for name, feature in table.features.items() if isinstance(feature, datasets.Image)]
    usual = [name for name in ("image", "img", "images") if name in table.column_names]
    if not declared + usual:
        raise UserError(f"--dataset {source}: no column of images (it has: {', '.join(table.column_names[:20])})")
    return (declared + usual)[0]


def _check_encoded(source: str, name: str, column, is_fingerprinted: Callable[[str], bool]) -> None:
    """Check that every row of a column has an encoded image, or the path of a file that is in the fingerprint."""
    import pyarrow as pa
    import pyarrow.compute as pc

    def is_binary(kind: pa.DataType) -> bool:
        return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)

    fix = "write the encoded images into the table, or pass a folder of images"
    kind = column.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        raise UserError(f"--dataset {source}: its column `{name}` has paths or URLs of images, not images: {fix}")
    if is_binary(kind):
        missing = column.is_null()
    elif pa.types.is_struct(kind) and (i := kind.get_field_index("bytes")) >= 0 and is_binary(kind.field(i).type):
        missing = pc.is_null(pc.struct_field(column, "bytes"))
    else:
        raise UserError(f"--dataset {source}: its column `{name}` does not contain images, but {str(kind)[:60]}: {fix}")
    rows = np.flatnonzero(missing.to_numpy())
    for row, value in zip(rows, column.filter(missing).to_pylist(), strict=True):
        path = (value or {}).get("path")
        if path is None:
            raise UserError(f"--dataset {source}: row {row} has no image: remove the row")
        if not is_fingerprinted(path):
            raise UserError(
                f"--dataset {source}: row {row} has the path or URL {path[:100]!r} in place of an image: {fix}"
            )


def _decode_image(source: str, row: int, value: bytes | dict, reduced: Counter) -> Image.Image:
    """Decode an image of at most 8 bits per channel to RGB.

    Args:
        value: the encoded image, or a dictionary with `bytes`, or else the `path`, of it.
        reduced: counts what is lost: one more for an image with transparency, with several frames.
    """
    where = f"--dataset {source}: the image of row {row}"
    if isinstance(value, dict):
        value = value["bytes"] if value["bytes"] is not None else value["path"]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of metadata, which are not used
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(value if isinstance(value, str) else io.BytesIO(value), formats=_IMAGE_FORMATS)
            with image:
                _check_header(where, image)
                reduced["transparency: it is ignored"] += image.has_transparency_data
                reduced["several frames: the first one is used"] += getattr(image, "is_animated", False)
                image.load()
                ImageOps.exif_transpose(image, in_place=True)
                return image.convert("RGB")
    except UserError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UserError(f"{where} is larger than {MAX_IMAGE_SIZE} x {MAX_IMAGE_SIZE} pixels: crop it first") from error
    except Exception as error:  # Pillow's decoders raise whatever damaged bytes lead them to
        reason = "unknown format" if isinstance(error, UnidentifiedImageError) else first_line(error)[:200]
        raise UserError(
            f"{where} cannot be decoded ({reason}); it must be a complete {', '.join(_IMAGE_FORMATS[:-1])} or "
            f"{_IMAGE_FORMATS[-1]} image"
        ) from error


def _check_header(where: str, image: Image.Image) -> None:
    """Check an image's size and number of bits before its pixels are decoded."""
    if not all(1 <= length <= MAX_IMAGE_SIZE for length in image.size):
        raise UserError(
            f"{where} is {image.width} x {image.height} pixels; crop or resize it to between 1 and {MAX_IMAGE_SIZE}"
        )
    # Pillow reads colors of 16 bits as 8 bits; only the tile's raw mode, like "RGB;16B", says so.
    if image.mode == "F" or image.mode.startswith("I") or any(";16" in str(tile.args) for tile in image.tile):
        raise UserError(
            f"{where} has more than 8 bits per channel (mode {image.mode}): "
            "convert the images to 0-255 first, with a suitable stretch"
        )


def _image_batches(source: str, images, column: str, size: int) -> Iterator[np.ndarray]:
    step = min(_BATCH_ROWS, max(1, BATCH_BYTES // (3 * size * size)))
    reduced: Counter = Counter()
    for start in range(0, len(images), step):
        values = images[start : start + step][column].to_pylist()
        batch = np.empty((len(values), size, size, 3), np.uint8)
        for i, value in enumerate(values):
            image = _decode_image(source, start + i, value, reduced)
            if image.size != (size, size):
                raise UserError(
                    f"--dataset {source}: the image of row {start + i} is {image.width} x {image.height} pixels, not "
                    f"{size} x {size}; crop or resize the images to squares of one size first"
                )
            batch[i] = image
        yield batch
    for loss, count in reduced.items():
        if count:
            logger.warning("%s: %d of %d images have %s", source, count, len(images), loss)


def _numbers(source: str, table, key: str) -> np.ndarray:
    """Return a column of numbers as float64, NaN where a value is missing."""
    import pyarrow as pa

    values = _column(table, key)
    kind = values.type
    wrong = f"--dataset {source}: its column `{key}` must contain numbers (degrees, arcsec), not {str(kind)[:60]}"
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind) or kind == pa.null()):
        raise UserError(wrong)
    try:
        return values.cast(pa.float64()).to_numpy()
    except pa.ArrowInvalid as error:  # integers too large for float64
        raise UserError(wrong) from error


def _labels_and_names(source: str, table, name: str) -> tuple[np.ndarray | None, tuple[str, ...]]:
    """Return integer labels and the names of the classes: the source's own names or, for ten classes, Galaxy10's.

    Strings become classes in alphabetical order. Labels that are partly missing or not integers are ignored with a
    warning, because pre-training does not need labels.
    """
    import pyarrow as pa

    column, feature = _column(table, name), table.features[name]
    if pa.types.is_nested(column.type):
        raise UserError(
            f"--dataset {source}: column `{name}` has {str(column.type)[:60]} in place of one label per image: rename "
            "that column, or write one label"
        )
    values = np.asarray(column.to_pylist())
    if values.dtype.kind == "f" and column.null_count == 0 and np.all(values == np.floor(values)):
        check_labels(source, values, _MAX_CLASSES)
        values = values.astype(np.int64)
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
            f"--dataset {source}: column `{name}` has more than {_MAX_CLASSES} classes, so it does not contain class "
            "labels; rename that column"
        )
    check_labels(source, values, len(class_names))
    return values.astype(np.int64), class_names

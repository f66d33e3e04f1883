"""Readers of tables and folders of images, through the `datasets` library.

The library finds the files, the splits and the features; `images.py` decodes the images. An image is read from the
bytes in the table, or from a file whose content is in the fingerprint. No code that comes with a data set is run.
"""

import glob
import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from galaxy_mae.data.fits import Stretch
from galaxy_mae.data.images import Encoded, read_images
from galaxy_mae.data.readers import (
    GALAXY10_CLASSES,
    MAX_COMPRESSION,
    SKY_COLUMNS,
    RawDataset,
    UnreadableImage,
    check_labels,
    checked_sky,
    find_column,
)
from galaxy_mae.errors import UserError, first_line, is_disk_full

logger = logging.getLogger(__name__)

_MAX_CLASSES = 1000
_FIX = "write the encoded images into the table, or pass a folder of images"


def open_parquet(source: str, files: Sequence[Path], skip_unreadable: bool) -> RawDataset:
    for file in files:
        _check_parquet(source, file)
    escaped = [glob.escape(str(file)) for file in files]  # the library interprets brackets in a path as a pattern
    splits = _load_parquet(source, escaped)
    return _open_table(source, splits, lambda _path: False, Stretch(), skip_unreadable)


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


def open_folder(source: str, folder: Path, files: list[Path], stretch: Stretch, skip_unreadable: bool) -> RawDataset:
    """Open a folder of Parquet files, else of images. Scripts and the settings in a README are not read."""
    parquet_files = [file for file in files if file.suffix.lower() == ".parquet" and file.stem != "metadata"]
    for file in parquet_files:
        _check_parquet(source, file)
    root = folder.resolve()
    if parquet_files:
        splits = _load_parquet(source, files_by_split(source, root, [".parquet"]))
    else:
        splits = _load_dataset(source, "imagefolder", data_files=files_by_split(source, root))
    known = set() if parquet_files else {str(root / file.relative_to(folder)) for file in files}
    is_known, named_after = known.__contains__, None if parquet_files else root
    return _open_table(source, splits, is_known, stretch, skip_unreadable, named_after)


def files_by_split(source: str, root: Path, suffixes: list[str] | None = None) -> dict[str, list[str]]:
    """The files of a folder, sorted by the split that their names tell, such as `test`; `train` without one.

    Args:
        source: the value of `--dataset`, for messages.
        root: the folder, resolved.
        suffixes: of the files; None takes all.
    """
    from datasets.data_files import DataFilesDict, get_data_patterns

    pattern = glob.escape(str(root))
    with _library_errors(source):
        patterns = get_data_patterns(pattern)
        return DataFilesDict.from_patterns(patterns, base_path=pattern, allowed_extensions=suffixes)


def load_from_hub(source: str, stretch: Stretch, skip_unreadable: bool) -> tuple[str, Callable[[], RawDataset]]:
    """Return the fingerprint of a dataset on the Hub, 64 hexadecimal digits, and a function that opens it."""
    splits = _load_dataset(source, source)
    # The library's own fingerprint covers the revision of the files and the reading options.
    parts = " ".join(f"{split} {part._fingerprint}" for split, part in sorted(splits.items()))
    if stretch != Stretch():
        parts += f" {stretch}"
    fingerprint = hashlib.sha256(parts.encode()).hexdigest()
    return fingerprint, lambda: _open_table(source, splits, _is_in_hub_cache, stretch, skip_unreadable)


def _load_parquet(source: str, data_files):
    """`datasets.load_dataset` of Parquet files, a row group at a time.

    The library scans a file with several threads, which read ahead of a slow disk by up to 1 GiB.
    """
    import pyarrow.parquet as pq

    with _library_errors(source):
        datasets = _library()
        builder = datasets.load_dataset_builder("parquet", data_files=data_files)
        tables = builder._generate_tables  # what a builder of the library implements; there is no public hook

        def tables_by_row_group(files: list[str], row_groups_list: list[None]) -> Iterator[tuple]:
            for file in files:
                for row_group in range(pq.read_metadata(file).num_row_groups):
                    yield from tables([file], [(row_group,)])

        builder._generate_tables = tables_by_row_group
        builder.download_and_prepare()
        return builder.as_dataset()


def _load_dataset(source: str, path: str, **options):
    """Call `datasets.load_dataset(path, **options)`, which never runs code that comes with a data set."""
    with _library_errors(source):
        return _library().load_dataset(path, trust_remote_code=False, **options)


def _library():
    """The `datasets` library, which is slow to import and which most runs do not need."""
    import datasets

    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # else a local file is reported to the Hub
    return datasets


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


def _open_table(
    source: str,
    splits,
    is_fingerprinted: Callable[[str], bool],
    stretch: Stretch,
    skip_unreadable: bool,
    root: Path | None = None,
) -> RawDataset:
    """Open a `datasets.DatasetDict` with a column of images and, optionally, labels, coordinates and names.

    Args:
        is_fingerprinted: whether the content of the file at a path is part of the fingerprint. Images that are stored
            as paths are only read if it is.
        stretch, skip_unreadable: as in `open_galaxies`.
        root: the folder relative to which image files name the galaxies, if no column does.
    """
    import datasets
    import pyarrow.compute as pc

    split_names = sorted(splits, key=lambda split: (split == "test", split))
    with _library_errors(source):
        table = datasets.concatenate_datasets([splits[split] for split in split_names])
    if len(table) == 0:
        raise UserError(f"--dataset {source}: the dataset is empty")
    table = table.with_format("arrow")  # never decoded by the library, which would open URLs
    image_column = _image_column(source, table)
    images = table.select_columns([image_column])
    object_id = None
    if name := find_column(table.column_names, "object_id"):
        object_id = object_ids(source, name, _column(table, name))
    if object_id is None and root:
        files = pc.struct_field(_column(table, image_column), "path").to_pylist()
        object_id = [Path(file).relative_to(root).as_posix() for file in files]
    keys = {field: find_column(table.column_names, field) for field in SKY_COLUMNS}
    keys = {field: key for field, key in keys.items() if key}
    columns = {field: numbers(source, key, _column(table, key)) for field, key in keys.items()}
    columns = checked_sky(f"--dataset {source}", columns, keys)
    columns["predefined_test"] = np.concatenate([np.full(len(splits[split]), split == "test") for split in split_names])
    class_names: tuple[str, ...] = ()
    if name := find_column(table.column_names, "label"):
        own_names = getattr(table.features[name], "names", None)
        label, class_names = labels_and_names(source, name, _column(table, name), own_names)
        if label is not None:
            columns["label"] = label

    def encoded(start: int, stop: int) -> list[Encoded]:
        return [_encoded(value, is_fingerprinted) for value in images[start:stop][image_column].to_pylist()]

    size, batches = read_images(source, len(table), encoded, object_id, stretch, skip_unreadable)
    return RawDataset(class_names, len(table), size, columns, batches, object_id)


def _encoded(value: bytes | dict | None, is_fingerprinted: Callable[[str], bool]) -> Encoded:
    """What a row of the image column holds: encoded bytes, or `bytes` and `path`, one of which may be missing."""
    if isinstance(value, dict):
        value, path = value["bytes"], value.get("path")
        if value is None and path is not None:
            if is_fingerprinted(path):
                return Path(path)
            return UnreadableImage(f"has the path or URL {path[:100]!r} in place of its content: {_FIX}")
    return UnreadableImage("is missing: remove the row") if value is None else value


def _column(table, name: str):
    """Return a column of a `datasets.Dataset` in Arrow's format as a `pyarrow.ChunkedArray`."""
    return table.select_columns([name])[:][name]


def _image_column(source: str, table) -> str:
    """Return the name of the image column: one of a usual name that holds images, else the declared one.

    Raises:
        UserError: there is no such column, or it does not have an encoded image per row.
    """
    import datasets
    import pyarrow as pa

    declared = [name for name, feature in table.features.items() if isinstance(feature, datasets.Image)]
    types = table.data.schema
    encoded = encoded_columns(types)
    name = find_column(encoded, "image") or next(iter(declared), None) or find_column(table.column_names, "image")
    if name is None:
        raise UserError(f"--dataset {source}: no column of images (it has: {', '.join(table.column_names[:20])})")
    if name not in encoded:
        kind = types.field(name).type
        if pa.types.is_string(kind) or pa.types.is_large_string(kind):
            raise UserError(f"--dataset {source}: its column `{name}` has paths or URLs of images, not images: {_FIX}")
        raise UserError(
            f"--dataset {source}: its column `{name}` does not contain images, but {str(kind)[:60]}: {_FIX}"
        )
    return name


def encoded_columns(schema) -> list[str]:
    """The columns of an Arrow schema that hold encoded images."""
    return [field.name for field in schema if _is_encoded(field.type)]


def _is_encoded(kind) -> bool:
    """Whether an Arrow type is that of encoded images: binary, or a struct with the binary field `bytes`."""
    import pyarrow as pa

    if pa.types.is_struct(kind) and (i := kind.get_field_index("bytes")) >= 0:
        kind = kind.field(i).type
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def object_ids(source: str, name: str, column) -> list[str] | None:
    """Return the names of the galaxies, empty where one is missing, or None if they are not texts or integers.

    Args:
        source: the value of `--dataset`.
        name: of the column.
        column: (N,) `pyarrow.ChunkedArray`.
    """
    import pyarrow as pa

    kind = column.type
    if not (pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        logger.warning("%s: `%s` is %s, not text or an integer: it is not used", source, name, str(kind)[:60])
        return None
    return column.cast(pa.large_string()).fill_null("").to_pylist()


def numbers(source: str, name: str, column) -> np.ndarray:
    """Return a column of numbers as float64, NaN where a value is missing. Arguments as in `object_ids`."""
    import pyarrow as pa

    kind = column.type
    wrong = f"--dataset {source}: its column `{name}` must contain numbers (degrees, arcsec), not {str(kind)[:60]}"
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind) or kind == pa.null()):
        raise UserError(wrong)
    try:
        return column.cast(pa.float64()).to_numpy()
    except pa.ArrowInvalid as error:  # integers too large for float64
        raise UserError(wrong) from error


def labels_and_names(
    source: str, name: str, column, own_names: list[str] | None
) -> tuple[np.ndarray | None, tuple[str, ...]]:
    """Return integer labels and the names of the classes: the source's own names or, for ten classes, Galaxy10's.

    Strings become classes in alphabetical order. Labels that are partly missing or not integers are ignored with a
    warning, because pre-training does not need labels. Arguments as in `object_ids`; `own_names` are the source's.
    """
    import pyarrow as pa

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
    elif own_names:
        class_names = tuple(own_names)
    elif name == "gz10_label" or len(np.unique(values)) == len(GALAXY10_CLASSES) == values.max() + 1:
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

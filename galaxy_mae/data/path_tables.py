"""Tables of paths: a CSV or FITS table with a column of image files, and labels, coordinates and names beside it.

A path is relative to the table's folder, or absolute. The fingerprint covers the table and every file that it names, so
a changed image is read again. URLs are refused.
"""

import csv
import hashlib
import itertools
import stat
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv

from galaxy_mae.data.download import content_fingerprint
from galaxy_mae.data.fits import FITS_SUFFIXES, Stretch, is_fits
from galaxy_mae.data.images import Encoded, read_images
from galaxy_mae.data.readers import (
    COLUMN_NAMES,
    SKY_COLUMNS,
    RawDataset,
    UnreadableImage,
    checked_sky,
    find_column,
    unreadable,
)
from galaxy_mae.data.tables import labels_and_names, numbers, object_ids
from galaxy_mae.errors import UserError, first_line

TABLE_SUFFIXES = (".csv", *FITS_SUFFIXES)
_FIELDS = ("path", "object_id", "label", *SKY_COLUMNS)
_MAX_HEADER = 1 << 20  # bytes of the first line of a CSV file
_MAX_FILE = 1 << 30  # bytes of an image file
_MAX_HDUS = 20  # in which the table is looked for
_NULLS = ["", "nan", "NaN", "NA", "N/A", "null", "NULL"]


def open_path_table(
    source: str, path: Path, stretch: Stretch, skip_unreadable: bool
) -> tuple[str, Callable[[], RawDataset]]:
    """Return the fingerprint of a table of paths, 64 hexadecimal digits, and a function that opens it.

    Raises:
        UserError: it cannot be read, has no column of paths, or has URLs; without `skip_unreadable`, a file is missing.
    """
    table, names = (_read_fits if is_fits(path) else _read_csv)(source, path)
    paths = table["path"].fill_null("").to_pylist()
    if not paths:
        raise UserError(f"--dataset {source}: the table is empty")
    object_id = object_ids(source, names["object_id"], table["object_id"]) if "object_id" in names else None
    object_id = paths if object_id is None else object_id
    files: set[Path] = set()
    for row, text in enumerate(paths):
        if "://" in text:
            raise UserError(
                f"--dataset {source}: row {row} has the URL {text[:100]!r}: download the images, and write their paths"
            )
        file = _locate(path.parent, text)
        if isinstance(file, Path):
            files.add(file)
        elif not skip_unreadable:
            raise unreadable(source, row, str(file), object_id)
    fingerprint = _fingerprint(path, sorted(files), stretch)

    def opener() -> RawDataset:
        columns = {field: numbers(source, names[field], table[field]) for field in SKY_COLUMNS if field in names}
        columns = checked_sky(f"--dataset {source}", columns, names)
        class_names: tuple[str, ...] = ()
        if "label" in names:
            label, class_names = labels_and_names(source, names["label"], table["label"], None)
            if label is not None:
                columns["label"] = label

        def encoded(start: int, stop: int) -> list[Encoded]:
            return [_locate(path.parent, text) for text in paths[start:stop]]

        size, batches = read_images(source, len(paths), encoded, object_id, stretch, skip_unreadable)
        return RawDataset(class_names, len(paths), size, columns, batches, object_id)

    return fingerprint, opener


def _locate(folder: Path, text: str) -> Path | UnreadableImage:
    """The file that a path names, or why it cannot be read."""
    if not text:
        return UnreadableImage("has no path: fill it in, or remove the row")
    file = folder / text
    try:
        status = file.stat()
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        reason = getattr(error, "strerror", None) or first_line(error)
        return UnreadableImage(
            f"cannot be opened ({text[:100]!r}: {reason}); paths are relative to the table's folder, or absolute"
        )
    if not stat.S_ISREG(status.st_mode) or not 0 < status.st_size <= _MAX_FILE:
        return UnreadableImage(f"is not a file of up to {_MAX_FILE:,} bytes, or is empty ({text[:100]!r})")
    return file


def _fingerprint(path: Path, files: list[Path], stretch: Stretch) -> str:
    """SHA-256 over the table, the files that it names and, if one is FITS, the stretch.

    The files are named relative to the table's folder, so both can be moved together.
    """
    root = path.parent if all(file.is_relative_to(path.parent) for file in files) else Path(path.absolute().anchor)
    parts = ["table of paths", content_fingerprint([path])]
    if files:
        parts.append(content_fingerprint(files, root))
    if any(map(is_fits, files)):
        parts.append(str(stretch))
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()


def _columns(source: str, names: list[str]) -> dict[str, str]:
    """The columns of a table by their field. Raises a `UserError` if none has paths."""
    found = {field: find_column(names, field) for field in _FIELDS}
    if found["path"] is None:
        raise UserError(
            f"--dataset {source}: no column of image paths (it has: {', '.join(names[:20])[:500]}); it should be one "
            f"of {', '.join(COLUMN_NAMES['path'])}"
        )
    return {field: name for field, name in found.items() if name}


# ------------------------------------------------------------------------------------------------------------------ CSV


def _read_csv(source: str, path: Path) -> tuple[pa.Table, dict[str, str]]:
    """Return the columns that are used, by field, and their names. Names and paths stay texts, with leading zeros."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            header = next(csv.reader([stream.readline(_MAX_HEADER)]), [])
        names = _columns(source, header)
        types = dict.fromkeys(("path", "object_id"), pa.string()) | dict.fromkeys(SKY_COLUMNS, pa.float64())
        options = pyarrow.csv.ConvertOptions(
            column_types={name: types[field] for field, name in names.items() if field in types},
            include_columns=list(dict.fromkeys(names.values())),
            null_values=_NULLS,
            strings_can_be_null=True,
        )
        table = pyarrow.csv.read_csv(path, convert_options=options)
    except (pa.ArrowException, KeyError, ValueError, csv.Error) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"--dataset {source}: cannot be read as CSV ({first_line(error)[:300]})") from error
    return pa.table({field: table[name] for field, name in names.items()}), names


# ----------------------------------------------------------------------------------------------------------------- FITS


def _read_fits(source: str, path: Path) -> tuple[pa.Table, dict[str, str]]:
    """As `_read_csv`, from the first table of a FITS file."""
    from astropy.io import fits

    try:
        with warnings.catch_warnings(), path.open("rb") as stream:
            warnings.simplefilter("ignore")
            if stream.read(9) != b"SIMPLE  =":  # astropy would unpack a compressed file of any size
                raise UserError(f"--dataset {source}: not a FITS file")
            stream.seek(0)
            with fits.open(stream, memmap=False) as hdus:
                hdu = _first_table(source, hdus, path.stat().st_size)
                names = _columns(source, hdu.columns.names)
                columns = {field: _fits_column(source, hdu, name) for field, name in names.items()}
            return pa.table(columns), names
    except UserError:
        raise
    except Exception as error:  # astropy raises whatever a damaged header leads it to
        raise UserError(f"--dataset {source}: cannot be read as FITS ({first_line(error)[:200]})") from error


def _first_table(source: str, hdus, file_size: int):
    """The first table of a FITS file, whose rows are all there."""
    from astropy.io import fits

    images = 0
    for hdu in itertools.islice(hdus, _MAX_HDUS):
        if isinstance(hdu, fits.BinTableHDU | fits.TableHDU):
            rows = hdu.header["NAXIS2"]
            if not 0 <= rows <= file_size or hdu.fileinfo()["datLoc"] + hdu.size > file_size:
                raise UserError(f"--dataset {source}: the file is truncated: copy or download it again")
            return hdu
        images += bool(hdu.is_image and hdu.shape)
    what = "one FITS image: pass the folder that it is in" if images else "a FITS file without a table"
    raise UserError(f"--dataset {source}: {what}, or a table with a column of image paths")


def _fits_column(source: str, hdu, name: str) -> pa.Array:
    """A column of a FITS table, with nulls where an integer has the value TNULL."""
    values = np.asarray(hdu.data[name])
    if values.ndim != 1 or values.dtype.kind not in "biufUS":
        raise UserError(f"--dataset {source}: its column `{name}` must have one number or text per row")
    null = hdu.columns[name].null
    mask = values == null if null is not None and values.dtype.kind in "iu" else None
    if values.dtype.kind in "US":
        return pa.array(values.tolist(), pa.string())
    return pa.array(values.astype(values.dtype.newbyteorder("=")), mask=mask)

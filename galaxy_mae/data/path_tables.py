"""Tables of paths: a CSV or FITS table with a column of image files, and labels, coordinates and names beside it.

A path is relative to the table's folder, or absolute. The fingerprint covers the table and every file that it names, so
a changed image is read again. URLs are refused.
"""

import csv
import hashlib
import itertools
import stat
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from galaxy_mae.data.columns import COLUMN_NAMES, SKY_FIELDS, check_unique, find_column, is_text
from galaxy_mae.data.download import content_fingerprint
from galaxy_mae.data.fits import FITS_SUFFIXES, MAX_HDUS, UnreadableImage, check_complete, is_fits, open_fits
from galaxy_mae.data.images import Encoded, unreadable
from galaxy_mae.data.source import Source
from galaxy_mae.errors import UserError, first_line

TABLE_SUFFIXES = (".csv", *FITS_SUFFIXES)
_MAX_HEADER = 1 << 20  # bytes of the first line of a CSV file
_MAX_FILE = 1 << 30  # bytes of an image file
_ROWS = 1024  # whose files are looked for at once
_NULLS = ["", "nan", "NaN", "NA", "N/A", "null", "NULL"]


class PathTable(Source):
    """A CSV file or a FITS table with a column of image files."""

    @cached_property
    def _content(self) -> tuple[pa.Table, list[str]]:
        """The table without its column of paths, and the paths."""
        table = (_read_fits if is_fits(self.path) else _read_csv)(self.where, self.path)
        name = find_column(table.column_names, "path")
        if not is_text(table[name].type):
            raise UserError(f"{self.where}: its column `{name}` must have texts, not {table[name].type}")
        if len(table) == 0:
            raise UserError(f"{self.where}: the table is empty")
        return table.drop_columns(name), table[name].fill_null("").to_pylist()

    @property
    def num_rows(self) -> int:
        return len(self.file_names)

    @property
    def table(self) -> pa.Table:
        return self._content[0]

    @property
    def file_names(self) -> list[str]:
        return self._content[1]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the table, the files that it names and, if one of them is FITS, the stretch."""
        files: set[Path] = set()
        for row, text in enumerate(self.file_names):
            if "://" in text:
                fix = "download the images, and write their paths"
                raise UserError(f"{self.where}: row {row} has the URL {text[:100]!r}: {fix}")
            file = self._locate(text)
            if isinstance(file, Path):
                files.add(file)
            elif not self.options.skip_unreadable:
                raise unreadable(self.where, row, str(file), self.file_names)
        parts = [content_fingerprint([self.path])]
        if files:
            parts.append(content_fingerprint(sorted(files)))
        if any(map(is_fits, files)):
            parts.append(str(self.options.stretch))
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()

    def images(self) -> Iterator[Sequence[Encoded]]:
        for start in range(0, self.num_rows, _ROWS):
            yield [self._locate(text) for text in self.file_names[start : start + _ROWS]]

    def _locate(self, text: str) -> Path | UnreadableImage:
        """The file that a path names, or why it cannot be read."""
        if not text:
            return UnreadableImage("has no path: fill it in, or remove the row")
        file = self.path.parent / text
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


def _known_columns(where: str, names: list[str]) -> dict[str, str]:
    """The columns of a table that are used, by their field. Raises a `UserError` if none has paths."""
    fields = ("path", "object_id", "label", *SKY_FIELDS)
    found = {field: name for field in fields if (name := find_column(names, field))}
    if "path" not in found:
        raise UserError(
            f"{where}: no column of image paths (it has: {', '.join(names[:20])[:500]}); it should be one of "
            f"{', '.join(COLUMN_NAMES['path'])}"
        )
    check_unique(where, names, found.values())
    return found


# ------------------------------------------------------------------------------------------------------------------ CSV


def _read_csv(where: str, path: Path) -> pa.Table:
    """Read a CSV file. Names and paths stay texts, with leading zeros."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            header = next(csv.reader([stream.readline(_MAX_HEADER)]), [])
        known = _known_columns(where, header)
        types = dict.fromkeys(header, pa.string())  # a type that is guessed from the first rows may fail later
        types |= {known[field]: pa.float64() for field in SKY_FIELDS if field in known}
        types.pop(known.get("label"), None)
        options = pyarrow.csv.ConvertOptions(
            column_types=types,
            include_columns=[name for name in dict.fromkeys(header) if header.count(name) == 1],
            null_values=_NULLS,
            strings_can_be_null=True,
        )
        table = pyarrow.csv.read_csv(path, convert_options=options)
    except (pa.ArrowException, KeyError, ValueError, csv.Error) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{where}: cannot be read as CSV ({first_line(error)[:300]})") from error
    for i, name in enumerate(table.column_names):
        if name not in known.values():
            table = table.set_column(i, name, _numbers_or_text(table[name]))
    return table


def _numbers_or_text(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Texts as numbers, if all are; those with leading zeros are names."""
    if pc.any(pc.match_substring_regex(column, r"^[+-]?0\d")).as_py():
        return column
    for kind in (pa.int64(), pa.float64()):
        with suppress(pa.ArrowInvalid):
            return column.cast(kind)
    return column


# ----------------------------------------------------------------------------------------------------------------- FITS


def _read_fits(where: str, path: Path) -> pa.Table:
    """Read the first table of a FITS file."""
    try:
        with open_fits(path) as hdus:
            hdu = _first_table(where, hdus)
            check_complete(hdu, path)
            known = _known_columns(where, hdu.columns.names).values()
            columns = {name: _fits_column(hdu, name) for name in hdu.columns.names}
            if wrong := [name for name in known if columns[name] is None]:
                raise UserError(f"{where}: its column `{wrong[0]}` must have one number or text per row")
            return pa.table({name: values for name, values in columns.items() if values is not None})
    except UnreadableImage as problem:
        raise UserError(f"{where}: {problem}") from problem


def _first_table(where: str, hdus):
    """The first table of a FITS file."""
    from astropy.io import fits

    images = 0
    for hdu in itertools.islice(hdus, MAX_HDUS):
        if isinstance(hdu, fits.BinTableHDU | fits.TableHDU):
            return hdu
        images += bool(hdu.is_image and hdu.shape)
    what = "one FITS image: pass the folder that it is in" if images else "a FITS file without a table"
    raise UserError(f"{where}: {what}, or a table with a column of image paths")


def _fits_column(hdu, name: str) -> pa.Array | None:
    """A column of a FITS table, with nulls where an integer has the value TNULL; None if it is no plain one."""
    values = np.asarray(hdu.data[name])
    if values.ndim != 1 or values.dtype.kind not in "biufUS":
        return None
    null = hdu.columns[name].null
    mask = values == null if null is not None and values.dtype.kind in "iu" else None
    if values.dtype.kind in "US":
        return pa.array(values.tolist(), pa.string())
    return pa.array(values.astype(values.dtype.newbyteorder("=")), mask=mask)

"""Tables of paths: a CSV or FITS table with a column of image files, and labels, coordinates and names beside it.

A path is relative to the table's folder, or absolute. The fingerprint covers the table and every file that it names, so
a changed image is read again.
"""

import csv
import hashlib
import stat
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from galaxy_mae.data.columns import COLUMN_NAMES, check_unique, find_column, is_text
from galaxy_mae.data.download import content_fingerprint
from galaxy_mae.data.fits import FITS_SUFFIXES, UnreadableImage, check_complete, is_fits, open_fits
from galaxy_mae.data.images import Encoded
from galaxy_mae.data.source import Source
from galaxy_mae.errors import UserError, first_line

_ROWS = 1024  # whose files are looked for at once
_NULLS = ["", "nan", "NaN", "NA", "N/A", "null", "NULL"]


class PathTable(Source):
    """A CSV file or a FITS table with a column of image files."""

    suffixes = (".csv", *FITS_SUFFIXES)

    @cached_property
    def _content(self) -> tuple[pa.Table, list[str]]:
        """The table without its column of paths, and the paths."""
        try:
            table = (_read_fits if is_fits(self.path) else _read_csv)(self.path)
        except (UnreadableImage, UnicodeError, csv.Error, pa.ArrowException) as error:
            raise UserError(f"{self.where}: cannot be read as a table ({first_line(error)[:300]})") from error
        names = table.column_names
        name = find_column(names, "path")
        check_unique(self.where, names, [name])
        if name is None or not is_text(table[name].type):
            known = f"it should be one of {', '.join(COLUMN_NAMES['path'])}"
            raise UserError(f"{self.where}: no column of image paths (it has: {', '.join(names[:20])[:500]}); {known}")
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
        files = {file for file in map(self._locate, self.file_names) if isinstance(file, Path)}
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
        file = self.path.parent / text
        try:
            status = file.stat()
        except (OSError, ValueError) as error:  # ValueError: a null byte in the name
            reason = getattr(error, "strerror", None) or first_line(error)
            fix = "paths are relative to the table's folder, or absolute"
            return UnreadableImage(f"cannot be opened ({text[:100]!r}: {reason}); {fix}")
        if not stat.S_ISREG(status.st_mode) or status.st_size == 0:
            return UnreadableImage(f"is not a file, or is empty ({text[:100]!r})")
        return file


def _read_csv(path: Path) -> pa.Table:
    """Read a CSV file. Names and paths stay texts, with leading zeros."""
    with path.open(encoding="utf-8-sig", newline="") as stream:
        header = next(filter(None, csv.reader(stream)), [])  # pyarrow skips empty lines, too
    options = pyarrow.csv.ConvertOptions(
        column_types=dict.fromkeys(header, pa.string()),  # a type that is guessed from the first rows may fail later
        null_values=_NULLS,
        strings_can_be_null=True,
    )
    table = pyarrow.csv.read_csv(path, convert_options=options)
    texts = [find_column(header, field) for field in ("path", "object_id")]
    columns = zip(table.column_names, table.columns, strict=True)
    columns = [column if name in texts else _numbers_or_text(column) for name, column in columns]
    return pa.table(columns, table.column_names)


def _numbers_or_text(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Texts as numbers, if all are; those with leading zeros are names."""
    if pc.any(pc.match_substring_regex(column, r"^[+-]?0\d")).as_py():
        return column
    for kind in (pa.int64(), pa.float64()):
        with suppress(pa.ArrowInvalid):
            return column.cast(kind)
    return column


def _read_fits(path: Path) -> pa.Table:
    """Read the columns of the first table of a FITS file that have one number or text per row."""
    from astropy.io import fits

    with open_fits(path) as hdus:
        tables = (hdu for hdu in hdus if isinstance(hdu, fits.BinTableHDU | fits.TableHDU))
        if (hdu := next(tables, None)) is None:
            raise UnreadableImage("it has no table; of one FITS image, pass the folder that it is in")
        check_complete(hdu, path)
        columns = [(column, np.asarray(hdu.data.field(i))) for i, column in enumerate(hdu.columns)]
        plain = [(c, values) for c, values in columns if values.ndim == 1 and values.dtype.kind in "biufUS"]
        return pa.table([_fits_column(*column) for column in plain], [column.name for column, _ in plain])


def _fits_column(column, values: np.ndarray) -> pa.Array:
    """The values of a column of a FITS table, with nulls where an integer has the value TNULL."""
    if values.dtype.kind in "US":
        return pa.array(values.tolist(), pa.string())
    mask = values == column.null if column.null is not None and values.dtype.kind in "iu" else None
    return pa.array(values.astype(values.dtype.newbyteorder("=")), mask=mask)

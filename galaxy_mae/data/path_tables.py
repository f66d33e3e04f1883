"""Images in files: a table of their paths, or a folder, with labels, coordinates and names beside them.

The fingerprint covers the table and every file, so a changed image is read again. A path in a CSV or FITS table is
relative to the table's folder, or absolute; of a folder of images, nothing that is outside of it is read.
"""

import csv
import hashlib
import os.path
import stat
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json

from galaxy_mae.data.arrow import ParquetFiles, concatenated
from galaxy_mae.data.columns import COLUMN_NAMES, check_unique, find_column, is_text
from galaxy_mae.data.download import content_fingerprint
from galaxy_mae.data.fits import (
    FITS_SUFFIXES,
    Extension,
    UnreadableImage,
    check_complete,
    galaxies_in,
    is_fits,
    open_fits,
)
from galaxy_mae.data.images import IMAGE_SUFFIXES, Encoded
from galaxy_mae.data.source import TEST, Options, Source, files_in_folder, splits_by_name, text_of_path
from galaxy_mae.errors import UserError, first_line
from galaxy_mae.files import check_decoded

_ROWS = 1024  # whose files are looked for at once
_NULLS = ["", "nan", "NaN", "NA", "N/A", "null", "NULL"]
_METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")  # of folders of images, as on the Hub


class PathTable(Source):
    """A CSV file or a FITS table with a column of image files."""

    suffixes = (".csv", *FITS_SUFFIXES)

    @cached_property
    def _content(self) -> tuple[pa.Table, list[str]]:
        """The table without its column of paths, and the paths."""
        try:
            table = (_read_fits if is_fits(self.path) else _read_csv)(self.path)
        except (OSError, UnreadableImage, UnicodeError, csv.Error, pa.ArrowException) as error:
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


@dataclass(frozen=True)
class _FolderRows:
    """The rows of a folder: names relative to it, files or None, `TEST` and other splits, columns; `Source.notes`."""

    names: list[str]
    files: list[Path | Extension | None]
    splits: np.ndarray
    table: pa.Table
    notes: list[str]


class ImageFolder(Source):
    """A folder of images or FITS cut-outs, with or without one subfolder per class, and perhaps `metadata.csv`.

    Every image is one row: first those that the metadata name, in that order. What they name and is no image in the
    folder is a row, too, with an image that cannot be read.
    """

    @cached_property
    def _files(self) -> list[Path]:
        return files_in_folder(self.where, self.path)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over all files and, if one of them is FITS, the stretch."""
        fingerprint = content_fingerprint(self._files, root=self.path)
        if any(map(is_fits, self._files)):
            fingerprint = hashlib.sha256(f"{fingerprint} {self.options.stretch}".encode()).hexdigest()
        return fingerprint

    @cached_property
    def _rows(self) -> _FolderRows:
        metadata = [file for file in self._files if file.name.lower() in _METADATA]
        images = [file for file in self._files if file.name.lower().endswith(IMAGE_SUFFIXES)]
        notes = []
        if others := sorted({*self._files} - {*metadata, *images}):
            examples = ", ".join(text_of_path(file.name) for file in others[:5])[:200]
            notes.append(f"{len(others)} files are not read, because their names are of no image ({examples})")
        read = [self._read_metadata(file) for file in metadata]
        listed = [name for names, _ in read for name in names]
        row_of = {name: row for row, name in reversed(list(enumerate(listed)))}
        named = sorted(row_of, key=row_of.__getitem__)
        known = {}
        for file in images:
            name = str(file.relative_to(self.path))
            several = galaxies_in(file) if is_fits(file) and name not in row_of else []
            known |= {f"{name}[{one.index}]": one for one in several if len(several) > 1} or {name: file}
        unnamed = [name for name in known if name not in row_of]
        if len(named) < len(listed):
            notes.append(f"{len(listed) - len(named)} rows of metadata name an image again: its first row counts")
        if named and unnamed:
            notes.append(f"the metadata do not name {len(unnamed)} images, like {text_of_path(unnamed[0])!r}")
        names = [*named, *unnamed]
        if not names:
            fix = f"names of images end with {', '.join(IMAGE_SUFFIXES)}"
            raise UserError(f"{self.where}: there is no image in it: {fix}")
        splits, are_folders, split_notes = splits_by_name(names)
        order = np.argsort(splits, kind="stable")
        names = [names[i] for i in order]
        table = pa.table({})
        if read:
            table = concatenated(self.where, [columns for _, columns in read])
            table = table.take(pa.array([row_of.get(name) for name in names], pa.int64()))
        table, label_notes = _with_labels(table, [Path(name).parts[are_folders:-1] for name in names])
        notes += split_notes + label_notes
        return _FolderRows(names, [known.get(name) for name in names], np.array(splits)[order], table, notes)

    def _read_metadata(self, file: Path) -> tuple[list[str], pa.Table]:
        """The images of the rows of a table, by their names relative to this folder, and its other columns."""
        try:
            if file.suffix.lower() == ".parquet":
                table = ParquetFiles(self.name, file, self.options).table
            else:
                table = _read_csv(file) if file.suffix.lower() == ".csv" else pyarrow.json.read_json(file)
        except (OSError, UnicodeError, csv.Error, pa.ArrowException) as error:
            raise UserError(f"{file}: cannot be read as a table ({first_line(error)[:300]})") from error
        names = table.column_names
        own = [name for name in names if name.lower().endswith("file_name")]  # as of the Hub
        name = min(own, key=len) if own else find_column(names, "path")
        check_unique(str(file), names, [name])
        if name is None or not is_text(table[name].type):
            fix = "name the column of the images file_name, with paths relative to this table"
            raise UserError(f"{file}: no column of image files (it has: {', '.join(names)[:500]}); {fix}")
        folder = file.parent.relative_to(self.path)
        paths = table[name].fill_null("").to_pylist()
        return [os.path.normpath(f"{folder}/{path}") for path in paths], table.drop_columns(name)

    @property
    def num_rows(self) -> int:
        return len(self._rows.names)

    @property
    def predefined_test(self) -> np.ndarray:
        return self._rows.splits == TEST

    @property
    def table(self) -> pa.Table:
        return self._rows.table

    @property
    def file_names(self) -> list[str]:
        return [text_of_path(name) for name in self._rows.names]

    @property
    def notes(self) -> list[str]:
        return self._rows.notes

    def images(self) -> Iterator[Sequence[Encoded]]:
        missing = UnreadableImage("is named by the metadata, and is not in this folder: paths are relative to them")
        for start in range(0, self.num_rows, _ROWS):
            yield [file or missing for file in self._rows.files[start : start + _ROWS]]


class FitsImages(ImageFolder):
    """A FITS file with one image of a galaxy, or several, in place of a folder of such files."""

    def __init__(self, name: str, path: Path, options: Options):
        super().__init__(name, path.parent, options)
        self._files = [path]


def _with_labels(table: pa.Table, folders: list[tuple[str, ...]]) -> tuple[pa.Table, list[str]]:
    """Add the names of the images' folders as labels, if there are several and no other labels; and `Source.notes`."""
    if find_column(table.column_names, "label") or len({folder[-1:] for folder in folders}) < 2:
        return table, []
    if len({len(folder) for folder in folders}) > 1:
        return table, ["names of folders are not used as labels, because not all images are at the same depth"]
    labels = pa.array([text_of_path(folder[-1]) for folder in folders])
    return pa.table([*table.columns, labels], [*table.column_names, "label"]), []


def _read_csv(path: Path) -> pa.Table:
    """Read a CSV file. Names and paths stay texts, with leading zeros; spaces around names and values are left out."""
    with path.open(encoding="utf-8-sig", newline="") as stream:
        header = next(filter(None, csv.reader(stream)), [])  # pyarrow skips empty lines, too
    types = dict.fromkeys(header, pa.string())  # a type that is guessed from the first rows may fail later
    table = pyarrow.csv.read_csv(path, convert_options=pyarrow.csv.ConvertOptions(column_types=types))
    names = [name.strip() for name in table.column_names]
    texts = [find_column(names, field) for field in ("path", "object_id")]
    columns = [pc.utf8_trim(column, " \t") for column in table.columns]
    columns = [pc.if_else(pc.is_in(column, pa.array(_NULLS)), None, column) for column in columns]
    columns = [c if name in texts else _numbers_or_text(c) for name, c in zip(names, columns, strict=True)]
    return pa.table(columns, names)


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
            raise UnreadableImage("it has neither an image nor a table")
        check_complete(hdu)
        check_decoded(hdu.size, path)
        columns = [(column, np.asarray(hdu.data.field(i))) for i, column in enumerate(hdu.columns)]
        plain = [(c, values) for c, values in columns if values.ndim == 1 and values.dtype.kind in "biufUS"]
        return pa.table([_fits_column(*column) for column in plain], [column.name for column, _ in plain])


def _fits_column(column, values: np.ndarray) -> pa.Array:
    """The values of a column of a FITS table, with nulls where an integer has the value TNULL."""
    if values.dtype.kind == "S":  # of which astropy cannot make text
        values = np.char.decode(values, "utf-8", "backslashreplace")
    if values.dtype.kind == "U":
        return pa.array(values.tolist(), pa.string())
    mask = values == column.null if column.null is not None and values.dtype.kind in "iu" else None
    return pa.array(values.astype(values.dtype.newbyteorder("=")), mask=mask)

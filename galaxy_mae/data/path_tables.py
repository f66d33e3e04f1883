"""Images in files: a table of their paths, or a folder, with labels, coordinates and names beside them.

The fingerprint covers the table and every file, so a changed image is read again. A path in a CSV or FITS table is
relative to the table's folder, or absolute; of a folder of images, nothing that is outside of it is read.
"""

import csv
import gzip
import hashlib
import io
import itertools
import json
import math
import os.path
import re
import stat
import tarfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from xml.parsers import expat

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json

from galaxy_mae.data.arrow import ParquetFiles, concatenated
from galaxy_mae.data.columns import COLUMN_NAMES, LABELS, check_unique, find_column, is_text, plain_rows
from galaxy_mae.data.download import content_fingerprint
from galaxy_mae.data.fits import FITS_SUFFIXES, Extension, UnreadableImage, check_table, galaxies_in, is_fits, open_fits
from galaxy_mae.data.images import ARRAY_SUFFIX, IMAGE_SUFFIXES, Encoded, takes_stretch
from galaxy_mae.data.source import TABLE_SUFFIXES, TEST, Options, Source, not_read, splits_by_name, text_of_path
from galaxy_mae.errors import UserError, first_line
from galaxy_mae.files import check_decoded

_ASTROPY = (".vot", ".votable", ".xml", ".ecsv")
_TAR_IMAGES = tuple(suffix for suffix in IMAGE_SUFFIXES if suffix not in FITS_SUFFIXES)
_ROWS = 1024  # whose files are looked for at once
_NULLS = ["", "nan", "NaN", "NA", "N/A", "null", "NULL"]
_METADATA = tuple(f"metadata{suffix}" for suffix in (*TABLE_SUFFIXES, ".jsonl"))  # of folders of images
_MAX_TEXT = 2 << 30  # bytes of a CSV file, unpacked


class PathTable(Source):
    """A table with a column of image files."""

    suffixes = (*TABLE_SUFFIXES, *FITS_SUFFIXES)

    @cached_property
    def _content(self) -> tuple[pa.Table, list[str]]:
        """The table without its column of paths, and the paths."""
        table = _read_table(self.where, self.path)
        names = table.column_names
        texts = [name for name in names if is_text(table[name].type)] if len({*names}) == len(names) else []
        name = self.options.image_column or find_column(names, "path") or find_column(texts, "image")
        return _without_paths(self.where, table, name, f"it should be one of {', '.join(COLUMN_NAMES['path'])}")

    @property
    def table(self) -> pa.Table:
        return self._content[0]

    @property
    def file_names(self) -> list[str]:
        return self._content[1]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the table, the files that it names and, if one of them may hold fluxes, the stretch."""
        files = {file for file in map(self._locate, self.file_names) if isinstance(file, Path)}
        parts = [content_fingerprint([self.path])]
        if files:
            parts.append(content_fingerprint(sorted(files)))
        if any(map(takes_stretch, files)):
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

    @property
    def _images(self) -> list[Path]:
        """Those of its files that are images: arrays only where there are no others."""
        images = [file for file in self.files if file.name.lower().endswith(IMAGE_SUFFIXES)]
        return images or [file for file in self.files if file.suffix.lower() == ARRAY_SUFFIX]

    @property
    def takes_stretch(self) -> bool:
        return any(map(takes_stretch, self._images))

    @cached_property
    def _rows(self) -> _FolderRows:
        metadata = [file for file in self.files if file.name.lower() in _METADATA]
        images = self._images
        notes = not_read(sorted({*self.files} - {*metadata, *images}), "because their names are of no image")
        read = [self._read_metadata(file) for file in metadata]
        listed = [name for _, names in read for name in names]
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
            table = concatenated(self.where, [columns for columns, _ in read])
            table = table.take(pa.array([row_of.get(name) for name in names], pa.int64()))
        table, label_notes = _with_labels(table, [Path(name).parts[are_folders:-1] for name in names])
        notes += split_notes + label_notes
        return _FolderRows(names, [known.get(name) for name in names], np.array(splits)[order], table, notes)

    def _read_metadata(self, file: Path) -> tuple[pa.Table, list[str]]:
        """A table without its column of images, and the names of these, relative to this folder."""
        table = _read_table(str(file), file)
        names = table.column_names
        own = [name for name in names if name.lower().endswith("file_name")]  # as of the Hub
        name = min(own, key=len) if own else find_column(names, "path")
        fix = "name the column of the images file_name, with paths relative to this table"
        table, paths = _without_paths(str(file), table, name, fix)
        folder = file.parent.relative_to(self.path)
        return table, [os.path.normpath(f"{folder}/{path}") for path in paths]

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
        self.files = [path]


class WebDataset(Source):
    """A tar file, or a folder of them: members of one name but for the suffix are an image, its .json and its .cls."""

    suffixes = (".tar",)

    @property
    def _tars(self) -> list[Path]:
        return [file for file in self.files if file.suffix.lower() in self.suffixes]

    @cached_property
    def _rows(self) -> dict[tuple[Path, str], dict[str, tuple[int, int]]]:
        """Where the members of each galaxy begin, and their lengths, by tar file and name, and then by suffix."""
        samples: dict[tuple[Path, str], dict[str, tuple[int, int]]] = {}
        for file in self._tars:
            try:
                with tarfile.open(file, "r:") as archive:
                    for member in archive:
                        stem, suffix = str(Path(member.name).with_suffix("")), Path(member.name).suffix.lower()
                        kind = "image" if suffix in _TAR_IMAGES else suffix
                        if member.isreg() and not member.issparse() and not Path(stem).name.startswith("."):
                            key = member.name if kind in samples.get((file, stem), {}) else stem
                            samples.setdefault((file, key), {})[kind] = (member.offset_data, member.size)
            except (OSError, tarfile.TarError) as error:
                raise UserError(f"{file}: cannot be read as tar ({first_line(error)}): copy it again") from error
        return {key: members for key, members in samples.items() if "image" in members}

    @property
    def file_names(self) -> list[str]:
        return [text_of_path(name) for _, name in self._rows]

    @property
    def notes(self) -> list[str]:
        if self.path.is_file():
            return []
        splits = splits_by_name([str(file.relative_to(self.path)) for file in self._tars])[2]
        return [*not_read(sorted({*self.files} - {*self._tars}), "beside tar files"), *splits]

    @property
    def predefined_test(self) -> np.ndarray:
        names = [str(file.relative_to(self.path)) for file, _ in self._rows] if self.path.is_dir() else []
        return np.array(splits_by_name(names)[0] or np.zeros(self.num_rows)) == TEST

    @property
    def table(self) -> pa.Table:
        try:
            rows = [json.loads(text or "{}") for text in self._members(".json")]
            for row, text in zip(rows, self._members(".cls"), strict=True):
                row |= {"label": int(text) if text.strip().isdigit() else text.decode().strip()} if text else {}
            names = dict.fromkeys(itertools.chain.from_iterable(rows))
            return pa.table({name: [row.get(name) for row in rows] for name in names})
        except (ValueError, TypeError, AttributeError, pa.ArrowException) as error:
            raise UserError(f"{self.where}: its .json or .cls cannot be read ({first_line(error)[:200]})") from error

    def _members(self, kind: str) -> Iterator[bytes | None]:
        for (file, _), members in self._rows.items():
            with file.open("rb") as stream:
                offset, size = members.get(kind, (0, 0))
                stream.seek(offset)
                yield stream.read(size) or None

    def images(self) -> Iterator[Sequence[Encoded]]:
        members = self._members("image")
        while batch := list(itertools.islice(members, 64)):
            yield batch


def _with_labels(table: pa.Table, folders: list[tuple[str, ...]]) -> tuple[pa.Table, list[str]]:
    """Add the names of the images' folders as labels, if there are several and no other labels; and `Source.notes`."""
    if any(name.lower() in LABELS for name in table.column_names) or len({folder[-1:] for folder in folders}) < 2:
        return table, []
    if len({len(folder) for folder in folders}) > 1:
        return table, ["names of folders are not used as labels, because not all images are at the same depth"]
    labels = pa.array([text_of_path(folder[-1]) for folder in folders])
    return pa.table([*table.columns, labels], [*table.column_names, "label"]), []


def _without_paths(where: str, table: pa.Table, name: str | None, fix: str) -> tuple[pa.Table, list[str]]:
    """A table without its column of image paths, and these. Raises a `UserError` with `fix` if it has no such one."""
    names = table.column_names
    check_unique(where, names, [name])
    if name not in names or not is_text(table[name].type):
        raise UserError(f"{where}: no column of image paths (it has: {', '.join(names[:20])[:500]}); {fix}")
    return table.drop_columns(name), table[name].fill_null("").to_pylist()


def _read_table(where: str, path: Path) -> pa.Table:
    """Read a table in the format that its suffix tells. Raises a `UserError` if it cannot be read."""
    suffix = path.suffix.lower()
    try:
        if suffix == ".parquet":
            return ParquetFiles(str(path), path, Options()).table
        if suffix == ".jsonl":
            return pyarrow.json.read_json(path)
        if is_fits(path):
            return _read_fits(path)
        return _read_astropy(path) if suffix in _ASTROPY else _read_csv(path)
    except (OSError, UnreadableImage, ValueError, EOFError, csv.Error, pa.ArrowException, SyntaxError) as error:
        raise UserError(f"{where}: cannot be read as a table ({first_line(error)[:300]})") from error


def _read_csv(path: Path) -> pa.Table:
    """Read texts separated by commas, semicolons, tabs or bars, in UTF-8 or UTF-16, perhaps in a .gz file.

    Names and paths stay texts, with leading zeros; spaces around names and values are left out.
    """
    with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as stream:
        chunks = iter(lambda: stream.read(1 << 20), b"")  # at once, it would reserve memory for the largest file
        content = b"".join(itertools.islice(chunks, (_MAX_TEXT >> 20) + 1))
    if len(content) > _MAX_TEXT:
        raise ValueError(f"it is larger than {_MAX_TEXT >> 30} GiB: write it as Parquet")
    text = content.decode("utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    text = re.sub(r"\A(\s*#.*\n)+", "", text)  # comments, as of VizieR
    first = next(filter(str.strip, io.StringIO(text)), "")
    separator = max(",;\t|", key=first.count)
    header = next(csv.reader([first], delimiter=separator), [])
    types = dict.fromkeys(header, pa.string())  # a type that is guessed from the first rows may fail later
    table = pyarrow.csv.read_csv(
        pa.BufferReader(text.encode()),
        parse_options=pyarrow.csv.ParseOptions(delimiter=separator),
        convert_options=pyarrow.csv.ConvertOptions(column_types=types),
    )
    names = [name.strip() for name in table.column_names]
    texts = [find_column(names, field) for field in ("path", "object_id")]
    columns = [pc.utf8_trim(column, " \t") for column in table.columns]
    columns = [pc.if_else(pc.is_in(column, pa.array(_NULLS)), None, column) for column in columns]
    decimal = "," if separator == ";" else "."  # as spreadsheets write it in most of Europe
    columns = [c if name in texts else _numbers_or_text(c, decimal) for name, c in zip(names, columns, strict=True)]
    return pa.table(columns, names)


def _numbers_or_text(column: pa.ChunkedArray, decimal: str) -> pa.ChunkedArray:
    """Texts as numbers, if all are; those with leading zeros are names."""
    if pc.any(pc.match_substring_regex(column, r"^[+-]?0\d")).as_py():
        return column
    with suppress(pa.ArrowInvalid):
        return column.cast(pa.int64())
    with suppress(pa.ArrowInvalid):
        return pc.replace_substring(column, decimal, ".").cast(pa.float64())
    return column


def check_votable(path: Path) -> None:
    """Refuse what astropy would open, a URL or file that a VOTable names, and make, more than the file can hold."""
    width, rows = 0, 0

    def start(name: str, attributes: dict[str, str]) -> None:
        nonlocal width, rows
        kind = name.rpartition(":")[2]
        if kind == "STREAM" and "href" in attributes:
            raise UserError(f"{path}: its values are elsewhere ({attributes['href'][:100]}): write them into it")
        if kind == "FIELD":
            width += 8 * math.prod(map(int, re.findall(r"\d+", attributes.get("arraysize", ""))))
        rows = max(rows + (kind == "TR"), int(attributes.get("nrows", 0)))
        check_decoded(width * rows, path)

    parser = expat.ParserCreate()
    parser.StartElementHandler = start
    with path.open("rb") as file:
        parser.ParseFile(file)  # which reads no compressed file


def _read_astropy(path: Path) -> pa.Table:
    """Read the columns of an ECSV file, or of the first table of a VOTable, that have one number or text per row."""
    from astropy.table import Table

    if path.suffix.lower() != ".ecsv":
        check_votable(path)
    with warnings.catch_warnings(action="ignore"):
        table = Table.read(path, format="ascii.ecsv" if path.suffix.lower() == ".ecsv" else "votable")
    plain = [name for name in table.colnames if table[name].ndim == 1 and table[name].dtype.kind in "biufUSO"]
    arrays = [pa.array(table[name].tolist()) for name in plain]  # None where it is masked
    return plain_rows(_with_units(arrays, plain, [table[name].unit for name in plain]))


def _read_fits(path: Path) -> pa.Table:
    """Read the columns of the first table of a FITS file that have one number or text per row."""
    from astropy.io import fits

    with open_fits(path) as hdus:
        tables = (hdu for hdu in hdus if isinstance(hdu, fits.BinTableHDU | fits.TableHDU))
        if (hdu := next(tables, None)) is None:
            raise UnreadableImage("it has neither an image nor a table")
        check_table(hdu, path)
        columns = [(column, np.asarray(hdu.data.field(i))) for i, column in enumerate(hdu.columns)]
        plain = [(c, values) for c, values in columns if values.ndim == 1 and values.dtype.kind in "biufUS"]
        names, units = zip(*((column.name, column.unit) for column, _ in plain), strict=True) if plain else ((), ())
        return _with_units([_fits_column(*column) for column in plain], names, units)


def _with_units(arrays: list[pa.Array], names: Sequence[str], units: Sequence[object]) -> pa.Table:
    """A table whose fields have the units that a FITS table or VOTable gives its columns."""
    described = [{"unit": str(unit)} if unit else None for unit in units]
    fields = zip(names, [array.type for array in arrays], [True] * len(arrays), described, strict=True)
    return pa.table(arrays, pa.schema([pa.field(*field) for field in fields]))


def _fits_column(column, values: np.ndarray) -> pa.Array:
    """The values of a column of a FITS table, with nulls where an integer has the value TNULL."""
    if values.dtype.kind == "S":  # of which astropy cannot make text
        values = np.char.decode(values, "utf-8", "backslashreplace")
    if values.dtype.kind == "U":
        return pa.array(values.tolist(), pa.string())
    mask = values == column.null if column.null is not None and values.dtype.kind in "iu" else None
    return pa.array(values.astype(values.dtype.newbyteorder("=")), mask=mask)

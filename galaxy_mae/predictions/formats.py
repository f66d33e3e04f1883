"""Predictions as Parquet, FITS, CSV and VOTable files: one table and its provenance, equal in all four.

A column's unit and description are in its Arrow field's metadata. Parquet is written row group by row group; the other
formats hold the table in memory while it is written.

Columns of a user's own table may have any type. All formats have 64-bit integers, which may be null, floats, and text:
smaller integers and booleans are written as integers, everything else as text, and a text that is null as an empty one.

FITS allows ASCII without trailing spaces, and XML no control characters. Such characters are written there as Python's
backslash escapes, and a backslash as two.
"""

import itertools
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from galaxy_mae.errors import UserError, first_line, is_disk_full
from galaxy_mae.files import atomic_file, read_json
from galaxy_mae.predictions.schema import VECTORS, Predictions, field, to_numpy

SUFFIXES = (".parquet", ".fits", ".csv", ".vot", ".xml")
_FIX = "write the catalogue again with python -m galaxy_mae.catalogue predict"
ABOUT = "galaxy_mae"  # where a file holds the provenance, as JSON
_TYPES = {str(kind): kind for kind in (pa.int64(), pa.string(), pa.float32(), pa.float64())}
_NULL = -(2**63)  # an integer that is null, in FITS and VOTable
_FITS_NAME = re.compile(r"\w.{,59}", re.ASCII)  # names of columns that astropy takes


def check_suffix(path: Path, flag: str) -> None:
    """Raise a `UserError` if a file's suffix is that of no format."""
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"{flag} {path}: its suffix names no format; use one of {', '.join(SUFFIXES)}")


def write_catalogue(path: Path, tables: Iterable[pa.Table], about: dict[str, Any]) -> None:
    """Write predictions atomically, in the format that the suffix names.

    Args:
        path: the file; replaced if it exists. The provenance of NAME.csv is in NAME.csv.json beside it.
        tables: the rows in order, in at least one table of one schema.
        about: the provenance, as JSON.

    Raises:
        UserError: unknown suffix.
    """
    check_suffix(path, "--output")
    with atomic_file(path) as tmp_path:
        _FORMATS[path.suffix.lower()][0](tmp_path, map(_portable, tables), about)


def read_catalogue(path: Path, fix: str = _FIX) -> Predictions:
    """Read predictions that `write_catalogue` wrote.

    Args:
        path: the file.
        fix: how it is written again; it ends the error message.

    Raises:
        UserError: no such file, unknown suffix, damaged, or another program's file.
    """
    check_suffix(path, "catalogue")
    if not path.is_file():
        raise UserError(f"{path}: no such file; {fix}")
    try:
        return _FORMATS[path.suffix.lower()][1](path)
    except UserError:
        raise
    except Exception as error:  # what the four libraries make of a damaged file
        if is_disk_full(error):
            raise
        raise UserError(f"{path}: not a catalogue of this program, or damaged ({first_line(error)}); {fix}") from error


# -------------------------------------------------------------------------------------------------------------- parquet


def _write_parquet(path: Path, tables: Iterable[pa.Table], about: dict) -> None:
    import pyarrow.parquet as pq

    tables = iter(tables)
    first = next(tables)
    schema = first.schema.with_metadata({ABOUT: json.dumps(about)})
    with pq.ParquetWriter(path, schema, use_compliant_nested_type=False) as writer:
        for table in itertools.chain([first], tables):
            writer.write_table(table.cast(schema))


def _read_parquet(path: Path) -> Predictions:
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    about = json.loads(table.schema.metadata[ABOUT.encode()])
    return Predictions(table.replace_schema_metadata(None), about)


# ----------------------------------------------------------------------------------------------------------------- FITS


def _write_fits(path: Path, tables: Iterable[pa.Table], about: dict) -> None:
    from astropy.io import fits

    table = pa.concat_tables(tables)
    columns = []
    for i, column in enumerate(table.schema, 1):
        values = _values(table[column.name])
        if values.dtype.kind == "O":
            values = np.array([_escape(value, _NOT_FITS).encode("ascii") for value in values], dtype=bytes)
            code = f"{values.dtype.itemsize}A"
        else:
            code = {"i8": "K", "f4": "E", "f8": "D"}[values.dtype.str[1:]]
            code = f"{values.shape[1]}{code}" if values.ndim == 2 else code
        name, unit = _escape(column.name, _NOT_FITS), _about_field(column, "unit") or None
        name = name if _FITS_NAME.fullmatch(name) else f"column_{i}"
        null = _NULL if table[column.name].null_count else None
        columns.append(fits.Column(name, code, unit=unit, null=null, array=values))
    hdu = fits.BinTableHDU.from_columns(columns, name="CATALOGUE")
    for i, column in enumerate(table.schema, 1):
        hdu.header[f"TCOMM{i}"] = _escape(_about_field(column, "description"), _NOT_FITS)
        hdu.header[f"TNAME{i}"] = _escape(column.name, _NOT_FITS)  # however long
    hdu.header["DATE"] = (str(about.get("created", ""))[:19], "UTC")
    hdu.header["CREATOR"] = "galaxy_mae"
    hdu.header["ABOUT"] = json.dumps(about)  # ASCII, however long: CONTINUE cards
    fits.HDUList([fits.PrimaryHDU(), hdu]).writeto(path, output_verify="exception")


def _read_fits(path: Path) -> Predictions:
    from astropy.io import fits

    with fits.open(path, memmap=False, character_as_bytes=False) as file:
        hdu = file["CATALOGUE"]
        about = json.loads(hdu.header["ABOUT"])
        arrays, columns = [], []
        for i, column in enumerate(hdu.columns, 1):
            values = np.asarray(hdu.data[column.name])
            if values.dtype.kind == "U":
                values = [_unescape(value) for value in values.tolist()]
            arrays.append(_to_arrow(column.name, values, column.null))
            description = _unescape(hdu.header.get(f"TCOMM{i}", ""))
            name = _unescape(hdu.header[f"TNAME{i}"])
            columns.append(field(name, arrays[-1].type, description, column.unit or ""))
    return Predictions(pa.table(arrays, pa.schema(columns)), about)


# ------------------------------------------------------------------------------------------------------------------ CSV


def _write_csv(path: Path, tables: Iterable[pa.Table], about: dict) -> None:
    import pyarrow.csv

    tables = iter(tables)
    first = next(tables)
    columns = [
        {
            "name": column.name,
            "length": column.type.list_size if column.name in VECTORS else None,
            "type": str(column.type.value_type if column.name in VECTORS else column.type),
            **{key: _about_field(column, key) for key in ("unit", "description")},
        }
        for column in first.schema
    ]
    rows = 0
    with pyarrow.csv.CSVWriter(path, _flatten(first).schema) as writer:
        for table in itertools.chain([first], tables):
            writer.write_table(_flatten(table))
            rows += len(table)
    side = {"about": about, "rows": rows, "columns": columns}
    _side_file(path).write_text(json.dumps(side, indent=2) + "\n")


def _read_csv(path: Path) -> Predictions:
    import pyarrow.csv

    shape = {"about": dict, "rows": int, "columns": [{"name": str, "length": int | None, "type": str}]}
    try:
        side = read_json(_side_file(path), _FIX, shape)
    except FileNotFoundError as error:
        raise UserError(
            f"{path}: {_side_file(path).name} with its provenance is not beside it; copy it, too"
        ) from error
    names = [_names_in_csv(column["name"], column["length"]) for column in side["columns"]]
    kinds = [_TYPES[column["type"]] for column in side["columns"]]
    types = {name: kind for of_column, kind in zip(names, kinds, strict=True) for name in of_column}
    table = pyarrow.csv.read_csv(
        path,
        read_options=pyarrow.csv.ReadOptions(column_names=list(types), skip_rows=1),
        parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True),
        convert_options=pyarrow.csv.ConvertOptions(column_types=types, null_values=[""], strings_can_be_null=False),
    )
    if len(table) != side["rows"]:
        raise ValueError(f"it has {len(table):,} of {side['rows']:,} rows")
    arrays, fields = [], []
    for column, parts, kind in zip(side["columns"], names, kinds, strict=True):
        if column["length"] is not None:
            arrays.append(_to_arrow(column["name"], np.stack([table[x].to_numpy() for x in parts], axis=1)))
        else:
            values = table[parts[0]].combine_chunks()
            arrays.append(values.fill_null(np.nan) if pa.types.is_floating(kind) else values)
        fields.append(field(column["name"], arrays[-1].type, column["description"], column["unit"]))
    return Predictions(pa.table(arrays, pa.schema(fields)), side["about"])


def _names_in_csv(name: str, length: int | None) -> list[str]:
    """The header of a column: its name, or one for each element of a vector."""
    return [name] if length is None else [f"{name}_{i:03d}" for i in range(length)]


def _flatten(table: pa.Table) -> pa.Table:
    """A table for CSV: a column per element of a vector, and nulls, which are empty cells, in place of NaN."""
    columns = {}
    for name, column in zip(table.column_names, table.columns, strict=True):
        if name in VECTORS:
            values = to_numpy(column)
            for i, part in enumerate(_names_in_csv(name, values.shape[1])):
                columns[part] = pa.array(values[:, i], from_pandas=True)
        else:
            is_number = pa.types.is_floating(column.type)
            columns[name] = pa.array(to_numpy(column), from_pandas=True) if is_number else column
    return pa.table(columns)


def _side_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


# -------------------------------------------------------------------------------------------------------------- VOTable


def _write_votable(path: Path, tables: Iterable[pa.Table], about: dict) -> None:
    from astropy.io import votable
    from astropy.table import Column, Table

    table = pa.concat_tables(tables)
    columns = []
    for i, column in enumerate(table.schema):
        values = _values(table[column.name])
        if values.dtype.kind == "O":
            values = np.array([_escape(value, _NOT_VOTABLE) for value in values], dtype=str)
        unit, description = (_about_field(column, key) or None for key in ("unit", "description"))
        columns.append(Column(values, f"column_{i}", unit=unit, description=description))
    file = votable.from_table(Table(columns, copy=False))
    for name, column in zip(table.column_names, file.get_first_table().fields, strict=True):
        column.name = name  # which may be no identifier of XML; that is `column_0` and so on
        if column.datatype == "unicodeChar":
            column.arraysize = "*"  # else as long as the longest text of this catalogue
        if table[name].null_count:
            column.values.null = _NULL
    for key, value in about.items():
        text = json.dumps(value)
        for character in "<>&":  # astropy 8.0 escapes them twice in attributes
            text = text.replace(character, f"\\u{ord(character):04x}")
        param = votable.tree.Param(file, ID=f"about_{key}", name=key, datatype="char", arraysize="*", value=text)
        file.get_first_table().params.append(param)
    file.to_xml(str(path), tabledata_format="tabledata")


def _read_votable(path: Path) -> Predictions:
    from astropy.io import votable

    table = votable.parse_single_table(path)
    about = {param.name: json.loads(str(param.value)) for param in table.params}
    arrays, fields = [], []
    for column in table.fields:
        values = np.asarray(table.array[column.ID].data)
        if values.dtype.kind in "OU":
            values = [_unescape(str(value)) for value in values]
        arrays.append(_to_arrow(column.name, values, column.values.null))
        fields.append(field(column.name, arrays[-1].type, (column.description or "").strip(), str(column.unit or "")))
    return Predictions(pa.table(arrays, pa.schema(fields)), about)


# ---------------------------------------------------------------------------------------------------------- conversions

_NOT_FITS = re.compile(r"[^\x20-\x7e]|\\| (?=\s*$)")
_NOT_VOTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\ufffe\uffff]|\\|^\s|\s(?=\s*$)|(?<=\s)\s")
_ESCAPED = re.compile(r"\\(?:\\|x([0-9a-f]{2})|u([0-9a-f]{4})|U([0-9a-f]{8}))")


def _escape(text: str, pattern: re.Pattern) -> str:
    """Write what a pattern finds as Python's backslash escapes."""

    def escaped(match: re.Match) -> str:
        code = ord(match[0])
        if match[0] == "\\":
            return r"\\"
        return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"

    return pattern.sub(escaped, text)


def _unescape(text: str) -> str:
    return _ESCAPED.sub(lambda match: chr(int(match[match.lastindex], 16)) if match.lastindex else "\\", text)


def _portable(table: pa.Table) -> pa.Table:
    """A table with the types that all formats have."""
    columns = [
        column if name in VECTORS else _portable_column(column)
        for name, column in zip(table.column_names, table.columns, strict=True)
    ]
    schema = [old.with_type(new.type) for old, new in zip(table.schema, columns, strict=True)]
    return pa.table(columns, pa.schema(schema))


def _portable_column(column: pa.ChunkedArray) -> pa.ChunkedArray:
    kind = column.type
    if pa.types.is_floating(kind):
        return (column.cast(pa.float32()) if pa.types.is_float16(kind) else column).fill_null(np.nan)
    if pa.types.is_boolean(kind) or (pa.types.is_integer(kind) and not pa.types.is_uint64(kind)):
        return column.cast(pa.int64())
    if pa.types.is_nested(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        texts = [None if value is None else str(value) for value in column.to_pylist()]
        column = pa.chunked_array([pa.array(texts, pa.string())])
    return column.cast(pa.string()).fill_null("")


def _values(column: pa.ChunkedArray) -> np.ndarray:
    """`to_numpy` with `_NULL` for integers that are null."""
    return to_numpy(column.fill_null(_NULL) if column.null_count and pa.types.is_int64(column.type) else column)


def _to_arrow(name: str, values: np.ndarray | list[str], null: int | None = None) -> pa.Array:
    """The inverse of `_values`, for numbers of any byte order."""
    if isinstance(values, list):
        return pa.array(values, pa.string())
    values = np.ascontiguousarray(values, values.dtype.newbyteorder("="))
    if null is not None:
        return pa.array(values, mask=values == null)
    if name in VECTORS:
        flat = values.reshape(len(values), -1)
        return pa.FixedSizeListArray.from_arrays(pa.array(flat.ravel()), flat.shape[1])
    return pa.array(values)


def _about_field(column: pa.Field, key: str) -> str:
    """The `unit` or `description` of a column, empty if it has none."""
    return (column.metadata or {}).get(key.encode(), b"").decode()


_FORMATS: dict[str, tuple[Callable, Callable]] = {
    ".parquet": (_write_parquet, _read_parquet),
    ".fits": (_write_fits, _read_fits),
    ".csv": (_write_csv, _read_csv),
    ".vot": (_write_votable, _read_votable),
    ".xml": (_write_votable, _read_votable),
}

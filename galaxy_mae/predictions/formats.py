"""Predictions as Parquet, FITS, CSV and VOTable files: one table and its provenance, equal in all four.

A column's unit and description are in its Arrow field's metadata. Parquet is written row group by row group; the other
formats hold the table in memory while it is written. Their provenance has an entry `columns` more, from which names,
types, units and descriptions are read again.

Columns of a user's own table may have any type. All formats have 64-bit integers, which may be null, floats, and text:
smaller integers and booleans are written as integers, everything else as text, and a text that is null as an empty one.

Spreadsheets run a cell that begins with =, +, - or @ and is not a number: in CSV, such a text has a ' before it.

FITS allows ASCII without trailing spaces, and XML no control characters. Such characters are written there as Python's
backslash escapes, and a backslash as two.
"""

import itertools
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import csv

from galaxy_mae.data.fits import check_table, open_fits
from galaxy_mae.data.hats import read_table
from galaxy_mae.data.path_tables import check_votable
from galaxy_mae.errors import UserError, first_line
from galaxy_mae.files import atomic_file, check_output, read_json
from galaxy_mae.predictions.schema import VECTORS, Predictions, field, to_numpy, to_table

if TYPE_CHECKING:
    from astropy.table import Table

SUFFIXES = (".parquet", ".fits", ".csv", ".vot", ".xml")
_FIX = "write the catalogue again with python -m galaxy_mae.catalogue predict"
ABOUT = "galaxy_mae"  # where a file holds the provenance, as JSON
_IN_SIDE_FILE = ("about", "rows")
_UCDS = {
    **{"row": "meta.record", "object_id": "meta.id;meta.main", "label": "src.class", "predicted_class": "src.class"},
    **{"ra": "pos.eq.ra;meta.main", "dec": "pos.eq.dec;meta.main", "flag": "meta.code.qual", "problem": "meta.note"},
}
_NULL = -(2**63)  # an integer that is null, in FITS and VOTable
_FITS_NAME = re.compile(r"\w.{,59}", re.ASCII)  # names of columns that astropy takes


def write_catalogue(path: Path, tables: Iterable[pa.Table], about: dict[str, Any]) -> None:
    """Write predictions atomically, in the format that the suffix names.

    Args:
        path: the file; replaced if it exists. The provenance of NAME.csv is in NAME.csv.json beside it.
        tables: the rows in order, in at least one table of one schema.
        about: the provenance, as JSON.
    """
    with atomic_file(path) as tmp_path:
        _FORMATS[path.suffix.lower()][0](tmp_path, map(_portable, tables), about)


def check_catalogue_output(path: Path, flag: str, *, overwrite: bool, inputs: Iterable[str | Path]) -> None:
    """As `files.check_output`, of a file that `write_catalogue` is to write, and of the one beside a CSV file."""
    check_output(path, flag, SUFFIXES, overwrite=overwrite, inputs=inputs)
    if path.suffix.lower() == ".csv" and (side := _side_file(path)).exists():
        try:
            read_json(side, "", _IN_SIDE_FILE)
        except UserError:
            wrong = f"{side.name} beside it would be replaced, which this program did not write"
            raise UserError(f"{flag} {path}: {wrong}; choose another name") from None


def read_catalogue(path: Path, fix: str = _FIX) -> Predictions:
    """Read predictions that `write_catalogue` wrote.

    Args:
        path: the file.
        fix: how it is written again; it ends the error message.

    Raises:
        UserError: no such file, unknown suffix, damaged, edited by hand, far larger in memory than on the disk, or
            another program's file.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"catalogue {path}: its suffix names no format; use one of {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise UserError(f"{path}: no such file; {fix}")
    try:
        found = _FORMATS[path.suffix.lower()][1](path)
        found.validate()
        return found
    except UserError:
        raise
    except Exception as error:  # what the four libraries make of a damaged file, and `validate` of an edited one
        raise UserError(f"{path}: not a catalogue of this program, or damaged ({first_line(error)}); {fix}") from error


def _write_parquet(path: Path, tables: Iterable[pa.Table], about: dict) -> None:
    tables = iter(tables)
    first = next(tables)
    schema = first.schema.with_metadata({ABOUT: json.dumps(about)})
    with pq.ParquetWriter(path, schema, use_compliant_nested_type=False) as writer:
        for table in itertools.chain([first], tables):
            writer.write_table(table.cast(schema))


def _read_parquet(path: Path) -> Predictions:
    with pq.ParquetFile(path) as parquet:
        table = read_table(parquet, path)
    about = json.loads(table.schema.metadata[ABOUT.encode()])
    return Predictions(table.replace_schema_metadata(None), about)


def _write_fits(path: Path, tables: Iterable[pa.Table], about: dict) -> None:
    from astropy.io import fits

    table = pa.concat_tables(tables)
    plain = _to_astropy(table, _NOT_FITS)
    for i, name in enumerate(table.column_names):
        if _FITS_NAME.fullmatch(name := _escape(name, _NOT_FITS)):
            plain.rename_column(f"column_no_{i}", name)
    hdu = fits.table_to_hdu(plain)
    for i, column in enumerate(table.schema, 1):
        hdu.header[f"TCOMM{i}"] = _escape(_about_field(column, "description"), _NOT_FITS)
        if ucd := _ucd(column.name):
            hdu.header[f"TUCD{i}"] = ucd
        if table[i - 1].null_count:
            hdu.header[f"TNULL{i}"] = _NULL
    hdu.header["RADESYS"] = "ICRS"
    hdu.header["EXTNAME"] = "CATALOGUE"
    hdu.header["DATE"] = (str(about.get("created", ""))[:19], "UTC")
    hdu.header["CREATOR"] = "galaxy_mae"
    hdu.header["ABOUT"] = json.dumps(_with_columns(about, table))  # ASCII, however long: CONTINUE cards
    fits.HDUList([fits.PrimaryHDU(), hdu]).writeto(path, output_verify="exception")


def _read_fits(path: Path) -> Predictions:
    with open_fits(path) as file:
        hdu = file["CATALOGUE"]
        check_table(hdu, path)
        about = json.loads(hdu.header["ABOUT"])
        return _to_predictions((_unescaped(hdu.data.field(i)) for i in range(len(hdu.columns))), about)


def _write_votable(path: Path, tables: Iterable[pa.Table], about: dict) -> None:
    from astropy.io import votable

    table = pa.concat_tables(tables)
    file = votable.from_table(_to_astropy(table, _NOT_VOTABLE))
    file.resources[0].coordinate_systems.append(votable.tree.CooSys(ID="sky", system="ICRS"))
    for name, column in zip(table.column_names, file.get_first_table().fields, strict=True):
        column.ucd, column.ref = _ucd(name), "sky" if name in ("ra", "dec") else None
        column.name = name  # which may be no identifier of XML; that is `column_no_0` and so on
        if column.datatype == "unicodeChar":
            column.arraysize = "*"  # else as long as the longest text of this catalogue
        if table[name].null_count:
            column.values.null = _NULL
    for key, value in _with_columns(about, table).items():
        text = json.dumps(value)
        for character in "<>&":  # astropy 8.0 escapes them twice in attributes
            text = text.replace(character, f"\\u{ord(character):04x}")
        param = votable.tree.Param(file, ID=f"about_{key}", name=key, datatype="char", arraysize="*", value=text)
        file.get_first_table().params.append(param)
    file.to_xml(str(path), tabledata_format="tabledata")


def _read_votable(path: Path) -> Predictions:
    from astropy.io import votable

    check_votable(path)
    table = votable.parse_single_table(path)
    about = {param.name: json.loads(str(param.value)) for param in table.params}
    return _to_predictions((_unescaped(table.array[column.ID].data) for column in table.fields), about)


def _to_astropy(table: pa.Table, forbidden: re.Pattern) -> "Table":
    """A table of the columns `column_no_0`, `column_no_1`, ..., with `_NULL` for integers that are null."""
    from astropy.table import Column, Table

    columns = []
    for i, (entry, column) in enumerate(zip(table.schema, table.columns, strict=True)):
        values = to_numpy(column.fill_null(_NULL) if column.null_count else column)
        if values.dtype.kind == "O":
            values = np.array([_escape(value, forbidden) for value in values], dtype=str)
        unit, description = (_about_field(entry, key) or None for key in ("unit", "description"))
        columns.append(Column(values, f"column_no_{i}", unit=unit, description=description))
    return Table(columns, copy=False)


_NOT_FITS = re.compile(r"[^\x20-\x7e]|\\| (?=\s*$)")
_NOT_VOTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\ufffe\uffff]|\\|^\s|\s(?=\s*$)|(?<=\s)\s")
_ESCAPED = re.compile(r"\\(?:[\\nrt]|x.{2}|u.{4}|U.{8})")


def _escape(text: str, forbidden: re.Pattern) -> str:
    """Write what a pattern finds as Python's backslash escapes."""
    return forbidden.sub(lambda x: r"\x20" if x[0] == " " else x[0].encode("unicode_escape").decode(), text)


def _unescaped(values: np.ndarray) -> np.ndarray:
    """A column of texts without the escapes; others as they are."""
    if values.dtype.kind not in "OU":
        return values
    texts = (_ESCAPED.sub(lambda x: x[0].encode().decode("unicode_escape"), str(text)) for text in values)
    return np.array([*texts, None], object)[:-1]


_FORMULA = re.compile(r"'*(?:[=@\t\r]|[+-](?!(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?\Z)).*", re.DOTALL)


def _guarded(texts: Iterable[str | None]) -> list[str | None]:
    """Texts with a ' before those that a spreadsheet would run, and before those that look like it."""
    return [f"'{text}" if text and _FORMULA.fullmatch(text) else text for text in texts]


def _write_csv(path: Path, tables: Iterable[pa.Table], about: dict) -> None:
    table, columns = pa.concat_tables(tables), {}
    for name, column in zip(table.column_names, table.columns, strict=True):
        values = to_numpy(column)
        if name in VECTORS:
            parts = zip(_names_in_csv(name, values.shape[1]), values.T, strict=True)
            columns |= {part: pa.array(each, from_pandas=True) for part, each in parts}
        elif pa.types.is_string(column.type):
            columns[name] = pa.array(_guarded(column.to_pylist()), pa.string())
        else:  # null, which is an empty cell, in place of NaN
            columns[name] = pa.array(values, from_pandas=True) if pa.types.is_floating(column.type) else column
    csv.write_csv(pa.table(list(columns.values()), _guarded(columns)), path)
    side = {"about": _with_columns(about, table), "rows": len(table)}
    _side_file(path).write_text(json.dumps(side, indent=2) + "\n", encoding="utf-8")


def _read_csv(path: Path) -> Predictions:
    try:
        side = read_json(_side_file(path), _FIX, _IN_SIDE_FILE)
    except FileNotFoundError as error:
        side_name = _side_file(path).name
        raise UserError(f"{path}: {side_name} with its provenance is not beside it; copy it, too") from error
    names = [_names_in_csv(column["name"], column["length"]) for column in side["about"]["columns"]]
    kinds = [pa.type_for_alias(column["type"]) for column in side["about"]["columns"]]
    types = {name: kind for of_column, kind in zip(names, kinds, strict=True) for name in of_column}
    table = csv.read_csv(
        path,
        read_options=csv.ReadOptions(column_names=list(types), skip_rows=1),
        parse_options=csv.ParseOptions(newlines_in_values=True),
        convert_options=csv.ConvertOptions(column_types=types, null_values=[""], strings_can_be_null=False),
    )
    if len(table) != side["rows"]:
        raise ValueError(f"it has {len(table):,} of {side['rows']:,} rows")

    def values(name: str) -> np.ndarray:
        column = table[name]
        if pa.types.is_string(column.type):
            texts = (x[1:] if x.startswith("'") and _FORMULA.fullmatch(x) else x for x in column.to_pylist())
            return np.array([*texts, None], object)[:-1]
        return to_numpy(column.fill_null(_NULL) if pa.types.is_integer(column.type) else column)

    return _to_predictions((np.stack(list(map(values, parts)), axis=1) for parts in names), side["about"])


def _names_in_csv(name: str, length: int | None) -> list[str]:
    """The header of a column: its name, or one for each element of a vector."""
    return [name] if length is None else [f"{name}_{i:03d}" for i in range(length)]


def _side_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


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


def _with_columns(about: dict[str, Any], table: pa.Table) -> dict[str, Any]:
    """The provenance, and as `columns` what the formats cannot say of the columns."""
    columns = [
        {
            "name": column.name,
            "length": column.type.list_size if column.name in VECTORS else None,
            "type": str(column.type.value_type if column.name in VECTORS else column.type),
            **{key: _about_field(column, key) for key in ("unit", "description")},
        }
        for column in table.schema
    ]
    return about | {"columns": columns}


def _to_predictions(values: Iterable[np.ndarray], about: dict[str, Any]) -> Predictions:
    """The inverse of `_with_columns`, from the values of each column in order, of any byte order."""
    columns = []
    for column, part in zip(about.pop("columns"), values, strict=True):
        kind = pa.type_for_alias(column["type"])
        part = part.astype(kind.to_pandas_dtype()).reshape(len(part), -1)
        if column["length"] is not None:
            array = pa.FixedSizeListArray.from_arrays(pa.array(part.ravel()), column["length"])
        else:
            part = part.ravel()
            array = pa.array(part, kind, mask=part == _NULL if pa.types.is_integer(kind) else None)
        columns.append((field(column["name"], array.type, column["description"], column["unit"]), array))
    return Predictions(to_table(columns), about)


def _ucd(name: str) -> str | None:
    """What a column of ours holds, in the IVOA's words (https://www.ivoa.net/documents/UCD1+)."""
    return _UCDS.get(name, "stat.probability" if name.startswith("p_") else None)


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

"""The columns of a table of galaxies: which one is the label, the position or the name, and what they may hold.

Every kind of input gives a table; what is in it is found here and nowhere else.
"""

import json
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa

from galaxy_mae.errors import UserError

Rows = TypeVar("Rows", pa.RecordBatch, pa.Table)

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
_COUNTS = (1081, 1853, 2645, 2027, 334, 2043, 1829, 2628, 1423, 1873)  # galaxies of each class of Galaxy10 DECaLS
GALAXY10_SDSS_CLASSES = (  # https://astronn.readthedocs.io/en/latest/galaxy10sdss.html
    "Disk, Face-on, No Spiral",
    "Smooth, Completely round",
    "Smooth, in-between round",
    "Smooth, Cigar shaped",
    "Disk, Edge-on, Rounded Bulge",
    "Disk, Edge-on, Boxy Bulge",
    "Disk, Edge-on, No Bulge",
    "Disk, Face-on, Tight Spiral",
    "Disk, Face-on, Medium Spiral",
    "Disk, Face-on, Loose Spiral",
)
LABELS = ("label", "labels", "ans", "gz10_label")
_SURE = {*LABELS, "ra", "dec"}  # what such a column holds that cannot be one is an error; of other names it is kept
# What a column may be called, in any case; the first name that is there is taken. `gz10_label` and `rgb_pixel_scale`
# are of the Multimodal Universe, `iauname`, `dr7objid` and `GalaxyID` of Galaxy Zoo.
COLUMN_NAMES = {
    "image": ("image", "img", "images", "rgb_image", "rgb"),
    "path": ("path", "file_loc", "image_path", "file_path", "filename", "file_name", "file"),
    "label": (*LABELS, "class", "morphology", "type"),
    "ra": ("ra", "raj2000", "right_ascension", "ra_deg", "_ra", "_raj2000", "ra_icrs"),
    "dec": ("dec", "dej2000", "declination", "dec_deg", "_de", "_dej2000", "de_icrs"),
    "pixel_scale": ("pxscale", "rgb_pixel_scale"),
    "object_id": (
        *("object_id", "objid", "galaxy_id", "galaxyid", "source_id"),
        *("iauname", "dr7objid", "dr8objid", "id_str", "id"),
    ),
}
# What `--columns` calls the fields that it names a column of; and these fields.
_NAMED = {"image": "image", "label": "label", "id": "object_id", "ra": "ra", "dec": "dec", "pxscale": "pixel_scale"}
COLUMNS_HELP = f"columns of a table, as in label=morphology id=name: {', '.join(_NAMED)} (default: by usual names)"
SKY_FIELDS = ("ra", "dec", "pixel_scale")
_SKY_RANGES = {"ra": (-180, 360), "dec": (-90, 90), "pixel_scale": (1e-6, 60)}  # degrees; arcsec per pixel
_MAX_CLASSES = 1000


def parse_columns(texts: Iterable[str]) -> dict[str, str]:
    """The columns that `--columns` names, by their fields. Raises a `UserError` if it is not understood."""
    pairs = [str(text).partition("=")[::2] for text in texts]
    if wrong := [f"{key}={name}" for key, name in pairs if key not in _NAMED or not name]:
        raise UserError(f"--columns {wrong[0][:100]}: write {'=NAME, '.join(_NAMED)}=NAME")
    if len({key for key, _ in pairs}) < len(pairs) or len({name for _, name in pairs}) < len(pairs):
        raise UserError(f"--columns {' '.join(map('='.join, pairs))[:200]}: name each, and each column, once")
    return {_NAMED[key]: name for key, name in pairs}


def find_column(names: Iterable[str], field: str) -> str | None:
    """The column that holds a field of `COLUMN_NAMES`, or None."""
    found = {name.lower(): name for name in reversed(list(names))}
    return next((found[name] for name in COLUMN_NAMES[field] if name in found), None)


def check_unique(where: str, names: list[str], used: Iterable[str]) -> None:
    """Raise a `UserError` if a column that is used has the name of another one."""
    if twice := next((name for name in used if names.count(name) > 1), None):
        raise UserError(f"{where}: it has {names.count(twice)} columns `{twice}`: rename or remove all but one")


def is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def is_plain(kind: pa.DataType) -> bool:
    """Whether a column of this type has one number, text, date or the like per row: not a list, struct or image."""
    return not (pa.types.is_nested(kind) or is_bytes(kind))


def is_bytes(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def plain_schema(schema: pa.Schema) -> pa.Schema:
    """A schema without dictionaries and views, as of Polars, which many functions of pyarrow do not take."""
    return pa.schema([field.with_type(_plain_type(field.type)) for field in schema], schema.metadata)


def _plain_type(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_plain_type(field.type)) for field in kind])
    if pa.types.is_dictionary(kind):
        return _plain_type(kind.value_type)
    views = {pa.string_view(): pa.large_string(), pa.binary_view(): pa.large_binary()}
    return views.get(kind, kind)


def plain_rows(rows: Rows) -> Rows:
    """Rows in their `plain_schema`. Bytes of a text that are not UTF-8 become Python's escapes, as in `NGC\\xe9`."""
    schema = plain_schema(rows.schema)
    rows = rows if rows.schema.equals(schema) else rows.cast(schema)
    for i, field in enumerate(schema):
        if is_text(field.type):
            try:
                rows.column(i).validate(full=True)
            except pa.ArrowInvalid:
                values = rows.column(i).cast(pa.large_binary()).to_pylist()
                texts = [value if value is None else value.decode("utf-8", "backslashreplace") for value in values]
                rows = rows.set_column(i, field, pa.array(texts, field.type))
    return rows


def declared_features(schema: pa.Schema) -> dict[str, dict]:
    """What the `datasets` library wrote about the columns of a Parquet file: classes, images."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {name: feature for name, feature in features.items() if isinstance(feature, dict)}
    except (KeyError, ValueError, TypeError, AttributeError):
        return {}


def descriptive_columns(schema: pa.Schema) -> list[str]:
    """The columns that `read_columns` has a use for: not lists, structs and images, unless it refuses them."""
    used = {find_column(schema.names, field) for field in ("label", *SKY_FIELDS, "object_id")}
    return [field.name for field in schema if is_plain(field.type) or field.name in used]


def read_columns(
    where: str,
    table: pa.Table,
    class_names: tuple[str, ...] = (),
    size: int | None = None,
    given: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, Any]:
    """Find and check the columns of a table of N galaxies.

    Args:
        where: the file or flag, for messages.
        table: without images.
        class_names: the names of the classes of integer labels, if they are known and the table does not declare them.
        size: of the images, in pixels, by which the two versions of Galaxy10 are recognized.
        given: columns by their fields, as of `parse_columns`; others are found by their names.

    Returns:
        `label`, `class_names`, `ra`, `dec`, `pixel_scale` and `extra` as in `cache.Galaxies`; and `object_id`, N names,
        empty where one is missing, or None; and `notes`, what is in the table and is not used, and why.

    Raises:
        UserError: a label, coordinate or pixel scale is impossible, or a column has another type.
    """
    every, known = table.column_names, ("label", *SKY_FIELDS, "object_id")
    given = {field: name for field, name in given.items() if field != "image"}
    if missing := [name for name in given.values() if name not in every]:
        others = ", ".join(every)[:500]
        raise UserError(f"{where}: --columns: no column {missing[0]!r} beside the images, only {others}")
    left = [name for name in every if name not in given.values()]
    names = {field: name for field in known if (name := given.get(field) or find_column(left, field))}
    check_unique(where, every, names.values())
    notes = []
    for field, other in (("ra", "dec"), ("dec", "ra")):
        if field in names and other not in names:
            notes.append(f"`{names.pop(field)}` is not used, because there is no `{other}`: overlaps are not known")
    found = dict.fromkeys(known) | {"class_names": ()}
    for field, name in [(field, names[field]) for field in (*SKY_FIELDS, "label") if field in names]:
        try:
            if field != "label":
                found[field] = _sky(where, field, name, table[name])
                continue
            own_names = tuple(declared_features(table.schema).get(name, {}).get("names", class_names))
            found["label"], found["class_names"] = _labels_and_names(where, name, table[name], own_names, size)
            if found["label"] is None:
                notes.append(f"the labels in `{name}` are partly missing or not integers: they are not used")
        except UserError as error:
            if name.lower() in _SURE or field == "pixel_scale" or field in given:
                raise
            notes.append(f"`{name}` is not used as {field}: {str(error).removeprefix(f'{where}: ')}")
    if name := names.get("object_id"):
        kind = table[name].type
        if pa.types.is_integer(kind) or is_text(kind):
            found["object_id"] = table[name].cast(pa.large_string()).fill_null("").to_pylist()
        else:
            notes.append(f"`{name}` is {str(kind)[:60]}, not text or an integer: it is not used")
    used = [name for field, name in names.items() if found[field] is not None]
    others = (name for name in every if name not in used and every.count(name) == 1)
    extra = [name for name in others if is_plain(table.schema.field(name).type)]
    if given or any(names.get(field, "").lower() not in {"", *_SURE} for field in ("label", "ra", "dec")):
        uses = ", ".join(f"`{name}` as {field}" for field, name in names.items() if name in used)
        notes.append(f"columns used: {uses}; passed through: {', '.join(extra)[:500] or 'none'}")
    return found | {"extra": table.select(extra).replace_schema_metadata(None), "notes": notes}


def numbers(where: str, name: str, column: pa.ChunkedArray) -> np.ndarray:
    """A column of numbers as float64, NaN where a value is missing."""
    try:
        return column.cast(pa.float64()).to_numpy()
    except pa.ArrowException as error:  # another type, text that is no number, integers too large for float64
        wrong = f"must contain numbers (degrees, arcsec), not {str(column.type)[:60]}"
        raise UserError(f"{where}: its column `{name}` {wrong}") from error


def _sky(where: str, field: str, name: str, column: pa.ChunkedArray) -> np.ndarray:
    """A column of `SKY_FIELDS`, (N,) float64. NaN says that a value is not known; an impossible one is an error."""
    values = numbers(where, name, column)
    lowest, highest = _SKY_RANGES[field]
    wrong = np.flatnonzero((values < lowest) | (values > highest))
    if len(wrong):
        value, unit = f"row {wrong[0]} has `{name}` {values[wrong[0]]:g}", "degrees, or arcsec per pixel"
        raise UserError(f"{where}: {value}; it must be from {lowest} to {highest} ({unit}), or NaN if it is not known")
    return np.where(values < 0, values + 360, values) if field == "ra" else values


def _labels_and_names(
    where: str, name: str, column: pa.ChunkedArray, own_names: tuple[str, ...], size: int | None
) -> tuple[np.ndarray | None, tuple[str, ...]]:
    """Integer labels and the names of the classes: the source's own names, or those of Galaxy10 where it is known.

    Strings become classes in alphabetical order. Labels that are partly missing or not integers are None, because
    pre-training does not need labels.
    """
    if pa.types.is_nested(column.type):
        raise UserError(f"{where}: column `{name}` has {str(column.type)[:60]}, not one label per image: rename it")
    values = np.asarray(column.to_pylist())
    if values.dtype.kind in "UT":
        own_names, values = np.unique(values, return_inverse=True)
    elif values.dtype.kind not in "iuf" or column.null_count or np.any(values != np.floor(values)):
        return None, ()
    if len(own_names):
        class_names = tuple(map(str, own_names))
    elif name == "gz10_label" or (size == 256 and _is_ordered_as_galaxy10(values)):
        class_names = GALAXY10_CLASSES
    elif size == 69 and np.array_equal(np.unique(values), np.arange(10)):
        class_names = GALAXY10_SDSS_CLASSES
    else:
        class_names = tuple(f"class {i}" for i in range(int(min(values.max(), _MAX_CLASSES)) + 1))
    if len(class_names) > _MAX_CLASSES:
        wrong = f"has more than {_MAX_CLASSES} classes, so it does not contain class labels"
        raise UserError(f"{where}: column `{name}` {wrong}; rename that column")
    wrong = np.flatnonzero((values < 0) | (values >= len(class_names)))
    if len(wrong):
        label, fix = values[wrong[0]], f"labels must be integers from 0 to {len(class_names) - 1}"
        raise UserError(f"{where}: row {wrong[0]} has label {label}; {fix}")
    return values.astype(np.int64), class_names


def _is_ordered_as_galaxy10(values: np.ndarray) -> bool:
    """Whether (N,) labels are 0 to 9, and their classes as frequent, in order, as those of Galaxy10 DECaLS."""
    classes, counts = np.unique(values, return_counts=True)
    return np.array_equal(classes, np.arange(10)) and np.array_equal(np.argsort(counts), np.argsort(_COUNTS))

"""Images in columns of Arrow tables: Parquet files, HATS catalogues, and data sets of the Hugging Face Hub."""

import errno
import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from galaxy_mae.data.columns import (
    COLUMN_NAMES,
    check_unique,
    declared_features,
    descriptive_columns,
    find_column,
    is_bytes,
    plain_rows,
    plain_schema,
)
from galaxy_mae.data.download import content_fingerprint
from galaxy_mae.data.fits import Stretch, UnreadableImage, check_size
from galaxy_mae.data.hats import READERS, Partition, open_hats, read_table
from galaxy_mae.data.images import Encoded
from galaxy_mae.data.source import TEST, Source, not_read, splits_by_name, text_of_path
from galaxy_mae.errors import DISK_FULL, UserError, first_line, is_disk_full, root_cause
from galaxy_mae.files import bytes_on_disk, check_decoded

BANDS = ("g", "r", "z")  # of multi-band images, that become blue, green and red
IMAGE_ROWS = 64  # read at once, with images
_FIX = "write the encoded images into the table, or pass a folder of images"


@dataclass(frozen=True)
class ImageColumn:
    """The column of an Arrow table in which the images are.

    Attributes:
        kind: `encoded` (binary, or a struct with `bytes`), or `flux` (a struct of `band` and `flux`).
        columns: what is read of it, as names for `Partition.read`.
        bands: of fluxes, the names of those that become blue, green and red.
    """

    name: str
    kind: str
    columns: tuple[str, ...]
    bands: tuple[str, ...] = BANDS

    def encoded(
        self, values: pa.Array | pa.ChunkedArray, may_read: Callable[[str], bool] = lambda path: False
    ) -> list[Encoded]:
        """The images of the column's values. A file is read only if `may_read` says so of its path."""
        values = values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values
        if self.kind == "flux":
            bands, flux = (pc.struct_field(values, name) for name in ("band", "flux"))
            return [self._fluxes(bands[row], flux[row]) for row in range(len(values))]
        if not pa.types.is_struct(values.type):
            return values.to_pylist()
        images = pc.struct_field(values, "bytes").to_pylist()
        for row in (row for row, image in enumerate(images) if image is None):
            try:
                path = str((values[row].as_py() or {}).get("path") or "")
            except UnicodeDecodeError:
                path = "(not UTF-8)"
            if path:
                problem = UnreadableImage(f"has the path or URL {path[:100]!r} in place of its content: {_FIX}")
                images[row] = Path(path) if may_read(path) else problem
        return images

    def _fluxes(self, names: pa.Scalar, flux: pa.Scalar) -> Encoded:
        """(3, H, W) floats of the three bands, or why they cannot be used."""
        if not names.is_valid or not flux.is_valid:
            return None
        found = [letter(str(name)) for name in names.as_py()]
        if missing := [band for band in self.bands if letter(band) not in found]:
            return UnreadableImage(f"has no band {missing[0]}, only {', '.join(map(str, names.as_py()))}")
        try:
            planes = dict(zip(found, flux.values, strict=True))
            return np.stack([_plane(planes[letter(band)]) for band in self.bands])
        except UnreadableImage as problem:
            return problem
        except Exception:  # whatever lists of other depths and types lead pyarrow to
            return UnreadableImage("has bands that are no images of one shape, or that have no names")


def image_column(where: str, schema: pa.Schema, name: str | None = None, bands: Sequence[str] = ()) -> ImageColumn:
    """Find the images of a table: a column of a usual name that holds images, else one that is declared as images.

    Args:
        where: flag and name of the table, for messages.
        schema: of the table.
        name: of the column, if it is known.
        bands: of fluxes that become blue, green and red; none if fluxes are not taken.

    Raises:
        UserError: there is no such column.
    """
    encoded, flux = (_columns_of_kind(schema, kind) for kind in ("encoded", "flux"))
    found = name or _find_encoded(schema) or (find_column(flux, "image") if bands else None)
    check_unique(where, schema.names, [found])
    if found in encoded:
        kind = schema.field(found).type
        fields = [field.name for field in kind] if pa.types.is_struct(kind) else []
        columns = tuple(f"{found}.{field}" for field in ("bytes", "path") if field in fields)
        return ImageColumn(found, "encoded", columns or (found,))
    if found in flux and bands:
        return ImageColumn(found, "flux", (f"{found}.band", f"{found}.flux"), tuple(bands))
    what = f"{name!r} of images" if name else f"of images ({', '.join(COLUMN_NAMES['image'])})"
    fix = "set --image_column" if bands else f"paths or URLs are not read: {_FIX}"
    raise UserError(f"{where}: no column {what}, only {', '.join(schema.names[:20])}; {fix}")


def _columns_of_kind(schema: pa.Schema, kind: str) -> list[str]:
    return [field.name for field in schema if _kind(field.type) == kind]


def _find_encoded(schema: pa.Schema) -> str | None:
    """The column of encoded images of a usual name, else one that is declared as images."""
    encoded = _columns_of_kind(schema, "encoded")
    declared = [name for name, feature in declared_features(schema).items() if feature.get("_type") == "Image"]
    return find_column(encoded, "image") or next((name for name in declared if name in encoded), None)


def _kind(kind: pa.DataType) -> str:
    """`encoded` or `flux` if a column of this type holds images, else empty."""
    if pa.types.is_struct(kind):
        fields = {field.name: field.type for field in kind}
        if "bytes" not in fields:
            return "flux" if "band" in fields and pa.types.is_nested(fields.get("flux", pa.null())) else ""
        kind = fields["bytes"]
    return "encoded" if is_bytes(kind) else ""


def letter(band: str) -> str:
    """The letter of a band; that of `des-g` is `g`."""
    return band.lower().rpartition("-")[2]


def _plane(band: pa.Scalar) -> np.ndarray:
    """(H, W) floats of a list of rows. Raises a ValueError if there is none, or they differ in length."""
    rows = band.values
    (width,) = {length or 0 for length in (rows.value_lengths().to_pylist() if rows is not None else ())} - {0}
    check_size(width, len(rows))
    return rows.flatten().to_numpy(zero_copy_only=False).reshape(len(rows), width)


def concatenated(where: str, tables: list[pa.Table]) -> pa.Table:
    """The tables of several files as one. Raises a `UserError` if a column has types that do not fit together."""
    try:
        return pa.concat_tables(tables, promote_options="permissive") if len(tables) > 1 else tables[0]
    except pa.ArrowException as error:
        fix = "write all files with the same columns"
        raise UserError(f"{where}: its files do not fit together ({first_line(error)}): {fix}") from error


class ParquetSource(Source):
    """Galaxies in Parquet shards: the partitions of a HATS catalogue, or files, which are partitions of order -1.

    They have `shards`, a tuple of partitions.
    """

    shards: tuple[Partition, ...]

    @property
    def shard_files(self) -> list[tuple[Partition, Path]]:
        """All files, each after its shard. Raises a `UserError` if a shard has none, or there is no shard."""
        if not self.shards:
            raise UserError(f"{self.where}: it has no Parquet file")
        return [(partition, file) for partition in self.shards for file in partition.existing()]

    @cached_property
    def schema(self) -> pa.Schema:
        """That of the first file."""
        partition, file = self.shard_files[0]
        with partition.open(file) as parquet:
            return plain_schema(parquet.schema_arrow)

    @cached_property
    def image(self) -> ImageColumn:
        return image_column(self.where, self.schema, self.options.image_column)

    @cached_property
    def _rows(self) -> list[int]:
        """The number of rows of each shard."""
        with ThreadPoolExecutor(READERS) as pool:
            return list(pool.map(Partition.count_rows, self.shards))

    @property
    def num_rows(self) -> int:
        return sum(self._rows)

    @property
    def predefined_test(self) -> np.ndarray:
        return np.repeat([partition.is_test for partition in self.shards], self._rows)

    @property
    def table(self) -> pa.Table:
        tables, size, stored = [], 0, 0
        for partition, file in self.shard_files:
            with partition.open(file) as parquet:
                columns = descriptive_columns(plain_schema(parquet.schema_arrow))
                tables.append(read_table(parquet, file, columns))
            size, stored = size + tables[-1].nbytes, stored + bytes_on_disk(file)
            check_decoded(size, file, stored)
        return concatenated(self.where, tables)

    def images(self) -> Iterator[Sequence[Encoded]]:
        for partition in self.shards:
            for batch in partition.read(self.image.columns, IMAGE_ROWS):
                if self.image.name not in batch.schema.names:
                    raise UserError(f"{self.where}: {partition.location} has no column `{self.image.name}`")
                yield self.image.encoded(batch[self.image.name])


class ParquetFiles(ParquetSource):
    """A Parquet file, or a folder of them or of `save_to_disk`, whose names may tell splits."""

    suffixes = (".parquet", ".arrow")

    @cached_property
    def shards(self) -> tuple[Partition, ...]:
        if self.path.is_file():
            return (Partition(-1, -1, text_of_path(self.path.name), (self.path,)),)
        names = self._names
        splits = splits_by_name(names)[0]
        return tuple(
            Partition(-1, -1, text_of_path(names[i]), (self.path.resolve() / names[i],), splits[i] == TEST)
            for i in np.argsort(splits, kind="stable")
        )

    @property
    def _names(self) -> list[str]:
        """Of the Parquet files in a folder, relative to it; without the caches of `map`."""
        files = [file for file in self.files if file.suffix.lower() in self.suffixes]
        return [str(file.relative_to(self.path)) for file in files if not re.fullmatch(r"cache-.*\.arrow", file.name)]

    @property
    def has_images(self) -> bool:
        """Whether images are in its first file, or that cannot be read."""
        try:
            return _find_encoded(self.schema) is not None
        except UserError:
            return True

    @property
    def notes(self) -> list[str]:
        if self.path.is_file():
            return []
        names = self._names
        own = {"dataset_dict.json", "dataset_info.json", "state.json", *names}
        others = [file for file in self.files if not own & {file.name, str(file.relative_to(self.path))}]
        return [*not_read(others, "beside Parquet files"), *splits_by_name(names)[2]]


class HatsSource(ParquetSource):
    """A HATS catalogue, or the primary catalogue of a collection."""

    @cached_property
    def _catalogue(self):
        return open_hats(self.name, self.options.flag)

    @property
    def fingerprint(self) -> str:
        return content_fingerprint([file for _, file in self.shard_files], self._catalogue.path)

    @property
    def shards(self) -> tuple[Partition, ...]:
        return self._catalogue.partitions


class Hub(Source):
    """A data set on the Hugging Face Hub: `OWNER/NAME`.

    The `datasets` library finds the files, the splits and the features, and keeps them in a folder that is named by
    the revision of the data set, which is part of the fingerprint. No code that comes with a data set is run.
    """

    @cached_property
    def _splits(self) -> dict:
        """The rows of each split; the test split is the last one."""
        import datasets  # slow to import

        with _library_errors(self.where):
            splits = datasets.load_dataset(self.name, trust_remote_code=False)
        return dict(sorted(splits.items(), key=lambda split: (split[0] == "test", split[0])))

    @property
    def fingerprint(self) -> str:
        # The library's own fingerprint covers the revision of the files and the reading options.
        parts = " ".join(f"{split} {part._fingerprint}" for split, part in sorted(self._splits.items()))
        if self.options.stretch != Stretch():
            parts += f" {self.options.stretch}"
        return hashlib.sha256(parts.encode()).hexdigest()

    @cached_property
    def _rows(self):
        """All rows as a `datasets.Dataset` in Arrow's format: never decoded by the library, which would open URLs."""
        import datasets

        with _library_errors(self.where):
            return datasets.concatenate_datasets(list(self._splits.values())).with_format("arrow")

    @cached_property
    def _schema(self) -> pa.Schema:
        return plain_schema(self._rows.features.arrow_schema)

    @cached_property
    def _image(self) -> ImageColumn:
        return image_column(self.where, self._schema, self.options.image_column)

    @property
    def num_rows(self) -> int:
        return len(self._rows)

    @property
    def predefined_test(self) -> np.ndarray:
        return np.concatenate([np.full(len(rows), name == "test") for name, rows in self._splits.items()])

    @property
    def table(self) -> pa.Table:
        table = self._rows.select_columns(descriptive_columns(self._schema))[:]
        return plain_rows(table.replace_schema_metadata(self._schema.metadata))

    def images(self) -> Iterator[Sequence[Encoded]]:
        images = self._rows.select_columns([self._image.name])
        for start in range(0, len(images), IMAGE_ROWS):
            yield self._image.encoded(images[start : start + IMAGE_ROWS][self._image.name], _is_downloaded)


def _is_downloaded(path: str) -> bool:
    """Whether the library downloaded an image, at a revision that is in the fingerprint."""
    import datasets
    from huggingface_hub.constants import HF_HUB_CACHE

    caches = (datasets.config.HF_DATASETS_CACHE, datasets.config.HF_CACHE_HOME, HF_HUB_CACHE)
    return any(Path(path).resolve().is_relative_to(Path(cache).resolve()) for cache in caches)


@contextmanager
def _library_errors(where: str) -> Iterator[None]:
    """Silence the `datasets` library, and turn its failures into a `UserError` that names the first cause."""
    import datasets

    verbosity = datasets.utils.logging.get_verbosity()
    datasets.utils.logging.set_verbosity_error()
    try:
        yield
    except Exception as error:  # the library raises whatever its readers and the network raise
        cause = root_cause(error)
        folder = getattr(cause, "filename", None) or datasets.config.HF_DATASETS_CACHE
        if is_disk_full(cause) or "Not enough disk space" in str(cause):
            fix = "free some space, or set HF_HOME to a folder on another disk"
            raise UserError(f"{folder}: {DISK_FULL}, and the table does not fit: {fix}") from error
        if getattr(cause, "errno", None) in (errno.EROFS, errno.EACCES, errno.EPERM):
            fix = "set HF_HOME to a folder that you may write to"
            raise UserError(f"{where}: {folder}: {cause.strerror}: {fix}") from error
        reasons = ": ".join(dict.fromkeys(first_line(reason)[:300] for reason in (error, cause)))
        wrong = f"cannot be read as a data set of the Hub ({reasons})"
        raise UserError(f"{where}: {wrong}; check the spelling, the files and the network") from error
    finally:
        datasets.utils.logging.set_verbosity(verbosity)

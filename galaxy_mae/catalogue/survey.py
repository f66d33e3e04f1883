"""A HATS catalogue of images in, the same catalogue with classes and embeddings out, partition by partition.

Several tasks, as of a Slurm array, share the partitions. Each partition is written into a staging folder and renamed
when it is complete, so a killed task loses only the partitions in its hands, and the same command resumes. A partition
names in its Parquet metadata what it was computed from: the model, the settings and the input catalogue. The last step
compares all partitions with the input and writes the catalogue's own metadata, so LSDB opens complete outputs only.

Record batches are streamed, decoded by threads ahead of the model, and run across partitions, so memory does not grow
with the partitions, and small ones fill the model's batches. An image's outputs do not depend on the batch it is in
(`CatalogueModel.outputs`), and so not on the number of tasks or on interruptions.
"""

import dataclasses
import functools
import heapq
import json
import logging
import os
import shutil
import sys
import threading
import time
from argparse import Namespace
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from galaxy_mae import provenance
from galaxy_mae.catalogue.models import CatalogueModel, open_model
from galaxy_mae.catalogue.predict import output_columns, resumable_disk_full, select_device
from galaxy_mae.data.fits import Stretch
from galaxy_mae.data.hats import COLLECTION, COMMON_METADATA, PARTITIONS, HatsCatalogue, Partition, open_hats
from galaxy_mae.data.hats import pixel_location as location_of
from galaxy_mae.data.images import check_square, decode_rgb, decoding
from galaxy_mae.data.readers import COLUMN_NAMES, UnreadableImage, find_column
from galaxy_mae.data.sources import area_average
from galaxy_mae.errors import UserError
from galaxy_mae.files import atomic_file, flush, read_json, remove_leftovers, temporary_folder, write_json
from galaxy_mae.training.tracking import setup_logging

if TYPE_CHECKING:
    from lsdb.catalog import Catalog

logger = logging.getLogger(__name__)

BANDS = ("g", "r", "z")  # of multi-band images, that become blue, green and red
_READ_ROWS = 64  # of a record batch; multi-band images of 160 x 160 in four bands are then 26 MB
_RUN_IMAGES = {"cpu": 64, "cuda": 512}  # that go through the model together, at most: full batches
_RUN_BYTES = 32 << 20  # of their pixels
_GROUP_ROWS = 16_384  # of a Parquet row group of the output
_ABOUT = "galaxy_mae"  # the key of a Parquet file's metadata that says where its rows come from, as JSON
_SURVEY = "survey.json"  # the same, of the output folder
_NOT_COMPARED = {"commit", "versions", "created"}
_SKY_MAPS = ("skymap.fits", "point_map.fits")
_KEPT_PROPERTIES = (
    *("hats_col_ra", "hats_col_dec", "hats_col_healpix", "hats_col_healpix_order", "hats_skymap_order", "hats_order"),
    *("hats_max_rows", "moc_sky_fraction", "hats_version", "hats_release_date"),
)
_MAX_NAMED = 10  # partitions in a message
_one_thread = threading.Lock()  # of Dask's in a process: hooks of the model and filters of warnings are shared


# ----------------------------------------------------------------------------------------------------------- the images


@dataclass(frozen=True)
class ImageReader:
    """Where the images of a table are, and how they become 8-bit colors of the model's size.

    Attributes:
        column: of encoded images (binary, or a struct with `bytes`), or a struct of `band` and `flux`.
        columns: what is read of it.
        is_flux: whether it holds fluxes.
        bands: names of those that become blue, green and red.
        stretch: of fluxes.
        image_size: of the model.
        enlarges: whether smaller images are left to the model's batches.
    """

    column: str
    columns: tuple[str, ...]
    is_flux: bool
    bands: tuple[str, ...]
    stretch: Stretch
    image_size: int
    enlarges: bool

    def images(self, table: pa.Table | pa.RecordBatch) -> list[np.ndarray | UnreadableImage]:
        """The image of each row, (S, S, 3) uint8, or why it cannot be used. Called within `images.decoding`."""
        values = table[self.column]
        values = values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values
        if not self.is_flux:
            encoded = pc.struct_field(values, "bytes") if pa.types.is_struct(values.type) else values
            return [self._usable(lambda row=row: _decode(row)) for row in encoded]
        bands, flux = (pc.struct_field(values, name) for name in ("band", "flux"))
        return [self._usable(lambda row=row: self._rgb(bands[row], flux[row])) for row in range(len(values))]

    def _usable(self, read) -> np.ndarray | UnreadableImage:
        try:
            image = read()
            size = check_square(image)
            if size < self.image_size and not self.enlarges:
                wanted = f"{self.image_size} x {self.image_size}"
                raise UnreadableImage(f"is {size} x {size} pixels, and the model takes {wanted} or more")
        except UnreadableImage as problem:
            return problem
        return area_average(image[None], self.image_size)[0] if size > self.image_size else image

    def _rgb(self, names: pa.Scalar, flux: pa.Scalar) -> np.ndarray:
        """The stretched fluxes of three bands; the first row of flux is the lowest, as in FITS."""
        if not names.is_valid or not flux.is_valid:
            raise UnreadableImage("is missing")
        # `des-g` is the band `g`
        found = {str(name).lower().rpartition("-")[2]: i for i, name in enumerate(names.as_py())}
        if missing := [band for band in self.bands if band.lower().rpartition("-")[2] not in found]:
            raise UnreadableImage(f"has no band {missing[0]}, only {', '.join(map(str, names.as_py()))}")
        planes = [_plane(flux.values[found[band.lower().rpartition("-")[2]]]) for band in self.bands]
        if len({plane.shape for plane in planes}) > 1:
            raise UnreadableImage("has bands of different shapes")
        return self.stretch.rgb(np.stack(planes))[::-1]


def image_reader(
    schema: pa.Schema, column: str | None, bands: Sequence[str], stretch: Stretch, model: CatalogueModel, source: str
) -> ImageReader:
    """Find the images of a catalogue.

    Args:
        schema: of the catalogue.
        column: the name; None takes the first column of encoded images, or else of fluxes.
        bands, stretch: of fluxes.
        model: whose image size is made.
        source: flag and name of the catalogue, for messages.

    Raises:
        UserError: there is no such column.
    """
    if len(bands) != 3 or len(set(bands)) != 3:
        raise UserError(f"--bands {' '.join(bands)}: give three different bands, for blue, green and red")
    kinds = {name: kind for name in schema.names if (kind := _kind(schema.field(name).type))}
    if column is None:
        known = [find_column([name for name in kinds if kinds[name] == kind], "image") for kind in ("encoded", "flux")]
        column = known[0] or known[1]
    if column is None or column not in kinds:
        what = (
            f"no column {column!r} of images" if column else f"no column of images ({', '.join(COLUMN_NAMES['image'])})"
        )
        raise UserError(f"{source}: {what}, only {', '.join(schema.names)}; set --image_column")
    kind = schema.field(column).type
    is_flux = kinds[column] == "flux"
    columns = (f"{column}.band", f"{column}.flux") if is_flux else (f"{column}.bytes",)
    return ImageReader(
        column,
        columns if pa.types.is_struct(kind) else (column,),
        is_flux,
        tuple(bands),
        stretch,
        model.image_size,
        model.enlarges,
    )


def _kind(kind: pa.DataType) -> str:
    """`encoded` or `flux` if a column of this type holds images, else empty."""
    if pa.types.is_struct(kind):
        names = {kind.field(i).name: kind.field(i).type for i in range(kind.num_fields)}
        if "bytes" in names:
            return "encoded"
        return "flux" if "band" in names and "flux" in names and pa.types.is_nested(names["flux"]) else ""
    return "encoded" if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) else ""


def _decode(value: pa.Scalar) -> np.ndarray:
    if not value.is_valid:
        raise UnreadableImage("is missing")
    return decode_rgb(value.as_py(), Counter())


def _plane(band: pa.Scalar) -> np.ndarray:
    """(H, W) floats of a list of rows."""
    rows = band.values
    if rows is None or len(rows) == 0 or rows.null_count:
        raise UnreadableImage("has an empty band")
    values = rows.flatten().to_numpy(zero_copy_only=False)
    if len(values) % len(rows) or np.ptp(rows.value_lengths().to_numpy()):
        raise UnreadableImage("has a band whose rows differ in length")
    return values.reshape(len(rows), -1)


# ------------------------------------------------------------------------------------------------------------- the rows


@dataclass(frozen=True)
class Embedder:
    """What turns rows of a catalogue into rows of the output.

    Attributes:
        model: what predicts.
        reader: of the images.
        kept: columns that are copied: HEALPix index, object id, coordinates.
        device, bf16: where and how the model runs.
        embedding_type: float32 or float16.
    """

    model: CatalogueModel
    reader: ImageReader
    kept: tuple[str, ...]
    device: str
    bf16: bool
    embedding_type: type[np.floating]

    @property
    def columns(self) -> list[str]:
        """What is read of the catalogue."""
        return [*self.kept, *self.reader.columns]

    def rows(self, table: pa.Table, images: list[np.ndarray | UnreadableImage]) -> pa.Table:
        """The output's rows.

        Args:
            table: N rows; the columns `kept` are copied.
            images: N images, or why they cannot be used.
        """
        problem = np.array([str(image) if isinstance(image, UnreadableImage) else "" for image in images], object)
        sizes = np.array([0 if isinstance(image, UnreadableImage) else len(image) for image in images])
        sizes[sizes == 0] = sizes.max(initial=0) or self.model.image_size
        outputs, order = [], []
        for size in np.unique(sizes):  # one, but for a model that enlarges images of several sizes
            index = np.flatnonzero(sizes == size)
            pixels = np.zeros((len(index), size, size, 3), np.uint8)
            for pixel, i in zip(pixels, index, strict=True):
                if not isinstance(images[i], UnreadableImage):
                    pixel[:] = images[i]
            flat = pixels.reshape(len(pixels), -1)
            blank = flat.min(axis=1) == flat.max(axis=1)
            columns = output_columns(
                self.model, pixels, problem[index], blank, self.device, self.bf16, self.embedding_type
            )
            outputs.append(pa.table([values for _, values in columns], pa.schema([column for column, _ in columns])))
            order.append(index)
        output = pa.concat_tables(outputs)
        if len(order) > 1:
            output = output.take(np.argsort(np.concatenate(order)))
        kept = table.select(list(self.kept))
        fields = [field.remove_metadata() for field in kept.schema]
        return pa.table([*kept.columns, *output.columns], pa.schema([*fields, *output.schema]))

    def empty(self, schema: pa.Schema) -> pa.Table:
        """The output without a row, for a catalogue of this schema."""
        one = pa.table({name: pa.nulls(1, schema.field(name).type) for name in self.kept})
        return self.rows(one, [np.zeros((self.model.image_size, self.model.image_size, 3), np.uint8)]).slice(0, 0)

    def images_per_run(self) -> int:
        """How many images go through the model together: full batches."""
        batch = 16 if self.device == "cpu" else 256
        most = min(_RUN_IMAGES[self.device], _RUN_BYTES // (3 * self.model.image_size**2))
        return max(1, most // batch) * batch


def kept_columns(names: Sequence[str], properties: dict[str, str]) -> tuple[str, ...]:
    """The HEALPix index, object id, right ascension and declination, as far as a catalogue has them."""
    wanted = [
        properties.get("hats_col_healpix", "_healpix_29"),
        find_column(names, "object_id"),
        properties.get("hats_col_ra", "ra"),
        properties.get("hats_col_dec", "dec"),
    ]
    return tuple(name for name in wanted if name in names)


# ------------------------------------------------------------------------------------------------------- the partitions


@dataclass
class _Rows:
    """Decoded rows of a partition; `last` after its last one, and `error` if it cannot be read further."""

    partition: Partition
    table: pa.Table | None
    images: list[np.ndarray | UnreadableImage]
    last: bool = False
    error: UserError | None = None


def _decoded(partitions: Iterable[Partition], embedder: Embedder) -> Iterator[_Rows]:
    """All rows of some partitions, decoded by threads ahead of the consumer."""

    def batches() -> Iterator[_Rows | tuple[Partition, pa.RecordBatch]]:
        for partition in partitions:
            error = None
            try:
                for batch in partition.read(embedder.columns, _READ_ROWS):
                    yield partition, batch
            except UserError as problem:
                error = problem
            yield _Rows(partition, None, [], last=True, error=error)

    def decode(partition: Partition, batch: pa.RecordBatch) -> _Rows:
        table = pa.Table.from_batches([batch])
        return _Rows(partition, table.select(list(embedder.kept)), embedder.reader.images(table))

    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    ahead = threads + embedder.images_per_run() // _READ_ROWS
    with decoding(), ThreadPoolExecutor(threads) as pool:
        pending = deque()
        for item in batches():
            pending.append(item if isinstance(item, _Rows) else pool.submit(decode, *item))
            if len(pending) > ahead:
                yield _finished(pending.popleft())
        while pending:
            yield _finished(pending.popleft())


def _finished(item) -> _Rows:
    return item if isinstance(item, _Rows) else item.result()


def _in_runs(rows: Iterable[_Rows], size: int) -> Iterator[list[_Rows]]:
    """The same rows in lists of `size` images, but for the last one."""
    run, images = [], 0
    for item in rows:
        while images + len(item.images) >= size and item.images:
            cut = size - images
            run.append(_Rows(item.partition, item.table.slice(0, cut), item.images[:cut]))
            yield run
            run, images = [], 0
            item = _Rows(item.partition, item.table.slice(cut), item.images[cut:])
        run.append(item)
        images += len(item.images)
    yield run


class _Writer:
    """Writes the file of one partition: in a staging folder until `finish` puts it in place."""

    def __init__(self, staging: Path, path: Path, schema: pa.Schema):
        self.path, self.staged = path, staging / f"{path.parent.parent.name}_{path.name}"
        self.rows, self.tables = 0, []
        self.writer = pq.ParquetWriter(self.staged, schema)

    def write(self, table: pa.Table) -> None:
        self.tables.append(table.cast(self.writer.schema))
        self.rows += len(table)
        if sum(map(len, self.tables)) >= _GROUP_ROWS:
            self._write_group()

    def _write_group(self) -> None:
        if self.tables:
            self.writer.write_table(pa.concat_tables(self.tables).combine_chunks())
            self.tables = []

    def finish(self) -> None:
        self._write_group()
        self.writer.close()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        flush(self.staged)
        self.staged.replace(self.path)
        flush(self.path.parent)

    def discard(self) -> None:
        self.writer.close()
        self.staged.unlink()


def embed_partitions(
    output: Path, catalogue: HatsCatalogue, partitions: Sequence[Partition], embedder: Embedder, about: dict[str, Any]
) -> tuple[Counter[str], dict[Partition, UserError]]:
    """Write the output's files of some partitions.

    Args:
        output: folder of the output's primary catalogue, in which files of this process are staged.
        catalogue: the input.
        partitions: of it.
        embedder: what computes the rows.
        about: what the rows depend on; written into each file.

    Returns:
        How many rows have each flag, and the partitions that cannot be read, with the reason.
    """
    schema = embedder.empty(catalogue.schema).schema
    flags: Counter[str] = Counter()
    errors: dict[Partition, UserError] = {}
    writers: dict[Partition, _Writer] = {}

    def writer_of(partition: Partition) -> _Writer:
        if partition not in writers:
            content = about | _source_of(partition, catalogue)
            path = output / location_of(partition.order, partition.pixel)
            writers[partition] = _Writer(staging, path, schema.with_metadata({_ABOUT: json.dumps(content)}))
        return writers[partition]

    with temporary_folder(output) as staging:
        for run in _in_runs(_decoded(partitions, embedder), embedder.images_per_run()):
            images = [image for rows in run for image in rows.images]
            if images:
                table = embedder.rows(pa.concat_tables([rows.table for rows in run if rows.images]), images)
                if not flags["unreadable"] and (problems := list(filter(None, table["problem"].to_pylist()))):
                    logger.warning("unreadable images are flagged; the first of them %s", problems[0])
                flags.update(table["flag"].to_pylist())
            start = 0
            for rows in run:
                writer = writer_of(rows.partition)
                if rows.images:
                    writer.write(table.slice(start, len(rows.images)))
                start += len(rows.images)
                if rows.last:
                    del writers[rows.partition]
                    if rows.error:
                        writer.discard()
                        errors[rows.partition] = rows.error
                    else:
                        if not writer.rows:
                            logger.warning("%s: the partition has no rows", rows.partition)
                        writer.finish()
    return flags, errors


def share_of_task(rows: dict[Partition, int | UserError], task: int, tasks: int) -> list[Partition]:
    """The partitions of one of several tasks, in the order of the catalogue: about the same number of rows for each.

    The largest partition that is left goes to the task with the fewest rows (Graham 1969, SIAM J. Appl. Math. 17, 416).
    """
    counts = {partition: 0 if isinstance(count, UserError) else count for partition, count in rows.items()}
    load = [(0, i) for i in range(tasks)]
    chosen = set()
    for partition in sorted(counts, key=lambda partition: -counts[partition]):
        total, i = heapq.heappop(load)
        heapq.heappush(load, (total + counts[partition] + 1, i))
        if i == task:
            chosen.add(partition)
    return [partition for partition in counts if partition in chosen]


def _source_of(partition: Partition, catalogue: HatsCatalogue) -> dict[str, Any]:
    """What tells whether the input of a partition has changed."""
    return {"source_rows": catalogue.rows[partition], "source_bytes": sum(f.stat().st_size for f in partition.files)}


def _is_done(path: Path, about: dict[str, Any], source: dict[str, Any]) -> bool:
    """Whether an output file is complete and of this input.

    Raises:
        UserError: it was made by another model or with other settings.
    """
    try:
        metadata = pq.read_metadata(path)
        found = json.loads(metadata.metadata[_ABOUT.encode()])
    except FileNotFoundError:
        return False
    except (OSError, pa.ArrowException, TypeError, KeyError, ValueError):  # damaged, or not ours: written again
        return False
    if changed := _difference(found, about):
        raise UserError(
            f"{path}: it was computed by another command ({changed}); choose another --output, or delete it"
        )
    return metadata.num_rows == source["source_rows"] and all(found.get(key) == value for key, value in source.items())


def _difference(before: dict[str, Any], now: dict[str, Any]) -> str:
    """Name what differs in what the rows depend on; a model or a catalogue may have moved."""
    ignored = _NOT_COMPARED | (before.keys() - now.keys())
    for name in ("model", "catalog"):
        if before.get(f"{name}_fingerprint") == now.get(f"{name}_fingerprint"):
            ignored = ignored | {name}
    return provenance.differences(before, now, ignored)


# ---------------------------------------------------------------------------------------------------------- the command


def run(options: Namespace) -> None:
    """Compute the partitions of a task, or all of them, and finish the output as the command line says.

    Raises:
        UserError: no such model or catalogue, or they do not fit together; an output of another command.
        SystemExit: status 1, if a partition cannot be read.
    """
    setup_logging()
    catalogue = open_hats(options.catalog)
    output = options.output
    _check_output(output, options.catalog)
    if options.finish:
        print(finish(catalogue, output))
        return
    if not options.model:
        raise UserError("--model is missing; only --finish goes without it")
    task, tasks = _task(options)
    device = select_device(options.use_cpu)
    stretch = Stretch.from_options(options)
    model = open_model(options.model, device=device, bf16=options.bf16)
    source = f"--catalog {options.catalog}"
    reader = image_reader(catalogue.schema, options.image_column, options.bands, stretch, model, source)
    kept = kept_columns(catalogue.schema.names, catalogue.properties)
    kind = np.float16 if options.float16 else np.float32
    embedder = Embedder(model, reader, kept, device, options.bf16, kind)
    about = _about(catalogue, embedder)
    primary = primary_folder(catalogue, output)
    with resumable_disk_full(output):
        primary.mkdir(parents=True, exist_ok=True)
        _check_or_write_survey(output, about)
        remove_leftovers(primary, recursive=False)
        partitions = share_of_task(catalogue.rows, task, tasks)
        errors = {p: rows for p in partitions if isinstance(rows := catalogue.rows[p], UserError)}
        left = [
            p
            for p in partitions
            if p not in errors
            and not _is_done(primary / location_of(p.order, p.pixel), about, _source_of(p, catalogue))
        ]
        logger.info("%d of %d partitions are left to this task", len(left), len(partitions))
        started = time.monotonic()
        flags, unreadable = embed_partitions(primary, catalogue, left, embedder, about) if left else (Counter(), {})
    errors |= unreadable
    counts = ", ".join(f"{flags[flag]:,} {flag}" for flag in ("unreadable", "blank", "saturated"))
    speed = flags.total() / (time.monotonic() - started)
    done = f"{len(partitions) - len(errors):,} of {len(partitions):,} partitions"
    print(f"task {task} of {tasks}: {done}; {flags.total():,} galaxies: {counts}; {speed:,.1f} images/s; {output}")
    for partition, error in errors.items():
        print(f"error: partition {partition}: {error}", file=sys.stderr)
    if errors:
        sys.exit(1)
    if tasks == 1:
        print(finish(catalogue, output))


def primary_folder(catalogue: HatsCatalogue, output: Path) -> Path:
    """Where the partitions of an output are: of a collection, in a folder of the output's own name."""
    return output / output.resolve().name if catalogue.in_collection else output


def _check_output(output: Path, source: str) -> None:
    inside = Path(source).expanduser().resolve()
    if inside in (output.resolve(), *output.resolve().parents):
        raise UserError(f"--output {output}: this is the input, or in it; choose another folder")
    if output.exists() and not output.is_dir():
        raise UserError(f"--output {output}: a file is in the way; choose another name")
    if output.is_dir() and not (output / _SURVEY).is_file():
        if any(not path.name.startswith(".tmp-") and not path.is_dir() for path in output.iterdir()):
            raise UserError(f"--output {output}: holds other files and no {_SURVEY}; choose an empty or new folder")
    elif not output.exists() and not output.resolve().parent.is_dir():
        raise UserError(f"--output {output}: there is no folder {output.parent}; create it first")


def _task(options: Namespace) -> tuple[int, int]:
    """This task, from 0, and how many there are: by the flags, by Slurm's array, or one."""
    if (options.task is None) != (options.tasks is None):
        raise UserError("--task and --tasks: set both, or none")
    if options.task is not None:
        if not 0 <= options.task < options.tasks:
            raise UserError(f"--task {options.task}: it must be one of 0 to {options.tasks - 1}")
        return options.task, options.tasks
    array = [os.environ.get(f"SLURM_ARRAY_TASK_{name}") for name in ("ID", "MIN", "MAX", "COUNT")]
    if array[0] is None:
        return 0, 1
    task, first, last, count = map(int, array)
    if last - first + 1 != count:
        raise UserError("the array has gaps: submit consecutive indices, as in --array=0-15; finished work is skipped")
    return task - first, count


def _about(catalogue: HatsCatalogue, embedder: Embedder) -> dict[str, Any]:
    """What an output says about itself: all that its rows depend on, versions and date."""
    model, reader, session = embedder.model, embedder.reader, provenance.session()
    about = {
        "model": model.name,
        "model_fingerprint": model.fingerprint,
        "class_names": list(model.class_names),
        "image_size": model.image_size,
        "catalog": catalogue.name,
        "catalog_fingerprint": catalogue.fingerprint,
        "image_column": reader.column,
        "columns": list(embedder.kept),
        "bands": list(reader.bands) if reader.is_flux else None,
        "stretch": dataclasses.asdict(reader.stretch) if reader.is_flux else None,
        "bf16": embedder.bf16,
        "embedding": np.dtype(embedder.embedding_type).name,
        "commit": session["commit"],
        "versions": session["versions"],
        "created": session["started"],
    }
    return json.loads(json.dumps(about))  # lists in place of tuples, as when it is read again


def _check_or_write_survey(output: Path, about: dict[str, Any]) -> None:
    """Raise a `UserError` if the output folder is of another command; the first task says whose it is."""
    if (found := _read_survey(output)) is None:
        write_json(output / _SURVEY, about)
    elif changed := _difference(found, about):
        raise UserError(f"--output {output}: another command wrote it ({changed}); choose another folder, or delete it")


def _read_survey(output: Path) -> dict[str, Any] | None:
    try:
        return read_json(output / _SURVEY, f"delete the folder {output}", {"model_fingerprint": str, "catalog": str})
    except FileNotFoundError:
        return None


def finish(catalogue: HatsCatalogue, output: Path) -> str:
    """Check that an output is complete and write its metadata, after which LSDB and hats open it.

    Args:
        catalogue: the input.
        output: the output's folder.

    Returns:
        A line that says what is there.

    Raises:
        UserError: partitions are missing, damaged, or of another model or input.
    """
    about = _read_survey(output)
    if about is None:
        raise UserError(f"--output {output}: nothing was computed there; run catalogue survey --model ... first")
    same = {"catalog": catalogue.name, "catalog_fingerprint": catalogue.fingerprint}
    if changed := provenance.differences({key: about.get(key) for key in same}, same, set()):
        raise UserError(f"--output {output}: it is of another catalogue ({changed}); give the --catalog it was made of")
    primary = primary_folder(catalogue, output)
    if unreadable := [f"{p} ({rows})" for p, rows in catalogue.rows.items() if isinstance(rows, UserError)]:
        raise UserError(f"--catalog {catalogue.path}: {_named(unreadable)} cannot be read")
    paths = {p: primary / location_of(p.order, p.pixel) for p in catalogue.partitions}
    with ThreadPoolExecutor(16) as pool:  # network file systems answer slowly
        done = pool.map(lambda p: _is_done(paths[p], about, _source_of(p, catalogue)), catalogue.partitions)
        missing = [str(p) for p, is_done in zip(catalogue.partitions, done, strict=True) if not is_done]
    if missing:
        raise UserError(
            f"--output {output}: {len(missing):,} of {len(catalogue.partitions):,} partitions are missing: "
            f"{_named(missing)}; submit the array again, which computes only these"
        )
    with resumable_disk_full(output):
        remove_leftovers(primary, recursive=False)
        _write_metadata(catalogue, output, primary, about, list(paths.values()))
    rows = sum(catalogue.rows.values())
    return f"{len(paths):,} partitions, {rows:,} galaxies: complete; {output}"


def _named(partitions: list[str]) -> str:
    more = len(partitions) - _MAX_NAMED
    return ", ".join(partitions[:_MAX_NAMED]) + (f" and {more:,} more" if more > 0 else "")


def _write_metadata(
    catalogue: HatsCatalogue, output: Path, primary: Path, about: dict[str, Any], files: list[Path]
) -> None:
    """Write what makes a folder of partitions a HATS catalogue. The properties come last: they are what opens it."""
    schema = pq.read_schema(files[0]).with_metadata({_ABOUT: json.dumps(about)})
    with atomic_file(primary / COMMON_METADATA) as tmp_path:
        pq.write_metadata(schema, tmp_path)
    for name in (PARTITIONS, *_SKY_MAPS):
        if (catalogue.path / name).is_file():
            with atomic_file(primary / name) as tmp_path:
                shutil.copyfile(catalogue.path / name, tmp_path)
    kept = {key: value for key, value in catalogue.properties.items() if key in _KEPT_PROPERTIES}
    size = sum(file.stat().st_size for file in files)
    common = {
        "hats_builder": "galaxy-mae",
        "hats_creation_date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%MUTC"),
        "hats_estsize": str(size // 1024),  # kB
    }
    properties = {
        "obs_collection": output.resolve().name,
        "dataproduct_type": "object",
        "hats_nrows": str(sum(catalogue.rows.values())),
        **kept,
        "hats_npix_suffix": ".parquet",
        **common,
    }
    _write_properties(primary / "hats.properties", properties)
    if catalogue.in_collection:
        name = output.resolve().name
        _write_properties(output / COLLECTION, {"obs_collection": name, "hats_primary_table_url": name, **common})


def _write_properties(path: Path, properties: dict[str, str]) -> None:
    with atomic_file(path) as tmp_path:
        tmp_path.write_text("".join(f"{key}={value}\n" for key, value in properties.items()))


# ----------------------------------------------------------------------------------------------------------------- LSDB


def embed(
    catalog: "Catalog",
    model: str,
    *,
    image_column: str | None = None,
    bands: Sequence[str] = BANDS,
    stretch: Stretch = Stretch(),  # noqa: B008 (frozen)
    bf16: bool = False,
    float16: bool = False,
    use_cpu: bool = False,
) -> "Catalog":
    """The classes and embeddings of an LSDB catalogue, computed by Dask when they are asked for.

    Args:
        catalog: an LSDB catalogue with images, as `lsdb.open_catalog` opens it.
        model: path or Hub id, as for `--model`; every worker opens it once.
        image_column, bands, stretch, bf16, float16, use_cpu: as the flags of the command `survey`.

    Returns:
        A lazy LSDB catalogue with the columns of the command's output, without margins.

    Raises:
        UserError: no such model or column.
    """
    properties = catalog.hc_structure.catalog_info
    schema = pa.Schema.from_pandas(catalog.meta, preserve_index=False)
    columns = {"hats_col_ra": properties.ra_column, "hats_col_dec": properties.dec_column, "hats_col_healpix": ""}
    kept = kept_columns(schema.names, columns)
    settings = _Settings(
        str(model), image_column, tuple(bands), stretch, bf16, float16, use_cpu, kept, schema.remove_metadata()
    )
    embedder = _embedder(settings)
    catalog = catalog[[*kept, embedder.reader.column]]
    catalog.margin = None  # it would be computed, too
    return catalog.map_partitions(_embed_frame, settings, meta=_to_frame(embedder.empty(schema), catalog.meta.index))


@dataclass(frozen=True)
class _Settings:
    """The arguments of `embed`: what a worker needs to open the model."""

    model: str
    image_column: str | None
    bands: tuple[str, ...]
    stretch: Stretch
    bf16: bool
    float16: bool
    use_cpu: bool
    kept: tuple[str, ...]
    schema: pa.Schema


@functools.lru_cache(maxsize=1)
def _embedder(settings: _Settings) -> Embedder:
    """One encoder per process."""
    device = select_device(settings.use_cpu)
    model = open_model(settings.model, device=device, bf16=settings.bf16)
    stretch, source = settings.stretch, "catalog"
    reader = image_reader(settings.schema, settings.image_column, settings.bands, stretch, model, source)
    kind = np.float16 if settings.float16 else np.float32
    return Embedder(model, reader, settings.kept, device, settings.bf16, kind)


def _embed_frame(frame, settings: _Settings):
    """The output's rows of a partition, a DataFrame with Arrow columns and the index of the input."""
    with _one_thread:
        output = _embed_table(pa.Table.from_pandas(frame, preserve_index=False), settings)
    return _to_frame(output, frame.index)


def _embed_table(table: pa.Table, settings: _Settings) -> pa.Table:
    embedder = _embedder(settings)
    outputs = [embedder.empty(settings.schema)]
    step = embedder.images_per_run()
    for start in range(0, len(table), step):
        part = table.slice(start, step).combine_chunks()
        with decoding():
            images = embedder.reader.images(part)
        outputs.append(embedder.rows(part, images))
    return pa.concat_tables(outputs)


def _to_frame(table: pa.Table, index):
    import nested_pandas as npd
    import pandas as pd

    frame = npd.NestedFrame(table.replace_schema_metadata(None).to_pandas(types_mapper=pd.ArrowDtype))
    frame.index = index
    return frame

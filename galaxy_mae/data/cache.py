"""Any source of galaxy images, cached as one memory-mapped uint8 array and a catalogue.

Training reads every image hundreds of times in random order, and the survey's file is compressed. Every source is
therefore ingested once, in the order of its rows, into the cache folder: `<fingerprint>/<size>.npy` holds the pixels,
`<size>.npz` the catalogue and checksums, and `source.json` describes the source. A cache entry is named by the SHA-256
of the content, so a changed file is ingested again and a moved or copied file is recognized.

Scratch file systems delete old files one by one, and copies get truncated. An entry with a missing, truncated or
altered file is therefore ingested again. Opening compares the size and a few samples of the pixels with their checksum;
all of them only on request, because that takes seconds. A complete entry is only read, so a cache may be read-only.
This module does not import torch, so that a data set can be inspected on a login node.
"""

import contextlib
import hashlib
import itertools
import json
import logging
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa

from galaxy_mae.data.columns import SKY_FIELDS, parse_columns, read_columns
from galaxy_mae.data.download import cache_folder
from galaxy_mae.data.fits import Stretch, UnreadableImage
from galaxy_mae.data.frame import UNREADABLE, Frame, Framed, geometry
from galaxy_mae.data.images import as_cutout, decode, decoding, unreadable
from galaxy_mae.data.kinds import find_source
from galaxy_mae.data.source import Options, Source
from galaxy_mae.errors import UserError, full_disk_named
from galaxy_mae.files import atomic_file, cached, sha256, write_json
from galaxy_mae.progress import stage

logger = logging.getLogger(__name__)

OTHER_DISK = ", or set GALAXY_MAE_CACHE to a folder on another disk"  # if it is full
_CACHE_FORMAT = 10  # changes with the content of the cached images and catalogue
_SAMPLES = 64  # parts of the pixels that are compared when an entry is opened
_SAMPLE_BYTES = 4096  # of each part: one page
_DAMAGE = (OSError, EOFError, KeyError, TypeError, ValueError, zipfile.BadZipFile, zlib.error, pa.ArrowException)


@dataclass(frozen=True)
class Galaxies:
    """A cached dataset. All arrays have one entry per row of the source, in its order.

    Attributes:
        name: the value of `--dataset`.
        fingerprint: hex SHA-256 of the source's content and of the frame, if it is not the default.
        class_names: names of the classes 0, 1, ...; empty if the source has no labels.
        pixels: (N, S, S, 3) uint8, read-only memory map; S is the requested size, or that of the first image.
        native_size: the shorter side of the first readable image in pixels.
        label: (N,) int64, or None.
        ra, dec: (N,) float64 degrees, J2000, or None.
        pixel_scale: (N,) float64 arcsec per pixel of the native image, or None.
        image_hash: (N,) uint64; equal for images with equal native pixels.
        blank: (N,) bool; True for an image in which all values are equal, and for an unreadable one.
        predefined_test: (N,) bool; True in the source's own test split; all False if it has none.
        channel_sum, channel_square_sum: (N, 3) int64, sums over each image's pixel values and over their squares.
        object_id: (N,) str (object array), the source's names of the galaxies, or None. Where images are files and no
            column names the galaxies, it is the path relative to the folder, or as the table has it.
        geometry: N rows, sizes of images, frames and galaxies, as of `frame.geometry`; or None.
        extra: N rows, the source's other columns, as they are; without lists, structs and further images.
        nan_fraction: (N,) float32, of the pixels of a FITS cut-out, how many are NaN; NaN for other images; or None.
        frame: in which the images are squares.
        problem: (N,) str (object array), why an image cannot be read; empty if it can. The pixels of an unreadable
            image are zero. It is a clause like "is missing", whose subject is the image.
    """

    name: str
    fingerprint: str
    class_names: tuple[str, ...]
    pixels: np.ndarray
    native_size: int
    label: np.ndarray | None
    ra: np.ndarray | None
    dec: np.ndarray | None
    pixel_scale: np.ndarray | None
    image_hash: np.ndarray
    blank: np.ndarray
    predefined_test: np.ndarray
    channel_sum: np.ndarray
    channel_square_sum: np.ndarray
    object_id: np.ndarray | None
    problem: np.ndarray
    geometry: pa.Table | None = None
    extra: pa.Table = field(default_factory=lambda: pa.table({}))
    nan_fraction: np.ndarray | None = None
    frame: Frame = Frame()  # noqa: RUF009 (frozen)

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def image_size(self) -> int:
        """Width and height of `pixels`."""
        return self.pixels.shape[1]


def open_galaxies(
    name: str,
    image_size: int | None = None,
    *,
    verify: bool = False,
    stretch: Stretch = Stretch(),  # noqa: B008 (frozen)
    frame: Frame = Frame(),  # noqa: B008 (frozen)
    skip_unreadable: bool = False,
    flag: str = "--dataset",
    columns: Iterable[str] | None = None,
) -> Galaxies:
    """Open a source. The first time, and if its cache entry is damaged, it is ingested into the cache.

    Args:
        name: `galaxy10`; `synthetic` or `synthetic:COUNT`; the path of an HDF5 file in Galaxy10's schema, of a
            Parquet file, of a CSV or FITS table of image paths, of a folder of Parquet files, or of a folder of images
            or FITS cut-outs, with or without one subfolder per class; or the id of a dataset on the Hugging Face Hub.
        image_size: images are area-averaged to this size, or enlarged; None takes that of the first one.
        verify: compare all cached pixels with their checksum, not only samples of them.
        stretch: how FITS cut-outs become images of 8 bits (`Stretch.named`).
        frame: how images of any shape become squares.
        skip_unreadable: give an image that cannot be decoded zero pixels and a `problem`, with one warning; otherwise
            the first such image is an error.
        flag: that named the source, for messages.
        columns: as of `--columns`, which `columns.parse_columns` reads.

    Raises:
        UserError: there is no such source, or it cannot be read or cached.
    """
    source = find_source(name, Options(image_size, stretch, frame, skip_unreadable, flag, tuple(columns or ())))
    fingerprint = fingerprint_of(source)
    folder = cache_folder() / f"{fingerprint[:16]}_format{_CACHE_FORMAT}"
    damaged: set[Path] = set()

    def read() -> Galaxies | None:
        galaxies = _load(source, fingerprint, folder, verify, damaged)
        if galaxies is None:
            cache_folder(writable=True)
            return None
        if len(rows := np.flatnonzero(galaxies.problem != "")):
            first = unreadable(source.where, rows[0], galaxies.problem[rows[0]], galaxies.object_id)
            if not skip_unreadable:
                raise first
            logger.warning("%d of %d images are unreadable and skipped; the first: %s", len(rows), len(galaxies), first)
        return galaxies

    def write() -> None:
        if old := [path for path in cache_folder().glob(f"{fingerprint[:16]}_format*") if path != folder]:
            made = "an earlier version, which may have read it otherwise, cached it: caching it again"
            logger.warning("%s: %s; %s can be deleted", name, made, ", ".join(map(str, old)))
        for path in damaged:
            logger.warning("%s is altered, unreadable or missing: caching %s again", path, name)
        with full_disk_named(str(folder.parent), OTHER_DISK):
            _ingest(source, fingerprint, folder)

    return cached(folder / ".lock", read, write)


def channel_statistics(parts: Sequence[tuple[Galaxies, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and std of each channel over rows of data sets of one image size, (3,) float64 each, scaled to 0-1."""
    count = sum(len(rows) * galaxies.image_size**2 for galaxies, rows in parts)
    mean = sum(galaxies.channel_sum[rows].sum(axis=0) for galaxies, rows in parts) / count
    variance = sum(galaxies.channel_square_sum[rows].sum(axis=0) for galaxies, rows in parts) / count - mean**2
    return mean / 255, np.sqrt(variance) / 255


def has_entry_of(count: int, image_size: int) -> bool:
    """Whether a source of so many images is cached in this size."""
    stored = (file.stat().st_size for file in cache_folder().glob(f"*_format{_CACHE_FORMAT}/{image_size}.npy"))
    return any(0 < size - count * image_size**2 * 3 <= 1024 for size in stored)  # with a header


def fingerprint_of(source: Source) -> str:
    """That of the source, with the frame of its images if that is not the default, and with `--columns` if given."""
    found, frame, columns = source.fingerprint, source.options.frame, sorted(source.options.columns)
    for given, more in ((frame != Frame(), frame), (columns, columns)):
        found = hashlib.sha256(f"{found} {more}".encode()).hexdigest() if given else found
    return found


def first_shape(source: Source) -> tuple[int, int]:
    """Height and width of the first readable image of a source; 1 and 1 if there is none."""
    for value in itertools.chain.from_iterable(source.images()):
        with contextlib.suppress(UnreadableImage), decoding():
            return decode(value, source.options.stretch).shape[:2]
    return 1, 1


def _ingest(source: Source, fingerprint: str, folder: Path) -> None:
    """Write a source into the cache: the pixels, then what says that they are complete: the catalogue, checksums."""
    count, options = source.num_rows, source.options
    if count == 0:
        raise UserError(f"{source.where}: it is empty: there are no galaxies in it")
    table, start = source.table, 0
    first = first_shape(source)
    native_size, frame = min(first), options.frame
    columns = read_columns(source.where, table, source.class_names, native_size, parse_columns(options.columns))
    object_id = source.file_names if columns["object_id"] is None else columns["object_id"]
    size = options.image_size or frame.width(first)
    image_hash, blank, problems = np.empty(count, np.uint64), np.empty(count, bool), [""] * count
    numbers = np.tile(UNREADABLE, (count, 1))
    scale = np.full(count, np.nan) if columns["pixel_scale"] is None else columns["pixel_scale"].copy()
    sums, reduced = np.empty((2, count, 3), np.int64), Counter()
    nan_fraction = np.full(count, np.nan, np.float32)
    with atomic_file(folder / f"{size}.npy") as tmp_path:
        # Written, not memory-mapped, so that a full disk raises an exception and not a bus error.
        with tmp_path.open("wb") as out, stage(f"caching {source.name}", count) as progress:
            header = {"descr": "|u1", "fortran_order": False, "shape": (count, size, size, 3)}
            np.lib.format.write_array_header_1_0(out, header)
            for values in source.images():
                with decoding():
                    for row, value in enumerate(values[: count - start], start):
                        try:
                            value = as_cutout(value, options.stretch)
                            if np.isnan(scale[row]) and frame.needs_scale:
                                scale[row] = getattr(value, "pixel_scale", np.nan)
                            nan_fraction[row] = getattr(value, "nan_fraction", np.nan)
                            image = decode(value, options.stretch, reduced)
                            framed = frame.apply(image, size, scale[row])
                        except UnreadableImage as problem:
                            if not options.skip_unreadable:
                                raise unreadable(source.where, row, str(problem), object_id) from None
                            problems[row], image = str(problem), np.zeros((native_size, native_size, 3), np.uint8)
                            framed = Framed(np.zeros((size, size, 3), np.uint8), UNREADABLE)
                        digest = hashlib.sha256(np.ascontiguousarray(image).data).digest()
                        image_hash[row] = int.from_bytes(digest[:8], "little")
                        blank[row], numbers[row] = image.min() == image.max(), framed.numbers
                        sums[:, row] = _channel_sums(framed.pixels)
                        out.write(np.ascontiguousarray(framed.pixels).data)
                start += len(values)
                progress.advance(len(values))
        if start != count or len(table) not in (0, count):
            parts = f"{count:,} rows, {start:,} images and {len(table):,} rows of columns"
            raise UserError(f"{source.where}: it has {parts}: it is damaged, or was changed meanwhile")
        if source.path.exists() and fingerprint_of(find_source(source.name, options)) != fingerprint:
            raise UserError(f"{source.where}: it was changed while it was read: start again when it is complete")
        if all(problems):
            raise UserError(f"{unreadable(source.where, 0, problems[0], object_id)}, as all {count:,} images are")
        checksums = [sha256(tmp_path), _sample_checksum(tmp_path)]
    lost = [f"{number} images have {loss}" for loss, number in reduced.items() if number]
    notes, readable = [*source.notes, *columns["notes"], *lost], numbers[:, 0] > 0
    if frame.arcsec and (unknown := int(np.isnan(scale[readable]).sum())):
        why = "neither a column pxscale nor a WCS tells their scale"
        notes.append(f"--arcsec is not used for {unknown:,} images: {why}")
    if frame.kind == "galaxy" and (unknown := int(np.isnan(numbers[readable, 3]).sum())):
        notes.append(f"--fit galaxy: {unknown:,} of {count:,} images have no galaxy that can be measured: cropped")
    texts = pa.table({"problem": problems} if object_id is None else {"problem": problems, "object_id": object_id})
    with atomic_file(folder / f"{size}.npz") as tmp_path:
        np.savez(
            tmp_path,
            checksums=checksums,
            class_names=np.array(columns["class_names"], dtype=str),
            image_hash=image_hash,
            blank=blank,
            predefined_test=np.zeros(count, bool) if source.predefined_test is None else source.predefined_test,
            channel_sum=sums[0],
            channel_square_sum=sums[1],
            texts=_pack(texts),  # numpy's arrays of text would give each the length of the longest
            extra=_pack(columns["extra"]),
            geometry=_pack(geometry(numbers, frame)),
            **{name: values for name, values in columns.items() if isinstance(values, np.ndarray)},
            **({} if np.isnan(nan_fraction).all() else {"nan_fraction": nan_fraction}),
        )
    sizes = {"native_size": native_size, "size": frame.width(first)}
    write_json(folder / "source.json", {"source": source.name, **sizes, "notes": notes})


def _pack(table: pa.Table) -> np.ndarray:
    """A table as the bytes of an Arrow stream, uint8."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return np.frombuffer(sink.getvalue(), np.uint8)


def _unpack(packed: np.ndarray) -> pa.Table:
    return pa.ipc.open_stream(pa.py_buffer(packed)).read_all()


def _load(source: Source, fingerprint: str, folder: Path, verify: bool, damaged: set[Path]) -> Galaxies | None:
    """The cached images of the requested size, or None; a file that is missing or altered is added to `damaged`."""
    if not any(folder.glob("*.np[yz]")):
        return None
    path = folder / "source.json"
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
        native_size, notes = int(described["native_size"]), list(map(str, described["notes"]))
        size = source.options.image_size or int(described["size"])
        if not any(folder.glob(f"{size}.np[yz]")):
            return None
        path = folder / f"{size}.npz"
        # The checksums of the zip file find any change.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            columns = dict.fromkeys(("label", *SKY_FIELDS, "object_id")) | dict(stored)
        checksum, sample_checksum = columns.pop("checksums")
        texts = _unpack(columns.pop("texts"))
        columns |= {name: _unpack(columns[name]) for name in ("extra", "geometry")}
        columns |= {field: texts[field].to_numpy() for field in texts.column_names}
        columns["class_names"] = tuple(map(str, columns["class_names"]))
        path = folder / f"{size}.npy"
        if _sample_checksum(path) != sample_checksum or (verify and sha256(path) != checksum):
            raise ValueError("checksum")
        pixels = np.load(path, mmap_mode="r", allow_pickle=False)
    except _DAMAGE:
        damaged.add(path)
        return None
    width = columns["geometry"]["frame_width"].to_numpy()
    if enlarged := int(np.sum((width > 0) & (width < size))):
        frames = "frames" if source.options.frame.kind in ("center", "galaxy") else "images"
        notes.append(f"{enlarged:,} of {len(pixels):,} {frames} have less than {size} pixels: they are enlarged")
    for note in notes:
        logger.warning("%s: %s", source.where, note)
    columns |= {"pixels": pixels, "native_size": native_size, "frame": source.options.frame}
    return Galaxies(name=source.name, fingerprint=fingerprint, **columns)


def _sample_checksum(path: Path) -> str:
    """SHA-256 of a file's size and of samples spread evenly over it, its start and its end among them. Fast."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as stream:
        for offset in np.linspace(0, max(0, size - _SAMPLE_BYTES), _SAMPLES).astype(int):
            stream.seek(offset)
            digest.update(stream.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def _channel_sums(image: np.ndarray) -> np.ndarray:
    """Return the exact sums of an (S, S, 3) uint8 image and of its squares over the pixels, (2, 3) int64."""
    values = image.reshape(-1, 3).astype(np.float64)  # integers far below 2**53, so the sums are exact
    return np.stack([np.ones(len(values)) @ values, np.diag(values.T @ values)]).astype(np.int64)

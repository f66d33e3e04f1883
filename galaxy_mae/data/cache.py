"""Any source of galaxy images, cached as one memory-mapped uint8 array and a catalogue.

Training reads every image hundreds of times in random order, and the survey's file is compressed. Reading it image by
image would cost more time than the model. Every source is therefore ingested once, in the order of its rows, into the
cache folder: `<fingerprint>/<size>.npy` holds the pixels, `<size>.npz` the catalogue and checksums, and `source.json`
describes the source. Later runs open these files in milliseconds, and the page cache shares the pixels between all
processes of a machine. A cache entry is named by the SHA-256 of the content, so a changed file is ingested again and a
moved or copied file is recognized.

Scratch file systems delete old files one by one, and copies get truncated. An entry with a missing, truncated or
altered file is therefore ingested again. Opening compares the size and a few samples of the pixels with their checksum;
all of them only on request, because that takes seconds. A complete entry is only read, so a cache may be read-only.

This module does not import torch, so that a data set can be inspected on a login node.
"""

import contextlib
import hashlib
import io
import json
import logging
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from galaxy_mae.data.columns import SKY_FIELDS, read_columns
from galaxy_mae.data.download import cache_folder, writable_cache_folder
from galaxy_mae.data.fits import MAX_IMAGE_SIZE, Stretch, UnreadableImage
from galaxy_mae.data.images import area_average, decoded_batches, unreadable
from galaxy_mae.data.kinds import find_source
from galaxy_mae.data.source import Options, Source
from galaxy_mae.errors import UserError, is_disk_full
from galaxy_mae.files import atomic_file, cached, remove_leftovers, sha256, write_json

logger = logging.getLogger(__name__)

_CACHE_FORMAT = 6  # changes with the content of the cached catalogue
_SAMPLES = 64  # parts of the pixels that are compared when an entry is opened
_SAMPLE_BYTES = 4096  # of each part: one page


@dataclass(frozen=True)
class Galaxies:
    """A cached dataset. All arrays have one entry per row of the source, in its order.

    Attributes:
        name: the value of `--dataset`.
        fingerprint: hex SHA-256 of the source's content.
        class_names: names of the classes 0, 1, ...; empty if the source has no labels.
        pixels: (N, S, S, 3) uint8, read-only memory map; S is the smaller of the requested and the native size.
        native_size: width and height of the source's images in pixels.
        label: (N,) int64, or None.
        ra, dec: (N,) float64 degrees, J2000, or None.
        pixel_scale: (N,) float64 arcsec per pixel of the native image, or None.
        image_hash: (N,) uint64; equal for images with equal native pixels.
        blank: (N,) bool; True for an image in which all values are equal, and for an unreadable one.
        predefined_test: (N,) bool; True in the source's own test split; all False if it has none.
        channel_sum, channel_square_sum: (N, 3) int64, sums over each image's pixel values and over their squares.
        object_id: (N,) str (object array), the source's names of the galaxies, or None. Where images are files and no
            column names the galaxies, it is the path relative to the folder, or as the table has it.
        extra: N rows, the source's other columns, as they are; without lists, structs and further images.
        problem: (N,) str (object array), why an image cannot be read; empty if it can. The pixels of an unreadable
            image are zero. It is a clause like "is 32 x 16 pixels, not 32 x 32", whose subject is the image.
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
    extra: pa.Table = field(default_factory=lambda: pa.table({}))

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def image_size(self) -> int:
        """Width and height of `pixels`."""
        return self.pixels.shape[1]

    def channel_statistics(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and std of each channel over the given images, (3,) float64 each, scaled to 0-1."""
        count = len(indices) * self.image_size**2
        mean = self.channel_sum[indices].sum(axis=0) / count
        variance = self.channel_square_sum[indices].sum(axis=0) / count - mean**2
        return mean / 255, np.sqrt(variance) / 255


class _DamagedEntry(UserError):
    """A cache entry is incomplete or altered. The message names the file and what is wrong with it."""


def open_galaxies(
    name: str,
    image_size: int | None = None,
    *,
    verify: bool = False,
    stretch: Stretch = Stretch(),  # noqa: B008 (frozen)
    skip_unreadable: bool = False,
    flag: str = "--dataset",
) -> Galaxies:
    """Open a source. The first time, and if its cache entry is damaged, it is ingested into the cache.

    Args:
        name: `galaxy10`; `synthetic` or `synthetic:COUNT`; the path of an HDF5 file in Galaxy10's schema, of a
            Parquet file, of a CSV or FITS table of image paths, of a folder of Parquet files, or of a folder of images
            or FITS cut-outs, with or without one subfolder per class; or the id of a dataset on the Hugging Face Hub.
        image_size: images larger than this are area-averaged to it; None keeps their size.
        verify: compare all cached pixels with their checksum, not only samples of them.
        stretch: how FITS cut-outs become images of 8 bits.
        skip_unreadable: give an image that cannot be decoded, is not square, or has another size than the first
            readable one, zero pixels and a `problem`, with one warning; otherwise the first such image is an error.
        flag: that named the source, for messages.

    Raises:
        UserError: there is no such source, the network fails, a file does not have the expected content, no image is
            readable, the disk is full, or the source is not cached and the cache is read-only.
    """
    source = find_source(name, Options(image_size, stretch, skip_unreadable, flag))
    fingerprint = source.fingerprint
    folder = cache_folder() / f"{fingerprint[:16]}_format{_CACHE_FORMAT}"
    damage: list[_DamagedEntry] = []

    def read() -> Galaxies | None:
        try:
            galaxies = _load(name, fingerprint, folder, image_size, verify)
        except _DamagedEntry as found:
            damage.append(found)
            galaxies = None
        if galaxies is None:
            writable_cache_folder()
        else:
            _report_unreadable(source.where, galaxies, skip_unreadable)
        return galaxies

    def write() -> None:
        if damage:
            logger.warning("%s: caching %s again", damage[-1], name)
        with full_disk_named(folder):
            _ingest(source, folder)

    remove_leftovers(folder)  # also of a process that was killed when its entry was complete
    return cached(folder / ".lock", read, write)


def has_entry_of(count: int, image_size: int) -> bool:
    """Whether a source of so many images is cached, in this size or in a smaller one, which is then their own."""
    for file in cache_folder().glob(f"*_format{_CACHE_FORMAT}/[0-9]*.npy"):
        size = int(file.stem)
        content = len(_array_header((count, size, size, 3))) + count * size**2 * 3
        if size <= image_size and file.stat().st_size == content:
            return True
    return False


def _report_unreadable(where: str, galaxies: Galaxies, skip_unreadable: bool) -> None:
    """Warn of unreadable images or, if they may not be skipped, raise a `UserError` that names the first one."""
    rows = np.flatnonzero(galaxies.problem != "")
    if len(rows) == 0:
        return
    first = unreadable(where, rows[0], galaxies.problem[rows[0]], galaxies.object_id)
    if not skip_unreadable:
        raise first
    logger.warning("%d of %d images are unreadable and skipped; the first: %s", len(rows), len(galaxies), first)


# ---------------------------------------------------------------------------------------------------------------- cache


@contextlib.contextmanager
def full_disk_named(folder: Path) -> Iterator[None]:
    """Say which disk is full, if an entry cannot be written."""
    try:
        yield
    except OSError as error:
        if not is_disk_full(error):
            raise
        raise UserError(
            f"{folder.parent}: the disk or quota is full, and the images do not fit: "
            "free some space, or set GALAXY_MAE_CACHE to a folder on another disk"
        ) from error


def _ingest(source: Source, folder: Path) -> None:
    """Write a source into the cache: the pixels, then what says that they are complete: the catalogue, checksums."""
    columns = read_columns(source.where, source.table, source.class_names)
    object_id = source.file_names if columns.object_id is None else columns.object_id
    count, options = source.num_rows, source.options
    try:
        native_size, batches = decoded_batches(source.images, options.stretch, options.skip_unreadable, source.where)
    except UnreadableImage as problem:
        if options.skip_unreadable:
            raise UserError(
                f"{source.where}: none of the {count:,} images is readable; the image of row 0 {problem}"
            ) from problem
        raise unreadable(source.where, 0, str(problem), object_id) from problem
    size = min(options.image_size or native_size, native_size)
    image_hash, blank = np.empty(count, np.uint64), np.empty(count, bool)
    sums = np.empty((2, count, 3), np.int64)
    problems: dict[int, str] = {}
    digest = hashlib.sha256()
    progress = tqdm(total=count, desc=f"caching {source.name}", unit=" images", leave=False)
    with atomic_file(folder / f"{size}.npy") as tmp_path:
        # Written, not memory-mapped, so that a full disk raises an exception and not a bus error.
        with tmp_path.open("wb") as out, progress:
            header = _array_header((count, size, size, 3))
            out.write(header)
            digest.update(header)
            start = 0
            for batch, batch_problems in batches:
                for i, problem in batch_problems.items():
                    if not options.skip_unreadable:
                        raise unreadable(source.where, start + i, problem, object_id)
                    problems[start + i] = problem
                rows = slice(start, start + len(batch))
                image_hash[rows] = [_hash(image) for image in batch]
                blank[rows] = batch.reshape(len(batch), -1).min(axis=1) == batch.reshape(len(batch), -1).max(axis=1)
                stored = batch if size == native_size else area_average(batch, size)
                for i, image in enumerate(stored, start):
                    sums[:, i] = _channel_sums(image)
                out.write(stored.data)
                digest.update(stored.data)
                start += len(batch)
                progress.update(len(batch))
            if start != count:
                raise UserError(f"{source.where}: expected {count} images, found {start}")
        sample_checksum = _sample_checksum(tmp_path)
    test = np.zeros(count, bool) if source.predefined_test is None else source.predefined_test
    optional = {name: getattr(columns, name) for name in ("label", *SKY_FIELDS)}
    optional["object_id"] = None if object_id is None else _pack(object_id)
    with atomic_file(folder / f"{size}.npz") as tmp_path:
        np.savez(
            tmp_path,
            native_size=native_size,
            class_names=np.array(columns.class_names, dtype=str),
            pixel_checksum=digest.hexdigest(),
            sample_checksum=sample_checksum,
            image_hash=image_hash,
            blank=blank,
            predefined_test=test,
            channel_sum=sums[0],
            channel_square_sum=sums[1],
            problem=_pack(problems),
            extra=_pack_table(columns.extra),
            **{name: values for name, values in optional.items() if values is not None},
        )
    write_json(folder / "source.json", {"source": source.name, "native_size": native_size})


def _pack(texts: list[str] | dict[int, str]) -> np.ndarray:
    """Texts as the bytes of JSON, uint8: numpy's arrays of text would give each the length of the longest."""
    return np.frombuffer(json.dumps(texts).encode(), np.uint8)


def _unpack(packed: np.ndarray) -> list[str] | dict[str, str]:
    return json.loads(packed.tobytes())


def _pack_table(table: pa.Table) -> np.ndarray:
    """A table as the bytes of an Arrow stream, uint8."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return np.frombuffer(sink.getvalue(), np.uint8)


def _array_header(shape: tuple[int, ...]) -> bytes:
    """The header of a .npy file of uint8."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return header.getvalue()


def _load(name: str, fingerprint: str, folder: Path, image_size: int | None, verify: bool) -> Galaxies | None:
    """Return the cached images of the requested size, or None if they were never cached.

    Raises:
        _DamagedEntry: a file is missing, truncated or altered.
    """
    if not any(folder.glob("*.np[yz]")):
        return None
    with _damage(folder / "source.json"):
        native_size = json.loads((folder / "source.json").read_text())["native_size"]
        if type(native_size) is not int or not 1 <= native_size <= MAX_IMAGE_SIZE:
            raise ValueError(f"native_size {native_size}")
    size = min(image_size or native_size, native_size)
    catalogue_path, pixel_path = folder / f"{size}.npz", folder / f"{size}.npy"
    if not catalogue_path.exists() and not pixel_path.exists():
        return None
    with _damage(catalogue_path), catalogue_path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
        columns = {key: stored[key] for key in stored.files}  # zip's own checksums find any change
        if int(columns.pop("native_size")) != native_size:
            raise ValueError("native_size")
        class_names = tuple(map(str, columns.pop("class_names")))
        checksum, sample_checksum = str(columns.pop("pixel_checksum")), str(columns.pop("sample_checksum"))
        problem = np.full(len(columns["blank"]), "", object)
        for row, reason in _unpack(columns.pop("problem")).items():
            problem[int(row)] = reason
        object_id = np.array(_unpack(columns.pop("object_id")), object) if "object_id" in columns else None
        extra = pa.ipc.open_stream(pa.py_buffer(columns.pop("extra"))).read_all()
    with _damage(pixel_path):
        if _sample_checksum(pixel_path) != sample_checksum or (verify and sha256(pixel_path) != checksum):
            raise ValueError("checksum")
        pixels = np.load(pixel_path, mmap_mode="r", allow_pickle=False)
    return Galaxies(
        name=name,
        fingerprint=fingerprint,
        class_names=class_names,
        pixels=pixels,
        native_size=native_size,
        **{field: columns.pop(field, None) for field in ("label", *SKY_FIELDS)},
        **columns,
        object_id=object_id,
        problem=problem,
        extra=extra,
    )


@contextlib.contextmanager
def _damage(path: Path) -> Iterator[None]:
    """Turn the errors of reading a damaged file of an entry into `_DamagedEntry`."""
    try:
        yield
    except (OSError, EOFError, KeyError, TypeError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise _DamagedEntry(f"{path} is {'altered or unreadable' if path.exists() else 'missing'}") from error


def _sample_checksum(path: Path) -> str:
    """SHA-256 of a file's size and of samples spread evenly over it, its start and its end among them. Fast."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as stream:
        for offset in np.linspace(0, max(0, size - _SAMPLE_BYTES), _SAMPLES).astype(int):
            stream.seek(offset)
            digest.update(stream.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def _hash(image: np.ndarray) -> int:
    return int.from_bytes(hashlib.sha256(image.data).digest()[:8], "little")


def _channel_sums(image: np.ndarray) -> np.ndarray:
    """Return the exact sums of an (S, S, 3) uint8 image and of its squares over the pixels, (2, 3) int64."""
    values = image.reshape(len(image), -1).astype(np.float64)  # integers far below 2**53, so the sums are exact
    ones = np.ones(len(image))
    columns = np.stack([ones @ values, ones @ values**2])  # (2, S * 3)
    return columns.reshape(2, -1, 3).sum(axis=1).astype(np.int64)

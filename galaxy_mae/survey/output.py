"""The folder of an output: what it says it was computed from, which partitions are complete, its HATS metadata.

A partition names in its Parquet metadata the model, the settings and the content of the input, and has a seal, the
SHA-256 of its file; `survey.json` names them for the folder. Another command's work is refused. `finish` compares all
partitions with their seals and with the input, and writes the metadata that makes the folder a HATS catalogue, so LSDB
opens complete outputs only.
"""

import dataclasses
import hashlib
import json
import mmap
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from galaxy_mae import provenance
from galaxy_mae.data import hats
from galaxy_mae.errors import UserError, full_disk_named
from galaxy_mae.files import atomic_file, make_output_folder, read_json, sha256, write_json
from galaxy_mae.predictions.formats import ABOUT
from galaxy_mae.survey.embedder import Embedder

_SURVEY = "survey.json"  # what the metadata of each partition say about it, of the folder
_SEAL = b"seal of this file: sha256 "  # before the hash, in the metadata of a partition's file
UNSEALED = f"{_SEAL.decode()}{'0' * 64}"  # until its content is known
_NOT_COMPARED = {"commit", "versions", "created"}
_SKY_MAPS = ("skymap.fits", "point_map.fits")
_KEPT_PROPERTIES = (
    *("hats_col_ra", "hats_col_dec", "hats_col_healpix", "hats_col_healpix_order", "hats_skymap_order", "hats_order"),
    *("hats_max_rows", "moc_sky_fraction", "hats_version", "hats_release_date"),
)


@dataclass(frozen=True)
class Output:
    """The folder of an output, the input, and what the rows depend on, versions and date (`provenance_of`)."""

    folder: Path
    catalogue: hats.HatsCatalogue
    about: dict[str, Any]

    @property
    def primary(self) -> Path:
        """Where the partitions are: of a collection, in a folder of the output's own name."""
        return self.folder / self.folder.resolve().name if self.catalogue.in_collection else self.folder

    def file_of(self, partition: hats.Partition) -> Path:
        return self.primary / hats.pixel_location(partition.order, partition.pixel)

    def about_partition(self, partition: hats.Partition) -> dict[str, Any]:
        """What the file of a partition says about itself: also what tells whether its input has changed."""
        source = {"source_state": state_of(partition), "source_sha256": [sha256(file) for file in partition.files]}
        return self.about | {"source_rows": self.catalogue.rows[partition]} | source

    def begin(self, source: Path) -> None:
        """Make the folders. The first task says whose they are, a later one compares that with its own command."""
        make_output_folder(self.folder, "--output", parents=False, markers=[_SURVEY], inputs=[source.expanduser()])
        if (found := _read_survey(self.folder)) is None:
            write_json(self.folder / _SURVEY, self.about)
        else:
            _check_same(f"--output {self.folder}", found, self.about)
        self.primary.mkdir(exist_ok=True)

    def is_done(self, partition: hats.Partition) -> bool:
        """Whether there is a complete file of a partition, of this input. A `UserError` if it is of another command.

        The input's content is hashed again only if its size or times are others: of a copy, they may be.
        """
        path = self.file_of(partition)
        try:
            if not seal(path):
                return False
            found = json.loads(pq.read_metadata(path).metadata[ABOUT.encode()])
            is_same = found["source_rows"] == self.catalogue.rows[partition]
            if is_same and found["source_state"] != state_of(partition):
                is_same = found["source_sha256"] == [sha256(file) for file in partition.files]
        except (OSError, pa.ArrowException, TypeError, KeyError, ValueError):  # absent, damaged or not ours: written
            return False
        _check_same(path, found, self.about)
        return is_same


def state_of(partition: hats.Partition) -> list[list[int]]:
    """What changes with the files of a partition: their sizes in bytes, and their times in nanoseconds."""
    states = [file.stat() for file in partition.files]
    return [[state.st_size, state.st_mtime_ns, state.st_ctime_ns] for state in states]


def seal(path: Path, write: bool = False) -> bool:
    """Whether a file, with zeros for the hash, has the hash that is in its metadata; or `write` it there.

    It finds what the checksums of pages do not cover: their headers and the footer.
    """
    with path.open("r+b" if write else "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        start = content.rfind(_SEAL) + len(_SEAL)
        digest = hashlib.sha256()
        for part in (slice(0, start), slice(start + 64, None)):
            with memoryview(content)[part] as view:
                digest.update(view)
        if write:
            file.seek(start)
            file.write(digest.hexdigest().encode())
        return write or content[start : start + 64] == digest.hexdigest().encode()


def provenance_of(catalogue: hats.HatsCatalogue, embedder: Embedder) -> dict[str, Any]:
    """What an output says about itself: all that its rows depend on, versions and date."""
    model, image, is_flux = embedder.model, embedder.image, embedder.image.kind == "flux"
    session = provenance.session()
    about = {
        "model": model.name,
        "model_fingerprint": model.fingerprint,
        "training_images": model.looks_fingerprint,
        "class_names": list(model.class_names),
        "image_size": model.image_size,
        "catalog": catalogue.name,
        "catalog_fingerprint": catalogue.fingerprint,
        "image_column": image.name,
        "columns": list(embedder.kept),
        "bands": list(image.bands) if is_flux else None,
        "stretch": dataclasses.asdict(embedder.stretch) if is_flux else None,
        "frame": dataclasses.asdict(embedder.frame),
        "bf16": model.bf16,
        "orientations": model.orientations,
        "embedding": np.dtype(embedder.embedding_type).name,
        **{"commit": session["commit"], "versions": session["versions"], "created": session["started"]},
    }
    return json.loads(json.dumps(about))  # lists in place of tuples, as when it is read again


def _read_survey(output: Path) -> dict[str, Any] | None:
    try:
        return read_json(output / _SURVEY, f"delete the folder {output}")
    except (FileNotFoundError, NotADirectoryError):
        return None


def _check_same(where: object, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise a `UserError` if rows depended on something else; a model or a catalogue may have moved."""
    same = {x for x in ("model", "catalog") if before.get(f"{x}_fingerprint") == now.get(f"{x}_fingerprint")}
    if changed := provenance.differences(before, now, _NOT_COMPARED | same | (before.keys() - now.keys())):
        raise UserError(f"{where}: another command wrote it ({changed}); choose another --output, or delete it")


def finish(catalogue: hats.HatsCatalogue, folder: Path) -> str:
    """Check that an output is complete, write its metadata, after which LSDB and hats open it, and say what is there.

    Raises:
        UserError: partitions are missing, damaged, or of another model or input.
    """
    if (about := _read_survey(folder)) is None:
        raise UserError(f"--output {folder}: nothing was computed there; run catalogue survey --model ... first")
    same = {"catalog": catalogue.name, "catalog_fingerprint": catalogue.fingerprint}
    _check_same(f"--output {folder}", about, about | same)
    if unreadable := [f"{p} ({rows})" for p, rows in catalogue.rows.items() if isinstance(rows, UserError)]:
        count = f"{len(unreadable):,} of {len(catalogue.partitions):,} partitions"
        raise UserError(f"--catalog {catalogue.path}: {count} cannot be read, as {unreadable[0]}")
    output = Output(folder, catalogue, about)
    with ThreadPoolExecutor(hats.READERS) as pool:
        done = pool.map(output.is_done, catalogue.partitions)
        missing = [str(p) for p, complete in zip(catalogue.partitions, done, strict=True) if not complete]
    if missing:
        named = ", ".join(missing[:10]) + ", ..." * (len(missing) > 10)
        wrong = f"{len(missing):,} of {len(catalogue.partitions):,} partitions are missing: {named}"
        raise UserError(f"--output {folder}: {wrong}; submit the array again, which computes only these")
    with full_disk_named(f"--output {folder}"):
        _write_metadata(output)
    rows = sum(catalogue.rows.values())
    return f"{len(catalogue.partitions):,} partitions, {rows:,} galaxies: complete; {folder}"


def _write_metadata(output: Output) -> None:
    """Write what makes a folder of partitions a HATS catalogue. The properties come last: they are what opens it."""
    catalogue, primary, name = output.catalogue, output.primary, output.folder.resolve().name
    files = [output.file_of(partition) for partition in catalogue.partitions]
    schema = pq.read_schema(files[0]).with_metadata({ABOUT: json.dumps(output.about)})
    with atomic_file(primary / hats.COMMON_METADATA) as tmp_path:
        pq.write_metadata(schema, tmp_path)
    for file in (hats.PARTITIONS, *_SKY_MAPS):
        if (catalogue.path / file).is_file():
            with atomic_file(primary / file) as tmp_path:
                shutil.copyfile(catalogue.path / file, tmp_path)
    common = {
        "hats_builder": "galaxy-mae",
        "hats_creation_date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%MUTC"),
        "hats_estsize": str(sum(file.stat().st_size for file in files) // 1024),  # kB
    }
    properties = {
        "obs_collection": name,
        "dataproduct_type": "object",
        "hats_nrows": str(sum(catalogue.rows.values())),
        **{key: value for key, value in catalogue.properties.items() if key in _KEPT_PROPERTIES},
        "hats_npix_suffix": ".parquet",
        **common,
    }
    _write_properties(primary / "hats.properties", properties)
    if catalogue.in_collection:
        properties = {"obs_collection": name, "hats_primary_table_url": name, **common}
        _write_properties(output.folder / hats.COLLECTION, properties)


def _write_properties(path: Path, properties: dict[str, str]) -> None:
    with atomic_file(path) as tmp_path:
        tmp_path.write_text("".join(f"{key}={value}\n" for key, value in properties.items()), encoding="utf-8")

"""The folder of an output: what it says it was computed from, which partitions are complete, its HATS metadata.

A partition names in its Parquet metadata the model, the settings and the input; `survey.json` names them for the
folder. Another command's work is refused. `finish` compares all partitions with the input and writes the metadata that
makes the folder a HATS catalogue, so LSDB opens complete outputs only.
"""

import dataclasses
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from galaxy_mae import provenance
from galaxy_mae.catalogue.predict import resumable_disk_full
from galaxy_mae.data.hats import COLLECTION, COMMON_METADATA, PARTITIONS, HatsCatalogue, Partition, pixel_location
from galaxy_mae.errors import UserError
from galaxy_mae.files import atomic_file, make_output_folder, read_json, remove_leftovers, write_json
from galaxy_mae.survey.embedder import Embedder

ABOUT = "galaxy_mae"  # the key of a Parquet file's metadata that says where its rows come from, as JSON
_SURVEY = "survey.json"  # the same, of the output folder
_NOT_COMPARED = {"commit", "versions", "created"}
_SKY_MAPS = ("skymap.fits", "point_map.fits")
_KEPT_PROPERTIES = (
    *("hats_col_ra", "hats_col_dec", "hats_col_healpix", "hats_col_healpix_order", "hats_skymap_order", "hats_order"),
    *("hats_max_rows", "moc_sky_fraction", "hats_version", "hats_release_date"),
)
_FOOTER_THREADS = 16  # network file systems answer slowly
_MAX_NAMED = 10  # partitions in a message


def primary_folder(catalogue: HatsCatalogue, output: Path) -> Path:
    """Where the partitions of an output are: of a collection, in a folder of the output's own name."""
    return output / output.resolve().name if catalogue.in_collection else output


def file_of(primary: Path, partition: Partition) -> Path:
    """Where an output has a partition."""
    return primary / pixel_location(partition.order, partition.pixel)


def provenance_of(catalogue: HatsCatalogue, embedder: Embedder) -> dict[str, Any]:
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
        "bf16": embedder.options.bf16,
        "orientations": model.orientations,
        "embedding": np.dtype(embedder.embedding_type).name,
        "commit": session["commit"],
        "versions": session["versions"],
        "created": session["started"],
    }
    return json.loads(json.dumps(about))  # lists in place of tuples, as when it is read again


def begin(output: Path, primary: Path, about: dict[str, Any], source: Path) -> None:
    """Make the folders of an output. The first task says whose it is, a later one compares that with its own command.

    Args:
        output: its folder.
        primary: its `primary_folder`.
        about: its `provenance_of`.
        source: the folder of the input.

    Raises:
        UserError: the output cannot be written, or is of another command.
    """
    make_output_folder(output, "--output", parents=False, marker=_SURVEY, inputs=[source.expanduser()])
    if (found := _read_survey(output)) is None:
        write_json(output / _SURVEY, about)
    elif changed := _difference(found, about):
        raise UserError(f"--output {output}: another command wrote it ({changed}); choose another folder, or delete it")
    primary.mkdir(exist_ok=True)
    remove_leftovers(primary, recursive=False)


def _read_survey(output: Path) -> dict[str, Any] | None:
    try:
        return read_json(output / _SURVEY, f"delete the folder {output}", {"model_fingerprint": str, "catalog": str})
    except (FileNotFoundError, NotADirectoryError):
        return None


def source_of(partition: Partition, catalogue: HatsCatalogue) -> dict[str, Any]:
    """What tells whether the input of a partition has changed."""
    return {"source_rows": catalogue.rows[partition], "source_bytes": sum(f.stat().st_size for f in partition.files)}


def is_done(primary: Path, partition: Partition, about: dict[str, Any], catalogue: HatsCatalogue) -> bool:
    """Whether an output has a complete file of a partition, of this input.

    Args:
        primary: `primary_folder` of the output.
        partition: that can be read.
        about: the output's `provenance_of`.
        catalogue: the input.

    Raises:
        UserError: it was made by another model or with other settings.
    """
    path, source = file_of(primary, partition), source_of(partition, catalogue)
    try:
        metadata = pq.read_metadata(path)
        found = json.loads(metadata.metadata[ABOUT.encode()])
    except FileNotFoundError:
        return False
    except (OSError, pa.ArrowException, TypeError, KeyError, ValueError):  # damaged, or not ours: written again
        return False
    if changed := _difference(found, about):
        raise UserError(f"{path}: computed by another command ({changed}); choose another --output, or delete it")
    return metadata.num_rows == source["source_rows"] and all(found.get(key) == value for key, value in source.items())


def _difference(before: dict[str, Any], now: dict[str, Any]) -> str:
    """Name what differs in what the rows depend on; a model or a catalogue may have moved."""
    ignored = _NOT_COMPARED | (before.keys() - now.keys())
    for name in ("model", "catalog"):
        if before.get(f"{name}_fingerprint") == now.get(f"{name}_fingerprint"):
            ignored = ignored | {name}
    return provenance.differences(before, now, ignored)


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
    with ThreadPoolExecutor(_FOOTER_THREADS) as pool:
        done = pool.map(lambda p: is_done(primary, p, about, catalogue), catalogue.partitions)
        missing = [str(p) for p, complete in zip(catalogue.partitions, done, strict=True) if not complete]
    if missing:
        raise UserError(
            f"--output {output}: {len(missing):,} of {len(catalogue.partitions):,} partitions are missing: "
            f"{_named(missing)}; submit the array again, which computes only these"
        )
    with resumable_disk_full(output):
        remove_leftovers(primary, recursive=False)
        _write_metadata(catalogue, output, primary, about)
    rows = sum(catalogue.rows.values())
    return f"{len(catalogue.partitions):,} partitions, {rows:,} galaxies: complete; {output}"


def _named(partitions: list[str]) -> str:
    more = len(partitions) - _MAX_NAMED
    return ", ".join(partitions[:_MAX_NAMED]) + (f" and {more:,} more" if more > 0 else "")


def _write_metadata(catalogue: HatsCatalogue, output: Path, primary: Path, about: dict[str, Any]) -> None:
    """Write what makes a folder of partitions a HATS catalogue. The properties come last: they are what opens it."""
    files = [file_of(primary, partition) for partition in catalogue.partitions]
    schema = pq.read_schema(files[0]).with_metadata({ABOUT: json.dumps(about)})
    with atomic_file(primary / COMMON_METADATA) as tmp_path:
        pq.write_metadata(schema, tmp_path)
    for name in (PARTITIONS, *_SKY_MAPS):
        if (catalogue.path / name).is_file():
            with atomic_file(primary / name) as tmp_path:
                shutil.copyfile(catalogue.path / name, tmp_path)
    kept = {key: value for key, value in catalogue.properties.items() if key in _KEPT_PROPERTIES}
    common = {
        "hats_builder": "galaxy-mae",
        "hats_creation_date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%MUTC"),
        "hats_estsize": str(sum(file.stat().st_size for file in files) // 1024),  # kB
    }
    name = output.resolve().name
    properties = {
        "obs_collection": name,
        "dataproduct_type": "object",
        "hats_nrows": str(sum(catalogue.rows.values())),
        **kept,
        "hats_npix_suffix": ".parquet",
        **common,
    }
    _write_properties(primary / "hats.properties", properties)
    if catalogue.in_collection:
        _write_properties(output / COLLECTION, {"obs_collection": name, "hats_primary_table_url": name, **common})


def _write_properties(path: Path, properties: dict[str, str]) -> None:
    with atomic_file(path) as tmp_path:
        tmp_path.write_text("".join(f"{key}={value}\n" for key, value in properties.items()))

"""Catalogues of predictions: class probabilities, uncertainties and embeddings of every galaxy of a data set.

Images take the path of training: the cache of the data set, `GalaxyBatches.eval_transform`, the model. The rows are
computed in parts of a fixed length, each written atomically into a folder beside the output (`.NAME.partial`). The same
command resumes with the first missing part, and the parts do not depend on where it was interrupted. At the end they
become the output. Memory does not grow with the number of galaxies, but for their names and positions.
"""

import dataclasses
import json
import logging
import shutil
import sys
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from galaxy_mae import provenance
from galaxy_mae.catalogue.models import CatalogueModel, open_model
from galaxy_mae.data.cache import Galaxies, open_galaxies
from galaxy_mae.data.fits import Stretch, UnreadableImage
from galaxy_mae.data.frame import Frame, geometry
from galaxy_mae.data.images import as_cutout, decode, decoding, image_statistics
from galaxy_mae.errors import UserError, first_line, full_disk_named
from galaxy_mae.files import atomic_file, check_output, claim, read_json, remove_leftovers, write_json
from galaxy_mae.model.compute import bfloat16_is_fast, use_free_cores
from galaxy_mae.model.encoder import Encoder
from galaxy_mae.model.saved_model import DEFAULT_MODEL
from galaxy_mae.predictions.formats import check_catalogue_output, read_catalogue, write_catalogue
from galaxy_mae.predictions.schema import FLAGS, galaxy_table, is_usable, to_numpy, vector_column
from galaxy_mae.progress import stage
from galaxy_mae.training.tracking import setup_logging

logger = logging.getLogger(__name__)

ROWS_PER_PART = 4096
_MEASURED = 1000  # of the images that are far from the training's, of which the statistics tell why
_PARTS = "part_*.parquet"


def predict_part(model: CatalogueModel, galaxies: Galaxies, rows: slice, embeddings: bool) -> pa.Table:
    """The catalogue's rows of some galaxies, but for the principal components; with the features if `embeddings`."""
    pixels, known = galaxies.pixels, galaxy_table(galaxies, np.arange(rows.start, rows.stop))
    if isinstance(pixels, np.memmap):  # mapped again: its pages leave this process's memory with the new map
        pixels = np.memmap(pixels.filename, pixels.dtype, "r", pixels.offset, pixels.shape)
    kind = np.float32 if embeddings else None
    nan_fraction = None if galaxies.nan_fraction is None else galaxies.nan_fraction[rows]
    return model.predict(known, pixels[rows], galaxies.problem[rows], galaxies.blank[rows], kind, nan_fraction)


def _open(
    images: str | Path | np.ndarray | Sequence[Image.Image | str | Path],
    model: CatalogueModel,
    stretch: Stretch,
    frame: Frame,
    pca: int | None,
    columns: Sequence[str] | None = None,
) -> Galaxies:
    """The galaxies, or a `UserError` if the model cannot take them, or there are too few for the components."""
    if isinstance(images, str | Path):
        how = {"stretch": stretch, "frame": frame, "columns": columns, "skip_unreadable": True}
        galaxies = open_galaxies(str(images), model.image_size, **how)
    else:
        galaxies = in_memory(images, model.image_size, stretch, frame, "images")
    rows = int(np.sum(galaxies.problem == ""))
    if pca is not None and not 1 <= pca <= min(rows, model.num_features):
        raise UserError(
            f"--pca {pca}: it must be at least 1 and at most the number of features, {model.num_features}, and of "
            f"readable galaxies, {rows:,}"
        )
    return galaxies


def add_components(
    tables: Iterable[pa.Table], count: int | None, embeddings: bool
) -> tuple[Iterable[pa.Table], list[float]]:
    """Append the principal components of the column `embedding` as `pca`, in memory that does not grow with the rows.

    The covariance is accumulated in float64, which is exact where scikit-learn's IncrementalPCA is approximate. The
    largest element of a component is positive.

    Args:
        tables: of the catalogue; iterated over twice. Embeddings with NaN are left out of the analysis.
        count: of the components; None changes nothing.
        embeddings: whether the column `embedding` stays.

    Returns:
        The tables, one by one, and the fraction of the variance that each component explains.
    """
    if count is None:
        return tables, []
    rows, total, square = 0, 0.0, 0.0
    for part in (to_numpy(table["embedding"]) for table in tables):
        x = part[np.isfinite(part).all(axis=1)].astype(np.float64)
        rows, total, square = rows + len(x), total + x.sum(axis=0), square + x.T @ x
    mean = total / rows
    variance, vectors = np.linalg.eigh(square / rows - np.outer(mean, mean))  # in increasing order
    components = vectors[:, ::-1][:, :count].T
    components *= np.sign(components[np.arange(count), np.abs(components).argmax(axis=1)])[:, None]
    explained = variance[::-1][:count].clip(min=0) / max(variance.sum(), np.finfo(float).tiny)

    def with_components(table: pa.Table) -> pa.Table:
        values = ((to_numpy(table["embedding"]) - mean) @ components.T).astype(np.float32)
        column, array = vector_column("pca", "principal components of the embedding in this catalogue", values)
        return (table if embeddings else table.drop_columns("embedding")).append_column(column, array)

    return map(with_components, tables), explained.tolist()


@dataclass(frozen=True)
class PartialCatalogue:
    """The parts of an output, each a Parquet file of its `NAME.partial`, and the provenance of who began it."""

    folder: Path
    parts: list[slice]
    about: dict[str, Any]

    @property
    def missing(self) -> list[slice]:
        """The rows of the parts that are not there."""
        return [rows for rows in self.parts if not self._path(rows).is_file()]

    def write(self, rows: slice, table: pa.Table) -> None:
        """Write a part atomically."""
        with atomic_file(self._path(rows)) as tmp_path:
            pq.write_table(table, tmp_path, use_compliant_nested_type=False)

    def __iter__(self) -> Iterator[pa.Table]:
        """The tables of all parts, in order; a `UserError` names a damaged one."""
        return self.columns(None)

    def columns(self, names: list[str] | None) -> Iterator[pa.Table]:
        """Some columns of them."""
        for path in map(self._path, self.parts):
            try:
                yield pq.read_table(path, columns=names)
            except (OSError, pa.ArrowException) as error:
                raise UserError(f"{path}: damaged ({first_line(error)}); delete it and repeat the command") from error

    def discard(self) -> None:
        """Delete all parts."""
        for path in self.folder.glob(_PARTS):
            path.unlink()

    def _path(self, rows: slice) -> Path:
        return self.folder / f"part_{rows.start // ROWS_PER_PART:06d}.parquet"


@contextmanager
def partial_catalogue(output: Path, rows: int, about: dict[str, Any], overwrite: bool) -> Iterator[PartialCatalogue]:
    """Hold the parts of an output within the block. Those that the same command computed before are kept.

    Raises:
        UserError: another process holds them, or they are of another command and `overwrite` is not set.
    """
    folder = partial_folder(output)
    folder.mkdir(exist_ok=True)
    with claim(folder / "lock"):
        remove_leftovers(folder)
        parts = [slice(i, min(i + ROWS_PER_PART, rows)) for i in range(0, rows, ROWS_PER_PART)]
        partial = PartialCatalogue(folder, parts, about)
        try:
            if any(folder.glob(_PARTS)):
                before = read_json(folder / "about.json", f"delete the folder {folder}")
                changed = provenance.differences(before, about, {"created", "dataset"})  # the data have a fingerprint
                if not changed:
                    partial = dataclasses.replace(partial, about=before)
                elif not overwrite:
                    raise UserError(
                        f"--output {output}: {folder.name} beside it has parts of another catalogue ({changed}); "
                        "repeat that command to complete it, or set --overwrite to discard them"
                    )
                else:
                    logger.info("%s: the parts of another catalogue are discarded (%s)", folder, changed)
                    partial.discard()
            write_json(folder / "about.json", partial.about)
            yield partial
        finally:
            if {path.name for path in folder.iterdir()} <= {"about.json", "lock", "lock.lease"}:
                shutil.rmtree(folder, ignore_errors=True)


def partial_folder(output: Path) -> Path:
    """Where the parts of an output are."""
    return output.with_name(f".{output.name}.partial")


def run(options: Namespace) -> None:
    """Write the catalogue that the command line describes; what it cannot do raises a `UserError`."""
    setup_logging()
    use_free_cores()
    output = options.output
    overwrite = options.overwrite or partial_folder(output).exists()
    check_catalogue_output(output, "--output", overwrite=overwrite, inputs=[options.dataset])
    device = select_device(options.use_cpu)
    if options.bf16 and not bfloat16_is_fast(device == "cpu"):
        logger.warning("--bf16: this device emulates bfloat16; float32 is faster")
    stretch, frame = Stretch.named(options.stretch), Frame.chosen(options.fit, options.arcsec)
    model = open_model(options.model, options.labels, stretch, frame, device, options.bf16, options.orientations)
    galaxies = _open(options.dataset, model, stretch, frame or model.frame, options.pca, options.columns)
    about = provenance_of(model, galaxies, options)
    with partial_catalogue(output, len(galaxies), about, options.overwrite) as partial:
        overwrite = options.overwrite or _is_complete(output, partial.about)
        check_output(output, "--output", overwrite=overwrite)
        if options.overwrite or not output.exists():
            with full_disk_named(f"--output {output}"):
                speed = _compute(partial, model, galaxies)
                names = ["flag", "far_from_training"] if model.looks else ["flag"]
                table = pa.concat_tables(partial.columns(names))
                about = partial.about | unlike(model, galaxies, table)
                _assemble(output, partial, about)
            counts = counts_of(Counter(table["flag"].to_pylist()))
            print(f"{len(galaxies):,} galaxies: {counts}; {speed:,.1f} images/s; {output}")
            if text := about.get("unlike"):
                print(f"warning: {text}", file=sys.stderr)
        partial.discard()


def unlike(model: CatalogueModel, galaxies: Galaxies, table: pa.Table) -> dict[str, str]:
    """`unlike` of the provenance: how the images differ from those of the model's training, if many are far from them.

    `table` has the catalogue's columns `flag` and, if the model knows its training images, `far_from_training`.
    """
    if model.looks is None:
        return {}
    usable, far = is_usable(to_numpy(table["flag"])), to_numpy(table["far_from_training"]) > 1
    rows = np.flatnonzero(usable & far)
    statistics = image_statistics(galaxies.pixels[rows[:: len(rows) // _MEASURED + 1]])
    text = model.looks.describe(statistics, len(rows), int(usable.sum()))
    return {"unlike": text} if text else {}


def counts_of(flags: Counter[str]) -> str:
    """How often each flag occurs, as the commands print it: the first four, and others that do."""
    return ", ".join(f"{flags[name]:,} {name}" for i, name in enumerate(FLAGS) if i < 4 or flags[name])


def _is_complete(output: Path, about: dict[str, Any]) -> bool:
    """Whether an output was made from these parts: a process was killed before it could delete them."""
    try:
        found = read_catalogue(output).about
    except UserError:  # not a catalogue
        return False
    return all(found.get(key) == value for key, value in about.items())


def select_device(use_cpu: bool) -> str:
    """`cuda` if there is a GPU and it may be used, else `cpu`."""
    return "cuda" if torch.cuda.is_available() and not use_cpu else "cpu"


def provenance_of(model: CatalogueModel, galaxies: Galaxies, options: Namespace) -> dict[str, Any]:
    """What a catalogue says about itself. But for the date, it is all that its rows depend on."""
    session = provenance.session()
    about = {
        "model": {
            "name": model.name,
            "fingerprint": model.fingerprint,
            "embedding_fingerprint": model.embedding_fingerprint,
            "seeds": list(model.seeds),
            "training_images": model.looks_fingerprint,
        },
        "class_names": list(model.class_names),
        "dataset": galaxies.name,
        "dataset_fingerprint": galaxies.fingerprint,
        "image_size": model.image_size,
        "stretch": dataclasses.asdict(Stretch.named(options.stretch)),
        "frame": dataclasses.asdict(galaxies.frame),
        "columns": sorted(options.columns or []),
        **{name: getattr(options, name) for name in ("labels", "orientations", "bf16")},
        "embeddings": options.embeddings or not model.class_names,
        "pca_components": options.pca,
        **{"commit": session["commit"], "versions": session["versions"], "created": session["started"]},
    }
    return json.loads(json.dumps(about))  # lists in place of tuples, as when it is read again


def _compute(partial: PartialCatalogue, model: CatalogueModel, galaxies: Galaxies) -> float:
    """Write the parts that are missing. Returns images/s."""
    missing, embeddings = partial.missing, bool(partial.about["embeddings"] or partial.about["pca_components"])
    left = sum(rows.stop - rows.start for rows in missing)
    if left < len(galaxies):
        logger.info("resuming: %s of %s galaxies are left", f"{left:,}", f"{len(galaxies):,}")
    started = time.monotonic()
    with stage("predicting", len(galaxies), done=len(galaxies) - left) as progress:
        for rows in missing:
            partial.write(rows, predict_part(model, galaxies, rows, embeddings))
            progress.advance(rows.stop - rows.start)
    return left / (time.monotonic() - started)


def _assemble(output: Path, partial: PartialCatalogue, about: dict[str, Any]) -> None:
    """Write the output from all parts with its provenance."""
    tables, explained = add_components(partial, about["pca_components"], about["embeddings"])
    write_catalogue(output, tables, about | ({"pca_explained_variance": explained} if explained else {}))


def predict(
    images: str | Path | np.ndarray | Sequence[Image.Image | str | Path],
    model: str | Path | Encoder = DEFAULT_MODEL,
    *,
    embeddings: bool = False,
    pca: int | None = None,
    labels: str | None = None,
    orientations: bool = False,
    stretch: str = "auto",
    fit: str | None = None,
    arcsec: float | None = None,
    bf16: bool = False,
    use_cpu: bool = False,
) -> pd.DataFrame:
    """The catalogue of some galaxies as a DataFrame; `python -m galaxy_mae.catalogue predict` writes the same rows.

    Args:
        images: a data set, as for `--dataset`; or (H, W, 3) uint8 arrays, PIL images of at most 8 bits, or paths of
            images, of any sizes.
        model: as the flag of that command, or of `load_encoder`.
        embeddings, pca, labels, orientations, stretch, fit, arcsec, bf16, use_cpu: as the flags of that command.

    Returns:
        One row per galaxy, with the columns of the catalogue. `embedding` and `pca` hold a float32 array per row.

    Raises:
        UserError: as the command does, or images of another shape or type.

    >>> table = gm.predict("my_galaxies/")
    >>> len(table), table["predicted_class"].nunique() > 1
    (50, True)
    """
    source = model if isinstance(model, Encoder) else str(model)
    how, frame = Stretch.named(stretch), Frame.chosen(fit, arcsec)
    opened = open_model(source, labels, how, frame, select_device(use_cpu), bf16, orientations)
    galaxies = _open(images, opened, how, frame or opened.frame, pca)
    keep = embeddings or not opened.class_names
    table = predict_part(opened, galaxies, slice(0, len(galaxies)), keep or pca is not None)
    if text := unlike(opened, galaxies, table):
        logger.warning("%s", text["unlike"])
    (table,), _ = add_components([table], pca, keep)
    return table.to_pandas()


def in_memory(
    images: np.ndarray | Sequence[Image.Image | str | Path], size: int, stretch: Stretch, frame: Frame, where: str
) -> Galaxies:
    """Images as galaxies without positions and labels, in their frames, as in the cache; `where` begins an error."""
    framed, blank = [], []
    for i, image in enumerate(images):
        is_file = isinstance(image, str | Path)
        try:
            with decoding():
                value = as_cutout(Path(image).expanduser(), stretch) if is_file else as_rgb(image, i)
                array = decode(value, stretch)
            framed.append(frame.apply(array, size, getattr(value, "pixel_scale", np.nan)))
        except UnreadableImage as problem:
            raise UserError(f"{where}: {image if is_file else f'image {i}'} {problem}") from problem
        blank.append(array.min() == array.max())
    if not framed:
        raise UserError("images: there is none")
    return Galaxies(
        name="images",
        fingerprint="",
        class_names=(),
        pixels=np.stack([image.pixels for image in framed]),
        native_size=size,
        geometry=geometry(np.array([image.numbers for image in framed]), frame),
        frame=frame,
        blank=np.array(blank),
        problem=np.full(len(framed), "", object),
        **dict.fromkeys(("label", "ra", "dec", "pixel_scale", "object_id")),
        **dict.fromkeys(("image_hash", "predefined_test", "channel_sum", "channel_square_sum")),  # not needed here
    )


def as_rgb(image: np.ndarray | Image.Image, i: int) -> np.ndarray:
    """An image in memory as (H, W, 3) uint8; a `UserError` with its number if it is of another shape or type."""
    if isinstance(image, Image.Image) and not (image.mode == "F" or image.mode.startswith("I")):
        image = image.convert("RGB")
    array = np.asarray(image)
    if array.dtype != np.uint8 or array.shape[2:] != (3,) or not array.size:
        fix = "it must be uint8 (H, W, 3), or a PIL image of at most 8 bits"
        raise UserError(f"images: image {i} is {array.dtype} {array.shape}; {fix}")
    return array

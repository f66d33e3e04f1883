"""Embeddings of an LSDB catalogue, computed by Dask when they are asked for."""

import ctypes
import functools
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pyarrow as pa

from galaxy_mae.data.arrow import BANDS
from galaxy_mae.data.fits import Stretch
from galaxy_mae.data.images import decoding
from galaxy_mae.survey.embedder import Embedder, open_embedder

if TYPE_CHECKING:
    import nested_pandas as npd
    import pandas as pd
    from lsdb.catalog import Catalog

_TRIM, _MMAP = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of glibc's malloc.h
_MMAP_BYTES = 32 << 20  # what glibc raises the second to by itself, if no environment variable fixes the first
_one_thread = threading.Lock()  # of Dask's in a process: hooks of the model and filters of warnings are shared


def embed(
    catalog: "Catalog",
    model: str,
    *,
    image_column: str | None = None,
    bands: Sequence[str] = BANDS,
    stretch: Stretch = Stretch(),  # noqa: B008 (frozen)
    bf16: bool = False,
    float16: bool = False,
    orientations: bool = False,
    use_cpu: bool = False,
) -> "Catalog":
    """The classes and embeddings of an LSDB catalogue, computed by Dask when they are asked for.

    Args:
        catalog: an LSDB catalogue with images, as `lsdb.open_catalog` opens it.
        model: path or Hub id, as for `--model`; every worker opens it once.
        image_column, bands, stretch, bf16, float16, orientations, use_cpu: as the flags of the command `survey`.

    Returns:
        A lazy LSDB catalogue with the columns of the command's output, without margins.

    Raises:
        UserError: no such model or column; orientations for a classifier.
    """
    info = catalog.hc_structure.catalog_info
    schema = pa.Schema.from_pandas(catalog.meta, preserve_index=False).remove_metadata()
    settings = _Settings(
        str(model),
        schema,
        (info.ra_column, info.dec_column),
        image_column,
        tuple(bands),
        stretch,
        bf16,
        float16,
        orientations,
        use_cpu,
    )
    embedder = _embedder(settings)
    catalog = catalog[[*embedder.kept, embedder.reader.found.name]]
    catalog.margin = None  # it would be computed, too
    return catalog.map_partitions(_embed_frame, settings, meta=_to_frame(embedder.empty(schema), catalog.meta.index))


@dataclass(frozen=True)
class _Settings:
    """The arguments of `embed`: what a worker needs to open the model. The catalogue is its schema, ra and dec."""

    model: str
    schema: pa.Schema
    position: tuple[str, str]
    image_column: str | None
    bands: tuple[str, ...]
    stretch: Stretch
    bf16: bool
    float16: bool
    orientations: bool
    use_cpu: bool


@functools.lru_cache(maxsize=1)
def _embedder(settings: _Settings) -> Embedder:
    """One encoder per process."""
    if "MALLOC_TRIM_THRESHOLD_" in os.environ:
        reuse_memory()
    ra, dec = settings.position
    return open_embedder(
        settings.model,
        settings.schema,
        {"hats_col_ra": ra, "hats_col_dec": dec},
        "catalog",
        image_column=settings.image_column,
        bands=settings.bands,
        stretch=settings.stretch,
        bf16=settings.bf16,
        float16=settings.float16,
        orientations=settings.orientations,
        use_cpu=settings.use_cpu,
    )


def reuse_memory() -> None:
    """Let glibc keep freed memory for the next tensor.

    Dask's nanny sets MALLOC_TRIM_THRESHOLD_ in its workers, which also ends glibc's adjustment of the size from which
    memory is mapped anew and returned: every larger tensor then costs page faults (mallopt(3)).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # of glibc alone
    if mallopt:
        mallopt(_MMAP, _MMAP_BYTES)
        mallopt(_TRIM, 2 * _MMAP_BYTES)


def _embed_frame(frame: "npd.NestedFrame", settings: _Settings) -> "npd.NestedFrame":
    """The output's rows of a partition, with Arrow columns and the index of the input."""
    table = pa.Table.from_pandas(frame, preserve_index=False)
    with _one_thread:
        embedder = _embedder(settings)
        outputs = [embedder.empty(settings.schema)]
        step = embedder.images_per_run()
        for start in range(0, len(table), step):
            part = table.slice(start, step).combine_chunks()
            with decoding():
                images = embedder.reader.images(part)
            outputs.append(embedder.rows(part, images))
    return _to_frame(pa.concat_tables(outputs), frame.index)


def _to_frame(table: pa.Table, index: "pd.Index") -> "npd.NestedFrame":
    import nested_pandas as npd
    import pandas as pd

    frame = npd.NestedFrame(table.replace_schema_metadata(None).to_pandas(types_mapper=pd.ArrowDtype))
    frame.index = index
    return frame

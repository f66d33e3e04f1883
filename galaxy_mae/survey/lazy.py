"""Embeddings of an LSDB catalogue, computed by Dask when they are asked for."""

import ctypes
import functools
import os
import threading
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from galaxy_mae.data.images import decoding
from galaxy_mae.survey.embedder import IMAGES_PER_RUN, Embedder, open_embedder

if TYPE_CHECKING:
    from lsdb.catalog import Catalog

_TRIM, _MMAP = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of glibc's malloc.h
_MMAP_BYTES = 32 << 20  # what glibc raises the second to by itself, if no environment variable fixes the first
_one_thread = threading.Lock()  # of Dask's in a process: hooks of the model and filters of warnings are shared


def embed(catalog: "Catalog", model: str, **options: Any) -> "Catalog":
    """The classes and embeddings of an LSDB catalogue, computed by Dask when they are asked for.

    Args:
        catalog: an LSDB catalogue with images, as `lsdb.open_catalog` opens it.
        model: path or Hub id, as for `--model`; every worker opens it once.
        options: as of `embedder.open_embedder`: image_column, bands, stretch, frame, bf16, float16, orientations,
            use_cpu.

    Returns:
        A lazy LSDB catalogue with the columns of the command's output, without margins.

    Raises:
        UserError: no such model or column; orientations for a classifier.
    """
    info = catalog.hc_structure.catalog_info
    schema = pa.Schema.from_pandas(catalog.meta, preserve_index=False).remove_metadata()
    if "bands" in options:
        options["bands"] = tuple(options["bands"])  # a list has no hash
    settings = (str(model), schema, info.ra_column, info.dec_column, tuple(options.items()))
    embedder = _embedder(*settings)
    catalog = catalog[[*embedder.kept, embedder.image.name]]
    catalog.margin = None  # it would be computed, too
    return catalog.map_partitions(_embed_frame, *settings, meta=_to_frame(embedder.empty(schema), catalog.meta.index))


@functools.lru_cache(maxsize=1)
def _embedder(model: str, schema: pa.Schema, ra: str, dec: str, options: tuple[tuple[str, Any], ...]) -> Embedder:
    """One encoder per process."""
    if "MALLOC_TRIM_THRESHOLD_" in os.environ:
        reuse_memory()
    return open_embedder(model, schema, {"hats_col_ra": ra, "hats_col_dec": dec}, "catalog", **dict(options))


def reuse_memory() -> None:
    """Let glibc keep freed memory for the next tensor. Dask's MALLOC_TRIM_THRESHOLD_ makes each cost page faults.

    The variable also ends glibc's adjustment of the size from which memory is mapped anew (mallopt(3)).
    """
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):  # of glibc alone
        mallopt(_MMAP, _MMAP_BYTES)
        mallopt(_TRIM, 2 * _MMAP_BYTES)


def _embed_frame(frame: Any, *settings: Any) -> Any:
    """The output's rows of a partition, with Arrow columns and the index of the input; `settings` as of `_embedder`."""
    table = pa.Table.from_pandas(frame, preserve_index=False)
    with _one_thread:
        embedder = _embedder(*settings)
        outputs = [embedder.empty(settings[1])]
        step = IMAGES_PER_RUN[embedder.model.device]
        for start in range(0, len(table), step):
            part = table.slice(start, step).combine_chunks()
            with decoding():
                images = embedder.images(part)
            outputs.append(embedder.rows(part, images))
    return _to_frame(pa.concat_tables(outputs), frame.index)


def _to_frame(table: pa.Table, index: Any) -> Any:
    import nested_pandas as npd
    import pandas as pd

    frame = npd.NestedFrame(table.replace_schema_metadata(None).to_pandas(types_mapper=pd.ArrowDtype))
    frame.index = index
    return frame

"""An index of a survey's embeddings, to find similar galaxies among more than fit into memory.

It is built partition by partition with faiss, from the standardized embeddings that `catalogue similar` compares, too.
IVF-PQ (Jegou, Douze & Schmid 2011, IEEE TPAMI 33, 117) keeps a quarter of a byte per dimension and the row's number,
HNSW (Malkov & Yashunin 2020, IEEE TPAMI 42, 824) the vectors and a graph. Either names candidates, whose embeddings are
then read from their partitions and compared exactly.
"""

import itertools
import json
import math
from argparse import Namespace
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from galaxy_mae import provenance
from galaxy_mae.data.columns import find_column
from galaxy_mae.data.hats import COMMON_METADATA, HatsCatalogue, open_hats
from galaxy_mae.errors import UserError, first_line
from galaxy_mae.files import atomic_folder, read_json, remove_leftovers, write_json
from galaxy_mae.predictions.formats import check_suffix, write_catalogue
from galaxy_mae.predictions.schema import field, is_usable
from galaxy_mae.survey.output import ABOUT

if TYPE_CHECKING:
    import faiss

KINDS = ("ivfpq", "hnsw")
MIN_TRAINING_ROWS = 1000  # of IVF-PQ: 256 centroids of each part of a vector are fitted
CANDIDATES = 10  # of the index for each neighbor that is asked for
_FILE, _ABOUT = "index.faiss", "index.json"
_DIMENSIONS_PER_BYTE = 4
_ROWS_PER_CENTROID = 64  # that train IVF-PQ
_PROBES = 64  # lists of IVF-PQ that a search reads
_LINKS, _MIN_WIDTH = 32, 256  # of each row in HNSW's graph; of a search in it
_READ_ROWS = 16_384
_THREADS = 16


# --------------------------------------------------------------------------------------------------------- the vectors


@dataclass(frozen=True)
class Scaling:
    """The standardization of embeddings: zero mean and unit variance in each dimension, then unit length.

    Attributes:
        mean, scale: (D,) float64; the scale is 0 for dimensions that do not vary.
    """

    mean: np.ndarray
    scale: np.ndarray

    def __call__(self, embedding: np.ndarray) -> np.ndarray:
        """(N, D) float32 of (N, D)."""
        scaled = (embedding - self.mean) * self.scale
        return (scaled / np.linalg.norm(scaled, axis=1, keepdims=True).clip(1e-30)).astype(np.float32)


def scaling_and_sample(parts: Iterator[np.ndarray], fraction: float) -> tuple[Scaling, np.ndarray, int]:
    """The scaling of embeddings in one pass, a random sample of them that is standardized, and how many there are.

    Args:
        parts: (n, D) float32 each, finite.
        fraction: of the sample.
    """
    rng, sample = np.random.default_rng(0), []
    rows, total, square = 0, 0.0, 0.0
    for part in parts:
        x = part.astype(np.float64)
        rows, total, square = rows + len(x), total + x.sum(axis=0), square + (x**2).sum(axis=0)
        sample.append(part[rng.random(len(part)) < fraction])
    if rows < 2:
        raise UserError(f"the catalogue has {rows} readable galaxies that are not blank; two are needed")
    mean = total / rows
    std = np.sqrt((square / rows - mean**2).clip(0))
    varies = std > 1e-6 * np.abs(mean)  # what varies less is a rounding error of float32
    scaling = Scaling(mean, np.divide(1, std, where=varies, out=np.zeros_like(std)))
    return scaling, scaling(np.concatenate(sample)), rows


def new_index(kind: str, rows: int, dimensions: int) -> "faiss.Index":
    """An empty faiss index of inner products, with the parameters for so many rows.

    Args:
        kind: `ivfpq`, which must be trained, or `hnsw`.
        rows: that it will hold.
        dimensions: of the vectors.
    """
    import faiss

    if kind == "hnsw":
        index = faiss.IndexHNSWFlat(dimensions, _LINKS, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efSearch = _MIN_WIDTH
        return faiss.IndexIDMap(index)
    lists, at_most = num_lists(rows), max(1, dimensions // _DIMENSIONS_PER_BYTE)
    num_bytes = max(divisor for divisor in range(1, at_most + 1) if dimensions % divisor == 0)
    index = faiss.index_factory(dimensions, f"IVF{lists}_HNSW{_LINKS},PQ{num_bytes}", faiss.METRIC_INNER_PRODUCT)
    index.nprobe = min(_PROBES, lists)
    index.cp.min_points_per_centroid = index.pq.cp.min_points_per_centroid = 1  # fewer are worth no warning
    return index


def num_lists(rows: int) -> int:
    """Lists of IVF-PQ: the power of two that is nearest to four times the root of the rows."""
    return 2 ** round(math.log2(4 * math.sqrt(rows)))


def sample_fraction(rows: int) -> float:
    """The fraction of the rows that train IVF-PQ."""
    return min(1.0, max(_ROWS_PER_CENTROID * num_lists(rows), 2**16) / rows)


# ------------------------------------------------------------------------------------------------------------ the index


@dataclass(frozen=True)
class SimilarityIndex:
    """An index and the catalogue that it was built from.

    Attributes:
        index: of faiss; its ids are rows of the catalogue, counted over the partitions in their order.
        catalogue: with the embeddings.
        starts: (partitions + 1,) int64, the first row of each partition.
        scaling: of embeddings.
    """

    index: "faiss.Index"
    catalogue: HatsCatalogue
    starts: np.ndarray
    scaling: Scaling

    def nearest(self, embedding: np.ndarray, k: int) -> tuple[pa.Table, np.ndarray]:
        """The galaxies with the largest cosine similarity to an embedding.

        Args:
            embedding: (D,) float32, finite.
            k: how many; fewer if the catalogue has not as many.

        Returns:
            Their rows of the catalogue with the column `embedding`, and the similarities, (k,) float64, decreasing.
        """
        query = self.scaling(embedding[None])
        _, found = self.index.search(query, CANDIDATES * k)
        table = self.take(np.sort(found[0][found[0] >= 0]))
        similarity = self.scaling(vectors(table["embedding"])).astype(np.float64) @ query[0]
        best = np.argsort(-similarity, kind="stable")[:k]
        return table.take(best), similarity[best]

    def take(self, rows: np.ndarray) -> pa.Table:
        """Rows of the catalogue, in increasing order."""
        partition = np.searchsorted(self.starts, rows, side="right") - 1

        def read(i: int) -> pa.Table:
            file = self.catalogue.partitions[i].files[0]
            return pq.read_table(file, partitioning=None, memory_map=True).take(rows[partition == i] - self.starts[i])

        with ThreadPoolExecutor(_THREADS) as pool:
            return pa.concat_tables(pool.map(read, np.unique(partition)))

    def find(self, object_id: str) -> pa.Table:
        """The row of an object, by a scan of all names.

        Raises:
            UserError: there is none, or several.
        """
        column = find_column(self.catalogue.schema.names, "object_id")
        if column is None:
            raise UserError(f"{self.catalogue.path}: it has no column of names")

        def rows_in(i: int) -> list[int]:
            start, found = int(self.starts[i]), []
            for batch in self.catalogue.partitions[i].read([column], _READ_ROWS):
                matches = pc.indices_nonzero(pc.equal(pc.cast(batch[column], pa.string()), object_id))
                found += [start + row for row in matches.to_pylist()]
                start += len(batch)
            return found

        with ThreadPoolExecutor(_THREADS) as pool:
            found = list(itertools.chain(*pool.map(rows_in, range(len(self.catalogue.partitions)))))
        if len(found) != 1:
            raise UserError(
                f"--query {object_id}: {len(found) or 'no'} galaxies of {self.catalogue.path} have this name"
            )
        return self.take(np.array(found))


def build_index(catalogue: HatsCatalogue, folder: Path, kind: str) -> int:
    """Build an index of the column `embedding` of a catalogue, without unreadable and blank images.

    Args:
        catalogue: of `catalogue survey`, complete.
        folder: of the index; replaced if it exists.
        kind: one of `KINDS`.

    Returns:
        The number of galaxies in it.

    Raises:
        UserError: faiss is not installed, or there are no embeddings, or too few.
    """
    faiss = _import_faiss()
    if "embedding" not in catalogue.schema.names:
        raise UserError(f"--catalog {catalogue.path}: it has no column embedding; write it with catalogue survey")
    if unreadable := [rows for rows in catalogue.rows.values() if isinstance(rows, UserError)]:
        raise unreadable[0]
    fraction = sample_fraction(sum(catalogue.rows.values())) if kind == "ivfpq" else 0
    scaling, sample, rows = scaling_and_sample((part for _, part in _embeddings(catalogue)), fraction)
    if kind == "ivfpq" and len(sample) < MIN_TRAINING_ROWS:
        raise UserError(f"--kind ivfpq: it needs {MIN_TRAINING_ROWS:,} galaxies, and {rows:,} can be used; use hnsw")
    index = new_index(kind, rows, sample.shape[1])
    if kind == "ivfpq":
        index.train(sample)
    del sample
    for ids, part in _embeddings(catalogue):
        index.add_with_ids(scaling(part), ids)
    about = {
        "kind": kind,
        "rows": [int(count) for count in catalogue.rows.values()],
        "indexed": rows,
        "source": _source(catalogue),
        "mean": scaling.mean.tolist(),
        "scale": scaling.scale.tolist(),
    }
    remove_leftovers(folder.parent, recursive=False)
    with atomic_folder(folder) as staging:
        faiss.write_index(index, str(staging / _FILE))
        write_json(staging / _ABOUT, about)
    return rows


def open_index(folder: Path, catalogue: HatsCatalogue) -> SimilarityIndex:
    """Open an index.

    Args:
        folder: of it.
        catalogue: that it was built from.

    Raises:
        UserError: faiss is not installed; it is no index, a damaged one, or of another catalogue.
    """
    faiss = _import_faiss()
    fix = "build it again with catalogue index"
    try:
        about = read_json(folder / _ABOUT, fix, {"rows": list, "source": dict, "mean": list, "scale": list})
        index = faiss.read_index(str(folder / _FILE))
    except FileNotFoundError as error:
        raise UserError(f"--index {folder}: no index is there; {fix}") from error
    except RuntimeError as error:  # of faiss
        raise UserError(f"{folder / _FILE}: cannot be read ({first_line(error)}); {fix}") from error
    if about["source"] != _source(catalogue):
        raise UserError(f"--index {folder}: it is not of --catalog {catalogue.path}, or that was computed again; {fix}")
    starts = np.cumsum([0, *about["rows"]])
    return SimilarityIndex(index, catalogue, starts, Scaling(np.array(about["mean"]), np.array(about["scale"])))


def vectors(column: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """(N, D) float32 of a column of lists of one length."""
    column = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    return column.flatten().to_numpy(zero_copy_only=False).astype(np.float32).reshape(len(column), -1)


def _embeddings(catalogue: HatsCatalogue) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Rows of the catalogue, (n,) int64, and their embeddings, (n, D) float32; without unreadable and blank images."""
    columns = [name for name in ("embedding", "flag") if name in catalogue.schema.names]
    start = 0
    for partition in catalogue.partitions:
        for batch in partition.read(columns, _READ_ROWS):
            usable = np.ones(len(batch), bool)
            if "flag" in columns:
                usable = is_usable(batch["flag"].to_numpy(zero_copy_only=False))
            rows = np.arange(start, start + len(batch))
            start += len(batch)
            if usable.any():
                embedding = vectors(batch["embedding"])[usable]
                if not np.isfinite(embedding).all():
                    raise UserError(f"{partition.files[0]}: embeddings are not finite; compute the partition again")
                yield rows[usable], embedding


def _source(catalogue: HatsCatalogue) -> dict[str, Any]:
    """What tells whether a catalogue is another one."""
    metadata = pq.read_schema(catalogue.path / COMMON_METADATA).metadata or {}
    about = json.loads(metadata.get(ABOUT.encode(), b"{}"))
    return {
        "fingerprints": [about.get("model_fingerprint"), about.get("catalog_fingerprint"), about.get("embedding")],
        "rows": catalogue.properties.get("hats_nrows"),
        "partitions": len(catalogue.partitions),
    }


def _import_faiss():
    try:
        import faiss
    except ImportError as error:
        raise UserError("faiss is not installed: pip install faiss-cpu") from error
    return faiss


# --------------------------------------------------------------------------------------------------------- the commands


def run_index(options: Namespace) -> None:
    """Build an index as the command line says.

    Raises:
        UserError: as `build_index`, or the output exists.
    """
    catalogue, folder = open_hats(options.catalog), options.output
    if folder.exists() and not (options.overwrite and (folder / _ABOUT).is_file()):
        raise UserError(f"--output {folder}: it exists; choose another name, or set --overwrite to replace an index")
    if not folder.resolve().parent.is_dir():
        raise UserError(f"--output {folder}: there is no folder {folder.parent}; create it first")
    rows = build_index(catalogue, folder, options.kind)
    size = (folder / _FILE).stat().st_size
    print(f"{rows:,} galaxies, {options.kind}, {size / 1e6:,.1f} MB; {folder}")


def run_nearest(options: Namespace) -> None:
    """Print and write the galaxies that are most similar to one, as the command line says.

    Raises:
        UserError: as `open_index`, or there is no such galaxy.
    """
    if options.k < 1:
        raise UserError(f"-k {options.k}: it must be at least 1")
    if options.output:
        check_suffix(options.output, "--output")
        if options.output.exists() and not options.overwrite:
            raise UserError(f"--output {options.output}: it exists; choose another name, or set --overwrite")
    opened = open_index(options.index, open_hats(options.catalog))
    query = opened.find(options.query)
    embedding = vectors(query["embedding"])[0]
    if not np.isfinite(embedding).all():
        raise UserError(f"--query {options.query}: its image is unreadable; use another galaxy")
    table, similarity = opened.nearest(embedding, options.k)
    table = table.drop_columns("embedding").replace_schema_metadata(None)
    description = "cosine of the standardized embeddings"
    table = table.add_column(0, field("similarity", pa.float64(), description), pa.array(similarity))
    if options.output:
        about = {"command": "nearest", "query": options.query, "catalog": str(options.catalog)}
        about["created"] = provenance.session()["started"]
        write_catalogue(options.output, [_portable(table)], about)
    names = ["similarity", find_column(table.column_names, "object_id"), "ra", "dec", "predicted_class"]
    frame = table.select([name for name in names if name in table.column_names]).to_pandas()
    print(frame.to_string(index=False, formatters={"similarity": "{:.4f}".format}))


def _portable(table: pa.Table) -> pa.Table:
    """The columns that a survey kept, in types that all formats have: 64-bit integers, floats, text without nulls."""
    columns = []
    for column in table.itercolumns():
        if (
            pa.types.is_uint64(column.type)
            or pa.types.is_temporal(column.type)
            or pa.types.is_large_string(column.type)
        ):
            column = column.cast(pa.string())
        elif pa.types.is_integer(column.type) or pa.types.is_boolean(column.type):
            column = column.cast(pa.int64())
        if pa.types.is_string(column.type):
            column = column.fill_null("")
        columns.append(column)
    return pa.table(
        columns, pa.schema([old.with_type(new.type) for old, new in zip(table.schema, columns, strict=True)])
    )

"""An index of a survey's embeddings, to find similar galaxies among more than fit into memory.

It is built partition by partition with faiss, from the standardized embeddings that `catalogue similar` compares, too.
IVF-PQ (Jegou, Douze & Schmid 2011, IEEE TPAMI 33, 117) keeps a quarter of a byte per dimension and the row's number,
HNSW (Malkov & Yashunin 2020, IEEE TPAMI 42, 824) the vectors and a graph. Either names candidates, whose embeddings are
then read from their partitions and compared exactly.
"""

import itertools
import json
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
from galaxy_mae.data.hats import COMMON_METADATA, READERS, HatsCatalogue, open_hats
from galaxy_mae.errors import UserError, first_line
from galaxy_mae.files import atomic_folder, check_output, read_json, remove_leftovers, write_json
from galaxy_mae.predictions.formats import ABOUT, SUFFIXES, write_catalogue
from galaxy_mae.predictions.neighbors import Scaling, exact_neighbors, new_index, num_lists, scaling_of
from galaxy_mae.predictions.schema import field, is_usable

if TYPE_CHECKING:
    import faiss

KINDS = ("ivfpq", "hnsw")
MIN_TRAINING_ROWS = 1000  # of IVF-PQ: 256 centroids of each part of a vector are fitted
CANDIDATES = 10  # of the index for each neighbor that is asked for
_FILE, _ABOUT = "index.faiss", "index.json"
_ROWS_PER_CENTROID = 64  # that train IVF-PQ
_READ_ROWS = 16_384


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
        _, found = self.index.search(query.astype(np.float32), CANDIDATES * k)
        table = self.take(np.sort(found[0][found[0] >= 0]))
        (rows,), (similarity,) = exact_neighbors([self.scaling(vectors(table["embedding"]))], query, k)
        return table.take(rows), similarity

    def take(self, rows: np.ndarray) -> pa.Table:
        """Rows of the catalogue, in increasing order."""
        partition = np.searchsorted(self.starts, rows, side="right") - 1

        def read(i: int) -> pa.Table:
            file = self.catalogue.partitions[i].files[0]
            return pq.read_table(file, partitioning=None, memory_map=True).take(rows[partition == i] - self.starts[i])

        with ThreadPoolExecutor(READERS) as pool:
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

        with ThreadPoolExecutor(READERS) as pool:
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
    rng, sample = np.random.default_rng(0), []

    def parts() -> Iterator[np.ndarray]:
        """All embeddings, of which a random sample is kept."""
        rows = 0
        for _, part in _embeddings(catalogue):
            rows += len(part)
            sample.append(part[rng.random(len(part)) < fraction])
            yield part
        if rows < 2:
            raise UserError(f"the catalogue has {rows} readable galaxies that are not blank; two are needed")

    scaling, rows = scaling_of(parts())
    index = new_index(kind, rows, len(scaling.mean))
    if kind == "ivfpq":
        if sum(map(len, sample)) < MIN_TRAINING_ROWS:
            needed = f"{MIN_TRAINING_ROWS:,} galaxies, and {rows:,} can be used"
            raise UserError(f"--kind ivfpq: it needs {needed}; use hnsw")
        index.train(scaling(np.concatenate(sample)).astype(np.float32))
    else:
        index = faiss.IndexIDMap(index)
    for ids, part in _embeddings(catalogue):
        index.add_with_ids(scaling(part).astype(np.float32), ids)
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


def sample_fraction(rows: int) -> float:
    """The fraction of the rows that train IVF-PQ."""
    return min(1.0, max(_ROWS_PER_CENTROID * num_lists(rows), 2**16) / rows)


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
    check_output(folder, "--output", overwrite=options.overwrite, marker=_ABOUT)
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
        check_output(options.output, "--output", SUFFIXES, overwrite=options.overwrite)
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
        write_catalogue(options.output, [table], about)
    names = ["similarity", find_column(table.column_names, "object_id"), "ra", "dec", "predicted_class"]
    frame = table.select([name for name in names if name in table.column_names]).to_pandas()
    print(frame.to_string(index=False, formatters={"similarity": "{:.4f}".format}))

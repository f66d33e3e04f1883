"""An index of a survey's embeddings, to find similar galaxies among more than fit into memory.

It is built partition by partition with faiss, from the standardized embeddings that `catalogue similar` compares, too.
IVF-PQ (Jegou, Douze & Schmid 2011, IEEE TPAMI 33, 117) keeps a quarter of a byte per dimension and the row's number. It
names candidates, whose embeddings are then read from their partitions and compared exactly.
"""

import math
from argparse import Namespace
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset
import pyarrow.parquet as pq

from galaxy_mae import provenance
from galaxy_mae.data.columns import find_column
from galaxy_mae.data.hats import READERS, HatsCatalogue, open_hats
from galaxy_mae.errors import UserError, first_line
from galaxy_mae.files import atomic_folder, check_output, read_json, write_json
from galaxy_mae.predictions.formats import ABOUT, check_catalogue_output, write_catalogue
from galaxy_mae.predictions.neighbors import Scaling, exact_neighbors, scaling_of
from galaxy_mae.predictions.schema import field, is_usable, to_numpy

try:
    import faiss
except ImportError as error:
    raise UserError("faiss is not installed: pip install faiss-cpu") from error

CANDIDATES = 10  # of the index for each neighbor that is asked for
_MIN_ROWS = 256  # the centroids of each part of a vector
_ROWS_PER_CENTROID = 64  # that train the lists
_DIMENSIONS_PER_BYTE = 4
_LINKS = 32  # of each centroid in the graph of centroids
_PROBES = 64  # lists that a search reads
_FILE, _ABOUT = "index.faiss", "index.json"
_READ_ROWS = 16_384


@dataclass(frozen=True)
class SimilarityIndex:
    """An index and the catalogue that it was built from.

    Attributes:
        index: its ids are rows of the catalogue, counted over the partitions in their order.
        starts: (partitions + 1,) int64, the first row of each partition.
    """

    index: faiss.Index
    catalogue: HatsCatalogue
    starts: np.ndarray
    scaling: Scaling

    def nearest(self, embedding: np.ndarray, k: int) -> tuple[pa.Table, np.ndarray]:
        """The k galaxies with the largest cosine similarity to an embedding, (D,) float, finite.

        Returns:
            Their rows of the catalogue, and the similarities, (k,) float64, decreasing.
        """
        query = self.scaling(embedding[None])
        _, found = self.index.search(query.astype(np.float32), CANDIDATES * k)
        table = self._take(np.sort(found[0][found[0] >= 0]))
        (rows,), (similarity,) = exact_neighbors([self.scaling(to_numpy(table["embedding"]))], query, k)
        return table.take(rows), similarity

    def _take(self, rows: np.ndarray) -> pa.Table:
        """Rows of the catalogue, in increasing order."""
        partition = np.searchsorted(self.starts, rows, side="right") - 1

        def read(i: int) -> pa.Table:
            file = self.catalogue.partitions[i].files[0]
            return pq.read_table(file, partitioning=None, memory_map=True).take(rows[partition == i] - self.starts[i])

        with ThreadPoolExecutor(READERS) as pool:
            return pa.concat_tables(pool.map(read, np.unique(partition)))


def find_galaxy(catalogue: HatsCatalogue, object_id: str) -> pa.Table:
    """The row of an object, by a scan of all names. Raises a `UserError` if there is none, or several."""
    column = find_column(catalogue.schema.names, "object_id")
    if column is None:
        raise UserError(f"{catalogue.path}: it has no column of names")
    files = [str(file) for partition in catalogue.partitions for file in partition.files]
    has_name = pc.field(column).cast(pa.string()) == object_id
    try:
        found = pyarrow.dataset.dataset(files).to_table(filter=has_name)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{catalogue.path}: cannot be read ({first_line(error)}); copy it again") from error
    if len(found) != 1:
        raise UserError(f"--query {object_id}: {len(found) or 'no'} galaxies of {catalogue.path} have this name")
    return found


def build_index(catalogue: HatsCatalogue, folder: Path) -> int:
    """Build an index of the embeddings of a survey, without unreadable and blank images. Returns their number.

    Raises:
        UserError: there are no embeddings, or too few.
    """
    if "embedding" not in catalogue.schema.names:
        raise UserError(f"--catalog {catalogue.path}: it has no column embedding; write it with catalogue survey")
    if unreadable := [rows for rows in catalogue.rows.values() if isinstance(rows, UserError)]:
        raise unreadable[0]
    fraction = sample_fraction(max(_MIN_ROWS, sum(catalogue.rows.values())))
    rng, sample = np.random.default_rng(0), []

    def parts() -> Iterator[np.ndarray]:
        """All embeddings, of which a random sample is kept."""
        for _, part in _embeddings(catalogue):
            sample.append(part[rng.random(len(part)) < fraction])
            yield part
        if sum(map(len, sample)) < _MIN_ROWS:
            needed = f"{_MIN_ROWS} galaxies that are readable and not blank"
            raise UserError(f"--catalog {catalogue.path}: an index needs {needed}; use catalogue similar")

    scaling, rows = scaling_of(parts())
    index = new_index(rows, len(scaling.mean))
    index.train(scaling(np.concatenate(sample)).astype(np.float32))
    for ids, part in _embeddings(catalogue):
        index.add_with_ids(scaling(part).astype(np.float32), ids)
    about = {"rows": list(catalogue.rows.values()), "source": _source(catalogue)}
    about |= {"mean": scaling.mean.tolist(), "scale": scaling.scale.tolist()}
    with atomic_folder(folder) as staging:
        faiss.write_index(index, str(staging / _FILE))
        write_json(staging / _ABOUT, about)
    return rows


def new_index(rows: int, dimensions: int) -> faiss.Index:
    """An empty index by inner products, to be trained, with the parameters for so many rows."""
    lists, at_most = _num_lists(rows), max(1, dimensions // _DIMENSIONS_PER_BYTE)
    num_bytes = max(divisor for divisor in range(1, at_most + 1) if dimensions % divisor == 0)
    description = f"IVF{lists}_HNSW{_LINKS},PQ{num_bytes}"
    index = faiss.index_factory(dimensions, description, faiss.METRIC_INNER_PRODUCT)
    index.nprobe = min(_PROBES, lists)
    index.cp.min_points_per_centroid = index.pq.cp.min_points_per_centroid = 1  # fewer are worth no warning
    return index


def sample_fraction(rows: int) -> float:
    """The fraction of the rows that train the index."""
    return min(1.0, max(_ROWS_PER_CENTROID * _num_lists(rows), 2**16) / rows)


def _num_lists(rows: int) -> int:
    return 2 ** round(math.log2(4 * math.sqrt(rows)))  # the power of two that is nearest to four times the root


def open_index(folder: Path, catalogue: HatsCatalogue) -> SimilarityIndex:
    """Open the index of a catalogue. Raises a `UserError` if it is none, a damaged one, or of another catalogue."""
    fix = "build it again with catalogue index"
    try:
        about = read_json(folder / _ABOUT, fix, ("rows", "source", "mean", "scale"))
        index = faiss.read_index(str(folder / _FILE))
    except FileNotFoundError as error:
        raise UserError(f"--index {folder}: no index is there; {fix}") from error
    except RuntimeError as error:  # of faiss
        raise UserError(f"{folder / _FILE}: cannot be read ({first_line(error)}); {fix}") from error
    if about["source"] != _source(catalogue):
        raise UserError(f"--index {folder}: it is not of --catalog {catalogue.path}, or that was computed again; {fix}")
    starts = np.cumsum([0, *about["rows"]])
    return SimilarityIndex(index, catalogue, starts, Scaling(np.array(about["mean"]), np.array(about["scale"])))


def _embeddings(catalogue: HatsCatalogue) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Rows of the catalogue, (n,) int64, and their embeddings, (n, D) float; without unreadable and blank images."""
    start = 0
    for partition in catalogue.partitions:
        for batch in partition.read(["embedding", "flag"], _READ_ROWS):
            usable = np.flatnonzero(is_usable(batch["flag"].to_numpy(zero_copy_only=False)))
            embedding = to_numpy(pa.chunked_array([batch["embedding"]]))[usable]
            if not np.isfinite(embedding).all():
                raise UserError(f"{partition.files[0]}: embeddings are not finite; compute the partition again")
            if len(usable):
                yield start + usable, embedding
            start += len(batch)


def _source(catalogue: HatsCatalogue) -> list[str | int | None]:
    """What tells whether a catalogue is another one: its provenance, and how much there is."""
    about = (catalogue.schema.metadata or {}).get(ABOUT.encode(), b"").decode()
    return [about, catalogue.properties.get("hats_nrows"), len(catalogue.partitions)]


def run_index(options: Namespace) -> None:
    """Build an index as the command line says."""
    catalogue, folder = open_hats(options.catalog), options.output
    check_output(folder, "--output", overwrite=options.overwrite, contents=(_ABOUT, _FILE))
    rows = build_index(catalogue, folder)
    print(f"{rows:,} galaxies, {(folder / _FILE).stat().st_size / 1e6:,.1f} MB; {folder}")


def run_nearest(options: Namespace) -> None:
    """Print and write the galaxies that are most similar to one, as the command line says."""
    if options.k < 1:
        raise UserError(f"-k {options.k}: it must be at least 1")
    if options.output:
        inputs = [options.catalog, options.index]
        check_catalogue_output(options.output, "--output", overwrite=options.overwrite, inputs=inputs)
    opened = open_index(options.index, open_hats(options.catalog))
    embedding = to_numpy(find_galaxy(opened.catalogue, options.query)["embedding"])[0]
    if not np.isfinite(embedding).all():
        raise UserError(f"--query {options.query}: its image is unreadable; use another galaxy")
    table, similarity = opened.nearest(embedding, options.k)
    table = table.drop_columns("embedding").replace_schema_metadata(None)
    description = "cosine of the standardized embeddings"
    table = table.add_column(0, field("similarity", pa.float64(), description), pa.array(similarity))
    if options.output:
        about = {"command": "nearest", "query": options.query, "catalog": str(options.catalog)}
        write_catalogue(options.output, [table], about | {"created": provenance.session()["started"]})
    names = ["similarity", find_column(table.column_names, "object_id"), "ra", "dec", "predicted_class"]
    frame = table.select([name for name in names if name in table.column_names]).to_pandas()
    print(frame.to_string(index=False, formatters={"similarity": "{:.4f}".format}))

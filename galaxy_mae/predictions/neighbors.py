"""Nearest neighbors and odd rows among the embeddings of a table of predictions."""

import importlib.util
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from galaxy_mae.errors import UserError

if TYPE_CHECKING:
    import faiss

SCORES = ("knn_distance", "isolation_forest")
NUM_NEIGHBORS = 5  # of the k-NN distance; more hide a handful of equal artifacts less, and rank single ones lower
NUM_TREES = 200  # of the isolation forest
ROWS_PER_COMPONENT = 10  # that whitening needs
_PRECISION = 10 * np.finfo(np.float32).eps  # relative; what varies less is a rounding error
_CHUNK = 16_384  # rows that are standardized at a time
_LARGE = 1_000_000  # rows from which faiss searches, if it is installed
_LINKS, _CANDIDATES = 32, 256  # of each row in HNSW's graph; that a search of it keeps
_DIMENSIONS_PER_BYTE = 4  # of IVF-PQ
_PROBES = 64  # lists of IVF-PQ that a search reads


@dataclass(frozen=True)
class Scaling:
    """The standardization of embeddings: zero mean and unit variance in each dimension, then unit length.

    Otherwise the few dimensions with a large mean decide alone. Constant dimensions do not count.

    Attributes:
        mean, scale: (D,) float64; the scale is 0 for dimensions that do not vary.
    """

    mean: np.ndarray
    scale: np.ndarray

    def __call__(self, embedding: np.ndarray) -> np.ndarray:
        """(N, D) float64 of (N, D) float."""
        scaled = (embedding - self.mean) * self.scale
        return scaled / np.linalg.norm(scaled, axis=1, keepdims=True).clip(np.finfo(np.float64).tiny)


def scaling_of(parts: Iterable[np.ndarray]) -> tuple[Scaling, int]:
    """The scaling of embeddings in one pass, and how many there are.

    Args:
        parts: (n, D) float32 each, finite; one at least.
    """
    rows, mean, squares = 0, 0.0, 0.0
    for part in parts:  # joined as by Chan, Golub & LeVeque 1983, The American Statistician 37, 242
        total, mean_of_part = rows + len(part), part.mean(axis=0, dtype=np.float64)
        shift = mean_of_part - mean
        squares = squares + ((part - mean_of_part) ** 2).sum(axis=0) + shift**2 * (rows * len(part) / total)
        rows, mean = total, mean + shift * (len(part) / total)
    std = np.sqrt(squares / rows)
    return Scaling(mean, np.divide(1, std, where=std > _PRECISION * np.abs(mean), out=np.zeros_like(std))), rows


def neighbors(
    embedding: np.ndarray, query: np.ndarray, k: int, index: str | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The rows with the largest cosine similarity to each query, in embeddings that `Scaling` standardizes.

    Args:
        embedding: (N, D) float32, finite.
        query: (Q, D) float32, finite.
        k: neighbors of each query; N if there are fewer.
        index: `exact`, all similarities, in float64; `flat`, the same by faiss, in float32; `hnsw`, faiss' approximate
            search in a graph (Malkov & Yashunin 2020, IEEE TPAMI 42, 824). None selects `exact`, or from a million rows
            on `flat`, if faiss is installed.

    Returns:
        Rows, (Q, k) int64, and their cosine similarities, (Q, k) float64, in decreasing order.

    Raises:
        UserError: faiss is needed and not installed, or the approximate search found too few rows.
    """
    scaling, _ = scaling_of(_chunks(embedding))
    query, k, chunks = scaling(query), min(k, len(embedding)), map(scaling, _chunks(embedding))
    if (index := _select_index(index, len(embedding))) == "exact":
        return exact_neighbors(chunks, query, k)
    similarity, row = _search_with_faiss(index, "inner_product", chunks, len(embedding), query, k)
    return row, similarity.astype(np.float64)


def exact_neighbors(parts: Iterable[np.ndarray], query: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The rows with the largest inner product with each query, in memory that does not grow with their number.

    Args:
        parts: (n, D) float64 each, by `Scaling`.
        query: (Q, D) float64, by the same.
        k: how many; fewer if there are not as many rows.

    Returns:
        Rows, counted over all parts, (Q, k) int64, and the products, (Q, k) float64, in decreasing order.
    """
    row, similarity, start = np.empty((len(query), 0), np.int64), np.empty((len(query), 0)), 0
    for part in parts:  # merged with the best so far
        new = np.broadcast_to(np.arange(start, start + len(part)), (len(query), len(part)))
        row, start = np.concatenate([row, new], axis=1), start + len(part)
        similarity = np.concatenate([similarity, query @ part.T], axis=1)
        best = np.argsort(-similarity, axis=1, kind="stable")[:, :k]
        row, similarity = np.take_along_axis(row, best, axis=1), np.take_along_axis(similarity, best, axis=1)
    return row, similarity


def anomaly_scores(embedding: np.ndarray, index: str | None = None) -> dict[str, np.ndarray]:
    """Two scores of how odd each row is, in whitened embeddings.

    Args:
        embedding: (N, D) float32, finite, of at least two rows.
        index: how the nearest rows are found, as in `neighbors`.

    Returns:
        `knn_distance` and `isolation_forest`, as the functions of these names: (N,) float64.

    Raises:
        UserError: all rows are equal, or as `neighbors`.
    """
    vectors = whiten(embedding)
    return {"knn_distance": knn_distance(vectors, index), "isolation_forest": isolation_forest(vectors)}


def whiten(embedding: np.ndarray) -> np.ndarray:
    """Principal components, each scaled to unit variance: (N, D) float32, of two rows or more, to (N, K) float32.

    Left out are components whose std is a rounding error of float32, and the last ones if there are fewer than ten rows
    for each: with as many components as rows, all rows would have the same distance.

    Raises:
        UserError: all rows are equal.
    """
    chunks, mean = _chunks(embedding), embedding.mean(axis=0, dtype=np.float64)
    covariance = sum((chunk - mean).T @ (chunk - mean) for chunk in chunks) / len(embedding)
    variance, vectors = np.linalg.eigh(covariance)  # in increasing order
    rounding = _PRECISION**2 * (np.trace(covariance) + mean @ mean)
    first = max(np.searchsorted(variance, rounding), len(variance) - max(1, len(embedding) // ROWS_PER_COMPONENT))
    if first == len(variance):
        raise UserError("all embeddings are equal: none is odd")
    scaled = vectors[:, first:] / np.sqrt(variance[first:])
    return np.concatenate([((chunk - mean) @ scaled).astype(np.float32) for chunk in chunks])


def knn_distance(vectors: np.ndarray, index: str | None = None) -> np.ndarray:
    """Mean Euclidean distance to the five nearest other rows (Angiulli & Pizzuti 2002, PKDD).

    Args:
        vectors: (N, K) float32, of at least two rows.
        index: how the nearest rows are found, as in `neighbors`.

    Returns:
        (N,) float64.

    Raises:
        UserError: as `neighbors`.
    """
    from sklearn.neighbors import NearestNeighbors

    k = min(NUM_NEIGHBORS + 1, len(vectors))  # the first is the row itself
    if (index := _select_index(index, len(vectors))) == "exact":
        distance, _ = NearestNeighbors(n_neighbors=k, algorithm="brute").fit(vectors).kneighbors(vectors)
    else:
        distance = np.sqrt(_search_with_faiss(index, "l2", [vectors], len(vectors), vectors, k)[0].clip(0))
    return distance[:, 1:].mean(axis=1, dtype=np.float64)


def isolation_forest(vectors: np.ndarray) -> np.ndarray:
    """The anomaly score of an isolation forest (Liu, Ting & Zhou 2008, ICDM), between 0 and 1, with a fixed seed.

    Args:
        vectors: (N, K) float32.

    Returns:
        (N,) float64.
    """
    from sklearn.ensemble import IsolationForest

    return -IsolationForest(n_estimators=NUM_TREES, random_state=0).fit(vectors).score_samples(vectors)


def _chunks(embedding: np.ndarray) -> list[np.ndarray]:
    return [embedding[start : start + _CHUNK] for start in range(0, len(embedding), _CHUNK)]


def _select_index(index: str | None, rows: int) -> str:
    """The index to search with; None as in `neighbors`."""
    installed = importlib.util.find_spec("faiss") is not None
    if index in ("flat", "hnsw") and not installed:
        raise UserError(f"--index {index}: faiss is not installed: pip install faiss-cpu")
    return index or ("flat" if installed and rows >= _LARGE else "exact")


def new_index(kind: str, rows: int, dimensions: int, metric: str = "inner_product") -> "faiss.Index":
    """An empty index of faiss, with the parameters for so many rows.

    Args:
        kind: `flat`, which is exact; `hnsw`; or `ivfpq`, which must be trained.
        rows: that it will hold.
        dimensions: of the vectors.
        metric: `inner_product` or `l2`.
    """
    import faiss

    metric = {"inner_product": faiss.METRIC_INNER_PRODUCT, "l2": faiss.METRIC_L2}[metric]
    if kind == "flat":
        return faiss.IndexFlat(dimensions, metric)
    if kind == "hnsw":
        index = faiss.IndexHNSWFlat(dimensions, _LINKS, metric)
        index.hnsw.efSearch = _CANDIDATES
        return index
    lists, at_most = num_lists(rows), max(1, dimensions // _DIMENSIONS_PER_BYTE)
    num_bytes = max(divisor for divisor in range(1, at_most + 1) if dimensions % divisor == 0)
    index = faiss.index_factory(dimensions, f"IVF{lists}_HNSW{_LINKS},PQ{num_bytes}", metric)
    index.nprobe = min(_PROBES, lists)
    index.cp.min_points_per_centroid = index.pq.cp.min_points_per_centroid = 1  # fewer are worth no warning
    return index


def num_lists(rows: int) -> int:
    """Lists of IVF-PQ: the power of two that is nearest to four times the root of the rows."""
    return 2 ** round(math.log2(4 * math.sqrt(rows)))


def _search_with_faiss(
    kind: str, metric: str, chunks: Iterable[np.ndarray], rows: int, query: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """The k best of all chunks' rows for each query: inner products or squared distances, float32, and rows; (Q, k)."""
    index = new_index(kind, rows, query.shape[1], metric)
    for chunk in chunks:
        index.add(np.ascontiguousarray(chunk, np.float32))
    if kind == "hnsw":
        index.hnsw.efSearch = max(_CANDIDATES, 2 * k)
    value, row = index.search(np.ascontiguousarray(query, np.float32), k)
    if (row < 0).any():  # parts of the graph that are not linked to each other
        raise UserError(f"--index {kind}: it found fewer than {k} rows; use --index flat")
    return value, row

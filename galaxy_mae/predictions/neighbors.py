"""Nearest neighbors and odd rows among the embeddings of a table of predictions."""

import importlib.util
from collections.abc import Iterable

import numpy as np

from galaxy_mae.errors import UserError

SCORES = ("knn_distance", "isolation_forest")
NUM_NEIGHBORS = 5  # of the k-NN distance; more hide a handful of equal artifacts less, and rank single ones lower
NUM_TREES = 200  # of the isolation forest
ROWS_PER_COMPONENT = 10  # that whitening needs
_PRECISION = 10 * np.finfo(np.float32).eps  # relative; what varies less is a rounding error
_CHUNK = 16_384  # rows that are standardized at a time
_LARGE = 1_000_000  # rows from which faiss searches, if it is installed
_HNSW_LINKS, _HNSW_CANDIDATES = 32, 256  # of each row in the graph; that a search of it keeps


def neighbors(
    embedding: np.ndarray, query: np.ndarray, k: int, index: str | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The rows with the largest cosine similarity to each query, in standardized embeddings.

    Each dimension is scaled to zero mean and unit variance over the rows. Otherwise the few dimensions with a large
    mean decide alone. Constant dimensions do not count.

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
    chunks, mean = _chunks(embedding), embedding.mean(axis=0, dtype=np.float64)
    std = np.sqrt(sum(((chunk - mean) ** 2).sum(axis=0) for chunk in chunks) / len(embedding))
    scale = np.divide(1, std, where=std > _PRECISION * np.abs(mean), out=np.zeros_like(std))

    def standardize(vectors: np.ndarray) -> np.ndarray:
        scaled = (vectors - mean) * scale
        return scaled / np.linalg.norm(scaled, axis=1, keepdims=True).clip(np.finfo(np.float64).tiny)

    query, k = standardize(query), min(k, len(embedding))
    if (index := _select_index(index, len(embedding))) != "exact":
        similarity, row = _search_with_faiss(index, "inner_product", map(standardize, chunks), query, k)
        return row, similarity.astype(np.float64)
    row, similarity = np.empty((len(query), 0), np.int64), np.empty((len(query), 0))
    for i, chunk in enumerate(chunks):  # merged with the best so far, so that memory does not grow with the rows
        new = np.broadcast_to(np.arange(len(chunk)) + i * _CHUNK, (len(query), len(chunk)))
        row = np.concatenate([row, new], axis=1)
        similarity = np.concatenate([similarity, query @ standardize(chunk).T], axis=1)
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
        distance = np.sqrt(_search_with_faiss(index, "l2", [vectors], vectors, k)[0].clip(0))
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


def _search_with_faiss(
    index: str, metric: str, chunks: Iterable[np.ndarray], query: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """The k best of all chunks' rows for each query: inner products or squared distances, float32, and rows; (Q, k)."""
    import faiss

    metric = {"inner_product": faiss.METRIC_INNER_PRODUCT, "l2": faiss.METRIC_L2}[metric]
    size = query.shape[1]
    searched = faiss.IndexFlat(size, metric) if index == "flat" else faiss.IndexHNSWFlat(size, _HNSW_LINKS, metric)
    for chunk in chunks:
        searched.add(np.ascontiguousarray(chunk, np.float32))
    if index == "hnsw":
        searched.hnsw.efSearch = max(_HNSW_CANDIDATES, 2 * k)
    value, row = searched.search(np.ascontiguousarray(query, np.float32), k)
    if (row < 0).any():  # parts of the graph that are not linked to each other
        raise UserError(f"--index {index}: it found fewer than {k} rows; use --index flat")
    return value, row

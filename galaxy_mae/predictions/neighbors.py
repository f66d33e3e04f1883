"""Nearest neighbors and odd rows among the embeddings of a table of predictions."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from galaxy_mae.errors import UserError

SCORES = ("knn_distance", "isolation_forest")
NUM_NEIGHBORS = 5  # of the k-NN distance; more hide a handful of equal artifacts less, and rank single ones lower
NUM_TREES = 200  # of the isolation forest
ROWS_PER_COMPONENT = 10  # that whitening needs
_PRECISION = 10 * np.finfo(np.float32).eps  # relative; what varies less is a rounding error
_CHUNK = 16_384  # rows that are standardized at a time


@dataclass(frozen=True)
class Scaling:
    """The standardization of embeddings: zero mean and unit variance in each dimension, then unit length.

    Otherwise the few dimensions with a large mean decide alone. `scale` is 0 for dimensions that do not vary.
    """

    mean: np.ndarray
    scale: np.ndarray

    def __call__(self, embedding: np.ndarray) -> np.ndarray:
        """(N, D) float64 of (N, D) float."""
        scaled = (embedding - self.mean) * self.scale
        return scaled / np.linalg.norm(scaled, axis=1, keepdims=True).clip(np.finfo(np.float64).tiny)


def scaling_of(parts: Iterable[np.ndarray]) -> tuple[Scaling, int]:
    """The scaling of embeddings in one pass, from parts of (n, D) float32, and how many there are."""
    rows, mean, squares = 0, 0.0, 0.0
    for part in parts:  # joined as by Chan, Golub & LeVeque 1983, The American Statistician 37, 242
        total, mean_of_part = rows + len(part), part.mean(axis=0, dtype=np.float64)
        shift = mean_of_part - mean
        squares = squares + ((part - mean_of_part) ** 2).sum(axis=0) + shift**2 * (rows * len(part) / total)
        rows, mean = total, mean + shift * (len(part) / total)
    std = np.sqrt(squares / rows)
    return Scaling(mean, np.divide(1, std, where=std > _PRECISION * np.abs(mean), out=np.zeros_like(std))), rows


def neighbors(embedding: np.ndarray, query: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k rows, or all, with the largest cosine similarity to each query, in embeddings that `Scaling` standardizes.

    Args:
        embedding, query: (N, D) and (Q, D) float32, finite.
        k: neighbors of each query; N if there are fewer.

    Returns:
        As `exact_neighbors`.
    """
    scaling, _ = scaling_of(_chunks(embedding))
    return exact_neighbors(map(scaling, _chunks(embedding)), scaling(query), k)


def exact_neighbors(parts: Iterable[np.ndarray], query: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k rows, or all, with the largest inner product with each query, in memory that does not grow with the rows.

    Args:
        parts, query: (n, D) each and (Q, D) float64, by `Scaling`.
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


def anomaly_scores(embedding: np.ndarray) -> dict[str, np.ndarray]:
    """`SCORES` of how odd each row of (N, D) float32, finite, is: (N,) float64 each, as of `whiten`."""
    vectors = whiten(embedding)
    return {"knn_distance": knn_distance(vectors), "isolation_forest": isolation_forest(vectors)}


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


def knn_distance(vectors: np.ndarray) -> np.ndarray:
    """Mean distance of (N, K) float32 to the five nearest other rows (Angiulli & Pizzuti 2002, PKDD): (N,) float64."""
    from sklearn.neighbors import NearestNeighbors

    k = min(NUM_NEIGHBORS + 1, len(vectors))  # the first is the row itself
    distance, _ = NearestNeighbors(n_neighbors=k, algorithm="brute").fit(vectors).kneighbors(vectors)
    return distance[:, 1:].mean(axis=1, dtype=np.float64)


def isolation_forest(vectors: np.ndarray) -> np.ndarray:
    """Scores of (N, K) float32 by an isolation forest (Liu, Ting & Zhou 2008, ICDM) of a fixed seed: (N,), 0 to 1."""
    from sklearn.ensemble import IsolationForest

    return -IsolationForest(n_estimators=NUM_TREES, random_state=0).fit(vectors).score_samples(vectors)


def _chunks(embedding: np.ndarray) -> list[np.ndarray]:
    return [embedding[start : start + _CHUNK] for start in range(0, len(embedding), _CHUNK)]

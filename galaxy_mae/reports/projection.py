"""Embeddings in two dimensions."""

import importlib.util

import numpy as np

_NEIGHBORS = 15  # of UMAP, its default


def project(embedding: np.ndarray) -> tuple[np.ndarray, str]:
    """The two dimensions of a map, and how they were found.

    Each dimension of the embeddings is first scaled to unit variance. UMAP (McInnes et al. 2018, arXiv:1802.03426) is
    used if umap-learn is installed and there are enough galaxies, principal components otherwise.

    Args:
        embedding: (N, D) float32, finite.

    Returns:
        (N, 2) float64, and a sentence for the page.
    """
    embedding = np.asarray(embedding, np.float64)
    std = embedding.std(axis=0)
    scaled = (embedding - embedding.mean(axis=0)) / np.where(std > 0, std, 1)
    if importlib.util.find_spec("umap") is not None and len(scaled) > _NEIGHBORS + 1:
        import umap  # slow to import: it compiles

        # With a seed UMAP uses one thread; asking for that avoids its warning.
        found = umap.UMAP(n_neighbors=_NEIGHBORS, random_state=0, n_jobs=1).fit_transform(scaled.astype(np.float32))
        note = "UMAP of the standardized embeddings: near galaxies are alike, far ones say little."
        return found.astype(np.float64), note
    _, singular, vectors = np.linalg.svd(scaled, full_matrices=False)
    found = np.zeros((len(scaled), 2))
    kept = min(2, len(vectors))
    found[:, :kept] = scaled @ vectors[:kept].T
    explained = float((singular[:kept] ** 2).sum() / max((singular**2).sum(), np.finfo(float).tiny))
    return found, (
        f"The first two principal components of the standardized embeddings, with {explained:.0%} of the variance. "
        "With umap-learn (pip install umap-learn) the map is UMAP's."
    )

"""Recall, speed, size and build time of the index of `catalogue index`, against an exact search.

    python benchmarks/similarity_index.py                                     10^5 and 10^6 drawn vectors
    python benchmarks/similarity_index.py --rows 100000

The vectors are drawn from a normal distribution with the covariance of the embeddings of synthetic galaxies by the
model of the repository: the right number of effective dimensions, and no clusters. Prints for each index

    recall at 10    the fraction of a query's ten nearest vectors that are found: by the index alone, and among its
                    hundred candidates, which `catalogue nearest` compares exactly
    queries/s       of the index alone, in batches of all queries, on all cores
    bytes per row   of the index in memory
"""

import argparse
import os
import sys

import faiss
import numpy as np
from measurement import print_table, timed

from galaxy_mae.catalogue.models import open_model
from galaxy_mae.data.cache import open_galaxies
from galaxy_mae.errors import one_line_errors
from galaxy_mae.model.saved_model import DEFAULT_MODEL
from galaxy_mae.predictions.neighbors import Scaling
from galaxy_mae.provenance import machine, session, short_commit
from galaxy_mae.survey.index import CANDIDATES, new_index, sample_fraction

K = 10
QUERIES = 500
RENDERED = 2000  # galaxies whose embeddings give the covariance


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=(100_000, 1_000_000))
    options = parser.parse_args(arguments)
    print(
        f"{machine()}, load {os.getloadavg()[0]:.1f} at the start; commit {short_commit(session())}; {QUERIES} queries"
    )
    rows = []
    for count in options.rows:
        vectors = drawn(count + QUERIES)
        vectors, queries = vectors[:count], vectors[count:]
        exact = faiss.IndexFlatIP(vectors.shape[1])
        exact.add(vectors)
        seconds, (_, truth) = timed(exact.search, queries, K)
        rows.append((f"{count:,}", "exact", "1", "1", f"{QUERIES / seconds:,.0f}", f"{4 * vectors.shape[1]}", "", ""))
        del exact
        rows.append((f"{count:,}", "IVF-PQ", *measure(vectors, queries, truth)))
    print(f"{vectors.shape[1]} dimensions")
    recall = (f"recall at {K}", f"of {CANDIDATES * K} candidates")
    print_table(("vectors", "index", *recall, "queries/s", "bytes per row", "training, s", "adding, s"), rows)


def measure(vectors: np.ndarray, queries: np.ndarray, truth: np.ndarray) -> tuple[str, ...]:
    """The cells of a row of the table."""
    count = len(vectors)
    index = new_index(count, vectors.shape[1])
    sample = np.random.default_rng(0).random(count) < sample_fraction(count)
    training, _ = timed(index.train, vectors[sample])
    adding, _ = timed(index.add_with_ids, vectors, np.arange(count))
    seconds, (_, found) = timed(index.search, queries, CANDIDATES * K)
    alone, candidates = (
        np.mean([np.isin(best, row[:depth]).mean() for best, row in zip(truth, found, strict=True)])
        for depth in (K, CANDIDATES * K)
    )
    size = faiss.serialize_index(index).nbytes / count
    speed = f"{len(queries) / seconds:,.0f}"
    return f"{alone:.3f}", f"{candidates:.3f}", speed, f"{size:.0f}", f"{training:.0f}", f"{adding:.0f}"


def drawn(count: int) -> np.ndarray:
    """Vectors with the covariance of standardized embeddings, of unit length: (count, D) float32."""
    model = open_model(DEFAULT_MODEL)
    pixels = open_galaxies(f"synthetic:{RENDERED}", model.image_size).pixels
    embedding = np.concatenate([features for _, features in model.outputs(pixels)])
    covariance = np.corrcoef(embedding.T)
    rng, size = np.random.default_rng(0), len(covariance)
    values = rng.standard_normal((count, size), np.float32) @ _root(covariance).astype(np.float32)
    return Scaling(np.zeros(size), np.ones(size))(values).astype(np.float32)


def _root(covariance: np.ndarray) -> np.ndarray:
    """The symmetric square root."""
    variance, axes = np.linalg.eigh(covariance)
    return axes * np.sqrt(variance.clip(0)) @ axes.T


if __name__ == "__main__":
    with one_line_errors(sys.argv[0]):
        main(sys.argv[1:])

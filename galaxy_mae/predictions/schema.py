"""The one schema of predictions: a table with one row per galaxy, whatever wrote it.

The evaluation of a method, `catalogue predict` and every partition of a survey write these columns, and the report, the
pages, the cards and the rankings read them. In this order, and only those that there are:

    row, object_id, ra, dec     the galaxy: its row of the data set, its name, its position (degrees, J2000)
    label                       its class in the data set
    (any other name)            columns of the data set that nobody here knows
    predicted_class             the most probable class
    p_CLASS                     the probability of each class, mean over seeds
    entropy, disagreement       of the probabilities, and between the seeds, in nats
    flag, problem               blank, saturated, unreadable, or empty; why an image cannot be read
    embedding, pca              vectors of fixed length

A field's metadata has its description and unit, the schema's metadata where the rows come from.
"""

import re
import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

VECTORS = ("embedding", "pca")  # columns with several numbers per row; of a CSV file embedding_000, embedding_001, ...
_LEFT_OUT = ("unreadable", "blank")  # flags of galaxies that are in no ranking
SATURATED_FRACTION = 0.05  # of an image's values that are 255
_CHUNK = 256  # images whose values are compared at once


def field(name: str, kind: pa.DataType, description: str, unit: str = "") -> pa.Field:
    """A column with its description and unit, which all formats keep."""
    metadata = {"description": description} | ({"unit": unit} if unit else {})
    return pa.field(name, kind, metadata=metadata)


def to_numpy(column: pa.ChunkedArray) -> np.ndarray:
    """The values of a column: (N,) numbers or str objects, or (N, D) float32 for a vector."""
    if pa.types.is_fixed_size_list(column.type):
        values = column.combine_chunks().flatten().to_numpy(zero_copy_only=False)
        return values.reshape(len(column), column.type.list_size)
    return column.to_numpy()


def is_usable(flag: np.ndarray) -> np.ndarray:
    """Of a catalogue's column `flag`, whether an image is neither unreadable nor blank: bool."""
    return ~np.isin(flag.astype(str), _LEFT_OUT)


def describe_left_out(flag: np.ndarray) -> str:
    """How many galaxies are not usable, as in `2 unreadable, 1 blank`; empty if all are."""
    counts = {name: int(np.sum(flag == name)) for name in _LEFT_OUT}
    return ", ".join(f"{count:,} {name}" for name, count in counts.items() if count)


def column_names(class_names: Sequence[str]) -> list[str]:
    """Names of the probabilities' columns, as in `p_round_smooth`: ASCII, and unique."""
    names: list[str] = []
    for c, class_name in enumerate(class_names):
        ascii_only = unicodedata.normalize("NFKD", class_name).encode("ascii", "ignore").decode().lower()
        name = "p_" + (re.sub(r"[^a-z0-9]+", "_", ascii_only).strip("_") or f"class_{c}")
        while name in names:
            name += f"_{c}"
        names.append(name)
    return names


def class_columns(
    probabilities: np.ndarray, class_names: tuple[str, ...], readable: np.ndarray
) -> list[tuple[pa.Field, Any]]:
    """Predicted class, probabilities, entropy and disagreement.

    Args:
        probabilities: (seeds, N, classes) float64.
        class_names: of the classes.
        readable: (N,) bool; the others get NaN and no class.
    """
    mean = probabilities.mean(axis=0)
    total, expected = entropy(mean), entropy(probabilities).mean(axis=0)
    disagreement = (total - expected).clip(min=0) if len(probabilities) > 1 else np.full(len(mean), np.nan)
    predicted = np.where(readable, np.array(class_names, object)[mean.argmax(axis=1)], "")
    columns = [(field("predicted_class", pa.string(), "the most probable class"), predicted)]
    numbers = dict(zip(column_names(class_names), mean.T, strict=True)) | {
        "entropy": total,
        "disagreement": disagreement,
    }
    descriptions = [f"probability of {name}" for name in class_names]
    descriptions += ["entropy of the probabilities in nats", "mutual information of class and seed in nats"]
    for (name, values), description in zip(numbers.items(), descriptions, strict=True):
        values = np.where(readable, values, np.nan).astype(np.float32)
        columns.append((field(name, pa.float32(), description), values))
    return columns


def entropy(probabilities: np.ndarray) -> np.ndarray:
    """Entropy in nats over the last axis. The mean's minus the members' mean is their disagreement.

    That difference is the mutual information between the class and the member (Houlsby et al. 2011, equation 2).
    """
    return -np.sum(probabilities * np.log(np.maximum(probabilities, np.finfo(float).tiny)), axis=-1)


def vector_column(name: str, description: str, values: np.ndarray) -> tuple[pa.Field, pa.Array]:
    """A column of (N, D) floats."""
    array = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1])
    return field(name, array.type, description), array


def saturated(pixels: np.ndarray) -> np.ndarray:
    """(N,) bool: more than 5 % of the values of an image, of (N, S, S, 3) uint8, are 255."""
    chunks = (pixels[start : start + _CHUNK] for start in range(0, len(pixels), _CHUNK))
    return np.concatenate([(chunk == 255).mean(axis=(1, 2, 3)) > SATURATED_FRACTION for chunk in chunks])

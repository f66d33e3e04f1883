"""Duplicates and overlaps on the sky, and a split into training, validation and test set that respects them.

Galaxy10's rows are cut-outs of 67 arcsec around catalogued galaxies, and some galaxies are catalogued twice. There are
rows with identical coordinates under two labels, cut-outs that overlap, and blank images. A random split would test on
pixels that were trained on. Here two rows whose cut-outs overlap, or whose pixels are identical, are always in the same
split. Rows with conflicting labels and blank images are not used.
"""

import hashlib
from dataclasses import dataclass

import numpy as np

from galaxy_mae.data.cache import Galaxies
from galaxy_mae.errors import UserError

SPLITS = ("train", "validation", "test")
FRACTIONS = (0.8, 0.1, 0.1)
CUTOUT_PIXELS = 256
PIXEL_SCALE = 0.262  # arcsec per pixel of the Legacy Surveys, where the data set does not say it
MATCH_RADIUS_ARCSEC = 1.0  # two rows closer than this are the same object


@dataclass(frozen=True)
class DuplicatePairs:
    """Pairs of rows of a catalogue, (P, 2) int64 with first < second.

    Attributes:
        overlapping: the cut-outs may overlap on the sky, or the pixels are identical.
        conflicting: the same object (within `MATCH_RADIUS_ARCSEC`, or with identical pixels) has two labels.
    """

    overlapping: np.ndarray
    conflicting: np.ndarray


def find_duplicates(
    labels: np.ndarray,
    ra: np.ndarray | None = None,
    dec: np.ndarray | None = None,
    pixel_scale: float | np.ndarray = PIXEL_SCALE,
    image_hash: np.ndarray | None = None,
) -> DuplicatePairs:
    """Find pairs of rows that show the same part of the sky or have the same pixels.

    Two square cut-outs of widths a and b can only overlap if their centers are less than (a + b) / sqrt(2) apart, the
    sum of their half diagonals, whatever their orientation. Pairs closer than this count as overlapping.

    Args:
        labels: (N,) integers.
        ra, dec: (N,) degrees, J2000; None if there are no coordinates. Rows with NaN overlap with nothing.
        pixel_scale: arcsec per pixel of a 256-pixel cut-out, one for all or (N,).
        image_hash: (N,) integers, equal for identical pixels; None if the pixels are not available.
    """
    overlapping = [np.empty((0, 2), np.int64)]
    same = [np.empty((0, 2), np.int64)]
    if ra is not None and dec is not None:
        pairs, separation, max_separation = _pairs_on_the_sky(ra, dec, np.broadcast_to(pixel_scale, labels.shape))
        overlapping.append(pairs[separation < max_separation])
        same.append(pairs[separation < MATCH_RADIUS_ARCSEC])
    if image_hash is not None:
        identical = _identical_pairs(image_hash)
        overlapping.append(identical)
        same.append(identical)
    same_pairs = np.unique(np.concatenate(same), axis=0)
    return DuplicatePairs(
        overlapping=np.unique(np.concatenate(overlapping), axis=0),
        conflicting=same_pairs[labels[same_pairs[:, 0]] != labels[same_pairs[:, 1]]],
    )


def _pairs_on_the_sky(
    ra: np.ndarray, dec: np.ndarray, pixel_scale: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Candidate pairs (P, 2), their separations (P,) and the separations below which they overlap (P,), in arcsec."""
    from scipy.spatial import cKDTree  # slow to import

    located = np.flatnonzero(np.isfinite(ra) & np.isfinite(dec))
    alpha, delta = np.radians(ra[located]), np.radians(dec[located])
    unit = np.stack([np.cos(delta) * np.cos(alpha), np.cos(delta) * np.sin(alpha), np.sin(delta)], axis=1)
    half_diagonal = np.where(np.isfinite(pixel_scale), pixel_scale, PIXEL_SCALE) * CUTOUT_PIXELS / np.sqrt(2)
    chord = 2 * np.sin(np.radians(2 * half_diagonal.max() / 3600) / 2)
    pairs = cKDTree(unit).query_pairs(chord, output_type="ndarray").astype(np.int64).reshape(-1, 2)
    distance = np.linalg.norm(unit[pairs[:, 0]] - unit[pairs[:, 1]], axis=1)
    separation = np.degrees(2 * np.arcsin(distance / 2)) * 3600
    pairs = np.sort(located[pairs], axis=1)
    return pairs, separation, half_diagonal[pairs].sum(axis=1)


def _identical_pairs(image_hash: np.ndarray) -> np.ndarray:
    """Consecutive rows of each group of equal hashes: enough to connect the group, without all of its pairs."""
    order = np.argsort(image_hash, kind="stable")
    equal = image_hash[order[1:]] == image_hash[order[:-1]]
    return np.stack([order[:-1][equal], order[1:][equal]], axis=1).astype(np.int64)


def split_catalogue(
    labels: np.ndarray,
    ra: np.ndarray | None = None,
    dec: np.ndarray | None = None,
    pixel_scale: float | np.ndarray = PIXEL_SCALE,
    seed: int = 0,
    *,
    image_hash: np.ndarray | None = None,
    blank: np.ndarray | None = None,
    predefined_test: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """Split a catalogue into 80 % training, 10 % validation and 10 % test set, stratified by class.

    A pure function of its arguments. Rows whose cut-outs overlap on the sky, or whose pixels are identical, are in the
    same split. Blank images, and rows that show the same object under two labels, are dropped. A predefined test split
    is kept (apart from what is dropped): training and validation set then share the other rows by 8 to 1, and other
    rows that are connected to a test row by overlaps are dropped.

    Args:
        labels: (N,) integers from 0.
        ra, dec, pixel_scale, image_hash: as in `find_duplicates`.
        seed: selects the split.
        blank: (N,) bool, true if all pixels of an image have the same value.
        predefined_test: (N,) bool, true in the predefined test split.

    Returns:
        Sorted sample indices, int64, of `train`, `validation`, `test` and `dropped`. Each row is in exactly one.
    """
    labels = np.asarray(labels)
    ra, dec = (None if x is None else np.asarray(x, dtype=np.float64) for x in (ra, dec))
    duplicates = find_duplicates(labels, ra, dec, pixel_scale, image_hash)
    dropped = np.zeros(len(labels), bool) if blank is None else blank.copy()
    dropped[_conflicting_rows(labels, duplicates, image_hash)] = True
    has_test_split = predefined_test is not None and bool(predefined_test.any())
    links = duplicates.overlapping[~dropped[duplicates.overlapping].any(axis=1)]
    groups = _connected_groups(len(labels), links)
    part = np.full(len(labels), -1)
    fractions = np.asarray(FRACTIONS)
    if has_test_split:
        part[predefined_test] = SPLITS.index("test")
        dropped |= np.isin(groups, np.unique(groups[predefined_test & ~dropped])) & ~predefined_test
        fractions = np.array([FRACTIONS[0], FRACTIONS[1], 0.0]) / (FRACTIONS[0] + FRACTIONS[1])
    free = np.flatnonzero((part < 0) & ~dropped)
    part[free] = _assign(labels[free], groups[free], fractions, np.random.default_rng(seed))
    part[dropped] = -1
    split = {name: np.flatnonzero(part == i) for i, name in enumerate(SPLITS)}
    return split | {"dropped": np.flatnonzero(dropped)}


def _conflicting_rows(labels: np.ndarray, duplicates: DuplicatePairs, image_hash: np.ndarray | None) -> np.ndarray:
    """Rows whose object has another label too: both of each pair, and all of a group with identical pixels."""
    rows = np.unique(duplicates.conflicting)
    if image_hash is None:
        return rows
    return np.flatnonzero(np.isin(image_hash, np.unique(image_hash[rows])) | np.isin(np.arange(len(labels)), rows))


def _connected_groups(count: int, links: np.ndarray) -> np.ndarray:
    """(count,) int: the number of the connected component of each row."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    graph = coo_array((np.ones(len(links)), (links[:, 0], links[:, 1])), shape=(count, count))
    return connected_components(graph, directed=False)[1]


def _assign(labels: np.ndarray, groups: np.ndarray, fractions: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Assign rows to splits, (M,) int, keeping groups together and each class at the given fractions.

    Groups of several rows come first. Each goes to a split drawn with the fractions as probabilities, if its classes
    still fit there, else to the training set. Single rows then fill each class up to its exact numbers.
    """
    classes, label = np.unique(labels, return_inverse=True)
    totals = np.bincount(label, minlength=len(classes))
    room = np.rint(np.outer(totals, fractions)).astype(int)  # (classes, splits): rows that still fit
    room[:, 0] += totals - room.sum(axis=1)
    part = np.full(len(labels), -1)
    _, group, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    grouped = np.flatnonzero(sizes[group] > 1)
    for members in np.split(grouped[np.argsort(group[grouped], kind="stable")], np.cumsum(sizes[sizes > 1])[:-1]):
        if len(members) == 0:
            continue
        needed = np.bincount(label[members], minlength=len(classes))
        selected = rng.choice(len(fractions), p=fractions)
        if np.any(room[:, selected] < needed):
            selected = 0
        part[members] = selected
        room[:, selected] -= needed
    for c in range(len(classes)):
        single = rng.permutation(np.flatnonzero((label == c) & (part < 0)))
        # If a large group took more of the training set than its fraction, the other splits get fewer.
        numbers = np.maximum(room[c], 0)
        ends = np.minimum(np.cumsum(numbers[::-1]), len(single))
        for p, rows in zip(range(len(fractions))[::-1], np.split(single, ends[:-1]), strict=True):
            part[rows] = p
    return part


# ------------------------------------------------------------------------------------------- the split of a data set


def split_galaxies(galaxies: Galaxies, seed: int = 0) -> dict[str, np.ndarray]:
    """`split_catalogue` of an opened data set, with its coordinates, pixels and predefined test split."""
    labels, scale = labels_and_scale(galaxies)
    return split_catalogue(
        labels,
        galaxies.ra,
        galaxies.dec,
        scale,
        seed,
        image_hash=galaxies.image_hash,
        blank=galaxies.blank,
        predefined_test=galaxies.predefined_test,
    )


def labels_and_scale(galaxies: Galaxies) -> tuple[np.ndarray, float | np.ndarray]:
    """Labels, all 0 if the data set has none, and arcsec per pixel of a cut-out of 256 pixels."""
    labels = np.zeros(len(galaxies), np.int64) if galaxies.label is None else galaxies.label
    scale = PIXEL_SCALE if galaxies.pixel_scale is None else galaxies.pixel_scale * galaxies.native_size / CUTOUT_PIXELS
    return labels, scale


def check_split_sizes(train: int, validation: int, batch_size: int) -> None:
    """Raise a `UserError` if there are too few galaxies of a split for pre-training."""
    if train == 0:
        raise UserError("no training galaxies: the images are too few, all alike, or all in the predefined test split")
    if train < batch_size:
        raise UserError(
            f"{train} training galaxies are fewer than a batch of {batch_size}; "
            f"use more galaxies, or --batch_size {max(1, train // 4)}"
        )
    if validation == 0:
        raise UserError(
            f"{train} training galaxies leave none for validation; use more galaxies, or another --split_seed"
        )


def split_fingerprint(split: dict[str, np.ndarray]) -> str:
    """Hex SHA-256 of a split: of the sample indices of its parts."""
    digest = hashlib.sha256()
    for name in (*SPLITS, "dropped"):
        digest.update(f"{name} {len(split[name])} ".encode() + np.asarray(split[name], "<i8").tobytes())
    return digest.hexdigest()

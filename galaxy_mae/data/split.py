"""Duplicates and overlaps on the sky, and a split into training, validation and test set that respects them.

Galaxy10's rows are cut-outs of 67 arcsec around catalogued galaxies, and some galaxies are catalogued twice. There are
rows with identical coordinates under two labels, cut-outs that overlap, and blank images. A random split would test on
pixels that were trained on.
"""

import hashlib

import numpy as np

from galaxy_mae.data.cache import Galaxies
from galaxy_mae.errors import UserError

SPLITS = ("train", "validation", "test")
FRACTIONS = (0.8, 0.1, 0.1)
ALL_TEST = "all are test galaxies by their names: rename the folder or the shards that are called test"
CUTOUT_ARCSEC = 256 * 0.262  # width of a cut-out of the Legacy Surveys, where the data set does not say it
_MATCH_RADIUS_ARCSEC = 1.0  # two rows closer than this are the same object


def sky_positions(galaxies: Galaxies) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Right ascension and declination in degrees, and the width of the cut-out in arcsec; (N,) float64, or NaN."""
    unknown = np.full(len(galaxies), np.nan)
    ra, dec = (unknown, unknown) if galaxies.ra is None or galaxies.dec is None else (galaxies.ra, galaxies.dec)
    native = galaxies.native_size
    if galaxies.geometry is not None:  # that of unreadable images is not known
        sides = np.stack([galaxies.geometry[name] for name in ("image_width", "image_height")])
        native = np.where(sides[0] > 0, sides.max(axis=0), native)
    cutout = CUTOUT_ARCSEC if galaxies.pixel_scale is None else galaxies.pixel_scale * native
    return ra, dec, np.broadcast_to(cutout, unknown.shape)


def pairs_on_the_sky(ra: np.ndarray, dec: np.ndarray, cutout: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Find pairs of rows that show the same part of the sky.

    Two square cut-outs of widths a and b can only overlap if their centers are less than (a + b) / sqrt(2) apart, the
    sum of their half diagonals, whatever their orientation.

    Args:
        ra, dec: (N,) degrees, J2000. Rows with NaN overlap with nothing.
        cutout: (N,) widths in arcsec; NaN stands for `CUTOUT_ARCSEC`.

    Returns:
        Pairs that may overlap, and pairs of the same object, within `_MATCH_RADIUS_ARCSEC`: (P, 2) int64 with first <
        second.
    """
    from scipy.spatial import cKDTree  # slow to import

    located = np.flatnonzero(np.isfinite(ra) & np.isfinite(dec))
    alpha, delta = np.radians(ra[located]), np.radians(dec[located])
    unit = np.stack([np.cos(delta) * np.cos(alpha), np.cos(delta) * np.sin(alpha), np.sin(delta)], axis=1)
    half_diagonal = np.where(np.isfinite(cutout), cutout, CUTOUT_ARCSEC) / np.sqrt(2)
    chord = 2 * np.sin(np.radians(2 * half_diagonal.max() / 3600) / 2)
    pairs = cKDTree(unit).query_pairs(chord, output_type="ndarray").astype(np.int64).reshape(-1, 2)
    distance = np.linalg.norm(unit[pairs[:, 0]] - unit[pairs[:, 1]], axis=1)
    separation = np.degrees(2 * np.arcsin(distance / 2)) * 3600
    pairs = np.sort(located[pairs], axis=1)
    return pairs[separation < half_diagonal[pairs].sum(axis=1)], pairs[separation < _MATCH_RADIUS_ARCSEC]


def identical_pairs(image_hash: np.ndarray) -> np.ndarray:
    """Consecutive rows of each group of equal hashes: enough to connect the group, without all of its pairs."""
    order = np.argsort(image_hash, kind="stable")
    equal = image_hash[order[1:]] == image_hash[order[:-1]]
    return np.stack([order[:-1][equal], order[1:][equal]], axis=1).astype(np.int64)


def find_duplicates(galaxies: Galaxies) -> tuple[np.ndarray, np.ndarray]:
    """Find pairs of rows, (P, 2) int64 with first < second.

    Returns:
        Those whose cut-outs may overlap on the sky or whose pixels are identical, and those that show the same object
        under two labels.
    """
    identical = identical_pairs(galaxies.image_hash)
    overlapping, same = (
        np.unique(np.concatenate([pairs, identical]), axis=0) for pairs in pairs_on_the_sky(*sky_positions(galaxies))
    )
    labels = _labels(galaxies)
    return overlapping, same[labels[same[:, 0]] != labels[same[:, 1]]]


def describe_duplicates(galaxies: Galaxies) -> list[str]:
    """Two lines of text: how many images are blank, repeated, overlap or have conflicting labels."""
    positions = sky_positions(galaxies)
    overlapping, _ = pairs_on_the_sky(*positions)
    identical, (_, conflicting) = identical_pairs(galaxies.image_hash), find_duplicates(galaxies)
    located = int(np.isfinite(positions[:2]).all(axis=0).sum())
    sky = "no coordinates: overlaps on the sky are not known"
    if located:
        sky = f"{len(overlapping):,} pairs of cut-outs that may overlap on the sky"
    if 0 < located < len(galaxies):
        sky += f" (not known for {len(galaxies) - located:,} images without coordinates)"
    return [
        f"{int(galaxies.blank.sum()):,} blank images; {len(identical):,} repeats of identical pixels",
        f"{sky}; {len(conflicting):,} pairs of one object with conflicting labels",
    ]


def _labels(galaxies: Galaxies) -> np.ndarray:
    """(N,) int64, all 0 if the data set has none."""
    return np.zeros(len(galaxies), np.int64) if galaxies.label is None else galaxies.label


def split_galaxies(galaxies: Galaxies, seed: int = 0) -> dict[str, np.ndarray]:
    """Split a data set into 80 % training, 10 % validation and 10 % test set, stratified by class.

    A pure function of its arguments. Rows whose cut-outs overlap on the sky, or whose pixels are identical, are in the
    same split. Blank images, and rows that show the same object under two labels, are dropped. A predefined test split
    is kept (apart from what is dropped): training and validation set then share the other rows by 8 to 1, and other
    rows that are connected to a test row by overlaps are dropped.

    Returns:
        Sorted sample indices, int64, of `train`, `validation`, `test` and `dropped`. Each row is in exactly one.
    """
    labels, predefined_test = _labels(galaxies), galaxies.predefined_test
    overlapping, conflicting = find_duplicates(galaxies)
    dropped = galaxies.blank | np.isin(galaxies.image_hash, galaxies.image_hash[conflicting])
    groups = _connected_groups(len(labels), overlapping[~dropped[overlapping].any(axis=1)])
    part = np.full(len(labels), -1)
    fractions = np.asarray(FRACTIONS)
    if predefined_test.any():
        part[predefined_test] = SPLITS.index("test")
        dropped |= np.isin(groups, np.unique(groups[predefined_test & ~dropped])) & ~predefined_test
        fractions = np.array([FRACTIONS[0], FRACTIONS[1], 0.0]) / (FRACTIONS[0] + FRACTIONS[1])
    free = np.flatnonzero((part < 0) & ~dropped)
    part[free] = _assign(labels[free], groups[free], fractions, np.random.default_rng(seed))
    part[dropped] = -1
    split = {name: np.flatnonzero(part == i) for i, name in enumerate(SPLITS)}
    return split | {"dropped": np.flatnonzero(dropped)}


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


def check_split_sizes(train: int, validation: int, batch_size: int) -> None:
    """Raise a `UserError` if there are too few galaxies of a split for a training."""
    if train == 0:
        raise UserError(f"no training galaxies: the images are too few or all alike, or {ALL_TEST}")
    if train < batch_size:
        fix = f"use more galaxies, or --batch_size {max(1, train // 4)}"
        raise UserError(f"{train} training galaxies are fewer than a batch of {batch_size}; {fix}")
    if validation == 0:
        raise UserError(f"{train} training galaxies leave none for validation: use more, or another --split_seed")


def split_fingerprint(split: dict[str, np.ndarray]) -> str:
    """Hex SHA-256 of a split: of the sample indices of its parts."""
    digest = hashlib.sha256()
    for name in (*SPLITS, "dropped"):
        digest.update(f"{name} {len(split[name])} ".encode() + np.asarray(split[name], "<i8").tobytes())
    return digest.hexdigest()

"""Galaxy10 DECaLS: its ten classes, the duplicates in it, and a split that is honest about the sky.

Galaxy10's rows are cut-outs of 67 arcsec around catalogued galaxies, and some galaxies are catalogued twice: there are
rows with identical coordinates under two labels, cut-outs that overlap, and constant images. A split by rows would
then test on pixels that were trained on. Here two rows whose cut-outs overlap, or whose pixels are identical, always
stand in the same part, and rows that contradict each other or show nothing are used nowhere.

    python -m galaxy_mae.galaxy10 SOURCE

describes any source: rows, classes, duplicates, the split, channel statistics, and a contact sheet of every class.
"""

import argparse
import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree

from galaxy_mae.errors import UserError, one_line_errors
from galaxy_mae.sources import Galaxies, open_galaxies

PARTS = ("train", "validation", "test")
SHARES = (0.8, 0.1, 0.1)
CUTOUT_PIXELS = 256
TWIN_SEPARATION = 1.0  # arcsec: closer than this, two rows are the same object


@dataclass(frozen=True)
class Twins:
    """What links rows of a catalogue: (P, 2) int64 pairs of row numbers, first < second in each.

    Attributes:
        overlapping: the cut-outs may overlap on the sky (or the pixels are identical).
        contradictory: the same object (within `TWIN_SEPARATION`, or identical pixels) under two labels.
    """

    overlapping: np.ndarray
    contradictory: np.ndarray


def find_twins(
    labels: np.ndarray,
    ra: np.ndarray | None = None,
    dec: np.ndarray | None = None,
    pixel_scale: float | np.ndarray = 0.262,
    image_hash: np.ndarray | None = None,
) -> Twins:
    """Find rows that show the same sky or the same pixels.

    Two square cut-outs of widths a and b can only overlap where their centres are less than (a + b) / sqrt(2) apart
    (their half diagonals, whatever their orientation), so this distance is what counts as overlapping.

    Args:
        labels: (N,) integers.
        ra, dec: (N,) degrees, J2000; None where the source has no coordinates. Rows with NaN are nowhere on the sky.
        pixel_scale: arcsec per pixel of a 256-pixel cut-out, one for all or (N,).
        image_hash: (N,) integers, equal where the pixels are identical; None where the pixels are not at hand.
    """
    overlapping = [np.empty((0, 2), np.int64)]
    same = [np.empty((0, 2), np.int64)]
    if ra is not None and dec is not None:
        pairs, separation, reach = _pairs_on_the_sky(ra, dec, np.broadcast_to(pixel_scale, labels.shape))
        overlapping.append(pairs[separation < reach])
        same.append(pairs[separation < TWIN_SEPARATION])
    if image_hash is not None:
        identical = _identical_pairs(image_hash)
        overlapping.append(identical)
        same.append(identical)
    same_pairs = np.unique(np.concatenate(same), axis=0)
    return Twins(
        overlapping=np.unique(np.concatenate(overlapping), axis=0),
        contradictory=same_pairs[labels[same_pairs[:, 0]] != labels[same_pairs[:, 1]]],
    )


def _pairs_on_the_sky(ra: np.ndarray, dec: np.ndarray, pixel_scale: np.ndarray):
    """Pairs of rows within the largest reach, their separations and the reach of each pair, in arcsec."""
    placed = np.flatnonzero(np.isfinite(ra) & np.isfinite(dec))
    alpha, delta = np.radians(ra[placed]), np.radians(dec[placed])
    unit = np.stack([np.cos(delta) * np.cos(alpha), np.cos(delta) * np.sin(alpha), np.sin(delta)], axis=1)
    half_diagonal = np.where(np.isfinite(pixel_scale), pixel_scale, 0.262) * CUTOUT_PIXELS / np.sqrt(2)
    chord = 2 * np.sin(np.radians(2 * half_diagonal.max() / 3600) / 2)
    pairs = cKDTree(unit).query_pairs(chord, output_type="ndarray").astype(np.int64).reshape(-1, 2)
    distance = np.linalg.norm(unit[pairs[:, 0]] - unit[pairs[:, 1]], axis=1)
    separation = np.degrees(2 * np.arcsin(distance / 2)) * 3600
    pairs = np.sort(placed[pairs], axis=1)
    return pairs, separation, half_diagonal[pairs].sum(axis=1)


def _identical_pairs(image_hash: np.ndarray) -> np.ndarray:
    """Pairs of neighbours in each group of equal hashes: enough to join the group, without all its pairs."""
    order = np.argsort(image_hash, kind="stable")
    equal = image_hash[order[1:]] == image_hash[order[:-1]]
    return np.stack([order[:-1][equal], order[1:][equal]], axis=1).astype(np.int64)


def split_rows(
    labels: np.ndarray,
    ra: np.ndarray | None = None,
    dec: np.ndarray | None = None,
    pixel_scale: float | np.ndarray = 0.262,
    seed: int = 0,
    *,
    image_hash: np.ndarray | None = None,
    constant: np.ndarray | None = None,
    source_test: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """Split a catalogue into 80 % training, 10 % validation and 10 % test rows, each class in these shares.

    A pure function of its arguments. Rows whose cut-outs overlap on the sky, or whose pixels are identical, stand in
    the same part. Constant images, and rows that show the same object under two labels, are dropped. Where the source
    has its own test set, that is kept whole (less what is dropped), training and validation share the rest by 8 to 1,
    and rows of the rest that overlap with a test row are dropped.

    Args:
        labels: (N,) integers from 0.
        ra, dec, pixel_scale, image_hash: as in `find_twins`.
        seed: chooses the split.
        constant: (N,) bool, true where an image holds one single value.
        source_test: (N,) bool, true in the source's own test set.

    Returns:
        Sorted row numbers, int64, of `train`, `validation`, `test` and `dropped`; each row stands in exactly one.
    """
    labels = np.asarray(labels)
    ra, dec = (None if x is None else np.asarray(x, dtype=np.float64) for x in (ra, dec))
    twins = find_twins(labels, ra, dec, pixel_scale, image_hash)
    dropped = np.zeros(len(labels), bool) if constant is None else constant.copy()
    dropped[_contradicted(labels, twins, image_hash)] = True
    has_own_test = source_test is not None and bool(source_test.any())
    links = twins.overlapping[~dropped[twins.overlapping].any(axis=1)]
    groups = _groups(len(labels), links)
    part = np.full(len(labels), -1)
    shares = np.asarray(SHARES)
    if has_own_test:
        part[source_test] = PARTS.index("test")
        dropped |= np.isin(groups, np.unique(groups[source_test & ~dropped])) & ~source_test
        shares = np.array([SHARES[0], SHARES[1], 0.0]) / (SHARES[0] + SHARES[1])
    free = np.flatnonzero((part < 0) & ~dropped)
    part[free] = _assign(labels[free], groups[free], shares, np.random.default_rng(seed))
    part[dropped] = -1
    rows = {name: np.flatnonzero(part == i) for i, name in enumerate(PARTS)}
    return rows | {"dropped": np.flatnonzero(dropped)}


def _contradicted(labels: np.ndarray, twins: Twins, image_hash: np.ndarray | None) -> np.ndarray:
    """Rows whose object stands under another label too: both of each pair, all of a group of identical pixels."""
    rows = np.unique(twins.contradictory)
    if image_hash is None:
        return rows
    return np.flatnonzero(np.isin(image_hash, np.unique(image_hash[rows])) | np.isin(np.arange(len(labels)), rows))


def _groups(count: int, links: np.ndarray) -> np.ndarray:
    """(count,) int: the number of the connected component of each row."""
    graph = coo_array((np.ones(len(links)), (links[:, 0], links[:, 1])), shape=(count, count))
    return connected_components(graph, directed=False)[1]


def _assign(labels: np.ndarray, groups: np.ndarray, shares: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(M,) int: the part of each row, whole groups together and each class by the shares.

    Groups of several rows go first, to a part drawn by the shares if their classes still fit there; then the rows
    that stand alone fill each class up to its exact numbers.
    """
    classes, label = np.unique(labels, return_inverse=True)
    totals = np.bincount(label, minlength=len(classes))
    room = np.rint(np.outer(totals, shares)).astype(int)  # (classes, parts): places left
    room[:, 0] += totals - room.sum(axis=1)
    part = np.full(len(labels), -1)
    _, group, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    together = np.flatnonzero(sizes[group] > 1)
    for members in np.split(together[np.argsort(group[together], kind="stable")], np.cumsum(sizes[sizes > 1])[:-1]):
        if len(members) == 0:
            continue
        needed = np.bincount(label[members], minlength=len(classes))
        chosen = rng.choice(len(shares), p=shares)
        if np.any(room[:, chosen] < needed):
            chosen = 0
        part[members] = chosen
        room[:, chosen] -= needed
    for c in range(len(classes)):
        alone = rng.permutation(np.flatnonzero((label == c) & (part < 0)))
        # Where a large group took more of the training set than its share, the other parts get fewer.
        places = np.maximum(room[c], 0)
        ends = np.minimum(np.cumsum(places[::-1]), len(alone))
        for p, rows in zip(range(len(shares))[::-1], np.split(alone, ends[:-1]), strict=True):
            part[rows] = p
    return part


def split_galaxies(galaxies: Galaxies, seed: int = 0) -> dict[str, np.ndarray]:
    """`split_rows` of an opened source, with its coordinates, pixels and own test set."""
    labels, scale = _labels_and_scale(galaxies)
    return split_rows(
        labels,
        galaxies.ra,
        galaxies.dec,
        scale,
        seed,
        image_hash=galaxies.image_hash,
        constant=galaxies.constant,
        source_test=galaxies.source_test,
    )


def _labels_and_scale(galaxies: Galaxies) -> tuple[np.ndarray, float | np.ndarray]:
    """Labels, all 0 where the source has none, and arcsec per pixel of a cut-out of 256 pixels."""
    labels = np.zeros(len(galaxies), np.int64) if galaxies.label is None else galaxies.label
    scale = 0.262 if galaxies.pixel_scale is None else galaxies.pixel_scale * galaxies.native_size / CUTOUT_PIXELS
    return labels, scale


def split_fingerprint(rows: dict[str, np.ndarray]) -> str:
    """Hex SHA-256 of a split: the row numbers of its parts."""
    digest = hashlib.sha256()
    for name in (*PARTS, "dropped"):
        digest.update(f"{name} {len(rows[name])} ".encode() + np.asarray(rows[name], "<i8").tobytes())
    return digest.hexdigest()


def describe(galaxies: Galaxies, rows: dict[str, np.ndarray]) -> str:
    """What a source holds, as a page of text: rows, classes and split, duplicates, channel statistics."""
    size = galaxies.native_size
    lines = [f"{galaxies.name}: {len(galaxies):,} images of {size} x {size}, SHA-256 {galaxies.fingerprint[:16]}..."]
    counts = {name: len(rows[name]) for name in (*PARTS, "dropped")}
    lines += ["", f"{'class':<28}{'rows':>8}" + "".join(f"{name:>12}" for name in counts)]
    if galaxies.label is not None:
        for c, class_name in enumerate(galaxies.class_names):
            of_class = [int(np.sum(galaxies.label[rows[name]] == c)) for name in counts]
            numbers = "".join(f"{n:>12,}" for n in of_class)
            lines.append(f"{c} {class_name:<26}{int(np.sum(galaxies.label == c)):>8,}{numbers}")
    lines.append(f"{'all':<28}{len(galaxies):>8,}" + "".join(f"{n:>12,}" for n in counts.values()))
    lines += ["", *_describe_duplicates(galaxies)]
    if counts["train"] == 0:
        return "\n".join([*lines, "no training rows: nothing to train on"])
    mean, deviation = galaxies.channel_statistics(rows["train"])
    text = ", ".join(f"{name} {m:.4f} +- {s:.4f}" for name, m, s in zip("RGB", mean, deviation, strict=True))
    lines.append(f"training rows, mean and standard deviation of each channel (0 to 1): {text}")
    return "\n".join(lines)


def _describe_duplicates(galaxies: Galaxies) -> list[str]:
    labels, scale = _labels_and_scale(galaxies)
    on_sky = find_twins(labels, galaxies.ra, galaxies.dec, scale)
    in_pixels = find_twins(labels, image_hash=galaxies.image_hash)
    contradictory = np.unique(np.concatenate([on_sky.contradictory, in_pixels.contradictory]), axis=0)
    if galaxies.ra is None:
        sky = "no coordinates: overlaps on the sky are not known"
    else:
        sky = f"{len(on_sky.overlapping):,} pairs of cut-outs that may overlap on the sky"
    return [
        f"{int(galaxies.constant.sum()):,} constant images; {len(in_pixels.overlapping):,} repeats of identical pixels",
        f"{sky}; {len(contradictory):,} pairs of one object under two labels",
    ]


def main(arguments: list[str] | None = None) -> None:
    """Describe a source and draw its contact sheet."""
    parser = argparse.ArgumentParser(prog="python -m galaxy_mae.galaxy10", description="Describe a source of galaxies.")
    parser.add_argument("source", help="galaxy10, synthetic[:COUNT], an HDF5 or Parquet file, a folder, or a Hub id")
    parser.add_argument("--image_size", type=int, help="area-average the images to this size")
    parser.add_argument("--split_seed", type=int, default=0)
    parser.add_argument("--contact_sheet", type=Path, default=Path("contact_sheet.png"), help="where to draw it")
    options = parser.parse_args(arguments)
    from galaxy_mae.figures import contact_sheet  # matplotlib is slow to import

    if options.image_size is not None and not 1 <= options.image_size <= 4096:
        raise UserError(f"--image_size {options.image_size}: it must lie between 1 and 4096")
    if options.split_seed < 0:
        raise UserError(f"--split_seed {options.split_seed}: it must not be negative")
    if options.contact_sheet.suffix.lower() != ".png" or options.contact_sheet.is_dir():
        raise UserError(f"--contact_sheet {options.contact_sheet}: it must be the path of a .png file")
    galaxies = open_galaxies(options.source, options.image_size)
    print(describe(galaxies, split_galaxies(galaxies, options.split_seed)))
    contact_sheet(galaxies, options.contact_sheet)
    print(f"contact sheet: {options.contact_sheet}")


if __name__ == "__main__":
    with one_line_errors("galaxy_mae.galaxy10"):
        main()

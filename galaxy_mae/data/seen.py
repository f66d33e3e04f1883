"""Test galaxies that an encoder has seen: leakage from pre-training into an evaluation, also across data sets.

A run keeps a catalogue of its training and validation galaxies beside the encoder. An evaluation looks up its test
galaxies there. A galaxy counts as seen if its pixels are identical, if its cut-out may overlap on the sky with one of
the catalogue, or, where positions are missing, if its image looks the same to a perceptual hash.

The perceptual hash recognizes an image that was compressed again, resized, mirrored or turned by multiples of 90
degrees. It does not recognize a crop, another angle, a strongly changed stretch, or another survey's image of the same
galaxy (docs/log.md has the measurements); only positions do.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from PIL import Image

from galaxy_mae.data.cache import Galaxies
from galaxy_mae.data.split import CUTOUT_PIXELS, find_duplicates, labels_and_scale
from galaxy_mae.provenance import CATALOGUE

HASH_SIZE = 16  # width of the perceptual hash: 256 bits
# Of 7,018 real galaxies, 99 % of copies at 96 pixels and JPEG quality 60 differ in at most 20 bits, and no two galaxies
# in less than 26, also mirrored and turned.
MAX_HASH_DISTANCE = 20

_SYNTHETIC = "synthetic"


@dataclass(frozen=True)
class SeenGalaxies:
    """Which test galaxies were used in pre-training: (M,) bool each.

    Attributes:
        identical_pixels: the images are equal, in the pixels of the source.
        overlapping_cutouts: the cut-outs may overlap on the sky (`split.find_duplicates`).
        similar_images: the perceptual hashes are close; looked for only where a position is missing.
    """

    identical_pixels: np.ndarray
    overlapping_cutouts: np.ndarray
    similar_images: np.ndarray

    @property
    def seen(self) -> np.ndarray:
        """(M,) bool: by any of the criteria."""
        return self.identical_pixels | self.overlapping_cutouts | self.similar_images

    def counts(self) -> dict[str, int]:
        """The number of test galaxies, of seen ones, and of those that meet each criterion."""
        return {
            "test_galaxies": len(self.seen),
            "seen": int(self.seen.sum()),
            "identical_pixels": int(self.identical_pixels.sum()),
            "overlapping_cutouts": int(self.overlapping_cutouts.sum()),
            "similar_images": int(self.similar_images.sum()),
        }


def describe_seen(counts: dict[str, int]) -> str:
    """`SeenGalaxies.counts` in words."""
    return (
        f"{counts['seen']:,} of {counts['test_galaxies']:,} test galaxies ({counts['identical_pixels']:,} with "
        f"identical pixels, {counts['overlapping_cutouts']:,} at the same place on the sky, "
        f"{counts['similar_images']:,} with a similar image and no position)"
    )


def pretraining_catalogue(galaxies: Galaxies, split: dict[str, np.ndarray]) -> pa.Table:
    """The galaxies that a pre-training uses, one row each.

    Args:
        galaxies: the opened data set.
        split: sample indices; `train` sets the weights, `validation` serves to select among runs.

    Returns:
        A table of `provenance.CATALOGUE`.
    """
    tables = []
    for name in ("train", "validation"):
        rows = split[name]
        hashes = perceptual_hashes(np.array(galaxies.pixels[row]) for row in rows)
        hashes = {"image_hash": galaxies.image_hash[rows], "perceptual_hash": [bits.tobytes() for bits in hashes]}
        tables.append(catalogue_rows(galaxies, name, rows, *_positions(galaxies, rows), **hashes))
    return pa.concat_tables(tables)


def catalogue_rows(
    galaxies: Galaxies, split: str, index: np.ndarray, ra: np.ndarray, dec: np.ndarray, cutout: np.ndarray, **hashes
) -> pa.Table:
    """Galaxies of a split as rows of `provenance.CATALOGUE`; hashes that are not given are null."""
    same = {"split": pa.repeat(split, len(index)), "frame": pa.repeat(_frame(galaxies), len(index))}
    columns = {"index": index, "ra": ra, "dec": dec, "cutout_arcsec": cutout} | same | hashes
    return pa.table([columns.get(f.name, pa.nulls(len(index), f.type)) for f in CATALOGUE], schema=CATALOGUE)


def find_seen_galaxies(galaxies: Galaxies, test: np.ndarray, catalogue: pa.Table) -> SeenGalaxies:
    """Look up test galaxies in the catalogue of a pre-training.

    Args:
        galaxies: the opened data set of the evaluation.
        test: (M,) int64, sample indices of its test set.
        catalogue: of `pretraining_catalogue`, perhaps of another data set.
    """
    hashed = catalogue.filter(catalogue["image_hash"].is_valid())
    identical = np.isin(galaxies.image_hash[test], hashed["image_hash"].to_numpy())
    overlapping, similar = np.zeros(len(test), bool), np.zeros(len(test), bool)
    frame = _frame(galaxies)
    # Many synthetic galaxies look alike to a hash: their pixels and, among themselves, their positions identify them.
    if frame == catalogue["frame"][0].as_py():
        position = _positions(galaxies, test)
        position_seen = tuple(catalogue[name].to_numpy() for name in ("ra", "dec", "cutout_arcsec"))
        overlapping = _overlapping(position, position_seen)
        if frame != _SYNTHETIC:
            located_seen = _is_located(tuple(hashed[name].to_numpy() for name in ("ra", "dec")))
            similar = _similar(galaxies, test, _is_located(position), hashed, located_seen)
    return SeenGalaxies(identical, overlapping, similar)


def _frame(galaxies: Galaxies) -> str:
    """Of the positions: synthetic galaxies are not on the sky."""
    return _SYNTHETIC if galaxies.name.partition(":")[0] == "synthetic" else "ICRS"


def _positions(galaxies: Galaxies, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Right ascension and declination in degrees, NaN if unknown, and the width of the cut-out in arcsec; (M,) each."""
    unknown = np.full(len(galaxies), np.nan)
    ra, dec = (unknown, unknown) if galaxies.ra is None or galaxies.dec is None else (galaxies.ra, galaxies.dec)
    cutout = np.broadcast_to(labels_and_scale(galaxies)[1] * CUTOUT_PIXELS, unknown.shape)
    return ra[rows], dec[rows], cutout[rows]


def _is_located(position: tuple[np.ndarray, ...]) -> np.ndarray:
    return np.isfinite(position[0]) & np.isfinite(position[1])


def _overlapping(position: tuple[np.ndarray, ...], seen: tuple[np.ndarray, ...]) -> np.ndarray:
    """(M,) bool: whether each of M positions overlaps with one of those that were seen."""
    ra, dec, cutout = (np.concatenate(pair) for pair in zip(position, seen, strict=True))
    pairs = find_duplicates(np.zeros(len(ra), np.int64), ra, dec, cutout / CUTOUT_PIXELS).overlapping
    count = len(position[0])
    overlapping = np.zeros(count, bool)
    overlapping[pairs[(pairs[:, 0] < count) & (pairs[:, 1] >= count), 0]] = True
    return overlapping


# ------------------------------------------------------------------------------------------------ the perceptual hash


def perceptual_hashes(images: Iterable[np.ndarray]) -> np.ndarray:
    """The 256-bit DCT hashes (imagehash's `phash`) of M images, each (S, S, 3) uint8: (M, 32) uint8."""
    import imagehash  # slow to import

    bits = [imagehash.phash(Image.fromarray(image), HASH_SIZE).hash.ravel() for image in images]
    return np.packbits(np.array(bits, bool).reshape(-1, HASH_SIZE**2), axis=1)


def _similar(
    galaxies: Galaxies, test: np.ndarray, located: np.ndarray, catalogue: pa.Table, located_seen: np.ndarray
) -> np.ndarray:
    """(M,) bool: whether a test galaxy looks like one of the catalogue, where one of the two has no position."""
    similar = np.zeros(len(test), bool)
    stored = np.frombuffer(b"".join(catalogue["perceptual_hash"].to_pylist()), np.uint64).reshape(len(catalogue), -1)
    for i in np.flatnonzero(~located | ~located_seen.all()):
        candidates = stored[~located_seen] if located[i] else stored
        image = np.array(galaxies.pixels[test[i]])
        views = [np.rot90(x, turns) for x in (image, image[:, ::-1]) for turns in range(4)]
        hashes = perceptual_hashes(map(np.ascontiguousarray, views)).view(np.uint64)
        distance = np.bitwise_count(hashes[:, None] ^ candidates).sum(axis=2)  # (8, candidates)
        similar[i] = distance.min(initial=HASH_SIZE**2) <= MAX_HASH_DISTANCE
    return similar

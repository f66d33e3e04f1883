"""What a model has seen: how its training images look, and which test galaxies were among them.

Leakage from pre-training into an evaluation is found also across data sets: a run keeps a catalogue of its training and
validation galaxies beside the encoder, in which an evaluation looks up its test galaxies (`find_seen_galaxies`).

The perceptual hash recognizes an image that was compressed again, resized, mirrored or turned by multiples of 90
degrees. It does not recognize a crop, another angle, a strongly changed stretch, or another survey's image of the same
galaxy (docs/log.md has the measurements); only positions do.
"""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from galaxy_mae.data.cache import Galaxies
from galaxy_mae.data.frame import Frame
from galaxy_mae.data.images import STATISTICS, image_statistics
from galaxy_mae.data.split import pairs_on_the_sky, sky_positions
from galaxy_mae.provenance import CATALOGUE

HASH_SIZE = 16  # width of the perceptual hash: 256 bits
# Of 7,018 real galaxies, 99 % of copies at 96 pixels and JPEG quality 60 differ in at most 20 bits, and no two galaxies
# in less than 26, also mirrored and turned.
MAX_HASH_DISTANCE = 20
_SYNTHETIC = "synthetic"
_SAMPLE = 5000  # training galaxies, and as many held out, whose images are measured
_SHRINKAGE = 0.1  # of the covariance towards its diagonal
_FEW = 100  # held-out galaxies, below which their percentile says little: training galaxies are added
# Of the statistics that are compared, what is added before the logarithm, so that differences are ratios; None: none.
_COMPARED = {"sky": 3.0, "brightness": 1.0, "peak": 1.0, "color": None, "noise": 0.3, "radius": 0.02}
_REASONS = ("radius", "brightness", "peak", "sky", "color", "noise")  # those first that a flag can change
_SHIFT = 1.5  # standard deviations of the training galaxies, from which a statistic is named as a reason
_FAR_FRACTION = 0.1  # of the images, from which a catalogue says so


@dataclass(frozen=True)
class TrainingImages:
    """How the images look that a model was trained on: the statistics of `_COMPARED`, in logarithms.

    Attributes:
        mean, covariance: (6,) and (6, 6) float64, of the training galaxies.
        limit: of the Mahalanobis distance, in which 99 % of the galaxies that were held out are nearer.
        frame: in which they were.
    """

    mean: np.ndarray
    covariance: np.ndarray
    limit: float
    frame: Frame

    @classmethod
    def of(cls, pixels: np.ndarray, split: dict[str, np.ndarray], frame: Frame) -> "TrainingImages":
        """Measure images, (N, S, S, 3) uint8 of NumPy or torch, of which a split has `train` and `validation`."""
        random = np.random.default_rng(0)
        rows = (np.sort(random.permutation(split[name])[:_SAMPLE]) for name in ("train", "validation"))
        images = (pixels[each] for each in rows)
        images = (x if isinstance(x, np.ndarray) else x.cpu().numpy() for x in images)
        train, held_out = (_logarithms(image_statistics(x)) for x in images)
        covariance = np.cov(train, rowvar=False) if len(train) > 1 else np.zeros((len(_COMPARED),) * 2)
        diagonal = np.diag(np.diag(covariance) + 1e-4)  # what does not vary in training may vary by a percent
        found = cls(train.mean(axis=0), (1 - _SHRINKAGE) * covariance + _SHRINKAGE * diagonal, 1.0, frame)
        tried = held_out if len(held_out) >= _FEW else np.concatenate([train, held_out])
        return replace(found, limit=max(1.0, float(np.percentile(found._mahalanobis(tried), 99))))

    def as_json(self) -> dict[str, Any]:
        """What `parse` reads."""
        numbers = {"mean": self.mean.tolist(), "covariance": self.covariance.tolist(), "limit": self.limit}
        return {"statistics": list(_COMPARED), "frame": asdict(self.frame)} | numbers

    @classmethod
    def parse(cls, content: dict[str, Any]) -> "TrainingImages":
        """That of `as_json`. Raises an ArithmeticError, ValueError or TypeError if it is none."""
        mean, covariance = (np.array(content.get(name), np.float64) for name in ("mean", "covariance"))
        limit, count = float(content.get("limit")), len(_COMPARED)
        if content.get("statistics") != list(_COMPARED) or mean.shape != (count,) or covariance.shape != (count,) * 2:
            raise ValueError("it has other statistics")
        is_finite = (np.abs([*mean, *covariance.ravel(), limit]) < 1e6).all()
        is_covariance = is_finite and (covariance == covariance.T).all() and np.linalg.eigvalsh(covariance)[0] >= 1e-9
        if not is_covariance or limit <= 0:
            raise ValueError("its numbers are no mean and covariance")
        return cls(mean, covariance, limit, frame_of(content))

    def distance(self, statistics: np.ndarray) -> np.ndarray:
        """How far images are from those of the training by their `image_statistics`, (N,) float32; far is above 1."""
        return (self._mahalanobis(_logarithms(statistics)) / self.limit).astype(np.float32)

    def _mahalanobis(self, x: np.ndarray) -> np.ndarray:
        return np.sqrt(np.einsum("ni,ij,nj->n", x - self.mean, np.linalg.inv(self.covariance), x - self.mean))

    def describe(self, far: np.ndarray, count: int, total: int) -> str:
        """How `count` of `total` images differ, by the `image_statistics` of some of them; empty if they are few."""
        if count <= _FAR_FRACTION * total:
            return ""
        found = np.median(_logarithms(far), axis=0)
        shift = dict(zip(_COMPARED, (found - self.mean) / np.sqrt(np.diag(self.covariance)), strict=True))
        texts: dict[str, str] = {}
        for name in sorted((name for name in shift if abs(shift[name]) > _SHIFT), key=_REASONS.index):
            i, added = list(_COMPARED).index(name), _COMPARED[name]
            here, there = (float(x) if added is None else math.exp(x) - added for x in (found[i], self.mean[i]))
            up, times = shift[name] > 0, f"{min(99, max(here, there) / max(min(here, there), 1e-3)):.2g} times"
            topic, text = {
                "radius": ("radius", f"{here / there:.2g} times as large in the frame, see --fit galaxy"),
                "sky": ("sky", f"a sky of {here:.0f} gray levels, not {there:.0f}"),
                "color": ("color", "redder" if up else "bluer"),
                "noise": ("noise", f"{'more' if up else 'less'} noise in the sky"),
            }.get(name, ("brightness", f"{'brighter' if up else 'fainter'} by {times}"))
            texts.setdefault(topic, text if here > 0 or name != "radius" else "nothing stands at the center")
        told = list(texts)[:2]
        reasons = "; ".join(texts[topic] for topic in told) or "in a combination of brightness, color and size"
        fix = " (of FITS files see --stretch)" if {"brightness", "color", "sky"} & set(told) else ""
        return f"{count:,} of {total:,} images are unlike those that the model was trained on: {reasons}{fix}"


def frame_of(content: dict[str, Any] | None) -> Frame:
    """The frame in `training_images.json`, which it may lack as the file itself; a `UserError` if it is none."""
    about = (content or {}).get("frame")
    return Frame.of(about) if isinstance(about, dict) else Frame()


def _logarithms(statistics: np.ndarray) -> np.ndarray:
    """The statistics of `_COMPARED` of (N, 7) `image_statistics`, as they are compared: (N, 6) float64."""
    columns = [statistics[:, STATISTICS.index(name)].astype(np.float64) for name in _COMPARED]
    pairs = zip(columns, _COMPARED.values(), strict=True)
    return np.stack([x if added is None else np.log(x.clip(0) + added) for x, added in pairs], axis=1)


def describe_seen(counts: dict[str, int]) -> str:
    """How many `test_galaxies` there are, and how many of them meet each criterion, in words."""
    return (
        f"{counts['seen']:,} of {counts['test_galaxies']:,} test galaxies ({counts['identical_pixels']:,} with "
        f"identical pixels, {counts['overlapping_cutouts']:,} at the same place on the sky, "
        f"{counts['similar_images']:,} with a similar image and no position)"
    )


def pretraining_catalogue(galaxies: Galaxies, split: dict[str, np.ndarray]) -> pa.Table:
    """The galaxies that a pre-training uses, one row each.

    Args:
        split: sample indices; `train` sets the weights, `validation` serves to select among runs.

    Returns:
        A table of `provenance.CATALOGUE`.
    """
    tables, position = [], sky_positions(galaxies)
    for name in ("train", "validation"):
        rows = split[name]
        hashes = perceptual_hashes(np.array(galaxies.pixels[row]) for row in rows)
        hashes = {"image_hash": galaxies.image_hash[rows], "perceptual_hash": [bits.tobytes() for bits in hashes]}
        tables.append(catalogue_rows(galaxies, name, rows, *(values[rows] for values in position), **hashes))
    return pa.concat_tables(tables)


def catalogue_rows(
    galaxies: Galaxies, split: str, index: np.ndarray, ra: np.ndarray, dec: np.ndarray, cutout: np.ndarray, **hashes
) -> pa.Table:
    """Galaxies of a split as rows of `provenance.CATALOGUE`; hashes that are not given are null."""
    same = {"split": pa.repeat(split, len(index)), "frame": pa.repeat(_frame(galaxies), len(index))}
    columns = {"index": index, "ra": ra, "dec": dec, "cutout_arcsec": cutout} | same | hashes
    return pa.table([columns.get(f.name, pa.nulls(len(index), f.type)) for f in CATALOGUE], schema=CATALOGUE)


def find_seen_galaxies(
    galaxies: Galaxies, test: np.ndarray, catalogue: pa.Table, look_alike: bool = True
) -> dict[str, np.ndarray]:
    """Look up test galaxies in the catalogue of a pre-training.

    Args:
        galaxies, test: the data set of an evaluation, and (M,) int64 sample indices of its test set.
        catalogue: of `pretraining_catalogue`, perhaps of another data set.
        look_alike: whether to look for similar images, which takes a while.

    Returns:
        (M,) bool each: `seen`, by any of the criteria; `identical_pixels`, in the pixels of the source;
        `overlapping_cutouts`, which may overlap on the sky; `similar_images`, whose perceptual hashes are close, looked
        for only where a position is missing.
    """
    identical = np.isin(galaxies.image_hash[test], catalogue["image_hash"].drop_null().to_numpy())
    overlapping, similar = np.zeros(len(test), bool), np.zeros(len(test), bool)
    frame = _frame(galaxies)
    # Many synthetic galaxies look alike to a hash: their pixels and, among themselves, their positions identify them.
    catalogue = catalogue.filter(pc.equal(catalogue["frame"], frame))
    if len(catalogue):
        position = [values[test] for values in sky_positions(galaxies)]
        position_seen = [catalogue[name].to_numpy() for name in ("ra", "dec", "cutout_arcsec")]
        pairs, _ = pairs_on_the_sky(*map(np.concatenate, zip(position, position_seen, strict=True)))
        overlapping[pairs[(pairs[:, 0] < len(test)) & (pairs[:, 1] >= len(test)), 0]] = True
        if frame != _SYNTHETIC and look_alike:
            hashed = catalogue.filter(catalogue["image_hash"].is_valid())
            similar = _similar(galaxies, test, np.isfinite(position[:2]).all(axis=0), hashed)
    seen = {"identical_pixels": identical, "overlapping_cutouts": overlapping, "similar_images": similar}
    return {"seen": identical | overlapping | similar} | seen


def _frame(galaxies: Galaxies) -> str:
    """Of the positions: synthetic galaxies are not on the sky."""
    return _SYNTHETIC if galaxies.name.partition(":")[0] == "synthetic" else "ICRS"


def perceptual_hashes(images: Iterable[np.ndarray]) -> np.ndarray:
    """The 256-bit DCT hashes (imagehash's `phash`) of M images, each (S, S, 3) uint8: (M, 32) uint8."""
    import imagehash  # slow to import

    bits = [imagehash.phash(Image.fromarray(image), HASH_SIZE).hash.ravel() for image in images]
    return np.packbits(np.array(bits, bool).reshape(-1, HASH_SIZE**2), axis=1)


def _similar(galaxies: Galaxies, test: np.ndarray, located: np.ndarray, catalogue: pa.Table) -> np.ndarray:
    """(M,) bool: whether a test galaxy looks like one of the catalogue, where one of the two has no position."""
    similar = np.zeros(len(test), bool)
    located_seen = np.isfinite(catalogue["ra"].to_numpy()) & np.isfinite(catalogue["dec"].to_numpy())
    stored = np.frombuffer(b"".join(catalogue["perceptual_hash"].to_pylist()), np.uint64).reshape(len(catalogue), -1)
    for i in np.flatnonzero(~located | ~located_seen.all()):
        candidates = stored[~located_seen] if located[i] else stored
        image = np.array(galaxies.pixels[test[i]])
        views = [np.rot90(x, turns) for x in (image, image[:, ::-1]) for turns in range(4)]
        hashes = perceptual_hashes(map(np.ascontiguousarray, views)).view(np.uint64)
        distance = np.bitwise_count(hashes[:, None] ^ candidates).sum(axis=2)  # (8, candidates)
        similar[i] = distance.min(initial=HASH_SIZE**2) <= MAX_HASH_DISTANCE
    return similar

"""Test galaxies that were used in pre-training are found in another file, in spite of what was done to it."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import SHARED, random_images, write_hdf5
from PIL import Image
from scipy.ndimage import gaussian_filter

from galaxy_mae.data.cache import open_galaxies
from galaxy_mae.data.seen import MAX_HASH_DISTANCE, find_seen_galaxies, perceptual_hashes, pretraining_catalogue
from galaxy_mae.data.split import split_galaxies

COUNT, SIZE = 60, 64
REAL = SHARED / "data" / "galaxies.parquet"
RA, DEC = np.linspace(0, 300, COUNT), np.linspace(-20, 20, COUNT)


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return structured_images(seed=0)


def structured_images(seed: int) -> np.ndarray:
    """(COUNT, SIZE, SIZE, 3) uint8: smoothed noise, which has structure at all the scales that a hash looks at."""
    noise = np.random.default_rng(seed).normal(size=(COUNT, SIZE, SIZE, 3))
    smooth = gaussian_filter(noise, (0, 2, 2, 0))
    return np.uint8(128 + 40 * (smooth / smooth.std()).clip(-3, 3))


@pytest.fixture(scope="module")
def pretraining(images, tmp_path_factory) -> tuple[pa.Table, np.ndarray]:
    """The catalogue of a pre-training, and which rows it used."""
    path = write_hdf5(tmp_path_factory.mktemp("pretraining") / "a.h5", images, ra=RA, dec=DEC)
    galaxies = open_galaxies(str(path))
    split = split_galaxies(galaxies)
    used = np.zeros(COUNT, bool)
    used[split["train"]] = used[split["validation"]] = True
    assert 0 < used.sum() < COUNT
    return pretraining_catalogue(galaxies, split), used


def jpeg(image: np.ndarray, size: int, quality: int) -> np.ndarray:
    encoded = io.BytesIO()
    Image.fromarray(image).resize((size, size)).save(encoded, "JPEG", quality=quality)
    return np.asarray(Image.open(encoded))


POSITIONS = {"ra": RA, "dec": DEC}
COPIES = {
    "shuffled": (lambda image: image, {}, "identical_pixels"),
    "compressed again, with positions": (lambda image: jpeg(image, SIZE, 50), POSITIONS, "overlapping_cutouts"),
    "half the size, no positions": (lambda image: jpeg(image, SIZE // 2, 75), {}, "similar_images"),
    "twice the size, no positions": (lambda image: jpeg(image, SIZE * 2, 90), {}, "similar_images"),
    "mirrored, no positions": (lambda image: image[::-1], {}, "similar_images"),
    "turned, no positions": (lambda image: np.rot90(image), {}, "similar_images"),
}


@pytest.mark.parametrize(("copy", "columns", "criterion"), COPIES.values(), ids=COPIES)
def test_exactly_the_galaxies_of_the_pretraining_are_found(images, pretraining, tmp_path, copy, columns, criterion):
    catalogue, used = pretraining
    order = np.random.default_rng(0).permutation(COUNT)
    copies = np.stack([copy(images[row]) for row in order])
    shuffled = {name: values[order] for name, values in columns.items()}
    path = write_hdf5(tmp_path / "b.h5", copies, np.zeros(COUNT), **shuffled)
    found = find_seen_galaxies(open_galaxies(str(path)), np.arange(COUNT), catalogue)
    assert np.array_equal(found["seen"], used[order])
    assert np.array_equal(found[criterion], used[order])


def test_same_place_is_found_within_a_cutout_and_not_beyond(pretraining, tmp_path):
    """Other images of the same places, such as another survey's."""
    catalogue, used = pretraining
    for shift, expected in ((30 / 3600, used), (300 / 3600, np.zeros(COUNT, bool))):
        path = write_hdf5(tmp_path / f"{shift}.h5", structured_images(seed=5), ra=RA, dec=DEC + shift)
        found = find_seen_galaxies(open_galaxies(str(path)), np.arange(COUNT), catalogue)
        assert np.array_equal(found["overlapping_cutouts"], expected)
        assert np.array_equal(found["seen"], expected)


def test_galaxy_without_position_is_compared_by_its_image(images, pretraining, tmp_path):
    catalogue, used = pretraining
    ra = np.where(np.arange(COUNT) % 2, RA, np.nan)
    path = write_hdf5(tmp_path / "b.h5", np.stack([jpeg(x, SIZE, 90) for x in images]), ra=ra, dec=DEC)
    found = find_seen_galaxies(open_galaxies(str(path)), np.arange(COUNT), catalogue)
    assert np.array_equal(found["overlapping_cutouts"], used & np.isfinite(ra))
    assert np.array_equal(found["similar_images"], used & np.isnan(ra))


def test_synthetic_positions_are_not_on_the_sky(tmp_path):
    """Synthetic galaxies are found among synthetic ones, also at another size, and never at a real position."""
    galaxies = open_galaxies("synthetic:40", 32)
    catalogue = pretraining_catalogue(galaxies, {"train": np.arange(30), "validation": np.arange(30, 40)})
    larger = open_galaxies("synthetic:50", 48)
    assert np.flatnonzero(find_seen_galaxies(larger, np.arange(50), catalogue)["seen"]).tolist() == list(range(40))
    sky = {"ra": galaxies.ra, "dec": galaxies.dec}
    real = open_galaxies(str(write_hdf5(tmp_path / "real.h5", random_images(40), **sky)))
    assert not find_seen_galaxies(real, np.arange(40), catalogue)["seen"].any()


@pytest.mark.slow
@pytest.mark.skipif(not REAL.is_file(), reason=f"{REAL.name} of shared/data is absent")
def test_perceptual_hash_tells_real_galaxies_apart():
    """Copies of a thousand real galaxies are recognized, and no two galaxies are taken for the same."""
    table = pq.read_table(REAL, columns=["image"]).slice(0, 1000)
    encoded = [row["bytes"] for row in table["image"].to_pylist()]
    images = [np.asarray(Image.open(io.BytesIO(content)).convert("RGB")) for content in encoded]
    hashes = perceptual_hashes(images).view(np.uint64)
    copies = perceptual_hashes([jpeg(image, 96, 60) for image in images]).view(np.uint64)
    distance = np.stack([np.bitwise_count(row ^ copies).sum(axis=1) for row in hashes])
    assert np.mean(distance.diagonal() <= MAX_HASH_DISTANCE) > 0.98
    np.fill_diagonal(distance, 256)
    assert distance.min() > MAX_HASH_DISTANCE

"""The split: no overlap between its parts, no conflicting labels, and every class at the given fractions."""

import csv
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import SHARED, random_images, write_hdf5

from galaxy_mae.data.__main__ import describe, main
from galaxy_mae.data.cache import open_galaxies
from galaxy_mae.data.split import (
    FRACTIONS,
    SPLITS,
    check_split_sizes,
    split_fingerprint,
    split_galaxies,
)
from galaxy_mae.errors import UserError

CUTOUT = 256 * 0.262  # arcsec


class Catalogue(SimpleNamespace):
    """What a split depends on, without images."""

    def __len__(self) -> int:
        return len(self.label)


def split_catalogue(labels, ra=None, dec=None, seed=0, **columns) -> dict[str, np.ndarray]:
    count = len(labels)
    columns = {"image_hash": np.arange(count), "predefined_test": np.zeros(count, bool), "pixel_scale": None} | columns
    known = {
        "label": labels,
        "ra": ra,
        "dec": dec,
        "native_size": 256,
        "geometry": None,
        "blank": np.zeros(count, bool),
    }
    return split_galaxies(Catalogue(**known, **columns), seed)


def part_of_each_row(split: dict[str, np.ndarray], count: int) -> np.ndarray:
    """(count,) index into SPLITS for each row, -1 if it was dropped. Fails if a row is in no part or in two."""
    part = np.full(count, -2)
    for number, name in [(-1, "dropped"), *enumerate(SPLITS)]:
        assert np.all(part[split[name]] == -2)
        part[split[name]] = number
    assert np.all(part > -2)
    return part


def squares_overlap(ra, dec, i, j) -> bool:
    """Whether two cut-outs aligned with the equator overlap, by their offsets in arcsec."""
    east = (ra[i] - ra[j] + 180) % 360 - 180
    return max(abs(east * np.cos(np.radians(dec[i]))), abs(dec[i] - dec[j])) * 3600 < CUTOUT


def check_split(labels, ra, dec, seed):
    """Check a split with an independent search for overlaps: over neighbours in declination. Returns the split."""
    split = split_catalogue(labels, ra, dec, seed=seed)
    part = part_of_each_row(split, len(labels))
    order = np.argsort(dec)
    between_parts = overlapping = conflicting = 0
    for position, i in enumerate(order):
        for j in order[position + 1 :]:
            if (dec[j] - dec[i]) * 3600 >= CUTOUT:
                break
            if squares_overlap(ra, dec, i, j):
                overlapping += 1
                between_parts += part[i] != part[j] and part[i] >= 0 and part[j] >= 0
                same_position = ra[i] == ra[j] and dec[i] == dec[j]
                conflicting += same_position and labels[i] != labels[j] and max(part[i], part[j]) >= 0
    assert overlapping > 0
    assert between_parts == 0
    assert conflicting == 0
    used = labels[part >= 0]
    for number, fraction in enumerate(FRACTIONS):
        of_class = np.bincount(labels[part == number], minlength=10) / np.bincount(used, minlength=10)
        assert np.all(np.abs(of_class - fraction) < 0.01)
    return split


@pytest.fixture
def crowded():
    """A catalogue where many cut-outs overlap, also across ra = 0 and near a pole, and some objects are there twice."""
    rng = np.random.default_rng(1)
    ra, dec = rng.uniform(0, 360, 4000), np.degrees(np.arcsin(rng.uniform(-1, 1, 4000)))
    labels = rng.integers(0, 10, 4000)
    first, second = np.arange(0, 300), np.arange(300, 600)
    dec[first[:20]], ra[first[20:40]] = 89.9, 359.9999
    ra[second] = (ra[first] + rng.uniform(-70, 70, 300) / 3600 / np.cos(np.radians(dec[first]))) % 360
    dec[second] = np.clip(dec[first] + rng.uniform(-70, 70, 300) / 3600, -90, 90)
    ra[second[:80]], dec[second[:80]] = ra[first[:80]], dec[first[:80]]
    return labels, ra, dec


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_overlapping_cutouts_are_in_the_same_part(crowded, seed):
    check_split(*crowded, seed)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_split_of_the_real_coordinates(seed):
    path = SHARED / "data" / "galaxy10_coordinates.csv"
    if not path.exists():
        pytest.skip("Galaxy10's coordinates are missing (shared/data/galaxy10_coordinates.csv)")
    with path.open() as file:
        table = list(csv.DictReader(file))
    labels = np.array([int(row["label"]) for row in table])
    ra, dec = (np.array([float(row[name]) for row in table]) for name in ("ra", "dec"))
    split = check_split(labels, ra, dec, seed)
    assert {name: len(indices) for name, indices in split.items()} == {
        "train": 14094,
        "validation": 1762,
        "test": 1762,
        "dropped": 118,
    }


def test_split_is_a_function_of_catalogue_and_seed(crowded):
    first, again, other = (split_catalogue(*crowded, seed=seed) for seed in (3, 3, 4))
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert not np.array_equal(first["test"], other["test"])
    assert split_fingerprint(first) == split_fingerprint(again) != split_fingerprint(other)


def test_maximum_separation_grows_with_the_pixel_scale():
    labels, dec = np.zeros(200, int), np.zeros(200)
    ra = np.repeat(np.arange(100), 2) + np.tile([0, 100 / 3600], 100)  # pairs, 100 arcsec apart
    for scale, linked in ((0.262, False), (0.524, True)):
        part = part_of_each_row(split_catalogue(labels, ra, dec, pixel_scale=np.full(200, scale)), 200)
        assert np.all(part[::2] == part[1::2]) == linked


def test_identical_and_blank_images(tmp_path):
    images = random_images(300)
    label = np.sort(np.arange(300) % 10)
    images[1] = images[0]  # identical pixels with the same label
    images[299] = images[2]  # identical pixels with two labels, classes 0 and 9
    images[150] = 32  # blank
    galaxies = open_galaxies(str(write_hdf5(tmp_path / "survey.h5", images, label)))
    part = part_of_each_row(split_galaxies(galaxies), 300)
    assert part[0] == part[1] >= 0
    assert np.flatnonzero(part < 0).tolist() == [2, 150, 299]
    text = describe(galaxies, split_galaxies(galaxies))
    assert "1 blank images; 2 repeats of identical pixels" in text
    assert "1 pairs of one object with conflicting labels" in text


def test_all_rows_of_a_group_with_identical_pixels_are_dropped_if_two_labels_conflict():
    labels = np.arange(100) % 2
    image_hash = np.arange(100, dtype=np.uint64)
    image_hash[[10, 20, 31, 50]] = 10  # labels 0, 0, 1, 0
    split = split_catalogue(labels, image_hash=image_hash)
    assert split["dropped"].tolist() == [10, 20, 31, 50]


def test_predefined_test_split_is_kept_and_not_trained_on():
    labels = np.arange(400) % 10
    predefined = np.arange(400) >= 350
    image_hash = np.arange(400, dtype=np.uint64)
    image_hash[7] = image_hash[357]  # identical to a test image of the same class
    split = split_catalogue(labels, image_hash=image_hash, predefined_test=predefined)
    part_of_each_row(split, 400)
    assert split["test"].tolist() == list(range(350, 400))
    assert split["dropped"].tolist() == [7]
    assert abs(len(split["validation"]) / 350 - 1 / 9) < 0.01


@pytest.mark.parametrize(
    ("train", "validation", "message"),
    [
        (0, 0, "no training galaxies: .* or all are test galaxies by their names"),
        (15, 2, "15 training galaxies are fewer than a batch of 16"),
        (16, 0, "validation"),
    ],
)
def test_too_small_splits_raise_user_error(train, validation, message):
    check_split_sizes(16, 1, batch_size=16)
    with pytest.raises(UserError, match=message):
        check_split_sizes(train, validation, batch_size=16)


def test_command_describes_a_dataset_and_plots_a_contact_sheet(tmp_path, small_hdf5, capsys):
    main([str(small_hdf5), "--contact_sheet", str(tmp_path / "sheet.png")])
    text = capsys.readouterr().out
    assert "200 images of 32 x 32" in text
    assert "3 class 3" in text
    assert (tmp_path / "sheet.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--image_size", "0"], "--image_size 0"),
        (["--split_seed", "-1"], "--split_seed -1"),
        (["--contact_sheet", "sheet.jpg"], "--contact_sheet sheet.jpg"),
    ],
)
def test_wrong_flags_of_the_command_raise_user_error(small_hdf5, flags, message):
    with pytest.raises(UserError, match=message):
        main([str(small_hdf5), *flags])

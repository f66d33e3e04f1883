"""The split is honest: no sky and no pixel on both sides, no contradiction keeps a label, every class its share."""

import csv

import numpy as np
import pytest
from conftest import SHARED, random_images, write_hdf5

from galaxy_mae.galaxy10 import PARTS, SHARES, describe, main, split_galaxies, split_rows
from galaxy_mae.sources import open_galaxies

CUTOUT = 256 * 0.262  # arcsec


def parts_of(rows: dict[str, np.ndarray], count: int) -> np.ndarray:
    """(count,) the part's number of each row, -1 where dropped; fails if a row stands in no part or in two."""
    part = np.full(count, -2)
    for number, name in [(-1, "dropped"), *enumerate(PARTS)]:
        assert np.all(part[rows[name]] == -2)
        part[rows[name]] = number
    assert np.all(part > -2)
    return part


def squares_overlap(ra, dec, i, j) -> bool:
    """Whether two cut-outs aligned with the equator overlap, by their offsets in arcsec."""
    east = (ra[i] - ra[j] + 180) % 360 - 180
    return max(abs(east * np.cos(np.radians(dec[i]))), abs(dec[i] - dec[j])) * 3600 < CUTOUT


def check_split(labels, ra, dec, seed):
    rows = split_rows(labels, ra, dec, seed=seed)
    part = parts_of(rows, len(labels))
    # Neighbours in declination, and across the meridian of 0 degrees: an independent search for overlaps.
    order = np.argsort(dec)
    straddling = overlapping = contradicting = 0
    for position, i in enumerate(order):
        for j in order[position + 1 :]:
            if (dec[j] - dec[i]) * 3600 >= CUTOUT:
                break
            if squares_overlap(ra, dec, i, j):
                overlapping += 1
                straddling += part[i] != part[j] and part[i] >= 0 and part[j] >= 0
                same_place = ra[i] == ra[j] and dec[i] == dec[j]
                contradicting += same_place and labels[i] != labels[j] and max(part[i], part[j]) >= 0
    assert overlapping > 0
    assert straddling == 0
    assert contradicting == 0
    used = labels[part >= 0]
    for number, share in enumerate(SHARES):
        of_class = np.bincount(labels[part == number], minlength=10) / np.bincount(used, minlength=10)
        assert np.all(np.abs(of_class - share) < 0.01)
    return rows


@pytest.fixture
def crowded():
    """A sky where many cut-outs overlap, also across ra = 0 and near a pole, and some objects stand twice."""
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
def test_no_overlap_straddles_two_parts(crowded, seed):
    check_split(*crowded, seed)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_split_of_the_real_coordinates(seed):
    path = SHARED / "data" / "galaxy10_coordinates.csv"
    if not path.exists():
        pytest.skip("the coordinates of Galaxy10's rows are not here (shared/data/galaxy10_coordinates.csv)")
    with path.open() as file:
        table = list(csv.DictReader(file))
    labels = np.array([int(row["label"]) for row in table])
    ra, dec = (np.array([float(row[name]) for row in table]) for name in ("ra", "dec"))
    rows = check_split(labels, ra, dec, seed)
    assert {name: len(found) for name, found in rows.items()} == {
        "train": 14094,
        "validation": 1762,
        "test": 1762,
        "dropped": 118,
    }


def test_split_is_a_function_of_catalogue_and_seed(crowded):
    once, again, other = (split_rows(*crowded, seed=seed) for seed in (3, 3, 4))
    assert all(np.array_equal(once[name], again[name]) for name in once)
    assert not np.array_equal(once["test"], other["test"])


def test_large_cutouts_reach_further():
    labels, dec = np.zeros(200, int), np.zeros(200)
    ra = np.repeat(np.arange(100), 2) + np.tile([0, 100 / 3600], 100)  # pairs, 100 arcsec apart
    for scale, linked in ((0.262, False), (0.524, True)):
        part = parts_of(split_rows(labels, ra, dec, pixel_scale=scale), 200)
        assert np.all(part[::2] == part[1::2]) == linked


def test_pixels_that_repeat_or_show_nothing(tmp_path):
    images = random_images(300)
    label = np.sort(np.arange(300) % 10)
    images[1] = images[0]  # twice under one label
    images[299] = images[2]  # under two labels, classes 0 and 9
    images[150] = 32  # shows nothing
    galaxies = open_galaxies(str(write_hdf5(tmp_path / "traps.h5", images, label)))
    part = parts_of(split_galaxies(galaxies), 300)
    assert part[0] == part[1] >= 0
    assert np.flatnonzero(part < 0).tolist() == [2, 150, 299]
    text = describe(galaxies, split_galaxies(galaxies))
    assert "1 constant images; 2 repeats of identical pixels" in text
    assert "1 pairs of one object under two labels" in text


def test_own_test_set_is_kept_and_not_trained_on():
    labels = np.arange(400) % 10
    own = np.arange(400) >= 350
    pixels = np.arange(400, dtype=np.uint64)
    pixels[7] = pixels[357]  # a training row repeats a test row of the same class
    rows = split_rows(labels, image_hash=pixels, source_test=own)
    parts_of(rows, 400)
    assert rows["test"].tolist() == list(range(350, 400))
    assert rows["dropped"].tolist() == [7]
    assert abs(len(rows["validation"]) / 350 - 1 / 9) < 0.01


def test_command_describes_and_draws(tmp_path, small_hdf5, capsys):
    main([str(small_hdf5), "--contact_sheet", str(tmp_path / "sheet.png")])
    text = capsys.readouterr().out
    assert "200 images of 32 x 32" in text
    assert "In-between Round Smooth" in text
    assert (tmp_path / "sheet.png").read_bytes().startswith(b"\x89PNG")

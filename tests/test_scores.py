"""Scores: intervals against published and simulated values, paired tests against the binomial, means by hand."""

import numpy as np
import pytest

from galaxy_mae.evaluation.scores import accuracy, all_scores, gain, mcnemar, wilson


@pytest.mark.parametrize(
    ("correct", "count", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_equals_the_published_intervals(correct, count, low, high):
    """Newcombe 1998, Statistics in Medicine 17, 857, table I, method 3."""
    assert wilson(correct / count, count) == pytest.approx((low, high), abs=5e-5)


def simulate_predictions(rng, galaxies: int, seeds: int, spread: float, mean: float = 0.6):
    """Labels all 0 and predictions of seeds whose true accuracies scatter around `mean`."""
    each = rng.normal(mean, spread, seeds)
    return np.zeros(galaxies, int), (rng.random((seeds, galaxies)) > each[:, None]).astype(int)


@pytest.mark.parametrize(
    ("galaxies", "seeds", "spread"), [(200, 1, 0.0), (200, 3, 0.0), (2000, 3, 0.03), (500, 10, 0.05)]
)
def test_interval_of_an_accuracy_covers_the_true_value(galaxies, seeds, spread):
    """In about 95 % of simulations or more, whichever uncertainty dominates; with one seed, not in many more."""
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(1000):
        estimate = accuracy(*simulate_predictions(rng, galaxies, seeds, spread))
        hits += estimate.low <= 0.6 <= estimate.high
    assert hits > 935
    if seeds == 1:
        assert hits < 970


def test_spread_between_seeds_widens_the_interval():
    label = np.zeros(1000, int)
    equal = np.tile(np.arange(1000) >= 600, (3, 1)).astype(int)
    unequal = np.stack([np.arange(1000) >= n for n in (500, 600, 700)]).astype(int)
    without_spread, with_spread = accuracy(label, equal), accuracy(label, unequal)
    assert without_spread.value == with_spread.value == 0.6
    assert (without_spread.low, without_spread.high) == pytest.approx(wilson(0.6, 1000))
    assert with_spread.high - with_spread.low > 5 * (without_spread.high - without_spread.low)


def test_gain_covers_the_true_value_and_uses_the_pairing():
    """If two classifiers fail on the same galaxies, the gain is known better than each accuracy."""
    rng = np.random.default_rng(0)
    label, hits = np.zeros(400, int), 0
    for _ in range(500):
        hard = rng.random(400)
        baseline, better = (hard > 0.55).astype(int)[None], (hard > 0.6).astype(int)[None]
        difference = gain(label, better, baseline)
        hits += difference.low <= 0.05 <= difference.high
    assert 460 < hits < 492
    unpaired = accuracy(label, better)
    assert difference.high - difference.low < 0.6 * (unpaired.high - unpaired.low)


def test_mcnemar_is_the_exact_binomial_test_of_the_pair_with_the_largest_p():
    label = np.zeros(20, int)
    baseline = np.array([[1] * 10 + [0] * 10])
    nine_to_one = np.array([0] * 9 + [1] + [1] + [0] * 9)  # corrects 9 errors, adds 1
    eight_to_two = np.array([0] * 8 + [1] * 2 + [1] * 2 + [0] * 8)
    result = mcnemar(label, nine_to_one[None], baseline)
    assert (result["only_this"], result["only_baseline"]) == (9, 1)
    assert result["p_value"] == pytest.approx(2 * (1 + 10) / 2**10)
    both = mcnemar(label, np.stack([nine_to_one, eight_to_two]), baseline)
    assert both == {"only_this": 8, "only_baseline": 2, "p_value": pytest.approx(0.109375), "num_seed_pairs": 2}
    assert mcnemar(label, baseline, baseline)["p_value"] == 1


def test_all_scores_by_hand():
    label = np.array([0, 0, 0, 0, 1, 1])  # no galaxy of class 2
    predicted = np.array([[0, 0, 0, 2, 1, 0], [0, 0, 0, 0, 1, 1]])
    scores = all_scores(label, predicted, ("a", "b", "c"))
    assert scores["accuracy_per_seed"] == pytest.approx([4 / 6, 1])
    assert scores["accuracy"] == pytest.approx(5 / 6)
    assert scores["balanced_accuracy"] == pytest.approx(((3 / 4 + 1 / 2) / 2 + 1) / 2)
    assert scores["macro_f1"] == pytest.approx(((3 / 4 + 2 / 3) / 2 + 1) / 2)
    assert scores["per_class"]["a"] == {
        "precision": pytest.approx((3 / 4 + 1) / 2),
        "recall": pytest.approx((3 / 4 + 1) / 2),
        "f1": pytest.approx((3 / 4 + 1) / 2),
        "test_images": 4,
    }
    assert scores["per_class"]["c"]["test_images"] == 0
    assert scores["confusion_matrix"] == [[7, 0, 1], [1, 3, 0], [0, 0, 0]]
    assert scores["test_images"] == 6

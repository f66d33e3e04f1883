"""Scores: intervals against published and simulated values, paired tests against the binomial, means by hand."""

import itertools
import json
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
from scipy import stats

from galaxy_mae.evaluation.methods import BY_NAME
from galaxy_mae.evaluation.results import Fit, ResultWriter
from galaxy_mae.evaluation.scores import accuracy, all_scores, gain, mcnemar, per_class_estimates, tango, wilson
from galaxy_mae.reports.report import write_report


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


def paired_predictions(both: int, only_this: int, only_baseline: int, neither: int):
    """Labels and predictions, one seed on each side, with these numbers of galaxies that each side gets right."""
    counts = (both, only_this, only_baseline, neither)
    this, baseline = np.repeat([0, 0, 1, 1], counts), np.repeat([0, 1, 0, 1], counts)
    return np.zeros(sum(counts), int), this[None], baseline[None]


def test_interval_of_a_gain_equals_the_published_one():
    """Tango's interval in the tests of R's contingencytables (of Fagerland, Lydersen and Laake 2017, chapter 8).

    Complete response before and after consolidation therapy (Cavo et al. 2012).
    """
    estimate = gain(*paired_predictions(59, 6, 16, 80))
    assert estimate == pytest.approx((-0.0621, -0.1240, -0.0054), abs=5e-5)


@pytest.mark.parametrize("galaxies", [1, 2, 5, 7])
def test_interval_of_a_gain_has_a_width_whatever_the_test_set(galaxies):
    """For every table of counts; where 0 is left out, McNemar's asymptotic test rejects."""
    for counts in itertools.product(range(galaxies + 1), repeat=4):
        if sum(counts) != galaxies:
            continue
        label, this, baseline = paired_predictions(*counts)
        value, low, high = gain(label, this, baseline)
        assert -1 <= low <= value <= high <= 1
        assert high - low > 0.4
        assert gain(label, baseline, this) == pytest.approx((-value, -high, -low))
        b, c = counts[1:3]
        assert (low > 0 or high < 0) == ((b - c) ** 2 > stats.norm.ppf(0.975) ** 2 * (b + c))


@pytest.mark.parametrize("galaxies", [5, 10])
def test_interval_of_a_gain_covers_the_true_value_in_small_test_sets(galaxies):
    """Exactly, from the probability of each table of counts, for equal and unequal accuracies up to 100 %."""
    tables = [t for t in itertools.product(range(galaxies + 1), repeat=3) if sum(t) <= galaxies]
    intervals = {t[:2]: tango(t[0] / galaxies, t[1] / galaxies, galaxies) for t in tables}
    low, high = np.array([intervals[t[:2]] for t in tables]).T
    coverages = []
    for one, other in itertools.product((0.1, 0.5, 0.64, 0.77, 0.95, 1.0), repeat=2):
        for overlap in (0.0, 0.5, 0.9):  # from independent galaxies to galaxies that are hard for both
            both = one * other + overlap * (min(one, other) - one * other)
            probabilities = np.clip([one - both, other - both, both, 1 - one - other + both], 0, 1)
            counts = [(*t, galaxies - sum(t)) for t in tables]
            weights = stats.multinomial.pmf(counts, galaxies, probabilities / probabilities.sum())
            covered = (low <= one - other + 1e-9) & (one - other - 1e-9 <= high)
            coverages.append(weights[covered].sum())
    assert min(coverages) > 0.91
    assert 0.95 < np.mean(coverages) < 0.99


@pytest.mark.parametrize(("seeds", "seeds_baseline"), [(2, 2), (3, 3), (2, 10)])
@pytest.mark.parametrize(("galaxies", "spread"), [(5, 0.03), (500, 0.1)])
def test_interval_of_a_gain_covers_the_true_value_over_seeds(galaxies, spread, seeds, seeds_baseline):
    """Galaxies are hard or easy for both methods and all seeds; seeds add a spread of their own."""
    rng = np.random.default_rng(0)
    label, hits, true_accuracy = np.zeros(galaxies, int), 0, (0.8, 0.65)
    for _ in range(400):
        hard = rng.standard_normal(galaxies)
        sides = []
        for mean, number in zip(true_accuracy, (seeds, seeds_baseline), strict=True):
            score = np.sqrt(0.6) * hard + np.sqrt(0.4) * rng.standard_normal((number, galaxies))
            limits = stats.norm.ppf(rng.uniform(mean - spread, mean + spread, number))
            sides.append((score > limits[:, None]).astype(int))
        difference = gain(label, *sides)
        hits += difference.low <= 0.15 <= difference.high
    assert hits > 376


def test_interval_of_a_gain_in_a_large_test_set_is_that_of_the_normal_distribution():
    label, this, baseline = paired_predictions(1000, 500, 300, 200)
    difference = (this == label)[0].astype(float) - (baseline == label)[0]
    half = 1.96 * difference.std(ddof=1) / np.sqrt(len(label))
    assert gain(label, this, baseline) == pytest.approx((0.1, 0.1 - half, 0.1 + half), abs=2e-4)


@pytest.mark.parametrize("galaxies", [1, 2, 7, 12, 750])  # 7 and 12: rounding put the end on the wrong side
@pytest.mark.parametrize("correct", [0.0, 1.0])
@pytest.mark.parametrize("seeds", [1, 2])
def test_interval_of_an_accuracy_of_0_or_100_percent(galaxies, correct, seeds):
    estimate = accuracy(np.zeros(galaxies, int), np.full((seeds, galaxies), 1 - int(correct)))
    assert 0 <= estimate.low <= estimate.value == correct <= estimate.high <= 1
    assert estimate.high - estimate.low > 0.005
    low, high = wilson(correct, galaxies)
    assert low <= correct <= high  # matplotlib takes no error bar of negative length


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


@pytest.mark.parametrize(
    ("predicted_random", "predicted_ssl", "verb"),
    [
        ([[0]], [[0]], "does not measurably change"),  # one test galaxy
        ([[1], [1]], [[0], [0]], "does not measurably change"),
        ([[0] * 5], [[0] * 5], "does not measurably change"),  # all differences are equal
        ([[1] * 12], [[0] * 12], "raises"),
    ],
)
def test_report_of_a_tiny_test_set_claims_no_more_than_its_interval(
    tmp_path, capsys, predicted_random, predicted_ssl, verb
):
    count, names = len(predicted_ssl[0]), ("a", "<img src=x> | *b* [c](d) __e_f")
    galaxies = SimpleNamespace(name="d", fingerprint="0", label=np.zeros(count, int), class_names=names)
    galaxies.ra = galaxies.dec = galaxies.object_id = galaxies.nan_fraction = galaxies.geometry = None
    galaxies.extra = pa.table({})
    galaxies.problem, galaxies.blank = np.full(count, "", object), np.zeros(count, bool)
    galaxies.pixels = np.zeros((count, 8, 8, 3), np.uint8)
    model = {"num_parameters": 1, "hidden_size": 1, "num_hidden_layers": 1, "patch_size": 1, "image_size": 1}
    config = {"dataset": "0", "split": "0", "encoder": "0", "recipe": {}, "model": model, "pretraining": None}
    config |= {"class_names": list(names), "encoder_name": "e", "dataset_name": "d"}
    config |= {"split_sizes": {"train": 9, "test": len(galaxies.label)}, "hub_ids": {"dataset": None, "encoder": None}}
    (tmp_path / "evaluation.json").write_text(json.dumps(config))
    writer = ResultWriter(tmp_path, galaxies, np.arange(len(galaxies.label)), config)
    methods = {"random_linear_probe": predicted_random, "resnet18_from_scratch": predicted_random}
    methods |= {"ssl_linear_probe": predicted_ssl, "ssl_fine_tune": predicted_ssl}
    for name, predicted in methods.items():
        fits = [Fit.of(seed, np.eye(2)[p], {"temperature": 1.0}) for seed, p in enumerate(predicted)]
        writer.write(name, {(BY_NAME[name].classifier, count): fits}, {})
    write_report(tmp_path)
    report = (tmp_path / "report.md").read_text()
    assert f"Pre-training {verb} the accuracy of the linear probe" in report
    compared = "is more accurate than" if verb == "raises" else "does not differ measurably from"
    assert f"Fine-tuning the pre-trained encoder {compared} training a ResNet-18 from scratch: " in report
    assert "Recall is 100 % for every class of the test set; it makes no error." in report
    assert "nan" not in report
    assert r"| \<img src=x\> \| \*b\* \[c\](d) \_\_e_f |" in report
    assert names[1] not in report


def test_scores_of_classes_have_intervals_that_cover_the_true_values():
    """Of one seed, in about 95 % of simulations; none where there is no galaxy to judge by."""
    rng = np.random.default_rng(0)
    confusion = np.array([[0.30, 0.10, 0.05], [0.08, 0.22, 0.05], [0.05, 0.05, 0.10]])  # true class by predicted class
    hit, true, guessed = np.diag(confusion), confusion.sum(axis=1), confusion.sum(axis=0)
    expected = np.stack([hit / guessed, hit / true, 2 * hit / (true + guessed)], axis=1)
    covered = np.zeros((3, 3))
    for _ in range(300):
        label, predicted = np.divmod(rng.choice(9, 400, p=confusion.ravel()), 3)
        found = per_class_estimates(label, predicted[None], 3)
        low, high = (np.array([[getattr(x, end) for x in scores] for scores in found]) for end in ("low", "high"))
        covered += (low <= expected) & (expected <= high)
    assert covered.min() > 0.91 * 300
    assert covered.mean() < 0.975 * 300


def test_scores_of_classes_are_means_over_seeds_whose_spread_widens_the_intervals():
    label = np.repeat([0, 1], 50)
    same = np.tile(np.where(np.arange(100) % 5 == 0, 1 - label, label), (2, 1))
    other = np.stack([label, np.where(np.arange(100) % 5 < 2, 1 - label, label)])
    narrow, wide = (per_class_estimates(label, x, 4)[0] for x in (same, other))
    assert [x.value for x in narrow] == pytest.approx([0.8] * 3)
    assert narrow[1][1:] == pytest.approx(wilson(0.8, 50))
    assert wide[1].value == pytest.approx(0.8)
    assert wide[1].high - wide[1].low > 2 * (narrow[1].high - narrow[1].low)
    assert per_class_estimates(label, same, 4)[3] == (None, None, None)
    never = per_class_estimates(label, np.zeros((1, 100), int), 2)[1]
    assert never[0] is None
    assert (never[1].value, never[2].value) == (0, 0)

"""Few labels: the subsets, how many labels pre-training is worth, and what the evaluation writes about it."""

import json
import re
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pyarrow.parquet as pq
import pytest
from test_linear_probe_checkpoints import (
    check_only_labels_differ,
    command,
    encoder,
    error_line,
    report_command,
    result,
    run,
    survey,
    write_survey,
)

import linear_probe_checkpoints
from galaxy_mae.data.cache import open_galaxies
from galaxy_mae.data.split import split_galaxies
from galaxy_mae.evaluation import few_labels, fine_tuning, probes
from galaxy_mae.evaluation import run as run_module
from galaxy_mae.evaluation.few_labels import (
    label_subsets,
    labels_at_accuracy,
    stratified_order,
    value_of_pretraining,
)
from galaxy_mae.evaluation.methods import BY_NAME, METHODS
from galaxy_mae.evaluation.results import few_labels_name
from galaxy_mae.evaluation.scores import Estimate, percent

__all__ = ["encoder", "survey"]  # fixtures
RNG = np.random.default_rng(3)
LABEL = RNG.permutation(np.repeat(np.arange(5), [3, 20, 77, 300, 600]))
TRAIN = np.sort(RNG.permutation(5000)[:1000])


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID", raising=False)
    monkeypatch.setattr(probes, "ATTENTION_EPOCHS", 1)


# ---------------------------------------------------------------------------------------------------------- the subsets


def test_subsets_of_a_draw_are_nested_and_stratified():
    subsets = label_subsets(TRAIN, LABEL, [1000, 10, 30, 100, 300, 1], seed=0)
    assert [(len(s.rows), s.draw) for s in subsets] == [
        (size, draw)
        for size, draws in ((5, 5), (10, 5), (30, 5), (100, 3), (300, 3), (1000, 1))
        for draw in range(draws)
    ]
    smaller: dict[int, set[int]] = {}
    for subset in subsets:
        rows = set(subset.rows.tolist())
        assert len(rows) == len(subset.rows)
        assert smaller.get(subset.draw, set()) <= rows <= set(TRAIN.tolist())
        smaller[subset.draw] = rows
        counts = np.bincount(LABEL[np.searchsorted(TRAIN, subset.rows)], minlength=5)
        share = np.bincount(LABEL) * len(rows) / len(TRAIN)
        assert counts.min() >= 1
        if len(rows) >= 100:
            assert np.all(np.abs(counts - np.maximum(share, 1)) <= 1.5)  # two classes have their first galaxy early
    assert np.array_equal(subsets[-1].rows, TRAIN)


def test_subsets_are_functions_of_the_seed_alone():
    one, again, other = (label_subsets(TRAIN, LABEL, [100], seed) for seed in (1, 1, 2))
    assert all(np.array_equal(a.rows, b.rows) for a, b in zip(one, again, strict=True))
    assert not any(np.array_equal(a.rows, b.rows) for a, b in zip(one, other, strict=True))
    assert len({a.rows.tobytes() for a in one}) == 3
    assert sorted(stratified_order(LABEL, 0, 0)) == list(range(1000))


# --------------------------------------------------------------------------------------------------------- the sentence


def test_labels_at_an_accuracy_are_interpolated_log_linearly():
    assert labels_at_accuracy([10, 100, 1000], [0.2, 0.4, 0.6], 0.5) == pytest.approx(10**2.5)
    assert labels_at_accuracy([10, 100, 1000], [0.2, 0.4, 0.6], 0.2) == 10
    assert labels_at_accuracy([10, 100, 1000], [0.2, 0.1, 0.6], 0.6) == pytest.approx(1000)
    assert labels_at_accuracy([10, 100], [0.2, 0.4], 0.41) is None
    assert labels_at_accuracy([10, 100], [0.2, 0.4], 0.19) is None


@pytest.mark.parametrize(
    ("random", "ssl", "expected"),
    [
        ([0.2, 0.4, 0.6], [0.4, 0.6, 0.8], "is worth 10 times the labels (10 labels reach what 100 do"),
        ([0.2, 0.4, 0.6], [0.3, 0.6, 0.8], "is worth 3.2 to 10 times the labels"),
        ([0.2, 0.4, 0.6], [0.15, 0.3, 0.4], "is worth 0.1 to 0.32 times the labels"),
        ([0.2, 0.3, 0.4], [0.5, 0.6, 0.7], "worth more than 100 times the labels: 10 labels reach more (50.0 %)"),
        ([0.5, 0.6, 0.7], [0.1, 0.2, 0.3], "cannot be computed"),
    ],
)
def test_value_of_pretraining(random, ssl, expected):
    assert expected in value_of_pretraining([10, 100, 1000], random, ssl)


# ------------------------------------------------------------------------------------------------------- the evaluation


def run_few_labels(encoder: Path, survey: Path, transfer: Path, folder: Path) -> None:
    flags = ["--label_fractions", "1", "0.05", "0.3", "--transfer", str(transfer)]
    for weights in ("random", "ssl"):
        run(command(encoder, survey, folder, "--method", f"{weights}_linear_probe", *flags))


def few_labels_files(folder: Path) -> list[str]:
    return sorted(path.stem for pattern in ("label_*.json", "transfer_*.json") for path in folder.glob(pattern))


@pytest.mark.slow
def test_frozen_features_with_few_labels(encoder, survey, tmp_path, monkeypatch, drawn_figures):
    """What is written and reported, and that neither a choice nor a prediction depends on a test label."""
    transfer, folder = write_survey(tmp_path / "transfer"), tmp_path / "one"
    monkeypatch.setattr(few_labels, "FEW_DRAWS", 2)
    monkeypatch.setattr(few_labels, "SOME_DRAWS", 1)
    run_few_labels(encoder, survey, transfer, folder)
    galaxies = open_galaxies(str(survey))
    count = len(split_galaxies(galaxies)["train"])
    sizes = [round(0.05 * count), round(0.3 * count), count]
    methods, names = [BY_NAME[name] for name in ("random_linear_probe", "ssl_linear_probe")], few_labels_files(folder)
    other = open_galaxies(str(transfer)).fingerprint
    assert names == [few_labels_name(method, dataset) for dataset in (None, other) for method in methods]
    for method, name in zip(methods, names, strict=False):
        about, table = result(folder, name), pq.read_table(folder / f"{name}.parquet")
        assert about["label_fractions"] == [0.05, 0.3, 1]
        for classifier in ("linear_probe", "radial_probe", "orientation_probe"):
            points = [p for p in about["points"] if p["classifier"] == classifier]
            assert [p["labels"] for p in points] == sizes
            assert [p["draws"] for p in points] == [2, 1, 2 if method.initialization == "random" else 1]
            for p in points:
                draws = f"predicted_class_{classifier}_{p['labels']}_draw"
                columns = [table[f"{draws}_{i}"].to_numpy() for i in range(p["draws"])]
                each = [np.mean(column == table["label"].to_numpy()) for column in columns]
                assert p["accuracy_per_draw"] == pytest.approx(each)
                assert p["accuracy"] == pytest.approx(np.mean(each))
                assert p["interval"][0] < p["accuracy"] < p["interval"][1]
            complete = result(folder, f"{method.initialization}_{classifier}")
            assert points[-1]["accuracy_per_draw"] == complete["accuracy_per_seed"]
    check_report(folder)

    # A subset that was computed without orientations is computed again.
    before = result(folder, names[1])
    subset = next((folder / "ssl_linear_probe" / names[1]).glob("*.json"))
    stored = json.loads(subset.read_text())
    del stored["fits"]["orientation_probe"]
    subset.write_text(json.dumps(stored))
    (folder / f"{names[1]}.json").unlink()
    run_few_labels(encoder, survey, transfer, folder)
    assert result(folder, names[1])["points"] == before["points"]

    with monkeypatch.context() as patch:
        patch.setattr(few_labels, "_probe_subset", None)  # all is finished
        run_few_labels(encoder, survey, transfer, folder)

    for where in ("survey", "moved"):
        write_survey(tmp_path / where, permute_test=True)
    run_few_labels(encoder, tmp_path / "survey", tmp_path / "moved", tmp_path / "two")
    for one, two in zip(names, few_labels_files(tmp_path / "two"), strict=True):
        check_only_labels_differ(folder / f"{one}.parquet", tmp_path / "two" / f"{two}.parquet")
        chosen = [
            [p["best_params"] for p in result(f, x)["points"]] for f, x in ((folder, one), (tmp_path / "two", two))
        ]
        assert chosen[0] == chosen[1]


def check_report(folder: Path) -> None:
    """The report's sentences and tables agree with the files."""
    run(report_command(folder))
    report = (folder / "report.md").read_text()
    section = report.split("## Label efficiency")[1].split("\n## ")[0]
    both = [result(folder, f"label_efficiency_{weights}_linear_probe")["points"] for weights in ("random", "ssl")]
    for random, ssl in zip(*both, strict=True):
        cells = (percent(Estimate(p["accuracy"], *p["interval"])) for p in (random, ssl))
        assert f"| {' | '.join(cells)} |" in section
    titles = {method.classifier: method.classifier_title for method in METHODS if method.run_by == "ssl_linear_probe"}
    for classifier in ("linear_probe", "radial_probe", "orientation_probe"):
        curves = [[p["accuracy"] for p in points if p["classifier"] == classifier] for points in both]
        labels = [p["labels"] for p in both[0] if p["classifier"] == classifier]
        assert f"- {value_of_pretraining(labels, *curves, titles[classifier])}" in section
    assert (folder / "label_efficiency.png").read_bytes().startswith(b"\x89PNG")
    transfer = report.split("## Transfer to other galaxies")[1].split("\n## ")[0]
    assert len(re.findall(r"\| \d+ \| .* % \(.*\) \| .* % \(.*\) \| [+-].* \|", transfer)) == 6


def test_an_interrupted_fine_tuning_on_few_labels_resumes(encoder, survey, tmp_path, monkeypatch):
    """The finished subset is kept and not trained again; an epoch is a whole batch also of few galaxies."""
    trained = []

    def fine_tune(model, batches, labelled, arguments, folder, run_id, seed):
        trained.append((folder.name, seed))
        if len(trained) == 2:
            raise KeyboardInterrupt
        assert len(labelled.train) >= 32
        assert len(labelled.validation) == len(split["validation"])
        return None, {"temperature": 1.0}

    split = split_galaxies(open_galaxies(str(survey)))
    monkeypatch.setattr(fine_tuning, "fine_tune", fine_tune)
    monkeypatch.setattr(fine_tuning, "classify", lambda *_: np.eye(4)[np.zeros(60, int)])
    monkeypatch.setattr(run_module, "run_complete", lambda m, e: (e.folder / f"{m.name}.json").write_text("{}"))
    for name in ("write_classifier_cards", "write_report", "write_evaluation_page"):
        monkeypatch.setattr(linear_probe_checkpoints, name, Mock())
    arguments = command(encoder, survey, tmp_path, "--method", "ssl_fine_tune", "--label_fractions", "0.05")
    with pytest.raises(SystemExit):
        run(arguments)
    assert not few_labels_files(tmp_path)
    run(arguments)
    assert trained == [(f"9_{draw}", draw) for draw in (0, 1, 1, 2, 3, 4)]
    assert [p["draws"] for p in result(tmp_path, "label_efficiency_ssl_fine_tune")["points"]] == [5]
    run(arguments)
    assert len(trained) == 6
    run([*arguments, "--rerun"])
    assert len(trained) == 11


@pytest.mark.slow
def test_fine_tuning_on_few_labels(encoder, survey, tmp_path):
    """With all labels it is the method itself. The classifiers of the subsets are not kept."""
    flags = ("--label_fractions", "0.05", "1", "--seeds", "1", "--num_train_epochs", "1", "--report_to", "tensorboard")
    run(command(encoder, survey, tmp_path, "--method", "ssl_fine_tune", *flags))
    few, complete = result(tmp_path, "label_efficiency_ssl_fine_tune")["points"]
    assert (few["labels"], few["draws"]) == (9, 5)
    assert len(few["best_params"]) == len(few["accuracy_per_draw"]) == 5
    assert complete["accuracy"] == result(tmp_path, "ssl_fine_tune")["accuracy"]
    assert [path.parent.name for path in tmp_path.rglob("model.safetensors")] == ["seed_0"]
    logs = tmp_path.glob("ssl_fine_tune/label_efficiency_ssl_fine_tune/9_*/tensorboard/*")
    assert {path.parent.parent.name for path in logs} == {f"9_{draw}" for draw in range(5)}
    run(report_command(tmp_path))
    report = (tmp_path / "report.md").read_text()
    assert "| Fine-tune | 9 | 5 | missing | " in report


@pytest.mark.parametrize("name", ["label_efficiency_ssl_linear_probe", "transfer_0123456789ab_ssl_linear_probe"])
def test_a_damaged_result_of_few_labels_is_named(encoder, survey, tmp_path, capsys, name):
    run(command(encoder, survey, tmp_path, "--method", "zero_shot"))
    path = tmp_path / f"{name}.json"
    about = {"label_fractions": [], "training_galaxies": 1, "points": [], **result(tmp_path, "evaluation")}
    for content in ({}, about | {"encoder": "x"}):
        path.write_text(json.dumps(content))
        line = error_line(report_command(tmp_path), capsys)
        assert f"{path}: " in line
        assert line.endswith(f"delete {path} and run its method again with --label_fractions or --transfer")


def test_wrong_fractions_and_transfers_end_in_one_line(encoder, survey, tmp_path, capsys):
    for flags, message in (
        (["--label_fractions", "0.1", "1.5"], "--label_fractions 1.5"),
        (["--label_fractions", "0"], "--label_fractions 0"),
        (["--transfer", "nowhere.parquet"], "--transfer nowhere.parquet"),
    ):
        assert message in error_line(command(encoder, survey, tmp_path, *flags), capsys)
    assert not list(tmp_path.glob("*.json"))

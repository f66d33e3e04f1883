"""The evaluation's command: what it writes, that test rows choose nothing, that bad input ends in one line."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import random_images, write_hdf5
from PIL import Image
from safetensors.torch import load_file
from test_classifier import DEVIATION, KEY, MEAN, change_tensors
from test_mae import small_config

import linear_probe_checkpoints
from galaxy_mae import evaluation, probe
from galaxy_mae.errors import one_line_errors
from galaxy_mae.evaluation import METHODS
from galaxy_mae.mae import build_mae, save_encoder

QUICK = ["--use_cpu", "True", "--bf16", "False", "--report_to", "none", "--disable_tqdm", "True"]
QUICK += ["--batch_size", "32", "--num_train_epochs", "2", "--learning_rate", "2e-3", "--seeds", "2"]
CLASSES = 4


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """Outside any Slurm job; short attention probes."""
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID", raising=False)
    monkeypatch.setattr(probe, "ATTENTION_EPOCHS", 3)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "small"
    save_encoder(build_mae(small_config(), seed=11), folder / "encoder", MEAN, DEVIATION, ())
    return folder


def write_survey(folder: Path, permute_test: bool = False) -> Path:
    """Parquet files with a test set of their own; the class is the brightness, with some noise."""
    import datasets

    images = random_images(260) // 2
    label = np.random.default_rng(0).integers(0, CLASSES, 260)
    images += (25 * label).astype(np.uint8)[:, None, None, None]
    ra, dec = np.linspace(0, 300, 260), np.linspace(-20, 20, 260)
    if permute_test:
        label[200:] = np.random.default_rng(1).permutation(label[200:])
    folder.mkdir()
    for part, rows in (("train", slice(0, 200)), ("test", slice(200, 260))):
        columns = {"image": [Image.fromarray(image) for image in images[rows]], "label": label[rows]}
        table = datasets.Dataset.from_dict(columns | {"ra": ra[rows], "dec": dec[rows]})
        table.to_parquet(folder / f"{part}.parquet")
    return folder


@pytest.fixture(scope="module")
def survey(tmp_path_factory) -> Path:
    return write_survey(tmp_path_factory.mktemp("survey") / "as_it_is")


def command(encoder: Path, survey: Path, folder: Path, *flags: str) -> list[str]:
    return [*QUICK, "--encoder", str(encoder), "--dataset", str(survey), "--output_dir", str(folder), *flags]


def run(arguments: list[str]) -> None:
    """As `python linear_probe_checkpoints.py`, in this process."""
    with one_line_errors("linear_probe_checkpoints.py"):
        linear_probe_checkpoints.main(arguments)


def refused(arguments: list[str], capsys) -> str:
    """The one line that a command ends with."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        run(arguments)
    assert stopped.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len([line for line in lines if "error:" in line]) == 1
    return lines[-1]


def result(folder: Path, name: str) -> dict:
    return json.loads((folder / f"{name}.json").read_text())


@pytest.fixture(scope="module")
def results(tmp_path_factory, encoder, survey) -> Path:
    """The folder that all five methods wrote."""
    folder = tmp_path_factory.mktemp("results") / "small"
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("SLURM_ARRAY_TASK_ID", raising=False)
        patch.setattr(probe, "ATTENTION_EPOCHS", 3)
        run(command(encoder, survey, folder))
    return folder


BESIDE = [f"{arm}_{name}" for arm in ("random", "ssl") for name in ("knn", "nearest_class_mean", "attention_probe")]
BESIDE += ["raw_pixels", "random_fine_tune_eightfold", "ssl_fine_tune_eightfold"]


@pytest.mark.parametrize("name", [*METHODS, *BESIDE])
def test_scores_follow_from_the_predictions_that_are_kept(results, survey, name):
    """Whoever reads the Parquet file computes the accuracies of the JSON file, and finds the galaxies on the sky."""
    table, scores = pq.read_table(results / f"{name}.parquet"), result(results, name)
    label = table["label"].to_numpy()
    test = pq.read_table(survey / "test.parquet")
    assert table["row"].to_pylist() == list(range(200, 260))
    assert label.tolist() == test["label"].to_pylist()
    assert table["ra"].to_pylist() == test["ra"].to_pylist()
    predicted = [table[f"predicted_seed_{seed}"].to_numpy() for seed in scores["seeds"]]
    assert scores["accuracy_per_seed"] == pytest.approx([np.mean(p == label) for p in predicted])
    assert scores["accuracy"] == pytest.approx(np.mean(scores["accuracy_per_seed"]))
    assert scores["interval"][0] < scores["accuracy"] < scores["interval"][1]
    assert np.sum(scores["confusion_matrix"]) == 60 * len(predicted)
    probabilities = np.stack([table[f"probability_{c}"].to_numpy() for c in range(CLASSES)], axis=1)
    assert np.allclose(probabilities.sum(axis=1), 1)
    if len(predicted) == 1 and not name.endswith("knn"):  # votes tie
        assert np.array_equal(probabilities.argmax(axis=1), predicted[0])
    assert scores["test_images"] == 60
    assert set(scores) >= {"balanced_accuracy", "macro_f1", "per_class", "chosen", "commit", "device", "seconds"}
    assert len(scores["dataset"]) == len(scores["split"]) == len(scores["encoder"]) == 64


def test_seeds_of_the_five_methods(results):
    seeds = {name: result(results, name)["seeds"] for name in METHODS}
    assert len(seeds["zero_shot"]) == 10
    assert seeds["ssl_linear_probe"] == [0]  # nothing random in it
    assert seeds["random_linear_probe"] == seeds["random_fine_tune"] == seeds["ssl_fine_tune"] == [0, 1]


def test_zero_shot_classifies_and_names_what_needs_no_network(results, survey):
    zero = result(results, "zero_shot")
    test = np.array(pq.read_table(survey / "test.parquet")["label"])
    assert zero["chance"] == 1 / CLASSES
    counts = [np.mean(test == c) for c in range(CLASSES)]
    assert zero["majority_class"]["accuracy"] in counts
    assert len(set(np.round(zero["accuracy_per_seed"], 6))) > 1
    table = pq.read_table(results / "zero_shot.parquet")
    assert any(len(set(table[f"predicted_seed_{seed}"].to_pylist())) > 1 for seed in range(10))


def test_what_can_be_learnt_is_learnt(results):
    """The class is the brightness: every method but the untrained one sees it, raw pixels included."""
    assert result(results, "zero_shot")["accuracy"] < 0.5
    for name in ("ssl_linear_probe", "random_linear_probe", "raw_pixels"):
        assert result(results, name)["accuracy"] > 0.6


def test_test_labels_influence_no_choice_and_no_weight(results, encoder, tmp_path, monkeypatch):
    """All over again with the classes of the test galaxies permuted: only the scores change."""
    survey, folder = write_survey(tmp_path / "permuted", permute_test=True), tmp_path / "results"
    run(command(encoder, survey, folder))
    for name in (*METHODS, *BESIDE):
        before, after = result(results, name), result(folder, name)
        assert before["chosen"] == after["chosen"]
        tables = [pq.read_table(place / f"{name}.parquet") for place in (results, folder)]
        assert tables[0]["label"] != tables[1]["label"]
        assert tables[0].drop_columns("label") == tables[1].drop_columns("label")
    assert result(results, "ssl_linear_probe")["accuracy"] != result(folder, "ssl_linear_probe")["accuracy"]
    weights = sorted(results.rglob("*.safetensors"))
    assert len(weights) == 4
    for path in weights:
        one, other = load_file(path), load_file(folder / path.relative_to(results))
        assert all((one[name] == other[name]).all() for name in one)


def test_fine_tuned_arms_start_from_the_file_or_not(encoder, survey, tmp_path, monkeypatch):
    """What the trainer is given before the first step: the file's tensors bit for bit, or none of them."""
    given = {}

    def watched(model, *_):
        given[arm] = model.state_dict()
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluation, "fine_tune", watched)
    for arm in ("ssl", "random"):
        with pytest.raises(SystemExit):
            run(command(encoder, survey, tmp_path, "--method", f"{arm}_fine_tune"))
    source = build_mae(small_config(), seed=11).vit.state_dict()
    assert source.keys() == given["ssl"].keys() == given["random"].keys()
    assert all((given["ssl"][name] == value).all() for name, value in source.items())
    drawn = [name for name, value in source.items() if value.ndim > 1 and "position" not in name]
    assert not any((given["random"][name] == source[name]).all() for name in drawn)


def test_a_finished_method_is_not_run_twice_unless_asked(results, encoder, survey, tmp_path, monkeypatch):
    folder = tmp_path / "results"
    shutil.copytree(results, folder)
    calls = []
    monkeypatch.setattr(evaluation.Evaluation, "_frozen", lambda self, arm: calls.append(arm))
    run(command(encoder, survey, folder, "--method", "1"))
    assert not calls
    run(command(encoder, survey, folder, "--method", "1", "--rerun"))
    assert calls == ["random"]


def test_an_interrupted_method_goes_on(results, encoder, survey, tmp_path, monkeypatch):
    """The first seed's fine-tuning is kept, the second is done: the same result as without interruption."""
    trained = []
    fine_tune = evaluation.fine_tune

    def interrupted(*arguments):
        trained.append(arguments[-1])
        if trained == [0, 1]:
            raise KeyboardInterrupt
        return fine_tune(*arguments)

    monkeypatch.setattr(evaluation, "fine_tune", interrupted)
    arguments = command(encoder, survey, tmp_path, "--method", "ssl_fine_tune")
    with pytest.raises(SystemExit):
        run(arguments)
    assert not (tmp_path / "ssl_fine_tune.json").exists()
    first = (tmp_path / "ssl_fine_tune" / "seed_0" / "model.safetensors").stat().st_mtime_ns
    run(arguments)
    assert (tmp_path / "ssl_fine_tune" / "seed_0" / "model.safetensors").stat().st_mtime_ns == first
    for key in ("accuracy_per_seed", "chosen", "confusion_matrix"):
        assert result(tmp_path, "ssl_fine_tune")[key] == result(results, "ssl_fine_tune")[key]


@pytest.mark.parametrize(
    ("task", "flag", "expected"), [("3", None, METHODS[3]), ("3", "0", METHODS[0]), (None, "ssl_fine_tune", METHODS[4])]
)
def test_slurm_s_task_chooses_the_method_and_the_flag_overrides_it(task, flag, expected):
    assert linear_probe_checkpoints.chosen_methods(flag, task) == (expected,)
    assert linear_probe_checkpoints.chosen_methods(None, None) == METHODS


# ---------------------------------------------------------------------------------------------------------- the report


def test_report_says_what_the_numbers_say(results, capsys):
    run(["--output_dir", str(results), "--report"])
    printed, report = capsys.readouterr().out, (results / "report.md").read_text()
    table = report.split("## Key findings")[0]
    rows = {line.split(" | ")[0].strip("| "): line for line in table.splitlines() if line.startswith("| ")}
    ssl, random = result(results, "ssl_linear_probe"), result(results, "random_linear_probe")
    assert f"{100 * ssl['accuracy']:.2f} %" in rows["Linear probe (SSL weights)"]
    assert f"{100 * (ssl['accuracy'] - random['accuracy']):+.2f}" in rows["Linear probe (SSL weights)"]
    assert "over the same from random weights" in rows["Fine-tune (SSL weights)"]
    assert "over chance, 25%" in rows["Fine-tune (random weights)"]
    assert rows["Linear probe (SSL weights)"] in printed
    assert "McNemar" in report
    for picture in ["accuracy.png", *(f"confusion_{name}.png" for name in METHODS)]:
        assert (results / picture).read_bytes().startswith(b"\x89PNG")
        assert f"({picture})" in report


def test_missing_methods_show_as_missing(results, tmp_path, capsys):
    folder = tmp_path / "results"
    shutil.copytree(results, folder, ignore=shutil.ignore_patterns("*.png", "*.md"))
    for name in ("random_fine_tune", "zero_shot"):
        (folder / f"{name}.json").unlink()
    run(["--output_dir", str(folder), "--report"])
    report = (folder / "report.md").read_text()
    assert "| Zero-shot (random weights) | missing | |" in report.replace("|  |", "| |")
    assert "missing: random_fine_tune" in report
    assert "- Zero-shot (random weights): missing." in report
    assert (folder / "accuracy.png").is_file()


def test_wandb_gets_scores_matrices_and_table(encoder, survey, tmp_path, monkeypatch):
    import wandb

    logged, groups = {}, set()
    log, init = wandb.sdk.wandb_run.Run.log, wandb.init

    def watched_init(**options):
        groups.add((options["group"], options["name"]))
        return init(**options)

    monkeypatch.setattr(wandb, "init", watched_init)
    monkeypatch.setattr(
        wandb.sdk.wandb_run.Run, "log", lambda self, d, *a, **k: (logged.update(d), log(self, d, *a, **k))
    )
    folder = tmp_path / "named"
    flags = ["--report_to", "wandb", "--seeds", "1", "--num_train_epochs", "1"]
    run(command(encoder, survey, folder, "--method", "ssl_fine_tune", *flags))
    run(["--output_dir", str(folder), "--report", "--report_to", "wandb"])
    assert logged["ssl_fine_tune/accuracy"] == result(folder, "ssl_fine_tune")["accuracy"]
    assert {"ssl_fine_tune/interval_low", "ssl_fine_tune_eightfold/macro_f1", "eval/accuracy"} <= set(logged)
    assert any("confusion_matrix" in name for name in logged)
    assert logged["results"].data[0][0] == "Zero-shot (random weights)"
    assert groups == {("named", f"named/{x}") for x in ("ssl_fine_tune", "ssl_fine_tune/seed_0", "report")}
    wandb.teardown()  # its service would serve, and confuse, the processes that later tests start


# ----------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--method", "5"], "--method 5: no such method"),
        (["--method", "-1"], "--method"),
        (["--method", "fine_tune"], "0 zero_shot"),
        (["--encoder", "nowhere"], "--encoder nowhere: no such folder"),
        (["--pooling", "max"], "--pooling max"),
        (["--seeds", "0"], "--seeds 0"),
        (["--mixup", "-1"], "--mixup -1"),
        (["--layer_decay", "0"], "--layer_decay 0"),
        (["--label_smoothing", "1"], "--label_smoothing 1"),
        (["--batch_size", "512"], "fewer than a batch of 512"),
        (["--metric_for_best_model", "loss"], "best accuracy on validation rows"),
        (["--learning-rat", "1"], "did you mean"),
    ],
)
def test_wrong_flags_end_in_one_line(encoder, survey, tmp_path, capsys, flags, named):
    assert named in refused(command(encoder, survey, tmp_path, *flags), capsys)
    assert not list(tmp_path.glob("*.json"))


def test_slurm_index_out_of_range(encoder, survey, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "5")
    assert "SLURM_ARRAY_TASK_ID 5: no such method" in refused(command(encoder, survey, tmp_path), capsys)


def test_results_of_another_evaluation_are_not_mixed(results, encoder, survey, tmp_path, capsys):
    other = write_survey(tmp_path / "other", permute_test=True)
    assert "dataset" in refused(command(encoder, other, results), capsys)
    assert "split" in refused(command(encoder, survey, results, "--split_seed", "1"), capsys)
    assert "recipe" in refused(command(encoder, survey, results, "--mixup", "0.5"), capsys)
    another = tmp_path / "another"
    save_encoder(build_mae(small_config(), seed=12), another, MEAN, DEVIATION, ())
    assert "encoder" in refused(command(another, survey, results), capsys)


def test_encoder_that_does_not_fit(encoder, survey, tmp_path, capsys):
    save_encoder(build_mae(small_config(image_size=64), seed=1), tmp_path / "large", MEAN, DEVIATION, ())
    assert "32 x 32" in refused(command(tmp_path / "large", survey, tmp_path / "results"), capsys)
    shutil.copytree(encoder / "encoder", tmp_path / "broken")
    change_tensors(tmp_path / "broken", lambda tensors: tensors.pop(KEY))
    assert "missing" in refused(command(tmp_path / "broken", survey, tmp_path / "results"), capsys)


def test_encoder_of_another_split_of_the_same_galaxies(encoder, survey, results, tmp_path, capsys):
    """It may have seen the galaxies that it would be tested on."""
    shutil.copytree(encoder, tmp_path / "run")
    about = result(results, "zero_shot")
    recipe = {
        "data": about["dataset"],
        "split": about["split"],
        "split_seed": 0,
        "num_train_epochs": 1,
        "mask_ratio": 0.75,
    }
    (tmp_path / "run" / "run.json").write_text(json.dumps({"recipe": recipe, "finished": True, "sessions": []}))
    line = refused(command(tmp_path / "run", survey, tmp_path / "out", "--method", "0", "--split_seed", "1"), capsys)
    assert "pre-trained on another split" in line
    run(command(tmp_path / "run", survey, tmp_path / "out", "--method", "0"))


def test_data_that_cannot_be_learnt(encoder, survey, tmp_path, capsys):
    table = pq.read_table(survey / "train.parquet")
    unlabelled = tmp_path / "unlabelled.parquet"
    pq.write_table(table.drop_columns("label"), unlabelled)
    assert "no labels" in refused(command(encoder, unlabelled, tmp_path / "results"), capsys)
    nine = write_hdf5(tmp_path / "nine.h5", random_images(90), np.arange(90) % 9)
    line = refused(command(encoder, nine, tmp_path / "results"), capsys)
    assert "class 9 (Edge-on with Bulge) has no training rows" in line
    assert not (tmp_path / "results").exists()


def test_report_without_results_or_with_damaged_ones(results, tmp_path, capsys):
    assert "no results there" in refused(["--output_dir", str(tmp_path), "--report"], capsys)
    folder = tmp_path / "results"
    shutil.copytree(results, folder)
    (folder / "ssl_linear_probe.json").write_text("{")
    assert "ssl_linear_probe.json: cannot be read" in refused(["--output_dir", str(folder), "--report"], capsys)
    shutil.copy(results / "ssl_linear_probe.json", folder)
    (folder / "ssl_linear_probe.parquet").write_bytes(b"PAR1")
    assert "ssl_linear_probe.parquet: cannot be read" in refused(["--output_dir", str(folder), "--report"], capsys)

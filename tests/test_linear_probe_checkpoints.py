"""The evaluation's script: what it writes, that test labels select nothing, and errors of one line."""

import io
import json
import os
import shutil
import signal
import threading
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import random_images, write_hdf5
from filelock import FileLock
from PIL import Image
from safetensors.torch import load_file
from test_encoder import KEY, MEAN, STD, change_tensors
from test_mae import small_config

import linear_probe_checkpoints
from galaxy_mae import figures, files
from galaxy_mae.data.cache import open_galaxies
from galaxy_mae.data.seen import pretraining_catalogue
from galaxy_mae.data.split import split_fingerprint, split_galaxies
from galaxy_mae.errors import one_line_errors
from galaxy_mae.evaluation import fine_tuning, probes
from galaxy_mae.evaluation import run as run_module
from galaxy_mae.evaluation.calibration import expected_calibration_error
from galaxy_mae.evaluation.fine_tuning import FineTuningTrainer
from galaxy_mae.evaluation.methods import ARRAY_METHODS, BY_NAME
from galaxy_mae.evaluation.methods import METHODS as ALL_METHODS
from galaxy_mae.evaluation.results import ResultWriter
from galaxy_mae.evaluation.scores import Estimate
from galaxy_mae.model.mae import build_mae, save_encoder
from galaxy_mae.predictions.formats import read_catalogue
from galaxy_mae.provenance import Pretraining
from galaxy_mae.reports.findings import verdict
from galaxy_mae.training import preemption

QUICK = ["--use_cpu", "True", "--bf16", "False", "--report_to", "none", "--disable_tqdm", "True"]
QUICK += ["--batch_size", "32", "--num_train_epochs", "2", "--learning_rate", "2e-3", "--seeds", "2"]
CLASSES = 4
METHODS = tuple(method.name for method in ARRAY_METHODS)
BASELINES = tuple(x.name for x in ALL_METHODS if x.name not in METHODS and x.network is None)


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """Outside of a Slurm job; short attentive probes."""
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID", raising=False)
    monkeypatch.setattr(probes, "ATTENTION_EPOCHS", 3)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "small"
    save_encoder(build_mae(small_config(), seed=11), folder / "encoder", MEAN, STD, ())
    return folder


def write_survey(folder: Path, permute_test: bool = False) -> Path:
    """Parquet files with a predefined test split. The class is the brightness, with some noise."""
    import datasets

    images = random_images(260) // 2
    label = np.random.default_rng(0).integers(0, CLASSES, 260)
    images += (25 * label).astype(np.uint8)[:, None, None, None]
    ra, dec = np.linspace(0, 300, 260), np.linspace(-20, 20, 260)
    if permute_test:
        label[200:] = np.random.default_rng(1).permutation(label[200:])
    folder.mkdir()
    for part, indices in (("train", slice(0, 200)), ("test", slice(200, 260))):
        columns = {"image": [Image.fromarray(image) for image in images[indices]], "label": label[indices]}
        table = datasets.Dataset.from_dict(columns | {"ra": ra[indices], "dec": dec[indices]})
        table.to_parquet(folder / f"{part}.parquet")
    return folder


@pytest.fixture(scope="module")
def survey(tmp_path_factory) -> Path:
    return write_survey(tmp_path_factory.mktemp("survey") / "original")


def command(encoder: Path, survey: Path, folder: Path, *flags: str) -> list[str]:
    return [*QUICK, "--encoder", str(encoder), "--dataset", str(survey), "--output_dir", str(folder), *flags]


def report_command(folder: Path) -> list[str]:
    return ["--output_dir", str(folder), "--report", "--report_to", "none"]


def run(arguments: list[str]) -> None:
    """As `python linear_probe_checkpoints.py`, in this process."""
    with one_line_errors("linear_probe_checkpoints.py"):
        linear_probe_checkpoints.main(arguments).show()


def error_line(arguments: list[str], capsys) -> str:
    """Run a command that must fail with exit status 2, and return the line that it prints."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_info:
        run(arguments)
    assert exit_info.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len([line for line in lines if "error:" in line]) == 1
    return lines[-1]


def result(folder: Path, name: str) -> dict:
    return json.loads((folder / f"{name}.json").read_text())


@pytest.fixture(scope="module")
def results(tmp_path_factory, encoder, survey) -> Path:
    """The results of all five methods."""
    folder = tmp_path_factory.mktemp("results") / "small"
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("SLURM_ARRAY_TASK_ID", raising=False)
        patch.setattr(probes, "ATTENTION_EPOCHS", 3)
        run(command(encoder, survey, folder))
    return folder


@pytest.fixture(scope="module")
def zero_shot(tmp_path_factory, encoder, survey) -> Path:
    """The results of the quickest method."""
    folder = tmp_path_factory.mktemp("results") / "zero_shot"
    run(command(encoder, survey, folder, "--method", "zero_shot"))
    return folder


def check_result(folder: Path, name: str, survey: Path) -> None:
    """The scores of the JSON file follow from the Parquet file, which holds the test galaxies in order."""
    classifier = BY_NAME[name].classifier
    predictions, scores = read_catalogue(folder / f"{name}.parquet"), result(folder, name)
    table, label, predicted = predictions.table, predictions.label, predictions.predicted
    test = pq.read_table(survey / "test.parquet")
    assert table["row"].to_pylist() == list(range(200, 260))
    assert label.tolist() == test["label"].to_pylist()
    assert table["ra"].to_pylist() == test["ra"].to_pylist()
    assert table["dec"].to_pylist() == test["dec"].to_pylist()
    assert predictions.seeds == scores["seeds"]
    assert scores["accuracy_per_seed"] == pytest.approx([np.mean(p == label) for p in predicted])
    assert scores["accuracy"] == pytest.approx(np.mean(scores["accuracy_per_seed"]))
    assert scores["interval"][0] < scores["accuracy"] < scores["interval"][1]
    assert np.sum(scores["confusion_matrix"]) == 60 * len(predicted)
    probabilities = predictions.probabilities
    assert np.allclose(probabilities.sum(axis=1), 1)
    assert scores["calibration"]["ece"] == pytest.approx(np.mean(scores["calibration"]["ece_per_seed"]))
    if classifier != "knn":  # whose fractions are at the ends of bins, and not quite there as float32
        assert scores["calibration"]["ece_of_mean"] == pytest.approx(expected_calibration_error(probabilities, label))
    assert sum(b["galaxies"] for b in scores["calibration"]["reliability"]) == 60 * len(predicted)
    assert ("before" in scores["calibration"]) == (classifier == "fine_tune")
    if classifier == "fine_tune" and len(predicted) == 1:
        uncalibrated = probabilities ** scores["best_params"]["0"]["temperature"]  # but for a factor
        before = expected_calibration_error(uncalibrated / uncalibrated.sum(axis=1, keepdims=True), label)
        assert scores["calibration"]["before"]["ece"] == pytest.approx(before) != scores["calibration"]["ece"]
    if len(predicted) == 1 and classifier != "knn":  # k-NN votes tie
        assert np.array_equal(probabilities.argmax(axis=1), predicted[0])
    assert scores["test_images"] == 60
    assert set(scores) >= {"balanced_accuracy", "macro_f1", "per_class", "best_params", "commit", "device", "seconds"}
    assert len(scores["dataset"]) == len(scores["split"]) == len(scores["encoder"]) == 64


def test_scores_of_zero_shot_follow_from_its_predictions(zero_shot, survey):
    check_result(zero_shot, "zero_shot", survey)


def test_method_writes_its_result_and_its_baselines(encoder, survey, tmp_path):
    """Of one seed; those of the frozen features are in `results`."""
    run(command(encoder, survey, tmp_path, "--method", "ssl_fine_tune", "--seeds", "1", "--num_train_epochs", "1"))
    names = {"ssl_fine_tune", "ssl_fine_tune_tta"}
    assert {path.stem for path in tmp_path.glob("*.parquet")} == names
    for name in names:
        check_result(tmp_path, name, survey)


def test_probes_learn_from_the_training_set_and_select_on_the_validation_set(encoder, survey, tmp_path, monkeypatch):
    """Every probe gets the features and labels of exactly these galaxies."""
    calls = {}

    def watch(name):
        fit = getattr(probes, name)

        def watched(*arguments):
            calls.setdefault(name, []).append([x for x in arguments if isinstance(x, probes.FeaturesAndLabels)])
            return fit(*arguments)

        monkeypatch.setattr(probes, name, watched)

    for name in ("linear_probe", "knn_classifier", "nearest_centroid", "attentive_probe"):
        watch(name)
    run(command(encoder, survey, tmp_path, "--method", "random_linear_probe", "--seeds", "1"))
    galaxies = open_galaxies(str(survey))
    split = split_galaxies(galaxies)
    indices = [split["train"], split["validation"]]
    raw_pixels, *layers_and_rings, linear_probe = calls["linear_probe"]
    *knn_at_layers, knn = calls["knn_classifier"]
    (nearest_centroid,), (attentive,) = (calls[name] for name in ("nearest_centroid", "attentive_probe"))
    assert len(knn) == len(nearest_centroid) == 1
    for given in (*layers_and_rings, raw_pixels, linear_probe, attentive, *knn_at_layers, knn, nearest_centroid):
        for part, expected in zip(given, indices, strict=False):
            assert np.array_equal(part.label, galaxies.label[expected])
    for part, pooled, tokens, expected in zip(raw_pixels, linear_probe, attentive, indices, strict=True):
        assert np.array_equal(part.features, galaxies.pixels[expected].reshape(len(expected), -1))
        assert np.allclose(tokens.features.astype(np.float32).mean(axis=1), pooled.features, atol=2e-3)
    for given in (knn, nearest_centroid):
        assert np.array_equal(given[0].features, linear_probe[0].features)


def test_radial_pooling_is_that_of_the_radial_probe_for_all_frozen_features(
    encoder, survey, tmp_path, monkeypatch, drawn_figures
):
    """The report has the layers of both initializations that are there, and says that they are of validation rows."""
    widths = []
    knn = probes.knn_classifier
    monkeypatch.setattr(probes, "knn_classifier", lambda train: widths.append(train.features.shape[1]) or knn(train))
    flags = ("--method", "ssl_linear_probe", "--pooling", "radial")
    run(command(encoder, survey, tmp_path, *flags))
    linear, radial = result(tmp_path, "ssl_linear_probe"), result(tmp_path, "ssl_radial_probe")
    assert linear["best_params"] == radial["best_params"]
    assert linear["confusion_matrix"] == radial["confusion_matrix"]
    selected = linear["best_params"]["0"]
    assert widths[-1] == 48 * selected["num_rings"] != 48
    by_rings = selected["validation_scores_by_num_rings"]
    assert selected["validation_accuracy"] == max(by_rings.values()) == by_rings[str(selected["num_rings"])]
    selected = result(tmp_path, "ssl_orientation_probe")["best_params"]["0"]
    by_orientations = selected["validation_scores_by_orientations"]
    assert by_orientations.keys() == {"mean", "mean and std"}
    assert by_orientations[selected["orientations"]] == max(by_orientations.values())
    selected = result(tmp_path, "ssl_best_layer")["best_params"]["0"]
    by_layer, best = selected["validation_accuracy_by_layer"]["linear_probe"], selected["layer"]
    assert by_layer[best - 1] == max(by_layer)
    run(report_command(tmp_path))
    report = (tmp_path / "report.md").read_text().split("## Accuracy by layer")[1]
    assert f"layer {best} of {len(by_layer)}, with {100 * max(by_layer):.1f} % on the validation set" in report
    assert (tmp_path / "layers.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.parametrize("name", [*METHODS, *BASELINES])
def test_scores_follow_from_the_saved_predictions(results, survey, name):
    check_result(results, name, survey)


@pytest.mark.slow
def test_seeds_of_the_five_methods(results):
    assert {path.stem for path in results.glob("*.parquet")} == {*METHODS, *BASELINES}
    seeds = {name: result(results, name)["seeds"] for name in METHODS}
    assert len(seeds["zero_shot"]) == 10
    assert seeds["ssl_linear_probe"] == [0]  # it is deterministic
    assert seeds["random_linear_probe"] == seeds["random_fine_tune"] == seeds["ssl_fine_tune"] == [0, 1]


def test_zero_shot_contains_the_accuracies_of_chance_and_of_the_most_frequent_class(zero_shot, survey):
    zero = result(zero_shot, "zero_shot")
    test = np.array(pq.read_table(survey / "test.parquet")["label"])
    assert zero["chance"] == 1 / CLASSES
    galaxies = open_galaxies(str(survey))
    most_frequent = np.bincount(galaxies.label[split_galaxies(galaxies)["train"]]).argmax()
    assert zero["majority_class"] == {"name": f"class {most_frequent}", "accuracy": np.mean(test == most_frequent)}
    assert len(set(np.round(zero["accuracy_per_seed"], 6))) > 1
    table = pq.read_table(zero_shot / "zero_shot.parquet")
    assert any(len(set(table[f"predicted_class_seed_{seed}"].to_pylist())) > 1 for seed in range(10))


@pytest.mark.slow
def test_trained_methods_beat_the_untrained_one(results):
    """The class is the brightness, which linear probes can read from features of both encoders and from raw pixels."""
    assert result(results, "zero_shot")["accuracy"] < 0.5
    for name in ("ssl_linear_probe", "random_linear_probe", "raw_pixels"):
        assert result(results, name)["accuracy"] > 0.6


def check_only_labels_differ(one: Path, other: Path) -> None:
    tables = [pq.read_table(path).to_pandas() for path in (one, other)]
    assert not tables[0]["label"].equals(tables[1]["label"])
    assert tables[0].drop(columns="label").equals(tables[1].drop(columns="label"))


@pytest.mark.slow
def test_permuted_test_labels_change_no_selected_parameter_and_no_weight(results, encoder, tmp_path):
    """All five methods run again with the classes of the test galaxies permuted. Only the scores change."""
    survey, folder = write_survey(tmp_path / "permuted", permute_test=True), tmp_path / "results"
    run(command(encoder, survey, folder))
    for name in (*METHODS, *BASELINES):
        before, after = result(results, name), result(folder, name)
        assert before["best_params"] == after["best_params"]
        check_only_labels_differ(results / f"{name}.parquet", folder / f"{name}.parquet")
    assert result(results, "ssl_linear_probe")["accuracy"] != result(folder, "ssl_linear_probe")["accuracy"]
    weights = sorted(results.rglob("*.safetensors"))
    assert len(weights) == 4
    for path in weights:
        one, other = load_file(path), load_file(folder / path.relative_to(results))
        assert all((one[name] == other[name]).all() for name in one)


def test_fine_tuning_starts_from_exactly_the_file_or_from_random_weights(encoder, survey, tmp_path, monkeypatch):
    """The encoder that fine-tuning gets has either exactly the tensors of the file, or none of its random ones."""
    encoders = {}

    def watched(model, *_):
        encoders[weights] = model.state_dict()
        raise KeyboardInterrupt

    monkeypatch.setattr(fine_tuning, "fine_tune", watched)
    for weights in ("ssl", "random"):
        with pytest.raises(SystemExit):
            run(command(encoder, survey, tmp_path, "--method", f"{weights}_fine_tune"))
    source = build_mae(small_config(), seed=11).vit.state_dict()
    assert source.keys() == encoders["ssl"].keys() == encoders["random"].keys()
    assert all((encoders["ssl"][name] == value).all() for name, value in source.items())
    random = [name for name, value in source.items() if value.ndim > 1 and "position" not in name]
    assert not any((encoders["random"][name] == source[name]).all() for name in random)


def test_finished_method_is_only_run_again_with_rerun(zero_shot, encoder, survey, tmp_path, monkeypatch):
    folder = tmp_path / "results"
    shutil.copytree(zero_shot, folder)
    calls = []
    monkeypatch.setattr(run_module, "run_complete", lambda method, _: calls.append(method.name))
    run(command(encoder, survey, folder, "--method", "0"))
    assert not calls
    run(command(encoder, survey, folder, "--method", "0", "--rerun"))
    assert calls == ["zero_shot"]
    assert not (folder / "zero_shot.json").exists()  # it is deleted first, so a killed rerun is not taken for finished


def test_folder_of_a_running_method_is_locked(encoder, survey, tmp_path, capsys):
    tmp_path.joinpath("results").mkdir()
    with FileLock(tmp_path / "results" / ".zero_shot.lock"):
        line = error_line(command(encoder, survey, tmp_path / "results", "--method", "0"), capsys)
    assert "another process" in line


@pytest.mark.slow
def test_interrupted_method_resumes(results, encoder, survey, tmp_path, monkeypatch):
    """The fine-tuning of the first seed is kept, the second one is run. The result is that of an uninterrupted one."""
    trained = []
    fine_tune = fine_tuning.fine_tune

    def interrupted(*arguments):
        trained.append(arguments[-1])
        if trained == [0, 1]:
            raise KeyboardInterrupt
        return fine_tune(*arguments)

    monkeypatch.setattr(fine_tuning, "fine_tune", interrupted)
    arguments = command(encoder, survey, tmp_path, "--method", "ssl_fine_tune")
    with pytest.raises(SystemExit):
        run(arguments)
    assert not (tmp_path / "ssl_fine_tune.json").exists()
    first = (tmp_path / "ssl_fine_tune" / "seed_0" / "model.safetensors").stat().st_mtime_ns
    run(arguments)
    assert (tmp_path / "ssl_fine_tune" / "seed_0" / "model.safetensors").stat().st_mtime_ns == first
    for key in ("accuracy_per_seed", "best_params", "confusion_matrix"):
        assert result(tmp_path, "ssl_fine_tune")[key] == result(results, "ssl_fine_tune")[key]


def test_the_id_of_a_fine_tuning_depends_on_its_name_and_on_the_evaluation(zero_shot, tmp_path):
    """A checkpoint is resumed from if its id is the same."""
    config = result(zero_shot, "evaluation")
    changes = ({}, {"encoder": "x"}, {"dataset": "x"}, {"split": "x"}, {"recipe": config["recipe"] | {"mixup": 0.5}})
    names = [f"{method}/seed_{seed}" for method in METHODS[3:] for seed in (0, 1)]
    ids = [ResultWriter(tmp_path, None, None, config | change).run_id(name) for change in changes for name in names]
    assert len(set(ids)) == len(ids) == 20
    moved = ResultWriter(tmp_path / "moved", None, None, config | {"encoder_name": "moved", "dataset_name": "moved"})
    assert moved.run_id(names[0]) == ids[0]


def test_a_requeued_process_does_not_run_a_method_that_finishes_meanwhile(encoder, survey, tmp_path, monkeypatch):
    """It waits for the lock of the first one, and only then looks whether the method is finished."""
    calls, arguments = [], command(encoder, survey, tmp_path, "--method", "0")
    second = threading.Thread(target=linear_probe_checkpoints.main, args=[arguments])

    def finishing(*_):
        calls.append("zero_shot")
        if len(calls) == 1:
            monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
            second.start()
            second.join(timeout=1)
            assert second.is_alive()
            (tmp_path / "zero_shot.json").write_text("{}")

    monkeypatch.setattr(run_module, "run_complete", finishing)
    monkeypatch.setattr(linear_probe_checkpoints, "write_report", Mock())
    run(arguments)
    second.join()
    assert calls == ["zero_shot"]


@pytest.mark.slow
def test_a_rerun_that_is_preempted_again_and_again_ends(encoder, survey, tmp_path, monkeypatch, signal_handlers):
    """TERM within the first seed and within the second. No step is taken twice, and the result is the same."""
    arguments = command(encoder, survey, tmp_path, "--method", "ssl_fine_tune", "--num_train_epochs", "1")
    run(arguments)
    before = result(tmp_path, "ssl_fine_tune")
    train, steps, stops = FineTuningTrainer.training_step, [], [2, 7]

    def preempted(self, *args, **kwargs):
        steps.append((self.args.seed, self.state.global_step))
        if stops and len(steps) == stops[0]:
            os.kill(os.getpid(), signal.SIGTERM)
            stops.pop(0)
        return train(self, *args, **kwargs)

    monkeypatch.setattr(FineTuningTrainer, "training_step", preempted)
    for _ in range(2):
        with pytest.raises(SystemExit) as stopped:
            run([*arguments, "--rerun"])
        assert stopped.value.code == preemption.EXIT_REQUEUE
        assert not (tmp_path / "ssl_fine_tune.json").exists()
    run([*arguments, "--rerun"])
    assert steps == [(seed, step) for seed in (0, 1) for step in range(5)]
    after = result(tmp_path, "ssl_fine_tune")
    for key in ("accuracy_per_seed", "best_params", "confusion_matrix"):
        assert after[key] == before[key]
    assert not list(tmp_path.glob(".*.rerun"))


def test_a_rerun_of_all_methods_resumes_with_the_one_that_was_interrupted(
    zero_shot, encoder, survey, tmp_path, monkeypatch
):
    """Those that it has finished are not run a third time; the next rerun begins with all of them.

    The page is written when all are finished.
    """
    calls, pages = [], []

    def write(method, evaluation):
        calls.append(method.name)
        if calls == ["zero_shot", "random_linear_probe"]:
            raise KeyboardInterrupt
        (evaluation.folder / f"{method.name}.json").write_text("{}")

    monkeypatch.setattr(run_module, "run_complete", write)
    for name in ("write_report", "write_classifier_cards"):
        monkeypatch.setattr(linear_probe_checkpoints, name, Mock())
    monkeypatch.setattr(linear_probe_checkpoints, "write_evaluation_page", lambda *_: pages.append(len(calls)))
    arguments = [*command(encoder, survey, tmp_path), "--rerun"]
    shutil.copy(zero_shot / "evaluation.json", tmp_path)
    for name in METHODS:
        (tmp_path / f"{name}.json").write_text("{}")
    with pytest.raises(SystemExit):
        run(arguments)
    assert pages == []
    run(arguments)
    assert pages == [len(calls)]
    assert calls == ["zero_shot", *METHODS[1:2], *METHODS[1:]]
    calls[:] = ["earlier"]
    run(arguments)
    assert calls == ["earlier", *METHODS]


def test_a_rerun_that_is_completed_without_the_flag_is_ended(encoder, survey, tmp_path, monkeypatch):
    calls = []

    def write(*_):
        calls.append("zero_shot")
        if len(calls) == 1:
            raise KeyboardInterrupt
        (tmp_path / "zero_shot.json").write_text("{}")

    monkeypatch.setattr(run_module, "run_complete", write)
    monkeypatch.setattr(linear_probe_checkpoints, "write_report", Mock())
    arguments = command(encoder, survey, tmp_path, "--method", "0")
    with pytest.raises(SystemExit):
        run([*arguments, "--rerun"])
    run(arguments)
    run([*arguments, "--rerun"])
    assert len(calls) == 3


def test_a_kill_before_the_old_results_are_all_deleted_begins_the_rerun_again(
    zero_shot, encoder, survey, tmp_path, monkeypatch
):
    folder = tmp_path / "results"
    shutil.copytree(zero_shot, folder)
    (folder / "zero_shot").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(SystemExit):
            run(command(encoder, survey, folder, "--method", "0", "--rerun"))
    run(command(encoder, survey, folder, "--method", "0", "--rerun"))
    assert not (folder / "zero_shot").exists()
    assert (folder / "zero_shot.json").is_file()


def test_left_overs_of_killed_methods_are_removed(zero_shot, encoder, survey, tmp_path, monkeypatch):
    """And those of a task that is running are not."""
    folder = tmp_path / "results"
    shutil.copytree(zero_shot, folder)
    (folder / "zero_shot.json").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(files, "_remove", lambda folder: None)
        with files.temporary_folder(folder / "ssl_fine_tune" / "seed_0") as left:
            (left / "file").write_text("half")
    with files.temporary_folder(folder) as tokens:
        run(command(encoder, survey, folder, "--method", "0"))
        assert list(folder.rglob(".tmp-*.lock")) == [tokens.with_name(f"{tokens.name}.lock")]
        assert tokens.is_dir()
    assert not list(folder.rglob(".tmp-*"))


@pytest.mark.parametrize(
    ("task", "flag", "expected"),
    [
        ("3", None, METHODS[3:4]),
        ("3", "0", METHODS[:1]),
        (None, "ssl_fine_tune", METHODS[4:]),
        (None, None, METHODS),
    ],
)
def test_flag_or_array_task_selects_the_method(monkeypatch, task, flag, expected):
    """The flag overrides Slurm's array task. Without either, all methods run. The report comes last."""
    steps = []
    monkeypatch.setattr(linear_probe_checkpoints, "prepare_evaluations", lambda recipe: [None])
    monkeypatch.setattr(linear_probe_checkpoints, "supported_methods", lambda _: ARRAY_METHODS)
    monkeypatch.setattr(linear_probe_checkpoints, "run", lambda method, _: steps.append(method.name))
    monkeypatch.setattr(linear_probe_checkpoints, "write_report", lambda *_: steps.append("report") or Mock())
    if task is not None:
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", task)
    run([*QUICK, "--encoder", "x", *(["--method", flag] if flag else [])])
    assert tuple(steps) == (*expected, "report")


# ---------------------------------------------------------------------------------------------------------- the report


@pytest.mark.slow
def test_report_agrees_with_the_results(results, capsys, drawn_figures):
    run(report_command(results))
    printed, report = capsys.readouterr().out, (results / "report.md").read_text()
    table = report.split("## Key findings")[0]
    lines = {line.split(" | ")[0].strip("| "): line for line in table.splitlines() if line.startswith("| ")}
    ssl, random = result(results, "ssl_linear_probe"), result(results, "random_linear_probe")
    assert f"{100 * ssl['accuracy']:.2f} %" in lines["Linear probe (SSL weights)"]
    assert f"{100 * (ssl['accuracy'] - random['accuracy']):+.2f}" in lines["Linear probe (SSL weights)"]
    assert "over the same method from random weights" in lines["Fine-tune (SSL weights)"]
    assert "over chance (25 %)" in lines["Fine-tune (random weights)"]
    assert lines["Linear probe (SSL weights)"] in printed
    assert "McNemar" in report
    fine_tune = result(results, "ssl_fine_tune")
    scores, best_params = fine_tune["calibration"], fine_tune["best_params"]
    columns = [f"{100 * scores['before']['ece']:.1f} %", f"{100 * scores['ece']:.1f} %"]
    columns += [f"{100 * scores['ece_if_calibrated']:.1f} %", f"{100 * scores['ece_of_mean']:.1f} %"]
    columns += [f"{best_params['0']['temperature']:.2f}, {best_params['1']['temperature']:.2f}"]
    assert f"| Fine-tune (SSL weights) | {' | '.join(columns)} |" in report.split("## Calibration")[1]
    figures = ["accuracy.png", "reliability_random_fine_tune.png", "reliability_ssl_fine_tune.png"]
    for figure in [*figures, *(f"confusion_{name}.png" for name in METHODS)]:
        assert (results / figure).read_bytes().startswith(b"\x89PNG")
        assert f"({figure})" in report


def test_the_verdict_is_that_the_pretraining_was_too_short_or_where_it_helps():
    recipe = {"batch_size": 50}
    better, equal = Estimate(0.1, 0.05, 0.15), Estimate(0.01, -0.02, 0.04)
    gains = {"the linear probe": {168: better, 5616: better}, "fine-tuning": {5616: equal, 168: better}}
    short = verdict(recipe, 180 * 50, gains)
    assert "too short" in short
    assert "(180 steps)" in short
    assert "saw 9,000 images" in short
    assert "fine-tuning" not in short
    assert verdict(recipe, 50_000, gains) == (
        "Pre-training (1,000 steps) helps the linear probe (168, 5,616 labels) and "
        "fine-tuning (168 labels); it cannot be told apart from random weights in fine-tuning (5,616 labels)."
    )
    assert "not been compared" in verdict(None, None, {})


def test_report_of_one_method(zero_shot, capsys, monkeypatch):
    drawn, draw = [], figures.accuracy_bars
    monkeypatch.setattr(figures, "accuracy_bars", lambda *arguments: drawn.append(arguments) or draw(*arguments))
    run(report_command(zero_shot))
    assert len(drawn) == 1  # for report.md and the page
    report, accuracy = (zero_shot / "report.md").read_text(), result(zero_shot, "zero_shot")["accuracy"]
    assert f"| Zero-shot (random weights) | {100 * accuracy:.2f} % (" in report
    assert f"{100 * (accuracy - 0.25):+.2f} (" in report
    assert report.count("| missing |") == 4
    assert "- Linear probe (SSL weights): missing." in report
    assert f"Best method: Zero-shot (random weights), {100 * accuracy:.2f} %" in report
    assert "Best method" in capsys.readouterr().out
    assert (zero_shot / "confusion_zero_shot.png").is_file()


def test_after_a_pretraining_that_was_too_short_there_are_no_findings(zero_shot, tmp_path, capsys):
    folder = tmp_path / "results"
    shutil.copytree(zero_shot, folder)
    config = json.loads((folder / "evaluation.json").read_text())
    recipe = {"batch_size": 50, "num_train_epochs": 1, "mask_ratio": 0.75, "data": "others"}
    config |= {"pretraining": recipe, "images_seen": 100}
    (folder / "evaluation.json").write_text(json.dumps(config))
    run(report_command(folder))
    for text in (capsys.readouterr().out, (folder / "report.md").read_text()):
        assert "is too short to say" in text
        assert "- None: " in text
        assert "- Linear probe (SSL weights): missing." in text
        assert "Best method" not in text
        assert "chance is" not in text


def test_a_report_removes_what_a_killed_one_left(zero_shot, tmp_path, monkeypatch):
    folder = tmp_path / "results"
    shutil.copytree(zero_shot, folder)
    with monkeypatch.context() as patch:
        patch.setattr(files, "_remove", lambda folder: None)
        run(report_command(folder))
    assert list(folder.glob(".tmp-*"))
    run(report_command(folder))
    assert not list(folder.glob(".tmp-*"))


def test_error_of_a_failed_method_is_in_the_report_until_it_is_run_again(
    zero_shot, encoder, survey, tmp_path, monkeypatch
):
    folder = tmp_path / "results"
    shutil.copytree(zero_shot, folder)

    def fail(*_):
        raise RuntimeError("out of\nmemory")

    monkeypatch.setattr(run_module, "run_complete", fail)
    with pytest.raises(RuntimeError, match="out of"):
        run(command(encoder, survey, folder, "--method", "1"))
    run(report_command(folder))
    report = (folder / "report.md").read_text()
    assert "| Linear probe (random weights) | failed, RuntimeError: out of memory |" in report
    monkeypatch.setattr(run_module, "run_complete", lambda *_: None)
    run(command(encoder, survey, folder, "--method", "1"))
    assert not list(folder.glob("*.failed"))


@pytest.mark.slow
def test_missing_methods_are_reported_as_missing(results, tmp_path, capsys):
    folder = tmp_path / "results"
    shutil.copytree(results, folder, ignore=shutil.ignore_patterns("*.png", "*.md"))
    for name in ("random_fine_tune", "zero_shot"):
        (folder / f"{name}.json").unlink()
    run(report_command(folder))
    report = (folder / "report.md").read_text()
    assert "| Zero-shot (random weights) | missing | |" in report.replace("|  |", "| |")
    assert "missing: random_fine_tune" in report
    assert "- Zero-shot (random weights): missing." in report
    assert (folder / "accuracy.png").is_file()


def test_dashboards_get_scores_confusion_matrices_table_and_page(encoder, survey, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logged, groups = {}, set()
    log, init = wandb.sdk.wandb_run.Run.log, wandb.init

    def watched_init(**options):
        groups.add((options["group"], options["name"], options["job_type"]))
        return init(**options)

    monkeypatch.setattr(wandb, "init", watched_init)
    monkeypatch.setattr(
        wandb.sdk.wandb_run.Run, "log", lambda self, d, *a, **k: (logged.update(d), log(self, d, *a, **k))
    )
    folder = tmp_path / "named"
    flags = ["--report_to", "wandb", "tensorboard"]
    quick = [*flags, "--seeds", "1", "--num_train_epochs", "1"]
    run(command(encoder, survey, folder, "--method", "ssl_fine_tune", *quick))
    run(["--output_dir", str(folder), "--report", *flags])
    assert logged["ssl_fine_tune/accuracy"] == result(folder, "ssl_fine_tune")["accuracy"]
    assert {"ssl_fine_tune/interval_low", "ssl_fine_tune_tta/macro_f1", "eval/accuracy"} <= set(logged)
    assert any("confusion_matrix" in name for name in logged)
    assert logged["report/results"].data[0][0] == "Zero-shot (random weights)"
    page = next((folder / "report" / "wandb").rglob("media/html/**/*.html")).read_text()
    assert (folder / "report.html").read_text() in page
    jobs = {"ssl_fine_tune": "evaluation", "ssl_fine_tune/seed_0": "fine-tuning", "report": "report"}
    assert groups == {("named", f"named/{name}", job) for name, job in jobs.items()}
    events = [EventAccumulator(str(folder / "tensorboard" / x)).Reload() for x in ("ssl_fine_tune", "report")]
    (accuracy,) = events[0].Scalars("ssl_fine_tune/accuracy")
    assert accuracy.value == pytest.approx(logged["ssl_fine_tune/accuracy"])
    assert "report/accuracy" in events[1].Tags()["images"]
    wandb.teardown()  # otherwise processes of later tests would use this process's service


# ------------------------------------------------------------------------------------------------------ invalid input


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--method", "5"], "--method 5: not one of 0 to 4"),
        (["--method", "fine_tune"], "0 zero_shot"),
        (["--encoder", "nowhere"], "--encoder nowhere: no such folder"),
        (["--pooling", "max"], "--pooling: invalid choice: 'max'"),
        (["--label_smoothing", "1"], "--label_smoothing 1"),
        (["--batch_size", "512"], "fewer than a batch of 512"),
        (["--learning-rat", "1"], "did you mean"),
    ],
)
def test_wrong_flags_end_in_one_line(encoder, survey, tmp_path, capsys, flags, message):
    assert message in error_line(command(encoder, survey, tmp_path, *flags), capsys)
    assert not list(tmp_path.glob("*.json"))


def test_a_batch_is_that_of_all_micro_batches(encoder, survey, tmp_path, capsys):
    arguments = command(encoder, survey, tmp_path, "--per_device_train_batch_size", "64")
    position = arguments.index("--batch_size")
    del arguments[position : position + 2]
    assert "fewer than a batch of 512" in error_line([*arguments, "--gradient_accumulation_steps", "8"], capsys)


def test_results_of_another_evaluation_are_not_mixed(zero_shot, encoder, survey, tmp_path, capsys):
    other = write_survey(tmp_path / "other", permute_test=True)
    assert "dataset is " in error_line(command(encoder, other, zero_shot), capsys)
    assert "split is " in error_line(command(encoder, survey, zero_shot, "--split_seed", "1"), capsys)
    assert "mixup is 0.2 there and 0.5 here" in error_line(
        command(encoder, survey, zero_shot, "--mixup", "0.5"), capsys
    )
    another = tmp_path / "another"
    save_encoder(build_mae(small_config(), seed=12), another, MEAN, STD, ())
    assert "encoder is " in error_line(command(another, survey, zero_shot), capsys)


def test_results_before_and_after_an_encoder_lost_its_origin_are_not_mixed(known, pretrained, survey, tmp_path, capsys):
    """The report must not say of both what is known of one."""
    shutil.copytree(pretrained, tmp_path / "encoder")
    (tmp_path / "encoder" / "pretraining.json").unlink()
    line = error_line(command(tmp_path / "encoder", survey, known, "--method", "0"), capsys)
    assert "seen_in_pretraining is {" in line
    assert "mask_ratio" not in line  # one line does not hold whole recipes


def test_encoder_that_does_not_fit_is_refused(encoder, survey, tmp_path, capsys):
    shutil.copytree(encoder / "encoder", tmp_path / "broken")
    change_tensors(tmp_path / "broken", lambda tensors: tensors.pop(KEY))
    assert "missing" in error_line(command(tmp_path / "broken", survey, tmp_path / "results"), capsys)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory, survey) -> Path:
    """An encoder's folder, far from its run, that says what it was pre-trained on."""
    galaxies = open_galaxies(str(survey))
    split = split_galaxies(galaxies)
    recipe = {"data": galaxies.fingerprint, "split": "x", "split_seed": 0, "num_train_epochs": 1, "mask_ratio": 0.75}
    recipe["max_steps"] = -1
    pretraining = Pretraining(recipe, [], pretraining_catalogue(galaxies, split))
    folder = tmp_path_factory.mktemp("elsewhere") / "encoder"
    save_encoder(build_mae(small_config(), seed=11), folder, MEAN, STD, (), pretraining)
    return folder


@pytest.fixture(scope="module")
def known(tmp_path_factory, pretrained, survey) -> Path:
    """The quickest method's results of that encoder."""
    folder = tmp_path_factory.mktemp("results") / "known"
    run(command(pretrained, survey, folder, "--method", "0"))
    return folder


def write_overlapping_survey(survey: Path, path: Path) -> tuple[Path, np.ndarray]:
    """Half of the galaxies of the predefined test set and half of the others, shuffled, without their test split."""
    galaxies, rows = open_galaxies(str(survey)), np.random.default_rng(0).permutation(np.arange(120, 230))
    label = np.arange(110) % 10
    return write_hdf5(path, np.array(galaxies.pixels)[rows], label), rows


def test_seen_test_galaxies_are_refused_or_reported(pretrained, survey, tmp_path, capsys):
    """Another file with galaxies of the pre-training, shuffled and relabelled."""
    other, rows = write_overlapping_survey(survey, tmp_path / "other.h5")
    test = split_galaxies(open_galaxies(str(other)))["test"]
    seen = int(np.sum(rows[test] < 200))
    assert 0 < seen < len(test)
    flags = ("--method", "0", "--batch_size", "8")
    line = error_line(command(pretrained, other, tmp_path / "out", *flags), capsys)
    assert f"{seen} of {len(test)} test galaxies" in line
    assert "--allow_seen" in line
    assert not (tmp_path / "out").exists()
    run(command(pretrained, other, tmp_path / "out", *flags, "--allow_seen"))
    run(report_command(tmp_path / "out"))
    assert f"Leakage: {seen} of {len(test)} test galaxies" in (tmp_path / "out" / "report.md").read_text()
    assert f"Leakage: {seen} of" in capsys.readouterr().out
    assert result(tmp_path / "out", "zero_shot")["seen_in_pretraining"]["seen"] == seen


def test_additional_baselines_can_be_left_out(zero_shot, encoder, survey, tmp_path):
    """Those of a run before go, too."""
    folder = tmp_path / "results"
    shutil.copytree(zero_shot, folder)
    (folder / "ssl_orientation_probe.json").write_text("{}")
    run(command(encoder, survey, folder, "--method", "ssl_linear_probe", "--additional_baselines", "False"))
    assert {path.name for path in folder.glob("*_*.json")} == {"ssl_linear_probe.json", "zero_shot.json"}


def test_without_a_flag_the_data_set_and_split_are_those_of_the_pretraining(survey, tmp_path, capsys):
    galaxies = open_galaxies(str(survey))
    split = split_galaxies(galaxies, 3)
    recipe = {"dataset": str(survey), "split_seed": 3, "data": galaxies.fingerprint, "num_train_epochs": 1}
    recipe |= {"max_steps": -1, "mask_ratio": 0.75, "split": "x"}
    pretraining = Pretraining(recipe, [], pretraining_catalogue(galaxies, split))
    save_encoder(build_mae(small_config(), seed=11), tmp_path / "encoder", MEAN, STD, (), pretraining)
    flags = [*QUICK, "--encoder", str(tmp_path / "encoder"), "--method", "0"]
    run([*flags, "--output_dir", str(tmp_path / "out")])
    about = result(tmp_path / "out", "zero_shot")
    assert (about["dataset_name"], about["split"]) == (str(survey), split_fingerprint(split))
    pretraining.recipe["dataset"] = str(tmp_path / "gone")
    pretraining.write(tmp_path / "encoder")
    line = error_line([*flags, "--output_dir", str(tmp_path / "none")], capsys)
    assert f"--dataset {tmp_path / 'gone'}: no such file or folder" in line


def test_report_says_whether_the_pretraining_is_known(known, zero_shot):
    for folder, expected in ((known, "None of the 60 test galaxies"), (zero_shot, "It is not known")):
        run(report_command(folder))
        assert expected in (folder / "report.md").read_text()


def test_encoder_with_a_damaged_provenance_is_refused(pretrained, survey, tmp_path, capsys):
    about, table = "pretraining.json", "pretraining_galaxies.parquet"
    without_positions = parquet_bytes(pq.read_table(pretrained / table).drop(["ra"]))
    cases = [(about, b"{}"), (table, b"PAR1"), (table, None), (table, without_positions)]
    for number, (name, content) in enumerate(cases):
        folder = tmp_path / str(number)
        shutil.copytree(pretrained, folder)
        (folder / name).unlink() if content is None else (folder / name).write_bytes(content)
        assert "pretraining" in error_line(command(folder, survey, tmp_path / "out", "--method", "0"), capsys)
        assert not (tmp_path / "out").exists()


def parquet_bytes(table: pa.Table) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return buffer.getvalue()


def test_data_without_labels_or_with_a_missing_class_are_refused(encoder, survey, tmp_path, capsys):
    table = pq.read_table(survey / "train.parquet")
    unlabelled = tmp_path / "unlabelled.parquet"
    pq.write_table(table.drop_columns("label"), unlabelled)
    assert "no labels" in error_line(command(encoder, unlabelled, tmp_path / "results"), capsys)
    label = np.arange(90) % 9
    nine_classes = write_hdf5(tmp_path / "nine.h5", random_images(90), np.where(label == 4, 9, label))
    line = error_line(command(encoder, nine_classes, tmp_path / "results"), capsys)
    assert "class 4 (class 4) has no training galaxies" in line
    assert not (tmp_path / "results").exists()


def test_report_without_results_or_with_a_damaged_one(zero_shot, tmp_path, capsys):
    assert "no results there" in error_line(report_command(tmp_path), capsys)
    folder = tmp_path / "results"
    shutil.copytree(zero_shot, folder)
    about = result(zero_shot, "zero_shot")
    (folder / "zero_shot.json").write_text(json.dumps(about | {"encoder": "another"}))
    assert "zero_shot.json: its encoder is not that of" in error_line(report_command(folder), capsys)


BAD_FILES = ["", "null", "[]", "5", "{}", "{", b"\xff\xfe", "[" * 100_000]


def write_bad(path: Path, content: str | bytes) -> None:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def test_the_advice_for_a_bad_result_works(zero_shot, encoder, survey, tmp_path, capsys):
    folder = tmp_path / "results"
    shutil.copytree(zero_shot, folder)
    path, good = folder / "zero_shot.json", result(zero_shot, "zero_shot")
    for content in BAD_FILES:
        write_bad(path, content)
        line = error_line(report_command(folder), capsys)
        assert f"{path}: " in line
        assert line.endswith(f"; delete {path} and run linear_probe_checkpoints.py --method zero_shot again")
    path.unlink()
    run(command(encoder, survey, folder, "--method", "zero_shot"))
    run(report_command(folder))
    assert result(folder, "zero_shot")["accuracy"] == good["accuracy"]


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("ssl_fine_tune", "ssl_fine_tune"),
        ("ssl_fine_tune_tta", "ssl_fine_tune"),
        ("random_knn", "random_linear_probe"),
        ("ssl_attentive_probe", "ssl_linear_probe"),
        ("raw_pixels", "random_linear_probe"),
    ],
)
def test_the_advice_for_a_bad_baseline_names_its_method(zero_shot, tmp_path, capsys, name, method):
    folder = tmp_path / "results"
    shutil.copytree(zero_shot, folder)
    (folder / f"{name}.json").write_text("{}")
    line = error_line(report_command(folder), capsys)
    assert line.endswith(f"; delete {folder / method}.json and run linear_probe_checkpoints.py --method {method} again")


def test_the_advice_for_a_bad_configuration_works(zero_shot, encoder, survey, tmp_path, capsys):
    folder = tmp_path / "results"
    shutil.copytree(zero_shot, folder)
    path, good = folder / "evaluation.json", result(zero_shot, "evaluation")
    for content in BAD_FILES:
        write_bad(path, content)
        for arguments in (report_command(folder), command(encoder, survey, folder, "--method", "0")):
            line = error_line(arguments, capsys)
            assert f"{path}: " in line
            assert line.endswith("; delete it and run a method again")
    path.unlink()
    run(command(encoder, survey, folder, "--method", "zero_shot"))
    run(report_command(folder))
    assert result(folder, "evaluation") == good


@pytest.mark.slow
def test_report_with_damaged_predictions(results, tmp_path, capsys):
    folder = tmp_path / "results"
    shutil.copytree(results, folder)
    (folder / "ssl_linear_probe.parquet").write_bytes(b"PAR1")
    line = error_line(report_command(folder), capsys)
    assert "ssl_linear_probe.parquet: not a catalogue of this program, or damaged" in line
    assert line.endswith("run linear_probe_checkpoints.py --method ssl_linear_probe again")

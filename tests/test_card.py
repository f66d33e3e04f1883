"""Cards: the code in them runs, their numbers are those of the results, and killed commands end with them."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import TRANSFORMERS_5_17, random_images, write_hdf5
from huggingface_hub import ModelCard
from PIL import Image
from test_linear_probe_checkpoints import command as evaluation_command
from test_linear_probe_checkpoints import report_command, write_survey
from test_linear_probe_checkpoints import run as evaluate
from test_main import run as pretrain
from test_trainer import command

import main
from galaxy_mae import files
from galaxy_mae.data.batches import GalaxyBatches
from galaxy_mae.data.download import GALAXY10
from galaxy_mae.evaluation.fine_tuning import classify
from galaxy_mae.evaluation.scores import wilson
from galaxy_mae.model.classifier import load_classifier
from galaxy_mae.model.encoder import encoder_fingerprint, load_encoder
from galaxy_mae.predictions.formats import read_catalogue
from galaxy_mae.reports import card
from galaxy_mae.reports.card import write_classifier_cards, write_encoder_card

needs_processor = pytest.mark.skipif(TRANSFORMERS_5_17, reason="there the image processor needs torchvision")


@pytest.fixture(scope="module")
def survey(tmp_path_factory) -> Path:
    return write_survey(tmp_path_factory.mktemp("survey") / "my_galaxies")


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory, survey) -> Path:
    """A finished pre-training."""
    folder = tmp_path_factory.mktemp("runs") / "small"
    pretrain(command(folder, survey, "--max_steps", "6"))
    return folder


@pytest.fixture(scope="module")
def results(tmp_path_factory, run_folder, survey) -> Path:
    """An evaluation with two classifiers from pre-trained and two from random weights."""
    folder = tmp_path_factory.mktemp("results") / "small"
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("SLURM_ARRAY_TASK_ID", raising=False)
        for method in ("ssl_fine_tune", "random_fine_tune"):
            evaluate(evaluation_command(run_folder, survey, folder, "--method", method))
    return folder


def read_card(folder: Path) -> ModelCard:
    """Parsed by the library; without machine paths, and with figures that are there."""
    text = (folder / "README.md").read_text()
    assert "/tmp" not in text
    assert str(Path.cwd()) not in text
    for figure in re.findall(r"!\[[^]]+\]\(([^)]+)\)", text):
        assert (folder / figure).read_bytes().startswith(b"\x89PNG")
    return ModelCard(text)


def run_snippet(folder: Path, monkeypatch, tmp_path: Path) -> tuple[dict, np.ndarray]:
    """Run a card's code as it stands in its folder, where `galaxy.jpg` is. Returns its names and the image."""
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    Image.fromarray(random_images(1, seed=3)[0]).save(copy / "galaxy.jpg")
    (code,) = re.findall(r"```python\n(.*?)```", (copy / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(copy)
    names: dict = {}
    exec(code, names)
    return names, np.array(Image.open("galaxy.jpg"))


def by_name(parsed: ModelCard) -> dict[str, float]:
    return {result.metric_name: result.metric_value for result in parsed.data.eval_results}


# --------------------------------------------------------------------------------------------------------- the encoder


def test_metadata_of_an_encoder(run_folder):
    parsed = read_card(run_folder / "encoder")
    metrics = json.loads((run_folder / "eval_results.json").read_text())
    assert (parsed.data.library_name, parsed.data.pipeline_tag) == ("transformers", "image-feature-extraction")
    assert parsed.data.license == "mit"
    assert {"masked-autoencoder", "astronomy"} <= set(parsed.data.tags)
    assert parsed.data.datasets is None
    assert parsed.data.model_name == "small"
    assert by_name(parsed) == {
        "Linear probe accuracy": pytest.approx(metrics["eval_linear_probe_accuracy"], abs=1e-4),
        "k-NN accuracy": pytest.approx(metrics["eval_knn_accuracy"], abs=1e-4),
    }
    assert {result.dataset_split for result in parsed.data.eval_results} == {"validation"}
    assert {result.dataset_name for result in parsed.data.eval_results} == {"my_galaxies"}


def test_an_encoders_card_says_what_it_was_trained_on(run_folder):
    text = read_card(run_folder / "encoder").text
    metrics = json.loads((run_folder / "eval_results.json").read_text())
    parts = pq.read_table(run_folder / "encoder" / "pretraining_galaxies.parquet")["split"].to_pylist()
    assert f"{parts.count('train')} training and {parts.count('validation')} validation galaxies" in text
    accuracy, count = metrics["eval_knn_accuracy"], metrics["eval_num_validation_images"]
    low, high = wilson(accuracy, count)
    assert f"| k-NN | {100 * accuracy:.2f} % ({100 * low:.2f} to {100 * high:.2f}) |" in text
    assert "was not recorded" in text
    assert "Galaxy10" not in text
    assert "hf upload USER/NAME FOLDER" in text


@needs_processor
def test_the_code_of_an_encoders_card_gives_our_features(run_folder, tmp_path, monkeypatch):
    names, image = run_snippet(run_folder / "encoder", monkeypatch, tmp_path)
    encoder = load_encoder(str(run_folder))
    pixels = (torch.from_numpy(image / 255) - torch.tensor(encoder.mean)) / torch.tensor(encoder.std)
    with torch.no_grad():
        tokens = encoder.model(pixels.permute(2, 0, 1)[None].float()).last_hidden_state
    assert torch.allclose(names["features"], tokens[:, 1:].mean(dim=1), atol=1e-4)
    assert f"(1, {names['features'].shape[1]})" in (run_folder / "encoder" / "README.md").read_text()


def test_a_card_does_not_change_the_encoder(run_folder, tmp_path):
    """Nor its fingerprint, by which features are cached and results are compared."""
    plain = tmp_path / "encoder"
    shutil.copytree(run_folder / "encoder", plain, ignore=shutil.ignore_patterns("*.md", "*.png"))
    with_card, without = (load_encoder(str(folder)) for folder in (run_folder, plain))
    assert encoder_fingerprint(with_card.model, with_card.mean, with_card.std) == encoder_fingerprint(
        without.model, without.mean, without.std
    )


def changed_recipe(run_folder: Path, folder: Path, **changes: str) -> ModelCard:
    """The card of a run with another recipe."""
    shutil.copytree(run_folder, folder)
    path = folder / "encoder" / "pretraining.json"
    about = json.loads(path.read_text())
    about["recipe"] |= changes
    path.write_text(json.dumps(about))
    write_encoder_card(folder)
    return read_card(folder / "encoder")


@pytest.mark.parametrize(
    ("changes", "datasets"),
    [
        ({"dataset": "galaxy10"}, None),
        ({"dataset": "mine.h5", "data": GALAXY10.sha256}, None),
        ({"dataset": "matthieulel/galaxy10_decals"}, ["matthieulel/galaxy10_decals"]),
    ],
)
def test_galaxy10_is_recognized_and_cited(run_folder, tmp_path, changes, datasets):
    parsed = changed_recipe(run_folder, tmp_path / "run", **changes)
    assert parsed.data.datasets == datasets
    assert {result.dataset_name for result in parsed.data.eval_results} == {"Galaxy10 DECaLS"}
    for words in ("59 objects are there twice", "Galaxy Zoo's volunteers", "@article{walmsley2022galaxy"):
        assert words in parsed.text


def test_what_is_not_known_is_not_said(run_folder, tmp_path, monkeypatch):
    """Synthetic galaxies are no survey, another data set of the Hub is not Galaxy10, and a folder is not on the Hub."""
    synthetic = changed_recipe(run_folder, tmp_path / "synthetic", dataset="synthetic:4000")
    assert "no images of the sky" in synthetic.text
    other = changed_recipe(run_folder, tmp_path / "other", dataset="someone/galaxies")
    assert other.data.datasets == ["someone/galaxies"]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "someone" / "galaxies").mkdir(parents=True)
    local = changed_recipe(run_folder, tmp_path / "local", dataset="someone/galaxies")
    assert local.data.datasets is None
    for parsed in (synthetic, other, local):
        assert "Galaxy10" not in parsed.text
        assert "walmsley" not in parsed.text


@pytest.mark.slow
def test_an_encoder_of_unlabelled_galaxies_has_no_accuracy(tmp_path):
    images = random_images(200)
    folder = tmp_path / "images"
    folder.mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i}.png")
    pretrain(command(tmp_path / "run", folder, "--max_steps", "2"))
    parsed = read_card(tmp_path / "run" / "encoder")
    assert parsed.data.eval_results is None
    assert parsed.data.metrics is None
    assert "Mean squared error" in parsed.text


@pytest.mark.slow
def test_a_killed_run_ends_with_the_card(tmp_path, monkeypatch, drawn_figures):
    """Killed before the card and within it, bit for bit; a run without it is not finished."""
    data = write_hdf5(tmp_path / "galaxies.h5", random_images(200))
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    pretrain(command(tmp_path / "whole" / "run", data, "--max_steps", "4"))
    folder = tmp_path / "killed" / "run"
    for target, name in ((main, "write_encoder_card"), (card, "move_files")):
        with monkeypatch.context() as patch:
            patch.setattr(target, name, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(SystemExit):
                pretrain(command(folder, data, "--max_steps", "4"))
        assert not json.loads((folder / "run.json").read_text())["finished"]
        assert not (folder / "encoder" / "README.md").exists()
    pretrain(command(folder, data, "--max_steps", "4"))
    for name in ("README.md", "reconstruction_example.png"):
        paths = (folder / "encoder" / name, tmp_path / "whole" / "run" / "encoder" / name)
        assert paths[0].read_bytes() == paths[1].read_bytes()
    assert not list(folder.rglob(".tmp-*"))


# ---------------------------------------------------------------------------------------------------- the classifiers


def test_metadata_of_classifiers(results):
    for method in ("ssl_fine_tune", "random_fine_tune"):
        about = json.loads((results / f"{method}.json").read_text())
        for position, seed in enumerate(about["seeds"]):
            parsed = read_card(results / method / f"seed_{seed}")
            assert (parsed.data.library_name, parsed.data.pipeline_tag) == ("transformers", "image-classification")
            assert ("masked-autoencoder" in parsed.data.tags) == (method == "ssl_fine_tune")
            assert parsed.data.base_model is None  # the encoder is not on the Hub
            scores = by_name(parsed)
            assert scores["Accuracy"] == pytest.approx(about["accuracy_per_seed"][position], abs=1e-4)
            assert {result.dataset_split for result in parsed.data.eval_results} == {"test"}
        means = {"Balanced accuracy": about["balanced_accuracy"], "Macro-F1": about["macro_f1"]}
        for name, expected in means.items():
            each = [by_name(read_card(results / method / f"seed_{seed}"))[name] for seed in about["seeds"]]
            assert np.mean(each) == pytest.approx(expected, abs=1e-4)


def test_the_text_of_a_classifiers_card(results):
    about = json.loads((results / "ssl_fine_tune.json").read_text())
    text = read_card(results / "ssl_fine_tune" / "seed_1").text
    accuracy = about["accuracy_per_seed"][1]
    low, high = wilson(accuracy, 60)
    assert f"{100 * accuracy:.2f} % ({100 * low:.2f} to {100 * high:.2f}) of 60 test galaxies" in text
    mean = f"{100 * about['accuracy']:.2f} % ({100 * about['interval'][0]:.2f} to {100 * about['interval'][1]:.2f})"
    assert f"| {mean} |" in text
    assert f"temperature of {about['best_params']['1']['temperature']:.3f}" in text
    assert f"error is {100 * about['calibration']['ece_per_seed'][1]:.1f} %" in text
    assert f"it is {100 * about['calibration']['before']['ece_per_seed'][1]:.1f} %" in text
    sizes = json.loads((results / "evaluation.json").read_text())["split_sizes"]
    assert f"{sizes['train']} training, {sizes['validation']} validation and 60 test galaxies" in text
    assert "pre-trained encoder `small`" in text
    predictions = read_catalogue(results / "ssl_fine_tune.parquet")
    label, predicted = (predictions.codes(name) for name in ("label", "predicted_class_seed_1"))
    recall = [np.mean(predicted[label == c] == c) for c in range(4)]
    hard = int(np.argmin(recall))
    assert f"Recall is lowest for class {hard}: {100 * recall[hard]:.0f} % of {np.sum(label == hard)} galaxies" in text
    assert "was not recorded" in text
    assert "Galaxy10" not in text


@needs_processor
def test_the_code_of_a_classifiers_card_gives_our_probabilities(results, tmp_path, monkeypatch):
    """Plain transformers, with the temperature: the class and the probabilities that the evaluation would write."""
    folder = results / "ssl_fine_tune" / "seed_0"
    names, image = run_snippet(folder, monkeypatch, tmp_path)
    classifier = load_classifier(str(folder))
    batches = GalaxyBatches(image[None], classifier.mean, classifier.std, len(image))
    ours = classify(classifier.model, batches, np.arange(1))[0]
    best = np.argsort(-ours)[:3]
    assert [p["label"] for p in names["predictions"]] == [classifier.class_names[c] for c in best]
    assert [p["score"] for p in names["predictions"]] == pytest.approx(ours[best].tolist(), abs=1e-4)


@pytest.mark.slow
def test_a_killed_evaluation_ends_with_the_cards(results, run_folder, survey, tmp_path, monkeypatch):
    """The method was finished before its cards were written. The same command writes them, and so does --report."""
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID", raising=False)
    before = {path: path.read_bytes() for path in results.glob("*/*/README.md")}
    assert len(before) == 4
    for path in before:
        path.unlink()
    evaluate(evaluation_command(run_folder, survey, results, "--method", "ssl_fine_tune"))
    assert {path: path.read_bytes() for path in results.glob("ssl_fine_tune/*/README.md")}.items() <= before.items()
    assert len(list(results.glob("*/*/README.md"))) == 2
    with monkeypatch.context() as patch:  # killed just before the temporary folders are removed
        patch.setattr(files, "_remove", lambda folder: None)
        write_classifier_cards(results, "ssl_fine_tune")
    assert list(results.glob("*/*/.tmp-*"))
    evaluate(evaluation_command(run_folder, survey, results, "--method", "ssl_fine_tune"))
    assert not list(results.glob("*/*/.tmp-*"))
    evaluate(report_command(results))
    assert {path: path.read_bytes() for path in results.glob("*/*/README.md")} == before


def test_a_base_model_is_named_if_it_is_on_the_hub(results, tmp_path):
    """And only for classifiers that start from it. One that was deleted is passed over."""
    folder = tmp_path / "results"
    shutil.copytree(results, folder)
    path = folder / "evaluation.json"
    config = json.loads(path.read_text())
    config["hub_ids"] = {"encoder": "someone/encoder", "dataset": None}
    path.write_text(json.dumps(config))
    shutil.rmtree(folder / "random_fine_tune" / "seed_1")
    for method in ("ssl_fine_tune", "random_fine_tune", "zero_shot"):
        write_classifier_cards(folder, method)
    assert read_card(folder / "ssl_fine_tune" / "seed_1").data.base_model == "someone/encoder"
    assert read_card(folder / "random_fine_tune" / "seed_0").data.base_model is None
    assert not (folder / "random_fine_tune" / "seed_1").exists()


def test_a_card_of_another_architecture_does_not_call_it_a_vision_transformer(results, tmp_path):
    folder = tmp_path / "results"
    shutil.copytree(results, folder)
    path = folder / "evaluation.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"architecture": "convnext"}))
    write_classifier_cards(folder, "ssl_fine_tune")
    text = read_card(folder / "ssl_fine_tune" / "seed_0").text
    assert re.search(
        r"A network of the architecture convnext \(\d+\.\d M parameters\) that sorts galaxy images of \d+ x", text
    )
    assert "vision transformer" not in text
    assert "patch tokens" not in text


def test_names_of_classes_do_not_break_the_card(results, tmp_path):
    folder = tmp_path / "results"
    shutil.copytree(results, folder)
    path = folder / "evaluation.json"
    config = json.loads(path.read_text())
    config["class_names"] = ["a|b", "---\nlicense: other", "<b>c</b>", "![d](e)"]
    path.write_text(json.dumps(config))
    write_classifier_cards(folder, "ssl_fine_tune")
    parsed = read_card(folder / "ssl_fine_tune" / "seed_0")
    assert parsed.data.license == "mit"
    for name in ("a\\|b", "--- license: other", "\\<b\\>c\\</b\\>", "!\\[d\\](e)"):
        assert f"| {name} | " in parsed.text

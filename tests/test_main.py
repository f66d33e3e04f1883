"""main.py: what a run writes, and that bad input ends in one line and exit status 2."""

import base64
import itertools
import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
from conftest import TRANSFORMERS_5_17, random_images, write_hdf5
from filelock import FileLock
from safetensors import safe_open
from test_mae import load_mae, small_config
from test_trainer import ROOT, TINY, command, killed_at
from transformers import AutoImageProcessor, AutoModel, TrainerState
from transformers.integrations.integration_utils import rewrite_logs

import main
from galaxy_mae import files, provenance
from galaxy_mae.data.batches import GalaxyBatches
from galaxy_mae.data.cache import open_galaxies
from galaxy_mae.data.images import image_statistics
from galaxy_mae.data.seen import TrainingImages, find_seen_galaxies
from galaxy_mae.data.split import split_galaxies
from galaxy_mae.errors import UserError, one_line_errors
from galaxy_mae.files import claim
from galaxy_mae.model.encoder import load_encoder
from galaxy_mae.model.mae import build_mae
from galaxy_mae.provenance import read_pretraining
from galaxy_mae.training import reconstruction, tracking
from galaxy_mae.training.pretraining import PretrainingTrainer
from galaxy_mae.training.recipe import read_recipe


def run(arguments: list[str]) -> None:
    """As `python main.py`, in this process."""
    with one_line_errors("main.py"):
        main.main(arguments)


def refused(arguments: list[str], capsys) -> str:
    """The one line that a command ends with."""
    with pytest.raises(SystemExit) as stopped:
        run(arguments)
    assert stopped.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(lines) == 1
    assert lines[0].startswith("main.py: error: ")
    return lines[0]


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_run_writes_what_the_documentation_lists(tmp_path, small_hdf5):
    folder = tmp_path / "run"
    flags = ["--max_steps", "20", "--reconstruct_every", "0.5", "--norm_pix_loss", "True", "--eval_steps", "10"]
    run(command(folder, small_hdf5, *flags))
    with safe_open(folder / "model.safetensors", "pt") as stored:  # its own names, not transformers' corrupt ones
        assert set(stored.keys()) == set(load_mae(folder).state_dict())
    AutoModel.from_pretrained(folder / "encoder", add_pooling_layer=False)
    if not TRANSFORMERS_5_17:  # where it needs torchvision
        assert AutoImageProcessor.from_pretrained(folder / "encoder").size["height"] == 32
    for figure in ("reconstruction_example.png", "reconstruction_example2.png", "reconstructions/step_000010.png"):
        assert (folder / figure).read_bytes().startswith(b"\x89PNG")
    assert np.isfinite(json.loads((folder / "train_results.json").read_text())["train_loss"])
    assert np.isfinite(json.loads((folder / "eval_results.json").read_text())["eval_loss"])
    for weights in ("model.safetensors", "encoder/model.safetensors", "checkpoint-20/model.safetensors"):
        assert (folder / weights).stat().st_mode & 0o777 == 0o666 & ~umask()  # a colleague can read them
    about = json.loads((folder / "run.json").read_text())
    assert about["finished"]
    assert about["recipe"]["mask_ratio"] == 0.75
    assert len(about["recipe"]["data"]) == len(about["recipe"]["split"]) == 64
    assert set(about["sessions"][0]) >= {"commit", "versions", "device", "started"}
    assert not list(folder.glob(".*"))
    looks = TrainingImages.parse(load_encoder(str(folder)).training_images)
    assert np.mean(looks.distance(image_statistics(open_galaxies(str(small_hdf5), 32).pixels)) > 1) < 0.1
    pretraining = read_pretraining(str(folder / "encoder"))
    assert pretraining.recipe == about["recipe"]
    split = split_galaxies(open_galaxies(str(small_hdf5)))
    assert pretraining.galaxies["index"].to_pylist() == [*split["train"], *split["validation"]]


def test_online_probes_are_logged_and_change_nothing_else(tmp_path, small_hdf5):
    """At the evaluations that they are due at, also in a resumed run; the weights are those of a run without them."""
    flags = ["--max_steps", "24", "--eval_steps", "4", "--save_steps", "4"]
    run(command(tmp_path / "without", small_hdf5, *flags, "--probe_every", "0"))
    run(command(tmp_path / "with", small_hdf5, *flags, "--probe_every", "1"))
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("with", "without")]
    assert weights[0] == weights[1]
    history, plain = (
        json.loads((tmp_path / name / "trainer_state.json").read_text())["log_history"] for name in ("with", "without")
    )
    assert not any("eval_online_knn_accuracy" in entry for entry in plain)
    probed = [entry for entry in history if "eval_online_knn_accuracy" in entry]
    assert probed[0]["step"] == 0
    assert all(0 <= entry["eval_online_linear_probe_accuracy"] <= 1 for entry in probed)
    assert 2 <= len(probed) < sum("eval_loss" in entry for entry in history)
    epochs = [entry["epoch"] for entry in probed]
    assert all(later - earlier >= 1 for earlier, later in itertools.pairwise(epochs))


def test_the_best_checkpoint_may_be_that_of_an_online_probe(tmp_path, small_hdf5):
    flags = ["--max_steps", "24", "--eval_steps", "4", "--save_steps", "4", "--save_total_limit", "10"]
    flags += ["--load_best_model_at_end", "--metric_for_best_model", "online_knn_accuracy"]
    run(command(tmp_path / "run", small_hdf5, *flags))
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
    accuracies = {
        entry["step"]: entry["eval_online_knn_accuracy"]
        for entry in state["log_history"]
        if "eval_online_knn_accuracy" in entry and entry["step"] > 0
    }
    assert len(accuracies) >= 6  # at every evaluation
    assert state["best_metric"] == max(accuracies.values())
    assert accuracies[state["best_global_step"]] == state["best_metric"]
    best = tmp_path / "run" / f"checkpoint-{state['best_global_step']}" / "model.safetensors"
    assert best.read_bytes() == (tmp_path / "run" / "model.safetensors").read_bytes()


def test_without_two_classes_nothing_is_probed(tmp_path, capsys):
    one_class = write_hdf5(tmp_path / "one_class.h5", random_images(200), np.zeros(200))
    flags = ["--load_best_model_at_end", "--metric_for_best_model", "online_knn_accuracy"]
    assert "has no two classes; use loss" in refused(command(tmp_path / "refused", one_class, *flags), capsys)
    assert not (tmp_path / "refused" / "run.json").exists()
    run(command(tmp_path / "run", one_class, "--max_steps", "4"))
    history = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    found = {name for entry in history for name in entry if name.startswith("eval_online")}
    assert found == {"eval_online_rankme"}


def test_only_the_training_set_is_trained_on(tmp_path, small_hdf5, monkeypatch):
    """The pixels of other galaxies are not used, nor their brightness in the statistics."""
    galaxies = open_galaxies(str(small_hdf5), 32)
    split = split_galaxies(galaxies)
    used = set()
    train_transform = GalaxyBatches.train_transform

    def watched(self, batch, step):
        used.update(batch["index"].tolist())
        expected = galaxies.pixels[split["train"]].mean(axis=(0, 1, 2)) / 255
        assert np.allclose(self.mean.numpy().ravel(), expected, atol=1e-6)
        return train_transform(self, batch, step)

    monkeypatch.setattr(GalaxyBatches, "train_transform", watched)
    run(command(tmp_path / "run", small_hdf5, "--num_train_epochs", "3", "--max_steps", "-1"))
    assert used <= set(split["train"].tolist())
    assert len(used) > 0.99 * len(split["train"])


SHORT = ("--max_steps", "2", "--save_steps", "1")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, small_hdf5) -> Path:
    """A finished run of two steps, `SHORT`."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    run(command(folder, small_hdf5, *SHORT))
    return folder


def test_finished_run_is_not_started_again(finished, small_hdf5, caplog):
    before = (finished / "model.safetensors").stat().st_mtime_ns
    run(command(finished, small_hdf5, *SHORT))
    assert "finished" in caplog.text
    assert (finished / "model.safetensors").stat().st_mtime_ns == before


def test_another_recipe_in_the_same_folder_is_refused(finished, tmp_path, small_hdf5, capsys):
    line = refused(command(finished, small_hdf5, *SHORT, "--mask_ratio", "0.5"), capsys)
    assert "mask_ratio is 0.75 there and 0.5 here;" in line
    assert "max_steps" not in line
    other = write_hdf5(tmp_path / "other.h5", random_images(200, seed=1))
    assert "data" in refused(command(finished, other, *SHORT), capsys)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--image_size", "30"], "--image_size 30 is not divisible by --patch_size 8"),
        (["--mask_ratio", "0"], "--mask_ratio 0.0"),
        (["--mask_ratio", "1"], "--mask_ratio 1.0"),
        (["--mask_ratio", "often"], "--mask_ratio"),
        (["--hidden_size", "50"], "--hidden_size 50 is not divisible by --num_attention_heads"),
        (["--batch_size", "500"], "fewer than a batch of 500"),
        (["--mask_ration", "0.5"], "--mask_ration: not supported here; did you mean --mask_ratio?"),
        (["--dataset", "nowhere.h5"], "nowhere.h5: no such file"),
        (["--config", "nowhere.yaml"], "--config nowhere.yaml"),
        (["--per_device_train_batch_size", "4"], "give one"),
        (["--eval_strategy", "never"], "never"),
    ],
)
def test_bad_flags(tmp_path, small_hdf5, capsys, flags, told):
    folder = tmp_path / "run"
    assert told in refused(command(folder, small_hdf5, *flags), capsys)
    assert not list(folder.glob("*"))


def test_a_second_process_is_kept_out(tmp_path, small_hdf5, capsys):
    arguments = command(tmp_path / "run", small_hdf5, "--max_steps", "4")
    (tmp_path / "run").mkdir()
    with FileLock(tmp_path / "run" / "run.lock"):
        assert "another process" in refused(arguments, capsys)


def test_a_requeued_job_waits_for_its_previous_job(tmp_path, monkeypatch):
    """It may still be ending, on a node that Slurm gave up. Without a requeue there is no waiting."""
    path = tmp_path / "run.lock"
    previous = FileLock(path, thread_local=False)
    previous.acquire()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
    with pytest.raises(UserError, match="another process"), claim(path):
        pass
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    end = threading.Timer(0.3, previous.release)
    end.start()
    with claim(path):
        assert not previous.is_locked
    with claim(path):
        pass  # it was released
    end.join()


def test_a_precision_that_was_not_set_may_change_with_the_node(tmp_path):
    run = {"recipe": {"bf16": True, "mask_ratio": 0.75}}
    other = {"bf16": False, "mask_ratio": 0.75}
    provenance.check_same_recipe(tmp_path, run, other, explicitly_set={"mask_ratio"})
    with pytest.raises(UserError, match="bf16 is True there and False here"):
        provenance.check_same_recipe(tmp_path, run, other, explicitly_set={"bf16"})


def test_a_constant_colour_is_refused(tmp_path, capsys):
    images = random_images(200)
    images[..., 2] = 0
    path = write_hdf5(tmp_path / "no_blue.h5", images)
    assert "a color channel is constant" in refused(command(tmp_path / "run", path, "--max_steps", "4"), capsys)


def test_bad_recipes(tmp_path, capsys):
    for text, told in (
        ("mask_ration: 0.5", "recipe.yaml: --mask_ration: not supported here; did you mean --mask_ratio?"),
        ("mask_ratio: often", "recipe.yaml: argument --mask_ratio"),
        ("a list", "a recipe is a list of lines"),
        ("config: other.yaml", "no field config"),
        ("a: [", "not YAML"),
    ):
        (tmp_path / "recipe.yaml").write_text(text)
        assert told in refused(["--config", str(tmp_path / "recipe.yaml")], capsys)


def test_full_disk(small_disk, small_hdf5, capsys):
    folder = small_disk / "run"
    arguments = command(folder, small_hdf5, "--max_steps", "8", "--save_steps", "2", "--save_total_limit", "9")
    line = refused(arguments, capsys)
    assert "the disk or quota is full" in line
    assert "checkpoint-" in line
    assert not list(folder.glob(".*"))


@pytest.mark.slow
def test_hub_id_without_network(tmp_path):
    """In a process of its own: huggingface_hub reads the variables once."""
    environment = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    arguments = [*TINY, "--dataset", "matthieulel/galaxy10_decals", "--output_dir", str(tmp_path / "run")]
    done = subprocess.run(
        [sys.executable, ROOT / "main.py", *arguments], capture_output=True, text=True, env=environment, timeout=120
    )
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("main.py: error: --dataset matthieulel/galaxy10_decals")
    assert "Traceback" not in done.stderr


class _Hub(BaseHTTPRequestHandler):
    """What an upload asks of the Hub; files come inside of the commit."""

    def do_POST(self):
        content = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked.append((self.path, content, self.headers["Authorization"]))
        url = f"{huggingface_hub.constants.ENDPOINT}/me/galaxies"
        answer = {"url": url, "errors": [], "warnings": [], "commitUrl": f"{url}/commit/1", "commitOid": "1"}
        if "/preupload/" in self.path:
            answer["files"] = [
                {"path": each["path"], "uploadMode": "regular", "shouldIgnore": False}
                for each in json.loads(content)["files"]
            ]
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def test_an_encoder_is_uploaded_and_a_failure_loses_nothing(tmp_path, small_hdf5, monkeypatch, capsys, caplog):
    """First no server answers: the run is finished, and the line has the command that repeats the upload."""
    folder, flags = tmp_path / "run", ["--max_steps", "2", "--push_to_hub", "True", "--hub_model_id"]
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
    assert "there is no token" in refused(command(folder, small_hdf5, *flags, "me/galaxies"), capsys)
    assert "--hub_model_id a/b/c: " in refused(command(folder, small_hdf5, *flags, "a/b/c"), capsys)
    assert not folder.exists()
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    run(command(folder, small_hdf5, *flags, "galaxies"))
    assert provenance.read_run(folder)["finished"]
    (line,) = [record.message for record in caplog.records if "not uploaded" in record.message]
    assert line.endswith(f"; to repeat: hf upload galaxies {folder}/encoder . --private")
    assert "hf_secret" not in caplog.text

    with ThreadingHTTPServer(("127.0.0.1", 0), _Hub) as server:
        server.asked = []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        tracking.push_encoder(folder / "encoder", "galaxies", private=True)
        server.shutdown()
    assert "encoder uploaded: " in caplog.text
    (_, made, _), *_, (path, commit, _) = server.asked
    made = json.loads(made)
    assert (made["name"], made.get("visibility") or made["private"]) in (("galaxies", "private"), ("galaxies", True))
    assert path == "/api/models/me/galaxies/commit/main"
    assert {token for *_, token in server.asked} == {"Bearer hf_secret"}
    _, *entries = (json.loads(line)["value"] for line in commit.splitlines())
    sent = {entry["path"]: base64.b64decode(entry["content"]) for entry in entries}
    assert sent == {path.name: path.read_bytes() for path in (folder / "encoder").iterdir()}
    assert {"README.md", "model.safetensors", "pretraining.json"} <= set(sent)


@pytest.mark.parametrize(
    ("every", "evaluations", "plotted"),
    [(20, range(12, 73, 12), [24, 48, 60]), (0.2, (0.2, 0.4, 0.6), [0.2, 0.4, 0.6])],
)
def test_a_resumed_run_plots_at_the_same_epochs(tmp_path, monkeypatch, every, evaluations, plotted):
    """Also when it was saved between two evaluations."""
    found = []
    monkeypatch.setattr(reconstruction, "reconstruct", lambda *_: ())
    monkeypatch.setattr(reconstruction.figures, "reconstructions", lambda *given: found.append(given[-1]))
    model = build_mae(small_config())
    for resumed_at in (0, *evaluations, *(epoch - evaluations[0] / 6 for epoch in evaluations)):
        found.clear()
        trainer = SimpleNamespace(options=SimpleNamespace(reconstruct_every=every), batches=None, trackers=[])
        callback = reconstruction.ReconstructionCallback(trainer, ([], []))
        history = [
            {"loss": 1.0, "epoch": 0.1},
            *({"eval_loss": 1.0, "epoch": x} for x in evaluations if x <= resumed_at),
        ]
        for epoch in (x for x in evaluations if x > resumed_at):
            history += [{"loss": 1.0, "epoch": epoch}, {"eval_loss": 1.0, "epoch": epoch}]
            state = TrainerState(epoch=epoch, log_history=history)
            callback.on_evaluate(SimpleNamespace(output_dir=tmp_path), state, None, model=model)
        assert [float(title.split()[1][:-1]) for title in found] == [x for x in plotted if x > resumed_at]


def test_a_run_starts_from_the_weights_of_another_and_knows_what_they_have_seen(tmp_path, small_hdf5):
    """A resumed run does not read them again. The leakage check of its encoder covers their galaxies, too."""
    positions = {"ra": np.linspace(0, 300, 200), "dec": np.full(200, 30.0)}
    others = write_hdf5(tmp_path / "others.h5", random_images(200, seed=7), **positions)
    first, second = tmp_path / "first", tmp_path / "second"
    run(command(first, others, "--max_steps", "4"))
    flags = ["--init_from", str(first), "--max_steps", "4", "--save_steps", "2", "--learning_rate", "1e-12"]
    with killed_at(3):
        main.main(command(second, small_hdf5, *flags))
    expected, seen = load_mae(first).state_dict(), read_pretraining(str(first / "encoder")).galaxies
    weights = files.sha256(first / "model.safetensors")
    first.rename(tmp_path / "elsewhere")
    run(command(second, small_hdf5, *flags))
    for name, tensor in load_mae(second).state_dict().items():
        assert np.allclose(tensor, expected[name], atol=1e-6), name
    about = provenance.read_run(second)
    assert about["recipe"]["init_from"] == about["init_from"]["source"] == str(first)
    assert (about["init_from"]["sha256"], about["init_from"]["taken"]) == (weights, "all weights")
    catalogue, galaxies = read_pretraining(str(second / "encoder")).galaxies, open_galaxies(str(others))
    assert catalogue["split"].to_pylist().count("init_from") == len(seen)
    found = find_seen_galaxies(galaxies, np.arange(200), catalogue)["seen"]
    assert sorted(np.flatnonzero(found)) == sorted(seen["index"].to_pylist())


def test_weights_of_a_run_that_does_not_know_its_galaxies_are_refused(finished, tmp_path, small_hdf5, capsys):
    shutil.copytree(finished, tmp_path / "first")
    shutil.rmtree(tmp_path / "first" / "encoder")
    for source in (tmp_path / "first", tmp_path / "first" / "checkpoint-2"):
        line = refused(command(tmp_path / "second", small_hdf5, "--init_from", str(source)), capsys)
        assert f"--init_from {source}: the run is not finished" in line
        assert not (tmp_path / "second" / "run.json").exists()


def test_offline_the_log_says_that_the_hub_was_not_asked(tmp_path, caplog):
    """What an encoder on the Hub was pre-trained on is then not known; a local folder without it is no news."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    code = "from galaxy_mae.provenance import read_pretraining; print(read_pretraining('someone/encoder'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.stdout == "None\n"
    assert "cannot be asked what it was pre-trained on: no network" in done.stderr
    assert read_pretraining(str(tmp_path)) is None
    assert not caplog.records


def test_flags_override_the_recipe_and_types_are_kept(tmp_path):
    recipe = read_recipe([*TINY, "--mask_ratio", "0.9", "--output_dir", str(tmp_path), "--run_name", "x"])
    assert recipe.model.mask_ratio == 0.9
    assert recipe.model.patch_size == 8
    assert recipe.galaxies.dataset == "synthetic:2000"
    assert recipe.training.run_name == "x"
    assert recipe.training.learning_rate == pytest.approx(4e-3 * 16 / 256)


def test_default_recipe_is_the_documented_one(tmp_path):
    recipe = read_recipe(["--output_dir", str(tmp_path), "--use_cpu", "True", "--report_to", "none"])
    config = recipe.model.config(recipe.galaxies.image_size)
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (384, 12, 6)
    assert (config.image_size, config.patch_size, config.mask_ratio, config.norm_pix_loss) == (256, 16, 0.75, False)
    assert (config.decoder_hidden_size, config.decoder_num_hidden_layers) == (512, 4)
    assert config.decoder_num_attention_heads == 16
    assert config.layer_norm_eps == 1e-6
    assert recipe.training.learning_rate == pytest.approx(3e-4)
    assert recipe.as_dict()["batch_size"] == 512
    assert (recipe.training.num_train_epochs, recipe.training.weight_decay) == (400, 0.05)


def test_help_reads_well_and_imports_nothing_that_is_slow():
    program = [sys.executable, "-X", "importtime", ROOT / "main.py", "--help"]
    done = subprocess.run(program, capture_output=True, text=True, check=True)
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert "yaml" in imported
    slow = {"torch", "transformers.training_args", "pandas", "sklearn", "scipy", "matplotlib", "datasets", "astropy"}
    assert not slow & imported
    text = done.stdout
    assert len(text.splitlines()) < 190
    for word in (
        "--dataset",
        "--mask_ratio",
        "--batch_size",
        "--learning_rate",
        "TrainingArguments",
        "recipes/demo.yaml",
    ):
        assert word in text


def test_wandb_gets_no_empty_tag(tmp_path, monkeypatch):
    """It refuses them; the name of `--dataset .` is empty."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_TAGS", "mine,,")
    started = []
    monkeypatch.setattr("wandb.init", lambda **options: started.append(options) or SimpleNamespace(dir=""))
    tracking.start_run(["wandb"], tmp_path, "run", {}, "pre-training", ["", "galaxies"])
    assert started[0]["tags"] == ["galaxies", "mine"]


@pytest.mark.slow
def test_dashboards_show_a_run_of_two_sessions_as_one(tmp_path, small_hdf5, monkeypatch, caplog):
    """W&B's own reader and TensorBoard's find every value of the log, in order, the best ones, and the figures.

    W&B logs offline, because nobody is logged in. The first session ends after step 5, the second resumes from step 4.
    """
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "nobody"))
    monkeypatch.setenv("WANDB_LOG_MODEL", "end")
    folder = tmp_path / "run"
    history = train_in_two_sessions(folder, small_hdf5, monkeypatch, "wandb", "tensorboard")
    sys.modules["wandb"].teardown()  # otherwise processes of later tests would use this process's service
    assert "wandb sync" in caplog.text
    check_wandb(folder, history)
    check_tensorboard(folder / "tensorboard", history)


def train_in_two_sessions(folder: Path, data: Path, monkeypatch, *report_to: str) -> list[dict]:
    """The log of a training to step 6, interrupted after step 5; the last checkpoint was of step 4."""
    flags = ["--report_to", *report_to, "--max_steps", "6", "--save_steps", "2", "--logging_steps", "1"]
    arguments = command(folder, data, *flags, "--eval_steps", "1", "--reconstruct_every", "0.2")
    evaluate = PretrainingTrainer.evaluate

    def interrupted(trainer, *args, **kwargs):
        metrics = evaluate(trainer, *args, **kwargs)
        if trainer.state.global_step == 5:
            raise KeyboardInterrupt
        return metrics

    with monkeypatch.context() as patch:
        patch.setattr(PretrainingTrainer, "evaluate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            main.main(arguments)
    tracking.finish_run()
    main.main(arguments)
    tracking.finish_run()
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


def check_wandb(folder: Path, history: list[dict]) -> None:
    sessions = sorted((folder / "wandb").glob("offline-run-*"))
    run_id = (folder / "wandb_run_id").read_text()
    assert [path.name.endswith(run_id) for path in sessions] == [True, True]
    records = [wandb_records(path) for path in sessions]
    (start,) = (record["run"] for record in records[0] if record["type"] == "run")
    assert start["job_type"] == "pre-training"
    assert start["tags"] == [start["config"]["update"]["dataset"].rsplit("/")[-1]]
    metrics = [record["metric"] for record in records[0] if record["type"] == "metric"]
    assert any(x.get("glob_name") == "*" and x["step_metric"] == "train/global_step" for x in metrics)
    rows = [{x["history"]["item"]["_step"]: x["history"]["item"] for x in y if x["type"] == "history"} for y in records]
    for session in rows:
        assert list(session) == sorted(session)
    repeated = set(rows[0]) & set(rows[1])
    assert {rows[0][step]["train/global_step"] for step in repeated} == {5}  # what came after the checkpoint
    assert max(rows[0]) == max(repeated)
    for step, name in itertools.product(repeated, ("train/loss", "eval/loss", "train/global_step")):
        assert rows[0][step].get(name) == rows[1][step].get(name)
    merged = [row for _, row in sorted((rows[0] | rows[1]).items())]
    values = [row for row in merged if "eval/reconstructions.caption" not in row]
    assert [row["train/global_step"] for row in values] == [entry["step"] for entry in history]
    for name in {name for entry in history for name in entry} - {"step"}:
        (group,) = rewrite_logs({name: 0})
        assert [row.get(group) for row in values] == pytest.approx([entry.get(name) for entry in history]), name
    assert {name.split("/")[0] for row in values for name in row if "/" in name} == {"train", "eval"}
    figures = [row for row in merged if row not in values]
    assert [row["eval/reconstructions.caption"].split(":")[0] for row in figures] == [
        "epoch 0.2",
        "epoch 0.4",
        "epoch 0.6",
    ]
    for row in figures:
        (figure,) = (folder / "wandb").glob(f"offline-run-*/files/{row['eval/reconstructions.path']}")
        assert figure.read_bytes().startswith(b"\x89PNG")
    summary = {key: value for x in records[1] for key, value in x.get("summary", {}).get("update", {}).items()}
    assert summary["best/eval/loss"] == min(entry["eval_loss"] for entry in history if "eval_loss" in entry)
    assert {"best/eval/online_knn_accuracy", "best/eval/online_linear_probe_accuracy"} < set(summary)
    artifacts = [record["artifact"]["name"] for record in records[1] if record["type"] == "artifact"]
    assert f"encoder-{run_id}" in artifacts


def check_tensorboard(folder: Path, history: list[dict]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0})
    events.Reload()
    for name in {name for entry in history for name in entry} - {"step"}:
        expected = [(entry["step"], pytest.approx(entry[name])) for entry in history if name in entry]
        (group,) = rewrite_logs({name: 0})
        assert [(x.step, x.value) for x in events.Scalars(group)] == expected, name
    figures = events.Images("eval/reconstructions")
    assert [image.step for image in figures] == [2, 4, 6]
    assert all(image.encoded_image_string.startswith(b"\x89PNG") and image.width > 100 for image in figures)


def wandb_records(session: Path) -> list[dict]:
    """The records of a session, as W&B's own reader prints them."""
    reader = [Path(sys.executable).with_name("wandb"), "leet", "inspect", "--json", session]
    return [json.loads(line) for line in subprocess.check_output(reader, text=True).splitlines()]


@pytest.mark.slow
def test_parquet_of_real_galaxies(tmp_path):
    """Real galaxies through the complete command, if they are available."""
    from conftest import SHARED

    path = SHARED / "data" / "galaxies.parquet"
    if not path.exists():
        pytest.skip("no real galaxies here (shared/data/galaxies.parquet)")
    run(command(tmp_path / "run", path, "--max_steps", "30", "--batch_size", "32", "--image_size", "32"))
    history = json.loads(Path(tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    losses = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    assert losses[-1] < 0.95 * losses[0]


# ------------------------------------------------------------------------------------ kills, locks and damaged run.json


@pytest.mark.slow
def test_a_second_process_at_the_end_of_the_first_one_changes_nothing(tmp_path, small_hdf5, capsys, monkeypatch):
    """It is refused, or waits if it was requeued, until everything is written; then the run is finished."""
    arguments, folder = command(tmp_path / "run", small_hdf5, "--max_steps", "2"), tmp_path / "run"
    finish_run, log, second = provenance.finish_run, [], threading.Thread(target=main.main, args=[arguments])
    monkeypatch.setattr(main.logger, "info", lambda text, *values: log.append(text % values))

    def watched(folder: Path) -> None:
        assert "another process" in refused(arguments, capsys)
        monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
        second.start()
        second.join(timeout=1.5)
        assert second.is_alive()  # it waits for the lock
        finish_run(folder)
        monkeypatch.delenv("SLURM_RESTART_COUNT")
        assert "another process" in refused(arguments, capsys)

    monkeypatch.setattr(provenance, "finish_run", watched)
    run(arguments)
    second.join()
    assert log[-1] == f"{folder}: this run is finished; nothing to do"
    about = json.loads((folder / "run.json").read_text())
    assert about["finished"]
    assert len(about["sessions"]) == 1


def test_checkpoints_hold_the_id_of_their_run(finished, tmp_path, small_hdf5):
    """A run keeps its id over sessions, and another run has another one."""
    ids, other = [], tmp_path / "other"
    run(command(other, small_hdf5, *SHORT))
    for folder in (finished, other):
        about = provenance.read_run(folder)
        manifests = [json.loads(path.read_text()) for path in folder.glob("checkpoint-*/complete.json")]
        assert [manifest["run"] for manifest in manifests] == [about["id"]] * 2
        ids.append(about["id"])
    assert ids[0] != ids[1]
    provenance.begin_session(folder, about, resumed_from=None)
    assert provenance.read_run(folder)["id"] == ids[1]
    assert len(provenance.read_run(folder)["sessions"]) == 2


@pytest.mark.slow
def test_a_kill_before_any_file_is_renamed_is_recovered_from(tmp_path, small_hdf5, monkeypatch):
    """Each session is killed one file later than the one before; the last one completes the run."""
    flags = ("--max_steps", "2", "--save_steps", "1", "--save_total_limit", "1")
    run(command(tmp_path / "whole", small_hdf5, *flags))
    arguments, folder = command(tmp_path / "run", small_hdf5, *flags), tmp_path / "run"
    replace, rename = os.replace, os.rename

    class Killed(BaseException):
        pass

    def killed_after(count: int):
        left = iter(range(count))

        def wrapped(move):
            def moved(*args, **kwargs):
                if next(left, None) is None:
                    raise Killed
                return move(*args, **kwargs)

            return moved

        return wrapped

    for count in range(100):
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", killed_after(count)(replace))
            patch.setattr(os, "rename", killed_after(count)(rename))
            patch.setattr(files, "_remove", lambda folder: None)  # a killed process removes nothing
            try:
                run(arguments)
            except Killed:
                continue
            break
    assert 8 < count < 99
    assert list(folder.rglob(".tmp-*"))  # of this last session, which could not remove anything either
    files.remove_leftovers(folder)
    names = [{str(path.relative_to(root)) for path in root.rglob("*")} for root in (tmp_path / "whole", folder)]
    assert names[0] == names[1]
    for name in ("model.safetensors", "encoder/model.safetensors", "all_results.json"):
        contents = [(root / name).read_bytes() for root in (tmp_path / "whole", folder)]
        if name != "all_results.json":  # it has the times
            assert contents[0] == contents[1]


def test_a_start_is_not_ended_by_what_killed_processes_left_and_removes_it(tmp_path, small_hdf5, monkeypatch):
    """Of half-written results, too, which the Trainer would read again."""
    folder, begin_session = tmp_path / "run", provenance.begin_session

    def with_half_a_file(folder, *arguments):
        begin_session(folder, *arguments)
        (folder / "all_results.json").write_text('{"train_')

    with monkeypatch.context() as patch:
        patch.setattr(files, "_remove", lambda folder: None)
        for parent in (folder, folder / "encoder", folder / "reconstructions"):
            with files.temporary_folder(parent) as left:
                (left / "file").write_text("half")
    assert len(list(folder.rglob(".tmp-*"))) == 6
    monkeypatch.setattr(provenance, "begin_session", with_half_a_file)
    run(command(folder, small_hdf5, "--max_steps", "2"))
    assert not list(folder.rglob(".tmp-*"))
    both = json.loads((folder / "all_results.json").read_text())
    assert {"train_loss", "eval_loss", "eval_linear_probe_accuracy"} <= set(both)


BAD_RUNS = ["", "null", "[]", "{}", "5", "{", "\x00", "[" * 100_000, "9" * 5000]


def test_the_advice_for_a_bad_run_json_works(finished, tmp_path, small_hdf5, capsys):
    """It is to delete the folder, because checkpoints without run.json are refused too."""
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    arguments = command(folder, small_hdf5, *SHORT)
    for content in (*BAD_RUNS, None):
        path = folder / "run.json"
        path.unlink()
        if content is None:
            path.mkdir()
        else:
            path.write_text(content)
        line = refused(arguments, capsys)
        assert f"{path}: " in line
        assert line.endswith(f"; choose another folder, or delete {folder} and train again")
    path.rmdir()
    line = refused(arguments, capsys)
    assert line.endswith(f"{folder}: holds other files and no run.json; choose an empty or new folder")
    shutil.rmtree(folder)
    run(arguments)
    assert json.loads((folder / "run.json").read_text())["finished"]


@pytest.mark.parametrize("name", ["/proc/x/y", "/sys/x", "/dev/null/x", "x" * 300])
def test_an_output_folder_that_cannot_be_made(small_hdf5, capsys, monkeypatch, tmp_path, name):
    monkeypatch.chdir(tmp_path)
    line = refused(["--output_dir", name, *TINY, "--dataset", str(small_hdf5)], capsys)
    assert line.startswith(f"main.py: error: --output_dir {name}: ")
    assert line.endswith("; choose another folder")
    assert not list(tmp_path.iterdir())

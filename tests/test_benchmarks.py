"""The benchmarks run, and the baseline crops as run_mae.py does; benchmarks/test_commands.py runs more of them."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import gpu_step
import pretrain

from galaxy_mae.model.mae import build_mae
from galaxy_mae.training.recipe import read_recipe

BENCHMARKS = Path(pretrain.__file__).parent
RECIPE = ["--config", str(BENCHMARKS.parent / "recipes" / "demo.yaml"), "--image_size", "32", "--batch_size", "8"]
RECIPE += ["--num_hidden_layers", "1", "--decoder_num_hidden_layers", "2"]
GPU = ["bash", str(BENCHMARKS / "gpu.sh")]


def test_gpu_script_prints_its_usage():
    done = subprocess.run(GPU, capture_output=True, text=True)
    assert done.returncode == 2
    assert "usage: bash benchmarks/gpu.sh DATA OUT" in done.stderr


@pytest.mark.slow
def test_ingest_compares_caching_with_reading(small_hdf5):
    command = [sys.executable, BENCHMARKS / "ingest.py", small_hdf5, "--repeats", "1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "caching / h5py only: " in done.stdout


@pytest.mark.slow
def test_gpu_step_measures_what_needs_no_gpu_and_resumes(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    results = tmp_path / "step.jsonl"
    arguments = [str(results), *RECIPE, "--steps", "1"]
    needs_cuda = {stage.name for stage in gpu_step.STAGES if stage.needs_cuda}
    assert gpu_step.main([*arguments, "--seconds", "0"]) == 75
    assert "rates: out of time, needs 30 s, 0 s left" in capsys.readouterr().out
    assert {json.loads(line)["stage"] for line in results.read_text().splitlines()} == needs_cuda
    assert gpu_step.main([*arguments, "--seconds", "3600"]) == 0
    assert "| attention | skipped | needs CUDA |" in capsys.readouterr().out
    entries = {entry["stage"]: entry for entry in map(json.loads, results.read_text().splitlines())}
    assert set(entries) == {stage.name for stage in gpu_step.STAGES}
    assert not [entry for entry in entries.values() if "failed" in entry]
    before, after = entries["+ model"], entries["+ q, k, v"]
    assert min(before["images_per_second"], before["model_only"], before["kinds"]["matrix products"]) > 0

    def products(entry):
        return sum(count for name, _, count in entry["largest"] if name in ("aten::mm", "aten::addmm"))

    assert products(before) - products(after) == 3 * 6  # of layers: queries, keys and values, forward and backward
    finished = results.read_text()
    assert gpu_step.main(arguments) == 0
    assert results.read_text() == finished


def test_gpu_step_goes_on_after_a_stage_that_fails(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    bad = gpu_step.Stage("bad", 0, lambda recipe: {}["a kernel"])
    good = gpu_step.Stage("good", 0, lambda recipe: {"rate": 2.0})
    monkeypatch.setattr(gpu_step, "STAGES", (bad, good))
    assert gpu_step.main([str(tmp_path / "step.jsonl"), *RECIPE]) == 0
    printed = capsys.readouterr().out
    assert "| bad | failed | KeyError: 'a kernel' |" in printed
    assert "| good | rate | 2 |" in printed


@pytest.mark.slow
def test_count_step_counts_a_step_without_a_gpu():
    """A linear layer has three products: forward, and two backward; the patch projection's input needs no gradient."""
    command = [sys.executable, BENCHMARKS / "count_step.py", *RECIPE, "--no_decoders", "--bandwidths", "1e-3"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "graph breaks: 0 before, 0 after" in done.stdout
    rows = {line.split(" | ")[0]: line.removesuffix(" |").split(" | ") for line in done.stdout.splitlines()}
    layers, others = 1 + 2, 2 + 3 + 3  # the patch projection, the decoder's first and last layer
    assert rows["| matrix products"][1] == f"{layers * 6 * 3 + others} -> {layers * 4 * 3 + others}"
    assert rows["| attention"][1] == f"{2 * layers}"
    config = read_recipe(RECIPE).model_config
    trained = sum(parameter.numel() for parameter in build_mae(config).parameters() if parameter.requires_grad)
    assert float(rows["| AdamW"][-1]) == pytest.approx(1e3 * 28 * trained / 1e9, abs=0.1)  # ms at 1 GB/s
    before, after = rows["| crops, masks and warp"][-1].split(" -> ")
    pixels = 8 * 32 * 32 * 3
    assert 10 * float(after) < float(before)
    assert float(after) == pytest.approx(1e3 * pixels * 5 / 1e9, abs=0.2)


def test_random_crop():
    """Areas are uniform from 0.2 to 1, aspect ratios are between 3/4 and 4/3, and boxes lie inside the image."""
    boxes = np.array([pretrain.random_crop(100) for _ in range(4000)])
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    assert boxes.min() >= 0
    assert boxes.max() <= 100 + 1e-9
    area = width * height / 100**2
    assert area.min() > 0.19
    assert abs(np.mean(area < 0.6) - 0.5) < 0.06  # large areas shrink a little where the box is larger than the image
    ratio = width / height
    assert ratio.min() > 3 / 4 - 1e-9
    assert ratio.max() < 4 / 3 + 1e-9

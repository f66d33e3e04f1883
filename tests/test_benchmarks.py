"""The benchmarks run, stop and go on; and what they call the stock recipe crops as it should."""

import os
import subprocess
import sys

import numpy as np
from test_trainer import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
from pretrain import random_box

GPU = ["bash", str(ROOT / "benchmarks" / "gpu.sh")]


def test_all_that_a_gpu_measures_runs_shortened(tmp_path, small_hdf5):
    """Every stage, on a CPU. When the time is up it says so; called again, it does what is left and nothing twice."""
    environment = os.environ | {"SHORT": "1", "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}

    def call(limit: int) -> subprocess.CompletedProcess:
        out = [str(small_hdf5), str(tmp_path / "out")]
        return subprocess.run([*GPU, *out], capture_output=True, text=True, env=environment | {"LIMIT": str(limit)})

    first = call(limit=19)
    assert first.returncode == 75
    assert "the time is up before throughput: call again" in first.stdout
    while (done := call(limit=500)).returncode == 75:  # a slow machine
        assert "s left)" in done.stdout
    assert done.returncode == 0, done.stdout + done.stderr
    for row in (
        "| ours, float32 |",
        "| features, float32 |",
        "| fine-tuning, float32 |",
        "| eager |",
        "| batch size |",
    ):
        assert row in done.stdout
    assert "to the first step:" in done.stdout
    assert "resident memory over 2 epochs of 32 galaxies:" in done.stdout
    assert (tmp_path / "out" / "growth.png").read_bytes().startswith(b"\x89PNG")
    assert "| Fine-tune (SSL weights) |" in done.stdout
    assert "aten::" in (tmp_path / "out" / "profile.log").read_text()
    assert (tmp_path / "out" / "results" / "report.md").is_file()
    again = call(limit=500)
    assert again.returncode == 0
    assert "s left)" not in again.stdout


def test_wrong_calls_say_how():
    done = subprocess.run(GPU, capture_output=True, text=True)
    assert done.returncode == 2
    assert "usage: bash benchmarks/gpu.sh DATA OUT" in done.stderr


def test_decoding_is_compared_with_reading(small_hdf5):
    command = [sys.executable, ROOT / "benchmarks" / "decode.py", small_hdf5, "--repeats", "1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "ours / h5py alone:" in done.stdout


def test_the_stock_recipe_crops_as_described():
    """0.2 to 1 of the area, uniformly; inside of the image; aspect ratios between 3/4 and 4/3."""
    boxes = np.array([random_box(100) for _ in range(4000)])
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    assert boxes.min() >= 0
    assert boxes.max() <= 100 + 1e-9
    area = width * height / 100**2
    assert area.min() > 0.19
    assert abs(np.mean(area < 0.6) - 0.5) < 0.06  # large areas lose a little where the box would leave the image
    ratio = width / height
    assert ratio.min() > 3 / 4 - 1e-9
    assert ratio.max() < 4 / 3 + 1e-9

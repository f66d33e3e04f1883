"""The benchmarks run, and resume after their time limit. The baseline crops as run_mae.py does."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import pretrain

BENCHMARKS = Path(pretrain.__file__).parent
GPU = ["bash", str(BENCHMARKS / "gpu.sh")]


@pytest.mark.slow
def test_gpu_script_measures_everything_and_resumes(tmp_path, small_hdf5):
    """Every stage, shortened, on a CPU. Out of time it exits with 75; the same command resumes and repeats nothing."""
    environment = os.environ | {"SHORT": "1", "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}

    def call(limit: int) -> subprocess.CompletedProcess:
        command = [*GPU, str(small_hdf5), str(tmp_path / "out")]
        return subprocess.run(command, capture_output=True, text=True, env=environment | {"LIMIT": str(limit)})

    first = call(limit=19)
    assert first.returncode == 75
    assert "out of time before profile: repeat the same command" in first.stdout
    while (done := call(limit=500)).returncode == 75:  # a slow machine
        assert "s left)" in done.stdout
    assert done.returncode == 0, done.stdout + done.stderr
    for text in (
        "| baseline (run_mae.py), float32, 1 workers |",
        "| main.py, float32 |",
        "| feature extraction, float32 |",
        "| fine-tuning, float32 |",
        "Matmul rate in float32: ",
        "| eager | eager attention in the encoder |",
        "| batch size | images/s | GFLOP per image | GFLOP/s |",
        "from `python main.py` to the first step: ",
        "resident memory (RSS) over 2 epochs of 32 galaxies: ",
        "| Fine-tune (SSL weights) |",
    ):
        assert text in done.stdout
    assert (tmp_path / "out" / "growth.png").read_bytes().startswith(b"\x89PNG")
    assert "aten::" in (tmp_path / "out" / "profile.log").read_text()
    assert (tmp_path / "out" / "results" / "report.md").is_file()
    again = call(limit=500)
    assert again.returncode == 0
    assert "s left)" not in again.stdout


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

"""The benchmarks run, and the baseline crops as run_mae.py does; benchmarks/test_commands.py runs more of them."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import pretrain

BENCHMARKS = Path(pretrain.__file__).parent
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

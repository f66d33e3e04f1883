"""Checks of minutes, which `make test` leaves out: `make test-benchmarks`, before a release or a run on a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import chaos

GPU = ["bash", str(Path(__file__).with_name("gpu.sh"))]


def test_gpu_script_measures_everything_and_resumes(tmp_path):
    """Every stage, shortened, on a CPU. Out of time it exits with 75; the same command resumes and repeats nothing."""
    environment = os.environ | {"SHORT": "1", "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}

    def call(limit: int) -> subprocess.CompletedProcess:
        command = [*GPU, "synthetic:200", str(tmp_path / "out")]
        return subprocess.run(command, capture_output=True, text=True, env=environment | {"LIMIT": str(limit)})

    first = call(limit=19)
    assert first.returncode == 75
    assert "out of time before step: repeat the same command" in first.stdout
    while (done := call(limit=500)).returncode == 75:  # a slow machine
        assert "s left)" in done.stdout
    assert done.returncode == 0, done.stdout + done.stderr
    for text in (
        "| baseline (run_mae.py), float32, 1 workers |",
        "| main.py, float32 |",
        "| feature extraction, float32 |",
        "| fine-tuning, float32 |",
        "Matmul rate in float32: ",
        "| eager | transformers' eager attention in the encoder, SDPA in the decoder |",
        "| attention | skipped | needs CUDA |",
        '"model_only": ',
        "| Fine-tune (SSL weights) |",
    ):
        assert text in done.stdout
    assert (tmp_path / "out" / "steps" / "encoder").is_dir()
    assert (tmp_path / "out" / "results" / "report.md").is_file()
    again = call(limit=500)
    assert again.returncode == 0
    assert "s left)" not in again.stdout


def test_killed_commands_end_as_uninterrupted_ones(tmp_path):
    """One kill of each kind of process and one more; benchmarks/chaos.sh does the same a hundred times."""
    results = chaos.run_trials(tmp_path, kills=5, seed=8)
    assert sum(len(result["kills"]) for result in results) == 5
    assert len({result["kind"] for result in results}) == 4
    failed = [result for result in results if not chaos.passed(result)]
    assert not failed, json.dumps(failed)

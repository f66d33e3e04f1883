"""The sbatch wrappers without Slurm; tests/slurm/ runs them on a cluster."""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
WRAPPERS = ("run_ssl", "run_survey", "run_linear_probe_array.sh")


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_outside_slurm_the_error_names_sbatch(wrapper, tmp_path):
    done = subprocess.run(["env", "-i", "bash", ROOT / wrapper], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == f"{wrapper}: error: submit it: sbatch {wrapper}\n"

"""The sbatch wrappers, as far as that goes without Slurm; tests/slurm/ runs them."""

import shutil
import subprocess

import pytest
from test_trainer import ROOT

WRAPPERS = ("run_ssl", "run_linear_probe_array.sh")


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="no shellcheck here: apt-get install shellcheck")
def test_shellcheck_finds_nothing():
    scripts = [*WRAPPERS, "slurm/job.sh", ".ci/run"]
    done = subprocess.run(["shellcheck", "-x", *scripts], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_outside_of_slurm_one_line_says_how(wrapper):
    done = subprocess.run(["env", "-i", "bash", ROOT / wrapper], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == f"{wrapper}: error: submit it: sbatch {wrapper}\n"

"""The sbatch wrappers without Slurm; tests/slurm/ runs them on a cluster."""

import os
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


@pytest.mark.parametrize("name", ["a/b", "../../a", "é" * 150])
def test_a_job_of_any_name_has_its_log_in_logs(tmp_path, name):
    (tmp_path / "submit").mkdir()
    environment = {
        "SLURM_JOB_ID": "12",
        "SLURM_JOB_NAME": name,
        "SLURM_JOB_NODELIST": "n1",
        "VENV": "/none",
        "LANG": "C.UTF-8",
    }
    command = f"cd {tmp_path}/submit; name=run_ssl; source {ROOT}/slurm/job.sh >/dev/null"
    assert subprocess.run(["bash", "-c", command], env=os.environ | environment).returncode == 2
    (log,) = (path for path in tmp_path.rglob("*") if path.is_file())
    assert log.parent == tmp_path / "submit" / "logs"
    assert log.name.endswith("-12.out")
    assert "no virtual environment there" in log.read_text(encoding="utf-8")

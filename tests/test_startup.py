"""What a command does not need is not imported: help and lists come within a second."""

import subprocess
import sys
from pathlib import Path

import pytest
from test_sweep import finished_sweep  # noqa: F401 (a fixture)

ROOT = Path(__file__).resolve().parents[1]
SLOW = {"torch", "transformers", "datasets", "sklearn", "scipy.stats", "pandas", "matplotlib", "astropy", "bokeh"}


def slow_modules(*commands: tuple[str, ...]) -> set[str]:
    """Those of `SLOW` that commands import, one after the other in one process."""
    program = f"""
import runpy, sys
for command in {commands}:
    sys.argv = list(command)
    try:
        runpy.run_module(command[0], run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        assert not ended.code, command
print("imported:", *({SLOW} & set(sys.modules)))
"""
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr[-2000:]
    name, *found = run.stdout.splitlines()[-1].split()
    assert name == "imported:"
    return set(found)


def test_help_and_trials_of_a_sweep(finished_sweep):  # noqa: F811
    """Trials that are not started, and those that have results."""
    commands = ("catalogue", "catalogue predict", "catalogue survey", "catalogue index", "data")
    helps = [(*f"galaxy_mae.{command}".split(), "--help") for command in commands]
    sweeps = (ROOT / "recipes" / "sweep" / "mask_ratio.yaml", finished_sweep)
    assert not slow_modules(*helps, *(("galaxy_mae.sweep", "trials", str(path)) for path in sweeps))


def test_index_and_nearest_neighbors_of_a_survey():
    """They take embeddings that are there."""
    pytest.importorskip("faiss")
    program = (
        "import sys, galaxy_mae.survey.index; print(sorted({'torch', 'transformers', 'sklearn'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    assert run.stdout.strip() == "[]"

"""What a command does not need is not imported: help and lists come within a second."""

import subprocess
import sys
from pathlib import Path

import pytest
from test_sweep import finished_sweep  # noqa: F401 (a fixture)

ROOT = Path(__file__).resolve().parents[1]
SLOW = {"torch", "transformers", "datasets", "sklearn", "scipy.stats", "pandas", "matplotlib", "astropy", "bokeh"}


def slow_modules(*arguments: str) -> set[str]:
    """Those of `SLOW` that a command imports."""
    program = "import atexit, runpy, sys; sys.argv = sys.argv[1:]\n"
    program += f"atexit.register(lambda: print('imported:', *({SLOW} & set(sys.modules))))\n"
    program += "runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)"
    run = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr[-2000:]
    name, *found = run.stdout.splitlines()[-1].split()
    assert name == "imported:"
    return set(found)


@pytest.mark.parametrize("command", ["catalogue", "catalogue predict", "catalogue survey", "catalogue index", "data"])
def test_help(command):
    module, *subcommand = command.split()
    assert not slow_modules(f"galaxy_mae.{module}", *subcommand, "--help")


def test_trials_of_a_sweep(finished_sweep):  # noqa: F811
    """Those that are not started, and those that have results."""
    for path in (ROOT / "recipes" / "sweep" / "mask_ratio.yaml", finished_sweep):
        assert not slow_modules("galaxy_mae.sweep", "trials", str(path))


def test_index_and_nearest_neighbors_of_a_survey():
    """They take embeddings that are there."""
    pytest.importorskip("faiss")
    program = (
        "import sys, galaxy_mae.survey.index; print(sorted({'torch', 'transformers', 'sklearn'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    assert run.stdout.strip() == "[]"

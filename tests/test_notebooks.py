"""The notebooks run, and what is committed of them is what they make. `python tests/test_notebooks.py` makes it again.

They are executed in a folder of their own, because a reader's images and runs are beside the notebooks.
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

nbclient = pytest.importorskip("nbclient", exc_type=ImportError)
pytest.importorskip("ipykernel")
nbformat = pytest.importorskip("nbformat")

NOTEBOOKS = sorted((Path(__file__).resolve().parents[1] / "notebooks").glob("*.ipynb"))


def execute(path: Path, folder: Path):
    """The notebook with the outputs that it has in an empty folder. The kernel listens on no port."""
    notebook = nbformat.read(path, 4)
    client = nbclient.NotebookClient(notebook, timeout=1800, resources={"metadata": {"path": str(folder)}})
    environment = os.environ | {
        "GALAXY_MAE_CACHE": str(folder / ".cache"),
        "IPYTHONDIR": str(folder / ".ipython"),
        "PYTHONPATH": os.pathsep.join(filter(None, (str(path.parents[1]), os.environ.get("PYTHONPATH")))),
        "PYTHONWARNINGS": "ignore",
    }
    with tempfile.TemporaryDirectory() as sockets:  # short: the path of a socket has at most 107 characters
        manager = client.create_kernel_manager()
        manager.transport, manager.connection_file = "ipc", f"{sockets}/kernel.json"
        client.execute(env=environment)
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times of day
    return notebook


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, tmp_path):
    """Each cell shows what it shows in the committed notebook: a figure, a table."""

    def shown(notebook) -> list[list[list[str]]]:
        cells = [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]
        return [[sorted(output.data) for output in outputs if "data" in output] for outputs in cells]

    assert shown(execute(path, tmp_path)) == shown(nbformat.read(path, 4))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_is_committed_is_small_and_complete(path):
    """Every cell ran in order; no errors, no path of the machine; the other notebooks that it names exist."""
    text, notebook = path.read_text(), nbformat.read(path, 4)
    assert path.stat().st_size < 1_500_000
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not [output for output in outputs if output.output_type == "error"]
    assert not re.search(r"/(home|root|work|tmp|usr|site-packages)/", text)
    for name in re.findall(r"\]\(([^)]+\.ipynb)\)", text):
        assert (path.parent / name).is_file()


def test_figures_leave_the_reader_s_own_alone():
    """The backend, which a notebook sets, and the style."""
    program = (
        "import matplotlib; before = dict(matplotlib.rcParams), matplotlib.get_backend(auto_select=False)\n"
        "import galaxy_mae.figures as f; f.layer_accuracies(__import__('io').BytesIO(), {})\n"
        "assert before == (dict(matplotlib.rcParams), matplotlib.get_backend(auto_select=False))\n"
        "assert not matplotlib._pylab_helpers.Gcf.get_all_fig_managers()"
    )
    environment = os.environ | {"MPLBACKEND": "svg"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


if __name__ == "__main__":
    for path in NOTEBOOKS:
        if path.stem in sys.argv[1:] or not sys.argv[1:]:
            with tempfile.TemporaryDirectory() as folder:
                nbformat.write(execute(path, Path(folder)), path)

"""Searches: which runs a file means, how they are judged, and what is gathered."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import random_images, write_hdf5
from test_main import refused
from test_trainer import ROOT

import main
from galaxy_mae import search
from galaxy_mae.errors import UserError
from galaxy_mae.recipe import read_recipe
from galaxy_mae.search import best_cell, find_cell, read_search

REFERENCE = {  # what the reference searched
    "learning_rate": {"learning_rate": [1e-4, 3e-4, 1e-3]},
    "decoder_layers": {"decoder_num_hidden_layers": [2, 4, 8]},
    "mask_ratio": {"mask_ratio": [0.65, 0.70, 0.75, 0.80, 0.85, 0.90]},
    "pixel_normalisation": {"norm_pix_loss": [False, True]},
}


@pytest.fixture(scope="module")
def survey(tmp_path_factory) -> Path:
    """200 images of ten classes that differ in brightness, which a probe can learn."""
    label = np.arange(200) % 10
    images = random_images(200) // 4 + (19 * label)[:, None, None, None].astype(np.uint8)
    place = {"ra": np.linspace(0, 300, 200), "dec": np.zeros(200)}
    return write_hdf5(tmp_path_factory.mktemp("survey") / "survey.h5", images, label, **place)


def write_search(folder: Path, data: Path, grid: dict, **fields: object) -> Path:
    """A search over a tiny model."""
    content = {
        "recipe": str(ROOT / "recipes" / "demo.yaml"),
        "dataset": str(data),
        "image_size": 32,
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "decoder_hidden_size": 32,
        "decoder_num_hidden_layers": 1,
        "batch_size": 32,
        "max_steps": 3,
        "reconstruct_every": 0,
        "report_to": "none",
        "output_dir": str(folder / "cells"),
        "search": grid,
    }
    path = folder / "search.yaml"
    path.write_text(yaml.safe_dump(content | fields))
    return path


@pytest.mark.parametrize("name", REFERENCE)
def test_the_reference_searches_are_there(name):
    """Each cell is the default recipe but for the searched field, in a folder of its own."""
    path = ROOT / "recipes" / "search" / f"{name}.yaml"
    default = read_recipe([])
    ((field, values),) = REFERENCE[name].items()
    cells = read_search(path, []).cells
    assert [cell.values[field] for cell in cells] == values
    assert len({cell.folder for cell in cells}) == len(values)
    for cell, value in zip(cells, values, strict=True):
        recipe = read_recipe(cell.arguments)
        changed = {key for key, old in default.as_dict().items() if recipe.as_dict()[key] != old}
        assert changed == ({field} if default.as_dict()[field] != value else set())
        assert recipe.as_dict()[field] == value
        assert recipe.training.output_dir == str(cell.folder)


def test_all_combinations_and_flags(tmp_path):
    path = write_search(tmp_path, tmp_path / "x.h5", {"mask_ratio": [0.5, 0.75], "norm_pix_loss": [False, True]})
    cells = read_search(path, ["--max_steps", "7", "--output_dir", str(tmp_path / "elsewhere")]).cells
    assert [tuple(cell.values.values()) for cell in cells] == [(0.5, False), (0.5, True), (0.75, False), (0.75, True)]
    recipe = read_recipe(cells[1].arguments)
    assert (recipe.model.mask_ratio, recipe.model.norm_pix_loss, recipe.training.max_steps) == (0.5, True, 7)
    assert Path(recipe.training.output_dir).parent == tmp_path / "elsewhere"


def test_slurm_or_a_flag_chooses_the_cell(tmp_path):
    path = write_search(tmp_path, tmp_path / "x.h5", {"mask_ratio": [0.5, 0.75, 0.9]})
    assert find_cell(["--config", str(path)], task="2").values == {"mask_ratio": 0.9}
    assert find_cell([f"--config={path}", "--cell", "0"], task="2").values == {"mask_ratio": 0.5}
    assert find_cell(["--config", str(ROOT / "recipes" / "demo.yaml")], task="2") is None
    assert find_cell([], task="2") is None


@pytest.mark.parametrize(
    ("flags", "grid", "said"),
    [
        (["--cell", "3"], {"mask_ratio": [0.5, 0.75]}, "--cell 3: no such cell; .* has cells 0 to 1"),
        (["--cell", "-1"], {"mask_ratio": [0.5, 0.75]}, "--cell"),
        ([], {"mask_ratio": [0.5, 0.75]}, "choose one by --cell 0 to 1, or run them all"),
        (["--cell", "0", "--mask_ratio", "0.6"], {"mask_ratio": [0.5, 0.75]}, "mask_ratio is what is searched"),
        (["--cell", "0"], {"mask_ratio": 0.5}, "lists of values"),
        (["--cell", "0"], {"mask_ratio": []}, "lists of values"),
        (["--cell", "0"], {"mask_ratio": [0.5, 0.5]}, "twice"),
        (["--cell", "0"], {"mask_ratios": [0.5]}, "unknown flag --mask_ratios; did you mean --mask_ratio?"),
        (["--cell", "0"], {"mask_ratio": ["much"]}, "much"),
        (["--cell", "0", "--seed", "x"], {"mask_ratio": [0.5]}, "--seed"),
    ],
)
def test_wrong_searches_are_refused(tmp_path, survey, capsys, flags, grid, said):
    path = write_search(tmp_path, survey, grid)
    line = refused(["--config", str(path), *flags], capsys)
    assert re.search(said, line), line
    assert not (tmp_path / "cells").exists()


def test_a_cell_needs_a_search(capsys):
    assert "is no search" in refused(["--config", str(ROOT / "recipes" / "demo.yaml"), "--cell", "1"], capsys)


def test_cells_run_are_judged_and_gathered(tmp_path, survey, capfd, caplog):
    """Without Slurm: one cell was run before, one cannot run; the rest run in turn, judged on validation rows."""
    path = write_search(tmp_path, survey, {"mask_ratio": [0.5, 0.75, 1.5]})
    main.main(["--config", str(path), "--cell", "1"])
    capfd.readouterr()
    with pytest.raises(UserError, match="cells 2 failed"):
        search.main(["run", str(path)])
    assert "cell 1, mask_ratio 0.75: finished before" in caplog.text
    assert capfd.readouterr().err.count("main.py: error: ") == 1
    search.main(["cells", str(path)])
    listed = capfd.readouterr().out
    assert listed.count("finished, ") == 2
    assert "2  mask_ratio 1.5: not started" in listed
    search.main(["report", str(path)])
    table = capfd.readouterr().out
    assert "| mask_ratio | 0.5, 0.75, 1.5 (1 unfinished) | 0." in table
    cells = read_search(path, []).cells
    results = [json.loads((cell.folder / "eval_results.json").read_text()) for cell in cells[:2]]
    assert all(result["eval_probed_images"] == 20 for result in results)
    assert all(result["eval_linear_probe_accuracy"] > 0.3 for result in results)  # chance is 0.1
    report = (tmp_path / "cells" / "search.md").read_text()
    assert "| mask_ratio 1.5 | not started | | |" in report.replace("|  |", "| |").replace("|  |", "| |")
    for picture in ("search.png", "reconstructions.png"):
        assert (tmp_path / "cells" / picture).read_bytes().startswith(b"\x89PNG")


def test_the_probe_chooses_never_the_loss(tmp_path):
    """Of two finished cells the one with the better linear probe is the best, though its loss is the higher one."""
    path = write_search(tmp_path, tmp_path / "x.h5", {"mask_ratio": [0.5, 0.75, 0.9]})
    numbers = {0.5: (0.9, 0.61, 0.5), 0.75: (0.1, 0.60, 0.7), 0.9: (0.5, 0.61, 0.4)}
    for cell in read_search(path, []).cells:
        loss, linear, knn = numbers[cell.values["mask_ratio"]]
        cell.folder.mkdir(parents=True)
        (cell.folder / "run.json").write_text(json.dumps({"recipe": {}, "finished": True, "sessions": []}))
        accuracies = {"eval_linear_probe_accuracy": linear, "eval_knn_accuracy": knn, "eval_probed_images": 700}
        (cell.folder / "eval_results.json").write_text(json.dumps({"eval_loss": loss} | accuracies))
    assert best_cell(read_search(path, [])).values == {"mask_ratio": 0.5}


def test_the_commands_want_searches(tmp_path):
    with pytest.raises(UserError, match="an ordinary recipe"):
        search.main(["cells", str(ROOT / "recipes" / "demo.yaml")])
    with pytest.raises(UserError, match="cannot be read"):
        search.main(["report", str(tmp_path / "none.yaml")])

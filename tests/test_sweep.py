"""Sweeps: which trials a file describes, how they are run and compared, and what the report contains."""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import random_images, write_hdf5

import main
from galaxy_mae import figures, sweep
from galaxy_mae.errors import UserError, one_line_errors
from galaxy_mae.sweep import find_trial, read_sweep
from galaxy_mae.training.recipe import read_recipe

ROOT = Path(__file__).resolve().parents[1]
SWEEPS = {  # of https://github.com/Sizchode/SSL-Project
    "learning_rate": {"learning_rate": [1e-4, 3e-4, 1e-3]},
    "decoder_layers": {"decoder_num_hidden_layers": [2, 4, 8]},
    "mask_ratio": {"mask_ratio": [0.65, 0.70, 0.75, 0.80, 0.85, 0.90]},
    "pixel_normalization": {"norm_pix_loss": [False, True]},
}


@pytest.fixture(autouse=True)
def _outside_slurm(monkeypatch):
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID", raising=False)


@pytest.fixture(scope="module")
def survey(tmp_path_factory) -> Path:
    """200 images of ten classes that differ in brightness, which a probe can learn."""
    label = np.arange(200) % 10
    images = random_images(200) // 4 + (19 * label)[:, None, None, None].astype(np.uint8)
    positions = {"ra": np.linspace(0, 300, 200), "dec": np.zeros(200)}
    return write_hdf5(tmp_path_factory.mktemp("survey") / "survey.h5", images, label, **positions)


def write_sweep(folder: Path, data: Path, grid: dict, **fields: object) -> Path:
    """Write the file of a sweep over a tiny model."""
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
        "output_dir": str(folder / "trials"),
        "sweep": grid,
    }
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(content | fields))
    return path


@pytest.mark.parametrize("name", SWEEPS)
def test_trials_of_the_included_sweeps(name):
    """Each trial is the default recipe except for the swept field, in its own folder."""
    path = ROOT / "recipes" / "sweep" / f"{name}.yaml"
    default = read_recipe([])
    ((field, values),) = SWEEPS[name].items()
    trials = read_sweep(path, []).trials
    assert [trial.values[field] for trial in trials] == values
    assert len({trial.folder for trial in trials}) == len(values)
    for trial, value in zip(trials, values, strict=True):
        recipe = read_recipe(trial.arguments)
        changed = {key for key, old in default.as_dict().items() if recipe.as_dict()[key] != old}
        assert changed == ({field} if default.as_dict()[field] != value else set())
        assert recipe.as_dict()[field] == value
        assert recipe.training.output_dir == str(trial.folder)


def test_all_combinations_of_several_fields_are_trials_and_flags_apply_to_all(tmp_path):
    path = write_sweep(tmp_path, tmp_path / "x.h5", {"mask_ratio": [0.5, 0.75], "norm_pix_loss": [False, True]})
    trials = read_sweep(path, ["--max_steps", "7", "--output_dir", str(tmp_path / "elsewhere")]).trials
    assert [tuple(trial.values.values()) for trial in trials] == [
        (0.5, False),
        (0.5, True),
        (0.75, False),
        (0.75, True),
    ]
    recipe = read_recipe(trials[1].arguments)
    assert (recipe.model.mask_ratio, recipe.model.norm_pix_loss, recipe.training.max_steps) == (0.5, True, 7)
    assert Path(recipe.training.output_dir).parent == tmp_path / "elsewhere"


def test_array_task_or_flag_selects_the_trial(tmp_path, monkeypatch):
    path = write_sweep(tmp_path, tmp_path / "x.h5", {"mask_ratio": [0.5, 0.75, 0.9]})
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    assert find_trial(["--config", str(path)]).values == {"mask_ratio": 0.9}
    assert find_trial([f"--config={path}", "--trial", "0"]).values == {"mask_ratio": 0.5}
    assert find_trial(["--config", str(ROOT / "recipes" / "demo.yaml")]) is None
    assert find_trial([]) is None
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    with pytest.raises(UserError, match="SLURM_ARRAY_TASK_ID 3: not one of 0 to 2"):
        find_trial(["--config", str(path)])


def test_home_folders_are_expanded(tmp_path, monkeypatch):
    """Also where the shell does not: after `--flag=` and in files."""
    monkeypatch.setenv("HOME", str(tmp_path))
    path = write_sweep(tmp_path, tmp_path / "x.h5", {"mask_ratio": [0.5]}, output_dir="~/trials")
    trial = find_trial(["--config=~/sweep.yaml", "--trial", "0"])
    assert trial.folder.parent == tmp_path / "trials"
    assert find_trial(["--config", str(path), "--trial", "0", "--output_dir=~/x"]).folder.parent == tmp_path / "x"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"recipe": "~/demo.yaml"}))
    (tmp_path / "demo.yaml").write_bytes((ROOT / "recipes" / "demo.yaml").read_bytes())
    recipe = read_recipe(find_trial(["--config", str(path), "--trial", "0"]).arguments)
    assert recipe.training.output_dir == str(tmp_path / "trials" / "mask_ratio_0.5")
    assert read_recipe(["--config=~/demo.yaml", "--output_dir=~/run"]).training.output_dir == str(tmp_path / "run")


def error_line(arguments: list[str], capsys) -> str:
    """Run main.py, which must fail with exit status 2, and return the line that it prints."""
    with pytest.raises(SystemExit) as exit_info, one_line_errors("main.py"):
        main.main(arguments)
    assert exit_info.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    return line


@pytest.mark.parametrize(
    ("flags", "grid", "message"),
    [
        (
            ["--trial", "3"],
            {"mask_ratio": [0.5, 0.75]},
            r"--trial 3: not one of 0 to 1 \(0 mask_ratio 0.5, 1 mask_ratio 0.75\)",
        ),
        (["--trial", "-1"], {"mask_ratio": [0.5, 0.75]}, "--trial -1: not one of 0 to 1"),
        (["--trial"], {"mask_ratio": [0.5, 0.75]}, "--trial: expected one argument"),
        ([], {"mask_ratio": [0.5, 0.75]}, "select one with --trial 0 to 1, or run all with"),
        (
            ["--trial", "0", "--mask_ratio", "0.6"],
            {"mask_ratio": [0.5, 0.75]},
            "mask_ratio is swept; it has no single value",
        ),
        (["--trial", "0"], {"mask_ratio": 0.5}, "lists of values"),
        (["--trial", "0"], {"mask_ratio": []}, "lists of values"),
        (["--trial", "0"], {"mask_ratios": [0.5]}, "--mask_ratios: not supported here; did you mean --mask_ratio?"),
        (["--trial", "0"], {"mask_ratio": ["much"]}, "much"),
        (["--trial", "0"], {"output_dir": ["a", "b"]}, "output_dir cannot be swept"),
        (["--trial", "0"], {"output-dir": ["a", "b"]}, "output_dir cannot be swept"),
        (["--trial", "0"], {"trial": [0, 1]}, "trial cannot be swept"),
        (["--trial", "0"], {"config": ["a", "b"]}, "config cannot be swept"),
        (["--trial", "0"], {"mask_ratio": [[0.5, "--seed"]]}, "mask_ratio: 0.5 --seed: in a recipe, each flag"),
        (["--trial", "0", "--seed", "x"], {"mask_ratio": [0.5]}, "--seed"),
    ],
)
def test_invalid_sweeps_end_in_one_line(tmp_path, survey, capsys, flags, grid, message):
    path = write_sweep(tmp_path, survey, grid)
    line = error_line(["--config", str(path), *flags], capsys)
    assert re.search(message, line), line
    assert not (tmp_path / "trials").exists()


def test_trial_without_a_sweep_ends_in_one_line(capsys):
    assert "is not a sweep" in error_line(["--config", str(ROOT / "recipes" / "demo.yaml"), "--trial", "1"], capsys)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "names the `recipe` that it varies"),
        ("recipe: [a.yaml]", "names the `recipe` that it varies"),
        ("recipe: x.yaml\nmask_ratio: 0.5", "mask_ratio is swept"),
    ],
)
def test_sweep_with_wrong_fields_besides_the_swept_ones(tmp_path, content, message):
    path = tmp_path / "sweep.yaml"
    path.write_text(f"{content}\nsweep: {{mask_ratio: [0.5, 0.75]}}")
    with pytest.raises(UserError, match=message):
        read_sweep(path, [])


def test_trials_lists_progress_and_the_sbatch_command(tmp_path, capsys):
    path = write_sweep(tmp_path, tmp_path / "x.h5", {"mask_ratio": [0.5, 0.75]})
    unfinished = read_sweep(path, []).trials[1].folder
    unfinished.mkdir(parents=True)
    (unfinished / "run.json").write_text(json.dumps({"id": "x", "recipe": {}, "finished": False, "sessions": []}))
    sweep.main(["trials", str(path), "--max_steps", "9"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{path}: 2 trials in {tmp_path / 'trials'}"
    assert lines[1].strip() == "0  mask_ratio 0.5: not started"
    assert lines[2].strip() == "1  mask_ratio 0.75: unfinished, no checkpoint yet"
    assert lines[3] == f"sbatch --array=0-1 run_ssl {path} --max_steps 9"


@pytest.mark.slow
def test_trials_are_run_compared_and_reported(tmp_path, survey, capfd):
    """Without Slurm. One trial was run before, one fails, the third is run. Validation galaxies compare them."""
    path = write_sweep(tmp_path, survey, {"mask_ratio": [0.5, 0.75, 1.5]})
    main.main(["--config", str(path), "--trial", "1"])
    capfd.readouterr()
    with pytest.raises(UserError, match="trials 2 failed"):
        sweep.main(["run", str(path)])
    printed = capfd.readouterr()
    assert "trial 1, mask_ratio 0.75: already finished" in printed.out
    assert printed.err.count("main.py: error: ") == 1
    sweep.main(["trials", str(path)])
    listed = capfd.readouterr().out
    assert listed.count("finished, ") == 2
    assert "2  mask_ratio 1.5: not started" in listed
    sweep.main(["report", str(path)])
    table = capfd.readouterr().out
    assert "| mask_ratio | 0.5, 0.75, 1.5 (1 unfinished) | 0." in table
    trials = read_sweep(path, []).trials
    results = [json.loads((trial.folder / "eval_results.json").read_text()) for trial in trials[:2]]
    assert all(result["eval_num_validation_images"] == 20 for result in results)
    assert all(result["eval_linear_probe_accuracy"] > 0.3 for result in results)  # chance is 0.1
    report = (tmp_path / "trials" / "sweep.md").read_text()
    assert "\n3 steps, hidden size 48, 2 layers, image size 32; " in report
    assert "| mask_ratio 1.5 | not started | | |" in report.replace("|  |", "| |").replace("|  |", "| |")
    assert (tmp_path / "trials" / "sweep.png").read_bytes().startswith(b"\x89PNG")
    for value in (0.5, 0.75):
        assert f"![mask_ratio {value}](<mask_ratio_{value}/reconstruction_example.png>)" in report


@pytest.fixture
def finished_sweep(tmp_path):
    """The file of a sweep whose three trials are finished, with made-up results."""
    path = write_sweep(tmp_path, tmp_path / "x.h5", {"mask_ratio": [0.5, 0.75, 0.9]})
    numbers = {0.5: (0.9, 0.61, 0.5), 0.75: (0.1, 0.60, 0.7), 0.9: (0.5, 0.61, 0.4)}
    recipe = {"num_train_epochs": 1.0, "hidden_size": 48, "num_hidden_layers": 2, "image_size": 32}
    recipe |= {"dataset": "x.h5", "data": "0" * 64}
    session = {"device": "a GPU", "commit": None}
    for trial in read_sweep(path, []).trials:
        loss, linear, knn = numbers[trial.values["mask_ratio"]]
        trial.folder.mkdir(parents=True)
        run = {"id": "x", "recipe": recipe, "finished": True, "sessions": [session]}
        (trial.folder / "run.json").write_text(json.dumps(run))
        accuracies = {"eval_linear_probe_accuracy": linear, "eval_knn_accuracy": knn, "eval_num_validation_images": 700}
        (trial.folder / "eval_results.json").write_text(json.dumps({"eval_loss": loss} | accuracies))
    return path


def test_trials_are_compared_by_the_linear_probe_and_not_by_the_loss(finished_sweep):
    """The trial with the best linear probe is the best, although its loss is the highest; k-NN breaks ties."""
    assert read_sweep(finished_sweep, []).best.values == {"mask_ratio": 0.5}


def test_report_contains_the_table_and_the_figure(finished_sweep, capsys, drawn_figures):
    sweep.main(["report", str(finished_sweep)])
    equal = "0.5 (not told apart from 0.75; 0.9)"
    assert f"| mask_ratio | 0.5, 0.75, 0.9 | {equal} | 61.00 % (57.34 to 64.54) | 50.00 % (" in capsys.readouterr().out
    folder = read_sweep(finished_sweep, []).folder
    report = (folder / "sweep.md").read_text()
    assert "| mask_ratio 0.5 | 61.00 % (57.34 to 64.54) | 50.00 % (46.31 to 53.69) | 0.9000 |" in report
    assert f"Best value: {equal}." in report
    assert "| mask_ratio 0.75 | 60.00 %" in report
    assert "700 validation galaxies" in report
    assert (folder / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert "Reconstructions" not in report  # students reconstruct nothing


def test_the_best_trial_is_marked_where_no_other_is_within_its_interval(finished_sweep):
    best, *others = read_sweep(finished_sweep, []).trials
    for trial in others:
        path = trial.folder / "eval_results.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"eval_linear_probe_accuracy": 0.5}))
    sweep.main(["report", str(finished_sweep)])
    report = (best.folder.parent / "sweep.md").read_text()
    assert "| mask_ratio 0.5 (best) |" in report
    assert "told apart" not in report


@pytest.mark.parametrize("interrupted", [False, True], ids=["the trial is stopped", "the sweep is stopped"])
def test_a_sweep_stops_with_its_trial_and_the_trial_with_its_sweep(tmp_path, monkeypatch, interrupted):
    """No further trial is started, and no process is left behind."""
    path = write_sweep(tmp_path, tmp_path / "x.h5", {"mask_ratio": [0.5, 0.75]})
    script, log = tmp_path / "main.py", tmp_path / "log"
    script.write_text(
        "import pathlib, signal, sys, time\n"
        f"log = pathlib.Path({str(log)!r}).open('a', buffering=1)\n"
        "signal.signal(signal.SIGTERM, lambda *_: (print('terminated', file=log), sys.exit(75)))\n"
        f"print('started', file=log)\ntime.sleep({60 * interrupted})\nsys.exit(75)\n"
    )

    def interrupt(*_: object) -> None:
        if log.exists() and log.read_text():
            signal.setitimer(signal.ITIMER_REAL, 0)
            raise KeyboardInterrupt

    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda command: popen([sys.executable, str(script), *command[3:]]))
    before = signal.signal(signal.SIGALRM, interrupt)
    if interrupted:
        signal.setitimer(signal.ITIMER_REAL, 0.2, 0.2)
    try:
        with pytest.raises(KeyboardInterrupt if interrupted else SystemExit):
            sweep.main(["run", str(path)])
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert log.read_text().split() == ["started", "terminated"][: 1 + interrupted]


def test_dollars_in_names_are_not_mathematics(tmp_path, drawn_figures):
    images = np.zeros((1, 8, 8, 3))
    examples = images, images, np.zeros((1, 8, 8), bool)
    figures.reconstructions(tmp_path / "one.png", *examples, ["$_$"], "gal$_$x: epoch 1")
    assert (tmp_path / "one.png").stat().st_size


def test_commands_need_sweeps(tmp_path):
    with pytest.raises(UserError, match="an ordinary recipe"):
        sweep.main(["trials", str(ROOT / "recipes" / "demo.yaml")])
    with pytest.raises(UserError, match="cannot be read"):
        sweep.main(["report", str(tmp_path / "none.yaml")])

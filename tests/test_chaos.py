"""How the trials of benchmarks/chaos.py kill and judge; benchmarks/test_commands.py runs some of them."""

import json
import signal
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import chaos


@pytest.fixture
def folders(tmp_path) -> tuple[Path, Path]:
    """What a reference and a trial left, which differ in nothing but times."""
    for name, seconds in (("reference", 3.0), ("trial", 9.0)):
        folder = tmp_path / name
        (folder / "run").mkdir(parents=True)
        (folder / "run" / "model.safetensors").write_bytes(b"weights")
        scores = {"accuracy": 0.5, "seconds": seconds, "started": f"at {seconds}"}
        (folder / "run" / "scores.json").write_text(json.dumps(scores))
        (folder / "run" / "run.json").write_text(json.dumps([seconds]))
    return tmp_path / "reference", tmp_path / "trial"


def test_a_trial_that_differs_in_times_alone_passes(folders):
    assert chaos.passed(chaos.judge(0, *folders))


@pytest.mark.parametrize(
    ("path", "content", "failed"),
    [
        ("run/model.safetensors", b"weighty", {"bit_equal": False, "different": ["run/model.safetensors"]}),
        ("run/scores.json", b'{"accuracy": 0.6}', {"bit_equal": False, "different": ["run/scores.json"]}),
        ("run/.32.npy.x", b"", {"clean": False, "left_over": ["run/.32.npy.x"]}),
        ("run/scores.json", None, {"completed": False, "missing": ["run/scores.json"]}),
    ],
)
def test_what_a_kill_must_not_leave(folders, path, content, failed):
    """Other bits, other scores, a temporary file, a file that is not there."""
    expected, trial = folders
    (trial / path).unlink() if content is None else (trial / path).write_bytes(content)
    result = chaos.judge(0, expected, trial)
    assert not chaos.passed(result)
    assert result.items() >= failed.items()


def test_a_process_is_killed_at_its_files_or_at_a_time(tmp_path):
    """A kill after the second new file, a kill after some time, one after the end."""
    program = "import pathlib, time; [(pathlib.Path(f'{i}').touch(), time.sleep(0.2)) for i in range(8)]"
    kill = (signal.SIGKILL,)
    folders = [tmp_path / name for name in ("at_files", "at_time", "late")]
    for folder in folders:
        folder.mkdir()
    at_files = chaos.run_process(["-c", program], folders[0], chaos.Kill(kill, files=2, seconds=0))
    at_time = chaos.run_process(["-c", program], folders[1], chaos.Kill(kill, files=0, seconds=0.4))
    late = chaos.run_process(["-c", "pass"], folders[2], chaos.Kill(kill, files=0, seconds=100))
    assert (at_files.status, at_files.killed, at_files.files, at_files.newest) == (-signal.SIGKILL, True, 2, "1")
    assert (at_time.status, at_time.killed) == (-signal.SIGKILL, True)
    assert 0.4 <= at_time.seconds < 1.4
    assert (late.status, late.killed, late.files) == (0, False, 0)


def test_a_log_whose_end_begins_within_a_character_is_read(tmp_path):
    (tmp_path / "run").mkdir()
    program = "import sys; sys.stdout.buffer.write('\u2588'.encode() * 1000)"
    assert chaos.run_process(["-c", program], tmp_path / "run").message.endswith("\u2588" * 300)


def test_the_kills_of_a_seed_are_drawn_again():
    whole = chaos.Run(0, False, 10.0, 100, "", "")
    first, again = ([chaos.random_kill(np.random.default_rng(7), whole) for _ in range(2)] for _ in range(2))
    assert first == again

"""Progress: no long silence, one bar in a terminal, and no bars or dictionaries in a log."""

import logging
import re
import time

import pytest
from test_trainer import make_trainer

from galaxy_mae import progress
from galaxy_mae.data.cache import open_galaxies
from galaxy_mae.training.tracking import setup_logging


@pytest.fixture
def short_interval(monkeypatch):
    """Lines come after a tenth of a second without one."""
    monkeypatch.setattr(progress, "INTERVAL", 0.1)


def test_a_line_says_how_far_the_outermost_counted_stage_is(short_interval, capsys):
    with progress.stage("evaluation"), progress.stage("caching a", 4000, done=1000) as stage:
        stage.advance(1500)
        with progress.stage("inner", 3, "files"):
            time.sleep(1.5)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) > 1
    assert all(
        re.fullmatch(r"evaluation, caching a: 2,500 of 4,000 images, \d s, about \d s left", line) for line in lines
    ), lines


def test_a_command_is_not_silent_without_a_stage_and_a_library_is(short_interval, capsys, monkeypatch):
    monkeypatch.setattr(progress, "_command", None)
    with progress.stage("a"):
        pass
    time.sleep(1.5)
    assert capsys.readouterr().err == ""
    progress.start("evaluation")
    time.sleep(1.5)
    assert re.match(r"evaluation: \d s\n", capsys.readouterr().err)


def test_a_reader_that_is_gone_does_not_end_the_work(monkeypatch):
    monkeypatch.setattr("sys.stderr.write", lambda _: (_ for _ in ()).throw(BrokenPipeError()), raising=False)
    progress.LineHandler().emit(logging.makeLogRecord({"msg": "a line"}))


def test_a_failed_stage_is_over():
    with pytest.raises(ValueError, match="x"), progress.stage("a", 3):
        raise ValueError("x")
    assert progress._stages == []


def test_there_is_one_bar_and_only_in_a_terminal(monkeypatch, capsys):
    with progress.stage("outer", 3) as outer:
        assert outer.bar.disable
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    with progress.stage("no total") as none, progress.stage("outer", 3) as outer, progress.stage("inner", 3) as inner:
        assert (none.bar.disable, outer.bar.disable, inner.bar.disable) == (True, False, True)
        assert (outer.bar.total, outer.bar.n) == (3, 0)
        outer.advance(2)
        assert outer.bar.n == 2
    with progress.stage("outer", 3, bar=False) as outer:
        assert outer.bar.disable


def test_a_log_holds_lines_of_losses_and_no_bars(tmp_path, small_hdf5, capfd, caplog):
    setup_logging()
    caplog.set_level(logging.INFO, "galaxy_mae")
    open_galaxies("synthetic:30", 24)
    trainer = make_trainer(tmp_path, small_hdf5, "--max_steps", "8", "--eval_steps", "4", "--logging_steps", "2")
    trainer.train()
    written = capfd.readouterr()
    assert "\r" not in written.err
    assert "{" not in written.out + written.err
    lines = [record.message for record in caplog.records if record.message.startswith("training: ")]
    numbers = r"epoch [\d.]+, loss on crops [\d.]+, validation loss on complete images [\d.]+"
    assert re.match(rf"training: 4 of 8 steps, {numbers}.*, \d+ s, about \d+ s left$", lines[1])
    assert lines[-1].startswith("training: 8 of 8 steps, ")
    assert progress._stages == []
    assert trainer.progress.stage is None


@pytest.mark.parametrize(("seconds", "words"), [(4.6, "5 s"), (200, "3 min 20 s"), (7500, "2 h 5 min")])
def test_durations(seconds, words):
    assert progress.duration(seconds) == words

"""Signals: a training saves its step and exits, anything else exits at once, and nothing is lost."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file
from test_trainer import ROOT, RUN_ID, command, last_checkpoint, make_trainer, same, weights
from transformers import TrainerCallback

from galaxy_mae.training import preemption
from galaxy_mae.training.checkpoints import find_checkpoint


class SignalAt(TrainerCallback):
    """Signals its own process within a step."""

    def __init__(self, step: int, number: signal.Signals):
        self.step, self.number = step, number

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step - 1:
            os.kill(os.getpid(), self.number)


def test_a_training_saves_its_step_and_exits(tmp_path, small_hdf5, signal_handlers):
    """Resumed within an epoch, it reaches the weights of a run that was never signalled."""
    flags = ("--max_steps", "23", "--save_steps", "20")
    whole = make_trainer(tmp_path / "whole", small_hdf5, *flags)
    whole.train()
    for number in preemption.SIGNALS:
        folder = tmp_path / str(number)
        stopped = make_trainer(folder, small_hdf5, *flags)
        stopped.add_callback(SignalAt(14, number))
        with pytest.raises(SystemExit) as stopped_with:
            stopped.train()
        assert stopped_with.value.code == preemption.EXIT_REQUEUE
        checkpoint = find_checkpoint(folder, RUN_ID)
        assert checkpoint.name == "checkpoint-14"
    resumed = make_trainer(folder, small_hdf5, *flags)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert same(weights(whole), weights(resumed))


def test_loader_workers_survive_the_signal(tmp_path, small_hdf5, signal_handlers):
    """Slurm's TERM reaches them too; the step is still finished and saved."""

    class SignalAll(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 4:
                workers = multiprocessing.active_children()
                assert len(workers) == 2
                pids = [str(process.pid) for process in (*workers, multiprocessing.current_process())]
                subprocess.run(["kill", "-TERM", *pids], check=True)  # a worker asks who sent it
                time.sleep(0.5)

    trainer = make_trainer(tmp_path, small_hdf5, "--max_steps", "9", "--dataloader_num_workers", "2")
    trainer.add_callback(SignalAll())
    with pytest.raises(SystemExit):
        trainer.train()
    assert find_checkpoint(tmp_path, RUN_ID).name == "checkpoint-5"


def test_outside_of_a_training_a_signal_exits_at_once(signal_handlers):
    with pytest.raises(SystemExit) as stopped_with:
        signal.raise_signal(signal.SIGTERM)
    assert stopped_with.value.code == preemption.EXIT_REQUEUE


def test_a_signal_after_the_last_step_still_ends_the_run(tmp_path, small_hdf5, signal_handlers):
    """It comes between the last step and the end of the training, after all checkpoints."""

    class SignalAtSummary(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            if "train_loss" in logs:
                os.kill(os.getpid(), signal.SIGUSR1)

    trainer = make_trainer(tmp_path, small_hdf5, "--max_steps", "4", "--save_steps", "2")
    trainer.add_callback(SignalAtSummary())
    with pytest.raises(SystemExit):
        trainer.train()
    assert find_checkpoint(tmp_path, RUN_ID).name == "checkpoint-4"


def test_the_last_step_of_an_epoch_is_evaluated_before_it_is_saved(tmp_path, small_hdf5, signal_handlers):
    """Otherwise the epoch would be missing when the best one is selected."""
    flags = ("--max_steps", "20", "--eval_strategy", "epoch", "--save_steps", "50")
    trainer = make_trainer(tmp_path, small_hdf5, *flags)
    trainer.add_callback(SignalAt(10, signal.SIGUSR1))  # an epoch has ten steps
    with pytest.raises(SystemExit):
        trainer.train()
    assert find_checkpoint(tmp_path, RUN_ID).name == "checkpoint-10"
    state = json.loads((tmp_path / "checkpoint-10" / "trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"] if "eval_loss" in entry] == [0, 10]


def test_a_checkpoint_that_is_complete_is_not_written_again(tmp_path, small_hdf5, signal_handlers):
    """Step 10 is the end of an epoch and is saved anyway; a kill while it is rewritten would lose it."""
    flags = ("--max_steps", "20", "--eval_steps", "10", "--save_steps", "10", "--save_total_limit", "1")
    trainer = make_trainer(tmp_path, small_hdf5, *flags)
    saved = []
    save = trainer.save_model
    trainer.save_model = lambda *args, **kwargs: saved.append(trainer.state.global_step) or save(*args, **kwargs)
    trainer.add_callback(SignalAt(10, signal.SIGTERM))
    with pytest.raises(SystemExit) as stopped_with:
        trainer.train()
    assert stopped_with.value.code == preemption.EXIT_REQUEUE
    assert saved == [10]
    assert find_checkpoint(tmp_path, RUN_ID).name == "checkpoint-10"


def test_a_logger_ended_by_the_signal_does_not_prevent_the_checkpoint(tmp_path, small_hdf5, signal_handlers):
    """Slurm's TERM ends W&B's process too, so that later logging fails."""

    class Dead(TrainerCallback):
        def on_log(self, args, state, control, **kwargs):
            if state.global_step == 8:
                raise ConnectionResetError("Connection lost")

    trainer = make_trainer(tmp_path, small_hdf5, "--max_steps", "20", "--save_steps", "20", "--logging_steps", "4")
    trainer.add_callback(Dead())
    trainer.add_callback(SignalAt(8, signal.SIGTERM))
    with pytest.raises(SystemExit):
        trainer.train()
    assert find_checkpoint(tmp_path, RUN_ID).name == "checkpoint-8"
    unsignalled = make_trainer(tmp_path / "other", small_hdf5, "--max_steps", "20", "--logging_steps", "4")
    unsignalled.add_callback(Dead())
    with pytest.raises(ConnectionResetError):
        unsignalled.train()


@pytest.mark.slow
def test_two_processes_stop_at_the_same_step(tmp_path, small_hdf5):
    """One of two is signalled, both stop after the same step; one process resumes to the weights of two."""
    two = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", ROOT / "main.py"]
    flags = ("--max_steps", "120", "--save_steps", "20", "--eval_steps", "200")
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    done = subprocess.run([*two, *command(whole, small_hdf5, *flags)], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    running = subprocess.Popen([*two, *command(stopped, small_hdf5, *flags)], stderr=subprocess.PIPE, text=True)
    while last_checkpoint(stopped) is None:
        assert running.poll() is None, running.stderr.read()
        time.sleep(0.02)
    os.kill(_worker(running.pid, rank=1), signal.SIGUSR1)
    told = running.communicate(timeout=100)[1]
    assert running.returncode, "the run was over before the signal came"
    step = int(told.split("stopped by a signal at step ")[1].split(",")[0])
    assert last_checkpoint(stopped).name == f"checkpoint-{step}"
    one = [sys.executable, ROOT / "main.py", *command(stopped, small_hdf5, *flags)]
    done = subprocess.run(one, capture_output=True, text=True, timeout=200)
    assert f"resuming from {stopped}/checkpoint-{step}" in done.stderr, done.stderr
    expected, reached = (load_file(folder / "model.safetensors") for folder in (whole, stopped))
    for name, tensor in expected.items():
        assert (reached[name] - tensor).abs().max() < 1e-3, name


def _worker(launcher: int, rank: int) -> int:
    """The process number of a rank that a launcher started."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((process / "stat").read_text().rsplit(")", 1)[1].split()[1])
            environment = (process / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if parent == launcher and f"RANK={rank}".encode() in environment:
            return int(process.name)
    raise AssertionError(f"no rank {rank} of {launcher}")

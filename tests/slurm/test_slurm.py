"""The sbatch wrappers on a real Slurm: what users of a cluster rely on, from submission to table."""

import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml
from cluster import Cluster, missing
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
SMALL = {
    "recipe": str(ROOT / "recipes" / "demo.yaml"),
    "dataset": "synthetic:400",
    "image_size": 32,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "decoder_hidden_size": 32,
    "decoder_num_hidden_layers": 1,
    "batch_size": 32,
    "reconstruct_every": 0,
    "eval_steps": 100,
    "logging_steps": 5,
    "save_steps": 97,
}
OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "DEADLINE")

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Two nodes with two made-up GPUs each, for all tests of this file."""
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))  # short: a socket's path has at most 107 characters
    slurm = Cluster(folder)
    # One thread a process: the two cores are shared by many jobs.
    slurm.environment |= {"VENV": sys.prefix, "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
    slurm.start()
    yield slurm
    slurm.stop()
    shutil.rmtree(folder)


class Desk:
    """A user's folder on the cluster, with a space in its path, and the repository at such a place too."""

    def __init__(self, cluster: Cluster, folder: Path):
        self.cluster, self.folder = cluster, folder / "my galaxies"
        self.folder.mkdir()
        self.repository = folder / "the code"
        self.repository.symlink_to(ROOT)

    def recipe(self, name: str, **fields: object) -> str:
        """Write a small recipe (fields with None are left out); its name."""
        content = {key: value for key, value in (SMALL | fields).items() if value is not None}
        if "search" not in content:
            content = yaml.safe_load(Path(content.pop("recipe")).read_text()) | content
        (self.folder / name).write_text(yaml.safe_dump(content))
        return name

    def sbatch(self, *arguments: str | Path, **environment: str) -> str:
        """Submit; the job's id."""
        output = self.cluster.command("sbatch", "--parsable", *arguments, cwd=self.folder, env=environment)
        return output.strip().splitlines()[-1]

    def run_ssl(self, *arguments: str, options: tuple[str, ...] = (), **environment: str) -> str:
        """Submit `run_ssl`."""
        return self.sbatch(*options, self.repository / "run_ssl", *arguments, **environment)

    def job(self, job: str) -> dict[str, str]:
        """What Slurm knows of a job, by its own names."""
        words = self.cluster.command("scontrol", "--oneliner", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, *jobs: str, seconds: float = 400) -> list[str]:
        """Wait until jobs are over: their states."""

        def states() -> list[str]:
            return [self.job(job)["JobState"] for job in jobs]

        self.until(lambda: all(state in OVER for state in states()), seconds, lambda: f"{states()}\n{self.logs()}")
        return states()

    def until(self, true: Callable[[], object], seconds: float = 200, told: Callable[[], str] = str) -> None:
        """Wait until something is true."""
        end = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < end, f"waited for {seconds} s\n{told() or self.logs()}"
            time.sleep(0.1)

    def log(self, job: str, name: str = "ssl") -> str:
        """What a job wrote."""
        return (self.folder / "logs" / f"{name}-{job}.out").read_text()

    def logs(self) -> str:
        """What all jobs wrote."""
        return "\n".join(f"== {path.name}\n{path.read_text()}" for path in sorted(self.folder.glob("logs/*")))

    def run(self, command: str, *arguments: str) -> str:
        """A command of the project in the user's folder, without Slurm: what it prints."""
        return self.cluster.command(
            sys.executable, "-m", command, *arguments, cwd=self.folder, env={"PYTHONPATH": str(ROOT)}, timeout=300
        )

    def has_checkpoint(self, run: str) -> bool:
        """Whether a run has begun to train, and can be killed."""
        return bool(list((self.folder / run).glob("checkpoint-*/trainer_state.json")))


@pytest.fixture
def desk(cluster, tmp_path) -> Desk:
    """A user's folder."""
    return Desk(cluster, tmp_path)


def losses(run: Path) -> dict[int, float]:
    """The logged training loss at each step."""
    state = json.loads((run / "trainer_state.json").read_text())
    return {entry["step"]: entry["loss"] for entry in state["log_history"] if "loss" in entry}


# ------------------------------------------------------------------------------------------------- the ways of stopping


def by_signal(desk: Desk, job: str) -> None:
    """As Slurm does ahead of the time limit."""
    desk.cluster.command("scancel", "--batch", "--signal=USR1", job)


def by_requeue(desk: Desk, job: str) -> None:
    """As an administrator does."""
    desk.cluster.command("scontrol", "requeue", job)


def by_kill(desk: Desk, job: str) -> None:
    """As the kernel does when memory runs out: SIGKILL to the python process."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes().split(b"\0")
            environment = (process / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        ours = f"SLURM_JOB_ID={job}".encode() in environment
        if ours and len(command) > 1 and command[1].endswith(b"/main.py"):
            os.kill(int(process.name), signal.SIGKILL)
            return
    raise AssertionError(f"no main.py of job {job} is running\n{desk.logs()}")


STOPS = {"signal": by_signal, "requeue": by_requeue, "kill": by_kill}


def test_interrupted_jobs_end_as_if_never_stopped(desk):
    """Pre-trainings signalled, requeued, killed: the weights of an uninterrupted job bit for bit, in one W&B run."""
    recipe = desk.recipe("small.yaml", max_steps=800)
    whole = desk.run_ssl(recipe, "--output_dir", "runs/whole")
    jobs = {how: desk.run_ssl(recipe, "--output_dir", f"runs/{how}") for how in STOPS}
    for how, stop in STOPS.items():
        desk.until(lambda how=how: desk.has_checkpoint(f"runs/{how}"))
        stop(desk, jobs[how])
    assert desk.wait(whole, *jobs.values()) == ["COMPLETED"] * 4, desk.logs()
    expected = load_file(desk.folder / "runs" / "whole" / "model.safetensors")
    for how, job in jobs.items():
        assert desk.job(job)["Restarts"] == "1", desk.log(job)
        assert "going on from" in desk.log(job)
        folder = desk.folder / "runs" / how
        weights = load_file(folder / "model.safetensors")
        assert all(weights[name].equal(expected[name]) for name in expected), how
        run_id = (folder / "wandb_run_id").read_text()
        sessions = [path.name.rsplit("-", 1)[-1] for path in folder.glob("wandb/offline-run-*")]
        assert sessions == [run_id] * 2, sessions
        assert "Traceback" not in desk.log(job), desk.log(job)
        assert "not requeued" not in desk.log(job), desk.log(job)
    for how in ("signal", "requeue"):  # not a step was lost
        log = desk.log(jobs[how])
        step = log.split("stopped by a signal at step ")[1].split(",")[0]
        assert f"checkpoint-{step}\n" in log
        assert int(step) % SMALL["save_steps"], "stopped where it would have saved anyway"
    again = desk.run_ssl(recipe, "--output_dir", "runs/whole")
    assert desk.wait(again) == ["COMPLETED"]
    assert "this run is finished; there is nothing to do" in desk.log(again)


def test_several_processes_and_nodes_train_as_one_does(desk):
    """Two processes on a node, signalled, and one on each of two nodes, preempted: the losses of a single process."""
    recipe = desk.recipe("small.yaml", max_steps=600, save_steps=20, logging_steps=20, report_to="none")
    alone = desk.run_ssl(recipe, "--output_dir", "runs/alone")
    assert desk.wait(alone) == ["COMPLETED"], desk.logs()
    expected = losses(desk.folder / "runs" / "alone")
    assert len(expected) == 30
    one_node = desk.run_ssl(recipe, "--output_dir", "runs/one_node", options=("--gres=gpu:2",))
    desk.until(lambda: desk.has_checkpoint("runs/one_node"))
    by_signal(desk, one_node)
    assert desk.wait(one_node) == ["COMPLETED"], desk.logs()
    two_nodes = desk.run_ssl(recipe, "--output_dir", "runs/two_nodes", options=("--nodes=2",))
    desk.until(lambda: desk.has_checkpoint("runs/two_nodes"))
    urgent = desk.sbatch("--partition=urgent", "--nodes=2", "--gres=gpu:2", "--wrap=sleep 1", "--output=/dev/null")
    assert desk.wait(two_nodes, urgent) == ["COMPLETED"] * 2, desk.logs()
    for job in (one_node, two_nodes):
        assert desk.job(job)["Restarts"] == "1", desk.log(job)
        assert "stopped by a signal at step" in desk.log(job), desk.log(job)
    for run in ("one_node", "two_nodes"):
        reached = losses(desk.folder / "runs" / run)
        assert reached.keys() >= expected.keys()
        # Sums in another order: at first equal to the last digits, then apart as any two runs that differ by a bit.
        early = {step: (loss, reached[step]) for step, loss in expected.items() if step <= 100}
        apart = {step: pair for step, pair in early.items() if abs(pair[1] / pair[0] - 1) > 1e-3}
        # The step of the interruption begins a new mean, so that one logged loss is of fewer steps.
        assert len(apart) <= 1, apart
        assert abs(np.mean(list(reached.values())) / np.mean(list(expected.values())) - 1) < 0.02


# ----------------------------------------------------------------------------------------------------- from end to end


def test_pretraining_then_five_evaluations(desk):
    """One documented line; a task that fails leaves its error in the log and in the report, and can be repeated."""
    recipe = desk.recipe("small.yaml", max_steps=100)
    wrapper = desk.repository / "run_linear_probe_array.sh"
    fast = {"dataset": "synthetic:400", "seeds": 1, "batch_size": 32, "num_train_epochs": 1, "bf16": False}
    (desk.folder / "fast.yaml").write_text(yaml.safe_dump(fast))
    flags = ("--encoder", "runs/first", "--config", "fast.yaml")
    results = desk.folder / "results" / "first"
    results.mkdir(parents=True)
    (results / "random_fine_tune").touch()  # a file where a folder must be: task 3 will fail
    pretraining = desk.run_ssl(recipe, "--output_dir", "runs/first")
    after = ("--kill-on-invalid-dep=yes", f"--dependency=afterok:{pretraining}")
    array = desk.sbatch(*after, wrapper, *flags)
    tasks = [f"{array}_{index}" for index in range(5)]
    assert desk.wait(pretraining, *tasks) == ["COMPLETED"] * 4 + ["FAILED", "COMPLETED"], desk.logs()
    assert "random_fine_tune" in desk.log(tasks[3], "linear_probe").split("Error")[-1]
    report = (results / "report.md").read_text()
    assert "| Fine-tune (random weights) | failed, " in report
    assert report.count(" over ") >= 4
    (results / "random_fine_tune").unlink()
    again = desk.sbatch("--array=2,3", wrapper, *flags)
    assert desk.wait(f"{again}_2", f"{again}_3") == ["COMPLETED"] * 2, desk.logs()
    assert "finished before" in desk.log(f"{again}_2", "linear_probe")
    report = (results / "report.md").read_text()
    assert "failed" not in report
    assert "missing" not in report
    failing = desk.run_ssl("missing.yaml")
    orphan = desk.sbatch("--kill-on-invalid-dep=yes", f"--dependency=afterok:{failing}", "--array=0", wrapper, *flags)
    assert desk.wait(failing, orphan) == ["FAILED", "CANCELLED"]


def test_search_as_an_array(desk):
    """Six cells, one of which is killed; submitted again, it alone goes on; then they are gathered."""
    values = [0.65, 0.7, 0.75, 0.8, 0.85, 0.9]
    recipe = desk.recipe("mask_ratio.yaml", max_steps=250, output_dir="runs/masks", search={"mask_ratio": values})
    assert "--array=0-5 run_ssl mask_ratio.yaml" in desk.run("galaxy_mae.search", "cells", recipe)
    first = desk.run_ssl(recipe, options=("--array=0-5",))
    desk.until(lambda: desk.has_checkpoint("runs/masks/mask_ratio_0.75"))
    desk.cluster.command("scancel", f"{first}_2")
    states = desk.wait(*(f"{first}_{index}" for index in range(6)))
    assert [states[index] for index in (0, 1, 3, 4, 5)] == ["COMPLETED"] * 5, desk.logs()
    assert states[2] == "CANCELLED"  # and not back in the queue: the user has the last word
    cells = desk.run("galaxy_mae.search", "cells", recipe)
    assert cells.count(": finished,") == 5
    assert "mask_ratio 0.75: unfinished, at step" in cells
    second = desk.run_ssl(recipe, options=("--array=0-5",))
    assert desk.wait(*(f"{second}_{index}" for index in range(6))) == ["COMPLETED"] * 6, desk.logs()
    for index in range(6):
        assert ("going on from" if index == 2 else "nothing to do") in desk.log(f"{second}_{index}")
    table = desk.run("galaxy_mae.search", "report", recipe)
    assert "| mask_ratio | 0.65, 0.7, 0.75, 0.8, 0.85, 0.9 |" in table
    folder = desk.folder / "runs" / "masks"
    assert (folder / "search.md").read_text().count("| mask_ratio") + (folder / "search.md").read_text().count(
        "| **"
    ) == 6
    for picture in ("search.png", "reconstructions.png"):
        assert (folder / picture).read_bytes().startswith(b"\x89PNG")


# ------------------------------------------------------------------------------------------------------------ wrong use


@pytest.mark.parametrize("wrapper", ["run_ssl", "run_linear_probe_array.sh"])
def test_slurm_would_take_the_wrappers(desk, wrapper):
    for options in ((), ("--gres=gpu:2",), ("-N", "2"), ("--array=0-2",)):
        answer = desk.cluster.command("sbatch", "--test-only", *options, desk.repository / wrapper, cwd=desk.folder)
        assert "to start at" in answer
    with pytest.raises(RuntimeError):
        desk.cluster.command("sbatch", "--test-only", "--partition=none", desk.repository / wrapper)


def test_wrong_use_ends_with_one_line_in_the_log(desk, small_disk):
    """Each with a state that is not COMPLETED, and no traceback."""
    recipe = desk.recipe("small.yaml")
    search = desk.recipe("search.yaml", search={"mask_ratio": [0.7, 0.8]})
    (desk.folder / "full").symlink_to(small_disk)
    wide = ("--hidden_size", "96", "--num_attention_heads", "3")
    jobs = {
        "--config missing.yaml: cannot be read": desk.run_ssl("missing.yaml"),
        "SLURM_ARRAY_TASK_ID 5: no such cell; search.yaml has cells 0 to 1": desk.run_ssl(
            search, options=("--array=5",)
        )
        + "_5",
        "VENV=/nowhere: no environment there": desk.run_ssl(recipe, VENV="/nowhere"),
        "the disk has": desk.run_ssl(recipe, *wide, "--output_dir", "full/run"),
        "SLURM_ARRAY_TASK_ID 7: no such method": desk.sbatch(
            "--array=7", desk.repository / "run_linear_probe_array.sh", "--encoder", "runs/first"
        )
        + "_7",
    }
    assert desk.wait(*jobs.values()) == ["FAILED"] * len(jobs)
    for line, job in jobs.items():
        log = desk.log(job, "linear_probe" if "method" in line else "ssl")
        assert line in log, log
        assert "Traceback" not in log, log
        assert log.count("error:") == (2 if "method" in line else 1), log  # the array's report, too, finds nothing

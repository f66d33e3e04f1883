"""The sbatch wrappers on a real Slurm: requeueing, several GPUs and nodes, arrays, error messages."""

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
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from cluster import Cluster, missing
from conftest import png
from safetensors.torch import load_file
from shards import galaxies_on_the_sky, write_hats

import galaxy_mae
from galaxy_mae.data.cache import open_galaxies
from galaxy_mae.data.hats import open_hats
from galaxy_mae.errors import UserError
from galaxy_mae.survey.output import finish

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
FINAL_STATES = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "DEADLINE"}

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(missing()), reason=missing())]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A cluster of two nodes with two fake GPUs each, for all tests in this file."""
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))  # a socket's path has at most 107 characters
    slurm = Cluster(folder)
    # One thread per process, because many jobs share the machine's cores.
    slurm.environment |= {"VENV": sys.prefix, "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
    slurm.start()
    yield slurm
    slurm.stop()
    shutil.rmtree(folder)


class User:
    """A user of the cluster: a folder to submit from and a link to the repository, both with a space in their paths."""

    def __init__(self, cluster: Cluster, folder: Path):
        self.cluster, self.folder = cluster, folder / "my galaxies"
        self.folder.mkdir()
        self.repository = folder / "the code"
        self.repository.symlink_to(ROOT)

    def recipe(self, name: str, **fields: object) -> str:
        """Write a recipe, or a sweep if `fields` has `sweep`, for a small and fast run; return its name."""
        content = SMALL | fields
        if "sweep" not in content:
            content = yaml.safe_load(Path(content.pop("recipe")).read_text()) | content
        (self.folder / name).write_text(yaml.safe_dump(content))
        return name

    def sbatch(self, *arguments: str | Path, **environment: str) -> str:
        """Submit a job and return its id."""
        output = self.cluster.command("sbatch", "--parsable", *arguments, cwd=self.folder, env=environment)
        return output.strip().splitlines()[-1]

    def run_ssl(self, *arguments: str, options: tuple[str, ...] = (), **environment: str) -> str:
        """Submit `run_ssl` and return the job's id."""
        return self.sbatch(*options, self.repository / "run_ssl", *arguments, **environment)

    def job(self, job: str) -> dict[str, str]:
        """Slurm's record of a job, as `scontrol show job` prints it."""
        words = self.cluster.command("scontrol", "--oneliner", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, *jobs: str, seconds: float = 400) -> list[str]:
        """Wait until jobs have ended and return their states."""

        def states() -> list[str]:
            return [self.job(job)["JobState"] for job in jobs]

        self.until(lambda: set(states()) <= FINAL_STATES, seconds, lambda: f"{states()}\n{self.logs()}")
        return states()

    def until(self, condition: Callable[[], object], seconds: float = 200, message: Callable[[], str] = str) -> None:
        """Wait until a condition holds; fail with a message, or all logs, after a time limit."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"waited for {seconds} s\n{message() or self.logs()}"
            time.sleep(0.1)

    def log(self, job: str, name: str = "ssl") -> str:
        """The log of a job."""
        return (self.folder / "logs" / f"{name}-{job}.out").read_text()

    def logs(self) -> str:
        """The logs of all jobs."""
        return "\n".join(f"== {path.name}\n{path.read_text()}" for path in sorted(self.folder.glob("logs/*")))

    def run_module(self, module: str, *arguments: str) -> str:
        """Run a module of the project in the user's folder, without Slurm, and return its output."""
        return self.cluster.command(
            sys.executable, "-m", module, *arguments, cwd=self.folder, env={"PYTHONPATH": str(ROOT)}, timeout=300
        )

    def has_checkpoint(self, run: str) -> bool:
        """Whether a run has saved a complete checkpoint, from which it can resume."""
        return bool(list((self.folder / run).glob("checkpoint-*/complete.json")))


@pytest.fixture
def user(cluster, tmp_path) -> User:
    """A user with an empty folder."""
    return User(cluster, tmp_path)


def losses(run: Path) -> dict[int, float]:
    """The logged training loss at each step."""
    state = json.loads((run / "trainer_state.json").read_text())
    return {entry["step"]: entry["loss"] for entry in state["log_history"] if "loss" in entry}


def by_signal(user: User, job: str) -> None:
    """Send USR1 to the batch shell, as Slurm does before the time limit."""
    user.cluster.command("scancel", "--batch", "--signal=USR1", job)


def by_requeue(user: User, job: str) -> None:
    """Requeue, as an administrator does. Slurm sends TERM to all processes of the job."""
    user.cluster.command("scontrol", "requeue", job)


def by_kill(user: User, job: str, program: bytes = b"/main.py") -> None:
    """Send KILL to the Python process, as the kernel does when memory runs out.

    Args:
        program: how an argument of its command line ends.
    """
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes().split(b"\0")
            environment = (process / "environ").read_bytes().split(b"\0")
            folder = (process / "cwd").readlink()
        except OSError:
            continue
        # Another cluster on this machine may have a job of this number.
        ours = f"SLURM_JOB_ID={job}".encode() in environment and folder == user.folder.resolve()
        if ours and b"python" in command[0] and any(argument.endswith(program) for argument in command):
            os.kill(int(process.name), signal.SIGKILL)
            return
    raise AssertionError(f"no {program.decode()} of job {job} is running\n{user.logs()}")


INTERRUPTIONS = {"signal": by_signal, "requeue": by_requeue, "kill": by_kill}


def test_interrupted_jobs_end_with_the_same_weights(user):
    """Jobs that were signalled, requeued or killed end with the weights of an uninterrupted job, in one W&B run."""
    recipe = user.recipe("small.yaml", max_steps=800)
    uninterrupted = user.run_ssl(recipe, "--output_dir", "runs/uninterrupted")
    jobs = {name: user.run_ssl(recipe, "--output_dir", f"runs/{name}") for name in INTERRUPTIONS}
    for name, interrupt in INTERRUPTIONS.items():
        user.until(lambda name=name: user.has_checkpoint(f"runs/{name}"))
        interrupt(user, jobs[name])
    assert user.wait(uninterrupted, *jobs.values()) == ["COMPLETED"] * 4, user.logs()
    expected = load_file(user.folder / "runs" / "uninterrupted" / "model.safetensors")
    for name, job in jobs.items():
        log, folder = user.log(job), user.folder / "runs" / name
        assert user.job(job)["Restarts"] == "1", log
        assert "resuming from" in log
        assert "Traceback" not in log, log
        assert "requeueing failed" not in log, log
        weights = load_file(folder / "model.safetensors")
        assert all(weights[key].equal(expected[key]) for key in expected), name
        run_id = (folder / "wandb_run_id").read_text()
        sessions = [path.name.rsplit("-", 1)[-1] for path in folder.glob("wandb/offline-run-*")]
        assert sessions == [run_id] * 2, sessions
    for name in ("signal", "requeue"):  # saved at the step of the signal, not at the last regular checkpoint
        log = user.log(jobs[name])
        step = log.split("stopped by a signal at step ")[1].split(",")[0]
        assert f"checkpoint-{step}\n" in log
        assert int(step) % SMALL["save_steps"], "the step of the signal is one of the regular checkpoints"
    again = user.run_ssl(recipe, "--output_dir", "runs/uninterrupted")
    assert user.wait(again) == ["COMPLETED"]
    assert "this run is finished; nothing to do" in user.log(again)


def test_several_processes_and_nodes_reach_the_losses_of_one_process(user):
    """Two processes on one node, signalled, and one process on each of two nodes, preempted."""
    recipe = user.recipe("small.yaml", max_steps=600, save_steps=20, logging_steps=20, report_to="none")
    one_process = user.run_ssl(recipe, "--output_dir", "runs/one_process")
    assert user.wait(one_process) == ["COMPLETED"], user.logs()
    expected = losses(user.folder / "runs" / "one_process")
    assert len(expected) == 30
    one_node = user.run_ssl(recipe, "--output_dir", "runs/one_node", options=("--gres=gpu:2",))
    user.until(lambda: user.has_checkpoint("runs/one_node"))
    by_signal(user, one_node)
    assert user.wait(one_node) == ["COMPLETED"], user.logs()
    two_nodes = user.run_ssl(recipe, "--output_dir", "runs/two_nodes", options=("--nodes=2",))
    user.until(lambda: user.has_checkpoint("runs/two_nodes"))
    urgent = user.sbatch("--partition=urgent", "--nodes=2", "--gres=gpu:2", "--wrap=sleep 1", "--output=/dev/null")
    assert user.wait(two_nodes, urgent) == ["COMPLETED"] * 2, user.logs()
    for job in (one_node, two_nodes):
        assert user.job(job)["Restarts"] == "1", user.log(job)
        assert "stopped by a signal at step" in user.log(job), user.log(job)
    for run in ("one_node", "two_nodes"):
        actual = losses(user.folder / "runs" / run)
        assert actual.keys() >= expected.keys()
        # Sums in a different order: the first losses agree to rounding errors, which then grow as training is chaotic.
        early = {step: (loss, actual[step]) for step, loss in expected.items() if step <= 100}
        different = {step: pair for step, pair in early.items() if abs(pair[1] / pair[0] - 1) > 1e-3}
        # The logged mean is reset at the interruption, so one of the losses is the mean of fewer steps.
        assert len(different) <= 1, different
        assert abs(np.mean(list(actual.values())) / np.mean(list(expected.values())) - 1) < 0.02


def test_streamed_shards_over_a_kill_and_in_two_processes(user):
    """From a HATS catalogue: a killed job ends with the weights of an uninterrupted one, two processes with its losses.

    Their losses are those only if their batches are the same, so no galaxy comes twice in an epoch.
    """
    write_hats(user.folder / "hats", galaxies_on_the_sky(), order=2)
    fields = {"dataset": "hats", "stream": True, "stream_buffer": 128, "max_steps": 600, "save_steps": 20}
    recipe = user.recipe("stream.yaml", **fields, probe_every=0, report_to="none")
    jobs = {name: user.run_ssl(recipe, "--output_dir", f"runs/{name}") for name in ("uninterrupted", "killed")}
    jobs["two"] = user.run_ssl(recipe, "--output_dir", "runs/two", options=("--gres=gpu:2",))
    user.until(lambda: user.has_checkpoint("runs/killed"))
    by_kill(user, jobs["killed"])
    assert user.wait(*jobs.values()) == ["COMPLETED"] * 3, user.logs()
    assert "resuming from" in user.log(jobs["killed"])
    weights = {name: load_file(user.folder / "runs" / name / "model.safetensors") for name in jobs}
    expected = weights["uninterrupted"]
    assert all(weights["killed"][key].equal(expected[key]) for key in expected)
    actual, expected = (losses(user.folder / "runs" / name) for name in ("two", "uninterrupted"))
    epochs = [step for step in expected if step <= 100]  # six of them; then rounding errors have grown
    assert np.allclose([actual[step] for step in epochs], [expected[step] for step in epochs], rtol=1e-3)


def test_pretraining_and_five_evaluations(user):
    """The array runs after the pre-training; a failed task is shown in its log and the report, and can be repeated."""
    recipe = user.recipe("small.yaml", max_steps=100)
    wrapper = user.repository / "run_linear_probe_array.sh"
    fast = {"dataset": "synthetic:400", "seeds": 1, "batch_size": 32, "num_train_epochs": 1, "bf16": False}
    (user.folder / "fast.yaml").write_text(yaml.safe_dump(fast))
    flags = ("--encoder", "runs/first", "--config", "fast.yaml")
    results = user.folder / "results" / "first"
    results.mkdir(parents=True)
    (results / ".evaluation.lock").touch()  # as of an evaluation before
    (results / "random_fine_tune").touch()  # a file in place of the folder, so task 3 fails
    pretraining = user.run_ssl(recipe, "--output_dir", "runs/first")
    after = ("--kill-on-invalid-dep=yes", f"--dependency=afterok:{pretraining}")
    array = user.sbatch(*after, wrapper, *flags)
    tasks = [f"{array}_{index}" for index in range(5)]
    assert user.wait(pretraining, *tasks) == ["COMPLETED"] * 4 + ["FAILED", "COMPLETED"], user.logs()
    assert "random_fine_tune" in user.log(tasks[3], "linear_probe").split("Error")[-1]
    report = (results / "report.md").read_text()
    assert "| Fine-tune (random weights) | failed, " in report
    assert report.count(" over ") >= 4
    (results / "random_fine_tune").unlink()
    again = user.sbatch("--array=2,3", wrapper, *flags)
    assert user.wait(f"{again}_2", f"{again}_3") == ["COMPLETED"] * 2, user.logs()
    assert "already finished" in user.log(f"{again}_2", "linear_probe")
    report = (results / "report.md").read_text()
    assert "failed" not in report
    assert "missing" not in report
    failing = user.run_ssl("missing.yaml")
    after = ("--kill-on-invalid-dep=yes", f"--dependency=afterok:{failing}")
    dependent = user.sbatch(*after, "--array=0", wrapper, *flags)
    assert user.wait(failing, dependent) == ["FAILED", "CANCELLED"]


def test_sweep_as_an_array(user):
    """One of three trials is cancelled and resumes when the array is submitted again; the report has all three."""
    values = [0.65, 0.75, 0.85]
    recipe = user.recipe("mask_ratio.yaml", max_steps=250, output_dir="runs/masks", sweep={"mask_ratio": values})
    assert "--array=0-2 run_ssl mask_ratio.yaml" in user.run_module("galaxy_mae.sweep", "trials", recipe)
    first = user.run_ssl(recipe, options=("--array=0-2",))
    user.until(lambda: user.has_checkpoint("runs/masks/mask_ratio_0.75"))
    user.cluster.command("scancel", f"{first}_1")
    states = user.wait(*(f"{first}_{index}" for index in range(3)))
    assert [states[index] for index in (0, 2)] == ["COMPLETED"] * 2, user.logs()
    assert states[1] == "CANCELLED"  # the wrapper does not requeue a cancelled job
    trials = user.run_module("galaxy_mae.sweep", "trials", recipe)
    assert trials.count(": finished,") == 2
    assert "mask_ratio 0.75: unfinished, at step" in trials
    second = user.run_ssl(recipe, options=("--array=0-2",))
    assert user.wait(*(f"{second}_{index}" for index in range(3))) == ["COMPLETED"] * 3, user.logs()
    for index in range(3):
        assert ("resuming from" if index == 1 else "nothing to do") in user.log(f"{second}_{index}")
    table = user.run_module("galaxy_mae.sweep", "report", recipe)
    assert "| mask_ratio | 0.65, 0.75, 0.85 |" in table
    folder = user.folder / "runs" / "masks"
    report = (folder / "sweep.md").read_text()
    assert report.count("| mask_ratio") + report.count("| **") == 3
    assert (folder / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert report.count("reconstruction_example.png") == 3


@pytest.mark.filterwarnings("ignore")  # of LSDB and Dask
def test_survey_as_an_array(user):
    """Of four tasks one is killed and one cancelled; the array submitted again completes what a plain loop computes."""
    model, count = ROOT / "pretrained" / "galaxy-zoo-small", 2400
    galaxies, catalogue = open_galaxies(f"synthetic:{count}", 64), user.folder / "sky"
    columns = {"ra": galaxies.ra, "dec": galaxies.dec, "object_id": [f"S{i}" for i in range(count)]}
    images = [{"bytes": png(image), "path": None} for image in galaxies.pixels]
    table = pa.table(columns | {"rgb_image": pa.array(images, pa.struct({"bytes": pa.binary(), "path": pa.string()}))})
    lsdb = pytest.importorskip("lsdb")
    frame = table.to_pandas(types_mapper=pd.ArrowDtype)
    options = {"ra_column": "ra", "dec_column": "dec", "catalog_name": "sky", "partition_rows": 60}
    known = lsdb.from_dataframe(frame, **options)
    known.write_catalog(catalogue, as_collection=True, progress_bar=False)
    wrapper, flags = user.repository / "run_survey", ("--catalog", "sky", "--output", "out")
    compute = (wrapper, "--model", model, *flags)
    done = user.folder / "out" / "out" / "dataset"

    first = user.sbatch("--array=0-3", *compute)
    tasks = [f"{first}_{index}" for index in range(4)]
    user.until(lambda: len(list(done.rglob("Npix*"))) > 1, 60)
    by_kill(user, user.job(tasks[1])["JobId"], b"galaxy_mae.catalogue")
    user.cluster.command("scancel", tasks[2])
    assert user.wait(*tasks) == ["COMPLETED", "COMPLETED", "CANCELLED", "COMPLETED"], user.logs()
    assert user.job(tasks[1])["Restarts"] == "1", user.logs()
    before = {path: path.stat().st_mtime_ns for path in done.rglob("Npix*")}
    with pytest.raises(UserError, match=r"partitions are missing: Norder="):
        finish(open_hats(str(catalogue)), user.folder / "out")
    again = user.sbatch("--array=0-1", *compute)
    after = ("--kill-on-invalid-dep=yes", f"--dependency=afterok:{again}")
    last = user.sbatch(*after, wrapper, "--finish", *flags)
    assert user.wait(f"{again}_0", f"{again}_1", last) == ["COMPLETED"] * 3, user.logs()
    assert f"{count:,} galaxies: complete" in user.log(last, "survey")
    assert {path: path.stat().st_mtime_ns for path in before} == before

    pq.write_table(table, user.folder / "plain.parquet")
    plain = galaxy_mae.predict(str(user.folder / "plain.parquet"), str(model), embeddings=True, use_cpu=True)
    opened = lsdb.open_catalog(user.folder / "out")
    found = opened.compute().set_index("object_id").loc[plain["object_id"]]
    embedding = np.array(found["embedding"].tolist(), np.float32)
    assert embedding.tobytes() == np.stack(plain["embedding"]).tobytes()
    assert (found["predicted_class"].to_numpy() == plain["predicted_class"].to_numpy()).all()
    options = {"radius_arcsec": 0.1, "suffixes": ("", "_known"), "suffix_method": "all_columns"}
    matched = opened.crossmatch(known[["object_id", "ra", "dec"]], **options).compute()
    assert (matched["object_id"] == matched["object_id_known"]).sum() == count


@pytest.mark.parametrize("wrapper", ["run_ssl", "run_survey", "run_linear_probe_array.sh"])
def test_slurm_accepts_the_wrappers(user, wrapper):
    for options in ((), ("--gres=gpu:2",), ("-N", "2"), ("--array=0-2",)):
        answer = user.cluster.command("sbatch", "--test-only", *options, user.repository / wrapper, cwd=user.folder)
        assert "to start at" in answer
    with pytest.raises(RuntimeError):
        user.cluster.command("sbatch", "--test-only", "--partition=none", user.repository / wrapper)


def test_a_submitted_copy_finds_its_repository(user, tmp_path):
    """Submitted by its path, through a link, from a pipe, with arguments that contain its name; and by a lone copy."""
    clone = tmp_path / "run_ssl clone"
    (clone / "slurm").mkdir(parents=True)
    for name in ("run_ssl", "slurm/job.sh"):
        shutil.copy(ROOT / name, clone / name)
    (clone / "main.py").write_text("import sys\nprint('found', sys.argv)")
    (user.folder / "run_ssl").symlink_to(clone / "run_ssl")
    jobs = {
        "path": user.sbatch(clone / "run_ssl"),
        "arguments": user.sbatch(clone / "run_ssl", "a.yaml", "--output_dir", "runs/run_ssl"),
        "link": user.sbatch("run_ssl", "--output_dir", "runs/run_ssl 2"),
        "pipe": user.cluster.command("sbatch", "--parsable", cwd=user.folder, input=(ROOT / "run_ssl").read_text()),
    }
    jobs = {name: job.strip() for name, job in jobs.items()}
    assert user.wait(*jobs.values()) == ["COMPLETED"] * 4, user.logs()
    for name, job in jobs.items():
        assert f"found ['{clone}/main.py'" in user.log(job), name
    assert "'--config', 'a.yaml', '--output_dir', 'runs/run_ssl']" in user.log(jobs["arguments"])
    (user.folder / "run_ssl").unlink()
    shutil.copy(ROOT / "run_ssl", user.folder)
    copy = user.sbatch("run_ssl")
    assert user.wait(copy) == ["FAILED"]
    error = "run_ssl: error: repository not found; submit it as sbatch PATH_OF_THE_CLONE/run_ssl\n"
    assert (user.folder / f"run_ssl-{copy}.out").read_text() == error


def test_errors_are_one_line_in_the_log(user, small_disk):
    """Jobs that fail because of the user's input or environment: no traceback, and the state is FAILED."""
    recipe = user.recipe("small.yaml")
    sweep = user.recipe("sweep.yaml", sweep={"mask_ratio": [0.7, 0.8]})
    (user.folder / "full").symlink_to(small_disk)
    large = ("--hidden_size", "96", "--num_attention_heads", "3")
    evaluation = user.repository / "run_linear_probe_array.sh"
    no_trial = user.run_ssl(sweep, options=("--array=5",))
    no_method = user.sbatch("--array=7", evaluation, "--encoder", "runs/first")
    jobs = {
        "--config missing.yaml: cannot be read": user.run_ssl("missing.yaml"),
        "SLURM_ARRAY_TASK_ID 5: not one of 0 to 1": f"{no_trial}_5",
        "VENV=/nowhere: no virtual environment there": user.run_ssl(recipe, VENV="/nowhere"),
        "the disk or quota is full": user.run_ssl(recipe, *large, "--output_dir", "full/run"),
        "SLURM_ARRAY_TASK_ID 7: not one of 0 to 4": f"{no_method}_7",
    }
    assert user.wait(*jobs.values()) == ["FAILED"] * len(jobs)
    for line, job in jobs.items():
        log = user.log(job, "linear_probe" if "TASK_ID 7" in line else "ssl")
        assert line in log, log
        assert "Traceback" not in log, log
        assert log.count("error:") == (2 if "TASK_ID 7" in line else 1), log  # the report, too, has no results

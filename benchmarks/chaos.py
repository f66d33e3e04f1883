"""Kill pre-training, evaluation and ingestion at random moments, start them again, and compare what they end with.

    python benchmarks/chaos.py OUT --kills 100

A trial is one command in a folder of its own. It is killed up to three times (SIGKILL, SIGTERM, or SIGTERM and SIGKILL
after it), repeated after each kill, and then left to finish. Half of the kills come at a random moment of the duration
of an uninterrupted reference run, half shortly after a random file or folder has appeared, which may be a temporary
one. A trial passes if its last start ends with status 0, if its artifacts have the bits of the reference's, and if it
leaves no file that the reference does not leave. Exit status 1 if a trial fails.

Prints a table and writes `OUT/trials.jsonl`, one line per trial. The folders of trials that failed are kept in OUT. The
same seed draws the same kills; the speed of the machine decides what they meet.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from measurement import print_table
from PIL import Image

from galaxy_mae.errors import UserError, one_line_errors
from galaxy_mae.predictions.formats import ABOUT
from galaxy_mae.provenance import machine, session, short_commit

ROOT = Path(__file__).resolve().parents[1]
WORKERS = 2  # trials that run at the same time
MAX_KILLS = 3  # of a trial
TIMEOUT = 240  # seconds after which a process counts as hanging

# What depends on the time or on how often a run was started: sessions, runtimes, losses averaged since the last start,
# and the checksums of such files.
_SESSION_FILES = {"run.json", "pretraining.json", "complete.json"}
_SESSION_FILES |= {"trainer_state.json", "train_results.json", "all_results.json"}
_SESSION_TEXT = re.compile(
    rb"p\d{4,}|[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}|[\d-]{10} \d\d:\d\d"
)  # Bokeh's ids, times
_SESSION_KEYS = re.compile(r"started|created|seconds|.*_runtime|.*_per_second|.*_preparation_time")

# What a process was doing, by the newest file or folder of its own.
_MOMENTS = (
    ("start-up", r"^$"),
    ("saving", r"checkpoint-\d+(/(?!complete\.json$).*)?$"),
    ("training", r"/complete\.json$|/\.?run\.json|/reconstructions"),
    ("ingest", r"^cache(?!/[0-9a-f]+/features)"),
    ("results", r""),
)


# -------------------------------------------------------------------------------------------------------- the commands


def write_inputs(folder: Path) -> None:
    """Write random galaxies as HDF5 and as Parquet: 2,000 images of 64 pixels in ten classes."""
    import datasets

    folder.mkdir(parents=True)
    images = np.random.default_rng(0).integers(0, 256, (2000, 64, 64, 3), dtype=np.uint8)
    label = np.arange(2000) % 10
    with h5py.File(folder / "galaxies.h5", "w") as file:
        file.create_dataset("images", data=images, chunks=(1, 64, 64, 3), compression="gzip")
        file["ans"] = label.astype(np.uint8)
    table = datasets.Dataset.from_dict({"image": [Image.fromarray(image) for image in images], "label": label})
    table.to_parquet(folder / "galaxies.parquet")


def commands(out: Path) -> dict[str, list[str]]:
    """The arguments of Python for each kind of process. The evaluation takes the encoder of the first reference."""
    common = ["--dataset", "synthetic:200", "--batch_size", "16", "--use_cpu", "True", "--bf16", "False"]
    common += ["--report_to", "none", "--disable_tqdm", "True", "--save_total_limit", "1"]
    model = ["--image_size", "32", "--hidden_size", "32", "--num_hidden_layers", "2", "--num_attention_heads", "2"]
    model += ["--decoder_hidden_size", "32", "--decoder_num_hidden_layers", "1"]
    steps = ["--max_steps", "300", "--save_steps", "10", "--eval_steps", "50", "--reconstruct_every", "10"]
    return {
        "pre-training": [
            *(str(ROOT / "main.py"), "--config", str(ROOT / "recipes" / "demo.yaml"), "--output_dir", "run"),
            *(*common, *model, *steps),
        ],
        "evaluation": [
            *(str(ROOT / "linear_probe_checkpoints.py"), "--config", str(ROOT / "recipes" / "evaluation_demo.yaml")),
            *("--encoder", str(reference(out, "pre-training") / "run"), "--output_dir", "results", *common),
        ],
        "ingest (HDF5)": ["-m", "galaxy_mae.data", str(out / "inputs" / "galaxies.h5"), "--image_size", "48"],
        "ingest (Parquet)": ["-m", "galaxy_mae.data", str(out / "inputs" / "galaxies.parquet"), "--image_size", "48"],
    }


def reference(out: Path, kind: str) -> Path:
    """The folder of the uninterrupted run of a kind."""
    return out / "reference" / kind


def environment() -> dict[str, str]:
    """One thread, this checkout's package, no commit in the results, and caches in the folder of the process."""
    caches = {"GALAXY_MAE_CACHE": "cache", "HF_HOME": "cache/huggingface", "HF_DATASETS_CACHE": "cache/datasets"}
    return os.environ | caches | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "GIT_DIR": os.devnull}


# --------------------------------------------------------------------------------------------------------- the killing


@dataclass(frozen=True)
class Kill:
    """When and how to kill a process: after so many seconds, or after so many new files and folders and seconds."""

    signals: tuple[signal.Signals, ...]
    files: int
    seconds: float


@dataclass(frozen=True)
class Run:
    """One start of a process.

    Attributes:
        status: as of `subprocess`; None if it had to be stopped after `TIMEOUT`.
        killed: whether it was still running when it was to be killed.
        seconds: from its start to its end.
        files: how many files and folders appeared.
        newest: the last of them.
        message: the end of its standard error.
    """

    status: int | None
    killed: bool
    seconds: float
    files: int
    newest: str
    message: str


def list_files(folder: Path) -> set[str]:
    """All files and folders in a folder, hidden ones as well, relative to it. It may change meanwhile."""
    return {
        os.path.relpath(Path(parent, name), folder)
        for parent, folders, files in os.walk(folder)
        for name in (*folders, *files)
    }


def run_process(command: list[str], folder: Path, kill: Kill | None = None) -> Run:
    """Run a command in a folder to its end, or kill it on the way."""
    # Its end may begin within a character of a progress bar, and a kill may end it within one.
    with (folder.parent / f"{folder.name}.log").open("a+", encoding="utf-8", errors="replace") as log:
        started, appeared, newest, killed, due = time.monotonic(), 0, "", False, None
        seen = list_files(folder)
        process = subprocess.Popen([sys.executable, *command], cwd=folder, env=environment(), stdout=log, stderr=log)
        try:
            while process.poll() is None and time.monotonic() < started + TIMEOUT:
                new = list_files(folder) - seen
                seen |= new
                appeared += len(new)
                newest = max((name for name in new if not name.endswith(".lock")), default=newest)
                if kill and not killed:
                    if due is None and appeared >= kill.files:
                        due = (time.monotonic() if kill.files else started) + kill.seconds
                    if due is not None and time.monotonic() >= due:
                        killed = _send(process, kill.signals)
                time.sleep(0.003)
            status = process.poll()
        finally:
            process.kill()
            process.wait()
        log.seek(max(0, log.tell() - 1000))
        message = log.read()
    return Run(status, killed, time.monotonic() - started, appeared, newest, message)


def _send(process: subprocess.Popen, signals: tuple[signal.Signals, ...]) -> bool:
    """Send signals, a second one after 0.2 s; returns whether the process was running before the first."""
    running = process.poll() is None
    for number in signals[:1]:
        process.send_signal(number)
    for number in signals[1:]:
        time.sleep(0.2)
        process.send_signal(number)
    return running


def random_kill(rng: np.random.Generator, whole: Run) -> Kill:
    """Draw a kill within the duration, or at one of the new files, of the uninterrupted run."""
    choices = ((signal.SIGKILL,), (signal.SIGTERM,), (signal.SIGTERM, signal.SIGKILL))
    signals = choices[rng.choice(3, p=(0.7, 0.2, 0.1))]
    if rng.random() < 0.5:
        return Kill(signals, 0, rng.uniform(0, whole.seconds))
    return Kill(signals, int(rng.integers(1, whole.files + 1)), rng.choice((0, rng.uniform(0, 0.05))))


def moment(run: Run) -> str:
    """What a process was doing when it ended."""
    return next(name for name, pattern in _MOMENTS if re.search(pattern, run.newest))


# ---------------------------------------------------------------------------------------------------------- the trials


def run_trial(kind: str, command: list[str], out: Path, whole: Run, seed: tuple[int, ...], kills: int) -> dict:
    """Start a command until it finishes, kill its first `kills` starts, and compare it with the reference.

    Args:
        kind: whose reference it is compared with.
        command: the arguments of Python.
        out: the folder of all trials.
        whole: the uninterrupted run.
        seed: of the kills.
        kills: how many are tried; one that comes after the end does not count.

    Returns:
        `kind`, `seed`, `kills` (signal, moment, newest file, seconds), `completed`, `bit_equal`, `clean`, and what is
        wrong: `message`, `different`, `left_over`, `missing`.
    """
    folder = out / "trials" / "_".join(map(str, (re.sub(r"\W+", "_", kind), *seed)))
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    killed = []
    for _ in range(kills):
        kill = random_kill(rng, whole)
        run = run_process(command, folder, kill)
        if not run.killed or run.status == 0:  # it was too late, or a signal came after the last file
            break
        names = "+".join(number.name for number in kill.signals)
        killed.append({"signal": names, "moment": moment(run), "newest": run.newest, "seconds": round(run.seconds, 2)})
        if run.status not in (75, *(-number for number in kill.signals)):
            break
    else:
        run = run_process(command, folder)
    result = {"kind": kind, "seed": seed, "kills": killed} | judge(run.status, reference(out, kind), folder)
    if passed(result):
        shutil.rmtree(folder)
        folder.with_name(f"{folder.name}.log").unlink()
        return result
    return result | ({"message": run.message} if run.status != 0 else {})


def judge(status: int | None, expected: Path, folder: Path) -> dict[str, Any]:
    """Compare what a trial ended with and what it left with the reference."""
    before, now = list_files(expected), list_files(folder)
    files = sorted(name for name in before & now if (expected / name).is_file())
    different = [name for name in files if not _equal(expected / name, folder / name)]
    left_over, missing = sorted(now - before), sorted(before - now)
    return {
        "completed": status == 0 and not missing,
        "bit_equal": status == 0 and not different and not missing,
        "clean": not left_over,
        "status": status,
        "different": different,
        "left_over": left_over,
        "missing": missing,
    }


def passed(result: dict[str, Any]) -> bool:
    """Whether a trial ended as if it had not been killed."""
    return result["completed"] and result["bit_equal"] and result["clean"]


def _equal(expected: Path, path: Path) -> bool:
    """Whether two files have the same bits; of JSON, HTML and Parquet, the same content but for times and ids."""
    if path.name in _SESSION_FILES:
        return True
    if path.suffix == ".json":
        return _without_times(json.loads(expected.read_text())) == _without_times(json.loads(path.read_text()))
    contents = [file.read_bytes() for file in (expected, path)]
    if path.suffix == ".parquet" and contents[0] != contents[1]:
        contents = [_without_date(file) for file in (expected, path)]
    if path.suffix == ".html":
        contents = [_SESSION_TEXT.sub(b"", content) for content in contents]
    return contents[0] == contents[1]


def _without_date(file: Path) -> bytes:
    """A table, and what its metadata say of it."""
    table, sink = pq.read_table(file), pa.BufferOutputStream()
    about = _without_times(json.loads((table.schema.metadata or {}).get(ABOUT.encode(), "{}")))
    pq.write_table(table.replace_schema_metadata({ABOUT: json.dumps(about)}), sink)
    return sink.getvalue().to_pybytes()


def _without_times(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _without_times(value) for key, value in content.items() if not _SESSION_KEYS.fullmatch(key)}
    return content


def run_references(out: Path, kinds: list[str]) -> dict[str, Run]:
    """Run each kind once without a kill.

    Raises:
        UserError: one of them failed.
    """
    if not (out / "inputs").exists():
        write_inputs(out / "inputs")
    runs = {}
    for kind in kinds:
        folder = reference(out, kind)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        runs[kind] = run_process(commands(out)[kind], folder)
        if runs[kind].status != 0:
            raise UserError(f"{kind}: the uninterrupted run failed, see {folder}.log")
    return runs


def run_trials(out: Path, kills: int, seed: int = 0) -> list[dict]:
    """Run trials of all kinds in turn, until so many kills have met their process. The results, as of `run_trial`."""
    by_kind = commands(out)
    kinds = list(by_kind)
    whole = run_references(out, kinds)
    results: list[dict] = []
    running: dict = {}
    number = 0
    with ThreadPoolExecutor(WORKERS) as pool, (out / "trials.jsonl").open("w") as file:
        while True:
            planned = sum(len(result["kills"]) for result in results) + sum(running.values())
            while planned < kills and len(running) < WORKERS:
                kind, wanted = kinds[number % len(kinds)], 1 + number // len(kinds) % MAX_KILLS
                wanted = min(wanted, kills - planned)
                trial = pool.submit(run_trial, kind, by_kind[kind], out, whole[kind], (seed, number), wanted)
                running[trial] = wanted
                planned, number = planned + wanted, number + 1
            if not running:
                return results
            for trial in wait(running, return_when=FIRST_COMPLETED).done:
                del running[trial]
                results.append(trial.result())
                print(json.dumps(results[-1]), file=file, flush=True)


# ----------------------------------------------------------------------------------------------------------- the table


def print_results(results: list[dict]) -> None:
    """One line per kind of process and one of all: trials, kills by moment, and how many trials passed each check."""
    moments = [name for name, _ in _MOMENTS]
    checks = ("completed", "bit_equal", "clean")
    rows = []
    for kind in (*sorted({result["kind"] for result in results}), "all"):
        of_kind = [result for result in results if kind in ("all", result["kind"])]
        counts = Counter(kill["moment"] for result in of_kind for kill in result["kills"])
        numbers = [len(of_kind), counts.total(), *(counts[name] for name in moments)]
        numbers += [sum(result[check] for result in of_kind) for check in checks]
        rows.append((kind, *map(str, numbers)))
    columns = ("process", "trials", "kills", *moments, "completed", "bit-equal", "no left-overs")
    print_table(columns, rows)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for the references, the trials that failed and trials.jsonl")
    parser.add_argument("--kills", type=int, default=100, help="over all trials")
    parser.add_argument("--seed", type=int, default=0, help="of the kills")
    options = parser.parse_args(arguments)
    started = time.monotonic()
    results = run_trials(options.out.absolute(), options.kills, options.seed)
    minutes = (time.monotonic() - started) / 60
    print(f"{machine()}; commit {short_commit(session())}; seed {options.seed}; {minutes:.0f} minutes")
    print_results(results)
    failed = [result for result in results if not passed(result)]
    for result in failed:
        print(f"failed: {json.dumps(result)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    with one_line_errors(sys.argv[0]):
        sys.exit(main(sys.argv[1:]))

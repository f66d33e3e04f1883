"""`catalogue survey` on a HATS catalogue: throughput against a plain loop, tasks, LSDB, memory, and what a kill costs.

    python benchmarks/survey.py                                      20,000 galaxies in 200 partitions
    python benchmarks/survey.py --galaxies 2000 --partitions 20 --repeats 1        to see whether it runs

Writes a catalogue of synthetic galaxies of 64 pixels as PNG, and embeds it with the model of the repository. Each
measurement is a process of its own, whose time starts after Python's imports. LSDB is needed (requirements-survey.txt).

    plain loop    the model alone, over pixels in memory: what decoding, writing and waiting are compared with
    tasks         of one core and one thread each
    memory        peak of the process above what it had before the first partition
    kill          work that is lost by SIGKILL at a random moment: the time since the last complete partition
"""

import argparse
import json
import os
import random
import re
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
import pyarrow as pa
from measurement import median_and_range, print_table
from PIL import Image

from galaxy_mae.catalogue.__main__ import main as run_command
from galaxy_mae.catalogue.models import open_model
from galaxy_mae.data.cache import open_galaxies
from galaxy_mae.data.hats import open_hats
from galaxy_mae.errors import UserError, one_line_errors
from galaxy_mae.model.saved_model import DEFAULT_MODEL
from galaxy_mae.provenance import machine, session, short_commit
from galaxy_mae.survey import embed

SIZE = 64  # pixels
SMALL, MEDIUM, LARGE = 3, 1, 0  # HEALPix orders of the partitions of three catalogues of the same galaxies
MAX_PARTITIONS = 768  # of the whole sky at the first of them
MEMORY_TASKS = 3  # among which a catalogue is shared: the first one gets the largest partition
KILLS = 4


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--galaxies", type=int, default=20_000)
    parser.add_argument("--partitions", type=int, default=200, help=f"at most {MAX_PARTITIONS}")
    parser.add_argument("--repeats", type=int, default=2, help="of each throughput")
    parser.add_argument("--measure", help=argparse.SUPPRESS)  # what a child process measures, as JSON
    options = parser.parse_args(arguments)
    if options.measure:
        measure(**json.loads(options.measure))
        return
    load = os.getloadavg()[0]
    print(f"{machine()}, {os.cpu_count()} CPUs, load {load:.1f} at the start; commit {short_commit(session())}")
    with tempfile.TemporaryDirectory() as folder:
        catalogues = write_catalogues(Path(folder), options.galaxies, options.partitions)
        print(f"{options.galaxies:,} galaxies of {SIZE} pixels, {options.repeats} repeats, model {DEFAULT_MODEL}")
        report_throughput(Path(folder), catalogues[SMALL], options)
        report_memory(Path(folder), catalogues)
        report_kills(Path(folder), catalogues[SMALL])


def write_catalogues(folder: Path, count: int, partitions: int) -> dict[int, Path]:
    """Write the same galaxies as three HATS catalogues, in small, medium and large partitions."""
    import lsdb
    from hats.pixel_math.healpix_shim import radec2pix

    if not 0 < partitions <= MAX_PARTITIONS:
        raise UserError(f"--partitions {partitions}: it must be between 1 and {MAX_PARTITIONS}")
    rng, draws = np.random.default_rng(0), (2 * count + 100) * MAX_PARTITIONS // partitions
    sky = np.degrees([rng.uniform(0, 2 * np.pi, draws), np.arcsin(rng.uniform(-1, 1, draws))])
    ra, dec = sky[:, radec2pix(SMALL, *sky) < partitions][:, :count]
    images = [{"bytes": png(image), "path": None} for image in open_galaxies(f"synthetic:{count}", SIZE).pixels]
    columns = {"object_id": [f"S{i}" for i in range(count)], "ra": ra, "dec": dec}
    columns["rgb_image"] = pa.array(images, pa.struct({"bytes": pa.binary(), "path": pa.string()}))
    frame = pa.table(columns).to_pandas(types_mapper=pd.ArrowDtype)
    paths = {}
    for order in (SMALL, MEDIUM, LARGE):
        options = {"lowest_order": order, "highest_order": order, "margin_threshold": None}
        paths[order] = folder / f"order_{order}"
        catalogue = lsdb.from_dataframe(frame, catalog_name="sky", **options)
        catalogue.write_catalog(paths[order], as_collection=False, progress_bar=False)
    return paths


def png(image: np.ndarray) -> bytes:
    file = BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


# ------------------------------------------------------------------------------------------------------------- reports


def report_throughput(folder: Path, catalogue: Path, options: argparse.Namespace) -> None:
    """Print images/s of the plain loop, of one process and two, and of LSDB."""
    cores = sorted(os.sched_getaffinity(0))[:2]
    count, plain_loop = options.galaxies, {"what": "plain", "rendered": options.galaxies}
    kinds: dict[str, list[dict[str, Any]]] = {
        "plain loop, all cores": [plain_loop | {"count": count // 2}],
        "one process, all cores": [{"what": "survey"}],
        "plain loop, one core": [plain_loop | {"count": count // 2, "core": cores[0]}],
        "one task": [{"what": "survey", "task": 0, "tasks": 2, "core": cores[0]}],
        "two tasks": [{"what": "survey", "task": i, "tasks": 2, "core": core} for i, core in enumerate(cores)],
        f"LSDB, {len(cores)} workers": [{"what": "lsdb_cluster", "workers": len(cores)}],
    }
    rates: dict[str, list[float]] = {name: [] for name in kinds}
    for repeat in range(options.repeats):
        for i, (name, jobs) in enumerate(kinds.items()):
            paths = {"catalog": str(catalogue), "output": str(folder / f"out_{repeat}_{i}")}
            results = measure_together([job if job["what"] == "plain" else job | paths for job in jobs])
            seconds = max(each["ended"] for each in results) - min(each["started"] for each in results)
            rates[name].append(sum(each["images"] for each in results) / seconds)
    compared = ("", "plain loop, all cores", "", "plain loop, one core", "one task", "two tasks")
    rows = []
    for (name, values), other in zip(rates.items(), compared, strict=True):
        ratio = f"{statistics.median(values) / statistics.median(rates[other]):.2f} of {other}" if other else ""
        rows.append((name, median_and_range(values), ratio))
    print_table(("path", "images/s (min to max)", "ratio of the medians"), rows)


def report_memory(folder: Path, catalogues: dict[int, Path]) -> None:
    """Print the memory of the command and of LSDB for partitions of three sizes."""
    rows = []
    for order, catalogue in catalogues.items():
        partitions = open_hats(str(catalogue)).rows
        largest = max(partitions, key=partitions.get)
        common = {"catalog": str(catalogue), "core": min(os.sched_getaffinity(0))}
        task = {"what": "survey", "output": str(folder / f"memory_{order}"), "task": 0, "tasks": MEMORY_TASKS}
        measured = [measure_together([job | common])[0] for job in (task, {"what": "lsdb_partition"})]
        size = f"{partitions[largest]:,} galaxies, {largest.files[0].stat().st_size / 1e6:.1f} MB"
        rows.append((f"{len(partitions)}", size, *(f"{each['memory'] / 1e6:,.0f}" for each in measured)))
    print_table(("partitions", "the largest", "a task of survey, MB", "LSDB, the largest partition, MB"), rows)


def report_kills(folder: Path, catalogue: Path) -> None:
    """Print the work that a SIGKILL loses, and the time from starting again to the next complete partition."""
    random.seed(0)
    output, lost, starting = folder / "killed", [], []
    job = {"what": "survey", "catalog": str(catalogue), "output": str(output)}

    def latest() -> float:
        return max((path.stat().st_mtime for path in output.rglob("Npix=*.parquet")), default=0.0)

    for _ in range(KILLS):
        before, started = latest(), time.time()
        child = start(job)
        go(child)
        while latest() <= before and child.poll() is None:
            time.sleep(0.02)
        if child.poll() is not None:  # all was computed before the last kill: there were too few galaxies
            break
        starting.append(latest() - started)
        time.sleep(random.uniform(0, 2))
        child.send_signal(signal.SIGKILL)
        child.wait()
        lost.append(time.time() - latest())
    if lost:
        print(f"\nkilled {len(lost)} times: {median_and_range(lost)} s of work lost", end=", ")
        print(f"{median_and_range(starting)} s from the start of Python to the next partition")


# ----------------------------------------------------------------------------------------------------- child processes


def start(job: dict[str, Any]) -> subprocess.Popen:
    """Start a measurement, which waits for a line of input after its imports."""
    environment = os.environ | ({"OMP_NUM_THREADS": "1"} if "core" in job else {})
    command = [sys.executable, __file__, "--measure", json.dumps(job)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, text=True, env=environment, **pipes)


def go(child: subprocess.Popen) -> None:
    child.stdin.write("\n")
    child.stdin.flush()


def measure_together(jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The results of measurements that begin at the same time."""
    children = [start(job) for job in jobs]
    if all(child.stdout.readline() for child in children):  # each is ready
        for child in children:
            go(child)
    results = []
    for child in children:
        out, error = child.communicate()
        if child.returncode:
            raise UserError((error.strip().splitlines() or ["no message"])[-1])
        results.append(json.loads(out.splitlines()[-1]))
    return results


def measure(what: str, core: int | None = None, **arguments: Any) -> None:
    """Run one measurement in this process and print its result."""
    if core is not None:
        os.sched_setaffinity(0, {core})
    work = MEASUREMENTS[what](**arguments)
    print("ready", flush=True)
    sys.stdin.readline()
    before, started = psutil.Process().memory_info().rss, time.time()
    images = work()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    print(json.dumps({"images": images, "started": started, "ended": time.time(), "memory": memory}))


def plain(rendered: int, count: int) -> Callable[[], int]:
    """The model over the pixels of the first of the galaxies, in memory."""
    model = open_model(DEFAULT_MODEL)
    pixels = np.array(open_galaxies(f"synthetic:{rendered}", SIZE).pixels[:count])

    def work() -> int:
        return sum(len(features) for _, features in model.outputs(pixels))

    return work


def survey(catalog: str, output: str, task: int = 0, tasks: int = 1) -> Callable[[], int]:
    """The command, or one of its tasks."""
    flags = ["--model", DEFAULT_MODEL, "--catalog", catalog, "--output", output, "--use_cpu"]
    flags += ["--task", str(task), "--tasks", str(tasks)] if tasks > 1 else []
    open_model(DEFAULT_MODEL)  # imports and memory that every path needs

    def work() -> int:
        with redirect_stdout(StringIO()) as printed:
            run_command(["survey", *flags])
        return int(re.search(r"([\d,]+) galaxies", printed.getvalue())[1].replace(",", ""))

    return work


def lsdb_cluster(catalog: str, output: str, workers: int) -> Callable[[], int]:
    """LSDB writes the embedded catalogue, on workers of one thread that have opened the model."""
    from dask.distributed import Client
    from lsdb import open_catalog

    client = Client(n_workers=workers, threads_per_worker=1, dashboard_address=None)
    lazy = embed(open_catalog(catalog), DEFAULT_MODEL, use_cpu=True)
    client.run(embed, open_catalog(catalog), DEFAULT_MODEL, use_cpu=True)

    def work() -> int:
        lazy.write_catalog(output, as_collection=False, progress_bar=False)
        return sum(open_hats(output).rows.values())

    return work


def lsdb_partition(catalog: str) -> Callable[[], int]:
    """LSDB computes the largest partition in this process."""
    import dask
    from lsdb import open_catalog

    rows = open_hats(catalog).rows
    largest = max(rows, key=rows.get)
    lazy = embed(open_catalog(catalog), DEFAULT_MODEL, use_cpu=True).get_partition(largest.order, largest.pixel)

    def work() -> int:
        with dask.config.set(scheduler="synchronous"):
            return len(lazy.compute())

    return work


MEASUREMENTS = {"plain": plain, "survey": survey, "lsdb_cluster": lsdb_cluster, "lsdb_partition": lsdb_partition}


if __name__ == "__main__":
    with one_line_errors(sys.argv[0]):
        main(sys.argv[1:])

"""Decoding a compressed survey file, side by side with h5py alone reading it, in one run.

    python benchmarks/decode.py                             400 synthetic galaxies, gzip, an image a chunk
    python benchmarks/decode.py Galaxy10_DECals.h5          your file

`h5py` reads every image in slabs and drops it; `ours` is the first opening of the file by main.py: fingerprint of the
file, images, hashes, statistics, and the decoded array written to disk.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import h5py
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from galaxy_mae.errors import one_line_errors
from galaxy_mae.provenance import machine
from galaxy_mae.sources import open_galaxies


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        file = options.file or write_survey(Path(folder))
        alone, ours = [], []
        for repeat in range(options.repeats):
            alone.append(seconds(read, file))
            os.environ["GALAXY_MAE_CACHE"] = str(Path(folder) / str(repeat))
            ours.append(seconds(open_galaxies, str(file)))
    ratio = statistics.median(ours) / statistics.median(alone)
    print(f"{machine()}; {file.name}, {options.repeats} repeats in turn")
    for name, each in (("h5py alone", alone), ("ours", ours)):
        print(f"{name:<10} {statistics.median(each):7.2f} s ({min(each):.2f} to {max(each):.2f})")
    print(f"ours / h5py alone: {ratio:.2f}")


def write_survey(folder: Path, count: int = 400) -> Path:
    """A file of synthetic galaxies in Galaxy10's schema."""
    os.environ["GALAXY_MAE_CACHE"] = str(folder / "drawn")
    galaxies = open_galaxies(f"synthetic:{count}", 256)
    path = folder / "synthetic.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("images", data=galaxies.pixels, chunks=(1, 256, 256, 3), compression="gzip")
        file["ans"] = galaxies.label.astype(np.uint8)
    return path


def read(path: Path, rows: int = 80) -> None:
    """Read every image of a file."""
    with h5py.File(path, "r") as file:
        for start in range(0, len(file["images"]), rows):
            file["images"][start : start + rows]


def seconds(work, *arguments) -> float:
    """How long a call takes."""
    started = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - started


if __name__ == "__main__":
    with one_line_errors(sys.argv[0]):
        main(sys.argv[1:])

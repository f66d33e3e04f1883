"""The time to cache a compressed survey file, compared with only reading it with h5py.

    python benchmarks/ingest.py                             400 synthetic galaxies, gzip, one image per chunk
    python benchmarks/ingest.py Galaxy10_DECals.h5          another file

"h5py only" reads all images in batches and discards them. "caching" is what main.py does when it opens a file for the
first time: it computes the fingerprint of the file, hashes and sums of the images, and writes the pixels to disk.
"""

import argparse
import os
import statistics
import sys
import tempfile
from pathlib import Path

import h5py
import numpy as np
from measurement import timed

from galaxy_mae.data.cache import open_galaxies
from galaxy_mae.errors import one_line_errors
from galaxy_mae.provenance import machine


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", type=Path, help="in Galaxy10's schema; default: a synthetic one")
    parser.add_argument("--repeats", type=int, default=3, help="of each measurement")
    options = parser.parse_args(arguments)
    reading, caching = [], []
    with tempfile.TemporaryDirectory() as folder:
        file = options.file or write_survey(Path(folder))
        for repeat in range(options.repeats):
            reading.append(timed(read, file)[0])
            os.environ["GALAXY_MAE_CACHE"] = str(Path(folder) / str(repeat))
            caching.append(timed(open_galaxies, str(file))[0])
    print(f"{machine()}; {file.name}, {options.repeats} repeats")
    for name, each in (("h5py only", reading), ("caching", caching)):
        print(f"{name:<10} {statistics.median(each):7.2f} s ({min(each):.2f} to {max(each):.2f})")
    print(f"caching / h5py only: {statistics.median(caching) / statistics.median(reading):.2f}")


def write_survey(folder: Path, count: int = 400) -> Path:
    """Write a file of synthetic galaxies in Galaxy10's schema."""
    os.environ["GALAXY_MAE_CACHE"] = str(folder / "synthetic")
    galaxies = open_galaxies(f"synthetic:{count}", 256)
    path = folder / "synthetic.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("images", data=galaxies.pixels, chunks=(1, 256, 256, 3), compression="gzip")
        file["ans"] = galaxies.label.astype(np.uint8)
    return path


def read(path: Path, batch_size: int = 80) -> None:
    """Read every image of a file."""
    with h5py.File(path, "r") as file:
        for start in range(0, len(file["images"]), batch_size):
            file["images"][start : start + batch_size]


if __name__ == "__main__":
    with one_line_errors(sys.argv[0]):
        main(sys.argv[1:])

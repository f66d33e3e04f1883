"""Describe a data set and plot a contact sheet of its classes.

    python -m galaxy_mae.data galaxy10
    python -m galaxy_mae.data my_galaxies.parquet --contact_sheet my_galaxies.png
    python -m galaxy_mae.data galaxy10 --verify

Prints the number of images and classes, duplicates, the split and the channel statistics. A data set that was not used
before is downloaded and cached, so this is also what to run on a login node with internet access.
"""

import argparse
import sys
from collections.abc import Sequence
from itertools import chain, islice
from pathlib import Path

import numpy as np

from galaxy_mae.data.cache import Galaxies, channel_statistics, open_galaxies
from galaxy_mae.data.columns import COLUMNS_HELP
from galaxy_mae.data.fits import MAX_IMAGE_SIZE, STRETCH_HELP, Stretch, UnreadableImage
from galaxy_mae.data.frame import Frame
from galaxy_mae.data.images import decode, decoding
from galaxy_mae.data.kinds import find_source
from galaxy_mae.data.source import Source
from galaxy_mae.data.split import SPLITS, describe_duplicates, split_galaxies
from galaxy_mae.errors import UserError, one_line_errors
from galaxy_mae.files import check_output, user_path


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m galaxy_mae.data", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", help="as --dataset of main.py: a file, a folder, a Hub id, galaxy10, ...")
    parser.add_argument("--image_size", type=int, help="average or enlarge the images to this size")
    parser.add_argument("--split_seed", type=int, default=0)
    parser.add_argument("--contact_sheet", type=user_path, default=Path("contact_sheet.png"), help="the PNG to write")
    parser.add_argument(
        "--verify", action="store_true", help="read all cached pixels and compare their SHA-256; repair what is damaged"
    )
    Frame.add_flags(parser)
    parser.add_argument("--columns", nargs="+", metavar="FIELD=NAME", help=COLUMNS_HELP)
    parser.add_argument("--stretch", default="auto", help=STRETCH_HELP)
    parser.add_argument("--compare", nargs="+", metavar="STRETCH", help="plot the first images by several stretches")
    options = parser.parse_args(arguments)
    if options.image_size is not None and not 1 <= options.image_size <= MAX_IMAGE_SIZE:
        raise UserError(f"--image_size {options.image_size}: it must be between 1 and {MAX_IMAGE_SIZE}")
    if options.split_seed < 0:
        raise UserError(f"--split_seed {options.split_seed}: it must not be negative")
    check_output(options.contact_sheet, "--contact_sheet", (".png",), replace_own=True, inputs=[options.source])
    from galaxy_mae.figures import contact_sheet  # matplotlib is slow to import

    how = {"stretch": Stretch.named(options.stretch), "frame": Frame.chosen(options.fit, options.arcsec) or Frame()}
    how["columns"] = options.columns
    if options.compare:
        compare(find_source(options.source), options.compare, options.contact_sheet)
        return
    galaxies = open_galaxies(options.source, options.image_size, verify=options.verify, **how)
    if options.verify:
        print("the cached pixels are those that were ingested (SHA-256 of all of them)")
    print(describe(galaxies, split_galaxies(galaxies, options.split_seed)))
    contact_sheet(options.contact_sheet, galaxies.pixels, galaxies.label, galaxies.class_names)
    print(f"contact sheet: {options.contact_sheet}")


def compare(source: Source, stretches: Sequence[str], path: Path) -> None:
    """Plot the first images of a source once by each stretch, one line for each, with the same galaxies in a column."""
    from galaxy_mae.figures import ranked_galaxies

    values = list(islice(chain.from_iterable(source.images()), 7))
    try:
        with decoding():
            lines = [[(decode(value, Stretch.named(name)), [name]) for value in values] for name in stretches]
    except UnreadableImage as problem:
        raise UserError(f"{source.where}: one of the first images {problem}") from problem
    ranked_galaxies(path, lines, f"{source.name}, by --stretch {', '.join(stretches)}")
    print(f"contact sheet: {path}")


def describe(galaxies: Galaxies, split: dict[str, np.ndarray]) -> str:
    """Text about a data set: images, classes and split, duplicates, channel statistics."""
    size = galaxies.native_size
    lines = [f"{galaxies.name}: {len(galaxies):,} images of {size} x {size}, SHA-256 {galaxies.fingerprint[:16]}..."]
    counts = {name: len(split[name]) for name in (*SPLITS, "dropped")}
    lines += ["", f"{'class':<28}{'images':>8}" + "".join(f"{name:>12}" for name in counts)]
    for c, class_name in enumerate(galaxies.class_names):
        numbers = "".join(f"{np.sum(galaxies.label[split[name]] == c):>12,}" for name in counts)
        lines.append(f"{c} {class_name:<26}{np.sum(galaxies.label == c):>8,}{numbers}")
    lines.append(f"{'all':<28}{len(galaxies):>8,}" + "".join(f"{n:>12,}" for n in counts.values()))
    lines += ["", *describe_duplicates(galaxies)]
    if counts["train"] == 0:
        return "\n".join([*lines, "no training galaxies: nothing to train on"])
    mean, std = channel_statistics([(galaxies, split["train"])])
    text = ", ".join(f"{name} {m:.4f} +- {s:.4f}" for name, m, s in zip("RGB", mean, std, strict=True))
    lines.append(f"training set, mean and std of each channel (0 to 1): {text}")
    return "\n".join(lines)


if __name__ == "__main__":
    with one_line_errors("galaxy_mae.data"):
        main(sys.argv[1:])

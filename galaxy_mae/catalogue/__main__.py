"""Catalogues of galaxies: predictions and embeddings of a data set.

python -m galaxy_mae.catalogue predict --dataset my_galaxies.parquet --output catalogue.parquet
"""

import argparse
import sys
from pathlib import Path

from galaxy_mae.data.fits import Stretch
from galaxy_mae.errors import one_line_errors


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m galaxy_mae.catalogue",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_predict(commands)
    options = parser.parse_args(arguments)
    options.run(options)


def _add_predict(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "predict",
        help="class probabilities, uncertainties and embeddings of every galaxy of a data set",
        description="Write one row per galaxy. Started again, the same command resumes.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--model",
        default="pretrained/galaxy-zoo-small",
        help="folder of a fine-tuned classifier, of a method with several seeds, of an encoder or of a run of main.py; "
        "or a Hub id (default: %(default)s of the repository)",
    )
    parser.add_argument(
        "--dataset", required=True, help="galaxy10, synthetic[:COUNT], a file, a folder, or a Hub id (docs/data.md)"
    )
    parser.add_argument("--output", required=True, type=Path, help="the file: .parquet, .fits, .csv, .vot or .xml")
    parser.add_argument("--overwrite", action="store_true", help="replace an output that exists")
    parser.add_argument("--embeddings", action="store_true", help="add the model's features as a column of vectors")
    parser.add_argument("--pca", type=int, metavar="N", help="add N principal components of the embeddings")
    parser.add_argument("--labels", metavar="DATASET", help="a labelled data set, to fit an encoder's linear probe")
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16: faster on some devices, less exact")
    parser.add_argument("--use_cpu", action="store_true", help="do not use a GPU")
    Stretch.add_flags(parser)
    parser.set_defaults(run=_predict)


def _predict(options: argparse.Namespace) -> None:
    from galaxy_mae.catalogue.predict import run  # slow to import, like torch

    run(options)


if __name__ == "__main__":
    with one_line_errors("galaxy_mae.catalogue"):
        main(sys.argv[1:])

"""Catalogues of galaxies: predictions and embeddings of a data set.

python -m galaxy_mae.catalogue predict --dataset my_galaxies.parquet --output catalogue.parquet --embeddings
python -m galaxy_mae.catalogue similar catalogue.parquet --query 587722981742084144
python -m galaxy_mae.catalogue odd catalogue.parquet
python -m galaxy_mae.catalogue page catalogue.parquet
python -m galaxy_mae.catalogue survey --model MODEL --catalog HATS_FOLDER --output survey/
python -m galaxy_mae.catalogue index --catalog survey/ --output survey.index
python -m galaxy_mae.catalogue nearest --index survey.index --catalog survey/ --query 587722981742084144
"""

import argparse
import os
import pkgutil
import sys
from functools import partial
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
    commands = parser.add_subparsers(
        required=True, metavar="COMMAND", parser_class=partial(argparse.ArgumentParser, allow_abbrev=False)
    )
    for add in (_add_predict, _add_similar, _add_odd, _add_page, _add_survey, _add_index, _add_nearest):
        add(commands)
    options = parser.parse_args(arguments)
    try:
        # Imported here, because torch is slow to import.
        pkgutil.resolve_name(options.run)(options)
        sys.stdout.flush()
    except BrokenPipeError:  # as of `| head`: Python would report it again when it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _add_predict(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "predict",
        help="class probabilities, uncertainties and embeddings of every galaxy of a data set",
        description="Write one row per galaxy. Started again, the same command resumes.",
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
    _add_table(parser, "the file", required=True)
    parser.add_argument("--embeddings", action="store_true", help="add the model's features as a column of vectors")
    parser.add_argument("--pca", type=int, metavar="N", help="add N principal components of the embeddings")
    parser.add_argument("--labels", metavar="DATASET", help="a labelled data set, to fit an encoder's linear probe")
    _add_computation(parser)
    parser.set_defaults(run="galaxy_mae.catalogue.predict:run")


def _add_similar(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "similar",
        help="the galaxies that are most similar to one of a catalogue, or to an image",
        description="Rank the galaxies of a catalogue by the cosine similarity of their standardized embeddings.",
    )
    _add_ranking(parser, 20, "similar.png")
    parser.add_argument(
        "--query",
        required=True,
        nargs="+",
        help="a galaxy of the catalogue (its object_id, or row:N) or the path of an image; each gets its own ranking",
    )
    parser.add_argument("--model", help="for an image: where the catalogue's model is now (default: where it was)")
    parser.set_defaults(run="galaxy_mae.catalogue.similarity:similar")


def _add_odd(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "odd",
        help="the galaxies of a catalogue that are least like the others",
        description="Rank the galaxies of a catalogue by how odd their whitened embeddings are.",
    )
    _add_ranking(parser, 50, "odd.png")
    parser.add_argument(
        "--rank_by", choices=("knn_distance", "isolation_forest"), default="knn_distance", help="default: %(default)s"
    )
    parser.set_defaults(run="galaxy_mae.catalogue.similarity:odd")


def _add_ranking(parser: argparse.ArgumentParser, k: int, sheet: str) -> None:
    parser.add_argument("catalogue", type=Path, help="a catalogue that predict wrote with --embeddings")
    parser.add_argument("-k", type=int, default=k, help="how many galaxies (default: %(default)s)")
    _add_table(parser, "write the ranking")
    parser.add_argument(
        "--sheet", type=Path, help=f"the PNG of the contact sheet (default: {sheet}, replaced if it exists)"
    )
    parser.add_argument("--dataset", help="where the catalogue's images are now (default: where they were)")


def _add_computation(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--orientations",
        action="store_true",
        help="features of an encoder: mean and std over sixteen orientations of each image, at sixteen times the cost",
    )
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16: faster on some devices, less exact")
    parser.add_argument("--use_cpu", action="store_true", help="do not use a GPU")
    Stretch.add_flags(parser)


def _add_table(parser: argparse.ArgumentParser, what: str, required: bool = False) -> None:
    text = f"{what}: .parquet, .fits, .csv, .vot or .xml"
    parser.add_argument("--output", required=required, type=Path, help=text)
    parser.add_argument("--overwrite", action="store_true", help="replace an output that exists")


def _add_survey(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "survey",
        help="class probabilities and embeddings of a HATS catalogue, partition by partition (docs/survey.md)",
        description="Write a HATS catalogue with one row per galaxy. Several tasks share the partitions; the task is "
        "that of --task and --tasks, or of Slurm's array. Started again, the same command computes what is missing.",
    )
    parser.add_argument("--model", help="as for predict; not needed with --finish")
    parser.add_argument("--catalog", required=True, help="folder of a HATS catalogue or collection with images")
    parser.add_argument("--output", required=True, type=Path, help="folder of the HATS catalogue that is written")
    parser.add_argument("--task", type=int, metavar="I", help="compute the part I of N of the partitions, from 0")
    parser.add_argument("--tasks", type=int, metavar="N", help="number of tasks; without it, one does all and finishes")
    parser.add_argument("--finish", action="store_true", help="only check that all is there and write the metadata")
    parser.add_argument("--image_column", metavar="NAME", help="default: the first one that holds images")
    parser.add_argument(
        "--bands",
        nargs=3,
        default=("g", "r", "z"),
        help="bands of multi-band fluxes that become blue, green and red (default: g r z)",
    )
    parser.add_argument("--float16", action="store_true", help="write embeddings of 16 bits: half the size, less exact")
    _add_computation(parser)
    parser.set_defaults(run="galaxy_mae.survey.command:run")


def _add_index(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "index",
        help="an index of a survey's embeddings, by faiss",
        description="Build an index of the embeddings that survey wrote, partition by partition.",
    )
    parser.add_argument("--catalog", required=True, help="folder of a complete output of survey")
    parser.add_argument("--output", required=True, type=Path, help="folder of the index")
    parser.add_argument("--overwrite", action="store_true", help="replace an index that exists")
    parser.set_defaults(run="galaxy_mae.survey.index:run_index")


def _add_nearest(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "nearest",
        help="the galaxies of a survey that are most similar to one, by its index",
        description="Rank galaxies by the cosine similarity of their standardized embeddings.",
    )
    parser.add_argument("--index", required=True, type=Path, help="folder that the command index wrote")
    parser.add_argument("--catalog", required=True, help="folder of the output of survey that it was built from")
    parser.add_argument("--query", required=True, help="object_id of a galaxy of the catalogue")
    parser.add_argument("-k", type=int, default=20, help="how many galaxies (default: %(default)s)")
    _add_table(parser, "write the ranking")
    parser.set_defaults(run="galaxy_mae.survey.index:run_nearest")


def _add_page(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "page",
        help="one HTML file that shows a catalogue: map, classes, uncertain and odd galaxies",
        description="Write an HTML page of a catalogue. It opens from disk and loads nothing from elsewhere.",
    )
    parser.add_argument("catalogue", type=Path, help="a catalogue that predict wrote; with --embeddings it gets a map")
    parser.add_argument(
        "--output", type=Path, help="the .html file (default: beside the catalogue, replaced if it exists)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an --output that exists")
    parser.add_argument("--dataset", help="where the catalogue's images are now (default: where they were)")
    parser.set_defaults(run="galaxy_mae.reports.page:page")


if __name__ == "__main__":
    with one_line_errors("galaxy_mae.catalogue"):
        main(sys.argv[1:])

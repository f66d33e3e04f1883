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
import pkgutil
import sys
from functools import partial

from galaxy_mae.data.columns import COLUMNS_HELP
from galaxy_mae.data.fits import STRETCH_HELP
from galaxy_mae.data.frame import Frame
from galaxy_mae.errors import one_line_errors
from galaxy_mae.files import user_path
from galaxy_mae.progress import stage


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
    with stage(options.command):
        pkgutil.resolve_name(options.run)(options)  # imported here, because torch is slow to import


def _add(commands: argparse._SubParsersAction, name: str, run: str, text: str) -> argparse.ArgumentParser:
    """Add a command that a function of this package runs; the text is its help."""
    parser = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    parser.set_defaults(run=f"galaxy_mae.{run}", command=name)
    return parser


def _add_predict(commands: argparse._SubParsersAction) -> None:
    text = "class probabilities and embeddings of every galaxy of a data set; started again, the same command resumes"
    parser = _add(commands, "predict", "catalogue.predict:run", text)
    parser.add_argument(
        "--model",
        default="pretrained/galaxy-zoo-small",
        help="folder of a fine-tuned classifier, of a method with several seeds, of an encoder or of a run of main.py; "
        "or a Hub id (default: %(default)s, which comes with this package)",
    )
    parser.add_argument(
        "--dataset", required=True, help="galaxy10, synthetic[:COUNT], a file, a folder, or a Hub id (docs/data.md)"
    )
    parser.add_argument("--columns", nargs="+", metavar="FIELD=NAME", help=COLUMNS_HELP)
    _add_table(parser, "the file", required=True)
    parser.add_argument("--embeddings", action="store_true", help="add the model's features as a column of vectors")
    parser.add_argument("--pca", type=int, metavar="N", help="add N principal components of the embeddings")
    parser.add_argument("--labels", metavar="DATASET", help="a labelled data set, to fit an encoder's linear probe")
    _add_computation(parser)


def _add_similar(commands: argparse._SubParsersAction) -> None:
    text = "the galaxies of a catalogue that are most similar to one of them, or to an image, by their embeddings"
    parser = _add_ranking(commands, "similar", 20, text)
    parser.add_argument(
        "--query",
        required=True,
        nargs="+",
        help="a galaxy of the catalogue (its object_id, its file's name, row:N, or RA,DEC in degrees, within 5 arcsec) "
        "or the path of an image; each gets its own ranking",
    )
    parser.add_argument("--model", help="for an image: where the catalogue's model is now (default: where it was)")


def _add_odd(commands: argparse._SubParsersAction) -> None:
    text = "the galaxies of a catalogue that are least like the others, by their whitened embeddings"
    _add_ranking(commands, "odd", 50, text).add_argument(
        "--rank_by", choices=("knn_distance", "isolation_forest"), default="knn_distance", help="default: %(default)s"
    )


def _add_ranking(commands: argparse._SubParsersAction, name: str, k: int, text: str) -> argparse.ArgumentParser:
    parser = _add(commands, name, f"catalogue.similarity:{name}", text)
    parser.add_argument("catalogue", type=user_path, help="a catalogue that predict wrote with --embeddings")
    parser.add_argument("-k", type=int, default=k, help="how many galaxies (default: %(default)s)")
    _add_table(parser, "write the ranking")
    parser.add_argument(
        "--sheet", type=user_path, help=f"the PNG of the contact sheet (default: {name}.png, replaced if it exists)"
    )
    parser.add_argument("--dataset", help="where the catalogue's images are now (default: where they were)")
    return parser


def _add_page(commands: argparse._SubParsersAction) -> None:
    text = "one HTML file that shows a catalogue: map, classes, uncertain and odd galaxies; it opens from disk"
    parser = _add(commands, "page", "reports.page:page", text)
    parser.add_argument("catalogue", type=user_path, help="a catalogue of predict; with --embeddings it gets a map")
    parser.add_argument(
        "--output", type=user_path, help="the .html file (default: beside the catalogue, replaced if it exists)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an --output that exists")
    parser.add_argument("--dataset", help="where the catalogue's images are now (default: where they were)")


def _add_survey(commands: argparse._SubParsersAction) -> None:
    text = "class probabilities and embeddings of a HATS catalogue, partition by partition; several tasks share them "
    text += "(docs/survey.md); started again, the same command computes what is missing"
    parser = _add(commands, "survey", "survey.command:run", text)
    parser.add_argument("--model", help="as for predict; not needed with --finish")
    parser.add_argument("--catalog", required=True, help="folder of a HATS catalogue or collection with images")
    parser.add_argument("--output", required=True, type=user_path, help="folder of the HATS catalogue that is written")
    parser.add_argument("--task", type=int, metavar="I", help="compute the part I of N, from 0 (default: Slurm's)")
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


def _add_index(commands: argparse._SubParsersAction) -> None:
    parser = _add(commands, "index", "survey.index:run_index", "an index of the embeddings that survey wrote, by faiss")
    parser.add_argument("--catalog", required=True, help="folder of a complete output of survey")
    parser.add_argument("--output", required=True, type=user_path, help="folder of the index")
    parser.add_argument("--overwrite", action="store_true", help="replace an index that exists")


def _add_nearest(commands: argparse._SubParsersAction) -> None:
    text = "the galaxies of a survey that are most similar to one, by its index"
    parser = _add(commands, "nearest", "survey.index:run_nearest", text)
    parser.add_argument("--index", required=True, type=user_path, help="folder that the command index wrote")
    parser.add_argument("--catalog", required=True, help="folder of the output of survey that it was built from")
    parser.add_argument("--query", required=True, help="object_id of a galaxy of the catalogue")
    parser.add_argument("-k", type=int, default=20, help="how many galaxies (default: %(default)s)")
    _add_table(parser, "write the ranking")


def _add_computation(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--orientations",
        action="store_true",
        help="features of an encoder: mean and std over sixteen orientations of each image, at sixteen times the cost",
    )
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16: faster on some devices, less exact")
    parser.add_argument("--use_cpu", action="store_true", help="do not use a GPU")
    Frame.add_flags(parser)
    parser.add_argument("--stretch", default="auto", help=STRETCH_HELP)


def _add_table(parser: argparse.ArgumentParser, what: str, required: bool = False) -> None:
    text = f"{what}: .parquet, .fits, .csv, .vot or .xml"
    parser.add_argument("--output", required=required, type=user_path, help=text)
    parser.add_argument("--overwrite", action="store_true", help="replace an output that exists")


if __name__ == "__main__":
    with one_line_errors("galaxy_mae.catalogue"):
        main(sys.argv[1:])

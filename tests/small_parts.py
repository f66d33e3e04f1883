"""`catalogue predict` with parts of four rows and a fixed date, for processes that are killed."""

from galaxy_mae import provenance
from galaxy_mae.catalogue import predict
from galaxy_mae.catalogue.__main__ import main


def run(arguments: list[str]) -> None:
    """The command with these arguments."""
    predict.ROWS_PER_PART = 4
    session = provenance.session() | {"started": "2026-11-25T09:00:00+00:00"}
    provenance.session = lambda: session
    main(["predict", *arguments])

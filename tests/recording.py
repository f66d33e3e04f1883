"""main.py, writing down which rows each process is given: RECORD.RANK holds a line of row numbers a batch."""

import os
import sys
from pathlib import Path

import main
from galaxy_mae.batches import GalaxyBatches

collate = GalaxyBatches.collate


def recorded(self: GalaxyBatches, rows: list[int]) -> dict:
    """As `collate`."""
    with Path(f"{os.environ['RECORD']}.{os.environ.get('RANK', '0')}").open("a") as file:
        print(*rows, file=file)
    return collate(self, rows)


if __name__ == "__main__":
    GalaxyBatches.collate = recorded
    main.main(sys.argv[1:])

"""main.py, recording the samples of each process: RECORD.RANK holds one line of sample indices per batch."""

import os
import sys
from pathlib import Path

import main
from galaxy_mae.data.batches import GalaxyBatches

collate = GalaxyBatches.collate


def recorded(self: GalaxyBatches, indices: list[int]) -> dict:
    """As `collate`."""
    with Path(f"{os.environ['RECORD']}.{os.environ.get('RANK', '0')}").open("a") as file:
        print(*indices, file=file)
    return collate(self, indices)


if __name__ == "__main__":
    GalaxyBatches.collate = recorded
    main.main(sys.argv[1:])

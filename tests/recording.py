"""main.py, recording the samples of each process: RECORD.RANK holds one line of sample indices per batch.

RECORD.RANK.threads holds the names of the threads that main.py leaves behind, in Linux.
"""

import os
import sys
from pathlib import Path

import main
from galaxy_mae.data.batches import GalaxyBatches

RECORD = Path(f"{os.environ['RECORD']}.{os.environ.get('RANK', '0')}")
collate = GalaxyBatches.collate


def recorded(self: GalaxyBatches, indices: list[int]) -> dict:
    """As `collate`."""
    with RECORD.open("a") as file:
        print(*indices, file=file)
    return collate(self, indices)


if __name__ == "__main__":
    GalaxyBatches.collate = recorded
    main.main(sys.argv[1:])
    threads = [name.read_text() for name in Path("/proc/self/task").glob("*/comm")]
    RECORD.with_name(f"{RECORD.name}.threads").write_text("".join(threads))

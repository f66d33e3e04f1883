"""Throughput and memory of pre-training from Parquet shards, compared with the cached images of the same galaxies.

    python benchmarks/stream.py --config recipes/demo.yaml

Writes two folders with the same synthetic galaxies (PNG, at --image_size): in shards of 250 and of 8,000. Each
measurement is a process of its own. "reading" iterates the Trainer's loader without training, after a warm-up;
"training" takes main.py's steps. "memory" is how far the peak of the resident memory while reading is above that before
the first batch. The loader of cached images carries their indices alone, so its rate of reading says nothing.
"""

import io
import json
import os
import statistics
import sys
import tempfile
from collections import deque
from itertools import islice
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from measurement import (
    WARM_UP,
    Timer,
    header,
    measurement_parser,
    median_and_range,
    precision,
    print_table,
    read_benchmark_recipe,
    run_measurement,
    timed,
)
from PIL import Image

from galaxy_mae.data.cache import open_galaxies
from galaxy_mae.data.pretraining import open_pretraining_data
from galaxy_mae.errors import one_line_errors
from galaxy_mae.training.pretraining import PretrainingTrainer, build_trainer
from galaxy_mae.training.recipe import Recipe, global_batch_size

COUNT = 32_000
SHARD_ROWS = (250, 8_000)
NUM_IMAGES = 2_000  # that are rendered, and then written again under other names and positions


def main(arguments: list[str]) -> None:
    parser = measurement_parser(__doc__, steps=120)
    parser.add_argument("--repeats", type=int, default=3, help="of each measurement")
    options, flags = parser.parse_known_args(arguments)
    recipe = read_benchmark_recipe(flags, WARM_UP + options.steps)
    if options.measure:
        print(json.dumps(measure(recipe, options.steps, **json.loads(options.measure))))
        return
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"GALAXY_MAE_CACHE": f"{folder}/cache", "HF_DATASETS_CACHE": f"{folder}/datasets"}
        write_shards(Path(folder), recipe.galaxies.image_size)
        paths = {"cached": (SHARD_ROWS[0], False)} | {f"shards of {rows:,}": (rows, True) for rows in SHARD_ROWS}
        measured = {name: [] for name in paths}
        for repeat in range(options.repeats):
            for name, (rows, stream) in paths.items():
                what = json.dumps({"dataset": f"{folder}/{rows}", "stream": stream})
                measured[name].append(run_measurement(__file__, what, repeat, options, flags))
    print(f"{header(recipe)}, batch size {global_batch_size(recipe.training)}, {precision(recipe.training.bf16)}")
    rows = []
    for name, results in measured.items():
        rates = {what: [result[what] for result in results] for what in ("reading", "training", "memory")}
        cached = statistics.median(result["training"] for result in measured["cached"])
        ratio = f"{statistics.median(rates['training']) / cached:.2f}"
        rows.append((name, *(median_and_range(rates[what]) for what in ("reading", "training")), ratio))
        rows[-1] += (f"{statistics.median(rates['memory']):,.0f}",)
    print_table(("images", "reading, images/s", "training, images/s", "training / cached", "memory, MB"), rows)


def write_shards(folder: Path, image_size: int) -> None:
    """Write `COUNT` galaxies, spread over the sky, in shards of each of `SHARD_ROWS`."""
    images = []
    for pixels in open_galaxies(f"synthetic:{NUM_IMAGES}", image_size).pixels:
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        images.append(file.getvalue())
    rng = np.random.default_rng(0)
    ra, dec = np.sort(rng.uniform(0, 360, COUNT)), np.degrees(np.arcsin(rng.uniform(-1, 1, COUNT)))
    for rows in SHARD_ROWS:
        (folder / str(rows)).mkdir()
        for start in range(0, COUNT, rows):
            part = range(start, start + rows)
            columns = {"image": [images[i % NUM_IMAGES] for i in part], "object_id": [f"galaxy {i}" for i in part]}
            table = pa.table(columns | {"ra": ra[start : start + rows], "dec": dec[start : start + rows]})
            # Without a dictionary, which would hold each image once.
            pq.write_table(table, folder / str(rows) / f"{start:06}.parquet", use_dictionary=False)


def measure(recipe: Recipe, steps: int, dataset: str, stream: bool) -> dict[str, float]:
    """Images/s of the loader and of the training, and the peak memory of the loader in MB."""
    recipe.galaxies.dataset = dataset
    images, process = steps * global_batch_size(recipe.training), psutil.Process()
    trainer = build(recipe, stream)
    before = process.memory_info().rss
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    batches = iter(trainer.get_train_dataloader())
    deque(islice(batches, WARM_UP), maxlen=0)
    seconds, _ = timed(lambda: deque(islice(batches, steps), maxlen=0))
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    peak = int(status["VmHWM"].split()[0]) * 1024
    timer = Timer()
    trainer = build(recipe, stream)
    trainer.add_callback(timer)
    trainer.train()
    return {"reading": images / seconds, "training": images / timer.seconds, "memory": (peak - before) / 1e6}


def build(recipe: Recipe, stream: bool) -> PretrainingTrainer:
    """main.py's Trainer."""
    options = recipe.galaxies
    return build_trainer(
        recipe, open_pretraining_data(options.dataset, options.image_size, stream=stream), {"id": "benchmark"}, False
    )


if __name__ == "__main__":
    with one_line_errors(sys.argv[0]):
        main(sys.argv[1:])

"""Pre-training from shards: which galaxies an epoch has and in which order, the split by cells, exact resuming."""

import io
import itertools
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from pandas.util import hash_array
from PIL import Image
from safetensors.torch import load_file
from shards import galaxies_on_the_sky, write_hats
from test_trainer import TINY
from torch.utils.data import BatchSampler

import main
from galaxy_mae.data.frame import Frame
from galaxy_mae.data.hats import Partition
from galaxy_mae.data.pretraining import is_too_large, open_pretraining_data
from galaxy_mae.data.random_numbers import mask_noise
from galaxy_mae.data.seen import find_seen_galaxies
from galaxy_mae.data.stream import CELL_ORDER, GalaxyStream, StreamDataset, find_shards, open_stream
from galaxy_mae.errors import UserError
from galaxy_mae.provenance import read_pretraining
from galaxy_mae.training.pretraining import PretrainingTrainer

BATCH, BUFFER = 24, 96


@pytest.fixture(scope="module")
def table() -> pa.Table:
    return galaxies_on_the_sky()


@pytest.fixture(scope="module")
def hats(tmp_path_factory, table) -> Path:
    """600 galaxies in about 120 partitions; a row group is smaller than a partition."""
    return write_hats(tmp_path_factory.mktemp("hats"), table, order=2)


@pytest.fixture(scope="module")
def stream(hats) -> GalaxyStream:
    return open_stream(str(hats), 32)


def keys_of(table: pa.Table) -> np.ndarray:
    return hash_array(table["object_id"].to_numpy().astype(object), categorize=False).view(np.int64)


def split_of(source: Path) -> dict[int, int]:
    """The split of each galaxy, by its key."""
    shards = find_shards(str(source))
    rows = [shards.read(shard, []) for shard in range(len(shards.source.shards))]
    return {int(k): int(p) for batches in rows for _, key, part in batches for k, p in zip(key, part, strict=True)}


# ----------------------------------------------------------------------------------------------------------- the order


def read_epochs(stream: GalaxyStream, seed: int, buffer: int = BUFFER) -> list[list[tuple[int, np.ndarray]]]:
    dataset = StreamDataset(stream, buffer)
    sampler, epochs = dataset.sampler(BATCH, seed), []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        epochs.append([])
        for places in BatchSampler(sampler, BATCH, drop_last=True):
            epochs[epoch] += dataset.__getitems__(places)
            assert sum(len(rows) for _, rows in dataset._windows.values()) <= buffer
    return epochs


def test_an_epoch_has_every_training_galaxy_once_in_another_order(table, stream):
    """Apart from the last incomplete batch. Each image is that of its galaxy."""
    train = {key for key, part in split_of(Path(stream.shards.source.name)).items() if part == 0}
    assert len(train) == len(stream.train_dataset()) > 480
    images = dict(zip(keys_of(table), table["rgb_image"].to_pylist(), strict=True))
    orders = []
    for items in read_epochs(stream, seed=3):
        order = [key for key, _ in items]
        assert len(set(order)) == len(order) == len(train) // BATCH * BATCH
        assert set(order) <= train
        for key, image in items[::25]:
            assert np.array_equal(image, np.asarray(Image.open(io.BytesIO(images[key]["bytes"]))))
        orders.append(order)
    orders.append([key for key, _ in read_epochs(stream, seed=4)[0]])
    original = {key: place for place, key in enumerate(keys_of(table).tolist())}
    for order in orders:  # neither the order of the shards, nor that of another epoch or seed
        assert abs(np.corrcoef([original[key] for key in order], range(len(order)))[0, 1]) < 0.2
    for one, other in ((0, 1), (0, 2)):
        shared = [(orders[one].index(key), orders[other].index(key)) for key in orders[one] if key in orders[other]]
        assert abs(np.corrcoef(np.transpose(shared))[0, 1]) < 0.2


def test_a_batch_mixes_many_shards(stream):
    """Although a window holds but four galaxies of a lane, and a shard five."""
    (items, _) = read_epochs(stream, seed=0)
    shards = {}
    for shard in range(len(stream.counts)):
        shards |= {key: shard for keys, _ in stream.shards.training_images(shard) for key in keys.tolist()}
    batches = [[shards[key] for key, _ in items[i : i + BATCH]] for i in range(0, len(items), BATCH)]
    assert np.mean([len(set(batch)) for batch in batches]) > 0.8 * BATCH


def test_two_processes_share_the_batches_of_one(stream):
    """Of accelerate's shards of the sampler: no galaxy twice, the same global batches, and different parts read."""
    one = [key for key, _ in read_epochs(stream, seed=3)[1]]
    ranks = []
    for rank in range(2):
        dataset = StreamDataset(stream, BUFFER)
        sampler = dataset.sampler(BATCH, seed=3)
        sampler.set_epoch(1)
        batches = BatchSamplerShard(BatchSampler(sampler, BATCH // 2, drop_last=False), 2, rank)
        ranks.append(([[key for key, _ in dataset.__getitems__(places)] for places in batches], set(dataset._windows)))
    (first, first_lanes), (second, second_lanes) = ranks
    assert len(first) == len(second) == len(one) // BATCH
    assert [key for pair in zip(first, second, strict=True) for part in pair for key in part] == one
    assert not first_lanes & second_lanes


@pytest.mark.parametrize("start", [7, 200, 337])
def test_reading_can_start_anywhere(stream, start):
    """As in a resumed run, which skips places of the sampler and reads none of their galaxies."""
    expected = read_epochs(stream, seed=3)[1][start:]
    dataset = StreamDataset(stream, BUFFER)
    sampler = dataset.sampler(BATCH, seed=3)
    sampler.set_epoch(1)
    items = dataset.__getitems__(list(sampler)[start:])
    assert [key for key, _ in items] == [key for key, _ in expected]
    assert all(np.array_equal(a[1], b[1]) for a, b in zip(items, expected, strict=True))


# ----------------------------------------------------------------------------------------------------------- the split


def test_cells_of_the_sky_are_held_out_whatever_the_shards(tmp_path, table, hats, monkeypatch):
    """The split is the same with partitions larger and smaller than a cell, and in files with ra and dec alone."""
    expected = split_of(hats)
    cell = table["_healpix_29"].to_numpy() >> 2 * (29 - CELL_ORDER)
    parts = np.array([expected[key] for key in keys_of(table)])
    assert all(len(set(parts[cell == number])) == 1 for number in np.unique(cell))
    assert np.bincount(parts)[1:].sum() / len(parts) == pytest.approx(0.1, abs=0.04)
    assert set(parts) == {0, 1, 2}
    fine = write_hats(tmp_path / "fine", table, order=6)
    assert split_of(fine) == expected
    (tmp_path / "plain").mkdir()
    for i in range(3):
        rows = table.drop_columns("_healpix_29").slice(200 * i, 200)
        pq.write_table(rows, tmp_path / "plain" / f"{i}.parquet")
    assert split_of(tmp_path / "plain") == expected
    pq.write_table(table.drop_columns(["_healpix_29", "ra", "dec"]), tmp_path / "no_positions.parquet")
    by_name = list(split_of(tmp_path / "no_positions.parquet").values())
    assert 0 < np.mean(np.array(by_name) > 0) < 0.2
    shards = find_shards(str(fine))
    monkeypatch.setattr(Partition, "read", None)  # only the footers of partitions within a cell are read
    assert np.array_equal(sum(map(shards.count, range(len(shards.source.shards)))), np.bincount(parts))


def test_own_test_files_are_held_out_and_names_replaced(tmp_path, table):
    """Files that are called test are test galaxies. Galaxies without a name are told apart by their row."""
    rows = table.drop_columns(["_healpix_29", "object_id"])
    for name, part in (("train-0", rows.slice(0, 300)), ("train-1", rows.slice(300, 200)), ("test-0", rows.slice(500))):
        pq.write_table(part, tmp_path / f"{name}.parquet")
    shards = find_shards(str(tmp_path))
    counts = {shards.source.shards[i].location: shards.count(i) for i in range(3)}
    assert counts["test-0.parquet"].tolist() == [0, 0, 100]
    assert len(split_of(tmp_path)) == 600


def test_the_sample_is_of_each_split(table, stream):
    """It has at most 2,000 galaxies of each, here all, with their classes; a change of a file makes another one."""
    assert {name: len(rows) for name, rows in stream.split.items()} == dict(
        zip(("train", "validation", "test", "dropped"), [*stream.counts.sum(axis=0), 0], strict=True)
    )
    expected = split_of(Path(stream.shards.source.name))
    label = dict(zip(table["object_id"].to_pylist(), table["gz10_label"].to_pylist(), strict=True))
    for part, name in enumerate(("train", "validation", "test")):
        names = stream.galaxies.object_id[stream.split[name]]
        assert {expected[key] for key in hash_array(names, categorize=False).view(np.int64).tolist()} == {part}
    assert stream.galaxies.label.tolist() == [label[name] for name in stream.galaxies.object_id]


# -------------------------------------------------------------------------------------------------------- the training


class Killed(BaseException):
    pass


@pytest.fixture(scope="module")
def runs(tmp_path_factory, hats) -> SimpleNamespace:
    """A run of two epochs and a half, and one that was killed in the second and resumed with a worker process."""
    folder, patch = tmp_path_factory.mktemp("runs"), pytest.MonkeyPatch()
    prepare, step = PretrainingTrainer.prepare_batch, PretrainingTrainer.training_step
    noise = {}

    def recorded(self, batch, training):
        prepared = prepare(self, batch, training)
        if training:
            noise[self.state.global_step] = batch["index"], prepared["noise"], self.state.epoch
        return prepared

    def killed(self, *args, **kwargs):
        if self.state.global_step == 45:
            raise Killed
        return step(self, *args, **kwargs)

    flags = [*TINY, "--max_steps", "85", "--save_steps", "19", "--eval_steps", "40", "--probe_every", "0"]
    flags += ["--dataset", str(hats), "--stream_buffer", "64", "--output_dir"]
    patch.setattr(PretrainingTrainer, "prepare_batch", recorded)
    main.main([*flags, str(folder / "uninterrupted"), "--stream", "True"])
    patch.undo()
    patch.setattr(PretrainingTrainer, "training_step", killed)
    with pytest.raises(Killed):
        main.main([*flags, str(folder / "killed"), "--stream", "True"])
    patch.undo()
    main.main([*flags, str(folder / "killed"), "--dataloader_num_workers", "1"])  # it is still streamed
    return SimpleNamespace(folder=folder, flags=flags, noise=noise)


@pytest.mark.slow
def test_a_killed_run_ends_with_the_bits_of_an_uninterrupted_one(runs):
    weights = [load_file(runs.folder / name / "model.safetensors") for name in ("uninterrupted", "killed")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    with pytest.raises(UserError, match="stream is True there and False here"):
        main.main([*runs.flags, str(runs.folder / "killed"), "--stream", "False"])


@pytest.mark.slow
def test_masks_depend_on_seed_epoch_and_galaxy(runs, stream):
    per_epoch = len(stream.train_dataset()) // 16
    for step in (0, per_epoch - 1, per_epoch, 2 * per_epoch + 3):
        index, noise, _ = runs.noise[step]
        assert torch.equal(noise, mask_noise(index, seed=0, step=step // per_epoch, num_patches=noise.shape[1]))
    seen = torch.cat([runs.noise[step][0] for step in range(per_epoch)])
    assert len(seen.unique()) == len(seen) == per_epoch * 16


@pytest.mark.slow
def test_the_encoder_knows_its_training_galaxies(runs, stream):
    """By their positions: of the streamed catalogue's galaxies, those that were not trained on are not seen."""
    catalogue = read_pretraining(str(runs.folder / "killed" / "encoder")).galaxies
    parts = np.array(catalogue["split"].to_pylist())
    assert (parts == "train").sum() == len(stream.train_dataset())
    assert (parts == "validation").sum() == len(stream.split["validation"])
    for name, seen in (("train", True), ("validation", True), ("test", False)):
        assert np.all(find_seen_galaxies(stream.galaxies, stream.split[name], catalogue)["seen"] == seen)


# ------------------------------------------------------------------------------------------------------- what can fail


def test_unreadable_images_are_blank_and_named_once(tmp_path, table, caplog):
    images = table["rgb_image"].to_pylist()
    for row in range(0, 600, 2):
        images[row] = {"bytes": b"no image", "path": None}
    images[1] = {"bytes": None, "path": None}
    column = table.column_names.index("rgb_image")
    write_hats(tmp_path / "hats", table.set_column(column, "rgb_image", pa.array(images)), order=1)
    stream = open_stream(str(tmp_path / "hats"), 16)
    assert len(stream.split["dropped"]) == 301
    dataset = StreamDataset(stream)
    sampler = dataset.sampler(BATCH, seed=0)
    blank = sum(not image.any() for _, image in dataset.__getitems__(list(sampler)))
    assert 0.4 < blank / len(sampler) < 0.6
    assert [message for message in caplog.messages if "such images are blank in training" in message] == [
        f"{tmp_path}/hats: an image cannot be decoded (unknown format); it must be a complete PNG, JPEG, WEBP, TIFF, "
        "GIF, BMP or FITS image; such images are blank in training"
    ]


@pytest.mark.parametrize("change", ["shorter", "reversed", "reversed while it is read", "gone"])
def test_a_shard_that_changes_during_the_training_ends_it(tmp_path, table, change):
    """Also if it has as many rows and an equal footer, as without compression. A window is smaller than a shard."""
    plain = {"compression": "none", "use_dictionary": False}
    write_hats(tmp_path / "hats", table, order=0)
    files = list((tmp_path / "hats").rglob("Npix*.parquet"))
    for file in files:
        pq.write_table(pq.read_table(file, partitioning=None), file, **plain)
    dataset = StreamDataset(open_stream(str(tmp_path / "hats"), 32), BUFFER)
    sampler = dataset.sampler(BATCH, seed=0)
    items = iter(sampler)
    if change == "reversed while it is read":
        dataset.__getitems__(list(itertools.islice(items, BATCH)))
    for file in files:
        rows = pq.read_table(file, partitioning=None)
        reverse = np.arange(len(rows))[::-1]
        pq.write_table(rows.slice(1) if change == "shorter" else rows.take(reverse), file, **plain)
        if change == "gone":
            file.unlink()
    with pytest.raises(UserError, match=r"Npix=\d+.parquet was changed during the training"):
        dataset.__getitems__(list(items))


def test_what_cannot_be_streamed_is_one_line(tmp_path, hats, small_hdf5, table):
    pq.write_table(table.drop_columns("rgb_image"), tmp_path / "catalogue.parquet")
    for name in ("mixed", "truncated"):
        (tmp_path / name).mkdir()
        pq.write_table(table, tmp_path / name / "0.parquet")
    pq.write_table(table.drop_columns("ra"), tmp_path / "mixed" / "1.parquet")
    content = (tmp_path / "mixed" / "0.parquet").read_bytes()
    (tmp_path / "truncated" / "1.parquet").write_bytes(content[: len(content) // 2])
    next(write_hats(tmp_path / "missing", table, order=2).rglob("Npix*.parquet")).unlink()
    run = ["--output_dir", str(tmp_path / "run"), "--stream", "True"]
    for dataset, flags, message in (
        (small_hdf5, [], "--stream True: --dataset .* is no HATS catalogue and not Parquet"),
        (tmp_path / "catalogue.parquet", [], "no column of images"),
        (tmp_path / "mixed", [], r"1.parquet: has no column `ra` of type double, as the first file"),
        (tmp_path / "truncated", [], r"1.parquet: cannot be read as Parquet"),
        (tmp_path / "missing", [], r"Npix=\d+.parquet: there is no such file"),
        (hats, ["--dataloader_num_workers", "2"], "--dataloader_num_workers: a process reads its part of a stream"),
        (hats, ["--stream_buffer", "0"], "--stream_buffer 0: it must be above 0"),
        (hats, ["--batch_size", "1024"], "training galaxies are fewer than a batch of 1024"),
    ):
        with pytest.raises(UserError, match=message):
            main.main([*TINY, "--dataset", str(dataset), *run, *flags])


def test_the_old_window_is_freed_before_the_new_one_is_read(stream, monkeypatch):
    """Else the memory would be twice the buffer."""

    class Row:
        """Can be referred to weakly."""

    def read(_self, _lane, _epoch, start, stop):
        assert not alive
        rows = [Row() for _ in range(start, stop)]
        alive.update(rows)
        return rows

    alive, dataset = weakref.WeakSet(), StreamDataset(stream, buffer_size=8)
    monkeypatch.setattr(StreamDataset, "_read", read)
    for epoch, place in itertools.islice(dataset.sampler(batch_size=1, seed=0), 40):
        dataset._row(epoch, place)
    assert len(alive) == 8


def test_what_does_not_fit_on_the_disk_is_streamed(hats, small_disk, small_hdf5, monkeypatch):
    """600 images of 32 pixels take 1.8 MB, of 64 pixels 7.4 MB; the disk has 4 MB."""
    monkeypatch.setenv("GALAXY_MAE_CACHE", str(small_disk))
    assert not is_too_large(str(hats), 32)
    assert is_too_large(str(hats), 64)
    assert not is_too_large(str(small_hdf5), 4096)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("galaxy_mae.data.stream.open_stream", lambda *source: source)
        assert open_pretraining_data(str(hats), 64) == (str(hats), 64, 0, Frame(), 64, Frame())
    assert not open_pretraining_data(str(hats), 32).is_streamed
    (small_disk / "other").write_bytes(bytes(1_500_000))
    assert not is_too_large(str(hats), 32)  # cached before the disk was that full

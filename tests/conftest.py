"""Shared fixtures: a separate cache, and small files in Galaxy10's schema."""

import gc
import io
import math
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import h5py
import numpy as np
import pytest
import transformers
from packaging.version import Version
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from galaxy_mae import figures, files, progress
from galaxy_mae.training import preemption

os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count()))  # not by the cores that are free at the start
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

# TensorBoard imports TensorFlow, which takes ten seconds, unless there is a module of this name.
sys.modules.setdefault("tensorboard.compat.notf", ModuleType("notf"))

# transformers 5.17: image processors need torchvision, and several CPU processes cannot resume (map_location "cpu:0").
TRANSFORMERS_5_17 = Version(transformers.__version__) < Version("5.18")

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    """Tests neither read nor write the user's cache."""
    patch = pytest.MonkeyPatch()
    patch.setenv("GALAXY_MAE_CACHE", str(tmp_path_factory.mktemp("cache")))
    patch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
    patch.delenv("GALAXY10_H5", raising=False)
    patch.setattr(figures, "_save", _save_blank)
    patch.setattr(progress, "INTERVAL", math.inf)  # no lines that come with the time
    yield
    patch.undo()


draw = figures._save


def _save_blank(figure: figures.Figure, path: figures.Target) -> None:
    """In place of drawing, which takes a second: a PNG of its size in inches. Processes that tests start do draw."""
    width, height = figure.get_size_inches()
    blank, software = Image.new("RGB", (round(100 * width), round(100 * height)), "white"), PngInfo()
    software.add_text("Software", "galaxy_mae")
    blank.save(file := io.BytesIO(), "PNG", pnginfo=software)
    content = file.getvalue()
    if isinstance(path, Path):
        with files.atomic_file(path) as tmp_path:
            tmp_path.write_bytes(content)
    else:
        path.write(content)


@pytest.fixture
def drawn_figures(monkeypatch):
    """Figures are drawn."""
    monkeypatch.setattr(figures, "_save", draw)


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of 4 MB, if this process may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", disk], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with many slow tests come first, after Slurm's, so that no worker waits for a long file at the end."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: (item.path.parent.name != "slurm", -slow[item.path]))


def pytest_collection_finish() -> None:
    """What was imported lives until the end: each run of accelerate's collector would go through it again."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()  # hypothesis, which may be imported for the summary, asks for the referrers of what was imported


def random_images(count: int, size: int = 32, seed: int = 0) -> np.ndarray:
    """(count, size, size, 3) uint8: coarse random images, all different, which a MAE can learn."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)
    return coarse.repeat(size // 4, axis=1).repeat(size // 4, axis=2)


def png(image: np.ndarray) -> bytes:
    """An (S, S, 3) uint8 image as a PNG file."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


def write_hdf5(path: Path, images: np.ndarray, label: np.ndarray | None = None, **columns: np.ndarray) -> Path:
    """Write a file in Galaxy10's schema; columns (ra, dec, ...) are written as they are."""
    label = np.sort(np.arange(len(images)) % 10) if label is None else label
    with h5py.File(path, "w") as file:
        chunks = (1, *images.shape[1:]) if len(images) else None
        file.create_dataset("images", data=images, chunks=chunks, compression="gzip" if chunks else None)
        file["ans"] = label.astype(np.uint8)
        for name, values in columns.items():
            file[name] = values
    return path


@pytest.fixture(scope="session")
def small_hdf5(tmp_path_factory) -> Path:
    """200 images of 32 x 32 in ten classes, far apart on the sky."""
    position = {"ra": np.linspace(0, 300, 200), "dec": np.zeros(200)}
    path = tmp_path_factory.mktemp("survey") / "small.h5"
    return write_hdf5(path, random_images(200), **position, pxscale=np.full(200, 0.262))


@pytest.fixture
def signal_handlers(monkeypatch):
    """Install the handlers in this process, as in one that was just started, and remove them afterwards."""
    monkeypatch.setattr(preemption, "_training", False)
    monkeypatch.setattr(preemption, "_signalled", None)
    before = {number: signal.getsignal(number) for number in preemption.SIGNALS}
    preemption.install_signal_handlers()
    yield
    for number, handler in before.items():
        signal.signal(number, handler)

"""What is saved opens in plain transformers 4.57, 5.17 and the installed version, with this package's numbers."""

import io
import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from conftest import random_images, write_hdf5
from safetensors.torch import load_file
from test_encoder import MEAN, STD
from test_mae import small_config
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification, ViTImageProcessorPil
from transformers.utils import logging as transformers_logging

from galaxy_mae.data.batches import GalaxyBatches
from galaxy_mae.data.cache import open_galaxies
from galaxy_mae.data.images import area_average
from galaxy_mae.evaluation.features import encode, mean_pool
from galaxy_mae.evaluation.fine_tuning import classify
from galaxy_mae.model.classifier import build_classifier, load_classifier
from galaxy_mae.model.encoder import load_encoder
from galaxy_mae.model.mae import build_mae, save_encoder
from galaxy_mae.model.saved_model import save_model

NAMES = ("round", "spiral", "edge-on")
SCRIPT = Path(__file__).with_name("plain_transformers.py")
VERSIONS = {  # other versions: what is installed for each, over this environment's torch, NumPy and Pillow
    "4.57.6": ["transformers==4.57.6", "huggingface_hub<1", "tokenizers<0.23.1"],
    "5.17.0": ["transformers==5.17.0", "huggingface_hub>=1.5,<2", "tokenizers>=0.23.1,<0.24"],
}
# None in sys.modules: as where this package and what transformers uses if it is there are not installed.
HIDDEN = (
    "import sys, runpy; sys.modules.update(dict.fromkeys(['datasets', 'galaxy_mae', 'tensorflow', 'torchvision'])); "
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """An encoder and a classifier in which every tensor differs from every initialization, as after training."""
    folder = tmp_path_factory.mktemp("models")
    mae, generator = build_mae(small_config(image_size=64), seed=1), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in mae.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
        save_encoder(mae, folder / "encoder", MEAN, STD, ("a", "b"))
        model = build_classifier(load_encoder(str(folder)).model, NAMES, seed=0)
        for parameter in (model.classifier.weight, *model.beit.pooler.parameters()):
            parameter.add_(torch.randn(parameter.shape, generator=generator))
        pixels = (noisy_images(32, 64) / 255 - MEAN) / STD
        logits = model.eval()(torch.tensor(pixels, dtype=torch.float32).permute(0, 3, 1, 2)).logits
        scale = 2 / logits.std(dim=0)  # so that the images get different classes
        model.classifier.weight.mul_(scale[:, None])
        model.classifier.bias.copy_(-logits.mean(dim=0) * scale)
    (folder / "classifier").mkdir()
    save_model(model, folder / "classifier", MEAN, STD)
    return {name: folder / name for name in ("encoder", "classifier")}


def our_numbers(folders: dict[str, Path], images: np.ndarray, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities and features of images by this package, which reads them from a file."""
    path = write_hdf5(folder / f"{images.shape[1]}.h5", images)
    classifier, encoder = load_classifier(str(folders["classifier"])), load_encoder(str(folders["encoder"]))
    batches = GalaxyBatches(open_galaxies(str(path), 64).pixels, classifier.mean, classifier.std, 64)
    indices = np.arange(len(images))
    features = np.concatenate([mean_pool(last) for *_, last in encode(encoder.model, batches, indices)])
    return classify(classifier.model, batches, indices), features


def plain_numbers(folders: dict[str, Path], images: list[np.ndarray], folder: Path, version: str | None = None) -> dict:
    """What plain transformers makes of the same images, in a process of its own."""
    paths = [folder / f"{same_size.shape[1]}.npy" for same_size in images]
    for path, same_size in zip(paths, images, strict=True):
        np.save(path, same_size)
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    if version:
        environment["PYTHONPATH"] = str(other_version(version))
    installed = version or transformers.__version__
    processor = "ViTImageProcessorPil" if installed.startswith("5.17") else "AutoImageProcessor"
    arguments = [str(x) for x in (SCRIPT, processor, folders["classifier"], folders["encoder"], *paths)]
    code = f"{HIDDEN} sys.argv = {arguments}; runpy.run_path(sys.argv[0], run_name='__main__')"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=folder)
    assert run.returncode == 0, run.stderr[-2000:]
    result = json.loads(run.stdout.splitlines()[-1])
    assert result["version"] == installed
    return result


def other_version(version: str) -> Path:
    """The folder with another version of transformers, installed once."""
    folder = SCRIPT.parents[1] / ".compat" / f"plain-{version}"
    if not folder.is_dir():
        new = folder.with_name(f"{folder.name}-{os.getpid()}")
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(new)]
        run = subprocess.run([*command, *VERSIONS[version]], capture_output=True, text=True)
        if run.returncode:
            pytest.skip(f"transformers {version} cannot be installed: {run.stderr.strip().splitlines()[-1]}")
        new.rename(folder)
    return folder


def noisy_images(count: int, size: int) -> np.ndarray:
    """(count, size, size, 3) uint8 that differ in brightness and color and from pixel to pixel."""
    noise = np.random.default_rng(size).integers(0, 64, (count, size, size, 3), dtype=np.uint8)
    return random_images(count, size) // 4 * 3 + noise


@pytest.mark.slow
@pytest.mark.parametrize("version", [None, *VERSIONS])
def test_plain_transformers_gives_our_probabilities_and_features(folders, tmp_path, version):
    """Of images of the model's size, and of larger ones whose size is a multiple of it."""
    images = [noisy_images(12, size) for size in (64, 192, 256)]
    ours = [our_numbers(folders, same_size, tmp_path) for same_size in images]
    probabilities, features = (np.concatenate(parts) for parts in zip(*ours, strict=True))
    plain = plain_numbers(folders, images, tmp_path, version)
    assert plain["class"] == "BeitForImageClassification"
    assert np.abs(probabilities - plain["probabilities"]).max() <= 1e-4
    assert np.abs(features - plain["features"]).max() <= 1e-4
    assert np.abs(features - plain["pipeline_features"]).max() <= 1e-4
    assert plain["pipeline_labels"] == [NAMES[c] for c in probabilities.argmax(axis=1)]
    assert np.abs(probabilities.max(axis=1) - plain["pipeline_scores"]).max() <= 1e-4
    assert len(set(plain["pipeline_labels"])) > 1  # or the comparisons above would say little
    assert probabilities.std(axis=0).max() > 0.1


def test_images_of_other_sizes_are_resized_a_little_differently(folders):
    """106 to 64 pixels: Pillow's box filter splits no pixel, and ours does (docs/transformers5.md has the numbers)."""
    images = open_galaxies("synthetic:24", 106).pixels
    processor = ViTImageProcessorPil.from_pretrained(folders["classifier"])
    plain = processor(list(images), return_tensors="np")["pixel_values"].transpose(0, 2, 3, 1) * STD + MEAN
    difference = np.abs(plain * 255 - area_average(np.array(images), 64))
    assert 0.1 < difference.mean() < 2


# ---------------------------------------------------------------------------------------- every other way to open them


def auto_classes(folder: Path) -> list[type]:
    """The Auto classes for models that know the architecture of a folder."""
    config = type(AutoConfig.from_pretrained(folder))
    classes = [getattr(transformers, name) for name in dir(transformers) if name.startswith("Auto")]
    return [x for x in classes if hasattr(x, "_model_mapping") and config in x._model_mapping]


def open_with_warnings(auto_class: type, folder: Path) -> tuple[torch.nn.Module, dict, str]:
    """A model, transformers' loading info, and what it warned of."""
    log, logger = io.StringIO(), transformers_logging.get_logger("transformers")
    handler = logging.StreamHandler(log)
    logger.addHandler(handler)
    try:
        model, loading_info = auto_class.from_pretrained(folder, output_loading_info=True)
    finally:
        logger.removeHandler(handler)
    return model, loading_info, log.getvalue()


@pytest.mark.parametrize("kind", ["encoder", "classifier"])
def test_no_class_opens_a_folder_silently_as_something_else(folders, kind):
    """Every tensor of the file is in the model; a head or pooler that is new, or left out, is reported."""
    stored = load_file(folders[kind] / "model.safetensors")
    opened = []
    for auto_class in auto_classes(folders[kind]):
        try:
            model, loading_info, warnings = open_with_warnings(auto_class, folders[kind])
        except ValueError as error:  # refused
            assert re.search("out_indices|Repo id", str(error))  # noqa: PT017 (a class may also open it)
            continue
        missing, unexpected = (set(loading_info[name]) for name in ("missing_keys", "unexpected_keys"))
        assert not loading_info["mismatched_keys"]
        values = {tensor.numpy().tobytes() for tensor in model.state_dict().values()}
        left_out = {name for name, tensor in stored.items() if tensor.numpy().tobytes() not in values}
        assert left_out <= {"classifier.weight", "classifier.bias"}
        assert len(left_out) == len(unexpected)
        new = {name.split(".")[0] for name in missing} - {"vit"} | {x for x in missing if x.startswith("vit.")}
        assert new <= {"pooler", "classifier", "decoder", "vit.embeddings.mask_token"}
        assert all(name.split(".")[-2] in warnings for name in missing | unexpected)
        assert ("MISSING" in warnings) == bool(missing)
        opened.append((type(model).__name__, bool(missing)))
    expected = {"encoder": [("ViTModel", True), ("ViTForImageClassification", True)]}
    expected["classifier"] = [("BeitModel", False), ("BeitForImageClassification", False)]
    assert set(expected[kind]) <= set(opened)


@torch.no_grad()
def test_the_base_models_outputs_are_right(folders):
    pixels = torch.randn(2, 3, 64, 64)
    expected = load_encoder(str(folders["encoder"])).model(pixels).last_hidden_state
    assert torch.equal(AutoModel.from_pretrained(folders["encoder"]).eval()(pixels).last_hidden_state, expected)
    model = AutoModelForImageClassification.from_pretrained(folders["classifier"]).eval()
    pooled = AutoModel.from_pretrained(folders["classifier"]).eval()(pixels).pooler_output
    assert torch.equal(model.classifier(pooled), model(pixels).logits)

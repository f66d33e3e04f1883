"""Frozen features: one pass of an encoder over all images, kept in a file."""

import logging
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from transformers import ViTModel

from galaxy_mae.data.batches import GalaxyBatches
from galaxy_mae.data.sources import Galaxies
from galaxy_mae.errors import UserError
from galaxy_mae.files import atomic_file, remove_leftovers
from galaxy_mae.model.compute import num_patches, select_attn_implementation

logger = logging.getLogger(__name__)


def check_image_size(model: str, size: int, galaxies: Galaxies) -> None:
    """Raise a `UserError` if the galaxies' images are smaller than those that a model takes.

    Args:
        model: the flag and name of the model, for the message.
        size: width and height of the model's images.
        galaxies: the opened data set.
    """
    native = galaxies.native_size
    if native < size:
        raise UserError(
            f"{model}: it takes images of {size} x {size}, and those of {galaxies.name} are only {native} x {native}; "
            f"use a model that was pre-trained with --image_size {native} or less"
        )


def iterate_images(batches: GalaxyBatches, indices: np.ndarray) -> Iterator[torch.Tensor]:
    """Yield the complete, normalized images of `indices` in order: (b, 3, S, S) float32 on the batches' device."""
    for start in range(0, len(indices), batches.inference_batch_size):
        chunk = indices[start : start + batches.inference_batch_size]
        yield batches.eval_transform(batches.collate(chunk.tolist()))


@torch.inference_mode()
def encode(model: ViTModel, batches: GalaxyBatches, indices: np.ndarray, bf16: bool = False) -> Iterator[torch.Tensor]:
    """Yield the last hidden states of images in order: (b, 1 + patches, hidden size) float32 on the batches' device.

    Args:
        model: the encoder; it is moved to that device.
        batches: makes the images.
        indices: (M,) int64.
        bf16: use bfloat16 autocast.
    """
    model = model.to(batches.device).eval()
    select_attn_implementation(model, batches.device, bf16)
    for images in iterate_images(batches, indices):
        with torch.autocast(batches.device.type, torch.bfloat16, enabled=bf16):
            tokens = model(images).last_hidden_state
        yield tokens.float()


def mean_pool(tokens: torch.Tensor) -> np.ndarray:
    """Mean of the patch tokens, without the class token: (b, 1 + patches, hidden size) to (b, hidden size)."""
    return tokens[:, 1:].mean(dim=1).cpu().numpy()


def pooled_features(model: ViTModel, batches: GalaxyBatches, path: Path, bf16: bool = False) -> dict[str, np.ndarray]:
    """The features of all images of the data set, computed once and cached in a file.

    Args:
        model, batches, bf16: as for `encode`.
        path: an .npz file, named by the encoder's fingerprint; read if it exists and is not damaged.

    Returns:
        `mean`, of the patch tokens, and `cls`, the class token: (N, hidden size) float32 each.
    """
    shape = (batches.num_images, model.config.hidden_size)
    features = _read_features(path, shape)
    if features is None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(f".{path.name}.lock")):  # one task of an array computes them, the others wait
            remove_leftovers(path.parent)
            features = _read_features(path, shape)
            if features is None:
                if path.exists():
                    logger.warning("%s is damaged: the features are computed again", path)
                features = _pool(model, batches, bf16)
                with atomic_file(path) as tmp_path:
                    np.savez(tmp_path, **features)
    return features


def _read_features(path: Path, shape: tuple[int, int]) -> dict[str, np.ndarray] | None:
    """Read cached features; None if there are none or they are damaged: the file has a checksum of each array."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            features = {name: stored[name] for name in ("mean", "cls")}
    except (OSError, ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    return features if all(x.shape == shape for x in features.values()) else None


def _pool(model: ViTModel, batches: GalaxyBatches, bf16: bool) -> dict[str, np.ndarray]:
    """Encode all images; `mean` and `cls` as in `pooled_features`."""
    pooled: dict[str, list[np.ndarray]] = {"mean": [], "cls": []}
    for tokens in encode(model, batches, np.arange(batches.num_images), bf16):
        pooled["mean"].append(mean_pool(tokens))
        pooled["cls"].append(tokens[:, 0].cpu().numpy())
    return {name: np.concatenate(parts) for name, parts in pooled.items()}


def select_pooling(features: dict[str, np.ndarray], pooling: str) -> np.ndarray:
    """(N, hidden size) features of one of `arguments.POOLINGS`; of `both`, concatenated, (N, 2 x hidden size)."""
    return np.concatenate([features["mean"], features["cls"]], axis=1) if pooling == "both" else features[pooling]


def cache_patch_tokens(
    model: ViTModel, batches: GalaxyBatches, indices: np.ndarray, folder: Path, bf16: bool = False
) -> np.ndarray:
    """The patch tokens of `indices`, (M, patches, hidden size) float16, as a memory map of a file in `folder`.

    On disk, because those of Galaxy10 take 3.5 GB.
    """
    path = folder / "tokens.npy"
    shape = (len(indices), num_patches(model.config), model.config.hidden_size)
    with path.open("wb") as out:  # written, not memory-mapped: a full disk then raises an error that can be reported
        np.lib.format.write_array_header_1_0(out, {"descr": "<f2", "fortran_order": False, "shape": shape})
        for tokens in encode(model, batches, indices, bf16):
            out.write(tokens[:, 1:].half().cpu().numpy().data)
    return np.load(path, mmap_mode="r")

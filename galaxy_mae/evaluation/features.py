"""Frozen features: one pass of an encoder over all images, kept in a file."""

import logging
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from transformers import PreTrainedModel

from galaxy_mae.data.batches import GalaxyBatches
from galaxy_mae.data.sources import Galaxies
from galaxy_mae.errors import UserError
from galaxy_mae.files import atomic_file, remove_leftovers
from galaxy_mae.model.backbone import hidden_states
from galaxy_mae.model.compute import select_attn_implementation

logger = logging.getLogger(__name__)

RINGS = 12  # has many divisors, so that wider rings can be made of these


def check_image_size(model: str, size: int, galaxies: Galaxies, enlarges: bool = False) -> None:
    """Raise a `UserError` if the galaxies' images are smaller than those that a model takes, and may not be enlarged.

    Args:
        model: the flag and name of the model, for the message.
        size: width and height of the model's images.
        galaxies: the opened data set.
        enlarges: whether smaller images are enlarged, with a line in the log.
    """
    native = galaxies.native_size
    if native < size and enlarges:
        logger.info("%s: images of %d x %d are enlarged to %d x %d", model, native, native, size, size)
    elif native < size:
        raise UserError(
            f"{model}: it takes images of {size} x {size}, and those of {galaxies.name} are only {native} x {native}; "
            f"use a model that was pre-trained with --image_size {native} or less"
        )


def iterate_images(batches: GalaxyBatches, indices: np.ndarray) -> Iterator[torch.Tensor]:
    """Yield the complete, normalized images of `indices` in order: (b, 3, S, S) float32 on the batches' device."""
    for start in range(0, len(indices), batches.inference_batch_size):
        chunk = indices[start : start + batches.inference_batch_size]
        yield batches.eval_transform(batches.collate(chunk.tolist()))


@dataclass(frozen=True)
class Tokens:
    """What a layer of an encoder makes of B images.

    Attributes:
        patches: (B, rows, columns, channels) float32, one token per patch of the image, or a feature map; numbers of
            rows, columns and channels may differ between layers.
        cls: (B, channels) float32, the class token; None where the encoder has none.
    """

    patches: torch.Tensor
    cls: torch.Tensor | None


@torch.no_grad()
def encode(
    model: PreTrainedModel, batches: GalaxyBatches, indices: np.ndarray, bf16: bool = False
) -> Iterator[list[Tokens]]:
    """Yield the tokens of images in order, on the batches' device: of every layer, the encoder's output last.

    Args:
        model: the encoder; it is moved to that device.
        batches: makes the images.
        indices: (M,) int64.
        bf16: use bfloat16 autocast.
    """
    # no_grad, not inference_mode: a BEiT caches tensors of a forward pass, which a later training uses.
    model = model.to(batches.device).eval()
    select_attn_implementation(model, batches.device, bf16)
    for images in iterate_images(batches, indices):
        with torch.autocast(batches.device.type, torch.bfloat16, enabled=bf16):
            layers = hidden_states(model, images)
        yield [Tokens(patches.float(), None if cls is None else cls.float()) for patches, cls in layers]


def mean_pool(tokens: Tokens) -> np.ndarray:
    """Mean of the patch tokens: (B, channels) float32."""
    return tokens.patches.mean(dim=(1, 2)).cpu().numpy()


def ring_pool(tokens: Tokens) -> np.ndarray:
    """Means over the patches of each of `RINGS` + 1 rings about the center: (B, RINGS + 1, channels) float32.

    Rings 0 to RINGS - 1 have equal widths and end at the circle that touches the edges; the last one, the corners, is
    outside of it. A galaxy is at the center of its image, so the rings are its profile. A rotation of the patches by 90
    degrees does not change them. The mean over a ring without patches is zero.
    """
    ring = torch.from_numpy(ring_of_patches(*tokens.patches.shape[1:3])).to(tokens.patches.device)
    members = torch.nn.functional.one_hot(ring.flatten(), RINGS + 1).float()
    weights = members / members.sum(dim=0).clamp(min=1)
    return torch.einsum("bpc,pr->brc", tokens.patches.flatten(1, 2), weights).cpu().numpy()


def ring_of_patches(rows: int, columns: int) -> np.ndarray:
    """The ring of each patch by the distance of its center from that of the image: (rows, columns) int64."""
    y, x = ((np.arange(count) + 0.5) * 2 / count - 1 for count in (rows, columns))
    radius = np.hypot(*np.meshgrid(y, x, indexing="ij"))
    return np.minimum((radius * RINGS).astype(np.int64), RINGS)


def merge_rings(rings: np.ndarray, num_rings: int, grid: tuple[int, int]) -> np.ndarray:
    """Means over fewer and wider rings: (N, num_rings * channels) float32.

    Args:
        rings: (N, RINGS + 1, channels) of `ring_pool`.
        num_rings: one of `ring_choices`: that many less one inside of the circle, and the corners.
        grid: rows and columns of patches.
    """
    patches = np.bincount(ring_of_patches(*grid).ravel(), minlength=RINGS + 1)
    merged = []
    for part in (*np.split(np.arange(RINGS), num_rings - 1), np.array([RINGS])):
        weights = patches[part] / patches[part].sum()
        merged.append(np.einsum("nrc,r->nc", rings[:, part].astype(np.float32), weights.astype(np.float32)))
    return np.concatenate(merged, axis=1)


def ring_choices(grid: tuple[int, int]) -> list[int]:
    """The numbers of rings for which no ring is without patches: 1 more than a divisor of `RINGS`."""
    patches = np.bincount(ring_of_patches(*grid).ravel(), minlength=RINGS + 1)
    inside = [n for n in range(1, RINGS + 1) if RINGS % n == 0 and patches[:RINGS].reshape(n, -1).sum(axis=1).all()]
    return [n + 1 for n in inside if patches[RINGS]]


@dataclass(frozen=True)
class Features:
    """Frozen features of all N images of a data set.

    Attributes:
        mean: (N, channels) float32, mean of the patch tokens.
        cls: (N, channels) float32, the class token; None where the encoder has none.
        rings: (N, RINGS + 1, channels) float16, of `ring_pool`.
        layers: the mean of the patch tokens of each layer before the last, (N, channels) float16 each.
        grid: rows and columns of patches.
    """

    mean: np.ndarray
    cls: np.ndarray | None
    rings: np.ndarray
    layers: list[np.ndarray]
    grid: tuple[int, int]

    def pooled(self, pooling: str) -> np.ndarray:
        """(N, channels) float32 of one of `arguments.POOLINGS`; of `both`, concatenated, (N, 2 x channels).

        Raises:
            UserError: the encoder has no class token.
        """
        if pooling == "mean":
            return self.mean
        if self.cls is None:
            raise UserError(f"--pooling {pooling}: this encoder has no class token; use --pooling mean")
        return self.cls if pooling == "cls" else np.concatenate([self.mean, self.cls], axis=1)


def frozen_features(model: PreTrainedModel, batches: GalaxyBatches, path: Path, bf16: bool = False) -> Features:
    """The features of all images of the data set, computed once and cached in a file.

    Args:
        model, batches, bf16: as for `encode`.
        path: an .npz file, named by the encoder's fingerprint; read if it exists and is not damaged.
    """
    features = _read_features(path, batches.num_images)
    if features is None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(f".{path.name}.lock")):  # one task of an array computes them, the others wait
            remove_leftovers(path.parent)
            features = _read_features(path, batches.num_images)
            if features is None:
                if path.exists():
                    logger.warning("%s is damaged: the features are computed again", path)
                features = _pool(model, batches, bf16)
                arrays = {"mean": features.mean, "rings": features.rings, "grid": np.array(features.grid)}
                arrays |= {f"layer_{i}": layer for i, layer in enumerate(features.layers)}
                if features.cls is not None:
                    arrays["cls"] = features.cls
                with atomic_file(path) as tmp_path:
                    np.savez(tmp_path, **arrays)
    return features


def _read_features(path: Path, num_images: int) -> Features | None:
    """Read cached features; None if there are none or they are damaged: the file has a checksum of each array."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
            layers = [arrays[f"layer_{i}"] for i in range(sum(name.startswith("layer_") for name in arrays))]
            rows, columns = arrays["grid"].tolist()
            features = Features(arrays["mean"], arrays.get("cls"), arrays["rings"], layers, (rows, columns))
    except (OSError, ValueError, TypeError, KeyError, EOFError, AttributeError, zipfile.BadZipFile):
        return None
    return features if len(features.mean) == num_images else None


def _pool(model: PreTrainedModel, batches: GalaxyBatches, bf16: bool) -> Features:
    """Encode all images, in one pass."""
    mean, cls, rings, layers = [], [], [], []
    for *inner, last in encode(model, batches, np.arange(batches.num_images), bf16):
        mean.append(mean_pool(last))
        rings.append(ring_pool(last).astype(np.float16))
        layers.append([mean_pool(tokens).astype(np.float16) for tokens in inner])
        if last.cls is not None:
            cls.append(last.cls.cpu().numpy())
    return Features(
        np.concatenate(mean),
        np.concatenate(cls) if cls else None,
        np.concatenate(rings),
        [np.concatenate(chunks) for chunks in zip(*layers, strict=True)],
        tuple(last.patches.shape[1:3]),
    )


def cache_patch_tokens(
    model: PreTrainedModel, batches: GalaxyBatches, indices: np.ndarray, folder: Path, bf16: bool = False
) -> np.ndarray:
    """The patch tokens of `indices`, (M, patches, channels) float16, as a memory map of a file in `folder`.

    On disk, because those of Galaxy10 take 3.5 GB.
    """
    path, shape = folder / "tokens.npy", None
    with path.open("wb") as out:  # written, not memory-mapped: a full disk then raises an error that can be reported
        for *_, last in encode(model, batches, indices, bf16):
            tokens = last.patches.flatten(1, 2).half().cpu().numpy()
            if shape is None:
                shape = (len(indices), *tokens.shape[1:])
                np.lib.format.write_array_header_1_0(out, {"descr": "<f2", "fortran_order": False, "shape": shape})
            out.write(tokens.data)
    return np.load(path, mmap_mode="r")

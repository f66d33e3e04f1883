"""Frozen features: one pass of an encoder over all images, kept in a file."""

import hashlib
import logging
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from galaxy_mae.data.batches import GalaxyBatches, orientations
from galaxy_mae.data.cache import Galaxies
from galaxy_mae.data.download import cache_folder
from galaxy_mae.errors import UserError
from galaxy_mae.files import atomic_file, cached
from galaxy_mae.model.backbone import Tokens, hidden_states
from galaxy_mae.model.compute import select_attn_implementation
from galaxy_mae.progress import stage

logger = logging.getLogger(__name__)

RINGS = 12  # has many divisors, so that wider rings can be made of these
MAX_ORIENTED_RINGS = 7  # over orientations; with 384 channels these are 5,376 features already
_PASS = 64  # images of a pass over several views of few: 1.5 times as fast as 16 on two cores in bfloat16
Views = Callable[[torch.Tensor], Iterator[torch.Tensor]]  # (B, C, S, S) images to views of the same shape


def iterate_images(batches: GalaxyBatches, indices: np.ndarray) -> Iterator[torch.Tensor]:
    """Yield the complete, normalized images of `indices` in order: (b, 3, S, S) float32 on the batches' device."""
    with stage("images through the model", len(indices)) as progress:
        for start in range(0, len(indices), batches.inference_batch_size):
            chunk = indices[start : start + batches.inference_batch_size]
            yield batches.eval_transform(batches.collate(chunk.tolist()))
            progress.advance(len(chunk))


@torch.no_grad()
def encode(
    model: PreTrainedModel, batches: GalaxyBatches, indices: np.ndarray, bf16: bool = False
) -> Iterator[list[Tokens]]:
    """Yield the tokens of images in order, float32 on the batches' device: of every layer, the encoder's output last.

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
        yield _tokens(model, images, bf16)


def _tokens(model: PreTrainedModel, images: torch.Tensor, bf16: bool) -> list[Tokens]:
    with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
        return hidden_states(model, images)


def mean_pool(tokens: Tokens) -> np.ndarray:
    """Mean of the patch tokens: (B, channels) float32."""
    return tokens.patches.mean(dim=(1, 2)).cpu().numpy()


def ring_pool(tokens: Tokens) -> np.ndarray:
    """Means over the patches of each of `RINGS` + 1 rings about the center: (B, RINGS + 1, channels) float32.

    Rings 0 to RINGS - 1 have equal widths and end at the circle that touches the edges; the last one, the corners, is
    outside of it. A galaxy is at the center of its image, so the rings are its profile. A rotation of the patches by 90
    degrees does not change them. The mean over a ring without patches is zero.
    """
    weights = torch.from_numpy(ring_weights(RINGS + 1, tokens.patches.shape[1:3])).to(tokens.patches.device)
    return torch.einsum("bpc,pr->brc", tokens.patches.flatten(1, 2), weights).cpu().numpy()


def ring_of_patches(rows: int, columns: int) -> np.ndarray:
    """The ring of each patch by the distance of its center from that of the image: (rows, columns) int64."""
    y, x = ((np.arange(count) + 0.5) * 2 / count - 1 for count in (rows, columns))
    radius = np.hypot(*np.meshgrid(y, x, indexing="ij"))
    return np.minimum((radius * RINGS).astype(np.int64), RINGS)


def merge_rings(rings: np.ndarray, num_rings: int, grid: tuple[int, int]) -> np.ndarray:
    """Means over fewer and wider rings, of (N, RINGS + 1, channels): (N, num_rings * channels) float32.

    `num_rings` is one of `ring_choices`: that many less one inside of the circle, and the corners.
    """
    patches = np.bincount(ring_of_patches(*grid).ravel(), minlength=RINGS + 1)
    merged = []
    for part in (*np.split(np.arange(RINGS), num_rings - 1), np.array([RINGS])):
        weights = patches[part] / patches[part].sum()
        merged.append(np.einsum("nrc,r->nc", rings[:, part].astype(np.float32), weights.astype(np.float32)))
    return np.concatenate(merged, axis=1)


def ring_weights(num_rings: int, grid: tuple[int, int]) -> np.ndarray:
    """The weights of patches in the means of `merge_rings`, or of all of them with one ring.

    Returns:
        (patches, num_rings) float32, each column with the sum 1, or zero for a ring without patches.
    """
    if num_rings == 1:
        return np.full((grid[0] * grid[1], 1), 1 / (grid[0] * grid[1]), np.float32)
    ring = np.minimum(ring_of_patches(*grid).ravel() // (RINGS // (num_rings - 1)), num_rings - 1)
    members = np.eye(num_rings, dtype=np.float32)[ring]
    return members / members.sum(axis=0).clip(1)


def ring_choices(grid: tuple[int, int]) -> list[int]:
    """The numbers of rings for which no ring is without patches: 1 more than a divisor of `RINGS`."""
    patches = np.bincount(ring_of_patches(*grid).ravel(), minlength=RINGS + 1)
    inside = [n for n in range(1, RINGS + 1) if RINGS % n == 0 and patches[:RINGS].reshape(n, -1).sum(axis=1).all()]
    return [n + 1 for n in inside if patches[RINGS]]


def rings_of_orientations(grid: tuple[int, int]) -> int:
    """The number of rings of `orientation_features`; 1, all patches, where there are too few for rings."""
    return max((n for n in ring_choices(grid) if n <= MAX_ORIENTED_RINGS), default=1)


@dataclass(frozen=True)
class Features:
    """Frozen features of all N images of a data set."""

    mean: np.ndarray  # (N, channels) float32, mean of the patch tokens
    cls: np.ndarray | None  # (N, channels) float32, the class token, where the encoder has one
    rings: np.ndarray  # (N, RINGS + 1, channels) float16, of `ring_pool`
    layers: list[np.ndarray]  # mean of the patch tokens of each layer before the last, (N, channels) float16
    grid: tuple[int, int]  # rows and columns of patches

    def pooled(self, pooling: str) -> np.ndarray:
        """(N, channels) float32 of `mean`, `cls` (`UserError` without one), or `both`, (N, 2 x channels)."""
        if pooling == "mean":
            return self.mean
        if self.cls is None:
            raise UserError(f"--pooling {pooling}: this encoder has no class token; use --pooling mean")
        return self.cls if pooling == "cls" else np.concatenate([self.mean, self.cls], axis=1)


def features_file(galaxies: Galaxies, encoder: str, bf16: bool, kind: str = "") -> Path:
    """The cache of the features of a data set's images by an encoder of a fingerprint; `kind` ends its name.

    Its name has a hash of the images in their order, which another version may read differently from the same files.
    """
    rows = hashlib.sha256(galaxies.image_hash.tobytes()).hexdigest()[:16]
    name = f"{encoder[:16]}_{rows}_{'bfloat16' if bf16 else 'float32'}{kind}.npz"
    return cache_folder() / galaxies.fingerprint[:16] / "features" / name


def frozen_features(model: PreTrainedModel, batches: GalaxyBatches, path: Path, bf16: bool = False) -> Features:
    """The features of all images of the data set, computed once and cached in `path`, a `features_file`."""
    arrays = _cached_arrays(path, lambda: _pool(model, batches, bf16), batches.num_images)
    layers = [arrays[f"layer_{i}"] for i in range(sum(name.startswith("layer_") for name in arrays))]
    return Features(arrays["mean"], arrays.get("cls"), arrays["rings"], layers, tuple(arrays["grid"].tolist()))


def orientation_features(
    model: PreTrainedModel, batches: GalaxyBatches, path: Path, bf16: bool = False, views: Views = orientations
) -> np.ndarray:
    """Mean and std of ring means over the `views` of every image: (N, 2 x rings x channels) float16.

    Both are the same for an image turned by 90 degrees or mirrored, over the sixteen `orientations` nearly so for one
    turned by 45 degrees, and vary less than those of one view for other angles. The std is small for a round galaxy,
    large for an edge-on one. The rings are the most of `ring_choices` up to `MAX_ORIENTED_RINGS`; where there are too
    few patches for rings, the mean of all patches takes their place. The other arguments are those of
    `frozen_features`, with a file of its own.
    """

    def compute() -> dict[str, np.ndarray]:
        chunks = encode_orientations(model, batches, np.arange(batches.num_images), bf16, views)
        return {"features": np.concatenate([chunk.astype(np.float16) for chunk in chunks])}

    return _cached_arrays(path, compute, batches.num_images)["features"]


def _cached_arrays(path: Path, compute: Callable[[], dict[str, np.ndarray]], num_images: int) -> dict[str, np.ndarray]:
    """The arrays of a file, which are computed and written if it is missing or damaged: it has a checksum of each."""

    def read() -> dict[str, np.ndarray] | None:
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as found:
                arrays = {name: found[name] for name in found.files}
        except (OSError, ValueError, TypeError, KeyError, EOFError, AttributeError, zipfile.BadZipFile):
            return None
        return arrays if all(len(x) == num_images for name, x in arrays.items() if name != "grid") else None

    def write() -> None:
        if path.exists():
            logger.warning("%s is damaged: the features are computed again", path)
        arrays = compute()
        with atomic_file(path) as tmp_path:
            np.savez(tmp_path, **arrays)

    return cached(path.with_name(f".{path.name}.lock"), read, write)


def _pool(model: PreTrainedModel, batches: GalaxyBatches, bf16: bool) -> dict[str, np.ndarray]:
    """The arrays of the file of `Features`, in one pass over all images."""
    parts = defaultdict(list)
    for *inner, last in encode(model, batches, np.arange(batches.num_images), bf16):
        parts["mean"].append(mean_pool(last))
        parts["rings"].append(ring_pool(last).astype(np.float16))
        for i, tokens in enumerate(inner):
            parts[f"layer_{i}"].append(mean_pool(tokens).astype(np.float16))
        if last.cls is not None:
            parts["cls"].append(last.cls.cpu().numpy())
    return {"grid": np.array(last.patches.shape[1:3])} | {name: np.concatenate(x) for name, x in parts.items()}


@torch.no_grad()
def encode_orientations(
    model: PreTrainedModel, batches: GalaxyBatches, indices: np.ndarray, bf16: bool = False, views: Views = orientations
) -> Iterator[np.ndarray]:
    """Yield the `orientation_features` of images in order, as `encode`: (b, 2 x rings x channels) float32."""
    model = model.to(batches.device).eval()
    select_attn_implementation(model, batches.device, bf16)
    for images in iterate_images(batches, indices):
        seen, left = [], views(images)
        while together := list(islice(left, max(1, _PASS // len(images)))):
            rings = _finest_rings(_tokens(model, torch.cat(together), bf16)[-1])
            seen.extend(np.split(rings, len(together)))
        yield np.concatenate([np.mean(seen, axis=0), np.std(seen, axis=0)], axis=1)


def _finest_rings(tokens: Tokens) -> np.ndarray:
    """Means over rings, or over all patches where they are too few: (B, rings * channels) float32."""
    grid = tuple(tokens.patches.shape[1:3])
    num_rings = rings_of_orientations(grid)
    return merge_rings(ring_pool(tokens), num_rings, grid) if num_rings > 1 else mean_pool(tokens)


def cache_patch_tokens(
    model: PreTrainedModel, batches: GalaxyBatches, indices: np.ndarray, folder: Path, bf16: bool = False
) -> np.ndarray:
    """The patch tokens of `indices`, (M, patches, channels) float16, as a memory map of a file in `folder`.

    On disk, because those of Galaxy10 take 3.5 GB.
    """
    path = folder / "tokens"
    with path.open("wb") as out:  # written, not memory-mapped: a full disk then raises an error that can be reported
        for *_, last in encode(model, batches, indices, bf16):
            tokens = last.patches.flatten(1, 2).half().cpu().numpy()
            out.write(tokens.data)
    return np.memmap(path, np.float16, "r", shape=(len(indices), *tokens.shape[1:]))

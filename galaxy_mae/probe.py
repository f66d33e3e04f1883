"""Frozen features, and what simple classifiers read from them.

The encoder runs once over every image; everything here then works on its output. Each classifier is fitted on training
rows and, where it has something to choose, chooses by its accuracy on validation rows; no function here ever sees a
test label.
"""

import copy
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier, NearestCentroid
from sklearn.preprocessing import StandardScaler
from torch import nn
from transformers import ViTModel

from galaxy_mae.atomic import atomic_file
from galaxy_mae.batches import GalaxyBatches
from galaxy_mae.mae import choose_attention

logger = logging.getLogger(__name__)

# Inverse strengths of the penalty, as scikit-learn's C, from strong to weak; half a decade apart.
PENALTIES = tuple(float(c) for c in np.geomspace(1e-4, 1e1, 11))
NEIGHBOURS = 20
ATTENTION_RATES = (3e-3, 1e-2)
ATTENTION_EPOCHS = 30
ATTENTION_BATCH = 256

Probabilities = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Examples:
    """What a probe learns or chooses from: (M, ...) float features of M galaxies and their (M,) int64 classes."""

    features: np.ndarray
    label: np.ndarray


@dataclass(frozen=True)
class Probe:
    """A fitted classifier of frozen features.

    Attributes:
        probabilities: (M, ...) features to (M, classes) float64.
        chosen: the hyper-parameters, and by what they were chosen.
    """

    probabilities: Probabilities
    chosen: dict


# ------------------------------------------------------------------------------------------------------- the features


@torch.inference_mode()
def encode(model: ViTModel, batches: GalaxyBatches, rows: np.ndarray, bf16: bool = False) -> Iterator[torch.Tensor]:
    """Yield the last hidden states of whole images, in order: (b, 1 + patches, width) float32 on the batches' device.

    Args:
        model: the encoder; it is moved to that device.
        batches: makes the images.
        rows: (M,) int64.
        bf16: compute in bfloat16 where autocast does.
    """
    model = model.to(batches.device).eval()
    choose_attention(model, batches.device, bf16)
    for start in range(0, len(rows), batches.at_a_time):
        batch = batches.collate([int(row) for row in rows[start : start + batches.at_a_time]])
        with torch.autocast(batches.device.type, torch.bfloat16, enabled=bf16):
            tokens = model(batches.plain(batch)).last_hidden_state
        yield tokens.float()


def pooled_features(model: ViTModel, batches: GalaxyBatches, path: Path, bf16: bool = False) -> dict[str, np.ndarray]:
    """The features of all rows of the source, computed once and kept in a file.

    Args:
        model, batches, bf16: as for `encode`.
        path: an .npz file, named by the encoder's fingerprint; read if it exists.

    Returns:
        `mean`, of the patch tokens, and `cls`, the class token: (N, width) float32 each.
    """
    if path.is_file():
        with np.load(path, allow_pickle=False) as stored:
            return {name: stored[name] for name in ("mean", "cls")}
    pooled: dict[str, list[np.ndarray]] = {"mean": [], "cls": []}
    for tokens in encode(model, batches, np.arange(batches.count), bf16):
        pooled["mean"].append(tokens[:, 1:].mean(dim=1).cpu().numpy())
        pooled["cls"].append(tokens[:, 0].cpu().numpy())
    features = {name: np.concatenate(parts) for name, parts in pooled.items()}
    with atomic_file(path) as aside:
        np.savez(aside, **features)
    return features


def choose_pooling(features: dict[str, np.ndarray], pooling: str) -> np.ndarray:
    """(N, width) features of one of `recipe.POOLINGS`; of both, side by side, (N, 2 width)."""
    return np.concatenate([features["mean"], features["cls"]], axis=1) if pooling == "both" else features[pooling]


# --------------------------------------------------------------------------------------------------------- the probes


def linear_probe(train: Examples, validation: Examples) -> Probe:
    """Multinomial logistic regression on standardised features, its L2 penalty chosen on validation rows.

    scikit-learn's L-BFGS from the strongest penalty to weaker ones, each started from the last one's weights. It ends
    when three penalties in a row brought no better validation accuracy. Among equals the stronger penalty wins.
    """
    scaler = StandardScaler().fit(train.features)
    x, x_validation = scaler.transform(train.features), scaler.transform(validation.features)
    model = LogisticRegression(max_iter=10_000, warm_start=True)
    tried: dict[float, float] = {}
    best = None
    for c in PENALTIES:
        model.set_params(C=c).fit(x, train.label)
        tried[c] = float(np.mean(model.predict(x_validation) == validation.label))
        if best is None or tried[c] > tried[best]:
            best, coefficients = c, (model.coef_.copy(), model.intercept_.copy())
        if PENALTIES.index(c) - PENALTIES.index(best) >= 3:
            break
    if best == PENALTIES[-1]:
        logger.warning("linear probe: the weakest penalty (C=%g) was the best: a weaker one may be better", best)
    model.coef_, model.intercept_ = coefficients
    chosen = {"C": best, "validation_accuracy": tried[best], "tried": {f"{c:.3g}": tried[c] for c in tried}}
    return Probe(lambda features: model.predict_proba(scaler.transform(features)), chosen)


def validation_accuracies(
    encoder: ViTModel,
    batches: GalaxyBatches,
    rows: dict[str, np.ndarray],
    label: np.ndarray,
    bf16: bool = False,
) -> dict[str, float]:
    """How good an encoder's frozen features are, without a look at a test row: what searches are judged by.

    Args:
        encoder, batches, bf16: as for `encode`.
        rows: `train` and `validation` row numbers; other parts are left alone.
        label: (N,) classes of the source's rows.

    Returns:
        `linear_probe_accuracy`, `knn_accuracy`, and `probed_images`, the number of validation rows; nothing where the
        training rows have a single class.
    """
    classes = np.unique(label[rows["train"]])
    if len(classes) < 2:
        return {}
    code = np.searchsorted(classes, label).clip(max=len(classes) - 1)  # among the classes that can be learnt
    code[classes[code] != label] = -1
    parts = []
    for part in ("train", "validation"):
        tokens = encode(encoder, batches, rows[part], bf16)
        features = np.concatenate([each[:, 1:].mean(dim=1).cpu().numpy() for each in tokens])
        parts.append(Examples(features, code[rows[part]]))
    train, validation = parts
    accuracies = {"probed_images": len(validation.label)}
    for name, probe in (("linear_probe", linear_probe(train, validation)), ("knn", nearest_neighbours(train))):
        right = probe.probabilities(validation.features).argmax(axis=1) == validation.label
        accuracies[f"{name}_accuracy"] = float(np.mean(right))
    return accuracies


def nearest_neighbours(train: Examples) -> Probe:
    """The share of classes among the 20 training galaxies of the largest cosine similarity, standardised features."""
    scaler = StandardScaler().fit(train.features)
    model = KNeighborsClassifier(min(NEIGHBOURS, len(train.label)), metric="cosine", algorithm="brute")
    model.fit(scaler.transform(train.features), train.label)
    return Probe(lambda features: model.predict_proba(scaler.transform(features)), {"neighbours": NEIGHBOURS})


def nearest_class_mean(train: Examples) -> Probe:
    """The class whose mean of standardised training features is nearest; as probabilities, one for that class."""
    scaler = StandardScaler().fit(train.features)
    model = NearestCentroid().fit(scaler.transform(train.features), train.label)
    classes = len(model.classes_)
    return Probe(lambda features: np.eye(classes)[model.predict(scaler.transform(features))], {})


# ------------------------------------------------------------------------------------------------ the attention probe


class AttentionPool(nn.Module):
    """Learnt queries that pool frozen tokens, and a linear classifier (efficient probing, Psomas et al. 2025).

    Each of Q queries attends to the tokens as they are, without a key projection, and pools its own share of width / Q
    of the projected values; the shares side by side are classified. Projecting after pooling is the same, and cheaper.
    """

    def __init__(self, queries: int, classes: int, mean: torch.Tensor, deviation: torch.Tensor):
        super().__init__()
        width = len(mean)
        self.register_buffer("mean", mean)
        self.register_buffer("deviation", deviation)
        self.queries = nn.Parameter(torch.randn(queries, width) * 0.02)
        self.values = nn.Parameter(torch.randn(queries, width, width // queries) * width**-0.5)
        self.classifier = nn.Linear(width, classes)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B, patches, width) tokens of any float type to (B, classes) logits."""
        tokens = (tokens.float() - self.mean) / self.deviation
        attention = torch.softmax(tokens @ self.queries.T * tokens.shape[-1] ** -0.5, dim=1)  # (B, patches, Q)
        pooled = attention.transpose(1, 2) @ tokens  # (B, Q, width)
        shares = torch.einsum("bqw,qwv->bqv", pooled, self.values)
        return self.classifier(shares.flatten(1))


def tokens_on_disk(
    model: ViTModel, batches: GalaxyBatches, rows: np.ndarray, folder: Path, bf16: bool = False
) -> np.ndarray:
    """The patch tokens of `rows`, (M, patches, width) float16, as a memory map of a file in `folder`.

    On disk, because those of Galaxy10 take 3.5 GB.
    """
    path = folder / "tokens.npy"
    shape = (len(rows), (model.config.image_size // model.config.patch_size) ** 2, model.config.hidden_size)
    with path.open("wb") as out:  # written, not memory-mapped: a full disk is then an error that can be told
        np.lib.format.write_array_header_1_0(out, {"descr": "<f2", "fortran_order": False, "shape": shape})
        for tokens in encode(model, batches, rows, bf16):
            out.write(tokens[:, 1:].half().cpu().numpy().data)
    return np.load(path, mmap_mode="r")


def attention_probe(
    train: Examples, validation: Examples, queries: int, seed: int, device: torch.device | str = "cpu"
) -> Probe:
    """Train an `AttentionPool`; its learning rate and its epoch are chosen on validation rows.

    Args:
        train, validation: (M, patches, width) tokens and classes.
        queries: a divisor of the width.
        seed: of weights and order.
        device: where it is trained.
    """
    tried: dict[str, float] = {}
    best: tuple[float, dict, nn.Module] | None = None
    for rate in ATTENTION_RATES:
        for epoch, accuracy, model in _attention_epochs(train, validation, queries, rate, seed, device):
            tried[f"{rate:g}"] = max(accuracy, tried.get(f"{rate:g}", 0.0))
            if best is None or accuracy > best[0]:
                best = accuracy, {"learning_rate": rate, "epoch": epoch}, copy.deepcopy(model)
    accuracy, chosen, model = best
    return Probe(
        lambda tokens: torch.softmax(_logits(model, tokens, device), dim=1).double().numpy(),
        chosen | {"validation_accuracy": accuracy, "tried": tried},
    )


def _attention_epochs(
    train: Examples, validation: Examples, queries: int, rate: float, seed: int, device: torch.device | str
) -> Iterator[tuple[int, float, AttentionPool]]:
    """Yield (epoch, validation accuracy, model) after every epoch of a training."""
    torch.manual_seed(seed)
    mean, deviation = _token_statistics(train.features)
    model = AttentionPool(queries, int(train.label.max()) + 1, mean, deviation).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    steps = ATTENTION_EPOCHS * -(-len(train.label) // ATTENTION_BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    for epoch in range(1, ATTENTION_EPOCHS + 1):
        for rows in torch.randperm(len(train.label)).split(ATTENTION_BATCH):
            tokens = torch.from_numpy(train.features[rows.numpy()]).to(device)
            loss = F.cross_entropy(model(tokens), torch.from_numpy(train.label[rows.numpy()]).to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        predicted = _logits(model, validation.features, device).argmax(dim=1).numpy()
        yield epoch, float(np.mean(predicted == validation.label)), model


def _token_statistics(tokens: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of each channel over all tokens: (width,) float32 each."""
    sums = np.zeros((2, tokens.shape[2]))
    for start in range(0, len(tokens), 256):
        slab = tokens[start : start + 256].astype(np.float64)
        sums += slab.sum(axis=(0, 1)), (slab**2).sum(axis=(0, 1))
    mean, square = sums / (tokens.shape[0] * tokens.shape[1])
    variance = (square - mean**2).clip(0)
    return torch.tensor(mean, dtype=torch.float32), torch.tensor(np.sqrt(variance) + 1e-6, dtype=torch.float32)


@torch.no_grad()
def _logits(model: AttentionPool, tokens: np.ndarray, device: torch.device | str) -> torch.Tensor:
    """(M, classes) float32 on the CPU."""
    slabs = (np.array(tokens[start : start + 1024]) for start in range(0, len(tokens), 1024))
    return torch.cat([model(torch.from_numpy(slab).to(device)).cpu() for slab in slabs])

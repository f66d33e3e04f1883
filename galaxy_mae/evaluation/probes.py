"""Probes: simple classifiers of frozen features.

Each classifier is fitted on the training set and, where it has something to select, selects by its accuracy on the
validation set. No function here uses a test label.
"""

import copy
import logging
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import broadcast_object_list
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier, NearestCentroid
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, TrainerCallback

from galaxy_mae.data.batches import GalaxyBatches
from galaxy_mae.data.cache import Galaxies
from galaxy_mae.errors import UserError
from galaxy_mae.evaluation.features import encode, mean_pool
from galaxy_mae.model.encoder import load_encoder
from galaxy_mae.model.mae import encoder_of
from galaxy_mae.training.arguments import ONLINE_PROBES
from galaxy_mae.training.pretraining import PretrainingTrainer

logger = logging.getLogger(__name__)

# Inverse strengths of the L2 penalty, scikit-learn's C, from strong to weak, half a decade apart.
C_GRID = tuple(float(c) for c in np.geomspace(1e-4, 1e1, 11))
COARSE_C_GRID = (0.01, 0.1, 1.0)  # to compare features; the weakest penalties take most of the time
ONLINE_C = (0.1,)  # of the linear probe during a training: the sweep over C takes longer than an epoch
ONLINE_SAMPLE = 2_000  # galaxies at most of the training and of the validation set that are probed then
NUM_NEIGHBORS = 20
ATTENTION_LEARNING_RATES = (3e-3, 1e-2)
ATTENTION_EPOCHS = 30
ATTENTION_BATCH_SIZE = 256

# BLAS takes a thread for every core that it sees, also for cores that other jobs have. Waiting for one another, these
# are ten times as slow as one thread, or worse (docs/log.md). Their number also changes the last digits of a result.
_one_blas_thread = threadpool_limits.wrap(limits=1, user_api="blas")


@dataclass(frozen=True)
class FeaturesAndLabels:
    """What a probe learns or selects from: (M, ...) float features of M galaxies and their (M,) int64 classes."""

    features: np.ndarray
    label: np.ndarray


@dataclass(frozen=True)
class Probe:
    """A fitted classifier of frozen features."""

    probabilities: Callable[[np.ndarray], np.ndarray]  # (M, ...) features to (M, classes) float64
    best_params: dict  # the selected hyper-parameters, and the scores by which they were selected


@_one_blas_thread
def linear_probe(train: FeaturesAndLabels, validation: FeaturesAndLabels, c_grid: Sequence[float] = C_GRID) -> Probe:
    """Multinomial logistic regression on standardized features, with the L2 penalty selected on the validation set.

    scikit-learn's L-BFGS from the strongest penalty to weaker ones, the increasing values of C in `c_grid`, each fit
    started from the weights of the last. It ends when three penalties in a row did not improve the validation accuracy.
    The stronger of equal penalties wins.
    """
    scaler = StandardScaler().fit(train.features)
    x, x_validation = scaler.transform(train.features), scaler.transform(validation.features)
    model = LogisticRegression(max_iter=10_000, warm_start=True)
    scores, best = {}, c_grid[0]
    for c in c_grid:
        model.set_params(C=c).fit(x, train.label)
        scores[c] = float(np.mean(model.predict(x_validation) == validation.label))
        if c == best or scores[c] > scores[best]:
            best, coefficients = c, (model.coef_.copy(), model.intercept_.copy())
        if c_grid.index(c) - c_grid.index(best) >= 3:
            break
    if best == C_GRID[-1]:
        logger.warning("linear probe: the weakest penalty (C=%g) is the best: a weaker one may be better", best)
    model.coef_, model.intercept_ = coefficients
    best_params = {"C": best, "validation_accuracy": scores[best]}
    best_params["validation_scores"] = {f"{c:.3g}": score for c, score in scores.items()}
    return Probe(_one_blas_thread(lambda features: model.predict_proba(scaler.transform(features))), best_params)


@_one_blas_thread
def knn_classifier(train: FeaturesAndLabels) -> Probe:
    """Class fractions among the 20 training galaxies with the largest cosine similarity of standardized features."""
    num_neighbors = min(NUM_NEIGHBORS, len(train.label))
    neighbors = KNeighborsClassifier(num_neighbors, metric="cosine", algorithm="brute")
    model = make_pipeline(StandardScaler(), neighbors).fit(train.features, train.label)
    return Probe(_one_blas_thread(model.predict_proba), {"num_neighbors": num_neighbors})


def nearest_centroid(train: FeaturesAndLabels) -> Probe:
    """The class with the nearest mean of standardized training features, with probability one."""
    with warnings.catch_warnings():  # of channels that are constant, as after a ReLU: they do not matter here
        warnings.filterwarnings("ignore", message="self.within_class_std_dev_ has")
        model = make_pipeline(StandardScaler(), NearestCentroid()).fit(train.features, train.label)
    return Probe(lambda features: np.eye(len(model.classes_))[model.predict(features)], {})


def effective_rank(features: np.ndarray) -> float:
    """RankMe (Garrido et al. 2023, section 3): exp of the entropy of the shares of the singular values of (N, D)."""
    values = np.linalg.svd(features.astype(np.float64), compute_uv=False)
    shares = values / values.sum() + 1e-7
    return float(np.exp(-(shares * np.log(shares)).sum()))


def validation_accuracies(
    encoder: PreTrainedModel,
    batches: GalaxyBatches,
    split: dict[str, np.ndarray],
    label: np.ndarray | None,
    bf16: bool = False,
    c_grid: Sequence[float] = C_GRID,
) -> dict[str, float]:
    """Accuracy of an encoder's frozen features on the validation set, by which the trials of a sweep are compared.

    `split` are sample indices, of which those of test galaxies are not used, and `label` (N,) the classes of all.

    Returns:
        `num_validation_images` and `rankme`, the effective rank; and, if the training set has two classes,
        `linear_probe_accuracy` and `knn_accuracy`.
    """

    def features(part: str) -> np.ndarray:
        return np.concatenate([mean_pool(last) for *_, last in encode(encoder, batches, split[part], bf16)])

    held_out = features("validation")
    accuracies = {"num_validation_images": len(held_out), "rankme": effective_rank(held_out)}
    classes = [] if label is None else np.unique(label[split["train"]])
    if len(classes) < 2:
        return accuracies
    train = FeaturesAndLabels(features("train"), label[split["train"]])
    validation = FeaturesAndLabels(held_out, label[split["validation"]])
    for name, probe in (("linear_probe", linear_probe(train, validation, c_grid)), ("knn", knn_classifier(train))):
        predicted = classes[probe.probabilities(validation.features).argmax(axis=1)]
        accuracies[f"{name}_accuracy"] = float(np.mean(predicted == validation.label))
    return accuracies


def probe_encoder(
    trainer: PretrainingTrainer, folder: Path, galaxies: Galaxies, split: dict[str, np.ndarray]
) -> dict[str, float]:
    """Log and return `validation_accuracies` of the encoder of a pre-training that ends."""
    encoder = load_encoder(str(folder)).model
    accuracies = validation_accuracies(encoder, trainer.batches, split, galaxies.label, trainer.args.bf16)
    metrics = {f"eval_{name}": value for name, value in accuracies.items()}
    trainer.log(dict(metrics))
    if "knn_accuracy" in accuracies:
        count, _, linear, knn = accuracies.values()
        logger.info("%d validation galaxies: linear probe %.1f %%, k-NN %.1f %%", count, 100 * linear, 100 * knn)
    return metrics


class OnlineProbe(TrainerCallback):
    """Adds `validation_accuracies` to the metrics of an evaluation, and to the log, where they are due.

    During a training the loss says little: it falls on while features get worse. All processes must agree on the best
    checkpoint, so the main one probes.

    Raises:
        UserError: no two classes, and the best checkpoint was to be found by a probe.
    """

    def __init__(self, trainer: PretrainingTrainer, galaxies: Galaxies, split: dict[str, np.ndarray]):
        self.trainer, self.label = trainer, galaxies.label
        self.decides = trainer.args.metric_for_best_model in ONLINE_PROBES
        has_classes = galaxies.label is not None and len(np.unique(galaxies.label[split["train"]])) > 1
        if self.decides and not has_classes:
            metric = trainer.args.metric_for_best_model
            raise UserError(f"--metric_for_best_model {metric}: {galaxies.name} has no two classes; use loss")
        train = np.random.default_rng(0).permutation(split["train"])[:ONLINE_SAMPLE]
        self.sample = {"train": np.sort(train), "validation": split["validation"][:ONLINE_SAMPLE]}

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        """Probe, if it is due."""
        if self._is_due(state):
            (accuracies,) = broadcast_object_list([self._probe() if state.is_world_process_zero else None])
            metrics.update(accuracies)
            self.trainer.log(dict(accuracies))

    def _is_due(self, state) -> bool:
        """Before the first step, and when enough epochs have passed since the last probe in the log of the run."""
        if self.decides:
            return True
        every = self.trainer.options.probe_every
        probed = [entry["epoch"] for entry in state.log_history if "eval_online_rankme" in entry]
        passed = (state.epoch or 0) - probed[-1] if probed else math.inf
        return every > 0 and passed > every - 1e-6

    def _probe(self) -> dict[str, float]:
        trainer = self.trainer
        encoder = encoder_of(trainer.unwrapped_model)
        found = validation_accuracies(encoder, trainer.batches, self.sample, self.label, trainer.args.bf16, ONLINE_C)
        return {f"eval_online_{name}": value for name, value in found.items() if name != "num_validation_images"}


class AttentionPool(nn.Module):
    """Learned queries that pool frozen tokens, and a linear classifier (efficient probing, Psomas et al. 2025).

    Each of Q queries attends to the tokens as they are, without a key projection, and pools its own hidden size / Q
    channels of the projected values. The concatenated channels are classified. Projecting after pooling gives the same
    result at a lower cost.
    """

    def __init__(self, queries: int, classes: int, mean: torch.Tensor, std: torch.Tensor):
        super().__init__()
        hidden_size = len(mean)
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)
        self.queries = nn.Parameter(torch.randn(queries, hidden_size) * 0.02)
        self.values = nn.Parameter(torch.randn(queries, hidden_size, hidden_size // queries) * hidden_size**-0.5)
        self.classifier = nn.Linear(hidden_size, classes)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B, patches, hidden size) tokens of any float type to (B, classes) logits."""
        tokens = (tokens.float() - self.mean) / self.std
        attention = torch.softmax(tokens @ self.queries.T * tokens.shape[-1] ** -0.5, dim=1)  # (B, patches, Q)
        pooled = attention.transpose(1, 2) @ tokens  # (B, Q, hidden size)
        channels = torch.einsum("bqw,qwv->bqv", pooled, self.values)
        return self.classifier(channels.flatten(1))


def attention_queries(config: PreTrainedConfig, channels: int) -> int:
    """Queries for a backbone's tokens: as many as attention heads, if it has them, or the largest divisor up to 12."""
    heads = getattr(config, "num_attention_heads", None)
    if isinstance(heads, int) and channels % heads == 0:
        return heads
    return max(q for q in range(1, 13) if channels % q == 0)


def attentive_probe(
    train: FeaturesAndLabels,
    validation: FeaturesAndLabels,
    queries: int,
    seed: int,
    device: torch.device | str = "cpu",
) -> Probe:
    """Train an `AttentionPool`, with the learning rate and the epoch selected on the validation set.

    Features are (M, patches, hidden size) tokens, `queries` divides the hidden size, `seed` is of weights and order.
    """
    (mean, std), classes = _token_statistics(train.features), int(train.label.max()) + 1
    steps = ATTENTION_EPOCHS * -(-len(train.label) // ATTENTION_BATCH_SIZE)
    scores, best, best_params, best_model = {}, -1.0, {}, None
    for rate in ATTENTION_LEARNING_RATES:
        torch.manual_seed(seed)
        model = AttentionPool(queries, classes, mean, std).to(device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
        for epoch in range(1, ATTENTION_EPOCHS + 1):
            for batch in torch.randperm(len(train.label)).split(ATTENTION_BATCH_SIZE):
                tokens = torch.from_numpy(train.features[batch.numpy()]).to(device)
                loss = F.cross_entropy(model(tokens), torch.from_numpy(train.label[batch.numpy()]).to(device))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
            predicted = _logits(model, validation.features, device).argmax(dim=1).numpy()
            accuracy = float(np.mean(predicted == validation.label))
            scores[f"{rate:g}"] = max(accuracy, scores.get(f"{rate:g}", 0.0))
            if accuracy > best:
                best, best_params, best_model = accuracy, {"learning_rate": rate, "epoch": epoch}, copy.deepcopy(model)
    return Probe(
        lambda tokens: torch.softmax(_logits(best_model, tokens, device), dim=1).double().numpy(),
        best_params | {"validation_accuracy": best, "validation_scores": scores},
    )


def _token_statistics(tokens: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and std of each channel over all tokens: (hidden size,) float32 each."""
    sums = np.zeros((2, tokens.shape[2]))
    for start in range(0, len(tokens), 256):
        chunk = tokens[start : start + 256].astype(np.float64)
        sums += chunk.sum(axis=(0, 1)), (chunk**2).sum(axis=(0, 1))
    mean, square = sums / (tokens.shape[0] * tokens.shape[1])
    variance = (square - mean**2).clip(0)
    return torch.tensor(mean, dtype=torch.float32), torch.tensor(np.sqrt(variance) + 1e-6, dtype=torch.float32)


@torch.no_grad()
def _logits(model: AttentionPool, tokens: np.ndarray, device: torch.device | str) -> torch.Tensor:
    """(M, classes) float32 on the CPU."""
    chunks = (np.array(tokens[start : start + 1024]) for start in range(0, len(tokens), 1024))
    return torch.cat([model(torch.from_numpy(chunk).to(device)).cpu() for chunk in chunks])

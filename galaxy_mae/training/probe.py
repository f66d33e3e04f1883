"""Probes of the frozen features during the training, because the loss says little: it falls on while they get worse."""

import math
from collections.abc import Callable

import numpy as np
from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback

from galaxy_mae.data.cache import Galaxies
from galaxy_mae.errors import UserError
from galaxy_mae.model.mae import encoder_of
from galaxy_mae.training.arguments import ONLINE_PROBES
from galaxy_mae.training.pretraining import PretrainingTrainer

ONLINE_C = (0.1,)  # of the linear probe: the sweep over C takes longer than an epoch
_RANK = "eval_online_rankme"
PROBE_SAMPLE = 2_000  # galaxies at most of the training and of the validation set


class OnlineProbe(TrainerCallback):
    """Adds accuracies on validation galaxies to the metrics of an evaluation, and to the log, where they are due.

    Without two classes it is the effective rank alone. All processes must agree on the best checkpoint, so the main one
    probes.
    `accuracies` is `evaluation.probes.validation_accuracies`.

    Raises:
        UserError: no two classes, and the best checkpoint was to be found by a probe.
    """

    def __init__(
        self,
        trainer: PretrainingTrainer,
        galaxies: Galaxies,
        split: dict[str, np.ndarray],
        accuracies: Callable[..., dict[str, float]],
    ):
        self.trainer, self.label, self.accuracies = trainer, galaxies.label, accuracies
        self.decides = trainer.args.metric_for_best_model in ONLINE_PROBES
        has_classes = galaxies.label is not None and len(np.unique(galaxies.label[split["train"]])) > 1
        if self.decides and not has_classes:
            metric = trainer.args.metric_for_best_model
            raise UserError(f"--metric_for_best_model {metric}: {galaxies.name} has no two classes; use loss")
        train = np.random.default_rng(0).permutation(split["train"])[:PROBE_SAMPLE]
        self.sample = {"train": np.sort(train), "validation": split["validation"][:PROBE_SAMPLE]}

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
        probed = [entry["epoch"] for entry in state.log_history if _RANK in entry]
        passed = (state.epoch or 0) - probed[-1] if probed else math.inf
        return every > 0 and passed > every - 1e-6

    def _probe(self) -> dict[str, float]:
        trainer = self.trainer
        encoder = encoder_of(trainer.unwrapped_model)
        found = self.accuracies(encoder, trainer.batches, self.sample, self.label, trainer.args.bf16, ONLINE_C)
        return {f"eval_online_{name}": value for name, value in found.items() if name != "num_validation_images"}

"""Stop at a signal without losing a step: what makes a run safe on a cluster that takes its machines back.

Slurm says that a job must go, by USR1 (some time before the limit, as the wrappers ask for it) or TERM (preemption,
requeue). A training then finishes its step, writes a checkpoint and exits with a status that means "start me again"; in
several processes all of them at the same step. Outside a training the process exits at once: whatever is written
appears whole or not at all, so nothing is lost but the time since the work was begun.
"""

import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed
from transformers import TrainerCallback

logger = logging.getLogger(__name__)

START_AGAIN = 75  # exit status; EX_TEMPFAIL of sysexits.h: "the user is invited to retry"
SIGNALS = (signal.SIGUSR1, signal.SIGTERM)

_training = False
_signalled: signal.Signals | None = None


def listen() -> None:
    """From now on, stop at USR1 and TERM as this module says; to be called by the main thread."""
    for number in SIGNALS:
        signal.signal(number, _note)


@contextmanager
def may_fail_at_a_signal() -> Iterator[None]:
    """What is done within may fail once this process was signalled: Slurm ends all of a job's processes, W&B's too."""
    try:
        yield
    except Exception:
        if _signalled is None:
            raise


def ignore_in_worker(initialise: Callable[[int], None] | None, worker: int) -> None:
    """A loader's worker lives as long as its training: Slurm's TERM reaches it too, and must not end it in mid-step.

    Args:
        initialise: the loader's own `worker_init_fn`.
        worker: its number.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if initialise is not None:
        initialise(worker)


def _note(number: int, frame: object) -> None:
    global _signalled
    first, _signalled = _signalled is None, signal.Signals(number)
    if first and not _training:  # a second one must not disturb the leaving
        sys.exit(START_AGAIN)


class StopAtSignal(TrainerCallback):
    """Ends a training after the step in which any of its processes was signalled, with a checkpoint of that step."""

    def __init__(self) -> None:
        self.group: torch.distributed.ProcessGroup | None = None
        self.stopping = False

    def on_train_begin(self, args, state, control, **kwargs):
        """From here on a signal waits for the end of a step."""
        global _training, _signalled
        _training, _signalled, self.stopping = True, None, False
        if args.world_size > 1 and self.group is None:
            # On the CPU: asking the GPUs after each step would make them wait for the host.
            self.group = torch.distributed.new_group(backend="gloo")

    def on_step_end(self, args, state, control, **kwargs):
        """Ask all processes whether one of them was signalled; at the end of an epoch, `on_epoch_end` does."""
        if not float(state.epoch).is_integer():
            self._stop_if_signalled(control)

    def on_epoch_end(self, args, state, control, **kwargs):
        """The last step of an epoch is saved only after what else belongs to it, such as an evaluation."""
        self._stop_if_signalled(control)

    def on_save(self, args, state, control, **kwargs):
        """The checkpoint is whole: leave."""
        if self.stopping:
            logger.info("stopped by a signal at step %d, after a checkpoint: start again to go on", state.global_step)
            _leave()

    def _stop_if_signalled(self, control) -> None:
        if self._anyone(_signalled is not None):
            self.stopping = control.should_save = True

    def on_train_end(self, args, state, control, **kwargs):
        """What follows is not a step that a checkpoint could save: a signal ends it at once."""
        global _training
        _training = False
        signalled = self._anyone(_signalled is not None)
        if self.group is not None:
            torch.distributed.destroy_process_group(self.group)
            self.group = None
        if signalled:
            sys.exit(START_AGAIN)

    def _anyone(self, signalled: bool) -> bool:
        if self.group is None:
            return signalled
        flag = torch.tensor([signalled], dtype=torch.uint8)
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX, group=self.group)
        return bool(flag)


def _leave() -> None:
    """Exit; W&B shows the run as preempted, not as crashed, if its process was not ended by the same signal."""
    wandb = sys.modules.get("wandb")
    try:
        if wandb is not None and wandb.run is not None:
            wandb.run.mark_preempting()
    except Exception:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(START_AGAIN)  # W&B's goodbye at a normal exit would be a traceback; all that matters is on disk
    sys.exit(START_AGAIN)

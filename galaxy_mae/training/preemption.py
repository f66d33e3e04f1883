"""Stop at a signal without losing a step, for clusters that preempt jobs.

Slurm sends USR1 some time before the time limit (the wrappers ask for it) or TERM (preemption, requeue). Training
then finishes its step, saves a checkpoint and exits with a status that means "requeue me"; several processes all do so
after the same step. Outside of training the process exits at once: every file is written atomically, so only the
work since the last finished file is lost.
"""

import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed
from transformers import TrainerCallback

from galaxy_mae.errors import EXIT_REQUEUE

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGUSR1, signal.SIGTERM)

_training = False
_signalled: signal.Signals | None = None


def install_signal_handlers() -> None:
    """From now on, stop at USR1 and TERM as described above. Must be called by the main thread."""
    for number in SIGNALS:
        signal.signal(number, _handle_signal)


@contextmanager
def suppress_errors_after_signal() -> Iterator[None]:
    """Ignore errors within the block if this process was signalled: Slurm signals all processes of a job, W&B's too."""
    try:
        yield
    except Exception:
        if _signalled is None:
            raise


def ignore_signals_in_worker(worker: int) -> None:
    """A `worker_init_fn`: Slurm's TERM reaches the loader's workers too, and must not end them within a step."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _handle_signal(number: int, frame: object) -> None:
    global _signalled
    first = _signalled is None
    _signalled = signal.Signals(number)
    if first and not _training:  # a second signal must not disturb the exit
        sys.exit(EXIT_REQUEUE)


class StopAtSignal(TrainerCallback):
    """Ends training after the step in which any of its processes was signalled, with a checkpoint of that step."""

    def __init__(self) -> None:
        self.group: torch.distributed.ProcessGroup | None = None
        self.stopping = False
        self.saved_step: int | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        """From here on a signal takes effect at the end of a step."""
        global _training, _signalled
        _training, _signalled, self.stopping = True, None, False
        if args.world_size > 1 and self.group is None:
            # On the CPU: an all-reduce on the GPUs after each step would make them wait for the host.
            self.group = torch.distributed.new_group(backend="gloo")

    def on_step_end(self, args, state, control, **kwargs):
        """Ask all processes whether one was signalled; at the end of an epoch, `on_epoch_end` does."""
        if not float(state.epoch).is_integer():
            self._stop_if_signalled(control)

    def on_epoch_end(self, args, state, control, **kwargs):
        """The last step of an epoch is saved after the epoch's evaluation, but no complete checkpoint is rewritten."""
        self._stop_if_signalled(control)
        if self.stopping and self.saved_step == state.global_step and not control.should_evaluate:
            _exit_for_requeue(state.global_step)

    def on_save(self, args, state, control, **kwargs):
        """The checkpoint is complete: exit."""
        self.saved_step = state.global_step
        if self.stopping:
            _exit_for_requeue(state.global_step)

    def _stop_if_signalled(self, control) -> None:
        if self._any_rank(_signalled is not None):
            self.stopping = control.should_save = True

    def on_train_end(self, args, state, control, **kwargs):
        """After the last step there is nothing that a checkpoint could save: a signal exits at once."""
        global _training
        _training = False
        signalled = self._any_rank(_signalled is not None)
        if self.group is not None:
            torch.distributed.destroy_process_group(self.group)
            self.group = None
        if signalled:
            sys.exit(EXIT_REQUEUE)

    def _any_rank(self, signalled: bool) -> bool:
        if self.group is None:
            return signalled
        flag = torch.tensor([signalled], dtype=torch.uint8)
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX, group=self.group)
        return bool(flag)


def _exit_for_requeue(step: int) -> None:
    """Exit. W&B shows the run as preempted, not as crashed, unless its process was ended by the same signal."""
    logger.info("stopped by a signal at step %d, after a checkpoint", step)
    wandb = sys.modules.get("wandb")
    try:
        if wandb is not None and wandb.run is not None:
            wandb.run.mark_preempting()
    except Exception:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(EXIT_REQUEUE)  # at a normal exit W&B would print a traceback; everything that matters is on disk
    sys.exit(EXIT_REQUEUE)

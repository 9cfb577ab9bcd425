"""Makes Trainer count rounds, and keeps its counters at the run's step, even after rounds that this node missed."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

from psyche_lightning.lightning.internals import set_fetched, set_steps

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


EACH_ROUND = 1e-9
"""A ``val_check_interval`` that Trainer rounds up to one batch; ModelCheckpoint would take 1 for 1.0, a whole epoch."""


def count_rounds(trainer: Trainer, undo: ExitStack) -> int:
    """Make Trainer count a round where it would count ``accumulate_grad_batches`` of the user's batches.

    Args:
        trainer: its loop over batches gets whole rounds; what counts batches is rounded up to rounds.
        undo: restores the user's values.

    Returns:
        The user's ``accumulate_grad_batches``.
    """
    batches = trainer.accumulate_grad_batches

    def replace(name: str, value: object) -> None:
        undo.callback(setattr, trainer, name, getattr(trainer, name))
        setattr(trainer, name, value)

    replace("accumulate_grad_batches", 1)
    if batches > 1 and isinstance(count := trainer.limit_train_batches, int):
        replace("limit_train_batches", -(-count // batches))
    if batches > 1 and isinstance(count := trainer.val_check_interval, int):
        replace("val_check_interval", -(-count // batches) if count > batches else EACH_ROUND)
    return batches


class RunProgress:
    """Moves Trainer to a step of the run.

    With others, a Lightning epoch is one pass of the whole run over the data. Alone, Trainer's own count of epochs
    leads: one may end early, and a second fit may have other data.

    Args:
        trainer: its counters, schedulers and progress bar follow the run.
        alone: whether the run is this Trainer's own. Otherwise its schedulers begin with the run's first step, even if
            the Trainer has made steps before.
    """

    def __init__(self, trainer: Trainer, alone: bool) -> None:
        self._trainer = trainer
        self._length = int(trainer.num_training_batches)
        self._scheduled = trainer.global_step if alone else 0  # the last step after which schedulers stepped
        self._alone = alone
        self._origin = (0, 0)  # an epoch, and the steps done before it

    def start_epoch(self, step: int) -> None:
        """Note that Trainer's current epoch goes on with ``step``."""
        if self._alone:
            trained = self._trainer.fit_loop.epoch_loop.batch_progress.current.ready
            self._origin = (self._trainer.current_epoch, step - 1 - trained)

    def _place(self, done: int) -> tuple[int, int]:
        """The epoch after so many steps, and the index of its next round."""
        epoch, before = self._origin
        passed, index = divmod(done - before, self._length)
        return epoch + passed, index

    def begin(self, step: int) -> None:
        """Set all counters to the moment before ``step``, before Trainer's loop starts."""
        done = step - 1
        passed, _ = self._place(done)
        for progress in (self._trainer.fit_loop.epoch_progress.current, self._trainer.fit_loop.epoch_progress.total):
            progress.ready = progress.started = progress.processed = progress.completed = passed  # type: ignore[attr-defined]
        self._step_schedulers(step)
        self._count(done, 0)

    def enter(self, step: int, fresh: bool) -> bool:
        """Set all counters to the moment before ``step``.

        Args:
            step: step of the run, from 1.
            fresh: whether this Lightning epoch has trained nothing yet, so that another may replace it.

        Returns:
            False when the step is outside this Lightning epoch or after Trainer's last step: the epoch must end.
        """
        trainer, fit_loop = self._trainer, self._trainer.fit_loop
        done = step - 1
        epoch, index = self._place(done)
        if epoch != trainer.current_epoch and not fresh:
            return False
        if -1 < trainer.max_steps < step:
            self._count(done, index)
            return False
        if epoch != trainer.current_epoch:
            last = trainer.max_epochs is not None and -1 < trainer.max_epochs <= epoch
            passed = epoch - 1 if last else epoch
            for progress in (fit_loop.epoch_progress.current, fit_loop.epoch_progress.total):
                progress.ready = progress.started = passed + 1  # type: ignore[attr-defined]
                progress.processed = progress.completed = passed  # type: ignore[attr-defined]
            if last:
                return False
        self._step_schedulers(step)
        self._count(done, index)
        return True

    def end(self, done: int) -> None:
        """Set all counters to the end of the run; this node may have missed its last steps."""
        if done > self._trainer.global_step:
            self._step_schedulers(done + 1)
            self._count(done, self._trainer.fit_loop.epoch_loop.batch_progress.current.ready)

    def _count(self, done: int, index: int) -> None:
        loop = self._trainer.fit_loop.epoch_loop
        steps = loop.automatic_optimization.optim_progress.optimizer.step
        for total, current in ((steps.total, steps.current), (loop.batch_progress.total, loop.batch_progress.current)):
            for counter, value in ((total, done), (current, index)):
                for name in vars(counter):
                    setattr(counter, name, value)
        set_steps(self._trainer, done)
        set_fetched(self._trainer, index)

    def _step_schedulers(self, step: int) -> None:
        """Step the schedulers for each step that this node missed; Trainer itself does so after one that it makes."""
        module = self._trainer.lightning_module
        last = min(self._scheduled, self._trainer.global_step)  # a round that lost its samples made no step
        for missed in range(last + 1, step):
            epoch, index = self._place(missed - 1)
            for config in self._trainer.lr_scheduler_configs:
                ended = index + 1 if config.interval == "step" else epoch + 1
                due = not config.reduce_on_plateau and (config.interval == "step" or index == self._length - 1)
                if due and ended % config.frequency == 0:
                    module.lr_scheduler_step(config.scheduler, None)
        self._scheduled = step

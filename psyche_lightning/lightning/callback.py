"""Connects a Trainer with its run, when the fit begins and after each step."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from psyche_lightning.errors import ConfigError, counted
from psyche_lightning.lightning.collectives import RUN_LOSS, monitored

if TYPE_CHECKING:
    from psyche_lightning.lightning.session import Session


class CoordinatorCallback(Callback):
    """Joins the run, stops Trainer when it is over, and logs its figures. The strategy adds it if the user does not.

    The strategy moves it before all callbacks but those that search for a learning rate or a batch size, so that the
    others see the run's parameters from the beginning.

    It logs ``psyche/gradient_norm``, ``psyche/momentum_norm`` and ``psyche/agreement`` (the share of this node's votes
    that the others share; with ``/0``, ``/1`` for several parameter groups), ``psyche/clients``, ``psyche/epoch`` and
    ``psyche/round`` (the coordinator's), ``psyche/bytes_up`` and ``psyche/bytes_down`` (at this node's sockets since it
    joined), ``psyche/waiting`` (seconds that it waited), and ``psyche/loss``: the run's training loss in the newest
    applied round, the median of the nodes' losses, which all nodes know. A callback or a scheduler that monitors it
    decides the same on all nodes that trained the same rounds; it is then logged at each step, with its mean at the end
    of an epoch.

    Args:
        log_every: steps between figures; None for Trainer's ``log_every_n_steps``, 0 to log none.

    Raises:
        ConfigError: ``log_every`` is not a whole number >= 0.
    """

    def __init__(self, log_every: int | None = None) -> None:
        if log_every is not None and (type(log_every) is not int or log_every < 0):
            raise ConfigError(f"log_every is {log_every!r}; expected a whole number from 0, or None for Trainer's")
        self.log_every = log_every
        self._monitored = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Join the run."""
        begin = getattr(trainer.strategy, "begin", None)
        if begin is not None:
            begin()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look who monitors the run's loss."""
        self._monitored = monitored(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Have the figures of a step computed that is to be logged."""
        session = self._session(trainer)
        if session is not None and self.log_every != 0:
            session.observe(trainer.global_step + 1, partial(self._due, trainer))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Check the run after each step."""
        session = self._session(trainer)
        if session is None:
            return
        if self._monitored and session.run_loss is not None:
            pl_module.log(RUN_LOSS, session.run_loss, on_step=True, on_epoch=True, batch_size=1)
        if self._due(trainer, trainer.global_step):
            of_step = {f"psyche/{name}": value for name, value in session.step_figures().items()}
            for name, value in {**session.figures(), **of_step}.items():
                if name == RUN_LOSS and self._monitored:
                    continue
                pl_module.log(name, value, on_step=True, on_epoch=False, batch_size=1)
        trainer.strategy.stop_if_finished()  # type: ignore[attr-defined]

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tell the coordinator the validation loss that the module logs, for people."""
        session, found = self._session(trainer), trainer.callback_metrics
        loss = found.get("val_loss", found.get("validation_loss"))
        if session is not None and loss is not None and not trainer.sanity_checking:
            session.measured(trainer.global_step, {"validation_loss": float(loss)})

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note whether the module skipped the rest of the epoch.

        Raises:
            ConfigError: it did so in a run with others.
        """
        end_epoch = getattr(trainer.strategy, "end_epoch", None)
        if end_epoch is not None:
            end_epoch()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a fit that trained nothing, because this Trainer's limits were reached before it began.

        Raises:
            ConfigError: no round was asked for.
        """
        if self._session(trainer) is None and trainer.limit_train_batches != 0:
            raise ConfigError(
                f"this fit trained nothing: the Trainer has made {counted(trainer.global_step, 'step')} in "
                f"{counted(trainer.current_epoch, 'epoch')} already, and its limits are max_steps={trainer.max_steps}, "
                f"max_epochs={trainer.max_epochs}, and max_time if you set it. Make a new Trainer, or raise the limit."
            )

    def _due(self, trainer: Trainer, step: int) -> bool:
        every: int = trainer.log_every_n_steps if self.log_every is None else self.log_every  # type: ignore[attr-defined]
        return every > 0 and step % every == 0

    def _session(self, trainer: Trainer) -> Session | None:
        session: Session | None = getattr(trainer.strategy, "session", None)
        return session

"""``Fabric(strategy="psyche")``: the user's own training loop, in which each batch is a node's share of a round."""

from __future__ import annotations

import atexit
import contextlib
import logging
import math
import os
import signal
import statistics
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property
from typing import Any

import torch
from lightning.fabric.accelerators.accelerator import Accelerator
from lightning.fabric.plugins import CheckpointIO, Precision
from lightning.fabric.strategies.single_device import SingleDeviceStrategy
from torch.nn import Module
from torch.optim import Optimizer

from psyche_lightning.errors import ConfigError, DataError
from psyche_lightning.lightning.collectives import LocalCollectives
from psyche_lightning.lightning.device import OneDevice
from psyche_lightning.lightning.entry import Entry
from psyche_lightning.lightning.loader import WITHOUT_A_BATCH, RoundLoader, check_loader
from psyche_lightning.lightning.manifest import sections
from psyche_lightning.lightning.optimizers import TakenStep
from psyche_lightning.lightning.session import Session
from psyche_lightning.lightning.supported import check_precision
from psyche_lightning.node.notices import Finished
from psyche_lightning.node.participant import RoundWork
from psyche_lightning.protocol.state import CoordinatorConfig
from psyche_lightning.recipe.options import RunOptions

logger = logging.getLogger(__name__)


class PsycheFabricStrategy(OneDevice, LocalCollectives, SingleDeviceStrategy):
    """One node of a run, for your own training loop.

    The first DataLoader that you set up is the one for training: iterating over it yields this node's share of each
    round in turn, for one pass of the whole run over the data, and ends early when the run does (:attr:`finished`
    says why). Each batch needs one ``optimizer.step()``, which submits the update and applies the agreed one. The node
    leaves the run when the process ends, or by :meth:`close`.

    With local steps, a share comes as one batch for each of them, and ``optimizer.step()`` makes the optimizer's own
    step; the last one of a share also submits and applies. In between, the module has this node's own parameters.

    With look-ahead, the module has the looked-ahead parameters from the moment the loader yields a batch to the
    optimizer's step; save and validate between a step and the next batch.

    All options but the first two are keyword-only. An omitted option that all nodes share (``overlap`` to
    ``total_steps``) takes the run's value, or the default if the run has none.

    Args:
        coordinator: URL of the coordinator; ``PSYCHE_COORDINATOR`` by default. Without one, the process trains alone.
        run: the run's name; ``PSYCHE_RUN`` by default. Give it with ``coordinator``, or give neither.
        overlap: whether results travel while the next round computes and are applied one round later.
        seed: seed of the data order.
        digest_every: rounds between digests of the parameters, which show nodes that theirs differ.
        keep_bytes: bytes of agreed payloads that nodes keep so that others can catch up; beyond it they take a new
            snapshot. 0 for the size of the parameters, but at least 64 MiB.
        cold_start_warmup_steps: steps over which learning rates rise again in the epoch after a pause; 0 for none.
        shares: ``speed`` or ``equal``: whether slower nodes get smaller shares of a round's samples.
        chunk: side of DisTrO's chunks: 8, 16, 32 or 64.
        k: coefficients sent per chunk; from 1 to a quarter of the chunk's area, and at most 128.
        decay: factor on delta before a gradient is added, 0 to 1.
        removal: fraction of the sent component to subtract from delta, 0 to 1.
        lookahead: whether gradients come from a copy ahead of the published parameters.
        k_for: another k for parameters whose names match a pattern (``{"*embed*": 2}``); the first match counts.
        float32_gradients: whether micro-batch gradients of lower-precision parameters accumulate in float32.
        local_steps: steps of the module's own optimizer in each round, before nodes exchange where they lead; 0 for
            DisTrO's form.
        scale: with local steps, the factor on the mean of what nodes send.
        schedule: other values of ``k`` and ``local_steps`` from given steps of the run on:
            ``[{"from_step": 0, "k": 96}, {"from_step": 200, "k": 6}]``.
        global_batch_size: samples of a round of the whole run, if the run leaves it to its first node; by default
            those of one node's DataLoader, times the run's ``init_min_clients``.
        total_steps: the run's last step, if the run leaves it to its first node; by default Trainer's.
        transport: how nodes reach each other; ``psyche plugins`` lists the choices.
        transport_options: the transport's options, such as ``{"host": "0.0.0.0", "advertise": "10.0.0.7"}``.
        directory: folder for the node's key, promises and payloads, so that a killed node can come back; one
            per node. None keeps them in memory.
        patience: longest wait for a round, in seconds.
        config: sizes of a run of this process alone; None for those of the DataLoader (and Trainer).
        start: for a run of this process alone: steps already trained, and the first data id that follows.
        manifest: manifest sections that replace those made from the module and its data.
        tokens_per_sample: tokens per sample in displayed figures.
        accelerator: as in Lightning's strategies.
        checkpoint_io: as in Lightning's strategies.
        precision: as in Lightning's strategies.

    Attributes:
        options: the given options, completed from the environment.
        session: this node's membership in the run, even after it ends; None before the loader is iterated over.

    Raises:
        ConfigError: an option is wrong, or only one of coordinator and run is known.
    """

    owner = "Fabric"

    def __init__(
        self,
        coordinator: str | None = None,
        run: str | None = None,
        *,
        overlap: bool | None = None,
        seed: int | None = None,
        digest_every: int | None = None,
        keep_bytes: int | None = None,
        cold_start_warmup_steps: int | None = None,
        shares: str | None = None,
        chunk: int | None = None,
        k: int | None = None,
        decay: float | None = None,
        removal: float | None = None,
        lookahead: bool | None = None,
        k_for: Mapping[str, int] | None = None,
        float32_gradients: bool | None = None,
        local_steps: int | None = None,
        scale: float | None = None,
        schedule: Sequence[Mapping[str, int]] | None = None,
        global_batch_size: int | None = None,
        total_steps: int | None = None,
        transport: str = "tcp",
        transport_options: Mapping[str, Any] | None = None,
        directory: str | os.PathLike[str] | None = None,
        patience: float = 24 * 3600.0,
        config: CoordinatorConfig | None = None,
        start: tuple[int, int] | None = None,
        manifest: Mapping[str, Mapping[str, Any]] | None = None,
        tokens_per_sample: int = 1,
        accelerator: Accelerator | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision: Precision | None = None,
    ) -> None:
        self.options = RunOptions(
            coordinator=coordinator,
            run=run,
            overlap=overlap,
            seed=seed,
            digest_every=digest_every,
            keep_bytes=keep_bytes,
            cold_start_warmup_steps=cold_start_warmup_steps,
            shares=shares,
            chunk=chunk,
            k=k,
            decay=decay,
            removal=removal,
            lookahead=lookahead,
            k_for=k_for,
            float32_gradients=float32_gradients,
            local_steps=local_steps,
            scale=scale,
            schedule=schedule,
            global_batch_size=global_batch_size,
            total_steps=total_steps,
            transport=transport,
            transport_options=transport_options or {},
            directory=directory,
            patience=patience,
            config=config,
            start=start,
            manifest=manifest or {},
            tokens_per_sample=tokens_per_sample,
        ).in_environment()
        super().__init__("cpu", accelerator, checkpoint_io, precision)
        self._step: TakenStep | None = None
        self._loader: RoundLoader | None = None
        self.session: Session | None = None
        self._ahead = ExitStack()
        self._losses: list[float] = []  # of the steps of the current round
        self._told = False

    @cached_property
    def _entry(self) -> Entry:
        """The run's fixed values; the first access queries the run."""
        return Entry(self.options)

    # --- set-up -----------------------------------------------------------------------------------------------------

    def setup_module_and_optimizers(
        self, module: Module, optimizers: list[Optimizer], scheduler: Any = None
    ) -> tuple[Module, list[Optimizer], Any]:
        """Called by ``fabric.setup(module, optimizer)``; queries the run and replaces the optimizer's step."""
        if len(optimizers) != 1 or self._step is not None:
            raise ConfigError(
                "the strategy 'psyche' trains one module with one optimizer (which may have several parameter groups): "
                "fabric.setup(module, optimizer), once"
            )
        check_precision(getattr(self.precision, "scaler", None), self._entry.distro)
        self._step = TakenStep(optimizers[0], module, self._entry.distro)
        self._step.keep_with_optimizer()
        return module, optimizers, scheduler

    def setup_optimizer(self, optimizer: Optimizer) -> Optimizer:
        """Always fails: a run needs the module, which names the optimizer's parameters.

        Raises:
            ConfigError: always.
        """
        raise ConfigError("the strategy 'psyche' needs module and optimizer together: fabric.setup(module, optimizer)")

    def process_dataloader(self, dataloader: Any) -> Any:
        """Called by ``fabric.setup_dataloaders``; the run feeds the first loader, the others stay unchanged."""
        if self._loader is not None:
            return dataloader
        self._loader = loader = RoundLoader(
            dataloader,
            self._entry.global_batch(check_loader(dataloader)),
            self._entry.run.seed,
            lambda: self._rounds(loader),
            split=False,
            decline=self._decline,
            upcoming=lambda: None if self.session is None else self.session.upcoming(),
            steps=self._entry.steps,
        )
        return loader

    def _join(self, loader: RoundLoader) -> Session:
        step = self._set_up
        made = sections(step, loader.order)
        session = Session(self._entry, step, made, global_batch=loader.global_batch, total_steps=None)
        try:
            session.start()
        except BaseException:
            session.close()
            raise
        self.session = session
        atexit.register(self.close)
        default = signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        if default and threading.current_thread() is threading.main_thread():
            # Fabric ignores signals, and the default action would not notify the coordinator.
            signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
        return session

    @property
    def _set_up(self) -> TakenStep:
        """The module with its optimizer.

        Raises:
            ConfigError: they are not set up.
        """
        if self._step is None:
            raise ConfigError("set up module and optimizer before training: fabric.setup(module, optimizer)")
        return self._step

    # --- rounds -----------------------------------------------------------------------------------------------------

    @property
    def finished(self) -> Finished | None:
        """How the run ended for this node; None until it ends."""
        return None if self.session is None else self.session.finished

    def _rounds(self, loader: RoundLoader) -> Iterator[RoundWork]:
        """The rounds of one pass over the data."""
        session, step = self.session or self._join(loader), self._set_up
        if session.finished is not None and not self._told:
            self._told = True
            logger.warning("run %r is over: the loader has no more batches", self._entry.run_id)
        passes: int | None = None
        while True:
            self._published()
            work = session.peek()
            if work is None:
                session.close()
                return
            now = (work.step - 1) // len(loader)
            if passes not in (None, now):
                return
            passes = now
            session.take()
            step.reset()
            self._losses.clear()
            self._ahead.enter_context(step.looking_ahead())
            self._ahead.enter_context(step.working())
            yield work

    def _decline(self, work: RoundWork, error: DataError) -> None:
        self._published()
        if self.session is None:
            raise error
        self.session.decline(work, error)

    def _published(self) -> None:
        """End the look-ahead or the local steps."""
        self._ahead.close()

    def optimizer_step(self, optimizer: Any, **kwargs: Any) -> Any:
        """Called by ``optimizer.step()``: submit the round's update, and apply the agreed one.

        With local steps, only the last of a round does so.
        """
        session, step, loader = self.session, self._step, self._loader
        if session is None or step is None or loader is None or session.work is None:
            raise ConfigError(WITHOUT_A_BATCH)
        result = super().optimizer_step(optimizer, **kwargs)
        self._losses.append(
            float(result.detach()) if isinstance(result, torch.Tensor) and result.numel() == 1 else math.nan
        )
        if len(self._losses) < len(loader.share.steps):
            return result
        self._published()
        if not step.called:
            session.abstain(session.work, "the gradient scaler found gradients that are not finite")
        elif step.broken is not None:
            session.abstain(session.work, str(step.broken))
        elif not (step.has_gradient if step.local is None else step.made):
            session.abstain(session.work, "no parameter has a gradient")
        else:
            session.submit(session.work, statistics.fmean(self._losses), loader.share.samples)
        return result

    def close(self) -> None:
        """Leave the run; idempotent."""
        self._published()
        if self.session is not None:
            self.session.close()
        if self._loader is not None:
            self._loader.close()
        with contextlib.suppress(ValueError):
            atexit.unregister(self.close)

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
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.accelerators.accelerator import Accelerator
from lightning.fabric.plugins import CheckpointIO, Precision
from lightning.fabric.strategies.single_device import SingleDeviceStrategy
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.tensor import DTensor
from torch.nn import Module
from torch.optim import Optimizer

from psyche_lightning.distro.holding import DeltaForm, GradientsForm, MastersForm
from psyche_lightning.distro.shards import Ranks
from psyche_lightning.errors import CheckpointError, ConfigError, DataError
from psyche_lightning.lightning.collectives import LocalCollectives
from psyche_lightning.lightning.device import check_inner
from psyche_lightning.lightning.distributed_checkpoint import META, is_distributed, load_module, restore, save
from psyche_lightning.lightning.entry import Entry, enter
from psyche_lightning.lightning.internals import FabricRanks
from psyche_lightning.lightning.loader import WITHOUT_A_BATCH, RoundLoader, check_loader
from psyche_lightning.lightning.manifest import sections
from psyche_lightning.lightning.optimizers import TakenStep
from psyche_lightning.lightning.ranks import RankGradients
from psyche_lightning.lightning.session import Session
from psyche_lightning.lightning.sharding import load_whole_state, shard_with_optimizer, whole_state
from psyche_lightning.lightning.supported import check_precision, check_streamed
from psyche_lightning.node.notices import Finished
from psyche_lightning.node.participant import RoundWork
from psyche_lightning.protocol.state import CoordinatorConfig
from psyche_lightning.recipe.options import RunOptions

logger = logging.getLogger(__name__)


class PsycheFabricStrategy(LocalCollectives, SingleDeviceStrategy):
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
        masters: ``float32`` or ``split``: whether bfloat16 parameters have their exact values as 4 bytes beside them,
            or as the 2 bytes that they lack.
        delta: dtype in which delta is kept between steps: ``float32``, ``bfloat16`` or ``int8``.
        gradients: ``kept`` or ``streamed``: whether gradients are added to delta one by one during the backward pass,
            and freed.
        region: where this node is, for the run's page: any name, such as ``eu-west``; empty to say nothing.
        config: sizes of a run of this process alone; None for those of the DataLoader (and Trainer).
        start: for a run of this process alone: steps already trained, and the first data id that follows.
        manifest: manifest sections that replace those made from the module and its data.
        tokens_per_sample: tokens per sample in displayed figures.
        inner: with several devices, how their ranks share the node's work. ``ddp``: each has the whole model and trains
            its part of a share, and gradients are reduced. ``fsdp``: each has a part of the model, too.
        save_distributed_checkpoint: with ``inner="fsdp"``, whether each rank writes its part of a checkpoint, which is
            a folder then. Else rank 0 gathers the model into a file, without delta.
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
    launcher_class = FabricRanks

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
        masters: MastersForm = "float32",
        delta: DeltaForm = "float32",
        gradients: GradientsForm = "kept",
        region: str = "",
        config: CoordinatorConfig | None = None,
        start: tuple[int, int] | None = None,
        manifest: Mapping[str, Mapping[str, Any]] | None = None,
        tokens_per_sample: int = 1,
        inner: str = "ddp",
        save_distributed_checkpoint: bool = False,
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
            masters=masters,
            delta=delta,
            gradients=gradients,
            region=region,
            config=config,
            start=start,
            manifest=manifest or {},
            tokens_per_sample=tokens_per_sample,
        ).in_environment()
        self.inner = check_inner(inner, save_distributed_checkpoint)
        self._in_parts = save_distributed_checkpoint
        super().__init__("cpu", accelerator, checkpoint_io, precision)
        self._step: TakenStep | None = None
        self._loader: RoundLoader | None = None
        self.session: Session | None = None
        self._ahead = ExitStack()
        self._losses: list[float] = []  # of the steps of the current round
        self._told = False
        self._ranks: RankGradients | None = None
        self._samples = self._step_samples = 0
        self._reduced_step: float | None = None  # the mean loss over all ranks, once gradients are reduced

    @cached_property
    def _entry(self) -> Entry:
        """The run's fixed values; the first access queries the run."""
        return enter(self.options, None, self.world)

    # --- set-up -----------------------------------------------------------------------------------------------------

    def setup_environment(self) -> None:
        """Called by ``fabric.launch()``: wait for the other ranks of the node."""
        super().setup_environment()
        self._meet()
        # Where a strategy overrides it, Fabric refuses loss.backward(), which works with one device.
        if self.world is not None:
            self.backward = self._backward  # type: ignore[method-assign]

    def setup_module_and_optimizers(
        self, module: Module, optimizers: list[Optimizer], scheduler: Any = None
    ) -> tuple[Module, list[Optimizer], Any]:
        """Called by ``fabric.setup(module, optimizer)``; queries the run and replaces the optimizer's step."""
        if len(optimizers) != 1 or self._step is not None:
            raise ConfigError(
                "the strategy 'psyche' trains one module with one optimizer (which may have several parameter groups): "
                "fabric.setup(module, optimizer), once"
            )
        if self.num_processes > 1 and self.world is None:
            raise ConfigError(
                f"Fabric has devices={self.num_processes}, but its ranks are not started: call fabric.launch() first"
            )
        check_precision(getattr(self.precision, "scaler", None), self._entry.distro, self.options.holding)
        if self.world is not None and self.inner == "fsdp":
            shard_with_optimizer(module, optimizers[0], self.world)
        self._step = TakenStep(optimizers[0], module, self._entry.distro, self.options.holding)
        if self._shards is None:
            self._step.keep_with_optimizer()
        self._ranks = None if self.world is None else RankGradients(self.world, self._step)
        return module, optimizers, scheduler

    @property
    def _shards(self) -> Ranks | None:
        """The ranks that have parts of the model; None if each has the whole one."""
        return None if self._step is None else self._step.distro.ranks

    def setup_optimizer(self, optimizer: Optimizer) -> Optimizer:
        """Always fails: a run needs the module, which names the optimizer's parameters.

        Raises:
            ConfigError: always.
        """
        raise ConfigError("the strategy 'psyche' needs module and optimizer together: fabric.setup(module, optimizer)")

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any] | None:
        """For Fabric, which divides loaders among the ranks of a node; the first one is the run's to divide."""
        if self.world is None or self._loader is None:
            return None
        return {"num_replicas": self.num_processes, "rank": self.global_rank}

    def process_dataloader(self, dataloader: Any) -> Any:
        """Called by ``fabric.setup_dataloaders``; the run feeds the first loader, the others stay unchanged."""
        if self._loader is not None:
            return dataloader
        self._loader = loader = RoundLoader(
            dataloader,
            self._entry.global_batch(check_loader(dataloader) * self.num_processes),
            self._entry.run.seed,
            lambda: self._rounds(loader),
            split=False,
            decline=self._decline,
            upcoming=lambda: None if self.session is None else self.session.upcoming(),
            steps=self._entry.steps,
            rank=self.global_rank,
            ranks=self.num_processes,
            alike=self._shards is not None,
            agreed=lambda error: error if self._ranks is None else self._ranks.agreed(error),
        )
        return loader

    def _join(self, loader: RoundLoader) -> Session:
        step = self._set_up
        made = sections(step, loader.order)
        session = Session(self._entry, step, made, global_batch=loader.global_batch, total_steps=None, world=self.world)
        try:
            session.start()
        except BaseException:
            session.close()
            raise
        self.session = session
        atexit.register(self._leave)
        default = signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        if default and threading.current_thread() is threading.main_thread():
            # Fabric ignores signals, and the default action would not notify the coordinator.
            signal.signal(signal.SIGTERM, self._terminate)
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
            self._reshard()
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
            self._samples = 0
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

    def _reshard(self) -> None:
        """Have no parameter gathered that is about to change."""
        if self._shards is not None and self._step is not None:
            self._shards.reshard(self._step.module)

    def _backward(self, tensor: torch.Tensor, module: Module | None, *args: Any, **kwargs: Any) -> None:
        """Called by ``fabric.backward(loss)``; with several ranks, gradients are then those of the mean over all."""
        if self._ranks is None or self.session is None or self.session.work is None:
            super().backward(tensor, module, *args, **kwargs)
            return
        loss = float(tensor.detach()) if tensor.numel() == 1 else math.nan
        if self._shards is None:
            super().backward(tensor, module, *args, **kwargs)
            self._average(self._ranks, loss)
            return
        assert self._loader is not None
        samples, whole = self._samples_here, self._loader.share.wholes[len(self._losses)]
        with self._ranks.summing():  # fully_shard adds up the others' while backward runs
            super().backward(tensor * (samples / whole), module, *args, **kwargs)
        self._reduced_step = self._ranks.total(loss * samples / whole if samples else 0.0)
        self._step_samples = whole

    @property
    def _samples_here(self) -> int:
        """Samples of this rank in the step that is made."""
        assert self._loader is not None
        share, step = self._loader.share, len(self._losses)
        return 0 if step in share.idle else share.sizes[step]

    def _average(self, ranks: RankGradients, loss: float) -> None:
        """Reduce the gradients of the step that is made; another backward of the same step may follow."""
        found = ranks.average(float(self._samples_here), loss, self._samples_here)
        assert found is not None  # who lacks samples has no batch
        self._reduced_step, self._step_samples = found[1], found[2]

    def optimizer_step(self, optimizer: Any, **kwargs: Any) -> Any:
        """Called by ``optimizer.step()``: submit the round's update, and apply the agreed one.

        With local steps, only the last of a round does so.
        """
        session, step, loader = self.session, self._step, self._loader
        if session is None or step is None or loader is None or session.work is None:
            raise ConfigError(WITHOUT_A_BATCH)
        self._reshard()
        if self._ranks is not None and self._reduced_step is None and "closure" not in kwargs:
            if self._shards is not None:
                raise ConfigError(
                    "optimizer.step() has no gradients of all ranks: with inner='fsdp', call fabric.backward(loss) for "
                    "each batch before it"
                )
            self._average(self._ranks, math.nan)  # the loss went backward without fabric.backward
        result = super().optimizer_step(optimizer, **kwargs)
        loss = float(result.detach()) if isinstance(result, torch.Tensor) and result.numel() == 1 else math.nan
        if self._reduced_step is not None:
            loss, self._reduced_step = self._reduced_step, None
            self._samples += self._step_samples
        self._losses.append(loss)
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
            samples = loader.share.samples if self._ranks is None else self._samples
            session.submit(session.work, statistics.fmean(self._losses), samples)
        return result

    def clip_gradients_norm(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Called by ``fabric.clip_gradients(max_norm=)``."""
        check_streamed("fabric.clip_gradients clips all gradients before a step", self.options.holding)
        norm = super().clip_gradients_norm(*args, **kwargs)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def clip_gradients_value(self, *args: Any, **kwargs: Any) -> None:
        """Called by ``fabric.clip_gradients(clip_val=)``."""
        check_streamed("fabric.clip_gradients clips all gradients before a step", self.options.holding)
        super().clip_gradients_value(*args, **kwargs)

    # --- checkpoints ------------------------------------------------------------------------------------------------

    def get_module_state_dict(self, module: Module) -> dict[str, Any]:
        """Called by ``fabric.save``: the module's state, as of a node with one device; empty without the whole."""
        if self._shards is None:
            return super().get_module_state_dict(module)
        if self._in_parts:
            self._shards.reshard(module)
            return super().get_module_state_dict(module)
        return whole_state(module, self._shards)

    def save_checkpoint(
        self, path: Any, state: dict[str, Any], storage_options: Any = None, filter: Any = None
    ) -> None:
        """Called by ``fabric.save`` on all ranks.

        Raises:
            CheckpointError: it is to be written in parts, and a rank cannot write its own.
        """
        if self._shards is None or self._step is None or not self._in_parts:
            super().save_checkpoint(path, state, storage_options, filter)
            return
        found = {name: self._state_of(one) for name, one in state.items()}
        for name, wanted in (filter or {}).items():
            found[name] = {key: value for key, value in found[name].items() if wanted(key, value)}
        parts = {name: found.pop(name) for name, one in state.items() if isinstance(one, Module)}
        steps = [name for name, one in state.items() if isinstance(one, Optimizer)]
        parts |= {name: self._step.own_state() for name in steps}
        save(Path(self.broadcast(path)), parts, self._step.distro.state_dict() if steps else None, found, self._shards)

    def _state_of(self, one: Any) -> Any:
        if isinstance(one, Module):
            return self.get_module_state_dict(one)
        if isinstance(one, Optimizer):
            return self.get_optimizer_state(one)
        return one.state_dict() if isinstance(one, Stateful) else one

    def load_checkpoint(
        self, path: Any, state: Any = None, strict: bool = True, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Called by ``fabric.load``.

        Raises:
            CheckpointError: it was written in parts, and lacks some, or a rank cannot read its own.
            ConfigError: it was written in parts, and ``state`` does not say what to restore.
        """
        folder = Path(path)
        if not is_distributed(folder):
            return super().load_checkpoint(path, state, strict, weights_only)
        if not isinstance(state, dict):
            raise ConfigError(
                f"{folder} was written in parts, which go to the objects that they are of. Give a dictionary, such as "
                'fabric.load(path, {"model": model, "optimizer": optimizer}).'
            )
        rest = super().load_checkpoint(folder / META, weights_only=weights_only)
        for name, one in state.copy().items():
            if isinstance(one, Module):
                self.load_module_state_dict(one, load_module(folder, name, one, self._shards), strict)
            elif name in rest and isinstance(one, Optimizer):
                one.load_state_dict({"state": {}, "param_groups": rest.pop(name)["param_groups"]})
                if self._step is not None:
                    restore(folder, name, self._step)
            elif name in rest and isinstance(one, Stateful):
                one.load_state_dict(rest.pop(name))
            elif name in rest:
                state[name] = rest.pop(name)
            elif strict:
                raise CheckpointError(f"the checkpoint {folder} has no {name!r}; it has {', '.join(map(repr, rest))}")
        return rest

    def load_module_state_dict(self, module: Module, state_dict: dict[str, Any], strict: bool = True) -> None:
        """Called by ``fabric.load``: restore :meth:`get_module_state_dict`."""
        if self._shards is None:
            super().load_module_state_dict(module, state_dict, strict)
        else:
            load_whole_state(module, state_dict, self._shards, strict)

    def get_optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Called by ``fabric.save``: the optimizer's state; of a divided model its groups alone."""
        if self._shards is None:
            return super().get_optimizer_state(optimizer)
        return {"state": {}, "param_groups": optimizer.state_dict()["param_groups"]}

    def _terminate(self, number: int, frame: Any) -> None:
        """A SIGTERM handler: end the program, and with it the node."""
        end = SystemExit(128 + number)
        if self.session is not None and self.world is not None:  # else the others would be waited for
            self.session.fails(end)
            self.world.fail(end)
        raise end

    def _leave(self) -> None:
        """Leave the run as the program ends, perhaps with an error."""
        error = getattr(sys, "last_value", None)
        if isinstance(error, BaseException) and self.session is not None:
            self.session.fails(error)
            if self.world is not None:
                self.world.fail(error)
        if self._shards is not None:
            self._ahead.pop_all()  # the other ranks may not be there to bring parameters back
        self.close()

    def close(self) -> None:
        """Leave the run; idempotent."""
        self._published()
        if self.session is not None:
            self.session.close()
        if self._loader is not None:
            self._loader.close()
        with contextlib.suppress(ValueError):
            atexit.unregister(self._leave)

"""``Trainer(strategy="psyche")``: each optimizer step is a round of a run of many nodes."""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.distributed.tensor import DTensor
from torch.nn import Module
from torch.optim import Optimizer

from psyche_lightning.checkpoints.deferred import Values
from psyche_lightning.distro.holding import DeltaForm, GradientsForm, MastersForm
from psyche_lightning.distro.shards import Ranks
from psyche_lightning.errors import ConfigError
from psyche_lightning.lightning.callback import CoordinatorCallback
from psyche_lightning.lightning.collectives import LocalCollectives, tell_of_monitors
from psyche_lightning.lightning.device import check_inner
from psyche_lightning.lightning.distributed_checkpoint import META, is_distributed, load_module, restore, save
from psyche_lightning.lightning.entry import Entry, Memory, enter
from psyche_lightning.lightning.internals import (
    TrainerRanks,
    claim_version,
    divided,
    give_back_handler,
    keep_from_asking,
    loads_train_data,
    logs_now,
    reload_train_loader,
    terminated,
    trainer_of,
)
from psyche_lightning.lightning.loader import RoundLoader, check_loader
from psyche_lightning.lightning.optimizers import STATE_KEY, TakenStep
from psyche_lightning.lightning.progress import count_rounds
from psyche_lightning.lightning.session import Session
from psyche_lightning.lightning.sharding import load_whole_state, shard, whole_state
from psyche_lightning.lightning.supported import SEARCHES, check, check_optimizers, check_precision
from psyche_lightning.lightning.training import Training
from psyche_lightning.lightning.world import World
from psyche_lightning.protocol.state import CoordinatorConfig
from psyche_lightning.recipe.options import RunOptions

_OWN = "optimizer_0"
"""The name of the optimizer's state in a checkpoint that ranks write in parts, as with Lightning's strategies."""
_FOLDER = "folder"
"""Says, in the state of an optimizer, that such a checkpoint has the rest of it."""


class PsycheStrategy(LocalCollectives, SingleDeviceStrategy):
    """One node of a run: trains its share of each round, and applies the update that all nodes agreed on.

    The user's optimizer gives learning rates (schedulers work on it), weight decay and parameter groups; DisTrO
    replaces its step. One round is one optimizer step and one Lightning batch: ``global_step``, ``max_steps`` and all
    other step counts are the run's. If a round's share exceeds the DataLoader's ``batch_size``, the node trains it in
    micro-batches, with the gradient of their mean. Callbacks, validation and checkpoints see the parameters that all
    nodes have.

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
        precision_plugin: as in Lightning's strategies.

    Attributes:
        options: the given options, completed from the environment.
        session: this node's membership in the run, even after it ends; None before it joins.
        values: with ``inner="fsdp"``, what gives the values of the module's tensors that are on the meta device, by
            name. Each rank takes its part when fitting begins.

    Raises:
        ConfigError: an option is wrong, or only one of coordinator and run is known.
    """

    strategy_name = "psyche"
    owner = "Trainer"
    launcher_class = TrainerRanks

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
        precision_plugin: Precision | None = None,
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
        super().__init__("cpu", accelerator, checkpoint_io, precision_plugin)
        self._memory = Memory()
        self._rest()

    def _rest(self) -> None:
        """Set the state of a strategy that no Trainer fits with."""
        self.session: Session | None = None
        self._fit: _Fit | None = None
        self._training: Training | None = None
        self._resumed: _Resumed | None = None
        self._terminated = self._failed = False
        self._undo = ExitStack()
        self.values: Values = {}

    def __getstate__(self) -> dict[str, Any]:
        """What a copy has: neither this node's key nor its membership, which only one process can have."""
        state = super().__getstate__()
        kept_out = ("session", "_memory", "_fit", "_training", "_resumed", "_terminated", "_failed", "_undo", "values")
        for name in kept_out:
            del state[name]
        state.pop("world", None)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._memory = Memory()
        self._rest()

    @classmethod
    def register_strategies(cls, strategy_registry: Any) -> None:
        """Does nothing; :mod:`psyche_lightning.lightning.registration` registers the strategy."""

    # --- set-up -----------------------------------------------------------------------------------------------------

    def connect(self, model: LightningModule) -> None:
        """Called by Trainer with the module; puts a :class:`CoordinatorCallback` before the callbacks that train.

        Callbacks that search (for a learning rate, for a batch size) stay before it: they run before the node joins.
        """
        super().connect(model)
        trainer = trainer_of(model)
        if trainer is not None and trainer.state.fn == TrainerFn.FITTING:
            callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined] # set dynamically
            ours = next((one for one in callbacks if isinstance(one, CoordinatorCallback)), CoordinatorCallback())
            others = [one for one in callbacks if one is not ours]
            searching = [one for one in others if isinstance(one, SEARCHES)]
            trainer.callbacks = [*searching, ours, *(one for one in others if one not in searching)]  # type: ignore[attr-defined]

    @property
    def is_distributed(self) -> bool:
        """Whether ``self.log(sync_dist=True)`` calls :meth:`reduce`: among ranks, or to say that values are local.

        Not when Trainer asks whether it should divide data among processes: this strategy does that.
        """
        return (self.num_processes > 1 or self.options.coordinator is not None) and logs_now(self.lightning_module)

    def setup_environment(self) -> None:
        """Called by Trainer before its loggers write: nodes of one folder log into folders of their own."""
        super().setup_environment()
        self._meet()
        trainer = trainer_of(self.lightning_module)
        for logger in [] if trainer is None or self.global_rank else trainer.loggers:
            claim_version(logger)

    def setup(self, trainer: Trainer) -> None:
        """Called by Trainer before anything runs; when fitting, refuses unsupported settings."""
        if trainer.state.fn == TrainerFn.FITTING:
            check(trainer, alone=self.options.coordinator is None, ranks=self.num_processes)
        super().setup(trainer)

    def model_to_device(self) -> None:
        """Called by Trainer; a model that still lacks values comes to its device with them."""
        if not self.values:
            super().model_to_device()

    def setup_optimizers(self, trainer: Trainer) -> None:
        """Called by Trainer when fitting; queries the run and replaces the step of the module's optimizer."""
        self.session = None
        if self.world is not None and self.inner == "fsdp":
            shard(trainer.lightning_module, self.world, values=self.values)
            self.values = {}
        # Before the module configures its optimizers: it may ask Trainer for its number of steps, which loads the data.
        self._fit = fit = _Fit(
            trainer, enter(self.options, self._memory, self.world), count_rounds(trainer, self._undo), self.world
        )
        if self.world is not None:
            keep_from_asking(trainer)
        super().setup_optimizers(trainer)
        check_optimizers(trainer, alone=self.options.coordinator is None)
        if self.options.coordinator is not None:
            tell_of_monitors(trainer)
        check_precision(getattr(self.precision_plugin, "scaler", None), fit.entry.distro, self.options.holding)
        fit.step = TakenStep(self.optimizers[0], trainer.lightning_module, fit.entry.distro, self.options.holding)

    def process_dataloader(self, dataloader: object) -> object:
        """Called by Trainer with each DataLoader; the run feeds the one for training."""
        fit = self._fit
        if fit is None or not loads_train_data(fit.trainer):
            trainer = trainer_of(self.lightning_module)
            if self.world is None or trainer is None:
                return dataloader
            return divided(trainer, dataloader, self.global_rank, self.num_processes)
        batch_size = check_loader(dataloader)
        fit.sized_apart = fit.searching
        entry = fit.entry.apart() if fit.searching else fit.entry
        loader = RoundLoader(
            dataloader,  # type: ignore[arg-type]
            entry.global_batch(batch_size * fit.accumulate * self.num_processes),
            entry.run.seed,
            lambda: self._now.rounds(),
            decline=lambda work, error: self._now.session.decline(work, error),
            upcoming=lambda: self._now.session.upcoming(),
            steps=entry.steps,
            rank=self.global_rank,
            ranks=self.num_processes,
            agreed=lambda error: self._now.agreed(error),
            alike=self.world is not None and self.inner == "fsdp",
        )
        self._undo.callback(loader.close)
        for earlier in fit.loaders:
            earlier.close()
        fit.loaders.append(loader)
        return loader

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Called by Trainer with ``ckpt_path``. In a run with others, the step and the schedule are the run's.

        So the checkpoint gives parameters, the callbacks' state and delta; whoever joins late steps the schedulers to
        the run's step, with or without a checkpoint.
        """
        checkpoint = self._read(checkpoint_path, weights_only)
        trainer = trainer_of(self.lightning_module)
        fits = trainer is not None and trainer.state.fn == TrainerFn.FITTING
        # Searches, which come later, go back to checkpoints of their own.
        if not fits or self._fit is not None or self.options.coordinator is None:
            return checkpoint
        states = checkpoint.get("optimizer_states") or [{}]
        self._resumed = _Resumed(int(checkpoint.get("global_step", 0)), states[0])
        kept = {name: value for name, value in checkpoint.items() if name != "loops"}
        return {**kept, **{name: [] for name in ("optimizer_states", "lr_schedulers") if name in kept}}

    def begin(self) -> None:
        """Called by :class:`CoordinatorCallback` when the fit begins: join others, and take the run's parameters.

        So all other callbacks and the sanity check see those. A node alone has the run's parameters anyway; it joins
        when its training starts.

        Raises:
            ConfigError: the Trainer's limits or its checkpoint do not fit the run.
            PsycheError: the run refuses this node.
        """
        fit = self._fit
        if fit is None or self.options.coordinator is None:
            return
        if fit.sized_apart is not False:
            reload_train_loader(fit.trainer)
        if fit.trainer.fit_loop.skip:
            return
        if self._resumed is not None:
            self._restore(fit.taken, self._resumed.optimizer)
        training = self._join(fit)
        training.first_round(0 if self._resumed is None else self._resumed.step)

    def on_train_start(self) -> None:
        """Called by Trainer after all set-up; a node alone joins its run, as does a search."""
        fit = self._fit
        assert fit is not None  # since setup_optimizers
        if fit.searching:
            if self._training is not None and self._training.session.entry is fit.entry:
                raise ConfigError(
                    "a search for a learning rate or a batch size began in the middle of training, where this node has "
                    "its part in a run. Search before: the callbacks LearningRateFinder and BatchSizeFinder as they "
                    "are, or lightning.pytorch.tuner.Tuner."
                )
            if not fit.sized_apart:
                reload_train_loader(fit.trainer)
            self._end_search()
            self._training = training = Training(fit.trainer, fit.taken, fit.loaders, fit.entry.apart())
            self._undo.callback(training.session.close)
            training.session.start()
        elif self._training is None:
            self._terminated = fit.trainer.received_sigterm  # so far Trainer's own handler only noted it
            self._join(fit)

    def on_train_end(self) -> None:
        """Called by Trainer when its loop ends, also that of a search."""
        if self._fit is not None and self._fit.searching:
            self._end_search()
        super().on_train_end()

    def _end_search(self) -> None:
        if self._training is not None:
            self._training.session.close()
        self._training = None

    def _join(self, fit: _Fit) -> Training:
        """Become a member of the run."""
        if threading.current_thread() is threading.main_thread():
            # Trainer ignores SIGINT from the first on, and restores it only once its loop has started.
            self._undo.callback(signal.signal, signal.SIGINT, signal.getsignal(signal.SIGINT))
            before = signal.getsignal(signal.SIGTERM)
            ours = self._terminate(before, fit)
            self._undo.callback(give_back_handler, fit.trainer, signal.SIGTERM, before, ours)
            signal.signal(signal.SIGTERM, ours)
        # A callback whose on_exception fails, for lack of space for instance, keeps Trainer from calling teardown.
        atexit.register(self._undo.close)
        self._undo.callback(atexit.unregister, self._undo.close)
        self._training = training = Training(fit.trainer, fit.taken, fit.loaders, fit.entry, fit.world)
        self.session = training.session
        self._undo.callback(training.session.close)
        loop = fit.trainer.fit_loop.epoch_loop
        self._undo.callback(setattr, loop, "max_steps", loop.max_steps)  # the end of the run overrides it
        if self._terminated:
            raise SIGTERMException
        training.session.start()
        return training

    def _terminate(self, before: Any, fit: _Fit) -> Callable[[int, Any], None]:
        """A SIGTERM handler that calls ``before``, then ends waits for other nodes; Trainer ends a node alone."""

        def handle(number: int, frame: Any) -> None:
            if fit.world is not None:
                terminated(fit.trainer)
            elif callable(before):
                before(number, frame)
            self._terminated = True
            if self._training is not None and not self._training.session.alone:
                self._training.session.interrupt(SIGTERMException())

        return handle

    # --- rounds -----------------------------------------------------------------------------------------------------

    @property
    def _now(self) -> Training:
        """The state while Trainer trains."""
        assert self._training is not None  # since on_train_start, at the latest
        return self._training

    def stop_if_finished(self) -> bool:
        """Tell Trainer to stop when the run is over; returns whether it is."""
        return self._training is not None and self._training.stop_if_finished()

    def end_epoch(self) -> None:
        """Called by :class:`CoordinatorCallback`: note whether the module skipped the rest of the epoch.

        A run of this process alone then goes on with the skipped round in the next epoch.

        Raises:
            ConfigError: the run is one with others.
        """
        session = self._now.session if self._training is not None else None
        if session is None or session.work is None:
            return
        if not session.alone:
            raise ConfigError(
                "on_train_batch_start returned -1, for which Trainer skips the rest of its epoch, but the run's rounds "
                "go on with the others. Return None; to leave the run, set trainer.should_stop = True."
            )
        session.put_back()

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Called by Trainer with the first micro-batch of the round's share; see :meth:`Training.train_share`."""
        batch, *rest = args
        train = super().training_step
        return self._now.train_share(batch, lambda micro: train(micro, *rest, **kwargs))

    def pre_backward(self, closure_loss: torch.Tensor) -> None:
        """Restore the gradients of the other micro-batches, so that backward adds to them."""
        self._now.restore_gradients()

    def optimizer_step(
        self,
        optimizer: Optimizer,
        closure: Callable[[], Any],
        model: LightningModule | Module | None = None,
        **kwargs: Any,
    ) -> Any:
        """Called by Trainer: forward, backward and clipping, then the round's payload and its results."""
        training = self._now

        def ahead() -> Any:
            with training.step.looking_ahead():
                return training.settle(closure())

        with contextlib.nullcontext() if self.world is None else self.world.computing():
            training.start_share()
            with training.step.working():
                result = super().optimizer_step(optimizer, ahead, model, **kwargs)
            applied = training.end_share()
        if not applied:
            raise StopIteration  # ends Trainer's loop over batches before it counts this step
        return result

    # --- checkpoints ------------------------------------------------------------------------------------------------

    @property
    def shards(self) -> Ranks | None:
        """The ranks that have parts of the model; None if each rank has the whole one."""
        module = self.lightning_module
        divided = module is not None and any(isinstance(parameter, DTensor) for parameter in module.parameters())
        return Ranks(device=self.root_device) if divided else None

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The module's state for a checkpoint, as of a node with one device; empty on ranks without the whole."""
        module, shards = self.lightning_module, self.shards
        if module is None or shards is None:
            return super().lightning_module_state_dict()
        if self._in_parts:
            shards.reshard(module)
            return super().lightning_module_state_dict()
        return whole_state(module, shards)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Called by Trainer on all ranks.

        Raises:
            CheckpointError: it is to be written in parts, and a rank cannot write its own.
        """
        shards = self.shards
        if shards is None or not self._in_parts:
            super().save_checkpoint(checkpoint, filepath, storage_options)
            return
        parts, distro = {"state_dict": checkpoint.pop("state_dict")}, None
        if checkpoint.get("optimizer_states") and self._fit is not None and self._fit.step is not None:
            parts[_OWN], distro = self._fit.step.own_state(), self._fit.step.distro.state_dict()
        save(Path(self.broadcast(filepath)), parts, distro, checkpoint, shards)

    def _read(self, path: Any, weights_only: bool | None) -> dict[str, Any]:
        """Trainer's checkpoint; of one in parts, the optimizer's state is restored when there is an optimizer."""
        folder = Path(path)
        if not is_distributed(folder):
            found: dict[str, Any] = super().load_checkpoint(path, weights_only)
            return found
        found = super().load_checkpoint(folder / META, weights_only)
        module = self.lightning_module
        assert module is not None  # Trainer loads after it connected one
        states = [{**state, _FOLDER: folder} for state in found.get("optimizer_states", [])]
        more = {"optimizer_states": states} if states else {}
        return {**found, **more, "state_dict": load_module(folder, "state_dict", module, self.shards)}

    def _restore(self, step: TakenStep, saved: Mapping[str, Any]) -> None:
        """Restore the state of an optimizer's own steps, and DisTrO's."""
        if _FOLDER in saved:
            restore(saved[_FOLDER], _OWN, step)
            return
        step.load_own_state(saved)
        if STATE_KEY in saved:
            step.distro.load_state_dict(saved[STATE_KEY])

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Restore :meth:`lightning_module_state_dict`."""
        module, shards = self.lightning_module, self.shards
        if module is None or shards is None:
            super().load_model_state_dict(checkpoint, strict)
        else:
            load_whole_state(module, checkpoint["state_dict"], shards, strict)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The state for a checkpoint: that of the user's groups, and DisTrO's."""
        if isinstance(optimizer, LightningOptimizer):
            optimizer = optimizer.optimizer
        if self.shards is not None:  # parts of it are on other ranks
            return {"state": {}, "param_groups": optimizer.state_dict()["param_groups"]}
        state = dict(optimizer.state_dict())
        if self._fit is not None and self._fit.step is not None:
            state[STATE_KEY] = self._fit.step.distro.state_dict()
        return state

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Restore :meth:`optimizer_state`; without local steps, it ignores the state of an optimizer's own steps."""
        step = None if self._fit is None else self._fit.step
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=False):
            optimizer.load_state_dict({"state": {}, "param_groups": saved["param_groups"]})
            if step is not None:
                self._restore(step, saved)

    # --- the end ----------------------------------------------------------------------------------------------------

    def on_exception(self, exception: BaseException) -> None:
        """Called by Trainer when training ends with an error or a signal."""
        if isinstance(exception, SIGTERMException) and exception.code is None:
            exception.code = 128 + signal.SIGTERM  # else Python would exit with 0
        self._failed = True
        if self.session is not None:
            self.session.fails(exception)
        if self.world is not None:
            self.world.fail(exception)
        super().on_exception(exception)

    def teardown(self) -> None:
        """Called by Trainer at the end, even after an error: leave the run."""
        try:
            self._undo.close()
        finally:
            # What fully_shard gathered when an error came stays so, and cannot be moved to the CPU.
            stuck, self._failed = self._failed and self.shards is not None, False
            self._fit = self._training = self._resumed = None
            self._terminated = False
            if not stuck:
                super().teardown()


@dataclass(frozen=True)
class _Resumed:
    """What a run with others needs to know of a checkpoint that Trainer restores.

    Attributes:
        step: its optimizer steps.
        optimizer: the optimizer's state, and DisTrO's in it if it has any.
    """

    step: int
    optimizer: dict[str, Any]


@dataclass
class _Fit:
    """One call of ``Trainer.fit``, from the moment it configures its optimizer.

    Attributes:
        trainer: the Trainer that fits.
        entry: the run's fixed values.
        accumulate: number of user batches whose gradients make one step.
        world: the ranks of the node; None for a node with one device.
        step: the module with its optimizer; None until it has one.
        loaders: training loaders, newest last.
        sized_apart: whether the newest one was made for a search; None before it.
    """

    trainer: Trainer
    entry: Entry
    accumulate: int
    world: World | None = None
    step: TakenStep | None = None
    loaders: list[RoundLoader] = field(default_factory=list)
    sized_apart: bool | None = None

    @property
    def taken(self) -> TakenStep:
        """The module with its optimizer."""
        assert self.step is not None  # since setup_optimizers
        return self.step

    @property
    def searching(self) -> bool:
        """Whether a callback of Lightning now trains to find a learning rate or a batch size.

        For that time it takes all other callbacks from Trainer.
        """
        return not any(isinstance(callback, CoordinatorCallback) for callback in self.trainer.callbacks)  # type: ignore[attr-defined] # set dynamically

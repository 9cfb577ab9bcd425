"""All private names of Lightning that this package uses, and those of torch that its strategies use.

None has a public counterpart; each docstring says why it is needed. The package's tests use all of them, with Lightning
2.6.6 and torch 2.13. (The private names of torch that DisTrO uses are in ``psyche_lightning/distro/internals.py``.)
"""

from __future__ import annotations

import itertools
import signal
from collections.abc import Callable
from typing import Any

import torch
from lightning.fabric.strategies.launchers.subprocess_script import _SubprocessScriptLauncher as _FabricLauncher
from lightning.fabric.utilities.data import _auto_add_worker_init_fn
from lightning.fabric.utilities.distributed import (
    _all_gather_ddp_if_available,
    _get_default_process_group_backend_for_device,
    _set_num_threads_if_needed,
    _sync_ddp_if_available,
)
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher as _TrainerLauncher
from lightning.pytorch.trainer.connectors.data_connector import _get_distributed_sampler
from lightning.pytorch.utilities.data import _update_dataloader
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from psyche_lightning.distro.internals import note_step


def seed_workers(loader: DataLoader[Any]) -> None:
    """Seed the worker processes as ``seed_everything(workers=True)`` asks.

    Trainer and Fabric do this for loaders that they make or replace, but have no function for other loaders.
    """
    _auto_add_worker_init_fn(loader, 0)


def before_transfer(module: LightningModule, batch: Any) -> Any:
    """Apply the module's ``on_before_batch_transfer`` to a batch.

    Trainer's data fetcher calls the hooks around a transfer; a strategy can only call those after it. A batch that
    Trainer did not fetch must go through this hook too.
    """
    return module._on_before_batch_transfer(batch, dataloader_idx=0)


def before_step(trainer: Trainer, optimizer: torch.optim.Optimizer) -> None:
    """Do what Trainer does between backward and the optimizer's step: call ``on_before_optimizer_step``, and clip.

    Trainer does it once in a round; local steps need it before each of them.
    """
    trainer.precision_plugin._after_closure(trainer.lightning_module, optimizer)


def weigh(trainer: Trainer, batch: Any) -> None:
    """Make ``self.log`` weight values by the size of this batch.

    Trainer notes the batch that it fetched, but does not know the other micro-batches of the same step.
    """
    results = trainer._results
    if results is not None:
        results.batch, results.batch_size = batch, None


def set_steps(trainer: Trainer, done: int) -> None:
    """Set the number of steps that loggers use for their x-axis; Trainer can only count it up."""
    trainer.fit_loop.epoch_loop._batches_that_stepped = done


def set_fetched(trainer: Trainer, batches: int) -> None:
    """Set the number of fetched batches, by which Trainer detects the epoch's last one; it can only count up."""
    fetcher = trainer.fit_loop._data_fetcher
    if fetcher is not None:
        fetcher.fetched = batches


def trainer_of(module: LightningModule | None) -> Trainer | None:
    """The module's Trainer; None without one, for which the public name raises an error."""
    return None if module is None else module._trainer


def loads_train_data(trainer: Trainer) -> bool:
    """Whether Trainer now asks for training data.

    It does not tell a strategy what a loader is for, and its stage is "training" too when a search loads other data.
    """
    loop = trainer.fit_loop
    return trainer.training and (loop._combined_loader is None or bool(loop._should_reload_train_dl))


def reload_train_loader(trainer: Trainer) -> None:
    """Make Trainer ask for the training loader again; its public function keeps the one that it has."""
    trainer.fit_loop._combined_loader = None
    trainer.fit_loop.setup_data()


def give_back_handler(trainer: Trainer, number: signal.Signals, handler: Any, instead_of: Any) -> None:
    """Restore a signal handler now, and keep Trainer from restoring ``instead_of`` at its end.

    Trainer notes the handlers when its loop starts; who waits for others before that has its own in place by then.
    """
    signal.signal(number, handler)
    noted = trainer._signal_connector._original_handlers
    if noted.get(number) is instead_of:
        noted[number] = handler


def wants_to_stop(trainer: Trainer, waited: float = 0.0) -> bool:
    """Whether Trainer would end its loop now: because of ``should_stop``, or because a Timer (``max_time``) is over.

    Trainer and its Timer look only after a batch, so a wait for a batch must look itself. Whether the minimum of
    epochs and steps is reached has no public name.

    Args:
        trainer: waits.
        waited: seconds of a wait before the training, which no Timer counts.
    """
    timers = [callback for callback in trainer.callbacks if isinstance(callback, Timer)]  # type: ignore[attr-defined] # set dynamically
    remaining = [timer.time_remaining() for timer in timers]
    if any(seconds is not None and seconds <= waited for seconds in remaining):
        trainer.should_stop = True
    return trainer.should_stop and trainer.fit_loop._can_stop_early


def logs_now(module: LightningModule | None) -> bool:
    """Whether the module is in a hook in which it logs metrics of training or evaluation.

    Trainer asks a strategy whether it is distributed for other reasons too, in other hooks or in none.
    """
    name = None if module is None else module._current_fx_name
    return name is not None and name.endswith(("_step", "_batch_end", "_epoch_end"))


def claim_version(logger: Logger) -> None:
    """Give a logger that numbers its folders one that no other process writes to.

    Lightning's loggers take the number after the highest that they see, as the only process that logs. Nodes that start
    at the same time in one folder would see the same.
    """
    if not isinstance(logger, (CSVLogger, TensorBoardLogger)) or logger._version is not None:
        return
    for version in itertools.count(logger._get_next_version()):
        logger._version = version
        try:
            logger._fs.makedirs(logger.log_dir, exist_ok=False)
            return
        except FileExistsError:
            continue


def replace_step(optimizer: torch.optim.Optimizer, step: Callable[..., Any]) -> None:
    """Replace the optimizer's step with ``step``.

    torch's schedulers warn if the step is replaced after their creation, or if the optimizer has made none. They check
    two marks that no public function sets.
    """
    step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]
    note_step(optimizer)
    optimizer.step = step  # type: ignore[method-assign]


class _Watched:
    """Starts the other ranks as Lightning does, but does not kill rank 0 when one of them ends.

    Lightning's own watcher sends SIGKILL to all. Here rank 0 hears of it, leaves the run and says why (``world.py``).
    """

    def launch(self, function: Callable[..., Any], *args: Any, trainer: Trainer | None = None, **kwargs: Any) -> Any:
        """Start the other ranks, unless somebody else does, and call the function."""
        environment: Any = self.cluster_environment  # type: ignore[attr-defined] # Lightning's launcher has these
        environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)  # type: ignore[attr-defined]
        if not environment.creates_processes_externally:
            self._call_children_scripts()  # type: ignore[attr-defined]
        _set_num_threads_if_needed(num_processes=self.num_processes)  # type: ignore[attr-defined]
        return function(*args, **kwargs)


class TrainerRanks(_Watched, _TrainerLauncher):
    """The launcher of a Trainer's ranks."""


class FabricRanks(_Watched, _FabricLauncher):
    """The launcher of a Fabric's ranks."""


def backend_for(device: torch.device) -> str:
    """What exchanges the tensors of such a device: ``gloo``, ``nccl``."""
    return _get_default_process_group_backend_for_device(device)


def divided(trainer: Trainer, loader: object, rank: int, ranks: int) -> object:
    """A rank's part of a loader for validation or test, as Lightning's own strategies give it.

    Lightning divides loaders itself only for its own strategies. It has already wrapped those for prediction, which
    each rank makes as a whole.
    """
    wanted = trainer._accelerator_connector.use_distributed_sampler and not trainer.predicting
    if not wanted or not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return loader
    if isinstance(loader.sampler, DistributedSampler):
        return loader
    mode = trainer.state.stage
    sampler = _get_distributed_sampler(loader, False, 0, mode=mode, num_replicas=ranks, rank=rank)
    return _update_dataloader(loader, sampler, mode=mode)


def note_rank(rank: int) -> None:
    """Tell the decorator ``rank_zero_only`` of loggers and others who this process is; it reads an attribute."""
    rank_zero_only.rank = rank  # type: ignore[attr-defined] # set by whoever knows it


def reduced(tensor: torch.Tensor, group: Any, reduce_op: Any) -> torch.Tensor:
    """A tensor over all processes of a group, as Lightning's own strategies give it."""
    return _sync_ddp_if_available(tensor, group, reduce_op=reduce_op)


def gathered(tensor: torch.Tensor, group: Any, sync_grads: bool) -> torch.Tensor:
    """The tensors of all processes of a group, as Lightning's own strategies give them."""
    return _all_gather_ddp_if_available(tensor, group=group, sync_grads=sync_grads)


def keep_from_asking(trainer: Trainer) -> None:
    """Keep Trainer from a collective before each batch, by which it tells all ranks that rank 0 got SIGTERM.

    A rank that ends its training tells the others itself. A collective that only some of them begin would be answered
    by whatever comes next.
    """
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]


def terminated(trainer: Trainer) -> None:
    """Note SIGTERM as Trainer's handler does, and nothing else.

    Its own also passes the signal on to the ranks that it started, and begins a collective at once, in the middle of
    whatever other one it interrupted. Rank 0 tells the others when it leaves: one that ended before it would end the
    node with an error.
    """
    trainer._signal_connector.received_sigterm = True

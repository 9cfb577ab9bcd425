"""What a run cannot do for a Trainer. All of it is refused before anything runs, with what to do instead."""

from __future__ import annotations

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    BatchSizeFinder,
    Callback,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelPruning,
    StochasticWeightAveraging,
)

from psyche_lightning.distro import DistroConfig
from psyche_lightning.distro.holding import Holding
from psyche_lightning.errors import ConfigError
from psyche_lightning.lightning.collectives import RUN_LOSS

SEARCHES = (BatchSizeFinder, LearningRateFinder)
"""Callbacks that train for a while to find a value, before the training itself."""


def check(trainer: Trainer, alone: bool, ranks: int = 1) -> None:
    """Refuse unsupported settings and callbacks.

    Args:
        trainer: will fit; it has its module and its callbacks.
        alone: whether the run is this Trainer's own.
        ranks: of the node.

    Raises:
        ConfigError: such a setting or callback is present; the text names a fix.
    """
    module = trainer.lightning_module
    if not module.automatic_optimization:
        raise ConfigError(
            f"{type(module).__name__} has automatic_optimization=False, but the strategy 'psyche' makes the "
            "optimizer's step itself. Return the loss from training_step and leave the rest to Trainer, or write your "
            'own loop with Fabric(strategy="psyche").'
        )
    if trainer.overfit_batches > 0:  # type: ignore[attr-defined] # set dynamically
        raise ConfigError(
            "Trainer has overfit_batches set, which repeats batches, but the run decides "
            "which samples come. Give the Trainer a small data set instead (torch.utils.data.Subset)."
        )
    for callback in trainer.callbacks:  # type: ignore[attr-defined] # set dynamically
        reason = _objection(callback, trainer, alone)
        if ranks > 1 and isinstance(callback, SEARCHES):
            reason = (
                "searches with the steps of one device. Search with devices=1, then train with the value that it found."
            )
        if reason is not None:
            raise ConfigError(f"the callback {type(callback).__name__} {reason}")


def _objection(callback: Callback, trainer: Trainer, alone: bool) -> str | None:
    """Why a callback cannot work, and what to do instead; None if it can."""
    match callback:
        case GradientAccumulationScheduler():
            return (
                "is a GradientAccumulationScheduler: it changes the batch size during training, which all nodes of a "
                "run share. Use Trainer's accumulate_grad_batches, or the run's global_batch_size_warmup_tokens."
            )
        case BaseFinetuning():
            return (
                "adds parameters to the optimizer during training, but the nodes of a run train one list of "
                "parameters from its first step to its last. Leave the callback out, give the optimizer all parameters "
                "at once, those that begin later in a group of their own, and keep that group's learning rate at 0 "
                "until then (torch.optim.lr_scheduler.LambdaLR takes a function for each group): at the rate 0 nothing "
                "moves. Or train twice: first with the other parameters frozen, then with all."
            )
        case StochasticWeightAveraging() if trainer.max_epochs != -1 and callback.pl_module_contains_batch_norm(
            trainer.lightning_module
        ):
            return (
                "ends with a pass over the data for BatchNorm's statistics, without a step, but each batch of a run is "
                "a round in which all nodes wait for this one. Use EMAWeightAveraging or WeightAveraging of "
                "lightning.pytorch.callbacks, which average the statistics with the parameters."
            )
        case ModelPruning() if not alone:
            return (
                "changes the module's parameters and buffers during training, but all nodes of a run, also those that "
                "come later, have the same ones from its first step to its last. Prune the module after the run, or "
                "before it."
            )
        case BatchSizeFinder() | LearningRateFinder() if (
            type(callback).on_train_epoch_start is not Callback.on_train_epoch_start
        ):
            return (
                "searches at the start of epochs, but then this node has its part in a run. Search once, before the "
                f"training: use {SEARCHES[isinstance(callback, LearningRateFinder)].__name__} itself, or "
                "lightning.pytorch.tuner.Tuner."
            )
    return None


def check_streamed(why: str, holding: Holding) -> None:
    """Refuse what needs the gradients of all parameters at once, if they are streamed.

    Args:
        why: what it is, and what it does.
        holding: how the node holds numbers.

    Raises:
        ConfigError: they are streamed.
    """
    if holding.gradients == "streamed":
        raise ConfigError(
            f"{why}, but gradients='streamed' (trainer.gradients) frees each gradient as it comes. Leave one of them "
            "out."
        )


def check_precision(scaler: object, distro: DistroConfig, holding: Holding) -> None:
    """Refuse a gradient scaler together with local steps, or with streamed gradients.

    Raises:
        ConfigError: there is one.
    """
    if scaler is not None:
        check_streamed('precision "16-mixed" unscales all gradients before a step', holding)
    if distro.local_steps and scaler is not None:
        raise ConfigError(
            'precision "16-mixed" scales gradients by a factor that follows one step in a round, but the run has local '
            'steps, several in a round. Use "bf16-mixed" or "32-true", or set local_steps to 0.'
        )


def check_optimizers(trainer: Trainer, alone: bool) -> None:
    """Refuse unsupported optimizers and schedulers.

    Args:
        trainer: will fit; it has its optimizers.
        alone: whether the run is this Trainer's own.

    Raises:
        ConfigError: there is not exactly one optimizer with parameters, or a scheduler follows a node's own metric.
    """
    optimizers, name = trainer.optimizers, type(trainer.lightning_module).__name__
    if len(optimizers) != 1 or not optimizers[0].param_groups:
        raise ConfigError(
            f"{name}.configure_optimizers gives {len(optimizers)} optimizers, or none that trains; the strategy "
            "'psyche' needs exactly one (it may have several parameter groups)."
        )
    for config in trainer.lr_scheduler_configs:
        if config.reduce_on_plateau and config.monitor != RUN_LOSS and not alone:
            raise ConfigError(
                f"ReduceLROnPlateau monitors {config.monitor!r}, a metric of this node alone, but all nodes must use "
                f"the same learning rate in each round. Monitor {RUN_LOSS!r}, the run's training loss, which is the "
                "same on every node, or use a scheduler that depends only on the step."
            )

"""Replaces the step of the user's optimizer by DisTrO."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from psyche_lightning.distro import DisTrO, DistroConfig
from psyche_lightning.errors import ConfigError, counted
from psyche_lightning.lightning.internals import replace_step
from psyche_lightning.node.parameters import named_parameters

STATE_KEY = "psyche_distro"
"""DisTrO's state within that of the user's optimizer."""


def build_distro(optimizer: torch.optim.Optimizer, module: torch.nn.Module, config: DistroConfig) -> DisTrO:
    """Build a DisTrO with the parameter groups, learning rates and weight decays of the user's optimizer.

    Gradients in groups that Muon trains (of :class:`~psyche_lightning.muon.MuonAdamW`, and all of ``torch.optim.Muon``)
    go through Muon first.

    Args:
        optimizer: the user's; of any kind.
        module: names the parameters.
        config: the run's compression.

    Raises:
        ConfigError: the optimizer has parameters that the module does not.
    """
    names = {id(parameter): name for name, parameter in named_parameters(module).items()}
    groups = []
    all_muon = isinstance(optimizer, torch.optim.Muon)
    for group in optimizer.param_groups:
        unknown = [parameter for parameter in group["params"] if id(parameter) not in names]
        if unknown:
            shapes = ", ".join(str(tuple(parameter.shape)) for parameter in unknown[:3])
            raise ConfigError(
                f"the optimizer trains {len(unknown)} tensors that are not parameters of {type(module).__name__} "
                f"(of shapes {shapes}); nodes can share only the module's own parameters"
            )
        groups.append(
            {
                "params": [(names[id(parameter)], parameter) for parameter in group["params"]],
                "lr": float(group["lr"]),
                "weight_decay": float(group.get("weight_decay", 0.0)),
                **({"muon": True, "momentum": group["momentum"]} if group.get("muon", all_muon) else {}),
            }
        )
    return DisTrO(groups, lr=float(optimizer.param_groups[0]["lr"]), config=config)


class TakenStep:
    """Replaces the ``step`` of the user's optimizer; a call now only runs the closure, which computes gradients.

    Args:
        optimizer: the user's; of any kind. Its groups have learning rates and weight decays.
        module: the module whose parameters it trains.
        config: the run's compression.

    Attributes:
        optimizer: as given.
        module: as given.
        distro: computes and applies the updates.
        factor: what DisTrO's learning rates are to those of the user's optimizer.
        called: whether the step was called since :meth:`reset`. Gradient scalers do not call it when a gradient is
            infinite.

    Raises:
        ConfigError: the optimizer has parameters that the module does not.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, module: torch.nn.Module, config: DistroConfig) -> None:
        self.optimizer = optimizer
        self.module = module
        self.distro = build_distro(optimizer, module, config)
        self.factor = 1.0
        self.called = False
        self._parameters = self._listed()
        replace_step(optimizer, self)

    def _listed(self) -> list[tuple[int, bool]]:
        """The optimizer's parameters, group by group, and whether each is trained."""
        groups = self.optimizer.param_groups
        return [(number, p.requires_grad) for number, group in enumerate(groups) for p in group["params"]]

    def __call__(self, closure: Callable[[], Any] | None = None) -> Any:
        """Run the closure, if there is one, and return its result."""
        self.called = True
        return None if closure is None else closure()

    def __str__(self) -> str:
        config = self.distro.config
        matrices = sum(len(group["params"]) for group in self.distro.param_groups if group["muon"])
        muon = f" (the gradients of {counted(matrices, 'parameter')} go through Muon first)" if matrices else ""
        return (
            f"DisTrO replaces the step of {type(self.optimizer).__name__}, whose learning rate, weight decay and "
            f"parameter groups it uses{muon}: {config.k} signs of each {config.chunk}x{config.chunk} chunk, "
            f"{self.distro.max_payload:,} bytes a round"
        )

    @property
    def has_gradient(self) -> bool:
        """Whether any parameter has a gradient."""
        return any(parameter.grad is not None for group in self.optimizer.param_groups for parameter in group["params"])

    def keep_with_optimizer(self) -> None:
        """Let ``state_dict`` of the user's optimizer hold DisTrO's state, and ``load_state_dict`` restore it."""

        def save(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
            return {**state, STATE_KEY: self.distro.state_dict()}

        def load(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
            if STATE_KEY in state:
                self.distro.load_state_dict(state[STATE_KEY])

        self.optimizer.register_state_dict_post_hook(save)
        self.optimizer.register_load_state_dict_pre_hook(load)

    def reset(self) -> None:
        """Forget the last call."""
        self.called = False

    def copy_rates(self) -> None:
        """Give DisTrO the learning rates of the user's optimizer, which schedulers change, times the factor.

        Raises:
            ConfigError: the optimizer has other parameters than at the start, or others are frozen.
        """
        if self._listed() != self._parameters:
            raise ConfigError(
                f"the parameters of {type(self.optimizer).__name__} were added, removed, frozen or unfrozen during "
                "training, but the nodes of a run train one list of parameters from its first step to its last. Give "
                "the optimizer all parameters at once, and keep the learning rate of those that rest at 0 (in a group "
                "of their own, with a scheduler)."
            )
        for theirs, ours in zip(self.optimizer.param_groups, self.distro.param_groups, strict=True):
            ours["lr"] = float(theirs["lr"]) * self.factor

    @contextlib.contextmanager
    def looking_ahead(self) -> Iterator[None]:
        """Give the module the looked-ahead parameters inside the context, if the run uses look-ahead."""
        if not self.distro.config.lookahead:
            yield
            return
        self.copy_rates()
        with self.distro.look_ahead():
            yield

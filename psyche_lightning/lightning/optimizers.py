"""Replaces the step of the user's optimizer by DisTrO, or makes it one of several local steps."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from psyche_lightning.distro import DisTrO, DistroConfig, LocalSteps, NonFiniteGradientError, shared_optimizer
from psyche_lightning.distro.holding import Holding
from psyche_lightning.distro.sharded import ShardedDisTrO
from psyche_lightning.errors import ConfigError, counted
from psyche_lightning.lightning.internals import replace_step
from psyche_lightning.node.parameters import named_parameters

STATE_KEY = "psyche_distro"
"""DisTrO's state within that of the user's optimizer."""


def build_distro(
    optimizer: torch.optim.Optimizer, module: torch.nn.Module, config: DistroConfig, holding: Holding | None = None
) -> DisTrO | ShardedDisTrO:
    """Build a DisTrO with the parameter groups, learning rates and weight decays of the user's optimizer.

    If parameters are divided among the ranks of a node, it is that of these ranks.

    Without local steps, gradients in groups that Muon trains (of :class:`~psyche_lightning.muon.MuonAdamW`, and all of
    ``torch.optim.Muon``) go through Muon first.

    Args:
        optimizer: the user's; of any kind.
        module: names the parameters.
        config: the run's compression.
        holding: how this node holds numbers; by default in float32.

    Raises:
        ConfigError: the optimizer has parameters that the module does not.
    """
    names = {id(parameter): name for name, parameter in named_parameters(module).items()}
    groups, local = [], config.local_steps > 0
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
                **({"muon": True, "momentum": group["momentum"]} if group.get("muon", all_muon) and not local else {}),
            }
        )
    rate = float(optimizer.param_groups[0]["lr"])
    if any(isinstance(parameter, DTensor) for parameter in module.parameters()):
        return ShardedDisTrO(groups, rate, config=config, holding=holding)
    return shared_optimizer(groups, rate, config, holding)


class TakenStep:
    """Replaces the ``step`` of the user's optimizer; a call now only runs the closure, which computes gradients.

    With local steps, it then makes the optimizer's own step.

    Args:
        optimizer: the user's; of any kind. Its groups have learning rates and weight decays.
        module: the module whose parameters it trains.
        config: the run's compression.
        holding: how this node holds numbers; by default in float32.

    Attributes:
        optimizer: as given.
        module: as given.
        distro: computes and applies the updates.
        factor: what DisTrO's learning rates are to those of the user's optimizer.
        called: whether the step was called since :meth:`reset`. Gradient scalers do not call it when a gradient is
            infinite.
        made: the optimizer's own steps since then.
        broken: the error if gradients for one of them were not finite; no other follows.

    Raises:
        ConfigError: the optimizer has parameters that the module does not, or it cannot make local steps.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        module: torch.nn.Module,
        config: DistroConfig,
        holding: Holding | None = None,
    ) -> None:
        self.optimizer = optimizer
        self.module = module
        self.distro = build_distro(optimizer, module, config, holding)
        self.factor = 1.0
        self.called, self.made = False, 0
        self.broken: NonFiniteGradientError | None = None
        self._parameters = self._listed()
        self._own_step = optimizer.step
        if self.local is not None and isinstance(optimizer, torch.optim.LBFGS):
            raise ConfigError(
                "LBFGS computes the loss several times in a step, but a local step has the gradients of one batch; "
                "use an optimizer such as AdamW or MuonAdamW, or set local_steps to 0"
            )
        replace_step(optimizer, self)

    def _listed(self) -> list[tuple[int, bool]]:
        """The optimizer's parameters, group by group, and whether each is trained."""
        groups = self.optimizer.param_groups
        return [(number, p.requires_grad) for number, group in enumerate(groups) for p in group["params"]]

    def __call__(self, closure: Callable[[], Any] | None = None) -> Any:
        """Run the closure, if there is one, make a local step if the run has them, and return the closure's result."""
        self.called = True
        result = None if closure is None else closure()
        self.step_locally()
        return result

    @property
    def local(self) -> LocalSteps | ShardedDisTrO | None:
        """``distro`` if the run has local steps."""
        if isinstance(self.distro, ShardedDisTrO):
            return self.distro if self.distro.config.local_steps else None
        return self.distro if isinstance(self.distro, LocalSteps) else None

    def step_locally(self) -> None:
        """Make the optimizer's own step with the gradients at hand; nothing without local steps or gradients."""
        if self.local is None or self.broken is not None or not self.has_gradient:
            return
        try:
            self.local.check_gradients()
        except NonFiniteGradientError as error:
            self.broken = error
            return
        groups = self.optimizer.param_groups
        rates = [group["lr"] for group in groups]
        try:
            for group in groups:
                group["lr"] = group["lr"] * self.factor
            self._own_step()
        finally:
            for group, rate in zip(groups, rates, strict=True):
                group["lr"] = rate
        self.made += 1

    @property
    def named(self) -> dict[str, torch.nn.Parameter]:
        """The optimizer's parameters by name, in the order in which torch numbers them."""
        groups = self.distro.param_groups
        names = [name for group in groups for name in group["param_names"]]
        return dict(zip(names, self.parameters, strict=True))

    def own_state(self) -> dict[str, dict[str, Any]]:
        """What local steps left in the optimizer, by parameter."""
        state = self.optimizer.state
        return {name: dict(state[parameter]) for name, parameter in self.named.items() if parameter in state}

    def load_own_state(self, saved: Mapping[str, Any]) -> None:
        """Restore what local steps left in the optimizer, without its learning rates.

        Args:
            saved: its ``state_dict``.
        """
        if self.local is not None and saved.get("state"):
            groups = self.optimizer.state_dict()["param_groups"]
            self.optimizer.load_state_dict({"state": saved["state"], "param_groups": groups})

    def __str__(self) -> str:
        (_, config), *later = self.distro.config.stages
        name, (size, *sizes) = type(self.optimizer).__name__, self.distro.payload_sizes
        changes = [
            f"; from step {first:,} on {counted(stage.local_steps, 'step') + ' and ' if stage.local_steps else ''}"
            f"{stage.k} of each chunk, {bytes_:,} bytes"
            for (first, stage), bytes_ in zip(later, sizes, strict=True)
        ]
        if self.local is not None:
            return (
                f"{name} makes {counted(config.local_steps, 'step')} in each round, and nodes exchange where they "
                f"lead: {config.k} entries of each {config.chunk}x{config.chunk} chunk, {size:,} bytes a round"
                f"{''.join(changes)}"
            )
        matrices = sum(len(group["params"]) for group in self.distro.param_groups if group["muon"])
        muon = f" (the gradients of {counted(matrices, 'parameter')} go through Muon first)" if matrices else ""
        return (
            f"DisTrO replaces the step of {name}, whose learning rate, weight decay and "
            f"parameter groups it uses{muon}: {config.k} signs of each {config.chunk}x{config.chunk} chunk, "
            f"{size:,} bytes a round{''.join(changes)}"
        )

    @property
    def has_gradient(self) -> bool:
        """Whether any parameter has a gradient, or had one that was streamed."""
        return self.distro.arrived or any(parameter.grad is not None for parameter in self.parameters)

    @property
    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """Those of the module's optimizer."""
        return (parameter for group in self.optimizer.param_groups for parameter in group["params"])

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
        """Forget the last calls, and begin a round of streamed gradients."""
        self.called, self.made, self.broken = False, 0, None
        self.distro.begin_gradients(self.copy_rates)

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

    def working(self) -> contextlib.AbstractContextManager[None]:
        """A context in which local steps move the module's parameters; afterwards they are the published ones."""
        return contextlib.nullcontext() if self.local is None else self.local.working()

    @contextlib.contextmanager
    def looking_ahead(self) -> Iterator[None]:
        """Give the module the looked-ahead parameters inside the context, if the run uses look-ahead."""
        if not self.distro.config.lookahead:
            yield
            return
        self.copy_rates()
        with self.distro.look_ahead():
            yield

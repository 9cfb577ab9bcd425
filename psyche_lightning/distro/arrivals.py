"""Gradients that are added to delta as they come, tensor by tensor, so that no two of them are held at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch

from psyche_lightning.distro.delta import Delta
from psyche_lightning.distro.internals import add_to_each
from psyche_lightning.distro.layout import Layout
from psyche_lightning.errors import ConfigError

_PART = 1 << 20
"""Elements of a gradient whose norm is computed at once."""


class Arrivals:
    """Takes each gradient from its parameter during the backward pass, adds it to delta, and frees it.

    ``delta = decay * delta + rate * gradient`` with a parameter's first gradient of a round, ``delta += rate *
    gradient`` with each further one, so micro-batches add up in delta itself. A gradient whose norm is not finite adds
    nothing; that of others stays.

    Args:
        layout: the model's layout.
        parameters: one per entry; each gets a hook.
        delta: gives the delta to add to.
        rates: gives the learning rate of each entry.
        decay: what remains of it.
        limit: chunks to work on at once.

    Attributes:
        before: called before the first gradient of a round.
    """

    def __init__(
        self,
        layout: Layout,
        parameters: Sequence[torch.Tensor],
        delta: Callable[[], Delta],
        rates: Callable[[], Sequence[float]],
        decay: float,
        limit: int,
    ) -> None:
        self._layout = layout
        self._delta = delta
        self._rates = rates
        self._decay = decay
        self._limit = limit
        self.before: Callable[[], None] = lambda: None
        self._norms: list[list[torch.Tensor]] = []
        self.begin()
        for number, parameter in enumerate(parameters):
            hook = partial(self.take, number)
            parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call] # torch's own

    @property
    def arrived(self) -> bool:
        """Whether a gradient came in this round."""
        return any(self._norms)

    def begin(self) -> None:
        """Begin a round."""
        self._norms = [[] for _ in self._layout.entries]

    def end(self) -> list[list[torch.Tensor]]:
        """End a round, in which delta also decays where no gradient came.

        Returns:
            For each entry the norms of the gradients that came, float32 scalars.
        """
        norms = self._norms
        self.begin()
        for number, its in enumerate(norms):
            if not its:
                self._add(number, None, 0.0)
        return norms

    @torch.no_grad()
    def take(self, number: int, parameter: torch.Tensor) -> None:
        """Add the gradient of an entry's parameter to delta, and take it from the parameter.

        Raises:
            ConfigError: it is sparse.
        """
        gradient, parameter.grad = parameter.grad, None
        if gradient is None:
            return
        if gradient.layout != torch.strided:
            name = self._layout.entries[number].name
            raise ConfigError(f"the gradient of {name!r} is sparse; DisTrO needs dense ones (sparse=False)")
        if not self.arrived:
            self.before()
        norm = _norm(gradient)
        gradient.masked_fill_(~torch.isfinite(norm), 0)  # so that nothing has to wait for the device
        self._add(number, gradient, self._rates()[number])
        self._norms[number].append(norm)

    @torch.no_grad()
    def _add(self, number: int, gradient: torch.Tensor | None, rate: float) -> None:
        layout, delta = self._layout, self._delta()
        matrices = {number: None if gradient is None else layout.folded(number, gradient)}
        for part in layout.parts(number, self._limit):
            chunks = delta.open(part)
            if not self._norms[number]:
                chunks.mul_(self._decay)
            views = [view for view in layout.views(part, matrices) if view is not None]
            if views:
                add_to_each(layout.blocks(part, chunks), views, rate)
            delta.close(part, chunks)


def _norm(gradient: torch.Tensor) -> torch.Tensor:
    """The L2 norm as a float32 scalar, in parts: torch copies a tensor whose norm it computes in another dtype."""
    wide = torch.promote_types(gradient.dtype, torch.float32)
    parts = torch.split(gradient.reshape(-1), _PART)
    norms = [torch.linalg.vector_norm(part, dtype=wide) for part in parts]
    whole: torch.Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return whole.to(torch.float32)


def norms_of(
    arrived: Sequence[Sequence[torch.Tensor]], read: Callable[[list[torch.Tensor]], list[float]]
) -> list[float]:
    """The norm of each entry's gradient in a round: NaN of the sum of several, infinite if one was not finite.

    Args:
        arrived: what :meth:`Arrivals.end` returns.
        read: brings scalars to the host.
    """
    flat = [norm for its in arrived for norm in its]
    values = iter(read(flat) if flat else [])
    found = []
    for its in arrived:
        norms = [next(values) for _ in its]
        broken = not all(map(math.isfinite, norms))
        found.append(math.inf if broken else math.nan if len(norms) > 1 else sum(norms))
    return found

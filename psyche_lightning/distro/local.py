"""Local steps: nodes exchange the few strongest entries of what several steps of their own optimizer changed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from psyche_lightning.distro.arithmetic import full_precision
from psyche_lightning.distro.config import STEPS_VERSION, DistroConfig
from psyche_lightning.distro.holding import Holding
from psyche_lightning.distro.internals import add_to_each, clear_each, subtract_from_each, untraced
from psyche_lightning.distro.magnitudes import UNIT, Sum, quantize
from psyche_lightning.distro.optimizer import DisTrO, values_of
from psyche_lightning.distro.votes import VotesOn, select
from psyche_lightning.errors import ConfigError, PsycheError


def shared_optimizer(
    parameters: Iterable[tuple[str, torch.Tensor]] | Iterable[dict[str, Any]],
    lr: float,
    config: DistroConfig,
    holding: Holding | None = None,
) -> DisTrO:
    """The optimizer of a configuration: :class:`LocalSteps` or :class:`DisTrO`; arguments are theirs."""
    if config.local_steps:
        return LocalSteps(parameters, lr, config, config.scale, holding=holding)
    return DisTrO(parameters, lr, config=config, holding=holding)


class LocalSteps(DisTrO):
    """Optimizer whose nodes exchange where several steps of their own optimizers lead, as a few small integers.

    In each round a node makes some steps of any optimizer of its own, within :meth:`working`. :meth:`encode` adds the
    displacement to what this node has not sent yet (delta, here the error feedback), and makes the payload of its
    strongest entries; :meth:`apply` moves the parameters by the mean of the agreed payloads, times ``scale``::

        with shared.working():
            for batch in batches:
                own.zero_grad()
                loss(batch).backward()
                own.step()
        payload = shared.encode()
        ...
        shared.apply(payloads, shared.lr_bits())

    Everything else is as with :class:`DisTrO`: equal parameters and payloads give equal parameters, to the bit.
    Learning rates and weight decay are the own optimizer's matter: the ones here move nothing.

    Args:
        parameters: as for :class:`DisTrO`, the ones that the own optimizer trains.
        lr: what :meth:`lr_bits` says of a group that has no own one.
        config: the run's compression: ``chunk``, ``k``, ``k_for``, ``schedule``, and ``decay``, the fraction of the
            error feedback that remains before a displacement is added.
        scale: factor on the mean of the displacements, above 0.
        budget: as for :class:`DisTrO`.
        holding: as for :class:`DisTrO`.

    Raises:
        ConfigError: as for :class:`DisTrO`, or the configuration has what only gradients need.
    """

    version = STEPS_VERSION

    def __init__(
        self,
        parameters: Iterable[tuple[str, torch.Tensor]] | Iterable[dict[str, Any]],
        lr: float,
        config: DistroConfig | None = None,
        scale: float = 1.0,
        budget: int = 128 << 20,
        holding: Holding | None = None,
    ) -> None:
        config = config or DistroConfig()
        config.check_local()
        if not isinstance(scale, (int, float)) or isinstance(scale, bool) or not 2**-10 <= scale <= 2**10:
            raise ConfigError(f"the scale of local steps is {scale!r}; choose a number from {2**-10} to {2**10}")
        super().__init__(parameters, lr, config=config, budget=budget, holding=holding)
        self.scale = float(scale)
        self._displaced: list[torch.Tensor] | None = None  # where the steps led, until encode

    @contextmanager
    def working(self) -> Iterator[None]:
        """Within the block, parameters may be moved at will; afterwards they hold the same bytes as before (I2).

        :meth:`encode` then takes where they were at the end of the block.
        """
        self._not_looking_ahead("working")
        self._displaced = None
        with torch.no_grad():
            self._saved = [parameter.detach().clone() for parameter in self._parameters]
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, saved in zip(self._parameters, self._saved, strict=True):
                    here = parameter.detach().clone()
                    parameter.copy_(saved)
                    saved.copy_(here)
            self._displaced, self._saved = self._saved, None

    def check_gradients(self) -> None:
        """Refuse gradients that are not finite, before the own optimizer takes them into its state.

        Raises:
            NonFiniteGradientError: a norm is not finite; the text names the parameter.
        """
        self._check_gradients()

    @untraced
    @torch.no_grad()
    def encode(self, step: int | None = None) -> bytes:
        """Add the displacement of :meth:`working` to delta, and take the strongest entries out of it.

        ``delta = decay * delta + (published - displaced)``. The k strongest entries of each chunk become votes, and
        what they say is subtracted from delta.

        Args:
            step: of the run, if the configuration has a schedule.

        Returns:
            The payload.

        Raises:
            NonFiniteGradientError: a displacement is not finite; nothing has changed.
            PsycheError: nothing was displaced since the last call.
        """
        codec, layout = self._codec(step), self.layout
        config = codec.config
        displaced, self._displaced = self._displaced, None
        if displaced is None:
            raise PsycheError("encode was called without working() before it, so there is no displacement to send")
        moves = self._moves(displaced)
        delta = self._deltas()
        votes = VotesOn.empty(layout.chunk_count, config.max_k, self._home, STEPS_VERSION)
        limit = self._limit(config.max_k)
        with full_precision(*self._devices):
            for batch in layout.batches(limit, list(zip(self._devices, codec.ks, strict=True))):
                k = codec.ks[batch.tiles[0].entry]
                chunks = delta.open(batch)
                chunks.mul_(config.decay)
                views = [view for view in layout.views(batch, moves) if view is not None]
                add_to_each(layout.blocks(batch, chunks), views, 1.0)
                chosen, values = select(chunks, k)
                signs, exponents, sent = quantize(values)
                chunks.view(len(batch), -1).scatter_(1, chosen, values.sub_(sent))
                if batch.padding:
                    clear_each(layout.padding(batch, chunks))
                delta.close(batch, chunks)
                some = VotesOn.chosen(chosen, signs, exponents)
                votes.put(slice(batch.start, batch.stop), some)
        self.nonce += 1
        payload = codec.encode(votes)
        self._sent.append(payload)
        return payload

    def _moves(self, displaced: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """``published - displaced`` of each entry as its matrix, float32; may overwrite ``displaced``."""
        moves = []
        for parameter, there in zip(self._parameters, displaced, strict=True):
            if there.dtype == torch.float32:
                moves.append(torch.sub(parameter.detach(), there, out=there))
            else:
                moves.append(parameter.detach().to(torch.float32).sub_(there))
        norms = values_of([torch.linalg.vector_norm(move) for move in moves])
        text = "the local steps moved {!r} by {}, but it must be finite; lower the learning rate"
        self._refuse_endless(norms, text)
        return [self.layout.folded(number, move) for number, move in enumerate(moves)]

    @untraced
    @torch.no_grad()
    def apply(self, payloads: Sequence[bytes], lrs: Sequence[int], step: int | None = None) -> None:
        """Move the parameters by the agreed payloads: ``p -= scale / n * sum of votes``, n being those with votes.

        The result is a pure function of the parameters and the set of payloads (I1).

        Args:
            payloads: the agreed payloads, in any order.
            lrs: the agreed learning rate of each group, as :meth:`lr_bits` gives them; they are only checked.
            step: the payloads' step of the run, if the configuration has a schedule.

        Raises:
            PayloadError: a payload or a learning rate is malformed; nothing has changed.
        """
        self._not_looking_ahead("apply")
        self._checked_rates(lrs)
        self._agreement = []
        layout, codec = self.layout, self._codec(step)
        voting = [payload for payload in payloads if payload != codec.abstention]
        span = self._checked_span(voting, codec)
        if not voting:
            return
        factor = float(np.float32(self.scale / len(voting))) * UNIT  # a float32 number times a power of two
        limit = self._limit(len(voting) * codec.config.max_k)
        total: Sum | None = None
        work: torch.Tensor | None = None
        first = last = 0  # the chunks whose votes are loaded
        self._masters.begin()
        with full_precision(*self._devices):
            for batch in layout.batches(limit, self._devices):
                device = self._devices[batch.tiles[0].entry]
                if batch.stop > last or total is None or total.device != device:
                    first, last = batch.start, min(batch.start + span, layout.chunk_count)
                    total = Sum(codec.decode_on(device, voting, first, last), device)
                if work is None or work.device != device:
                    work = torch.empty(
                        min(limit, layout.chunk_count), self.config.area, dtype=total.dtype, device=device
                    )
                sums = total.sums(batch.start - first, batch.stop - first, work[: len(batch)].zero_())
                # Three roundings, each of a kernel of its own: to float32, by the factor, by the difference.
                sums.mul_(factor)
                blocks = layout.blocks(batch, sums.view(len(batch), self.config.chunk, self.config.chunk))
                subtract_from_each(self._masters.open(batch), blocks, 1.0)
                self._masters.close(batch)
        self._finish(payloads, codec)

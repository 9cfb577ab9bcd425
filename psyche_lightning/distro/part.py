"""The optimizer that each rank of a node has for its fragments; their votes meet elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from psyche_lightning.distro.config import STEPS_VERSION, WIRE_VERSION, DistroConfig
from psyche_lightning.distro.fragments import Fragment
from psyche_lightning.distro.holding import Holding
from psyche_lightning.distro.layout import Layout
from psyche_lightning.distro.local import LocalSteps
from psyche_lightning.distro.matrices import Matrices
from psyche_lightning.distro.optimizer import DisTrO, NonFiniteGradientError, first_endless
from psyche_lightning.distro.payload import PayloadCodec
from psyche_lightning.distro.shards import Ranks
from psyche_lightning.distro.votes import Votes, VotesOn
from psyche_lightning.muon import MOMENTUM, to_directions

GAP = 256
"""Chunks of others that are sooner read along with one's own than left out."""


class PartCodec(PayloadCodec):
    """Keeps the votes of one rank's chunks when they are written, and reads those chunks from whole payloads.

    Args:
        whole: of the whole model.
        ks: the k of each fragment.
        chunks: the numbers in the whole model of this rank's chunks.

    Attributes:
        whole: as given.
        config: of ``whole``.
        ks: as given.
        votes: the votes that were written last.
    """

    def __init__(self, whole: PayloadCodec, ks: list[int], chunks: NDArray[np.int64]) -> None:
        self.whole, self.config, self.ks = whole, whole.config, ks
        self.size = whole.size
        self.votes: Votes | None = None
        self._chunks = chunks

    @property
    def abstention(self) -> bytes:
        """The payload without votes."""
        return self.whole.abstention

    def encode(self, votes: Votes | VotesOn) -> bytes:
        """Keep the votes; the payload is written when those of all ranks are together."""
        self.votes = votes.votes() if isinstance(votes, VotesOn) else votes
        return b""

    def check(self, payload: bytes) -> None:
        """As :meth:`PayloadCodec.check`."""
        self.whole.check(payload)

    def forget(self) -> None:
        """As :meth:`PayloadCodec.forget`."""
        self.whole.forget()

    def decode(self, payload: bytes, start: int = 0, stop: int | None = None) -> Votes:
        """Read the votes of some of this rank's chunks."""
        return self.decode_each([payload], start, stop)[0]

    def decode_each(self, payloads: Sequence[bytes], start: int = 0, stop: int | None = None) -> list[Votes]:
        """Read the votes of some of this rank's chunks from several payloads."""
        return [votes.votes() for votes in self.decode_on(torch.device("cpu"), payloads, start, stop)]

    def decode_on(
        self, where: torch.device, payloads: Sequence[bytes], start: int = 0, stop: int | None = None
    ) -> list[VotesOn]:
        """Read the votes of some of this rank's chunks from several payloads, onto a device."""
        chunks = self._chunks[start:stop]  # never none
        version = STEPS_VERSION if self.config.local_steps else WIRE_VERSION
        found = [VotesOn.empty(len(chunks), self.config.max_k, where, version) for _ in payloads]
        edges = [0, *(np.flatnonzero(np.diff(chunks) > GAP) + 1).tolist(), len(chunks)]
        for first, last in pairwise(edges):
            low, high = int(chunks[first]), int(chunks[last - 1]) + 1
            numbers = torch.from_numpy(chunks[first:last] - low).to(where)
            for votes, its in zip(found, self.whole.decode_on(where, payloads, low, high), strict=True):
                votes.put(slice(first, last), its.of_chunks(numbers, self.config.max_k))
        return found


class Part(DisTrO):
    """What a rank's own optimizer has beyond that of a node with one device.

    Args:
        groups: the parameter groups, with the rank's fragments for parameters.
        lr: as for :class:`DisTrO`.
        config: as for :class:`DisTrO`.
        budget: as for :class:`DisTrO`.
        holding: as for :class:`DisTrO`.
        whole: the layout of the whole model.
        mine: the rank's fragments.
        ranks: the node's ranks.
        muon: the number of the group of each matrix in the whole model that Muon has, by the matrix's number.
        matrices: these matrices.
        given: says which of some parameters have a gradient; collective.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        lr: float,
        config: DistroConfig,
        budget: int,
        holding: Holding | None,
        whole: Layout,
        mine: Sequence[Fragment],
        ranks: Ranks,
        muon: Mapping[int, int],
        matrices: Matrices,
        given: Callable[[Sequence[int]], list[int]],
    ) -> None:
        self._muon, self._matrices, self._given = muon, matrices, given
        self._whole, self._mine, self._ranks = whole, mine, ranks
        super().__init__(groups, lr, config=config, budget=budget, holding=holding, **self._more(config))

    def _more(self, config: DistroConfig) -> dict[str, Any]:
        return {}

    def _make_codec(self, stage: DistroConfig) -> PayloadCodec:
        whole = PayloadCodec(self._whole, stage, self.version)
        chunks = [np.arange(part.chunk, part.chunk + part.chunks) for part in self._mine]
        return PartCodec(whole, [whole.ks[part.entry] for part in self._mine], np.concatenate(chunks))

    def codec(self, step: int | None) -> PartCodec:
        """Writes and reads the payloads of a step."""
        return cast(PartCodec, self._codec(step))

    def _refuse_endless(self, norms: Sequence[float], text: str) -> None:
        names = [self._whole.entries[part.entry].name for part in self._mine]
        problem = self._ranks.agree(first_endless(names, norms, text))
        if problem is not None:
            raise NonFiniteGradientError(problem)

    def _directions(self) -> dict[int, torch.Tensor]:
        if not self._muon:
            return {}
        some = self._given(list(self._muon))
        found: dict[int, torch.Tensor] = {}
        momenta: dict[int, torch.Tensor] = {}
        for number, part in enumerate(self._mine):
            if part.entry in some:
                parameter = self._parameters[number]
                if parameter.grad is None:
                    found[number] = torch.zeros_like(parameter, dtype=torch.float32)
                else:
                    found[number] = parameter.grad.detach().to(torch.float32)
                momenta[number] = self.state[parameter].setdefault(MOMENTUM, self.momentum_of(number))

        def compute(number: int, values: list[torch.Tensor]) -> None:
            gradient, momentum = values  # both overwritten
            to_directions([gradient], [{MOMENTUM: momentum}], float(self.param_groups[self._muon[number]]["momentum"]))

        self._matrices.change(some, (found, momenta), compute)
        return found

    def stream(self, number: int) -> None:
        """Add a fragment's gradient to delta, and free it."""
        assert self._arrivals is not None  # since gradients are streamed
        self._arrivals.take(number, self._parameters[number])

    def has_momentum(self, number: int) -> bool:
        """Whether Muon has begun with a fragment's matrix."""
        return MOMENTUM in self.state.get(self._parameters[number], {})

    def momentum_of(self, number: int) -> torch.Tensor:
        """Muon's momentum of a fragment, float32; zeros if there is none."""
        parameter = self._parameters[number]
        if self.has_momentum(number):
            return cast(torch.Tensor, self.state[parameter][MOMENTUM])
        return torch.zeros_like(parameter, dtype=torch.float32)

    def published_of(self, number: int) -> torch.Tensor:
        """The published values of a fragment, float32."""
        return self._masters.get(number).detach()

    @property
    def has_delta(self) -> bool:
        """Whether delta has begun."""
        return self._delta is not None

    def delta_of(self, number: int) -> torch.Tensor:
        """A copy of delta of a fragment, float32."""
        assert self._delta is not None
        return self._delta.get(number)


class StepsPart(Part, LocalSteps):
    """The same with local steps."""

    def _more(self, config: DistroConfig) -> dict[str, Any]:
        return {"scale": config.scale}

"""How fast a run's members train, and the weights by which the samples of a round are divided among them.

A member says in its reports how many tokens a second it trains, and nobody can check that. It need not be checked: a
payload counts once whatever its share, so who says too little only trains less, and who says too much is late. The
latter is the one thing that costs others time, so a claim above the median counts only as long as it is kept.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from psyche_lightning.protocol.state import MOST_WEIGHT, Round

MEASURED = 2
"""Measurements after which a speed is known; a node's first round also loads and compiles."""
EARLY = 0.5
"""A first measurement counts at once if it is below this part of the median: so slow is no first round of others."""
KEPT = 5
"""The newest measurements of a member; their median is its speed, of two of them the higher one."""
MEMBERS = 1024
"""Members whose measurements are kept, also while they are away."""
RANGE = 16
"""A client counts as at most this many times slower than the fastest, and faster than the median."""
FASTER = 2.0
"""A new measurement counts up to this many times the speed so far."""
LATE = 7 / 8
"""A client whose result is missing is thought this much slower, so that its next shares let it catch up."""
RESTED = 33 / 32
"""A client without a share is thought this much faster after each round, so that its speed is measured again."""
UNEQUAL = 1.25
"""Equal shares stay while they cost less than this factor in time: what equal machines measure differs a little."""
LEAST = 0.25
"""Equal shares stay while they cost less than so many seconds of a round: so short a time says little of a speed."""
EQUAL = 1.1
"""Shares become equal again once that costs less than this factor."""
DRIFT = 1.05
"""Unequal shares stay while they cost less than this factor."""


class Speeds:
    """The speeds of a run's members.

    Attributes:
        known: tokens per second by signer, where enough is measured.
    """

    def __init__(self) -> None:
        self.known: dict[bytes, float] = {}
        self._first: dict[bytes, float] = {}
        self._rates: dict[bytes, deque[float]] = {}
        self._steps: dict[bytes, int] = {}

    def measured(self, signer: bytes, step: int, rate: float) -> None:
        """Add what a member says of a step, once; a rate that is no positive number says nothing."""
        if step <= self._steps.get(signer, 0) or not 0 < rate < math.inf:
            return
        if signer in self.known:
            rate = min(rate, FASTER * self.known[signer])
        rates = self._rates.pop(signer, deque(maxlen=KEPT))
        rates.append(rate)
        self._set(signer, step, rates)  # the newest last
        while len(self._rates) > MEMBERS:
            oldest = next(iter(self._rates))
            for each in (self._rates, self._steps, self.known, self._first):
                each.pop(oldest, None)

    def _set(self, signer: bytes, step: int, rates: deque[float]) -> None:
        self._rates[signer], self._steps[signer] = rates, step
        speed = statistics.median_high(rates)
        if len(rates) >= MEASURED or signer in self.known:
            self.known[signer] = speed
            self._first.pop(signer, None)
        else:
            self._first[signer] = speed
        every = {**self.known, **self._first}
        if self._first and min(self._first.values()) < EARLY * statistics.median_low(every.values()):
            self.known, self._first = every, {}

    def missed(self, signer: bytes) -> None:
        """A client's result is not in a decided round: it counts as no faster than the median until it shows more."""
        if signer in self.known:
            self._scale(signer, min(LATE, statistics.median_low(self.known.values()) / self.known[signer]))

    def rested(self, signer: bytes) -> None:
        """A client had no share of a round."""
        if signer in self.known:
            self._scale(signer, RESTED)

    def _scale(self, signer: bytes, factor: float) -> None:
        rates = deque((rate * factor for rate in self._rates[signer]), maxlen=KEPT)
        self._set(signer, self._steps[signer], rates)

    def undo(self, step: int) -> None:
        """The run goes back to the parameters after a step, and trains later ones again."""
        self._steps = {signer: min(step, last) for signer, last in self._steps.items()}

    def dump(self) -> dict[str, Any]:
        """Everything as JSON values."""
        return {signer.hex(): [self._steps[signer], *rates] for signer, rates in self._rates.items()}

    @classmethod
    def load(cls, data: Mapping[str, Sequence[float]]) -> Speeds:
        """Read what :meth:`dump` wrote; other data raises the errors of reading it."""
        speeds = cls()
        for text, (step, *rates) in data.items():
            speeds._set(bytes.fromhex(text), int(step), deque(map(float, rates), maxlen=KEPT))
        return speeds


def weigh(
    clients: Sequence[bytes], speeds: Mapping[bytes, float], before: Round | None, samples: float = math.inf
) -> tuple[int, ...]:
    """The weights of a round that begins.

    They stay as they are as long as that costs little time, so that measurements that differ a little change nothing.

    Args:
        clients: the round's clients.
        speeds: those that are known, in samples a second; the others are as fast as the median.
        before: the round before it in the epoch, if there is one.
        samples: of the round.

    Returns:
        The weights, as of :class:`~psyche_lightning.protocol.state.Round`.
    """
    known = [speeds[client] for client in clients if client in speeds]
    if not known:
        return ()
    middle = statistics.median_low(known)
    each = [min(speeds.get(client, middle), RANGE * middle) for client in clients]
    fastest = max(each)
    each = [max(speed, fastest / RANGE) for speed in each]

    def cost(weights: Sequence[int]) -> float:
        """The time of a round with these shares, in that of one in which nobody waits."""
        slowest = max(weight / speed for weight, speed in zip(weights, each, strict=True))
        return slowest * sum(each) / sum(weights)

    equal = cost([1] * len(clients))
    if (equal - 1) * samples / sum(each) < LEAST:
        return ()
    held = before.weights if before is not None and before.clients == tuple(clients) else ()
    if equal < (EQUAL if held else UNEQUAL):
        return ()
    if held and cost(held) < DRIFT:
        return held
    return tuple(max(1, round(MOST_WEIGHT * speed / fastest)) for speed in each)

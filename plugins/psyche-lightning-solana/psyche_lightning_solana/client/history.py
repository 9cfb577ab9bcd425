"""The rounds of an epoch as a node saw them; the account itself keeps only the last four."""

from __future__ import annotations

from psyche_lightning.coordinator.history import plain_round
from psyche_lightning.protocol.state import Round, RunState

MAX_ROUNDS = 4096
"""Rounds of an epoch that are kept; a node that needs older ones takes a newer snapshot instead."""


class History:
    """What was seen of the newest epoch's rounds, without Bloom filters.

    A round is settled once a later one is there: no record is added to it any more.
    """

    def __init__(self) -> None:
        self.epoch = -1
        self._settled: dict[int, Round] = {}
        self._newest: Round | None = None

    def observe(self, state: RunState) -> None:
        """Take the rounds that a state shows."""
        current = state.current
        if current is None:
            return
        over = not state.phase.active
        epoch = state.epoch - over
        if epoch < self.epoch:
            return
        if epoch > self.epoch:
            self.epoch, self._settled = epoch, {}
        self._newest = plain_round(current)
        for round_ in state.rounds:
            if round_.height < current.height and round_.height not in self._settled:
                self._settled[round_.height] = plain_round(round_)
        for height in range(current.height - MAX_ROUNDS, -1, -1):
            if self._settled.pop(height, None) is None:
                break

    def fill(self, epoch: int, rounds: list[Round]) -> None:
        """Take settled rounds that were found elsewhere."""
        if epoch == self.epoch:
            for round_ in rounds:
                self._settled.setdefault(round_.height, plain_round(round_))

    def missing(self, epoch: int, first: int) -> bool:
        """Whether some round of that epoch, from height ``first`` on, was not seen to its end."""
        if epoch != self.epoch or self._newest is None:
            return False
        return any(height not in self._settled for height in range(first, self._newest.height))

    def rounds(self, epoch: int, first: int) -> list[Round]:
        """The rounds from height ``first`` to the newest, whose records may still grow; empty if one is missing."""
        if epoch != self.epoch or self._newest is None or first > self._newest.height or self.missing(epoch, first):
            return []
        return [*(self._settled[height] for height in range(first, self._newest.height)), self._newest]

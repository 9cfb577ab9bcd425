"""How long a witness waits for late results when a quorum of them is here. Part of the node core, so no I/O or clock.

A round does not wait for the slowest: each missing result gets as long again as the quorum took, and at least a few
seconds. With overlap a witness begins to wait when it has trained the round after theirs itself, because late results
hold nobody up before. Each time that a trainer makes others wait for long, it gets half of that. So who is late again
and again costs little, and gets its time back by being quick.
"""

from __future__ import annotations

from collections import Counter

from psyche_lightning.node.rounds import RoundLog
from psyche_lightning.protocol.committee import quorum

LEAST = 5.0
"""Seconds that a trainer that was never late gets in any case."""
USUAL = 0.5
"""Share of the quorum's time after which a result is late."""
MOST_LATE = 8
"""Times that count: a trainer gets at least 1 / 2^MOST_LATE of the full time."""


class Patience:
    """One node's patience with trainers, by node key."""

    def __init__(self) -> None:
        self._late: Counter[bytes] = Counter()
        self._before: Counter[bytes] = Counter()
        self._key: object = None
        self._began = 0.0
        self._since: float | None = None
        self._judged = False

    def over(self, key: object, about: RoundLog, missing: set[int], now: float, *, held: bool = True) -> bool:
        """Whether to go on without the missing results.

        Args:
            key: names the round.
            about: the round.
            missing: indices of the trainers whose results are awaited.
            now: seconds.
            held: whether the missing results hold this node up by now, so that it begins to wait.
        """
        if key != self._key:
            self._key, self._began, self._since, self._judged = key, now, None, False
            self._before = self._late.copy()
        here = len(about.batches) - len(about.missing)
        if self._since is None and (not missing or (held and here >= quorum(len(about.batches)))):
            self._since = now
        if self._since is None:
            return False
        taken, waited = self._since - self._began, now - self._since
        late = waited >= USUAL * max(taken, 1.0)
        if not self._judged and (late or not missing):
            self._judged = True
            for index in about.batches:
                node = about.nodes[index]
                self._late[node] = min(self._late[node] + 1, MOST_LATE) if index in missing else self._late[node] // 2
        most = max((max(taken, LEAST) / 2.0 ** self._before[about.nodes[index]] for index in missing), default=0.0)
        return not missing or waited >= most

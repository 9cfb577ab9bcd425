"""Repairs a node whose parameters are not the run's, or that misses data to reach them (I6).

Part of the node core, so it does no I/O. A snapshot and replay restore parameters within an epoch. This node keeps
some snapshots and peers offer others. An offer is proven when its digest is on the coordinator's record. An older one
can be tried: the replay must reach a digest that is on record.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from psyche_lightning.node.agreement import EpochLog
from psyche_lightning.node.settings import Settings

PRINT_SIZE = 8
MAX_OFFERS = 8
"""Offers that are kept of each peer."""
SNAPSHOT_PAUSE = 4
"""Digests between two snapshots that peers request."""


@dataclass(frozen=True, order=True)
class Base:
    """Parameters from which a replay can begin.

    Attributes:
        applied: rounds of the epoch that they contain.
        digest: their digest.
    """

    applied: int
    digest: bytes


@dataclass
class Repair:
    """A node's repair state for an epoch.

    Attributes:
        settings: see :class:`Settings`.
        own: snapshots of this epoch that this node keeps, ascending.
        offers: snapshots that each peer offers, the latest ones last.
        restored: snapshots that this node stored before a restart.
        doubted: whether this node has replayed because others hold other parameters than it at the epoch's end.
        trial: the unproven base from which the parameters stem, until the replay reaches a digest on record.
        confirmed: rounds applied at the newest digest shared with a quorum.
        stuck: height of the round that cannot be applied, although all peers were asked.
        wanted: whether a peer asked for a snapshot.
        sought: when this node started to look for parameters to replay.
    """

    settings: Settings
    own: list[Base] = field(default_factory=list)
    offers: dict[bytes, list[Base]] = field(default_factory=dict)
    confirmed: int = 0
    stuck: int | None = None
    wanted: bool = False
    sought: float | None = None
    trial: Base | None = None
    restored: list[Base] = field(default_factory=list)
    doubted: bool = False
    _prints: dict[int, bytes] = field(default_factory=dict)
    _suspect: dict[int, bytes] = field(default_factory=dict)
    _replayed: set[int] = field(default_factory=set)
    _blocked: tuple[int, float] = (-1, 0.0)
    _refused: set[Base] = field(default_factory=set)

    # --- differences ----------------------------------------------------------------------------------------------

    def fingerprint(self, applied: int, prints: bytes) -> str | None:
        """Note the parameters' fingerprints; in a replay, return the first tensor that differs from before."""
        self._prints[applied] = prints
        before = self._suspect.pop(applied, prints)
        if before == prints:
            return None
        self._suspect.clear()
        pairs = zip(_blocks(before), _blocks(prints), strict=False)
        place = next((i for i, (a, b) in enumerate(pairs) if a != b), 0)
        names = self.settings.tensors
        return names[place] if place < len(names) else f"number {place}"

    def confirm(self, applied: int) -> None:
        """The digest of this node's parameters after ``applied`` rounds is on record."""
        self.confirmed, self.trial = applied, None
        self._prints = {rounds: prints for rounds, prints in self._prints.items() if rounds > applied}

    def differ(self, applied: int) -> bool:
        """Other parameters are on record.

        Args:
            applied: rounds.

        Returns:
            Whether to replay; False if that did not help before.
        """
        if applied in self._replayed:
            self.stuck = applied - 1
            return False
        self._replayed.add(applied)
        self._suspect, self._prints = self._prints, {}
        return True

    # --- what is missing ------------------------------------------------------------------------------------------

    def waited(self, height: int, now: float) -> float:
        """Seconds for which ``height`` has been the round that cannot be applied."""
        if self._blocked[0] != height:
            self._blocked = (height, now)
        return now - self._blocked[1]

    def hear(self, peer: bytes, offer: Base) -> None:
        """Note a peer's offer."""
        known = self.offers.setdefault(peer, [])
        if offer not in known and offer not in self._refused:
            known.append(offer)
            del known[:-MAX_OFFERS]

    def ask(self, applied: int) -> None:
        """Note a peer's snapshot request, if due."""
        pause = SNAPSHOT_PAUSE * self.settings.digest_every
        self.wanted = not self.own or self.own[-1].applied + pause <= applied

    # --- where to begin -------------------------------------------------------------------------------------------

    def bases(self, log: EpochLog) -> list[Base]:
        """Bases for a replay, best first: this node's snapshots and proven ones, then those that can be tried.

        Snapshots from before a restart need a proof like a peer's: the parameters may have been wrong already.
        """
        first = Base(0, log.digest)
        own = [base for base in self.own if base.applied <= self.confirmed] or [first]
        offers = sorted({offer for offered in self.offers.values() for offer in offered})
        known, newest = [*offers, *self.restored], max(log.named, default=0)
        proven = [base for base in known if log.named.get(base.applied) == base.digest]
        mine, tried = ([base for base in each if base.applied < newest] for each in (self.restored, offers))
        found = [*reversed(own), *reversed(proven), first] if self.own else [*reversed(proven), *reversed(mine), first]
        least = -1 if self.stuck is None else self.stuck
        return [base for base in dict.fromkeys([*found, *reversed(tried)]) if base.applied > least]

    def proven(self, log: EpochLog, base: Base) -> bool:
        """Whether the base needs no trial."""
        start = base == Base(0, log.digest)
        return start or base in self.own or log.named.get(base.applied) == base.digest

    def remember(self, bases: Sequence[Base]) -> None:
        """Take the snapshots that this node stored before a restart."""
        self.restored = sorted(bases)

    def refuse(self, base: Base) -> None:
        """The trial of an offer failed."""
        self._refused.add(base)
        self.restored = [other for other in self.restored if other != base]
        for offered in self.offers.values():
            offered[:] = [other for other in offered if other != base]
        self.trial = None

    def keep(self, base: Base) -> None:
        """Note a stored snapshot."""
        self.own.append(base)
        self.wanted = False

    def outdated(self) -> int:
        """Height below which nothing is needed: that of the second-newest confirmed snapshot."""
        good = [base for base in self.own if base.applied <= self.confirmed]
        if len(good) < 2:
            return 0
        self.own = [base for base in self.own if base >= good[-2]]
        return good[-2].applied


def _blocks(prints: bytes) -> Sequence[bytes]:
    return [prints[i : i + PRINT_SIZE] for i in range(0, len(prints), PRINT_SIZE)]

"""Derives agreed sets and open ids from what a node knows of an epoch's rounds.

Pure data and rules without I/O or clock. Invariant I1 needs this rule: the coordinator's record alone says which
results a round has, regardless of what a node was sent.
"""

from __future__ import annotations

import math
import statistics
import struct
from dataclasses import dataclass, field

from psyche_lightning.node.rates import ONE_GROUP, Rates, agreed_rates
from psyche_lightning.node.rounds import Entry, RoundLog
from psyche_lightning.protocol.messages import Envelope
from psyche_lightning.protocol.open_ids import Interval, OpenIds, reopen, take
from psyche_lightning.protocol.state import Checkpoint, Round


@dataclass(frozen=True)
class AgreedSet:
    """The results that every node applies.

    Attributes:
        entries: agreed results in ascending commitment order.
        lrs: fp32 bits of each parameter group's agreed learning rate; empty if nothing is agreed.
    """

    entries: tuple[Entry, ...] = ()
    lrs: tuple[int, ...] = ()

    @property
    def trained(self) -> set[int]:
        """Indices of the trainers whose ids count as trained."""
        return {entry.trainer for entry in self.entries if entry.result.tokens}

    @property
    def loss(self) -> float | None:
        """The median of the losses of those who trained, which few members cannot move far; None without any."""
        losses = [float32(entry.result.loss) for entry in self.entries if entry.result.tokens]
        finite = [loss for loss in losses if math.isfinite(loss)]
        return statistics.median(finite) if finite else None


@dataclass(frozen=True)
class Unknown:
    """What is missing to know a round's agreed set.

    Attributes:
        results: whether the list is here, and announcements that it names are not.
    """

    results: bool = False


def agreed_set(results: RoundLog, attesting: RoundLog) -> AgreedSet | Unknown:
    """The agreed set of the results of one round.

    The coordinator's record decides it: the results are those of the list whose Merkle root a quorum of the witnesses
    reported; without such a root there are none. Any node can supply the list.

    Args:
        results: the round whose results these are.
        attesting: the round that witnessed them, when its record is final.
    """
    root = attesting.root
    listed = () if root is None else results.list_of(root)
    if listed is None:
        return Unknown()
    if any(commitment not in results.entries for commitment in listed):
        return Unknown(results=True)
    entries = [results.entries[commitment] for commitment in listed]
    return AgreedSet(tuple(entries), agreed_rates(entry.result.lrs for entry in entries))


def float32(bits: int) -> float:
    """The float32 with those bits."""
    value: float = struct.unpack("<f", struct.pack("<I", bits))[0]
    return value


@dataclass(frozen=True)
class DecidedRound:
    """A decided round as a node writes it to the run's ledger.

    Attributes:
        epoch: of the run.
        round: the coordinator's record.
        nodes: node key of each client.
        again: ids of earlier rounds that it retrained.
        results: the agreed announcements.
        parameters: digest at the epoch's start.
    """

    epoch: int
    round: Round
    nodes: tuple[bytes, ...]
    again: tuple[Interval, ...]
    results: tuple[Envelope, ...]
    parameters: bytes


@dataclass
class EpochLog:
    """The rounds of one epoch that this node knows.

    Attributes:
        epoch: number of the epoch.
        digest: parameters at its start.
        first_step: optimizer step of its first round.
        needed: number of equal reports that decide one of its rounds.
        rates: the learning rates that its results may have.
        rounds: by height.
        early: messages of rounds not yet announced or assigned, by height.
        agreements: decisions by height; contiguous.
        decided: height of the first undecided round; None while the ids open before it are unknown.
        open_at: open ids by number of decided rounds, from this node's first round on.
        named: the digests on the coordinator's record, by the number of rounds applied.
    """

    epoch: int
    digest: bytes
    first_step: int
    needed: int
    rates: Rates = ONE_GROUP
    rounds: dict[int, RoundLog] = field(default_factory=dict)
    early: dict[int, list[Envelope]] = field(default_factory=dict)
    agreements: dict[int, AgreedSet] = field(default_factory=dict)
    decided: int | None = None
    open_at: dict[int, OpenIds] = field(default_factory=dict)
    named: dict[int, bytes] = field(default_factory=dict)
    _base: int = 0

    def start(self, applied: int, open_ids: OpenIds) -> None:
        """Start (or restart) deciding at round ``applied``; these ids were open before it."""
        self._base = self.decided = applied
        self.agreements = {}
        self.open_at = {applied: open_ids}
        for height, log in self.rounds.items():
            log.assigned = log.assigned and (height < applied or not log.round.step)

    def assign(self) -> list[RoundLog]:
        """Assign batches to every round with known ids; returns those rounds, ascending."""
        found = []
        height = self._base
        if self.decided is not None:
            height = max(self._base, self.decided)
            while (log := self.rounds.get(height)) is not None and height < self.decided + 3:
                if not log.assigned:
                    self.early.setdefault(height, []).extend(log.assign(self.again(height)))
                    found.append(log)
                height += 1
        return found

    def again(self, height: int) -> tuple[Interval, ...]:
        """The earlier rounds' ids that this round retrains."""
        first = max(self._base, height - 2)
        open_ids = self.open_at[first]
        taken: tuple[Interval, ...] = ()
        for each in range(first, height + 1):
            taken, open_ids = self._take(open_ids, self.rounds[each].round)
        return taken

    def close(self, agreement: AgreedSet) -> DecidedRound:
        """Record a decision for the first open round."""
        height = self.decided
        assert height is not None
        log = self.rounds[height]
        trained = agreement.trained
        lost = [interval for trainer, batch in log.batches.items() if trainer not in trained for interval in batch]
        again, rest = self._take(self.open_at[height], log.round)
        self.agreements[height] = agreement
        self.open_at[height + 1] = reopen(rest, log.round.step, lost)
        self.decided = height + 1
        results = tuple(entry.envelope for entry in agreement.entries)
        return DecidedRound(self.epoch, log.round, log.nodes, again, results, self.digest)

    def forget(self, before: int) -> None:
        """Drop rounds below that height."""
        for known in (self.rounds, self.agreements, self.open_at, self.early):
            for height in [height for height in known if height < before]:
                del known[height]
        self._base = max(self._base, before)

    def payloads(self) -> tuple[bytes, ...]:
        """Hashes of all payloads announced in kept rounds."""
        return tuple(entry.result.payload for log in self.rounds.values() for entry in log.entries.values())

    def name(self, checkpoint: Checkpoint) -> None:
        """Note parameters of this epoch that the coordinator has on record."""
        applied = checkpoint.step + 1 - self.first_step
        if applied >= 0 and checkpoint.digest:
            self.named[applied] = checkpoint.digest

    @staticmethod
    def _take(open_ids: OpenIds, round_: Round) -> tuple[tuple[Interval, ...], OpenIds]:
        return take(open_ids, round_.step, round_.batch_size)

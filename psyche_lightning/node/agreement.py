"""Derives agreed sets and open ids from what a node knows of an epoch's rounds.

Pure data and rules without I/O or clock. Invariant I1 needs this rule: nodes with the same witness records and lists
decide the same set, regardless of other messages.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field

from psyche_lightning.node.rounds import Entry, RoundLog
from psyche_lightning.protocol.committee import quorum
from psyche_lightning.protocol.messages import Attest, Envelope
from psyche_lightning.protocol.open_ids import Interval, OpenIds, reopen, take
from psyche_lightning.protocol.state import Round


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


@dataclass(frozen=True)
class Undecided:
    """Data missing to decide.

    Attributes:
        lists: indices (in the attesting round's clients) of witnesses whose list did not arrive.
        results: whether an agreed commitment's announcement is unknown.
    """

    lists: tuple[int, ...] = ()
    results: bool = False


def decide(results: RoundLog, attesting: RoundLog, absent: Collection[int] = ()) -> AgreedSet | Undecided:
    """The agreed set of the results of one round (design, section 3).

    A commitment is agreed when a quorum of the *expected* witnesses of the attesting round lists it. A list counts
    when its Merkle root is in that witness' record. If one trainer has two agreed commitments for one batch, both are
    excluded. Missing lists matter only while they could still change the outcome.

    Args:
        results: the round whose results are decided.
        attesting: the final round that witnessed them.
        absent: witnesses whose list no peer can supply.

    Returns:
        The agreement or the missing data.
    """
    needed = quorum(attesting.selection.witness_count)
    records = attesting.round.witnesses
    if len(records) < needed or not results.batches:
        return AgreedSet()
    counts: Counter[bytes] = Counter()
    missing = []
    for record in records:
        envelope = attesting.attests.get(record.proof.index, {}).get(record.merkle)
        if envelope is not None:
            assert isinstance(envelope.message, Attest)
            counts.update(envelope.message.hashes())
        elif record.proof.index not in absent:
            missing.append(record.proof.index)
    open_ = len(missing) >= needed or any(needed - len(missing) <= count < needed for count in counts.values())
    if missing and open_:
        return Undecided(lists=tuple(missing))
    agreed = sorted(commitment for commitment, count in counts.items() if count >= needed)
    if any(commitment not in results.entries for commitment in agreed):
        return Undecided(results=True)
    entries = [results.entries[commitment] for commitment in agreed]
    per_trainer = Counter(entry.trainer for entry in entries)
    entries = [entry for entry in entries if per_trainer[entry.trainer] == 1]
    rates = Counter(entry.result.lrs for entry in entries)
    lrs = min(rates, key=lambda bits: (-rates[bits], bits)) if rates else ()
    return AgreedSet(tuple(entries), lrs)


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
        ended: agreed digest at the epoch's end; empty except in its last round.
    """

    epoch: int
    round: Round
    nodes: tuple[bytes, ...]
    again: tuple[Interval, ...]
    results: tuple[Envelope, ...]
    parameters: bytes
    ended: bytes = b""


@dataclass
class EpochLog:
    """The rounds of one epoch that this node knows.

    Attributes:
        epoch: number of the epoch.
        digest: parameters at its start.
        rounds: by height.
        early: messages of rounds not yet announced or assigned, by height.
        agreements: decisions by height; contiguous.
        decided: height of the first undecided round; None while the ids open before it are unknown.
        open_at: open ids by number of decided rounds, from this node's first round on.
    """

    epoch: int
    digest: bytes
    rounds: dict[int, RoundLog] = field(default_factory=dict)
    early: dict[int, list[Envelope]] = field(default_factory=dict)
    agreements: dict[int, AgreedSet] = field(default_factory=dict)
    decided: int | None = None
    open_at: dict[int, OpenIds] = field(default_factory=dict)
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

    def quorum_digest(self, applied: int, span: int) -> bytes | None:
        """The digest that a quorum of a round's witnesses holds after ``applied`` rounds, or None.

        Args:
            applied: rounds applied.
            span: later rounds whose lists may name it.
        """
        for height in range(max(0, applied - 1), applied + span + 1):
            log = self.rounds.get(height)
            for (rounds, digest), voters in log.votes.items() if log else ():
                if rounds == applied and len(voters) >= quorum(log.selection.witness_count):  # type: ignore[union-attr]
                    return digest
        return None

    @staticmethod
    def _take(open_ids: OpenIds, round_: Round) -> tuple[tuple[Interval, ...], OpenIds]:
        return take(open_ids, round_.step, round_.batch_size)

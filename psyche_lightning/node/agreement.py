"""What a node knows of an epoch's rounds, and what follows from it: the agreed sets, and the ids that stay open.

Pure data and rules without I/O or clock. The rule of the agreed set is invariant I1's input: every node that has the
same witness records and lists decides the same set, whatever else it heard.
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
    """What every node applies for a round.

    Attributes:
        entries: agreed results in ascending commitment order.
        lrs: fp32 bits of the agreed learning rate of each parameter group; empty when nothing is agreed.
    """

    entries: tuple[Entry, ...] = ()
    lrs: tuple[int, ...] = ()

    @property
    def trained(self) -> set[int]:
        """Indices of the trainers whose ids count as trained."""
        return {entry.trainer for entry in self.entries if entry.result.tokens}


@dataclass(frozen=True)
class Undecided:
    """What is missing to decide.

    Attributes:
        lists: indices (in the attesting round's clients) of witnesses whose list did not arrive.
        results: whether an agreed commitment's announcement is unknown.
    """

    lists: tuple[int, ...] = ()
    results: bool = False


def decide(results: RoundLog, attesting: RoundLog, absent: Collection[int] = ()) -> AgreedSet | Undecided:
    """The agreed set of the results of one round (design, section 3).

    A commitment is agreed when it is in the lists of a quorum of the *expected* witnesses of the attesting round; a
    list counts when its Merkle root is in that witness' record. Two agreed commitments of one trainer for one batch
    exclude both. Lists that did not arrive matter only while they could still change the outcome.

    Args:
        results: the round whose results are decided.
        attesting: the final round in which they were witnessed.
        absent: witnesses whose list nobody can supply any more.

    Returns:
        The agreement, or what is missing.
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
    """What a node writes down of a decided round, for the ledger of the run.

    Attributes:
        epoch: of the run.
        round: the coordinator's record of it.
        nodes: node key of each of its clients.
        again: ids of earlier rounds that it trained again.
        results: the agreed announcements.
        parameters: digest with which the epoch began.
        ended: digest with which it ended, as agreed; empty but for its last round.
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
        digest: parameters with which it began.
        rounds: by height.
        early: messages of rounds that were not announced or assigned yet, by height.
        agreements: what was decided, by height; contiguous.
        decided: height of the first round that is not decided; None while it is not known what was open before.
        open_at: open ids by the number of rounds decided: those with which this node began, and after each round since.
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
        """Begin to decide at round ``applied``, before which these ids were open; perhaps not for the first time."""
        self._base = self.decided = applied
        self.agreements = {}
        self.open_at = {applied: open_ids}
        for height, log in self.rounds.items():
            log.assigned = log.assigned and (height < applied or not log.round.step)

    def assign(self) -> list[RoundLog]:
        """Give batches to every round whose ids can be known; returns those rounds, ascending."""
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
        """The ids of earlier rounds that this round trains again."""
        first = max(self._base, height - 2)
        open_ids = self.open_at[first]
        taken: tuple[Interval, ...] = ()
        for each in range(first, height + 1):
            taken, open_ids = self._take(open_ids, self.rounds[each].round)
        return taken

    def close(self, agreement: AgreedSet) -> DecidedRound:
        """Take the decision on the first undecided round."""
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
        """Drop what is known of the rounds before that height."""
        for known in (self.rounds, self.agreements, self.open_at, self.early):
            for height in [height for height in known if height < before]:
                del known[height]
        self._base = max(self._base, before)

    def payloads(self) -> tuple[bytes, ...]:
        """Hashes of all payloads announced in the rounds that are kept."""
        return tuple(entry.result.payload for log in self.rounds.values() for entry in log.entries.values())

    def quorum_digest(self, applied: int, span: int) -> bytes | None:
        """The digest that a quorum of witnesses of one round holds after ``applied`` rounds; None as long as none does.

        Args:
            applied: rounds applied.
            span: rounds after that in which lists may name it.
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

"""What a node knows of an epoch's rounds: announcements, witness lists, and the set that follows from them.

Pure data and rules without I/O or clock. The rule of the agreed set is invariant I1's input: every node that has the
same witness records and lists decides the same set, whatever else it heard.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from psyche_lightning.coordinator.assignment import assign
from psyche_lightning.coordinator.committee import CommitteeSelection, quorum, round_selection
from psyche_lightning.coordinator.merkle import attest_root
from psyche_lightning.coordinator.state import CoordinatorConfig, Round
from psyche_lightning.errors import WireError
from psyche_lightning.wire.identity import short
from psyche_lightning.wire.messages import Attest, Envelope, Result

MAX_ENTRIES_PER_BATCH = 8
"""Two different results of one trainer for one batch prove equivocation; a few more are kept, as one may be agreed."""


@dataclass
class Entry:
    """One announced result.

    Attributes:
        commitment: the hash that witnesses list.
        envelope: the signed announcement.
        result: its content.
        trainer: index of the trainer in the round's client list.
        verified: whether the payload is stored here and well-formed.
        refused: why the payload can never be used, or empty.
    """

    commitment: bytes
    envelope: Envelope
    result: Result
    trainer: int
    verified: bool = False
    refused: str = ""


@dataclass(frozen=True)
class Agreement:
    """What every node applies for a round.

    Attributes:
        entries: agreed results in ascending commitment order.
        lrs: fp32 bits of the agreed learning rate of each parameter group; empty when nothing is agreed.
    """

    entries: tuple[Entry, ...] = ()
    lrs: tuple[int, ...] = ()


@dataclass(frozen=True)
class Undecided:
    """What is missing to decide.

    Attributes:
        lists: indices (in the attesting round's clients) of witnesses whose list did not arrive.
        results: whether an agreed commitment's announcement is unknown.
    """

    lists: tuple[int, ...] = ()
    results: bool = False


@dataclass
class RoundLog:
    """Everything known of one round.

    Attributes:
        round: the coordinator's record of it, the newest seen.
        nodes: node key of each client of the round, in list order.
        run_id: the run.
        layout: what payload positions must mean; results with another layout are refused.
        max_payload: largest payload in bytes.
        selection: the round's committees.
        final: whether ``round`` holds all witness records that it will ever hold.
        entries: announced results by commitment.
        attests: lists by sender index and Merkle root.
    """

    round: Round
    nodes: tuple[bytes, ...]
    run_id: str
    layout: bytes
    max_payload: int
    selection: CommitteeSelection
    final: bool = False
    entries: dict[bytes, Entry] = field(default_factory=dict)
    attests: dict[int, dict[bytes, Envelope]] = field(default_factory=dict)
    batches: dict[int, tuple[int, int]] = field(default_factory=dict)

    @classmethod
    def open(
        cls, round: Round, nodes: tuple[bytes, ...], config: CoordinatorConfig, run_id: str, layout: bytes, limit: int
    ) -> RoundLog:
        """Derive committees and assignment of a round that the coordinator announced."""
        selection = round_selection(round, config)
        log = cls(round, nodes, run_id, layout, limit, selection)
        if round.step:
            shares = assign(round.seed, round.data_index, round.batch_size, selection)
            log.batches = {client: (start, end) for client, start, end in shares}
        return log

    def index_of(self, node: bytes) -> int | None:
        """The list index of a node in this round, or None."""
        return self.nodes.index(node) if node in self.nodes else None

    def add_result(self, envelope: Envelope) -> Entry | None:
        """Take an announcement; returns the new entry, or None when it was known.

        Raises:
            WireError: it does not belong to this round, says why.
        """
        result = envelope.message
        assert isinstance(result, Result)
        index = self.index_of(envelope.sender)
        who = short(envelope.sender)
        if index is None:
            raise WireError(f"{who} is not a member of round {self.round.height}")
        if self.batches.get(index) != (result.start, result.end) or result.step != self.round.step:
            raise WireError(
                f"{who} announced batch [{result.start}, {result.end}] of step {result.step}; it was assigned "
                f"{self.batches.get(index)} of step {self.round.step}"
            )
        if result.layout != self.layout:
            raise WireError(f"{who} trains a model with other shapes, chunk or k than this node")
        if not 0 < result.size <= self.max_payload:
            raise WireError(f"{who} announced a payload of {result.size} bytes; 1 to {self.max_payload} are accepted")
        commitment = result.commitment(self.run_id, envelope.sender)
        if commitment in self.entries or len(self.of(index)) >= MAX_ENTRIES_PER_BATCH:
            return None
        entry = Entry(commitment, envelope, result, index)
        self.entries[commitment] = entry
        return entry

    def add_attest(self, envelope: Envelope) -> bool:
        """Take a witness' list; returns whether it was new.

        Raises:
            WireError: its sender is no witness of this round.
        """
        attest = envelope.message
        assert isinstance(attest, Attest)
        index = self.index_of(envelope.sender)
        if index is None or not self.selection.is_witness(index):
            raise WireError(f"{short(envelope.sender)} is not a witness of round {self.round.height}")
        lists = self.attests.setdefault(index, {})
        root = attest_root(attest)
        if root in lists or len(lists) >= MAX_ENTRIES_PER_BATCH:
            return False
        lists[root] = envelope
        return True

    def of(self, trainer: int) -> list[Entry]:
        """The results announced by a trainer."""
        return [entry for entry in self.entries.values() if entry.trainer == trainer]

    def verified(self) -> list[Entry]:
        """Results that this node can vouch for: payload stored and well-formed, and only one for its batch."""
        counts = Counter(entry.trainer for entry in self.entries.values())
        return [entry for entry in self.entries.values() if entry.verified and counts[entry.trainer] == 1]

    def unannounced(self) -> list[int]:
        """Indices of trainers from which no result was heard of."""
        heard = {entry.trainer for entry in self.entries.values()}
        return [index for index in self.batches if index not in heard]

    def unverified(self) -> list[int]:
        """Indices of trainers whose result this node cannot vouch for."""
        fine = {entry.trainer for entry in self.verified()}
        return [index for index in self.batches if index not in fine]

    def messages(self) -> list[Envelope]:
        """Every stored message of the round, to send again."""
        lists = [envelope for by_root in self.attests.values() for envelope in by_root.values()]
        return [entry.envelope for entry in self.entries.values()] + lists


def decide(results: RoundLog, attesting: RoundLog) -> Agreement | Undecided:
    """The agreed set of the results of one round (design, section 3).

    A commitment is agreed when it is in the lists of a quorum of the *expected* witnesses of the attesting round; a
    list counts when its Merkle root is in that witness' record. Two agreed commitments of one trainer for one batch
    exclude both. Lists that did not arrive matter only while they could still change the outcome.

    Args:
        results: the round whose results are decided.
        attesting: the final round in which they were witnessed.

    Returns:
        The agreement, or what is missing.
    """
    needed = quorum(attesting.selection.witness_count)
    records = attesting.round.witnesses
    if len(records) < needed or not results.batches:
        return Agreement()
    counts: Counter[bytes] = Counter()
    absent = []
    for record in records:
        envelope = attesting.attests.get(record.proof.index, {}).get(record.merkle)
        if envelope is None:
            absent.append(record.proof.index)
            continue
        assert isinstance(envelope.message, Attest)
        counts.update(envelope.message.hashes())
    open_ = len(absent) >= needed or any(needed - len(absent) <= count < needed for count in counts.values())
    if absent and open_:
        return Undecided(lists=tuple(absent))
    agreed = sorted(commitment for commitment, count in counts.items() if count >= needed)
    if any(commitment not in results.entries for commitment in agreed):
        return Undecided(results=True)
    entries = [results.entries[commitment] for commitment in agreed]
    per_trainer = Counter(entry.trainer for entry in entries)
    entries = [entry for entry in entries if per_trainer[entry.trainer] == 1]
    rates = Counter(entry.result.lrs for entry in entries)
    lrs = min(rates, key=lambda bits: (-rates[bits], bits)) if rates else ()
    return Agreement(tuple(entries), lrs)


@dataclass
class EpochLog:
    """The rounds of one epoch that this node knows.

    Attributes:
        epoch: number of the epoch.
        digest: parameters with which it began.
        rounds: by height.
        early: messages of rounds that the coordinator did not announce to this node yet, by height.
    """

    epoch: int
    digest: bytes
    rounds: dict[int, RoundLog] = field(default_factory=dict)
    early: dict[int, list[Envelope]] = field(default_factory=dict)

    def payloads(self) -> tuple[bytes, ...]:
        """Hashes of all payloads announced in the epoch."""
        return tuple(entry.result.payload for log in self.rounds.values() for entry in log.entries.values())

    def desync(self, mine: Mapping[int, bytes], since: int) -> tuple[int, bytes] | None:
        """Find parameters that differ from those of a quorum of witnesses (invariant I6).

        Args:
            mine: this node's digests by the number of rounds applied.
            since: height of the first round whose lists are looked at.

        Returns:
            ``(rounds applied, the quorum's digest)`` for the earliest difference, or None.
        """
        found = []
        for log in (log for height, log in self.rounds.items() if height >= since):
            votes: dict[tuple[int, bytes], set[int]] = {}
            for index, lists in log.attests.items():
                for envelope in lists.values():
                    attest = envelope.message
                    if isinstance(attest, Attest) and attest.digest:
                        votes.setdefault((attest.applied, attest.digest), set()).add(index)
            needed = quorum(log.selection.witness_count)
            found += [
                (applied, digest)
                for (applied, digest), voters in votes.items()
                if len(voters) >= needed and mine.get(applied, digest) != digest
            ]
        return min(found, default=None)

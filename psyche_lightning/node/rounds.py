"""A node's data on one round: assignment, announcements and lists of them. No I/O or clock."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from psyche_lightning.errors import WireError
from psyche_lightning.node.rates import ONE_GROUP, Rates
from psyche_lightning.protocol.assignment import assign
from psyche_lightning.protocol.committee import CommitteeSelection, decided_root, round_selection
from psyche_lightning.protocol.merkle import EMPTY_ROOT, merkle_root
from psyche_lightning.protocol.messages import Envelope, Result
from psyche_lightning.protocol.open_ids import Interval, batches, shown
from psyche_lightning.protocol.state import CoordinatorConfig, Round
from psyche_lightning.wire.identity import short

MAX_LISTS = 16
"""Lists of one round that are kept of each sender; it sends another when it has verified more."""
MAX_ENTRIES_PER_BATCH = 8
"""Two results of one trainer for one batch prove equivocation; a few more are kept, as one may be agreed."""


@dataclass(eq=False)
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


@dataclass
class RoundLog:
    """All that is known of a round.

    Attributes:
        round: the coordinator's newest record of it.
        nodes: node key of each client of the round, in list order.
        run_id: the run.
        layout: digest of the meaning of payload positions; others are refused.
        max_payload: largest payload in bytes.
        rates: the learning rates that a result may have.
        selection: the round's committees.
        final: whether ``round`` holds all its witness records.
        assigned: whether ``batches`` is known; earlier agreed sets determine it.
        batches: each trainer's data ids by its index: its own share, then ids to train again.
        entries: announced results by commitment.
        needed: number of equal reports that decide it.
        wanted: commitments of the list that was decided, while results in it are not here.
        lists: lists of commitments of this round's results by Merkle root.
        silent: trainers without a known result.
        missing: trainers whose result this node cannot vouch for.
        hopeless: the missing trainers with two results for one batch, or a bad payload.
    """

    round: Round
    nodes: tuple[bytes, ...]
    run_id: str
    layout: bytes
    max_payload: int
    rates: Rates
    selection: CommitteeSelection
    needed: int
    final: bool = False
    assigned: bool = False
    batches: dict[int, tuple[Interval, ...]] = field(default_factory=dict)
    entries: dict[bytes, Entry] = field(default_factory=dict)
    lists: dict[bytes, tuple[bytes, ...]] = field(default_factory=dict)
    wanted: frozenset[bytes] = frozenset()
    silent: set[int] = field(default_factory=set)
    missing: set[int] = field(default_factory=set)
    hopeless: set[int] = field(default_factory=set)
    _places: dict[bytes, int] = field(default_factory=dict)
    _of: dict[int, list[Entry]] = field(default_factory=dict)
    _listed: Counter[bytes] = field(default_factory=Counter)
    _own: tuple[tuple[bytes, ...], bytes] | None = None

    @classmethod
    def open(
        cls,
        round: Round,
        nodes: tuple[bytes, ...],
        config: CoordinatorConfig,
        needed: int,
        run_id: str,
        layout: bytes,
        limit: int,
        rates: Rates = ONE_GROUP,
    ) -> RoundLog:
        """Open the log of an announced round; a draining round has no batches to assign."""
        chosen = round_selection(round, config)
        log = cls(round, nodes, run_id, layout, limit, rates, chosen, needed, assigned=not round.step)
        log._places = {node: index for index, node in enumerate(nodes)}
        return log

    def assign(self, again: tuple[Interval, ...]) -> list[Envelope]:
        """Divide the round's ids and the ids to train again among its trainers.

        Returns:
            Messages filed under another assignment, to file anew.
        """
        self.assigned = True
        round_, weights = self.round, self.round.weights
        shares = assign(round_.seed, round_.data_index, round_.batch_size, self.selection, weights)
        assigned = batches(shares, again, weights)
        if assigned == self.batches:
            return []
        before = [entry.envelope for entry in self.entries.values()]
        self.batches, self.silent, self.missing = assigned, set(assigned), set(assigned)
        for filed in (self.entries, self._of, self.hopeless):
            filed.clear()
        self._own = None
        return before

    @property
    def root(self) -> bytes | None:
        """The Merkle root that its witnesses decided; None while they have not, or if it ended without a decision."""
        return decided_root(self.round, self.needed)

    def index_of(self, node: bytes) -> int | None:
        """The list index of a node in this round, or None."""
        return self._places.get(node)

    def add_result(self, envelope: Envelope) -> Entry | None:
        """Take an announcement of an assigned round; returns the new entry, or None if known.

        Raises:
            WireError: it does not belong to this round.
        """
        result = envelope.message
        assert isinstance(result, Result)
        index = self.index_of(envelope.sender)
        who = short(envelope.sender)
        if index is None:
            raise WireError(f"{who} is not a member of round {self.round.height}")
        if self.batches.get(index) != result.batch or result.step != self.round.step:
            raise WireError(
                f"{who} announced the ids {shown(result.batch)} of step {result.step}; it was assigned "
                f"{shown(self.batches.get(index, ()))} of step {self.round.step}"
            )
        if result.layout != self.layout:
            raise WireError(f"{who} trains a model with other shapes, chunk or k than this node")
        if not 0 < result.size <= self.max_payload:
            raise WireError(f"{who} announced a payload of {result.size} bytes; 1 to {self.max_payload} are accepted")
        self.rates.check(result.lrs, result.step, who)
        commitment = result.commitment(self.run_id, envelope.sender)
        known = self._of.setdefault(index, [])
        full = len(known) >= MAX_ENTRIES_PER_BATCH and commitment not in self.wanted
        if commitment in self.entries or full:
            return None
        entry = Entry(commitment, envelope, result, index)
        self.entries[commitment] = entry
        self._own = None
        known.append(entry)
        self.silent.discard(index)
        if len(known) > 1:
            self.missing.add(index)
            self.hopeless.add(index)
        return entry

    def settle(self, entry: Entry, refused: str = "") -> None:
        """Note that an entry's payload is here and well-formed, or why it is unusable."""
        entry.verified, entry.refused = not refused, refused
        self._own = None
        if len(self._of[entry.trainer]) > 1:
            return
        if refused:
            self.hopeless.add(entry.trainer)
        else:
            self.missing.discard(entry.trainer)

    def add_list(self, sender: bytes, commitments: Sequence[bytes]) -> None:
        """Keep a list of this round's results, in ascending order: a few of each sender, and all of this node's.

        Args:
            sender: who sent it; empty for a list of this node itself.
            commitments: the list.
        """
        root = merkle_root(commitments)
        if root not in self.lists and (not sender or self._listed[sender] < MAX_LISTS):
            self._listed[sender] += 1
            self.lists[root] = tuple(commitments)

    def list_of(self, root: bytes) -> tuple[bytes, ...] | None:
        """The list with that root: empty, this node's own, or one that it was sent."""
        if root == EMPTY_ROOT:
            return ()
        own, own_root = self.own()
        return own if own_root == root else self.lists.get(root)

    def own(self) -> tuple[tuple[bytes, ...], bytes]:
        """The commitments of the results that this node vouches for, in ascending order, and their Merkle root."""
        if self._own is None:
            commitments = tuple(sorted(entry.commitment for entry in self.verified()))
            self._own = commitments, merkle_root(commitments)
        return self._own

    def announced(self) -> tuple[bytes, ...]:
        """The commitments of the results of trainers that announced one, whose payloads need not be here; ascending."""
        return tuple(sorted(entries[0].commitment for entries in self._of.values() if len(entries) == 1))

    def of(self, trainer: int) -> list[Entry]:
        """The results announced by a trainer."""
        return self._of.get(trainer, [])

    def verified(self) -> list[Entry]:
        """Results that this node vouches for: payload stored and well-formed, one result per batch."""
        return [entries[0] for entries in self._of.values() if len(entries) == 1 and entries[0].verified]

    def messages(self) -> list[Envelope]:
        """All stored announcements, to resend."""
        return [entry.envelope for entry in self.entries.values()]

"""Who trains and who witnesses in a round: a permutation of the clients that every party derives from the round's seed.

The permutation is Ethereum's swap-or-not shuffle with 90 rounds (Psyche's swap_or_not.rs and committee_selection.rs).
"""

from __future__ import annotations

import struct
from enum import IntEnum
from functools import lru_cache

from psyche_lightning.errors import CoordinatorError, counted
from psyche_lightning.protocol.state import CoordinatorConfig, Round, RunState, WitnessProof
from psyche_lightning.wire.canonical import sha256

SHUFFLE_ROUNDS = 90
MAX_WITNESSES = 32
"""Witnesses of a round when the configuration says "everyone" (``witness_nodes = 0``)."""


class Committee(IntEnum):
    """The role of a client in a round; the numbers are on the wire."""

    TIE_BREAKER = 0
    VERIFIER = 1
    TRAINER = 2


def quorum(expected: int) -> int:
    """How many of ``expected`` must agree: two thirds rounded down, but never half or fewer.

    This is Psyche's table except where that gives half: 4 needs 3, not 2. So two quorums always share a member.
    """
    return max(1, int(expected * (2 / 3)), expected // 2 + 1)


def members(state: RunState) -> int:
    """The number of clients with which the epoch was formed, also of those that have left it since."""
    return len(state.clients) + len(state.exited_clients)


def needed_reports(state: RunState) -> int:
    """How many equal reports decide a round of an epoch with these members: a quorum of the witnesses it begins with.

    Clients that leave later do not lower it. So whoever stays never decides alone.
    """
    return quorum(min(state.config.witness_nodes or MAX_WITNESSES, members(state)))


def least_clients(state: RunState) -> int:
    """The number of clients below which the epoch cannot go on: a quorum of its members, and ``min_clients``."""
    return max(state.config.min_clients, quorum(members(state)))


def starting_digest(state: RunState) -> bytes:
    """The digest of the parameters with which the formed epoch begins, if it is decided; empty otherwise.

    In a fresh run the first member decides it. After an epoch whose last parameters nobody named, it is what the
    members of the next one find by applying the decided rounds.
    """
    if state.settled:
        return state.checkpoint.digest
    fresh = not state.checkpoint.digest and state.warmup_witnesses
    return state.warmup_witnesses[0].merkle if fresh else b""


def decided_root(round_: Round, needed: int) -> bytes | None:
    """The Merkle root that decides a round: the one that ``needed`` of its witnesses report; None without any."""
    if len(round_.witnesses) < needed:
        return None
    roots = [record.merkle for record in round_.witnesses]
    return next((root for root in dict.fromkeys(roots) if roots.count(root) >= needed), None)


class Permutation:
    """The swap-or-not shuffle of ``range(size)`` with a 32-byte key; hashes pivots and blocks of bits only once."""

    def __init__(self, key: bytes, size: int) -> None:
        self._key = key
        self._size = size
        self._pivots: list[int] = []
        self._blocks: dict[tuple[int, int], bytes] = {}
        self._positions: dict[int, int] = {}

    def __call__(self, index: int) -> int:
        """The position to which ``index`` moves.

        Raises:
            IndexError: ``index`` is not below the size.
        """
        if not 0 <= index < self._size:
            raise IndexError(f"index {index} of {self._size}")
        position = self._positions.get(index)
        if position is None:
            position = self._positions[index] = self._shuffle(index)
        return position

    def _shuffle(self, current: int) -> int:
        size = self._size
        if size == 1:  # a run of one node: 180 hashes in each round would find the same
            return current
        if not self._pivots:
            hashes = (sha256(self._key + bytes([turn])) for turn in range(SHUFFLE_ROUNDS))
            self._pivots = [int.from_bytes(digest[:8], "little") % size for digest in hashes]
        for turn, pivot in enumerate(self._pivots):
            flip = (pivot + size - current) % size
            position = max(current, flip)
            block = self._blocks.get((turn, position >> 8))
            if block is None:
                block = sha256(self._key + struct.pack("<BI", turn, position >> 8))
                self._blocks[turn, position >> 8] = block
            if block[(position & 255) >> 3] >> (position & 7) & 1:
                current = flip
        return current


class CommitteeSelection:
    """The committees of one round. It computes positions when needed, and keeps them.

    Args:
        tie_breakers: clients that settle disputes; always 0 so far.
        witness_nodes: witnesses of the round; 0 for everyone up to 32.
        verification_percent: share of the others that verify, 0 to 100.
        clients: number of clients in the round.
        seed: the round's u64 seed.

    Raises:
        CoordinatorError: there are more seats than clients, or a percentage above 100 (``InvalidCommitteeSelection``).
    """

    def __init__(
        self, tie_breakers: int, witness_nodes: int, verification_percent: int, clients: int, seed: int
    ) -> None:
        for name, seats in (("tie breakers", tie_breakers), ("witnesses", witness_nodes)):
            if seats > clients:
                raise CoordinatorError(
                    f"{seats} {name} among {counted(clients, 'client')}; at most every client can be one",
                    code="InvalidCommitteeSelection",
                )
        if not 0 <= verification_percent <= 100:
            raise CoordinatorError(
                f"verification_percent is {verification_percent}; it must be between 0 and 100",
                code="InvalidCommitteeSelection",
            )
        self.clients = clients
        self.tie_breakers = tie_breakers
        self.verifiers = (clients - tie_breakers) * verification_percent // 100
        self.witness_count = witness_nodes or min(clients, MAX_WITNESSES)
        self.seed = sha256(struct.pack("<Q", seed))
        self._committee = Permutation(sha256(self.seed, b"committee"), clients)
        self._witness = Permutation(sha256(self.seed, b"witness"), clients)

    def committee_position(self, index: int) -> int:
        """Position in the committee order of the client at ``index`` of the round's list."""
        return self._committee(index)

    def committee(self, index: int) -> Committee:
        """The role of the client at ``index``."""
        if not self.tie_breakers + self.verifiers:  # as in most runs: to find the position takes 180 hashes
            return Committee.TRAINER
        position = self._committee(index)
        if position < self.tie_breakers:
            return Committee.TIE_BREAKER
        if position < self.tie_breakers + self.verifiers:
            return Committee.VERIFIER
        return Committee.TRAINER

    def trainers(self) -> list[int]:
        """Indices of the clients that train, ascending."""
        return [index for index in range(self.clients) if self.committee(index) is Committee.TRAINER]

    def witness_position(self, index: int) -> int:
        """Position of the client at ``index`` in the witness order; positions below ``witness_count`` are seats."""
        return self._witness(index)

    def is_witness(self, index: int) -> bool:
        """Whether the client at ``index`` witnesses."""
        return self.witness_count == self.clients or self._witness(index) < self.witness_count

    def witnesses(self) -> list[int]:
        """Indices of the clients that witness, ascending."""
        return [index for index in range(self.clients) if self.is_witness(index)]

    def witness_proof(self, index: int) -> WitnessProof:
        """The claim of the client at ``index``, with its true position and whether it witnesses."""
        return WitnessProof(position=self._witness(index), index=index, witness=self.is_witness(index))

    def verify_witness(self, proof: WitnessProof) -> bool:
        """Whether ``proof`` claims a seat that the shuffle gives to the client at its index."""
        return proof.witness and 0 <= proof.index < self.clients and proof == self.witness_proof(proof.index)


@lru_cache(maxsize=64)
def _selection(
    tie_breakers: int, witness_nodes: int, verification_percent: int, clients: int, seed: int
) -> CommitteeSelection:
    return CommitteeSelection(tie_breakers, witness_nodes, verification_percent, clients, seed)


def round_selection(round_: Round, config: CoordinatorConfig) -> CommitteeSelection:
    """The committees of ``round_``; cached, because the machine and the nodes ask for them often.

    A drain round may have fewer clients than ``witness_nodes``; then all of them witness.
    """
    clients = len(round_.clients)
    return _selection(
        round_.tie_breaker_tasks,
        min(config.witness_nodes, clients),
        config.verification_percent,
        clients,
        round_.seed,
    )

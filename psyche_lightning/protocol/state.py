"""The state of a run, as the coordinator holds it and nodes see it (the fields of Psyche's coordinator.rs).

These are plain data; the transitions are in :mod:`psyche_lightning.coordinator.machine`. Nodes receive the same
classes without the witnesses' Bloom filters, which decide nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from functools import cached_property

STORED_ROUNDS = 4
MOST_WEIGHT = 256
"""The weight of a round's fastest client."""
MISSED_ROUNDS = 3
"""Decided rounds in a row without a result of a client after which it may be dropped."""
BLOOM_WORDS = 16
BLOOM_KEYS = 8
INCARNATION_SIZE = 16


def scope_of(run_id: str, incarnation: bytes) -> str:
    """The text by which signatures name a run: its name, ``#`` and its incarnation in hex.

    The incarnation is made with the run, so nothing that was signed for a former run of the same name counts here. It
    has a fixed size, so no two runs have one scope.
    """
    return f"{run_id}#{incarnation.hex()}" if incarnation else run_id


class Phase(IntEnum):
    """What a run does; the numbers are on the wire (5, Psyche's cool-down, is not used)."""

    UNINITIALIZED = 0
    WAITING_FOR_MEMBERS = 1
    WARMUP = 2
    ROUND_TRAIN = 3
    ROUND_WITNESS = 4
    FINISHED = 6
    PAUSED = 7

    @property
    def halted(self) -> bool:
        """Whether only a command can continue the run."""
        return self in (Phase.UNINITIALIZED, Phase.FINISHED, Phase.PAUSED)

    @property
    def active(self) -> bool:
        """Whether the run is in an epoch's rounds."""
        return self in (Phase.ROUND_TRAIN, Phase.ROUND_WITNESS)


class ClientStatus(IntEnum):
    """The status of a client; a client that is not healthy leaves the list at the end of the round."""

    HEALTHY = 0
    DROPPED = 1
    WITHDRAWN = 2
    EJECTED = 3


@dataclass(frozen=True)
class CoordinatorConfig:
    """The run's durations and sizes. Durations are upper limits in seconds, batches count samples.

    Attributes:
        warmup_time: longest time for nodes to obtain the epoch's parameters.
        cooldown_time: longest time of a drain round, in which nodes also report the parameters at the epoch's end.
        max_round_train_time: longest time for a round's training and exchange.
        round_witness_time: longest time after that for witnesses to report, and to agree on what they report.
        epoch_time: an epoch ends after the round in which this time is over.
        global_batch_size_start: samples of the whole run in the first round.
        global_batch_size_end: samples of a round after ``global_batch_size_warmup_tokens`` tokens.
        global_batch_size_warmup_tokens: length of the batch ramp in tokens; 0 for no ramp.
        total_steps: training rounds of the run.
        init_min_clients: clients needed to begin an epoch.
        min_clients: number of clients below which an epoch ends.
        witness_nodes: witnesses per round; 0 for everyone up to the limit.
        verification_percent: share of verifiers; not supported yet, so 0.
        waiting_for_members_extra_time: longest time to wait for further members once there are enough.
    """

    warmup_time: float = 60.0
    cooldown_time: float = 30.0
    max_round_train_time: float = 120.0
    round_witness_time: float = 10.0
    epoch_time: float = 3600.0
    global_batch_size_start: int = 1
    global_batch_size_end: int = 1
    global_batch_size_warmup_tokens: int = 0
    total_steps: int = 1000
    init_min_clients: int = 1
    min_clients: int = 1
    witness_nodes: int = 0
    verification_percent: int = 0
    waiting_for_members_extra_time: float = 3.0


@dataclass(frozen=True)
class Client:
    """A member of the epoch.

    Attributes:
        signer: 32-byte key by which the coordinator knows the client (a wallet, or the node key).
        node: 32-byte node key, which signs gossip and names the node on transports.
        address: the address of its transport; empty if the transport finds nodes by key.
        status: its status.
        exited_height: round height at which it left the list.
    """

    signer: bytes
    node: bytes
    address: str = ""
    status: ClientStatus = ClientStatus.HEALTHY
    exited_height: int = 0


@dataclass(frozen=True)
class WitnessProof:
    """A claim to a seat: the position that the committee shuffle gives to the client at ``index``."""

    position: int
    index: int
    witness: bool = True


@dataclass(frozen=True)
class WitnessRecord:
    """A witness' report as the coordinator stores it.

    Attributes:
        proof: its seat.
        merkle: root over the commitments that it verified (``merkle_root``); in warm-up, the digest of the parameters
            that the client holds.
        participants: serialized Bloom filter (192 bytes) of clients whose results arrived or that owed none; empty in
            the nodes' views.
        broadcasts: serialized Bloom filter of commitments, for Psyche's readers; empty in the nodes' views.
    """

    proof: WitnessProof
    merkle: bytes
    participants: bytes = b""
    broadcasts: bytes = b""


@dataclass(frozen=True)
class Round:
    """One round of an epoch.

    Attributes:
        height: counts rounds within the epoch from 0.
        step: the optimizer step that it trains, from 1; 0 for a drain round.
        seed: u64 from which committee and assignment follow.
        data_index: first data id of the round.
        batch_size: samples of the round; 0 for a drain round.
        clients: signers of the clients at its start, in list order, which proofs and assignment use.
        tie_breaker_tasks: always 0 so far.
        witnesses: the newest report of each witness. A quorum of equal roots decides the round.
        weights: how fast each of ``clients`` is in comparison, 1 to :data:`MOST_WEIGHT`, by which the samples are
            divided; empty for equal shares.
    """

    height: int = 0
    step: int = 0
    seed: int = 0
    data_index: int = 0
    batch_size: int = 0
    clients: tuple[bytes, ...] = ()
    tie_breaker_tasks: int = 0
    witnesses: tuple[WitnessRecord, ...] = ()
    weights: tuple[int, ...] = ()


@dataclass(frozen=True)
class Checkpoint:
    """The newest parameters whose digest is on record.

    The run's parameters are these, with the results of the decided rounds after ``step`` applied.

    Attributes:
        digest: parameter digest, named by a quorum; in a fresh run by the first member. Empty before that.
        step: training steps that the parameters contain.
    """

    digest: bytes = b""
    step: int = 0


@dataclass(frozen=True)
class RunState:
    """Everything that decides how a run continues. Immutable: a transition returns a new state.

    Attributes:
        run_id: the run's name, at most 32 bytes of UTF-8.
        phase: what the run does.
        phase_start: time at which the phase began, in the coordinator's seconds.
        config: durations and sizes.
        max_seq_len: tokens of a sample, for the batch ramp and token counts.
        epoch: number of the epoch, from 0.
        step: the next optimizer step, from 1; ``total_steps + 1`` when all are trained.
        epoch_start_data_index: first data id of the epoch.
        epoch_start: time at which the epoch began.
        gathered_at: time since which enough members wait for an epoch; None while there are too few.
        start_step: ``step`` when the epoch, or while none trains the last one, began.
        last_step: 0, or ``step`` when the epoch began to drain; this epoch trains no further step.
        head: index of the current round in ``rounds`` (height modulo 4).
        rounds: ring of the last four rounds; slot ``height % 4``. Until an epoch trains, those of the last one.
        warmup_witnesses: records of clients that hold the epoch's parameters.
        needed: number of equal reports that decide one of these rounds.
        epoch_digest: digest of the parameters with which the first of these rounds' epoch began.
        clients: members in list order.
        exited_clients: members that left during the epoch.
        checkpoint: the newest parameters whose digest is on record.
        checkpoint_votes: ``(signer, step, digest)``: the parameters that witnesses of the current round hold.
        holders: signers of the clients that may hold the run's parameters: the members of the last epoch and those
            that reported them since. Without any of them no epoch forms.
        pending_pause: whether the run pauses at the end of the epoch.
        cold_start_epoch: whether the epoch follows a pause, so that learning rates warm up again.
        nonce: grows with every change by at least one; updates with a smaller nonce are stale.
        incarnation: 16 random bytes made with the run; empty only if the name is never given to another run.
    """

    run_id: str
    phase: Phase = Phase.UNINITIALIZED
    phase_start: float = 0.0
    config: CoordinatorConfig = field(default_factory=CoordinatorConfig)
    max_seq_len: int = 1
    epoch: int = 0
    step: int = 1
    epoch_start_data_index: int = 0
    epoch_start: float = 0.0
    gathered_at: float | None = None
    start_step: int = 1
    last_step: int = 0
    head: int = 0
    rounds: tuple[Round, ...] = ()
    needed: int = 1
    warmup_witnesses: tuple[WitnessRecord, ...] = ()
    epoch_digest: bytes = b""
    clients: tuple[Client, ...] = ()
    exited_clients: tuple[Client, ...] = ()
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    checkpoint_votes: tuple[tuple[bytes, int, bytes], ...] = ()
    holders: tuple[bytes, ...] = ()
    pending_pause: bool = False
    cold_start_epoch: bool = False
    nonce: int = 0
    incarnation: bytes = b""

    @property
    def scope(self) -> str:
        """The text by which signatures name this run; see :func:`scope_of`."""
        return scope_of(self.run_id, self.incarnation)

    @property
    def current(self) -> Round | None:
        """The newest round; None before the first of the run."""
        return self.rounds[self.head] if self.rounds else None

    @property
    def rounds_epoch(self) -> int:
        """The epoch of ``rounds``: this one, or the last one until this one trains."""
        return self.epoch if self.phase.active else self.epoch - 1

    def round_at(self, height: int) -> Round | None:
        """The stored round of that height; None if the ring does not hold it."""
        slot = height % STORED_ROUNDS
        if height < 0 or slot >= len(self.rounds) or self.rounds[slot].height != height:
            return None
        return self.rounds[slot]

    @cached_property
    def healthy(self) -> tuple[Client, ...]:
        """The healthy clients, in list order."""
        return tuple(client for client in self.clients if client.status is ClientStatus.HEALTHY)

    @property
    def settled(self) -> bool:
        """Whether the checkpoint contains every round, so that its digest is the run's."""
        return bool(self.checkpoint.digest) and self.checkpoint.step == self.step - 1

    @property
    def draining(self) -> bool:
        """Whether the epoch only drains its pipeline now."""
        return self.phase.active and self.last_step != 0

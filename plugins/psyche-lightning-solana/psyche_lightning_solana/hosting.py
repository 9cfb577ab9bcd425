"""Each instruction's effect on a run, without accounts and bytes: the state machine as the program hosts it.

:mod:`psyche_lightning.coordinator.machine` decides; this adds the chain's own parts: the list of members, points,
Psyche's flags and checkpoint kinds, and the layout's limits. ``program/machine`` is the same in C.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from psyche_lightning.coordinator import machine
from psyche_lightning.errors import ConfigError
from psyche_lightning.protocol.committee import Committee, round_selection
from psyche_lightning.protocol.limits import PSYCHE_LIMITS, check_config
from psyche_lightning.protocol.requests import HealthCheck, WarmupWitness, Witness
from psyche_lightning.protocol.state import (
    Checkpoint,
    Client,
    ClientStatus,
    CoordinatorConfig,
    Phase,
    Round,
    RunState,
    WitnessProof,
)
from psyche_lightning.wire.canonical import ZERO_HASH, sha256
from psyche_lightning_solana.account import Member, Rates, RunAccounts
from psyche_lightning_solana.errors import require
from psyche_lightning_solana.layout import MAX_CLIENTS
from psyche_lightning_solana.types import CHECKPOINT, LLM, METADATA, MODEL, cold_start_problem, model_problem

LAST_EPOCH = 2**16 - 1
MAX_U64 = 2**64 - 1
_CHECKPOINT_AT = MODEL.body + LLM.offsets["checkpoint"]
"""Offset of the checkpoint in the model section."""
_IN_ROUND = (Phase.ROUND_TRAIN, Phase.ROUND_WITNESS)
_COMMITTEES = {"TieBreaker": Committee.TIE_BREAKER, "Verifier": Committee.VERIFIER, "Trainer": Committee.TRAINER}


class Clock(NamedTuple):
    """The clock sysvar: seconds since 1970, and the slot."""

    unix_timestamp: int
    slot: int

    @property
    def now(self) -> int:
        """The machine's time."""
        return max(self.unix_timestamp, 0)

    @property
    def seed(self) -> int:
        """The seed of a round that begins now: LE64 of SHA-256(unix_timestamp, slot), as in Psyche."""
        digest = sha256(struct.pack("<qQ", self.unix_timestamp, self.slot))
        return int.from_bytes(digest[:8], "little")


# What follows from an instruction and from the clock.


def advance(run: RunAccounts, clock: Clock) -> RunAccounts:
    """Make every due step; none if the run is halted."""
    while not run.state.phase.halted:
        pending = run.pending if run.state.phase is Phase.WAITING_FOR_MEMBERS else None
        state = machine.tick(run.state, pending, clock.now, clock.seed)
        if state is run.state:
            break
        run = _stepped(run, state, clock)
    return run


def _stepped(run: RunAccounts, after: RunState, clock: Clock) -> RunAccounts:
    """The run after a machine step, with the step's other changes."""
    before = run.state
    if before.gathered_at is not None and after.phase is before.phase and after.gathered_at is None:
        after = replace(after, phase_start=clock.now)
    if after.phase is Phase.WARMUP and before.phase is not Phase.WARMUP:
        run = replace(run, current_rates=run.future_rates)
    if before.phase is Phase.WARMUP and after.phase is Phase.WAITING_FOR_MEMBERS and not after.checkpoint.digest:
        run = _another_first(run, before.clients)
        after = replace(after, clients=(), exited_clients=(), holders=())
    if after.phase is Phase.ROUND_TRAIN and before.phase is Phase.WARMUP:
        run = replace(run, next_active=(run.next_active + 1) & MAX_U64)
    if before.phase.active and not after.phase.active:
        run = _checkpoint_moves(_paid(run, after), {"Hub": "P2P", "Dummy": "P2P", "Gcs": "P2PGcs"})
        if after.epoch > LAST_EPOCH:  # the layout's maximum
            over = after.phase is Phase.WAITING_FOR_MEMBERS
            after = replace(after, epoch=LAST_EPOCH, phase=Phase.FINISHED if over else after.phase)
    return replace(run, state=after)


def _another_first(run: RunAccounts, clients: Sequence[Client]) -> RunAccounts:
    """The warm-up of a fresh run failed: the last client gets the place of the first, which says how it begins."""
    order = [member.signer for member in run.members]
    members = list(run.members)
    if len(clients) > 1:
        first, last = order.index(clients[0].signer), order.index(clients[-1].signer)
        members[first], members[last] = members[last], members[first]
    return replace(run, members=tuple(members))


def _paid(run: RunAccounts, after: RunState) -> RunAccounts:
    """An epoch in which the checkpoint advanced pays equal shares to the clients healthy at its end.

    Whoever was ejected in an epoch pays.
    """
    advanced = after.checkpoint.step >= after.start_step
    paid = {client.signer for client in run.state.healthy} if advanced else set()
    pays = {client.signer for client in after.exited_clients if client.status is ClientStatus.EJECTED}
    rate = run.current_rates.slashing_per_client
    share = run.current_rates.earning_total_shared // max(len(paid), 1)
    members = (
        replace(
            m,
            earned=min(m.earned + share * (m.signer in paid), MAX_U64),
            slashed=min(m.slashed + rate * (m.signer in pays), MAX_U64),
        )
        for m in run.members
    )
    return replace(run, members=tuple(members))


def _checkpoint_kind(run: RunAccounts) -> str:
    return list(CHECKPOINT.variants)[run.model[_CHECKPOINT_AT]]


def _checkpoint_moves(run: RunAccounts, moves: dict[str, str]) -> RunAccounts:
    """The same place under another kind."""
    to = moves.get(_checkpoint_kind(run))
    if to is None:
        return run
    tag = struct.pack("<I", list(CHECKPOINT.variants).index(to))
    return replace(run, model=run.model[:_CHECKPOINT_AT] + tag + run.model[_CHECKPOINT_AT + 4 :])


def flagged(run: RunAccounts) -> RunAccounts:
    """The run with Psyche's flags, here functions of phase and height."""
    phase, round_ = run.state.phase, run.state.current
    return replace(
        run,
        first_round=phase is Phase.WARMUP or (phase in _IN_ROUND and round_ is not None and round_.height == 0),
        is_warmup_first_tick=phase is Phase.WAITING_FOR_MEMBERS,
        is_training_first_tick=phase in (Phase.WAITING_FOR_MEMBERS, Phase.WARMUP),
    )


# What the main authority sets.


def update(run: RunAccounts, metadata: Any, config: Any, model: Any, progress: Any) -> RunAccounts:
    """Set all given values; all but the metadata need a halted run."""
    state = run.state
    require(state.phase is not Phase.FINISHED, "UpdateConfigFinished")
    halting = not (config is None and model is None and progress is None)
    require(state.phase.halted or not halting, "UpdateConfigNotHalted")
    if metadata is not None:
        run = replace(run, metadata=METADATA.pack(metadata))
    if config is not None:
        state = replace(state, config=CoordinatorConfig(**config))
        require(_sane(state.config), "ConfigSanityCheckFailed")
    if model is not None:
        require(not model_problem(model), "ModelSanityCheckFailed")
        run = replace(run, model=MODEL.pack(model))
        state = replace(state, max_seq_len=model["LLM"]["max_seq_len"])
    if config is not None or model is not None:
        require(not cold_start_problem(vars(state.config), run.llm), "ModelSanityCheckFailed")
    if progress is not None:
        # Below 2^63: no sum of the run's batches, 2^32 of at most 2^16, overflows.
        sane = progress["step"] > 0 and progress["epoch_start_data_index"] < 1 << 63
        require(sane, "ProgressSanityCheckFailed")
        state = replace(state, **progress)
    return replace(run, state=state)


def _sane(config: CoordinatorConfig) -> bool:
    try:
        check_config(config, PSYCHE_LIMITS)
    except ConfigError:
        return False
    return True


def set_rates(run: RunAccounts, earning: int | None, slashing: int | None) -> RunAccounts:
    """Set the points of future epochs; None keeps a rate."""
    rates = run.future_rates
    return replace(
        run,
        future_rates=Rates(
            rates.earning_total_shared if earning is None else earning,
            rates.slashing_per_client if slashing is None else slashing,
        ),
    )


def pause(run: RunAccounts, clock: Clock) -> RunAccounts:
    """Halt the run now or at the end of the epoch; changes nothing else."""
    return replace(run, state=machine.pause(run.state, clock.now))


def resume(run: RunAccounts, clock: Clock) -> RunAccounts:
    """Open the run, also for the first time; all members must join again."""
    state = run.state
    require(_sane(state.config), "ConfigSanityCheckFailed")
    require(not model_problem(run.llm), "ModelSanityCheckFailed")
    require(not cold_start_problem(vars(state.config), run.llm), "ModelSanityCheckFailed")
    if state.phase is Phase.UNINITIALIZED:
        state = replace(state, phase=Phase.PAUSED, step=state.step or 1)
    state = machine.resume(state, clock.now)
    return advance(replace(run, state=state, next_active=(run.next_active + 1) & MAX_U64), clock)


def restart_from(run: RunAccounts, step: int, digest: bytes, clock: Clock) -> RunAccounts:
    """Go on from other parameters; the samples since the stored round that follows them are trained again."""
    before = run.state
    state = machine.restart_from(before, Checkpoint(b"" if digest == ZERO_HASH else digest, step), clock.now)
    place = next((round_.data_index for round_ in before.rounds if round_.step == step + 1), None)
    if place is not None:
        state = replace(state, epoch_start_data_index=place)
    return advance(replace(run, state=state), clock)


def set_checkpoint(run: RunAccounts, repo: Any, clock: Clock) -> RunAccounts:
    """Change the checkpoint's place if docs/solana-account.md's table has an entry; else change nothing."""
    peers = {"Hub": "P2P", "Gcs": "P2PGcs"}
    offered = repo if isinstance(repo, str) else next(iter(repo))
    current = _checkpoint_kind(run)
    if offered in peers and current in (offered, *peers.values()):
        kept = peers[offered] if current in peers.values() else offered
        packed = CHECKPOINT.pack({kept: repo[offered]})
        model = run.model[:_CHECKPOINT_AT] + packed + run.model[_CHECKPOINT_AT + CHECKPOINT.size :]
        run = replace(run, model=model)
    return advance(run, clock)


# Members come and go.


def join(run: RunAccounts, user: bytes, signer: bytes, p2p: bytes, clock: Clock) -> RunAccounts:
    """Add the wallet from the next epoch on; an earlier member may bring a new node key."""
    require(signer == user, "SignerMismatch")
    pending = {client.signer for client in run.pending}
    # Every node needs its own key.
    require(all(client.node != p2p for client in run.pending if client.signer != signer), "SignerMismatch")
    room = signer in pending or len(pending) < run.state.config.global_batch_size_end
    require(room, "MoreClientsThanBatches")
    members = list(run.members)
    place = next((i for i, member in enumerate(members) if member.signer == signer), None)
    if place is not None:
        members[place] = replace(members[place], p2p=p2p, active=run.next_active)
    else:
        free = _free_place(run)
        require(free < MAX_CLIENTS, "ClientsFull")
        members[free : free + 1] = [Member(signer, p2p, active=run.next_active)]
    return advance(replace(run, members=tuple(members)), clock)


def _free_place(run: RunAccounts) -> int:
    """A new place, or that of a wallet that is gone, has no points and does not hold the checkpoint.

    Those of the epoch and of the stored rounds stay. Without any it is ``MAX_CLIENTS``.
    """
    if len(run.members) < MAX_CLIENTS:
        return len(run.members)
    state = run.state
    listed = (client.signer for client in (*run.pending, *state.clients, *state.exited_clients))
    trained = (signer for round_ in state.rounds for signer in round_.clients)
    kept = {*listed, *trained, *state.holders}
    free = (i for i, m in enumerate(run.members) if m.signer not in kept and not m.earned and not m.slashed)
    return next(free, MAX_CLIENTS)


def withdraw(run: RunAccounts, user: bytes, clock: Clock) -> RunAccounts:
    """A client of the epoch becomes Withdrawn; a pending member is forgotten."""
    return _left(run, user, ClientStatus.WITHDRAWN, clock)


def kick(run: RunAccounts, signer: bytes, clock: Clock) -> RunAccounts:
    """The same, and the client is Ejected: the owner removes it."""
    return _left(run, signer, ClientStatus.EJECTED, clock)


def _left(run: RunAccounts, user: bytes, status: ClientStatus, clock: Clock) -> RunAccounts:
    state = run.state
    client = any(client.signer == user for client in state.healthy)
    require(client or any(waiting.signer == user for waiting in run.pending), "InvalidWithdraw")
    if client:
        state = machine.withdraw(state, user, status)
    return advance(replace(_forgotten(run, user), state=state), clock)


def _forgotten(run: RunAccounts, signer: bytes) -> RunAccounts:
    """The member is no longer pending."""
    pending = run.next_active
    members = (replace(m, active=0) if (m.signer, m.active) == (signer, pending) else m for m in run.members)
    return replace(run, members=tuple(members))


# What clients report.


def need_member(run: RunAccounts, user: bytes) -> None:
    """Refuse a wallet that never joined."""
    require(any(member.signer == user for member in run.members), "SignerNotAClient")


def _running(state: RunState) -> Round | None:
    return state.current if state.phase in _IN_ROUND else None


def tick(run: RunAccounts, clock: Clock) -> RunAccounts:
    """Time has passed."""
    require(not run.state.phase.halted, "Halted")
    return advance(run, clock)


def witness(run: RunAccounts, user: bytes, record: dict[str, Any], place: dict[str, Any], clock: Clock) -> RunAccounts:
    """A witness' report; ``place`` has the trailer, and is empty if it names no round."""
    need_member(run, user)
    state, round_ = run.state, _running(run.state)
    require(round_ is None or record["metadata"]["step"] in (0, state.step), "InvalidWitness")
    request = Witness(
        place.get("epoch", state.epoch),
        place.get("height", round_.height if round_ else 0),
        WitnessProof(**record["proof"]),
        record["broadcast_merkle"],
        _bloom(record["participant_bloom"]),
        _bloom(record["broadcast_bloom"]),
        place.get("step", 0),
        b"" if place.get("digest", ZERO_HASH) == ZERO_HASH else place["digest"],
    )
    state = machine.witness(state, user, request)
    return advance(replace(run, state=state), clock)


def _bloom(value: dict[str, Any]) -> bytes:
    return struct.pack("<24Q", *value["keys"], *value["bits"])


def warmup_witness(
    run: RunAccounts, user: bytes, index: int, digest: bytes, epoch: int | None, clock: Clock
) -> RunAccounts:
    """The client at ``index`` holds these parameters."""
    need_member(run, user)
    epoch = run.state.epoch if epoch is None else epoch
    state = machine.warmup_witness(run.state, user, WarmupWitness(epoch, index, digest))
    require(state is run.state or digest != ZERO_HASH, "InvalidWitness")
    return advance(replace(run, state=state), clock)


def health_check(
    run: RunAccounts, user: bytes, listed: bytes, committee: str, position: int, index: int, clock: Clock
) -> RunAccounts:
    """Drop the client ``listed``, at ``index`` of the previous round, with that seat."""
    need_member(run, user)
    state, round_ = run.state, _running(run.state)
    if round_ is not None:
        before = state.round_at(round_.height - 1)
        caller = any(client.signer == user for client in state.healthy)
        require(before is not None and caller, "InvalidHealthCheck")
        assert before is not None
        require(index < len(before.clients) and before.clients[index] == listed, "InvalidCommitteeProof")
        selection = round_selection(before, state.config)
        seat = selection.committee(index), selection.committee_position(index)
        require(seat == (_COMMITTEES[committee], position), "InvalidCommitteeProof")
    height = round_.height if round_ else 0
    state, dropped = machine.health_check(state, user, HealthCheck(state.epoch, height, (listed,)))
    run = _forgotten(run, listed) if dropped else run
    return advance(replace(run, state=state), clock)

"""The coordinator's state machine: pure functions from a run's state to the next one.

docs/psyche.md lists the differences from Psyche's machine.

Inputs (:func:`witness` and similar) only record. Only :func:`tick` moves a run from phase to phase, one step per call,
so a host calls it until nothing changes. Time and randomness are arguments. Every change increases ``nonce``, and a
call that changes nothing returns the same state object.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import replace
from enum import Enum, auto
from typing import Any

from psyche_lightning.errors import CoordinatorError
from psyche_lightning.protocol.bloom import BLOOM_SIZE, Bloom
from psyche_lightning.protocol.committee import quorum, round_selection
from psyche_lightning.protocol.requests import HealthCheck, Vote, WarmupWitness, Witness
from psyche_lightning.protocol.state import (
    STORED_ROUNDS,
    Checkpoint,
    Client,
    ClientStatus,
    CoordinatorConfig,
    Phase,
    Round,
    RunState,
    WitnessProof,
    WitnessRecord,
)
from psyche_lightning.wire.canonical import HASH_SIZE, sha256

DRAIN_ROUNDS = 2
"""Rounds without training at the end of an epoch, in which the last results are witnessed and applied."""


class MachineError(CoordinatorError):
    """The machine refuses a transition; ``code`` is Psyche's name of the error (``InvalidCheckpoint`` is ours)."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message, code=code)


def batch_size(config: CoordinatorConfig, tokens: int) -> int:
    """Samples of the next round after ``tokens`` tokens of the run; half rounds up, as in Psyche."""
    start, end = config.global_batch_size_start, config.global_batch_size_end
    ramp = config.global_batch_size_warmup_tokens
    if tokens >= ramp:
        return end
    return start + (2 * (end - start) * tokens + ramp) // (2 * ramp)


def healthy(state: RunState) -> list[Client]:
    """The healthy clients, in list order."""
    return [client for client in state.clients if client.status is ClientStatus.HEALTHY]


def deadline(state: RunState) -> float | None:
    """When time alone advances the run; None if only an input can."""
    config, start = state.config, state.phase_start
    if state.phase is Phase.WAITING_FOR_MEMBERS:
        return None if state.gathered_at is None else state.gathered_at + config.waiting_for_members_extra_time
    length = {
        Phase.WARMUP: config.warmup_time,
        Phase.ROUND_TRAIN: config.max_round_train_time,
        Phase.ROUND_WITNESS: config.round_witness_time,
        Phase.COOLDOWN: config.cooldown_time,
    }.get(state.phase)
    return None if length is None else start + length


def _expired(state: RunState, now: float) -> bool:
    due = deadline(state)
    return due is not None and now >= due


def _heard_enough(state: RunState, round_: Round) -> bool:
    """Whether a quorum of the expected witnesses has said "I have everything"."""
    complete = sum(record.complete for record in round_.witnesses)
    return complete >= quorum(round_selection(round_, state.config).witness_count)


def _nobody_left_to_report(state: RunState, round_: Round) -> bool:
    """Whether each witness has reported or has left."""
    selection = round_selection(round_, state.config)
    reported = {record.proof.index for record in round_.witnesses}
    present = {client.signer for client in healthy(state)}
    return not any(
        signer in present and index not in reported and selection.is_witness(index)
        for index, signer in enumerate(round_.clients)
    )


class Ending(Enum):
    """Why an epoch ends."""

    NO_WITNESS = auto()
    TIME_OVER = auto()
    FEW_CLIENTS = auto()
    NO_QUORUM = auto()
    ALL_TRAINED = auto()
    PAUSE = auto()


def ending(state: RunState, round_: Round, now: float) -> Ending | None:
    """Why the epoch ends after the training round ``round_``; None if it continues.

    In ``state`` the step is counted and the clients that left are removed.
    """
    if not round_.witnesses:
        return Ending.NO_WITNESS
    if now >= state.epoch_start + state.config.epoch_time:
        return Ending.TIME_OVER
    if len(state.clients) < state.config.min_clients:
        return Ending.FEW_CLIENTS
    if len(round_.witnesses) < quorum(round_selection(round_, state.config).witness_count):
        return Ending.NO_QUORUM
    if state.step > state.config.total_steps:
        return Ending.ALL_TRAINED
    return Ending.PAUSE if state.pending_pause else None


def _change(state: RunState, **fields: Any) -> RunState:
    return replace(state, nonce=state.nonce + 1, **fields)


def _enter(state: RunState, phase: Phase, now: float, **fields: Any) -> RunState:
    return _change(state, phase=phase, phase_start=now, gathered_at=None, **fields)


def _departed(state: RunState, height: int) -> dict[str, Any]:
    """The fields that change when clients that are not healthy leave the list."""
    leaving = tuple(replace(c, exited_height=height) for c in state.clients if c.status is not ClientStatus.HEALTHY)
    return {"clients": tuple(healthy(state)), "exited_clients": state.exited_clients + leaving} if leaving else {}


def _with_status(state: RunState, status: ClientStatus, signers: Collection[bytes]) -> tuple[Client, ...]:
    return tuple(
        replace(c, status=status) if c.signer in signers and c.status is ClientStatus.HEALTHY else c
        for c in state.clients
    )


def _everyone_withdrawn(state: RunState) -> tuple[Client, ...]:
    return _with_status(state, ClientStatus.WITHDRAWN, [client.signer for client in state.clients])


def _next_members(state: RunState) -> Phase:
    return Phase.FINISHED if state.step > state.config.total_steps else Phase.WAITING_FOR_MEMBERS


def start(state: RunState, now: float) -> RunState:
    """Open a new run to members.

    Raises:
        MachineError: the run was opened before (``InvalidRunState``).
    """
    if state.phase is not Phase.UNINITIALIZED:
        raise MachineError("InvalidRunState", f"the run is already in phase {state.phase.name}")
    return _enter(state, Phase.WAITING_FOR_MEMBERS, now)


def tick(state: RunState, pending: Sequence[Client] | None, now: float, seed: int) -> RunState:
    """Take the next step that is due, if any.

    Args:
        state: the state.
        pending: the members that wait for an epoch, at most as many as the host supports; None if not known.
        now: the coordinator's time in seconds.
        seed: u64 for the round that may begin.

    Raises:
        MachineError: only a command can continue the run (``Halted``).
    """
    if state.phase.halted:
        raise MachineError("Halted", f"the run is halted in phase {state.phase.name}")
    if state.phase is Phase.WAITING_FOR_MEMBERS:
        return state if pending is None else _tick_waiting(state, pending, now)
    if state.phase is Phase.WARMUP:
        return _tick_warmup(state, now, seed)
    if state.phase is Phase.COOLDOWN:
        return _tick_cooldown(state, now)
    round_ = state.current
    assert round_ is not None
    if not (_expired(state, now) or _heard_enough(state, round_) or _nobody_left_to_report(state, round_)):
        return state
    if state.phase is Phase.ROUND_TRAIN:
        return _enter(state, Phase.ROUND_WITNESS, now)
    return _end_round(state, round_, now, seed)


def _tick_waiting(state: RunState, pending: Sequence[Client], now: float) -> RunState:
    if len(pending) < state.config.init_min_clients:
        return state if state.gathered_at is None else _change(state, gathered_at=None)
    alone = state.config.init_min_clients == len(pending) == 1
    if not alone:
        if state.gathered_at is None:
            return _change(state, gathered_at=now)
        if not _expired(state, now):
            return state
    # If nobody is left who could serve the parameters, the first warm-up witness decides again.
    lost = {client.signer for client in pending}.isdisjoint(state.holders)
    return _enter(
        state,
        Phase.WARMUP,
        now,
        clients=tuple(replace(c, status=ClientStatus.HEALTHY, exited_height=0) for c in pending),
        exited_clients=(),
        rounds=(),
        head=0,
        warmup_witnesses=(),
        checkpoint_votes=(),
        epoch_digest=b"",
        epoch_start=now,
        start_step=state.step,
        last_step=0,
        checkpoint=Checkpoint() if lost else state.checkpoint,
    )


def _tick_warmup(state: RunState, now: float, seed: int) -> RunState:
    departed = _departed(state, 0)
    if departed:
        # A record names its client by index, so the clients that stay get new indices.
        index = {client.signer: i for i, client in enumerate(departed["clients"])}
        records = [(index.get(state.clients[record.proof.index].signer), record) for record in state.warmup_witnesses]
        kept = tuple(replace(record, proof=WitnessProof(i, i)) for i, record in records if i is not None)
        return _change(state, warmup_witnesses=kept, **departed)
    if len(state.clients) < state.config.min_clients:
        return _enter(state, Phase.WAITING_FOR_MEMBERS, now)
    if len(state.warmup_witnesses) < len(state.clients) and not _expired(state, now):
        return state
    if not state.warmup_witnesses:
        # These clients had the whole warm-up to report the checkpoint. None did, so none holds it.
        silent = {client.signer for client in state.clients}
        holders = tuple(signer for signer in state.holders if signer not in silent)
        return _enter(state, Phase.WAITING_FOR_MEMBERS, now, holders=holders)
    # If parameters are agreed, all records name them. If not, the first record decides, and its parameters are agreed.
    digest = state.warmup_witnesses[0].merkle
    agreed = state.checkpoint if state.checkpoint.digest else Checkpoint(digest, state.step - 1)
    state = replace(state, epoch_digest=digest, checkpoint=agreed)
    return _begin_round(state, state.epoch_start_data_index, now, seed)


def _begin_round(state: RunState, data_index: int, now: float, seed: int) -> RunState:
    before = state.current
    height = before.height + 1 if before else 0
    training = not state.draining
    round_ = Round(
        height=height,
        step=state.step if training else 0,
        seed=seed,
        data_index=data_index,
        batch_size=batch_size(state.config, data_index * state.max_seq_len) if training else 0,
        clients=tuple(client.signer for client in state.clients),
    )
    head = height % STORED_ROUNDS
    rounds = (*state.rounds[:head], round_, *state.rounds[head + 1 :])
    return _enter(state, Phase.ROUND_TRAIN, now, rounds=rounds, head=head)


def _end_round(state: RunState, round_: Round, now: float, seed: int) -> RunState:
    state = replace(state, step=state.step + (round_.step > 0), **_departed(state, round_.height))
    if not state.draining:
        if not round_.witnesses:
            return _enter(state, Phase.COOLDOWN, now, clients=_everyone_withdrawn(state))
        if ending(state, round_, now):
            state = replace(state, last_step=state.step)
    elif _drained(state) == DRAIN_ROUNDS:
        return _enter(state, Phase.COOLDOWN, now)
    return _begin_round(state, round_.data_index + round_.batch_size, now, seed)


def _drained(state: RunState) -> int:
    """How many of the stored rounds are drain rounds; the ring has room for all of them."""
    return sum(round_.step == 0 for round_ in state.rounds)


def _tick_cooldown(state: RunState, now: float) -> RunState:
    round_ = state.current
    assert round_ is not None
    present = {client.signer for client in healthy(state)}
    counted = Counter(vote[1:] for vote in state.checkpoint_votes if vote[0] in present)
    agreed = [vote for vote, count in counted.most_common(1) if count >= quorum(len(present))]
    if not agreed and counted.total() < len(present) and not _expired(state, now):
        return state
    if agreed:
        checkpoint = Checkpoint(step=agreed[0][0], digest=agreed[0][1])
        state = replace(state, checkpoint=checkpoint, epoch_start_data_index=round_.data_index + round_.batch_size)
    else:  # go back to the epoch's beginning, and train its steps again
        state = replace(state, step=state.start_step)
    members = dict.fromkeys(client.signer for client in (*state.clients, *state.exited_clients))
    state = replace(state, epoch=state.epoch + 1, holders=tuple(members), cold_start_epoch=state.pending_pause)
    if state.pending_pause:
        return _enter(state, Phase.PAUSED, now, clients=_everyone_withdrawn(state), pending_pause=False)
    return _enter(state, _next_members(state), now)


def warmup_witness(state: RunState, signer: bytes, request: WarmupWitness) -> RunState:
    """Record which parameters a client holds; changes nothing if it comes too late.

    Raises:
        MachineError: ``Halted``; ``InvalidRunState`` if no epoch is formed; ``InvalidWitness`` for another epoch,
            client or digest; ``DuplicateWitness``.
    """
    index, digest = request.index, request.digest
    _not_halted(state)
    if state.phase is Phase.WAITING_FOR_MEMBERS:
        raise MachineError("InvalidRunState", "no epoch is formed yet; wait for the warm-up")
    _same_epoch(state, request.epoch, "InvalidWitness")
    if state.phase is not Phase.WARMUP:
        return state
    at_index = 0 <= index < len(state.clients) and state.clients[index].signer == signer
    if not (at_index and _is_healthy(state, signer)):
        raise MachineError("InvalidWitness", f"{signer[:4].hex()} is not the healthy client at index {index}")
    if any(record.proof.index == index for record in state.warmup_witnesses):
        raise MachineError("DuplicateWitness", f"client {index} has already reported its parameters")
    if len(digest) != HASH_SIZE:
        raise MachineError("InvalidWitness", f"a parameter digest has {HASH_SIZE} bytes, not {len(digest)}")
    if state.checkpoint.digest and digest != state.checkpoint.digest:
        raise MachineError(
            "InvalidWitness",
            f"the parameters {digest[:4].hex()} are not the run's, {state.checkpoint.digest[:4].hex()} "
            f"after {state.checkpoint.step} steps; fetch those from a peer",
        )
    record = WitnessRecord(WitnessProof(index, index), digest)
    holders = state.holders if signer in state.holders else (*state.holders, signer)
    return _change(state, warmup_witnesses=(*state.warmup_witnesses, record), holders=holders)


def witness(state: RunState, signer: bytes, request: Witness) -> RunState:
    """Record a witness' report on the current round; during training it means "I have everything".

    Raises:
        MachineError: ``Halted``; ``InvalidRunState`` outside a round; ``InvalidWitness`` for another round, a client
            without that seat or not healthy, or bytes of a wrong size; ``DuplicateWitness``.
    """
    epoch, height, proof = request.epoch, request.height, request.proof
    round_ = _running_round(state)
    if (epoch, height) != (state.epoch, round_.height):
        raise MachineError(
            "InvalidWitness",
            f"a report on epoch {epoch}, height {height}; the run is at epoch {state.epoch}, height {round_.height}",
        )
    seated = round_selection(round_, state.config).verify_witness(proof) and round_.clients[proof.index] == signer
    if not seated:
        raise MachineError(
            "InvalidWitness", f"{signer[:4].hex()} has no witness seat {proof.position} at index {proof.index}"
        )
    if not _is_healthy(state, signer):
        raise MachineError("InvalidWitness", f"{signer[:4].hex()} is no longer a healthy client")
    if any(record.proof.index == proof.index for record in round_.witnesses):
        raise MachineError("DuplicateWitness", f"client {proof.index} has already reported on height {height}")
    for name, value, size in (
        ("merkle root", request.merkle, HASH_SIZE),
        ("participants filter", request.participants, BLOOM_SIZE),
        ("broadcasts filter", request.broadcasts, BLOOM_SIZE),
    ):
        if len(value) != size:
            raise MachineError("InvalidWitness", f"the {name} has {len(value)} bytes, not {size}")
    complete = state.phase is Phase.ROUND_TRAIN
    record = WitnessRecord(proof, request.merkle, complete, request.participants, request.broadcasts)
    filled = replace(round_, witnesses=(*round_.witnesses, record))
    return _change(state, rounds=(*state.rounds[: state.head], filled, *state.rounds[state.head + 1 :]))


def health_check(state: RunState, signer: bytes, request: HealthCheck) -> tuple[RunState, int]:
    """Drop the named clients, from which the witnesses of the previous round heard nothing.

    A client is healthy if the reports of a quorum of those witnesses name it as a participant, if it was not in that
    round, or if the round cannot tell (nobody reported on it, or it was a drain round). Clients that have already left
    are ignored.

    Returns:
        The state, and how many clients were dropped.

    Raises:
        MachineError: ``Halted``; ``InvalidRunState`` outside a round; ``InvalidHealthCheck`` if a listed client is
            healthy, the caller is not, or the round is another or the first.
    """
    epoch, height = request.epoch, request.height
    round_ = _running_round(state)
    before = state.round_at(round_.height - 1)
    if (epoch, height) != (state.epoch, round_.height) or before is None:
        raise MachineError(
            "InvalidHealthCheck",
            f"a health check at epoch {epoch}, height {height}; the run is at epoch {state.epoch}, height "
            f"{round_.height}, and the first round has no previous one",
        )
    if not _is_healthy(state, signer):
        raise MachineError("InvalidHealthCheck", f"{signer[:4].hex()} is not a healthy client of this epoch")
    blooms = [Bloom.from_bytes(record.participants) for record in before.witnesses]
    dropped = [listed for listed in dict.fromkeys(request.signers) if _is_healthy(state, listed)]
    for listed in dropped:
        item = sha256(listed)
        unheard = listed in before.clients and before.step > 0 and blooms
        if not unheard or sum(item in bloom for bloom in blooms) >= quorum(len(blooms)):
            raise MachineError(
                "InvalidHealthCheck", f"{listed[:4].hex()} is healthy as far as height {height - 1} shows"
            )
    if not dropped:
        return state, 0
    return _change(state, clients=_with_status(state, ClientStatus.DROPPED, dropped)), len(dropped)


def vote(state: RunState, signer: bytes, request: Vote) -> RunState:
    """Record a client's vote for the parameters that it holds at the end of the epoch; may be repeated.

    Raises:
        MachineError: ``Halted``; ``InvalidRunState`` outside cool-down; ``InvalidCheckpoint`` for another epoch, a
            client that is not healthy, a second different vote, or values out of range.
    """
    step, digest = request.step, request.digest
    _not_halted(state)
    if state.phase is not Phase.COOLDOWN:
        raise MachineError("InvalidRunState", f"votes count in cool-down only; the run is in {state.phase.name}")
    _same_epoch(state, request.epoch, "InvalidCheckpoint")
    if not _is_healthy(state, signer):
        raise MachineError("InvalidCheckpoint", f"{signer[:4].hex()} is not a healthy client of this epoch")
    if len(digest) != HASH_SIZE or not 0 <= step < state.step:
        raise MachineError(
            "InvalidCheckpoint",
            f"a vote needs a digest of {HASH_SIZE} bytes (got {len(digest)}) and at most {state.step - 1} steps "
            f"(got {step})",
        )
    for voter, *before in state.checkpoint_votes:
        if voter == signer:
            if before == [step, digest]:
                return state
            raise MachineError("InvalidCheckpoint", f"{signer[:4].hex()} has already voted for other parameters")
    return _change(state, checkpoint_votes=(*state.checkpoint_votes, (signer, step, digest)))


def withdraw(state: RunState, signer: bytes, status: ClientStatus = ClientStatus.WITHDRAWN) -> RunState:
    """Let a healthy client leave: by its own decision, or (``DROPPED``) because the host saw it vanish.

    Raises:
        MachineError: it is not a healthy client (``InvalidWithdraw``).
    """
    if not _is_healthy(state, signer):
        raise MachineError("InvalidWithdraw", f"{signer[:4].hex()} is not a healthy client of this epoch")
    return _change(state, clients=_with_status(state, status, [signer]))


def move(state: RunState, signer: bytes, node: bytes, address: str) -> RunState:
    """Change the address of a client that came back; other signers and node keys change nothing."""
    clients = tuple(replace(c, address=address) if (c.signer, c.node) == (signer, node) else c for c in state.clients)
    return state if clients == state.clients else _change(state, clients=clients)


def pause(state: RunState, now: float) -> RunState:
    """Pause the run: at once between epochs and in warm-up, otherwise when the epoch has drained.

    Raises:
        MachineError: the run is already halted (``Halted``).
    """
    _not_halted(state)
    if state.phase.active:
        return state if state.pending_pause else _change(state, pending_pause=True)
    return _enter(state, Phase.PAUSED, now, clients=_everyone_withdrawn(state), cold_start_epoch=True)


def resume(state: RunState, now: float) -> RunState:
    """Open a paused run to members again, or finish it if all steps are trained.

    Raises:
        MachineError: the run is not paused (``CannotResume``).
    """
    if state.phase is not Phase.PAUSED:
        raise MachineError("CannotResume", f"only a paused run resumes; this one is in phase {state.phase.name}")
    return _enter(state, _next_members(state), now)


def _not_halted(state: RunState) -> None:
    if state.phase.halted:
        raise MachineError("Halted", f"the run is halted in phase {state.phase.name}")


def _running_round(state: RunState) -> Round:
    _not_halted(state)
    round_ = state.current
    if state.phase not in (Phase.ROUND_TRAIN, Phase.ROUND_WITNESS) or round_ is None:
        raise MachineError("InvalidRunState", f"no round is under way; the run is in phase {state.phase.name}")
    return round_


def _same_epoch(state: RunState, epoch: int, code: str) -> None:
    if epoch != state.epoch:
        raise MachineError(code, f"a message for epoch {epoch}; the run is in epoch {state.epoch}")


def _is_healthy(state: RunState, signer: bytes) -> bool:
    return any(client.signer == signer and client.status is ClientStatus.HEALTHY for client in state.clients)

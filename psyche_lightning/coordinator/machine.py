"""The coordinator's state machine: pure functions from a run's state to the next one.

docs/psyche.md lists the differences from Psyche's machine.

Inputs (:func:`witness` and similar) only record. Only :func:`tick` moves a run from phase to phase, one step per call,
so a host calls it until nothing changes. Time and randomness are arguments. Every change increases ``nonce``, and a
call that changes nothing returns the same state object.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from enum import Enum, auto
from typing import Any

from psyche_lightning.coordinator.shares import weigh
from psyche_lightning.errors import CoordinatorError, counted
from psyche_lightning.protocol.bloom import BLOOM_SIZE, Bloom
from psyche_lightning.protocol.committee import (
    decided_root,
    least_clients,
    members,
    needed_reports,
    quorum,
    round_selection,
    starting_digest,
)
from psyche_lightning.protocol.merkle import EMPTY_ROOT
from psyche_lightning.protocol.requests import HealthCheck, WarmupWitness, Witness
from psyche_lightning.protocol.state import (
    MISSED_ROUNDS,
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
"""Most rounds without training at the end of an epoch: they decide the last results and name the last parameters."""


class MachineError(CoordinatorError):
    """The machine refuses a transition; ``code`` is Psyche's name of the error."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message, code=code)


def batch_size(config: CoordinatorConfig, tokens: int) -> int:
    """Samples of the next round after ``tokens`` tokens of the run; half rounds up, as in Psyche."""
    start, end = config.global_batch_size_start, config.global_batch_size_end
    ramp = config.global_batch_size_warmup_tokens
    if tokens >= ramp:
        return end
    return start + (2 * (end - start) * tokens + ramp) // (2 * ramp)


def deadline(state: RunState) -> float | None:
    """When time alone advances the run; None if only an input can."""
    config, start = state.config, state.phase_start
    if state.phase is Phase.WAITING_FOR_MEMBERS:
        return None if state.gathered_at is None else state.gathered_at + config.waiting_for_members_extra_time
    length = {
        Phase.WARMUP: config.warmup_time,
        Phase.ROUND_TRAIN: config.cooldown_time if state.draining else config.max_round_train_time,
        Phase.ROUND_WITNESS: config.round_witness_time,
    }.get(state.phase)
    return None if length is None else start + length


def _expired(state: RunState, now: float) -> bool:
    due = deadline(state)
    return due is not None and now >= due


def _over(state: RunState, round_: Round) -> bool:
    """Whether nothing more is to come of a round: it is decided, or too few clients are left to decide it.

    The last drain round is over when the parameters after all results are named.
    """
    if len(state.healthy) < least_clients(state):
        return True
    if state.draining and (state.settled or _drained(state) == DRAIN_ROUNDS):
        return state.settled
    return decided_root(round_, state.needed) is not None


def unreported(state: RunState, round_: Round) -> set[bytes]:
    """The signers of the healthy witnesses that have not reported on a round."""
    selection = round_selection(round_, state.config)
    reported = {record.proof.index for record in round_.witnesses}
    present = {client.signer for client in state.healthy}
    return {
        signer
        for index, signer in enumerate(round_.clients)
        if signer in present and index not in reported and selection.is_witness(index)
    }


class Ending(Enum):
    """Why an epoch ends. The first two end it at once: no round can be decided."""

    FEW_CLIENTS = auto()
    FEW_REPORTS = auto()
    NOTHING_APPLIED = auto()
    TIME_OVER = auto()
    ALL_TRAINED = auto()
    PAUSE = auto()


AT_ONCE = (Ending.FEW_CLIENTS, Ending.FEW_REPORTS)


def ending(state: RunState, round_: Round, now: float) -> Ending | None:
    """Why the epoch ends after the round ``round_``; None if it continues.

    In ``state`` the step is counted and the clients that left are removed.
    """
    if len(state.clients) < least_clients(state):
        return Ending.FEW_CLIENTS
    if len(round_.witnesses) < state.needed:
        return Ending.FEW_REPORTS
    if _nothing_applied(state):
        return Ending.NOTHING_APPLIED
    if now >= state.epoch_start + state.config.epoch_time:
        return Ending.TIME_OVER
    if state.step > state.config.total_steps:
        return Ending.ALL_TRAINED
    return Ending.PAUSE if state.pending_pause else None


def _nothing_applied(state: RunState) -> bool:
    """Whether none of the stored rounds, all of which train, has a result."""
    return len(state.rounds) == STORED_ROUNDS and all(
        round_.step and decided_root(round_, state.needed) in (None, EMPTY_ROOT) for round_ in state.rounds
    )


def _change(state: RunState, **fields: Any) -> RunState:
    return replace(state, nonce=state.nonce + 1, **fields)


def _enter(state: RunState, phase: Phase, now: float, **fields: Any) -> RunState:
    return _change(state, phase=phase, phase_start=now, gathered_at=None, **fields)


def _departed(state: RunState, height: int) -> dict[str, Any]:
    """The fields that change when clients that are not healthy leave the list."""
    leaving = tuple(replace(c, exited_height=height) for c in state.clients if c.status is not ClientStatus.HEALTHY)
    return {"clients": state.healthy, "exited_clients": state.exited_clients + leaving} if leaving else {}


def _with_status(state: RunState, status: ClientStatus, signers: Collection[bytes]) -> tuple[Client, ...]:
    return tuple(
        replace(c, status=status) if c.signer in signers and c.status is ClientStatus.HEALTHY else c
        for c in state.clients
    )


def _everyone_withdrawn(state: RunState) -> tuple[Client, ...]:
    return _with_status(state, ClientStatus.WITHDRAWN, [client.signer for client in state.clients])


def _next_members(state: RunState) -> Phase:
    nothing = not state.checkpoint.digest  # no epoch ever began
    over = state.step > state.config.total_steps and (state.settled or nothing)
    return Phase.FINISHED if over else Phase.WAITING_FOR_MEMBERS


def start(state: RunState, now: float) -> RunState:
    """Open a new run to members.

    Raises:
        MachineError: the run was opened before (``InvalidRunState``).
    """
    if state.phase is not Phase.UNINITIALIZED:
        raise MachineError("InvalidRunState", f"the run is already in phase {state.phase.name}")
    return _enter(state, Phase.WAITING_FOR_MEMBERS, now)


def tick(
    state: RunState,
    pending: Sequence[Client] | None,
    now: float,
    seed: int,
    speeds: Mapping[bytes, float] | None = None,
) -> RunState:
    """Take the next step that is due, if any.

    Args:
        state: the state.
        pending: the members that wait for an epoch, at most as many as the host supports; None if not known.
        now: the coordinator's time in seconds.
        seed: u64 for the round that may begin.
        speeds: the known speeds of the clients in samples a second, by which that round's samples are divided; None
            for equal shares.

    Raises:
        MachineError: only a command can continue the run (``Halted``).
    """
    if state.phase.halted:
        raise MachineError("Halted", f"the run is halted in phase {state.phase.name}")
    if state.phase is Phase.WAITING_FOR_MEMBERS:
        return state if pending is None else _tick_waiting(state, pending, now)
    if state.phase is Phase.WARMUP:
        return _tick_warmup(state, now, seed, speeds or {})
    round_ = state.current
    assert round_ is not None
    if _over(state, round_):
        return _end_round(state, round_, now, seed, speeds or {})
    if state.phase is Phase.ROUND_TRAIN:
        over = _expired(state, now) or not unreported(state, round_)
        return _enter(state, Phase.ROUND_WITNESS, now) if over else state
    return _end_round(state, round_, now, seed, speeds or {}) if _expired(state, now) else state


def _tick_waiting(state: RunState, pending: Sequence[Client], now: float) -> RunState:
    if not gathered(state, pending):
        return state if state.gathered_at is None else _change(state, gathered_at=None)
    alone = state.config.init_min_clients == len(pending) == 1
    if not alone:
        if state.gathered_at is None:
            return _change(state, gathered_at=now)
        if not _expired(state, now):
            return state
    return _enter(
        state,
        Phase.WARMUP,
        now,
        clients=tuple(replace(c, status=ClientStatus.HEALTHY, exited_height=0) for c in pending),
        exited_clients=(),
        warmup_witnesses=(),
        checkpoint_votes=(),
        epoch_start=now,
    )


def gathered(state: RunState, pending: Collection[Client]) -> bool:
    """Whether enough members wait for an epoch, and one of them may hold the run's parameters."""
    enough = len(pending) >= state.config.init_min_clients
    fresh = not state.checkpoint.digest
    return enough and (fresh or not {client.signer for client in pending}.isdisjoint(state.holders))


def _tick_warmup(state: RunState, now: float, seed: int, speeds: Mapping[bytes, float]) -> RunState:
    departed = _departed(state, 0)
    if departed:
        # A record names its client by index, so the clients that stay get new indices.
        index = {client.signer: i for i, client in enumerate(departed["clients"])}
        records = [(index.get(state.clients[record.proof.index].signer), record) for record in state.warmup_witnesses]
        kept = tuple(replace(record, proof=WitnessProof(i, i)) for i, record in records if i is not None)
        return _change(state, warmup_witnesses=kept, **departed)
    if len(state.clients) < least_clients(state):
        return _enter(state, Phase.WAITING_FOR_MEMBERS, now)
    expired = _expired(state, now)
    if len(state.warmup_witnesses) < len(state.clients) and not expired:
        return state
    counts = Counter(record.merkle for record in state.warmup_witnesses)
    digest, count = max(counts.items(), key=lambda item: item[1], default=(b"", 0))
    if count < quorum(members(state)):
        return _enter(state, Phase.WAITING_FOR_MEMBERS, now) if expired else state
    state = replace(
        state,
        epoch_digest=digest,
        checkpoint=Checkpoint(digest, state.step - 1),
        start_step=state.step,
        last_step=0,
        needed=needed_reports(state),
        rounds=(),
        head=0,
    )
    if state.step > state.config.total_steps:  # the last epoch ended before its parameters were named
        return _enter(state, Phase.FINISHED, now)
    return _begin_round(state, state.epoch_start_data_index, now, seed, speeds)


def _begin_round(state: RunState, data_index: int, now: float, seed: int, speeds: Mapping[bytes, float]) -> RunState:
    before = state.current
    height = before.height + 1 if before else 0
    training = not state.draining
    clients = tuple(client.signer for client in state.clients)
    samples = batch_size(state.config, data_index * state.max_seq_len) if training else 0
    round_ = Round(
        height=height,
        step=state.step if training else 0,
        seed=seed,
        data_index=data_index,
        batch_size=samples,
        clients=clients,
        weights=weigh(clients, speeds, before, samples) if training else (),
    )
    head = height % STORED_ROUNDS
    rounds = (*state.rounds[:head], round_, *state.rounds[head + 1 :])
    return _enter(state, Phase.ROUND_TRAIN, now, rounds=rounds, head=head, checkpoint_votes=())


def _end_round(state: RunState, round_: Round, now: float, seed: int, speeds: Mapping[bytes, float]) -> RunState:
    state = replace(state, step=state.step + (round_.step > 0), **_departed(state, round_.height))
    why = ending(state, round_, now)
    if why in AT_ONCE or (state.draining and (state.settled or _drained(state) == DRAIN_ROUNDS)):
        return _end_epoch(state, round_, now)
    if not state.draining and why is not None:
        idle = why is Ending.NOTHING_APPLIED
        state = replace(state, last_step=state.step, pending_pause=state.pending_pause or idle)
    return _begin_round(state, round_.data_index + round_.batch_size, now, seed, speeds)


def _drained(state: RunState) -> int:
    """How many of the stored rounds are drain rounds; the ring has room for all of them."""
    return sum(round_.step == 0 for round_ in state.rounds)


def _end_epoch(state: RunState, round_: Round, now: float) -> RunState:
    everyone = tuple(client.signer for client in (*state.clients, *state.exited_clients))
    state = replace(
        state,
        epoch=state.epoch + 1,
        epoch_start_data_index=round_.data_index + round_.batch_size,
        holders=everyone,
        cold_start_epoch=state.pending_pause,
    )
    if state.pending_pause:
        return _enter(state, Phase.PAUSED, now, clients=_everyone_withdrawn(state), pending_pause=False)
    return _enter(state, _next_members(state), now)


def warmup_witness(state: RunState, signer: bytes, request: WarmupWitness) -> RunState:
    """Record which parameters a member holds; changes nothing if it comes too late.

    Before an epoch is formed, a member so becomes a holder, whoever brought the checkpoint back. In a fresh run the
    first member's parameters become the run's.

    Raises:
        MachineError: ``Halted``; ``InvalidWitness`` for another epoch, client or digest; ``DuplicateWitness``.
    """
    index, digest = request.index, request.digest
    _not_halted(state)
    _same_epoch(state, request.epoch, "InvalidWitness")
    if state.phase is Phase.WAITING_FOR_MEMBERS:
        if not digest or digest != state.checkpoint.digest:
            raise MachineError("InvalidWitness", "these are not the parameters for which the run waits")
        return state if signer in state.holders else _change(state, holders=(*state.holders, signer))
    if state.phase is not Phase.WARMUP:
        return state
    at_index = 0 <= index < len(state.clients) and state.clients[index].signer == signer
    if not (at_index and _is_healthy(state, signer)):
        raise MachineError("InvalidWitness", f"{signer[:4].hex()} is not the healthy client at index {index}")
    if any(record.proof.index == index for record in state.warmup_witnesses):
        raise MachineError("DuplicateWitness", f"client {index} has already reported its parameters")
    if len(digest) != HASH_SIZE:
        raise MachineError("InvalidWitness", f"a parameter digest has {HASH_SIZE} bytes, not {len(digest)}")
    decided = starting_digest(state)
    if not decided and not state.checkpoint.digest and index:
        raise MachineError("InvalidWitness", "the first member of a fresh run says which parameters it begins with")
    if decided and digest != decided:
        raise MachineError(
            "InvalidWitness",
            f"the parameters {digest[:4].hex()} are not the run's, {decided[:4].hex()} after "
            f"{counted(state.step - 1, 'step')}; fetch those from a peer",
        )
    record = WitnessRecord(WitnessProof(index, index), digest)
    holders = state.holders if signer in state.holders else (*state.holders, signer)
    return _change(state, warmup_witnesses=(*state.warmup_witnesses, record), holders=holders)


def witness(state: RunState, signer: bytes, request: Witness) -> RunState:
    """Record a witness' report on the current round in place of its earlier one, until the round is decided.

    A host may leave a decided round open for first reports. While the epoch drains, a later report still names
    parameters.

    Raises:
        MachineError: ``Halted``; ``InvalidRunState`` outside a round; ``InvalidWitness`` for another round, a client
            without that seat or not healthy, bytes of a wrong size, or a step that the parameters cannot have;
            ``DuplicateWitness`` for an equal report, or for another one if the round is decided.
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
    for name, value, size in (
        ("merkle root", request.merkle, HASH_SIZE),
        ("participants filter", request.participants, BLOOM_SIZE),
        ("broadcasts filter", request.broadcasts, BLOOM_SIZE),
    ):
        if len(value) != size:
            raise MachineError("InvalidWitness", f"the {name} has {len(value)} bytes, not {size}")
    if len(request.digest) not in (0, HASH_SIZE) or (request.digest and not 0 <= request.step < state.step):
        raise MachineError(
            "InvalidWitness",
            f"parameters are named by {HASH_SIZE} bytes and at most {counted(state.step - 1, 'step')}, not by "
            f"{counted(len(request.digest), 'byte')} and {counted(request.step, 'step')}",
        )
    records = {record.proof.index: record for record in round_.witnesses}
    stays = proof.index in records and decided_root(round_, state.needed) is not None  # what is decided stays decided
    if not stays:
        records[proof.index] = WitnessRecord(proof, request.merkle, request.participants, request.broadcasts)
    held = {vote[0]: vote for vote in state.checkpoint_votes}
    if request.digest:
        held[signer] = (signer, request.step, request.digest)
    witnesses, votes = tuple(records.values()), tuple(held.values())
    repeated = (witnesses, votes) == (round_.witnesses, state.checkpoint_votes)
    if repeated or (stays and not state.draining):
        raise MachineError("DuplicateWitness", f"client {proof.index} has already reported on height {height}")
    filled = replace(round_, witnesses=witnesses)
    return _change(
        state,
        rounds=(*state.rounds[: state.head], filled, *state.rounds[state.head + 1 :]),
        checkpoint_votes=votes,
        checkpoint=_named(state, votes),
    )


def _named(state: RunState, votes: Sequence[tuple[bytes, int, bytes]]) -> Checkpoint:
    """The newest parameters that enough witnesses of one round hold."""
    counts = Counter(vote[1:] for vote in votes)
    named = [Checkpoint(digest, step) for (step, digest), count in counts.items() if count >= state.needed]
    return max([state.checkpoint, *named], key=lambda checkpoint: checkpoint.step)


def health_check(state: RunState, signer: bytes, request: HealthCheck) -> tuple[RunState, int]:
    """Drop the named clients, which delivered nothing in the last rounds.

    A client may be dropped if in each of the last ``MISSED_ROUNDS`` rounds a quorum of the witnesses reported, and
    their reports do not name it as a participant. In the first rounds of an epoch, and in drain rounds, none may be.
    Clients that have already left are ignored.

    Returns:
        The state, and how many clients were dropped.

    Raises:
        MachineError: ``Halted``; ``InvalidRunState`` outside a round; ``InvalidHealthCheck`` if a listed client is
            healthy, the caller is not, or the round is another or the first.
    """
    epoch, height = request.epoch, request.height
    round_ = _running_round(state)
    past = [state.round_at(round_.height - back) for back in range(1, MISSED_ROUNDS + 1)]
    if (epoch, height) != (state.epoch, round_.height):
        raise MachineError(
            "InvalidHealthCheck",
            f"a health check at epoch {epoch}, height {height}; the run is at epoch {state.epoch}, height "
            f"{round_.height}",
        )
    if not _is_healthy(state, signer):
        raise MachineError("InvalidHealthCheck", f"{signer[:4].hex()} is not a healthy client of this epoch")
    dropped = [listed for listed in dict.fromkeys(request.signers) if _is_healthy(state, listed)]
    for listed in dropped:
        if not all(before is not None and _missed(state, before, listed) for before in past):
            raise MachineError(
                "InvalidHealthCheck",
                f"{listed[:4].hex()} is healthy as far as the {MISSED_ROUNDS} rounds before height {height} show",
            )
    if not dropped:
        return state, 0
    return _change(state, clients=_with_status(state, ClientStatus.DROPPED, dropped)), len(dropped)


def _missed(state: RunState, round_: Round, signer: bytes) -> bool:
    """Whether a quorum of a training round's witnesses reports that this client delivered nothing."""
    item = sha256(signer)
    silent = sum(item not in Bloom.from_bytes(record.participants) for record in round_.witnesses)
    return round_.step > 0 and signer in round_.clients and silent >= state.needed


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


def restart_from(state: RunState, checkpoint: Checkpoint, now: float) -> RunState:
    """Go on from other parameters than the newest, because those are lost or not wanted; later steps are undone.

    Raises:
        MachineError: an epoch is under way, or the run is over (``InvalidRunState``); the digest or the step cannot be
            those of parameters of this run (``InvalidCheckpoint``).
    """
    if state.phase not in (Phase.WAITING_FOR_MEMBERS, Phase.WARMUP, Phase.PAUSED):
        raise MachineError(
            "InvalidRunState",
            f"the run is in {state.phase.name}; pause it first, then choose the parameters from which it goes on",
        )
    if len(checkpoint.digest) != HASH_SIZE or not 0 <= checkpoint.step < state.step:
        raise MachineError(
            "InvalidCheckpoint",
            f"a checkpoint has a digest of {HASH_SIZE} bytes and at most {counted(state.step - 1, 'step')}, not "
            f"{counted(len(checkpoint.digest), 'byte')} and {counted(checkpoint.step, 'step')}",
        )
    state = replace(
        state, checkpoint=checkpoint, step=checkpoint.step + 1, rounds=(), head=0, holders=(), warmup_witnesses=()
    )
    if state.phase is Phase.PAUSED:
        return _change(state)
    return _enter(state, Phase.WAITING_FOR_MEMBERS, now)


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
    return any(client.signer == signer for client in state.healthy)

"""The coordinator's state machine: the timeline, every correction of it, and every refusal."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import pytest

from psyche_lightning.coordinator import machine
from psyche_lightning.coordinator.machine import MachineError
from psyche_lightning.protocol.bloom import participants_bloom
from psyche_lightning.protocol.committee import round_selection
from psyche_lightning.protocol.requests import HealthCheck, Vote, WarmupWitness, Witness
from psyche_lightning.protocol.state import (
    Checkpoint,
    Client,
    ClientStatus,
    CoordinatorConfig,
    Phase,
    RunState,
    WitnessProof,
)
from psyche_lightning.wire.canonical import sha256

BLOOM = bytes(192)
ROOT = sha256(b"root")
CONFIG = CoordinatorConfig(
    warmup_time=10.0,
    cooldown_time=10.0,
    max_round_train_time=10.0,
    round_witness_time=10.0,
    epoch_time=1000.0,
    global_batch_size_start=6,
    global_batch_size_end=6,
    total_steps=100,
    init_min_clients=3,
    min_clients=2,
    waiting_for_members_extra_time=5.0,
)


def key(i: int) -> bytes:
    return bytes([i + 1]) * 32


def digest(name: str) -> bytes:
    return sha256(name.encode())


def members(count: int) -> list[Client]:
    return [Client(key(i), key(i), f"host:{i}") for i in range(count)]


def advance(state: RunState, now: float, pending: list[Client] | None = None) -> RunState:
    """Tick until nothing changes, as a host does."""
    while not state.phase.halted:
        again = machine.tick(state, pending, now, seed=state.nonce)
        if again is state:
            break
        state = again
    return state


def waiting(now: float = 0.0, **config: Any) -> RunState:
    return machine.start(RunState("run", config=replace(CONFIG, **config)), now)


def warming(count: int = 3, **config: Any) -> RunState:
    state = advance(waiting(**config), 0.0, members(count))
    state = advance(state, 5.0, members(count))
    assert state.phase is Phase.WARMUP
    return state


def training(count: int = 3, **config: Any) -> RunState:
    state = warming(count, **config)
    for i in range(count):
        state = machine.warmup_witness(state, key(i), WarmupWitness(state.epoch, i, digest("start")))
    state = advance(state, 5.0)
    assert state.phase is Phase.ROUND_TRAIN
    return state


def report(state: RunState, i: int, heard: Iterable[int] | None = None, **changes: Any) -> RunState:
    round_ = state.current
    assert round_ is not None
    index = round_.clients.index(key(i))
    proof = round_selection(round_, state.config).witness_proof(index)
    bloom = BLOOM if heard is None else participants_bloom(round_.seed, [key(j) for j in heard])
    fields = {
        "epoch": state.epoch,
        "height": round_.height,
        "proof": proof,
        "merkle": ROOT,
        "participants": bloom,
        "broadcasts": BLOOM,
    }
    signer = changes.pop("signer", key(i))
    return machine.witness(state, signer, Witness(**{**fields, **changes}))


def play(state: RunState, now: float, who: Iterable[int] = range(3)) -> RunState:
    """One round in which ``who`` report at once."""
    for i in who:
        state = report(state, i)
    return advance(state, now)


def refused(code: str, call: Callable[[], object]) -> None:
    with pytest.raises(MachineError) as caught:
        call()
    assert caught.value.code == code


def cooling(count: int = 3, **config: Any) -> RunState:
    """An epoch of one step, drained."""
    state = training(count, total_steps=1, **config)
    for _ in range(3):
        state = play(state, 6.0, range(count))
    assert state.phase is Phase.COOLDOWN
    return state


# Gathering members.


def test_a_run_opens_once() -> None:
    assert waiting().phase is Phase.WAITING_FOR_MEMBERS
    refused("InvalidRunState", lambda: machine.start(waiting(), 0.0))


def test_halted_runs_do_not_tick() -> None:
    for phase in (Phase.UNINITIALIZED, Phase.PAUSED, Phase.FINISHED):
        refused("Halted", lambda phase=phase: machine.tick(RunState("run", phase=phase), [], 0.0, 0))


def test_extra_time_counts_from_enough_members() -> None:
    state = waiting()
    assert machine.tick(state, None, 100.0, 0) is state
    assert machine.tick(state, members(2), 100.0, 0) is state
    assert machine.deadline(state) is None
    state = machine.tick(state, members(3), 100.0, 0)
    assert (state.phase, machine.deadline(state)) == (Phase.WAITING_FOR_MEMBERS, 105.0)
    assert machine.tick(state, members(4), 104.9, 0) is state
    formed = machine.tick(state, members(4), 105.0, 0)
    assert formed.phase is Phase.WARMUP
    assert formed.clients == tuple(members(4))
    assert (formed.epoch_start, formed.phase_start) == (105.0, 105.0)
    # One leaves: the count starts again.
    fewer = machine.tick(state, members(2), 104.0, 0)
    assert machine.deadline(fewer) is None
    assert machine.deadline(machine.tick(fewer, members(3), 110.0, 0)) == 115.0


def test_a_run_of_one_never_waits_for_the_clock() -> None:
    state = advance(waiting(init_min_clients=1, min_clients=1, total_steps=2), 0.0, members(1))
    assert state.phase is Phase.WARMUP
    state = advance(machine.warmup_witness(state, key(0), WarmupWitness(0, 0, digest("start"))), 0.0)
    for _ in range(4):
        state = play(state, 0.0, [0])
    assert (state.phase, state.step) == (Phase.COOLDOWN, 3)
    state = advance(machine.vote(state, key(0), Vote(0, 2, digest("end"))), 0.0, members(1))
    assert (state.phase, state.checkpoint) == (Phase.FINISHED, Checkpoint(digest("end"), 2))


def test_two_members_of_a_run_for_one_wait_the_extra_time() -> None:
    state = advance(waiting(init_min_clients=1, min_clients=1), 0.0, members(2))
    assert (state.phase, machine.deadline(state)) == (Phase.WAITING_FOR_MEMBERS, 5.0)


# Warm-up.


def test_the_first_round_begins_when_every_client_has_reported() -> None:
    state = warming()
    for i in range(3):
        assert advance(state, 6.0).phase is Phase.WARMUP
        state = machine.warmup_witness(state, key(i), WarmupWitness(0, i, digest(f"start{i}")))
    state = advance(state, 6.0)
    round_ = state.current
    assert state.phase is Phase.ROUND_TRAIN
    assert state.epoch_digest == digest("start0")
    assert round_ is not None
    assert (round_.height, round_.step, round_.data_index, round_.batch_size) == (0, 1, 0, 6)
    assert round_.clients == (key(0), key(1), key(2))


def test_warm_up_ends_on_time_with_the_first_record() -> None:
    state = machine.warmup_witness(warming(), key(1), WarmupWitness(0, 1, digest("mine")))
    assert advance(state, 14.9).phase is Phase.WARMUP
    state = advance(state, 15.0)
    assert (state.phase, state.epoch_digest) == (Phase.ROUND_TRAIN, digest("mine"))


def test_warm_up_without_any_record_ends_the_epoch() -> None:
    state = advance(warming(), 15.0)
    assert (state.phase, state.epoch, state.epoch_digest) == (Phase.WAITING_FOR_MEMBERS, 0, b"")


def test_warm_up_with_too_few_clients_ends_the_epoch() -> None:
    state = warming()
    state = machine.withdraw(state, key(0))
    state = machine.withdraw(state, key(2), ClientStatus.DROPPED)
    state = advance(state, 6.0)
    assert state.phase is Phase.WAITING_FOR_MEMBERS
    assert [(c.signer, c.status) for c in state.exited_clients] == [
        (key(0), ClientStatus.WITHDRAWN),
        (key(2), ClientStatus.DROPPED),
    ]


def test_records_follow_their_clients_when_one_leaves_in_warm_up() -> None:
    state = warming(4)
    for i in (3, 0, 1):
        state = machine.warmup_witness(state, key(i), WarmupWitness(0, i, digest(f"start{i}")))
    state = advance(machine.withdraw(state, key(0)), 6.0)
    assert [(r.proof.index, r.merkle) for r in state.warmup_witnesses] == [(2, digest("start3")), (0, digest("start1"))]
    refused("DuplicateWitness", lambda: machine.warmup_witness(state, key(1), WarmupWitness(0, 0, digest("start1"))))
    state = advance(machine.warmup_witness(state, key(2), WarmupWitness(0, 1, digest("start2"))), 6.0)
    assert (state.phase, state.epoch_digest) == (Phase.ROUND_TRAIN, digest("start3"))


def test_warm_up_refuses_who_is_not_the_client_at_its_index() -> None:
    state = warming()
    for signer, index in ((key(0), 1), (key(0), 3), (key(0), -1), (key(9), 0)):
        refused("InvalidWitness", lambda s=signer, i=index: machine.warmup_witness(state, s, WarmupWitness(0, i, ROOT)))
    refused("InvalidWitness", lambda: machine.warmup_witness(state, key(0), WarmupWitness(1, 0, ROOT)))
    refused("InvalidWitness", lambda: machine.warmup_witness(state, key(0), WarmupWitness(0, 0, b"short")))
    refused(
        "InvalidWitness",
        lambda: machine.warmup_witness(machine.withdraw(state, key(0)), key(0), WarmupWitness(0, 0, ROOT)),
    )
    once = machine.warmup_witness(state, key(0), WarmupWitness(0, 0, ROOT))
    refused("DuplicateWitness", lambda: machine.warmup_witness(once, key(0), WarmupWitness(0, 0, ROOT)))


def test_warm_up_records_outside_warm_up() -> None:
    refused("InvalidRunState", lambda: machine.warmup_witness(waiting(), key(0), WarmupWitness(0, 0, ROOT)))
    refused("Halted", lambda: machine.warmup_witness(RunState("run"), key(0), WarmupWitness(0, 0, ROOT)))
    state = training()
    assert machine.warmup_witness(state, key(0), WarmupWitness(0, 0, ROOT)) is state


def test_warm_up_takes_the_agreed_parameters_only() -> None:
    state = replace(warming(), checkpoint=Checkpoint(digest("agreed"), 7))
    refused("InvalidWitness", lambda: machine.warmup_witness(state, key(0), WarmupWitness(0, 0, digest("other"))))
    state = machine.warmup_witness(state, key(1), WarmupWitness(0, 1, digest("agreed")))
    assert advance(state, 15.0).epoch_digest == digest("agreed")


# Rounds.


def test_a_quorum_of_complete_reports_ends_the_round_at_once() -> None:
    state = report(training(), 2)
    assert advance(state, 6.0) is state
    state = advance(report(state, 0), 6.0)
    assert state.current is not None
    assert (state.phase, state.current.height, state.step) == (Phase.ROUND_TRAIN, 1, 2)
    assert [r.complete for r in state.rounds[0].witnesses] == [True, True]
    refused("InvalidWitness", lambda: report(state, 1, height=0))


def test_reports_after_training_are_not_complete_and_all_of_them_are_needed() -> None:
    state = advance(report(training(4), 0), 15.0)
    assert state.phase is Phase.ROUND_WITNESS
    for i in (1, 2):
        state = advance(report(state, i), 16.0)
        assert state.phase is Phase.ROUND_WITNESS
    state = advance(report(state, 3), 16.0)
    assert (state.phase, state.step) == (Phase.ROUND_TRAIN, 2)
    assert [r.complete for r in state.rounds[0].witnesses] == [True, False, False, False]


def test_witness_phase_ends_on_time() -> None:
    state = advance(training(), 15.0)
    state = report(report(state, 0), 1)
    assert advance(state, 24.9).phase is Phase.ROUND_WITNESS
    state = advance(state, 25.0)
    assert (state.phase, state.step, state.draining) == (Phase.ROUND_TRAIN, 2, False)


def test_nobody_waits_for_a_witness_that_is_gone() -> None:
    state = report(training(), 0)
    state = machine.withdraw(state, key(1), ClientStatus.DROPPED)
    assert advance(state, 6.0) is state
    state = advance(machine.withdraw(state, key(2)), 6.0)
    # One of three witnesses reported: no quorum, so the epoch drains.
    assert (state.phase, state.step, state.last_step) == (Phase.ROUND_TRAIN, 2, 2)
    assert [c.exited_height for c in state.exited_clients] == [0, 0]


def test_nobody_waits_for_clients_without_a_seat() -> None:
    state = training(witness_nodes=2)
    round_ = state.current
    assert round_ is not None
    first, second = round_selection(round_, state.config).witnesses()
    state = advance(machine.withdraw(report(state, first), key(second)), 6.0)
    assert (state.phase, state.draining) == (Phase.ROUND_TRAIN, True)


def test_a_witness_must_hold_its_seat_in_the_current_round() -> None:
    state = training(5, witness_nodes=2)
    round_ = state.current
    assert round_ is not None
    selection = round_selection(round_, state.config)
    seated, other = selection.witnesses(), [i for i in range(5) if not selection.is_witness(i)]
    refused("InvalidWitness", lambda: report(state, other[0]))
    proof = selection.witness_proof(seated[0])
    refused("InvalidWitness", lambda: report(state, seated[0], signer=key(seated[1])))
    refused("InvalidWitness", lambda: report(state, seated[0], signer=key(9)))
    for wrong in (
        replace(proof, witness=False),
        replace(proof, position=1 - proof.position),
        WitnessProof(proof.position, other[0]),
        WitnessProof(proof.position, 5),
    ):
        refused("InvalidWitness", lambda wrong=wrong: report(state, seated[0], proof=wrong))
    for field, value in (
        ("epoch", 1),
        ("height", 1),
        ("merkle", b"x"),
        ("participants", bytes(191)),
        ("broadcasts", b""),
    ):
        refused("InvalidWitness", lambda f=field, v=value: report(state, seated[0], **{f: v}))
    refused("InvalidWitness", lambda: report(machine.withdraw(state, key(seated[0])), seated[0]))
    refused("DuplicateWitness", lambda: report(report(state, seated[0]), seated[0], merkle=digest("other")))


def test_witnesses_outside_rounds() -> None:
    signer, witness = key(0), Witness(0, 0, WitnessProof(0, 0), ROOT, BLOOM, BLOOM)
    refused("InvalidRunState", lambda: machine.witness(warming(), signer, witness))
    refused("InvalidRunState", lambda: machine.witness(cooling(), signer, witness))
    refused("Halted", lambda: machine.witness(RunState("run"), signer, witness))


# The ends of an epoch.


def test_timeline_of_an_epoch_that_times_out() -> None:
    """The epoch is over at 40, two rounds drain, and no step is lost."""
    state = advance(waiting(epoch_time=30.0, waiting_for_members_extra_time=10.0), 0.0, members(3))
    trace = []
    for now in (10.0, 20.0, 30.0, 40.0, 50.0, 60.0):
        state = advance(state, now, members(3))
        if state.phase is Phase.WARMUP:
            state = machine.warmup_witness(state, key(0), WarmupWitness(0, 0, ROOT))
        if state.phase is Phase.ROUND_WITNESS:
            state = play(state, now)
        height = state.current.height if state.current else None
        trace.append((now, state.phase, height, state.step, state.last_step))
    train = Phase.ROUND_TRAIN
    assert trace == [
        (10.0, Phase.WARMUP, None, 1, 0),
        (20.0, train, 0, 1, 0),
        (30.0, train, 1, 2, 0),
        (40.0, train, 2, 3, 3),
        (50.0, train, 3, 3, 3),
        (60.0, Phase.COOLDOWN, 3, 3, 3),
    ]
    assert [(r.step, r.data_index, r.batch_size) for r in state.rounds] == [
        (1, 0, 6),
        (2, 6, 6),
        (0, 12, 0),
        (0, 12, 0),
    ]
    for i in range(2):
        state = machine.vote(state, key(i), Vote(0, 2, ROOT))
    state = advance(state, 70.0)
    assert (state.phase, state.epoch, state.epoch_start_data_index) == (Phase.WAITING_FOR_MEMBERS, 1, 12)
    assert (state.step, state.checkpoint) == (3, Checkpoint(ROOT, 2))


def test_an_epoch_whose_end_is_not_agreed_is_trained_again() -> None:
    state = training()
    began = state.checkpoint
    assert began == Checkpoint(digest("start"), 0)  # what a fresh run began with is agreed
    while state.phase is not Phase.COOLDOWN:
        state = play(machine.pause(state, 6.0), 6.0)
    assert state.step == 2
    for i in range(3):
        state = machine.vote(state, key(i), Vote(0, 1, bytes([i]) * 32))
    state = machine.resume(advance(state, 7.0), 8.0)
    assert (state.epoch, state.step, state.epoch_start_data_index, state.checkpoint) == (1, 1, 0, began)


def test_total_steps_are_trained_exactly() -> None:
    state = training(total_steps=5)
    trained = []
    while state.phase is Phase.ROUND_TRAIN:
        assert state.current is not None
        trained.append(state.current.step)
        state = play(state, 6.0)
    assert trained == [1, 2, 3, 4, 5, 0, 0]
    assert (state.phase, state.step, state.last_step) == (Phase.COOLDOWN, 6, 6)
    for i in range(2):
        state = machine.vote(state, key(i), Vote(0, 5, ROOT))
    assert advance(state, 16.0).phase is Phase.FINISHED


def test_no_witness_at_all_withdraws_everyone() -> None:
    state = advance(training(), 15.0)
    state = machine.tick(state, None, 25.0, 0)
    assert (state.phase, state.step, state.last_step) == (Phase.COOLDOWN, 2, 0)
    assert {c.status for c in state.clients} == {ClientStatus.WITHDRAWN}
    # Nobody is there to vote, so nobody is waited for.
    state = advance(state, 25.0)
    assert (state.phase, state.epoch, state.epoch_start_data_index) == (Phase.WAITING_FOR_MEMBERS, 1, 0)
    assert state.step == 1


def test_too_few_reports_end_the_epoch() -> None:
    state = play(advance(training(), 15.0), 25.0, [1])
    assert (state.phase, state.draining) == (Phase.ROUND_TRAIN, True)


def test_too_few_clients_end_the_epoch() -> None:
    state = training(min_clients=3)
    state = play(machine.withdraw(state, key(2)), 6.0, [0, 1])
    assert state.current is not None
    assert (state.draining, state.current.clients, state.current.step) == (True, (key(0), key(1)), 0)


def test_drain_rounds_go_on_without_witnesses() -> None:
    state = play(training(total_steps=1), 6.0)
    for now in (16.0, 26.0, 36.0):
        state = advance(state, now)
        assert state.phase in (Phase.ROUND_TRAIN, Phase.ROUND_WITNESS)
    state = advance(state, 46.0)
    assert (state.phase, len(state.clients)) == (Phase.COOLDOWN, 3)


def test_everybody_leaving_while_draining_ends_it_at_once() -> None:
    state = play(training(total_steps=1), 6.0)
    for i in range(3):
        state = machine.withdraw(state, key(i))
    state = advance(state, 6.0)  # without agreed parameters: what was trained is trained again
    assert (state.phase, state.step) == (Phase.WAITING_FOR_MEMBERS, 1)


def test_batch_ramp_and_data_index() -> None:
    sizes = {"global_batch_size_start": 12288, "global_batch_size_end": 32768}
    config = replace(CONFIG, **sizes, global_batch_size_warmup_tokens=549755813888)
    tokens = 549755813888
    ramp = [machine.batch_size(config, t) for t in (0, tokens // 4, tokens // 2, tokens - 1, tokens)]
    assert ramp == [12288, 17408, 22528, 32768, 32768]
    assert machine.batch_size(replace(config, global_batch_size_warmup_tokens=0), 0) == 32768
    # Halves are rounded away from zero: 1 + 1 * 1/2.
    assert machine.batch_size(replace(config, global_batch_size_start=1, global_batch_size_end=2,
                                      global_batch_size_warmup_tokens=2), 1) == 2  # fmt: skip
    # Exact where floats are not: one token before the half, of 2^64 - 2.
    long = replace(
        config, global_batch_size_start=1, global_batch_size_end=2, global_batch_size_warmup_tokens=2**64 - 2
    )
    assert [machine.batch_size(long, 2**63 - 1 - i) for i in (0, 1)] == [2, 1]
    state = training(global_batch_size_start=2, global_batch_size_end=6, global_batch_size_warmup_tokens=200)
    state = replace(state, max_seq_len=10)
    for _ in range(3):
        state = play(state, 6.0)
    assert [(r.data_index, r.batch_size) for r in state.rounds] == [(0, 2), (2, 2), (4, 3), (7, 3)]


def test_the_ring_keeps_four_rounds() -> None:
    state = training()
    for _ in range(6):
        state = play(state, 6.0)
    assert state.current is not None
    assert (state.current.height, state.head) == (6, 2)
    assert [r.height for r in state.rounds] == [4, 5, 6, 3]
    assert state.round_at(2) is None


# Cool-down.


def test_a_quorum_of_equal_votes_ends_cool_down() -> None:
    state = machine.vote(cooling(), key(0), Vote(0, 1, digest("end")))
    assert advance(state, 7.0) is state
    assert machine.vote(state, key(0), Vote(0, 1, digest("end"))) is state
    state = advance(machine.vote(state, key(2), Vote(0, 1, digest("end"))), 7.0)
    assert (state.phase, state.epoch, state.checkpoint) == (Phase.FINISHED, 1, Checkpoint(digest("end"), 1))


def test_cool_down_without_quorum() -> None:
    def votes(state: RunState, names: str) -> RunState:
        for i, name in enumerate(names):
            state = machine.vote(state, key(i), Vote(0, 1, digest(name)))
        return state

    held = Checkpoint(digest("held"), 0)
    state = votes(replace(cooling(4), checkpoint=held), "ab")
    assert advance(state, 15.9).phase is Phase.COOLDOWN
    assert advance(state, 16.0).checkpoint == held
    # When all have voted there is nothing to wait for.
    split = advance(votes(cooling(4), "abcb"), 7.0)
    assert (split.phase, split.step, split.checkpoint) == (Phase.WAITING_FOR_MEMBERS, 1, Checkpoint(digest("start"), 0))


def test_votes_of_those_who_left_do_not_make_a_quorum() -> None:
    state = replace(cooling(), checkpoint=Checkpoint(digest("held"), 0))
    state = machine.withdraw(machine.vote(state, key(0), Vote(0, 1, digest("end"))), key(0))
    state = machine.vote(state, key(1), Vote(0, 1, digest("end")))
    assert advance(state, 7.0) is state
    state = advance(machine.vote(state, key(2), Vote(0, 1, digest("end"))), 7.0)
    assert state.checkpoint.digest == digest("end")


def test_checkpoint_refusals() -> None:
    state = cooling()
    refused("InvalidRunState", lambda: machine.vote(training(), key(0), Vote(0, 0, ROOT)))
    refused("Halted", lambda: machine.vote(RunState("run"), key(0), Vote(0, 0, ROOT)))
    for arguments in ((key(9), 0, 1, ROOT), (key(0), 1, 1, ROOT), (key(0), 0, 2, ROOT), (key(0), 0, 1, b"x")):
        refused("InvalidCheckpoint", lambda a=arguments: machine.vote(state, a[0], Vote(*a[1:])))
    refused("InvalidCheckpoint", lambda: machine.vote(machine.withdraw(state, key(0)), key(0), Vote(0, 1, ROOT)))
    once = machine.vote(state, key(0), Vote(0, 1, ROOT))
    refused("InvalidCheckpoint", lambda: machine.vote(once, key(0), Vote(0, 1, digest("other"))))


# Who holds the parameters.


def next_epoch(pending: list[Client]) -> RunState:
    """An epoch after one of clients 0 to 2 that agreed on parameters; client 2 left within it."""
    state = training(epoch_time=11.0)
    state = play(machine.withdraw(state, key(2)), 20.0, [0, 1])
    state = advance(report(report(state, 0), 1), 20.0)
    state = advance(report(report(state, 0), 1), 20.0)
    for i in (0, 1):
        state = machine.vote(state, key(i), Vote(0, 1, digest("end")))
    state = advance(state, 20.0)
    assert (state.phase, state.checkpoint.digest) == (Phase.WAITING_FOR_MEMBERS, digest("end"))
    state = advance(advance(state, 20.0, pending), 25.0, pending)
    assert (state.phase, state.epoch) == (Phase.WARMUP, 1)
    return state


def test_checkpoint_stays_while_somebody_of_the_last_epoch_joins() -> None:
    for holder in (0, 2):
        pending = [*members(6)[3:], members(3)[holder]]
        assert next_epoch(pending).checkpoint.digest == digest("end")


def test_checkpoint_degrades_when_only_strangers_join() -> None:
    state = next_epoch(members(6)[3:])
    assert state.checkpoint == Checkpoint()
    state = machine.warmup_witness(state, key(4), WarmupWitness(1, 1, digest("anything")))
    assert advance(state, 35.0).epoch_digest == digest("anything")


def test_checkpoint_degrades_when_those_of_the_last_epoch_do_not_hold_it() -> None:
    pending = [*members(6)[3:], members(3)[2]]
    state = advance(next_epoch(pending), 35.0)
    assert (state.phase, state.checkpoint.digest) == (Phase.WAITING_FOR_MEMBERS, digest("end"))
    # Client 2 had a whole warm-up to report and did not; the others may still come back.
    assert advance(advance(state, 35.0, members(3)), 40.0, members(3)).checkpoint.digest == digest("end")
    assert advance(advance(state, 35.0, pending), 40.0, pending).checkpoint == Checkpoint()


def test_a_newcomer_that_fetched_the_parameters_keeps_them() -> None:
    pending = [*members(6)[3:], members(3)[0]]
    state = machine.warmup_witness(next_epoch(pending), key(5), WarmupWitness(1, 2, digest("end")))
    for i in (0, 3, 4):
        state = machine.withdraw(state, key(i))
    state = advance(state, 26.0)
    assert state.phase is Phase.WAITING_FOR_MEMBERS
    pending = [members(9)[i] for i in (5, 7, 8)]
    assert advance(advance(state, 30.0, pending), 35.0, pending).checkpoint.digest == digest("end")


# Health checks, leaving, pausing.


def second_round(*heard: Iterable[int]) -> RunState:
    state = training()
    for i, names in enumerate(heard):
        state = report(state, i, names)
    state = advance(state, 6.0)
    assert state.current is not None
    assert state.current.height == 1
    return state


def test_a_client_that_no_quorum_heard_is_dropped() -> None:
    state = second_round([0, 1], [0, 1, 2])
    dropped, count = machine.health_check(state, key(0), HealthCheck(0, 1, (key(2), key(2))))
    assert count == 1
    assert [c.status for c in dropped.clients] == [ClientStatus.HEALTHY, ClientStatus.HEALTHY, ClientStatus.DROPPED]
    assert machine.health_check(dropped, key(1), HealthCheck(0, 1, (key(2), key(9)))) == (dropped, 0)
    ended = play(dropped, 7.0, [0, 1])
    assert [(c.signer, c.exited_height) for c in ended.exited_clients] == [(key(2), 1)]


def test_health_check_refusals() -> None:
    state = second_round([0, 1, 2], [0, 1, 2])
    for arguments in (
        (key(0), 0, 1, [key(2)]),
        (key(9), 0, 1, []),
        (key(0), 1, 1, []),
        (key(0), 0, 0, []),
        (key(0), 0, 2, []),
    ):
        refused("InvalidHealthCheck", lambda a=arguments: machine.health_check(state, a[0], HealthCheck(*a[1:])))
    mixed = second_round([0], [0])
    refused("InvalidHealthCheck", lambda: machine.health_check(mixed, key(0), HealthCheck(0, 1, (key(2), key(0)))))
    refused("InvalidHealthCheck", lambda: machine.health_check(training(), key(0), HealthCheck(0, 0, ())))
    refused("InvalidHealthCheck", lambda: machine.health_check(training(), key(0), HealthCheck(0, -1, ())))
    refused("InvalidRunState", lambda: machine.health_check(warming(), key(0), HealthCheck(0, 0, ())))
    refused("Halted", lambda: machine.health_check(RunState("run"), key(0), HealthCheck(0, 0, ())))


def test_health_cannot_be_judged_by_rounds_that_show_nothing() -> None:
    newcomer = second_round([0], [0])
    before = replace(newcomer.rounds[0], clients=(key(0), key(1), key(7)))
    absent = replace(newcomer, rounds=(before, newcomer.rounds[1]))
    refused("InvalidHealthCheck", lambda: machine.health_check(absent, key(0), HealthCheck(0, 1, (key(2),))))
    silent = replace(newcomer, rounds=(replace(newcomer.rounds[0], witnesses=()), newcomer.rounds[1]))
    refused("InvalidHealthCheck", lambda: machine.health_check(silent, key(0), HealthCheck(0, 1, (key(2),))))
    drained = replace(newcomer, rounds=(replace(newcomer.rounds[0], step=0), newcomer.rounds[1]))
    refused("InvalidHealthCheck", lambda: machine.health_check(drained, key(0), HealthCheck(0, 1, (key(2),))))


def test_only_healthy_clients_withdraw() -> None:
    state = machine.withdraw(training(), key(1))
    assert state.clients[1].status is ClientStatus.WITHDRAWN
    refused("InvalidWithdraw", lambda: machine.withdraw(state, key(1)))
    refused("InvalidWithdraw", lambda: machine.withdraw(state, key(9)))


def test_a_client_that_came_back_has_its_new_address() -> None:
    state = training()
    moved = machine.move(state, key(1), key(1), "elsewhere:1")
    assert (moved.clients[1].address, moved.nonce) == ("elsewhere:1", state.nonce + 1)
    assert machine.move(moved, key(1), key(1), "elsewhere:1") is moved
    assert machine.move(moved, key(1), key(2), "other") is moved
    assert machine.move(moved, key(9), key(9), "other") is moved


def test_pause_between_epochs_and_in_warm_up_is_immediate() -> None:
    for state in (waiting(), warming()):
        paused = machine.pause(state, 7.0)
        assert (paused.phase, paused.cold_start_epoch, paused.epoch) == (Phase.PAUSED, True, 0)
        assert all(c.status is ClientStatus.WITHDRAWN for c in paused.clients)
        resumed = machine.resume(paused, 8.0)
        assert (resumed.phase, resumed.cold_start_epoch) == (Phase.WAITING_FOR_MEMBERS, True)
        formed = advance(advance(resumed, 8.0, members(3)), 13.0, members(3))
        assert formed.cold_start_epoch


def test_who_left_before_everyone_was_withdrawn_keeps_its_status() -> None:
    paused = machine.pause(machine.withdraw(warming(), key(1), ClientStatus.DROPPED), 7.0)
    assert [c.status for c in paused.clients] == [
        ClientStatus.WITHDRAWN,
        ClientStatus.DROPPED,
        ClientStatus.WITHDRAWN,
    ]


def test_pause_in_an_epoch_drains_it() -> None:
    state = machine.pause(training(), 6.0)
    assert machine.pause(state, 6.0) is state
    for _ in range(3):
        assert state.phase is Phase.ROUND_TRAIN
        state = play(state, 6.0)
    for i in range(3):
        state = machine.vote(state, key(i), Vote(0, 1, digest("end")))
    state = advance(state, 7.0)
    assert (state.phase, state.epoch, state.step, state.pending_pause) == (Phase.PAUSED, 1, 2, False)
    assert state.cold_start_epoch
    # Those who held the parameters before the pause still do.
    state = machine.resume(state, 50.0)
    assert advance(advance(state, 50.0, members(3)), 55.0, members(3)).checkpoint == Checkpoint(digest("end"), 1)


def test_pause_and_resume_refusals() -> None:
    refused("CannotResume", lambda: machine.resume(training(), 0.0))
    refused("Halted", lambda: machine.pause(RunState("run"), 0.0))
    done = replace(machine.pause(waiting(total_steps=5), 0.0), step=6)
    assert machine.resume(done, 1.0).phase is Phase.FINISHED


def test_every_change_counts() -> None:
    state = training()
    again = report(state, 0)
    assert again.nonce == state.nonce + 1
    assert machine.tick(again, None, 6.0, 0) is again
    assert machine.tick(again, None, 15.0, 0).nonce == again.nonce + 1

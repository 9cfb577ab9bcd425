"""The coordinator's state machine: the timeline, every correction of it, and every refusal."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import pytest

from psyche_lightning.coordinator import machine
from psyche_lightning.coordinator.machine import MachineError
from psyche_lightning.protocol.bloom import participants_bloom
from psyche_lightning.protocol.committee import decided_root, round_selection, starting_digest
from psyche_lightning.protocol.merkle import EMPTY_ROOT
from psyche_lightning.protocol.requests import HealthCheck, WarmupWitness, Witness
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
        state = holds(state, i, "start")
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


def play(state: RunState, now: float, who: Iterable[int] = range(3), roots: Iterable[bytes] | None = None) -> RunState:
    """One round in which ``who`` report one after the other until it is over, as at a host."""
    place = state.epoch, state.current
    for i, root in zip(who, roots or itertools.repeat(ROOT), strict=False):
        state = advance(report(state, i, merkle=root), now)
        if state.epoch != place[0] or state.current is None or state.current.height != place[1].height:  # type: ignore[union-attr]
            break
    return state


def refused(code: str, call: Callable[[], object]) -> None:
    with pytest.raises(MachineError) as caught:
        call()
    assert caught.value.code == code


def named(state: RunState, who: Iterable[int], name: str = "end") -> RunState:
    """``who`` report in this round that they hold the parameters before its step."""
    for i in who:
        state = report(state, i, step=state.step - 1, digest=digest(name))
    return state


def draining(count: int = 3, **config: Any) -> RunState:
    """An epoch of one step in its first drain round."""
    state = play(training(count, **{"total_steps": 1, **config}), 6.0, range(count))
    assert (state.phase, state.draining, state.settled) == (Phase.ROUND_TRAIN, True, False)
    return state


def between(name: str | None = "end", *, count: int = 3, gone: int | None = None, **config: Any) -> RunState:
    """A run after an epoch of one step that its time ended; its clients named its last parameters, or did not."""
    state = training(count, epoch_time=10.0, **config)
    if gone is not None:
        state = machine.withdraw(state, key(gone), ClientStatus.DROPPED)
    who = [i for i in range(count) if i != gone]
    state = play(state, 15.0, who)
    assert state.draining
    for _ in range(2):
        if state.phase.active:
            state = advance(named(state, who, name) if name else state, state.phase_start)
            if state.phase.active:
                state = advance(advance(state, state.phase_start + 10.0), state.phase_start + 20.0)
    assert (state.phase, state.epoch, state.step) == (Phase.WAITING_FOR_MEMBERS, 1, 2)
    return state


def formed(state: RunState, pending: list[Client]) -> RunState:
    """The next epoch of these members, in warm-up."""
    now = state.phase_start
    state = advance(advance(state, now, pending), now + 5.0, pending)
    assert state.phase is Phase.WARMUP
    return state


def holds(state: RunState, i: int, name: str) -> RunState:
    """Client ``i`` of the list reports the parameters of that name."""
    return machine.warmup_witness(state, state.clients[i].signer, WarmupWitness(state.epoch, i, digest(name)))


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
    state = advance(holds(state, 0, "start"), 0.0)
    for _ in range(2):
        state = play(state, 0.0, [0])
    state = advance(named(state, [0]), 0.0, members(1))
    assert (state.phase, state.checkpoint) == (Phase.FINISHED, Checkpoint(digest("end"), 2))


def test_two_members_of_a_run_for_one_wait_the_extra_time() -> None:
    state = advance(waiting(init_min_clients=1, min_clients=1), 0.0, members(2))
    assert (state.phase, machine.deadline(state)) == (Phase.WAITING_FOR_MEMBERS, 5.0)


def test_no_epoch_forms_without_a_holder_of_the_parameters() -> None:
    strangers = members(9)[3:]
    state = between()
    assert advance(state, 100.0, strangers) is state
    assert machine.deadline(state) is None
    with_one = advance(state, 100.0, [*strangers, members(3)[1]])
    assert machine.deadline(with_one) == 105.0
    left = advance(with_one, 101.0, strangers)  # the holder leaves: the count starts again
    assert (left.phase, machine.deadline(left)) == (Phase.WAITING_FOR_MEMBERS, None)
    assert advance(with_one, 105.0, [*strangers, members(3)[1]]).phase is Phase.WARMUP


def test_holders_are_all_members_of_the_last_epoch_also_those_that_left() -> None:
    state = between(gone=2)
    assert state.holders == (key(0), key(1), key(2))
    for i in range(3):
        assert formed(state, [members(3)[i], *members(5)[3:]]).phase is Phase.WARMUP


def test_holders_of_earlier_epochs_are_forgotten() -> None:
    state = formed(between(), [members(3)[0], *members(6)[3:]])
    for i in range(3):  # the fourth member never says that it has the parameters, but may have got them in the epoch
        state = holds(state, i, "end")
    state = advance(state, state.phase_start + 10.0)
    state = advance(advance(state, state.phase_start + 10.0), state.phase_start + 20.0)
    assert (state.phase, state.epoch) == (Phase.WAITING_FOR_MEMBERS, 2)
    assert state.holders == (key(0), key(3), key(4), key(5))


def test_who_brings_the_named_parameters_becomes_a_holder() -> None:
    state, strangers = between(), members(9)[3:]
    for wrong in (digest("other"), b"", b"short"):
        refused("InvalidWitness", lambda w=wrong: machine.warmup_witness(state, key(4), WarmupWitness(1, 0, w)))
    refused("InvalidWitness", lambda: machine.warmup_witness(state, key(4), WarmupWitness(0, 0, digest("end"))))
    brought = machine.warmup_witness(state, key(4), WarmupWitness(1, 0, digest("end")))
    assert brought.holders == (*state.holders, key(4))
    assert machine.warmup_witness(brought, key(4), WarmupWitness(1, 0, digest("end"))) is brought
    assert formed(brought, strangers).phase is Phase.WARMUP
    # In a fresh run there is nothing to bring.
    refused("InvalidWitness", lambda: machine.warmup_witness(waiting(), key(0), WarmupWitness(0, 0, ROOT)))
    refused("InvalidWitness", lambda: machine.warmup_witness(waiting(), key(0), WarmupWitness(0, 0, b"")))


def test_until_an_epoch_trains_the_record_of_the_last_one_stays() -> None:
    state = between()
    again = formed(state, members(4))
    kept = ("rounds", "head", "epoch_digest", "start_step", "needed", "checkpoint", "holders", "step", "last_step")
    assert [getattr(again, name) for name in kept] == [getattr(state, name) for name in kept]
    assert (state.last_step, again.last_step, again.draining) == (2, 2, False)
    assert (again.checkpoint_votes, again.warmup_witnesses, again.exited_clients) == ((), (), ())
    for i in range(4):
        again = holds(again, i, "end")
    again = advance(again, 21.0)
    assert (again.phase, again.start_step, again.needed, again.epoch_digest) == (Phase.ROUND_TRAIN, 2, 3, digest("end"))
    assert (again.last_step, again.draining) == (0, False)
    assert [(r.height, r.step, r.data_index) for r in again.rounds] == [(0, 2, 6)]


# Warm-up.


def test_the_first_member_of_a_fresh_run_says_which_parameters_it_begins_with() -> None:
    state = warming()
    refused("InvalidWitness", lambda: holds(state, 1, "mine"))
    first = holds(state, 0, "start")
    assert starting_digest(first) == digest("start")
    assert first.checkpoint == Checkpoint()  # nothing is decided before the epoch begins
    refused("InvalidWitness", lambda: holds(first, 1, "mine"))
    assert holds(first, 1, "start").holders == (key(0), key(1))


def test_the_first_round_begins_when_every_client_has_reported() -> None:
    state = warming()
    for i in range(3):
        assert advance(state, 6.0).phase is Phase.WARMUP
        state = holds(state, i, "start")
    state = advance(state, 6.0)
    round_ = state.current
    assert state.phase is Phase.ROUND_TRAIN
    assert (state.epoch_digest, state.checkpoint) == (digest("start"), Checkpoint(digest("start"), 0))
    assert (state.start_step, state.needed) == (1, 2)
    assert round_ is not None
    assert (round_.height, round_.step, round_.data_index, round_.batch_size) == (0, 1, 0, 6)
    assert round_.clients == (key(0), key(1), key(2))


def test_warm_up_that_is_over_needs_the_reports_of_a_quorum_of_the_members() -> None:
    state = warming(4)
    for i in range(2):
        state = holds(state, i, "start")
    assert advance(state, 14.9) is state
    failed = advance(state, 15.0)
    assert (failed.phase, failed.epoch, failed.checkpoint) == (Phase.WAITING_FOR_MEMBERS, 0, Checkpoint())
    began = advance(holds(state, 2, "start"), 15.0)
    assert (began.phase, began.epoch_digest, len(began.clients)) == (Phase.ROUND_TRAIN, digest("start"), 4)


def test_warm_up_with_fewer_clients_than_a_quorum_of_the_members_ends() -> None:
    state = machine.withdraw(warming(4), key(0))
    assert advance(state, 6.0).phase is Phase.WARMUP
    state = advance(machine.withdraw(state, key(2), ClientStatus.DROPPED), 6.0)  # 2 of 4; min_clients is 2
    assert state.phase is Phase.WAITING_FOR_MEMBERS
    assert [(c.signer, c.status) for c in state.exited_clients] == [
        (key(0), ClientStatus.WITHDRAWN),
        (key(2), ClientStatus.DROPPED),
    ]
    alone = machine.withdraw(warming(3, min_clients=3), key(0))
    assert advance(alone, 6.0).phase is Phase.WAITING_FOR_MEMBERS


def test_who_leaves_in_warm_up_still_counts_for_what_is_needed() -> None:
    state = machine.withdraw(warming(5), key(4))
    state = advance(machine.withdraw(state, key(3)), 6.0)
    for i in range(3):
        state = holds(state, i, "start")
    state = advance(state, 6.0)
    assert (state.phase, state.needed) == (Phase.ROUND_TRAIN, 3)


def test_records_follow_their_clients_when_one_leaves_in_warm_up() -> None:
    state = warming(4)
    for i in (0, 3, 1):
        state = holds(state, i, "start")
    state = advance(machine.withdraw(state, key(0)), 6.0)
    assert [(r.proof.index, r.merkle) for r in state.warmup_witnesses] == [(2, digest("start")), (0, digest("start"))]
    refused("DuplicateWitness", lambda: holds(state, 0, "start"))
    refused("InvalidWitness", lambda: holds(state, 1, "other"))
    state = advance(holds(state, 1, "start"), 6.0)
    assert (state.phase, state.epoch_digest) == (Phase.ROUND_TRAIN, digest("start"))


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
    refused("Halted", lambda: machine.warmup_witness(RunState("run"), key(0), WarmupWitness(0, 0, ROOT)))
    state = training()
    assert machine.warmup_witness(state, key(0), WarmupWitness(0, 0, ROOT)) is state


def test_named_parameters_bind_the_next_epoch() -> None:
    state = formed(between("end"), members(5))
    assert starting_digest(state) == digest("end")
    for i in (0, 4):
        refused("InvalidWitness", lambda i=i: holds(state, i, "other"))
    for i in (4, 3, 2):  # also newcomers, which fetched them
        state = holds(state, i, "end")
    assert advance(state, state.phase_start + 10.0).epoch_digest == digest("end")


def test_unnamed_parameters_are_found_by_a_quorum_of_the_next_members() -> None:
    ended = between(None)
    assert (ended.settled, ended.checkpoint) == (False, Checkpoint(digest("start"), 0))
    state = formed(ended, members(5))
    for i, name in enumerate(["lie", "lie", "true", "true"]):
        state = holds(state, i, name)
    late = state.phase_start + 10.0
    assert advance(state, late).phase is Phase.WAITING_FOR_MEMBERS  # no three of five agree
    split = holds(state, 4, "third")
    assert advance(split, late - 0.1) is split  # all have reported, but somebody may leave yet
    assert advance(split, late).phase is Phase.WAITING_FOR_MEMBERS
    state = advance(holds(state, 4, "true"), late - 0.1)
    assert (state.phase, state.checkpoint) == (Phase.ROUND_TRAIN, Checkpoint(digest("true"), 1))


def test_a_run_that_is_trained_finishes_when_its_last_parameters_are_found() -> None:
    state = formed(between(None, total_steps=1), members(3))
    for i in range(3):
        state = holds(state, i, "end")
    state = advance(state, state.phase_start)
    assert (state.phase, state.step, state.checkpoint) == (Phase.FINISHED, 2, Checkpoint(digest("end"), 1))


# Rounds.


def test_enough_equal_roots_end_the_round_at_once() -> None:
    state = report(training(), 2)
    assert advance(state, 6.0) is state
    state = advance(report(state, 0), 6.0)
    assert state.current is not None
    assert (state.phase, state.current.height, state.step) == (Phase.ROUND_TRAIN, 1, 2)
    assert decided_root(state.rounds[0], state.needed) == ROOT
    refused("InvalidWitness", lambda: report(state, 1, height=0))


def test_reports_of_other_results_do_not_end_the_round() -> None:
    state = training(4)
    for i, name in enumerate("abab"):
        state = report(state, i, merkle=digest(name))
    state = advance(state, 6.0)  # all have reported, and can report again
    assert (state.phase, state.step) == (Phase.ROUND_WITNESS, 1)
    state = advance(report(state, 0, merkle=digest("b")), 7.0)
    assert (state.phase, state.step) == (Phase.ROUND_TRAIN, 2)
    assert [(r.proof.index, r.merkle) for r in state.rounds[0].witnesses] == [
        (i, digest(name)) for i, name in enumerate("bbab")
    ]


def test_a_later_report_takes_the_place_of_the_earlier_one() -> None:
    state = report(report(training(4), 2, merkle=digest("a")), 0)
    again = report(state, 2, heard=[1], merkle=digest("b"), step=0, digest=digest("start"))
    assert [record.proof.index for record in again.rounds[0].witnesses] == [2, 0]
    assert again.rounds[0].witnesses[0].merkle == digest("b")
    assert again.rounds[0].witnesses[0].participants != state.rounds[0].witnesses[0].participants
    refused("DuplicateWitness", lambda: report(again, 0))
    refused("DuplicateWitness", lambda: report(again, 2, heard=[1], merkle=digest("b")))


def test_nothing_is_added_to_a_round_that_is_decided() -> None:
    state = training(4)
    for i in range(3):
        state = report(state, i)
    for i in range(3):
        refused("DuplicateWitness", lambda i=i: report(state, i, merkle=digest("other")))
        refused("DuplicateWitness", lambda i=i: report(state, i, step=0, digest=digest("other")))
    late = report(state, 3)  # for a host that leaves it open
    assert len(late.current.witnesses) == 4
    refused("DuplicateWitness", lambda: report(late, 3, merkle=digest("other")))


def test_what_is_needed_is_counted_once_for_the_epoch() -> None:
    state = training(7)
    assert state.needed == 4
    for i in (4, 5, 6):
        state = machine.withdraw(state, key(i), ClientStatus.DROPPED)
    state = play(state, 6.0, range(4))
    assert (len(state.clients), state.needed) == (4, 4)
    state = play(state, 6.0, range(3))
    assert state.current is not None
    assert (state.step, state.current.height) == (2, 1)  # three of the four that are left decide nothing
    assert advance(report(state, 3), 6.0).step == 3


def test_witness_phase_ends_on_time() -> None:
    state = advance(training(), 15.0)
    assert state.phase is Phase.ROUND_WITNESS
    state = report(report(state, 0), 1, merkle=digest("other"))
    assert advance(state, 24.9).phase is Phase.ROUND_WITNESS
    state = advance(state, 25.0)
    assert (state.phase, state.step, state.draining) == (Phase.ROUND_TRAIN, 2, False)
    assert decided_root(state.rounds[0], state.needed) is None


def test_nobody_waits_for_a_witness_that_is_gone() -> None:
    state = report(report(training(), 0, merkle=digest("a")), 1, merkle=digest("b"))
    assert advance(state, 6.0) is state
    gone = advance(machine.withdraw(state, key(2), ClientStatus.DROPPED), 6.0)
    assert (gone.phase, gone.step) == (Phase.ROUND_WITNESS, 1)


def test_a_round_with_too_few_clients_to_decide_it_ends_at_once() -> None:
    state = report(training(), 0)
    state = machine.withdraw(machine.withdraw(state, key(1), ClientStatus.DROPPED), key(2))
    state = advance(state, 6.0)
    assert (state.phase, state.epoch, state.step) == (Phase.WAITING_FOR_MEMBERS, 1, 2)
    assert [c.exited_height for c in state.exited_clients] == [0, 0]


def test_nobody_waits_for_clients_without_a_seat() -> None:
    state = training(4, witness_nodes=2)
    round_ = state.current
    assert round_ is not None
    first, second = round_selection(round_, state.config).witnesses()
    assert state.needed == 2
    state = report(report(state, first), second)
    assert advance(state, 6.0).step == 2


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
        ("digest", b"x"),
    ):
        refused("InvalidWitness", lambda f=field, v=value: report(state, seated[0], **{f: v}))
    refused("InvalidWitness", lambda: report(machine.withdraw(state, key(seated[0])), seated[0]))


def test_witnesses_outside_rounds() -> None:
    signer, witness = key(0), Witness(0, 0, WitnessProof(0, 0), ROOT, BLOOM, BLOOM)
    refused("InvalidRunState", lambda: machine.witness(warming(), signer, witness))
    refused("InvalidRunState", lambda: machine.witness(between(), signer, witness))
    refused("Halted", lambda: machine.witness(RunState("run"), signer, witness))


# Naming parameters.


def test_enough_witnesses_of_one_round_name_parameters() -> None:
    state = play(play(training(4), 6.0, range(4)), 6.0, range(4))
    start = state.checkpoint
    assert (start, state.step) == (Checkpoint(digest("start"), 0), 3)
    name = {"step": 2, "digest": digest("two")}
    state = report(report(state, 0, **name), 1, **name)
    assert state.checkpoint == start
    assert report(state, 2, step=2, digest=digest("lie")).checkpoint == start
    assert report(state, 2, step=1, digest=digest("two")).checkpoint == start
    state = report(state, 2, **name)
    assert state.checkpoint == Checkpoint(digest("two"), 2)


def test_parameters_named_in_different_rounds_do_not_add_up() -> None:
    state = play(training(), 6.0)
    state = report(state, 0, step=1, digest=digest("one"))
    assert state.checkpoint_votes == ((key(0), 1, digest("one")),)
    state = play(state, 6.0, [1, 2])
    assert state.checkpoint_votes == ()
    assert report(state, 1, step=1, digest=digest("one")).checkpoint.step == 0


def test_a_later_report_replaces_what_its_witness_named() -> None:
    state = report(training(4), 0, step=0, digest=digest("a"))
    state = report(state, 1, step=0, digest=digest("b"))
    state = report(state, 0, merkle=digest("other"), step=0, digest=digest("c"))
    assert [vote[::2] for vote in state.checkpoint_votes] == [(key(0), digest("c")), (key(1), digest("b"))]
    state = report(state, 0)  # without a digest the vote stays
    assert state.checkpoint_votes[0] == (key(0), 0, digest("c"))


def test_older_parameters_do_not_replace_newer_ones() -> None:
    state = play(play(training(), 6.0), 6.0)
    for i in range(2):
        state = report(state, i, merkle=digest(str(i)), step=2, digest=digest("two"))
    for i in range(2):
        state = report(state, i, merkle=digest(str(i)), step=1, digest=digest("one"))
    assert state.checkpoint == Checkpoint(digest("two"), 2)
    for i in range(2):
        state = report(state, i, merkle=digest(str(i)), step=2, digest=digest("other two"))
    assert state.checkpoint == Checkpoint(digest("two"), 2)


def test_nobody_names_parameters_that_do_not_exist_yet() -> None:
    state = play(training(), 6.0)
    for step in (2, 3, -1):
        refused("InvalidWitness", lambda s=step: report(state, 0, step=s, digest=digest("x")))
    assert report(state, 0, step=1, digest=digest("x")).checkpoint_votes
    assert report(state, 0, step=99).checkpoint_votes == ()  # without a digest the step means nothing


# The ends of an epoch.


def test_timeline_of_an_epoch_that_times_out() -> None:
    """The epoch is over at 30, two rounds drain, and no step is lost."""
    state = advance(waiting(epoch_time=20.0, waiting_for_members_extra_time=10.0), 0.0, members(3))
    trace = []
    for now, reports in (
        (10.0, "warm-up"),
        (20.0, "round"),  # 0
        (30.0, "round"),  # 1
        (40.0, "round"),  # 2, drains
        (50.0, "none"),  # 3, drains
        (55.0, "round"),  # decided, but nobody names the parameters
        (60.0, "none"),
        (70.0, "none"),
    ):
        state = advance(state, now, members(3))
        if reports == "warm-up":
            for i in range(3):
                state = holds(state, i, "start")
        elif reports == "round":
            state = play(state, now)
        state = advance(state, now, members(3))
        trace.append((now, state.phase, state.current.height if state.current else None, state.step, state.last_step))
    train = Phase.ROUND_TRAIN
    assert trace == [
        (10.0, train, 0, 1, 0),
        (20.0, train, 1, 2, 0),
        (30.0, train, 2, 3, 3),
        (40.0, train, 3, 3, 3),
        (50.0, Phase.ROUND_WITNESS, 3, 3, 3),
        (55.0, Phase.ROUND_WITNESS, 3, 3, 3),
        (60.0, Phase.WAITING_FOR_MEMBERS, 3, 3, 3),
        (70.0, Phase.WARMUP, 3, 3, 3),
    ]
    assert [(r.step, r.data_index, r.batch_size) for r in state.rounds] == [
        (1, 0, 6),
        (2, 6, 6),
        (0, 12, 0),
        (0, 12, 0),
    ]
    assert (state.epoch, state.epoch_start_data_index, state.checkpoint) == (1, 12, Checkpoint(digest("start"), 0))


def test_a_drain_round_lasts_as_long_as_the_cool_down() -> None:
    state = draining(cooldown_time=3.0)
    assert machine.deadline(state) == 9.0
    assert machine.deadline(training(cooldown_time=3.0)) == 15.0


def test_an_epoch_ends_as_soon_as_its_last_parameters_are_named() -> None:
    state = named(draining(), [0])
    assert advance(state, 7.0) is state
    state = advance(named(state, [2]), 7.0)
    assert (state.phase, state.epoch, state.checkpoint) == (Phase.FINISHED, 1, Checkpoint(digest("end"), 1))
    assert [r.step for r in state.rounds] == [1, 0]


def test_the_last_drain_round_waits_for_the_parameters() -> None:
    state = play(draining(), 7.0)
    assert state.current is not None
    assert (state.current.height, state.current.step) == (2, 0)
    state = report(report(report(state, 0), 1), 2)
    assert decided_root(state.rounds[2], state.needed) == ROOT
    state = advance(state, 8.0)
    assert state.phase is Phase.ROUND_WITNESS
    assert advance(state, 17.9) is state
    over = advance(state, 18.0)
    assert (over.phase, over.epoch, over.settled) == (Phase.WAITING_FOR_MEMBERS, 1, False)  # trained, but not found
    state = advance(named(state, [0, 1]), 9.0)
    assert (state.phase, state.settled) == (Phase.FINISHED, True)


def test_what_a_drain_round_decided_stays_while_its_witnesses_name_parameters() -> None:
    state = report(report(play(draining(), 7.0), 0), 1)
    for i in range(2):
        state = report(state, i, merkle=digest("other"), step=1, digest=digest(f"mine {i}"))
    assert decided_root(state.rounds[2], state.needed) == ROOT
    assert len(state.checkpoint_votes) == 2
    state = report(state, 2, merkle=digest("other"))
    assert [record.merkle for record in state.rounds[2].witnesses] == [ROOT, ROOT, digest("other")]
    refused("DuplicateWitness", lambda: report(state, 0, merkle=digest("third"), step=1, digest=digest("mine 0")))


def test_total_steps_are_trained_exactly() -> None:
    state = training(total_steps=5)
    trained = []
    while state.phase is Phase.ROUND_TRAIN:
        assert state.current is not None
        trained.append(state.current.step)
        state = advance(named(state, range(3)), 6.0) if state.draining else play(state, 6.0)
    assert trained == [1, 2, 3, 4, 5, 0]
    assert (state.phase, state.step, state.last_step) == (Phase.FINISHED, 6, 6)


def test_no_report_at_all_ends_the_epoch_at_once_and_undoes_nothing() -> None:
    state = advance(play(training(), 6.0), 16.0)
    state = advance(state, 26.0)
    assert (state.phase, state.epoch, state.step, state.last_step) == (Phase.WAITING_FOR_MEMBERS, 1, 3, 0)
    assert state.epoch_start_data_index == 12
    assert decided_root(state.rounds[0], state.needed) == ROOT  # what was decided stays
    assert state.checkpoint == Checkpoint(digest("start"), 0)
    assert {c.status for c in state.clients} == {ClientStatus.HEALTHY}


def test_fewer_reports_than_needed_end_the_epoch_at_once() -> None:
    state = play(advance(training(), 15.0), 25.0, [1])
    assert (state.phase, state.epoch, state.step) == (Phase.WAITING_FOR_MEMBERS, 1, 2)
    # Also while it drains.
    state = advance(advance(report(draining(), 0), 16.0), 26.0)
    assert (state.phase, state.epoch, state.settled) == (Phase.WAITING_FOR_MEMBERS, 1, False)


def test_too_few_clients_end_the_epoch_after_what_they_decided() -> None:
    state = play(machine.withdraw(training(min_clients=3), key(2)), 6.0, [0, 1])
    assert (state.phase, state.epoch, state.step) == (Phase.WAITING_FOR_MEMBERS, 1, 2)
    assert state.holders == (key(0), key(1), key(2))
    # A quorum of the members must stay, whatever min_clients is.
    state = training(5)
    for i in (2, 3, 4):
        state = machine.withdraw(state, key(i))
    assert advance(state, 6.0).phase is Phase.WAITING_FOR_MEMBERS


def test_everybody_leaving_while_draining_ends_it_at_once() -> None:
    state = draining()
    for i in range(3):
        state = machine.withdraw(state, key(i))
    state = advance(state, 6.0)
    assert (state.phase, state.epoch, state.step) == (Phase.WAITING_FOR_MEMBERS, 1, 2)


@pytest.mark.parametrize("roots", [[EMPTY_ROOT] * 3, [digest("a"), digest("b"), digest("c")]], ids=["empty", "split"])
def test_a_run_that_applies_nothing_pauses(roots: list[bytes]) -> None:
    state = training()
    for step in range(1, 5):
        assert (state.step, state.draining, state.pending_pause) == (step, False, False)
        state = play(state, state.phase_start, roots=roots)
        while state.step == step:
            state = advance(state, machine.deadline(state) or 0.0)
    assert (state.draining, state.pending_pause, state.last_step) == (True, True, 5)
    state = advance(named(state, range(3)), state.phase_start)
    assert (state.phase, state.step, state.cold_start_epoch) == (Phase.PAUSED, 5, True)


def test_one_result_in_four_rounds_is_enough_to_go_on() -> None:
    state = training()
    for step in range(1, 13):
        state = play(state, 6.0, roots=itertools.repeat(EMPTY_ROOT if step % 4 else ROOT))
        assert (state.step, state.draining) == (step + 1, False)


def test_a_pause_in_an_epoch_drains_it() -> None:
    state = machine.pause(training(), 6.0)
    assert machine.pause(state, 6.0) is state
    state = play(state, 6.0)
    assert (state.phase, state.draining) == (Phase.ROUND_TRAIN, True)
    state = advance(named(state, range(3)), 7.0)
    assert (state.phase, state.epoch, state.step, state.pending_pause) == (Phase.PAUSED, 1, 2, False)
    assert state.cold_start_epoch
    assert {c.status for c in state.clients} == {ClientStatus.WITHDRAWN}
    state = machine.resume(state, 50.0)
    assert formed(state, members(3)).checkpoint == Checkpoint(digest("end"), 1)
    assert advance(state, 100.0, members(9)[3:]) is state  # a pause makes no stranger a holder
    assert not between().cold_start_epoch


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


# Health checks, leaving, pausing.


def rounds_played(count: int, heard: Iterable[int], **config: Any) -> RunState:
    """So many rounds of three clients, in which 0 and 1 report whom they heard."""
    state, heard = training(**config), list(heard)
    for _ in range(count):
        state = advance(report(report(state, 0, heard), 1, heard), 6.0)
    assert state.current is not None
    assert state.current.height == count
    return state


def check(state: RunState, *who: int, caller: int = 0) -> tuple[RunState, int]:
    assert state.current is not None
    request = HealthCheck(state.epoch, state.current.height, tuple(key(i) for i in who))
    return machine.health_check(state, key(caller), request)


def test_a_client_that_a_quorum_did_not_hear_in_three_rounds_is_dropped() -> None:
    state = rounds_played(3, [0, 1])
    dropped, count = check(state, 2, 2)
    assert count == 1
    assert [c.status for c in dropped.clients] == [ClientStatus.HEALTHY, ClientStatus.HEALTHY, ClientStatus.DROPPED]
    assert check(dropped, 2, 9, caller=1) == (dropped, 0)
    ended = play(dropped, 7.0, [0, 1])
    assert [(c.signer, c.exited_height) for c in ended.exited_clients] == [(key(2), 3)]


@pytest.mark.parametrize("count", [1, 2])
def test_fewer_rounds_show_nothing(count: int) -> None:
    refused("InvalidHealthCheck", lambda: check(rounds_played(count, [0, 1]), 2))


@pytest.mark.parametrize("back", [1, 2, 3])
def test_one_round_in_which_it_was_heard_keeps_a_client(back: int) -> None:
    state = rounds_played(3, [0, 1])
    slot = 3 - back
    heard = participants_bloom(state.rounds[slot].seed, [key(0), key(1), key(2)])
    records = (replace(state.rounds[slot].witnesses[0], participants=heard), state.rounds[slot].witnesses[1])
    for changed in (
        replace(state.rounds[slot], witnesses=records),  # one of two heard it: fewer than needed did not
        replace(state.rounds[slot], witnesses=records[1:]),  # one of three, alone, did not hear it
        replace(state.rounds[slot], witnesses=()),
        replace(state.rounds[slot], step=0),
        replace(state.rounds[slot], clients=(key(0), key(1), key(7))),
    ):
        other = replace(state, rounds=(*state.rounds[:slot], changed, *state.rounds[slot + 1 :]))
        refused("InvalidHealthCheck", lambda other=other: check(other, 2))


def test_health_check_refusals() -> None:
    state = rounds_played(3, [0, 1, 2])
    for arguments in (
        (key(0), 0, 3, [key(2)]),
        (key(9), 0, 3, []),
        (key(0), 1, 3, []),
        (key(0), 0, 2, []),
        (key(0), 0, 4, []),
    ):
        refused("InvalidHealthCheck", lambda a=arguments: machine.health_check(state, a[0], HealthCheck(*a[1:])))
    refused("InvalidHealthCheck", lambda: check(rounds_played(3, [0, 1]), 2, 0))
    refused("InvalidRunState", lambda: machine.health_check(warming(), key(0), HealthCheck(0, 0, ())))
    refused("Halted", lambda: machine.health_check(RunState("run"), key(0), HealthCheck(0, 0, ())))


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


def test_pause_and_resume_refusals() -> None:
    refused("CannotResume", lambda: machine.resume(training(), 0.0))
    refused("Halted", lambda: machine.pause(RunState("run"), 0.0))
    done = replace(machine.pause(waiting(total_steps=5), 0.0), step=6, checkpoint=Checkpoint(digest("end"), 5))
    assert machine.resume(done, 1.0).phase is Phase.FINISHED
    unnamed = replace(done, checkpoint=Checkpoint(digest("before"), 4))
    assert machine.resume(unnamed, 1.0).phase is Phase.WAITING_FOR_MEMBERS


# Going back.


def test_the_owner_goes_back_to_other_parameters() -> None:
    state = between("end")
    back = machine.restart_from(state, Checkpoint(digest("start"), 0), 30.0)
    assert (back.phase, back.step, back.checkpoint) == (Phase.WAITING_FOR_MEMBERS, 1, Checkpoint(digest("start"), 0))
    assert (back.rounds, back.holders) == ((), ())
    assert advance(back, 31.0, members(3)) is back  # nobody has shown yet that it holds them
    back = machine.warmup_witness(back, key(7), WarmupWitness(1, 0, digest("start")))
    again = formed(back, members(8)[5:])
    refused("InvalidWitness", lambda: holds(again, 0, "end"))
    for i in range(3):
        again = holds(again, i, "start")
    again = advance(again, again.phase_start)
    assert (again.phase, again.step, again.epoch) == (Phase.ROUND_TRAIN, 1, 1)


def test_parameters_that_are_lost_are_replaced_in_any_phase_without_rounds() -> None:
    state, chosen = between("end"), Checkpoint(digest("other"), 1)
    gathering = advance(state, 30.0, members(3))
    assert gathering.gathered_at is not None
    assert machine.restart_from(gathering, chosen, 31.0).gathered_at is None
    forming = machine.restart_from(holds(formed(state, members(3)), 0, "end"), chosen, 31.0)
    assert (forming.phase, forming.warmup_witnesses, forming.checkpoint) == (Phase.WAITING_FOR_MEMBERS, (), chosen)
    paused = machine.restart_from(machine.pause(state, 30.0), chosen, 31.0)
    assert (paused.phase, paused.checkpoint) == (Phase.PAUSED, chosen)


def test_going_back_is_refused() -> None:
    for state in (training(), draining(), RunState("run"), replace(waiting(), phase=Phase.FINISHED)):
        refused("InvalidRunState", lambda s=state: machine.restart_from(s, Checkpoint(digest("start"), 0), 9.0))
    state = between("end")
    for wrong in (Checkpoint(b"short", 0), Checkpoint(b"", 0), Checkpoint(ROOT, 2), Checkpoint(ROOT, -1)):
        refused("InvalidCheckpoint", lambda w=wrong: machine.restart_from(state, w, 9.0))


# Counting.


def test_every_change_counts() -> None:
    state = training()
    again = report(state, 0)
    assert again.nonce == state.nonce + 1
    assert machine.tick(again, None, 6.0, 0) is again
    assert machine.tick(again, None, 15.0, 0).nonce == again.nonce + 1

"""What a node does in a run: events in, effects out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from support.core import KEYS, NODES, RETRY, RUN, STRANGER, Scene, brief, commitments, of, one, parameters, sent

from psyche_lightning.node import events as ev
from psyche_lightning.node.core import CLAIM_AFTER, FINAL_LOADS, OLDER_FOR, STALE
from psyche_lightning.node.notices import (
    CoordinatorWentBack,
    Finished,
    Notice,
    OtherStart,
    Outcome,
    ParametersDiffer,
    ParametersNotObtained,
    RequestRefused,
    SignedBefore,
    TakesLast,
    TakesStart,
)
from psyche_lightning.node.patience import LEAST
from psyche_lightning.node.witness import list_promise, result_promise
from psyche_lightning.protocol.merkle import EMPTY_ROOT, merkle_root
from psyche_lightning.protocol.messages import Ask, Attest, Offer, Result, Stuck, seal
from psyche_lightning.protocol.requests import Accuse, HealthCheck, Join, WarmupWitness, Withdraw, Witness
from psyche_lightning.protocol.state import Checkpoint, Phase, RunState, WitnessProof, WitnessRecord
from psyche_lightning.wire.canonical import sha256

TRAINING = (ev.Train, ev.Apply)


# --- joining ----------------------------------------------------------------------------------------------------------


def test_a_node_asks_to_be_counted_in_ever_more_rarely() -> None:
    scene = Scene(3)
    scene.join(1)
    asked = [second for second in range(16) if of(scene.see() if not second else scene.tick(1.0), Join)]
    assert asked == [0, 2, 6, 14]


@pytest.mark.parametrize(
    ("phase", "member", "joins"),
    [
        pytest.param(Phase.UNINITIALIZED, False, False, id="a run that nobody has opened"),
        pytest.param(Phase.WAITING_FOR_MEMBERS, False, True, id="members are waited for"),
        pytest.param(Phase.WAITING_FOR_MEMBERS, True, True, id="members are waited for, and it is one"),
        pytest.param(Phase.WARMUP, True, False, id="it is a client"),
        pytest.param(Phase.WARMUP, False, True, id="an epoch without it is formed"),
        pytest.param(Phase.ROUND_TRAIN, True, False, id="it is a client of the round"),
        pytest.param(Phase.ROUND_TRAIN, False, True, id="an epoch without it is under way"),
        pytest.param(Phase.PAUSED, True, True, id="a paused run"),
        pytest.param(Phase.FINISHED, False, False, id="a finished run"),
    ],
)
def test_when_a_node_asks_to_be_counted_in(phase: Phase, member: bool, joins: bool) -> None:
    scene = Scene(3)
    scene.begin(but=(ev.Train,))
    clients = scene.state.clients if member else scene.state.clients[1:]
    node = Scene(3).core
    effects = node.handle(ev.StateSeen(replace(scene.state, phase=phase, clients=clients)), scene.now)
    assert bool(of(effects, Join)) is joins


def test_a_client_that_was_dropped_asks_to_be_counted_in() -> None:
    scene = Scene(3)
    scene.begin(but=(ev.Train,))
    scene.host.disconnected(KEYS[0], scene.now, "its connection was lost")
    assert of(scene.see(), Join)


def test_a_new_phase_makes_it_ask_at_once() -> None:
    scene = Scene(3)
    scene.host.begin(scene.now)
    assert of(scene.see(), Join)
    paused = replace(scene.state, phase=Phase.PAUSED, nonce=scene.state.nonce + 1)
    assert of(scene.give(ev.StateSeen(paused)), Join)
    assert not of(scene.give(ev.StateSeen(replace(paused, nonce=paused.nonce + 1))), Join)


def test_a_state_that_was_overtaken_by_a_newer_one_is_not_heard() -> None:
    scene = Scene(3)
    scene.warm()
    old = scene.state
    scene.begin(but=(ev.Train,))
    assert scene.give(ev.StateSeen(old)) == []
    assert scene.core.state == scene.state


# --- warming up -------------------------------------------------------------------------------------------------------


def warm(me: int = 0, *reported: int, digest: bytes = parameters(0), **config: Any) -> Scene:
    """A warm-up of a fresh run in which these peers have reported, and that the core has not seen."""
    scene = Scene(3, me=me, **config)
    scene.warm()
    for i in reported:
        scene.ask(i, WarmupWitness(0, i, digest))
    return scene


def test_a_node_looks_at_its_parameters_first() -> None:
    scene = warm()
    assert of(scene.see(), ev.TakeSnapshot) == [ev.TakeSnapshot()]
    assert not of(scene.tick(60.0), (ev.TakeSnapshot, WarmupWitness))  # type: ignore[arg-type]


def test_the_first_in_the_list_reports_its_own_parameters_at_once() -> None:
    scene = warm()
    scene.head = 0
    assert of(scene.obey(scene.see(), but=(WarmupWitness,)), WarmupWitness) == [WarmupWitness(0, 0, parameters(0))]


def test_the_others_wait_for_the_first_in_the_list_of_a_fresh_run() -> None:
    scene = warm(me=1)
    scene.head = 0
    assert not of(scene.obey(scene.see()) + scene.tick(10.0), (ev.TakeSnapshot, WarmupWitness))  # type: ignore[arg-type]
    scene.ask(0, WarmupWitness(0, 0, parameters(0)))
    assert of(scene.obey(scene.see(), but=(WarmupWitness,)), WarmupWitness) == [WarmupWitness(0, 1, parameters(0))]


def test_a_report_is_repeated_until_it_is_there() -> None:
    scene = warm()
    scene.head = 0
    scene.obey(scene.see(), but=(WarmupWitness,))
    assert not of(scene.tick(RETRY - 0.1), WarmupWitness)
    (again,) = of(scene.tick(0.1), WarmupWitness)
    scene.ask(0, again)
    scene.see()
    assert not of(scene.tick(60.0), WarmupWitness)


@pytest.mark.parametrize("decided", [False, True], ids=["of the first to report", "of an epoch before"])
def test_who_holds_others_takes_the_run_s(decided: bool) -> None:
    scene = warm(1, *([] if decided else [0]))
    state = replace(scene.state, checkpoint=Checkpoint(parameters(0) if decided else b"", 0))
    effects = scene.obey(scene.give(ev.StateSeen(state)), but=(WarmupWitness,))
    # Where they are on record, nobody needs to look at the own ones first.
    assert [effect for effect in effects if isinstance(effect, (Notice, ev.TakeSnapshot, ev.Load, WarmupWitness))] == [
        *([] if decided else [ev.TakeSnapshot()]),
        TakesStart(parameters(0)),
        ev.Load(parameters(0), (KEYS[0], KEYS[2])),
        WarmupWitness(0, 1, parameters(0)),
    ]


def test_who_holds_the_run_s_already_reports_them() -> None:
    scene = warm(1, 0)
    scene.head = 0
    effects = scene.obey(scene.see(), but=(WarmupWitness,))
    assert not of(effects, ev.Load)
    assert of(effects, WarmupWitness) == [WarmupWitness(0, 1, parameters(0))]


def test_where_the_run_s_are_not_to_be_had_it_is_tried_again() -> None:
    scene = warm(1, 0)
    scene.obey(scene.see(), but=(ev.Load,))
    effects = scene.give(ev.Loaded(parameters(0), "nobody has it"))
    assert brief(effects, ev.Load, ev.TakeSnapshot) == ["TakeSnapshot"]  # what it holds is not known any more
    effects = scene.give(ev.SnapshotTaken(sha256(b"mine")))
    assert brief(effects + scene.tick(RETRY - 0.1), ev.Load) == []
    assert brief(scene.tick(0.1), ev.Load) == ["Load 0"]


def test_parameters_that_were_obtained_do_not_delay_others_that_are_wanted_next() -> None:
    scene = warm(2, 0)
    effects = scene.obey(scene.see(), but=(WarmupWitness,))
    assert brief(effects, ev.Load) == ["Load 0"]
    scene.ask(0, Withdraw())
    scene.ask(1, WarmupWitness(0, 0, parameters(1)))
    assert brief(scene.see(), ev.Load) == ["Load 1"]


def test_who_is_no_client_has_no_part_in_a_warm_up() -> None:
    scene = Scene(3, me=3, init_min_clients=3)
    scene.nodes = 3
    scene.warm()
    assert not of(scene.see(), (ev.TakeSnapshot, WarmupWitness))  # type: ignore[arg-type]


def lied_start(digest: bytes, **settings: Any) -> tuple[Scene, list[ev.Effect]]:
    """A fresh run whose first member is not the core, and names its parameters."""
    scene = Scene(3, me=2, settings=settings)
    scene.warm()
    scene.head = 0
    effects = scene.obey(scene.see())
    first = KEYS.index(scene.state.clients[0].signer)
    assert first != scene.me
    scene.ask(first, WarmupWitness(0, 0, digest))
    return scene, effects + scene.obey(scene.see()) + scene.obey(scene.tick(RETRY))


def test_a_run_that_resumes_begins_with_no_other_parameters_whoever_is_first() -> None:
    scene, effects = lied_start(b"E" * 32, pinned=True)
    assert of(effects, OtherStart) == [OtherStart(scene.state.clients[0].node, b"E" * 32)]
    assert not of(effects, (ev.Load, WarmupWitness))  # type: ignore[arg-type]
    _, effects = lied_start(parameters(0), pinned=True)
    assert brief(effects, ev.Load, WarmupWitness) == ["WarmupWitness"]
    _, effects = lied_start(b"E" * 32)  # a fresh run begins with what its first member has
    assert of(effects, ev.Load)


def test_parameters_of_a_fresh_run_that_name_ids_to_train_again_are_refused() -> None:
    """The first member could otherwise double everybody's work for good."""
    scene = Scene(3, me=2)
    scene.warm()
    scene.see()
    first = KEYS.index(scene.state.clients[0].signer)
    scene.ask(first, WarmupWitness(0, 0, parameters(0)))
    (load,) = of(scene.obey(scene.see(), but=(ev.Load,)), ev.Load)
    effects = scene.give(ev.Loaded(load.digest, open_ids=((1, 0, 1 << 40),)))
    assert "nothing was trained" in one(effects, ParametersNotObtained).reason
    assert not of(effects, WarmupWitness)


# --- a run that waits for a holder ------------------------------------------------------------------------------------


def newcomer(head: int | None = 1, **options: Any) -> Scene:
    """A node that was not in the run's only epoch, of one step, which is over."""
    before = Scene(4, total_steps=3, epoch_time=50.0)
    before.begin()
    before.now += 50.0
    before.play(3)
    for i in range(4):
        before.ask(i, Withdraw())
    assert (before.state.phase, before.state.checkpoint) == (Phase.WAITING_FOR_MEMBERS, Checkpoint(parameters(1), 1))
    scene = Scene(4, me=5, **options)
    scene.host, scene.now, scene.head, scene.log = before.host, before.now, head, before.log
    scene.join(5)
    return scene


def test_a_node_that_holds_the_run_s_parameters_claims_it_while_the_run_waits_for_a_holder() -> None:
    scene = newcomer()
    assert not of(scene.see() + scene.tick(CLAIM_AFTER - 0.1), ev.TakeSnapshot)
    (claim,) = of(scene.obey(scene.tick(0.1), but=(WarmupWitness,)), WarmupWitness)
    assert claim == WarmupWitness(1, 0, parameters(1))
    assert of(scene.tick(RETRY), WarmupWitness) == [claim]
    scene.ask(5, claim)
    assert KEYS[5] in scene.state.holders
    scene.see()
    assert not of(scene.tick(60.0), WarmupWitness)


@pytest.mark.parametrize("what", ["others", "none on record", "a holder already"])
def test_who_has_nothing_to_claim_claims_nothing(what: str) -> None:
    scene = newcomer(None if what == "others" else 1)
    state = scene.state
    if what == "none on record":  # its last rounds are not in the checkpoint
        state = replace(state, checkpoint=Checkpoint(parameters(0), 0), rounds=())
    elif what == "a holder already":
        state = replace(state, holders=(*state.holders, KEYS[5]))
    effects = scene.give(ev.StateSeen(state)) + scene.obey(scene.tick(CLAIM_AFTER)) + scene.tick(60.0)
    assert not of(effects, WarmupWitness)


def test_older_parameters_to_which_the_owner_goes_back_are_taken_from_who_stored_them() -> None:
    scene = Scene(4, settings={"keep_bytes": 0})
    scene.begin()
    scene.play(3)
    scene.host.pause(scene.now)
    scene.play(2)
    assert scene.state.phase is Phase.PAUSED
    scene.host.restart_from(parameters(2), 2, scene.now)
    scene.host.resume(scene.now)
    scene.join(0, 1, 2, 3)
    scene.pass_time(60.0)
    assert scene.state.phase is Phase.WAITING_FOR_MEMBERS
    effects = scene.obey(scene.see())
    assert brief(effects, ev.Load, WarmupWitness) == ["Load 2", "WarmupWitness"]
    scene.pass_time(3.0)
    assert scene.state.phase is Phase.WARMUP


@pytest.mark.parametrize("changed", [True, False], ids=["changed", "not changed"])
def test_a_node_whose_parameters_the_next_members_do_not_have_works_them_out_again_once(changed: bool) -> None:
    """No digest of the last rounds is on record, so nothing else would show that its parameters have changed."""
    scene = Scene(4)
    scene.begin()
    if changed:
        scene.head = None
    scene.play(1)
    for i in (1, 2):
        scene.ask(i, Withdraw())
    scene.obey(scene.see())
    assert (scene.state.phase, scene.state.checkpoint.step) == (Phase.WAITING_FOR_MEMBERS, 0)
    step = scene.state.step - 1
    loads = []
    for _ in range(2):
        scene.join(0, 1, 2, 3)
        while scene.state.phase is not Phase.WARMUP:
            scene.pass_time(1.0)
        scene.obey(scene.see())
        for i, digest in ((1, parameters(step)), (2, parameters(step)), (3, b"L" * 32)):
            place = [client.signer for client in scene.state.clients].index(KEYS[i])
            scene.ask(i, WarmupWitness(1, place, digest))
        if scene.state.phase.active:
            break
        scene.pass_time(20.0)
        loads += brief(scene.obey(scene.see()), ev.Load, ParametersDiffer)
    assert loads == (["ParametersDiffer", "Load 0"] if changed else [])
    assert scene.head == step
    assert scene.state.phase is Phase.ROUND_TRAIN


# --- training ---------------------------------------------------------------------------------------------------------


def test_a_node_trains_its_batch_once() -> None:
    scene = Scene(3)
    (train,) = of(scene.begin(but=(ev.Train,)), ev.Train)
    known = scene.log.rounds[0]
    assert train == ev.Train(0, 0, 1, known.batches[known.nodes.index(KEYS[0])])
    assert not of([*scene.tick(60.0), *scene.see()], ev.Train)


def test_an_update_is_promised_and_then_announced() -> None:
    scene = Scene(3)
    (train,) = of(scene.begin(but=(ev.Train,)), ev.Train)
    promise, broadcast = scene.give(scene.trained(train))[:2]
    assert promise == ev.Promise(result_promise(0, 0), broadcast.envelope)  # type: ignore[union-attr]
    assert broadcast == ev.Broadcast(scene.result(0))


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(lambda trained: replace(trained, result=None), id="a batch without an update"),
        pytest.param(lambda trained: replace(trained, epoch=1), id="of another epoch"),
        pytest.param(lambda trained: replace(trained, height=5), id="of a round that is not known"),
    ],
)
def test_what_is_not_announced(answer: Callable[[ev.Trained], ev.Trained]) -> None:
    scene = Scene(3)
    (train,) = of(scene.begin(but=(ev.Train,)), ev.Train)
    assert scene.give(answer(scene.trained(train))) == []


def test_a_node_that_comes_back_sends_the_same_bytes_again_and_does_not_train() -> None:
    scene = Scene(3)
    scene.begin()
    again = scene.restarted(head=0)
    effects = again.obey(again.see())
    assert ev.Broadcast(scene.promises[result_promise(0, 0)]) in effects
    assert not of(effects, (ev.Train, ev.Promise))  # type: ignore[arg-type]


def test_a_node_that_comes_back_to_another_batch_does_not_sign_a_second_result() -> None:
    """Two results for one round would have it ejected, whatever their batches."""
    scene = Scene(3)
    scene.begin()
    old = scene.promises[result_promise(0, 0)].message
    assert isinstance(old, Result)
    scene.promises[result_promise(0, 0)] = scene.seal(replace(old, start=old.start + 1))
    again = scene.restarted(head=0)
    effects = again.obey(again.see())
    assert of(effects, SignedBefore) == [SignedBefore(0)]
    assert not of(effects, (ev.Train, ev.Promise))  # type: ignore[arg-type]


@pytest.mark.parametrize("overlap", [False, True])
def test_nothing_is_trained_outside_of_training(overlap: bool) -> None:
    scene = Scene(3, settings={"overlap": overlap})
    scene.ready()
    witnessing = replace(scene.state, phase=Phase.ROUND_WITNESS)
    assert not of(scene.give(ev.StateSeen(witnessing)), ev.Train)
    assert of(scene.see(), ev.Train)


def test_overlap_trains_the_older_of_two_announced_rounds_first() -> None:
    scene = Scene(4, settings={"overlap": True})
    scene.ready()
    scene.play_alone(1)
    assert scene.round.height == 1
    effects = scene.see() + scene.tick() + scene.tick()
    assert brief(effects, *TRAINING) == ["Train 0", "Train 1"]


def test_overlap_applies_no_more_than_precedes_the_round_that_is_trained_next() -> None:
    scene = Scene(4, settings={"overlap": True})
    scene.ready()
    scene.play_alone(2)
    assert scene.round.height == 2
    effects = scene.see() + scene.listen(0, 1) + scene.tick()
    assert brief(effects, *TRAINING) == ["Train 1", "Apply 0"]  # round 0 is not worth training any more
    effects = scene.give(scene.applied(of(effects, ev.Apply)[0]))
    assert brief(effects, *TRAINING) == ["Train 2"]


def test_overlap_trains_before_it_applies_what_is_not_to_be_in_that_round_s_parameters() -> None:
    scene = Scene(4, settings={"overlap": True})
    scene.ready()
    scene.obey(scene.see())  # round 0 is trained
    scene.play_alone(2)
    scene.listen(0, 1)  # what decides round 0 is here before round 1 is known
    effects = scene.see()
    assert brief(effects, *TRAINING) == ["Train 1"]
    assert brief(scene.tick(), *TRAINING) == ["Apply 0"]


def test_without_overlap_a_round_waits_until_the_one_before_is_applied() -> None:
    scene = Scene(4)
    scene.ready()
    scene.play_alone(1)
    effects = scene.see() + scene.listen(0)
    assert brief(effects, *TRAINING) == ["Apply 0"]
    assert brief(scene.tick(1.0), *TRAINING) == []
    assert brief(scene.give(scene.applied(of(effects, ev.Apply)[0])), *TRAINING) == ["Train 1"]


# --- witnessing -------------------------------------------------------------------------------------------------------


def holding(*who: int, **options: Any) -> Scene:
    """Round 0 of 4 nodes; the core has its own result and those of ``who``, with their payloads."""
    scene = Scene(4, **options)
    scene.begin()
    for i in who:
        scene.obey(scene.hear(scene.result(i)), but=(Witness,))
    return scene


def root(scene: Scene, *who: int) -> bytes:
    """The root over the results of these nodes in round 0."""
    return merkle_root(commitments(*[scene.result(i, 0) for i in who]))


def test_a_witness_that_verified_everything_stores_it_and_then_reports_it_during_training() -> None:
    scene = holding(1, 2)
    effects = scene.obey(scene.hear(scene.result(3)), but=(Witness,))
    remember, report = [effect for effect in effects if not isinstance(effect, ev.Fetch)]
    assert isinstance(remember, ev.Remember)
    assert remember.key == list_promise(0, 0, root(scene, 0, 1, 2, 3))
    assert {envelope.sender for envelope in remember.envelopes} == set(KEYS[:4])
    assert isinstance(report, Witness)
    assert report.merkle == root(scene, 0, 1, 2, 3)
    scene.ask(0, report)
    assert len(scene.round.witnesses) == 1


def test_a_payload_that_is_not_here_yet_is_waited_for_during_training() -> None:
    scene = holding(1, 2)
    assert not of(scene.hear(scene.result(3)), Witness)
    assert not of(scene.tick(1.0), Witness)
    payload = scene.result(3).message.payload  # type: ignore[union-attr]
    assert of(scene.give(ev.Fetched(payload)), Witness)


def test_what_is_late_is_waited_for_for_a_while_once_a_quorum_is_here() -> None:
    scene = holding(1)
    assert not of(scene.tick(39.0), Witness)
    scene.obey(scene.hear(scene.result(2)), but=(Witness,))
    assert not of(scene.tick(38.9), Witness)  # as long again as the quorum took
    assert one(scene.tick(0.1), Witness).merkle == root(scene, 0, 1, 2)


def test_with_overlap_late_results_hold_up_nobody_who_still_trains_the_next_round() -> None:
    scene = holding(1, 2, settings={"overlap": True})
    scene.end_round()
    scene.obey(scene.see(), but=(ev.Train, Witness))
    assert scene.round.height == 1
    assert not of(scene.tick(40.0 + LEAST), Witness)
    effects = scene.give(ev.Trained(0, 1, None))  # it gave no update
    assert not of(effects, Witness)
    assert one(scene.tick(40.0 + LEAST), Witness).merkle == root(scene, 0, 1, 2)


def test_a_witness_reports_again_when_it_verified_more() -> None:
    scene = holding(1, 2)
    first = one(scene.tick(LEAST), Witness)
    scene.ask(0, first)
    scene.see()
    (second,) = of(scene.obey(scene.hear(scene.result(3)), but=(Witness,)), Witness)
    assert [first.merkle, second.merkle] == [root(scene, 0, 1, 2), root(scene, 0, 1, 2, 3)]
    scene.ask(0, second)
    assert [record.merkle for record in scene.round.witnesses] == [second.merkle]


@pytest.mark.parametrize("overlap", [False, True])
def test_a_witness_reports_once_on_a_decided_round_and_no_more(overlap: bool) -> None:
    scene = holding(1, 2, settings={"overlap": overlap})
    if overlap:
        scene.end_round()
        scene.obey(scene.see(), but=(Witness,))
        assert scene.round.height == 1
    decided = root(scene, 1, 2)
    records = tuple(WitnessRecord(WitnessProof(0, i), decided) for i in (1, 2, 3))
    rounds = (*scene.state.rounds[:-1], replace(scene.round, witnesses=records))
    effects = scene.give(ev.StateSeen(replace(scene.state, rounds=rounds)))
    effects += scene.obey(scene.hear(scene.result(3, 0)), but=(Witness,)) + scene.tick(60.0)
    mine = of(effects, Witness)[-1]  # it holds the results, too: the coordinator may have waited for that
    records = (*records, WitnessRecord(WitnessProof(0, 0), mine.merkle))
    rounds = (*scene.state.rounds[:-1], replace(scene.round, witnesses=records))
    effects = scene.give(ev.StateSeen(replace(scene.state, rounds=rounds))) + scene.tick(120.0)
    assert not of(effects, Witness)


def test_a_list_that_grew_after_the_decision_is_no_reason_to_report_in_a_drain_round() -> None:
    scene = Scene(4, total_steps=1, settings={"overlap": True})
    scene.begin()
    scene.end_round()  # round 0's results are reported in round 1, which drains
    for i in (1, 2):
        scene.obey(scene.hear(scene.result(i, 0)), but=(Witness,))
    scene.obey(scene.see(), but=(Witness,))
    scene.ask(0, one(scene.tick(LEAST), Witness))
    records = (*scene.round.witnesses, *[WitnessRecord(WitnessProof(0, i), root(scene, 1, 2)) for i in (1, 2, 3)])
    rounds = (scene.state.rounds[0], replace(scene.round, witnesses=records))
    effects = scene.give(ev.StateSeen(replace(scene.state, rounds=rounds)))
    effects += scene.obey(scene.hear(scene.result(3, 0)), but=(Witness,)) + scene.tick(60.0)
    assert not of(effects, Witness)


def test_in_the_witness_phase_it_reports_what_it_has() -> None:
    scene = holding(1)
    assert not of(scene.tick(), Witness)
    scene.pass_time(40.0)
    assert scene.state.phase is Phase.ROUND_WITNESS
    assert one(scene.see(), Witness).merkle == root(scene, 0, 1)


def test_witnesses_whose_list_is_another_are_asked_and_what_they_have_is_reported_too() -> None:
    scene = holding(1, 2)
    scene.overhear(scene.result(3))
    scene.report(2)
    effects = scene.see()
    assert brief(effects, ev.SendTo) == ["Ask to 2"]
    answer = [scene.result(3), scene.attest(2)]
    effects = scene.obey(scene.hear(*answer), but=(Witness,))
    assert one(effects, Witness).merkle == root(scene, 0, 1, 2, 3)


@pytest.mark.parametrize("why", ["left", "malformed", "two results"])
def test_who_has_nothing_better_to_give_is_not_waited_for(why: str) -> None:
    scene = holding(1, 2)
    if why == "left":
        scene.ask(3, Withdraw())
        effects = scene.see()
    else:
        envelope = scene.result(3)
        effects = scene.hear(envelope)
        if why == "malformed":
            effects += scene.give(ev.Fetched(envelope.message.payload, "too short", refused=True))  # type: ignore[union-attr]
        else:
            effects += scene.hear(scene.result(3, nonce=1))
    assert one(effects, Witness).merkle == root(scene, 0, 1, 2)


def test_a_report_is_repeated_until_it_is_recorded() -> None:
    scene = holding(1, 2, 3)
    (first,) = of(scene.tick(RETRY), Witness)
    effects = scene.tick(2 * RETRY)
    assert one(effects, Witness) == first
    assert not of(effects, ev.Remember)
    scene.ask(0, first)
    scene.see()
    assert not of(scene.tick(60.0), Witness)


def test_who_has_no_seat_does_not_report() -> None:
    scene = Scene(4, witness_nodes=1)
    scene.ready()
    (witness,) = scene.log.rounds[0].selection.witnesses()
    assert witness != 0
    effects = scene.obey(scene.see(), but=(Witness,))
    effects += scene.obey(scene.hear(*[scene.result(i) for i in scene.peers]), but=(Witness,))
    assert not of(effects, (Witness, ev.Remember))  # type: ignore[arg-type]


def test_with_overlap_a_round_s_results_are_reported_in_the_next_and_the_first_report_is_empty() -> None:
    scene = Scene(4, settings={"overlap": True})
    effects = scene.begin()
    assert one(effects, Witness).merkle == EMPTY_ROOT
    assert not of(effects, ev.Remember)
    scene.end_round()
    assert scene.round.height == 1
    effects = scene.obey(scene.see())
    assert not of(effects, Witness)
    effects = scene.obey(scene.hear(*[scene.result(i, 0) for i in scene.peers]), but=(Witness,))
    report = one(effects, Witness)
    assert (report.height, report.merkle) == (1, root(scene, 0, 1, 2, 3))


def test_a_report_names_the_newest_digest_until_there_is_another() -> None:
    scene = Scene(3)
    effects = scene.begin() + scene.play(6)
    named = {report.height: (report.step, report.digest) for report in of(effects, Witness)}
    none = (0, b"")
    assert [named[height] for height in range(6)] == [none, none, *[(2, parameters(2))] * 2, *[(4, parameters(4))] * 2]


# --- silent clients ---------------------------------------------------------------------------------------------------


def silent(*rounds: set[int]) -> Scene:
    """Rounds of 4 nodes in each of which nothing was heard of some. The core has not seen that the last is over."""
    scene = Scene(4)
    scene.begin()
    for who in rounds:
        scene.obey(scene.see())
        for i in scene.peers:
            if i not in who:
                scene.obey(scene.hear(scene.result(i)))
        scene.obey(scene.tick(60.0))  # its patience is over
        scene.end_round(*[i for i in scene.peers if i not in who])
    assert (scene.round.height, scene.state.phase) == (len(rounds), Phase.ROUND_TRAIN)
    return scene


def test_who_is_missing_in_three_rounds_in_a_row_is_named_once() -> None:
    scene = silent({2}, {2}, {2})
    effects = scene.obey(scene.see(), but=(HealthCheck,))
    assert of(effects, HealthCheck) == [HealthCheck(0, 3, (KEYS[2],))]
    assert not of(scene.tick(60.0), HealthCheck)
    assert scene.ask(0, one(effects, HealthCheck)) == 1


@pytest.mark.parametrize(
    "rounds",
    [
        pytest.param([{2}, {2}], id="missing in the first two rounds"),
        pytest.param([{2}, set(), {2}, {2}], id="heard in between"),
        pytest.param([{1}, {2}, {3}], id="others each time"),
        pytest.param([set()] * 3, id="never missing"),
    ],
)
def test_who_was_heard_since_is_not_named(rounds: list[set[int]]) -> None:
    scene = silent(*rounds)
    assert not of(scene.obey(scene.see(), but=(HealthCheck,)), HealthCheck)


def test_in_an_epoch_s_first_rounds_a_late_result_is_a_sign_of_life() -> None:
    scene = silent({2}, {2}, {2})
    scene.obey(scene.hear(scene.result(2, 1)), but=(HealthCheck,))  # of a round that was decided without it
    assert not of(scene.obey(scene.see(), but=(HealthCheck,)) + scene.tick(60.0), HealthCheck)


def test_who_left_already_is_not_named() -> None:
    scene = silent({2}, {2}, {2})
    scene.ask(2, Withdraw())
    assert not of(scene.obey(scene.see(), but=(HealthCheck,)), HealthCheck)


def test_nobody_is_named_outside_of_training() -> None:
    scene = silent({2}, {2}, {2})
    witnessing = ev.StateSeen(replace(scene.state, phase=Phase.ROUND_WITNESS))
    assert not of(scene.obey(scene.give(witnessing), but=(HealthCheck, Witness)), HealthCheck)
    assert of(scene.obey(scene.see(), but=(HealthCheck,)), HealthCheck)


def test_who_does_not_know_what_was_decided_names_nobody() -> None:
    scene = silent({2}, {2})
    for i in (1, 3):
        scene.overhear(scene.result(i))
    scene.end_round()
    assert scene.round.height == 3
    assert not of(scene.obey(scene.see(), but=(HealthCheck,)), HealthCheck)


@pytest.mark.parametrize("verified", [(0, 0, 0), (0, 1, 2)], ids=["nothing was verified", "nothing was decided"])
def test_where_a_round_has_no_results_nobody_is_to_blame(verified: tuple[int, ...]) -> None:
    scene = silent({2}, {2})
    scene.obey(scene.see())
    found = commitments(*[scene.result(i) for i in (1, 3)])
    for i, many in zip(scene.peers, verified, strict=True):
        scene.report(i, found[:many])
    if scene.round.height == 2:
        scene.pass_time(45.0)
        scene.pass_time(5.0)
    assert scene.round.height == 3
    assert not of(scene.obey(scene.see(), but=(HealthCheck,)), HealthCheck)


def test_a_node_does_not_name_itself() -> None:
    scene = Scene(4)
    scene.begin(but=(ev.Train,))
    for _ in range(3):
        scene.obey(scene.hear(*[scene.result(i) for i in scene.peers]), but=(Witness,))
        scene.end_round()
        effects = scene.obey(scene.see(), but=(ev.Train, HealthCheck))
    assert scene.round.height == 3
    assert [scene.log.rounds[height].silent for height in range(3)] == [{0}] * 3
    assert not of(effects, HealthCheck)


# --- the end of an epoch ----------------------------------------------------------------------------------------------


def drained() -> Scene:
    """An epoch of one step of 4 nodes that drains; of its last parameters, the coordinator has heard nothing."""
    scene = Scene(4, total_steps=1)
    scene.begin()
    scene.obey(scene.hear(*[scene.result(i) for i in scene.peers]))
    scene.end_round()
    assert scene.state.draining
    scene.obey(scene.see(), but=(Witness,))
    return scene


@pytest.mark.parametrize("overlap", [False, True])
def test_a_drain_round_s_report_names_the_last_parameters_and_has_an_empty_list(overlap: bool) -> None:
    scene = Scene(4, total_steps=1, settings={"overlap": overlap})
    effects = scene.begin() + scene.play(1 + overlap)
    report = of(effects, Witness)[-1]
    assert scene.round.step == 0
    assert (report.height, report.merkle) == (scene.round.height, EMPTY_ROOT)
    assert (report.step, report.digest) == (1, parameters(1))
    assert scene.state.checkpoint_votes == ((KEYS[0], 1, parameters(1)),)


def test_it_is_repeated_until_it_is_there() -> None:
    scene = drained()
    (report,) = of(scene.tick(RETRY), Witness)
    assert report.digest == parameters(1)
    scene.ask(0, report)
    scene.see()
    assert not of(scene.tick(60.0), Witness)


def test_the_parameters_after_the_last_training_are_stored_and_offered() -> None:
    scene = Scene(4, total_steps=3)
    effects = scene.begin() + scene.play(3)
    assert [apply.snapshot for apply in of(effects, ev.Apply)] == [False, False, True]
    assert sent(effects, Offer) == [Offer(0, 3, parameters(3))]


def test_a_node_alone_stores_them_too() -> None:
    scene = Scene(1, total_steps=3)
    scene.warm()
    scene.head = 0
    effects = scene.obey(scene.see())
    assert [apply.height for apply in of(effects, ev.Apply) if apply.snapshot] == [2]
    assert scene.core.finished


def test_who_has_not_applied_everything_names_older_parameters_only_when_time_is_short() -> None:
    scene = Scene(4, total_steps=3)
    scene.begin()
    scene.play(2)
    scene.obey(scene.see())
    scene.obey(scene.hear(*[scene.result(i) for i in scene.peers]), but=(ev.Apply,))
    scene.end_round()
    assert scene.state.draining
    assert brief(scene.see() + scene.tick(10.0), ev.Apply, Witness) == ["Apply 2"]
    scene.pass_time(10.0)
    assert scene.state.phase is Phase.ROUND_WITNESS
    report = one(scene.see(), Witness)
    assert (report.step, report.digest) == (2, parameters(2))


# --- the end of the run -----------------------------------------------------------------------------------------------


def ended(digest: bytes = parameters(1)) -> Scene:
    """The run is finished; the core has not seen it."""
    scene = drained()
    for i in scene.peers:
        scene.report(i, named=(1, digest))
    assert scene.state.phase is Phase.FINISHED
    assert scene.state.checkpoint.digest == digest
    return scene


def test_who_holds_the_last_parameters_leaves() -> None:
    scene = ended()
    assert of(scene.obey(scene.see()), Finished) == [Finished(Outcome.LAST_PARAMETERS, parameters(1))]
    assert scene.core.finished


def test_who_has_left_does_nothing_more() -> None:
    scene = ended()
    scene.obey(scene.see())
    assert scene.core.finished
    assert scene.tick(60.0) + scene.see() + scene.hear(scene.seal(Ask(0, 9, 1), 1)) == []


def test_a_run_without_agreed_parameters_is_left_as_it_is() -> None:
    scene = ended()
    state = replace(scene.state, checkpoint=Checkpoint())
    assert of(scene.obey(scene.give(ev.StateSeen(state))), Finished) == [Finished(Outcome.NOTHING_AGREED)]


def test_who_holds_others_takes_the_last_parameters_and_leaves() -> None:
    scene = ended(sha256(b"others"))
    effects = scene.obey(scene.see())
    assert [effect for effect in effects if isinstance(effect, (Notice, ev.Load))] == [
        ParametersDiffer(0, 0),
        TakesLast(sha256(b"others")),
        ev.Load(sha256(b"others"), (KEYS[1], KEYS[2], KEYS[3])),
        Finished(Outcome.LAST_PARAMETERS, sha256(b"others")),
    ]


def test_who_cannot_get_the_last_parameters_leaves_without_them_after_three_attempts() -> None:
    scene = ended(sha256(b"others"))
    loads: list[ev.Load] = of(scene.see(), ev.Load)
    attempts = 0
    while not scene.core.finished and attempts < 10:
        attempts += 1
        effects = scene.give(ev.Loaded(loads[-1].digest, "nobody has it")) if loads else []
        effects += scene.tick(20.0)
        loads = of(effects, ev.Load)
    assert of(effects, Finished) == [Finished(Outcome.OTHER_PARAMETERS, sha256(b"others"))]
    assert attempts == FINAL_LOADS


def test_who_comes_to_a_finished_run_takes_its_last_parameters() -> None:
    scene = ended()
    late = Scene(4, me=4)
    late.host, late.now = scene.host, scene.now
    assert of(late.see(), ev.Load) == [ev.Load(parameters(1), ())]


def test_who_has_not_applied_everything_takes_the_last_parameters_after_some_patience() -> None:
    scene = Scene(4, total_steps=1)
    scene.begin()
    scene.hear(*[scene.result(i) for i in scene.peers])  # the payloads do not come
    scene.end_round()
    scene.see()
    scene.end_round(digests=True)
    assert scene.state.phase is Phase.FINISHED
    assert not of(scene.see(), ev.Load)
    assert not of(scene.tick(4 * RETRY - 0.1), ev.Load)
    assert of(scene.tick(0.1), ev.Load) == [ev.Load(parameters(1), (KEYS[1], KEYS[2], KEYS[3]))]


# --- what else is heard -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "retryable", "said"),
    [
        pytest.param("NotAuthorized", False, True, id="a refusal is told"),
        pytest.param("Unreachable", True, False, id="what may succeed later is not"),
        *[pytest.param(code, False, False, id=f"the run moved on: {code}") for code in STALE],
    ],
)
def test_which_refusals_are_told(code: str, retryable: bool, said: bool) -> None:
    scene = Scene(3)
    effects = scene.give(ev.RequestFailed(Join(), code, "not you", retryable))
    assert effects == ([RequestRefused(code, "not you")] if said else [])


def test_who_is_stuck_gets_this_node_s_offer_and_the_next_digest_comes_with_a_snapshot() -> None:
    scene = Scene(3, settings={"keep_bytes": 0})
    scene.begin()
    scene.play(2)
    assert scene.round.height == 2
    snapshot = parameters(2)
    stuck = seal(NODES[1], RUN, Stuck(0, 1, 1))
    assert brief(scene.hear(stuck), ev.SendTo) == ["Offer to 1"]
    assert sent(scene.hear(seal(NODES[1], RUN, Stuck(0, 1, 2))), Offer) == [Offer(0, 2, snapshot)]
    other = Scene(3)
    other.begin()
    other.play(2)
    assert brief(other.hear(stuck), ev.SendTo) == []
    applied = of(other.play(2), ev.Apply)
    assert [(apply.height, apply.snapshot) for apply in applied] == [(2, False), (3, True)]


@pytest.mark.parametrize(
    "message",
    [
        pytest.param(Offer(0, 2, parameters(2)), id="an offer"),
        pytest.param(Stuck(0, 1, 1), id="a call for help"),
        pytest.param(Ask(0, 0, 1), id="a question"),
    ],
)
def test_strangers_are_not_heard(message: Any) -> None:
    scene = Scene(3, settings={"keep_bytes": 0})
    scene.begin()
    scene.play(2)
    assert scene.hear(seal(STRANGER, RUN, message)) == []
    assert scene.core._follower.repair.offers == {}
    assert not scene.core._follower.repair.wanted


def test_a_coordinator_that_went_back_is_followed_from_what_is_stored_and_nothing_is_signed_twice() -> None:
    scene = Scene(3)
    scene.begin()
    older = scene.state
    scene.play(1)
    signed, step = dict(scene.promises), scene.state.step
    assert result_promise(0, 1) in signed
    scene.host.state = older
    assert scene.see() == []
    assert not of(scene.tick(OLDER_FOR - 0.1), ev.StartOver)
    effects = scene.tick(0.1)
    assert effects == [CoordinatorWentBack(step, older.step), ev.StartOver(older)]
    again = scene.restarted(head=0)
    effects = again.obey(again.give(ev.StateSeen(older)))
    assert ev.Broadcast(signed[result_promise(0, 0)]) in effects
    assert not of(effects, (ev.Train, ev.Promise))  # type: ignore[arg-type]


def _with_other_members(state: RunState) -> RunState:
    assert state.current is not None
    newest = replace(state.current, clients=state.current.clients[:-1])
    return replace(state, rounds=(*state.rounds[: state.head], newest))


def _decided_otherwise(state: RunState) -> RunState:
    first, *others = state.rounds
    reports = tuple(replace(report, merkle=EMPTY_ROOT) for report in first.witnesses)
    return replace(state, rounds=(replace(first, witnesses=reports), *others))


def _ended_before(state: RunState) -> RunState:
    waiting = replace(state, phase=Phase.WAITING_FOR_MEMBERS, epoch=state.epoch + 1)
    return replace(waiting, rounds=state.rounds[: state.head], head=state.head - 1)


@pytest.mark.parametrize("otherwise", [_with_other_members, _decided_otherwise, _ended_before])
def test_a_coordinator_that_went_back_and_went_on_otherwise_is_noticed_at_once(
    otherwise: Callable[[RunState], RunState],
) -> None:
    scene = Scene(3)
    scene.begin()
    scene.play(2)
    known = scene.state
    scene.host.state = replace(otherwise(known), nonce=known.nonce)
    assert ev.StartOver(scene.state) in scene.see()


def test_a_state_that_is_only_late_changes_nothing() -> None:
    scene = Scene(3)
    scene.begin()
    older = scene.state
    scene.play(1)
    scene.give(ev.StateSeen(older))
    scene.see()
    assert not of(scene.tick(OLDER_FOR) + scene.tick(OLDER_FOR), ev.StartOver)


def test_an_accusation_that_did_not_reach_the_coordinator_is_repeated() -> None:
    scene = Scene(3)
    scene.begin(but=(ev.Train,))
    (accuse,) = of(scene.hear(scene.result(1), scene.result(1, nonce=1)), Accuse)
    assert not of(scene.give(ev.RequestFailed(accuse, "Unreachable", "no answer", True)), Accuse)
    assert of(scene.tick(RETRY), Accuse) == [accuse]
    assert not of(scene.tick(60.0), Accuse)  # it was heard
    scene.give(ev.RequestFailed(accuse, "InvalidAccusation", "no", False))
    assert not of(scene.tick(60.0), Accuse)


def test_messages_of_another_epoch_are_not_heard() -> None:
    scene = holding()
    assert scene.hear(seal(NODES[1], RUN, Ask(1, 0, 1))) == []
    assert scene.hear(seal(NODES[1], RUN, Ask(0, 0, 1)))


def test_before_anything_is_known_of_the_run_messages_are_not_heard() -> None:
    scene = Scene(3)
    for message in (Ask(0, 0, 1), Offer(0, 2, parameters(2)), Stuck(0, 1, 1), Attest(0, 0, b"")):
        assert scene.give(ev.Received(seal(NODES[1], RUN, message))) == []


def test_what_is_missing_is_asked_for_when_time_passes_and_not_at_each_message() -> None:
    scene = holding(1)
    scene.now += 60.0
    assert not sent(scene.give(ev.BuffersTaken(0, sha256(b"?"))), Ask)
    assert sent(scene.tick(), Ask)


def test_time_never_goes_back() -> None:
    scene = Scene(3)
    scene.host.begin(scene.now)
    assert of(scene.see(), Join)
    scene.core.handle(ev.Tick(), scene.now - 50.0)
    assert not of(scene.core.handle(ev.Tick(), scene.now + RETRY - 0.1), Join)
    assert of(scene.core.handle(ev.Tick(), scene.now + RETRY), Join)


def test_what_the_node_says_it_waits_for_is_what_it_waits_for() -> None:
    scene = Scene(3)
    assert scene.core.waiting() == "waiting for the coordinator's state"
    scene.begin()
    assert scene.core.waiting().startswith("round 0: waiting for results of 2/3 batches")

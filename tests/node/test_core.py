"""What a node does in a run: events in, effects out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from support.core import KEYS, NODES, RETRY, RUN, STRANGER, Scene, brief, of, one, parameters, sent

from psyche_lightning.node import events as ev
from psyche_lightning.node.core import FINAL_LOADS, STALE
from psyche_lightning.node.notices import Finished, Notice, Outcome, RequestRefused, TakesLast, TakesStart
from psyche_lightning.node.witness import attest_promise, result_promise
from psyche_lightning.protocol.messages import Ask, Attest, Offer, Result, Stuck, seal
from psyche_lightning.protocol.requests import HealthCheck, Join, Vote, WarmupWitness, Withdraw, Witness
from psyche_lightning.protocol.state import Checkpoint, ClientStatus, Phase
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
        pytest.param(Phase.COOLDOWN, True, False, id="its epoch ends"),
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
    """A warm-up in which these peers have reported, and that the core has not seen."""
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


def test_another_does_so_when_half_of_the_warm_up_is_over() -> None:
    scene = warm(me=1)
    scene.head = 0
    assert not of(scene.obey(scene.see()), WarmupWitness)
    assert not of(scene.tick(9.9), WarmupWitness)
    assert of(scene.tick(0.1), WarmupWitness) == [WarmupWitness(0, 1, parameters(0))]


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
    scene = warm(0, *([] if decided else [2]))
    state = replace(scene.state, checkpoint=Checkpoint(parameters(0) if decided else b"", 0))
    effects = scene.obey(scene.give(ev.StateSeen(state)), but=(WarmupWitness,))
    # Where they are decided, nobody needs to look at the own ones first.
    assert [effect for effect in effects if isinstance(effect, (Notice, ev.TakeSnapshot, ev.Load, WarmupWitness))] == [
        *([] if decided else [ev.TakeSnapshot()]),
        TakesStart(parameters(0)),
        ev.Load(parameters(0), (KEYS[1], KEYS[2])),
        WarmupWitness(0, 0, parameters(0)),
    ]


def test_who_holds_the_run_s_already_reports_them() -> None:
    scene = warm(1, 0)
    scene.head = 0
    effects = scene.obey(scene.see(), but=(WarmupWitness,))
    assert not of(effects, ev.Load)
    assert of(effects, WarmupWitness) == [WarmupWitness(0, 1, parameters(0))]


def test_where_the_run_s_are_not_to_be_had_it_is_tried_again() -> None:
    scene = warm(0, 1)
    scene.obey(scene.see(), but=(ev.Load,))
    effects = scene.give(ev.Loaded(parameters(0), "nobody has it"))
    assert brief(effects, ev.Load, ev.TakeSnapshot) == ["TakeSnapshot"]  # what it holds is not known any more
    effects = scene.give(ev.SnapshotTaken(sha256(b"mine")))
    assert brief(effects + scene.tick(RETRY - 0.1), ev.Load) == []
    assert brief(scene.tick(0.1), ev.Load) == ["Load 0"]


def test_parameters_that_were_obtained_do_not_delay_others_that_are_wanted_next() -> None:
    scene = warm(0, 2)
    effects = scene.obey(scene.see(), but=(WarmupWitness,))
    assert brief(effects, ev.Load) == ["Load 0"]
    scene.ask(2, Withdraw())
    scene.ask(1, WarmupWitness(0, 1, parameters(1)))
    assert brief(scene.see(), ev.Load) == ["Load 1"]


def test_who_is_no_client_has_no_part_in_a_warm_up() -> None:
    scene = Scene(3, me=3, init_min_clients=3)
    scene.nodes = 3
    scene.warm()
    assert not of(scene.see(), (ev.TakeSnapshot, WarmupWitness))  # type: ignore[arg-type]


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


def restarted(scene: Scene, **options: Any) -> Scene:
    """The core's node starts again, with what is in its journal and with the run's parameters."""
    again = Scene(scene.nodes, me=scene.me, promises=scene.promises, **options)
    again.host, again.log, again.now, again.head = scene.host, scene.log, scene.now, 0
    return again


def test_a_node_that_comes_back_sends_the_same_bytes_again_and_does_not_train() -> None:
    scene = Scene(3)
    scene.begin()
    again = restarted(scene)
    effects = again.obey(again.see())
    assert ev.Broadcast(scene.promises[result_promise(0, 0)]) in effects
    assert not of(effects, (ev.Train, ev.Promise))  # type: ignore[arg-type]


def test_a_node_that_comes_back_to_another_batch_trains_it() -> None:
    scene = Scene(3)
    scene.begin()
    old = scene.promises[result_promise(0, 0)].message
    assert isinstance(old, Result)
    scene.promises[result_promise(0, 0)] = scene.seal(replace(old, start=old.start + 1))
    again = restarted(scene)
    assert brief(again.obey(again.see()), ev.Train, ev.Promise) == ["Train 0", "Promise"]


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


def test_a_witness_that_has_everything_reports_complete_during_training() -> None:
    scene = holding(1, 2)
    effects = scene.obey(scene.hear(scene.result(3)), but=(Witness,))
    assert [type(effect) for effect in effects if not isinstance(effect, ev.Fetch)] == [
        ev.Promise, ev.Broadcast, Witness,
    ]  # fmt: skip
    scene.ask(0, one(effects, Witness))
    assert [record.complete for record in scene.round.witnesses] == [True]


def test_its_list_is_of_all_that_it_verified() -> None:
    scene = holding(1, 2, 3)
    attest = scene.promises[attest_promise(0, 0)].message
    known = scene.log.rounds[0]
    commitments = [envelope.message.commitment(RUN, envelope.sender) for envelope in known.messages()[:4]]  # type: ignore[union-attr]
    assert attest == Attest(0, 0, b"".join(sorted(commitments)), 0, b"")


def test_a_payload_that_is_not_here_yet_is_waited_for_during_training() -> None:
    scene = holding(1, 2)
    assert not of(scene.hear(scene.result(3)), Witness)
    assert not of(scene.tick(1.0), Witness)
    payload = scene.result(3).message.payload  # type: ignore[union-attr]
    assert of(scene.give(ev.Fetched(payload)), Witness)


def test_in_the_witness_phase_it_reports_what_it_has() -> None:
    scene = holding(1)
    assert not of(scene.tick(), Witness)
    scene.pass_time(40.0)
    assert scene.state.phase is Phase.ROUND_WITNESS
    effects = scene.see()
    attest = one(sent(effects, Attest), Attest)
    assert len(attest.hashes()) == 2
    scene.ask(0, one(effects, Witness))
    assert [record.complete for record in scene.round.witnesses] == [False]


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
    assert of(effects, Witness)
    attest = one(sent(effects, Attest), Attest)
    assert len(attest.hashes()) == 3


def test_a_report_is_repeated_until_it_is_recorded_with_the_same_list() -> None:
    scene = holding(1, 2, 3)
    (first,) = of(scene.tick(RETRY), Witness)
    effects = scene.tick(2 * RETRY)
    assert one(effects, Witness) == first
    assert not of(effects, ev.Promise)
    assert ev.Broadcast(scene.promises[attest_promise(0, 0)]) in effects
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
    assert not of(effects, Witness)
    assert not sent(effects, Attest)


def test_with_overlap_a_round_s_results_are_listed_in_the_next_and_the_first_list_is_empty() -> None:
    scene = Scene(4, settings={"overlap": True})
    effects = scene.begin()
    assert of(effects, Witness)
    assert sent(effects, Attest) == [Attest(0, 0, b"", 0, b"")]
    for i in scene.peers[:2]:
        scene.report(i, scene.attest(i))
    assert scene.round.height == 1
    effects = scene.obey(scene.see())
    assert not of(effects, Witness)
    effects = scene.obey(scene.hear(*[scene.result(i, 0) for i in scene.peers]), but=(Witness,))
    assert of(effects, Witness)
    (attest,) = sent(effects, Attest)
    assert attest.height == 1
    assert len(attest.hashes()) == 4


def test_a_round_that_only_drains_has_an_empty_list_without_overlap() -> None:
    scene = Scene(4, total_steps=1)
    scene.begin()
    scene.play()
    assert scene.round.step == 0
    attest = scene.promises[attest_promise(0, 1)].message
    assert isinstance(attest, Attest)
    assert attest.hashes() == []


def test_a_list_names_the_newest_digest_until_there_is_another() -> None:
    scene = Scene(3)
    scene.begin()
    scene.play(6)
    attests = [scene.promises[attest_promise(0, height)].message for height in range(6)]
    named = [(attest.applied, attest.digest) for attest in attests if isinstance(attest, Attest)]
    none = (0, b"")
    assert named == [none, none, *[(2, parameters(2))] * 2, *[(4, parameters(4))] * 2]


# --- silent clients ---------------------------------------------------------------------------------------------------


def silent(*who: int, witnessed: bool = True) -> Scene:
    """Round 1 of 4 nodes; in round 0 nothing was heard of ``who``. The core has not seen it."""
    scene = Scene(4)
    scene.begin()
    for i in scene.peers:
        if i not in who:
            scene.obey(scene.hear(scene.result(i)), but=(Witness,))
    scene.pass_time(40.0)
    if witnessed:
        scene.obey(scene.see())
    for i in scene.peers:
        if i not in who:
            scene.report(i, scene.attest(i))
    scene.pass_time(5.0)
    assert (scene.round.height, scene.state.phase) == (1, Phase.ROUND_TRAIN)
    return scene


def test_who_gave_no_sign_of_life_is_named_once() -> None:
    scene = silent(2)
    effects = scene.see()
    assert of(effects, HealthCheck) == [HealthCheck(0, 1, (KEYS[2],))]
    assert not of(scene.tick(60.0), HealthCheck)
    assert scene.ask(0, one(effects, HealthCheck)) == 1


def test_in_each_epoch_it_is_looked_for_anew() -> None:
    scene = Scene(4, total_steps=4, epoch_time=50.0)
    scene.begin()
    scene.now += 50.0
    assert not of(scene.play(3), HealthCheck)
    scene.next_epoch()
    scene.obey(scene.see())
    for i in (1, 3):
        scene.obey(scene.hear(scene.result(i)))
    scene.pass_time(40.0)
    scene.obey(scene.see())
    for i in (1, 3):
        scene.report(i, scene.attest(i))
    scene.pass_time(5.0)
    assert of(scene.see(), HealthCheck) == [HealthCheck(1, 1, (KEYS[2],))]


def test_where_everybody_was_heard_nobody_is_named() -> None:
    assert not of(silent().see(), HealthCheck)


def test_who_left_already_is_not_named() -> None:
    scene = silent(2)
    scene.ask(2, Withdraw())
    assert not of(scene.see(), HealthCheck)


def test_who_did_not_witness_the_round_names_nobody() -> None:
    scene = silent(2, witnessed=False)
    assert 0 not in {record.proof.index for record in scene.state.rounds[0].witnesses}
    assert not of(scene.see(), HealthCheck)


def test_nobody_is_named_outside_of_training() -> None:
    scene = silent(2)
    assert not of(scene.give(ev.StateSeen(replace(scene.state, phase=Phase.ROUND_WITNESS))), HealthCheck)
    assert of(scene.see(), HealthCheck)


def test_a_node_does_not_name_itself() -> None:
    scene = Scene(4)
    scene.begin(but=(ev.Train,))
    scene.obey(scene.hear(*[scene.result(i) for i in scene.peers]), but=(Witness,))
    scene.pass_time(40.0)
    scene.obey(scene.see())
    for i in scene.peers:
        if scene.round.height == 0:
            scene.report(i, scene.attest(i))
    assert scene.round.height == 1
    assert scene.log.rounds[0].silent == {0}
    assert not of(scene.see(), HealthCheck)


# --- the end of an epoch ----------------------------------------------------------------------------------------------


def cooled(**config: Any) -> Scene:
    """An epoch of one step of 4 nodes has drained; the core has not seen that it is over."""
    scene = Scene(4, total_steps=1, **config)
    scene.begin()
    scene.play(2)
    scene.obey(scene.see())
    for i in scene.peers:
        if scene.state.phase is not Phase.COOLDOWN:
            scene.report(i, scene.attest(i))
    assert scene.state.phase is Phase.COOLDOWN
    return scene


def test_a_node_votes_for_the_parameters_that_it_holds_at_the_end() -> None:
    scene = cooled()
    effects = scene.see()
    assert brief(effects, ev.TakeSnapshot, Vote) == ["TakeSnapshot"]
    assert of(scene.give(ev.SnapshotTaken(parameters(1))), Vote) == [Vote(0, 1, parameters(1))]


def test_a_vote_is_repeated_until_it_is_there() -> None:
    scene = cooled()
    scene.obey(scene.see(), but=(Vote,))
    (vote,) = of(scene.tick(RETRY), Vote)
    scene.ask(0, vote)
    scene.see()
    assert not of(scene.tick(60.0), Vote)


def test_who_was_dropped_has_no_vote() -> None:
    scene = cooled()
    clients = tuple(replace(c, status=ClientStatus.DROPPED) if c.node == KEYS[0] else c for c in scene.state.clients)
    assert of(scene.give(ev.StateSeen(replace(scene.state, clients=clients))), ev.TakeSnapshot)
    assert not of(scene.give(ev.SnapshotTaken(parameters(1))), Vote)


def lagging() -> Scene:
    """An epoch of one step is over; the core has not got to applying it."""
    scene = Scene(4, total_steps=1)
    scene.begin()
    scene.obey(scene.hear(*[scene.result(i) for i in scene.peers]), but=(ev.Apply,))
    for _ in range(3):
        for i in scene.peers:
            if scene.state.phase is not Phase.COOLDOWN:
                envelope = scene.attest(i)
                scene.hear(envelope)
                scene.report(i, envelope)
                scene.obey(scene.see(), but=(ev.Apply,))
    assert scene.state.phase is Phase.COOLDOWN
    return scene


def test_who_has_not_applied_everything_does_not_vote() -> None:
    assert not of(lagging().tick(60.0), (Vote, ev.TakeSnapshot))  # type: ignore[arg-type]


# --- the end of the run -----------------------------------------------------------------------------------------------


def ended(digest: bytes = parameters(1)) -> Scene:
    """The run is finished; the core, which reported nothing, has not seen it."""
    scene = cooled()
    scene.obey(scene.see(), but=(Vote,))
    scene.vote(digest, 1, 2, 3)
    assert scene.state.phase is Phase.FINISHED
    assert scene.state.checkpoint.digest == digest
    return scene


def test_who_holds_the_last_parameters_leaves() -> None:
    scene = cooled()
    scene.obey(scene.see(), but=(Vote, ev.TakeSnapshot))
    scene.give(ev.SnapshotTaken(parameters(1)))
    scene.vote(parameters(1), 1, 2, 3)
    assert of(scene.see(), Finished) == [Finished(Outcome.LAST_PARAMETERS, parameters(1))]
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
    while scene.state.phase is not Phase.COOLDOWN:
        for i in scene.peers:
            if scene.state.phase is not Phase.COOLDOWN:
                envelope = scene.attest(i)
                scene.hear(envelope)
                scene.report(i, envelope)
                scene.see()
    scene.vote(parameters(1), 1, 2, 3)
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
    assert scene.core._follower.repair.offers == []
    assert not scene.core._follower.repair.wanted


def test_messages_of_another_epoch_are_not_heard() -> None:
    scene = holding()
    assert scene.hear(seal(NODES[1], RUN, Ask(1, 0, 1))) == []
    assert scene.hear(seal(NODES[1], RUN, Ask(0, 0, 1)))


def test_before_anything_is_known_of_the_run_messages_are_not_heard() -> None:
    scene = Scene(3)
    for message in (Ask(0, 0, 1), Offer(0, 2, parameters(2)), Stuck(0, 1, 1), Attest(0, 0, b"", 0, b"")):
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

"""How a node keeps its parameters at the run's: deciding, applying, comparing, repairing, and where it begins."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from support.core import KEYS, NODES, RATES, RETRY, RUN, SIZE, Scene, brief, of, one, parameters, sent

from psyche_lightning.node import events as ev
from psyche_lightning.node.follower import HOPELESS_LOADS, LOOK_AHEAD
from psyche_lightning.node.notices import (
    DecidedWithoutLists,
    Notice,
    ParametersDiffer,
    ParametersNotObtained,
    RatesDiffer,
    ReplayDoesNotHelp,
    RoundNotApplicable,
    TakesSnapshot,
    TensorDiffered,
)
from psyche_lightning.protocol.messages import Ask, Attest, Envelope, Offer, Result, Stuck, seal
from psyche_lightning.protocol.open_ids import reopen
from psyche_lightning.protocol.requests import GetRounds, WarmupWitness, Withdraw, Witness
from psyche_lightning.protocol.state import Phase
from psyche_lightning.wire.canonical import sha256

DEADLINE = 40.0
"""Seconds of a round's longest training."""
WITHOUT = (ev.Train, ev.Apply)


def commitments(*envelopes: Envelope) -> list[bytes]:
    return sorted(one_.message.commitment(RUN, one_.sender) for one_ in envelopes if isinstance(one_.message, Result))


def witnessed(scene: Scene, *lists: Envelope, heard: bool = True) -> list[ev.Effect]:
    """Peers report these lists, of which the core hears; then the round is over. Returns what the core does."""
    effects = scene.hear(*lists) if heard else []
    height = scene.round.height
    for envelope in lists:
        scene.overhear(envelope)
        if scene.round.height == height:
            scene.report(KEYS.index(envelope.sender), envelope)
    if scene.round.height == height:
        scene.pass_time(DEADLINE)
        scene.pass_time(5.0)
    assert scene.round.height == height + 1
    return effects + scene.see()


def first_round(*trainers: int, payloads: bool = True, **options: Any) -> tuple[Scene, list[Envelope]]:
    """Round 0 of 4 nodes in which the core and these peers gave results, which the core has."""
    scene = Scene(4, **options)
    scene.begin()
    results = [scene.result(i) for i in (0, *trainers)]
    effects = scene.hear(*results[1:])
    if payloads:
        scene.obey(effects, but=(Witness, *WITHOUT))
    scene.now += 2 * RETRY  # the core's first patience with the silent is over
    return scene, results


# --- applying ---------------------------------------------------------------------------------------------------------


def test_the_agreed_results_are_applied_in_the_order_of_their_commitments() -> None:
    scene, results = first_round(1, 2, 3)
    apply = one(witnessed(scene, *[scene.attest(i) for i in scene.peers]), ev.Apply)
    by_commitment = {commitments(envelope)[0]: envelope.message for envelope in results}
    payloads = tuple(by_commitment[commitment].payload for commitment in sorted(by_commitment))  # type: ignore[union-attr]
    assert apply == ev.Apply(0, 0, payloads, RATES, digest_due=False, snapshot=False, prints=True, open_ids=())


def test_ids_of_results_that_are_not_agreed_stay_open() -> None:
    scene, results = first_round(1, 2, 3)
    lists = [scene.attest(i, commitments(*results[:2])) for i in scene.peers]
    apply = one(witnessed(scene, *lists), ev.Apply)
    assert len(apply.payloads) == 2
    lost = [interval for envelope in results[2:] for interval in envelope.message.batch]  # type: ignore[union-attr]
    assert apply.open_ids == reopen((), scene.log.rounds[0].round.step, lost)


def alone(steps: int, **settings: Any) -> list[ev.Effect]:
    """A run of one node from its beginning to its end, which nothing holds up."""
    scene = Scene(1, total_steps=steps, settings=settings)
    scene.warm()
    scene.head = 0
    effects = scene.obey(scene.see())
    assert scene.state.phase is Phase.FINISHED
    return effects


@pytest.mark.parametrize(
    ("nodes", "height", "due", "prints"),
    [
        pytest.param(4, 0, False, True, id="no digest is due after the first round"),
        pytest.param(4, 1, True, True, id="one is due after the second"),
        pytest.param(4, 3, True, True, id="and after the fourth"),
        pytest.param(1, 1, True, False, id="who is alone compares nothing"),
    ],
)
def test_when_a_digest_is_due(nodes: int, height: int, due: bool, prints: bool) -> None:
    scene = Scene(nodes)
    effects = alone(4) if nodes == 1 else scene.begin() + scene.play(height + 1)
    (apply,) = [apply for apply in of(effects, ev.Apply) if apply.height == height]
    assert (apply.digest_due, apply.prints, apply.snapshot) == (due, prints, False)


def test_a_payload_that_is_not_here_is_waited_for() -> None:
    scene, results = first_round(1, 2, 3, payloads=False)
    assert not of(witnessed(scene, *[scene.attest(i) for i in scene.peers]), ev.Apply)
    payloads = [envelope.message.payload for envelope in results[1:]]  # type: ignore[union-attr]
    assert [brief(scene.give(ev.Fetched(payload)), ev.Apply) for payload in payloads] == [[], [], ["Apply 0"]]


def test_one_round_is_applied_at_a_time() -> None:
    scene = Scene(4)
    scene.ready()
    scene.play_alone(3)
    effects = scene.obey(scene.see(), but=WITHOUT) + scene.listen(0, 1, 2)
    assert brief(effects, *WITHOUT) == ["Apply 0"]
    other = ev.Applied(0, 1)
    assert brief(scene.give(other), *WITHOUT) == []  # not what is under way
    assert brief(scene.give(replace(other, epoch=1, height=0)), *WITHOUT) == []
    assert brief(scene.obey(scene.give(ev.Applied(0, 0)), but=WITHOUT), *WITHOUT) == ["Apply 1"]


def test_a_round_in_which_nothing_is_agreed_needs_no_applying_unless_a_digest_is_due() -> None:
    scene = Scene(4)
    scene.begin()
    found = []
    for _ in range(3):
        scene.now += 1.0
        effects = witnessed(scene, *[scene.attest(i, []) for i in scene.peers])
        found.append(brief(scene.obey(effects), ev.Apply, ev.Train))
    assert found == [["Train 1"], ["Apply 1", "Train 2"], ["Train 3"]]


def test_the_payloads_of_rounds_to_come_are_fetched_before_their_turn_but_not_of_all() -> None:
    scene = Scene(4)
    scene.ready()
    rounds = LOOK_AHEAD + 3
    scene.play_alone(rounds)
    scene.obey(scene.see(), but=(ev.Fetch, *WITHOUT))
    effects = []
    for height in range(rounds):
        others = scene.log.rounds[height].messages()
        effects += scene.obey(scene.hear(*others), but=(ev.Fetch, *WITHOUT))
    wanted = {
        entry.result.payload: height for height in range(rounds) for entry in scene.log.rounds[height].entries.values()
    }
    heights = {wanted[fetch.payload] for fetch in of(effects, ev.Fetch)}
    assert heights == set(range(LOOK_AHEAD))


def test_another_learning_rate_than_the_agreed_one_is_told() -> None:
    scene = Scene(4)
    (train,) = of(scene.begin(but=(ev.Train,)), ev.Train)
    scene.obey(scene.give(scene.trained(train, lrs=(9,))))
    scene.obey(scene.hear(*[scene.result(i) for i in scene.peers]), but=WITHOUT)
    effects = witnessed(scene, *[scene.attest(i) for i in scene.peers])
    assert of(effects, RatesDiffer) == [RatesDiffer()]
    assert one(effects, ev.Apply).lrs == RATES


def test_the_agreed_learning_rate_is_not_told() -> None:
    scene, _ = first_round(1, 2, 3)
    assert not of(witnessed(scene, *[scene.attest(i) for i in scene.peers]), Notice)


# --- deciding ---------------------------------------------------------------------------------------------------------


def test_a_list_that_did_not_arrive_is_asked_for_from_its_witness() -> None:
    scene, _ = first_round(1, 2, 3)
    lists = [scene.attest(i) for i in scene.peers]
    scene.hear(lists[0])
    effects = witnessed(scene, *lists, heard=False)
    assert brief(effects, ev.Apply, ev.SendTo) == ["Ask to 2", "Ask to 3"]
    assert sent(effects, Ask) == [Ask(0, 0, 1), Ask(0, 0, 1)]
    assert brief(scene.hear(lists[1]), ev.Apply) == []
    assert brief(scene.hear(lists[2]), ev.Apply) == ["Apply 0"]


def test_the_list_of_a_witness_that_left_is_asked_for_from_everybody() -> None:
    scene, _ = first_round(1, 2, 3)
    lists = [scene.attest(i) for i in scene.peers]
    scene.hear(*lists[:2])
    witnessed(scene, *lists, heard=False)
    scene.ask(3, Withdraw())
    assert brief(scene.see(), ev.Apply, ev.SendTo, ev.Broadcast) == ["Ask to all"]


def test_a_list_that_cannot_change_the_outcome_is_not_waited_for() -> None:
    scene, _ = first_round(1, 2, 3)
    scene.obey(scene.tick(RETRY))  # the core reports, too
    lists = [scene.attest(i) for i in (1, 2)]
    assert brief(witnessed(scene, *lists), ev.Apply, ev.SendTo) == ["Apply 0"]


def test_an_agreed_result_that_is_unknown_here_is_asked_for() -> None:
    scene, _ = first_round(1, 2)
    scene.overhear(scene.result(3))
    effects = witnessed(scene, *[scene.attest(i) for i in scene.peers])
    assert sent(effects, Ask) == [Ask(0, 0, 1)]
    assert not of(effects, ev.Apply)
    assert brief(scene.obey(scene.hear(scene.result(3, 0)), but=WITHOUT), ev.Apply) == ["Apply 0"]


def stalled(*, left: bool = True) -> Scene:
    """Round 0 is over; a witness whose list decides has left, and nobody has it."""
    scene, _ = first_round(1, 2, 3)
    lists = [scene.attest(i) for i in scene.peers]
    scene.hear(*lists[:2])
    scene.obey(witnessed(scene, *lists, heard=False), but=WITHOUT)
    if left:
        scene.ask(3, Withdraw())
    scene.obey(scene.see(), but=WITHOUT)
    return scene


def asking(scene: Scene, seconds: float) -> list[ev.Effect]:
    """Time passes, in steps in which what is due is done."""
    effects = []
    for _ in range(round(seconds)):
        effects += scene.tick(1.0)
    return effects


def test_a_list_nobody_has_counts_as_absent_after_half_of_a_round_s_longest_time() -> None:
    scene = stalled()
    assert not of(asking(scene, DEADLINE / 2), ev.Apply)
    effects = asking(scene, 2)
    assert of(effects, DecidedWithoutLists) == [DecidedWithoutLists(0, (KEYS[3],))]
    assert brief(effects, *WITHOUT) == ["Train 1"]  # two lists are no quorum, so nothing is agreed


def test_the_list_of_a_witness_that_is_there_never_counts_as_absent() -> None:
    scene = stalled(left=False)
    assert not of(asking(scene, DEADLINE), (ev.Apply, DecidedWithoutLists))  # type: ignore[arg-type]


def test_a_node_that_is_no_member_itself_decides_nothing_without_a_list() -> None:
    scene = stalled()
    scene.ask(0, Withdraw())
    scene.see()
    assert not of(asking(scene, DEADLINE), DecidedWithoutLists)


def test_a_list_counts_as_absent_only_after_everybody_was_asked_often_enough() -> None:
    scene = stalled()
    scene.tick(DEADLINE)  # all are asked the second time
    assert not of(scene.tick(0.5), DecidedWithoutLists)
    scene.tick(15.0)
    assert of(scene.tick(0.5), DecidedWithoutLists)


def test_rounds_behind_an_undecided_one_are_asked_for_together_in_a_replay() -> None:
    scene = Scene(4)
    scene.ready()
    scene.play_alone(4)
    effects = scene.obey(scene.see(), but=WITHOUT)
    asked = {ask.height for ask in sent(effects, Ask)}
    assert asked >= {0, 1, 2}
    assert 4 not in asked


# --- rounds that were not seen ----------------------------------------------------------------------------------------


def missed(rounds: int = 6) -> Scene:
    """The core holds the epoch's parameters and sees a state that has not all of its rounds any more."""
    scene = Scene(4)
    scene.begin(but=(ev.Train,))
    scene.play_alone(rounds)
    return scene


def test_rounds_that_were_not_seen_are_asked_for() -> None:
    scene = missed()
    effects = scene.see()
    assert of(effects, GetRounds) == [GetRounds(0, 0)]
    assert not of(scene.tick(RETRY - 0.1), GetRounds)
    assert of(scene.tick(0.1), GetRounds) == [GetRounds(0, 0)]
    answer = scene.ask(0, GetRounds(0, 0))
    scene.obey(scene.give(ev.RoundsSeen(0, 0, answer)), but=WITHOUT)
    assert brief(scene.listen(*range(6)), ev.Apply) == ["Apply 0"]
    assert not of(scene.tick(60.0), GetRounds)


def test_an_answer_for_another_epoch_is_not_heard() -> None:
    scene = missed()
    scene.see()
    answer = scene.ask(0, GetRounds(0, 0))
    scene.give(ev.RoundsSeen(1, 0, answer))
    assert of(scene.tick(RETRY), GetRounds)


def test_the_newest_round_of_an_answer_may_get_more_records() -> None:
    scene, _ = first_round(1, 2, 3)
    early = scene.ask(0, GetRounds(0, 0))
    assert brief(scene.give(ev.RoundsSeen(0, 0, early)), ev.Apply, ev.Train) == []
    assert brief(witnessed(scene, *[scene.attest(i) for i in scene.peers]), ev.Apply) == ["Apply 0"]


# --- comparing --------------------------------------------------------------------------------------------------------


def test_rounds_are_written_down_when_a_quorum_holds_the_same_parameters() -> None:
    scene = Scene(4)
    scene.begin()
    scene.play(2)
    assert scene.written == []
    scene.play(1, digests=False)
    assert scene.written == []
    scene.play(1)
    assert [record.round.height for record in scene.written] == [0, 1]
    assert all(len(record.results) == 4 and not record.ended for record in scene.written)
    scene.play(2)
    assert [record.round.height for record in scene.written] == [0, 1, 2, 3]


def test_two_confirmed_snapshots_let_the_rounds_before_the_first_go() -> None:
    scene = Scene(4, settings={"keep_bytes": 0})
    scene.begin()
    scene.play(4)
    assert scene.kept is None
    scene.play(1)  # those after two and four rounds are confirmed
    assert scene.kept is not None
    assert set(scene.kept.snapshots) == {parameters(0), parameters(2), parameters(4)}
    kept = {entry.result.payload for height in (2, 3, 4) for entry in scene.log.rounds[height].entries.values()}
    gone = {entry.result.payload for height in (0, 1) for entry in scene.log.rounds[height].entries.values()}
    assert kept <= set(scene.kept.payloads)
    assert not gone & set(scene.kept.payloads)
    assert {key.rpartition("/")[2] for key in scene.kept.promises} == {"2", "3", "4"}


@pytest.mark.parametrize(
    ("keep_bytes", "snapshots"),
    [
        pytest.param(1 << 30, [], id="as long as few bytes are kept, none is taken"),
        pytest.param(0, [1, 3, 5], id="with each digest, where nothing is to be kept"),
        pytest.param(8 * SIZE - 1, [1, 3, 5], id="after more bytes than may be kept"),
        pytest.param(8 * SIZE, [3], id="as many as may be kept are not more; a new count begins"),
    ],
)
def test_a_snapshot_is_taken_when_too_many_bytes_are_kept(keep_bytes: int, snapshots: list[int]) -> None:
    scene = Scene(4, settings={"keep_bytes": keep_bytes})
    scene.begin()
    effects = scene.play(6)
    assert [apply.height for apply in of(effects, ev.Apply) if apply.snapshot] == snapshots
    offers = [Offer(0, height + 1, parameters(height + 1)) for height in snapshots]
    assert sent(effects, Offer) == offers


def test_who_is_alone_takes_no_snapshot() -> None:
    applies = of(alone(6, keep_bytes=0), ev.Apply)
    assert len(applies) > 4
    assert not any(apply.snapshot for apply in applies)


def differing() -> tuple[Scene, list[ev.Effect]]:
    """After two rounds the core's parameters are not the quorum's. Returns what it does when it finds out."""
    scene = Scene(4)
    scene.begin()
    scene.head = None  # a bit flips
    effects = scene.play(2)
    assert not of(effects, ParametersDiffer)
    effects = scene.see()
    lists = [scene.attest(i, [], digest=(2, parameters(2))) for i in (1, 2, 3)]
    for envelope in lists[:2]:
        effects += scene.hear(envelope)
    assert not of(effects, ParametersDiffer)  # two are no quorum of four
    return scene, scene.hear(lists[2])


def test_parameters_that_differ_from_a_quorum_s_are_replayed_from_the_last_that_are_right() -> None:
    scene, effects = differing()
    assert of(effects, Notice) == [ParametersDiffer(1, 0), TakesSnapshot(parameters(0), 0)]
    assert brief(effects, ev.Load) == ["Load 0"]
    replayed = scene.obey(effects, but=(ev.Train,))
    assert brief(replayed, ev.Apply) == ["Apply 0", "Apply 1"]
    assert of(replayed, TensorDiffered) == [TensorDiffered("a", 0)]
    assert of(replayed, ev.WriteDown)


def test_what_was_under_way_before_a_replay_does_not_count() -> None:
    scene = Scene(4)
    scene.begin()
    scene.head = None
    scene.play(2)
    scene.obey(scene.see())
    scene.obey(scene.hear(*[scene.result(i) for i in scene.peers]), but=WITHOUT)
    effects = witnessed(scene, *[scene.attest(i, digest=(0, b"")) for i in scene.peers])
    (apply,) = of(effects, ev.Apply)
    assert apply.height == 2
    found = scene.hear(*[scene.attest(i, [], digest=(2, parameters(2))) for i in scene.peers])
    assert of(found, ParametersDiffer)
    assert brief(scene.tick(RETRY), ev.Load) == ["Load 0"]
    assert brief(scene.give(scene.applied(apply)), *WITHOUT) == []
    scene.head = 0
    assert brief(scene.give(ev.Loaded(parameters(0))), ev.Apply) == ["Apply 0"]


def test_where_a_replay_does_not_help_a_peer_s_are_taken() -> None:
    scene, effects = differing()
    scene.obey(effects, but=(ev.Apply, ev.Load))
    scene.give(ev.Loaded(parameters(0)))
    scene.give(ev.Applied(0, 0, b"", b"x" * 16))
    found = scene.give(ev.Applied(0, 1, sha256(b"still others"), b"x" * 16))
    assert of(found, ReplayDoesNotHelp) == [ReplayDoesNotHelp(1)]
    assert of(found, ev.Diagnose) == [
        ev.Diagnose(1, sha256(b"still others"), parameters(2), (KEYS[1], KEYS[2], KEYS[3]))
    ]
    assert sent(found, Stuck) == [Stuck(0, 1, 1)]
    assert not of(found, ev.Load)
    taken = scene.hear(seal(NODES[2], RUN, Offer(0, 2, parameters(2))))
    taken += scene.tick(RETRY)
    assert brief(taken, ev.Load) == ["Load 2"]


def test_who_decided_without_a_list_does_not_replay_as_that_would_be_decided_alike() -> None:
    scene = stalled()
    effects = asking(scene, DEADLINE / 2 + 2)
    assert of(effects, DecidedWithoutLists)
    scene.obey(effects)
    scene.play(1)
    found = scene.hear(*[scene.attest(i, [], digest=(2, sha256(b"others"))) for i in (1, 2)])
    assert of(found, ReplayDoesNotHelp)
    assert not of(found, ParametersDiffer)


# --- what is not to be had --------------------------------------------------------------------------------------------


def stuck() -> Scene:
    """Round 0 is agreed, but a payload of it is not to be had."""
    scene, _ = first_round(1, 2, 3, payloads=False)
    witnessed(scene, *[scene.attest(i) for i in scene.peers])
    return scene


def test_a_round_that_cannot_be_applied_for_a_whole_deadline_makes_a_node_ask_for_later_parameters() -> None:
    scene = stuck()
    effects = asking(scene, DEADLINE)
    assert not of(effects, RoundNotApplicable)
    effects = asking(scene, 1)
    assert [notice.round for notice in of(effects, RoundNotApplicable)] == [0]
    effects += asking(scene, RETRY)
    assert sent(effects, Stuck)[0] == Stuck(0, 0, 1)


def test_who_is_stuck_does_not_witness() -> None:
    scene = stuck()
    asking(scene, DEADLINE + 1)
    effects = scene.obey(scene.hear(*[scene.result(i) for i in scene.peers], scene.result(0)), but=WITHOUT)
    scene.pass_time(DEADLINE)
    assert scene.state.phase is Phase.ROUND_WITNESS
    assert not sent(effects + scene.see(), Attest)


def test_who_is_stuck_takes_what_a_peer_offers_once_lists_prove_it() -> None:
    scene = stuck()
    asking(scene, DEADLINE + 1)
    effects = scene.hear(seal(NODES[1], RUN, Offer(0, 2, parameters(2)))) + scene.tick(RETRY)
    assert not of(effects, ev.Load)
    scene.play_alone(2)
    effects = scene.see() + scene.listen(1, 2, but=(ev.Load,))
    assert of(effects, ev.Load) == [ev.Load(parameters(2), (KEYS[1], KEYS[2], KEYS[3]))]
    assert TakesSnapshot(parameters(2), 2) in effects
    scene.head = 2
    effects = scene.obey(scene.give(ev.Loaded(parameters(2))), but=WITHOUT)
    assert brief(effects, *WITHOUT) == ["Apply 2"]


def test_the_clock_of_a_round_that_cannot_be_applied_begins_when_it_is_the_next() -> None:
    scene, _ = first_round(1, 2, 3)
    assert not of(asking(scene, DEADLINE + 1), RoundNotApplicable)  # it is not over yet


# --- where to begin ---------------------------------------------------------------------------------------------------


def late(rounds: int, **settings: Any) -> Scene:
    """A node of an epoch that is under way comes back with other parameters than the run's."""
    before = Scene(4, settings=settings)
    before.ready()
    before.play_alone(rounds)
    scene = Scene(4, settings=settings, promises={})
    scene.host, scene.log, scene.now = before.host, before.log, before.now
    return scene


def test_who_comes_back_early_takes_the_parameters_with_which_the_epoch_began() -> None:
    effects = late(2).see()
    assert of(effects, TakesSnapshot) == [TakesSnapshot(parameters(0), 0)]
    assert brief(effects, ev.Load) == ["Load 0"]


def test_who_comes_back_later_first_asks_what_peers_keep() -> None:
    scene = late(3)
    effects = scene.see()
    assert Ask(0, 3, 1) in sent(effects, Ask)
    assert not of(effects + scene.tick(RETRY - 0.1), ev.Load)
    assert brief(scene.tick(0.1), ev.Load) == ["Load 0"]


def test_an_offer_that_lists_prove_is_taken_before_the_start_of_the_epoch() -> None:
    scene = late(4)
    scene.see()
    scene.listen(3, 4)
    scene.hear(seal(NODES[1], RUN, Offer(0, 2, parameters(2))))
    effects = scene.tick(RETRY)
    assert of(effects, TakesSnapshot) == [TakesSnapshot(parameters(2), 2)]
    assert brief(effects, ev.Load) == ["Load 2"]


def test_lists_that_may_prove_an_offer_are_asked_for() -> None:
    scene = late(4)
    scene.see()
    effects = scene.hear(seal(NODES[1], RUN, Offer(0, 3, parameters(3)))) + scene.tick(RETRY)
    assert 3 in {ask.height for ask in sent(effects, Ask)}
    effects = scene.hear(seal(NODES[1], RUN, Offer(0, 1, parameters(1)))) + scene.tick(RETRY)
    assert GetRounds(0, 1) in of(effects, GetRounds) or 1 in {ask.height for ask in sent(effects, Ask)}


def test_the_round_in_which_an_offer_is_proven_is_asked_for_where_it_is_unknown() -> None:
    scene = late(8)
    scene.see()
    effects = scene.hear(seal(NODES[1], RUN, Offer(0, 3, parameters(3)))) + scene.tick(RETRY)
    assert GetRounds(0, 3) in of(effects, GetRounds)


def test_where_parameters_are_not_to_be_had_it_is_said_and_tried_again_ever_more_rarely() -> None:
    scene = late(2)
    (load,) = of(scene.see(), ev.Load)
    times = []
    for second in range(24):
        effects = scene.give(ev.Loaded(load.digest, "nobody has it"))
        if second == 0:
            assert of(effects, ParametersNotObtained) == [ParametersNotObtained(load.digest, "nobody has it")]
        times += [second] * bool(of(scene.tick(1.0), ev.Load))
    assert times == [1, 5, 13]


def test_after_some_failures_peers_are_asked_for_newer_parameters() -> None:
    scene = late(2)
    (load,) = of(scene.see(), ev.Load)
    loads, told = 1, []
    while not told:
        told = sent(scene.give(ev.Loaded(load.digest, "nobody has it")), Stuck)
        loads += not told and bool(of(scene.tick(15.0), ev.Load))
        assert loads < 10
    assert loads == HOPELESS_LOADS + 1
    assert told == [Stuck(0, 0, 1)]


def test_an_answer_to_another_load_does_not_count() -> None:
    scene = late(2)
    scene.see()
    effects = scene.give(ev.Loaded(sha256(b"others")))
    effects += scene.obey(scene.tick(1.0), but=WITHOUT) + scene.listen(0, 1, 2)
    assert not of(effects, ev.Apply)


def test_who_holds_what_the_epoch_begins_with_takes_nothing() -> None:
    scene = Scene(4)
    scene.ready()
    assert not of(scene.see(), ev.Load)


def test_what_is_loaded_as_the_epoch_begins_is_where_a_node_begins() -> None:
    scene = Scene(4, me=1)
    scene.warm()
    scene.ask(0, WarmupWitness(0, 0, parameters(0)))
    effects = scene.obey(scene.see(), but=(ev.Load,))
    assert brief(effects, ev.Load) == ["Load 0"]
    scene.pass_time(20.0)  # the warm-up is over before the parameters are here
    assert scene.state.phase is Phase.ROUND_TRAIN
    assert not of(scene.see(), ev.Load)
    scene.head = 0
    assert brief(scene.give(ev.Loaded(parameters(0))), ev.Train) == ["Train 0"]


# --- the end of an epoch ----------------------------------------------------------------------------------------------


def over(**settings: Any) -> Scene:
    """An epoch of one step is over, and the core has voted."""
    scene = Scene(4, total_steps=1, settings=settings)
    scene.begin()
    scene.play(3)
    assert scene.state.phase is Phase.COOLDOWN
    scene.obey(scene.see())
    return scene


@pytest.mark.parametrize("overlap", [False, True])
def test_the_last_rounds_are_written_down_when_their_parameters_are_agreed(overlap: bool) -> None:
    scene = over(overlap=overlap)
    before = len(scene.written)
    scene.obey(scene.tick(1.0))
    assert len(scene.written) == before
    agreed = scene.core.holding
    assert agreed
    scene.vote(agreed, 1, 2)
    scene.obey(scene.see())
    assert [record.round.height for record in scene.written] == [0, 1, 2]
    assert [record.ended for record in scene.written] == [b"", b"", agreed]


def test_rounds_that_led_to_other_parameters_than_agreed_are_not_written_down() -> None:
    scene = over()
    before = len(scene.written)
    scene.vote(sha256(b"others"), 1, 2, 3)
    scene.obey(scene.see(), but=(ev.Load,))
    assert len(scene.written) == before


def test_with_overlap_a_last_round_which_nobody_witnesses_any_more_counts_as_empty() -> None:
    scene = over(overlap=True)
    assert scene.round.height == 2  # its results would be witnessed in round 3, which never comes
    assert scene.log.decided == 2
    assert scene.core.holding is not None


def test_a_new_epoch_needs_the_promises_and_parameters_of_no_other() -> None:
    scene = Scene(4, total_steps=3, epoch_time=50.0)
    scene.begin()
    scene.now += 50.0
    scene.play(3)
    agreed = scene.next_epoch()
    effects = scene.see()
    assert of(effects, ev.Keep) == [ev.Keep((agreed,), (), ())]
    assert brief(effects, ev.Load, ev.Train) == ["Train 0"]


def test_a_new_epoch_has_other_offers_and_tells_again_what_it_told() -> None:
    scene = Scene(4, total_steps=3, epoch_time=50.0, settings={"keep_bytes": 0})
    train = one(scene.begin(but=(ev.Train,)), ev.Train)
    scene.obey(scene.give(scene.trained(train, lrs=(9,))))
    scene.now += 50.0
    effects = scene.play(3)
    assert of(effects, RatesDiffer)
    assert sent(effects, Offer)
    scene.next_epoch()
    (train,) = of(scene.obey(scene.see(), but=(ev.Train,)), ev.Train)
    assert sent(scene.hear(seal(NODES[1], RUN, Ask(1, 0, 1))), Offer) == []
    scene.obey(scene.give(scene.trained(train, lrs=(9,))))
    scene.obey(scene.hear(*[scene.result(i) for i in scene.peers]), but=WITHOUT)
    assert of(witnessed(scene, *[scene.attest(i) for i in scene.peers]), RatesDiffer)


def test_lists_that_come_when_the_next_epoch_is_formed_start_no_repair() -> None:
    scene = Scene(4, total_steps=3, epoch_time=50.0)
    scene.begin()
    scene.head = None
    scene.now += 50.0
    scene.play(3, digests=False)
    scene.vote(parameters(3), 1, 2, 3)
    lists = [seal(NODES[i], RUN, Attest(0, 2, b"", 2, parameters(2))) for i in (1, 2, 3)]
    scene.join(0, 1, 2, 3)
    scene.pass_time(3.0)
    assert scene.state.phase is Phase.WARMUP
    scene.obey(scene.see())
    assert not of(scene.hear(*lists), Notice)


def test_what_was_under_way_in_an_epoch_is_left_when_the_next_is_formed() -> None:
    scene = Scene(4, total_steps=3, epoch_time=50.0)
    scene.begin()
    scene.obey(scene.hear(*[scene.result(i) for i in scene.peers]), but=WITHOUT)
    scene.now += 50.0
    applies = []
    while scene.state.phase is not Phase.COOLDOWN:
        for i in scene.peers:
            if scene.state.phase in (Phase.ROUND_TRAIN, Phase.ROUND_WITNESS):
                envelope = scene.attest(i)
                scene.hear(envelope)
                scene.report(i, envelope)
        applies += of(scene.obey(scene.see(), but=WITHOUT), ev.Apply)
    assert [apply.height for apply in applies] == [0]
    scene.vote(parameters(3), 1, 2, 3)
    scene.join(0, 1, 2, 3)
    scene.pass_time(3.0)
    assert scene.state.phase is Phase.WARMUP
    scene.see()
    effects = scene.give(ev.Applied(0, 0))
    assert not of(effects, (ev.Apply, ev.Train))  # type: ignore[arg-type]
    assert brief(effects, ev.TakeSnapshot, ev.Load) == ["TakeSnapshot"]
    assert brief(scene.give(ev.SnapshotTaken(parameters(1))), ev.Load) == ["Load 3"]

"""How a node keeps its parameters at the run's: deciding, applying, comparing, repairing, and where it begins."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from support.core import KEYS, NODES, RATES, RETRY, RUN, SIZE, Scene, brief, commitments, of, one, parameters, sent

from psyche_lightning.node import events as ev
from psyche_lightning.node.follower import HOPELESS_LOADS, LOOK_AHEAD
from psyche_lightning.node.notices import (
    Notice,
    ParametersDiffer,
    ParametersNotObtained,
    RatesDiffer,
    ReplayDoesNotHelp,
    RoundNotApplicable,
    TakesSnapshot,
    TensorDiffered,
)
from psyche_lightning.node.rounds import MAX_ENTRIES_PER_BATCH
from psyche_lightning.protocol.messages import Ask, Envelope, Offer, Stuck, seal
from psyche_lightning.protocol.open_ids import reopen
from psyche_lightning.protocol.requests import Accuse, GetRounds, WarmupWitness, Withdraw, Witness
from psyche_lightning.protocol.state import Phase
from psyche_lightning.wire.canonical import sha256

DEADLINE = 40.0
"""Seconds of a round's longest training."""
WITHOUT = (ev.Train, ev.Apply)


def witnessed(scene: Scene, hashes: list[bytes] | None = None) -> list[ev.Effect]:
    """The peers report this, or everything that was announced, and the round is over. Returns what the core does."""
    scene.end_round(hashes=hashes)
    return scene.see()


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
    apply = one(witnessed(scene), ev.Apply)
    by_commitment = {commitments(envelope)[0]: envelope.message for envelope in results}
    payloads = tuple(by_commitment[commitment].payload for commitment in sorted(by_commitment))  # type: ignore[union-attr]
    assert apply == ev.Apply(0, 0, 1, payloads, RATES, prints=True, loss=apply.loss)


def test_ids_of_results_that_are_not_agreed_stay_open() -> None:
    scene, results = first_round(1, 2, 3)
    assert not of(witnessed(scene, commitments(*results[:2])), ev.Apply)
    apply = one(scene.hear(scene.attest(1, commitments(*results[:2]), 0)), ev.Apply)
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
    effects = alone(6) if nodes == 1 else scene.begin() + scene.play(height + 1)
    (apply,) = [apply for apply in of(effects, ev.Apply) if apply.height == height]
    assert (apply.digest_due, apply.prints, apply.snapshot) == (due, prints, False)


def test_a_payload_that_is_not_here_is_waited_for() -> None:
    scene, results = first_round(1, 2, 3, payloads=False)
    assert not of(witnessed(scene), ev.Apply)
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
        effects = witnessed(scene, [])
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
        effects += scene.listen(height, but=(ev.Fetch, *WITHOUT))
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
    effects = witnessed(scene)
    assert of(effects, RatesDiffer) == [RatesDiffer()]
    assert one(effects, ev.Apply).lrs == RATES


def test_the_agreed_learning_rate_is_not_told() -> None:
    scene, _ = first_round(1, 2, 3)
    assert not of(witnessed(scene), Notice)


# --- deciding ---------------------------------------------------------------------------------------------------------


def undecided() -> Scene:
    """Round 0 is over; its list has a result of node 3, of which the core has not heard."""
    scene, _ = first_round(1, 2)
    scene.overhear(scene.result(3))
    scene.end_round()
    return scene


def test_a_list_that_is_not_here_is_asked_for_from_who_reported_it_and_from_all_in_turn() -> None:
    scene = undecided()
    asked = brief(scene.see(), ev.Apply, ev.SendTo, ev.Broadcast)
    for _ in range(3):
        asked += brief(scene.give(ev.BuffersTaken(0, b"")), ev.SendTo, ev.Broadcast)  # not with each event
        scene.now += 15.0
        asked += brief(scene.give(ev.BuffersTaken(0, b"")), ev.SendTo, ev.Broadcast)
    assert asked == ["Ask to 1", "Ask to all", "Ask to 3", "Ask to all"]


def test_the_list_and_its_results_decide_whoever_sends_them() -> None:
    scene = undecided()
    scene.see()
    listed, result = scene.attest(2, None, 0), scene.result(3, 0)
    assert brief(scene.hear(listed), ev.Apply) == []
    assert brief(scene.obey(scene.hear(result), but=WITHOUT), ev.Apply) == ["Apply 0"]


def test_another_list_than_the_decided_one_decides_nothing() -> None:
    scene = undecided()
    scene.see()
    effects = scene.hear(scene.attest(1, commitments(scene.result(0, 0), scene.result(1, 0)), 0))
    assert not of(effects + asking(scene, DEADLINE), ev.Apply)


def test_what_was_decided_is_stored_before_it_is_applied() -> None:
    scene = undecided()
    scene.see()
    effects = scene.obey(scene.hear(scene.attest(1, None, 0), scene.result(3, 0)), but=WITHOUT)
    kinds = [type(effect) for effect in effects if isinstance(effect, (ev.Remember, ev.WriteDown, ev.Apply))]
    assert kinds == [ev.Remember, ev.WriteDown, ev.Apply]
    assert len(one(effects, ev.Remember).envelopes) == 4


def test_a_round_that_ended_without_a_decision_has_no_results() -> None:
    scene, results = first_round(1, 2, 3)
    for i in scene.peers:
        scene.report(i, commitments(*results[:i]))
    scene.pass_time(DEADLINE)
    scene.pass_time(5.0)
    assert scene.round.height == 1
    effects = scene.see()
    assert brief(effects, *WITHOUT) == ["Train 1"]
    lost = [interval for envelope in results for interval in envelope.message.batch]  # type: ignore[union-attr]
    assert scene.core.log is not None
    assert scene.core.log.open_at[1] == reopen((), 1, lost)


def asking(scene: Scene, seconds: float) -> list[ev.Effect]:
    """Time passes, in steps in which what is due is done."""
    effects = []
    for _ in range(round(seconds)):
        effects += scene.tick(1.0)
    return effects


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
    assert brief(witnessed(scene), ev.Apply) == ["Apply 0"]


# --- comparing --------------------------------------------------------------------------------------------------------


def test_rounds_are_written_down_once_when_they_are_decided() -> None:
    scene, effects = differing()
    assert [record.round.height for record in scene.written] == [0, 1]
    assert all(len(record.results) == 4 for record in scene.written)
    assert brief(scene.obey(effects, but=(ev.Train,)), ev.Apply) == ["Apply 0", "Apply 1"]  # again
    assert [record.round.height for record in scene.written] == [0, 1, 2]


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
    assert {key.split("/")[2] for key in scene.kept.promises} == {"2", "3", "4"}


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


def test_who_is_alone_takes_no_snapshot_but_the_last() -> None:
    applies = of(alone(6, keep_bytes=0), ev.Apply)
    assert len(applies) > 4
    assert [apply.height for apply in applies if apply.snapshot] == [5]


def differing() -> tuple[Scene, list[ev.Effect]]:
    """After two rounds the core's parameters are not those on record. Returns what it does when it finds out."""
    scene = Scene(4)
    scene.begin()
    scene.head = None  # a bit flips
    effects = scene.play(2)
    effects += scene.see()
    for i in (1, 2):
        scene.report(i, [], scene.named)
    effects += scene.see()
    assert not of(effects, ParametersDiffer)  # two are no quorum of four
    scene.report(3, [], scene.named)
    return scene, scene.see() + scene.tick(RETRY)  # it hears first what peers keep


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
    scene.obey(scene.hear(*[scene.result(i) for i in scene.peers]), but=(Witness, *WITHOUT))
    (apply,) = of(witnessed(scene), ev.Apply)
    assert apply.height == 2
    scene.end_round(hashes=[], digests=True)
    assert of(scene.see(), ParametersDiffer)
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


# --- what is not to be had --------------------------------------------------------------------------------------------


def stuck() -> Scene:
    """Round 0 is agreed, but a payload of it is not to be had."""
    scene, _ = first_round(1, 2, 3, payloads=False)
    witnessed(scene)
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
    assert not of(effects + scene.see(), Witness)


def test_who_is_stuck_takes_what_a_peer_offers_once_it_is_on_record() -> None:
    scene = stuck()
    asking(scene, DEADLINE + 1)
    effects = scene.hear(seal(NODES[1], RUN, Offer(0, 2, parameters(2)))) + scene.tick(RETRY)
    assert not of(effects, ev.Load)
    scene.play_alone(1)
    assert scene.round.height == 2
    scene.end_round(hashes=[], digests=True)
    effects = scene.see() + scene.listen(1, but=(ev.Load,)) + scene.tick(RETRY)
    assert of(effects, ev.Load) == [ev.Load(parameters(2), (KEYS[1], KEYS[2], KEYS[3]))]
    assert TakesSnapshot(parameters(2), 2) in effects
    scene.head = 2
    effects = scene.obey(scene.give(ev.Loaded(parameters(2))), but=(ev.Train,))
    assert brief(effects, ev.Train) == ["Train 3"]


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


def test_an_offer_that_is_on_record_is_taken_before_the_start_of_the_epoch() -> None:
    scene = late(4)
    assert scene.state.checkpoint.step == 2
    scene.see()
    scene.hear(seal(NODES[1], RUN, Offer(0, 2, parameters(2))), seal(NODES[2], RUN, Offer(0, 1, parameters(1))))
    effects = scene.tick(RETRY)
    assert of(effects, TakesSnapshot) == [TakesSnapshot(parameters(2), 2)]
    assert brief(effects, ev.Load) == ["Load 2"]


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
    for i in (0, 2, 3):
        scene.ask(i, WarmupWitness(0, i, parameters(0)))
    effects = scene.obey(scene.see(), but=(ev.Load,))
    assert brief(effects, ev.Load) == ["Load 0"]
    scene.pass_time(20.0)  # the warm-up is over before the parameters are here
    assert scene.state.phase is Phase.ROUND_TRAIN
    assert not of(scene.see(), ev.Load)
    scene.head = 0
    assert brief(scene.give(ev.Loaded(parameters(0))), ev.Train) == ["Train 0"]


def test_the_decided_one_of_many_results_is_taken_whatever_its_trainer_sent_before() -> None:
    """An equivocator fills what this node keeps of it, and shows all others one result."""
    scene, results = first_round(1, 2)
    decided = scene.result(3)
    many = [scene.result(3, nonce=nonce) for nonce in range(1, MAX_ENTRIES_PER_BATCH + 4)]
    scene.obey(scene.hear(*many), but=(Accuse, Witness, *WITHOUT))
    hashes = commitments(*results, decided)
    assert not of(witnessed(scene, hashes) + scene.hear(scene.attest(1, hashes, 0)), ev.Apply)
    apply = one(scene.obey(scene.hear(decided), but=WITHOUT), ev.Apply)
    assert decided.message.payload in apply.payloads  # type: ignore[union-attr]


# --- offers that nobody proves ----------------------------------------------------------------------------------------


def trying(*offers: Offer, head: int | None = 1, rounds: int = 4, **settings: Any) -> Scene:
    """A node that came back late takes an older offer, as nobody has the epoch's first parameters any more.

    Args:
        offers: what peers offer.
        head: training steps in the parameters that it gets for it.
        rounds: those that are over; of the second, the parameters are on record.
        settings: of the core.
    """
    scene = late(rounds)
    if scene.state.checkpoint.step < 2:
        for i in scene.peers:
            scene.report(i, [sha256(bytes([i]))], scene.named)  # the round is not decided
    scene.core._follower._settings = scene.settings = replace(scene.settings, **settings)
    effects = scene.obey(scene.see(), but=(ev.Train, ev.Load))
    effects += scene.hear(*[seal(NODES[1], RUN, offer) for offer in offers]) + scene.tick(RETRY)
    assert brief(effects, ev.Load) == ["Load 0"]
    effects = scene.give(ev.Loaded(parameters(0), "nobody has it")) + scene.tick(RETRY)
    (load,) = of(effects, ev.Load)
    assert load.digest == offers[-1].snapshot
    scene.head = head
    scene.obey(scene.give(ev.Loaded(load.digest, open_ids=scene.log.open_at[1])), but=WITHOUT)
    return scene


def test_an_older_offer_is_tried_until_the_replay_reaches_what_is_on_record() -> None:
    scene = trying(Offer(0, 1, parameters(1)))
    effects = scene.listen(1, 2, 3, 4)
    assert brief(effects, *WITHOUT) == ["Apply 1"]
    assert not scene.core._follower.sure
    assert scene.written == []  # other open ids may belong to these parameters
    effects = scene.obey(scene.give(scene.applied(one(effects, ev.Apply))))
    assert [record.round.height for record in scene.written] == [1, 2, 3]
    assert brief(effects, ev.Apply, ev.Train) == ["Apply 2", "Apply 3", "Train 4"]


def test_a_trial_ends_on_record_whatever_this_node_s_own_interval_of_digests_is() -> None:
    scene = trying(Offer(0, 1, parameters(1)), digest_every=3)
    (apply,) = of(scene.listen(1, 2, 3, 4), ev.Apply)
    assert apply.digest_due
    scene.obey(scene.give(scene.applied(apply)), but=WITHOUT)
    assert scene.core._follower.sure


def test_an_offer_whose_replay_does_not_reach_what_is_on_record_is_refused() -> None:
    forged = Offer(0, 1, sha256(b"forged"))
    scene = trying(forged, head=None)
    effects = scene.listen(1, 2, 3, 4, but=(ev.Load, ev.Train))
    assert brief(effects, ev.Apply) == ["Apply 1"]
    assert not of(effects, ParametersDiffer)  # they were never this node's
    loads = of(effects, ev.Load)
    for _ in range(3):
        loads += of(scene.give(ev.Loaded(loads[-1].digest, "nobody has it")) + scene.tick(15.0), ev.Load)
    assert [load.digest for load in loads] == [parameters(0)] * 4
    assert scene.written == []
    assert scene.core._follower.repair.trial is None


def test_who_tries_parameters_does_not_train_with_them() -> None:
    scene = trying(Offer(0, 1, parameters(1)), rounds=2)
    assert (scene.round.height, scene.state.checkpoint.step) == (2, 2)
    (apply,) = of(scene.listen(1), ev.Apply)
    scene.give(replace(scene.applied(apply), digest=b""))  # as if it took no digest
    assert scene.core._follower.next_apply == 2
    assert not of(scene.tick(), ev.Train)
    scene.core._follower.repair.trial = None
    assert brief(scene.tick(), ev.Train) == ["Train 2"]


def test_who_tries_parameters_neither_names_them_nor_goes_beyond_what_is_on_record() -> None:
    scene = trying(Offer(0, 1, parameters(1)))
    (apply,) = of(scene.listen(1, 2, 3, 4), ev.Apply)
    effects = scene.obey(scene.give(replace(scene.applied(apply), digest=b"")))
    follower = scene.core._follower
    assert (follower.next_apply, follower.sure) == (2, False)
    assert of(effects, ev.Fetch)
    assert not of(effects, WITHOUT)  # type: ignore[arg-type]
    follower.digests = {1: parameters(1)}
    assert follower.named(scene.state) == (0, b"")
    follower.repair.trial = None
    assert follower.named(scene.state) == (1, parameters(1))
    assert brief(scene.tick(), ev.Apply) == ["Apply 2"]


# --- the end of an epoch ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overlap", [False, True])
def test_the_rounds_of_an_epoch_are_written_down_to_the_last(overlap: bool) -> None:
    scene = Scene(4, total_steps=2, settings={"overlap": overlap})
    scene.begin()
    scene.play(8)
    assert scene.state.phase is Phase.FINISHED
    assert [record.round.step for record in scene.written][:2] == [1, 2]
    assert [len(record.results) for record in scene.written][:2] == [4, 4]


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
    assert of(witnessed(scene), RatesDiffer)


def test_who_has_not_applied_everything_takes_what_is_on_record_for_the_next_epoch() -> None:
    scene = Scene(4, total_steps=3, epoch_time=50.0)
    scene.begin()
    scene.hear(*[scene.result(i) for i in scene.peers])  # the payloads do not come
    scene.now += 50.0
    while scene.state.phase.active:
        scene.end_round(digests=True)
        scene.see()
    assert (scene.state.phase, scene.state.checkpoint.digest) == (Phase.WAITING_FOR_MEMBERS, parameters(1))
    scene.join(0, 1, 2, 3)
    scene.pass_time(3.0)
    assert scene.state.phase is Phase.WARMUP
    assert brief(scene.obey(scene.see(), but=(ev.Load, ev.Fetch)), ev.Apply, ev.Load) == ["Load 1"]


# --- an epoch whose last parameters nobody named ----------------------------------------------------------------------


def broken(rounds: int = 3, *, hears: bool = True, **settings: Any) -> Scene:
    """An epoch of 4 nodes lost two of them after some rounds, before its last parameters were named.

    Args:
        rounds: decided rounds.
        hears: whether the core took part.
        settings: of the core.
    """
    scene = Scene(4, settings=settings)
    scene.begin()
    if hears:
        scene.play(rounds)
    else:
        scene.play_alone(rounds)
    for i in (2, 3):
        scene.ask(i, Withdraw())
    assert (scene.state.phase, scene.state.epoch) == (Phase.WAITING_FOR_MEMBERS, 1)
    assert scene.state.step == rounds + 2  # the round that was under way counts, with nothing
    assert scene.state.checkpoint.step < rounds
    return scene


def formed(scene: Scene, *who: int) -> Scene:
    """The next epoch is formed of these nodes."""
    scene.host.update({"init_min_clients": len(who)}, scene.now) if scene.state.phase.halted else None
    scene.join(*who)
    scene.pass_time(3.0)
    assert scene.state.phase is Phase.WARMUP
    return scene


def test_its_members_apply_every_round_and_report_what_they_get() -> None:
    scene = broken()
    effects = scene.obey(scene.see())
    assert [(apply.height, apply.snapshot) for apply in of(effects, ev.Apply)] == [(3, True)]
    assert sent(effects, Offer) == [Offer(0, 4, parameters(4))]  # for who comes next
    formed(scene, 0, 1, 2, 3)
    effects = scene.obey(scene.see(), but=(WarmupWitness,))
    assert of(effects, WarmupWitness) == [WarmupWitness(1, 0, parameters(4))]


def test_the_next_epoch_begins_with_what_a_quorum_of_its_members_gets() -> None:
    scene = formed(broken(), 0, 1, 2, 3)
    scene.obey(scene.see())
    for i in (1, 2):
        scene.ask(i, WarmupWitness(1, i, parameters(4)))
    scene.pass_time(20.0)
    assert (scene.state.phase, scene.state.epoch_digest) == (Phase.ROUND_TRAIN, parameters(4))
    assert scene.state.step == 5


def test_the_results_of_who_missed_them_are_asked_for_and_replayed() -> None:
    scene = formed(broken(hears=False), 0, 1, 2, 3)
    effects = scene.obey(scene.see())
    assert {ask.height for ask in sent(effects, Ask)} == {0, 1}
    assert not of(effects, (ev.Apply, WarmupWitness))  # type: ignore[arg-type]
    effects = scene.listen(0, 1, 2, but=())
    assert brief(effects, ev.Apply, WarmupWitness) == [*[f"Apply {n}" for n in range(4)], "WarmupWitness"]
    assert one(effects, WarmupWitness).digest == parameters(4)


def test_a_newcomer_replays_it_from_its_beginning() -> None:
    before = broken()
    scene = Scene(5, me=4)
    scene.host, scene.log, scene.now = before.host, before.log, before.now
    formed(scene, 0, 1, 4, 2, 3)
    effects = scene.obey(scene.see()) + scene.obey(scene.tick(RETRY))
    assert of(effects, GetRounds) == []  # the coordinator's last rounds are all
    assert brief(effects, ev.Load) == ["Load 0"]
    effects = scene.listen(0, 1, 2, but=())
    assert one(effects, WarmupWitness).digest == parameters(4)


@pytest.mark.parametrize("genuine", [True, False])
def test_a_newcomer_tries_an_older_offer_and_reports_nothing_that_it_is_not_sure_of(genuine: bool) -> None:
    before = broken(5)
    assert before.state.checkpoint.step == 4
    scene = Scene(5, me=4)
    scene.host, scene.log, scene.now = before.host, before.log, before.now
    formed(scene, 0, 1, 4, 2, 3)
    scene.obey(scene.see(), but=(ev.Load,))
    offer = Offer(0, 2, parameters(2) if genuine else sha256(b"forged"))
    scene.hear(seal(NODES[1], RUN, offer))
    (load,) = of(scene.tick(RETRY), ev.Load)
    effects = scene.give(ev.Loaded(load.digest, "nobody has the epoch's beginning any more")) + scene.tick(RETRY)
    assert [load.digest for load in of(effects, ev.Load)] == [offer.snapshot]
    effects = scene.obey(effects) + scene.listen(2, 3, 4, but=(ev.Load,))
    if genuine:
        assert brief(effects, ev.Apply) == [f"Apply {height}" for height in (2, 3, 4, 5)]
        assert one(effects, WarmupWitness).digest == parameters(6)
    else:
        assert brief(effects, ev.Apply) == ["Apply 2", "Apply 3"]
        assert not of(effects + scene.tick(1.0), WarmupWitness)


@pytest.mark.parametrize("keep_bytes", [0, 1 << 30], ids=["from its own snapshot", "from the epoch's beginning"])
def test_a_node_that_starts_again_decides_and_replays_alone_from_what_it_stored(keep_bytes: int) -> None:
    before = broken(5, keep_bytes=keep_bytes)
    before.obey(before.see(), but=(ev.Apply,))  # all nodes lose power now
    scene = before.restarted(settings={"keep_bytes": keep_bytes})
    effects = scene.obey(scene.see(), but=(ev.SendTo, ev.Broadcast))
    for _ in range(4):
        effects += scene.obey(scene.tick(RETRY), but=(ev.SendTo, ev.Broadcast))
    first = 0 if keep_bytes else 4
    assert brief(effects, ev.Load) == [f"Load {first}"]
    assert brief(effects, ev.Apply) == [f"Apply {height}" for height in range(first, 6)]
    assert scene.core.holding == parameters(6)


def test_who_lacks_a_decided_list_after_a_restart_needs_its_peers() -> None:
    before = broken(5)
    kept = {key: stored for key, stored in before.remembered.items() if not key.startswith("list/0/2/")}
    scene = before.restarted(remembered=kept)
    effects = scene.obey(scene.see())
    for _ in range(4):
        effects += scene.obey(scene.tick(RETRY))
    assert brief(effects, ev.Apply) == ["Apply 0", "Apply 1"]
    assert 2 in {ask.height for ask in sent(effects, Ask)}

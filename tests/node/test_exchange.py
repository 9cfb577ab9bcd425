"""What a node tells its peers, asks them and fetches from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
from support.core import KEYS, NODES, RETRY, RUN, SIZE, STRANGER, Scene, commitments, of, one, parameters, sent

from psyche_lightning.node import events as ev
from psyche_lightning.node.agreement import AgreedSet, EpochLog
from psyche_lightning.node.exchange import EARLY_ROUNDS, Exchange, gone
from psyche_lightning.node.notices import MessageRefused, PayloadRefused, TwoResults
from psyche_lightning.node.outbox import Outbox
from psyche_lightning.node.rounds import MAX_ENTRIES_PER_BATCH, RoundLog
from psyche_lightning.node.witness import list_promise, offer_promise, result_promise
from psyche_lightning.protocol.merkle import EMPTY_ROOT, merkle_root
from psyche_lightning.protocol.messages import Ask, Attest, Buffers, Envelope, Offer, Result, Stuck, seal
from psyche_lightning.protocol.requests import Accuse, Withdraw
from psyche_lightning.protocol.state import WitnessProof, WitnessRecord
from psyche_lightning.wire.canonical import sha256


class Talk:
    """The exchange of node 0, in round 0 of an epoch of 4 nodes, that knows ``log``."""

    def __init__(
        self,
        *,
        promises: Mapping[str, Envelope] | None = None,
        remembered: Mapping[str, Sequence[Envelope]] | None = None,
        settings: Mapping[str, Any] | None = None,
        assigned: bool = True,
        lost: tuple[bytes, ...] = (),
        **config: Any,
    ) -> None:
        self.scene = Scene(4, settings=settings, **config)
        self.scene.begin(but=(ev.Train,))
        self.out = Outbox(RETRY, 15.0)
        self.exchange = Exchange(
            KEYS[0], self.scene.settings, self.scene.seal, promises or {}, remembered or {}, self.out, lost
        )
        self.exchange.meet(self.scene.state)
        self.out.take()
        self.log = EpochLog(0, parameters(0), 1, 3)
        self.open(assigned)

    def open(self, assigned: bool = True) -> RoundLog:
        """Open the newest round."""
        state, record = self.scene.state, self.scene.round
        opened = RoundLog.open(record, record.clients, state.config, 3, RUN, self.scene.settings.layout, 64)
        self.log.rounds[record.height] = opened
        if assigned:
            opened.assign(())
        return opened

    def hear(self, envelope: Envelope, head: int = 0) -> list[ev.Effect]:
        self.exchange.receive(envelope, self.log, head)
        return self.out.take()

    def later(self, seconds: float) -> None:
        self.out.now += seconds

    def entries(self, height: int = 0) -> list[int]:
        """The trainers whose results are filed."""
        return sorted(entry.trainer for entry in self.log.rounds[height].entries.values())


# --- peers ------------------------------------------------------------------------------------------------------------


def test_the_transport_is_told_of_the_other_clients_when_they_change() -> None:
    talk = Talk()
    talk.exchange.meet(talk.scene.state)
    assert talk.out.take() == []
    talk.scene.host.handle(KEYS[3], Withdraw(), talk.scene.now)
    gone_for_good = replace(talk.scene.state, clients=talk.scene.state.clients[:3])
    talk.exchange.meet(gone_for_good)
    assert one(talk.out.take(), ev.SetPeers).peers == ((KEYS[1], "at 1"), (KEYS[2], "at 2"))
    talk.exchange.meet(replace(gone_for_good, clients=()))  # between epochs: the old peers may still need something
    assert talk.out.take() == []
    assert [talk.exchange.knows(key) for key in KEYS[:4]] == [False, True, True, False]


def test_the_first_provider_is_who_was_named() -> None:
    talk = Talk()
    assert talk.exchange.providers() == (KEYS[1], KEYS[2], KEYS[3])
    assert talk.exchange.providers(KEYS[2]) == (KEYS[2], KEYS[1], KEYS[3])


def test_who_is_no_client_has_no_providers() -> None:
    talk = Talk()
    talk.exchange.meet(replace(talk.scene.state, clients=talk.scene.state.clients[1:]))
    assert talk.out.take() == []  # its peers are the same
    assert talk.exchange.providers() == ()


def test_clients_that_are_not_healthy_are_gone() -> None:
    talk = Talk()
    assert gone(talk.scene.state, talk.log.rounds[0]) == set()
    talk.scene.ask(2, Withdraw())
    assert gone(talk.scene.state, talk.log.rounds[0]) == {2}


# --- messages ---------------------------------------------------------------------------------------------------------


def test_a_result_is_filed_and_its_payload_fetched_from_its_trainer_first() -> None:
    talk = Talk()
    envelope = talk.scene.result(2)
    assert talk.hear(envelope) == [ev.Fetch(envelope.message.payload, SIZE, 1, (KEYS[2], KEYS[1], KEYS[3]))]  # type: ignore[union-attr]
    assert talk.entries() == [2]
    assert talk.hear(envelope) == []


@pytest.mark.parametrize(
    ("overlap", "head", "fetched"),
    [
        pytest.param(False, 0, True, id="of this round"),
        pytest.param(False, 1, False, id="of the round before"),
        pytest.param(True, 1, True, id="of the round before, with overlap"),
        pytest.param(True, 2, False, id="of the round before that, with overlap"),
    ],
)
def test_a_payload_of_a_round_that_is_witnessed_now_or_next_is_fetched_at_once(
    overlap: bool, head: int, fetched: bool
) -> None:
    talk = Talk(settings={"overlap": overlap})
    effects = talk.hear(talk.scene.result(1), head)
    assert bool(of(effects, ev.Fetch)) is fetched
    assert talk.entries() == [1]


def a_result(talk: Talk, i: int = 1) -> Result:
    message = talk.scene.result(i).message
    assert isinstance(message, Result)
    return message


@pytest.mark.parametrize(
    ("distance", "sender", "kept"),
    [
        pytest.param(EARLY_ROUNDS, 1, True, id="three rounds early"),
        pytest.param(EARLY_ROUNDS + 1, 1, False, id="four rounds early"),
        pytest.param(-EARLY_ROUNDS, 1, True, id="three rounds late"),
        pytest.param(-EARLY_ROUNDS - 1, 1, False, id="four rounds late"),
        pytest.param(1, None, False, id="of a stranger"),
    ],
)
def test_what_comes_before_its_round_is_known_is_kept_for_a_while(
    distance: int, sender: int | None, kept: bool
) -> None:
    talk = Talk()
    height = 10 + distance
    identity = STRANGER if sender is None else NODES[sender]
    envelope = seal(identity, RUN, replace(a_result(talk), height=height))
    assert talk.hear(envelope, head=10) == []
    assert talk.log.early.get(height, []) == ([envelope] if kept else [])


def test_of_one_sender_only_so_many_early_messages_are_kept_each_once() -> None:
    talk = Talk()
    result = replace(a_result(talk), height=5)
    many = [seal(NODES[1], RUN, replace(result, nonce=n)) for n in range(MAX_ENTRIES_PER_BATCH + 2)]
    other = seal(NODES[2], RUN, result)
    for envelope in (*many, *many, other, other):
        talk.hear(envelope, head=4)
    assert talk.log.early[5] == [*many[:MAX_ENTRIES_PER_BATCH], other]


def test_a_result_waits_for_the_assignment_of_its_round_and_a_list_does_not() -> None:
    talk = Talk(assigned=False)
    envelope = talk.scene.result(1)
    talk.hear(envelope)
    talk.hear(talk.scene.attest(2, commitments(envelope)))
    known = talk.log.rounds[0]
    assert not known.entries
    assert known.list_of(merkle_root(commitments(envelope))) == tuple(commitments(envelope))
    known.assign(())
    talk.exchange.file_early(talk.log, [known])
    assert talk.entries() == [1]
    assert talk.log.early == {}


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"step": 9}, id="of another step"),
        pytest.param({"size": 1000}, id="with a payload that is too large"),
    ],
)
def test_a_message_that_does_not_belong_there_is_refused(changes: dict[str, Any]) -> None:
    talk = Talk()
    notice = one(talk.hear(talk.scene.result(1, **changes)), MessageRefused)
    assert notice.peer == KEYS[1]
    assert talk.entries() == []


@pytest.mark.parametrize(
    ("sender", "height", "kept"),
    [
        pytest.param(NODES[3], 0, True, id="of any peer"),
        pytest.param(STRANGER, 0, False, id="of a stranger"),
        pytest.param(NODES[3], 1, False, id="of a round that is not known"),
    ],
)
def test_whose_lists_are_kept(sender: Any, height: int, kept: bool) -> None:
    talk = Talk(witness_nodes=1)
    listed = [sha256(b"somebody's")]
    assert talk.hear(seal(sender, RUN, Attest(0, height, listed[0]))) == []
    assert talk.log.rounds[0].list_of(merkle_root(listed)) == (tuple(listed) if kept else None)


def test_two_results_of_one_trainer_for_one_batch_are_shown_to_the_coordinator_once() -> None:
    talk = Talk()
    first, second, third = (talk.scene.result(1, nonce=nonce) for nonce in range(3))
    assert not of(talk.hear(first), (TwoResults, Accuse))  # type: ignore[arg-type]
    effects = talk.hear(second)
    assert of(effects, TwoResults) == [TwoResults(KEYS[1])]
    assert of(effects, Accuse) == [Accuse(first.raw, second.raw)]
    assert not of(talk.hear(third), Accuse)
    assert talk.log.rounds[0].hopeless == {1}


def test_a_flood_of_refused_messages_leaves_a_few_lines() -> None:
    talk = Talk()
    told = [one for step in range(2, 1002) for one in of(talk.hear(talk.scene.result(1, step=step)), MessageRefused)]
    assert [one.times for one in told] == [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]
    assert {one.peer for one in told} == {KEYS[1]}


@pytest.mark.parametrize("lrs", [(1, 1), (0x7F800000,), (0x80000001,)], ids=["two groups", "infinite", "negative"])
def test_learning_rates_that_no_node_could_apply_are_refused(lrs: tuple[int, ...]) -> None:
    """One member could otherwise end every node: what is agreed must be applied."""
    talk = Talk()
    assert "learning rate" in one(talk.hear(talk.scene.result(1, lrs=lrs)), MessageRefused).reason
    assert talk.entries() == []


# --- answers ----------------------------------------------------------------------------------------------------------


def asked(talk: Talk, height: int = 0, i: int = 1, attempt: int = 1) -> Envelope:
    return seal(NODES[i], RUN, Ask(0, height, attempt))


def test_who_asks_gets_every_result_and_the_list_of_those_that_this_node_verified() -> None:
    talk = Talk()
    first, second = talk.scene.result(2), talk.scene.result(3)
    talk.hear(first)
    assert talk.hear(asked(talk, i=3)) == [ev.SendTo(KEYS[3], first)]  # an empty list needs no message
    talk.hear(second)
    talk.exchange.fetched(ev.Fetched(a_result(talk, 3).payload))
    *results, listed = talk.hear(asked(talk))
    assert results == [ev.SendTo(KEYS[1], first), ev.SendTo(KEYS[1], second)]
    assert isinstance(listed, ev.SendTo)
    assert (listed.peer, listed.envelope.sender) == (KEYS[1], KEYS[0])
    assert listed.envelope.message == Attest(0, 0, commitments(second)[0])


def test_who_asks_about_a_decided_round_gets_the_decided_list_only() -> None:
    talk = Talk()
    known = talk.log.rounds[0]
    for i in (1, 2, 3):
        talk.hear(talk.scene.result(i))
        talk.exchange.fetched(ev.Fetched(a_result(talk, i).payload))
    decided = [entry for entry in known.verified() if entry.trainer != 3]
    decided.sort(key=lambda entry: entry.commitment)
    talk.log.start(0, ())
    talk.log.close(AgreedSet(tuple(decided)))
    (listed,) = sent(talk.hear(asked(talk)), Attest)
    assert listed.hashes() == [entry.commitment for entry in decided]


def test_who_asks_gets_the_offers_too_unless_they_are_of_an_epoch_before() -> None:
    talk = Talk()
    buffers = talk.scene.seal(Buffers(0, sha256(b"buffers")), 2)
    talk.exchange.pass_on(buffers)
    talk.exchange.offer(0, 2, sha256(b"snapshot"))
    talk.out.take()
    assert sent(talk.hear(asked(talk)), Offer) == [Offer(0, 2, sha256(b"snapshot"))]
    talk.later(60.0)
    assert ev.SendTo(KEYS[2], buffers) in talk.hear(asked(talk, i=2))
    talk.exchange.keep_promises(1)
    assert sent(talk.hear(asked(talk, i=3)), Offer) == []


def test_the_same_peer_is_answered_once_in_a_quarter_of_the_interval() -> None:
    talk = Talk()
    talk.hear(talk.scene.result(2))
    answers = []
    for later, i in ((0.0, 1), (0.0, 3), (0.4, 1), (0.1, 1)):
        talk.later(later)
        answers.append(len(talk.hear(asked(talk, i=i))))
    assert answers == [1, 1, 0, 1]


def test_strangers_and_questions_about_unknown_rounds_get_no_answer() -> None:
    talk = Talk()
    talk.hear(talk.scene.result(2))
    assert talk.hear(seal(STRANGER, RUN, Ask(0, 0, 1))) == []
    assert talk.hear(asked(talk, height=1)) == []


# --- questions --------------------------------------------------------------------------------------------------------


def questions(talk: Talk, times: int, peer: int | None = None, everybody: bool = False) -> list[int | str]:
    """Whom the node asks when it asks again and again."""
    whom: list[int | str] = []
    for _ in range(times):
        talk.exchange.ask(0, 0, None if peer is None else KEYS[peer], everybody=everybody)
        for effect in talk.out.take():
            whom.append(KEYS.index(effect.peer) if isinstance(effect, ev.SendTo) else "all")
        talk.later(20.0)
    return whom


def test_a_peer_is_asked_and_each_third_time_all_are() -> None:
    assert questions(Talk(), 7, peer=2) == [2, 2, "all", 2, 2, "all", 2]


def test_without_a_peer_one_after_the_other_is_asked_and_each_third_time_all_are() -> None:
    assert questions(Talk(), 6) == [2, 3, "all", 2, 3, "all"]


def test_everybody_is_asked_at_once_where_it_must_be() -> None:
    talk = Talk()
    assert questions(talk, 2, everybody=True) == ["all", "all"]


def test_without_peers_everybody_is_asked() -> None:
    talk = Talk()
    alone = Exchange(KEYS[0], talk.scene.settings, talk.scene.seal, {}, {}, talk.out)
    alone.ask(0, 0)
    assert len(of(talk.out.take(), ev.Broadcast)) == 1


def test_a_question_counts_up_and_is_repeated_ever_more_rarely() -> None:
    talk = Talk()
    attempts = []
    for second in range(16):
        talk.exchange.ask(0, 0, KEYS[1])
        attempts += [(second, message.attempt) for message in sent(talk.out.take(), Ask)]
        talk.later(1.0)
    assert attempts == [(0, 1), (2, 2), (6, 3), (14, 4)]


def test_who_is_stuck_tells_everybody_and_an_offer_goes_to_one() -> None:
    talk = Talk()
    talk.exchange.complain(Stuck(0, 3, 1))
    assert one(talk.out.take(), ev.Broadcast).envelope.message == Stuck(0, 3, 1)
    talk.exchange.offer_to(KEYS[1], 0)
    assert talk.out.take() == []
    talk.exchange.offer(0, 4, sha256(b"snapshot"))
    offer = one(talk.out.take(), ev.Broadcast).envelope
    assert offer.message == Offer(0, 4, sha256(b"snapshot"))
    talk.exchange.offer_to(KEYS[1], 0)
    assert talk.out.take() == [ev.SendTo(KEYS[1], offer)]


# --- results ----------------------------------------------------------------------------------------------------------


def gathered(talk: Talk) -> list[int | bytes]:
    """The peers that are asked and the payloads that are fetched."""
    talk.exchange.gather(talk.log, talk.scene.state)
    effects = talk.out.take()
    return [
        KEYS.index(effect.peer) if isinstance(effect, ev.SendTo) else effect.payload
        for effect in effects
        if isinstance(effect, (ev.SendTo, ev.Fetch))
    ]


def test_silent_trainers_are_asked_after_a_while_but_not_those_who_are_gone() -> None:
    talk = Talk()
    talk.hear(talk.scene.result(1))
    talk.scene.ask(3, Withdraw())
    assert gathered(talk) == []
    talk.later(2 * RETRY - 0.1)
    assert gathered(talk) == []
    talk.later(0.1)
    assert gathered(talk) == [2]


@pytest.mark.parametrize("overlap", [False, True])
def test_rounds_that_are_witnessed_now_or_next_are_gathered(overlap: bool) -> None:
    talk = Talk(settings={"overlap": overlap})
    talk.scene.obey(talk.scene.see())
    talk.hear(talk.scene.result(1))
    talk.exchange.fetched(ev.Fetched(talk.scene.result(1).message.payload, "nobody has it"))  # type: ignore[union-attr]
    payload = talk.scene.result(1).message.payload  # type: ignore[union-attr]
    talk.scene.play()
    assert talk.scene.round.height == 1
    talk.open()
    talk.later(20.0)
    assert (payload in gathered(talk)) is overlap


def differing(*roots: bytes) -> Talk:
    """A round in which this node has the results of nodes 1 and 2, and witnesses from node 0 on reported this."""
    talk = Talk()
    for i in (1, 2):
        talk.hear(talk.scene.result(i))
        talk.exchange.fetched(ev.Fetched(a_result(talk, i).payload))
    known = talk.log.rounds[0]
    records = tuple(WitnessRecord(WitnessProof(0, i), root) for i, root in enumerate(roots))
    known.round = replace(known.round, witnesses=records)
    return talk


def test_the_witnesses_whose_report_shows_another_list_are_asked() -> None:
    mine = merkle_root(sorted(commitments(differing().scene.result(1)) + commitments(differing().scene.result(2))))
    talk = differing(b"\1" * 32, mine, b"\2" * 32, EMPTY_ROOT)
    assert gathered(talk) == [2]  # this node itself, and who has the same list or none, is not asked
    assert gathered(talk) == []
    talk.later(RETRY)
    assert gathered(talk) == [2]


def test_a_witness_whose_list_is_here_is_not_asked_for_it() -> None:
    talk = differing(EMPTY_ROOT, merkle_root([sha256(b"somebody's")]))
    talk.hear(seal(NODES[3], RUN, Attest(0, 0, sha256(b"somebody's"))))
    assert gathered(talk) == []


def test_a_witness_that_was_only_quicker_with_the_payloads_is_not_asked() -> None:
    talk = differing()
    both = [*commitments(talk.scene.result(1)), *commitments(talk.scene.result(2))]
    all_three = merkle_root(sorted([*both, *commitments(talk.scene.result(3))]))
    talk = differing(EMPTY_ROOT, all_three)
    assert gathered(talk) == [1]  # it has a result of which this node has not heard
    talk = differing(EMPTY_ROOT, all_three)
    talk.hear(talk.scene.result(3))
    assert gathered(talk) == []
    assert talk.log.rounds[0].list_of(all_three)


def test_a_payload_is_fetched_once_at_a_time_and_again_when_that_failed() -> None:
    talk = Talk()
    envelope = talk.scene.result(1)
    payload = envelope.message.payload  # type: ignore[union-attr]
    talk.hear(envelope)
    talk.later(60.0)
    assert gathered(talk)[:1] != [payload]  # it is under way
    talk.exchange.fetched(ev.Fetched(payload, "nobody has it"))
    assert talk.out.take() == []
    assert talk.log.rounds[0].missing == {0, 1, 2, 3}
    assert payload in gathered(talk)
    talk.exchange.fetched(ev.Fetched(payload))
    assert talk.log.rounds[0].missing == {0, 2, 3}
    talk.later(60.0)
    assert payload not in gathered(talk)


def test_a_malformed_payload_is_refused_and_not_fetched_again() -> None:
    talk = Talk()
    envelope = talk.scene.result(1)
    payload = envelope.message.payload  # type: ignore[union-attr]
    talk.hear(envelope)
    talk.exchange.fetched(ev.Fetched(payload, "too many bits", refused=True))
    assert talk.out.take() == [PayloadRefused(KEYS[1], 0, "too many bits")]
    assert talk.log.rounds[0].hopeless == {1}
    talk.later(60.0)
    assert payload not in gathered(talk)


def test_two_announcements_of_one_payload_share_a_fetch() -> None:
    talk = Talk()
    payload = sha256(b"the same")
    assert len(of(talk.hear(talk.scene.result(1, payload=payload)), ev.Fetch)) == 1
    talk.later(60.0)
    assert not of(talk.hear(talk.scene.result(2, payload=payload)), ev.Fetch)
    talk.exchange.fetched(ev.Fetched(payload))
    assert talk.log.rounds[0].missing == {0, 3}


# --- promises ---------------------------------------------------------------------------------------------------------


def test_who_announces_another_s_payload_with_a_wrong_size_spoils_only_its_own_result() -> None:
    talk = Talk()
    honest = talk.scene.result(1)
    payload, size = honest.message.payload, honest.message.size  # type: ignore[union-attr]
    copied = talk.scene.result(2, payload=payload, size=size + 1)
    (fetch,) = of(talk.hear(copied), ev.Fetch)
    assert (fetch.payload, fetch.size) == (payload, size + 1)
    assert not of(talk.hear(honest), ev.Fetch)
    talk.exchange.fetched(ev.Fetched(payload, "of another size", refused=True))
    assert [refused.trainer for refused in of(talk.out.take(), PayloadRefused)] == [KEYS[2]]
    talk.exchange.gather(talk.log, talk.scene.state)
    (fetch,) = of(talk.out.take(), ev.Fetch)
    assert fetch.size == size
    talk.exchange.fetched(ev.Fetched(payload))
    assert talk.log.rounds[0].verified()[0].envelope == honest


def test_a_result_is_promised_before_it_is_announced_and_counts_as_verified() -> None:
    talk = Talk()
    result = talk.scene.result(0).message
    assert isinstance(result, Result)
    talk.exchange.announce(talk.log.rounds[0], result, result_promise(0, 0))
    promise, broadcast = talk.out.take()
    assert promise == ev.Promise(result_promise(0, 0), broadcast.envelope)  # type: ignore[union-attr]
    assert [entry.trainer for entry in talk.log.rounds[0].verified()] == [0]


def test_no_second_result_for_the_same_batch_is_signed() -> None:
    talk = Talk()
    result = talk.scene.result(0).message
    assert isinstance(result, Result)
    talk.exchange.announce(talk.log.rounds[0], result, result_promise(0, 0))
    talk.out.take()
    talk.exchange.announce(talk.log.rounds[0], replace(result, nonce=9), result_promise(0, 0))
    assert talk.out.take() == []


def test_a_promise_is_for_its_round_whatever_its_batch() -> None:
    """Two results for one round are proof of equivocation, also if their batches differ."""
    mine = Talk().scene.result(0)
    talk = Talk(promises={result_promise(0, 0): mine})
    assert talk.exchange.promised(result_promise(0, 0)) == mine
    assert talk.exchange.promised(result_promise(0, 1)) is None
    other = replace(mine.message, start=7, end=8)
    talk.exchange.announce(talk.log.rounds[0], other, result_promise(0, 0))  # type: ignore[arg-type]
    assert talk.out.take() == []


def test_a_promised_result_whose_payload_was_lost_is_fetched_from_peers_and_not_vouched_for_before() -> None:
    mine = Talk().scene.result(0)
    payload = mine.message.payload  # type: ignore[union-attr]
    talk = Talk(promises={result_promise(0, 0): mine}, assigned=False, lost=(payload,))
    known = talk.log.rounds[0]
    known.assign(())
    talk.exchange.file_early(talk.log, [known])
    assert not known.verified()
    talk.exchange.gather(talk.log, talk.scene.state)
    (fetch,) = of(talk.out.take(), ev.Fetch)
    assert (fetch.payload, set(fetch.providers)) == (payload, set(KEYS[1:4]))
    talk.exchange.fetched(ev.Fetched(payload))
    assert [entry.envelope for entry in known.verified()] == [mine]


def test_what_was_promised_is_filed_when_its_round_is_assigned() -> None:
    mine = Talk().scene.result(0)
    talk = Talk(promises={result_promise(0, 0): mine}, assigned=False)
    known = talk.log.rounds[0]
    known.assign(())
    talk.exchange.file_early(talk.log, [known])
    assert [entry.envelope for entry in known.verified()] == [mine]


def test_an_announcement_of_a_round_that_is_not_assigned_again_yet_is_sent_all_the_same() -> None:
    talk = Talk(assigned=False)
    mine = talk.scene.result(0)
    talk.exchange.publish(talk.log.rounds[0], mine)
    assert talk.out.take() == [ev.Broadcast(mine)]
    assert not talk.log.rounds[0].entries


# --- what outlives a node ---------------------------------------------------------------------------------------------


def test_the_results_of_a_list_are_stored_once_in_its_order() -> None:
    talk = Talk()
    for i in (3, 1):
        talk.hear(talk.scene.result(i))
        talk.exchange.fetched(ev.Fetched(a_result(talk, i).payload))
    known = talk.log.rounds[0]
    talk.exchange.remember(talk.log, 0, known.verified())
    remember = one(talk.out.take(), ev.Remember)
    assert remember.key == list_promise(0, 0, merkle_root(known.own()[0]))
    assert [commitments(envelope)[0] for envelope in remember.envelopes] == list(known.own()[0])
    talk.exchange.remember(talk.log, 0, reversed(known.verified()))
    assert talk.out.take() == []
    talk.exchange.remember(talk.log, 0, known.verified()[:1])  # another list of the same round
    assert len(of(talk.out.take(), ev.Remember)) == 1
    talk.exchange.remember(talk.log, 0, [])
    assert talk.out.take() == []


def test_what_was_stored_before_a_restart_is_filed_with_its_list_and_sent_to_who_asks() -> None:
    scene = Talk().scene
    stored = [scene.result(i) for i in (1, 2)]
    root = merkle_root(commitments(*stored))
    talk = Talk(remembered={list_promise(0, 0, root): stored}, assigned=False)
    known = talk.log.rounds[0]
    known.assign(())
    talk.exchange.file_early(talk.log, [known])
    assert talk.entries() == [1, 2]
    assert known.list_of(root) == tuple(commitments(*stored))
    assert known.verified() == []  # their payloads are fetched, from this node's own store if they are there
    *results, listed = of(talk.hear(asked(talk)), ev.SendTo)
    assert [effect.envelope for effect in results] == stored
    assert listed.envelope.message == Attest(0, 0, b"".join(commitments(*stored)))


def test_what_was_stored_is_sent_to_who_asks_even_if_this_node_began_after_that_round() -> None:
    scene = Talk().scene
    stored = [scene.result(i) for i in (1, 2)]
    talk = Talk(remembered={list_promise(0, 0, b"\1" * 32): stored}, assigned=False)
    *results, listed = of(talk.hear(asked(talk)), ev.SendTo)
    assert [effect.envelope for effect in results] == stored
    assert listed.envelope.message == Attest(0, 0, b"".join(commitments(*stored)))


@pytest.mark.parametrize(
    ("epoch", "height", "kept"),
    [
        pytest.param(0, 0, ["result 1", "offer 2", "result 2", "list 1", "list 2"], id="all of the epoch"),
        pytest.param(0, 2, ["offer 2", "result 2", "list 2"], id="from a round on"),
        pytest.param(1, 0, [], id="none of the epoch before"),
    ],
)
def test_what_was_stored_of_rounds_that_are_over_is_dropped(epoch: int, height: int, kept: list[str]) -> None:
    scene = Talk().scene
    result = scene.result(0).message
    assert isinstance(result, Result)
    at = {height: replace(result, height=height, payload=sha256(bytes([height]))) for height in (1, 2)}
    other = {height: replace(at[height], nonce=1, payload=sha256(b"other", bytes([height]))) for height in at}
    keys = {
        "result 1": result_promise(0, 1),
        "offer 2": offer_promise(0, 2),
        "result 2": result_promise(0, 2),
        "list 1": list_promise(0, 1, b"\1" * 32),
        "list 2": list_promise(0, 2, b"\2" * 32),
    }
    talk = Talk(
        promises={
            keys["result 1"]: scene.seal(at[1]),
            keys["offer 2"]: scene.seal(Offer(0, 2, sha256(b"snapshot"))),
            keys["result 2"]: scene.seal(at[2]),
        },
        remembered={keys[f"list {n}"]: [scene.seal(at[n]), scene.seal(other[n], 1)] for n in (1, 2)},
    )
    payloads = {name: at[int(name[-1])].payload for name in ("result 1", "result 2")}
    payloads |= {name: other[int(name[-1])].payload for name in ("list 1", "list 2")}
    expected = [payloads[name] for name in kept if name in payloads]
    for place in ((epoch, height), (0, 0)):  # what was dropped is forgotten
        promises, blobs = talk.exchange.keep_promises(*place)
        assert promises == tuple(keys[name] for name in kept)
        assert sorted(blobs) == sorted(expected)


def test_the_parameters_that_were_stored_in_an_epoch_are_known_after_a_restart() -> None:
    scene = Talk().scene
    offers = {offer_promise(epoch, 2): scene.seal(Offer(epoch, 2, sha256(bytes([epoch])))) for epoch in (0, 1)}
    talk = Talk(promises=offers)
    assert talk.exchange.offered(1) == [Offer(1, 2, sha256(b"\1"))]
    assert talk.exchange.offered(2) == []

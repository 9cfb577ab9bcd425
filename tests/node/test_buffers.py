"""Whose buffers a node begins an epoch with."""

from __future__ import annotations

from dataclasses import replace

import pytest
from support.core import KEYS, NODES, RETRY, RUN, STRANGER, Scene, of, one, parameters, sent

from psyche_lightning.node import events as ev
from psyche_lightning.node.buffers import BufferCopy
from psyche_lightning.node.exchange import Exchange
from psyche_lightning.node.notices import BuffersNotObtained, KeepsOwnBuffers
from psyche_lightning.node.outbox import Outbox
from psyche_lightning.protocol.messages import Ask, Buffers, Envelope, seal
from psyche_lightning.protocol.requests import WarmupWitness, Withdraw
from psyche_lightning.protocol.state import Checkpoint
from psyche_lightning.wire.canonical import sha256

INDEX = sha256(b"buffers")
HALF = 20.0
"""Seconds of half a round's longest training."""


class Copy:
    """Node 0 of a run of 3 nodes, which is not fresh, in the warm-up in which those in ``first`` reported in turn."""

    def __init__(self, *first: int, buffers: bool = True) -> None:
        self.scene = Scene(3, settings={"buffers": buffers})
        self.scene.warm()
        self.scene.host.state = replace(self.scene.state, checkpoint=Checkpoint(parameters(0), 0))
        for i in first:
            self.scene.ask(i, WarmupWitness(0, i, parameters(0)))
        self.out = Outbox(RETRY, 15.0)
        self.exchange = Exchange(KEYS[0], self.scene.settings, self.scene.seal, {}, {}, self.out)
        self.exchange.meet(self.scene.state)
        self.out.take()
        self.copy = BufferCopy(KEYS[0], self.scene.settings, self.exchange, self.out)

    def train(self) -> None:
        """The first round begins."""
        for i in range(3):
            if all(record.proof.index != i for record in self.scene.state.warmup_witnesses):
                self.scene.ask(i, WarmupWitness(0, i, parameters(0)))

    def advance(self, seconds: float = 0.0) -> list[ev.Effect]:
        self.out.now += seconds
        self.copy.advance(self.scene.state, self.scene.log)
        return self.out.take()

    def waits(self, height: int = 0, seconds: float = 0.0) -> bool:
        self.out.now += seconds
        return self.copy.awaited(self.scene.state, height)

    def hear(self, i: int, index: bytes = INDEX, epoch: int = 0) -> Envelope:
        envelope = seal(NODES[i], RUN, Buffers(epoch, index))
        self.copy.hear(envelope)
        return envelope


def load(index: bytes = INDEX, source: int = 1) -> ev.LoadBuffers:
    others = tuple(key for key in KEYS[1:3] if key != KEYS[source])
    return ev.LoadBuffers(index, (KEYS[source], *others))


# --- whose they are ---------------------------------------------------------------------------------------------------


def test_a_model_without_buffers_needs_nothing() -> None:
    node = Copy(1, buffers=False)
    node.hear(1)
    node.train()
    assert node.advance(60.0) == []
    assert not node.waits()


def test_as_long_as_nobody_reported_nothing_is_known() -> None:
    node = Copy()
    node.hear(1)
    assert node.advance(60.0) == []


def test_the_first_to_report_shares_its_buffers_once() -> None:
    node = Copy(0, 1)
    assert node.advance() == [ev.ShareBuffers(0)]
    assert node.advance(60.0) == []
    assert not node.waits()


def test_its_record_has_its_place_also_when_the_first_round_has_begun() -> None:
    node = Copy(0, 1)
    node.train()
    assert node.advance() == [ev.ShareBuffers(0)]
    other = Copy(2)
    other.train()
    other.hear(2)
    assert other.advance() == [load(source=2)]


def test_later_its_buffers_are_not_those_of_the_start_any_more() -> None:
    node = Copy(0)
    node.train()
    node.scene.head = 0
    node.scene.obey(node.scene.see())
    node.scene.play()
    assert node.scene.round.height == 1
    assert node.advance() == []
    assert not node.waits()


def test_everybody_is_told_where_they_are_and_so_is_who_asks() -> None:
    node = Copy(0)
    node.advance()
    node.copy.taken(ev.BuffersTaken(0, INDEX))
    shared = one(node.out.take(), ev.Broadcast).envelope
    assert shared.message == Buffers(0, INDEX)
    node.train()
    node.exchange.receive(seal(NODES[2], RUN, Ask(0, 0, 1)), node.scene.log, 0)
    assert node.out.take() == [ev.SendTo(KEYS[2], shared)]


def test_buffers_that_were_taken_for_another_epoch_are_not_shared() -> None:
    node = Copy(0)
    node.advance()
    node.copy.taken(ev.BuffersTaken(1, INDEX))
    assert node.out.take() == []


# --- taking them ------------------------------------------------------------------------------------------------------


def test_others_take_them_from_whose_they_are_first() -> None:
    node = Copy(1)
    assert node.advance() == []
    assert node.waits()
    node.hear(1)
    assert node.advance() == [load()]
    assert node.advance(3.0) == []  # under way
    assert node.waits()
    node.copy.loaded(ev.BuffersLoaded(INDEX))
    assert not node.waits()
    assert node.advance(60.0) == []


def test_an_offer_may_come_before_it_is_known_whose_count() -> None:
    node = Copy()
    node.hear(1)
    node.advance()
    node.scene.ask(1, WarmupWitness(0, 1, parameters(0)))
    assert node.advance() == [load()]


def test_whoever_asks_this_node_gets_the_offer_that_it_follows() -> None:
    node = Copy(1)
    offer = node.hear(1)
    node.train()
    node.advance()
    node.exchange.receive(seal(NODES[2], RUN, Ask(0, 0, 1)), node.scene.log, 0)
    assert node.out.take() == [ev.SendTo(KEYS[2], offer)]


@pytest.mark.parametrize(
    ("offers", "loaded"),
    [
        pytest.param([(2, INDEX, 0)], None, id="of another node"),
        pytest.param([(1, INDEX, 1)], None, id="of another epoch"),
        pytest.param([(1, sha256(b"old"), 0), (1, INDEX, 0)], INDEX, id="the newest of the epoch"),
        pytest.param([(1, INDEX, 1), (1, sha256(b"old"), 0)], None, id="a newer epoch's stays"),
    ],
)
def test_which_offer_counts(offers: list[tuple[int, bytes, int]], loaded: bytes | None) -> None:
    node = Copy(1)
    for i, index, epoch in offers:
        node.hear(i, index, epoch)
    assert [effect.index for effect in of(node.advance(), ev.LoadBuffers)] == ([] if loaded is None else [loaded])


def test_strangers_are_not_heard() -> None:
    node = Copy(1)
    node.copy.hear(seal(STRANGER, RUN, Buffers(0, INDEX)))
    assert STRANGER.public not in node.copy._offers


def test_an_offer_of_whose_they_are_counts_even_when_it_has_left() -> None:
    node = Copy(1)
    node.advance()
    left = Exchange(KEYS[0], node.scene.settings, node.scene.seal, {}, {}, node.out)  # without any peers
    node.copy._exchange = left
    node.hear(1)
    assert of(node.advance(), ev.LoadBuffers)


def test_where_nobody_gives_them_it_is_said_and_tried_again() -> None:
    node = Copy(1)
    node.hear(1)
    node.advance()
    node.copy.loaded(ev.BuffersLoaded(sha256(b"others"), "nobody has it"))  # of an earlier attempt
    assert node.out.take() == []
    node.copy.loaded(ev.BuffersLoaded(INDEX, "nobody has it"))
    assert node.out.take() == [BuffersNotObtained("nobody has it")]
    assert node.waits()
    assert node.advance(RETRY - 0.1) == []
    assert node.advance(0.1) == [load()]


def test_in_the_first_round_whose_they_are_is_asked_after_a_while_and_not_before() -> None:
    node = Copy(1)
    assert node.advance(60.0) == []
    node.train()
    assert node.advance() == []
    assert node.advance(RETRY / 2 - 0.1) == []
    effects = node.advance(0.1)
    assert one(effects, ev.SendTo).peer == KEYS[1]
    assert sent(effects, Ask) == [Ask(0, 0, 1)]


# --- waiting ----------------------------------------------------------------------------------------------------------


def test_only_the_training_of_the_first_round_waits_for_them() -> None:
    node = Copy(1)
    node.train()
    node.advance()
    assert node.waits(0)
    assert not node.waits(1)


def test_after_half_of_a_round_s_time_a_node_trains_with_its_own() -> None:
    node = Copy(1)
    node.train()
    node.advance()
    assert node.waits()
    assert node.waits(seconds=HALF - 0.1)
    assert not node.waits(seconds=0.1)
    assert node.out.take() == [KeepsOwnBuffers(KEYS[1])]
    node.hear(1)
    assert node.advance(60.0) == []


def test_whose_they_are_may_leave_then_nobody_waits() -> None:
    node = Copy(1)
    node.train()
    node.advance()
    node.scene.ask(1, Withdraw())
    assert not node.waits()
    assert node.out.take() == [KeepsOwnBuffers(KEYS[1])]


def test_where_nobody_is_known_nobody_is_waited_for_and_nothing_said() -> None:
    node = Copy()
    node.train()
    node.scene.log.rounds.clear()
    node.advance()
    assert not node.waits()
    assert node.out.take() == []


# --- in a run ---------------------------------------------------------------------------------------------------------


def test_the_first_training_waits_until_the_buffers_are_here() -> None:
    scene = Scene(3, me=1, settings={"buffers": True})
    scene.ready()
    assert not of(scene.obey(scene.see()), ev.Train)
    effects = scene.give(ev.Received(seal(NODES[0], RUN, Buffers(0, INDEX))))
    assert one(effects, ev.LoadBuffers).index == INDEX
    assert not of(effects, ev.Train)
    assert of(scene.give(ev.BuffersLoaded(INDEX)), ev.Train)


def test_the_first_to_report_trains_at_once_and_shares_before() -> None:
    scene = Scene(3, settings={"buffers": True})
    scene.warm()
    effects = scene.obey(scene.see())
    assert of(effects, ev.ShareBuffers) == [ev.ShareBuffers(0)]
    assert sent(scene.give(ev.BuffersTaken(0, INDEX)), Buffers) == [Buffers(0, INDEX)]
    for i in scene.peers:
        scene.ask(i, WarmupWitness(0, i, scene.digest))
    assert of(scene.see(), ev.Train)


def test_each_epoch_begins_anew() -> None:
    scene = Scene(3, settings={"buffers": True}, total_steps=4, epoch_time=50.0)
    scene.begin()
    scene.now += 50.0  # the epoch is over after its first round
    scene.play(3)
    scene.obey(scene.see())
    scene.join(0, 1, 2)
    scene.pass_time(3.0)
    assert (scene.state.epoch, scene.state.phase.name) == (1, "WARMUP")
    scene.ask(1, WarmupWitness(1, 1, scene.state.checkpoint.digest))
    scene.obey(scene.see())
    effects = scene.give(ev.Received(seal(NODES[1], RUN, Buffers(1, INDEX))))
    assert one(effects, ev.LoadBuffers).index == INDEX

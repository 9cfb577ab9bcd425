"""A coordinator's rounds come in pages, for members only, and a late node puts the pages together."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from support.core import KEYS, Scene, of

from psyche_lightning.coordinator import host as host_module
from psyche_lightning.coordinator.host import MAX_ROUNDS, RunHost
from psyche_lightning.errors import CoordinatorError
from psyche_lightning.node import events as ev
from psyche_lightning.protocol.requests import GetRounds, Join
from psyche_lightning.protocol.state import CoordinatorConfig, Round, WitnessProof, WitnessRecord
from psyche_lightning.server.channel import MAX_FRAME_SIZE

EPOCH = 3


def kept(nodes: int, rounds: int) -> RunHost:
    """A run that has kept so many rounds of full size."""
    host = RunHost("run", CoordinatorConfig(), seed=1)
    keys = tuple(number.to_bytes(4, "big") * 8 for number in range(nodes))
    host.handle(keys[0], Join("tcp://a:1", {"run": {"global_batch_size": 1, "total_steps": 9}}), 0.0)
    records = tuple(WitnessRecord(WitnessProof(2**31, seat, True), b"m" * 32, True) for seat in range(nodes))
    one = Round(0, 2**31, 2**64 - 1, 2**62, 2**31, keys, 0, records)
    host.rounds = [replace(one, height=height) for height in range(rounds)]
    host.rounds_epoch = EPOCH
    return host


@pytest.mark.parametrize(("nodes", "rounds"), [(1, MAX_ROUNDS), (16, MAX_ROUNDS), (256, 200), (1024, 40)])
def test_a_page_is_well_below_a_frame_and_pages_together_are_everything(nodes: int, rounds: int) -> None:
    host = kept(nodes, rounds)
    found: list[Round] = []
    while len(found) < rounds:
        first = max(0, len(found) - 1)
        page = host.handle(host.rounds[0].clients[0], GetRounds(EPOCH, first), 0.0)
        assert len(json.dumps(GetRounds.answer_to_json(page))) < MAX_FRAME_SIZE / 2
        assert len(page) > 1
        found = [*found[:first], *page]
    assert found == host.rounds


def test_strangers_get_no_rounds() -> None:
    with pytest.raises(CoordinatorError, match="for its members") as refused:
        kept(2, 9).handle(b"s" * 32, GetRounds(EPOCH, 0), 0.0)
    assert (refused.value.code, refused.value.retryable) == ("NotMember", True)


def test_a_node_asks_on_from_the_end_of_a_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_module, "PAGE", 1)  # so an answer has two rounds
    scene = Scene(4)
    scene.begin(but=(ev.Train,))
    scene.play_alone(6)
    asked = of(scene.see(), GetRounds)
    firsts = []
    while asked:
        (request,) = asked
        firsts.append(request.first)
        answer = scene.host.handle(KEYS[0], request, scene.now)
        assert len(answer) == 2
        asked = of(scene.give(ev.RoundsSeen(request.epoch, request.first, answer)), GetRounds)
    assert firsts == list(range(len(firsts)))
    assert len(firsts) >= 3
    assert scene.core.log is not None
    assert set(range(len(firsts))) <= set(scene.core.log.rounds)

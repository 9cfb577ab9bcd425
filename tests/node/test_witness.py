"""What a witness reports to the coordinator."""

from __future__ import annotations

import pytest
from support.core import KEYS, Scene

from psyche_lightning.node.events import Train
from psyche_lightning.node.witness import list_promise, offer_promise, result_promise, witness_report
from psyche_lightning.protocol.bloom import Bloom
from psyche_lightning.protocol.merkle import EMPTY_ROOT, merkle_root
from psyche_lightning.protocol.requests import Withdraw
from psyche_lightning.wire.canonical import sha256


def test_each_promise_has_a_key_of_its_own() -> None:
    roots = (EMPTY_ROOT, sha256(b"root"))
    keys = {make(epoch, height) for make in (result_promise, offer_promise) for epoch in (1, 11) for height in (1, 11)}
    lists = {list_promise(epoch, height, root) for epoch in (1, 11) for height in (1, 11) for root in roots}
    assert len(keys | lists) == 16


def participants(bloom: bytes) -> list[int]:
    """The nodes that a report has among its participants."""
    found = Bloom.from_bytes(bloom)
    return [i for i, key in enumerate(KEYS) if sha256(key) in found]


@pytest.mark.parametrize("overlap", [False, True])
def test_a_report_binds_the_list_and_names_those_who_gave_a_result(overlap: bool) -> None:
    scene = Scene(4, settings={"overlap": overlap})
    scene.begin(but=(Train,))
    scene.hear(*[scene.result(i) for i in (1, 3)])
    if overlap:  # round 0 is witnessed in the next
        scene.end_round()
    here, about = scene.log.rounds[scene.round.height], scene.log.rounds[0]
    assert here.round.height == overlap
    report = witness_report(0, here, 2, about)
    assert (report.epoch, report.height) == (0, here.round.height)
    assert report.proof == here.selection.witness_proof(2)
    commitments = [entry.commitment for entry in about.verified()]
    assert len(commitments) == 2
    assert report.merkle == merkle_root(sorted(commitments))
    assert participants(report.participants) == [1, 3]
    broadcasts = Bloom.from_bytes(report.broadcasts)
    assert all(commitment in broadcasts for commitment in commitments)
    assert sha256(b"another") not in broadcasts
    scene.ask(2, report)  # the coordinator accepts it


def test_with_overlap_those_who_have_left_since_are_among_the_participants_all_the_same() -> None:
    scene = Scene(4, settings={"overlap": True})
    scene.begin(but=(Train,))
    scene.hear(*[scene.result(i) for i in (1, 3)])
    scene.ask(1, Withdraw())
    scene.play_alone(1)
    here, about = scene.log.rounds[1], scene.log.rounds[0]
    assert here.nodes == (KEYS[0], KEYS[2], KEYS[3])
    assert participants(witness_report(0, here, 1, about).participants) == [1, 2, 3]


def test_where_no_results_are_witnessed_everybody_is_among_the_participants() -> None:
    scene = Scene(4, settings={"overlap": True})
    scene.begin(but=(Train,))
    report = witness_report(0, scene.log.rounds[0], 2, None)
    assert participants(report.participants) == [0, 1, 2, 3]
    assert report.merkle == EMPTY_ROOT


def test_a_report_names_parameters_where_the_node_knows_some() -> None:
    scene = Scene(4)
    scene.begin(but=(Train,))
    here = scene.log.rounds[0]
    report = witness_report(0, here, 2, here, 7, sha256(b"after 7"))
    assert (report.step, report.digest) == (7, sha256(b"after 7"))
    report = witness_report(0, here, 2, here)
    assert (report.step, report.digest) == (0, b"")

"""What a coordinator keeps for people: figures of old rounds, who delivered, who is and was there."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
from support.host_in_motion import DIGEST, ROOT, finished, join, key, make, play, report, training

from psyche_lightning.coordinator.delivery import Mark, marks_of, shares_of
from psyche_lightning.coordinator.host import RunHost
from psyche_lightning.coordinator.metrics import MAX_PAST, Mean, Metrics, Past, Stretch
from psyche_lightning.coordinator.nodes import MAX_NODES, Check, Nodes
from psyche_lightning.protocol.bloom import participants_bloom
from psyche_lightning.protocol.merkle import EMPTY_ROOT
from psyche_lightning.protocol.requests import Figure, Join, Report, WarmupWitness, Withdraw
from psyche_lightning.protocol.state import CoordinatorConfig, Phase, Round, WitnessProof, WitnessRecord


def row(step: int, **values: float) -> Metrics:
    return Metrics(0, step - 1, step, float(step), 2, 8, reports=1, **values)  # type: ignore[arg-type]


def means(stretch: Stretch) -> dict[str, float]:
    return {mean.name: mean.value for mean in (*stretch.means, *stretch.figures)}


def test_the_past_of_a_long_run_has_a_bounded_size_and_right_means() -> None:
    past, count = Past(), 100_000
    for step in range(1, count + 1):
        figures = (Mean("val", float(step), 3),) if step % 2 else ()
        past.add(replace(row(step, loss=float(step), tokens_per_second=4.0), figures=figures))
    assert past.width == 128
    assert MAX_PAST / 2 < len(past.stretches) <= MAX_PAST
    assert len(json.dumps(past.dump())) < 700_000
    assert [(one.first_step, one.step) for one in past.stretches[:2]] == [(1, 128), (129, 256)]
    assert past.stretches[-1].step == count
    assert sum(one.rounds for one in past.stretches) == count
    # Losses 1 to 128; the validation loss of the odd steps alone.
    found = means(past.stretches[0])
    assert (found["loss"], found["val"]) == (pytest.approx(64.5), pytest.approx(64.0))
    assert (found["tokens_per_second"], found["clients"]) == (4.0, 2.0)
    assert Past.load(json.loads(json.dumps(past.dump()))).dump() == past.dump()


def test_a_stretch_without_a_loss_has_none_and_steps_that_come_again_begin_another() -> None:
    past = Past(width=4)
    for step in (1, 2, 3, 2, 3):
        past.add(row(step))
    assert [(one.first_step, one.step, one.rounds) for one in past.stretches] == [(1, 3, 3), (2, 3, 2)]
    assert "loss" not in means(past.stretches[0])


def test_rows_that_are_no_longer_whole_are_in_the_past(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("psyche_lightning.coordinator.history.MAX_METRICS", 2)
    host = finished(total_steps=5)
    assert [one.step for one in host.history.metrics.since(0)] == [4, 5]
    assert [one.step for one in host.history.past.stretches] == [1, 2, 3]


def test_rounds_have_their_length() -> None:
    host = training()
    play(host, 6.0)
    play(host, 8.5)
    rows = host.history.metrics.since(0)
    assert [one.time for one in rows] == [5.0, 6.5, 8.5]  # who is silent holds a decided round up for a while
    assert [one.seconds for one in rows] == [1.5, 2.0, None]
    while host.state.phase.active:
        play(host, 10.0)
    assert host.history.metrics.since(0)[-1].seconds == 1.5


def attested(round_: Round, *reports: tuple[bytes, tuple[int, ...]]) -> Round:
    """The round with witnesses: the root that each reports, and the clients that it heard."""
    records = [
        WitnessRecord(WitnessProof(i, i), root, participants_bloom(round_.seed, [key(j) for j in heard]))
        for i, (root, heard) in enumerate(reports)
    ]
    return replace(round_, witnesses=tuple(records))


def marks(round_: Round, trained: set[bytes] | None = None) -> tuple[bool, str]:
    shares = shares_of(round_, CoordinatorConfig())
    decided, found = marks_of(round_, round_, 2, shares, trained or set())
    return decided, "".join(mark.value for mark in found)


def test_marks_of_a_round() -> None:
    four = Round(0, 1, 5, 0, 8, tuple(key(i) for i in range(4)))
    everyone = (0, 1, 2, 3)
    assert marks(attested(four, (ROOT, everyone), (ROOT, everyone))) == (True, "dddd")
    # One alone heard the third node, nobody the fourth, which says that it has trained.
    assert marks(attested(four, (ROOT, (0, 1, 2)), (ROOT, (0, 1)))) == (True, "ddla")
    assert marks(attested(four, (ROOT, (0, 1)), (ROOT, (0, 1))), {key(3)}) == (True, "ddal")
    # Nothing is agreed: what was there does not count.
    assert marks(attested(four, (ROOT, (0, 1)), (b"s" * 32, (0, 2)))) == (False, "xxxa")
    assert marks(attested(four, (EMPTY_ROOT, (0,)), (EMPTY_ROOT, (0,)))) == (False, "xaaa")
    assert marks(four) == (False, "aaaa")
    # Three samples for four: one rests, which witnesses count as heard.
    three = replace(four, batch_size=3)
    resting = shares_of(three, CoordinatorConfig())
    found = marks(attested(three, (ROOT, everyone), (ROOT, everyone)))[1]
    assert sorted(found) == ["d", "d", "d", "r"]
    assert found[list(resting.values()).index(0)] == Mark.RESTED.value


def test_who_delivered_is_recorded_for_each_training_round() -> None:
    host = training()
    play(host, 6.0, heard=(0, 1))
    while host.state.phase.active:
        play(host, 8.0)
    found = host.history.deliveries.since(0)
    assert [(one.step, one.decided, one.nodes, one.marks) for one in found] == [
        (1, True, (0, 1, 2), "dda"),
        (2, True, (0, 1, 2), "ddd"),
        (3, True, (0, 1, 2), "ddd"),
    ]
    node = host.history.nodes.get(key(2))
    assert node is not None
    assert (node.delivered, node.absent, node.late) == (2, 1, 0)


def test_with_overlap_the_next_round_says_who_delivered() -> None:
    host = make(manifest={"run": {"overlap": True}})
    for i in range(3):
        host.handle(key(i), Join("", {"run": {"overlap": True}}), 0.0)
    host.tick(5.0)
    for i in range(3):
        host.handle(key(i), WarmupWitness(0, i, DIGEST), 5.0)
    play(host, 6.0, heard=())  # the first round of an epoch is about nothing
    play(host, 7.0, heard=(0, 1))
    assert [(one.step, one.marks) for one in host.history.deliveries.since(0)] == [(1, "dda")]


def test_who_was_absent_and_trained_after_all_was_late_and_is_told_once() -> None:
    host = training(total_steps=6)
    for number in range(3):
        play(host, 6.0 + number, heard=(0, 1), figures=Report(number + 1, 2.0))
    assert host.history.deliveries.since(0)[-1].marks == "dda"
    report(host, 2, 9.0, Report(3, 2.5))
    assert [one.marks for one in host.history.deliveries.since(0)] == ["dda", "dda", "ddl"]
    node = host.history.nodes.get(key(2))
    assert node is not None
    assert (node.absent, node.late) == (2, 1)
    late = [event for event in host.history.events.since(0) if event.kind == "late"]
    assert [event.text for event in late] == [f"{key(2)[:4].hex()} was too late with its result of step 3"]


def test_a_report_of_step_zero_leaves_the_figures_of_the_last_step() -> None:
    host = training()
    report(host, 0, 6.0, Report(1, 3.0, 100.0, 1000, 500))
    report(host, 0, 7.0, Report(0, math.nan, 0.0, 1500, 600), merkle=b"x" * 32)
    kept = host.history.reports[key(0)]
    assert (kept.step, kept.loss, kept.tokens_per_second, kept.bytes_up) == (1, 3.0, 100.0, 1500)
    assert host.history.metrics.since(0)[0].reports == 1


def test_nodes_have_a_history() -> None:
    host = make()
    host.history.ahead = 1000.0
    join(host, range(2), 1.0)
    host.handle(key(1), Withdraw(), 3.0)
    left = host.history.nodes.get(key(1))
    assert left is not None
    assert (left.joined, left.left, left.status, left.reason, left.address) == (
        1001.0,
        1003.0,
        "left",
        "left",
        "host:1",
    )
    join(host, [1], 4.0)
    back = host.history.nodes.get(key(1))
    assert back is not None
    assert (back.number, back.joins, back.left, back.status, back.reason) == (1, 2, None, "", "")
    host.kick(key(1), 5.0)
    gone = host.history.nodes.get(key(1))
    assert gone is not None
    assert (gone.status, gone.reason) == ("kicked", "was removed by the run's owner")


def test_who_leaves_a_finished_run_is_finished_and_the_run_has_its_dates() -> None:
    host = finished()
    host.handle(key(0), Withdraw(), 30.0)
    host.disconnected(key(1), 31.0, "its connection was closed")
    assert [node.status for node in host.history.nodes] == ["finished", "finished", ""]
    dates = host.history.dates
    assert (dates.created, dates.started, dates.ended) == (0.0, 5.0, 6.0)


def test_a_link_has_the_speed_between_two_reports() -> None:
    host = training()
    report(host, 0, 6.0, Report(1, 3.0, 100.0, 1000, 500))
    report(host, 1, 7.0, Report(1, 3.0, 100.0, 1000, 500))
    report(host, 2, 7.0, Report(1, 3.0, 100.0, 1000, 500))
    report(host, 0, 10.0, Report(2, 3.0, 100.0, 3000, 1500))
    node = host.history.nodes.get(key(0))
    assert node is not None
    assert (node.seen, node.up, node.down) == (10.0, 500.0, 250.0)


def test_the_parameters_that_nodes_name_are_compared() -> None:
    host = training(total_steps=2)
    play(host, 6.0)
    play(host, 7.0)
    assert host.state.draining
    other = b"o" * 32
    report(host, 2, 8.0, digest=other)
    report(host, 0, 8.0)
    report(host, 1, 8.0)
    assert host.state.phase is Phase.FINISHED
    assert host.history.votes[key(2)] == (2, other)
    checks = {node.number: [(check.kind, check.good) for check in node.checks] for node in host.history.nodes}
    assert checks == {
        0: [("warmup", True), ("digest", True)],
        1: [("warmup", True), ("digest", True)],
        2: [("warmup", True), ("digest", False)],
    }
    told = [event.text for event in host.history.events.since(0) if event.kind == "digest"]
    assert told == [
        f"{key(2)[:4].hex()} holds other parameters than the run's of step 2: {other[:4].hex()} instead of "
        f"{DIGEST[:4].hex()}"
    ]


def test_checks_and_nodes_are_bounded_and_who_is_there_is_kept() -> None:
    nodes = Nodes()
    for i in range(MAX_NODES + 50):
        signer = i.to_bytes(32, "big")
        nodes.joined(signer, float(i))
        if i >= 10:
            nodes.change(signer, lambda node, i=i: replace(node, left=float(i)))  # type: ignore[misc]
    assert len(list(nodes)) == MAX_NODES
    assert [node.number for node in nodes][:11] == [*range(10), 60]
    for time in range(20):
        nodes.change(bytes(32), lambda node, time=time: node.checked(Check(time, "digest", time % 2 == 0, "")))  # type: ignore[misc]
    first = nodes.get(bytes(32))
    assert first is not None
    assert [check.time for check in first.checks] == [18, 19]
    version = nodes.version
    nodes.joined(bytes(32), 1.0)
    assert [node.number for node in nodes.since(version)] == [0]


def test_a_schedule_of_the_compression_is_told() -> None:
    schedule = [{"from_step": 2, "k": 4}]
    distro = {"chunk": 64, "k": 8, "schedule": schedule}
    host = make(manifest={"distro": distro})
    assert host.settings.at(1) == {"k": 8, "local_steps": 0, "chunk": 64}
    assert host.settings.after(1) == {"from_step": 2, "k": 4, "local_steps": 0}
    assert host.settings.after(2) is None
    for i in range(3):
        host.handle(key(i), Join("", {"distro": distro}), 0.0)
    host.tick(5.0)
    for i in range(3):
        host.handle(key(i), WarmupWitness(0, i, DIGEST), 5.0)
    play(host, 6.0)
    told = [event.text for event in host.history.events.since(0) if event.kind == "settings"]
    assert told == ["from step 2 on k is 4 (was 8)"]


@pytest.mark.parametrize(
    ("shapes", "count"),
    [([[2, 3], [4], []], 11), ([[2] * 17], None), ([[1 << 40, 1 << 40]], None), ([["9" * 4000]], None), ([[-1]], None)],
)
def test_trained_parameters_are_counted_if_they_can_be(shapes: list[list[object]], count: int | None) -> None:
    parameters = [[f"p{i}", shape, "float32", True] for i, shape in enumerate(shapes)]
    model = {"name": "m" * 1000, "parameters": [*parameters, ["frozen", [7], "float32", False]]}
    settings = make(manifest={"model": model}).settings
    assert settings.parameters == count
    assert settings.model == "m" * 200


@pytest.mark.parametrize("manifest", [{"distro": 3, "model": [], "data": {"name": 7}}, {"distro": {"k": -1, "x": 2}}])
def test_a_manifest_of_anything_says_nothing(manifest: dict[str, object]) -> None:
    settings = make(manifest=manifest).settings
    assert (settings.distro, settings.model, settings.data, settings.recipe) == (None, None, None, False)
    assert settings.at(1) == {"k": None, "local_steps": None, "chunk": None}


def test_named_figures_of_a_report_survive_storing() -> None:
    host = training()
    report(host, 0, 6.0, Report(1, 3.0, figures=(Figure("seconds/compute", 1, 0.5),)))
    again = RunHost.load(json.loads(json.dumps(host.dump())))
    assert again.history.dump({}) == host.history.dump({})

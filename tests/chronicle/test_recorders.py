"""What nodes and the coordinator write into their event files, in whole runs of the simulator."""

from __future__ import annotations

import logging
import resource
import threading
from pathlib import Path

import pytest
from support.killed import killed

from psyche_lightning.chronicle.entry import COORDINATOR, SIMULATOR, Entry, Kind
from psyche_lightning.chronicle.writer import FILE, Chronicle
from psyche_lightning.logs import speaking
from psyche_lightning.node.notices import KeepsOwnBuffers
from psyche_lightning.node.recorder import LogRecorder, Recorder
from psyche_lightning.node.waiting import Awaited
from psyche_lightning.simulation.scenario import Scenario
from psyche_lightning.simulation.simulator import Simulation


def of(entries: tuple[Entry, ...], kind: Kind, node: str | None = None) -> list[Entry]:
    return [one for one in entries if one.kind is kind and node in (None, one.node)]


def test_a_node_that_is_killed_is_missed_by_name() -> None:
    told = killed()
    [kill] = [one for one in of(told, Kind.FAULT, SIMULATOR) if "killed" in one.text]
    [victim] = kill.about
    others = {one.node for one in told} - {victim, SIMULATOR, COORDINATOR}
    after = tuple(one for one in told if one.time > kill.time)
    [drop] = of(after, Kind.DROP, COORDINATOR)
    assert drop.about == (victim,)
    assert {one.node for one in of(after, Kind.DROP) if one.about == (victim,)} == {*others, COORDINATOR}
    waits = [one for one in of(after, Kind.WAIT) if one.about == (victim,)]
    assert waits
    assert all(victim in one.text for one in waits)
    absent = [one for one in of(after, Kind.ABSENT) if one.about == (victim,)]
    assert {one.node for one in absent} == others
    assert {one.text for one in absent} == {f"{victim} announced nothing"}
    assert all(one.node != victim for one in after if one.time < drop.time)


def test_each_round_is_opened_decided_and_applied_by_each_node() -> None:
    told: list[Entry] = []
    Simulation(Scenario(2, 4, False, 12, 0.0, 0.1, 0.0, 0, 0, 0, 0, 0, 150.0), told.append).run()
    nodes = {one.node for one in told} - {COORDINATOR}
    assert len(nodes) == 4
    for node in nodes:
        mine = tuple(one for one in told if one.node == node)
        steps = list(range(1, 13))
        for kind in (Kind.OPENED, Kind.DECIDED, Kind.APPLIED):
            assert [one.step for one in of(mine, kind) if one.step] == steps, kind
        by_round = {one.step: [each for each in of(mine, Kind.RECEIVED) if each.step == one.step] for one in mine}
        assert all({name for one in by_round[step] for name in one.about} == nodes - {node} for step in steps)
        trained = [one for one in of(mine, Kind.TRAINED) if "no usable update" not in one.text]
        assert all(one.seconds is not None and 0.2 <= one.seconds <= 3.1 for one in trained)
        assert len(of(mine, Kind.PROMISE)) >= 12
    coordinator = tuple(one for one in told if one.node == COORDINATOR)
    assert [one.step for one in of(coordinator, Kind.DECIDED) if one.step] == list(range(1, 13))
    assert [one.text for one in of(coordinator, Kind.PHASE)][-1] == "finished"


def recorder() -> tuple[Recorder, list[Entry], list[float]]:
    told: list[Entry] = []
    clock = [0.0]
    return Recorder("aabb", b"", "run", lambda: clock[0], told.append), told, clock


def test_a_wait_is_written_when_it_is_over_and_when_it_lasts() -> None:
    record, told, clock = recorder()
    first, second = Awaited("for a", (b"aaaa",)), Awaited("for b", (b"bbbb",))
    for clock[0], what in [(0.0, first), (1.0, first), (1.5, second), (3.0, second), (4.0, second), (9.0, None)]:
        record.awaits(what)
    assert [(one.time, one.text, one.about, one.seconds) for one in told] == [
        (1.5, "for a", ("61616161",), 1.5),
        (4.0, "for b", ("62626262",), None),
        (9.0, "for b", ("62626262",), 7.5),
    ]


def test_the_log_adds_warnings_and_saved_checkpoints_of_this_node_alone() -> None:
    record, told, _ = recorder()
    warner = logging.getLogger("psyche_lightning.transports.tcp")
    saver = logging.getLogger("psyche_lightning.checkpoints.writer")
    before = saver.level
    saver.setLevel(logging.INFO)
    try:
        with LogRecorder(record, "aabb").listening():
            with speaking("run", "aabb"):
                warner.warning("lost %s", "a peer")
                warner.info("not worth a line")
                KeepsOwnBuffers(b"aaaa").tell()  # the recorder has it from the core
            with speaking("run", "ccdd"):
                warner.warning("lost another")
            saver.info("wrote the checkpoint")
        warner.warning("too late")
    finally:
        saver.setLevel(before)
    assert [(one.kind, one.text) for one in told] == [
        (Kind.FAULT, "lost a peer"),
        (Kind.SAVE, "wrote the checkpoint"),
    ]


def test_events_that_end_as_the_disk_is_full_do_not_stop_whom_the_log_is_recorded_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = Chronicle(tmp_path, node="aabb", run="run")
    record = Recorder("aabb", b"", "run", lambda: 0.0, files.add)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def full() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / FILE).stat().st_size, before[1]))
        try:
            with LogRecorder(record, "aabb").listening():
                record.note(Kind.FAULT, "this does not fit")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    writer = threading.Thread(target=full, daemon=True)
    writer.start()
    writer.join(60.0)
    assert not writer.is_alive()
    assert "no more events" in caplog.text

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from psyche_lightning.distro import DistroConfig
from psyche_lightning.errors import ManifestMismatchError, PsycheError, StoreError, UnfinishedError
from psyche_lightning.node import events as ev
from psyche_lightning.node import participant, runtime
from psyche_lightning.node.events import StartOver
from psyche_lightning.node.journal import Journal
from psyche_lightning.node.ledger import Ledger
from psyche_lightning.node.notices import (
    CannotGoOn,
    Finished,
    MessageRefused,
    Outcome,
    ParametersDiffer,
    ParametersNotObtained,
    PayloadRefused,
    TakesStart,
    TensorDiffered,
    TooFewMembers,
    TrainingAway,
    Waits,
)
from psyche_lightning.node.status import StatusFile
from psyche_lightning.node.store import DirectoryBlobStore
from psyche_lightning.protocol.requests import Join, Report, Witness
from psyche_lightning.protocol.state import Phase
from psyche_lightning.wire.canonical import sha256


def test_a_node_alone_trains_all_steps(make_run: Any, make_trainee: Any) -> None:
    run = make_run(1, 20)
    node = make_trainee(0, run)
    run.go(node)
    assert node.steps == list(range(1, 21))
    assert node.ids == list(range(20 * 6))
    assert run.host.state.phase is Phase.FINISHED
    assert run.host.state.checkpoint.step == 20


def test_reports_carry_each_token_once_and_all_seconds_of_training(make_run: Any, make_trainee: Any) -> None:
    run, reports, texts = make_run(1, 4), [], iter([[(0, 1)] * 3, [], [(0, 2), (1, 3), (1, 4)], [(1, 5)] * 20])
    node = make_trainee(0, run)
    coordinator = node.participant.node.coordinator
    real = coordinator.request

    async def request(asked: Any) -> Any:
        if isinstance(asked, Witness) and asked.report.step:
            reports.append(asked.report)
        return await real(asked)

    def compute(trainee: Any, work: Any) -> None:
        for prompt, token in next(texts):
            node.participant.wrote(prompt, token)

    coordinator.request, node.compute = request, compute
    run.go(node)
    told: list[Report] = [one for step in range(1, 5) for one in reports if one.step == step]
    assert told == reports
    # One text a report; of more tokens than it holds the newest.
    found = [(one.prompt, one.tokens) for one in told if one.tokens]
    assert found[:2] == [(0, (1, 1, 1)), (0, (2,))]
    assert found[2][0] == 1
    assert [token for _, tokens in found[2:] for token in tokens][-16:] == [5] * 16
    seconds = [one.seconds for one in told]
    assert 0 < seconds[0] < seconds[-1]
    assert seconds == sorted(seconds)


@pytest.mark.parametrize("overlap", [False, True])
def test_nodes_that_began_differently_end_with_the_same_bytes(make_run: Any, make_trainee: Any, overlap: bool) -> None:
    run = make_run(3, 12)
    nodes = [make_trainee(number, run, overlap=overlap) for number in range(3)]
    assert len({node.bytes for node in nodes}) == 3
    run.go(*nodes)
    assert len({node.bytes for node in nodes}) == 1
    assert sorted(number for node in nodes for number in node.ids) == list(range(12 * 6))
    assert sum(any(isinstance(notice, TakesStart) for notice in node.said) for node in nodes) == 2


def test_with_overlap_the_coordinator_goes_on_while_a_round_is_computed(make_run: Any, make_trainee: Any) -> None:
    run = make_run(3, 12, max_round_train_time=60.0)
    nodes = [make_trainee(number, run, overlap=True) for number in range(3)]

    def wait_for_the_next_round(node: Any, work: Any) -> None:
        until = time.monotonic() + 60
        while run.host.state.step <= work.step:
            assert time.monotonic() < until, f"no round follows that of step {work.step} before all have computed it"
            time.sleep(0.001)

    for node in nodes[:2]:  # the third is quicker
        node.compute = wait_for_the_next_round
    run.go(*nodes)
    assert all(node.steps == list(range(1, 13)) for node in nodes)
    assert len({node.bytes for node in nodes}) == 1


def test_to_apply_results_is_no_wait(make_run: Any, make_trainee: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    start = float(int(time.monotonic()))  # the runtime compares its own clock with what this one said
    passed = [start]
    monkeypatch.setattr(participant, "time", SimpleNamespace(monotonic=lambda: passed[0]))
    run = make_run(1, 6)
    node = make_trainee(0, run)
    apply = node.participant.node.replica.apply

    def long(*given: Any) -> None:
        passed[0] += 1000.0
        apply(*given)

    monkeypatch.setattr(node.participant.node.replica, "apply", long)
    run.go(node)
    assert passed[0] == start + 6 * 1000.0
    assert node.participant.waited == 0.0


def test_the_same_seed_gives_the_same_parameters(make_run: Any, make_trainee: Any) -> None:
    seen = set()
    for _ in range(2):
        run = make_run(1, 8)
        node = make_trainee(0, run)
        run.go(node)
        seen.add(node.bytes)
    assert len(seen) == 1


def test_parameters_that_changed_by_themselves_are_named_and_repaired(make_run: Any, make_trainee: Any) -> None:
    run = make_run(3, 40)  # enough of them for the replay to be done before the last
    nodes = [make_trainee(number, run) for number in range(3)]

    def flip(node: Any, work: Any) -> None:
        if work.step == 3:
            with torch.no_grad():
                node.module.weight.view(torch.int32)[0, 0] ^= 1

    nodes[1].spoil = flip
    run.go(*nodes)
    assert len({node.bytes for node in nodes}) == 1
    said = nodes[1].said
    # A digest of every second round shows it; the first at which the lists of the other two make a quorum.
    assert any(isinstance(notice, ParametersDiffer) and notice.round in range(3, 40, 2) for notice in said)
    assert TensorDiffered("weight", 3) in said


def test_a_node_that_starts_over_goes_on_from_what_it_stored(make_run: Any, make_trainee: Any) -> None:
    run = make_run(3, 30)
    nodes = [make_trainee(number, run) for number in range(3)]
    cores = []

    def start_over(node: Any, work: Any) -> None:
        if work.step == 5:
            runtime = node.participant._runtime
            cores.append(runtime.core)
            runtime._loop.call_soon_threadsafe(runtime._carry_out, StartOver(runtime.core.state))

    nodes[1].spoil = start_over
    run.go(*nodes)
    assert nodes[1].participant._runtime.core is not cores[0]
    assert len({node.bytes for node in nodes}) == 1
    assert len(nodes[1].steps) <= len(set(nodes[1].steps)) + 1  # what it signed, it does not train again
    assert not run.host.membership.ejected


@pytest.mark.parametrize("overlap", [False, True])
def test_a_replay_over_a_change_of_k_takes_each_round_with_its_own(
    make_run: Any, make_trainee: Any, overlap: bool
) -> None:
    config = DistroConfig(chunk=8, schedule=[{"from_step": 0, "k": 9}, {"from_step": 4, "k": 2}])
    run = make_run(3, 24)
    nodes = [make_trainee(number, run, overlap=overlap, config=config) for number in range(3)]

    def flip(node: Any, work: Any) -> None:
        if work.step == 8:  # the replay begins with the first round and ends beyond the change
            with torch.no_grad():
                node.module.weight.view(torch.int32)[0, 0] ^= 1

    nodes[1].spoil = flip
    run.go(*nodes)
    assert len({node.bytes for node in nodes}) == 1
    assert any(isinstance(notice, ParametersDiffer) and notice.round >= 5 for notice in nodes[1].said)


def test_a_payload_with_the_k_of_other_rounds_is_refused_and_never_agreed(make_run: Any, make_trainee: Any) -> None:
    config = DistroConfig(chunk=8, schedule=[{"from_step": 0, "k": 9}, {"from_step": 4, "k": 2}])
    run = make_run(3, 8)
    nodes = [make_trainee(number, run, config=config) for number in range(3)]
    nodes[2].step_of = lambda work: 4 if work.step < 4 else 1
    run.go(*nodes[:2], but=nodes[2:])
    assert nodes[0].bytes == nodes[1].bytes
    told = [notice for node in nodes[:2] for notice in node.said]
    assert any(isinstance(notice, PayloadRefused) and "k is 2; this run's is 9" in notice.reason for notice in told)
    assert any(isinstance(notice, MessageRefused) and "announced a payload of" in notice.reason for notice in told)


def test_another_manifest_is_refused_with_the_fields_that_differ(make_run: Any, make_trainee: Any) -> None:
    run = make_run(1, 4)
    run.host.handle(b"\x09" * 32, Join("", {"model": {"parameters": ["other"]}}), 0.0)
    node = make_trainee(0, run)
    with pytest.raises(ManifestMismatchError) as caught:
        run.go(node)
    assert any("parameters" in field for field, _, _ in caught.value.differences)


def test_who_comes_in_the_last_epoch_leaves_the_finished_run_without_asking_those_who_would_not_let_it_in(
    make_run: Any, make_trainee: Any
) -> None:
    run = make_run(2, 8)
    first, second, late = nodes = [make_trainee(number, run) for number in range(3)]
    thread = threading.Thread(target=late.train, daemon=True)

    def call_the_third(node: Any, work: Any) -> None:
        if work.step == 4:
            thread.start()
        while work.step == 5 and not run.host.pending:
            time.sleep(0.01)

    first.spoil = call_the_third
    run.go(*nodes[:2])
    thread.join(120.0)
    assert not thread.is_alive()
    assert first.bytes == second.bytes != late.bytes
    assert not late.steps
    assert isinstance(late.error, UnfinishedError)
    assert "the last parameters of run 'test': the run is finished, but no peer sent" in str(late.error)
    with pytest.raises(UnfinishedError):
        late.participant.next_round()
    assert late.participant.finished == Finished(Outcome.OTHER_PARAMETERS, run.host.state.checkpoint.digest)
    failures = [notice for notice in late.said if isinstance(notice, ParametersNotObtained)]
    assert failures
    assert all("no provider is known" in notice.reason for notice in failures)


# --- storage that fails -----------------------------------------------------------------------------------------------


def fill_disk(part: Any) -> None:
    """From now on, the disk of an open journal or ledger is full."""
    device = os.open("/dev/full", os.O_RDWR)
    os.dup2(device, part._file.fileno())
    os.close(device)


def left(run: Any) -> list[str]:
    return [event.text for event in run.host.history.events.since(0) if event.kind == "left"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no device that is always full")
@pytest.mark.parametrize("part", ["journal", "ledger"])
def test_a_full_disk_ends_the_node_which_leaves_the_run(
    make_run: Any, make_trainee: Any, tmp_path: Path, part: str
) -> None:
    run = make_run(1, 1000)
    parts: dict[str, Any] = {"journal": Journal(tmp_path / "the journal"), "ledger": Ledger(tmp_path / "the ledger")}
    node = make_trainee(0, run, **parts)
    node.spoil = lambda trainee, work: fill_disk(parts[part]) if work.step == 3 else None
    with pytest.raises(StoreError, match=rf"cannot write to the {part} .*the {part}: No space left on device"):
        run.go(node)
    assert max(node.steps) < 20
    assert len(left(run)) == 1
    assert [notice for notice in node.said if isinstance(notice, CannotGoOn)] == [CannotGoOn(str(node.error))]


def test_a_disk_that_fails_while_peers_read_from_it_ends_the_node(
    make_run: Any, make_trainee: Any, tmp_path: Path
) -> None:
    run = make_run(1, 1000)
    store, wanted = DirectoryBlobStore(tmp_path), sha256(b"wanted")
    node = make_trainee(0, run, store=store)

    def serve(node: Any, work: Any) -> None:
        if work.step == 3:
            store._file(wanted).mkdir(parents=True)  # neither a file nor missing
            with pytest.raises(StoreError):
                node.participant._runtime._blob_for_peer(wanted)
            deadline = time.monotonic() + 120.0
            while not left(run):  # at once, although the training thread is busy
                assert time.monotonic() < deadline
                time.sleep(0.01)

    node.spoil = serve
    with pytest.raises(StoreError, match=f"cannot read the blob folder {tmp_path}"):
        run.go(node)
    assert len(left(run)) == 1


@pytest.mark.parametrize("task", [ev.Load, ev.LoadBuffers])
def test_parameters_that_cannot_be_read_are_not_taken_for_damaged_ones(
    make_run: Any, make_trainee: Any, tmp_path: Path, task: Any
) -> None:
    store, index = DirectoryBlobStore(tmp_path), sha256(b"index")
    runtime = make_trainee(0, make_run(1, 10), store=store).participant._runtime
    assert runtime.run_replica_task(task(index, ())).reason
    store._file(index).mkdir(parents=True)
    with pytest.raises(StoreError, match="cannot read the blob folder"):
        runtime.run_replica_task(task(index, ()))


def test_a_training_loop_that_does_not_come_back_is_not_waited_for(
    make_run: Any, make_trainee: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as that of a notebook whose cell failed. When it comes back, the node does too."""
    monkeypatch.setattr(runtime, "LEAST_AWAY", 0.5)
    run = make_run(2, 8, min_clients=2, max_round_train_time=1.0, warmup_time=3.0, cooldown_time=1.0)
    nodes = first, second = [make_trainee(number, run) for number in range(2)]
    back = threading.Event()
    first.compute = lambda node, work: back.wait(240.0) if work.step == 3 and not back.is_set() else None
    threads = [threading.Thread(target=node.train, daemon=True) for node in nodes]
    for thread in threads:
        thread.start()

    def told(node: Any, kind: type[Any]) -> bool:
        return any(isinstance(notice, kind) for notice in node.said)

    deadline = time.monotonic() + 120.0
    while not told(first, TrainingAway) or first.identity.public in run.host.membership.members:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    while not told(second, TooFewMembers):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(1.0)
    assert first.identity.public not in run.host.membership.members, "it does not join again while it is away"
    back.set()
    for thread in threads:
        thread.join(120.0)
        assert not thread.is_alive()
    assert first.error is second.error is None
    assert first.bytes == second.bytes
    assert run.host.state.phase is Phase.FINISHED


# --- a coordinator that is away ---------------------------------------------------------------------------------------


def test_a_node_waits_for_its_coordinator_as_long_as_its_patience_says(
    make_run: Any, make_trainee: Any, tmp_path: Path
) -> None:
    run = make_run(2, 10)  # the other node never comes
    file = tmp_path / "status.json"
    node = make_trainee(0, run, status=StatusFile(file))
    node.participant.node.coordinator.away = away = "the coordinator at http://there: no connection"
    seen = []

    def look() -> None:
        while not any(isinstance(notice, Waits) and "http://there" in str(notice) for notice in node.said):
            time.sleep(0.05)
        seen.append(json.loads(file.read_text()))
        node.participant._patience = 0.5

    looks = threading.Thread(target=look, daemon=True)
    looks.start()
    told = r"for \d+ s: waiting for the coordinator at http://there: no connection\. "
    with pytest.raises(PsycheError, match=told):
        run.go(node)
    looks.join()
    assert seen[0].pop("since") < (last := json.loads(file.read_text())).pop("since")
    known = {"run": "test", "node": node.identity.public.hex(), "epoch": 0, "round": None, "step": 1, "away": away}
    assert seen[0] == {**known, "waiting": f"waiting for {away}", "left": None}
    assert last == {**known, "waiting": None, "left": "its training ended here"}

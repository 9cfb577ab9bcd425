"""One run as its host keeps it: members, manifest, history, durability, and what people read."""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from support.host_in_motion import CONFIG, DIGEST, ROOT, finished, join, key, make, play, report, training

from psyche_lightning.coordinator import history as history_module
from psyche_lightning.coordinator import host as host_module
from psyche_lightning.coordinator.history import History
from psyche_lightning.coordinator.host import RunHost
from psyche_lightning.errors import ConfigError, CoordinatorError, ManifestMismatchError, WireError
from psyche_lightning.protocol.committee import round_selection
from psyche_lightning.protocol.limits import PSYCHE_LIMITS, Limits
from psyche_lightning.protocol.manifest import ABSENT
from psyche_lightning.protocol.merkle import EMPTY_ROOT
from psyche_lightning.protocol.requests import (
    MAX_FIGURES,
    Figure,
    GetRounds,
    HealthCheck,
    Join,
    Report,
    WarmupWitness,
    Withdraw,
    Witness,
)
from psyche_lightning.protocol.state import Checkpoint, ClientStatus, Phase


def code_of(call: Callable[[], object]) -> str:
    with pytest.raises(CoordinatorError) as caught:
        call()
    return caught.value.code


def one_step(host: RunHost) -> None:
    """Let the epoch, which lasts 11 seconds, end after its first round."""
    host.tick(15.0)
    play(host, 20.0)
    assert host.state.draining
    play(host, 21.0)
    assert (host.state.epoch, host.state.settled) == (1, True)


def test_a_run_from_beginning_to_end() -> None:
    host = finished()
    assert (host.state.phase, host.state.step) == (Phase.FINISHED, 4)
    assert host.state.checkpoint == Checkpoint(DIGEST, 3)
    assert [(r.height, r.step, r.data_index) for r in host.rounds] == [
        (0, 1, 0), (1, 2, 6), (2, 3, 12), (3, 0, 18)
    ]  # fmt: skip
    assert all(len(r.witnesses) == 2 and r.witnesses[0].participants == b"" for r in host.rounds)
    assert host.state.rounds[0].witnesses[0].participants != b""
    assert host.deadline() is None
    assert not host.tick(1e9)


def test_a_finished_run_takes_no_newcomers() -> None:
    host = finished()
    with pytest.raises(CoordinatorError, match=r"'run' finished after 3 steps.*checkpoint.resume") as caught:
        host.handle(key(9), Join("nine", {}), 8.0)
    assert caught.value.code == "Halted"
    assert key(9) not in host.membership.members
    host.handle(key(0), Join("moved", {}), 8.0)  # a member may still move, and fetch the last parameters


def test_a_member_may_say_where_it_is() -> None:
    host = make()
    host.handle(key(0), Join("a:1", {}, "eu-west"), 0.0)
    host.handle(key(1), Join("b:1", {}), 0.0)
    assert [node.region for node in host.history.nodes] == ["eu-west", None]
    assert [node.region for node in History.load(host.history.dump({})).nodes] == ["eu-west", None]
    for harmful in ("x" * 41, "eu\x1b[2J", " eu", "\u202eue"):
        with pytest.raises(CoordinatorError, match=r"region is .*expected at most 40 printable") as caught:
            host.handle(key(2), Join("c:1", {}, harmful), 0.0)
        assert caught.value.code == "InvalidMember"
        assert str(caught.value).isprintable()
    host.handle(key(0), Join("a:1", {}), 1.0)  # started again, it says so no more
    assert [node.region for node in host.history.nodes] == [None, None]


def test_seeds_follow_from_run_epoch_and_height() -> None:
    first, second, other = (training(seed=seed) for seed in (7, 7, 8))
    expected = hashlib.sha256(struct.pack("<Q", 7) + b"run" + struct.pack("<QQ", 0, 0)).digest()
    assert first.rounds[0].seed == second.rounds[0].seed == int.from_bytes(expected[:8], "little")
    assert other.rounds[0].seed != first.rounds[0].seed
    play(first, 6.0)
    assert first.rounds[1].seed != first.rounds[0].seed
    again = training(epoch_time=11.0)
    one_step(again)
    again.tick(26.0)
    for i in range(3):
        again.handle(key(i), WarmupWitness(1, i, DIGEST), 27.0)
    expected = hashlib.sha256(struct.pack("<Q", 7) + b"run" + struct.pack("<QQ", 1, 0)).digest()
    assert again.rounds[0].seed == int.from_bytes(expected[:8], "little")


def test_bad_runs_are_not_made() -> None:
    for arguments in (
        {"run_id": "", "config": CONFIG, "seed": 1},
        {"run_id": "r", "config": replace(CONFIG, total_steps=0), "seed": 1},
        {"run_id": "r", "config": replace(CONFIG, warmup_time=0.5), "seed": 1, "limits": PSYCHE_LIMITS},
        {"run_id": "r", "config": CONFIG, "seed": -1},
        {"run_id": "r", "config": CONFIG, "seed": 1, "max_seq_len": 0},
    ):
        with pytest.raises(ConfigError):
            RunHost(**arguments)  # type: ignore[arg-type]


def test_a_revoked_member_finishes_its_epoch_and_is_in_no_other() -> None:
    host = make()
    join(host, range(4))
    host.tick(5.0)
    assert host.state.phase is Phase.WARMUP
    host.revoke(key(1), 6.0)
    assert key(1) in [client.signer for client in host.state.clients]
    host.pause(7.0)  # the epoch is over
    assert key(1) not in host.membership.members
    host.resume(8.0)
    host.tick(20.0)
    assert [client.signer for client in host.state.clients] == [key(0), key(2), key(3)]
    assert code_of(lambda: join(host, [1], 20.0)) == "NotAuthorized"
    join(host, [5], 20.0)  # the others may still come


def test_a_member_that_waits_is_revoked_at_once() -> None:
    host = make()
    join(host, range(2))
    host.revoke(key(1), 1.0)
    assert list(host.membership.members) == [key(0)]
    assert host.history.events.since(0)[-1].text == f"{key(1)[:4].hex()} may no longer be a member"


def test_a_kicked_node_leaves_the_epoch_at_once() -> None:
    host = training()
    host.kick(key(1), 6.0)
    assert {client.signer: client.status for client in host.state.clients}[key(1)] is ClientStatus.EJECTED
    assert key(1) not in host.membership.members
    assert code_of(lambda: report(host, 1, 6.0)) == "InvalidWitness"
    again = RunHost.load(json.loads(json.dumps(host.dump())))
    for each in (host, again):
        assert code_of(lambda each=each: join(each, [1], 7.0)) == "NotAuthorized"  # type: ignore[misc]
        each.allow(None)  # everybody does not mean those that were removed by name
        assert code_of(lambda each=each: join(each, [1], 7.0)) == "NotAuthorized"  # type: ignore[misc]
        each.allow(key(1))
        join(each, [1], 7.0)
        assert key(1) in each.membership.members


def test_a_closed_door_keeps_the_members_and_lets_no_stranger_in() -> None:
    host = make()
    join(host, range(2))
    host.revoke(None, 1.0)
    assert host.membership.allowed == [key(0), key(1)]
    assert code_of(lambda: join(host, [2], 1.0)) == "NotAuthorized"
    join(host, [0], 1.0)  # one that comes back
    host.kick(key(0), 2.0)
    assert host.membership.allowed == [key(1)]


def test_manifest_is_fixed_by_the_first_and_checked_for_the_others() -> None:
    host = make(manifest={"data": {"path": "x"}})
    host.handle(key(0), Join("", {"model": {"width": 8}}), 0.0)
    assert host.manifest == {"data": {"path": "x"}, "model": {"width": 8}}
    with pytest.raises(ManifestMismatchError) as caught:
        host.handle(key(1), Join("", {"model": {"width": 9}, "data": {"path": "y"}}), 0.0)
    assert caught.value.differences == [("data.path", "x", "y"), ("model.width", 8, 9)]
    assert list(host.membership.members) == [key(0)]
    again = RunHost.load(json.loads(json.dumps(host.dump())))
    for each in (host, again):  # the first node sealed it
        with pytest.raises(ManifestMismatchError) as caught:
            each.handle(key(1), Join("", {"model": {"width": 8}, "start": {"step": 50}}), 0.0)
        assert caught.value.differences == [("start", ABSENT, {"step": 50})]
        each.handle(key(1), Join("", {"model": {"width": 8}}), 0.0)  # what a node does not know is not compared
        assert each.manifest == {"data": {"path": "x"}, "model": {"width": 8}}


def test_values_alone_seal_the_manifest() -> None:
    host = RunHost("run", CONFIG, seed=1, unset=["total_steps"])
    host.handle(key(0), Join("", {"run": {"total_steps": 9}}), 0.0)
    assert (host.manifest, host.sealed) == ({}, True)
    host.handle(key(1), Join("", {"run": {"total_steps": 9}}), 0.0)
    with pytest.raises(ManifestMismatchError, match="x: the run has"):
        host.handle(key(2), Join("", {"run": {"total_steps": 9}, "x": {}}), 0.0)


def test_joining_is_idempotent_and_tells_a_new_address() -> None:
    host = training()
    host.handle(key(1), Join("elsewhere", {}), 6.0)
    assert host.state.clients[1].address == "elsewhere"
    nonce = host.state.nonce
    host.handle(key(1), Join("elsewhere", {}), 6.0)
    assert host.state.nonce == nonce
    assert len(host.membership.members) == 3
    assert sum(event.kind == "joined" for event in host.history.events.since(0)) == 3


def test_members_that_cannot_be_are_refused() -> None:
    host = make(limits=Limits(clients=3))
    join(host, [0])
    assert code_of(lambda: host.handle(b"short", Join("", {}), 0.0)) == "InvalidMember"
    assert code_of(lambda: host.handle(key(1), Join("x" * 513, {}), 0.0)) == "InvalidMember"
    join(host, [1, 2])
    with pytest.raises(CoordinatorError) as caught:
        join(host, [3])
    assert (caught.value.code, caught.value.retryable) == ("RunFull", True)
    join(host, [2])
    assert list(host.membership.members) == [key(0), key(1), key(2)]


def test_the_first_member_opens_a_run() -> None:
    host = make()
    assert (host.state.phase, host.tick(0.0)) == (Phase.UNINITIALIZED, False)
    join(host, [0], 3.0)
    assert (host.state.phase, host.state.phase_start) == (Phase.WAITING_FOR_MEMBERS, 3.0)
    opened = make()
    opened.begin(1.0)
    opened.begin(2.0)
    assert (opened.state.phase, opened.state.phase_start) == (Phase.WAITING_FOR_MEMBERS, 1.0)


def test_leaving_before_an_epoch() -> None:
    host = make()
    join(host, range(3))
    assert host.deadline() == 5.0
    host.handle(key(1), Withdraw(), 1.0)
    assert host.deadline() is None
    join(host, [1], 2.0)
    host.disconnected(key(0), 3.0, "connection lost")
    assert list(host.membership.members) == [key(2), key(1)]
    assert code_of(lambda: host.handle(key(0), Withdraw(), 4.0)) == "InvalidWithdraw"
    host.disconnected(key(0), 4.0, "again")
    texts = [(event.kind, event.text) for event in host.history.events.since(0)][-2:]
    assert texts == [("joined", "02020202 joined"), ("dropped", "01010101 is gone: connection lost")]


def test_leaving_within_an_epoch() -> None:
    host = training(5)
    host.handle(key(2), Withdraw(), 6.0)
    host.disconnected(key(1), 6.0, "connection lost")
    gone = {client.signer: client.status for client in host.state.clients if client.status is not ClientStatus.HEALTHY}
    assert gone == {key(1): ClientStatus.DROPPED, key(2): ClientStatus.WITHDRAWN}
    assert list(host.membership.members) == [key(0), key(3), key(4)]
    # Back again: a member for the next epoch, but not of this one.
    join(host, [1], 7.0)
    assert [member.signer for member in host.pending()] == [key(1)]
    assert host.state.clients[1].status is ClientStatus.DROPPED
    assert list(host.membership.members) == [key(0), key(3), key(4), key(1)]


def test_members_of_an_epoch_are_pending_again_after_it() -> None:
    host = training(epoch_time=11.0)
    join(host, [3], 6.0)
    one_step(host)
    assert (host.state.phase, host.deadline()) == (Phase.WAITING_FOR_MEMBERS, 26.0)
    assert host.handle(key(0), GetRounds(0, 1), 0.0) == tuple(host.rounds[1:])
    assert len(host.pending()) == 4
    host.tick(26.0)
    assert [c.signer for c in host.state.clients] == [key(i) for i in range(4)]
    assert host.pending() == []
    # What the last epoch decided is served until the next one trains: newcomers may need it.
    assert [round_.step for round_ in host.handle(key(3), GetRounds(0, 0), 0.0)] == [1, 0]
    for i in range(4):
        host.handle(key(i), WarmupWitness(1, i, DIGEST), 27.0)
    assert host.handle(key(0), GetRounds(0, 0), 0.0) == ()
    assert [(round_.height, round_.step) for round_ in host.handle(key(0), GetRounds(1, 0), 0.0)] == [(0, 2)]


def test_everybody_without_a_report_is_pending_again() -> None:
    host = training()
    host.tick(15.0)
    host.tick(25.0)
    assert (host.state.phase, host.state.epoch, len(host.membership.members)) == (Phase.WAITING_FOR_MEMBERS, 1, 3)
    host.tick(30.0)
    assert host.state.phase is Phase.WARMUP


def test_a_first_member_that_does_not_say_with_what_the_run_begins_loses_its_turn() -> None:
    host = make()
    join(host, range(3))
    for first in (0, 1, 2, 0):
        host.tick(host.deadline() or 0.0)
        assert host.state.clients[0].signer == key(first)
        host.tick(host.deadline() or 0.0)
        assert host.state.phase is Phase.WAITING_FOR_MEMBERS
    for i in range(3):  # all may leave
        host.tick(host.deadline() or 0.0) if i == 0 else None
        host.handle(key(i), Withdraw(), 100.0)
    assert (host.state.phase, host.membership.members) == (Phase.WAITING_FOR_MEMBERS, {})
    # Later, silence costs nobody its place.
    host = training(epoch_time=11.0)
    one_step(host)
    for _ in range(2):
        host.tick(host.deadline() or 0.0)
        assert host.state.clients[0].signer == key(0)
        host.tick(host.deadline() or 0.0)


def test_health_check_drops_members() -> None:
    host = training(total_steps=9)
    for _ in range(3):
        play(host, 6.0, heard=[0, 1])
    assert host.handle(key(0), HealthCheck(0, 3, (key(2),)), 7.0) == 1
    assert list(host.membership.members) == [key(0), key(1)]
    event = host.history.events.since(0)[-1]
    assert (event.kind, event.signer) == ("dropped", key(2).hex())
    assert event.text == "03030303 is dropped: it delivered nothing in the last 3 rounds"
    assert code_of(lambda: host.handle(key(0), HealthCheck(0, 3, (key(1),)), 7.0)) == "InvalidHealthCheck"


def test_pause_and_resume() -> None:
    host = make()
    join(host, range(3))
    host.pause(1.0)
    assert (host.state.phase, host.deadline()) == (Phase.PAUSED, None)
    assert code_of(lambda: host.pause(1.0)) == "Halted"
    host.resume(50.0)
    assert (host.state.phase, host.deadline()) == (Phase.WAITING_FOR_MEMBERS, 55.0)
    assert code_of(lambda: host.resume(51.0)) == "CannotResume"


def test_rounds_are_served_from_any_kept_height(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_module, "MAX_ROUNDS", 4)
    host = finished()
    assert [r.height for r in host.rounds] == [0, 1, 2, 3]
    host = finished(total_steps=5)
    assert [r.height for r in host.rounds] == [2, 3, 4, 5]
    assert [r.height for r in host.handle(key(0), GetRounds(0, 3), 0.0)] == [3, 4, 5]
    assert host.handle(key(0), GetRounds(0, 1), 0.0) == ()
    assert host.handle(key(0), GetRounds(0, 6), 0.0) == ()
    assert host.handle(key(0), GetRounds(1, 1), 0.0) == ()


def test_dump_and_load_are_exact_at_every_change() -> None:
    host = make(manifest={"model": {"width": 8}})
    seen = 0

    def check() -> None:
        data = host.dump()
        again = RunHost.load(json.loads(json.dumps(data, allow_nan=False)))
        assert json.dumps(again.dump()) == json.dumps(data)
        assert again.state == host.state
        assert (again.rounds, list(again.membership.members), again.manifest) == (
            host.rounds,
            list(host.membership.members),
            host.manifest,
        )
        assert (again.history.events.since(0), again.history.metrics.since(0)) == (
            host.history.events.since(0),
            host.history.metrics.since(0),
        )

    def both(call: Callable[[], None]) -> None:
        nonlocal seen
        call()
        check()
        seen += 1

    both(lambda: join(host, range(3)))
    both(lambda: host.tick(5.0) and None)
    for i in range(3):
        both(lambda i=i: host.handle(key(i), WarmupWitness(0, i, DIGEST), 5.0))  # type: ignore[misc]
    both(lambda: report(host, 0, 6.0, Report(1, math.nan, math.inf, 5, 6)))
    both(lambda: report(host, 1, 6.0, Report(1, 2.5, 3.0, 7, 8, (Figure("norm", 1, 0.5),))))
    both(lambda: host.disconnected(key(2), 6.5, "gone"))
    while host.state.phase.active:
        both(lambda: report(host, 0, 7.0))
        both(lambda: report(host, 1, 7.0))
    assert host.state.phase is Phase.FINISHED
    assert seen == 14


def test_dump_in_parts_together_makes_the_whole() -> None:
    host = training()
    early = host.dump()
    play(host, 6.0)
    late = host.dump(rounds_from=1, since={"events": host.history.events.count - 1, "metrics": 1})
    whole = host.dump()
    assert [r["height"] for r in late["history"]] == [1]
    assert late["events"] == {"first": host.history.events.count - 1, "items": whole["events"]["items"][-1:]}
    assert late["metrics"] == {"first": 1, "items": whole["metrics"]["items"][1:]}
    assert late["state"] == whole["state"]
    assert early["events"]["items"] == whole["events"]["items"][: len(early["events"]["items"])]
    far = host.dump(since={"events": 99, "metrics": 99})
    assert far["events"] == {"first": host.history.events.count, "items": []}


@pytest.mark.parametrize(
    ("name", "value"),
    [("format", 1), ("state", {}), ("members", None), ("events", []), ("events", {"first": 0, "items": [1]}),
     ("history", [1]), ("seed", -1), ("reports", {"xx": {"loss": None}}), ("now", None)],
)  # fmt: skip
def test_other_data_is_not_loaded(name: str, value: Any) -> None:
    data = finished().dump()
    with pytest.raises(WireError):
        RunHost.load({**data, name: value})
    del data[name]
    with pytest.raises(WireError):
        RunHost.load(data)


def test_downtime_does_not_count() -> None:
    host = training()
    report(host, 0, 8.0)
    again = RunHost.load(host.dump())
    again.restarted(1008.0)
    assert (again.deadline(), again.state.epoch_start) == (1015.0, 1005.0)
    assert again.state.nonce == host.state.nonce + 1
    gathering = make()
    join(gathering, range(3), 2.0)
    again = RunHost.load(gathering.dump())
    again.restarted(102.0)
    assert again.deadline() == 107.0
    waiting = make()
    waiting.begin(0.0)
    again = RunHost.load(waiting.dump())
    again.restarted(9.0)
    assert again.deadline() is None


@pytest.mark.parametrize("odd", [(math.nan, math.inf), (-1.7e308, 1.7e308), (1.7e308, -math.inf)])
def test_figures_of_a_round(odd: tuple[float, float]) -> None:
    host = training()
    report(host, 0, 6.0, Report(1, 3.0, 100.0, 1000, 500))
    report(host, 1, 6.0, Report(1, 1.0, 50.0, 2000, 700))
    host.tick(6.5)
    # The third comes when its round is over: refused as a witness, but its figures count.
    seat = round_selection(host.rounds[0], host.state.config).witness_proof(2)
    late = Witness(0, 0, seat, ROOT, bytes(192), bytes(192), report=Report(1, *odd, 3000, 900))
    for _ in range(2):
        assert code_of(lambda: host.handle(key(2), late, 7.0)) == "InvalidWitness"
    row = host.history.metrics.since(0)[0]
    assert (row.height, row.step, row.clients, row.batch_size, row.reports, row.losses) == (0, 1, 3, 6, 3, 2)
    assert (row.loss, row.tokens_per_second, row.bytes_up, row.bytes_down) == (2.0, 150.0, 2000.0, 700.0)
    assert host.history.reports[key(1)].loss == 1.0
    # Bytes are counted since the report before, or from zero after a restart.
    report(host, 0, 8.0, Report(2, 2.0, 100.0, 1600, 600))
    report(host, 1, 8.0, Report(2, 2.0, 100.0, 400, 100))
    host.tick(8.75)
    assert (host.history.metrics.since(0)[1].bytes_up, host.history.metrics.since(0)[1].bytes_down) == (500.0, 100.0)
    # The same step again, in a round that drains or by a node that had nothing to train, is no further figure.
    report(host, 0, 8.5, Report(2, 9.0, 100.0, 1700, 700))
    assert (
        host.history.metrics.since(0)[1].reports,
        host.history.metrics.since(0)[1].loss,
        host.history.metrics.since(0)[2].reports,
    ) == (2, 2.0, 0)
    assert host.history.reports[key(0)].bytes_up == 1700
    strangers = len(host.history.reports)
    assert code_of(lambda: host.handle(key(9), late, 7.0)) == "InvalidWitness"
    assert len(host.history.reports) == strangers


@pytest.mark.parametrize("lag", [0, 1], ids=["at once", "with overlap"])
def test_figures_are_of_the_step_that_was_trained(lag: int) -> None:
    host, now = training(total_steps=6, epoch_time=11.0), 5.0
    while host.state.phase is not Phase.FINISHED:
        now += 4.0
        state, round_ = host.state, host.state.current
        if state.phase is Phase.ROUND_TRAIN:
            assert round_ is not None
            trained = round_.step - lag if round_.step else state.step - 1  # while it drains, nodes train nothing
            play(host, now, figures=Report(trained, 5.0 - trained if trained else math.nan, bytes_up=int(now)))
        elif state.phase is Phase.WARMUP:
            for i, client in enumerate(state.clients):
                host.handle(client.signer, WarmupWitness(state.epoch, i, DIGEST), now)
        host.tick(now)
    assert host.state.epoch > 1
    assert [(row.step, row.loss, row.reports) for row in host.history.metrics.since(0)] == [
        (s, 5.0 - s, 2) for s in range(1, 7)
    ]


def named(host: RunHost) -> list[dict[str, float]]:
    """The run's means of named figures, row by row."""
    return [{mean.name: mean.value for mean in row.figures} for row in host.history.metrics.since(0)]


def test_named_figures_are_means_of_their_own_step() -> None:
    host = training(total_steps=9)

    def tell(i: int, now: float, *figures: Figure) -> None:
        report(host, i, now, Report(host.state.step, figures=figures))

    tell(0, 6.0, Figure("norm", 1, 2.0), Figure("agreement", 1, 0.75))
    tell(1, 6.0, Figure("norm", 1, 4.0), Figure("huge", 1, 1e300), Figure("lost", 1, math.nan))
    host.tick(host.deadline() or 0.0)
    assert named(host) == [{"norm": 3.0, "agreement": 0.75}, {}]
    # A report of a later step repeats what its sender said; the others' come late, and count for their own step.
    tell(0, 7.0, Figure("norm", 1, 2.0), Figure("agreement", 1, 0.75))
    tell(1, 7.0, Figure("norm", 1, 4.0), Figure("agreement", 1, 0.25))
    host.tick(host.deadline() or 0.0)
    assert named(host) == [{"norm": 3.0, "agreement": 0.5}, {}, {}]
    tell(0, 8.0, Figure("norm", 2, 7.0), Figure("norm", 99, 1.0))
    assert named(host)[1:] == [{"norm": 7.0}, {}]
    assert RunHost.load(host.dump()).history.metrics.since(0) == host.history.metrics.since(0)
    assert host.history.reports[key(1)].figures == (Figure("norm", 1, 4.0), Figure("agreement", 1, 0.25))


def test_named_figures_of_a_step_are_few() -> None:
    host = training()
    for i in range(2):
        many = [Figure(f"name/{MAX_FIGURES * i + number}", 1, 1.0) for number in range(MAX_FIGURES)]
        report(host, i, 6.0, Report(1, figures=(*many,)))
    assert len(host.history.metrics.since(0)[0].figures) == MAX_FIGURES


def test_a_run_that_an_earlier_version_stored_has_no_named_figures() -> None:
    host = training()
    report(host, 0, 6.0, Report(1, 3.0, figures=(Figure("norm", 1, 2.0),)))
    data = host.dump()
    for values in (*data["metrics"]["items"], *data["reports"].values()):
        del values["figures"]
    again = RunHost.load(data)
    assert (again.history.metrics.since(0)[0].loss, again.history.metrics.since(0)[0].figures) == (3.0, ())
    assert again.history.reports[key(0)] == Report(1, 3.0)


def story(host: RunHost) -> list[str]:
    return [event.text for event in host.history.events.since(0)]


def test_events_tell_the_story() -> None:
    assert story(finished()) == [
        "01010101 joined",
        "02020202 joined",
        "03030303 joined",
        "epoch 0 is formed by 3 nodes: 01010101, 02020202, 03030303",
        "epoch 0 begins with step 1 from the parameters 64646464",
        "epoch 0 ends: all steps are trained; up to two rounds exchange what is under way",
        "epoch 0 has ended: the parameters 64646464 of step 3 are agreed",
        "the run has finished after 3 steps",
    ]


def test_events_of_what_goes_wrong() -> None:
    host = make()
    join(host, range(3))
    host.tick(5.0)
    host.tick(15.0)
    assert story(host)[-1] == "epoch 0 could not begin: the parameters were reported by 0 of 3 nodes in time"
    host.tick(20.0)
    host.handle(key(0), Withdraw(), 21.0)
    host.handle(key(1), Withdraw(), 21.0)
    failed = [text for text in story(host) if "could not begin" in text]
    assert failed[1:] == ["epoch 0 could not begin: only 1 node is left, and 2 are needed"]
    host = training()
    host.pause(6.0)
    assert story(host)[-1] == "a pause was asked for; the epoch ends first"
    play(host, 6.0)
    assert story(host)[-1] == "epoch 0 ends: a pause was asked for; up to two rounds exchange what is under way"
    while host.state.phase.active:
        host.tick(host.deadline() or 0.0)
    assert story(host)[-2:] == [
        "epoch 0 has ended: the run goes on from step 1, which the decided rounds after the parameters 64646464 of "
        "step 0 give",
        "the run is paused",
    ]
    host.resume(500.0)
    assert "the run is resumed" in story(host)


def test_events_name_what_was_needed() -> None:
    silent = training()
    silent.tick(15.0)
    silent.tick(25.0)
    assert "epoch 0 has ended: 0 witnesses reported, and 2 are needed; the run goes on from step 1" in story(silent)[-1]
    few = training()
    report(few, 0, 6.0)
    few.tick(15.0)
    few.tick(25.0)
    assert "epoch 0 has ended: 1 witness reported, and 2 are needed; the run goes on from step 1" in story(few)[-1]
    left = training()
    left.disconnected(key(1), 6.0, "gone")
    left.handle(key(2), Withdraw(), 6.0)
    assert "epoch 0 has ended: 1 node of 3 is left, and 2 are needed" in "\n".join(story(left))
    idle = training(total_steps=9)
    for _ in range(4):
        play(idle, 6.0, merkle=EMPTY_ROOT)
    assert story(idle)[-1].startswith("epoch 0 ends: no result was agreed in the last 4 rounds; the run pauses then")
    assert not any("asked for" in text for text in story(idle))
    play(idle, 6.0)
    assert idle.state.phase is Phase.PAUSED


def test_events_and_figures_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history_module, "MAX_EVENTS", 4)
    monkeypatch.setattr(history_module, "MAX_METRICS", 2)
    host = finished()
    assert (len(host.history.events.since(0)), host.history.events.count) == (4, 8)
    assert (len(host.history.metrics.since(0)), host.history.metrics.count) == (2, 3)
    assert host.history.events.since(6) == host.history.events.since(0)[2:]
    assert host.history.metrics.since(2) == host.history.metrics.since(0)[1:]
    again = RunHost.load(host.dump())
    assert (again.history.events.since(0), again.history.events.count) == (host.history.events.since(0), 8)


# Who reports last.


def test_a_decided_round_waits_a_moment_for_members_that_reported_before() -> None:
    """So each of them holds what is decided: after a power cut the run goes on with any one."""
    host = training(total_steps=9)
    for i in (0, 1, 2):
        report(host, i, 7.0)
    assert host.rounds[-1].height == 1  # everyone has reported
    for i in (0, 1):
        report(host, i, 9.0)
    assert (host.rounds[-1].height, host.deadline()) == (1, 10.0)  # half of the two seconds since it began
    report(host, 2, 9.5)
    assert (host.rounds[-1].height, len(host.rounds[-2].witnesses)) == (2, 3)
    for i in (0, 1):
        report(host, i, 11.5)
    host.tick(12.25)
    assert host.rounds[-1].height == 2
    host.tick(12.5)
    assert host.rounds[-1].height == 3
    for i in (0, 1):
        report(host, i, 13.0)
    assert host.rounds[-1].height == 4  # who was not in time once is not waited for again


# Points.


def test_a_decided_round_pays_those_whose_results_it_has() -> None:
    host = training()
    play(host, 6.0, heard=[0, 2])
    assert host.points == {key(0): 3, key(2): 3}
    assert RunHost.load(json.loads(json.dumps(host.dump()))).points == host.points
    while host.state.phase.active:  # drain rounds pay nothing
        play(host, 7.0)
    assert host.points == {key(0): 7, key(1): 4, key(2): 7}


def test_one_witness_gives_nobody_points() -> None:
    host = training()
    report(host, 0, 6.0, heard=[0, 1])
    report(host, 1, 6.0, heard=[1, 2])
    host.tick(6.5)
    assert host.points == {key(1): 6}  # a result is named by as many witnesses as decide the round


def test_reports_of_other_results_do_not_count_for_points() -> None:
    host = training(4)
    report(host, 3, 6.0, merkle=b"other" + bytes(27), heard=[0, 1, 3])
    for i, heard in enumerate(([0, 1, 3], [0, 1, 3], [0, 1])):
        report(host, i, 6.0, heard=heard)
    assert host.state.step == 2
    assert host.points == {key(0): 3, key(1): 3}


def test_rounds_without_results_pay_nothing() -> None:
    host = training(total_steps=9)
    play(host, 6.0, merkle=EMPTY_ROOT)
    report(host, 0, 6.0, merkle=b"1" * 32)
    report(host, 1, 6.0, merkle=b"2" * 32)
    while host.rounds[-1].height == 1:
        host.tick(host.deadline() or 0.0)
    assert host.points == {}


def test_a_decided_round_pays_also_if_the_epoch_ends_with_it() -> None:
    host = training()
    host.disconnected(key(2), 6.0, "gone")
    report(host, 0, 6.0)
    host.disconnected(key(1), 6.0, "gone")  # the epoch ends before the round is decided
    assert (host.state.epoch, host.points) == (1, {})
    host = training(min_clients=3)
    host.state = replace(host.state, needed=2)
    report(host, 0, 6.0)
    host.tick(6.0)
    report(host, 1, 6.0)
    host.tick(6.5)
    assert host.points == {key(i): 2 for i in range(3)}


# Shares by speed.


def mixed(**config: int) -> RunHost:
    """A run whose third member is four times slower, in its third round."""
    host = training(manifest={"run": {"shares": "speed"}}, global_batch_size_start=27, global_batch_size_end=27,
                    total_steps=9, **config)  # fmt: skip
    for now in (6.0, 7.0):
        round_(host, now)
    return host


def round_(host: RunHost, now: float, heard: tuple[int, ...] = (0, 1, 2)) -> None:
    step = host.state.step
    for i, rate in enumerate((40.0, 40.0, 10.0)):
        report(host, i, now, Report(step, tokens_per_second=rate), heard=heard)


def test_the_weights_of_a_round_are_on_record_when_it_begins() -> None:
    host = mixed()
    assert [one.weights for one in host.rounds] == [(), (256, 256, 64), (256, 256, 64)]
    assert host.state.current is not None
    assert host.state.current.weights == (256, 256, 64)
    again = RunHost.load(json.loads(json.dumps(host.dump())))
    assert (again.state, again.rounds, again.speeds.known) == (host.state, host.rounds, host.speeds.known)
    for each in (host, again):
        round_(each, 8.0)
    assert again.state.current == host.state.current


def test_speeds_are_in_the_tokens_that_the_manifest_says() -> None:
    manifest = {"run": {"shares": "speed"}, "data": {"seq_len": 100}}
    host = training(manifest=manifest, global_batch_size_start=27, global_batch_size_end=27, total_steps=9)
    for now in (6.0, 7.0):
        for i, rate in enumerate((4000.0, 4000.0, 1000.0)):
            report(host, i, now, Report(host.state.step, tokens_per_second=rate), heard=(0, 1, 2))
    assert host.state.current is not None
    assert host.state.current.weights == (256, 256, 64)


def test_speeds_do_not_matter_where_shares_are_equal() -> None:
    host = training(manifest={"run": {"shares": "equal"}}, total_steps=9)
    for now in (6.0, 7.0, 8.0):
        round_(host, now)
    assert [one.weights for one in host.rounds] == [()] * 4
    assert host.speeds.dump() == {}


def test_points_follow_the_shares() -> None:
    host = mixed()
    before = dict(host.points)
    assert before == {key(0): 9 + 12, key(1): 9 + 12, key(2): 9 + 3}
    round_(host, 8.0)
    assert {signer: points - before[signer] for signer, points in host.points.items()} == {
        key(0): 12, key(1): 12, key(2): 3
    }  # fmt: skip


def test_a_result_that_is_missing_makes_its_trainer_s_next_share_smaller() -> None:
    host = mixed()
    fast = host.speeds.known[key(1)]
    round_(host, 8.0, heard=(0, 2))
    assert host.speeds.known[key(1)] == fast * 7 / 8
    assert host.speeds.known[key(0)] == fast


def test_a_round_that_drains_has_no_weights() -> None:
    host = mixed()
    while host.state.phase.active and not host.state.draining:
        play(host, 9.0)
    assert host.state.current is not None
    assert host.state.current.weights == ()


# Going back.


def test_the_owner_goes_back_to_a_step_and_its_samples() -> None:
    host = training()
    play(host, 6.0)
    play(host, 7.0)
    host.pause(8.0)
    while host.state.phase.active:
        play(host, 8.0)
    assert (host.state.phase, host.state.step, host.state.epoch_start_data_index) == (Phase.PAUSED, 4, 18)
    other = b"o" * 32
    assert code_of(lambda: host.restart_from(other, 4, 9.0)) == "InvalidCheckpoint"
    host.restart_from(other, 1, 9.0)
    assert (host.state.step, host.state.checkpoint, host.state.epoch_start_data_index) == (2, Checkpoint(other, 1), 6)
    assert host.rounds == []
    assert host.handle(key(0), GetRounds(0, 0), 9.0) == ()
    assert story(host)[-1] == "the owner goes back to the parameters 6f6f6f6f of step 1"
    assert RunHost.load(json.loads(json.dumps(host.dump()))).dump() == host.dump()
    host.resume(10.0)
    host.tick(30.0)
    assert host.state.phase is Phase.WAITING_FOR_MEMBERS  # nobody has shown that it holds them
    host.handle(key(1), WarmupWitness(1, 0, other), 31.0)
    host.tick(36.0)
    for i in range(3):
        host.handle(key(i), WarmupWitness(1, i, other), 37.0)
    assert [(round_.step, round_.data_index) for round_ in host.rounds] == [(2, 6)]
    assert code_of(lambda: host.restart_from(other, 1, 38.0)) == "InvalidRunState"

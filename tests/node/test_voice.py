"""What a node tells people: as whom it joins, who is there, for whom it waits, why it leaves; each node as itself."""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import replace
from typing import Any

import pytest

from psyche_lightning.errors import ManifestMismatchError
from psyche_lightning.node.news import news
from psyche_lightning.node.notices import (
    Dropped,
    EpochFormed,
    Finished,
    Joined,
    Left,
    Notice,
    Outcome,
    Paused,
    PeerLeft,
    Waits,
)
from psyche_lightning.node.waiting import Wait
from psyche_lightning.protocol.requests import Join
from psyche_lightning.protocol.state import Client, ClientStatus, Phase, RunState
from psyche_lightning.wire.identity import short

# --- from one state to the next ---------------------------------------------------------------------------------------

KEYS = [bytes([number]) * 32 for number in range(4)]
ME = KEYS[0]
CLIENTS = tuple(Client(signer=key, node=key[::-1] + b"") for key in KEYS[:3])
BEFORE = RunState("run", Phase.WAITING_FOR_MEMBERS)
FORMED = replace(BEFORE, phase=Phase.WARMUP, clients=CLIENTS)
TRAINS = replace(FORMED, phase=Phase.ROUND_TRAIN, step=5)
DRAINS = replace(TRAINS, epoch=3, step=9, start_step=5, last_step=9)


def standing(state: RunState, *status: ClientStatus) -> RunState:
    return replace(state, clients=tuple(replace(c, status=s) for c, s in zip(state.clients, status, strict=True)))


H, D, W = ClientStatus.HEALTHY, ClientStatus.DROPPED, ClientStatus.WITHDRAWN
FIRST = EpochFormed(0, tuple(KEYS[:3]), True)


@pytest.mark.parametrize(
    ("before", "now", "told"),
    [
        (None, BEFORE, []),
        (BEFORE, FORMED, [FIRST]),
        (BEFORE, TRAINS, [FIRST]),  # states in between may be skipped
        (None, TRAINS, [FIRST]),
        (None, replace(TRAINS, clients=CLIENTS[1:]), [EpochFormed(0, tuple(KEYS[1:3]), False)]),
        (FORMED, TRAINS, []),
        (TRAINS, replace(TRAINS, phase=Phase.ROUND_WITNESS), []),
        (TRAINS, standing(TRAINS, H, D, W), [PeerLeft(KEYS[1], D), PeerLeft(KEYS[2], W)]),
        (standing(TRAINS, H, D, H), standing(TRAINS, H, D, W), [PeerLeft(KEYS[2], W)]),
        (
            standing(TRAINS, H, D, H),
            replace(TRAINS, clients=(CLIENTS[0], CLIENTS[2]), exited_clients=(replace(CLIENTS[1], status=D),)),
            [],
        ),
        (TRAINS, standing(TRAINS, D, H, H), [Dropped(D)]),
        (DRAINS, replace(DRAINS, phase=Phase.WAITING_FOR_MEMBERS, epoch=4), []),
        (DRAINS, replace(DRAINS, phase=Phase.WARMUP, epoch=4), [EpochFormed(4, tuple(KEYS[:3]), True)]),
        (BEFORE, replace(BEFORE, phase=Phase.PAUSED), [Paused(True)]),
        (None, replace(BEFORE, phase=Phase.PAUSED), [Paused(True)]),
        (replace(BEFORE, phase=Phase.PAUSED), BEFORE, [Paused(False)]),
        (DRAINS, replace(DRAINS, phase=Phase.FINISHED), []),
    ],
)
def test_what_two_states_mean(before: RunState | None, now: RunState, told: list[Notice]) -> None:
    assert list(news(before, now, ME)) == told


def test_many_nodes_are_not_all_named() -> None:
    keys = tuple(bytes([number]) * 32 for number in range(20))
    assert str(EpochFormed(1, keys, True)).endswith("07070707, ...")


# --- waiting ----------------------------------------------------------------------------------------------------------


def lines(wait: Wait, until: float, what: Any, start: float = 0.0) -> list[float]:
    """When a wait from ``start`` on is told, if somebody looks every quarter of a second."""
    wait.rest(start)
    moments = [start + step / 4 for step in range(int((until - start) * 4) + 1)]
    told = [now for now in moments if wait.worth_a_line(now, what(now) if callable(what) else what) is not None]
    wait.resume(until)
    return told


def test_a_wait_is_told_soon_then_ever_rarer() -> None:
    assert lines(Wait(), 700.0, "for a") == [2, 15, 30, 60, 120, 300, 600]


def test_short_waits_need_no_words() -> None:
    assert lines(Wait(), 1.9, "for a") == []


def test_who_works_does_not_wait() -> None:
    wait = Wait()
    assert lines(wait, 1.5, "for a") == []
    assert wait.worth_a_line(100.0, "for a") is None  # it trains, applies or loads something
    assert lines(wait, 120.0, "for a", start=119.0) == [119.5]  # 1.5 s before, and half a second more


def test_another_reason_is_told_when_the_last_line_is_some_time_ago() -> None:
    assert lines(Wait(), 60.0, lambda now: "for a" if now < 35 else f"for b, part {int(now)}") == [2, 15, 30, 45, 60]


def test_what_is_usual_needs_no_words() -> None:
    wait = Wait()
    for number in range(8):
        lines(wait, 100.0 * number + 10.0, "for a", start=100.0 * number)
        wait.over()
    assert lines(wait, 1030.0, "for a", start=1000.0) == [1020, 1030]


def test_what_is_usual_for_long_is_told_after_five_minutes() -> None:
    wait = Wait()
    for number in range(8):
        lines(wait, 1000.0 * number + 400.0, "for a", start=1000.0 * number)
        wait.over()
    assert lines(wait, 9400.0, "for a", start=9000.0) == [9300]


# --- a whole run ------------------------------------------------------------------------------------------------------


def test_nodes_of_one_process_tell_each_for_itself_from_joining_to_leaving(make_run: Any, make_trainee: Any) -> None:
    run = make_run(3, 4)
    nodes = [make_trainee(number, run) for number in range(3)]
    run.go(*nodes)
    keys = {node.identity.public for node in nodes}
    finished = str(Finished(Outcome.LAST_PARAMETERS, run.host.state.checkpoint.digest))
    for node in nodes:
        (joined,) = (notice for notice in node.said if isinstance(notice, Joined))
        assert (joined.node, joined.signer) == (node.identity.public, node.identity.public)
        assert joined.address.startswith("memory:")
        (formed,) = (notice for notice in node.said if isinstance(notice, EpochFormed))
        assert (formed.epoch, set(formed.nodes), formed.member) == (0, keys, True)
        assert node.said[-1] == Left(finished)
        assert [notice for notice in node.said if isinstance(notice, Left)] == [Left(finished)]
    assert {name for name, _ in run.told} == {short(key) for key in keys}


def test_a_node_tells_for_whom_it_waits_and_why_it_leaves(make_run: Any, make_trainee: Any) -> None:
    run = make_run(2, 4)
    node = make_trainee(0, run)
    node.participant._runtime.wait._due = 0.0  # the test does not want to wait
    thread = threading.Thread(target=node.train, daemon=True)
    thread.start()
    while not any(isinstance(notice, Waits) for notice in node.said):
        time.sleep(0.01)
    (waits,) = (notice for notice in node.said if isinstance(notice, Waits))
    assert waits.what == "epoch 0: waiting for 2 members"
    assert waits.level == logging.INFO
    node.participant.interrupt(KeyboardInterrupt())
    thread.join(30)
    assert isinstance(node.error, KeyboardInterrupt)
    assert node.said[-1] == Left("its training ended here")  # a strategy would know better


def test_who_could_not_join_has_not_left(make_run: Any, make_trainee: Any) -> None:
    run = make_run(2, 4)
    run.host.handle(KEYS[1], Join("", {"model": {"parameters": ["other"]}}), 0.0)
    node = make_trainee(0, run)
    node.train()
    assert isinstance(node.error, ManifestMismatchError)
    assert [notice for notice in node.said if isinstance(notice, (Joined, Left))] == []

"""What people read while a run waits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from psyche_lightning.coordinator.host import RunHost
from psyche_lightning.coordinator.waiting import awaited
from psyche_lightning.protocol.requests import Join, WarmupWitness
from psyche_lightning.protocol.state import Checkpoint, Client, CoordinatorConfig, Phase, RunState

DIGEST = bytes.fromhex("31b4378d") + bytes(28)


def key(i: int) -> bytes:
    return bytes([i + 1]) * 32


def members(*who: int) -> list[Client]:
    return [Client(key(i), key(i)) for i in who]


def state(phase: Phase = Phase.WAITING_FOR_MEMBERS, **fields: Any) -> RunState:
    return RunState("r", phase=phase, config=CoordinatorConfig(init_min_clients=3), **fields)


@pytest.mark.parametrize(
    ("who", "line"),
    [
        ([5, 6, 7], "waiting for a holder of 31b4378d, step 100; 3 newcomers are here"),
        ([5, 6], "waiting for a holder of 31b4378d, step 100; 2 newcomers are here"),
        ([5], "waiting for a holder of 31b4378d, step 100, and 1 more member; 1 newcomer is here"),
        ([], "waiting for a holder of 31b4378d, step 100, and 2 more members"),
        ([1], "waiting for 2 more members"),
        ([1, 5], "waiting for 1 more member"),
        ([1, 5, 6], "waiting for further members before the next epoch is formed"),
    ],
)
def test_a_run_whose_members_are_away_names_what_they_hold(who: list[int], line: str) -> None:
    waiting = state(checkpoint=Checkpoint(DIGEST, 100), holders=(key(0), key(1)), step=101)
    assert awaited(waiting, members(*who)) == line


def test_a_fresh_run_waits_for_members() -> None:
    assert awaited(state(), members(1)) == "waiting for 2 more members"
    assert awaited(state(), members(0, 1, 2)).startswith("waiting for further members")


def test_other_phases() -> None:
    assert awaited(state(Phase.UNINITIALIZED), []) == "waiting to be opened"
    assert awaited(state(Phase.PAUSED), []) == "waiting to be resumed by its owner"
    assert awaited(state(Phase.ROUND_TRAIN), []) == awaited(state(Phase.FINISHED), []) == ""


def test_a_host_says_it_at_each_step_to_an_epoch() -> None:
    host = RunHost("r", replace(CoordinatorConfig(), init_min_clients=2), seed=1)
    said = [host.waits_for]
    for i in range(2):
        host.handle(key(i), Join("", {}), 0.0)
        said.append(host.waits_for)
    host.tick(10.0)
    for i in range(2):
        said.append(host.waits_for)
        host.handle(key(i), WarmupWitness(0, i, DIGEST), 10.0)
    assert [*said, host.waits_for] == [
        "waiting to be opened",
        "waiting for 1 more member",
        "waiting for further members before the next epoch is formed",
        "waiting for 2 of 2 members to report the parameters",
        "waiting for 1 of 2 members to report the parameters",
        "",
    ]

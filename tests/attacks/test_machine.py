"""Members that lie to the coordinator: fewer of them than a quorum leaves decide nothing, drop nobody, earn nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import pytest

from psyche_lightning.coordinator.host import RunHost
from psyche_lightning.errors import CoordinatorError
from psyche_lightning.protocol.bloom import participants_bloom
from psyche_lightning.protocol.committee import decided_root, quorum, round_selection
from psyche_lightning.protocol.merkle import EMPTY_ROOT
from psyche_lightning.protocol.requests import HealthCheck, Join, WarmupWitness, Witness
from psyche_lightning.protocol.state import Checkpoint, CoordinatorConfig, Phase

GOOD, EVIL = b"G" * 32, b"E" * 32
LIST, LIE = b"L" * 32, b"X" * 32
CONFIG = CoordinatorConfig(init_min_clients=4, min_clients=1, global_batch_size_start=12, global_batch_size_end=12)


def key(i: int) -> bytes:
    return bytes([i + 1]) * 32


def run_of(count: int, **config: Any) -> RunHost:
    """A run whose members wait for their epoch."""
    host = RunHost("r", replace(CONFIG, init_min_clients=count, **config), seed=1)
    for i in range(count):
        host.handle(key(i), Join("", {}), 0.0)
    return host


def training(count: int, **config: Any) -> RunHost:
    host = run_of(count, **config)
    host.tick(10.0)
    for i in range(count):
        host.handle(key(i), WarmupWitness(0, i, GOOD), 10.0)
    assert host.state.phase is Phase.ROUND_TRAIN
    return host


def report(host: RunHost, i: int, heard: Iterable[int], root: bytes = LIST, **named: Any) -> None:
    round_ = host.state.current
    assert round_ is not None
    proof = round_selection(round_, host.state.config).witness_proof(round_.clients.index(key(i)))
    bloom = participants_bloom(round_.seed, [key(j) for j in heard])
    request = Witness(host.state.epoch, round_.height, proof, root, bloom, bytes(192), **named)
    host.handle(key(i), request, host.state.phase_start)


def play(host: RunHost, who: Iterable[int], root: bytes = LIST) -> None:
    """A round in which ``who`` report, each until the round is over, that they have the results of all of them."""
    place = host.state.epoch, host.rounds[-1].height
    for i in (everyone := list(who)):
        if (host.state.epoch, host.rounds[-1].height) == place:
            report(host, i, everyone, root)


def wait(host: RunHost, until: Callable[[], bool]) -> None:
    """Let time pass, phase by phase."""
    for _ in range(20):
        if until():
            return
        host.tick(host.deadline() or 0.0)
    raise AssertionError("time alone does not lead there")


def refused(code: str, call: Callable[[], object]) -> None:
    with pytest.raises(CoordinatorError) as caught:
        call()
    assert caught.value.code == code


def test_a_lone_report_decides_nothing_and_drops_nobody() -> None:
    """One of four reports alone that only its own results exist, wants the others dropped, and names parameters."""
    host, evil = training(4), 3
    play(host, range(4))
    points, members = dict(host.points), list(host.membership.members)
    report(host, evil, [evil], LIE, step=1, digest=EVIL)
    check = HealthCheck(0, 1, tuple(key(i) for i in range(3)))
    refused("InvalidHealthCheck", lambda: host.handle(key(evil), check, host.state.phase_start))
    wait(host, lambda: host.state.epoch == 1)
    assert [round_.height for round_ in host.rounds] == [0, 1]  # the epoch ended with that round
    assert [decided_root(round_, 3) for round_ in host.rounds] == [LIST, None]
    assert host.state.checkpoint == Checkpoint(GOOD, 0)
    assert host.points == points
    assert list(host.membership.members) == members
    assert {client.status.name for client in host.state.clients} == {"HEALTHY"}


def test_the_run_goes_on_from_what_was_decided_and_not_from_what_one_member_says() -> None:
    host, evil = training(4), 3
    play(host, range(4))
    report(host, evil, [evil], LIE, step=1, digest=EVIL)
    wait(host, lambda: host.state.phase is Phase.WARMUP)
    now = host.state.phase_start
    host.handle(key(evil), WarmupWitness(1, evil, EVIL), now)
    for i in range(3):  # they applied what was decided to the parameters of the record
        host.handle(key(i), WarmupWitness(1, i, b"H" * 32), now)
    assert host.state.checkpoint == Checkpoint(b"H" * 32, 2)
    # Its word ends no warm-up of its own, either.
    host = training(4)
    wait(host, lambda: host.state.phase is Phase.WARMUP)
    host.handle(key(evil), WarmupWitness(1, evil, EVIL), host.state.phase_start)
    wait(host, lambda: host.state.phase is Phase.WAITING_FOR_MEMBERS)
    assert host.state.checkpoint == Checkpoint(GOOD, 0)


@pytest.mark.parametrize("count", [3, 4, 7, 8])
def test_all_that_a_quorum_leaves_decide_nothing_together(count: int) -> None:
    host = training(count)
    evil = range(quorum(count), count)
    for i in evil:
        report(host, i, evil, LIE, step=0, digest=EVIL)
    assert host.state.current is not None
    play(host, range(quorum(count)))
    assert decided_root(host.rounds[0], host.state.needed) == LIST
    assert host.state.checkpoint == Checkpoint(GOOD, 0)
    assert set(host.points) == {key(i) for i in range(quorum(count))}
    points = dict(host.points)
    for i in evil:  # now alone
        report(host, i, evil, LIE, step=1, digest=EVIL)
    wait(host, lambda: host.state.epoch == 1)
    assert decided_root(host.rounds[1], host.state.needed) is None
    assert (host.state.checkpoint, host.points) == (Checkpoint(GOOD, 0), points)


@pytest.mark.parametrize("count", [3, 4, 7, 8])
def test_all_that_a_quorum_leaves_drop_nobody_together(count: int) -> None:
    host = training(count)
    honest, evil = range(quorum(count)), range(quorum(count), count)
    for height in range(4):
        for i in (*evil, *honest):
            if host.rounds[-1].height == height:
                report(host, i, evil if i in evil else range(count))
    assert host.rounds[-1].height == 4
    for i in honest:
        check = HealthCheck(0, 4, (key(i),))
        refused("InvalidHealthCheck", lambda c=check: host.handle(key(evil[0]), c, host.state.phase_start))  # type: ignore[misc]


def test_whoever_stays_does_not_decide_alone() -> None:
    """Connections are cut, and the epoch's quorum does not shrink with those that are gone."""
    host, evil = training(4), 3
    for i in range(3):
        host.disconnected(key(i), 11.0, "the network between them is cut")
    assert host.state.epoch == 1  # too few are left, whatever the one does
    refused("InvalidRunState", lambda: report(host, evil, [evil], LIE))
    host.tick(1000.0)
    assert (host.state.phase, host.state.checkpoint, host.points) == (
        Phase.WAITING_FOR_MEMBERS,
        Checkpoint(GOOD, 0),
        {},
    )


def test_what_was_decided_cannot_be_taken_back() -> None:
    """While the epoch drains its witnesses may report again, to name parameters: not to change what is decided."""
    host = training(4, total_steps=1)
    play(host, range(4))
    play(host, range(4))
    for i in (1, 2, 3):
        report(host, i, range(4))
    report(host, 3, [3], LIE, step=1, digest=EVIL)
    assert host.state.draining
    assert decided_root(host.rounds[-1], host.state.needed) == LIST
    wait(host, lambda: host.state.epoch == 1)
    assert decided_root(host.rounds[-1], host.state.needed) == LIST
    assert host.state.checkpoint == Checkpoint(GOOD, 0)


def test_members_that_agree_on_nothing_do_not_train_for_ever() -> None:
    """A quorum that keeps reporting empty lists earns nothing, and the run pauses until its owner looks at it."""
    host = training(3)
    for _ in range(4):
        play(host, range(2), EMPTY_ROOT)
    wait(host, lambda: host.state.phase is Phase.PAUSED)
    assert (host.state.step, host.points) == (5, {})


def test_the_first_report_of_a_fresh_run_decides_nothing() -> None:
    """A member that is not the first of the list says first that the run begins with its own parameters."""
    host, evil = run_of(2), 1
    host.tick(10.0)
    refused("InvalidWitness", lambda: host.handle(key(evil), WarmupWitness(0, 1, EVIL), 10.0))
    host.handle(key(0), WarmupWitness(0, 0, GOOD), 10.0)
    refused("InvalidWitness", lambda: host.handle(key(evil), WarmupWitness(0, 1, EVIL), 10.0))
    wait(host, lambda: host.state.phase is Phase.WAITING_FOR_MEMBERS)
    assert host.state.checkpoint == Checkpoint()  # one of two is no quorum
    # The owner removes it: at once, and no epoch is formed with it again.
    host.kick(key(evil), 100.0)
    assert list(host.membership.members) == [key(0)]
    refused("NotAuthorized", lambda: host.handle(key(evil), Join("", {}), 101.0))


def test_strangers_do_not_take_a_run_whose_members_are_away() -> None:
    """All members of the last epoch are gone; newcomers wait, and cannot begin with other parameters."""
    host = training(3)
    for i in range(3):
        host.disconnected(key(i), 11.0, "power cut")
    for i in range(3, 7):
        host.handle(key(i), Join("", {}), 12.0)
    host.tick(10_000.0)
    assert (host.state.phase, host.deadline()) == (Phase.WAITING_FOR_MEMBERS, None)
    refused("InvalidWitness", lambda: host.handle(key(3), WarmupWitness(1, 0, EVIL), 10_001.0))
    host.handle(key(1), Join("", {}), 10_002.0)  # any one of them is enough
    host.tick(20_000.0)
    assert host.state.phase is Phase.WARMUP

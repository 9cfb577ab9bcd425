"""The wall clock steps; a run's time does not."""

from __future__ import annotations

from pathlib import Path

import pytest

from psyche_lightning.coordinator.host import RunHost
from psyche_lightning.protocol.requests import Join
from psyche_lightning.protocol.state import CoordinatorConfig, Phase
from psyche_lightning.server.clock import steady
from psyche_lightning.server.live import LiveRun
from psyche_lightning.server.store import SqliteStore
from psyche_lightning.wire.canonical import sha256

YEAR = 365 * 86400.0
MANIFEST = {"model": {"layers": 2}}
CONFIG = CoordinatorConfig(total_steps=12, warmup_time=10.0)


class Clocks:
    """A machine's two clocks."""

    def __init__(self, wall: float) -> None:
        self.wall, self.monotonic = wall, 77.0

    def pass_(self, seconds: float) -> None:
        self.wall += seconds
        self.monotonic += seconds

    def live(self, host: RunHost, store: SqliteStore | None = None) -> LiveRun:
        return LiveRun(host, steady(lambda: self.wall, lambda: self.monotonic), store, lambda: self.wall)


@pytest.mark.parametrize("step", [-3600.0, 3600.0, -30 * YEAR, 30 * YEAR])
def test_a_run_goes_on_when_the_wall_clock_steps(step: float) -> None:
    clocks = Clocks(50 * YEAR)
    live = clocks.live(RunHost("r", CONFIG, seed=1))
    live.act(lambda host, now: host.handle(sha256(b"a node"), Join("there", MANIFEST), now))
    clocks.pass_(4.0)
    clocks.wall += step
    live.tick()
    assert live.state.phase is Phase.WARMUP
    assert live.wait_time() == pytest.approx(6.0)
    clocks.pass_(6.0)
    live.tick()
    first, *_, last = live.host.history.events.since(0)
    failed = "epoch 0 could not begin: the parameters were reported by 0 of 1 node in time"
    assert [event.text for event in live.host.history.events.since(0)][-2] == failed
    assert (first.time, last.time) == (50 * YEAR, pytest.approx(clocks.wall))  # what people see is the date


@pytest.mark.parametrize("step", [-3600.0, 0.0, 3600.0, -49 * YEAR])
def test_a_restarted_run_goes_on_where_it_was_whatever_the_clocks_say(tmp_path: Path, step: float) -> None:
    clocks, store = Clocks(50 * YEAR), SqliteStore(tmp_path)
    host = RunHost("r", CONFIG, seed=1)
    store.create(host, {})
    live = clocks.live(host, store)
    clocks.pass_(100.0)
    live.act(lambda host, now: host.handle(sha256(b"a node"), Join("there", MANIFEST), now))
    clocks.wall += step
    clocks.monotonic = 3.0  # another boot of the machine
    (again,) = store.load()
    live = clocks.live(again, store)
    live.act(lambda host, now: host.restarted(now))
    assert live.state.phase is Phase.WARMUP
    assert live.wait_time() == pytest.approx(10.0)
    store.close()

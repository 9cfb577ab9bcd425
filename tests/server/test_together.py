"""Requests that come at about the same time are stored and told together."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from support.host_in_motion import key, training, witness

from psyche_lightning.coordinator.host import RunHost
from psyche_lightning.errors import CoordinatorError, PsycheError
from psyche_lightning.protocol.requests import Withdraw
from psyche_lightning.server import live as live_module
from psyche_lightning.server.live import LiveRun
from psyche_lightning.server.store import SqliteStore


class Disk(SqliteStore):
    """Counts changes, and may fail."""

    fails = False
    changes = 0

    def save(self, host: RunHost) -> None:
        if self.fails:
            raise CoordinatorError("the disk is full", code="StoreFailed", retryable=True)
        super().save(host)
        self.changes += 1


@pytest.fixture
def disk(tmp_path: Path) -> Disk:
    return Disk(tmp_path)


def live_on(disk: Disk) -> LiveRun:
    host = training()
    disk.create(host, {})
    return LiveRun(host, lambda: 6.0, disk)


def stored(disk: Disk) -> tuple[int, int]:
    """Height of the newest round on disk, and how many have reported on it."""
    (host,) = disk.load()
    assert host.state.current is not None
    return host.state.current.height, len(host.state.current.witnesses)


def test_the_last_report_of_a_round_stores_all_and_waits_for_nothing(
    disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live_module, "GATHER", 1e6)
    live, told = live_on(disk), []
    live.subscribe(lambda: told.append(live.state))

    async def main() -> None:
        reports = [asyncio.ensure_future(live.answer(key(i), witness(live.state, i))) for i in range(3)]
        await reports[2]
        assert stored(disk) == (1, 0)
        for waits in reports[:2]:
            waits.cancel()

    asyncio.run(main())
    assert [state.step for state in told] == [2]
    assert disk.changes == 1


def test_an_answer_comes_when_the_change_is_stored(disk: Disk) -> None:
    live = live_on(disk)

    async def main() -> None:
        report = asyncio.ensure_future(live.answer(key(0), witness(live.state, 0)))
        await asyncio.sleep(0)
        assert stored(disk) == (0, 0)
        assert live.state.current.witnesses == ()
        await report
        assert stored(disk) == (0, 1)
        waits = asyncio.ensure_future(live.answer(key(1), witness(live.state, 1)))
        await asyncio.sleep(0)
        with pytest.raises(CoordinatorError, match="has already reported"):  # as was not known to anybody yet
            await live.answer(key(1), witness(live.state, 1))
        assert stored(disk) == (0, 2)
        await waits
        waits = asyncio.ensure_future(live.answer(key(2), Withdraw()))
        await asyncio.sleep(0)
        assert key(2) not in live.host.membership.members  # who looks sees what is stored
        assert live.state.current.height == 1
        assert stored(disk)[0] == 1
        await waits

    asyncio.run(main())


def test_all_hear_that_nothing_could_be_stored(disk: Disk) -> None:
    live = live_on(disk)

    async def main() -> list[BaseException | None]:
        disk.fails = True
        reports = [live.answer(key(i), witness(live.state, i)) for i in range(2)]
        return await asyncio.gather(*reports, return_exceptions=True)

    assert [getattr(error, "code", "") for error in asyncio.run(main())] == ["StoreFailed"] * 2
    assert live.unstorable == "the disk is full"
    with pytest.raises(PsycheError, match="the disk is full"):
        asyncio.run(live.answer(key(2), witness(live.state, 2)))
    assert live.state.current.witnesses == ()
    disk.fails = False
    live.tick()
    assert stored(disk) == (0, 2)

"""``kill -9`` and restart of the coordinator process with clients attached (invariant I8)."""

from __future__ import annotations

import asyncio
import random
import shutil
import signal

import pytest

from psyche_lightning.chronicle.entry import COORDINATOR, Kind
from psyche_lightning.chronicle.reader import find_books
from psyche_lightning.errors import CoordinatorError
from psyche_lightning.protocol.requests import Join, Withdraw
from psyche_lightning.protocol.state import Phase, RunState
from psyche_lightning.server.client import HttpCoordinator
from psyche_lightning.server.store import FILE, KEY_FILE
from psyche_lightning.wire.identity import Identity


class Watcher:
    """Checks that what one node sees never goes back, and that what it saw of a round never changes."""

    def __init__(self) -> None:
        self.nonce = -1
        self.place = (0, 0, 0)
        self.rounds: dict[tuple[int, int], tuple[int, int]] = {}
        self.states = 0

    def __call__(self, state: RunState) -> None:
        self.states += 1
        assert state.nonce > self.nonce
        self.nonce = state.nonce
        height = state.current.height if state.current and state.phase.active else 0
        place = (state.epoch, state.step, height)
        assert place >= self.place
        self.place = place
        if state.phase.active:
            for round_ in state.rounds:
                value = (round_.seed, round_.data_index)
                assert self.rounds.setdefault((state.epoch, round_.height), value) == value


@pytest.mark.parametrize(
    ("seed", "steps", "most"),
    [(1, 30, 2), *(pytest.param(seed, 150, 12, marks=pytest.mark.slow) for seed in (2, 3))],
)
def test_kills_at_random_moments(server_process, walk, run, quick, seed, steps, most):
    dice = random.Random(seed)
    server = server_process("--grace", "30")
    settings = {**quick, "init_min_clients": 3, "total_steps": steps, "global_batch_size_start": 3}
    server.admin.create("r", settings, seed=seed)
    identities = [Identity.generate() for _ in range(3)]
    watchers = [Watcher() for _ in identities]
    kills = 0

    async def node(identity, watcher):
        client = HttpCoordinator(server.url, "r", identity)
        try:
            return await walk(client, seen=watcher)
        finally:
            await client.close()

    async def main():
        nonlocal kills
        nodes = asyncio.gather(*map(node, identities, watchers))
        while not nodes.done():
            await asyncio.wait([nodes], timeout=dice.uniform(0.05, 0.6))
            if kills < most and not nodes.done():
                kills += 1
                await asyncio.to_thread(server.end, signal.SIGKILL)
                await asyncio.to_thread(server.start)
        return await nodes

    states = run(main(), 250)
    assert kills > 0
    assert {state.phase for state in states} == {Phase.FINISHED}
    assert {state.step for state in states} == {steps + 1}
    # Nobody was lost on the way: one epoch, all steps, three nodes to the end.
    assert {state.epoch for state in states} == {1}
    status = server.admin.status("r")
    assert [event["kind"] for event in status["events"] if event["kind"] == "dropped"] == []
    # Two decide the rounds, so one that tries again late may see little of them.
    assert sum(watcher.states > 10 for watcher in watchers) >= 2
    # Its events tell of each start, and of the rounds: a kill may come between a change and its entry.
    [book] = find_books([server.directory])
    told = book.news()
    assert {one.node for one in told} == {COORDINATOR}
    assert 1 <= sum(one.kind is Kind.START for one in told) <= kills + 1
    decided = [one.step for one in told if one.kind is Kind.DECIDED and one.step]
    assert decided == sorted(set(decided))
    assert len(decided) >= steps - 2 * kills


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_cleanly_with_nodes_attached(server_process, walk, run, quick, number):
    server = server_process()
    server.admin.create("r", {**quick, "init_min_clients": 2})
    identity = Identity.generate()

    async def main():
        client = HttpCoordinator(server.url, "r", identity)
        await client.request(Join("a", {"run": {"global_batch_size": 4, "total_steps": 10}}))
        code = await asyncio.to_thread(server.end, number)
        await asyncio.to_thread(server.start)
        # It comes back by itself, and its membership was kept.
        await client.request(Withdraw())
        await client.close()
        return code

    assert run(main()) == 0
    events = [event["text"].split(" ", 1)[1] for event in server.admin.status("r")["events"]]
    assert events == ["joined", "left"]


@pytest.mark.parametrize("kept", ["nothing", "the key"])
def test_a_coordinator_with_another_directory_is_noticed(tmp_path, server_process, walk, run, quick, kept):
    """One with another key is none of this run's; one with an older state was restored from a copy, and is followed."""
    server = server_process()
    settings = {**quick, "init_min_clients": 1, "total_steps": 10**6, "global_batch_size_start": 1}
    server.admin.create("r", settings)
    identity = Identity.generate()
    moved = asyncio.Event()
    older = {file.name: file.read_bytes() for file in server.directory.glob(f"{FILE}*")}
    nonces = [0]

    async def main():
        client = HttpCoordinator(server.url, "r", identity)

        def seen(state: RunState) -> None:
            nonces.append(state.nonce)
            if state.nonce > 20:
                moved.set()

        node = asyncio.ensure_future(walk(client, seen=seen, until=lambda state: state.nonce < nonces[-2]))
        await moved.wait()
        await asyncio.to_thread(server.end)
        before, server.directory = server.directory, tmp_path / "another"
        if kept == "the key":  # and an older database
            server.directory.mkdir()
            shutil.copy(before / KEY_FILE, server.directory)
            for name, data in older.items():
                (server.directory / name).write_bytes(data)
        await asyncio.to_thread(server.start)
        if kept == "nothing":
            await asyncio.to_thread(server.admin.create, "r", settings)
            with pytest.raises(CoordinatorError, match="another coordinator answers"):
                await node
        else:
            assert (await node).nonce < 20
        await client.close()

    run(main())

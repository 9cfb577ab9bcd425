"""Links that fall silent: nobody closes them, and nothing comes through."""

from __future__ import annotations

import asyncio
import contextlib

from psyche_lightning.protocol.state import Phase
from psyche_lightning.server import client as client_module
from psyche_lightning.server import server as server_module
from psyche_lightning.server.admin import CoordinatorAdmin
from psyche_lightning.server.client import HttpCoordinator
from psyche_lightning.wire.identity import Identity

SERVER, NODE = 0.4, 0.2
"""Seconds between pings."""
GRACE = 1.5
"""Seconds in which a node comes back whose link only seemed to be silent, as the machine is busy."""
LONG = 3.0
"""Seconds of silence: longer than a round may take, than the grace, and than anybody waits for a pong."""


class Way:
    """A way to the server that can fall silent: it then takes connections and bytes, and passes nothing on."""

    def __init__(self, url):
        self._target = int(url.rpartition(":")[2])
        self._open = asyncio.Event()
        self._open.set()
        self._tasks = set()

    async def __aenter__(self):
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_):
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def silence(self):
        self._open.clear()

    def speak(self):
        self._open.set()

    async def _accept(self, reader, writer):
        back = await asyncio.open_connection("127.0.0.1", self._target)
        for pair in ((reader, back[1]), (back[0], writer)):
            self._tasks.add(asyncio.ensure_future(self._pass_on(*pair)))

    async def _pass_on(self, reader, writer):
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                await self._open.wait()
                writer.write(data)
                await writer.drain()
        await self._open.wait()  # nor does it tell that a connection ended
        writer.close()


@contextlib.asynccontextmanager
async def three_nodes(served, quick, heartbeat=SERVER, **settings):
    """A server, the way to it of each node, and the nodes."""
    async with served(grace=GRACE, heartbeat=heartbeat) as (server, url), contextlib.AsyncExitStack() as opened:
        given = {**quick, "init_min_clients": 3, "min_clients": 2, "global_batch_size_start": 3, "total_steps": 10**6}
        await asyncio.to_thread(CoordinatorAdmin(url).create, "r", {**given, **settings})
        ways = [await opened.enter_async_context(Way(url)) for _ in range(3)]
        nodes = [
            HttpCoordinator(way.url, "r", Identity.generate(), heartbeat=NODE, connect_timeout=1.0) for way in ways
        ]
        for node in nodes:
            opened.push_async_callback(node.close)
        yield server.runs["r"], ways, nodes


def events(live, kind):
    return [event.text for event in live.host.history.events.since(0) if event.kind == kind]


def test_when_nobody_is_heard_the_run_waits_and_nobody_is_dropped(served, walk, run, quick, caplog):
    async def main():
        async with three_nodes(served, quick, max_round_train_time=2) as (live, ways, nodes):
            await asyncio.gather(*(walk(node, until=lambda state: state.step > 20) for node in nodes))
            for way in ways:
                way.silence()
            before = live.state
            await asyncio.sleep(LONG)
            assert "no node has been heard from for " in live.problem
            assert live.wait_time() is not None
            assert all(node.away.startswith(f"the coordinator at {node.url}: ") for node in nodes)
            for way in ways:
                way.speak()
            going_on = (walk(node, until=lambda state: state.step > before.step + 20) for node in nodes)
            states = await asyncio.gather(*going_on)
            assert {state.epoch for state in states} == {before.epoch}
            assert events(live, "dropped") == []
            assert live.problem is None
            assert all(node.away is None for node in nodes)

    run(main())
    assert "the run waits until one is back" in caplog.text
    assert "a node is heard from again, after" in caplog.text


def test_a_silence_that_only_nodes_notice_drops_nobody_when_it_ends(served, walk, run, quick):
    """They have closed their connections by then, which the server sees before it sees the new ones."""

    async def main():
        async with three_nodes(served, quick, heartbeat=4.0) as (live, ways, nodes):
            await asyncio.gather(*(walk(node, until=lambda state: state.step > 20) for node in nodes))
            for way in ways:
                way.silence()
            before = live.state
            await asyncio.sleep(LONG)
            assert all(node.away is not None for node in nodes)
            assert live.problem is None
            for way in ways:
                way.speak()
            going_on = (walk(node, until=lambda state: state.step > before.step + 20) for node in nodes)
            states = await asyncio.gather(*going_on)
            assert {state.epoch for state in states} == {before.epoch}
            assert events(live, "dropped") == []

    run(main())


def test_when_others_are_heard_the_silent_one_is_dropped(served, walk, run, quick):
    async def main():
        async with three_nodes(served, quick) as (live, ways, nodes):
            await asyncio.gather(*(walk(node, until=lambda state: state.step > 20) for node in nodes))
            ways[2].silence()
            others = (walk(node, until=lambda state: events(live, "dropped")) for node in nodes[:2])
            await asyncio.gather(*others)
            (text,) = events(live, "dropped")
            assert text == f"{nodes[2].signer[:4].hex()} is gone: nothing was heard from it"

    run(main())


def test_who_does_not_come_back_after_the_silence_is_dropped_then(served, walk, run, quick, monkeypatch):
    monkeypatch.setattr(server_module, "RECONNECT_TIME", 2.0)

    async def main():
        async with three_nodes(served, quick) as (live, ways, nodes):
            await asyncio.gather(*(walk(node, until=lambda state: state.step > 20) for node in nodes))
            for way in ways:
                way.silence()
            await asyncio.sleep(LONG)
            assert events(live, "dropped") == []
            for way in ways[:2]:
                way.speak()
            others = (walk(node, until=lambda state: events(live, "dropped")) for node in nodes[:2])
            states = await asyncio.gather(*others)
            assert events(live, "dropped")[0].startswith(nodes[2].signer[:4].hex())
            assert all(state.phase is not Phase.PAUSED for state in states)

    run(main())


def test_a_node_notices_a_silent_link_before_it_counts_as_gone():
    grace = 5.0
    noticed = 1.5 * client_module.HEARTBEAT + client_module.FIRST_WAIT + 5.0  # one attempt may end without an answer
    gone = 1.5 * server_module.HEARTBEAT - client_module.HEARTBEAT + grace  # the node was last heard that long before
    assert noticed < gone


def test_nodes_find_a_coordinator_that_is_back_in_time():
    assert client_module.LONGEST_WAIT + client_module.FIRST_WAIT + 5.0 < server_module.RECONNECT_TIME

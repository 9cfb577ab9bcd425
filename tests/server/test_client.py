"""A node's client: links that break, servers that are not there, nodes that vanish."""

from __future__ import annotations

import asyncio
import socket
from dataclasses import replace

import pytest
from aiohttp import web

from psyche_lightning.errors import ConfigError, CoordinatorError, ManifestMismatchError
from psyche_lightning.protocol.codec import state_from_json, state_to_json
from psyche_lightning.protocol.requests import GetTerms, Join, Withdraw
from psyche_lightning.protocol.state import Phase
from psyche_lightning.server.admin import CoordinatorAdmin
from psyche_lightning.server.client import HttpCoordinator
from psyche_lightning.server.server import CoordinatorServer
from psyche_lightning.server.store import MemoryStore
from psyche_lightning.wire.identity import Identity

CONFIG = {"init_min_clients": 2, "total_steps": 30, "global_batch_size_start": 2}


async def create(url, run_id="r", **settings):
    await asyncio.to_thread(CoordinatorAdmin(url).create, run_id, {**CONFIG, **settings}, seed=1)


class Relay:
    """A TCP relay in front of the server whose links can be cut."""

    def __init__(self, url):
        self._target = int(url.rpartition(":")[2])
        self._writers = set()
        self._tasks = set()
        self.links = 0

    async def start(self):
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        return f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def _accept(self, reader, writer):
        self.links += 1
        back_reader, back_writer = await asyncio.open_connection("127.0.0.1", self._target)
        self._writers |= {writer, back_writer}
        for pair in ((reader, back_writer), (back_reader, writer)):
            task = asyncio.ensure_future(self._pump(*pair))
            self._tasks.add(task)

    async def _pump(self, reader, writer):
        try:
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        except OSError:
            pass
        writer.close()

    def cut(self):
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()

    async def stop(self):
        self._server.close()
        self.cut()
        await asyncio.gather(*self._tasks, return_exceptions=True)


def test_an_unreachable_server_is_explained_after_bounded_tries(run, caplog):
    url = "http://127.0.0.1:1"  # where nobody listens, nor any other test

    async def main():
        client = HttpCoordinator(url, "r", Identity.generate(), attempts=2)
        with pytest.raises(CoordinatorError) as caught:
            await client.request(Join("a", {}))
        assert (caught.value.code, caught.value.retryable) == ("Unreachable", True)
        for part in (url, "'r'", "Tried 2 times", "psyche coordinator", "PSYCHE_COORDINATOR"):
            assert part in str(caught.value)
        with pytest.raises(CoordinatorError):  # and it stays so, for whoever watches
            async for _ in client.watch():
                pass
        await client.close()

    run(main())
    assert caplog.messages == [
        f"cannot reach the coordinator at {url}: no connection (Connection refused); trying again"
    ]
    with pytest.raises(CoordinatorError, match="Tried 1 times"):
        CoordinatorAdmin(url, attempts=1).runs()


@pytest.mark.parametrize("url", ["", "nonsense", "ftp://a", "http://", "http://a:99999"])
def test_urls_that_are_none(url):
    with pytest.raises(ConfigError):
        HttpCoordinator(url, "r", Identity.generate())
    with pytest.raises(ConfigError):
        CoordinatorAdmin(url or "x")


def test_an_unknown_run_names_the_known_ones(served, run):
    async def main():
        async with served() as (_, url):
            await create(url, "mine")
            client = HttpCoordinator(url, "min", Identity.generate())
            with pytest.raises(CoordinatorError, match="its runs are: mine") as caught:
                await client.request(Join("a", {}))
            assert caught.value.code == "UnknownRun"
            await client.close()

    run(main())


@pytest.mark.parametrize("kind", ["page", "silent", "babble"])
def test_something_else_listens_there(run, kind):
    async def handler(request):
        if kind == "page":
            return web.Response(text="hello")
        socket_ = web.WebSocketResponse()
        await socket_.prepare(request)
        if kind == "babble":
            await socket_.send_str('["hello", 99, "00"]')
        await socket_.receive()
        return socket_

    async def main():
        application = web.Application()
        application.router.add_route("*", "/{path:.*}", handler)
        runner = web.AppRunner(application, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        patience = 0.5 if kind == "silent" else 30.0
        client = HttpCoordinator(url, "r", Identity.generate(), attempts=1, connect_timeout=patience)
        expected = {"page": "not a psyche coordinator", "silent": "sent nothing", "babble": "another protocol"}[kind]
        with pytest.raises(CoordinatorError, match=expected):
            await client.request(Join("a", {}))
        await client.close()
        await runner.cleanup()

    run(main())


def test_cut_links_lose_nothing(served, walk, run, quick):
    """Requests whose answers were lost are sent again and count once."""
    identities = [Identity.generate() for _ in range(2)]

    async def main():
        async with served() as (server, url):
            await create(url, **quick)
            relay = Relay(url)
            through = await relay.start()
            clients = [HttpCoordinator(through, "r", identity) for identity in identities]
            walks = asyncio.gather(*map(walk, clients))
            for _ in range(4):
                nonce = server.runs["r"].state.nonce
                while server.runs["r"].state.nonce < nonce + 7 and not walks.done():
                    await asyncio.sleep(0.005)
                relay.cut()
            states = await walks
            assert {state.phase for state in states} == {Phase.FINISHED}
            assert {state.epoch for state in states} == {1}
            assert relay.links > 4
            kinds = [event.kind for event in server.runs["r"].host.history.events.since(0)]
            assert "dropped" not in kinds
            assert kinds.count("joined") == 2
            await asyncio.gather(*(client.close() for client in clients))
            await relay.stop()

    run(main())


def test_a_lost_coordinator_is_told_at_once_then_at_intervals_and_when_it_is_back(run, caplog):
    now = [0.0]

    async def told(text):
        while not caplog.messages or text not in caplog.messages[-1]:
            await asyncio.sleep(0.01)
        record = caplog.records[-1]
        assert (record.levelname, record.name) == ("WARNING", "psyche_lightning.server.client")

    async def main():
        store = MemoryStore()
        server = CoordinatorServer(store)
        url = await server.start("127.0.0.1", 0)
        await create(url)
        client = HttpCoordinator(url, "r", Identity.generate(), clock=lambda: now[0])
        states = client.watch()
        await anext(states)
        assert caplog.messages == []
        await server.stop()
        await told(f"lost the coordinator at {url}: it closed the connection")
        now[0] = 31.0
        await told(f"the coordinator at {url} is still away after 31 s: no connection (Connection refused)")
        again = CoordinatorServer(store)
        now[0] = 42.0
        await again.start("127.0.0.1", int(url.rpartition(":")[2]))
        await told(f"the coordinator at {url} is back after 42 s")
        assert len(caplog.messages) == 3
        await states.aclose()
        await client.close()
        await again.stop()

    run(main())


def test_a_node_that_vanishes_is_dropped_after_the_grace_and_named(served, walk, run, quick):
    *stay, vanishes = (Identity.generate() for _ in range(3))

    async def main():
        async with served(grace=0.2) as (server, url):
            # More steps than anybody walks through in the grace: nobody is dropped from a run that has ended.
            await create(url, **{**quick, "waiting_for_members_extra_time": 1, "total_steps": 1_000_000})
            *others, client = (HttpCoordinator(url, "r", identity) for identity in (*stay, vanishes))

            def dropped():
                return [event for event in server.runs["r"].host.history.events.since(0) if event.kind == "dropped"]

            walking = asyncio.gather(*(walk(other, until=lambda state: dropped()) for other in others))
            await walk(client, until=lambda state: state.step >= 5)  # of states that come together it sees the newest
            await client.close()
            assert all(state.step >= 5 for state in await walking)
            (event,) = dropped()
            assert event.text.startswith(vanishes.public[:4].hex())
            assert "its connection was" in event.text  # closed; or lost, if the server was writing to it just then
            assert event.epoch == 0
            await asyncio.gather(*(client.close() for client in others))

    run(main())


def test_coming_back_within_the_grace_is_no_absence(served, run):
    identity = Identity.generate()

    async def main():
        async with served(grace=600.0) as (server, url):
            await create(url)
            first = HttpCoordinator(url, "r", identity)
            await first.request(Join("a", {}))
            await first.close()
            while not server._leaving:
                await asyncio.sleep(0.01)
            second = HttpCoordinator(url, "r", identity)
            await second.request(Join("b", {}))
            assert not server._leaving, "the grace of the first has no end any more"
            assert server.runs["r"].host.membership.members.keys() == set([identity.public])
            server._grace = 0.0
            await second.close()
            while server.runs["r"].host.membership.members:
                await asyncio.sleep(0.01)
            assert [event.kind for event in server.runs["r"].host.history.events.since(0)] == ["joined", "dropped"]

    run(main())


def test_two_processes_with_one_key(served, run):
    identity = Identity.generate()

    async def main():
        async with served() as (_, url):
            await create(url)
            first, second = (HttpCoordinator(url, "r", identity) for _ in range(2))
            await first.request(Join("a", {}))
            await second.request(Join("b", {}))
            with pytest.raises(CoordinatorError, match="another process") as caught:
                async for _ in first.watch():
                    pass
            assert caught.value.code == "Replaced"
            await second.request(Withdraw())
            await first.close()
            await second.close()

    run(main())


def test_a_manifest_travels_once_and_mismatches_name_the_fields(served, run):
    manifest = {"model": {"name": "m", "shapes": [[64, 64]] * 5000}, "optimizer": {"lr": 0.5}}

    async def main():
        async with served() as (_, url):
            await create(url)
            relay_bytes = []

            class Counting(socket.socket):
                def send(self, data, *flags):
                    sent = super().send(data, *flags)
                    relay_bytes.append(sent)
                    return sent

            def factory(info):
                made = Counting(info[0], info[1], info[2])
                made.setblocking(False)
                return made

            first = HttpCoordinator(url, "r", Identity.generate())
            second = HttpCoordinator(url, "r", Identity.generate(), socket_factory=factory)
            third = HttpCoordinator(url, "r", Identity.generate())
            await first.request(Join("a", manifest))
            await second.request(Join("b", manifest))
            assert 0 < sum(relay_bytes) < 2000
            with pytest.raises(ManifestMismatchError) as caught:
                await third.request(Join("c", {**manifest, "optimizer": {"lr": 0.25}}))
            assert caught.value.differences == [("optimizer.lr", 0.5, 0.25)]
            with pytest.raises(CoordinatorError, match="not JSON"):
                await third.request(Join("c", {"model": {"x": float("nan")}}))
            for client in (first, second, third):
                await client.close()

    run(main())


def test_close_ends_what_waits(served, run):
    async def main():
        async with served() as (_, url):
            await create(url)
            client = HttpCoordinator(url, "r", Identity.generate())
            await client.request(Join("a", {}))

            async def watch():
                async for _ in client.watch():
                    pass

            watching = asyncio.ensure_future(watch())
            await asyncio.sleep(0.1)
            await client.close()
            with pytest.raises(CoordinatorError, match="closed by this node"):
                await watching
            with pytest.raises(CoordinatorError, match="closed by this node"):
                await client.request(Withdraw())
            await client.close()

    run(main())


def test_terms_come_over_the_same_connection(served, run):
    async def main():
        async with served() as (_, url):
            body = {"init_min_clients": 3, "max_round_train_time": 9.5}
            manifest = {"model": {"name": "m"}}
            await asyncio.to_thread(CoordinatorAdmin(url).create, "r", body, manifest=manifest)
            client = HttpCoordinator(url, "r", Identity.generate())
            terms = await client.request(GetTerms())
            assert (terms.config.init_min_clients, terms.config.max_round_train_time) == (3, 9.5)
            assert (terms.unset, terms.manifest) == (("global_batch_size", "total_steps"), manifest)
            await client.close()

    run(main())


def test_a_gap_in_the_changes_is_noticed_and_filled(served, run):
    async def main():
        async with served() as (server, url):
            await create(url)
            client = HttpCoordinator(url, "r", Identity.generate())
            await client.request(Join("a", {}))
            # As if a change had been lost on the way.
            client._state = replace(client._state, nonce=client._state.nonce - 1)
            server.runs["r"].act(lambda host, now: host.pause(now))
            async for state in client.watch():
                if state == without_blooms(server.runs["r"].state):
                    break
            assert state.phase is Phase.PAUSED
            await client.close()

    run(main())


def without_blooms(state):
    return state_from_json(state_to_json(state))

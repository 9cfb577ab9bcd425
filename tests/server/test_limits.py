"""What callers of a server may ask for, and how many connections they may have."""

from __future__ import annotations

import asyncio
import contextlib
import ssl

import aiohttp
import pytest

from psyche_lightning import entrance
from psyche_lightning.errors import CoordinatorError
from psyche_lightning.protocol.manifest import manifest_digest, manifest_text
from psyche_lightning.server import limits, server
from psyche_lightning.server.admin import CoordinatorAdmin
from psyche_lightning.server.channel import seal_frame
from psyche_lightning.server.client import HttpCoordinator
from psyche_lightning.server.limits import Callers
from psyche_lightning.server.server import CoordinatorServer
from psyche_lightning.server.store import MemoryStore
from psyche_lightning.wire.identity import Identity

from .test_websocket import Raw, create, join

SLOW = 1e-6


async def plain(url):
    host, port = url.partition("//")[2].split(":")
    return await asyncio.open_connection(host, int(port))


@contextlib.asynccontextmanager
async def serving(tls):
    one = CoordinatorServer(MemoryStore(), tls=tls)
    try:
        yield await one.start("127.0.0.1", 0)
    finally:
        await one.stop()


async def over(reader):
    """Wait until the server has closed."""
    with contextlib.suppress(OSError):
        while await asyncio.wait_for(reader.read(65536), 20):
            pass


async def eventually(condition, what):
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError(what)


@pytest.mark.parametrize("tls", [False, True])
@pytest.mark.parametrize(
    "said", [b"", b"GET /v1/runs HTTP/1.1\r\nHost: 127.0", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"]
)
def test_a_connection_that_does_not_finish_its_beginning_is_closed(run, monkeypatch, said, tls):
    monkeypatch.setattr(entrance, "HEADER_SECONDS", 0.3)

    async def main():
        async with serving(tls) as url:
            reader, writer = await plain(url)
            for byte in said:
                writer.write(bytes([byte]))
            await over(reader)
            writer.close()

    run(main())


def test_encrypted_connections_are_counted_from_the_beginning(run, monkeypatch):
    monkeypatch.setattr(entrance, "MAX_SILENT_OF_HOST", 3)

    async def main():
        async with serving(True) as url:
            silent = [await plain(url) for _ in range(8)]
            for reader, _ in silent[:5]:
                await over(reader)
            unchecked = ssl._create_unverified_context()
            async with aiohttp.ClientSession() as session:
                for _ in range(3):
                    async with session.get(f"{url}/v1/runs", ssl=unchecked) as answer:
                        assert answer.status == 200
                        assert (await answer.json())["runs"] == []
            slow = await asyncio.open_connection(*url.partition("//")[2].split(":"), ssl=unchecked)
            monkeypatch.setattr(entrance, "HEADER_SECONDS", 0.3)
            late = await asyncio.open_connection(*url.partition("//")[2].split(":"), ssl=unchecked)
            late[1].write(b"GET /v1/runs")
            await over(late[0])
            for _, writer in (*silent, slow, late):
                writer.transport.abort()

    run(main())


def test_a_slow_body_is_refused(served, run, monkeypatch):
    monkeypatch.setattr(server, "BODY_SECONDS", 0.3)

    async def main():
        async with served() as (_, url):
            reader, writer = await plain(url)
            head = "Host: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{"
            writer.write(b"POST /v1/runs HTTP/1.1\r\n" + head.encode())
            assert b"did not come within" in await asyncio.wait_for(reader.readuntil(b"}"), 20)
            writer.close()

    run(main())


def test_silent_connections_of_one_address_are_few_and_do_not_keep_others_out(served, run, monkeypatch):
    monkeypatch.setattr(entrance, "MAX_SILENT_OF_HOST", 3)

    async def main():
        async with served() as (_, url):
            await create(url)
            talker = await Raw.open(url)
            silent = [await plain(url) for _ in range(8)]
            for reader, _ in silent[:5]:
                await over(reader)
            async with aiohttp.ClientSession() as session, session.get(f"{url}/v1/runs") as answer:
                assert answer.status == 200
            assert not talker.socket.closed  # it has asked for something
            for _, writer in silent:
                writer.close()
            await talker.close()

    run(main())


def test_an_address_that_asks_too_much_over_http_is_refused_for_a_while(served, run, monkeypatch):
    monkeypatch.setattr(limits, "CALL_STORE", 20.0)
    monkeypatch.setattr(limits, "CALL_RATE", SLOW)

    async def main():
        async with served() as (_, url):
            await create(url)
            admin = CoordinatorAdmin(url)

            def ask_on():
                for _ in range(25):
                    admin.status("r")

            with pytest.raises(CoordinatorError, match="too many requests") as refused:
                await asyncio.to_thread(ask_on)
            assert (refused.value.code, refused.value.retryable) == ("TooManyRequests", True)

    run(main())


def test_large_answers_cost_more(run, monkeypatch):
    from aiohttp.test_utils import make_mocked_request

    async def main():
        callers = Callers()
        bucket = callers._buckets.of("")
        before = bucket.left

        async def handler(_):
            return aiohttp.web.Response(body=bytes(1 << 20))

        await callers.check(make_mocked_request("GET", "/"), handler)
        assert before - bucket.left == pytest.approx(1 + (1 << 20) / limits.ANSWER_UNIT)

    run(main())


def test_a_client_of_a_busy_server_tries_again(served, run, monkeypatch):
    monkeypatch.setattr(limits, "CALL_STORE", 1.0)
    monkeypatch.setattr(limits, "CALL_RATE", 1.0)

    async def main():
        async with served() as (_, url):
            await create(url)
            client = HttpCoordinator(url, "r", Identity.generate())
            states = client.watch()
            assert (await states.__anext__()).run_id == "r"
            await states.aclose()
            await client.close()

    run(main())


async def answers(raw, frames, sure=0):
    """How many of these requests are answered before an answer takes long.

    The first ``sure`` ones do not, except on a busy machine.
    """
    count = 0
    with contextlib.suppress(asyncio.TimeoutError):
        for frame in frames:
            await asyncio.wait_for(raw.answer(frame), 0.5 if count >= sure else 30.0)
            count += 1
    return count


@pytest.mark.parametrize(("name", "most"), [("terms", 7), ("sync", 7), ("join", 4)])
def test_a_node_that_asks_too_much_is_answered_later_and_others_at_once(served, run, monkeypatch, name, most):
    monkeypatch.setattr(server, "REQUEST_STORE", 60.0)
    monkeypatch.setattr(server, "REQUEST_RATE", SLOW)
    greedy, modest = Identity.generate(), Identity.generate()

    def frames(raw, identity):
        for number in range(1, 100):
            sealed = seal_frame(identity, "r", raw.challenge, number, name, [])
            yield join(identity, raw.challenge, number) if name == "join" else sealed

    async def main():
        async with served() as (_, url):
            await create(url)
            one, other = await Raw.open(url, identity=greedy), await Raw.open(url, identity=modest)
            assert 2 <= await answers(one, frames(one, greedy), sure=2) <= most
            await other.answer(next(frames(other, modest)))
            again = await Raw.open(url, identity=greedy)  # is no way around it
            assert await answers(again, frames(again, greedy)) == 0
            for each in (other, one, again):
                await each.close()

    run(main())


def test_only_a_join_may_be_large(served, run):
    alice = Identity.generate()
    manifest = {"model": {"name": "m" * 500_000}}

    async def main():
        async with served() as (_, url):
            await create(url)
            raw = await Raw.open(url, identity=alice)
            fields = ["a", manifest_digest(manifest), manifest_text(manifest)]
            assert await raw.answer(seal_frame(alice, "r", raw.challenge, 1, "join", fields)) == ["ok", 1, None]
            large = seal_frame(alice, "r", raw.challenge, 2, "health_check", [0, 1, [bytes(32)] * 20_000])
            assert "at most 262144" in await raw.refused(large)

    run(main())


def test_watchers_are_few_and_members_stay(served, run, monkeypatch):
    monkeypatch.setattr(server, "MAX_STRANGERS", 4)
    monkeypatch.setattr(server, "MAX_STRANGERS_OF_HOST", 4)

    async def main():
        async with served() as (one, url):
            await create(url)
            alice = Identity.generate()
            member = await Raw.open(url, identity=alice)
            assert await member.answer(join(alice, member.challenge)) == ["ok", 1, None]
            watchers = [await Raw.open(url) for _ in range(9)]
            await eventually(lambda: len(one._open) == 5, "the oldest watchers are turned away")
            for watcher in watchers[:5]:
                assert (await watcher.socket.receive(10)).type is aiohttp.WSMsgType.CLOSE
            newcomer = Identity.generate()  # who is no member yet, and gets in
            late = await Raw.open(url, identity=newcomer)
            assert await late.answer(join(newcomer, late.challenge)) == ["ok", 1, None]
            assert await member.answer(join(alice, member.challenge, 2)) == ["ok", 2, None]
            for each in (member, late, *watchers):
                await each.close()

    run(main())


def test_runs_are_bounded(served, run):
    async def main():
        async with served(max_runs=2) as (_, url):
            for name in ("a", "b"):
                await create(url, name)
            await create(url, "b")  # the same request again makes no run
            with pytest.raises(AssertionError, match="TooManyRuns"):
                await create(url, "c")

    run(main())

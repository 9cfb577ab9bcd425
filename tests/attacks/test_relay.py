"""A server in the middle: what a node signs for one coordinator makes it a member nowhere else."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from psyche_lightning.errors import CoordinatorError
from psyche_lightning.protocol.requests import GetTerms, Join
from psyche_lightning.server.admin import CoordinatorAdmin
from psyche_lightning.server.channel import SALT_SIZE, VERSION, greet
from psyche_lightning.server.client import HttpCoordinator
from psyche_lightning.server.server import CoordinatorServer
from psyche_lightning.server.store import MemoryStore
from psyche_lightning.wire.identity import Identity

CONFIG = {"init_min_clients": 2, "total_steps": 9, "global_batch_size_start": 2}
OWN = Identity(b"m" * 32)
Frame = list[Any]


def passed_on(frame: Frame, nonce: bytes) -> Frame:
    """The coordinator's greeting as it came, for another nonce than the victim's."""
    return frame


def own_key(frame: Frame, nonce: bytes) -> Frame:
    """The coordinator's challenge under the relay's key, with the relay's proof."""
    incarnation, salt = (bytes.fromhex(part) for part in frame[3][1:3])
    facts = greet(OWN, "r", incarnation, salt, nonce)[1][3]
    return ["hello", VERSION, frame[2], facts]


def own_proof(frame: Frame, nonce: bytes) -> Frame:
    """The coordinator's key and challenge with a proof of the relay."""
    incarnation, salt = (bytes.fromhex(part) for part in frame[3][1:3])
    proof = greet(OWN, "r", incarnation, salt, nonce)[1][3][3]
    return [*frame[:3], [*frame[3][:3], proof]]


def own_greeting(frame: Frame, nonce: bytes) -> Frame:
    """A greeting of the relay as the coordinator that it is."""
    incarnation, salt = (bytes.fromhex(part) for part in frame[3][1:3])
    return greet(OWN, "r", incarnation, salt, nonce)[1]


async def relayed(change: Callable[[Frame, bytes], Frame]) -> tuple[str, list[bytes], set[bytes]]:
    """A victim joins at a relay, which joins at the coordinator with what the victim signs.

    Returns:
        What the victim is told, the frames that it sent, and the coordinator's members.
    """
    server = CoordinatorServer(MemoryStore())
    target = await server.start(port=0)
    await asyncio.to_thread(CoordinatorAdmin(target).create, "r", CONFIG)
    sent: list[bytes] = []

    async def watch(request: web.Request) -> web.StreamResponse:
        victim = web.WebSocketResponse()
        await victim.prepare(request)
        nonce = bytes.fromhex(request.query["nonce"])
        async with aiohttp.ClientSession() as session, session.ws_connect(f"{target}/v1/runs/r/watch") as honest:
            await victim.send_str(json.dumps(change(json.loads(await honest.receive_str()), nonce)))

            async def back() -> None:
                async for message in honest:
                    await victim.send_str(message.data)

            pushing = asyncio.ensure_future(back())
            async for message in victim:
                sent.append(message.data)
                await honest.send_bytes(message.data)
            pushing.cancel()
        return victim

    application = web.Application()
    application.router.add_get("/v1/runs/r/watch", watch)
    runner = web.AppRunner(application)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    client = HttpCoordinator("http://{}:{}".format(*runner.addresses[0]), "r", Identity.generate(), attempts=1)
    try:
        with pytest.raises(CoordinatorError) as told:
            await client.request(Join("a", {"run": {}}))
        await client.close()
        return f"{told.value.code}: {told.value}", sent, set(server.runs["r"].host.membership.members)
    finally:
        await runner.cleanup()
        await server.stop()


@pytest.mark.parametrize("change", [passed_on, own_key, own_proof])
def test_a_node_signs_nothing_for_who_does_not_prove_the_key(change: Callable[[Frame, bytes], Frame]) -> None:
    told, sent, members = asyncio.run(asyncio.wait_for(relayed(change), 30))
    assert told.startswith("WrongCoordinator:")
    assert "does not prove the coordinator's key" in told
    assert (sent, members) == ([], set())


def test_what_is_signed_for_one_coordinator_is_refused_by_another() -> None:
    told, sent, members = asyncio.run(asyncio.wait_for(relayed(own_greeting), 30))
    assert "wrong signature on the hello" in told
    assert sent
    assert not members


def test_an_impostor_at_the_address_ends_no_node_that_has_the_link() -> None:
    async def test() -> None:
        store = MemoryStore()
        server = CoordinatorServer(store)
        url = await server.start(port=0)
        owner, port = CoordinatorAdmin(url), int(url.rpartition(":")[2])
        await asyncio.to_thread(owner.create, "r", CONFIG)
        node = HttpCoordinator(str(await asyncio.to_thread(owner.link, "r")), "r", Identity.generate())
        await node.request(GetTerms())
        await server.stop()

        drawn: list[int] = []

        def entropy(size: int) -> bytes:
            drawn.append(size)
            return os.urandom(size)

        impostor = CoordinatorServer(MemoryStore(), entropy=entropy)
        await impostor.start(port=port)
        await asyncio.to_thread(owner.create, "r", CONFIG)
        asked = asyncio.ensure_future(node.request(Join("a", {"run": {}})))
        while drawn.count(SALT_SIZE) < 3:  # it greeted the node, which came again
            await asyncio.sleep(0.05)
        assert not asked.done()
        assert impostor.runs["r"].host.membership.members == {}
        await impostor.stop()

        server = CoordinatorServer(store)
        await server.start(port=port)
        await asked
        assert node.signer in server.runs["r"].host.membership.members
        await node.close()
        await server.stop()

    asyncio.run(asyncio.wait_for(test(), 60))


def test_a_node_notices_that_another_coordinator_or_run_answers() -> None:
    async def test() -> None:
        store = MemoryStore()
        server = CoordinatorServer(store)
        url = await server.start(port=0)
        owner, port = CoordinatorAdmin(url), int(url.rpartition(":")[2])
        await asyncio.to_thread(owner.create, "r", CONFIG)
        first, second = (HttpCoordinator(url, "r", Identity.generate()) for _ in range(2))
        await first.request(GetTerms())
        await server.stop()

        server = CoordinatorServer(store)  # the same coordinator: nobody minds
        await server.start(port=port)
        await first.request(GetTerms())
        await second.request(GetTerms())
        await asyncio.to_thread(owner.pause, "r")
        await asyncio.to_thread(owner.command, "r", "close")
        await asyncio.to_thread(owner.create, "r", CONFIG)
        with pytest.raises(CoordinatorError, match="another one was made under its name") as caught:
            await first.request(GetTerms())
        assert caught.value.code == "AnotherRun"
        await first.close()
        await second.close()

        third = HttpCoordinator(url, "r", Identity.generate())
        await third.request(GetTerms())
        await server.stop()
        server = CoordinatorServer(MemoryStore())
        await server.start(port=port)
        await asyncio.to_thread(owner.create, "r", CONFIG)
        with pytest.raises(CoordinatorError, match="another coordinator answers") as caught:
            await third.request(GetTerms())
        assert caught.value.code == "WrongCoordinator"
        await third.close()
        await server.stop()

    asyncio.run(asyncio.wait_for(test(), 60))

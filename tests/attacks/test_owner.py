"""What the owner takes back holds: at once, when an epoch forms, and against whom it was taken."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from psyche_lightning.errors import CoordinatorError
from psyche_lightning.protocol.owner import Creation
from psyche_lightning.protocol.requests import Join
from psyche_lightning.protocol.state import ClientStatus, Phase
from psyche_lightning.server.admin import ServerRun
from psyche_lightning.server.client import HttpCoordinator
from psyche_lightning.server.live import LiveRun
from psyche_lightning.server.server import CoordinatorServer
from psyche_lightning.server.store import MemoryStore
from psyche_lightning.testing.walking import MANIFEST, state_when, walk
from psyche_lightning.wire.identity import Identity

CONFIG = {
    "init_min_clients": 3,
    "min_clients": 2,
    "waiting_for_members_extra_time": 0.05,
    "warmup_time": 20,
    "cooldown_time": 5,
    "max_round_train_time": 20,
    "total_steps": 10**6,
    "global_batch_size_start": 3,
}


@asynccontextmanager
async def run_of(count: int, **config: float) -> AsyncIterator[tuple[LiveRun, ServerRun, list[HttpCoordinator]]]:
    """A run that nodes are in, its owner's side, and their clients; the nodes walk until the context ends."""
    server = CoordinatorServer(MemoryStore())
    url = await server.start("127.0.0.1", 0)
    owner = ServerRun(url, "r")
    await asyncio.to_thread(owner.create, Creation({**CONFIG, "init_min_clients": count, **config}))
    clients = [HttpCoordinator(url, "r", Identity.generate()) for _ in range(count)]
    walks = [asyncio.ensure_future(walk(client)) for client in clients]
    try:
        await state_when(clients[0], lambda state: state.step > 2)
        yield server.runs["r"], owner, clients
    finally:
        for each in walks:
            each.cancel()
        await asyncio.gather(*walks, return_exceptions=True)
        await asyncio.gather(*(client.close() for client in clients))
        await server.stop()


async def refused(client: HttpCoordinator) -> CoordinatorError:
    """The error with which the coordinator turned a node out."""
    with pytest.raises(CoordinatorError) as caught:
        async for _ in client.watch():
            pass
    return caught.value


def test_a_kick_takes_effect_at_once() -> None:
    async def main() -> None:
        async with run_of(4) as (run, owner, clients):
            bad, epoch, step = clients[1], run.state.epoch, run.state.step
            text = await asyncio.to_thread(owner.kick, bad.signer.hex()[:8])
            assert bad.signer.hex() in text
            assert "another key" in text, "strangers may join this run"
            standing = {each.signer: each.status for each in (*run.state.clients, *run.state.exited_clients)}
            assert standing[bad.signer] is ClientStatus.EJECTED
            error = await refused(bad)
            assert error.code == "NotAuthorized"
            assert f"psyche run authorize r {bad.signer.hex()}" in str(error)
            again = HttpCoordinator(bad.url, "r", bad._identity)
            with pytest.raises(CoordinatorError, match="may not join"):
                await again.request(Join("elsewhere", MANIFEST))
            after = await state_when(clients[0], lambda state: state.step > step + 3)
            assert after.epoch == epoch, "the others train on in the same epoch"
            await asyncio.to_thread(owner.authorize, bad.signer.hex())
            await again.request(Join("elsewhere", MANIFEST))
            assert bad.signer in run.host.membership.members
            await again.close()

    asyncio.run(asyncio.wait_for(main(), 60))


def test_a_revoked_member_is_not_in_the_next_epoch() -> None:
    async def main() -> None:
        async with run_of(3) as (run, owner, clients):
            bad, others = clients[1], [clients[0], clients[2]]
            await asyncio.to_thread(owner.revoke, bad.signer.hex())
            assert run.host.trains(bad.signer), "it finishes its epoch"
            await asyncio.to_thread(owner.pause)
            assert (await refused(bad)).code == "NotAuthorized"
            await state_when(others[0], lambda state: state.phase is Phase.PAUSED)
            status = await asyncio.to_thread(owner.status)
            assert bad.signer.hex() not in [each["signer"] for each in status["pending"]]
            run.act(lambda host, now: host.update({"init_min_clients": 2}, now))
            await asyncio.to_thread(owner.resume)
            formed = await state_when(others[0], lambda state: state.phase is Phase.ROUND_TRAIN)
            assert {client.signer for client in formed.clients} == {other.signer for other in others}

    asyncio.run(asyncio.wait_for(main(), 60))


def test_nobody_slips_in_while_an_invited_run_is_created() -> None:
    async def main() -> None:
        server = CoordinatorServer(MemoryStore())
        url = await server.start("127.0.0.1", 0)
        posts: list[str] = []
        owner = ServerRun(url, "r")
        plain = owner._admin._ask
        owner._admin._ask = lambda method, path, body=None: (posts.append(path), plain(method, path, body))[1]  # type: ignore[method-assign]
        status = await asyncio.to_thread(owner.create, Creation(CONFIG, everybody=False))
        assert posts == ["/v1/runs"], "a second request would leave a moment in which the run is open"
        assert status["allowed"] == []
        client = HttpCoordinator(url, "r", Identity.generate())
        with pytest.raises(CoordinatorError, match="may not join"):
            await client.request(Join("elsewhere", MANIFEST))
        await client.close()
        await server.stop()

    asyncio.run(asyncio.wait_for(main(), 60))

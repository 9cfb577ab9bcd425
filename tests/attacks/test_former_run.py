"""A run was closed, and another one was made under its name: nothing that was signed for the former one counts."""

from __future__ import annotations

import asyncio

import pytest

from psyche_lightning.coordinator.host import RunHost
from psyche_lightning.errors import ConfigError, CoordinatorError
from psyche_lightning.protocol.messages import Result, equivocator, seal
from psyche_lightning.protocol.requests import Accuse, GetTerms, Join
from psyche_lightning.protocol.state import CoordinatorConfig, scope_of
from psyche_lightning.server.admin import CoordinatorAdmin
from psyche_lightning.server.client import HttpCoordinator
from psyche_lightning.server.server import CoordinatorServer
from psyche_lightning.server.store import MemoryStore
from psyche_lightning.wire.identity import Identity

CONFIG = {"init_min_clients": 2, "min_clients": 1, "total_steps": 9, "waiting_for_members_extra_time": 60}
MANIFEST = {"run": {"global_batch_size": 8}}


def two_results(trainer: Identity, scope: str) -> Accuse:
    """An accusation of that trainer, which signed two results for one batch."""
    results = [Result(0, 0, 1, 0, 7, 0, b"p" * 32, 9, b"l" * 32, (rate,), 0, 8) for rate in (1, 2)]
    return Accuse(*(seal(trainer, scope, result).raw for result in results))


def test_a_stranger_ejects_nobody_by_results_of_a_former_run() -> None:
    honest, stranger = Identity.generate(), Identity.generate()

    async def test() -> None:
        server = CoordinatorServer(MemoryStore())
        url = await server.start(port=0)
        owner = CoordinatorAdmin(url)
        try:
            scopes = []
            for last in (False, True):
                await asyncio.to_thread(owner.create, "r", CONFIG)
                a, m = HttpCoordinator(url, "r", honest), HttpCoordinator(url, "r", stranger)
                for client in (a, m):
                    await client.request(Join("", MANIFEST))
                terms = await a.request(GetTerms())
                scopes.append(scope_of("r", terms.incarnation))
                members = server.runs["r"].host.membership
                if last:
                    for old in ("r", scopes[0]):
                        with pytest.raises(CoordinatorError, match="wrong signature") as caught:
                            await m.request(two_results(honest, old))
                        assert caught.value.code == "InvalidAccusation"
                    assert members.ejected == set()
                    await a.request(Join("", MANIFEST))
                    await m.request(two_results(honest, scopes[1]))  # of this run, they prove it
                    assert members.ejected == {honest.public}
                await asyncio.gather(a.close(), m.close())
                await asyncio.to_thread(owner.pause, "r")
                await asyncio.to_thread(owner.command, "r", "close")
            assert scopes[0] != scopes[1]
        finally:
            await server.stop()

    asyncio.run(asyncio.wait_for(test(), 60))


def test_the_scope_names_one_incarnation() -> None:
    one, other = (RunHost("r", CoordinatorConfig(), seed=1, incarnation=bytes([i]) * 16) for i in (1, 2))
    trainer = Identity.generate()
    proof = two_results(trainer, one.state.scope)
    assert equivocator(one.state.scope, proof.first, proof.second) == trainer.public
    with pytest.raises(CoordinatorError, match="wrong signature"):
        equivocator(other.state.scope, proof.first, proof.second)
    assert RunHost.load(one.dump()).state.scope == one.state.scope
    assert len({one.state.scope, other.state.scope, RunHost("r", CoordinatorConfig(), seed=1).state.scope}) == 3
    with pytest.raises(ConfigError, match="has 15 bytes"):
        RunHost("r", CoordinatorConfig(), seed=1, incarnation=bytes(15))

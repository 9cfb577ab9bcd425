from __future__ import annotations

import asyncio
from typing import Any

import pytest

from psyche_lightning.errors import ConfigError
from psyche_lightning.plugins import Plugins
from psyche_lightning.protocol.requests import Join
from psyche_lightning.protocol.state import CoordinatorConfig, Phase
from psyche_lightning.transports.base import TransportContext
from psyche_lightning.wire.identity import Identity

PLUGINS = Plugins(only=[])


@pytest.mark.parametrize(("name", "options"), [("memory", {}), ("tcp", {"host": "127.0.0.1", "port": 0})])
def test_a_transport_by_its_name_listens(name: str, options: dict[str, Any]) -> None:
    async def listen() -> str:
        transport = PLUGINS.transports()[name](options)
        context = TransportContext(Identity(bytes(32)), "run", lambda peer, message: None, lambda digest: None)
        address: str = await transport.start(context)
        await transport.stop()
        return address

    assert asyncio.run(listen())


def test_an_unknown_transport_option_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"transport 'tcp' has no option 'prot'\. Did you mean 'port'\?"):
        PLUGINS.transports()["tcp"]({"prot": 1})


def test_the_embedded_coordinator_runs_alone() -> None:
    async def join() -> Phase:
        options = {"config": CoordinatorConfig(total_steps=3), "max_seq_len": 16}
        client = PLUGINS.coordinators()["embedded"].client("embedded", "run", Identity(bytes(32)), options)
        await client.request(Join("memory:1", {}))
        try:
            async for state in client.watch():
                if state.clients:
                    assert state.config.total_steps == 3
                    assert state.max_seq_len == 16
                    return Phase(state.phase)
            raise AssertionError("the run never had a client")
        finally:
            await client.close()

    assert asyncio.run(asyncio.wait_for(join(), 30)) is Phase.WARMUP


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_coordinator_by_its_scheme(scheme: str) -> None:
    kind = PLUGINS.coordinators()[scheme]
    client = kind.client(f"{scheme}://127.0.0.1:1", "run", Identity(bytes(32)), {"attempts": 1})
    asyncio.run(client.close())
    with pytest.raises(ConfigError, match=r"no option 'atempts'\. Did you mean 'attempts'\?"):
        kind.client(f"{scheme}://127.0.0.1:1", "run", Identity(bytes(32)), {"atempts": 1})

"""Pages of other sites, in a browser beside a coordinator: rebound names and cross-site requests."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import aiohttp
import pytest

from psyche_lightning.data.serve import FileServer
from psyche_lightning.errors import CoordinatorError
from psyche_lightning.server.client import HttpCoordinator
from psyche_lightning.server.server import CoordinatorServer
from psyche_lightning.server.store import MemoryStore
from psyche_lightning.wire.identity import Identity

REBOUND = [
    "evil.example",
    "evil.example:8080",
    "localhost.evil.example",
    "127.0.0.1.evil.example",
    "10.0.0.7",
    "",
    "a b",
]
OWN = ["localhost", "LOCALHOST:9", "127.0.0.1:1234", "[::1]:8080", "127.0.0.9"]


@asynccontextmanager
async def serving(host: str = "127.0.0.1", **options: Any) -> AsyncIterator[tuple[str, aiohttp.ClientSession]]:
    server = CoordinatorServer(MemoryStore(), **options)
    url = (await server.start(host, 0)).replace("0.0.0.0", "127.0.0.1")
    async with aiohttp.ClientSession() as session:
        async with session.post(f"{url}/v1/runs", json={"run_id": "r"}) as answer:
            assert answer.status == 201
        try:
            yield url, session
        finally:
            await server.stop()


async def outcomes(session: aiohttp.ClientSession, url: str, **headers: str) -> set[int]:
    """What the page, a read, a change and the websocket answer."""
    found = set()
    for method, path in (("GET", "/"), ("GET", "/v1/runs/r"), ("POST", "/v1/runs/r/authorize")):
        async with session.request(
            method, url + path, json={} if method == "POST" else None, headers=headers
        ) as answer:
            found.add(answer.status)
    try:
        async with session.ws_connect(f"{url}/v1/runs/r/watch", headers=headers) as socket:
            assert (await socket.receive_json())[0] == "hello"
            found.add(200)
    except aiohttp.WSServerHandshakeError as error:
        found.add(error.status)
    return found


def test_a_rebound_name_reaches_nothing() -> None:
    async def main() -> None:
        async with serving() as (url, session):
            for host in REBOUND:
                assert await outcomes(session, url, Host=host) == {421}, host
            for host in OWN:
                assert await outcomes(session, url, Host=host) == {200}, host
            async with session.get(f"{url}/v1/runs", headers={"Host": "evil.example"}) as answer:
                problem = await answer.json()
            assert problem["code"] == "ForeignHost"
            assert "--allow-host evil.example" in problem["error"]

    asyncio.run(main())


def test_pages_of_other_sites_are_refused() -> None:
    async def main() -> None:
        async with serving() as (url, session):
            port = url.rpartition(":")[2]
            foreign = ["http://evil.example", "null", "http://127.0.0.1:1", f"http://evil.example:{port}", "http://["]
            for origin in foreign:
                assert await outcomes(session, url, Origin=origin) == {403}, origin
            assert await outcomes(session, url, Origin=url) == {200}
            tunnel = {"Host": "localhost:9000", "Origin": "http://localhost:9000"}  # ssh -L 9000:localhost:8080
            assert await outcomes(session, url, **tunnel) == {200}

    asyncio.run(main())


def test_a_proxy_in_front_is_named() -> None:
    async def main() -> None:
        site = "https://psyche.example"
        async with serving(hosts=["Psyche.example"]) as (url, session):
            for headers in (
                {"Host": "psyche.example", "Origin": site},  # the proxy passes the name on
                {"Host": "psyche.example:8443", "Origin": f"{site}:8443"},
                {"Origin": site},  # it asks with the coordinator's own name, as nginx does
            ):
                assert await outcomes(session, url, **headers) == {200}, headers
            assert await outcomes(session, url, Host="other.example") == {421}
            assert await outcomes(session, url, Origin="https://other.example") == {403}
        async with serving() as (url, session):
            inner = {"Origin": site, "X-Forwarded-Host": "psyche.example, inner"}
            assert await outcomes(session, url, **inner) == {200, 401}, "all but changes, which need a token behind it"

    asyncio.run(main())


def test_a_coordinator_of_a_network_answers_to_the_names_it_was_given() -> None:
    async def main() -> None:
        async with serving("0.0.0.0") as (url, session):
            assert await outcomes(session, url, Host="gpu.example") == {200}
            assert await outcomes(session, url, Host="gpu.example", Origin="http://evil.example") == {403}
        async with serving("0.0.0.0", hosts=["gpu.example"]) as (url, session):
            for host in ("gpu.example", "10.0.0.7:8080", "127.0.0.1"):
                assert await outcomes(session, url, Host=host) == {200}
            assert await outcomes(session, url, Host="evil.example") == {421}

    asyncio.run(main())


def test_a_data_server_answers_to_its_names_only(tmp_path: Path) -> None:
    (tmp_path / "dataset.json").write_text("{}")

    def status(server: FileServer, **headers: str) -> int:
        try:
            with urlopen(Request(f"{server.url}/dataset.json", headers=headers)) as answer:
                return int(answer.status)
        except HTTPError as error:
            return error.code

    with FileServer(tmp_path) as server:
        assert status(server) == status(server, Host="localhost:1", Origin="http://localhost:1") == 200
        assert status(server, Host="evil.example") == 421
        assert status(server, Origin="http://evil.example") == 403
    with FileServer(tmp_path, hosts=["data.example"]) as server:
        assert status(server, Host="data.example", Origin="https://data.example") == 200


def test_a_node_is_told_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with serving() as (url, _):

            class Rebound(aiohttp.ThreadedResolver):
                async def resolve(self, host: str, port: int = 0, family: Any = 0) -> Any:
                    return await super().resolve("127.0.0.1", port, family)

            monkeypatch.setattr("aiohttp.connector.DefaultResolver", Rebound)
            name = url.replace("127.0.0.1", "gpu.example")
            client = HttpCoordinator(name, "r", Identity.generate())
            with pytest.raises(CoordinatorError, match=r"--allow-host gpu\.example") as caught:
                await client.watch().__anext__()
            assert caught.value.code == "ForeignHost"
            await client.close()

    asyncio.run(main())

"""Pages in a browser beside the chain: those of this machine may use it, rebound names and other sites may not."""

import asyncio

import aiohttp
import pytest
from psyche_lightning_localnet import LocalChain, LocalServer, SlotClock

HEALTH = {"jsonrpc": "2.0", "id": 1, "method": "getHealth"}
PAGE = "http://localhost:5173"


async def outcomes(session, server, **headers):
    """What a request, a look at the health, a preflight and a websocket answer."""
    found = set()
    for method, path, body in (("POST", "/", HEALTH), ("GET", "/health", None), ("OPTIONS", "/", None)):
        async with session.request(method, server.url + path, json=body, headers=headers) as answer:
            found.add(200 if answer.status == 204 else answer.status)
    for url in (server.ws_url, server.url):
        try:
            async with session.ws_connect(url, headers=headers) as socket:
                await socket.send_json({**HEALTH, "method": "slotSubscribe"})
                assert "result" in await asyncio.wait_for(socket.receive_json(), 10)
                found.add(200)
        except aiohttp.WSServerHandshakeError as error:
            found.add(error.status)
    return found - {405}  # without an Origin, OPTIONS is no preflight


def play(test, **options):
    async def main():
        chain = LocalChain(SlotClock(running=False))
        async with LocalServer(chain, **options) as server, aiohttp.ClientSession() as session:
            await asyncio.wait_for(test(session, server), 60)

    asyncio.run(main())


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8899", "localhost.evil.example", "127.0.0.1.evil.example", "10.0.0.7", ""]
)
def test_a_rebound_name_reaches_nothing(host):
    async def test(session, server):
        assert await outcomes(session, server, Host=host) == {421}
        assert await outcomes(session, server, Host=host, Origin=PAGE) == {421}

    play(test)


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "http://localhost.evil.example", "http://10.0.0.7:8899", "http://["]
)
def test_pages_of_other_sites_are_refused(origin):
    async def test(session, server):
        assert await outcomes(session, server, Origin=origin) == {403}

    play(test)


def test_programs_and_pages_of_this_machine_use_it():
    async def test(session, server):
        for host in ("localhost", "LOCALHOST:9", "127.0.0.1:1234", "[::1]:8899", "127.0.0.9"):
            assert await outcomes(session, server, Host=host) == {200}, host
        assert await outcomes(session, server) == {200}
        for origin in (PAGE, "http://127.0.0.1:8899", "http://[::1]:3000"):
            assert await outcomes(session, server, Origin=origin) == {200}, origin
        asks = {"Origin": PAGE, "Access-Control-Request-Method": "POST"}
        async with session.options(server.url, headers=asks) as answer:
            allowed = answer.headers
        async with session.post(server.url, json=HEALTH, headers={"Origin": PAGE}) as answer:
            readable = answer.headers
        for headers in (allowed, readable):
            assert headers["Access-Control-Allow-Origin"] == PAGE
            assert headers["Vary"] == "Origin"
        assert "content-type" in allowed["Access-Control-Allow-Headers"]
        async with session.post(server.url, json=HEALTH) as answer:
            assert "Access-Control-Allow-Origin" not in answer.headers
        # A client's own headers, and a browser that asks before it lets a page of the network use this machine.
        own = {
            **asks,
            "Access-Control-Request-Headers": "content-type,x-own",
            "Access-Control-Request-Private-Network": "true",
        }
        async with session.options(server.url, headers=own) as answer:
            assert answer.headers["Access-Control-Allow-Headers"] == "content-type,x-own"
            assert answer.headers["Access-Control-Allow-Private-Network"] == "true"
        # A page can read why its request was refused.
        async with session.put(server.url, json=HEALTH, headers={"Origin": PAGE}) as answer:
            assert (answer.status, answer.headers["Access-Control-Allow-Origin"]) == (405, PAGE)

    play(test)


def test_its_owner_names_a_proxy():
    async def test(session, server):
        assert await outcomes(session, server, Host="chain.example", Origin="https://chain.example") == {200}
        assert await outcomes(session, server, Origin="https://chain.example") == {200}
        assert await outcomes(session, server, Host="evil.example") == {421}

    play(test, hosts=["Chain.example"])


def test_a_chain_of_a_network_answers_to_addresses_and_names():
    async def test(session, server):
        assert await outcomes(session, server, Host="gpu.example:8899") == {200}
        assert await outcomes(session, server, Host="gpu.example", Origin="http://gpu.example") == {200}
        assert await outcomes(session, server, Host="gpu.example", Origin="http://evil.example") == {403}

    async def named(session, server):
        assert await outcomes(session, server, Host="10.0.0.7:8899") == {200}
        assert await outcomes(session, server, Host="evil.example") == {421}

    play(test, host="0.0.0.0")
    play(named, host="0.0.0.0", hosts=["gpu.example"])

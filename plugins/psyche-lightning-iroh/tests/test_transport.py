from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import iroh
import pytest
from psyche_lightning_iroh import IrohTransport, transport
from psyche_lightning_iroh.address import Address
from psyche_lightning_iroh.transport import _relay_mode, _relays

from psyche_lightning.errors import ConfigError, TransportError
from psyche_lightning.plugins import load_plugins
from psyche_lightning.testing.peers import Node, eventually
from psyche_lightning.transports import mesh
from psyche_lightning.transports.base import Link
from psyche_lightning.transports.framing import Kind, frame
from psyche_lightning.wire.identity import Identity


def play(scene: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        await asyncio.wait_for(scene(), 60)
        left = asyncio.all_tasks() - {asyncio.current_task()}
        assert not left

    asyncio.run(main())


@contextlib.asynccontextmanager
async def living(*transports: IrohTransport, identities: list[Identity] | None = None) -> AsyncIterator[list[Node]]:
    """Started nodes that have each other as peers."""
    identities = identities or [Identity.generate() for _ in transports]
    nodes = [Node(transport, identity) for transport, identity in zip(transports, identities, strict=True)]
    try:
        for node in nodes:
            await node.start()
        for node in nodes:
            node.transport.set_peers({other.key: other.address for other in nodes})
        yield nodes
    finally:
        for node in nodes:
            await node.transport.stop()


def link(node: Node, peer: bytes) -> Link:
    (found,) = [link for link in node.transport.links() if link.peer == peer]
    return found


def test_the_name_of_a_node_is_its_own_key() -> None:
    async def scene() -> None:
        async with living(IrohTransport()) as (node,):
            endpoint = node.transport._endpoint  # type: ignore[attr-defined]
            assert bytes(endpoint.id().to_bytes()) == node.key

    play(scene)


def test_a_node_listens_on_loopback_by_default() -> None:
    async def scene() -> None:
        async with living(IrohTransport()) as (node,):
            bound = node.transport._endpoint.bound_sockets()  # type: ignore[attr-defined]
            assert {text.rpartition(":")[0] for text in bound} <= {"127.0.0.1", "[::1]"}
            assert node.address == f"iroh://{next(text for text in bound if text.startswith('127'))}"

    play(scene)


def test_a_stranger_is_refused(reach: Callable[..., Any]) -> None:
    async def scene() -> None:
        async with living(IrohTransport()) as (node,):
            alpn = node.transport._alpn  # type: ignore[attr-defined]
            endpoint, connection = await reach(node, Identity.generate(), alpn)
            assert await connection.closed() == "closed by peer: you are not a peer in this run (code 1)"
            await endpoint.close()

    play(scene)


def test_a_node_of_another_run_cannot_connect(reach: Callable[..., Any]) -> None:
    async def scene() -> None:
        guest = Identity.generate()
        async with living(IrohTransport()) as (node,):
            node.transport.set_peers({guest.public: "iroh://127.0.0.1:9"})
            with pytest.raises(iroh.IrohError):
                await reach(node, guest, b"psyche-lightning/1/" + bytes(16).hex().encode())
            assert not link(node, guest.public).connected

    play(scene)


def test_a_host_that_connects_again_and_again_gets_no_handshake(
    reach: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mesh, "ARRIVAL_STORE", 6.0)
    monkeypatch.setattr(mesh, "ARRIVAL_RATE", 1e-6)
    shown: list[bool] = []  # whether it had to show that it receives at its address
    admit = IrohTransport._admit

    async def counted(self: IrohTransport, incoming: Any) -> Any:
        shown.append(await incoming.remote_addr_validated())
        return await admit(self, incoming)

    monkeypatch.setattr(IrohTransport, "_admit", counted)

    async def scene() -> None:
        async with living(IrohTransport()) as (node,):
            alpn = node.transport._alpn  # type: ignore[attr-defined]
            for _ in range(6):
                endpoint, connection = await reach(node, Identity.generate(), alpn)
                assert "you are not a peer" in await connection.closed()
                await endpoint.close()
            with pytest.raises(iroh.IrohError):
                await reach(node, Identity.generate(), alpn)
            assert shown == [False] * 4 + [True] * 2

    play(scene)


def test_another_node_at_an_address_is_refused() -> None:
    async def scene() -> None:
        absent = Identity.generate()
        async with living(IrohTransport(handshake_timeout=2), IrohTransport()) as (a, b):
            a.transport.set_peers({absent.public: b.address})
            await eventually(lambda: "cannot connect" in link(a, absent.public).reason, "the link says why")
            assert not link(a, absent.public).connected

    play(scene)


@pytest.mark.parametrize("both_ways", [False, True])
def test_a_peer_that_opens_more_streams_is_cut_off(both_ways: bool, reach: Callable[..., Any]) -> None:
    async def scene() -> None:
        guest = Identity.generate()
        async with living(IrohTransport()) as (node,):
            node.transport.set_peers({guest.public: "iroh://127.0.0.1:9"})
            endpoint, connection = await reach(node, guest, node.transport._alpn)  # type: ignore[attr-defined]
            streams = [await connection.open_bi() for _ in range(2)]
            for stream in streams:
                await stream.send().write_all(frame(Kind.WELCOME))
            await streams[0].recv().read_exact(5)
            more = (await connection.open_bi()).send() if both_ways else await connection.open_uni()
            await more.write_all(bytes(1000))
            assert "it opened more" in await connection.closed()
            await eventually(lambda: "it opened more" in link(node, guest.public).reason, "the link says why")
            await endpoint.close()

    play(scene)


def test_the_urgent_stream_has_priority() -> None:
    async def scene() -> None:
        async with living(IrohTransport(), IrohTransport()) as (a, b):
            await eventually(lambda: a.connected(b) and b.connected(a), "they are connected")
            for node in (a, b):
                (pipe,) = [pipe for pipe in node.transport._pipes if not pipe.over]  # type: ignore[attr-defined]
                urgent, bulk = pipe._streams
                assert await urgent.priority() > await bulk.priority()

    play(scene)


def test_urgent_frames_overtake_a_blob(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene() -> None:
        async with living(IrohTransport(), IrohTransport()) as (a, b):
            await eventually(lambda: a.connected(b), "they are connected")
            seen: list[int] = []

            def watch(here: int, size: int) -> None:
                if not seen:
                    b.transport.send(a.key, b"urgent")
                seen.append(here if b"urgent" in a.texts() else 0)

            data = os.urandom(100_000_000)  # long enough for several reports on a fast machine
            await a.transport.fetch(b.add(data), [b.key], max_size=len(data), timeout=50, progress=watch)
            assert any(0 < here < len(data) for here in seen)

    play(scene)


def test_every_byte_is_counted() -> None:
    async def scene() -> None:
        one, two = IrohTransport(), IrohTransport()
        async with living(one, two) as (a, b):
            await eventually(lambda: a.connected(b) and b.connected(a), "they are connected")
            await a.transport.fetch(b.add(bytes(1_000_000)), [b.key], max_size=1_000_000, timeout=50)
            there, back = link(a, b.key), link(b, a.key)
            assert 1_000_000 < there.bytes_down < 1_200_000
            assert 1_000_000 < back.bytes_up < 1_200_000
            assert there.bytes_down <= one.meter.down < 1_300_000
            assert back.bytes_up <= two.meter.up < 1_300_000
        assert one.meter.down >= there.bytes_down  # nothing is forgotten when a connection ends

    play(scene)


@pytest.mark.parametrize("reachable", [0, 1])
def test_one_reachable_node_of_two_is_enough(reachable: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mesh, "GRACE", 0.2)

    async def scene() -> None:
        identities = sorted([Identity.generate(), Identity.generate()], key=lambda identity: identity.public)
        async with living(IrohTransport(), IrohTransport(), identities=identities) as nodes:
            for i, node in enumerate(nodes):
                other = nodes[1 - i]
                node.transport.set_peers({other.key: other.address if i != reachable else "iroh://127.0.0.1:9"})
            await eventually(lambda: nodes[0].connected(nodes[1]) and nodes[1].connected(nodes[0]), "they connect")

    play(scene)


# -- relays -----------------------------------------------------------------------------------------------------------


def test_the_option_relay_is_read_and_checked() -> None:
    assert _relays("off") == _relays(False) == []
    assert _relays("on") is _relays(True) is None
    assert _relays("https://relay.example") == ["https://relay.example"]
    assert _relays(["https://a.example", "https://b.example"]) == ["https://a.example", "https://b.example"]
    wrong: Any
    for wrong in ("maybe", [], ["off"], 7, None, ""):
        with pytest.raises(ConfigError, match=r"option relay is .* expected off, on"):
            IrohTransport(relay=wrong)
    assert _relay_mode([]).relay_map().is_empty()
    assert _relay_mode(None).relay_map().len() > 0
    assert _relay_mode(["https://relay.example"]).relay_map().contains("https://relay.example")
    with pytest.raises(TransportError, match="URL that iroh does not accept"):
        _relay_mode(["https://"])


def test_with_a_relay_that_does_not_answer_direct_paths_work(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(transport, "ONLINE_WAIT", 0.3)

    async def scene() -> None:
        relay = "https://127.0.0.1:9/"
        async with living(IrohTransport(relay=relay), IrohTransport(relay=relay)) as (a, b):
            assert a.address.endswith(f"?relay={relay}")
            await eventually(lambda: a.connected(b) and b.connected(a), "they are connected")
            assert link(a, b.key).path == "direct"
        assert "no relay answered" in caplog.text

    play(scene)


def test_a_peer_behind_a_relay_is_unreachable_without_relays() -> None:
    async def scene() -> None:
        peer = Identity.generate().public
        async with living(IrohTransport()) as (a,):
            a.transport.set_peers({peer: "iroh://?relay=https://relay.example"})
            await eventually(lambda: "option relay is off" in link(a, peer).reason, "the link says why")

    play(scene)


# -- addresses and start ----------------------------------------------------------------------------------------------


def test_start_says_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "ROUTER_WAIT", 0.1)

    async def scene() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as taken:
            taken.bind(("127.0.0.1", 0))
            port = taken.getsockname()[1]
            for one, text in (
                (
                    IrohTransport(port=port),
                    f"cannot listen on 127.0.0.1:{port}: Address already in use.*Choose a free UDP port",
                ),
                (IrohTransport(host="192.0.2.1"), "an address of this machine"),
                (IrohTransport(host="no such host"), "cannot listen on no such host"),
                (IrohTransport(host="0.0.0.0"), "no address that peers could try: set advertise"),
                (IrohTransport(advertise="no good/at all"), "is not HOST or HOST:PORT"),
            ):
                with pytest.raises(TransportError, match=text):
                    await Node(one, Identity.generate()).start()
                await one.stop()

    play(scene)


def test_the_advertised_address_comes_first() -> None:
    async def scene() -> None:
        one = IrohTransport(host="0.0.0.0", advertise="home.example")
        async with living(one) as (node,):
            port = next(text for text in one._endpoint.bound_sockets() if text.startswith("0.0")).rpartition(":")[2]
            assert node.address == f"iroh://home.example:{port}"
        async with living(IrohTransport(advertise="home.example:4000")) as (node,):
            assert node.address.startswith("iroh://home.example:4000,127.0.0.1:")

    play(scene)


def test_addresses_are_written_and_read() -> None:
    for address in (
        Address((("10.0.0.7", 4000),)),
        Address((("10.0.0.7", 4000), ("fe80::1", 4001), ("home.example", 1))),
        Address((("10.0.0.7", 4000),), "https://relay.example/"),
        Address((), "https://relay.example:444/a?b"),
    ):
        assert Address.parse(str(address)) == address
    for wrong in (
        "",
        "iroh://",
        "iroh://host",
        "tcp://host:1",
        "iroh://host:99999",
        "iroh://host:1/path",
        "iroh://[::1",
        "iroh://host:1?relay=a&relay=b",
        "iroh://host:1?rely=a",
        "iroh://" + ",".join(["host:1"] * 17),
        "iroh://" + "x" * 3000 + ":1",
    ):
        with pytest.raises(TransportError, match="is not an address of the iroh transport"):
            Address.parse(wrong)


def test_an_invalid_address_is_reported_and_breaks_nothing() -> None:
    async def scene() -> None:
        strange = Identity.generate().public
        async with living(IrohTransport(), IrohTransport()) as (a, b):
            a.transport.set_peers({b.key: b.address, strange: "carrier pigeon"})
            await eventually(lambda: "is not an address" in link(a, strange).reason, "the link says why")
            await eventually(lambda: a.connected(b), "the others are connected")

    play(scene)


# -- the plugin -------------------------------------------------------------------------------------------------------


def test_the_plugin_registers_the_transport_and_checks_its_options(monkeypatch: pytest.MonkeyPatch) -> None:
    factory = load_plugins().transports()["iroh"]
    assert isinstance(factory({"relay": "https://relay.example", "upload": 1000}), IrohTransport)
    with pytest.raises(ConfigError, match=r"'iroh' has no option 'relais'\. Did you mean 'relay'"):
        factory({"relais": "off"})
    monkeypatch.setenv("PSYCHE_HOST", "192.0.2.7")
    built: Any = factory({})
    assert built._host == "192.0.2.7"

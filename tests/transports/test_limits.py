"""How much a peer may send, with the time and the messages given; and the same over real connections."""

from __future__ import annotations

import asyncio
import contextlib
import struct

import pytest

from psyche_lightning.testing.peers import eventually
from psyche_lightning.transports import connection, limits, mesh
from psyche_lightning.transports.framing import Kind, frame, read_frame
from psyche_lightning.transports.gossip import Rumor
from psyche_lightning.transports.limits import (
    LONGEST_QUARANTINE,
    RATE,
    SHARE,
    SHORTEST_QUARANTINE,
    STORE,
    Allowance,
    Bucket,
    FloodError,
    Quarantine,
    Said,
)
from psyche_lightning.transports.tcp import TcpTransport
from psyche_lightning.wire.identity import Identity

from .test_tcp import admitted, ended, farewell, introduce, link, living, plain, play

PEER, OTHER = b"p" * 32, b"o" * 32


def message(sender: bytes, kind: int, size: int = 150) -> bytes:
    return (sender + bytes(64) + bytes([0x94, kind])).ljust(size, b"x")


COST = 1 + 150 / limits.UNIT
PEERS = [Allowance(bytes([number]) * 32, Said()) for number in range(6)]


def sent(allowance: Allowance, data: bytes, now: float, most: int = 100_000) -> int:
    """How many of a message pass until one does not."""
    return next((count for count in range(most) if not allowance.take(data, now, PEERS)), most)


def test_an_honest_peer_is_never_limited_at_any_pace() -> None:
    for pace in (0.1, 1.0, 50.0):  # rounds a second
        said, now = Said(), 0.0
        allowance = Allowance(PEER, said)
        for _ in range(3000):
            now += 1 / pace
            for kind in (0, 1):
                said.note(message(OTHER, kind))
                assert allowance.take(message(PEER, kind, 1000), now, PEERS)
                assert all(allowance.take(message(OTHER, kind), now, PEERS) for _ in PEERS)


def test_a_peer_may_send_a_store_then_a_few_a_second_of_each_kind() -> None:
    allowance = Allowance(PEER, Said())
    assert sent(allowance, message(PEER, 2), 0.0) == pytest.approx(STORE / COST, abs=1)
    assert sent(allowance, message(PEER, 5), 0.0) == pytest.approx(STORE / COST, abs=1)  # another kind, another store
    allowance = Allowance(PEER, Said())
    taken = sum(allowance.take(message(PEER, 2), number / (2 * RATE), PEERS) for number in range(9000))
    assert (STORE + 500 * RATE) / COST < taken < (STORE + 900 * RATE) / COST  # a little too much is no flood


def test_what_this_node_says_itself_is_a_measure() -> None:
    said = Said()
    allowance = Allowance(PEER, said)
    sent(allowance, message(PEER, 0), 0.0)
    for _ in range(100):
        said.note(message(OTHER, 0))
    assert sent(allowance, message(PEER, 0), 0.0) == pytest.approx(100 * SHARE, abs=2)


@pytest.mark.parametrize("flooding", [0, 2])
def test_a_node_that_says_nothing_itself_measures_a_peer_by_the_others(flooding: int) -> None:
    keys = [bytes([number]) * 32 for number in range(7)]
    peers = [Allowance(key, Said()) for key in keys]
    for height in range(5000):
        now = height / 50
        for number, peer in enumerate(peers):
            if number >= flooding:
                assert peer.take(message(keys[number], 0), now, peers)
            else:
                for _ in range(30):
                    with contextlib.suppress(FloodError):
                        peer.take(message(keys[number], 0), now, peers)
    for number in range(flooding):
        assert peers[number].said.by_kind[0] < 2 * SHARE * peers[-1].said.by_kind[0]


def test_large_messages_count_as_many() -> None:
    assert sent(Allowance(PEER, Said()), message(PEER, 1, 64 * 1024), 0.0) < 20


def test_whoever_goes_on_floods() -> None:
    allowance = Allowance(PEER, Said())

    def flood() -> None:
        for _ in range(round(6 * STORE)):
            allowance.take(message(PEER, 2), 0.0, PEERS)

    with pytest.raises(FloodError, match="kind 2"):
        flood()


def test_what_others_signed_is_dropped_without_blame() -> None:
    allowance = Allowance(PEER, Said())
    assert sent(allowance, message(OTHER, 0), 0.0) == pytest.approx((len(PEERS) + 1) * STORE / COST, abs=2)
    for _ in range(round(20 * STORE)):
        assert not allowance.take(message(OTHER, 0), 0.0, PEERS)
    assert allowance.take(message(PEER, 0), 0.0, PEERS)  # its own are another matter


def test_refused_messages_count_as_many() -> None:
    allowance = Allowance(PEER, Said())

    def refuse() -> bool:
        taken = allowance.take(message(PEER, 0), 0.0, PEERS)
        allowance.refused(message(PEER, 0))
        return taken

    assert sum(refuse() for _ in range(25)) < 22


def test_bytes_that_are_no_envelope_have_one_store() -> None:
    allowance = Allowance(PEER, Said())
    first = sent(allowance, b"", 0.0)
    assert first == pytest.approx((len(PEERS) + 1) * STORE, abs=2)
    assert sent(allowance, b"short", 0.0) == 0
    assert sent(allowance, message(OTHER, 200), 0.0) == 0


def test_quarantine_doubles_and_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    quarantine = Quarantine()
    assert quarantine.left(PEER, 0.0) == 0
    assert quarantine.begin(PEER, 0.0) == SHORTEST_QUARANTINE
    assert quarantine.left(PEER, 1.0) == SHORTEST_QUARANTINE - 1
    assert quarantine.left(PEER, SHORTEST_QUARANTINE) == 0
    assert quarantine.begin(PEER, 100.0) == 2 * SHORTEST_QUARANTINE
    assert [quarantine.begin(PEER, 0.0) for _ in range(10)][-1] == LONGEST_QUARANTINE
    monkeypatch.setattr(limits, "MAX_QUARANTINED", 3)
    for number in range(9):
        quarantine.begin(bytes([number]), 0.0)
    assert quarantine.left(PEER, 1.0) == 0  # the oldest is forgotten
    assert quarantine.left(bytes([8]), 1.0) > 0


def test_a_bucket_makes_up_for_what_was_taken() -> None:
    bucket = Bucket(10.0, 5.0, 0.0)
    assert [bucket.wait(1.0, 0.0) for _ in range(7)] == pytest.approx([0, 0, 0, 0, 0, 0.1, 0.2])
    assert bucket.wait(1.0, 100.0) == 0


# -- over connections -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["directly", "to all", "to be passed on"])
def test_a_peer_that_floods_is_disconnected_and_kept_away(way: str) -> None:
    def flood(number: int, sender: bytes, friend: bytes) -> bytes:
        if way == "directly":
            return frame(Kind.MESSAGE, message(sender, 2))
        names = (friend[:8],) if way == "to be passed on" else ()
        return Rumor(number, 2, bool(names), sender, names, message(sender, 2)).frame()

    async def scene() -> None:
        guest = Identity.generate()
        async with living(TcpTransport(), TcpTransport()) as (node, friend):
            introduce([node, friend], guest)
            await eventually(lambda: node.connected(friend), "a friend is there")
            async with admitted(node, guest) as (reader, writer):
                for number in range(6000):
                    writer.write(flood(number, guest.public, friend.key))
                assert "it floods this node" in await farewell(reader)
            await eventually(lambda: "kept away" in link(node, guest.public)[1], "the link says why")
            with pytest.raises(Exception, match="you flooded this node"):
                async with admitted(node, guest):
                    pass
            assert len(node.texts()) <= STORE
            assert len(friend.texts()) <= STORE
            friend.transport.send(node.key, b"hello")
            await eventually(lambda: b"hello" in node.texts(friend), "the others do not notice")
            introduce([node, friend])
            introduce([node, friend], guest)  # a new epoch changes nothing
            with pytest.raises(Exception, match="you flooded this node"):
                async with admitted(node, guest):
                    pass

    play(scene)


def test_frames_beyond_the_limit_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "FRAME_STORE", 100.0)
    monkeypatch.setattr(connection, "FRAME_RATE", 0.001)

    async def scene() -> None:
        guest = Identity.generate()
        async with living(TcpTransport()) as (node,):
            introduce([node], guest)
            async with admitted(node, guest) as (_, writer):
                for number in range(1000):
                    writer.write(frame(Kind.MESSAGE, b"%d" % number))
                await eventually(lambda: len(node.texts()) >= 100, "the first ones arrive")
                await asyncio.sleep(0.2)
                assert len(node.texts()) <= 102

    play(scene)


def test_blocks_of_a_request_that_was_given_up_are_bounded() -> None:
    async def scene() -> None:
        guest = Identity.generate()
        async with living(TcpTransport()) as (node,):
            introduce([node], guest)
            async with admitted(node, guest) as (reader, writer):
                await eventually(lambda: link(node, guest.public)[0], "a link")
                fetch = asyncio.ensure_future(
                    node.transport.fetch(bytes(32), [guest.public], max_size=100_000, timeout=50)
                )
                _, body = await read_frame(reader, {Kind.WANT})
                writer.write(frame(Kind.FOUND, body[:4], struct.pack("!Q", 100_000)))
                fetch.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await fetch
                for _ in range(100):
                    writer.write(frame(Kind.BLOCK, body[:4], bytes(50_000)))
                assert "goes on sending what this node gave up" in await farewell(reader)

    play(scene)


def test_one_host_does_not_use_up_the_places_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mesh, "MAX_ARRIVING_OF_HOST", 5)
    monkeypatch.setattr(mesh, "MAX_ARRIVING", 8)

    async def scene() -> None:
        async with living(TcpTransport(handshake_timeout=600)) as (node,):
            transport = node.transport
            assert isinstance(transport, TcpTransport)
            ends: dict[str, asyncio.Future[None]] = {}

            async def never(name: str) -> None:
                ends[name] = asyncio.get_running_loop().create_future()
                await ends[name]

            async def come(host: str, count: int) -> None:
                for number in range(count):
                    transport._arrive(never(f"{host} {number}"), f"{host}:{1000 + number}")  # type: ignore[arg-type]
                    await asyncio.sleep(0)
                await asyncio.sleep(0)

            await come("[2001:db8::1]", 3)
            await come("[2001:db8::2]", 3)  # the same network
            assert ends["[2001:db8::1] 0"].cancelled()
            assert not ends["[2001:db8::1] 1"].cancelled()
            await come("192.0.2.1", 2)
            await come("192.0.2.2", 3)
            assert len(transport._arriving) == 8
            assert not any(end.cancelled() for name, end in ends.items() if name.startswith("192"))

    play(scene)


def test_a_host_that_connects_again_and_again_gets_no_handshake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mesh, "ARRIVAL_STORE", 3.0)
    monkeypatch.setattr(mesh, "ARRIVAL_RATE", 1e-6)

    async def scene() -> None:
        guest = Identity.generate()
        async with living(TcpTransport()) as (node,):
            introduce([node], guest)
            for _ in range(3):
                async with admitted(node, guest):
                    pass
            async with plain(node) as (reader, _):
                await ended(reader)  # closed at once

    play(scene)


def test_a_peer_whose_address_changes_all_the_time_is_dialled_no_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    dialled: list[str] = []

    async def dial(_: TcpTransport, key: bytes, address: str, meter: object) -> None:
        dialled.append(address)
        raise OSError("nobody is there")

    monkeypatch.setattr(TcpTransport, "_dial", dial)

    async def scene() -> None:
        async with living(TcpTransport(), identities=[Identity(bytes(32))]) as (node,):
            key = next(key for key in (Identity.generate().public for _ in range(999)) if key > node.key)
            for port in range(1, 100):
                node.transport.set_peers({key: f"tcp://127.0.0.1:{port}"})
                await asyncio.sleep(0.005)
            assert 1 <= len(set(dialled)) <= limits.MOVE_STORE + 1

    play(scene)

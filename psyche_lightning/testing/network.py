"""The conformance kit of transports that use a network: :class:`TransportContract` and further tests.

Example::

    class TestPigeon(NetworkTransportContract):
        nowhere = "pigeon://the.moon"

        def make_network_transport(self, **options):
            return PigeonTransport(loft="127.0.0.1", **options)

        @contextlib.asynccontextmanager
        async def outside(self, node):  # a connection without a handshake
            ...

        @contextlib.asynccontextmanager
        async def inside(self, node, guest):  # a connection of a peer, after the handshake
            ...

All nodes of a test run in one process and use the loopback interface.
"""

# ruff: noqa: D102 - the name of a test says what it shows
from __future__ import annotations

import abc
import asyncio
import contextlib
import itertools
import os
import random
import tracemalloc
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol

import pytest

from psyche_lightning.errors import ConfigError, TransportError
from psyche_lightning.testing.peers import LONG, Node, eventually
from psyche_lightning.testing.transport import TransportContract
from psyche_lightning.transports.base import Link, Transport
from psyche_lightning.transports.framing import Kind, frame
from psyche_lightning.wire.identity import Identity, short

BIG = 12_000_000  # bytes of a blob that several nodes deliver together
RATE = 400_000  # bytes a second, in tests with a limit


class Intruder(Protocol):
    """A raw connection to a node, for bytes that a transport would never send."""

    async def send(self, data: bytes) -> None:
        """Send bytes; does nothing if the connection is closed."""

    async def ended(self) -> None:
        """Wait until the node has closed the connection."""


class NetworkTransportContract(TransportContract):
    """What every transport that uses a network must do; subclass it as ``Test...`` and define what is abstract.

    Attributes:
        nowhere: an address at which nobody listens.
        beginning: the first bytes of a valid frame, without its end.
        headers: the largest allowed ratio of bytes on the wire to bytes of blobs.
    """

    nowhere: str
    beginning: bytes = frame(Kind.MESSAGE, bytes(60_000))[:20_000]
    headers: float = 1.1

    @abc.abstractmethod
    def make_network_transport(self, **options: Any) -> Transport:
        """Returns a new transport that is not started.

        Args:
            options: any of ``upload`` and ``download`` (bytes a second), ``ping_interval`` and ``silence`` (seconds).
        """

    @abc.abstractmethod
    def outside(self, node: Node) -> AbstractAsyncContextManager[Intruder]:
        """Connects to the node without a handshake."""

    @abc.abstractmethod
    def inside(self, node: Node, guest: Identity) -> AbstractAsyncContextManager[Intruder]:
        """Connects to the node as one of its peers: the handshake with the key ``guest`` is done."""

    def make_transport(self) -> Transport:
        return self.make_network_transport()

    # -- helpers ------------------------------------------------------------------------------------------------------

    async def special(self, identity: Identity | None = None, **options: Any) -> Node:
        """Start a node whose transport has options."""
        node = Node(self.make_network_transport(**options), identity or Identity.generate())
        self._all.append(node)
        await node.start()
        return node

    async def apart(self, count: int) -> list[Node]:
        """Start nodes; the first and the last cannot reach each other, all other pairs are connected."""
        nodes = [await self.node() for _ in range(count)]
        ends = nodes[0], nodes[-1]
        for one in nodes:
            other = ends[1] if one is ends[0] else ends[0]
            self.introduce_one(one, nodes, {other.key: self.nowhere} if one in ends else {})
        for a, b in itertools.permutations(nodes, 2):
            if {a, b} != set(ends):
                await eventually(lambda a=a, b=b: a.connected(b), "all other pairs are connected")  # type: ignore[misc]
        return nodes

    def introduce_one(self, node: Node, nodes: list[Node], but: Mapping[bytes, str]) -> None:
        """Give one node its peers; ``but`` replaces the addresses of some keys."""
        node.transport.set_peers({one.key: one.address for one in nodes} | dict(but))

    def link(self, node: Node, peer: bytes) -> Link:
        """The link from a node to a peer."""
        (found,) = [link for link in node.transport.links() if link.peer == peer]
        return found

    async def still_well(self, a: Node, b: Node) -> None:
        """Check that two nodes still exchange messages and blobs."""
        text = os.urandom(8)
        await eventually(lambda: text in b.texts(), "the others go on", lambda: a.transport.send(b.key, text))
        assert await b.transport.fetch(a.add(text), [a.key], max_size=8, timeout=LONG) == text

    # -- gossip -------------------------------------------------------------------------------------------------------

    def test_a_message_reaches_those_that_only_others_can_reach(self) -> None:
        async def scene() -> None:
            a, b, c = await self.apart(3)
            assert not a.connected(c)
            a.transport.broadcast(b"for all")
            a.transport.send(c.key, b"for c")
            await eventually(lambda: {b"for all", b"for c"} <= set(c.texts(b)), "c hears a through b")
            assert b.texts() == [b"for all"]
            c.transport.broadcast(b"and back")
            await eventually(lambda: b"and back" in a.texts(b), "a hears c through b")

        self.play(scene)

    def test_a_message_is_acted_on_once_however_many_pass_it_on(self) -> None:
        async def scene() -> None:
            nodes = await self.apart(6)
            sent = [b"%d" % number for number in range(30)]
            for message in sent:
                nodes[0].transport.broadcast(message)
            nodes[0].transport.broadcast(b"last")
            await eventually(lambda: all(b"last" in node.texts() for node in nodes[1:]), "everyone has the last one")
            for node in nodes[1:]:
                await eventually(lambda node=node: set(sent) <= set(node.texts()), "all are there")  # type: ignore[misc]
                assert sorted(node.texts()) == sorted([*sent, b"last"])
            assert not nodes[0].messages

        self.play(scene)

    def test_a_message_that_was_refused_is_not_passed_on(self) -> None:
        async def scene() -> None:
            a, b, c = await self.apart(3)
            b.refused.add(b"of another run")
            a.transport.broadcast(b"of another run")
            a.transport.broadcast(b"good")
            await eventually(lambda: b"good" in c.texts(), "the good one arrives")
            assert c.texts() == [b"good"]
            assert set(b.texts()) == {b"of another run", b"good"}

        self.play(scene)

    def test_what_was_said_just_now_is_said_again_when_a_link_comes_up(self) -> None:
        async def scene() -> None:
            a, b = await self.nodes(2)
            a.transport.broadcast(b"news")
            await eventually(lambda: b"news" in b.texts(), "b has it")
            late = await self.node()
            self.introduce([a, late])
            await eventually(lambda: b"news" in late.texts(a), "the late one has it, too")

        self.play(scene)

    # -- blobs from several nodes -------------------------------------------------------------------------------------

    def test_a_large_blob_comes_from_several_at_once(self) -> None:
        async def scene() -> None:
            a, *sources = await self.nodes(4)
            data = os.urandom(BIG)
            digests = {node.add(data) for node in sources}
            fetched = await a.transport.fetch(digests.pop(), [node.key for node in sources], max_size=BIG, timeout=LONG)
            assert fetched == data
            assert all(node.given > 0 for node in sources)
            assert sum(node.given for node in sources) < 1.3 * BIG

        self.play(scene)

    def test_a_source_that_dies_is_replaced_and_what_it_gave_is_kept(self) -> None:
        async def scene() -> None:
            a, b, c = await self.nodes(3)
            data = os.urandom(2 * BIG)
            digest = b.add(data)
            dying: list[asyncio.Task[None]] = []

            def watch(here: int, size: int) -> None:
                if here > 500_000 and not dying:
                    c.add(data)
                    c.gate.set()
                    dying.append(asyncio.ensure_future(b.transport.stop()))

            c.gate.clear()  # so b delivers first
            fetched = await a.transport.fetch(digest, [b.key, c.key], max_size=2 * BIG, timeout=LONG, progress=watch)
            assert fetched == data
            await dying[0]
            assert c.given < 2 * BIG

        self.play(scene)

    def test_the_next_attempt_goes_on_where_the_last_one_ended(self) -> None:
        async def scene() -> None:
            a = await self.node()
            slow = await self.special(upload=2_000_000)
            b = await self.node()
            self.introduce([a, slow, b])
            await self.connected([a, slow, b])
            data = os.urandom(BIG)
            digest = slow.add(data)
            with pytest.raises(TransportError, match=rf"of {BIG} bytes are kept.*{short(slow.key)}"):
                await a.transport.fetch(digest, [slow.key], max_size=BIG, timeout=2)
            b.add(data)
            told: list[int] = []
            fetched = await a.transport.fetch(
                digest, [b.key], max_size=BIG, timeout=LONG, progress=lambda here, size: told.append(here)
            )
            assert fetched == data
            assert b.given < BIG - 500_000
            assert told[0] > 500_000

        self.play(scene)

    def test_a_slow_source_does_not_hold_up_the_others(self) -> None:
        async def scene() -> None:
            a = await self.node()
            slow = await self.special(upload=20_000)  # BIG would take ten minutes
            b = await self.node()
            self.introduce([a, slow, b])
            await self.connected([a, slow, b])
            data = os.urandom(BIG)
            digest = slow.add(data)
            b.add(data)
            fetched = await a.transport.fetch(digest, [slow.key, b.key], max_size=BIG, timeout=LONG)
            assert fetched == data
            assert slow.given < 1_000_000

        self.play(scene)

    def test_one_wrong_byte_among_several_providers_is_found_and_its_provider_named(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        async def scene() -> None:
            a, b, c, d = await self.nodes(4)
            data = os.urandom(BIG)
            wrong = bytearray(data)
            for at in range(0, BIG, 50_000):
                wrong[at] ^= 1
            for node in (b, d):
                digest = node.add(data)
            c.blobs[digest] = bytes(wrong)
            fetched = await a.transport.fetch(digest, [b.key, c.key, d.key], max_size=BIG, timeout=LONG)
            assert fetched == data
            warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
            named = [sum(short(node.key) in text for text in warnings) for node in (b, c, d)]
            assert named == [0, 1, 0], f"one warning must name c, which delivered wrong bytes: {warnings}"
            other = os.urandom(BIG)
            for node in (b, c, d):
                digest = node.add(other)
            before = c.given
            assert await a.transport.fetch(digest, [c.key, b.key, d.key], max_size=BIG, timeout=LONG) == other
            assert c.given == before, "the provider of the wrong bytes must be asked last"

        self.play(scene)

    def test_a_source_that_gives_another_size_does_not_win_by_being_first(self) -> None:
        async def scene() -> None:
            a, b, c = await self.nodes(3)
            data = os.urandom(BIG)
            digest = c.add(data)
            for wrong in (data[: BIG // 2], data + b"x"):
                b.blobs[digest] = wrong
                fetched = await a.transport.fetch(digest, [b.key, c.key], max_size=BIG + 1, timeout=LONG)
                assert fetched == data

        self.play(scene)

    # -- limits -------------------------------------------------------------------------------------------------------

    def test_a_limit_holds_in_both_directions(self) -> None:
        async def scene() -> None:
            sender = await self.special(upload=RATE)
            receiver = await self.special(download=RATE)
            other = await self.node()
            self.introduce([sender, receiver, other])
            await self.connected([sender, receiver, other])
            loop = asyncio.get_running_loop()
            for giver, taker in ((sender, other), (other, receiver)):
                data = os.urandom(RATE)
                before = self.link(taker, giver.key).bytes_down
                begun = loop.time()
                await taker.transport.fetch(giver.add(data), [giver.key], max_size=RATE, timeout=LONG)
                passed = loop.time() - begun
                moved = self.link(taker, giver.key).bytes_down - before
                assert RATE <= moved <= self.headers * RATE * (passed + 0.4)

        self.play(scene)

    def test_a_limit_is_shared_by_all_peers(self) -> None:
        async def scene() -> None:
            sender = await self.special(upload=RATE)
            takers = [await self.node() for _ in range(3)]
            self.introduce([sender, *takers])
            await self.connected([sender, *takers])
            loop = asyncio.get_running_loop()
            digest = sender.add(os.urandom(RATE // 3))
            begun = loop.time()
            await asyncio.gather(
                *(node.transport.fetch(digest, [sender.key], max_size=RATE, timeout=LONG) for node in takers)
            )
            assert sender.given <= self.headers * RATE * (loop.time() - begun + 0.4)

        self.play(scene)

    def test_announcements_overtake_blobs_where_there_is_a_limit(self) -> None:
        async def scene() -> None:
            a = await self.special(upload=RATE)
            b = await self.node()
            self.introduce([a, b])
            await self.connected([a, b])
            order: list[str] = []

            def watch(here: int, size: int) -> None:
                if not order:
                    a.transport.broadcast(b"urgent")
                if b"urgent" in b.texts() and "message" not in order:
                    order.append("message")
                order.append("piece")

            digest = a.add(os.urandom(RATE))
            await b.transport.fetch(digest, [a.key], max_size=RATE, timeout=LONG, progress=watch)
            assert "message" in order
            assert order.index("message") < len(order) / 2

        self.play(scene)

    def test_announcements_do_not_wait_for_the_blobs_of_many(self) -> None:
        async def scene() -> None:
            a = await self.special(upload=RATE)
            takers = [await self.node() for _ in range(8)]
            self.introduce([a, *takers])
            await self.connected([a, *takers])
            fetches = [
                asyncio.ensure_future(
                    node.transport.fetch(a.add(os.urandom(RATE // 4)), [a.key], max_size=RATE, timeout=LONG)
                )
                for node in takers
            ]
            await eventually(lambda: a.given > RATE // 2, "blobs are on their way")
            before = a.given
            a.transport.broadcast(b"urgent")
            while not all(b"urgent" in node.texts() for node in takers):
                await asyncio.sleep(0.001)
            assert a.given - before < RATE // 6
            for fetch in fetches:
                fetch.cancel()
            await asyncio.gather(*fetches, return_exceptions=True)

        self.play(scene)

    @pytest.mark.parametrize("value", [0, -1, "fast", True, float("nan")])
    def test_a_limit_that_makes_no_sense_is_refused(self, value: Any) -> None:
        for name in ("upload", "download"):
            with pytest.raises(ConfigError, match=f"{name} is .*bytes a second"):
                self.make_network_transport(**{name: value})

    # -- misbehaviour -------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("proven", [False, True])
    def test_nonsense_is_answered_by_closing_and_costs_nothing(
        self, proven: bool, caplog: pytest.LogCaptureFixture
    ) -> None:
        nonsense = [
            random.Random(7).randbytes(10_000),
            b"\xff" * 64,
            b"\x7f" + bytes(63),
            b"GET / HTTP/1.1\r\n\r\n" * 4,
        ]

        async def scene() -> None:
            a, b = await self.nodes(2)
            guest = Identity.generate()
            for data in nonsense:
                for node in (a, b):
                    node.transport.set_peers({a.key: a.address, b.key: b.address, guest.public: self.nowhere})
                await self.connected([a, b])
                async with self.inside(a, guest) if proven else self.outside(a) as intruder:
                    tracemalloc.start()
                    await intruder.send(data)
                    await asyncio.wait_for(intruder.ended(), LONG)
                    _, peak = tracemalloc.get_traced_memory()
                    tracemalloc.stop()
                    assert peak < 5_000_000
            await self.still_well(a, b)
            if proven:
                warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
                assert any(short(guest.public) in text for text in warnings)
                assert not self.link(a, guest.public).connected
                assert self.link(a, guest.public).reason

        caplog.set_level("DEBUG", "psyche_lightning")
        self.play(scene)

    @pytest.mark.parametrize("drip", [False, True])
    def test_half_a_message_is_not_waited_for_however_slowly_it_goes_on(
        self, drip: bool, caplog: pytest.LogCaptureFixture
    ) -> None:
        async def scene() -> None:
            a = await self.special(silence=1.0, ping_interval=0.2)
            b = await self.node()
            guest = Identity.generate()
            a.transport.set_peers({b.key: b.address, guest.public: self.nowhere})
            b.transport.set_peers({a.key: a.address})
            await self.connected([a, b])
            async with self.inside(a, guest) as intruder:
                await intruder.send(self.beginning[: 100 if drip else None])
                ended = asyncio.ensure_future(intruder.ended())
                for at in range(100, len(self.beginning)):
                    if ended.done():
                        break
                    if drip:
                        await intruder.send(self.beginning[at : at + 1])
                    await asyncio.wait([ended], timeout=0.05)
                await asyncio.wait_for(ended, LONG)
            await eventually(lambda: "silent" in self.link(a, guest.public).reason, "the link says why")
            assert short(guest.public) in caplog.text
            await self.still_well(a, b)

        caplog.set_level("DEBUG", "psyche_lightning")
        self.play(scene)

    def test_a_crowd_at_the_door_does_not_keep_peers_out(self) -> None:
        async def scene() -> None:
            a = await self.node()
            async with contextlib.AsyncExitStack() as stack:
                for _ in range(40):
                    await stack.enter_async_context(self.outside(a))
                b = await self.node()
                self.introduce([a, b])
                await self.connected([a, b])
                await self.still_well(a, b)

        self.play(scene)

    def test_a_peer_that_connects_over_and_over_has_one_link(self) -> None:
        async def scene() -> None:
            a, b = await self.nodes(2)
            guest = Identity.generate()
            for node in (a, b):
                node.transport.set_peers({a.key: a.address, b.key: b.address, guest.public: self.nowhere})
            async with contextlib.AsyncExitStack() as stack:
                crowd = [await stack.enter_async_context(self.inside(a, guest)) for _ in range(8)]
                for intruder in crowd[:-1]:
                    await asyncio.wait_for(intruder.ended(), LONG)
                assert self.link(a, guest.public).connected
                await self.still_well(a, b)

        self.play(scene)

    # -- liveness -----------------------------------------------------------------------------------------------------

    def test_links_tell_latency_bandwidth_and_when_and_why_a_peer_left(self) -> None:
        async def scene() -> None:
            a = await self.special(ping_interval=0.1)
            b = await self.node()
            self.introduce([a, b])
            await self.connected([a, b])
            await eventually(lambda: self.link(a, b.key).round_trip is not None, "the round trip is measured")
            await a.transport.fetch(b.add(os.urandom(1_000_000)), [b.key], max_size=BIG, timeout=LONG)
            there = self.link(a, b.key)
            assert there.bandwidth is not None
            assert there.bandwidth > 0
            assert there.path == "direct"
            assert there.last_seen is not None
            assert 0 <= there.last_seen < LONG
            await b.transport.stop()
            await eventually(lambda: not a.connected(b), "a sees that b is gone")
            gone = self.link(a, b.key)
            assert "this node stopped" in gone.reason
            assert gone.last_seen is not None

        self.play(scene)

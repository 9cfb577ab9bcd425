"""The conformance kit of transports: subclass one class, and pytest tests the contract.

Example::

    # tests/test_pigeon.py
    from psyche_lightning.testing.transport import TransportContract

    class TestPigeon(TransportContract):
        def make_transport(self):
            return PigeonTransport(loft="127.0.0.1")

For a transport that uses a network, subclass :class:`psyche_lightning.testing.network.NetworkTransportContract`
instead. The kit needs pytest alone (``pip install psyche-lightning[testing]``). Each test has its own event loop, ends
within :attr:`TransportContract.limit` seconds, and checks that no task still runs.
"""

# ruff: noqa: D102 - the name of a test says what it shows
from __future__ import annotations

import abc
import asyncio
import contextlib
import os
from collections.abc import Awaitable, Callable, Mapping

import pytest

from psyche_lightning.errors import AbsentError, TransportError
from psyche_lightning.protocol.messages import MAX_MESSAGE_SIZE
from psyche_lightning.testing.peers import LONG, Node, eventually
from psyche_lightning.transports.base import HandsOut, Transport
from psyche_lightning.wire.canonical import sha256
from psyche_lightning.wire.identity import Identity, short


class TransportContract(abc.ABC):
    """What every transport must do; subclass it as ``Test...`` and define :meth:`make_transport`.

    Attributes:
        limit: seconds after which a test that hangs fails.
    """

    limit: float = 60.0

    @abc.abstractmethod
    def make_transport(self) -> Transport:
        """Returns a new transport that is not started. The transports of one test must be able to reach each other."""

    # -- helpers ------------------------------------------------------------------------------------------------------

    @pytest.fixture(autouse=True)
    def _nodes(self) -> None:
        self._all: list[Node] = []

    def play(self, scene: Callable[[], Awaitable[None]]) -> None:
        """Run one test, stop its nodes, and check that no task still runs."""

        async def main() -> None:
            try:
                await asyncio.wait_for(scene(), self.limit)
            finally:
                for node in self._all:
                    node.gate.set()
                    await asyncio.wait_for(node.transport.stop(), self.limit)
            left = asyncio.all_tasks() - {asyncio.current_task()}
            assert not left, f"tasks still run after stop(): {left}"

        asyncio.run(main())

    async def node(self, identity: Identity | None = None, run_id: str = "run") -> Node:
        """Start a node."""
        node = Node(self.make_transport(), identity or Identity.generate(), run_id)
        self._all.append(node)
        await node.start()
        return node

    async def nodes(self, count: int) -> list[Node]:
        """Start nodes, and wait until all are connected with each other."""
        nodes = [await self.node() for _ in range(count)]
        self.introduce(nodes)
        await self.connected(nodes)
        return nodes

    def introduce(self, nodes: list[Node], but: Mapping[bytes, str] | None = None) -> None:
        """Make nodes peers of each other; ``but`` replaces the addresses of some keys."""
        peers = {node.key: node.address for node in nodes} | dict(but or {})
        for node in nodes:
            node.transport.set_peers(peers)

    async def connected(self, nodes: list[Node]) -> None:
        """Wait until all links are up."""
        for a in nodes:
            for b in nodes:
                if a is not b:
                    await eventually(lambda a=a, b=b: a.connected(b), "all nodes are connected")  # type: ignore[misc]

    # -- messages -----------------------------------------------------------------------------------------------------

    def test_messages_arrive_unchanged_with_their_sender(self) -> None:
        async def scene() -> None:
            a, b = await self.nodes(2)
            for message in (b"", b"x", bytes(range(256)), os.urandom(MAX_MESSAGE_SIZE)):
                for sender, receiver in ((a, b), (b, a)):
                    await eventually(
                        lambda receiver=receiver, sender=sender, message=message: (  # type: ignore[misc]
                            message in receiver.texts(sender)
                        ),
                        f"a message of {len(message)} bytes arrives",
                        lambda receiver=receiver, sender=sender, message=message: (  # type: ignore[misc]
                            sender.transport.send(receiver.key, message)
                        ),
                    )
            assert {sender for sender, _ in a.messages} == {b.key}
            assert {sender for sender, _ in b.messages} == {a.key}

        self.play(scene)

    def test_a_broadcast_reaches_every_peer_but_not_the_sender(self) -> None:
        async def scene() -> None:
            nodes = await self.nodes(4)
            sender, others = nodes[1], [nodes[0], *nodes[2:]]
            await eventually(
                lambda: all(b"to all" in node.texts(sender) for node in others),
                "everyone has the broadcast",
                lambda: sender.transport.broadcast(b"to all"),
            )
            assert not sender.messages

        self.play(scene)

    def test_a_message_for_a_stranger_is_dropped_and_one_too_long_refused(self) -> None:
        async def scene() -> None:
            a, b = await self.nodes(2)
            a.transport.send(Identity.generate().public, b"to nobody")
            for call in (a.transport.broadcast, lambda message: a.transport.send(b.key, message)):
                with pytest.raises(TransportError, match=str(MAX_MESSAGE_SIZE)):
                    call(bytes(MAX_MESSAGE_SIZE + 1))
            await eventually(lambda: b"on" in b.texts(), "a goes on", lambda: a.transport.send(b.key, b"on"))

        self.play(scene)

    def test_a_handler_that_fails_does_not_end_the_link(self) -> None:
        async def scene() -> None:
            a, b = await self.nodes(2)
            b.faulty = True
            await eventually(lambda: b"1" in b.texts(), "the handler fails", lambda: a.transport.send(b.key, b"1"))
            b.faulty = False
            await eventually(lambda: b"2" in b.texts(), "the next one arrives", lambda: a.transport.send(b.key, b"2"))

        self.play(scene)

    def test_a_flood_towards_a_peer_that_is_away_is_bounded_and_the_link_recovers(self) -> None:
        async def scene() -> None:
            a, b = await self.nodes(2)
            await b.transport.stop()
            for i in range(5000):
                a.transport.send(b.key, b"%d" % i)
            again = await self.node(b.identity)
            self.introduce([a, again])
            await eventually(lambda: b"new" in again.texts(a), "b hears a", lambda: a.transport.send(b.key, b"new"))
            await eventually(lambda: b"hello" in a.texts(), "a hears b", lambda: again.transport.broadcast(b"hello"))
            assert len(again.messages) < 5000

        self.play(scene)

    # -- strangers ----------------------------------------------------------------------------------------------------

    def test_a_stranger_can_neither_send_nor_fetch(self) -> None:
        async def scene() -> None:
            a, b = await self.nodes(2)
            digest = a.add(b"secret of the run")
            stranger = await self.node()
            stranger.transport.set_peers({a.key: a.address, b.key: b.address})
            stranger.transport.broadcast(b"let me in")
            with pytest.raises(TransportError):
                await stranger.transport.fetch(digest, [a.key], max_size=100, timeout=1)
            await eventually(lambda: b"on" in b.texts(), "the others go on", lambda: a.transport.send(b.key, b"on"))
            assert not a.messages
            assert not a.asked
            assert b.texts(stranger) == []
            assert not stranger.connected(a)

        self.play(scene)

    def test_whoever_sits_at_the_address_of_a_peer_gets_nothing(self) -> None:
        async def scene() -> None:
            a, b = await self.nodes(2)
            absent, impostor = Identity.generate(), await self.node()
            impostor.transport.set_peers({a.key: a.address})
            digest = impostor.add(b"blob")
            a.transport.set_peers({b.key: b.address, absent.public: impostor.address})
            a.transport.send(absent.public, b"for the absent one only")
            with pytest.raises(TransportError, match=short(absent.public)):
                await a.transport.fetch(digest, [absent.public], max_size=100, timeout=1)
            await eventually(lambda: b"on" in b.texts(), "the others go on", lambda: a.transport.send(b.key, b"on"))
            assert not impostor.messages
            assert not impostor.asked
            assert not any(link.connected for link in a.transport.links() if link.peer == absent.public)

        self.play(scene)

    def test_nodes_of_different_runs_do_not_talk(self) -> None:
        async def scene() -> None:
            a, b = await self.nodes(2)
            other = await self.node(run_id="another run")
            digest = a.add(b"blob")
            self.introduce([a, b, other])
            other.transport.broadcast(b"hello?")
            a.transport.send(other.key, b"hello?")
            with pytest.raises(TransportError):
                await other.transport.fetch(digest, [a.key], max_size=100, timeout=1)
            await eventually(lambda: b"on" in b.texts(), "the others go on", lambda: a.transport.send(b.key, b"on"))
            assert not other.messages
            assert not a.messages
            assert not a.asked

        self.play(scene)

    def test_a_peer_that_is_taken_off_the_list_is_cut_off(self) -> None:
        async def scene() -> None:
            a, b, c = await self.nodes(3)
            a.transport.set_peers({b.key: b.address})
            assert [link.peer for link in a.transport.links()] == [b.key]
            await eventually(lambda: not c.connected(a), "c sees that its link is gone")
            a.messages.clear()
            c.transport.send(a.key, b"still here?")
            await eventually(lambda: b"on" in a.texts(b), "b goes on", lambda: b.transport.send(a.key, b"on"))
            assert not a.texts(c)
            self.introduce([a, b, c])
            await eventually(lambda: b"back" in a.texts(c), "c is back", lambda: c.transport.send(a.key, b"back"))

        self.play(scene)

    # -- blobs --------------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("size", [0, 1, 65_535, 65_536, 65_537, 3_000_001])
    def test_a_blob_arrives_whole(self, size: int) -> None:
        async def scene() -> None:
            a, b = await self.nodes(2)
            data = os.urandom(size)
            assert await a.transport.fetch(b.add(data), [b.key], max_size=size, timeout=LONG) == data

        self.play(scene)

    def test_a_blob_that_was_handed_out_arrives_like_any_other(self) -> None:
        async def scene() -> None:
            a, b, c = await self.nodes(3)
            few, more = os.urandom(1000), os.urandom(2_000_000)
            for data in (few, more):
                digest = b.add(data)
                if isinstance(b.transport, HandsOut):
                    b.transport.hand_out(data)
                b.transport.broadcast(digest)
                for node in (a, c):
                    await eventually(lambda node=node, digest=digest: digest in node.texts(b), "they hear of it")  # type: ignore[misc]
                    assert await node.transport.fetch(digest, [b.key], max_size=len(data), timeout=LONG) == data

        self.play(scene)

    def test_many_blobs_at_once_in_both_directions(self) -> None:
        async def scene() -> None:
            a, b = await self.nodes(2)
            blobs = [os.urandom(40_000 + i) for i in range(50)]
            fetched = await asyncio.gather(
                *(a.transport.fetch(b.add(data), [b.key], max_size=50_000, timeout=LONG) for data in blobs),
                *(b.transport.fetch(a.add(data), [a.key], max_size=50_000, timeout=LONG) for data in blobs),
            )
            assert fetched == blobs + blobs

        self.play(scene)

    def test_one_provider_that_has_it_serves(self) -> None:
        async def scene() -> None:
            a, b, c, d = await self.nodes(4)
            digest = c.add(b"blob")
            d.add(b"blob")
            gone = Identity.generate().public
            providers = [gone, b.key, c.key, d.key]
            assert await a.transport.fetch(digest, providers, max_size=4, timeout=LONG) == b"blob"
            assert c.asked + d.asked == [digest]
            assert c.served + d.served == [(4, 4)]
            assert not b.served

        self.play(scene)

    def test_nobody_has_it_is_a_prompt_answer_that_names_everyone(self) -> None:
        async def scene() -> None:
            a, b, c = await self.nodes(3)
            with pytest.raises(AbsentError) as caught:
                await a.transport.fetch(sha256(b"?"), [b.key, c.key], max_size=100, timeout=100 * self.limit)
            assert short(b.key) in str(caught.value)
            assert short(c.key) in str(caught.value)
            with pytest.raises(TransportError):
                await a.transport.fetch(sha256(b"?"), [], max_size=100, timeout=LONG)

        self.play(scene)

    def test_progress_is_told_up_to_the_whole(self) -> None:
        async def scene() -> None:
            a, b = await self.nodes(2)
            told: list[tuple[int, int]] = []
            data = os.urandom(1_000_000)
            await a.transport.fetch(
                b.add(data), [b.key], max_size=2_000_000, timeout=LONG, progress=lambda *at: told.append(at)
            )
            assert told[-1] == (1_000_000, 1_000_000)
            assert told == sorted(set(told))
            assert sum(given for _, given in b.served) == 1_000_000
            assert {size for size, _ in b.served} == {1_000_000}

        self.play(scene)

    def test_a_blob_larger_than_expected_is_refused(self) -> None:
        async def scene() -> None:
            a, b = await self.nodes(2)
            digest = b.add(bytes(1_000_000))
            with pytest.raises(TransportError, match=short(b.key)):
                await a.transport.fetch(digest, [b.key], max_size=999_999, timeout=LONG)
            assert await a.transport.fetch(digest, [b.key], max_size=1_000_000, timeout=LONG) == bytes(1_000_000)

        self.play(scene)

    def test_other_bytes_than_asked_for_are_refused_and_the_next_provider_tried(self) -> None:
        async def scene() -> None:
            a, b, c = await self.nodes(3)
            data = os.urandom(200_000)
            digest = c.add(data)
            for wrong in (data[:-1], data + b"x", bytes(200_000), b""):
                b.blobs[digest] = wrong
                with pytest.raises(TransportError, match=short(b.key)):
                    await a.transport.fetch(digest, [b.key], max_size=300_000, timeout=LONG)
                fetched = await a.transport.fetch(digest, [b.key, c.key], max_size=300_000, timeout=LONG)
                assert fetched == data

        self.play(scene)

    def test_a_provider_whose_disk_fails_counts_as_one_without_the_blob(self) -> None:
        async def scene() -> None:
            a, b, c = await self.nodes(3)
            digest = b.add(b"blob")
            c.add(b"blob")
            b.faulty = True
            assert await a.transport.fetch(digest, [b.key, c.key], max_size=4, timeout=LONG) == b"blob"

        self.play(scene)

    def test_a_slow_disk_holds_up_neither_messages_nor_the_next_provider(self) -> None:
        async def scene() -> None:
            a, b, c = await self.nodes(3)
            digest = b.add(b"blob")
            b.gate.clear()
            with pytest.raises(TransportError, match=short(b.key)):
                await a.transport.fetch(digest, [b.key], max_size=4, timeout=0.3)
            await eventually(lambda: b"on" in b.texts(), "messages pass", lambda: a.transport.send(b.key, b"on"))
            c.add(b"blob")
            assert await a.transport.fetch(digest, [b.key, c.key], max_size=4, timeout=4) == b"blob"
            b.gate.set()
            assert await a.transport.fetch(digest, [b.key], max_size=4, timeout=LONG) == b"blob"

        self.play(scene)

    def test_a_cancelled_fetch_leaves_the_link_in_order(self) -> None:
        async def scene() -> None:
            a, b = await self.nodes(2)
            digest = b.add(os.urandom(2_000_000))
            for _ in range(20):
                task = asyncio.ensure_future(a.transport.fetch(digest, [b.key], max_size=2_000_000, timeout=LONG))
                await asyncio.sleep(0.001)
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
            assert sha256(await a.transport.fetch(digest, [b.key], max_size=2_000_000, timeout=LONG)) == digest

        self.play(scene)

    # -- links, start and stop ----------------------------------------------------------------------------------------

    def test_links_tell_who_is_there_and_how_much_went_over(self) -> None:
        async def scene() -> None:
            a, b = await self.nodes(2)
            absent = Identity.generate().public
            a.transport.set_peers({a.key: a.address, b.key: b.address, absent: a.address + "0"})
            await a.transport.fetch(b.add(bytes(100_000)), [b.key], max_size=100_000, timeout=LONG)
            links = {link.peer: link for link in a.transport.links()}
            assert set(links) == {b.key, absent}
            assert links[b.key].connected
            assert not links[b.key].reason
            assert links[b.key].bytes_down >= 100_000
            assert not links[absent].connected
            assert links[absent].reason
            back = {link.peer: link for link in b.transport.links()}
            assert back[a.key].bytes_up >= 100_000
            assert all(link.round_trip is None or link.round_trip >= 0 for link in links.values())

        self.play(scene)

    def test_stop_may_be_called_at_any_time_and_again(self) -> None:
        async def scene() -> None:
            never_started = self.make_transport()
            await never_started.stop()
            a, b, c = await self.nodes(3)
            digest = b.add(b"blob")
            b.gate.clear()
            pending = asyncio.ensure_future(a.transport.fetch(digest, [b.key], max_size=4, timeout=100 * self.limit))
            await eventually(lambda: b.asked, "b is asked")
            await a.transport.stop()
            await a.transport.stop()
            with pytest.raises(TransportError):
                await pending
            with pytest.raises(TransportError):
                await a.transport.fetch(digest, [b.key], max_size=4, timeout=100 * self.limit)
            a.transport.set_peers({b.key: b.address})
            a.transport.broadcast(b"into the void")
            await eventually(lambda: not b.connected(a), "b sees that a is gone")
            await eventually(lambda: b"on" in c.texts(), "the others go on", lambda: b.transport.send(c.key, b"on"))

        self.play(scene)

    def test_a_second_start_is_refused(self) -> None:
        async def scene() -> None:
            a, b = await self.nodes(2)
            with pytest.raises(TransportError):
                await a.start()
            await eventually(lambda: b"on" in b.texts(), "a goes on", lambda: a.transport.send(b.key, b"on"))

        self.play(scene)

    def test_peers_may_be_set_before_the_start(self) -> None:
        async def scene() -> None:
            a = await self.node()
            b = Node(self.make_transport(), Identity.generate())
            self._all.append(b)
            b.transport.set_peers({a.key: a.address, b.key: "nowhere"})
            await b.start()
            a.transport.set_peers({b.key: b.address})
            await self.connected([a, b])
            assert [link.peer for link in b.transport.links()] == [a.key]

        self.play(scene)

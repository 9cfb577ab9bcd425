from __future__ import annotations

import asyncio
import base64
import contextlib
import os
import random
import socket
import ssl
import struct
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from psyche_lightning.errors import TransportError
from psyche_lightning.testing.peers import Node, eventually
from psyche_lightning.transports import mesh
from psyche_lightning.transports.framing import BLOCK_SIZE, LIMITS, MAX_HANDED, Kind, frame, goodbye_text, read_frame
from psyche_lightning.transports.handshake import SERVER_PURPOSE, VERSION, Handshake, HandshakeError
from psyche_lightning.transports.tcp import TcpTransport, _address, _locate
from psyche_lightning.wire.canonical import sha256
from psyche_lightning.wire.identity import Identity, short

Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]
EVERY = frozenset(LIMITS)
WHOLE = struct.pack("!QQ", 0, 1 << 40)


def play(scene: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        await asyncio.wait_for(scene(), 60)
        left = asyncio.all_tasks() - {asyncio.current_task()}
        assert not left

    asyncio.run(main())


@contextlib.asynccontextmanager
async def living(*transports: TcpTransport, identities: list[Identity] | None = None) -> AsyncIterator[list[Node]]:
    """Started nodes that have each other as peers."""
    identities = identities or [Identity.generate() for _ in transports]
    nodes = [Node(transport, identity) for transport, identity in zip(transports, identities, strict=True)]
    try:
        for node in nodes:
            await node.start()
        introduce(nodes)
        yield nodes
    finally:
        for node in nodes:
            await node.transport.stop()


def introduce(nodes: list[Node], *guests: Identity) -> None:
    peers = {node.key: node.address for node in nodes} | {guest.public: "tcp://127.0.0.1:9" for guest in guests}
    for node in nodes:
        node.transport.set_peers(peers)


def link(node: Node, peer: bytes) -> tuple[bool, str]:
    (found,) = [link for link in node.transport.links() if link.peer == peer]
    return found.connected, found.reason


@contextlib.asynccontextmanager
async def plain(node: Node) -> AsyncIterator[Stream]:
    """A connection to the node's port without TLS."""
    reader, writer = await asyncio.open_connection(*_locate(node.address))
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


@contextlib.asynccontextmanager
async def encrypted(node: Node, handshake: Handshake) -> AsyncIterator[Stream]:
    """A TLS connection to the node's port, before anything is proven."""
    host, port = _locate(node.address)
    reader, writer = await asyncio.open_connection(host, port, ssl=handshake.client_context, server_hostname="")
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


@contextlib.asynccontextmanager
async def admitted(node: Node, guest: Identity) -> AsyncIterator[Stream]:
    """A connection of a peer that is played by the test."""
    handshake = Handshake(guest, node.run_id)
    async with encrypted(node, handshake) as (reader, writer):
        await handshake.meet(reader, writer, node.key)
        yield reader, writer


async def farewell(reader: asyncio.StreamReader) -> str:
    """The reason in the GOODBYE that comes, whatever comes before it."""
    while True:
        kind, body = await read_frame(reader, EVERY)
        if kind == Kind.GOODBYE:
            return goodbye_text(body)


async def ended(reader: asyncio.StreamReader) -> None:
    """Read until the other side has closed."""
    with contextlib.suppress(OSError):
        while await reader.read(65536):
            pass


# -- who is who -------------------------------------------------------------------------------------------------------


def test_a_stranger_proves_itself_and_is_refused() -> None:
    async def scene() -> None:
        async with living(TcpTransport()) as (node,):
            with pytest.raises(HandshakeError, match="you are not a peer"):
                async with admitted(node, Identity.generate()):
                    pass

    play(scene)


def test_a_proof_cannot_be_replayed() -> None:
    async def scene() -> None:
        guest = Identity.generate()
        handshake = Handshake(guest, "run")
        async with living(TcpTransport()) as (node,):
            introduce([node], guest)
            sent: list[bytes] = []
            async with encrypted(node, handshake) as (reader, writer):
                write = writer.write

                def tap(data: bytes) -> None:
                    sent.append(data)
                    write(data)

                writer.write = tap  # type: ignore[method-assign,assignment]
                await handshake.meet(reader, writer, node.key)
            (proof,) = sent
            async with encrypted(node, handshake) as (reader, writer):
                await read_frame(reader, {Kind.HELLO})
                writer.write(proof)
                assert await farewell(reader) == "wrong proof of identity, or another run"

    play(scene)


def test_a_proof_for_one_node_is_useless_at_another() -> None:
    """A dials M, a peer; M is at the same time a client of B and passes B's challenge to A, and A's proof to B."""

    async def scene() -> None:
        guest, middle = Identity.generate(), Identity.generate()
        relay = Handshake(middle, "run")
        verdict: asyncio.Future[str] = asyncio.get_running_loop().create_future()

        async with living(TcpTransport()) as (victim,):
            introduce([victim], guest, middle)

            async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                async with encrypted(victim, relay) as (onward_reader, onward_writer):
                    _, hello = await read_frame(onward_reader, {Kind.HELLO})
                    signature = middle.sign(SERVER_PURPOSE, "run", relay._binding)
                    writer.write(frame(Kind.HELLO, bytes([VERSION]), middle.public, hello[33:65], signature))
                    _, proof = await read_frame(reader, {Kind.PROOF})
                    assert proof[:32] == guest.public
                    onward_writer.write(frame(Kind.PROOF, proof))
                    verdict.set_result(await farewell(onward_reader))
                writer.transport.abort()

            server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=relay.server_context)
            dialler = Node(TcpTransport(), guest)
            await dialler.start()
            address = "tcp://{}:{}".format(*server.sockets[0].getsockname())
            dialler.transport.set_peers({middle.public: address})
            assert await verdict == "wrong proof of identity, or another run"
            await dialler.transport.stop()
            server.close()
            await server.wait_closed()

    play(scene)


def test_a_man_in_the_middle_cannot_pass_on_a_servers_hello() -> None:
    """A dials the address of B; M answers with its own certificate and B's HELLO."""

    async def scene() -> None:
        relay = Handshake(Identity.generate(), "run")
        stolen: list[bytes] = []
        async with living(TcpTransport()) as (target,):

            async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                async with encrypted(target, relay) as (onward_reader, _):
                    _, hello = await read_frame(onward_reader, {Kind.HELLO})
                    writer.write(frame(Kind.HELLO, hello))
                    with contextlib.suppress(OSError):
                        stolen.append(await reader.read())
                writer.transport.abort()

            server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=relay.server_context)
            dialler = Node(TcpTransport(), Identity.generate())
            await dialler.start()
            dialler.transport.set_peers({target.key: "tcp://{}:{}".format(*server.sockets[0].getsockname())})
            dialler.transport.send(target.key, b"confidential")
            await eventually(lambda: "does not prove the peer's key" in link(dialler, target.key)[1], "a refusal")
            await eventually(lambda: stolen, "the relay sees the end")
            assert stolen[0] == b""
            await dialler.transport.stop()
            server.close()
            await server.wait_closed()

    play(scene)


def test_another_node_at_an_address_is_named() -> None:
    async def scene() -> None:
        expected = Identity.generate().public
        async with living(TcpTransport(), TcpTransport()) as (a, b):
            a.transport.set_peers({expected: b.address})
            await eventually(lambda: "another node answers at this address" in link(a, expected)[1], "a reason")

    play(scene)


def test_the_secret_never_touches_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    secret = os.urandom(32)
    written: list[bytes] = []
    load = ssl.SSLContext.load_cert_chain

    def look(context: ssl.SSLContext, path: Path) -> None:
        assert path.parent.parent == tmp_path
        assert (path.stat().st_mode & 0o777, path.parent.stat().st_mode & 0o777) == (0o600, 0o700)
        written.append(path.read_bytes())
        load(context, path)

    monkeypatch.setattr(ssl.SSLContext, "load_cert_chain", look)
    Handshake(Identity(secret), "run")
    (pem,) = written
    key = base64.b64decode(pem.split(b"-----")[2])
    assert len(key) == 48  # a PKCS #8 wrapping of another 32 bytes
    assert secret not in key
    assert not list(tmp_path.iterdir())


# -- hostile bytes ----------------------------------------------------------------------------------------------------


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0


def test_garbage_at_the_port_leaves_nothing_behind_and_peers_get_through() -> None:
    async def scene() -> None:
        rng = random.Random(5)
        async with living(TcpTransport(handshake_timeout=5), TcpTransport()) as (a, b):
            await eventually(lambda: a.connected(b) and b.connected(a), "they are connected")
            tasks, files = len(asyncio.all_tasks()), descriptors()

            async def annoy() -> None:
                async with plain(a) as (reader, writer):
                    head = rng.choice([b"", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"GET / HTTP/1.1\r\n"])
                    writer.write(head + rng.randbytes(rng.choice([1, 40, 5000])))
                    if rng.random() < 0.5:
                        writer.write_eof()
                        await ended(reader)

            for _ in range(10):
                await asyncio.gather(*(annoy() for _ in range(15)))
            assert a.connected(b)
            b.transport.send(a.key, b"still here")
            await eventually(lambda: a.texts(b), "the link lives")
            c = Node(TcpTransport(), Identity.generate())
            await c.start()
            introduce([a, b, c])
            await eventually(lambda: a.connected(c), "a newcomer gets through")
            await c.transport.stop()
            introduce([a, b])
            await eventually(
                lambda: len(asyncio.all_tasks()) <= tasks + 1 and descriptors() <= files, "tasks and sockets are gone"
            )

    play(scene)


frames = st.one_of(
    st.binary(max_size=300),
    st.builds(
        lambda kind, body: struct.pack("!IB", len(body), kind) + body, st.integers(0, 13), st.binary(max_size=200)
    ),
    st.builds(
        lambda kind, number, rest: struct.pack("!IBI", 4 + len(rest), kind, number) + rest,
        st.sampled_from([Kind.WANT, Kind.FOUND, Kind.BLOCK, Kind.ABSENT, Kind.ENOUGH, Kind.GOSSIP, Kind.BLOB]),
        st.integers(0, 3),
        st.binary(max_size=40),
    ),
    st.builds(lambda number: frame(Kind.WANT, struct.pack("!I", number), bytes(32), WHOLE), st.integers(0, 2**32 - 1)),
    st.builds(lambda length, kind: struct.pack("!IB", length, kind), st.integers(0, 2**32 - 1), st.integers(0, 255)),
)


def test_a_small_blob_that_was_handed_out_need_not_be_asked_for() -> None:
    async def scene() -> None:
        async with living(TcpTransport(), TcpTransport(), TcpTransport()) as (a, b, c):
            for node in (b, c):
                await eventually(lambda node=node: a.connected(node) and node.connected(a), "they are linked")  # type: ignore[misc]
            small, large = os.urandom(MAX_HANDED), os.urandom(MAX_HANDED + 1)
            for data in (small, large):
                digest = a.add(data)
                a.transport.hand_out(data)
                a.transport.broadcast(digest)
                await eventually(lambda digest=digest: digest in b.texts(), "b hears of it")  # type: ignore[misc]
                assert await b.transport.fetch(digest, [a.key], max_size=len(data), timeout=60) == data
            assert a.asked == [sha256(large)]
            with pytest.raises(TransportError, match="more than the 100 expected"):  # it asks then
                await b.transport.fetch(sha256(small), [a.key], max_size=100, timeout=60)
            with pytest.raises(TransportError, match="does not have it"):  # others did not hand it out
                await b.transport.fetch(sha256(small), [c.key], max_size=len(small), timeout=60)

    play(scene)


def test_blobs_that_nobody_asked_for_take_bounded_memory_and_displace_only_their_sender_s() -> None:
    async def scene() -> None:
        guest = Identity.generate()
        async with living(TcpTransport(), TcpTransport()) as (a, b):
            introduce([a, b], guest)
            await eventually(lambda: a.connected(b) and b.connected(a), "they are linked")
            a.transport.hand_out(b"honest")
            a.transport.broadcast(b"sent")
            await eventually(lambda: b"sent" in b.texts(), "b hears of it")
            async with admitted(b, guest) as (reader, writer):
                for number in range(200):
                    writer.write(frame(Kind.BLOB, b"%d" % number))
                writer.write(frame(Kind.PING))
                while (await read_frame(reader, EVERY))[0] != Kind.PONG:
                    pass
            kept = {key: [blob for _, blob in peer.handed] for key, peer in b.transport._peers.items()}  # type: ignore[attr-defined]
            assert kept == {a.key: [b"honest"], guest.public: [b"198", b"199"]}

    play(scene)


def test_a_blob_is_not_handed_out_to_many() -> None:
    async def scene() -> None:
        async with living(*(TcpTransport() for _ in range(4))) as (a, b, *others):
            for node in (b, *others):
                await eventually(lambda node=node: a.connected(node) and node.connected(a), "they are linked")  # type: ignore[misc]
            data = os.urandom(MAX_HANDED)
            digest = a.add(data)
            with pytest.MonkeyPatch.context() as patched:
                patched.setattr(mesh, "MAX_HANDED_OUT", 3 * MAX_HANDED - 1)
                a.transport.hand_out(data)
            assert a.served == []
            a.transport.hand_out(data)
            assert a.served == 3 * [(MAX_HANDED, MAX_HANDED)]
            assert await b.transport.fetch(digest, [a.key], max_size=MAX_HANDED, timeout=60) == data

    play(scene)


@pytest.mark.parametrize("proven", [False, True])
@settings(max_examples=25, suppress_health_check=list(HealthCheck))
@given(chunks=st.lists(frames, max_size=6))
def test_hostile_frames_inside_the_encryption_do_no_harm(proven: bool, chunks: list[bytes]) -> None:
    async def scene() -> None:
        guest = Identity.generate()
        async with living(TcpTransport()) as (node,):
            introduce([node], guest)
            node.blobs[bytes(32)] = b"some blob"
            opened = admitted(node, guest) if proven else encrypted(node, Handshake(guest, "run"))
            async with opened as (reader, writer):
                for chunk in chunks:
                    writer.write(chunk)
                writer.write_eof() if writer.can_write_eof() else writer.close()
                with contextlib.suppress(OSError):
                    await reader.read(1000)
            async with admitted(node, guest) as (reader, writer):
                writer.write(frame(Kind.MESSAGE, b"honest") + frame(Kind.PING))
                assert (await read_frame(reader, EVERY))[0] == Kind.PONG
            assert b"honest" in node.texts()

    play(scene)


def test_what_breaks_the_protocol_is_answered_with_the_reason() -> None:
    number = struct.pack("!I", 1)
    want = frame(Kind.WANT, number, bytes(32), WHOLE)
    cases = [
        (struct.pack("!IB", 2**32 - 1, Kind.MESSAGE), "a MESSAGE frame of 4294967295 bytes"),
        (struct.pack("!IB", 5 + BLOCK_SIZE, Kind.BLOCK), "a BLOCK frame of"),
        (struct.pack("!IB", 1, Kind.PING), "a PING frame of 1 bytes"),
        (struct.pack("!IB", 0, Kind.WELCOME), "kind 2 is not allowed"),
        (struct.pack("!IB", 0, 77), "kind 77 is not allowed"),
        (want + want, "request 1 after request 1"),
        (frame(Kind.ABSENT, number), "request 1, which this node never made"),
        (frame(Kind.BLOCK, number, b"x"), "request 1, which this node never made"),
    ]

    async def scene() -> None:
        guest = Identity.generate()
        async with living(TcpTransport()) as (node,):
            introduce([node], guest)
            for data, reason in cases:
                async with admitted(node, guest) as (reader, writer):
                    writer.write(data)
                    assert reason in await farewell(reader)
                    await eventually(lambda reason=reason: reason in link(node, guest.public)[1], "the link says why")  # type: ignore[misc]

    play(scene)


def test_a_provider_that_lies_about_sizes_is_cut_off_and_the_next_one_asked() -> None:
    async def scene() -> None:
        guest = Identity.generate()
        async with living(TcpTransport(), TcpTransport()) as (a, b):
            introduce([a, b], guest)
            await eventually(lambda: a.connected(b), "they are connected")
            digest = b.add(bytes(100))
            lies: list[Callable[[bytes], bytes]] = [
                lambda n: frame(Kind.FOUND, n, struct.pack("!Q", 100)) + frame(Kind.BLOCK, n, bytes(101)),
                lambda n: frame(Kind.FOUND, n, struct.pack("!Q", 100)) * 2,
                lambda n: frame(Kind.BLOCK, n, bytes(100)),
            ]
            for lie in lies:
                async with admitted(a, guest) as (reader, writer):
                    fetch = asyncio.ensure_future(
                        a.transport.fetch(digest, [guest.public, b.key], max_size=100, timeout=50)
                    )
                    _, body = await read_frame(reader, {Kind.WANT})
                    writer.write(lie(body[:4]))
                    assert "it broke the protocol: it" in await farewell(reader)
                    assert await fetch == bytes(100)

    play(scene)


def test_a_huge_announcement_is_refused_before_anything_is_sent() -> None:
    async def scene() -> None:
        guest = Identity.generate()
        async with living(TcpTransport()) as (node,):
            introduce([node], guest)
            async with admitted(node, guest) as (reader, writer):
                await eventually(lambda: link(node, guest.public)[0], "a link")
                fetch = asyncio.ensure_future(
                    node.transport.fetch(bytes(32), [guest.public], max_size=1000, timeout=50)
                )
                _, body = await read_frame(reader, {Kind.WANT})
                writer.write(frame(Kind.FOUND, body[:4], struct.pack("!Q", 1 << 50)))
                with pytest.raises(TransportError, match="more than the 1000 expected"):
                    await fetch
                assert (await read_frame(reader, {Kind.ENOUGH}))[1] == body[:4] + bytes(8)

    play(scene)


# -- those who stall --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["nothing", "half a TLS hello", "no proof", "a proof byte by byte"])
def test_a_connection_that_does_not_prove_itself_in_time_is_closed(stage: str) -> None:
    async def scene() -> None:
        async with living(TcpTransport(handshake_timeout=0.5)) as (node,):
            if stage in ("nothing", "half a TLS hello"):
                async with plain(node) as (reader, writer):
                    writer.write(b"\x16\x03\x01\x02\x00\x01" if stage != "nothing" else b"")
                    await ended(reader)
            else:
                async with encrypted(node, Handshake(Identity.generate(), "run")) as (reader, writer):
                    closed = asyncio.ensure_future(ended(reader))
                    for byte in frame(Kind.PROOF, bytes(96)) if stage != "no proof" else b"":
                        if closed.done():
                            break
                        writer.write(bytes([byte]))
                        await asyncio.wait([closed], timeout=0.1)
                    else:
                        assert stage == "no proof", "it was given all the time in the world"
                    await closed
            await eventually(lambda: not node.transport._arriving, "it is forgotten")  # type: ignore[attr-defined]

    play(scene)


def test_a_crowd_of_idle_connections_does_not_keep_peers_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mesh, "MAX_ARRIVING", 10)

    async def scene() -> None:
        guest = Identity.generate()
        async with living(TcpTransport(handshake_timeout=600)) as (node,), contextlib.AsyncExitStack() as stack:
            introduce([node], guest)
            for _ in range(25):
                await stack.enter_async_context(plain(node))
            async with admitted(node, guest):
                pass
            assert len(node.transport._arriving) <= 10  # type: ignore[attr-defined]

    play(scene)


def test_a_peer_that_falls_silent_is_disconnected_with_the_reason() -> None:
    async def scene() -> None:
        guest = Identity.generate()
        async with living(TcpTransport(ping_interval=0.1, silence=0.5)) as (node,):
            introduce([node], guest)
            async with admitted(node, guest) as (reader, _):
                assert await farewell(reader) == "silent for 0.5 s"
            await eventually(lambda: "silent for 0.5 s" in link(node, guest.public)[1], "the link says why")
            assert not link(node, guest.public)[0]

    play(scene)


def test_a_peer_that_talks_but_never_reads_is_disconnected() -> None:
    async def scene() -> None:
        guest = Identity.generate()
        async with living(TcpTransport(ping_interval=0.1, silence=0.5)) as (node,):
            introduce([node], guest)
            digest = node.add(bytes(50_000_000))
            async with admitted(node, guest) as (reader, writer):
                reader._transport.pause_reading()  # type: ignore[attr-defined]
                writer.write(frame(Kind.WANT, struct.pack("!I", 1), digest, WHOLE))
                await eventually(
                    lambda: "took no bytes" in link(node, guest.public)[1],
                    "it is disconnected",
                    lambda: writer.is_closing() or writer.write(frame(Kind.MESSAGE, b"I am alive")),  # type: ignore[func-returns-value]
                )

    play(scene)


def test_requests_without_reading_the_answers_are_bounded() -> None:
    async def scene() -> None:
        guest = Identity.generate()
        async with living(TcpTransport()) as (node,):
            introduce([node], guest)
            node.gate.clear()
            async with admitted(node, guest) as (reader, writer):
                for number in range(1, 200):
                    writer.write(frame(Kind.WANT, struct.pack("!I", number), bytes(32), WHOLE))
                assert "asks for more without reading" in await farewell(reader)
            node.gate.set()

    play(scene)


def test_a_long_sleep_of_the_process_is_not_taken_for_silence() -> None:
    async def scene() -> None:
        transports = [TcpTransport(ping_interval=0.1, silence=0.6) for _ in range(2)]
        async with living(*transports) as (a, b):
            await eventually(lambda: a.connected(b) and b.connected(a), "they are connected")
            await asyncio.sleep(0.3)
            before = transports[0]._peers[b.key].connection
            time.sleep(1.5)
            await asyncio.sleep(0.5)
            assert transports[0]._peers[b.key].connection is before

    play(scene)


# -- links ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reachable", [0, 1])
def test_one_reachable_node_of_two_is_enough(reachable: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mesh, "GRACE", 0.2)

    async def scene() -> None:
        identities = sorted([Identity.generate(), Identity.generate()], key=lambda identity: identity.public)
        transports = [TcpTransport(advertise=None if i == reachable else "127.0.0.1:9") for i in range(2)]
        async with living(*transports, identities=identities) as (a, b):
            await eventually(lambda: a.connected(b) and b.connected(a), "they are connected")
            await eventually(lambda: a.texts(b) and b.texts(a), "both hear", lambda: _hello(a, b))

    play(scene)


def _hello(*nodes: Node) -> None:
    for node in nodes:
        node.transport.broadcast(b"hello")


def test_two_connections_made_at_the_same_time_do_not_end_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mesh, "GRACE", 0.0)  # both dial at once, again and again

    async def scene() -> None:
        for _ in range(5):
            async with living(TcpTransport(), TcpTransport(), TcpTransport()) as nodes:
                for a in nodes:
                    for b in nodes:
                        if a is not b:
                            await eventually(lambda a=a, b=b: a.connected(b), "all are connected")  # type: ignore[misc]

    play(scene)


def test_a_young_connection_of_the_smaller_key_stays_and_an_old_one_is_replaced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scene() -> None:
        smaller, larger = sorted([Identity.generate(), Identity.generate()], key=lambda identity: identity.public)
        transports = TcpTransport(), TcpTransport()
        async with living(*transports, identities=[smaller, larger]) as (a, b):
            await eventually(lambda: a.connected(b), "they are connected")
            with pytest.raises(HandshakeError, match="at the same time"):
                async with admitted(a, larger):
                    pass
            monkeypatch.setattr(mesh, "GRACE", 0.0)
            async with admitted(a, larger) as (_, writer):
                writer.write(frame(Kind.MESSAGE, b"from the new one"))
                await eventually(lambda: a.texts(), "the new connection serves")
                await eventually(lambda: "replaced it" in transports[1]._peers[a.key].lost, "the old one ends")

    play(scene)


def test_a_message_overtakes_a_blob() -> None:
    async def scene() -> None:
        guest = Identity.generate()
        async with living(TcpTransport()) as (node,):
            introduce([node], guest)
            digest = node.add(os.urandom(400 * BLOCK_SIZE))
            async with admitted(node, guest) as (reader, writer):
                writer.write(frame(Kind.WANT, struct.pack("!I", 1), digest, WHOLE))
                order: list[int] = []
                while order.count(Kind.BLOCK) < 400:
                    order.append((await read_frame(reader, EVERY))[0])
                    if order.count(Kind.BLOCK) == 1:
                        node.transport.send(guest.public, b"urgent")
                assert Kind.MESSAGE in order[:200]

    play(scene)


def test_every_byte_is_counted_and_messages_cost_little() -> None:
    async def scene() -> None:
        transports = TcpTransport(), TcpTransport()
        async with living(*transports) as (a, b):
            await eventually(lambda: a.connected(b) and b.connected(a), "they are connected")
            up, down = transports[0].meter.up, transports[1].meter.down
            for _ in range(10):
                seen = len(b.messages)
                a.transport.send(b.key, bytes(300))
                await eventually(lambda seen=seen: len(b.messages) > seen, "it arrives")  # type: ignore[misc]
            assert transports[0].meter.up - up == transports[1].meter.down - down <= 10 * (300 + 32)
            await a.transport.fetch(b.add(bytes(1_000_000)), [b.key], max_size=1_000_000, timeout=50)
            (there,), (back,) = a.transport.links(), b.transport.links()
            assert (there.bytes_up, there.bytes_down) == (back.bytes_down, back.bytes_up)
            for (one,), transport in zip(((there,), (back,)), transports, strict=True):
                assert (one.bytes_up, one.bytes_down) == (transport.meter.up, transport.meter.down)
            assert 1_000_000 < there.bytes_down < 1_010_000

    play(scene)


def test_a_ping_measures_the_round_trip() -> None:
    async def scene() -> None:
        async with living(TcpTransport(ping_interval=0.1), TcpTransport()) as (a, _):
            await eventually(lambda: a.transport.links()[0].round_trip is not None, "it is measured")

    play(scene)


# -- addresses and start ----------------------------------------------------------------------------------------------


def test_start_says_what_is_wrong() -> None:
    async def scene() -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            for transport, text in (
                (TcpTransport(port=port), f"cannot listen on 127.0.0.1:{port}: .*Choose a free port"),
                (TcpTransport(host="192.0.2.1"), "an address of this machine"),
                (TcpTransport(host="0.0.0.0"), "give advertise"),
                (TcpTransport(advertise="no good/at all"), "not an address of the tcp transport"),
            ):
                with pytest.raises(TransportError, match=text):
                    await Node(transport, Identity.generate()).start()
                await transport.stop()

    play(scene)


def test_addresses_are_written_and_read() -> None:
    assert _locate(_address("10.0.0.7", 4000)) == ("10.0.0.7", 4000)
    assert _locate(_address("home.example:5000", 4000)) == ("home.example", 5000)
    assert _locate(_address("::1", 4000)) == ("::1", 4000)
    assert _locate(_address("[fe80::1]:5000", 4000)) == ("fe80::1", 5000)
    for wrong in (
        "",
        "tcp://",
        "tcp://host",
        "udp://host:1",
        "tcp://host:99999",
        "tcp://[::1",
        "tcp://a@host:1",
        "x" * 999,
    ):
        with pytest.raises(TransportError, match="is not an address"):
            _locate(wrong)


def test_an_invalid_address_is_reported_and_breaks_nothing() -> None:
    async def scene() -> None:
        strange = Identity.generate().public
        async with living(TcpTransport(), TcpTransport()) as (a, b):
            a.transport.set_peers({b.key: b.address, strange: "carrier pigeon"})
            await eventually(lambda: "is not an address" in link(a, strange)[1], "the link says why")
            await eventually(lambda: a.connected(b), "the others are connected")

    play(scene)


def test_a_peer_is_told_lost_and_found_and_one_that_refuses_is_not_away(caplog: pytest.LogCaptureFixture) -> None:
    """Until an epoch begins, who is a peer of whom differs from node to node."""

    def told() -> list[str]:
        return [record.getMessage() for record in caplog.records if record.levelname != "DEBUG"]

    async def scene() -> None:
        async with living(TcpTransport(), TcpTransport()) as (a, b):
            await eventually(lambda: a.transport.links()[0].connected, "they are connected")
            assert told() == []
            a.transport.set_peers({})
            b.transport.set_peers({})
            a.transport.set_peers({b.key: b.address})
            a.transport._peers[b.key].outage._allowance = 0.0  # type: ignore[attr-defined] # not to wait for it
            await eventually(lambda: a.transport.links()[0].answered is not None, "b refuses a")
            assert told() == []
            introduce([a, b])
            await eventually(lambda: a.transport.links()[0].connected, "they are connected again")
            await b.transport.stop()
            await eventually(lambda: not a.transport.links()[0].connected, "b is gone")
            lost = f"lost peer {short(b.key)}: it said goodbye: this node stopped; trying again"
            assert [text for text in told() if text.startswith("lost")][-1] == lost
            assert not any("cannot reach" in text for text in told())

    caplog.set_level("DEBUG", "psyche_lightning")
    play(scene)

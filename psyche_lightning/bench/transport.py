"""TransportSpeed of the transports between two processes of this machine, over loopback."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from psyche_lightning.errors import PsycheError, TransportError
from psyche_lightning.plugins import load_plugins
from psyche_lightning.transports.base import Transport, TransportContext
from psyche_lightning.wire.canonical import sha256
from psyche_lightning.wire.identity import Identity

RUN = "bench"
START_SECONDS = 30.0
FETCH_SECONDS = 300.0
MESSAGES = 200
_CHUNK = 1 << 20


@dataclass(frozen=True)
class TransportSpeed:
    """TransportSpeed of one transport.

    Attributes:
        name: its name in recipes.
        best: bytes a second of the fastest blob.
        median: median of all blobs, bytes a second.
        round_trip: median seconds until a message was answered; None if there are no messages.
        overhead: bytes at the sockets for each byte of a blob; None if they are not counted.
    """

    name: str
    best: float
    median: float
    round_trip: float | None = None
    overhead: float | None = None


def measure(name: str, options: Mapping[str, Any], size: int, repeats: int) -> TransportSpeed:
    """Fetch blobs of ``size`` bytes from another process.

    Args:
        name: a registered transport.
        options: options of its factory on both sides.
        size: bytes of a blob.
        repeats: number of blobs, after a first one that does not count.

    Raises:
        PsycheError: the transport does not exist or does not work.
    """
    transport = load_plugins().transports()[name](options)
    with _other([name, json.dumps(dict(options)), str(size), str(repeats + 1)]) as child:
        return asyncio.run(_fetch_all(name, transport, child, size))


def sockets(size: int, repeats: int) -> TransportSpeed:
    """Send the same bytes over a plain TCP socket without encryption, which shows what the machine can do.

    Args:
        size: bytes of a blob.
        repeats: number of blobs, after a first one that does not count.
    """
    times = []
    with _other(["", "{}", str(size), str(repeats + 1)]) as child:
        port = _line(child)["port"]
        with socket.create_connection(("127.0.0.1", port)) as sock:
            buffer = bytearray(size)
            for _ in range(repeats + 1):
                begun = time.perf_counter()
                sock.sendall(b"?")
                view = memoryview(buffer)
                while view:
                    got = sock.recv_into(view, min(len(view), _CHUNK))
                    if not got:
                        raise PsycheError("the other process closed its socket")
                    view = view[got:]
                times.append(time.perf_counter() - begun)
    return TransportSpeed("plain sockets", size / min(times[1:]), size / statistics.median(times[1:]))


async def _fetch_all(name: str, transport: Transport, child: subprocess.Popen[str], size: int) -> TransportSpeed:
    answered = asyncio.Event()
    identity = Identity.generate()
    context = TransportContext(identity, RUN, lambda peer, message: answered.set(), lambda digest: None)
    try:
        address = await transport.start(context)
        other = _line(child)
        key = bytes.fromhex(other["key"])
        _tell(child, {"key": identity.public.hex(), "address": address})
        transport.set_peers({key: other["address"]})
        deadline = time.monotonic() + START_SECONDS
        while not any(link.connected for link in transport.links()):
            if time.monotonic() > deadline:
                raise TransportError(f"no connection within {START_SECONDS:g} s: {transport.links()[0].reason}")
            await asyncio.sleep(0.02)
        times = []
        before = sum(link.bytes_down for link in transport.links())
        for digest in other["blobs"]:
            begun = time.perf_counter()
            await transport.fetch(bytes.fromhex(digest), [key], max_size=size, timeout=FETCH_SECONDS)
            times.append(time.perf_counter() - begun)
        received = sum(link.bytes_down for link in transport.links()) - before
        trips = []
        for number in range(MESSAGES):
            answered.clear()
            begun = time.perf_counter()
            transport.send(key, b"%d" % number)
            await asyncio.wait_for(answered.wait(), START_SECONDS)
            trips.append(time.perf_counter() - begun)
    finally:
        await transport.stop()
    return TransportSpeed(
        name,
        best=size / min(times[1:]),
        median=size / statistics.median(times[1:]),
        round_trip=statistics.median(trips),
        overhead=received / (size * len(times)) if received else None,
    )


@contextmanager
def _other(arguments: list[str]) -> Iterator[subprocess.Popen[str]]:
    """The process that has the blobs; it ends with the block."""
    child = subprocess.Popen(
        [sys.executable, "-m", "psyche_lightning.bench.transport", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield child
    finally:
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.close()
        try:
            child.wait(5)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
        child.stdout.close()


def _line(child: subprocess.Popen[str]) -> dict[str, Any]:
    assert child.stdout is not None
    text = child.stdout.readline()
    if not text:
        raise PsycheError("the other process of the measurement ended; its error is above")
    told: dict[str, Any] = json.loads(text)
    return told


def _tell(child: subprocess.Popen[str], what: Mapping[str, Any]) -> None:
    assert child.stdin is not None
    child.stdin.write(json.dumps(what) + "\n")
    child.stdin.flush()


# -- the other process ------------------------------------------------------------------------------------------------


def _say(what: Mapping[str, Any]) -> None:
    print(json.dumps(what), flush=True)


async def _serve(name: str, options: Mapping[str, Any], size: int, count: int) -> None:
    blobs = {sha256(data): data for data in (os.urandom(size) for _ in range(count))}
    identity = Identity.generate()
    transport = load_plugins().transports()[name](options)

    def answer(peer: bytes, message: bytes) -> None:
        transport.send(peer, message)

    address = await transport.start(TransportContext(identity, RUN, answer, blobs.get))
    _say({"key": identity.public.hex(), "address": address, "blobs": [digest.hex() for digest in blobs]})
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()

    def listen() -> None:
        for line in sys.stdin:
            peer = json.loads(line)
            loop.call_soon_threadsafe(transport.set_peers, {bytes.fromhex(peer["key"]): peer["address"]})
        loop.call_soon_threadsafe(ended.set)

    threading.Thread(target=listen, daemon=True).start()
    await ended.wait()
    await transport.stop()


def _serve_plain(size: int, count: int) -> None:
    data = os.urandom(size)
    with socket.create_server(("127.0.0.1", 0)) as server:
        _say({"port": server.getsockname()[1]})
        connection, _ = server.accept()
        with connection:
            for _ in range(count):
                if not connection.recv(1):
                    return
                connection.sendall(data)


if __name__ == "__main__":
    wanted, given, blob_size, blob_count = sys.argv[1:]
    if wanted:
        asyncio.run(_serve(wanted, json.loads(given), int(blob_size), int(blob_count)))
    else:
        _serve_plain(int(blob_size), int(blob_count))

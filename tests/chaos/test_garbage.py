"""Garbage at a running node: from strangers at its port, and from a member of the run. Real processes and sockets."""

from __future__ import annotations

import asyncio
import contextlib
import random
import ssl
import struct
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from support.fleet import Fleet, usage

from psyche_lightning.transports.framing import Kind
from psyche_lightning.transports.handshake import Handshake
from psyche_lightning.wire.identity import Identity, short

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ODD = Path(__file__).with_name("odd_node.py")
SETTINGS = [
    "init_min_clients=3",
    "min_clients=2",
    "global_batch_size_start=6",
    "global_batch_size_end=6",
    "max_round_train_time=30",
]
CROWD = 400
ROOM = 320 << 20
"""Bytes: twice what the 256 connections take that may be in their handshake; the crowd is larger."""


def address(found: dict[str, Any], key: str) -> tuple[str, int]:
    [node] = [node for node in found["clients"] if node["key"] == key]
    parts = urlsplit(node["address"])
    assert parts.hostname
    assert parts.port
    return parts.hostname, parts.port


async def spoil(host: str, port: int, rng: random.Random) -> None:
    """All kinds of garbage from strangers, at once, for as long as each lasts."""

    async def send(data: bytes, *, drip: float = 0.0, linger: float = 3.0) -> None:
        with contextlib.suppress(OSError):
            _, writer = await asyncio.open_connection(host, port)
            for piece in [data[i : i + 1] for i in range(len(data))] if drip else [data]:
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(drip)
            await asyncio.sleep(linger)
            writer.transport.abort()

    async def encrypted(data: bytes) -> None:
        handshake = Handshake(Identity.generate(), "another run")
        with contextlib.suppress(OSError, ssl.SSLError, asyncio.TimeoutError):
            opening = asyncio.open_connection(host, port, ssl=handshake.client_context, server_hostname="")
            reader, writer = await asyncio.wait_for(opening, 20)
            writer.write(data)
            await asyncio.wait_for(reader.read(), 20)
            writer.transport.abort()

    async def foreign() -> None:
        """An honest node of another run."""
        handshake = Handshake(Identity.generate(), "another run")
        with contextlib.suppress(Exception):
            opening = asyncio.open_connection(host, port, ssl=handshake.client_context, server_hostname="")
            reader, writer = await asyncio.wait_for(opening, 20)
            await asyncio.wait_for(handshake.meet(reader, writer, bytes(32)), 20)

    hello = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"
    await asyncio.gather(
        *(send(rng.randbytes(rng.choice([1, 100, 70_000]))) for _ in range(40)),
        *(send(hello + rng.randbytes(60)) for _ in range(10)),  # half a message
        *(send(hello + rng.randbytes(10), drip=0.4) for _ in range(10)),
        *(encrypted(struct.pack("!IB", 0xFFFFFFFF, Kind.PROOF)) for _ in range(10)),  # a huge length
        *(encrypted(struct.pack("!IB", 128, Kind.PROOF) + bytes(60)) for _ in range(10)),
        *(foreign() for _ in range(5)),
        *(send(b"", linger=6.0) for _ in range(CROWD)),  # too many connections
    )


def test_garbage_at_the_port_of_a_running_node_is_named_and_harms_nobody(tmp_path: Path) -> None:
    with Fleet(tmp_path, [*SETTINGS, "total_steps=1000000"]) as fleet:
        target = fleet.start()
        for _ in range(2):
            fleet.start()
        found = fleet.until(lambda found: found["step"] > 10, "the first rounds")
        pid, other = fleet.nodes[target].process.pid, fleet.nodes[1].process.pid
        files = usage(pid)[1]
        asyncio.run(spoil(*address(found, short(fleet.key(target))), random.Random(1)))
        after = fleet.status()
        assert usage(pid)[0] < usage(other)[0] + ROOM, "a process in its first rounds grows anyway"
        fleet.until(lambda found: usage(pid)[1] <= files + 8, "the connections to be gone")
        fleet.until(lambda found: found["step"] > after["step"] + 10, "more rounds")
        digests = fleet.conclude()
        ledger = fleet.ledger()
        log = fleet.log(target)
    assert after["step"] > found["step"], "rounds went on meanwhile"
    assert [event for event in after["events"] if event["kind"] == "dropped"] == []
    assert len(digests) == 3
    assert len(set(digests.values())) == 1
    assert not ledger.problems
    assert "127.0.0.1: " in log, "who did it is named"


def test_a_member_that_speaks_garbage_is_named_and_the_others_go_on(tmp_path: Path) -> None:
    with Fleet(tmp_path, [*SETTINGS, "total_steps=20"]) as fleet:
        rude = fleet.start(program=[str(ODD), "rude", "1"])
        for _ in range(2):
            fleet.start()
        digests = fleet.finish()
        ledger = fleet.ledger()
        name = short(fleet.key(rude))
        logs = [fleet.log(number) for number in (1, 2)]
    assert {1, 2} <= set(digests)
    assert len(set(digests.values())) == 1
    assert not ledger.problems
    for log in logs:
        assert f"refused a message from {name}" in log
    assert any(f"{name}: it broke the protocol" in log for log in logs)

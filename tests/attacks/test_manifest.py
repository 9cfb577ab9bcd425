"""Strangers who add to a run's manifest, or send more than anybody should have to take."""

from __future__ import annotations

import asyncio
import gzip
import struct
import zlib

import aiohttp
import pytest

from psyche_lightning.errors import ManifestMismatchError
from psyche_lightning.protocol.requests import GetTerms, Join
from psyche_lightning.server.admin import CoordinatorAdmin
from psyche_lightning.server.channel import MAX_FRAME_SIZE
from psyche_lightning.server.client import HttpCoordinator
from psyche_lightning.server.server import CoordinatorServer
from psyche_lightning.server.store import MemoryStore
from psyche_lightning.wire.identity import Identity

RUN = {"run": {"global_batch_size": 8, "total_steps": 9}, "model": {"width": 8}}
HELD = {"model": {"width": 8}}


def test_what_strangers_add_keeps_nobody_out() -> None:
    """Sections of strangers, each of a size that is allowed, once added up to terms that fit into no frame."""

    async def main() -> None:
        server = CoordinatorServer(MemoryStore())
        url = await server.start("127.0.0.1", 0)
        await asyncio.to_thread(CoordinatorAdmin(url).create, "r")
        honest, stranger, late = (HttpCoordinator(url, "r", Identity.generate()) for _ in range(3))
        await honest.request(Join("", RUN))
        for number in range(3):
            for section in ("y" * 1_000_000, {"step": 50}):
                with pytest.raises(ManifestMismatchError) as caught:
                    await stranger.request(Join("", {**RUN, f"x{number}": section, "start": section}))
                assert {field for field, _, _ in caught.value.differences} == {f"x{number}", "start"}
        assert (await late.request(GetTerms())).manifest == HELD
        await late.request(Join("", RUN))
        assert server.runs["r"].host.membership.members.keys() == {honest.signer, late.signer}
        for client in (honest, stranger, late):
            await client.close()
        await server.stop()

    asyncio.run(asyncio.wait_for(main(), 60))


def test_what_grows_when_it_is_decompressed_is_refused() -> None:
    async def main() -> None:
        server = CoordinatorServer(MemoryStore())
        url = await server.start("127.0.0.1", 0)
        admin = CoordinatorAdmin(url)
        await asyncio.to_thread(admin.create, "r")
        large = bytes(4 * MAX_FRAME_SIZE)
        async with aiohttp.ClientSession() as session:
            headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
            async with session.post(f"{url}/v1/runs", data=gzip.compress(large), headers=headers) as answer:
                assert answer.status == 413
            socket = await session.ws_connect(f"{url}/v1/runs/r/watch", compress=15)
            assert (await socket.receive_json())[0] == "hello"
            packer = zlib.compressobj(9, zlib.DEFLATED, -15)
            packed = (packer.compress(large) + packer.flush(zlib.Z_SYNC_FLUSH))[:-4]
            assert len(packed) < 65536
            transport = socket.get_extra_info("transport") or socket._response.connection.transport  # type: ignore[union-attr]
            final_compressed_binary, masked_long = 0xC2, 0x80 | 126
            head = struct.pack(">BBH", final_compressed_binary, masked_long, len(packed))
            transport.write(head + bytes(4) + packed)
            while (message := await socket.receive(20)).type is aiohttp.WSMsgType.TEXT:
                pass
            assert (message.type, message.data) == (aiohttp.WSMsgType.CLOSE, aiohttp.WSCloseCode.MESSAGE_TOO_BIG)
        await server.stop()

    asyncio.run(asyncio.wait_for(main(), 60))

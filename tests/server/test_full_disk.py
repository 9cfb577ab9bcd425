"""The coordinator's disk is really full, and then is not."""

from __future__ import annotations

import asyncio
import logging
from contextlib import asynccontextmanager

from support.disk import small_disk
from typer.testing import CliRunner

from psyche_lightning.cli.run import run as run_command
from psyche_lightning.protocol.state import Phase
from psyche_lightning.server.admin import CoordinatorAdmin
from psyche_lightning.server.client import HttpCoordinator
from psyche_lightning.server.server import CoordinatorServer
from psyche_lightning.server.store import SqliteStore
from psyche_lightning.wire.identity import Identity

TOKEN = "t" * 40


@asynccontextmanager
async def serving(folder, port=0):
    store = SqliteStore(folder)
    server = CoordinatorServer(store, token=TOKEN, grace=0.3)
    url = await server.start("127.0.0.1", port)
    try:
        yield server, url
    finally:
        await server.stop()
        store.close()


def test_it_says_so_loses_nothing_and_goes_on(tmp_path, walk, run, quick, caplog):
    caplog.set_level(logging.INFO, logger="psyche_lightning.server.live")
    identity = Identity.generate()

    async def problem(url):
        admin = CoordinatorAdmin(url, token=TOKEN)
        while not (found := (await asyncio.to_thread(admin.status, "r")))["problem"]:
            await asyncio.sleep(0.05)
        return found

    async def first(disk):
        async with serving(disk.path / "runs") as (_, url):
            admin = CoordinatorAdmin(url, token=TOKEN)
            await asyncio.to_thread(
                admin.create, "r", {**quick, "total_steps": 40, "global_batch_size_start": 1, "max_round_train_time": 2}
            )
            client = HttpCoordinator(url, "r", identity)
            seen = await walk(client, until=lambda state: state.step > 5)
            disk.fill()
            going_on = asyncio.ensure_future(walk(client, until=lambda state: state.step > 15))
            found = await problem(url)
            assert "disk is full" in found["problem"]
            assert found["step"] >= seen.step
            shown = await asyncio.to_thread(CliRunner().invoke, run_command, ["status", "r", "--coordinator", url])
            assert "disk is full" in shown.output
            await asyncio.sleep(2.5)  # longer than a round may take
            disk.free()
            await going_on
            assert (await asyncio.to_thread(admin.status, "r"))["problem"] is None
            disk.fill()
            going_on = asyncio.ensure_future(walk(client, until=lambda state: state.step > 25))
            promised = (await problem(url))["nonce"]
            assert client._state.nonce == promised
            going_on.cancel()
            await client.close()
            return promised, int(url.rpartition(":")[2])

    async def second(disk, promised, port):
        async with serving(disk.path / "runs", port) as (server, url):  # started while the disk is full
            found = await problem(url)
            assert found["nonce"] == promised
            client = HttpCoordinator(url, "r", identity)
            going_on = asyncio.ensure_future(walk(client))
            await asyncio.sleep(1.0)
            disk.free()
            last = await going_on
            assert last.phase is Phase.FINISHED
            assert last.epoch == 1  # the one epoch in which everything was trained
            await client.close()
            kinds = [event.kind for event in server.runs["r"].host.history.events.since(0)]
            assert "dropped" not in kinds

    with small_disk(tmp_path / "disk") as disk:
        promised, port = run(first(disk))
        run(second(disk, promised, port))
    lines = [record.getMessage() for record in caplog.records if record.name == "psyche_lightning.server.live"]
    lines = [line for line in lines if "store" in line]
    assert "lost the coordinator's store: cannot write" in lines[0]
    assert "the coordinator's store is back after" in lines[1]

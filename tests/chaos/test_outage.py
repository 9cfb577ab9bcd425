"""The way to the coordinator falls silent for a while: real processes behind a real proxy that is stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from support.fleet import Fleet

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SETTINGS = [
    "total_steps=1000000",
    "init_min_clients=3",
    "min_clients=2",
    "global_batch_size_start=6",
    "global_batch_size_end=6",
    "waiting_for_members_extra_time=1",
]
PROXY = """
import asyncio, sys
async def pipe(a, b):
    try:
        while data := await a.read(65536):
            b.write(data); await b.drain()
    except OSError: pass
    finally: b.close()
async def serve(a, b):
    c, d = await asyncio.open_connection("127.0.0.1", int(sys.argv[1]))
    await asyncio.gather(pipe(a, d), pipe(c, b))
async def main():
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()
asyncio.run(main())
"""


def test_a_silent_way_to_the_coordinator_costs_nothing_but_its_time(tmp_path: Path) -> None:
    with Fleet(tmp_path, SETTINGS) as fleet:
        port = fleet.url.rpartition(":")[2]
        proxy = subprocess.Popen([sys.executable, "-c", PROXY, port], stdout=subprocess.PIPE, text=True)
        try:
            assert proxy.stdout is not None
            url = f"http://127.0.0.1:{proxy.stdout.readline().strip()}"
            fleet.url = str(replace(fleet.admin.link(fleet.run), url=url))  # the nodes take the proxy
            for _ in range(3):
                fleet.start()
            before = fleet.until(lambda found: found["step"] > 30, "30 steps")
            os.kill(proxy.pid, signal.SIGSTOP)
            time.sleep(50)
            silent = fleet.status()
            os.kill(proxy.pid, signal.SIGCONT)
            after = fleet.until(lambda found: found["step"] > silent["step"] + 20, "20 more steps", 60)
        finally:
            proxy.kill()
        logs = [fleet.log(number) for number in range(3)]
    assert "no node has been heard from" in silent["problem"]
    assert (after["epoch"], after["problem"]) == (before["epoch"], None)
    assert not any(event["kind"] in ("dropped", "left") for event in after["events"])
    assert all(f"waiting for the coordinator at {url}: " in log for log in logs)

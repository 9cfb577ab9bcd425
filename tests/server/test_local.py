from __future__ import annotations

import asyncio
import threading

import pytest

from psyche_lightning.coordinator.host import RunHost
from psyche_lightning.errors import CoordinatorError
from psyche_lightning.protocol.requests import Join, Withdraw
from psyche_lightning.protocol.state import CoordinatorConfig, Phase
from psyche_lightning.server.local import LocalCoordinator
from psyche_lightning.wire.identity import Identity


class Clock:
    """A clock that stands still unless moved: nothing that waits for it ever goes on."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.reads = 0

    def __call__(self) -> float:
        self.reads += 1
        return self.now


def test_a_lone_node_never_waits_for_the_clock(walk, run):
    clock = Clock()
    identity = Identity.generate()
    waits: list[float] = []

    async def alone():
        loop = asyncio.get_running_loop()
        call_at = loop.call_at

        def counted(when, *args, **kwargs):
            waits.append(when - loop.time())
            return call_at(when, *args, **kwargs)

        loop.call_at = counted
        client = LocalCoordinator(RunHost("r", CoordinatorConfig(total_steps=50), seed=1), identity, clock)
        state = await walk(client)
        await client.close()
        return state

    state = run(alone())
    assert (state.phase, state.step) == (Phase.FINISHED, 51)
    # Time stood still all along, so nothing moved by a deadline; and the timers that were set are only the deadlines
    # of phases (the shortest is 10 s) and the bound of this test, never a short nap.
    assert all(wait > 5 for wait in waits)
    assert clock.reads < 50 * 20


def test_several_share_a_host_also_across_threads(walk, run, quick):
    host = RunHost(
        "r", CoordinatorConfig(total_steps=20, init_min_clients=3, waiting_for_members_extra_time=0.05), seed=1
    )
    identities = [Identity.generate() for _ in range(3)]
    states = {}

    def node(identity):
        async def main():
            client = LocalCoordinator(host, identity)
            states[identity.public] = await walk(client)
            await client.close()

        run(main())

    threads = [threading.Thread(target=node, args=(identity,)) for identity in identities]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(states) == 3
    assert len({state.nonce for state in states.values()}) == 1
    assert host.state.step == 21


def test_a_deadline_passes_without_any_call(run):
    # Two are needed and one joined; then the second comes, and only the clock opens the warm-up.
    config = CoordinatorConfig(init_min_clients=2, waiting_for_members_extra_time=0.05, total_steps=1)

    async def main():
        host = RunHost("r", config, seed=1)
        first, second = (LocalCoordinator(host, Identity.generate()) for _ in range(2))
        await first.request(Join("a", {}))
        await second.request(Join("b", {}))
        async for state in first.watch():
            if state.phase is Phase.WARMUP:
                break
        await first.close()
        await second.close()
        with pytest.raises(CoordinatorError, match="closed"):
            await first.request(Withdraw())

    run(main())

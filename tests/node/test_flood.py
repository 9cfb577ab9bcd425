"""A member that floods its peers with signed messages is cut off, and the others train on."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from typing import Any

import pytest

from psyche_lightning.protocol.messages import Ask, Message, Result, Stuck, seal
from psyche_lightning.protocol.state import Phase
from psyche_lightning.transports import limits
from psyche_lightning.transports.framing import Kind, frame
from psyche_lightning.transports.tcp import TcpTransport

STEPS = 60


def questions(number: int) -> Message:
    return Ask(0, number % 50, number)


def cries(number: int) -> Message:
    return Stuck(0, number % 50, number)


def results(number: int) -> Message:
    return Result(0, number % 50, 1, 0, 1, number, bytes(32), 100, bytes(32), (0,), 0, 1)


class Flooding(TcpTransport):
    """A transport that takes part, and besides writes signed messages to every link as fast as it can."""

    def __init__(self, make: Any) -> None:
        super().__init__()
        self._make = make

    async def start(self, context: Any) -> str:
        address = await super().start(context)
        sealed = [seal(context.identity, context.scope, self._make(number)).raw for number in range(1000)]
        frames = [frame(Kind.MESSAGE, raw) for raw in sealed]
        batches = [b"".join(frames[at : at + 100]) for at in range(0, len(frames), 100)]
        self._spawn(self._flood(batches))
        return address

    async def _flood(self, batches: list[bytes]) -> None:
        for batch in itertools.cycle(batches):
            for peer in list(self._peers.values()):
                if peer.connection is not None:
                    with contextlib.suppress(OSError, asyncio.TimeoutError):
                        await asyncio.wait_for(peer.connection.pipe.write(batch, bulk=False), 0.2)
            await asyncio.sleep(0.001)


@pytest.mark.parametrize(
    "make", [questions, pytest.param(cries, marks=pytest.mark.slow), pytest.param(results, marks=pytest.mark.slow)]
)
def test_a_flood_of_signed_messages_stops_nobody(
    make_run: Any, make_trainee: Any, make: Any, caplog: pytest.LogCaptureFixture
) -> None:
    run = make_run(4, STEPS, max_round_train_time=1.0, warmup_time=2.0, min_clients=3)
    nodes = [make_trainee(number, run, transport=lambda run: TcpTransport()) for number in range(3)]
    flooder = make_trainee(3, run, transport=lambda run: Flooding(make))
    with caplog.at_level(logging.WARNING, "psyche_lightning.transports"):
        run.go(*nodes, but=[flooder])
    assert run.host.state.phase is Phase.FINISHED
    assert all(node.steps[-1] == STEPS for node in nodes)
    assert len({node.bytes for node in nodes}) == 1
    # The flooder hears the same words as a farewell, and may log them first: who keeps it away says for how long.
    kept = f"kept away for {limits.SHORTEST_QUARANTINE:g} s"
    assert any("floods this node" in text and kept in text for text in caplog.messages)

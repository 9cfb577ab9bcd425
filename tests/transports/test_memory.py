from __future__ import annotations

import asyncio
import threading

from psyche_lightning.testing.peers import Node, eventually
from psyche_lightning.transports.memory import MemoryTransport
from psyche_lightning.wire.identity import Identity


def test_nodes_on_event_loops_of_different_threads_meet_in_the_process() -> None:
    nodes = [Node(MemoryTransport(), Identity.generate()) for _ in range(3)]
    started, heard, done = (threading.Barrier(3, timeout=30) for _ in range(3))
    failures: list[BaseException] = []
    for node in nodes:
        node.add(node.key)

    async def live(node: Node) -> None:
        loop = asyncio.get_running_loop()
        threads = set()
        original = node._on_message

        def on_message(peer: bytes, message: bytes) -> None:
            threads.add(threading.get_ident())
            original(peer, message)

        node._on_message = on_message  # type: ignore[method-assign]
        await node.start()
        await loop.run_in_executor(None, started.wait)
        node.transport.set_peers({other.key: other.address for other in nodes})
        others = [other for other in nodes if other is not node]
        await eventually(
            lambda: all(a.texts(b) for a in nodes for b in nodes if a is not b),
            "all are heard",
            lambda: node.transport.broadcast(b"hi"),
        )
        await loop.run_in_executor(None, heard.wait)
        for other in others:
            (digest,) = other.blobs
            assert await node.transport.fetch(digest, [other.key], max_size=32, timeout=30) == other.key
        await loop.run_in_executor(None, done.wait)
        await node.transport.stop()
        assert threads == {threading.get_ident()}

    def run(node: Node) -> None:
        try:
            asyncio.run(live(node))
        except BaseException as error:
            failures.append(error)

    workers = [threading.Thread(target=run, args=(node,)) for node in nodes]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures

"""A Solana cluster with one node, for tests and experiments: ``solana-localnet``.

Ordinary clients use it like a validator: JSON-RPC over HTTP, subscriptions over a websocket. The programs run in
Solana's own runtime (``solders.litesvm``); this package adds the parts of a cluster that clients see. It lacks some
features of a validator: several nodes, votes and stakes, durable nonces, simulation on older states, and the parsed
form of accounts other than those of SPL Token.

In a test::

    async with LocalServer(LocalChain(SlotClock(running=False))) as server:
        client = AsyncClient(server.url)
        ...
        server.chain.advance(2)  # two slots; nothing else advances a frozen clock
"""

from psyche_lightning_localnet.chain import LocalChain
from psyche_lightning_localnet.clock import SlotClock
from psyche_lightning_localnet.errors import LedgerError, LocalnetError
from psyche_lightning_localnet.process import LocalnetProcess
from psyche_lightning_localnet.server import LocalServer

__all__ = ["LedgerError", "LocalChain", "LocalServer", "LocalnetError", "LocalnetProcess", "SlotClock"]

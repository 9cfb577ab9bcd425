"""A transport between the nodes of one process, whose event loops may run in different threads."""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
from collections import deque
from collections.abc import Mapping, Sequence

from psyche_lightning.errors import AbsentError, TransportError
from psyche_lightning.transports.base import Link, Progress, TransportContext, check_message
from psyche_lightning.wire.canonical import sha256
from psyche_lightning.wire.identity import short

QUEUE_LENGTH = 1024
_log = logging.getLogger(__name__)


class MemoryNetwork:
    """Finds the transports of one process by address."""

    def __init__(self) -> None:
        self._members: dict[str, MemoryTransport] = {}
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()

    def enter(self, transport: MemoryTransport) -> str:
        """Give a transport a new address."""
        with self._lock:
            address = f"memory:{next(self._numbers)}"
            self._members[address] = transport
            return address

    def leave(self, address: str) -> None:
        """Forget the transport at an address."""
        with self._lock:
            self._members.pop(address, None)

    def find(self, address: str) -> MemoryTransport | None:
        """The transport at an address, or None."""
        with self._lock:
            return self._members.get(address)


_PROCESS = MemoryNetwork()


class MemoryTransport:
    """A :class:`~psyche_lightning.transports.base.Transport` without sockets.

    A message to a peer that is not there (yet, or any more) is lost, as on any transport. Links count the bytes of
    messages and blobs.

    Args:
        network: the network to enter; by default the one that all transports of the process share.
    """

    def __init__(self, network: MemoryNetwork | None = None) -> None:
        self._network = network or _PROCESS
        self._context: TransportContext | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._address = ""
        self._peers: dict[bytes, str] = {}
        self._inbox: dict[bytes, deque[bytes]] = {}
        self._bytes: dict[bytes, list[int]] = {}  # peer -> [up, down]
        self._fetches: set[asyncio.Future[bytes | None]] = set()
        self._lock = threading.Lock()

    async def start(self, context: TransportContext) -> str:
        """See the contract."""
        if self._context is not None:
            raise TransportError("this transport was started before; make a new one")
        self._context = context
        self._loop = asyncio.get_running_loop()
        self._address = self._network.enter(self)
        self._peers.pop(context.identity.public, None)
        return self._address

    def set_peers(self, peers: Mapping[bytes, str]) -> None:
        """See the contract."""
        own = self._context.identity.public if self._context else None
        with self._lock:
            self._peers = {key: address for key, address in peers.items() if key != own}
            self._inbox = {key: queue for key, queue in self._inbox.items() if key in self._peers}

    def send(self, peer: bytes, message: bytes) -> None:
        """See the contract."""
        check_message(message)
        context, target = self._context, self._reach(peer)
        if context is None or target is None:
            return
        if target._receive(context.identity.public, bytes(message)):
            self._count(peer, up=len(message))

    def broadcast(self, message: bytes) -> None:
        """See the contract."""
        check_message(message)
        for peer in list(self._peers):
            self.send(peer, message)

    async def fetch(
        self,
        digest: bytes,
        providers: Sequence[bytes],
        *,
        max_size: int,
        timeout: float,
        progress: Progress | None = None,
    ) -> bytes:
        """See the contract."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout
        failures, absent = [], 0
        for index, provider in enumerate(providers):
            left = deadline - loop.time()
            last = index == len(providers) - 1
            try:
                data = await self._fetch_from(provider, digest, max_size, left if last else left / 2)
                if progress is not None:
                    progress(len(data), len(data))
                return data
            except TransportError as error:
                failures.append(f"{short(provider)} {error}")
                absent += isinstance(error, AbsentError)
        reasons = "; ".join(failures) or "no provider is known"
        kind = AbsentError if failures and absent == len(failures) else TransportError
        raise kind(f"nobody delivered blob {short(digest)}: {reasons}")

    def links(self) -> list[Link]:
        """See the contract."""
        links = []
        for peer in list(self._peers):
            up, down = self._bytes.get(peer, (0, 0))
            connected = self._reach(peer) is not None
            links.append(Link(peer, connected, None, up, down, "" if connected else "not there"))
        return links

    async def stop(self) -> None:
        """See the contract."""
        self._network.leave(self._address)
        with self._lock:
            self._loop = None
            self._inbox.clear()
        for fetch in list(self._fetches):
            fetch.cancel()

    async def _fetch_from(self, provider: bytes, digest: bytes, max_size: int, timeout: float) -> bytes:
        target = self._reach(provider)
        if target is None or target._context is None or self._loop is None:
            raise TransportError("is not connected")
        if timeout <= 0:
            raise TransportError("was not asked, because time ran out")
        reading = self._loop.run_in_executor(None, target._context.read_blob, digest)
        self._fetches.add(reading)
        try:
            await asyncio.wait([reading], timeout=timeout)
            if not reading.done():
                raise TransportError(f"did not answer within {timeout:.1f} s")
            data = reading.result()
        except TransportError:
            raise
        except asyncio.CancelledError:
            if self._loop is not None:
                raise
            raise TransportError("was being asked when this node stopped") from None
        except Exception:
            _log.exception("reading a blob failed")
            data = None
        finally:
            reading.cancel()
            self._fetches.discard(reading)
        if data is None:
            raise AbsentError("does not have it")
        if len(data) > max_size:
            raise TransportError(f"has {len(data)} bytes, more than the {max_size} expected")
        self._count(provider, down=len(data))
        if self._context is not None:
            target._count(self._context.identity.public, up=len(data))
        target._context.on_served(len(data), len(data))
        if sha256(data) != digest:
            raise TransportError("delivered wrong bytes")
        return bytes(data)

    def _reach(self, peer: bytes) -> MemoryTransport | None:
        """The transport of a peer, if both belong to the same run and have each other as peers."""
        context, address = self._context, self._peers.get(peer)
        target = self._network.find(address) if address is not None and self._loop is not None else None
        if context is None or target is None or target._context is None or target._loop is None:
            return None
        same = target._context.identity.public == peer and target._context.scope == context.scope
        return target if same and context.identity.public in target._peers else None

    def _receive(self, sender: bytes, message: bytes) -> bool:
        """Queue a message, in the sender's thread; drops the oldest if the node does not keep up."""
        with self._lock:
            loop = self._loop
            if loop is None or loop.is_closed() or sender not in self._peers:
                return False
            self._inbox.setdefault(sender, deque(maxlen=QUEUE_LENGTH)).append(message)
            loop.call_soon_threadsafe(self._deliver, sender)
        return True

    def _deliver(self, sender: bytes) -> None:
        with self._lock:
            queue = self._inbox.get(sender)
            message = queue.popleft() if queue else None
        if message is None or self._context is None:
            return
        self._count(sender, down=len(message))
        try:
            self._context.on_message(sender, message)
        except Exception:
            _log.exception("handling a message from %s failed", short(sender))

    def _count(self, peer: bytes, up: int = 0, down: int = 0) -> None:
        with self._lock:
            counts = self._bytes.setdefault(peer, [0, 0])
            counts[0] += up
            counts[1] += down

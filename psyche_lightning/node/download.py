"""Downloads parameters into a node's blob store, piece by piece, from several peers.

Every piece is checked against its hash, which the agreed digest covers. Stored pieces stay, so an interrupted
transfer resumes. Each peer gets its next request as soon as it has delivered a piece, so fast peers deliver
more. A peer that keeps failing is no longer asked.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from psyche_lightning.errors import AbsentError, TransportError, counted
from psyche_lightning.node.notices import Notice, PieceNotDelivered
from psyche_lightning.node.snapshot import MAX_INDEX_SIZE, Index, Piece, decode_index
from psyche_lightning.node.store import BlobStore
from psyche_lightning.transports.base import Transport
from psyche_lightning.wire.identity import short

WIDTH = 2
"""Pieces requested from a peer at the same time."""
STRIKES = 3
"""Failures after which a transfer no longer asks a peer."""
PIECE_TIMEOUT = 600.0
"""Bounds a slow peer; the transport drops one that delivers nothing long before."""
INDEX_TIMEOUT = 60.0


@dataclass
class Transfer:
    """Progress of a download of parameters.

    Attributes:
        digest: the digest.
        total: bytes of all their pieces.
        done: bytes that are here, including earlier ones.
        sources: peers that delivered pieces.
    """

    digest: bytes
    total: int
    done: int = 0
    sources: set[bytes] = field(default_factory=set)
    partial: dict[bytes, int] = field(default_factory=dict)

    @property
    def here(self) -> int:
        """Bytes that are here, including partial pieces."""
        return self.done + sum(self.partial.values())

    def __str__(self) -> str:
        peers = f"{len(self.sources)} peer{'s' * (len(self.sources) != 1)}"
        return f"{self.here / 1e6:,.0f} of {self.total / 1e6:,.0f} MB from {peers}"


class Downloads:
    """Gets indices and pieces.

    Args:
        transport: the node's.
        store: gets all the blobs.
        say: tells people a notice.

    Attributes:
        transfer: the current one, or None.
    """

    def __init__(self, transport: Transport, store: BlobStore, say: Callable[[Notice], None] = Notice.tell) -> None:
        self.transfer: Transfer | None = None
        self._transport = transport
        self._store = store
        self._say = say

    async def index(self, digest: bytes, providers: Sequence[bytes]) -> Index:
        """The index of parameters or buffers, from the store or a peer.

        Raises:
            TransportError: no peer has it.
            WireError: it is not one.
        """
        loop = asyncio.get_running_loop()
        data = await loop.run_in_executor(None, self._store.get, digest)
        if data is None:
            data = await self._transport.fetch(digest, providers, max_size=MAX_INDEX_SIZE, timeout=INDEX_TIMEOUT)
            await loop.run_in_executor(None, self._store.put, data)
        return decode_index(data)

    async def obtain(
        self, digest: bytes, providers: Sequence[bytes], check: Callable[[Index], None] = lambda index: None
    ) -> Index:
        """Fetch an index and all its pieces.

        Args:
            digest: hash of the index.
            providers: peers that may have them.
            check: raises an error if the index describes something else; then no piece is fetched.

        Raises:
            TransportError: a piece is missing; the others stay stored.
            WireError: the index is not one, or not the expected one.
        """
        index = await self.index(digest, providers)
        check(index)
        loop = asyncio.get_running_loop()
        missing = [
            piece for piece in index.pieces if not await loop.run_in_executor(None, self._store.has, piece.digest)
        ]
        transfer = Transfer(digest, index.size, index.size - sum(piece.size for piece in missing))
        if missing:
            self.transfer = transfer
            try:
                await _Pull(self._transport, self._store, transfer, missing, providers, self._say).run()
            finally:
                self.transfer = None
        return index


class _Pull:
    """One transfer: takes pieces from a list until it is empty."""

    def __init__(
        self,
        transport: Transport,
        store: BlobStore,
        transfer: Transfer,
        pieces: Sequence[Piece],
        providers: Sequence[bytes],
        say: Callable[[Notice], None],
    ) -> None:
        self._say = say
        self._transport = transport
        self._store = store
        self._transfer = transfer
        self._waiting = list(pieces)
        self._left = len(pieces)
        self._tried: dict[bytes, dict[bytes, str]] = {piece.digest: {} for piece in pieces}
        self._sources = list(dict.fromkeys(providers))
        self._strikes = dict.fromkeys(self._sources, 0)
        self._failure: TransportError | None = None
        self._news = asyncio.Condition()

    async def run(self) -> None:
        workers = [asyncio.ensure_future(self._work(source)) for source in self._sources for _ in range(WIDTH)]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
        if self._left:
            reasons = {who: why for tried in self._tried.values() for who, why in tried.items()}
            text = "; ".join(f"{short(who)} {why}" for who, why in reasons.items()) or "there is no peer to ask"
            raise TransportError(f"{counted(self._left, 'piece')} {'is' if self._left == 1 else 'are'} missing: {text}")

    async def _work(self, source: bytes) -> None:
        """Get pieces from one peer until none is left for it."""
        while (piece := await self._next(source)) is not None:
            try:
                await self._take(source, piece)
            except TransportError as error:
                reason = str(error).partition(f"{short(source)} ")[2] or str(error)
                self._tried[piece.digest][source] = reason
                self._strikes[source] += 1
                if not isinstance(error, AbsentError):
                    self._say(PieceNotDelivered(source, piece.tensor, reason))
                self._waiting.insert(0, piece)
            else:
                self._left -= 1
            async with self._news:
                self._news.notify_all()

    async def _next(self, source: bytes) -> Piece | None:
        """The next piece for a peer, or None; waits while other peers may still return some."""
        async with self._news:
            while self._left and self._strikes[source] < STRIKES:
                for place, piece in enumerate(self._waiting):
                    if source not in self._tried[piece.digest]:
                        return self._waiting.pop(place)
                if self._hopeless():
                    break
                await self._news.wait()
            self._news.notify_all()
            return None

    def _hopeless(self) -> bool:
        """Whether all peers still in use refused some piece."""
        able = {source for source in self._sources if self._strikes[source] < STRIKES}
        return any(able <= self._tried[piece.digest].keys() for piece in self._waiting)

    async def _take(self, source: bytes, piece: Piece) -> None:
        partial = self._transfer.partial

        def progress(got: int, whole: int) -> None:
            partial[piece.digest] = got

        try:
            data = await self._transport.fetch(
                piece.digest, [source], max_size=piece.size, timeout=PIECE_TIMEOUT, progress=progress
            )
        finally:
            partial.pop(piece.digest, None)
        await asyncio.get_running_loop().run_in_executor(None, self._store.put, data)
        self._transfer.done += len(data)
        self._transfer.sources.add(source)

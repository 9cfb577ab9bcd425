"""Brings parameters into a node's blob store, piece by piece, from several peers at once.

Every piece is checked against its hash, which the agreed digest covers. What is stored stays, so a transfer that is
interrupted goes on where it was. Each peer is asked for the next piece that it was not asked for as soon as it has
delivered one, so the fast ones give more; one that keeps failing is left alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

from psyche_lightning.errors import AbsentError, TransportError
from psyche_lightning.node.notices import PieceNotDelivered
from psyche_lightning.node.snapshot import MAX_INDEX_SIZE, Index, Piece, decode_index
from psyche_lightning.node.store import BlobStore
from psyche_lightning.transports.base import Transport
from psyche_lightning.wire.identity import short

WIDTH = 2
"""Pieces that a peer is asked for at the same time."""
STRIKES = 3
"""Failures after which a peer is left alone during a transfer."""
PIECE_TIMEOUT = 600.0
"""A transport gives up on a peer that delivers nothing long before; this bounds one that drips."""
INDEX_TIMEOUT = 60.0


@dataclass
class Transfer:
    """Parameters on their way to this node, for progress bars.

    Attributes:
        digest: of the parameters.
        total: bytes of all their pieces.
        done: bytes that are here, those that were here before included.
        sources: peers that delivered something.
    """

    digest: bytes
    total: int
    done: int = 0
    sources: set[bytes] = field(default_factory=set)
    partial: dict[bytes, int] = field(default_factory=dict)

    @property
    def here(self) -> int:
        """Bytes that are here, parts of pieces included."""
        return self.done + sum(self.partial.values())

    def __str__(self) -> str:
        peers = f"{len(self.sources)} peer{'s' * (len(self.sources) != 1)}"
        return f"{self.here / 1e6:,.0f} of {self.total / 1e6:,.0f} MB from {peers}"


class Downloads:
    """Obtains indices and pieces.

    Args:
        transport: the node's.
        store: where everything goes.

    Attributes:
        transfer: the one that is under way, or None.
    """

    def __init__(self, transport: Transport, store: BlobStore) -> None:
        self.transfer: Transfer | None = None
        self._transport = transport
        self._store = store

    async def index(self, digest: bytes, providers: Sequence[bytes]) -> Index:
        """The index of parameters (or buffers), from the own store or a peer.

        Raises:
            TransportError: nobody delivered it.
            WireError: it is not one.
        """
        loop = asyncio.get_running_loop()
        data = await loop.run_in_executor(None, self._store.get, digest)
        if data is None:
            data = await self._transport.fetch(digest, providers, max_size=MAX_INDEX_SIZE, timeout=INDEX_TIMEOUT)
            await loop.run_in_executor(None, self._store.put, data)
        return decode_index(data)

    async def obtain(self, digest: bytes, providers: Sequence[bytes]) -> Index:
        """Bring an index and all its pieces into the store.

        Raises:
            TransportError: nobody delivered one of them; the others stay.
            WireError: the index is not one.
        """
        index = await self.index(digest, providers)
        loop = asyncio.get_running_loop()
        missing = [
            piece for piece in index.pieces if not await loop.run_in_executor(None, self._store.has, piece.digest)
        ]
        transfer = Transfer(digest, index.size, index.size - sum(piece.size for piece in missing))
        if missing:
            self.transfer = transfer
            try:
                await _Pull(self._transport, self._store, transfer, missing, providers).run()
            finally:
                self.transfer = None
        return index


class _Pull:
    """One transfer: peers pull from a list of pieces until it is empty."""

    def __init__(
        self,
        transport: Transport,
        store: BlobStore,
        transfer: Transfer,
        pieces: Sequence[Piece],
        providers: Sequence[bytes],
    ) -> None:
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
            raise TransportError(f"{self._left} pieces are missing: {text}")

    async def _work(self, source: bytes) -> None:
        """Let one peer deliver pieces until nothing is left for it."""
        while (piece := await self._next(source)) is not None:
            try:
                await self._take(source, piece)
            except TransportError as error:
                reason = str(error).partition(f"{short(source)} ")[2] or str(error)
                self._tried[piece.digest][source] = reason
                self._strikes[source] += 1
                if not isinstance(error, AbsentError):
                    PieceNotDelivered(source, piece.tensor, reason).tell()
                self._waiting.insert(0, piece)
            else:
                self._left -= 1
            async with self._news:
                self._news.notify_all()

    async def _next(self, source: bytes) -> Piece | None:
        """The next piece for a peer; waits while others may still give some back. None when it has nothing to do."""
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
        """Whether some piece was refused by everybody who is still asked."""
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

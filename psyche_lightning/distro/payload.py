"""The payload of a whole model: one part for each k, in ascending order of k.

A part is the encoding of :mod:`~psyche_lightning.distro.codec` for the chunks with that k, in the layout's order. If
all parameters have the same k, the payload is this one part.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from psyche_lightning.distro import codec
from psyche_lightning.distro.config import WIRE_VERSION, DistroConfig
from psyche_lightning.distro.layout import Layout
from psyche_lightning.distro.votes import Votes
from psyche_lightning.errors import ConfigError, PayloadError

KEPT = 1 << 22
"""Bytes of votes that :meth:`PayloadCodec.check` keeps at most, those of several payloads together."""


class PayloadCodec:
    """Writes and reads the payloads of one layout and configuration.

    Args:
        layout: the model's layout.
        config: the run's configuration.
        version: of the payloads: 2 for signs, 3 for local steps.

    Attributes:
        ks: the k of each entry of the layout.
        size: the size of every payload, in bytes.

    Raises:
        ConfigError: a pattern of ``k_for`` matches no parameter.
    """

    def __init__(self, layout: Layout, config: DistroConfig, version: int = WIRE_VERSION) -> None:
        self.ks = [config.k_of(entry.name) for entry in layout.entries]
        for pattern in config.k_for:
            only = DistroConfig(config.chunk, 1, k_for={pattern: 2})
            if all(only.k_of(entry.name) == 1 for entry in layout.entries):
                names = ", ".join(entry.name for entry in layout.entries[:8])
                raise ConfigError(f"distro.k_for[{pattern!r}] matches no parameter; the names are {names}, ...")
        self._layout, self._config, self._version = layout, config, version
        # The last two, as with overlap the last but one is applied. Other threads decode as well, so what is kept is
        # replaced as a whole; what one of them loses is read again.
        self._written: tuple[tuple[bytes, Votes], ...] = ()
        self._read: dict[bytes, Votes] = {}
        self.size = sum(codec.payload_size(len(chunks), part, version) for part, chunks in self._parts)

    @cached_property
    def _parts(self) -> list[tuple[DistroConfig, NDArray[np.int64]]]:
        """The configuration of each part, and the ascending numbers of its chunks."""
        of_chunk = np.repeat(self.ks, [entry.chunks for entry in self._layout.entries])
        return [(self._config.uniform(int(k)), np.flatnonzero(of_chunk == k)) for k in np.unique(of_chunk)]

    def abstention(self) -> bytes:
        """The payload without votes."""
        return self.encode(Votes.empty(self._layout.chunk_count, self._config.max_k, self._version))

    def encode(self, votes: Votes) -> bytes:
        """Write votes, [chunks, largest k]; for a chunk with a smaller k, only the first columns count.

        Their arrays must not change any more: :meth:`decode` may give them back instead of reading the payload.
        """
        if len(self._parts) > 1:
            return b"".join(codec.encode(votes.of_chunks(chunks, part.k), part) for part, chunks in self._parts)
        payload = codec.encode(votes, self._parts[0][0])
        self._written = (*self._written[-1:], (payload, votes))
        return payload

    def check(self, payload: bytes) -> None:
        """Refuse a payload that :meth:`decode` would refuse; any thread may call it.

        The votes of the last ones are kept while they are few, so that applying them does not read them again.

        Raises:
            PayloadError: the bytes are not the canonical encoding of votes for this layout.
        """
        votes = self.decode(payload)
        room = KEPT // votes.nbytes if votes.nbytes else 0
        if room:
            self._read = dict([*self._read.items(), (payload, votes)][-room:])

    def decode(self, payload: bytes, start: int = 0, stop: int | None = None) -> Votes:
        """Read the votes of the chunks ``start`` to ``stop``; columns beyond a chunk's k have sign 0.

        Raises:
            PayloadError: the bytes are not the canonical encoding of votes for this layout.
        """
        stop = self._layout.chunk_count if stop is None else stop
        for written, its in self._written:
            if written == payload:
                return its.part(start, stop)
        if self._read and (known := self._read.get(payload)) is not None:  # a large payload takes long to hash
            return known.part(start, stop)
        version = self._version
        if len(self._parts) == 1:
            return codec.decode(payload, self._layout.chunk_count, self._parts[0][0], start, stop, version)
        if len(payload) != self.size:
            raise PayloadError(f"the payload has {len(payload)} bytes; {self.size} are expected")
        votes = Votes.empty(stop - start, self._config.max_k, version)
        offset = 0
        for part, chunks in self._parts:
            end = offset + codec.payload_size(len(chunks), part, version)
            first, last = np.searchsorted(chunks, (start, stop)).tolist()
            some = codec.decode(payload[offset:end], len(chunks), part, first, last, version)
            votes.put(chunks[first:last] - start, some)
            offset = end
        return votes

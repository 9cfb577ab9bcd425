"""The payload of a whole model: one part for each k, in ascending order of k.

A part is the encoding of :mod:`~psyche_lightning.distro.codec` for the chunks with that k, in the layout's order. If
all parameters have the same k, the payload is this one part.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from psyche_lightning.distro import codec, device
from psyche_lightning.distro.config import STEPS_VERSION, WIRE_VERSION, DistroConfig
from psyche_lightning.distro.layout import Layout
from psyche_lightning.distro.votes import Votes, VotesOn
from psyche_lightning.errors import ConfigError, PayloadError

KEPT = 1 << 22
"""Bytes of votes that :meth:`PayloadCodec.check` keeps at most, those of several payloads together."""


class PayloadCodec:
    """Writes and reads the payloads of one layout and configuration.

    Args:
        layout: the model's layout.
        config: the run's configuration, without a schedule (:meth:`DistroConfig.at`).
        version: of the payloads: 2 for signs, 3 for local steps.

    Attributes:
        config: as given.
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
        self.config = config
        self._layout, self._version = layout, version
        # The last two, as with overlap the last but one is applied. Other threads decode as well, so what is kept is
        # replaced as a whole; what one of them loses is read again.
        self._written: tuple[tuple[bytes, Votes | VotesOn], ...] = ()
        self._read: dict[bytes, Votes] = {}
        self.size = sum(codec.payload_size(len(chunks), part, version) for part, chunks in self._parts)

    @property
    def kept(self) -> int:
        """Bytes of the votes of the last two payloads that were written, which are kept if all have the same k."""
        per_chunk = 3 * self.config.max_k + (self._version == STEPS_VERSION)
        return 2 * per_chunk * self._layout.chunk_count if len(self._parts) == 1 else 0

    @cached_property
    def _parts(self) -> list[tuple[DistroConfig, NDArray[np.int64]]]:
        """The configuration of each part, and the ascending numbers of its chunks."""
        of_chunk = np.repeat(self.ks, [entry.chunks for entry in self._layout.entries])
        return [(self.config.uniform(int(k)), np.flatnonzero(of_chunk == k)) for k in np.unique(of_chunk)]

    @cached_property
    def abstention(self) -> bytes:
        """The payload without votes."""
        return self.encode(Votes.empty(self._layout.chunk_count, self.config.max_k, self._version))

    def encode(self, votes: Votes | VotesOn) -> bytes:
        """Write votes, [chunks, largest k]; for a chunk with a smaller k, only the first columns count.

        Those on a device are written there. Their arrays must not change any more: :meth:`decode` may give them back
        instead of reading the payload.
        """
        if isinstance(votes, VotesOn):
            if device.computes(votes.signs.device):
                return self._encode_there(votes)
            votes = votes.votes()
        if len(self._parts) > 1:
            return b"".join(codec.encode(votes.of_chunks(chunks, part.k), part) for part, chunks in self._parts)
        payload = codec.encode(votes, self._parts[0][0])
        self._written = (*self._written[-1:], (payload, votes))
        return payload

    def _encode_there(self, votes: VotesOn) -> bytes:
        if len(self._parts) > 1:
            where = votes.signs.device
            parts = ((part, torch.from_numpy(chunks).to(where)) for part, chunks in self._parts)
            return b"".join(device.encode(votes.of_chunks(chunks, part.k), part) for part, chunks in parts)
        payload = device.encode(votes, self._parts[0][0])
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

    def forget(self) -> None:
        """Keep no votes; those of payloads that come again are read again."""
        self._written, self._read = (), {}

    def decode(self, payload: bytes, start: int = 0, stop: int | None = None) -> Votes:
        """Read the votes of the chunks ``start`` to ``stop``; columns beyond a chunk's k have sign 0.

        Raises:
            PayloadError: the bytes are not the canonical encoding of votes for this layout.
        """
        return self.decode_each([payload], start, stop)[0]

    def decode_each(self, payloads: Sequence[bytes], start: int = 0, stop: int | None = None) -> list[Votes]:
        """Read several payloads at once, quicker than one after the other; otherwise as :meth:`decode`."""
        stop = self._layout.chunk_count if stop is None else stop
        known = [self._known(payload) for payload in payloads]
        others = [payload for payload, votes in zip(payloads, known, strict=True) if not isinstance(votes, Votes)]
        theirs = iter(self._decoded(others, start, stop) if others else [])
        return [votes.part(start, stop) if isinstance(votes, Votes) else next(theirs) for votes in known]

    def decode_on(
        self, where: torch.device, payloads: Sequence[bytes], start: int = 0, stop: int | None = None
    ) -> list[VotesOn]:
        """Read several payloads onto a device, which computes that itself if it can; otherwise as :meth:`decode`."""
        stop = self._layout.chunk_count if stop is None else stop
        if not device.computes(where):
            return [VotesOn.of(votes, where) for votes in self.decode_each(payloads, start, stop)]
        known = [self._known(payload) for payload in payloads]
        others = [payload for payload, votes in zip(payloads, known, strict=True) if votes is None]
        theirs = iter(self._decoded_on(where, others, start, stop) if others else [])
        return [next(theirs) if votes is None else VotesOn.of(votes.part(start, stop), where) for votes in known]

    def _known(self, payload: bytes) -> Votes | VotesOn | None:
        """The votes of a payload that was written or checked lately."""
        for written, votes in self._written:
            if written == payload:
                return votes
        return self._read.get(payload) if self._read else None  # a large payload takes long to hash

    def _decoded(self, payloads: Sequence[bytes], start: int, stop: int) -> list[Votes]:
        version = self._version
        if len(self._parts) == 1:
            return codec.decode_each(payloads, self._layout.chunk_count, self._parts[0][0], start, stop, version)
        found = [Votes.empty(stop - start, self.config.max_k, version) for _ in payloads]
        for part, chunks, first, last, its in self._cut(payloads, start, stop):
            some = codec.decode_each(its, len(chunks), part, first, last, version)
            for votes, one in zip(found, some, strict=True):
                votes.put(chunks[first:last] - start, one)
        return found

    def _decoded_on(self, where: torch.device, payloads: Sequence[bytes], start: int, stop: int) -> list[VotesOn]:
        version = self._version
        if len(self._parts) == 1:
            part = self._parts[0][0]
            return device.decode_each(payloads, self._layout.chunk_count, part, where, start, stop, version)
        found = [VotesOn.empty(stop - start, self.config.max_k, where, version) for _ in payloads]
        for part, chunks, first, last, its in self._cut(payloads, start, stop):
            some = device.decode_each(its, len(chunks), part, where, first, last, version)
            numbers = torch.from_numpy(chunks[first:last] - start).to(where)
            for votes, one in zip(found, some, strict=True):
                votes.put(numbers, one)
        return found

    def _cut(
        self, payloads: Sequence[bytes], start: int, stop: int
    ) -> Iterator[tuple[DistroConfig, NDArray[np.int64], int, int, list[bytes]]]:
        """The parts of payloads: configuration, chunks, which of them lie between ``start`` and ``stop``, and bytes."""
        for payload in payloads:
            if len(payload) != self.size:
                raise PayloadError(f"the payload has {len(payload)} bytes; {self.size} are expected")
        offset = 0
        for part, chunks in self._parts:
            end = offset + codec.payload_size(len(chunks), part, self._version)
            first, last = np.searchsorted(chunks, (start, stop)).tolist()
            yield part, chunks, first, last, [payload[offset:end] for payload in payloads]
            offset = end

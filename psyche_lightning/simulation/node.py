"""A node of the simulator: its disk, its core, and a training thread whose tensors are hash chains."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from psyche_lightning.distro import DistroConfig
from psyche_lightning.errors import StoreError, WireError
from psyche_lightning.node import events as ev
from psyche_lightning.node.core import NodeCore
from psyche_lightning.node.ledger import Row
from psyche_lightning.node.notices import Finished
from psyche_lightning.node.recorder import Recorder
from psyche_lightning.protocol.messages import Envelope, Result
from psyche_lightning.protocol.open_ids import OpenIds, closed, count
from psyche_lightning.protocol.requests import Report
from psyche_lightning.simulation.roles import NOT_FINITE, Role
from psyche_lightning.wire.canonical import HASH_SIZE, pack, sha256, unpack
from psyche_lightning.wire.identity import Identity, short

LAYOUT = sha256(b"simulated layout")
BAD = b"malformed"
PAYLOAD = len(BAD) + HASH_SIZE
"""Bytes of a payload, besides one for each k of its step."""
ABSTENTIONS = 0.01
RATE = 2.0**-149
"""The learning rate, whose bits are 1."""
_K = TypeVar("_K")
_V = TypeVar("_V")


@dataclass
class SimNode:
    """A node: what survives a kill (identity, blobs, promises, remembered results, ledger) and what does not.

    Attributes:
        head: its parameters, a hash chain over everything that was applied.
        buffers: another one, which each node's training changes in its own way.
        role: how it breaks the rules on purpose, one of :data:`~psyche_lightning.simulation.roles.ROLES`, or empty.
        life: how often it was killed.
        queue: what its training thread has to do.
        done: how it left the finished run; None as long as it has not.
        gone: whether it will not come back.
        flipped: whether its parameters may differ from the others'.
        young: blobs since the last :class:`~psyche_lightning.node.events.Keep`.
        room: writes until its disk is full; None while it has room.
        torn: whether the write that fails is there afterwards, because only the disk's answer failed.
        follows: whether what it knows is what the coordinator has, which may have been restored from a copy.
        clock: how far its clock is ahead of virtual time; each process has a clock of its own.
        speed: samples that it trains in a second, where nodes differ.
        report: what it says of its speed.
        distro: how updates are compressed; decides the sizes of payloads.
        recorder: writes down its events; None without a trace.
    """

    index: int
    identity: Identity
    role: str = ""
    blobs: dict[bytes, bytes] = field(default_factory=dict)
    promises: dict[str, Envelope] = field(default_factory=dict)
    remembered: dict[str, tuple[Envelope, ...]] = field(default_factory=dict)
    core: NodeCore | None = None
    plays: Role = field(init=False)
    life: int = 0
    head: bytes = b""
    buffers: bytes = b""
    peers: tuple[bytes, ...] = ()
    queue: deque[ev.Effect] = field(default_factory=deque)
    working: bool = False
    done: Finished | None = None
    gone: bool = False
    flipped: bool = False
    open_ids: OpenIds = ()
    ledger: list[Row] = field(default_factory=list)
    young: set[bytes] = field(default_factory=set)
    room: int | None = None
    torn: bool = False
    clock: float = 0.0
    follows: bool = True
    speed: float = 1.0
    report: Report = field(default_factory=Report)
    distro: DistroConfig = field(default_factory=DistroConfig)
    recorder: Recorder | None = None

    @property
    def name(self) -> str:
        """Short key, as in the logs."""
        return short(self.identity.public)

    @property
    def digest(self) -> bytes:
        """Digest of its parameters and open ids."""
        return sha256(pack([self.head, self.open_ids]))

    def payload_size(self, step: int) -> int:
        """Bytes of each payload of a step."""
        return PAYLOAD + self.distro.at(step).k

    def begin(self, core: NodeCore) -> None:
        """Starts with parameters of its own."""
        seed = self.identity.public, bytes([self.life])
        self.core, self.open_ids, self.flipped, self.room, self.follows = core, (), False, None, True
        self.head, self.buffers = sha256(b"initial", *seed), sha256(b"buffers", *seed)

    def end(self) -> None:
        """Ends at once; everything that is not on disk is lost."""
        self.core, self.working = None, False
        self.life += 1
        self.queue.clear()

    def put(self, blob: bytes) -> bytes:
        """Store a blob.

        Raises:
            StoreError: the disk is full.
        """
        digest = sha256(blob)
        self._write(self.blobs, digest, blob)
        self.young.add(digest)
        return digest

    def promise(self, key: str, envelope: Envelope) -> None:
        """Store a promise; raises as :meth:`put`."""
        self._write(self.promises, key, envelope)

    def remember(self, key: str, envelopes: tuple[Envelope, ...]) -> None:
        """Store the announcements of a round; raises as :meth:`put`."""
        self._write(self.remembered, key, envelopes)

    def write_down(self, rows: Sequence[Row]) -> None:
        """Add to the ledger; raises as :meth:`put`."""
        self._write({}, "", rows)
        self.ledger += rows

    def _write(self, place: dict[_K, _V], key: _K, value: _V) -> None:
        if self.room != 0 or self.torn:
            place[key] = value
        if self.room == 0:
            raise StoreError("the disk is full")
        self.room = None if self.room is None else self.room - 1

    def keep(self, kept: set[bytes], promises: tuple[str, ...]) -> None:
        """Forgets everything else; new blobs stay until the next call."""
        self.blobs = {key: blob for key, blob in self.blobs.items() if key in kept | self.young}
        self.promises = {key: kept for key, kept in self.promises.items() if key in promises}
        self.remembered = {key: kept for key, kept in self.remembered.items() if key in promises}
        self.young.clear()

    def load(self, blob: bytes) -> None:
        """Takes parameters that a node stored.

        Raises:
            WireError: they are no parameters of this model; the node keeps its own.
            StoreError: the disk is full.
        """
        head, open_ids = unpack(blob, max_size=1 << 20)
        if len(head) != HASH_SIZE or head == NOT_FINITE:
            raise WireError("these are not parameters of this model")
        self.put(blob)
        self.head, self.open_ids, self.flipped = head, tuple(map(tuple, open_ids)), False

    def serve(self, digest: bytes) -> bytes | None:
        """What a peer gets that asks for a blob."""
        blob = self.blobs.get(digest)
        return b"other bytes" if blob is not None and self.role == "false bytes" else blob

    def forget(self, *, promises: bool = False, blobs: bool = False) -> None:
        """Loses a part of its disk."""
        if promises:
            self.promises, self.remembered = {}, {}
        if blobs:
            self.blobs, self.young = {}, set()

    def perform(self, task: ev.Effect, rng: random.Random) -> ev.Event:
        """Does a task of the training thread."""
        match task:
            case ev.Train(epoch, height, step, batch):
                k = self.distro.at(step).k - (self.role == "other k")
                kind = BAD if self.role == "malformed" else b"ok".ljust(len(BAD))
                blob = kind + sha256(self.identity.public, self.head, f"{epoch} {height}".encode()) + bytes(k)
                (start, end), *again = closed(batch)
                tokens = 0 if rng.random() < ABSTENTIONS else count(batch)
                self.buffers = sha256(self.buffers, self.identity.public)
                lrs = (7 if self.role == "rates" else 1,)
                result = Result(
                    epoch, height, step, start, end, 0, self.put(blob), len(blob), LAYOUT, lrs, 0, tokens, tuple(again)
                )
                return ev.Trained(epoch, height, result)
            case ev.Apply(epoch, height, step, payloads, lrs, due, _, prints, open_ids):
                assert all(len(self.blobs[payload]) == self.payload_size(step) for payload in payloads)
                if payloads:  # as in the runtime, an empty set leaves the parameters alone
                    self.head = sha256(self.head, *(self.blobs[payload] for payload in payloads), repr(lrs).encode())
                self.open_ids = open_ids
                return ev.Applied(epoch, height, self._store() if due else b"", self.head[:8] if prints else b"")
            case ev.TakeSnapshot(open_ids):
                self.open_ids = open_ids
                return ev.SnapshotTaken(self._store())
            case ev.ShareBuffers(epoch):
                return ev.BuffersTaken(epoch, self.put(self.buffers))
        raise AssertionError(task)

    def _store(self) -> bytes:
        return self.put(pack([self.head, self.open_ids]))

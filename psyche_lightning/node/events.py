"""What goes into the node core (events) and what comes out (effects); see :mod:`psyche_lightning.node.core`.

What the core asks of the coordinator is an effect, too: the requests of :mod:`psyche_lightning.protocol.requests`.

All are plain data: the runtime, the tests and the simulator carry them out, each with its own clock and network.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from psyche_lightning.node.agreement import DecidedRound
from psyche_lightning.node.notices import Finished, Notice
from psyche_lightning.protocol.messages import Envelope, Result
from psyche_lightning.protocol.open_ids import Interval, OpenIds
from psyche_lightning.protocol.requests import Request
from psyche_lightning.protocol.state import Round, RunState

# --- events ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StateSeen:
    """The coordinator's state changed; states in between may have been skipped."""

    state: RunState


@dataclass(frozen=True)
class RoundsSeen:
    """The answer to :class:`~psyche_lightning.protocol.requests.GetRounds`."""

    epoch: int
    first: int
    rounds: tuple[Round, ...]


@dataclass(frozen=True)
class Received:
    """A peer's message; its signature was verified."""

    envelope: Envelope


@dataclass(frozen=True)
class Trained:
    """The answer to :class:`Train`: an update whose payload is in the blob store.

    ``result`` is None when the batch gave no usable update (non-finite gradients, for example).
    """

    epoch: int
    height: int
    result: Result | None


@dataclass(frozen=True)
class Fetched:
    """The answer to :class:`Fetch`. ``reason`` is empty when the payload is stored and well-formed.

    ``refused`` tells a malformed payload, which no provider can mend, from one that could not be had.
    """

    payload: bytes
    reason: str = ""
    refused: bool = False


@dataclass(frozen=True)
class Applied:
    """The answer to :class:`Apply`.

    Attributes:
        epoch: as of the effect.
        height: as of the effect.
        digest: of the parameters afterwards where one was due, else empty.
        prints: a fingerprint of 8 bytes of each trained parameter afterwards, where they were asked for, else empty.
    """

    epoch: int
    height: int
    digest: bytes = b""
    prints: bytes = b""


@dataclass(frozen=True)
class Loaded:
    """The answer to :class:`Load`.

    Attributes:
        digest: as of the effect.
        reason: empty when the parameters now have that digest.
        open_ids: the data ids that are open after those parameters.
    """

    digest: bytes
    reason: str = ""
    open_ids: OpenIds = ()


@dataclass(frozen=True)
class SnapshotTaken:
    """The answer to :class:`TakeSnapshot`: the parameters' digest; their tensors are in the blob store."""

    digest: bytes


@dataclass(frozen=True)
class BuffersTaken:
    """The answer to :class:`ShareBuffers`: the hash of their index blob."""

    epoch: int
    index: bytes


@dataclass(frozen=True)
class BuffersLoaded:
    """The answer to :class:`LoadBuffers`; ``reason`` is empty when the buffers are those of the index."""

    index: bytes
    reason: str = ""


@dataclass(frozen=True)
class RequestFailed:
    """The coordinator refused or did not answer; ``code`` as in :class:`~psyche_lightning.errors.CoordinatorError`."""

    request: Request[Any]
    code: str
    text: str
    retryable: bool


@dataclass(frozen=True)
class Tick:
    """Time passed."""


Event = (
    StateSeen
    | RoundsSeen
    | Received
    | Trained
    | Fetched
    | Applied
    | Loaded
    | SnapshotTaken
    | BuffersTaken
    | BuffersLoaded
    | RequestFailed
    | Tick
)

# --- effects --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SetPeers:
    """The nodes to talk to: ``(node key, address)`` pairs without this node."""

    peers: tuple[tuple[bytes, str], ...]


@dataclass(frozen=True)
class Broadcast:
    """Send to every peer."""

    envelope: Envelope


@dataclass(frozen=True)
class SendTo:
    """Send to one peer."""

    peer: bytes
    envelope: Envelope


@dataclass(frozen=True)
class Promise:
    """Store durably before any later effect of the same list is carried out (invariant I8)."""

    key: str
    envelope: Envelope


@dataclass(frozen=True)
class Fetch:
    """Get a payload from the first provider that has it, check its form, store it."""

    payload: bytes
    size: int
    providers: tuple[bytes, ...]


@dataclass(frozen=True)
class Train:
    """Compute and compress the update for the data ids of ``batch``; store the payload."""

    epoch: int
    height: int
    step: int
    batch: tuple[Interval, ...]


@dataclass(frozen=True)
class Apply:
    """Apply the agreed payloads of a round (ascending commitment order) with the agreed learning rates.

    Attributes:
        epoch: of the run.
        height: of the round.
        payloads: what to apply.
        lrs: fp32 bits of the learning rate of each parameter group.
        digest_due: whether the parameters' digest is wanted.
        snapshot: whether their tensors are to be stored, too, so that peers can take them.
        prints: whether the fingerprints are wanted.
        open_ids: what is open after the round; part of the digest.
    """

    epoch: int
    height: int
    payloads: tuple[bytes, ...]
    lrs: tuple[int, ...]
    digest_due: bool = False
    snapshot: bool = False
    prints: bool = False
    open_ids: OpenIds = ()


@dataclass(frozen=True)
class Load:
    """Replace the parameters by those with that digest, from the own store or from peers."""

    digest: bytes
    providers: tuple[bytes, ...]


@dataclass(frozen=True)
class TakeSnapshot:
    """Put the parameters into the blob store and tell their digest, to which ``open_ids`` belong."""

    open_ids: OpenIds = ()


@dataclass(frozen=True)
class ShareBuffers:
    """Put the model's buffers into the blob store and tell their index."""

    epoch: int


@dataclass(frozen=True)
class LoadBuffers:
    """Replace the model's buffers by those with that index."""

    index: bytes
    providers: tuple[bytes, ...]


@dataclass(frozen=True)
class Diagnose:
    """Compare two parameter digests tensor by tensor and tell the first that differs, for people."""

    round: int
    mine: bytes
    theirs: bytes
    providers: tuple[bytes, ...]


@dataclass(frozen=True)
class Keep:
    """Everything in the blob store and among the promises but this is no longer needed.

    Attributes:
        snapshots: digests of parameters.
        payloads: hashes of payloads.
        promises: keys of promises.
    """

    snapshots: tuple[bytes, ...]
    payloads: tuple[bytes, ...]
    promises: tuple[str, ...]


@dataclass(frozen=True)
class WriteDown:
    """Rounds whose agreed set is certain, for this node's ledger."""

    records: tuple[DecidedRound, ...]


Effect = (
    SetPeers
    | Broadcast
    | SendTo
    | Promise
    | Fetch
    | Train
    | Apply
    | Load
    | TakeSnapshot
    | ShareBuffers
    | LoadBuffers
    | Diagnose
    | Keep
    | WriteDown
    | Notice
    | Finished
    | Request[Any]
)

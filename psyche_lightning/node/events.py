"""What goes into the node core (events) and what comes out (effects); see :mod:`psyche_lightning.node.core`.

Requests to the coordinator are effects, too; see :mod:`psyche_lightning.protocol.requests`.

All are plain data: the runtime, the tests and the simulator execute them, each with its own clock and network.
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

    ``refused`` marks a malformed payload, which no provider can mend, not a missing one.
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
        digest: of the parameters afterwards if it was due, else empty.
        prints: 8-byte fingerprint of each trained parameter afterwards if requested, else empty.
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
        open_ids: the data ids open after those parameters.
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
class Remember:
    """Store the announcements of a round durably, in place of earlier ones, as :class:`Promise` does."""

    key: str
    envelopes: tuple[Envelope, ...]


@dataclass(frozen=True)
class Fetch:
    """Get a payload of a step of the run from the first provider that has it, check it and store it."""

    payload: bytes
    size: int
    step: int
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
        step: of the round.
        payloads: what to apply.
        lrs: fp32 bits of the learning rate of each parameter group.
        digest_due: whether to compute the digest.
        snapshot: whether to store their tensors, too, so that peers can take them.
        prints: whether to compute fingerprints.
        open_ids: ids open after the round; part of the digest.
        loss: the round's training loss (:attr:`AgreedSet.loss`), for people and callbacks.
    """

    epoch: int
    height: int
    step: int
    payloads: tuple[bytes, ...]
    lrs: tuple[int, ...]
    digest_due: bool = False
    snapshot: bool = False
    prints: bool = False
    open_ids: OpenIds = ()
    loss: float | None = None


@dataclass(frozen=True)
class Load:
    """Load the parameters with that digest from this node's store or from peers."""

    digest: bytes
    providers: tuple[bytes, ...]


@dataclass(frozen=True)
class TakeSnapshot:
    """Store the parameters as blobs and report their digest, which covers ``open_ids``."""

    open_ids: OpenIds = ()


@dataclass(frozen=True)
class ShareBuffers:
    """Store the model's buffers as blobs and report their index."""

    epoch: int


@dataclass(frozen=True)
class LoadBuffers:
    """Load the model's buffers with that index."""

    index: bytes
    providers: tuple[bytes, ...]


@dataclass(frozen=True)
class Diagnose:
    """Compare two parameter digests by tensor and report the first difference to people."""

    round: int
    mine: bytes
    theirs: bytes
    providers: tuple[bytes, ...]


@dataclass(frozen=True)
class StartOver:
    """Begin with a new core from what is stored, as after a restart, and give it this state; no effect follows."""

    state: RunState


@dataclass(frozen=True)
class Keep:
    """Everything else in the blob store and the promises is no longer needed.

    Attributes:
        snapshots: digests of parameters.
        payloads: hashes of payloads.
        promises: keys of promises and of remembered announcements.
    """

    snapshots: tuple[bytes, ...]
    payloads: tuple[bytes, ...]
    promises: tuple[str, ...]


@dataclass(frozen=True)
class WriteDown:
    """Decided rounds, for this node's ledger."""

    records: tuple[DecidedRound, ...]


Effect = (
    SetPeers
    | Broadcast
    | SendTo
    | Promise
    | Remember
    | Fetch
    | Train
    | Apply
    | Load
    | TakeSnapshot
    | ShareBuffers
    | LoadBuffers
    | Diagnose
    | StartOver
    | Keep
    | WriteDown
    | Notice
    | Finished
    | Request[Any]
)

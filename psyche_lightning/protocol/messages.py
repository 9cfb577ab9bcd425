"""The messages that nodes gossip, and the signed envelope that carries them.

Messages are small (a payload travels as a blob that is fetched by hash). The signature covers the run's scope (its name
and incarnation), and each message names epoch and height in the clear, so two different results for one batch prove
equivocation (invariant I5).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, get_type_hints

from psyche_lightning.errors import CoordinatorError, WireError
from psyche_lightning.protocol.open_ids import Interval, half_open
from psyche_lightning.wire.canonical import HASH_SIZE, pack, sha256, unpack
from psyche_lightning.wire.identity import KEY_SIZE, SIGNATURE_SIZE, Identity, verify

MAX_MESSAGE_SIZE = 64 * 1024
MAX_COMMITMENTS = 1024
MAX_LEARNING_RATES = 64
MAX_AGAIN = 1024
PURPOSE = "psyche-lightning gossip 1"


@dataclass(frozen=True)
class Result:
    """A trainer's announcement of the compressed update of one batch; all fields are signed.

    Attributes:
        epoch: u16 epoch of the run.
        height: round height within the epoch, from 0.
        step: optimizer step of the run, from 1.
        start: first data id of the batch.
        end: last data id of the batch.
        nonce: number of updates that this trainer encoded before, since its optimizer state was empty.
        payload: SHA-256 of the payload blob.
        size: bytes of the payload blob.
        layout: digest of what the payload's positions mean (shapes, chunk, k).
        lrs: fp32 bits of the learning rate of each parameter group.
        loss: fp32 bits of the mean training loss of the batch; information only.
        tokens: tokens or samples of the batch. 0 is an abstention: the payload is empty, and the ids are trained again.
        again: further ids of the batch, which were not agreed in earlier rounds, as ``(first, last)``: ascending
            intervals that do not touch.
    """

    kind: ClassVar[int] = 0
    epoch: int
    height: int
    step: int
    start: int
    end: int
    nonce: int
    payload: bytes
    size: int
    layout: bytes
    lrs: tuple[int, ...]
    loss: int
    tokens: int
    again: tuple[tuple[int, int], ...] = ()

    @property
    def batch(self) -> tuple[Interval, ...]:
        """All data ids of the batch, half-open; the share of the round's own samples comes first."""
        return half_open(((self.start, self.end), *self.again))

    def commitment(self, scope: str, trainer: bytes) -> bytes:
        """The hash that witnesses list; it covers the run's scope, the trainer and all fields."""
        return sha256(b"psyche-lightning commitment 1", pack([scope, trainer, *_values(self)]))


@dataclass(frozen=True)
class Attest:
    """The results of a round that the sender verified, or those that were decided.

    The Merkle root over the list is what witnesses report. So the list needs no other proof, whoever sends it.

    Attributes:
        epoch: epoch of the run.
        height: height of the round whose results these are.
        commitments: ascending 32-byte commitment hashes, concatenated.
    """

    kind: ClassVar[int] = 1
    epoch: int
    height: int
    commitments: bytes

    def hashes(self) -> list[bytes]:
        """The commitment hashes, one by one."""
        return [self.commitments[i : i + HASH_SIZE] for i in range(0, len(self.commitments), HASH_SIZE)]


@dataclass(frozen=True)
class Ask:
    """A request to send again every stored :class:`Result` and :class:`Attest` of one round.

    Attributes:
        epoch: epoch of the run.
        height: round height.
        attempt: increases, so that a repeated request does not look like a duplicate.
    """

    kind: ClassVar[int] = 2
    epoch: int
    height: int
    attempt: int


@dataclass(frozen=True)
class Buffers:
    """Where the first witness of an epoch keeps the model's buffers (BatchNorm statistics and the like).

    Attributes:
        epoch: epoch of the run.
        index: SHA-256 of the index blob of the buffers.
    """

    kind: ClassVar[int] = 3
    epoch: int
    index: bytes


@dataclass(frozen=True)
class Offer:
    """Parameters within the epoch that the sender keeps, so that other nodes need not replay earlier rounds.

    Attributes:
        epoch: epoch of the run.
        applied: height before which all results are applied in them.
        snapshot: their digest.
    """

    kind: ClassVar[int] = 4
    epoch: int
    applied: int
    snapshot: bytes


@dataclass(frozen=True)
class Stuck:
    """The sender cannot apply a round, because no peer has what it needs. It asks for an :class:`Offer`.

    Attributes:
        epoch: epoch of the run.
        height: height of the round.
        attempt: increases, so that a repeated request does not look like a duplicate.
    """

    kind: ClassVar[int] = 5
    epoch: int
    height: int
    attempt: int


Message = Result | Attest | Ask | Buffers | Offer | Stuck
_KINDS: dict[int, type[Message]] = {cls.kind: cls for cls in (Result, Attest, Ask, Buffers, Offer, Stuck)}
_HINTS = {cls: get_type_hints(cls) for cls in _KINDS.values()}
_HASHES = {"payload", "layout", "index", "snapshot"}


@dataclass(frozen=True)
class Envelope:
    """A message with its sender and the exact signed bytes, which can be sent on unchanged.

    Attributes:
        sender: 32-byte public key of the signer.
        message: the decoded message.
        raw: the envelope's bytes: sender, signature, message.
    """

    sender: bytes
    message: Message
    raw: bytes


def _values(message: Message) -> list[Any]:
    return [getattr(message, field.name) for field in dataclasses.fields(message)]


def _check(message: Message) -> None:
    """Refuse values that are out of range, both when sending and when receiving."""
    for field in dataclasses.fields(message):
        value = getattr(message, field.name)
        hint = _HINTS[type(message)][field.name]
        if hint is int and (type(value) is not int or not 0 <= value < 1 << 64):
            raise WireError(f"{type(message).__name__}.{field.name} is not an unsigned 64-bit integer")
        if hint is bytes and not isinstance(value, bytes):
            raise WireError(f"{type(message).__name__}.{field.name} is not a byte string")
        if field.name in _HASHES and len(value) != HASH_SIZE:
            raise WireError(f"{type(message).__name__}.{field.name} has {len(value)} bytes, not {HASH_SIZE}")
    if isinstance(message, Result):
        if message.end < message.start:
            raise WireError(f"a batch from {message.start} to {message.end} is empty")
        if not 0 < len(message.lrs) <= MAX_LEARNING_RATES:
            raise WireError(f"{len(message.lrs)} learning rates; 1 to {MAX_LEARNING_RATES} are accepted")
        if any(type(bits) is not int or not 0 <= bits < 1 << 32 for bits in (*message.lrs, message.loss)):
            raise WireError("learning rates and loss are the bits of 32-bit floats")
        if len(message.again) > MAX_AGAIN or any(
            type(pair) is not tuple or [type(n) for n in pair] != [int, int] or not 0 <= pair[0] <= pair[1] < 1 << 64
            for pair in message.again
        ):
            raise WireError(f"the ids trained again must be at most {MAX_AGAIN} intervals [first, last]")
        if any(a[1] + 1 >= b[0] for a, b in itertools.pairwise(message.again)):
            raise WireError("the ids trained again are not in ascending order, or their intervals touch")
    if isinstance(message, Attest):
        if len(message.commitments) % HASH_SIZE or len(message.commitments) > MAX_COMMITMENTS * HASH_SIZE:
            raise WireError(f"a list of {len(message.commitments)} bytes is not up to {MAX_COMMITMENTS} hashes")
        hashes = message.hashes()
        if any(a >= b for a, b in itertools.pairwise(hashes)):
            raise WireError("the commitments of a list are not in ascending order")


def seal(identity: Identity, scope: str, message: Message) -> Envelope:
    """Sign a message.

    Layout: sender (32 bytes), Ed25519 signature (64 bytes), canonical msgpack of ``[kind, *fields]``; the signature
    covers the purpose, the run's scope (``RunState.scope``) and that msgpack.

    Raises:
        WireError: a field is out of range.
    """
    _check(message)
    body = pack([message.kind, *_values(message)])
    raw = identity.public + identity.sign(PURPOSE, scope, body) + body
    return Envelope(identity.public, message, raw)


def open_envelope(raw: bytes, scope: str) -> Envelope:
    """Decode and verify what :func:`seal` made.

    Raises:
        WireError: the bytes are too long or not canonical, the kind is unknown, a field is out of range, or the
            signature is wrong.
    """
    head = KEY_SIZE + SIGNATURE_SIZE
    if not head < len(raw) <= MAX_MESSAGE_SIZE:
        raise WireError(f"an envelope of {len(raw)} bytes; {head + 1} to {MAX_MESSAGE_SIZE} are accepted")
    sender, signature, body = raw[:KEY_SIZE], raw[KEY_SIZE:head], raw[head:]
    values = unpack(body, max_size=MAX_MESSAGE_SIZE)
    if not isinstance(values, list) or not values or type(values[0]) is not int or values[0] not in _KINDS:
        raise WireError("an envelope holds a list that starts with a known message kind")
    cls = _KINDS[values[0]]
    names = [field.name for field in dataclasses.fields(cls)]
    if len(values) != len(names) + 1:
        raise WireError(f"a {cls.__name__} has {len(names)} fields, not {len(values) - 1}")
    fields = dict(zip(names, values[1:], strict=True))
    if "lrs" in fields:
        if not isinstance(fields["lrs"], list):
            raise WireError("the learning rates are a list")
        fields["lrs"] = tuple(fields["lrs"])
    if "again" in fields:
        if not isinstance(fields["again"], list) or not all(isinstance(pair, list) for pair in fields["again"]):
            raise WireError("the ids trained again are a list of lists")
        fields["again"] = tuple(map(tuple, fields["again"]))
    message: Message = cls(**fields)
    _check(message)
    if not verify(sender, PURPOSE, scope, body, signature):
        raise WireError(f"wrong signature on a {cls.__name__} that claims to come from {sender[:4].hex()}")
    return Envelope(sender, message, raw)


def commitments(run_id: str, envelopes: Iterable[Envelope]) -> list[bytes]:
    """The commitments of the results among signed messages, in ascending order, as lists have them."""
    results = [(envelope.sender, envelope.message) for envelope in envelopes]
    return sorted(each.commitment(run_id, sender) for sender, each in results if isinstance(each, Result))


def equivocator(scope: str, first: bytes, second: bytes) -> bytes:
    """The node key of the trainer that signed two different results.

    Args:
        scope: the run's scope; results of another run or incarnation prove nothing.
        first: one signed result, as it was gossiped.
        second: the other signed result.

    Raises:
        CoordinatorError: they do not prove equivocation (``InvalidAccusation``).
    """
    try:
        one, other = open_envelope(first, scope), open_envelope(second, scope)
    except WireError as error:
        raise CoordinatorError(f"the proof cannot be read: {error}", code="InvalidAccusation") from error
    a, b = one.message, other.message
    same = isinstance(a, Result) and isinstance(b, Result) and (a.epoch, a.height) == (b.epoch, b.height)
    if not same or one.sender != other.sender or a == b:
        raise CoordinatorError(
            "a proof of equivocation is two different results of one trainer for one round", code="InvalidAccusation"
        )
    return one.sender

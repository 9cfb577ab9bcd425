"""What travels between a node and the coordinator's server over their websocket.

The server speaks first. Its frames are text: JSON lists that start with a word.

- ``["hello", version, challenge, [key, incarnation, salt, proof]]``, all in hex. The challenge is the SHA-256 of the
  coordinator's public key, the run's scope and a salt that is new for each connection; the proof is the coordinator's
  signature of the challenge, and of a nonce if the node's address of the websocket has one (``?nonce=`` and hex).
- ``["state", {...}]``: the full state without Bloom filters; then ``["change", nonce, {...}]``: the differences from
  the state with that nonce.
- ``["ok", number, result]`` or ``["error", number, {"error", "code", "retryable", ...}]``: the answer to a request.
  Number 0 concerns the connection itself, which the server then closes.

The node's frames are binary. The first one proves the node's key: it holds the public key, the signature of the
challenge and, if the node has a join link or the owner's token, the proof of it
(:func:`~psyche_lightning.protocol.link.join_proof`). Each further frame is a request: a signature, then the canonical
msgpack of ``[number, name, values]``. The signature covers purpose, run id, challenge and that msgpack, and numbers
increase within a connection. So a recorded request is refused on the same connection because its number was used, and
on every other one because the challenge differs. A connection that never proves a key can only watch.

The node computes the challenge itself, so everything that it signs names this coordinator and this incarnation of the
run. A server that passes on another one's challenge as its own gets no signature: its key does not give that challenge.
A server that passes on everything unchanged is only a part of the way to the coordinator.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from psyche_lightning.errors import CoordinatorError, ManifestMismatchError, PsycheError, WireError
from psyche_lightning.protocol.link import PROOF_SIZE, join_proof
from psyche_lightning.protocol.state import INCARNATION_SIZE, scope_of
from psyche_lightning.text import plain
from psyche_lightning.wire.canonical import pack, sha256, unpack
from psyche_lightning.wire.identity import KEY_SIZE, SIGNATURE_SIZE, Identity, short, verify

VERSION = 2
SALT_SIZE = 32
NONCE_SIZE = 32
MAX_FRAME_SIZE = 8 * 1024 * 1024
CLOSE_REPLACED = 4001
CLOSE_REFUSED = 4002
CHALLENGE = b"psyche-lightning coordinator challenge 1"
GREETING = "psyche-lightning coordinator greeting 1"
HELLO = "psyche-lightning coordinator hello 1"
REQUEST = "psyche-lightning coordinator request 1"

SYNC = "sync"
"""Requests the full state again; it concerns the connection, not the run."""


@dataclass(frozen=True)
class Greeting:
    """Who speaks, at the server's end of a connection.

    Attributes:
        coordinator: the coordinator's public key.
        incarnation: the run's.
        challenge: what the node's signatures on this connection cover.
    """

    coordinator: bytes
    incarnation: bytes
    challenge: bytes


def greet(identity: Identity, run_id: str, incarnation: bytes, salt: bytes, nonce: bytes) -> tuple[bytes, list[Any]]:
    """The server's first frame.

    Args:
        identity: the coordinator's key.
        run_id: the run.
        incarnation: the run's.
        salt: 32 random bytes, new for each connection.
        nonce: the node's; empty if it gave none.

    Returns:
        The connection's challenge, and the frame.
    """
    scope = scope_of(run_id, incarnation)
    challenge = _challenge(identity.public, scope, salt)
    proof = identity.sign(GREETING, scope, challenge + nonce)
    facts = [part.hex() for part in (identity.public, incarnation, salt, proof)]
    return challenge, ["hello", VERSION, challenge.hex(), facts]


def open_greeting(values: list[Any], run_id: str, nonce: bytes) -> Greeting:
    """Verify what :func:`greet` made, but for its first word and version.

    Raises:
        WireError: it is malformed, or the server does not prove its key.
    """
    try:
        challenge, (key, incarnation, salt, proof) = bytes.fromhex(values[0]), map(bytes.fromhex, values[1])
    except (IndexError, TypeError, ValueError) as error:
        raise WireError("its greeting is not a challenge, a key, an incarnation, a salt and a proof") from error
    if len(incarnation) not in (0, INCARNATION_SIZE) or len(salt) != SALT_SIZE or len(key) != KEY_SIZE:
        raise WireError("its greeting has a key, an incarnation or a salt of a wrong size")
    scope = scope_of(run_id, incarnation)
    if challenge != _challenge(key, scope, salt) or not verify(key, GREETING, scope, challenge + nonce, proof):
        raise WireError(f"it does not prove the coordinator's key {short(key)}, which it shows")
    return Greeting(key, incarnation, challenge)


def _challenge(coordinator: bytes, scope: str, salt: bytes) -> bytes:
    return sha256(CHALLENGE, pack([coordinator, scope, salt]))


@dataclass(frozen=True)
class Frame:
    """A verified frame of a node.

    Attributes:
        number: increases within a connection, from 1.
        name: name of the request, or :data:`SYNC`.
        values: the request's fields, not yet checked; see :func:`~psyche_lightning.protocol.requests.decode`.
    """

    number: int
    name: str
    values: Any


def seal_hello(identity: Identity, run_id: str, challenge: bytes, secret: bytes = b"") -> bytes:
    """The node's first frame: its 32-byte public key, its 64-byte signature of the challenge, the proof of a secret."""
    proof = join_proof(secret, challenge, identity.public) if secret else b""
    return identity.public + identity.sign(HELLO, run_id, challenge) + proof


def open_hello(frame: bytes, run_id: str, challenge: bytes) -> tuple[bytes, bytes]:
    """Verify a first frame.

    Returns:
        The node's public key, and its proof of a secret, not yet compared; empty if it has none.

    Raises:
        WireError: it has another size, or its signature is wrong.
    """
    head = KEY_SIZE + SIGNATURE_SIZE
    if len(frame) not in (head, head + PROOF_SIZE):
        raise WireError(
            f"the first frame has {len(frame)} bytes; expected a key of {KEY_SIZE}, a signature of {SIGNATURE_SIZE} "
            f"and perhaps a proof of {PROOF_SIZE}"
        )
    public, signature, proof = frame[:KEY_SIZE], frame[KEY_SIZE:head], frame[head:]
    if not verify(public, HELLO, run_id, challenge, signature):
        raise WireError(f"wrong signature on the hello of {short(public)} for run {run_id!r}")
    return public, proof


def seal_frame(identity: Identity, run_id: str, challenge: bytes, number: int, name: str, values: list[Any]) -> bytes:
    """Sign a request; the module's description shows the layout."""
    body = pack([number, name, values])
    return identity.sign(REQUEST, run_id, challenge + body) + body


def open_frame(frame: bytes, public: bytes, run_id: str, challenge: bytes, last: int) -> Frame:
    """Verify what :func:`seal_frame` made.

    Args:
        frame: the websocket message.
        public: the public key of the connection.
        run_id: the run.
        challenge: the connection's challenge.
        last: number of the connection's latest request.

    Raises:
        WireError: the signature is wrong, the frame is malformed, or its number was used before.
    """
    signature, body = frame[:SIGNATURE_SIZE], frame[SIGNATURE_SIZE:]
    if not verify(public, REQUEST, run_id, challenge + body, signature):
        raise WireError(
            f"wrong signature on a request of {short(public)}: it was changed on the way, replayed from another "
            f"connection, or meant for another run than {run_id!r}"
        )
    value = unpack(body, max_size=MAX_FRAME_SIZE)
    if not isinstance(value, list) or len(value) != 3:
        raise WireError("a request is a list of number, name and values")
    number, name, values = value
    if type(number) is not int or number <= last:
        raise WireError(f"request number {number!r} after {last}: it was replayed; numbers must increase")
    if not isinstance(name, str):
        raise WireError(f"the name of a request is {type(name).__name__}; expected text")
    return Frame(number, name, values)


def problem(error: PsycheError, *, choices: list[str] | None = None) -> dict[str, Any]:
    """``{"error", "code", "retryable"}``, and ``"differences"`` or ``"choices"`` if there are any."""
    result: dict[str, Any] = {
        "error": str(error),
        "code": getattr(error, "code", type(error).__name__),
        "retryable": getattr(error, "retryable", False),
    }
    if isinstance(error, ManifestMismatchError):
        result["differences"] = error.differences
    if choices is not None:
        result["choices"] = choices
    return result


def coordinator_error(value: Any) -> CoordinatorError:
    """The error that :func:`problem` described, in words safe to show; other values become a plain error."""
    if not isinstance(value, dict) or not isinstance(value.get("error"), str):
        return CoordinatorError("the coordinator refused without giving a reason")
    text = plain(value["error"], lines=True)
    differences = value.get("differences")
    if isinstance(differences, list) and all(isinstance(row, list) and len(row) == 3 for row in differences):
        return ManifestMismatchError(text, [(str(field), run, own) for field, run, own in differences])
    code = value.get("code")
    return CoordinatorError(
        text, code=plain(code) if isinstance(code, str) else "Coordinator", retryable=value.get("retryable") is True
    )

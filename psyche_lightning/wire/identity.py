"""A node's Ed25519 key, and signatures that always name their purpose and scope (invariant I5)."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from psyche_lightning import system
from psyche_lightning.errors import ConfigError

KEY_SIZE = 32
SIGNATURE_SIZE = 64


def short(key: bytes) -> str:
    """The first four bytes of a key in hex, for tables and logs."""
    return key[:4].hex()


def _statement(purpose: str, scope: str, payload: bytes) -> bytes:
    """The bytes to sign: purpose and scope with their lengths, then the payload. So no two statements are equal."""
    head = b""
    for text in (purpose, scope):
        raw = text.encode()
        if len(raw) > 255:
            raise ConfigError(f"{text[:40]!r}... has {len(raw)} bytes; a purpose or scope has at most 255")
        head += bytes([len(raw)]) + raw
    return head + payload


class Identity:
    """An Ed25519 key pair; the public key is the node's name on every transport.

    Args:
        secret: 32 raw secret bytes. They are never logged and never part of an error or ``repr``.
    """

    def __init__(self, secret: bytes) -> None:
        if len(secret) != KEY_SIZE:
            raise ConfigError(f"an identity has {KEY_SIZE} secret bytes, not {len(secret)}")
        self._key = Ed25519PrivateKey.from_private_bytes(secret)
        self.public: bytes = self._key.public_key().public_bytes_raw()

    def __repr__(self) -> str:
        return f"Identity({short(self.public)})"

    @classmethod
    def generate(cls) -> Identity:
        """A new random identity."""
        return cls(os.urandom(KEY_SIZE))

    @classmethod
    def load_or_create(cls, path: Path, whose: str = "node") -> Identity:
        """Read a key from ``path``, or create the file (mode 0600) with a new one.

        The file has the 32 raw secret bytes and behind them the 32 of the public key, which shows damage. Version 0.1
        wrote the secret ones alone; such a file is read, too.

        Args:
            path: the file.
            whose: whose key it is, for messages.

        Raises:
            ConfigError: the file exists but is damaged, others may read it, or it cannot be read or written.
        """
        try:
            if path.exists():
                return cls(_secret(_read(path, whose), path, whose))
            path.parent.mkdir(parents=True, exist_ok=True)
            made = cls.generate()
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(made.secret_bytes() + made.public)
                file.flush()
                os.fsync(file.fileno())
            return made
        except OSError as error:
            raise ConfigError(f"cannot read or create the {whose} key {path}: {error.strerror}") from error

    def secret_bytes(self) -> bytes:
        """The 32 raw secret bytes, for a library that proves the node's key by itself, such as QUIC."""
        return self._key.private_bytes_raw()

    def sign_raw(self, payload: bytes) -> bytes:
        """A plain 64-byte Ed25519 signature over ``payload`` (Psyche's form)."""
        return self._key.sign(payload)

    def sign(self, purpose: str, scope: str, payload: bytes) -> bytes:
        """Sign ``payload`` for one purpose within one scope (see ``RunState.scope``); 64 bytes."""
        return self.sign_raw(_statement(purpose, scope, payload))


def _read(path: Path, whose: str) -> bytes:
    with path.open("rb") as file:
        if system.open_to_others(file):
            raise ConfigError(
                f"other users can read the {whose} key {path}, and sign as this {whose}. Close it with "
                f"`chmod 600 {shlex.quote(str(path))}`. If one of them may have read it, remove the file instead: the "
                f"{whose} then has a new key."
            )
        return file.read(2 * KEY_SIZE + 1)


def _secret(data: bytes, path: Path, whose: str) -> bytes:
    """The secret bytes in a key file; no part of them is in the error."""
    secret, public = data[:KEY_SIZE], data[KEY_SIZE:]
    wrong = ""
    if len(data) not in (KEY_SIZE, 2 * KEY_SIZE):
        wrong = f"it has {len(data) if len(data) <= 2 * KEY_SIZE else 'more'} bytes, not {2 * KEY_SIZE}"
    elif public and public != Identity(secret).public:
        wrong = "its secret and its public half do not belong together"
    if wrong:
        raise ConfigError(
            f"the {whose} key {path} is damaged: {wrong}. Restore the file from a copy. If there is none, remove it:"
            f" the {whose} then has a new key, and is another one to everybody."
        )
    return secret


def verify(public: bytes, purpose: str, scope: str, payload: bytes, signature: bytes) -> bool:
    """Whether ``signature`` is the one of ``public`` over ``payload`` for that purpose and scope; never raises."""
    if len(public) != KEY_SIZE or len(signature) != SIGNATURE_SIZE:
        return False
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, _statement(purpose, scope, payload))
    except (InvalidSignature, ValueError):
        return False
    return True

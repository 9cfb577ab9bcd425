"""Mutual authentication of two nodes over TLS 1.3, by their Ed25519 node keys.

Each process makes a fresh TLS key with a self-signed certificate that says nothing about who it is. TLS gives a secret
channel to *whoever holds the key of that certificate*; the node keys then say who that is, and who the client is::

    server -> client   HELLO   version, server key B, challenge c,
                               sign_B("psyche-lightning tcp server 1", run, SHA-256(certificate))
    client -> server   PROOF   client key A, sign_A("psyche-lightning tcp client 1", run, c | B | SHA-256(certificate))
    server -> client   WELCOME, or GOODBYE with the reason

Why nobody can stand in the middle, nor use what was heard elsewhere:

* *The client knows the server.* In TLS 1.3 the server signs the transcript of this very handshake with the key of its
  certificate. The HELLO signature is node B's word that this certificate is its own, in this run. Someone in the middle
  must show a certificate whose key they hold, for which B has signed nothing; B's HELLO, passed on, names another
  certificate than the one that the client sees. Passing on the TLS bytes untouched is what any router does.
* *The server knows the client.* The client sends its proof only into a channel whose other end it knows to be B. The
  proof names B, B's certificate and a challenge that B drew for this connection alone. So a proof that M received from
  A (who meant to talk to M) names M and is worthless at B, even with B's challenge passed to A; a proof recorded at B
  answers an old challenge; and nobody but B can read a proof for B before it is used.
* *Nothing else can pass for these signatures*, nor they for others: each starts with its purpose and the run id.
* Whether the proven key is one of the current peers is decided after that, so that a stranger learns only what B is.

The node's secret never leaves the process: only the fresh TLS key is written, to a private folder that is gone at once,
because Python's ``ssl`` loads keys from files only. Sessions are not resumed, so every connection proves all of this.
"""

from __future__ import annotations

import asyncio
import datetime
import os
import secrets
import ssl
import tempfile
from collections.abc import Callable
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from psyche_lightning.errors import TransportError
from psyche_lightning.transports.framing import Kind, frame, goodbye, goodbye_text, read_frame
from psyche_lightning.wire.canonical import sha256
from psyche_lightning.wire.identity import KEY_SIZE, Identity, short, verify

VERSION = 2
CHALLENGE_SIZE = 32
SERVER_PURPOSE = "psyche-lightning tcp server 1"
CLIENT_PURPOSE = "psyche-lightning tcp client 1"
WRONG_PROOF = "wrong proof of identity, or another run"


class HandshakeError(TransportError):
    """The other side did not prove what it had to, or refused; the text is the reason."""


class RefusedError(HandshakeError):
    """The other side proved who it is, and refused this node."""


class UnwelcomeError(HandshakeError):
    """The other side proved who it is, and is not welcome now."""


class Handshake:
    """One node's side of all its handshakes: TLS contexts with a fresh key, and the proofs above.

    Args:
        identity: the node's key.
        run_id: the run; nodes of another run fail.

    Attributes:
        server_context: TLS settings for accepted connections.
        client_context: TLS settings for dialled connections.
    """

    def __init__(self, identity: Identity, run_id: str) -> None:
        self._identity = identity
        self._run_id = run_id
        key = Ed25519PrivateKey.generate()
        certificate = _certificate(key)
        binding = sha256(certificate.public_bytes(Encoding.DER))
        self._binding = binding
        self._hello = identity.public, identity.sign(SERVER_PURPOSE, run_id, binding)
        self.server_context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.server_context.minimum_version = ssl.TLSVersion.TLSv1_3
        self.server_context.num_tickets = 0
        _load(self.server_context, key, certificate)
        self.client_context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self.client_context.minimum_version = ssl.TLSVersion.TLSv1_3
        # No authority vouches for these certificates: the HELLO does, in meet().
        self.client_context.check_hostname = False
        self.client_context.verify_mode = ssl.CERT_NONE

    async def meet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, expected: bytes) -> None:
        """The client's part.

        Args:
            reader: the TLS connection.
            writer: the same.
            expected: public key of the node that the server must be.

        Raises:
            HandshakeError: the server is someone else.
            RefusedError: it refused this node.
            WireError: the server sent what is no handshake.
            EOFError, OSError: the connection ended.
        """
        encrypted: ssl.SSLObject | None = writer.get_extra_info("ssl_object")
        certificate = encrypted.getpeercert(binary_form=True) if encrypted else None
        if certificate is None:
            raise HandshakeError("the connection is not encrypted")
        binding = sha256(certificate)
        _, hello = await read_frame(reader, {Kind.HELLO})
        server, challenge, signature = hello[1:33], hello[33:65], hello[65:]
        if hello[0] != VERSION:
            raise HandshakeError(f"it speaks version {hello[0]} of this transport, this node {VERSION}")
        if server != expected:
            raise HandshakeError(f"another node answers there: {short(server)}")
        if not verify(expected, SERVER_PURPOSE, self._run_id, binding, signature):
            raise HandshakeError("what answers there does not hold the peer's key in this run")
        proof = self._identity.sign(CLIENT_PURPOSE, self._run_id, challenge + expected + binding)
        writer.write(frame(Kind.PROOF, self._identity.public, proof))
        kind, body = await read_frame(reader, {Kind.WELCOME, Kind.GOODBYE})
        if kind == Kind.GOODBYE:
            raise RefusedError(f"it refused: {goodbye_text(body)}")

    async def admit(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        objection: Callable[[bytes], str | None],
    ) -> bytes:
        """The server's part.

        Args:
            reader: the TLS connection.
            writer: the same.
            objection: why a client with this (proven) key is not welcome, or None.

        Returns:
            The public key of the client, proven.

        Raises:
            HandshakeError: the client proved nothing.
            UnwelcomeError: there is an objection.
            WireError: the client sent what is no handshake.
            EOFError, OSError: the connection ended.
        """
        challenge = secrets.token_bytes(CHALLENGE_SIZE)
        key, signature = self._hello
        writer.write(frame(Kind.HELLO, bytes([VERSION]), key, challenge, signature))
        _, body = await read_frame(reader, {Kind.PROOF})
        client, proof = body[:KEY_SIZE], body[KEY_SIZE:]
        if not verify(client, CLIENT_PURPOSE, self._run_id, challenge + key + self._binding, proof):
            writer.write(goodbye(WRONG_PROOF))
            raise HandshakeError(WRONG_PROOF)
        reason = objection(client)
        if reason is not None:
            writer.write(goodbye(reason))
            raise UnwelcomeError(f"{short(client)} is not welcome: {reason}")
        writer.write(frame(Kind.WELCOME))
        return client


def _certificate(key: Ed25519PrivateKey) -> x509.Certificate:
    """A minimal certificate; nothing in it is ever relied on but its key."""
    name = x509.Name([])
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(datetime.datetime(2000, 1, 1))
        .not_valid_after(datetime.datetime(9999, 12, 31))
        .sign(key, None)
    )


def _load(context: ssl.SSLContext, key: Ed25519PrivateKey, certificate: x509.Certificate) -> None:
    """Give key and certificate to ``ssl``, which reads files only: in a folder of mode 0700 that goes at once."""
    secret = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    with tempfile.TemporaryDirectory(prefix="psyche-tls-") as folder:
        path = Path(folder) / "pem"
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(secret + certificate.public_bytes(Encoding.PEM))
        context.load_cert_chain(path)

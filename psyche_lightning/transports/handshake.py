"""Mutual authentication of two nodes over TLS 1.3, by their Ed25519 node keys.

Each process makes a fresh TLS key with a self-signed certificate that names nobody. TLS gives a secret channel to
*whoever holds the key of that certificate*. The node keys then prove who that is, and who the client is::

    server -> client   HELLO   version, server key B, challenge c,
                               sign_B("psyche-lightning tcp server 1", scope, SHA-256(certificate))
    client -> server   PROOF   client key A,
                               sign_A("psyche-lightning tcp client 1", scope, c | B | SHA-256(certificate))
    server -> client   WELCOME, or GOODBYE with the reason

Why nobody can stand in the middle, or use a message that was recorded elsewhere:

* *The client knows the server.* In TLS 1.3 the server signs the transcript of this handshake with the key of its
  certificate. The HELLO signature is node B's statement that this certificate is its own, in this run. Someone in the
  middle must show a certificate whose key they hold, and B has signed nothing for that certificate. If they pass on B's
  HELLO, it names another certificate than the one that the client sees. Passing on the TLS bytes unchanged is only what
  any router does.
* *The server knows the client.* The client sends its proof only into a channel whose other end it knows to be B. The
  proof names B, B's certificate and a challenge that B drew for this connection alone. So a proof that M received from
  A (who meant to talk to M) names M and is worthless at B, even if M passed B's challenge to A. A proof recorded at B
  answers an old challenge. And nobody but B can read a proof for B before it is used.
* *Nothing else can pass for these signatures*, and they cannot pass for others: each starts with its purpose and the
  run's scope, which also tells it from a former run of the same name.
* The server decides after the proof whether the key is a current peer, so a stranger learns only who B is.

The node's secret never leaves the process. Only the fresh TLS key is written to a private folder, which is deleted at
once, because Python's ``ssl`` loads keys from files only. Sessions are not resumed, so all of this is proved each time.
"""

from __future__ import annotations

import asyncio
import secrets
import ssl
from collections.abc import Callable

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding

from psyche_lightning.errors import TransportError
from psyche_lightning.transports.framing import Kind, frame, goodbye, goodbye_text, read_frame
from psyche_lightning.wire.canonical import sha256
from psyche_lightning.wire.certificate import client_context, self_signed, server_context
from psyche_lightning.wire.identity import KEY_SIZE, Identity, short, verify

VERSION = 3
CHALLENGE_SIZE = 32
SERVER_PURPOSE = "psyche-lightning tcp server 1"
CLIENT_PURPOSE = "psyche-lightning tcp client 1"
WRONG_PROOF = "wrong proof of identity, or another run"


class HandshakeError(TransportError):
    """The other side did not prove its key, or refused this node; the text is the reason."""


class RefusedError(HandshakeError):
    """The other side proved its key, and refused this node."""


class UnwelcomeError(HandshakeError):
    """The other side proved its key, and this node refuses it now."""


class Handshake:
    """One node's side of all its handshakes: TLS contexts with a fresh key, and the proofs.

    Args:
        identity: the node's key.
        scope: names the run and its incarnation; handshakes with nodes of another one fail.

    Attributes:
        server_context: TLS settings for accepted connections.
        client_context: TLS settings for dialled connections.
    """

    def __init__(self, identity: Identity, scope: str) -> None:
        self._identity = identity
        self._scope = scope
        key = Ed25519PrivateKey.generate()
        certificate = self_signed(key)
        binding = sha256(certificate.public_bytes(Encoding.DER))
        self._binding = binding
        self._hello = identity.public, identity.sign(SERVER_PURPOSE, scope, binding)
        self.server_context = server_context(key, certificate)
        self.client_context = client_context()  # meet() checks the HELLO in place of the certificate

    async def meet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, expected: bytes) -> None:
        """Do the client's part.

        Args:
            reader: the TLS connection.
            writer: the same.
            expected: public key that the server must prove.

        Raises:
            HandshakeError: the server is another node.
            RefusedError: the server refused this node.
            WireError: the server sent something other than a handshake.
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
            raise HandshakeError(f"another node answers at this address: {short(server)}")
        if not verify(expected, SERVER_PURPOSE, self._scope, binding, signature):
            raise HandshakeError("the node at this address does not prove the peer's key in this run")
        proof = self._identity.sign(CLIENT_PURPOSE, self._scope, challenge + expected + binding)
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
        """Do the server's part.

        Args:
            reader: the TLS connection.
            writer: the same.
            objection: returns why a client with this (proven) key is refused, or None.

        Returns:
            The client's public key, proven.

        Raises:
            HandshakeError: the client did not prove a key.
            UnwelcomeError: there is an objection.
            WireError: the client sent something other than a handshake.
            EOFError, OSError: the connection ended.
        """
        challenge = secrets.token_bytes(CHALLENGE_SIZE)
        key, signature = self._hello
        writer.write(frame(Kind.HELLO, bytes([VERSION]), key, challenge, signature))
        _, body = await read_frame(reader, {Kind.PROOF})
        client, proof = body[:KEY_SIZE], body[KEY_SIZE:]
        if not verify(client, CLIENT_PURPOSE, self._scope, challenge + key + self._binding, proof):
            writer.write(goodbye(WRONG_PROOF))
            raise HandshakeError(WRONG_PROOF)
        reason = objection(client)
        if reason is not None:
            writer.write(goodbye(reason))
            raise UnwelcomeError(f"{short(client)} is refused: {reason}")
        writer.write(frame(Kind.WELCOME))
        return client

"""Certificates that name nobody: only their key matters, and whoever meets one knows the key in another way."""

from __future__ import annotations

import datetime
import os
import ssl
import tempfile
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat


def self_signed(key: Ed25519PrivateKey) -> x509.Certificate:
    """A minimal certificate of that key."""
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


def server_context(key: Ed25519PrivateKey, certificate: x509.Certificate) -> ssl.SSLContext:
    """Settings for accepted connections: TLS 1.3, without sessions that are resumed.

    Python's ``ssl`` reads keys from files only: the key lies in a folder of mode 0700 that is deleted at once.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.num_tickets = 0
    secret = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    with tempfile.TemporaryDirectory(prefix="psyche-tls-") as folder:
        path = Path(folder) / "pem"
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(secret + certificate.public_bytes(Encoding.PEM))
        context.load_cert_chain(path)
    return context


def client_context() -> ssl.SSLContext:
    """Settings for dialled connections: TLS 1.3, and the certificate is for the caller to check."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def is_of(key: bytes, certificate: bytes | None) -> bool:
    """Whether a certificate (DER, from a connection whose other end proved it) has that Ed25519 public key."""
    try:
        found = x509.load_der_x509_certificate(certificate or b"").public_key()
    except ValueError:
        return False
    return isinstance(found, Ed25519PublicKey) and found.public_bytes_raw() == key

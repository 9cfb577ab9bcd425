"""SHA-256, the one hash of the wire: blobs, commitments and digests are all addressed by it."""

from __future__ import annotations

import hashlib

HASH_SIZE = 32
ZERO_HASH = bytes(HASH_SIZE)


def sha256(*parts: bytes | memoryview) -> bytes:
    """Hash the concatenation of ``parts`` (spec: ``S(x, y, ...)``)."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.digest()

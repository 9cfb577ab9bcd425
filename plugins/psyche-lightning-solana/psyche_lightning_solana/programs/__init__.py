"""The on-chain programs as built from ``program/`` in the repository; ``SHA256SUMS`` has their digests."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent
NAMES = ("authorizer", "coordinator", "treasurer")


def image(name: str) -> bytes:
    """The ELF shared object of one of :data:`NAMES`."""
    return (FOLDER / f"{name}.so").read_bytes()

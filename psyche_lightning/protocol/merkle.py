"""Merkle trees over SHA-256 (Psyche's merkle_tree.rs)."""

from __future__ import annotations

from collections.abc import Sequence

from psyche_lightning.wire.canonical import ZERO_HASH, sha256

EMPTY_ROOT = ZERO_HASH
"""The root of an empty list."""


def _leaf(item: bytes) -> bytes:
    return sha256(b"\x00", item)


def _parents(level: list[bytes]) -> list[bytes]:
    """The next level up; an odd level repeats its last node."""
    if len(level) % 2:
        level = [*level, level[-1]]
    return [sha256(b"\x01", level[i], level[i + 1]) for i in range(0, len(level), 2)]


def merkle_root(items: Sequence[bytes]) -> bytes:
    """The root, 32 bytes, over ``items`` in the given order; :data:`EMPTY_ROOT` for none."""
    level = [_leaf(item) for item in items]
    while len(level) > 1:
        level = _parents(level)
    return level[0] if level else EMPTY_ROOT


def merkle_proof(items: Sequence[bytes], index: int) -> list[tuple[bool, bytes]]:
    """The path from ``items[index]`` up to the root, as ``(whether the sibling is on the left, sibling)``.

    Raises:
        IndexError: the item does not exist.
    """
    if not 0 <= index < len(items):
        raise IndexError(f"item {index} of {len(items)}")
    level = [_leaf(item) for item in items]
    proof = []
    while len(level) > 1:
        sibling = min(index ^ 1, len(level) - 1)
        proof.append((bool(index & 1), level[sibling]))
        level = _parents(level)
        index >>= 1
    return proof


def verify_proof(root: bytes, item: bytes, proof: Sequence[tuple[bool, bytes]]) -> bool:
    """Whether ``proof`` leads from ``item`` to ``root``."""
    node = _leaf(item)
    for left, sibling in proof:
        node = sha256(b"\x01", sibling, node) if left else sha256(b"\x01", node, sibling)
    return node == root

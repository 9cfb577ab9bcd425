"""Tells whether saved tensors are what was saved: bits flip on disks, and formats such as torch's do not look."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch


def checksum(about: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> str:
    """The SHA-256 of named tensors and of what is said about them, in hex.

    Args:
        about: JSON values.
        tensors: of any shapes, dtypes and devices; their order does not matter.
    """
    hashed = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name in sorted(tensors):
        plain = tensors[name].detach().cpu().contiguous()
        hashed.update(json.dumps([name, str(plain.dtype), list(plain.shape)]).encode())
        hashed.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    return hashed.hexdigest()


def damage(tensors: Mapping[str, torch.Tensor], found: str, expected: str | None) -> str | None:
    """What is wrong with loaded tensors, in words; None if nothing is.

    Args:
        tensors: the tensors, by name.
        found: their :func:`checksum` now.
        expected: the one that was saved with them; None if there was none.
    """
    if expected not in (None, found):
        return f"its checksum is {found[:12]}, and {str(expected)[:12]} was saved with it"
    endless = [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
    return f"{', '.join(endless[:5])}: values are not finite" if endless else None

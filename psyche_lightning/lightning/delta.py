"""Saves a node's delta to disk, so that a killed node does not lose updates that it has not sent yet.

One safetensors file has the float32 delta of each parameter by name, and any momentum of Muon; its metadata names the
run, the layout that positions refer to, the nonce and a checksum. Parameters need no file: snapshot and replay restore
them.
"""

from __future__ import annotations

import contextlib
import json
import logging
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from psyche_lightning import system
from psyche_lightning.distro import DisTrO
from psyche_lightning.distro.saved import checksum, damage
from psyche_lightning.errors import StoreError

logger = logging.getLogger(__name__)

FILE = "delta.safetensors"
SAVE_EVERY = 50
"""Rounds between two saves; a killed node loses the delta of at most this many."""
_MOMENTUM = "momentum of "


def save(folder: Path, run: str, optimizer: DisTrO) -> None:
    """Write the delta; if the process is killed meanwhile, the previous file stays.

    Raises:
        StoreError: the folder is not writable.
    """
    deltas = {name: delta.cpu() for name, delta in optimizer.delta()}
    if not deltas:
        return
    deltas |= {_MOMENTUM + name: tensor.cpu().contiguous() for name, tensor in optimizer.momentum()}
    about = {"run": run, "layout": optimizer.layout_digest.hex(), "nonce": optimizer.nonce}
    path, new = folder / FILE, folder / f"{FILE}.new"
    text = json.dumps({**about, "checksum": checksum(about, deltas)}, sort_keys=True)
    try:
        save_file(deltas, new, metadata={"psyche": text})
        system.sync(new)
        new.replace(path)
        system.sync(folder)
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            new.unlink(missing_ok=True)
        raise StoreError(f"cannot write {path}: {error}. Is its disk full or read-only?") from error


def load(folder: Path, run: str, optimizer: DisTrO) -> bool:
    """Load the delta that an earlier process of this node saved; returns whether one fits.

    A damaged one, or one with values that are not finite, is left out with a warning.
    """
    path = folder / FILE
    if not path.exists():
        return False
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {})["psyche"])
            expected = str(about.pop("checksum"))
            nonce = int(about["nonce"])
            deltas = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        problem = damage(deltas, checksum(about, deltas), expected)
    except (OSError, SafetensorError, ValueError, TypeError, LookupError, AttributeError) as error:
        problem = f"it cannot be read: {error!r}"
    if problem is not None:
        logger.warning("the delta in %s is damaged and left out, so delta begins empty: %s", path, problem)
        return False
    shapes = {entry.name: entry.shape for entry in optimizer.layout.entries}
    fits = all(
        tensor.shape == shapes.get(name.removeprefix(_MOMENTUM)) and tensor.dtype == torch.float32
        for name, tensor in deltas.items()
    )
    if not fits or (about.get("run"), about.get("layout")) != (run, optimizer.layout_digest.hex()):
        logger.info("the delta in %s is of another run or model and left out", path)
        return False
    for name, tensor in deltas.items():
        if name.startswith(_MOMENTUM):
            optimizer.load_momentum(name.removeprefix(_MOMENTUM), tensor)
        else:
            optimizer.load_delta(name, tensor)
    optimizer.nonce = nonce
    return True

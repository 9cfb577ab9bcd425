"""The accumulated update (delta) of a node on disk, so that a killed node does not lose what it had yet to send.

One safetensors file with the float32 delta of each parameter by name; its metadata names the run, the layout that
positions refer to, and the nonce. Parameters need none: they come back by snapshot and replay.
"""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from psyche_lightning.distro import DisTrO
from psyche_lightning.errors import StoreError

logger = logging.getLogger("psyche_lightning")

FILE = "delta.safetensors"
SAVE_EVERY = 50
"""Rounds between two saves: so much of the accumulated update a kill may cost."""


def _parameters(optimizer: DisTrO) -> list[tuple[str, torch.Tensor]]:
    return [
        (name, parameter)
        for group in optimizer.param_groups
        for name, parameter in zip(group["param_names"], group["params"], strict=True)
    ]


def save(folder: Path, run: str, optimizer: DisTrO) -> None:
    """Write the delta; a kill in between leaves the file before.

    Raises:
        StoreError: the folder cannot be written.
    """
    deltas = {
        name: optimizer.state[parameter]["delta"].detach().cpu().contiguous()
        for name, parameter in _parameters(optimizer)
        if "delta" in optimizer.state[parameter]
    }
    if not deltas:
        return
    about = {"run": run, "layout": optimizer.layout_digest.hex(), "nonce": optimizer.nonce}
    path, new = folder / FILE, folder / f"{FILE}.new"
    try:
        save_file(deltas, new, metadata={"psyche": json.dumps(about, sort_keys=True)})
        with new.open("rb") as file:
            os.fsync(file.fileno())
        new.replace(path)
    except (OSError, SafetensorError) as error:
        raise StoreError(f"cannot write {path}: {error}. Is its disk full or read-only?") from error


def load(folder: Path, run: str, optimizer: DisTrO) -> bool:
    """Take up the delta that a former life of this node saved; returns whether there was one that fits."""
    path = folder / FILE
    if not path.exists():
        return False
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {}).get("psyche", "{}"))
            if (about.get("run"), about.get("layout")) != (run, optimizer.layout_digest.hex()):
                return False
            deltas = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (OSError, SafetensorError, ValueError) as error:
        logger.warning("the accumulated update in %s cannot be read and is left out: %s", path, error)
        return False
    parameters = dict(_parameters(optimizer))
    fits = all(
        name in parameters and delta.shape == parameters[name].shape and delta.dtype == torch.float32
        for name, delta in deltas.items()
    )
    if not fits:
        return False
    for name, delta in deltas.items():
        optimizer.state[parameters[name]]["delta"] = delta.to(parameters[name].device)
    optimizer.nonce = int(about["nonce"])
    return True

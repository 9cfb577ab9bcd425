"""Saves a node's delta to disk, so that a killed node does not lose updates that it has not sent yet.

One safetensors file has the float32 delta of each parameter by name, any momentum of Muon, and with local steps the
state of the node's own optimizer; its metadata names the run, the layout that positions refer to, the nonce and a
checksum. Parameters need no file: snapshot and replay restore
them.
"""

from __future__ import annotations

import contextlib
import json
import logging
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from psyche_lightning import system
from psyche_lightning.distro import DisTrO, LocalSteps
from psyche_lightning.distro.saved import checksum, damage
from psyche_lightning.distro.sharded import ShardedDisTrO
from psyche_lightning.errors import StoreError

logger = logging.getLogger(__name__)

FILE = "delta.safetensors"
SAVE_EVERY = 50
"""Rounds between two saves; a killed node loses the delta of at most this many."""
_MOMENTUM = "momentum of "
_OWN = "own "
"""Begins the names of what local steps left in the node's own optimizer; a JSON list of parameter and name follows."""


def save(folder: Path, run: str, optimizer: DisTrO | ShardedDisTrO, own: torch.optim.Optimizer | None = None) -> None:
    """Write the delta; if the process is killed meanwhile, the previous file stays.

    Args:
        folder: the node's.
        run: names the run and its incarnation.
        optimizer: has the delta.
        own: the optimizer that makes local steps, whose state is written as well.

    Raises:
        StoreError: the folder is not writable.
    """
    optimizer, own, path = _place(folder, optimizer, own)
    deltas = {name: delta.cpu() for name, delta in optimizer.delta()}
    if not deltas:
        return
    deltas |= {_MOMENTUM + name: tensor.cpu().contiguous() for name, tensor in optimizer.momentum()}
    about: dict[str, Any] = {"run": run, "layout": optimizer.layout_digest.hex(), "nonce": optimizer.nonce}
    if own is not None and isinstance(optimizer, LocalSteps):
        values = _own_state(optimizer, own)
        tensors = {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}
        deltas |= {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        about["own"] = {
            "optimizer": type(own).__name__,
            "values": {n: v for n, v in values.items() if n not in tensors},
        }
    new = path.with_name(f"{path.name}.new")
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


def load(folder: Path, run: str, optimizer: DisTrO | ShardedDisTrO, own: torch.optim.Optimizer | None = None) -> bool:
    """Load the delta that an earlier process of this node saved, and the state of ``own``; returns whether one fits.

    A damaged one, or one with values that are not finite, is left out with a warning.
    """
    optimizer, own, path = _place(folder, optimizer, own)
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
    values = {name: deltas.pop(name) for name in list(deltas) if name.startswith(_OWN)}
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
    if own is not None and isinstance(optimizer, LocalSteps):
        _load_own_state(optimizer, own, about.get("own"), values)
    return True


def _place(
    folder: Path, optimizer: DisTrO | ShardedDisTrO, own: torch.optim.Optimizer | None
) -> tuple[DisTrO, torch.optim.Optimizer | None, Path]:
    """What is saved where: of a model that ranks share, each one's part in a file of its own, without own state."""
    if isinstance(optimizer, ShardedDisTrO):
        ranks = optimizer.ranks
        return optimizer.part, None, folder / f"{ranks.rank + 1}-of-{ranks.size}-{FILE}"
    return optimizer, own, folder / FILE


def _own_state(optimizer: DisTrO, own: torch.optim.Optimizer) -> dict[str, Any]:
    """Tensors and JSON values of an optimizer's state, by parameter and name."""
    names = {
        id(parameter): name
        for group in optimizer.param_groups
        for name, parameter in zip(group["param_names"], group["params"], strict=True)
    }
    return {
        _OWN + json.dumps([names[id(parameter)], key]): value
        for parameter, state in own.state.items()
        for key, value in state.items()
        if isinstance(value, (torch.Tensor, int, float, str, type(None)))
    }


def _load_own_state(
    optimizer: DisTrO, own: torch.optim.Optimizer, about: Any, tensors: dict[str, torch.Tensor]
) -> None:
    """Put what :func:`_own_state` found into an optimizer of the same kind."""
    if not isinstance(about, dict) or about.get("optimizer") != type(own).__name__:
        logger.info("the state of another optimizer is left out; %s begins anew", type(own).__name__)
        return
    names = [name for group in optimizer.param_groups for name in group["param_names"]]  # torch numbers in this order
    state: dict[int, dict[str, Any]] = {}
    for label, value in {**about.get("values", {}), **tensors}.items():
        name, key = json.loads(label.removeprefix(_OWN))
        state.setdefault(names.index(name), {})[key] = value
    own.load_state_dict({"state": state, "param_groups": own.state_dict()["param_groups"]})

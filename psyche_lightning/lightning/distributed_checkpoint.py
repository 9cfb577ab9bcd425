"""Checkpoints of a model that ranks share, into which each rank writes its part.

A checkpoint is a folder. ``torch.distributed.checkpoint`` writes the module's ``state_dict`` into it, and the state of
the optimizer's own steps; any number of devices can read these. As with Lightning's own strategies, ``meta.pt`` has the
rest of the checkpoint. ``distro-R-of-N.pt`` has what DisTrO holds on a rank, for as many devices as before.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from psyche_lightning.distro.shards import Ranks
from psyche_lightning.errors import CheckpointError
from psyche_lightning.lightning.optimizers import TakenStep

logger = logging.getLogger(__name__)

META = "meta.pt"
"""Has what is not in parts; it is written last, so a folder with it is whole."""
_INDEX = ".metadata"
"""What ``torch.distributed.checkpoint`` writes last."""


def is_distributed(path: Path) -> bool:
    """Whether a path is the folder of such a checkpoint.

    Raises:
        CheckpointError: it was not written to its end.
    """
    if not path.is_dir():
        return False
    if (path / META).is_file():
        return True
    raise CheckpointError(
        f"{str(path)!r} is a folder without {META}: no checkpoint, or one that was not written to its end. Give another"
    )


def save(folder: Path, parts: Mapping[str, Any], distro: Mapping[str, Any] | None, rest: Any, ranks: Ranks) -> None:
    """Write a checkpoint; collective.

    Args:
        folder: is made, or replaced.
        parts: nested dictionaries of tensors. Of a DTensor each rank writes its part, of others one rank writes all.
        distro: what only this rank has.
        rest: what rank 0 writes besides.
        ranks: the ranks of the node.

    Raises:
        CheckpointError: a rank could not write.
    """

    def begin() -> None:
        if ranks.rank == 0:
            if folder.is_file():
                folder.unlink()
            folder.mkdir(parents=True, exist_ok=True)
            for old in (folder / META, *folder.glob("distro-*.pt")):
                old.unlink(missing_ok=True)

    def write() -> None:
        state_dict_saver.save(dict(parts), checkpoint_id=folder)
        if distro is not None:
            torch.save(dict(distro), _own_file(folder, ranks.rank + 1, ranks.size))

    def end() -> None:
        if ranks.rank == 0:
            torch.save(rest, folder / META)

    for work in (begin, write, end):  # a rank that could not do one must not go on while others do
        problem = ranks.agree(_problem(work))
        if problem is not None:
            raise CheckpointError(f"cannot write the checkpoint {folder}: {problem}")


def load(folder: Path, tensors: dict[str, Any]) -> None:
    """Fill tensors, given as to :func:`save`, with their parts of a checkpoint; collective if there are ranks.

    Raises:
        CheckpointError: they are not there, have other shapes, or cannot be read.
    """
    alone = not dist.is_initialized()
    problem = _problem(lambda: state_dict_loader.load(tensors, checkpoint_id=folder, no_dist=alone))
    if problem is not None:
        raise CheckpointError(f"cannot load the checkpoint {folder}: {problem}")


def load_module(folder: Path, name: str, module: torch.nn.Module, ranks: Ranks | None) -> dict[str, Any]:
    """Fill a module's ``state_dict`` as far as the checkpoint has it, and return it.

    A name that the module lacks has None: ``load_state_dict`` tells of it, as of those that the checkpoint lacks.

    Args:
        folder: the checkpoint's.
        name: under which :func:`save` got the ``state_dict``.
        module: the module.
        ranks: those that share it; None if each has it as a whole.

    Raises:
        CheckpointError: it has nothing of that name; or as of :func:`load`.
    """
    if ranks is not None:
        ranks.reshard(module)
    ours = module.state_dict()
    names = list(dict.fromkeys(path[1] for path in _entries(folder) if path[0] == name and len(path) > 1))
    if not names:
        raise CheckpointError(f"the checkpoint {folder} has no {name!r}")
    found = {key: ours[key] for key in names if key in ours}
    load(folder, {name: found})
    return {key: found.get(key) for key in names}


def restore(folder: Path, name: str, step: TakenStep) -> None:
    """Restore the state of an optimizer's own steps, and DisTrO's; without it, as of other ranks, delta begins empty.

    Args:
        folder: the checkpoint's.
        name: under which :func:`save` got what ``step.own_state()`` gave.
        step: the optimizer.

    Raises:
        CheckpointError: as of :func:`load`.
    """
    named = step.named
    own: dict[str, dict[str, Any]] = {}
    for (first, *rest), about in _entries(folder).items():
        if first == name and len(rest) == 2 and rest[0] in named:
            own.setdefault(rest[0], {})[rest[1]] = _room(about, named[rest[0]])
    if own:
        load(folder, {name: own})
        numbers = {each: number for number, each in enumerate(named)}
        step.load_own_state({"state": {numbers[each]: values for each, values in own.items()}})
    ranks = step.distro.ranks
    path = _own_file(folder, 1, 1) if ranks is None else _own_file(folder, ranks.rank + 1, ranks.size)
    if path.is_file():
        step.distro.load_state_dict(torch.load(path, weights_only=True))
    else:
        logger.warning("the checkpoint %s has no %s, so delta begins empty", folder, path.name)


def _room(about: Any, parameter: torch.Tensor) -> torch.Tensor | None:
    if not isinstance(about, TensorStorageMetadata):
        return None
    dtype = about.properties.dtype
    if about.size == parameter.shape:
        return torch.empty_like(parameter, dtype=dtype).detach()
    return torch.empty(about.size, dtype=dtype)


def _own_file(folder: Path, number: int, size: int) -> Path:
    return folder / f"distro-{number}-of-{size}.pt"


def _entries(folder: Path) -> dict[tuple[str, ...], Any]:
    """What the parts have, by the keys of their dictionaries."""
    try:
        index = FileSystemReader(folder).read_metadata()
    except (OSError, EOFError, ValueError) as error:
        raise CheckpointError(f"cannot read {folder / _INDEX}: {error}") from error
    paths = index.planner_data or {}
    return {tuple(map(str, paths.get(key, (key,)))): about for key, about in index.state_dict_metadata.items()}


def _problem(work: Callable[[], object]) -> str | None:
    """Do something; returns why it failed, in a line."""
    try:
        work()
    except CheckpointException as error:  # torch's own for several ranks; it is no Exception
        cause: BaseException = next(iter(error.failures.values()))[0]
    except (OSError, RuntimeError, ValueError) as error:
        cause = error
    else:
        return None
    return (getattr(cause, "strerror", None) or str(cause) or type(cause).__name__).splitlines()[0]

"""Which checkpoints of a place may go."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from psyche_lightning.checkpoints.address import Place
from psyche_lightning.checkpoints.folder import scan
from psyche_lightning.checkpoints.manifest import folder_name


def doomed(found: Mapping[int, bool], keep: int, spare: Collection[int] = ()) -> list[int]:
    """The steps whose folders may go, ascending.

    The newest ``keep`` complete ones stay, at least one. An incomplete one that is older than the newest complete one
    was given up by its writer; a newer one may be under way.

    Args:
        found: whether the folder of a step is complete.
        keep: how many stay.
        spare: steps that stay in any case.
    """
    complete = sorted(step for step, whole in found.items() if whole)
    kept = {*complete[-max(1, keep) :], *spare}
    newest = complete[-1] if complete else -1
    return [step for step in sorted(found) if step not in kept and (found[step] or step < newest)]


def prune(place: Place, keep: int, spare: Collection[int] = ()) -> list[int]:
    """Remove what :func:`doomed` says; returns it.

    Raises:
        CheckpointError: the place cannot be read or written.
    """
    steps = doomed(scan(place), keep, spare)
    for step in steps:
        place.remove(folder_name(step))
    return steps

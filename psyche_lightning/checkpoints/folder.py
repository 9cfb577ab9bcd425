"""Finds checkpoints at an address, brings one here with every byte checked, and removes those that may go."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from psyche_lightning.checkpoints.address import Place, open_place
from psyche_lightning.checkpoints.manifest import MAX_SIZE, NAME, Manifest, file_of, folder_name, step_of
from psyche_lightning.errors import CheckpointError

CONFIG = "config.json"
"""The file that every folder in Hugging Face format has."""
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Found:
    """A complete checkpoint at an address.

    Attributes:
        place: the address.
        path: its folder there; empty where the address is the folder.
        manifest: what it has.
    """

    place: Place
    path: str
    manifest: Manifest

    def __str__(self) -> str:
        return self.place.name(self.path)


def scan(place: Place) -> dict[int, bool]:
    """The steps that have a folder, and whether it has a manifest."""
    steps = {step_of(name): name for name, size in place.entries().items() if size is None}
    return {step: NAME in place.entries(name) for step, name in steps.items() if step is not None}


def candidates(place: Place, step: int | None = None) -> list[Found]:
    """The complete checkpoints of an address, newest first; the address may also be that of one.

    Args:
        place: the address.
        step: only that of this step.

    Raises:
        CheckpointError: there is none, or the address cannot be read.
    """
    direct = _read(place, "")
    if direct is not None:
        found = [direct] if step in (None, direct.manifest.moment.step) else []
    else:
        steps = sorted((one for one, whole in scan(place).items() if whole and step in (None, one)), reverse=True)
        found = []
        for number in steps:
            try:
                one = _read(place, folder_name(number))
            except CheckpointError as error:
                logger.warning("%s; trying the one before", error)
                continue
            found += [] if one is None else [one]
    if not found:
        what = "complete checkpoint" if step is None else f"complete checkpoint of step {step}"
        there = ", ".join(sorted(place.entries())[:8]) or "nothing is"
        raise CheckpointError(
            f"There is no {what} at {place}: expected folders such as {folder_name(120)}, each with {NAME}; "
            f"{there} there."
        )
    return found


def newest(address: str) -> Found:
    """The newest complete checkpoint of an address, by its manifest; nothing else is read.

    Raises:
        CheckpointError: as :func:`candidates`.
        ConfigError: the address is malformed.
    """
    return candidates(open_place(address))[0]


def fetch(found: Found, cache: Path, *, weights: bool = True) -> Path:
    """The folder of a checkpoint on this machine, its files checked against their hashes.

    What lies on this machine is used where it lies; all else is copied into ``cache``, where files that are there
    already are not copied again.

    Args:
        found: which.
        cache: a folder for copies.
        weights: whether the parameters are needed, or only what describes the model.

    Raises:
        CheckpointError: it is not what its manifest says, it cannot be read, or there is no room.
    """
    files = {name: file for name, file in found.manifest.files.items() if weights or not name.endswith(WEIGHTS)}
    here = found.place.local
    name = folder_name(found.manifest.moment.step)
    folder = cache / found.manifest.digest[:16] / name if here is None else here / found.path
    try:
        if here is None:
            folder.mkdir(parents=True, exist_ok=True)
        for name, file in files.items():
            path = folder / name
            if here is None and not (path.is_file() and file_of(path) == file):
                fresh = folder / f".{name}.new"
                found.place.download(f"{found.path}/{name}" if found.path else name, fresh)
                fresh.replace(path)
            now = file_of(path) if path.is_file() else None
            if now != file:
                is_now = "is missing" if now is None else f"has {now.size} bytes and the hash {now.sha256[:12]}"
                raise CheckpointError(
                    f"{found} is damaged, or changed under way: {name} {is_now}; the manifest says {file.size} bytes "
                    f"and {file.sha256[:12]}"
                )
    except OSError as error:
        raise CheckpointError(f"cannot copy {found} to {folder}: {error.strerror or error}") from error
    return folder


def fetch_newest(address: str, cache: Path, step: int | None = None) -> tuple[Found, Path]:
    """The newest checkpoint of an address that is as its manifest says, and its folder here.

    Args:
        address: of checkpoints, or of one.
        cache: a folder for copies.
        step: only that of this step.

    Raises:
        CheckpointError: there is none, or all are damaged.
    """
    problem: CheckpointError | None = None
    for found in candidates(open_place(address), step):
        try:
            folder = fetch(found, cache)
        except CheckpointError as error:
            problem = error if problem is None else problem
            logger.warning("%s; trying the one before", error)
            continue
        return found, folder
    assert problem is not None
    raise CheckpointError(f"no checkpoint of {address} can be used; of the newest: {problem}")


def local_model(path: str, *, weights: bool = True, cache: Path | None = None) -> str:
    """What a model's factory is given as its path: checkpoints and addresses become a folder on this machine.

    Args:
        path: a folder in Hugging Face format, a folder of checkpoints, an address of either, or a name of the Hub.
        weights: whether the parameters are needed, or only what describes the model.
        cache: a folder for copies; :func:`cache_folder` unless given.

    Returns:
        The folder; ``path`` itself where it is neither an address nor a folder with checkpoints.

    Raises:
        CheckpointError: nothing usable is there.
        ConfigError: the address is malformed.
    """
    cache = cache or cache_folder()
    here = Path(path).expanduser()
    if "://" not in path:
        if not here.is_dir() or ((here / CONFIG).is_file() and not (here / NAME).is_file()):
            return path
        if not (here / NAME).is_file() and not any(step_of(one.name) is not None for one in here.iterdir()):
            return path
    else:
        place = open_place(path)
        entries = place.entries()
        if CONFIG in entries and NAME not in entries:
            return str(_plain(place, entries, cache, weights=weights))
        if not entries:
            raise CheckpointError(
                f"There is nothing at {path}: expected a model in Hugging Face format, or checkpoints."
            )
    if not weights:
        return str(fetch(newest(path), cache, weights=False))
    found, folder = fetch_newest(path, cache)
    moment = found.manifest.moment
    logger.info("taking the parameters of step %d of run %r from %s", moment.step, moment.run, found)
    return str(folder)


def cache_folder() -> Path:
    """Where copies of what lies at addresses are kept: ``~/.cache/psyche-lightning/checkpoints``, or as XDG says."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "psyche-lightning" / "checkpoints"


def _plain(place: Place, entries: dict[str, int | None], cache: Path, *, weights: bool) -> Path:
    """Copy a folder in Hugging Face format that has no manifest; nothing in it can be checked, so nothing is kept."""
    folder = place.local
    if folder is not None:
        return folder
    folder = cache / hashlib.sha256(place.address.encode()).hexdigest()[:16] / "model"
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for name, size in entries.items():
            if size is not None and (weights or not name.endswith(WEIGHTS)):
                place.download(name, folder / name)
    except OSError as error:
        raise CheckpointError(f"cannot copy {place} to {folder}: {error.strerror or error}") from error
    return folder


def _read(place: Place, path: str) -> Found | None:
    name = f"{path}/{NAME}" if path else NAME
    data = place.read(name, MAX_SIZE)
    if data is None:
        return None
    manifest = Manifest.parse(data, place.name(name))
    if path and manifest.moment.step != step_of(path):
        raise CheckpointError(f"{place.name(name)} is of step {manifest.moment.step}: the folder was renamed.")
    return Found(place, path, manifest)


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

"""Finds checkpoints at an address, copies them here and checks every byte, and removes old ones."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from psyche_lightning.checkpoints.address import Storage, open_storage
from psyche_lightning.checkpoints.manifest import MAX_SIZE, NAME, Manifest, file_of, folder_name, step_of
from psyche_lightning.errors import CheckpointError

CONFIG = "config.json"
"""The file that every folder in Hugging Face format has."""
ADAPTER = "adapter_config.json"
"""The file that the folder of an adapter has; ``peft`` writes it."""
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint at an address.

    Attributes:
        storage: the address.
        path: its folder there; empty if the address itself is the folder.
        manifest: its manifest.
    """

    storage: Storage
    path: str
    manifest: Manifest

    def __str__(self) -> str:
        return self.storage.name(self.path)


def scan(storage: Storage) -> dict[int, bool]:
    """For each step with a folder, whether the folder has a manifest."""
    steps = {step_of(name): name for name, size in storage.entries().items() if size is None}
    return {step: NAME in storage.entries(name) for step, name in steps.items() if step is not None}


def complete_checkpoints(storage: Storage, step: int | None = None) -> list[Checkpoint]:
    """The complete checkpoints of an address, newest first; the address may also be that of one checkpoint.

    Args:
        storage: the address.
        step: return only the checkpoint of this step.

    Raises:
        CheckpointError: there is none, or the address cannot be read.
    """
    direct = _read(storage, "")
    if direct is not None:
        found = [direct] if step in (None, direct.manifest.metadata.step) else []
    else:
        steps = sorted((one for one, whole in scan(storage).items() if whole and step in (None, one)), reverse=True)
        found = []
        for number in steps:
            try:
                one = _read(storage, folder_name(number))
            except CheckpointError as error:
                logger.warning("%s; trying the one before it", error)
                continue
            found += [] if one is None else [one]
    if not found:
        what = "complete checkpoint" if step is None else f"complete checkpoint of step {step}"
        there = ", ".join(sorted(storage.entries())[:8]) or "nothing"
        raise CheckpointError(
            f"There is no {what} at {storage}: expected folders such as {folder_name(120)}, each with {NAME}; "
            f"found {there}."
        )
    return found


def newest(address: str) -> Checkpoint:
    """The newest complete checkpoint of an address, judged by manifests; reads nothing else.

    Raises:
        CheckpointError: as :func:`complete_checkpoints`.
        ConfigError: the address is malformed.
    """
    return complete_checkpoints(open_storage(address))[0]


def fetch(found: Checkpoint, cache: Path, *, weights: bool = True) -> Path:
    """Returns the folder of a checkpoint on this machine, with its files checked against their hashes.

    Uses a checkpoint on this machine where it is, and copies others into ``cache``, but not files that are already
    there.

    Args:
        found: the checkpoint.
        cache: a folder for copies.
        weights: whether the parameters are needed, or only the files that describe the model.

    Raises:
        CheckpointError: it differs from its manifest, it cannot be read, or there is no space.
    """
    files = {name: file for name, file in found.manifest.files.items() if weights or not name.endswith(WEIGHTS)}
    here = found.storage.local
    name = folder_name(found.manifest.metadata.step)
    folder = cache / found.manifest.digest[:16] / name if here is None else here / found.path
    try:
        if here is None:
            folder.mkdir(parents=True, exist_ok=True)
        for name, file in files.items():
            path = folder / name
            if here is None and not (path.is_file() and file_of(path) == file):
                fresh = folder / f".{name}.new"
                found.storage.download(f"{found.path}/{name}" if found.path else name, fresh)
                fresh.replace(path)
            now = file_of(path) if path.is_file() else None
            if now != file:
                is_now = "is missing" if now is None else f"has {now.size} bytes and the hash {now.sha256[:12]}"
                raise CheckpointError(
                    f"{found} is damaged, or changed meanwhile: {name} {is_now}; the manifest says {file.size} bytes "
                    f"and {file.sha256[:12]}"
                )
    except OSError as error:
        raise CheckpointError(f"cannot copy {found} to {folder}: {error.strerror or error}") from error
    return folder


def fetch_newest(address: str, cache: Path, step: int | None = None) -> tuple[Checkpoint, Path]:
    """Fetch the newest checkpoint of an address that matches its manifest. Returns it and its folder here.

    Args:
        address: an address of checkpoints, or of one.
        cache: a folder for copies.
        step: fetch only the checkpoint of this step.

    Raises:
        CheckpointError: there is none, or all are damaged.
    """
    problem: CheckpointError | None = None
    for found in complete_checkpoints(open_storage(address), step):
        try:
            folder = fetch(found, cache)
        except CheckpointError as error:
            problem = error if problem is None else problem
            logger.warning("%s; trying the one before it", error)
            continue
        return found, folder
    assert problem is not None
    raise CheckpointError(f"no checkpoint of {address} is usable; the newest: {problem}")


def local_model(path: str, *, weights: bool = True, cache: Path | None = None) -> str:
    """The path to give to a model's factory: checkpoints and addresses become a folder on this machine.

    Args:
        path: a folder in Hugging Face format, a folder of checkpoints, an address of either, or a name on the Hub.
        weights: whether the parameters are needed, or only the files that describe the model.
        cache: a folder for copies; :func:`cache_folder` by default.

    Returns:
        The folder, or ``path`` itself if it is neither an address nor a folder with checkpoints.

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
        storage = open_storage(path)
        entries = storage.entries()
        if CONFIG in entries and NAME not in entries:
            return str(_plain(storage, entries, cache, weights=weights))
        if not entries:
            raise CheckpointError(
                f"There is nothing at {path}: expected a model in Hugging Face format, or checkpoints."
            )
    if not weights:
        return str(fetch(newest(path), cache, weights=False))
    found, folder = fetch_newest(path, cache)
    metadata = found.manifest.metadata
    logger.info("loading the parameters of step %d of run %r from %s", metadata.step, metadata.run, found)
    return str(folder)


def cache_folder() -> Path:
    """The folder for copies from addresses: ``psyche-lightning/checkpoints`` in ``XDG_CACHE_HOME`` or ``~/.cache``."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "psyche-lightning" / "checkpoints"


def _plain(storage: Storage, entries: dict[str, int | None], cache: Path, *, weights: bool) -> Path:
    """Copy a folder in Hugging Face format without a manifest. It cannot be checked, so no earlier copy is reused."""
    folder = storage.local
    if folder is not None:
        return folder
    folder = cache / hashlib.sha256(storage.address.encode()).hexdigest()[:16] / "model"
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for name, size in entries.items():
            if size is not None and (weights or not name.endswith(WEIGHTS)):
                storage.download(name, folder / name)
    except OSError as error:
        raise CheckpointError(f"cannot copy {storage} to {folder}: {error.strerror or error}") from error
    return folder


def _read(storage: Storage, path: str) -> Checkpoint | None:
    name = f"{path}/{NAME}" if path else NAME
    data = storage.read(name, MAX_SIZE)
    if data is None:
        return None
    manifest = Manifest.parse(data, storage.name(name))
    if path and manifest.metadata.step != step_of(path):
        raise CheckpointError(f"{storage.name(name)} is for step {manifest.metadata.step}: the folder was renamed.")
    return Checkpoint(storage, path, manifest)


def removable(found: Mapping[int, bool], keep: int, spare: Collection[int] = ()) -> list[int]:
    """The steps whose folders may be removed, ascending.

    The newest ``keep`` complete checkpoints stay, at least one. An incomplete checkpoint that is older than the newest
    complete one was given up by its writer; a newer one may still be in progress.

    Args:
        found: whether the folder of a step is complete.
        keep: number of checkpoints to keep.
        spare: steps to keep in any case.
    """
    complete = sorted(step for step, whole in found.items() if whole)
    kept = {*complete[-max(1, keep) :], *spare}
    newest = complete[-1] if complete else -1
    return [step for step in sorted(found) if step not in kept and (found[step] or step < newest)]


def prune(storage: Storage, keep: int, spare: Collection[int] = ()) -> list[int]:
    """Remove the folders that :func:`removable` names. Returns their steps.

    Raises:
        CheckpointError: the address cannot be read or written.
    """
    steps = removable(scan(storage), keep, spare)
    for step in steps:
        storage.remove(folder_name(step))
    return steps

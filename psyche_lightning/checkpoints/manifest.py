"""``manifest.json`` describes a checkpoint and lists its files. It is written last, so it means that all files exist.

A JSON object with ``format`` (1), ``run``, ``step``, ``epoch``, ``data_index``, ``digest``, ``recipe``, ``settings``,
``files`` (``{name: {"size": bytes, "sha256": hex}}``) and ``checksum``, the SHA-256 of the rest; version 0.1 wrote
neither checksum nor settings.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from psyche_lightning.errors import CheckpointError

NAME = "manifest.json"
FORMAT = 1
MAX_SIZE = 16 << 20
MAX_FILES = 100_000
_PIECE = 16 << 20
_HASH = re.compile(r"[0-9a-f]{64}")
_FILE = re.compile(r"[A-Za-z0-9_][\w. -]{0,199}")
_FOLDER = re.compile(r"step-(\d{6,12})")


@dataclass(frozen=True)
class File:
    """One file of a checkpoint.

    Attributes:
        size: in bytes.
        sha256: SHA-256 of its bytes, in hex.
    """

    size: int
    sha256: str


@dataclass(frozen=True)
class Metadata:
    """Which state of which run a checkpoint holds.

    Attributes:
        run: the run's name.
        step: training steps that the parameters contain.
        epoch: the run's epoch in which it was saved.
        data_index: first data id of the next step.
        recipe: digest of the run's manifest, which is equal on all nodes, in hex.
        settings: the sections of that manifest; empty if the checkpoint does not have them.
    """

    run: str
    step: int
    epoch: int
    data_index: int
    recipe: str
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Manifest:
    """A complete checkpoint.

    Attributes:
        metadata: which state of which run it holds.
        digest: digest of the saved parameters, in hex. It is the run's digest if all dtypes are float32 and no data ids
            were open.
        files: all files but the manifest, by name.
    """

    metadata: Metadata
    digest: str
    files: Mapping[str, File]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files.values())

    def text(self) -> str:
        """The content of ``manifest.json``."""
        files = {name: asdict(self.files[name]) for name in sorted(self.files)}
        body = {"format": FORMAT, **asdict(self.metadata), "digest": self.digest, "files": files}
        return json.dumps({**body, "checksum": _checksum(body)}, indent=1) + "\n"

    @classmethod
    def parse(cls, data: bytes, source: str) -> Manifest:
        """Read a manifest from outside.

        Args:
            data: the file's bytes.
            source: where the file is, for people.

        Raises:
            CheckpointError: it is not a manifest of this format, or it is damaged.
        """
        try:
            values: Any = json.loads(data)
            if values["format"] != FORMAT:
                raise ValueError(f"its format is {values['format']!r}, and this version knows {FORMAT}")
            rest = {name: value for name, value in values.items() if name != "checksum"}
            if values.get("checksum", found := _checksum(rest)) != found:
                raise ValueError("it is damaged: its checksum is wrong")
            numbers = {name: values[name] for name in ("step", "epoch", "data_index")}
            if any(type(number) is not int or not 0 <= number < 1 << 64 for number in numbers.values()):
                raise ValueError("step, epoch or data_index is not a whole number")
            settings = values.get("settings", {})
            if not isinstance(settings, dict):
                raise ValueError("its settings are not sections")
            metadata = Metadata(run=_text(values["run"]), recipe=_hash(values["recipe"]), settings=settings, **numbers)
            if not 0 < len(values["files"]) <= MAX_FILES:
                raise ValueError(f"it has {len(values['files'])} files")
            files = {_name(name): _file(entry) for name, entry in values["files"].items()}
            return cls(metadata, _hash(values["digest"]), files)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{source} is not the manifest of a checkpoint: {error!r}") from error


def describe(folder: Path, metadata: Metadata, digest: bytes) -> Manifest:
    """The manifest of a folder's files; reads each file once."""
    files = {path.name: file_of(path) for path in sorted(folder.iterdir()) if path.name != NAME}
    return Manifest(metadata, digest.hex(), files)


def file_of(path: Path) -> File:
    """Size and hash of a file."""
    hashed, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            hashed.update(piece)
            size += len(piece)
    return File(size, hashed.hexdigest())


def folder_name(step: int) -> str:
    """The name of a checkpoint's folder, such as ``step-000120``; names sort like steps up to a million."""
    return f"step-{step:06d}"


def step_of(name: str) -> int | None:
    """The step of a checkpoint's folder; None for another name."""
    match = _FOLDER.fullmatch(name)
    return int(match[1]) if match and folder_name(int(match[1])) == name else None


def _checksum(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _text(value: Any) -> str:
    if not isinstance(value, str) or len(value) > 200:
        raise ValueError(f"{value!r} is not a name")
    return value


def _hash(value: Any) -> str:
    if not isinstance(value, str) or not _HASH.fullmatch(value):
        raise ValueError(f"{value!r} is not a SHA-256 in hex")
    return value


def _name(value: str) -> str:
    if value == NAME or not _FILE.fullmatch(value):  # no file may be outside the folder
        raise ValueError(f"{value!r} is not a name of a file in the folder")
    return value


def _file(value: Any) -> File:
    size, sha256 = value["size"], value["sha256"]
    if type(size) is not int or size < 0:
        raise ValueError(f"{size!r} is not a number of bytes")
    return File(size, _hash(sha256))

"""Writes the files of one kind of deployment, filled in for a run."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING

from psyche_lightning import system
from psyche_lightning.deploy.service import Service
from psyche_lightning.deploy.template import LINK_FILE, TEMPLATES, filled, write_secret
from psyche_lightning.errors import ConfigError
from psyche_lightning.version import __version__

if TYPE_CHECKING:
    from importlib.abc import Traversable

GUIDE = "README.md"
"""What to do with the files; the first of a kind's folders has it."""
DEFAULT_RUN = "my-run"
CONTAINER_ID = 10001
"""User and group of the image."""
_HIDDEN = "dot."  # a package's data has no files whose names begin with a dot
_RUN = re.compile(r"[A-Za-z0-9._-]{1,32}")
_IMAGES = {
    # PyPI's torch for Linux brings CUDA; without it, an image is a fifth of the size.
    "Dockerfile": {"INDEX": "--extra-index-url https://download.pytorch.org/whl/cpu ", "DEVICES": ""},
    "Dockerfile.cuda": {
        "INDEX": "",
        "DEVICES": " \\\n    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility",
    },
}


class Kind(str, Enum):
    """What files are written for."""

    DOCKER = "docker"
    COMPOSE = "compose"
    HELM = "helm"
    SKYPILOT = "skypilot"
    SLURM = "slurm"
    SYSTEMD = "systemd"


# The folders of templates behind each kind. The link lies where the second value says.
_PARTS = {
    Kind.DOCKER: (("docker", "images"), LINK_FILE),
    Kind.COMPOSE: (("compose", "images", "monitoring"), f"link/{LINK_FILE}"),
    Kind.HELM: (("helm",), LINK_FILE),
    Kind.SKYPILOT: (("skypilot",), LINK_FILE),
    Kind.SLURM: (("slurm",), LINK_FILE),
    Kind.SYSTEMD: (("systemd",), LINK_FILE),
}


@dataclass(frozen=True)
class Deployment:
    """Files that were written.

    Attributes:
        folder: where.
        paths: the files, in it.
        guide: what to do with them.
    """

    folder: Path
    paths: tuple[Path, ...]
    guide: str


def write(kind: Kind, folder: Path, *, run: str = "", link: str = "", force: bool = False) -> Deployment:
    """Write the files of a kind.

    Args:
        kind: which files.
        folder: where to; made if it is missing.
        run: the run's name; empty for an example's.
        link: its join link, which goes into a file that its owner alone may read; empty to write none.
        force: whether files that exist are overwritten.

    Raises:
        ConfigError: the name cannot be that of a run, a file exists and ``force`` is false, or none can be written.
    """
    run = run or DEFAULT_RUN
    if not _RUN.fullmatch(run):
        raise ConfigError(f"a run cannot have the name {run!r}: a name has 1 to 32 letters, digits, '.', '_' and '-'")
    user, group = _container_user()
    parts, place = _PARTS[kind]
    program = _program()
    values = {
        "RUN": run,
        "OBJECT": _object_name(run),
        "VERSION": __version__,
        "LINK_FILE": place,
        "PROFILES": "" if link else "coordinator",
        "UID": str(user),
        "GID": str(group),
        "PSYCHE": program,
        **_unit(run, program),
    }
    texts = _texts(parts, values)
    paths = [*texts, *([place] if link else [])]
    there = [name for name in paths if (folder / name).exists()]
    if there and not force:
        raise ConfigError(
            f"{str(folder / there[0])!r} exists already, and is not overwritten. Choose another folder with --out DIR, "
            "or give --force to replace what differs"
        )
    try:
        for name, text in texts.items():
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text, encoding="utf-8")
        if link:
            write_secret(folder / place, link)
        if kind is Kind.COMPOSE:
            for path in (folder / "link", *(folder / "link").iterdir()):
                system.give(path, (user, group))
    except OSError as error:
        raise ConfigError(f"cannot write to {str(folder)!r}: {error.strerror}") from error
    return Deployment(folder, tuple(folder / name for name in sorted(paths)), texts[GUIDE])


def _texts(parts: tuple[str, ...], values: Mapping[str, str]) -> dict[str, str]:
    """The text of each file by its path; of two with one path, that of the first part."""
    found: dict[str, str] = {}
    for part in parts:
        for path, source in _sources(TEMPLATES / part):
            text = source.read_text("utf-8")
            for name, more in (_IMAGES if path == "Dockerfile" else {filled(path, values): {}}).items():
                found.setdefault(name, filled(text, {**values, **more}))
    return found


def _sources(folder: Traversable, prefix: str = "") -> Iterator[tuple[str, Traversable]]:
    """The templates in a folder, each with the path of its file."""
    for entry in sorted(folder.iterdir(), key=lambda entry: entry.name):
        if entry.is_dir():
            yield from _sources(entry, f"{prefix}{entry.name}/")
        else:
            name = entry.name
            yield prefix + (f".{name.removeprefix(_HIDDEN)}" if name.startswith(_HIDDEN) else name), entry


def _object_name(run: str) -> str:
    """The run's name as names of containers and of Kubernetes have to be: lower case, without dots."""
    return re.sub(r"[^a-z0-9]+", "-", run.lower()).strip("-") or "run"


def _container_user() -> tuple[int, int]:
    """Who a container is that has to read this user's files: this user, unless that is root."""
    me = system.user()
    return (CONTAINER_ID, CONTAINER_ID) if me is None or me[0] == 0 else me


def _unit(run: str, program: str) -> dict[str, str]:
    """What fills in the unit of a node that is a service of the whole machine."""
    command = [program, "join", f"@/etc/psyche/{run}.link", "--run", run]
    return Service(run, Path("/var/lib/psyche"), command, "psyche", {}, writer="deploy systemd").values


def _program() -> str:
    """The ``psyche`` of this installation."""
    beside = Path(sys.executable).parent / "psyche"
    return str(beside) if beside.exists() else "/opt/psyche/bin/psyche"

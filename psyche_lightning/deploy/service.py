"""A node as a service of systemd: its unit, and how it is put in place and started."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from psyche_lightning import system
from psyche_lightning.deploy.template import LINK_FILE, filled, template, write_secret
from psyche_lightning.errors import ConfigError

UNIT = "systemd/psyche-@RUN@.service"
SYSTEM_UNITS = Path("/etc/systemd/system")
KEPT = (
    "PSYCHE_HOST", "PSYCHE_PORT", "PSYCHE_ADVERTISE", "PSYCHE_UPLOAD", "PSYCHE_DOWNLOAD",
    "CUDA_VISIBLE_DEVICES", "HF_HOME", "HF_HUB_OFFLINE", "OMP_NUM_THREADS", "XDG_CACHE_HOME",
)  # fmt: skip
"""Variables that a service takes along: those that say how this machine trains, and none that may hold a secret."""
_SECONDS = 30


@dataclass(frozen=True)
class Service:
    """A node of a run that systemd starts.

    Attributes:
        run: the run's name.
        folder: the working directory.
        command: what is started, word by word.
        owner: the user as whom a service of the whole machine runs; None for a service of the user who installs it.
        environment: variables that it gets.
        writer: the command that writes the unit, without ``psyche``.
    """

    run: str
    folder: Path
    command: Sequence[str]
    owner: str | None
    environment: Mapping[str, str]
    writer: str = "join --service"

    @property
    def name(self) -> str:
        """The unit's name."""
        return f"psyche-{self.run}.service"

    @property
    def path(self) -> Path:
        """Where the unit has to lie."""
        if self.owner is not None:
            return SYSTEM_UNITS / self.name
        return Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config").expanduser() / "systemd" / "user" / self.name

    @property
    def unit(self) -> str:
        """The text of the unit."""
        return filled(template(UNIT), self.values)

    @property
    def values(self) -> dict[str, str]:
        """What fills in the unit's template."""
        network = "Wants=network-online.target\nAfter=network-online.target\n"
        variables = [f"Environment={_word(f'{name}={value}')}\n" for name, value in self.environment.items()]
        return {
            "RUN": self.run,
            "WRITER": self.writer,
            "NETWORK": network if self.owner is not None else "",
            "RIGHTS": f"User={self.owner}\nProtectSystem=full\n" if self.owner is not None else "",
            "FOLDER": str(self.folder).replace("%", "%%"),
            # A unit's command lines expand variables, its assignments do not.
            "COMMAND": " ".join(_word(word).replace("$", "$$") for word in self.command),
            "ENVIRONMENT": "".join(["Environment=PYTHONUNBUFFERED=1\n", *variables]),
            "TARGET": "default.target" if self.owner is None else "multi-user.target",
        }

    def systemctl(self, *words: str) -> list[str]:
        """A command of ``systemctl`` for the manager of this unit."""
        return ["systemctl", *(["--user"] if self.owner is None else []), *words]


def node_service(run: str, link: str, node_folder: Path, options: Sequence[str]) -> Service:
    """The service of a node that joins a run in the current folder; its link is written for its owner alone.

    For root, it is a service of the whole machine, which runs as the owner of the current folder.

    Args:
        run: the run's name.
        link: the join link.
        node_folder: the node's folder, where the file with the link lies.
        options: further words of ``psyche join``.

    Raises:
        ConfigError: the link cannot be written.
    """
    here, file = Path.cwd(), node_folder.absolute() / LINK_FILE
    owner = None
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_secret(file, link)
        me = system.user()
        if me is not None and me[0] == 0:
            found = here.stat()
            owner = system.user_name(found.st_uid)
            for path in (file.parent, file):
                system.give(path, (found.st_uid, found.st_gid))
    except (OSError, KeyError) as error:
        raise ConfigError(f"cannot keep the join link in {str(file)!r} for the service: {error}") from error
    command = [sys.executable, "-m", "psyche_lightning", "join", f"@{file}", *options, "--run", run]
    return Service(run, here, command, owner, {name: os.environ[name] for name in KEPT if name in os.environ})


def install(service: Service) -> None:
    """Write a service's unit, enable it and start it; one that runs already is started anew.

    Raises:
        ConfigError: systemd does not run here, or refuses (the text has the unit, and where to put it), or the run's
            service belongs to another folder.
    """
    why = _absent(service)
    if why:
        raise ConfigError(f"{why}, so nothing was started.\n{_by_hand(service)}")
    other = _folder_of(service.path)
    if other is not None and other != _folder_line(service.unit):
        away = shlex.join(service.systemctl("disable", "--now", service.name))
        raise ConfigError(
            f"{service.path} runs a node of run {service.run!r} in {other} already, and a machine has one service for "
            f"each run. Call this there to start it anew, or remove it first: {away} && rm {service.path}"
        )
    try:
        service.path.parent.mkdir(parents=True, exist_ok=True)
        service.path.write_text(service.unit, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {str(service.path)!r}: {error.strerror}.\n{_by_hand(service)}") from error
    for words in (("daemon-reload",), ("enable", service.name), ("restart", service.name)):
        done = _call(service.systemctl(*words))
        if done.returncode:
            raise ConfigError(
                f"`{shlex.join(service.systemctl(*words))}` failed: {done.stderr.strip() or done.returncode}. The unit "
                f"is in {service.path}; try it by hand, or remove it."
            )


def _folder_of(unit: Path) -> str | None:
    """The folder in which an installed unit runs; None if there is none."""
    try:
        return _folder_line(unit.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _folder_line(unit: str) -> str | None:
    found = re.search(r"^WorkingDirectory=(.*)$", unit, re.MULTILINE)
    return None if found is None else found[1]


def _absent(service: Service) -> str:
    """Why no manager of systemd takes this service; empty if one does."""
    if shutil.which("systemctl") is None:
        return "there is no systemd on this machine"
    try:
        done = _call(service.systemctl("show", "--property=Version"))
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"systemd does not answer ({error})"
    said = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[0]
    return f"systemd does not run here ({said})" if done.returncode else ""


def _call(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=_SECONDS)


def _by_hand(service: Service) -> str:
    calls = [service.systemctl("daemon-reload"), service.systemctl("enable", "--now", service.name)]
    return (
        f"This is the unit. Save it as {service.path} and call: {' && '.join(map(shlex.join, calls))}\nUnder another "
        f"supervisor, have it run the line of ExecStart in {service.folder}, and start it again when it "
        f"fails.\n\n{service.unit}"
    )


def _word(text: str) -> str:
    """A word of a command line or an assignment in a unit, which means itself."""
    for special, escaped in (("\\", "\\\\"), ('"', '\\"'), ("%", "%%"), ("\n", "\\n")):
        text = text.replace(special, escaped)
    return f'"{text}"'

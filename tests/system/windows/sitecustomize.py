"""Takes from psyche's modules what Windows lacks, as far as that can be done on another system.

Every interpreter whose path has this folder runs it. Other libraries keep everything: they ask which system it is, and
that is not hidden from them.
"""

from __future__ import annotations

import asyncio.unix_events
import builtins
import os
import pathlib
import signal
import socket
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

MODULES = ("fcntl", "grp", "pwd", "resource", "termios")
NAMES = {
    os: "O_CLOEXEC O_DIRECTORY O_NOFOLLOW O_NONBLOCK fchmod fork getloadavg getpgid getuid killpg mkfifo pread pwrite "
    "posix_fallocate sched_getaffinity setsid statvfs sysconf uname",
    signal: "SIGALRM SIGCHLD SIGHUP SIGKILL SIGQUIT SIGUSR1 SIGUSR2 pthread_sigmask setitimer",
    socket: "AF_UNIX SO_REUSEPORT TCP_CONGESTION TCP_NOTSENT_LOWAT",
}


def without(module: ModuleType, names: str) -> ModuleType:
    copy = ModuleType(module.__name__)
    copy.__dict__.update({name: value for name, value in vars(module).items() if name not in names.split()})
    return copy


LESS = {module.__name__: without(module, names) for module, names in NAMES.items()}
LESS["os"].name = "nt"  # type: ignore[attr-defined]


def import_less(
    name: str,
    globals: Mapping[str, Any] | None = None,
    locals: Mapping[str, Any] | None = None,
    fromlist: Sequence[str] = (),
    level: int = 0,
) -> ModuleType:
    if not level and name in MODULES:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    found = builtins.__import__(name, globals, locals, fromlist, level)
    return found if level else LESS.get(name, found)


class Finder(MetaPathFinder):
    """Lets psyche's modules import by :func:`import_less`."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if not name.startswith("psyche_lightning"):
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next((found for finder in others if (found := finder.find_spec(name, path, target))), None)
        loader: Any = spec and spec.loader
        if loader is not None:
            execute = loader.exec_module

            def execute_with_less(module: ModuleType) -> None:
                vars(module)["__builtins__"] = {**vars(builtins), "__import__": import_less}
                execute(module)

            loader.exec_module = execute_with_less
        return spec


def unknown(*_: Any, **__: Any) -> None:
    raise NotImplementedError


def not_permitted(*_: Any, **__: Any) -> None:
    raise OSError(1314, "A required privilege is not held by the client")


asyncio.unix_events._UnixSelectorEventLoop.add_signal_handler = unknown  # type: ignore[assignment]
pathlib.Path.symlink_to = not_permitted  # type: ignore[assignment]
tempfile.TemporaryFile = tempfile.NamedTemporaryFile  # type: ignore[misc]
sys.meta_path.insert(0, Finder())

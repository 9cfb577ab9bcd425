"""What operating systems have or lack, in one place: Linux has all of it, macOS most, Windows a part.

The rest of the package asks here, and gets along with what it gets.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import IO

KILL = getattr(signal, "SIGKILL", signal.SIGTERM)
"""The signal that no process can refuse."""

MOVES_OPEN_FILES = os.name == "posix"
"""Whether a file can be renamed, or replaced by another, while a process has it open."""

# --- processes --------------------------------------------------------------------------------------------------------


def on_stop(call: Callable[[], object]) -> None:
    """Have the running event loop call ``call`` at Ctrl-C and SIGTERM, which then end nothing by themselves."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        try:
            loop.add_signal_handler(number, call)
        except NotImplementedError:  # Windows
            signal.signal(number, lambda *_: loop.call_soon_threadsafe(call))


def send_signal(process: subprocess.Popen[bytes], number: int) -> None:
    """Send a signal to a process that leads a session, and to all in it, if it still runs.

    Windows has no signals between processes: whichever it is, the process ends there, as with :data:`KILL`.
    """
    if process.poll() is not None:
        return
    with contextlib.suppress(ProcessLookupError):  # it may end in between
        if hasattr(os, "killpg"):
            os.killpg(process.pid, number)
        else:
            process.terminate()


# --- memory -----------------------------------------------------------------------------------------------------------

FROM_MAPS, KEPT = 32 << 20, 256 << 20
"""A block of so many bytes is memory of its own; at most so many bytes stay with the process when it frees others."""
LARGE = 1 << 20
"""The same of a process that shares a model with others, and so gathers and frees its parts all the time."""
FILLING = 1 << 17
"""The same while it fills its parts, once: between these, what is read and freed would leave gaps."""
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h


def keep_memory() -> bool:
    """Have this process keep memory that it frees, for what it takes next; returns whether its C library can.

    A training step frees what the step after it takes. Else the system takes the pages back each time, and clears them
    again, which is a twentieth of the time of a small model's step on a CPU. The peak stays as it was.
    """
    return _set_malloc({_MMAP_THRESHOLD: FROM_MAPS, _TRIM_THRESHOLD: KEPT})


def return_memory(block: int = LARGE) -> bool:
    """Have this process give memory back that it frees in large blocks; returns whether its C library can.

    What it keeps it keeps in pieces. Of a model whose layers are gathered and freed, these may take more than the rest.

    Args:
        block: bytes of the smallest such block. Each costs time: the system clears its pages.
    """
    return _set_malloc({_MMAP_THRESHOLD: block})


def _set_malloc(options: dict[int, int]) -> bool:
    try:
        library = ctypes.CDLL(None)
        set_option, is_glibc = library.mallopt, library.gnu_get_libc_version is not None
    except (AttributeError, OSError, TypeError):  # another C library; TypeError on Windows
        return False
    return is_glibc and all(set_option(option, value) for option, value in options.items())


# --- users ------------------------------------------------------------------------------------------------------------


def user() -> tuple[int, int] | None:
    """Numbers of this process's user and group; None on Windows, which has none."""
    if sys.platform == "win32":
        return None
    return os.geteuid(), os.getegid()


def user_name(number: int) -> str:
    """The name of a user.

    Raises:
        KeyError: there is no such user; on Windows, none has a number.
    """
    if sys.platform == "win32":
        raise KeyError(number)
    import pwd

    return pwd.getpwuid(number).pw_name


def give(path: Path, owner: tuple[int, int]) -> None:
    """Make a user and a group the owners of a file, where files have such.

    Raises:
        OSError: this process may not.
    """
    if sys.platform != "win32":
        os.chown(path, *owner)


# --- files ------------------------------------------------------------------------------------------------------------


def claim(file: IO[bytes]) -> bool:
    """Lock a file for this process until it closes it; False where another process has done so.

    Forked workers do not inherit the lock. A file system that knows no locks keeps nobody away.
    """
    try:
        if sys.platform == "win32":
            import msvcrt

            here = file.seek(0, os.SEEK_CUR)
            file.seek(1 << 40)  # a locked byte cannot be read, so it is one that the file never has
            try:
                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            finally:
                file.seek(here)
        else:
            import fcntl

            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # forked workers would inherit the lock of flock
    except ImportError:
        return True
    except OSError as error:
        return error.errno not in (errno.EACCES, errno.EAGAIN)
    return True


def open_to_others(file: IO[bytes]) -> bool:
    """Whether other users may read or write an open file; no for a pipe, and on Windows, which has no such mode."""
    mode = os.fstat(file.fileno()).st_mode
    return os.name == "posix" and stat.S_ISREG(mode) and bool(mode & 0o077)


def sync(path: Path) -> None:
    """Make a file's bytes, or the new names in a folder, durable; Windows opens no folders, and keeps their names."""
    folder = path.is_dir()
    if folder and not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(path, os.O_RDONLY if folder else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_at(file: IO[bytes], size: int, offset: int, writing: threading.Lock) -> bytes:
    """Bytes from a place in a file that is open for appending.

    Args:
        file: flushed.
        size: how many bytes; fewer come at the end of the file.
        offset: of the first.
        writing: held by whoever appends, and not by the caller. Needed where reading moves the file's position; there,
            no other process shares the file.
    """
    if hasattr(os, "pread"):
        data: bytes = os.pread(file.fileno(), size, offset)
        return data
    with writing:
        file.seek(offset)
        try:
            return file.read(size)
        finally:
            file.seek(0, os.SEEK_END)


def lead(link: Path, folder: Path) -> None:
    """Let the name ``link`` lead to a folder beside or below it, in place of what it led to before.

    It becomes a symbolic link, in one step. Windows makes those for administrators only: there it becomes a folder with
    the same files, which take no more room.
    """
    fresh = link.with_name(f"{link.name}.new")
    _remove(fresh)
    try:
        fresh.symlink_to(folder.relative_to(link.parent), target_is_directory=True)
    except OSError:
        shutil.copytree(folder, fresh, copy_function=os.link)
    if fresh.is_symlink() and (link.is_symlink() or not link.exists()):
        os.replace(fresh, link)
    else:
        _remove(link)
        os.rename(fresh, link)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


# --- the machine ------------------------------------------------------------------------------------------------------


def devices() -> dict[str, int]:
    """How many devices of each kind torch finds on this machine, the fastest kind last."""
    import torch

    found = {"cpu": 1, "mps": int(torch.backends.mps.is_available()), "cuda": torch.cuda.device_count()}
    return {kind: count for kind, count in found.items() if count}


def cores() -> int:
    """Cores that this process may use."""
    with contextlib.suppress(OSError):
        if hasattr(os, "sched_getaffinity"):
            return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory() -> int | None:
    """Bytes of memory of the machine; None where it does not say."""
    with contextlib.suppress(OSError, ValueError):
        if hasattr(os, "sysconf"):
            size: int = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
            return size
    return None


def load() -> float | None:
    """Processes that want to compute, the mean of a minute; None where the system does not count them."""
    with contextlib.suppress(OSError):
        if hasattr(os, "getloadavg"):
            mean: float = os.getloadavg()[0]
            return mean
    return None


def open_files() -> tuple[int | None, int | None]:
    """How many files this process may have open, and how far it may raise that; None for no limit."""
    if sys.platform == "win32":
        return None, None
    try:
        import resource
    except ImportError:
        return None, None
    soft, hard = (
        None if limit == resource.RLIM_INFINITY else limit for limit in resource.getrlimit(resource.RLIMIT_NOFILE)
    )
    return soft, hard

"""Writing files so that what fails says what to do."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from psyche_lightning.errors import StoreError


def write_all(file: BinaryIO, data: bytes) -> None:
    """Write everything to an unbuffered file: one write may be partial.

    Raises:
        OSError: it cannot be written; a part may be there.
    """
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


def sync(file: BinaryIO) -> None:
    """Make what was written to a file survive a power cut."""
    file.flush()
    os.fsync(file.fileno())


@contextlib.contextmanager
def explained(action: str, path: Path) -> Iterator[None]:
    """Turn an operating system error within into one with advice.

    Args:
        action: what fails, such as ``"write to the journal"``.
        path: its file or folder.

    Raises:
        StoreError: in place of an OSError.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            advice = "Free some space there, or choose a folder on another disk"
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            advice = "Make it writable for this user, or choose another folder"
        elif error.errno in (errno.ENOTDIR, errno.EEXIST, errno.EISDIR):
            advice = "Something else has that name: move it away, or choose another folder"
        else:
            advice = "Check the disk, or choose another folder"
        reason = error.strerror or str(error)
        raise StoreError(f"cannot {action} {path}: {reason}. {advice}; what was stored before is kept.") from error

"""Join links on the command line: as they are, or in a file, so that no list of processes shows them."""

from __future__ import annotations

import logging
from pathlib import Path

from psyche_lightning.errors import ConfigError
from psyche_lightning.protocol.link import whole_url

logger = logging.getLogger(__name__)

MARK = "@"
MAX_SIZE = 4096
"""Bytes of a link's file; a longer file is something else."""


def read_link(text: str | None) -> str | None:
    """A link as given, or that in the file behind ``@``. As a callback, it serves options and arguments.

    Raises:
        ConfigError: the file cannot be read, or does not hold one line of text.
    """
    if text is None or not text.startswith(MARK):
        return text
    path = Path(text.removeprefix(MARK))
    try:
        with path.open("rb") as file:
            data = file.read(MAX_SIZE + 1)
    except OSError as error:
        raise ConfigError(
            f"cannot read the join link in {str(path)!r}: {error.strerror}. Write the line there that `psyche run "
            "link RUN` prints, or give the link itself in place of @FILE."
        ) from error
    found = data.decode(errors="replace").strip()
    if not found or len(data) > MAX_SIZE or not found.isprintable():
        raise ConfigError(f"{str(path)!r} does not hold a join link: one line, as `psyche run link RUN` prints it")
    return found


def is_link(text: str) -> bool:
    """Whether an argument is a link, a coordinator's URL or a file with one, and no recipe or override."""
    return text.startswith(MARK) or "://" in whole_url(text).partition("=")[0]

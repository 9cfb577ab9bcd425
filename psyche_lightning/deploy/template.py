"""The templates, and the file of a join link beside what is made of them."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path

LINK_FILE = "join-link"
"""The file that holds a run's join link."""
TEMPLATES = files("psyche_lightning.deploy") / "templates"
_PLACE = re.compile(r"@([A-Z_]+)@")


def write_secret(path: Path, text: str) -> None:
    """Write a line to a file that its owner alone may read.

    Raises:
        OSError: it cannot be written.
    """
    fresh = path.with_name(f".{path.name}.new")
    fresh.unlink(missing_ok=True)
    with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(f"{text}\n")
    fresh.replace(path)


def template(name: str) -> str:
    """The text of a template, as ``FOLDER/FILE``."""
    return TEMPLATES.joinpath(*name.split("/")).read_text("utf-8")


def filled(text: str, values: Mapping[str, str]) -> str:
    """A template's text with values in the places ``@NAME@``."""
    return _PLACE.sub(lambda match: values[match[1]], text)

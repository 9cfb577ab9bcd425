"""The console to which commands print."""

from __future__ import annotations

import os

from rich.console import Console

WIDE = 200


def stdout() -> Console:
    """Standard output: as wide as the terminal; elsewhere 200 columns wide, and lines are not wrapped."""
    console = Console()
    return console if console.is_terminal or "COLUMNS" in os.environ else Console(width=WIDE, soft_wrap=True)

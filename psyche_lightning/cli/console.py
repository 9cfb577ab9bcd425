"""The console to which commands print.

Much of what commands show was chosen by others: nodes' addresses, servers' reasons, names in manifests. So text is text
here: square brackets style nothing (a command styles with :class:`rich.text.Text`), and what a terminal would obey is
escaped.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.table import Table

from psyche_lightning.text import plain

WIDE = 200


class PlainConsole(Console):
    """A console on which text styles nothing and moves no cursor; arguments as :class:`rich.console.Console`."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(markup=False, emoji=False, **settings)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """As rich does, with all text escaped, and cells folded rather than cut; rich's own control codes pass."""
        if isinstance(renderable, Table):
            for column in renderable.columns:
                if column.overflow == "ellipsis":  # rich's default
                    column.overflow = "fold"
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=plain(segment.text, lines=True))


def say(text: str) -> None:
    """Print text that others may have chosen, unwrapped."""
    print(plain(text, lines=True), flush=True)


def stdout() -> Console:
    """Standard output: as wide as the terminal; elsewhere 200 columns wide, and lines are not wrapped."""
    console = PlainConsole()
    return console if console.is_terminal or "COLUMNS" in os.environ else PlainConsole(width=WIDE, soft_wrap=True)

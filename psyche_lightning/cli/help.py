"""Help texts: a command's docstring, with its section ``Examples:`` shown below the options."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import typer

_EXAMPLES = re.compile(r"\n\s*\nExamples:\n((?:    .*\n?|\s*\n)+)\Z")


def with_examples(group: typer.Typer) -> typer.Typer:
    """A group of commands, whose own examples are shown below the options of each."""
    for command in group.registered_commands:
        if command.callback is not None and command.help is None:
            command.help, command.epilog = help_of(command.callback)
    own = group.registered_callback
    if own is not None and own.callback is not None:
        own.help, own.epilog = help_of(own.callback)
    for inner in group.registered_groups:
        if inner.typer_instance is not None:
            with_examples(inner.typer_instance)
    return group


def help_of(function: Callable[..., Any]) -> tuple[str, str | None]:
    """The help text of a command's function, and the text below its options; None without examples.

    The docstring's last section ``Examples:`` has one command a line, indented by four spaces.
    """
    from rich.markup import escape

    text = inspect.getdoc(function) or ""
    found = _EXAMPLES.search(text)
    if found is None:
        return text, None
    # typer joins the lines of a paragraph, and puts each paragraph on a line of its own
    lines = ["[bold]Examples:[/bold]", *(escape(line) for line in inspect.cleandoc(found[1]).splitlines())]
    return text[: found.start()], "\n\n".join(lines)

"""``psyche plugins``: lists installed plugins, what loading each takes, and those that failed to load."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from psyche_lightning.cli import COMMANDS
from psyche_lightning.cli.console import stdout
from psyche_lightning.json_text import json_text
from psyche_lightning.plugins import Plugins, load_plugins

SLOW = 0.5
"""Seconds from which on a plugin's loading is named: every command that needs plugins waits for it."""


def plugins(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """List installed plugins, their distributions and how long each takes to load, and those that failed to load.

    A plugin that imports torch or the like while it loads is named: such imports belong where they are needed.

    The exit code is 1 if a plugin failed to load or two plugins register one name.

    Examples:
        psyche plugins
        PSYCHE_PLUGINS=mla psyche plugins --json
    """
    loaded = load_plugins()
    conflicts = [registry.conflict(name) for registry in loaded.registries() for name in registry.conflicts]
    for name, found in loaded.commands().registrations.items():
        if name in COMMANDS:
            conflicts.append(f"The {found.owner} registers {name!r}, which is a command of psyche itself and stays so.")
    if as_json:
        print(json_text(_report(loaded, conflicts), 2))
    else:
        _print(loaded, conflicts)
    if conflicts or loaded.failures:
        raise typer.Exit(1)


def _report(loaded: Plugins, conflicts: list[str]) -> dict[str, object]:
    return {
        "plugins": [
            {
                "kind": found.kind,
                "name": found.name,
                "plugin": found.plugin,
                "distribution": found.distribution,
                "version": found.version,
            }
            for registry in loaded.registries()
            for found in registry.registrations.values()
        ],
        "conflicts": conflicts,
        "failures": [asdict(failure) for failure in loaded.failures],
        "loadings": [asdict(loading) for loading in loaded.loadings],
    }


def _print(loaded: Plugins, conflicts: list[str]) -> None:
    console = stdout()
    table = Table("Plugin", "Adds")
    table.add_column("Loads in", justify="right")
    for loading in loaded.loadings:
        origin = f"{loading.distribution} {loading.version}"
        table.add_row(
            Text.assemble((loading.plugin, "bold"), "\n", (origin, "dim")),
            Text("\n").join(_adds(loaded, loading.plugin, loading.distribution)),
            f"{1000 * loading.seconds:.0f} ms",
            end_section=True,
        )
    console.print(table)
    for loading in loaded.loadings:
        origin = f"{loading.plugin} of {loading.distribution} {loading.version}"
        if loading.heavy:
            text = f"{origin} imports {', '.join(loading.heavy)} while it loads ({loading.seconds:.1f} s)."
            console.print(Text(f"{text} Such imports belong into its factories.", style="yellow"), soft_wrap=True)
        elif loading.seconds > SLOW:
            text = f"{origin} takes {loading.seconds:.1f} s to load; commands that need plugins wait for it."
            console.print(Text(text, style="yellow"), soft_wrap=True)
    for failure in loaded.failures:
        head = f"{failure.plugin} of {failure.distribution} {failure.version} failed to load: "
        console.print(Text.assemble((head, "bold red"), failure.error), soft_wrap=True)
    for conflict in conflicts:
        console.print(Text(conflict, style="red"), soft_wrap=True)


def _adds(loaded: Plugins, plugin: str, distribution: str) -> list[Text]:
    """A line for each kind of what a plugin registers."""
    lines = []
    for registry in loaded.registries():
        names = [
            found.name
            for found in registry.registrations.values()
            if (found.plugin, found.distribution) == (plugin, distribution)
        ]
        if names:
            lines.append(Text.assemble((f"{registry.kind} ", "dim"), ", ".join(names)))
    return lines or [Text("nothing", style="red")]

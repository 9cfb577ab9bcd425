"""``psyche plugins``: lists installed plugins, their distributions, and those that failed to load."""

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


def plugins(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """List installed plugins and their distributions, and those that failed to load, with the reason.

    The exit code is 1 if a plugin failed to load or two plugins register one name.
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
    }


def _print(loaded: Plugins, conflicts: list[str]) -> None:
    console = stdout()
    table = Table("Kind", "Name", "Plugin", "Distribution")
    for registry in loaded.registries():
        for found in registry.registrations.values():
            origin = f"{found.distribution} {found.version}"
            table.add_row(found.kind, Text(found.name, style="bold"), found.plugin, origin)
        table.add_section()
    console.print(table)
    for failure in loaded.failures:
        head = f"{failure.plugin} of {failure.distribution} {failure.version} failed to load: "
        console.print(Text.assemble((head, "bold red"), failure.error), soft_wrap=True)
    for conflict in conflicts:
        console.print(Text(conflict, style="red"), soft_wrap=True)

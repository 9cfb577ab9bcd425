"""``psyche recipes``: lists the recipes that have a name here."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from psyche_lightning.cli.console import stdout
from psyche_lightning.errors import ConfigError
from psyche_lightning.json_text import json_text
from psyche_lightning.recipe import load_recipe
from psyche_lightning.recipe.loading import recipe_folders


@dataclass(frozen=True)
class Listed:
    """A recipe, as the list shows it.

    Attributes:
        name: its name on a command line.
        path: its file.
        about: the first paragraph of its comment, in one line.
        model: ``model.name``.
        rounds: ``run.total_steps``; None where the run ends otherwise.
        error: why it cannot be read; empty for a recipe that can.
    """

    name: str
    path: str
    about: str
    model: str = ""
    rounds: int | None = None
    error: str = ""


def recipes(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """List the recipes that `psyche train`, `run create` and the like know by name.

    They lie in ./recipes and in what is installed; of two with one name the first counts. The exit code is 1 if one
    cannot be read.

    Examples:
        psyche recipes
        psyche train mla-200m --dry-run
    """
    found: dict[str, Listed] = {}
    for folder in recipe_folders():
        for path in sorted(folder.glob("*.yaml")):
            found.setdefault(path.stem, _listed(path))
    if as_json:
        print(json_text([asdict(one) for one in found.values()], 2))
    else:
        _print(list(found.values()))
    if any(one.error for one in found.values()):
        raise typer.Exit(1)


def _listed(path: Path) -> Listed:
    about = _about(path.read_text(encoding="utf-8", errors="replace"))
    try:
        recipe = load_recipe(path)
    except ConfigError as error:
        return Listed(path.stem, str(path), about, error=str(error))
    return Listed(path.stem, str(path), about, recipe.model.name, recipe.run.total_steps)


def _about(text: str) -> str:
    """The first paragraph of the comment with which a file begins, in one line."""
    comment = re.match(r"(?:#[^\n]*\S[^\n]*(?:\n|\Z))*", text)
    lines = comment[0].splitlines() if comment else []
    return " ".join(line.lstrip("#").strip() for line in lines if line.strip("# "))


def _print(recipes: list[Listed]) -> None:
    console = stdout()
    table = Table("Recipe", "About", "Model")
    table.add_column("Rounds", justify="right")
    for one in recipes:
        about = Text(one.error, style="red") if one.error else Text(one.about)
        rounds = "" if one.rounds is None else f"{one.rounds:,}"
        table.add_row(Text(one.name, style="bold"), about, one.model, rounds, end_section=True)
    console.print(table)

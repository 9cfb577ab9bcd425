"""``psyche plugin``: creates a plugin, as a complete package whose tests pass."""

from __future__ import annotations

import keyword
import re
from enum import Enum
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from psyche_lightning.cli import COMMANDS
from psyche_lightning.errors import ConfigError, PsycheError
from psyche_lightning.plugins import Registry, load_plugins

if TYPE_CHECKING:
    from importlib.abc import Traversable

TEMPLATES = "plugin_templates"
SUFFIX = ".txt"
LONGEST = 40
_NAME = re.compile(r"[a-z][a-z0-9]*([-_][a-z0-9]+)*")

plugin = typer.Typer(no_args_is_help=True, help="Create a plugin of your own.")


class Kind(str, Enum):
    """What a plugin can add; the values are the folders of templates."""

    TRANSPORT = "transport"
    COORDINATOR = "coordinator"
    MODEL = "model"
    DATA = "data"
    EXPORT = "export"
    COMMAND = "command"

    @property
    def words(self) -> str:
        """The plugin host's name of the kind."""
        return {Kind.DATA: "data provider", Kind.EXPORT: "export format"}.get(self, self.value)

    @property
    def registry(self) -> str:
        """The plugin host's method that lists the installed plugins of the kind."""
        return "exports" if self is Kind.EXPORT else f"{self.words.replace(' ', '_')}s"


@plugin.callback()
def _group() -> None:
    """Create a plugin of your own."""


@plugin.command()
def new(
    kind: Annotated[Kind, typer.Argument(help="What the plugin adds.", show_default=False)],
    name: Annotated[str, typer.Argument(help="Its name in recipes and command lines.", show_default=False)],
    directory: Annotated[Path, typer.Option(help="Folder for the new package's folder.")] = Path("."),
) -> None:
    """Write a complete package: entry point, a working implementation, the conformance tests, a README.

    It is an ordinary Python package, psyche-lightning-NAME, and its tests pass without changes.

    Examples:
        psyche plugin new transport pigeon
    """
    folder = write(kind, name, directory)
    console = Console(soft_wrap=True, highlight=False)
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        console.print(f"  {path}", markup=False)
    console.print(
        f"\nNow: cd {folder} && pip install -e '.[testing]' && pytest\nThen make it your own; "
        "docs/plugins.md and psyche_lightning/hookspecs.py are the manual.",
        markup=False,
    )


def write(kind: Kind, name: str, directory: Path) -> Path:
    """Write a package.

    Args:
        kind: what the plugin adds.
        name: the name that it registers.
        directory: the folder for the package's folder; created if missing.

    Returns:
        The new folder.

    Raises:
        ConfigError: the name is not valid or is taken, or the folder exists or cannot be written.
    """
    _check_name(kind, name)
    distribution = f"psyche-lightning-{name.replace('_', '-')}"
    folder = directory / distribution
    values = {
        "kind": kind.words,
        "registry": kind.registry,
        "name": name,
        "distribution": distribution,
        "module": distribution.replace("-", "_"),
        "class": "".join(part.capitalize() for part in re.split("[-_]", name)),
    }
    root = files("psyche_lightning.cli") / TEMPLATES
    texts = {
        _filled(path.replace("package/", "{{module}}/"), values): _filled(source.read_text("utf-8"), values)
        for part in ("common", kind.value)
        for path, source in _sources(root / part)
    }
    try:
        folder.mkdir(parents=True)
        for path, text in texts.items():
            (folder / path).parent.mkdir(exist_ok=True)
            (folder / path).write_text(text, encoding="utf-8")
    except FileExistsError as error:
        raise ConfigError(
            f"{str(error.filename)!r} already exists and is not overwritten; choose another name, or another "
            "folder with --directory"
        ) from error
    except OSError as error:
        raise ConfigError(f"the package cannot be written to {str(folder)!r}: {error.strerror}") from error
    return folder


def _sources(folder: Traversable, prefix: str = "") -> list[tuple[str, Traversable]]:
    """The templates in a folder, each with the path of its file in the package."""
    found = []
    for entry in folder.iterdir():
        if entry.is_dir():
            found += _sources(entry, f"{prefix}{entry.name}/")
        elif entry.name.endswith(SUFFIX):
            found.append((prefix + entry.name.removesuffix(SUFFIX), entry))
    return found


def _filled(text: str, values: dict[str, str]) -> str:
    return re.sub(r"\{\{(\w+)\}\}", lambda match: values[match[1]], text)


def _check_name(kind: Kind, name: str) -> None:
    if not _NAME.fullmatch(name) or len(name) > LONGEST or keyword.iskeyword(name):
        raise ConfigError(
            f"a plugin cannot have the name {name!r}: a name begins with a lower-case letter, followed by lower-case "
            f"letters, digits and single '-' or '_', at most {LONGEST} characters, and is not a Python keyword"
        )
    if kind is Kind.COMMAND and name in COMMANDS:
        raise ConfigError(f"{name!r} is a command of psyche itself; choose another name")
    installed: Registry[object] = getattr(load_plugins(), kind.registry)()
    if name in installed:
        owner = installed.registrations[name].owner
        raise ConfigError(f"{owner} already registers the {kind.words} {name!r}; choose another name")
    if name in installed.conflicts:
        raise PsycheError(installed.conflict(name))
    if kind is Kind.MODEL:
        from transformers import CONFIG_MAPPING

        if name in CONFIG_MAPPING:
            raise ConfigError(
                f"transformers has the model type {name!r}, and checkpoints name their type; choose another name"
            )

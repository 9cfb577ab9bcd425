"""Every command in the documentation exists, with its options, recipes and keys."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.core import TyperGroup

from psyche_lightning.cli import COMMANDS, _app
from psyche_lightning.plugins import Plugins
from psyche_lightning.recipe import load_recipe
from psyche_lightning.recipe.loading import find_recipe, parse_override

ASSIGNMENT = re.compile(r"[A-Z_]+=")


def commands_of(line: str) -> Iterator[list[str]]:
    """The calls of psyche in a line of shell."""
    words: list[str] = []
    lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;")
    lexer.whitespace_split = True
    for word in [*lexer, "&"]:
        if not set(word) <= set("&|;"):
            words.append(word)
            continue
        while words and ASSIGNMENT.match(words[0]):
            del words[0]
        if words and words[0] == "psyche":
            yield words[1:]
        words = []


def child(command: Any, name: str) -> Any:
    """The sub-command, in full, though its group may load it only when it is called; None if there is none."""
    context = typer.Context(command, resilient_parsing=True)
    return command.resolve_command(context, [name])[1] if name in command.list_commands(context) else None


def parse(arguments: list[str]) -> tuple[list[str], dict[str, Any]]:
    """Parse a call as psyche does, without running it: the names of its commands and their parameters."""
    path: list[str] = []
    rest = [*arguments]
    while rest[0].startswith("-"):
        assert rest[0] in ("--traceback", "--verbose", "--version", "--help")
        del rest[0]
    command: Any = typer.main.get_command(_app(rest[0]))
    while isinstance(command, TyperGroup):
        if command.invoke_without_command and (not rest or rest[0].startswith("-")):
            break
        assert rest, f"`psyche {' '.join(path)}` wants a sub-command"
        path.append(rest.pop(0))
        command = child(command, path[-1])
        assert command, f"there is no `psyche {' '.join(path)}`"
    return path, command.make_context(path[-1], rest).params


def check_recipe(path: list[str], parameters: dict[str, Any]) -> None:
    if path[0] in ("train", "demo"):
        load_recipe(parameters["recipe"], parameters["overrides"] or (), twin=parameters["twin"])
    elif path == ["run", "create"]:
        recipe, *overrides = parameters["arguments"] or [""]
        if "=" in recipe or not recipe:
            for override in filter(None, [recipe, *overrides]):
                assert parse_override(override)[0].startswith(("run.", "distro."))
        else:
            load_recipe(recipe, overrides, twin=parameters["twin"])


def test_every_command_in_a_block_can_be_typed(pages: list[Any], tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("PSYCHE_PLUGINS", "mla,text,solana")
    found = set()
    for page in pages:
        page.write_files(tmp_path)
    (tmp_path / "join-link").write_text("https://train.example.org:8080\n")  # which commands read as @join-link
    monkeypatch.chdir(tmp_path)
    for page in pages:
        for block in page.blocks:
            if block.language not in ("bash", "sh", "console"):
                continue
            for line in block.text.replace("\\\n", " ").splitlines():
                for arguments in commands_of(line):
                    if arguments[0] == "sums":  # the example's own, which its test runs
                        continue
                    try:
                        path, parameters = parse(arguments)
                        check_recipe(path, parameters)
                    except (Exception, SystemExit) as error:
                        pytest.fail(f"{block.place}: psyche {' '.join(arguments)}: {error!r}")
                    found.add(" ".join(path))
    assert found >= {"demo", "train", "coordinator", "run create", "run status", "run pause", "plugins", "generate"}


def test_every_command_in_the_text_exists(pages: list[Any]) -> None:
    for page in pages:
        for span in page.spans:
            if not span.startswith("psyche ") or span.startswith("psyche NAME"):
                continue
            words = shlex.split(span)[1:]
            command: Any = None
            options = [word for word in words if word.startswith("-")]
            for word in words:
                if word.startswith("-"):
                    if getattr(command, "invoke_without_command", False):
                        break  # what follows belongs to its own options
                    continue
                group = typer.main.get_command(_app(words[0])) if command is None else command
                if isinstance(group, TyperGroup):
                    command = child(group, word)
                    assert command, f"{page.name}: `{span}` does not exist"
            if command is not None:
                known = {
                    option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)
                }
                known |= {"--help", "--traceback", "--verbose"}
                assert set(options) <= known, f"{page.name}: `{span}` has unknown options"


def test_every_option_in_the_text_is_one_of_some_command(pages: list[Any]) -> None:
    program: Any = typer.main.get_command(_app("plugins"))
    known = {"--help", "--strict"} | {option for parameter in program.params for option in parameter.opts}
    for name in (*COMMANDS, "solana"):
        pending = [child(typer.main.get_command(_app(name)), name)]
        while pending:
            command = pending.pop()
            if isinstance(command, TyperGroup):
                pending += [child(command, each) for each in command.list_commands(typer.Context(command))]
            known |= {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    for page in pages:
        for span in page.spans:
            if span.split(" ")[0] in ("torchrun", "pip", "python", "git", "solana", "systemctl"):
                continue
            for option in re.findall(r"(?:^| )(--[a-z-]+)", span):
                assert option in known, f"{page.name}: no command has {option} (in `{span}`)"


def test_every_command_is_in_the_documentation(pages: list[Any]) -> None:
    text = "\n".join(page.text for page in pages)
    assert [name for name in COMMANDS if f"psyche {name}" not in text] == []


def test_every_recipe_is_on_the_page_of_recipes(page: Callable[[str], Any]) -> None:
    table = page("recipes.md").text.partition("## A small one")[0]
    names = re.findall(r"^\| `([a-z0-9-]+)` \|", table, re.MULTILINE)
    folder = Path(__file__).parents[2] / "recipes"
    assert sorted(names) == sorted(path.stem for path in folder.glob("*.yaml"))
    assert all(find_recipe(name) for name in names)


def test_the_example_s_command_is_there_once_it_is_installed(example: Path) -> None:
    assert "sums" in Plugins(only=["sums"]).commands()

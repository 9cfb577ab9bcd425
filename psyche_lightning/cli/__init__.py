"""The ``psyche`` command: a table of its sub-commands. It imports only the one that is called."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import typer

from psyche_lightning.cli.help import help_of, with_examples
from psyche_lightning.errors import PluginError, PsycheError
from psyche_lightning.logs import Stream, handled, tell_more
from psyche_lightning.plugins import Registration, failed_to_load, load_plugins, packages
from psyche_lightning.version import __version__

TRACEBACK_VARIABLE = "PSYCHE_TRACEBACK"
VERBOSE_VARIABLE = "PSYCHE_VERBOSE"
# Where a shell's completion leaves the line that is being typed: bash, and the others.
_TYPED = ("COMP_WORDS", "_TYPER_COMPLETE_ARGS")


@dataclass(frozen=True)
class Command:
    """A built-in sub-command.

    Attributes:
        target: ``"module:name"`` of a function with typer's annotations, or of a ``typer.Typer`` with sub-commands.
        help: its line in ``psyche --help``.
        log: the stream of its log; standard output only if the command prints nothing else.
    """

    target: str
    help: str
    log: Stream = "stderr"


# A new command is one line here and a module; third parties add theirs with the hook register_commands.
COMMANDS = {
    "train": Command("psyche_lightning.cli.train:train", "Train as one node: join a run, or run alone.", log="stdout"),
    "join": Command("psyche_lightning.cli.join:join", "Join a run with nothing but its link.", log="stdout"),
    "recipes": Command("psyche_lightning.cli.recipes:recipes", "List the recipes that have a name here."),
    "generate": Command("psyche_lightning.cli.generate:generate", "Complete a text with a checkpoint."),
    "eval": Command("psyche_lightning.cli.eval:evaluate", "Evaluate a checkpoint on tasks of lm-eval."),
    "checkpoints": Command("psyche_lightning.cli.checkpoints:checkpoints", "List, check and copy checkpoints."),
    "export": Command("psyche_lightning.cli.export:export", "Write a checkpoint in another format."),
    "observe": Command("psyche_lightning.cli.observe:observe", "Look at what nodes did, round by round."),
    "top": Command("psyche_lightning.cli.top:top", "Watch a run in the terminal."),
    "sim": Command("psyche_lightning.cli.sim:sim", "Replay whole runs under faults in virtual time."),
    "coordinator": Command("psyche_lightning.cli.coordinator:coordinator", "Serve runs to nodes, and a live page."),
    "data": Command("psyche_lightning.cli.data:data", "Make, inspect and serve token files."),
    "run": Command("psyche_lightning.cli.run:run", "Create, inspect, pause and resume runs."),
    "deploy": Command("psyche_lightning.cli.deploy:deploy", "Write files that deploy a run, such as an image."),
    "demo": Command("psyche_lightning.cli.demo:demo", "Watch several nodes on this machine train a model."),
    "doctor": Command("psyche_lightning.cli.doctor:doctor", "Check this machine for a run; predict the run's speed."),
    "plan": Command("psyche_lightning.cli.plan:plan", "Propose k, local steps and batch for a link and a time."),
    "bench": Command("psyche_lightning.cli.bench:bench", "Measure bytes, speed and quality."),
    "clean": Command("psyche_lightning.cli.clean:clean", "Free what nodes of finished runs left on disk."),
    "plugin": Command("psyche_lightning.cli.plugin:plugin", "Create a plugin of your own."),
    "plugins": Command("psyche_lightning.cli.plugins:plugins", "List installed plugins and those that failed."),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``psyche``; returns its exit code.

    It is 0, 1 for an explained error, 2 for wrong usage, 130 for Ctrl-C, 143 for SIGTERM, or 137 if a rank of this
    process's node was killed.

    Args:
        arguments: the command line without the program's name; None for that of this process.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    name = _command_name(_typed() or arguments)
    with handled(COMMANDS[name].log if name in COMMANDS else "stderr", packages()):
        return _run(name, arguments)


def _run(name: str | None, arguments: list[str]) -> int:
    try:
        _app(name)(arguments, prog_name="psyche")
    except SystemExit as end:
        if end.code == 2 and name is not None and name not in COMMANDS and name not in load_plugins().commands():
            failed = failed_to_load(load_plugins().failures)
            if failed:
                print(failed.strip(), file=sys.stderr)  # one of them may have the command
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except KeyboardInterrupt:
        return 130
    except PsycheError as error:
        if os.environ.get(TRACEBACK_VARIABLE, "0") not in ("", "0"):
            raise
        _explain(str(error))
        return error.exit_code
    return 0


def _command_name(arguments: list[str]) -> str | None:
    """The sub-command on the command line; the options before it take no values."""
    return next((argument for argument in arguments if not argument.startswith("-")), None)


def _typed() -> list[str]:
    """The line to complete, without the program's name; empty if no shell asks for completions."""
    if "_PSYCHE_COMPLETE" not in os.environ:
        return []
    return next((os.environ[name].split()[1:] for name in _TYPED if name in os.environ), [])


def _app(called: str | None) -> typer.Typer:
    """Build the application: the called command, and only the names and help lines of the others."""
    app = typer.Typer(
        name="psyche",
        help="Train one model on many machines that share only the internet.",
        no_args_is_help=True,
        context_settings={"help_option_names": ["-h", "--help"]},
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
    )
    app.callback()(_options)
    for name, command in COMMANDS.items():
        _add(app, name, command.help, _load(command.target) if name == called else None)
    if called not in COMMANDS:
        commands = load_plugins().commands()
        for name, registration in commands.registrations.items():
            if name not in COMMANDS:  # `psyche plugins` names plugins that try to take one
                _add(app, name, _help_line(registration), commands[name]() if name == called else None)
        if called in commands.conflicts:
            raise PluginError(commands.conflict(called))
    return app


def _print_version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


def _options(
    traceback: bool = typer.Option(
        False, "--traceback", envvar=TRACEBACK_VARIABLE, help="Show Python's traceback of an error."
    ),
    verbose: bool = typer.Option(False, "--verbose", envvar=VERBOSE_VARIABLE, help="Log details for developers, too."),
    version: bool = typer.Option(
        False, "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
    ),
) -> None:
    """Train one model on many machines that share only the internet."""
    if traceback:  # processes that the command starts inherit it
        os.environ[TRACEBACK_VARIABLE] = "1"
    if verbose:
        os.environ[VERBOSE_VARIABLE] = "1"
        tell_more(packages())


def _add(app: typer.Typer, name: str, help_line: str, command: Callable[..., Any] | typer.Typer | None) -> None:
    if isinstance(command, typer.Typer):
        app.add_typer(with_examples(command), name=name, short_help=help_line)
    else:
        function = command or _only_listed
        text, epilog = help_of(function)
        app.command(name, short_help=help_line, help=text, epilog=epilog)(function)


def _only_listed() -> None:
    """Placeholder for a command that is listed but not called."""


def _load(target: str) -> Callable[..., Any] | typer.Typer:
    module, _, name = target.partition(":")
    command: Callable[..., Any] | typer.Typer = getattr(importlib.import_module(module), name)
    return command


def _help_line(registration: Registration) -> str:
    from rich.markup import escape

    lines = (registration.offer.__doc__ or "").strip().splitlines()
    return escape(f"{lines[0] if lines else ''} ({registration.distribution})".strip())


def _explain(message: str) -> None:
    from rich.text import Text

    from psyche_lightning.cli.console import PlainConsole

    PlainConsole(stderr=True, soft_wrap=True).print(Text.assemble(("error: ", "bold red"), message))

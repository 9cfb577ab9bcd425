from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.text import Text
from typer.main import get_command

import psyche_lightning
from psyche_lightning import cli
from psyche_lightning.cli import COMMANDS, main

PROGRAM = [sys.executable, "-m", "psyche_lightning"]
Psyche = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def psyche(tmp_path: Path) -> Psyche:
    """Runs ``psyche`` in a process of its own, in an empty folder, with extra folders on its path."""

    def run(*arguments: str, path: tuple[Path, ...] = (), **variables: str) -> subprocess.CompletedProcess[str]:
        environment = {key: value for key, value in os.environ.items() if not key.startswith("PSYCHE_")}
        environment |= {
            "PYTHONPATH": os.pathsep.join([*map(str, path), *filter(None, sys.path)]),
            "COLUMNS": "200",
            "OMP_NUM_THREADS": "1",
            **variables,
        }
        return subprocess.run(
            [*PROGRAM, *arguments], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=240
        )

    return run


def distribution(site: Path, name: str, module: str, source: str, version: str = "1.0") -> Path:
    """Install a plugin for real: a module and a dist-info folder with an entry point."""
    info = site / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "entry_points.txt").write_text(f"[psyche_lightning]\n{module} = {module}\n")
    (site / f"{module}.py").write_text("from psyche_lightning import hookimpl\n\n\n" + source)
    return site


GREET = '''
@hookimpl
def register_commands(register):
    register("greet", greet)


def greet():
    """Say hello to somebody."""
    import typer

    def command(name: str, loud: bool = False) -> None:
        if name == "nobody":
            from psyche_lightning.errors import PsycheError

            raise PsycheError("There is nobody; say somebody's name.")
        print(f"hello {name}" + "!" * loud)

    return command
'''


def test_help_lists_every_command_and_imports_nothing_heavy(psyche: Psyche) -> None:
    done = psyche("--help")
    assert done.returncode == 0
    for name, command in COMMANDS.items():
        assert f" {name} " in done.stdout
        assert command.help in done.stdout
    script = (
        "import sys; from psyche_lightning.cli import main; main(['--help'])\n"
        "heavy = {'torch', 'lightning', 'transformers', 'matplotlib', 'aiohttp', 'omegaconf', 'numpy'}\n"
        "print(sorted(heavy & {*sys.modules}), file=sys.stderr)"
    )
    listed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert listed.stderr.strip() == "[]"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_listed_command_exists_and_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--help"]) == 0
    shown = capsys.readouterr().out
    assert "Usage: psyche " + name in shown.replace("\n", "")
    assert main([name, "-h"]) == 0
    assert capsys.readouterr().out == shown


def leaves(command: Any, words: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Each command below one, with the words that call it."""
    inner = getattr(command, "commands", None)
    if inner is None:
        yield words, command
    else:
        for name in inner:
            yield from leaves(inner[name], (*words, name))


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_s_help_has_examples_that_it_takes(name: str) -> None:
    app: Any = get_command(cli._app(name))
    for words, command in leaves(app.commands[name], (name,)):
        title, *examples = (command.epilog or "").split("\n\n")
        assert title == "[bold]Examples:[/bold]", f"psyche {' '.join(words)} has no examples"
        for example in examples:
            typed = shlex.split(Text.from_markup(example).plain)
            program = typed.index("psyche")
            assert all("=" in variable for variable in typed[:program])
            assert len(f" {example}") <= 80, f"too long to be read in a terminal: {example}"
            app.make_context("psyche", typed[program + 1 :])
            if tuple(typed[program + 1 :][: len(words)]) == words:
                command.make_context(" ".join(words), typed[program + 1 + len(words) :])


def test_recipes_are_listed_with_what_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "recipes").mkdir()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes" / "demo.yaml").write_text(
        "# Mine alone.\n# And more.\n#\n# Not this.\n"
        "model: {name: hf}\ndata: {name: text}\noptimizer: {lr: 1.0e-3}\nrun: {total_steps: 7}\n"
    )
    assert main(["recipes", "--json"]) == 0
    found = {one["name"]: one for one in json.loads(capsys.readouterr().out)}
    assert {"consilience-40b", "mla-200m", "hf-llama", "tokens"} < set(found)
    assert found["demo"]["about"] == "Mine alone. And more."
    assert (found["demo"]["model"], found["demo"]["rounds"]) == ("hf", 7)
    assert all(one["about"] and not one["error"] for one in found.values())
    (tmp_path / "recipes" / "broken.yaml").write_text("run: [")
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["recipes"]) == 1
    table = capsys.readouterr().out
    assert "Mine alone." in table
    assert "broken" in table
    assert max(map(len, table.splitlines())) <= 80


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("tra", ["train"]),
        ("plu", ["plugin", "plugins"]),
        ("train --tw", ["--twin"]),
        ("run cre", ["create"]),
        ("run create --coord", ["--coordinator"]),
        ("gre", ["greet"]),  # a plugin's
        ("greet --lo", ["--loud"]),
    ],
)
def test_bash_completes_commands_and_their_options(
    psyche: Psyche, tmp_path: Path, typed: str, offered: list[str]
) -> None:
    site = distribution(tmp_path / "site", "psyche-lightning-greet", "psyche_greet", GREET)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), *filter(None, sys.path)])}
    (tmp_path / "psyche").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m psyche_lightning "$@"\n')
    (tmp_path / "psyche").chmod(0o755)
    shown = psyche("--show-completion", "bash", _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1").stdout
    script = (
        f"{shown}\nCOMP_WORDS=(psyche {typed}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))\n"
        f"_psyche_completion {tmp_path}/psyche\nprintf '%s\\n' \"${{COMPREPLY[@]}}\""
    )
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == offered


def test_the_other_shells_complete_options_of_a_command(psyche: Psyche) -> None:
    done = psyche(_PSYCHE_COMPLETE="complete_zsh", _TYPER_COMPLETE_ARGS="psyche train --tw")
    assert "--twin" in done.stdout
    assert "--traceback" not in done.stdout


def test_version(psyche: Psyche) -> None:
    done = psyche("--version")
    assert (done.returncode, done.stdout) == (0, f"{psyche_lightning.__version__}\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nonsense"], "No such command 'nonsense'"),
        (["plugins", "--nonsense"], "No such option"),
        (["generate", "x"], "Missing option '--prompt'"),
        (["train"], "Missing argument"),
    ],
)
def test_wrong_usage_ends_with_2(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "dmo"], "error: There is no recipe 'dmo'"),
        (["train", "demo", "run.totl_steps=3"], "Did you mean 'run.total_steps'?"),
        (["train", "demo", "lr=fast"], "optimizer.lr is 'fast' (text); a number was expected."),
        (["train", "demo", "model.name=mlp", "--dry-run"], "There is no model 'mlp'. Did you mean 'mla'?"),
        (["train", "demo", "data.name=txt", "--dry-run"], "There is no data provider 'txt'. Did you mean 'text'?"),
        (["train", "demo", "transport=tpc", "--dry-run"], "There is no transport 'tpc'. Did you mean 'tcp'?"),
        (["train", "demo", "model.config.hidden_sise=3", "--dry-run"], "Did you mean 'hidden_size'?"),
        (["generate", "nowhere", "--prompt", "x"], "There is no folder 'nowhere'"),
        (["generate", ".", "--prompt", "x"], "'.' has no config.json"),
    ],
)
def test_errors_are_explained(arguments: list[str], message: str, psyche: Psyche) -> None:
    done = psyche(*arguments)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: ")
    assert message in done.stderr


def test_errors_of_the_program_come_without_a_traceback(psyche: Psyche) -> None:
    done = psyche("train", "demo", "run.totl_steps=3")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: Unknown key 'run.totl_steps'. Did you mean 'run.total_steps'?")
    assert "Traceback" not in done.stderr


def test_a_traceback_is_shown_on_request(psyche: Psyche) -> None:
    for done in (psyche("--traceback", "train", "dmo"), psyche("train", "dmo", PSYCHE_TRACEBACK="1")):
        assert done.returncode == 1
        assert "Traceback (most recent call last)" in done.stderr
        assert "There is no recipe 'dmo'" in done.stderr


def test_ctrl_c_ends_with_130(tmp_path: Path) -> None:
    source = GREET.replace(
        'print(f"hello {name}" + "!" * loud)', 'print("ready", flush=True); import time; time.sleep(60)'
    )
    site = distribution(tmp_path, "psyche-lightning-greet", "psyche_greet", source)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), *filter(None, sys.path)])}
    with subprocess.Popen(
        [*PROGRAM, "greet", "you"], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        assert "Traceback" not in process.stderr.read()


def test_ctrl_c_while_a_command_loads_ends_with_130(psyche: Psyche, tmp_path: Path) -> None:
    source = GREET.replace("    import typer\n", "    raise KeyboardInterrupt\n")
    done = psyche("greet", path=(distribution(tmp_path / "site", "psyche-lightning-greet", "psyche_greet", source),))
    assert (done.returncode, done.stderr) == (130, "")


def test_a_plugin_adds_a_command(psyche: Psyche, tmp_path: Path) -> None:
    site = distribution(tmp_path / "site", "psyche-lightning-greet", "psyche_greet", GREET)
    listed = psyche("--help", path=(site,))
    assert "greet" in listed.stdout
    assert "Say hello to somebody. (psyche-lightning-greet)" in listed.stdout
    done = psyche("greet", "you", "--loud", path=(site,))
    assert (done.returncode, done.stdout) == (0, "hello you!\n")
    failed = psyche("greet", "nobody", path=(site,))
    assert (failed.returncode, failed.stderr) == (1, "error: There is nobody; say somebody's name.\n")


def test_a_plugin_adds_a_group_of_commands(psyche: Psyche, tmp_path: Path) -> None:
    source = GREET.replace("    return command", "    app = typer.Typer()\n    app.command('one')(command)\n"
                           "    app.command('two')(command)\n    return app")  # fmt: skip
    site = distribution(tmp_path / "site", "psyche-lightning-greet", "psyche_greet", source)
    assert psyche("greet", "two", "you", path=(site,)).stdout == "hello you\n"


def test_a_plugin_cannot_take_a_command_of_psyche(psyche: Psyche, tmp_path: Path) -> None:
    site = distribution(tmp_path / "site", "psyche-lightning-evil", "psyche_evil", GREET.replace('"greet"', '"train"'))
    assert "[KEY=VALUE]" in psyche("train", "--help", path=(site,)).stdout
    done = psyche("--help", path=(site,))
    assert done.returncode == 0
    assert COMMANDS["train"].help in done.stdout
    assert "Say hello" not in done.stdout
    table = psyche("plugins", path=(site,))
    assert table.returncode == 1
    assert "plugin 'psyche_evil' of psyche-lightning-evil 1.0" in table.stdout


def test_two_plugins_with_one_command_are_both_named(psyche: Psyche, tmp_path: Path) -> None:
    one = distribution(tmp_path / "one", "psyche-lightning-one", "psyche_one", GREET)
    two = distribution(tmp_path / "two", "psyche-lightning-two", "psyche_two", GREET)
    done = psyche("greet", "you", path=(one, two))
    assert done.returncode == 1
    assert "psyche-lightning-one 1.0" in done.stderr
    assert "psyche-lightning-two 1.0" in done.stderr
    assert psyche("greet", "you", path=(one, two), PSYCHE_PLUGINS="psyche_two").stdout == "hello you\n"


def test_plugins_prints_what_there_is_and_what_failed(psyche: Psyche, tmp_path: Path) -> None:
    good = distribution(tmp_path / "good", "psyche-lightning-greet", "psyche_greet", GREET, version="3.1")
    done = psyche("plugins", path=(good,))
    assert done.returncode == 0
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in done.stdout.splitlines() if "│" in line]
    assert ["builtin.transports", "transport memory, tcp"] in [row[:2] for row in rows]
    greet = [row[:2] for row in rows].index(["psyche_greet", "command greet"])
    assert re.fullmatch(r"\d+ ms", rows[greet][2])
    assert rows[greet + 1] == ["psyche-lightning-greet 3.1", "", ""]
    bad = distribution(tmp_path / "bad", "psyche-lightning-bad", "psyche_bad", "import nothing_at_all\n")
    done = psyche("plugins", path=(good, bad))
    assert done.returncode == 1
    assert "psyche_bad of psyche-lightning-bad 1.0 failed to load: ModuleNotFoundError" in done.stdout
    assert "greet" in done.stdout
    report = json.loads(psyche("plugins", "--json", path=(good, bad)).stdout)
    assert {"kind": "command", "name": "greet", "plugin": "psyche_greet", "distribution": "psyche-lightning-greet",
            "version": "3.1"} in report["plugins"]  # fmt: skip
    assert [failure["plugin"] for failure in report["failures"]] == ["psyche_bad"]
    assert "nothing_at_all" in report["failures"][0]["details"]
    assert report["conflicts"] == []
    unknown = psyche("nothing", path=(good, bad))
    assert unknown.returncode == 2
    assert "No such command 'nothing'" in unknown.stderr
    assert unknown.stderr.endswith("Plugins that failed to load: psyche_bad; `psyche plugins` says why.\n")
    assert "failed to load" not in psyche("nothing", path=(good,)).stderr
    assert "failed to load" not in psyche("greet", "--nothing", path=(good, bad)).stderr


def test_plugins_names_a_plugin_that_ends_the_program(psyche: Psyche, tmp_path: Path) -> None:
    bad = distribution(tmp_path / "bad", "psyche-lightning-bad", "psyche_bad", "raise SystemExit('no licence')\n")
    done = psyche("plugins", path=(bad,))
    assert done.returncode == 1
    assert "psyche_bad of psyche-lightning-bad 1.0 failed to load: SystemExit: no licence" in done.stdout
    assert psyche("run", "--help", path=(bad,)).returncode == 0


def test_plugins_names_a_plugin_that_imports_what_takes_seconds(psyche: Psyche, tmp_path: Path) -> None:
    heavy = distribution(tmp_path / "heavy", "psyche-lightning-heavy", "psyche_heavy", f"import torch\n{GREET}")
    done = psyche("plugins", path=(heavy,))
    assert done.returncode == 0
    assert "psyche_heavy of psyche-lightning-heavy 1.0 imports torch while it loads" in done.stdout
    report = json.loads(psyche("plugins", "--json", path=(heavy,)).stdout)
    (found,) = [one for one in report["loadings"] if one["plugin"] == "psyche_heavy"]
    assert found["heavy"] == ["torch"]
    assert found["seconds"] > max(one["seconds"] for one in report["loadings"] if one["plugin"] == "mla")


def test_a_dry_run_prints_recipe_size_and_traffic(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["train", "consilience-40b", "init_min_clients=20", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    for text in ("Recipe consilience-40b", "optimizer.schedule.stable_steps", "run.init_min_clients", "39.9 B", "2e-05",
                 "what parameters lack of their masters", "look-ahead copy", "8, fsdp", "62.7 GB", "fits, and leaves",
                 "total memory", "fp32 all-reduce", "│    20 │"):  # fmt: skip
        assert text in printed, text


def test_a_dry_run_of_the_twin(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "mla-200m", "--twin", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "model.config.hidden_size" in printed
    assert "200 M" not in printed

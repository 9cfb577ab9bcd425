from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from psyche_lightning import hookimpl
from psyche_lightning.errors import ConfigError, PluginError
from psyche_lightning.plugins import BUILTINS, KINDS, Plugins, build

Install = Callable[..., Path]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Installs a distribution for real: a module and a dist-info folder with an entry point, on ``sys.path``."""

    def write(distribution: str, module: str, source: str, version: str = "1.0", entry: str | None = None) -> Path:
        site = tmp_path / distribution
        info = site / f"{distribution.replace('-', '_')}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
        (info / "entry_points.txt").write_text(f"[psyche_lightning]\n{entry or module} = {module}\n")
        (site / f"{module}.py").write_text(
            "from psyche_lightning.hookspecs import CoordinatorKind, hookimpl\n\n\n" + textwrap.dedent(source).lstrip()
        )
        monkeypatch.syspath_prepend(str(site))
        monkeypatch.delitem(sys.modules, module, raising=False)
        return site

    return write


def registering(hook: str, *names: str) -> str:
    """The source of a plugin that registers these names."""
    offer = "CoordinatorKind(build)" if hook == "register_coordinators" else "build"
    calls = "".join(f"    register({name!r}, {offer})\n" for name in names)
    return f"@hookimpl\ndef {hook}(register):\n{calls}\n\ndef build(*args, **kwargs):\n    return args, kwargs\n"


def test_built_ins_come_through_the_same_door() -> None:
    plugins = Plugins(only=[])
    assert plugins.failures == []
    assert set(plugins.transports()) == {"memory", "tcp"}
    assert {"http", "https"} <= set(plugins.coordinators())
    assert set(plugins.models()) == {"hf"}
    assert set(plugins.data_providers()) == {"text", "tokens", "mix", "datasets", "parquet"}
    found = plugins.transports().registrations["tcp"]
    assert (found.kind, found.plugin, found.distribution) == ("transport", "builtin.transports", "psyche-lightning")
    assert set(Plugins(builtins=[], only=[]).transports()) == set()
    assert len(BUILTINS) == 4


@pytest.mark.parametrize(("hook", "kind"), KINDS.items())
def test_an_entry_point_adds_to_every_kind(install: Install, hook: str, kind: str) -> None:
    install("psyche-lightning-hello", "psyche_hello", registering(hook, "hello", "hello-2"), version="2.3")
    plugins = Plugins(only=["psyche_hello"])
    assert plugins.failures == []
    registry = next(registry for registry in plugins.registries() if registry.kind == kind)
    assert {"hello", "hello-2"} <= set(registry)
    found = registry.registrations["hello"]
    assert (found.kind, found.name, found.plugin) == (kind, "hello", "psyche_hello")
    assert (found.distribution, found.version) == ("psyche-lightning-hello", "2.3")
    assert registry["hello"] is found.offer
    build = found.offer.client if kind == "coordinator" else found.offer
    assert build(1, a=2) == ((1,), {"a": 2})


def test_two_plugins_with_one_name_are_both_named_and_the_rest_stays(install: Install) -> None:
    install("psyche-lightning-one", "psyche_one", registering("register_models", "same", "first"), version="1.1")
    install("psyche-lightning-two", "psyche_two", registering("register_models", "same", "second"), version="2.2")
    models = Plugins(only=["psyche_one", "psyche_two"]).models()
    assert set(models) == {"first", "hf", "second"}
    with pytest.raises(PluginError) as error:
        models["same"]
    text = str(error.value)
    for part in (
        "psyche-lightning-one 1.1",
        "psyche-lightning-two 2.2",
        "'psyche_one'",
        "'psyche_two'",
        "PSYCHE_PLUGINS",
    ):
        assert part in text


def test_a_built_in_name_is_not_silently_replaced(install: Install) -> None:
    install("psyche-lightning-evil", "psyche_evil", registering("register_transports", "tcp"))
    transports = Plugins(only=["psyche_evil"]).transports()
    assert "tcp" not in transports
    with pytest.raises(PluginError, match=r"psyche-lightning 0\.1\.0 and by .* psyche-lightning-evil 1\.0"):
        transports["tcp"]


@pytest.mark.parametrize(
    ("source", "parts"),
    [
        ("import nothing_of_that_name\n", ["ModuleNotFoundError", "nothing_of_that_name"]),
        ("def broken(:\n", ["SyntaxError"]),
        (
            "@hookimpl\ndef register_models(registry, more):\n    pass\n",
            ["register_models(registry, more)", "register_models(register:", "psyche_bad.py:"],
        ),
        ("@hookimpl\ndef register_model(register):\n    pass\n", ["no hook 'register_model'", "'register_models'"]),
        ("@hookimpl\ndef register_models(register):\n    raise OSError('no disk')\n", ["OSError: no disk"]),
        (registering("register_models", "twice", "twice"), ["'twice' twice"]),
        (registering("register_models", "Upper Case"), ["'Upper Case'", "lower-case"]),
        ("@hookimpl\ndef register_models(register):\n    register('x', 5)\n", ["'x'", "not 5"]),
        (
            "@hookimpl\ndef register_coordinators(register):\n    register('x', print)\n",
            [
                "The coordinator 'x' needs a CoordinatorKind, not <built-in",
                "register('x', CoordinatorKind(client=...))",
            ],
        ),
    ],
)
def test_a_plugin_that_fails_is_recorded_and_breaks_nothing(install: Install, source: str, parts: list[str]) -> None:
    install("psyche-lightning-bad", "psyche_bad", source, version="0.9")
    install("psyche-lightning-good", "psyche_good", registering("register_models", "good"))
    plugins = Plugins(only=["psyche_bad", "psyche_good"])
    assert set(plugins.models()) == {"good", "hf"}
    (failure,) = plugins.failures
    assert (failure.plugin, failure.distribution, failure.version) == ("psyche_bad", "psyche-lightning-bad", "0.9")
    for part in parts:
        assert part in failure.error
    assert "Traceback" in failure.details
    with pytest.raises(PluginError, match="failed to load: psyche_bad"):
        plugins.models()["bad"]


def test_a_host_alone_says_how_to_get_the_demo_s_model() -> None:
    with pytest.raises(PluginError, match=r"no model 'mla'.* pip install 'psyche-lightning\[demo\]'"):
        Plugins(only=[]).models()["mla"]


def test_a_hook_that_fails_late_leaves_nothing_behind(install: Install) -> None:
    source = registering("register_models", "early") + "\n\n@hookimpl\ndef register_transports(register):\n    1 / 0\n"
    install("psyche-lightning-bad", "psyche_bad", source)
    plugins = Plugins(only=["psyche_bad"])
    assert "early" not in plugins.models()
    assert "ZeroDivisionError" in plugins.failures[0].error


def test_functions_without_the_mark_are_not_hooks(install: Install) -> None:
    source = registering("register_models", "hello").replace("@hookimpl\n", "")
    install("psyche-lightning-hello", "psyche_hello", source)
    plugins = Plugins(only=["psyche_hello"])
    assert set(plugins.models()) == {"hf"}
    assert set(plugins.data_providers()) == {"text", "tokens", "mix", "datasets", "parquet"}
    assert plugins.failures == []


def test_an_unknown_name_gives_the_nearest_and_the_choices() -> None:
    with pytest.raises(PluginError, match=r"no transport 'tpc'\. Did you mean 'tcp'\? Installed: memory, tcp\."):
        Plugins(only=[]).transports()["tpc"]


@pytest.mark.parametrize(
    ("variable", "expected"),
    [
        ("one", {"first"}),
        ("Psyche_Lightning-two", {"second"}),
        ("one, two", {"first", "second"}),
        ("", set()),
        (None, {"first", "second"}),
    ],
)
def test_the_variable_narrows_loading(install: Install, variable: str | None, expected: set[str]) -> None:
    one = install("psyche-lightning-one", "psyche_one", registering("register_transports", "first"), entry="one")
    two = install("psyche-lightning.Two", "psyche_two", registering("register_transports", "second"), entry="two")
    environment = {key: value for key, value in os.environ.items() if key != "PSYCHE_PLUGINS"}
    environment["PYTHONPATH"] = os.pathsep.join([str(one), str(two), *sys.path])
    if variable is not None:
        environment["PSYCHE_PLUGINS"] = variable
    script = "import json; from psyche_lightning.plugins import *; print(json.dumps([*load_plugins().transports()]))"
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert set(json.loads(done.stdout)) & {"first", "second"} == expected


def test_hooks_of_an_object_with_methods_work() -> None:
    class Plugin:
        @hookimpl
        def register_models(self, register: Callable[[str, object], None]) -> None:
            register("method", dict)

    plugins = Plugins(only=[])
    plugins._load("object", "psyche-lightning-object", "1", Plugin)
    assert plugins.failures == []
    assert plugins.models()["method"] is dict


def test_build_checks_options_by_name() -> None:
    def make(host: str, port: int = 0) -> tuple[str, int]:
        return host, port

    assert build("transport 'x'", make, {"host": "a", "port": 1}) == ("a", 1)
    with pytest.raises(ConfigError, match=r"transport 'x' has no option 'prot'\. Did you mean 'port'\? .*host, port"):
        build("transport 'x'", make, {"host": "a", "prot": 1})
    with pytest.raises(ConfigError, match="'host'"):
        build("transport 'x'", make, {})


def test_listing_plugins_imports_nothing_heavy() -> None:
    script = (
        "import sys; from psyche_lightning.plugins import Plugins; Plugins(only=[])\n"
        "heavy = {'torch', 'lightning', 'transformers', 'aiohttp', 'omegaconf'}; print(sorted(heavy & {*sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

from __future__ import annotations

import inspect
import re
import textwrap

import pytest

import psyche_lightning
from psyche_lightning import hookspecs
from psyche_lightning.plugins import KINDS, Plugins

SPECIFIED = [
    name
    for name, function in vars(hookspecs).items()
    if inspect.isfunction(function) and hasattr(function, f"{hookspecs.PROJECT}_spec")
]


def test_every_hook_adds_a_kind() -> None:
    assert list(KINDS) == ["register_transports", "register_coordinators", "register_models",
                           "register_data_providers", "register_exports", "register_commands"]  # fmt: skip
    assert set(SPECIFIED) == set(KINDS)


@pytest.mark.parametrize("name", SPECIFIED)
def test_every_hook_is_documented_with_an_example_that_registers(name: str) -> None:
    function = getattr(hookspecs, name)
    assert list(inspect.signature(function).parameters) == ["register"]
    documentation = inspect.getdoc(function) or ""
    assert ("client(" if name == "register_coordinators" else "factory(") in documentation
    example = textwrap.dedent(documentation.partition("Example::\n")[2].partition("\nBuilt in:")[0])
    namespace: dict[str, object] = {"hookimpl": psyche_lightning.hookimpl}
    exec(example, namespace)
    plugins = Plugins(builtins=[], only=[])
    plugin = type("Module", (), {name: staticmethod(namespace[name])})
    plugins._load("example", "psyche-lightning-example", "1", lambda: plugin)
    assert plugins.failures == []
    (registry,) = [registry for registry in plugins.registries() if registry]
    assert registry.kind == KINDS[name]


def test_the_manual_names_every_rule_of_the_host() -> None:
    manual = hookspecs.__doc__ or ""
    for word in ("Signature", "Conflicts", "Failures", "Order", "PSYCHE_PLUGINS", "psyche plugins"):
        assert re.search(word, manual)

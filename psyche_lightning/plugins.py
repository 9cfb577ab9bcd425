"""The plugin host: loads plugins, keeps their registrations, and reports why others fail to load.

Built-ins use the same hooks as third-party distributions; :mod:`psyche_lightning.hookspecs` is the
manual. Loading runs no factory, so it stays cheap.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import inspect
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import pluggy

import psyche_lightning.hookspecs as hookspecs
from psyche_lightning.errors import ConfigError, PluginError, nearest
from psyche_lightning.hookspecs import (
    CommandFactory,
    CoordinatorKind,
    DataProviderFactory,
    Exporter,
    ModelFactory,
    TransportFactory,
)
from psyche_lightning.version import __version__

ENTRY_POINT_GROUP = "psyche_lightning"
PLUGINS_VARIABLE = "PSYCHE_PLUGINS"

BUILTINS = (
    "psyche_lightning.builtin.transports",
    "psyche_lightning.builtin.coordinators",
    "psyche_lightning.builtin.models",
    "psyche_lightning.builtin.data",
)

# The kind that each hook adds, for messages.
KINDS = {
    "register_transports": "transport",
    "register_coordinators": "coordinator",
    "register_models": "model",
    "register_data_providers": "data provider",
    "register_exports": "export format",
    "register_commands": "command",
}

# The extra of psyche-lightning that adds a name the host lacks.
EXTRAS = {"mla": "demo", "iroh": "iroh", "solana": "solana"}

# Packages that take seconds to import; a plugin should import them where it needs them, not when it loads.
HEAVY = ("torch", "lightning", "transformers", "datasets", "matplotlib", "scipy", "pandas", "jax", "tensorflow")

_Built = TypeVar("_Built")
_Offer = TypeVar("_Offer")
_NAME = re.compile(r"[a-z][a-z0-9_.-]*")


@dataclass(frozen=True)
class Registration:
    """A name that a plugin registered.

    Attributes:
        kind: ``"transport"``, ``"coordinator"``, ``"model"``, ``"data provider"``, ``"export format"`` or
            ``"command"``.
        name: its name in recipes and command lines.
        offer: a factory, or a :class:`~psyche_lightning.hookspecs.CoordinatorKind`;
            :mod:`psyche_lightning.hookspecs` describes their arguments.
        plugin: the entry point's name, or the module of a built-in.
        distribution: the plugin's distribution.
        version: its version.
    """

    kind: str
    name: str
    offer: Any
    plugin: str
    distribution: str
    version: str

    @property
    def owner(self) -> str:
        """The plugin and its distribution, for messages."""
        return f"plugin {self.plugin!r} of {self.distribution} {self.version}"


@dataclass(frozen=True)
class Failure:
    """A plugin that adds nothing, and why.

    Attributes:
        plugin: the entry point's name.
        distribution: the plugin's distribution.
        version: its version.
        error: the error, for people.
        details: the traceback, for the plugin's author.
    """

    plugin: str
    distribution: str
    version: str
    error: str
    details: str = ""


@dataclass(frozen=True)
class Loading:
    """What loading a plugin took, also one that failed.

    Attributes:
        plugin: the entry point's name, or the module of a built-in.
        distribution: the plugin's distribution.
        version: its version.
        seconds: the time of its import and its hooks; every ``psyche`` command that needs plugins waits that long.
        heavy: those of :data:`HEAVY` that it was the first to import.
    """

    plugin: str
    distribution: str
    version: str
    seconds: float
    heavy: tuple[str, ...]


def failed_to_load(failures: Sequence[Failure]) -> str:
    """A sentence for a message about something that is missing, with a space before it; empty without failures."""
    names = ", ".join(sorted({failure.plugin for failure in failures}))
    return f" Plugins that failed to load: {names}; `psyche plugins` says why." if names else ""


class Registry(dict[str, _Offer]):
    """The registrations of one kind, by name; looking up any other name raises :class:`PluginError`.

    Args:
        kind: the kind, as messages call it.
        registrations: all registrations of that kind.
        failures: the plugins that failed to load, for the message about a missing name.

    Attributes:
        registrations: each name's registration.
        conflicts: names that several plugins registered, with all registrations.
    """

    def __init__(self, kind: str, registrations: Iterable[Registration], failures: Sequence[Failure]) -> None:
        owners: dict[str, list[Registration]] = {}
        for registration in registrations:
            owners.setdefault(registration.name, []).append(registration)
        self.registrations = {name: found[0] for name, found in sorted(owners.items()) if len(found) == 1}
        super().__init__((name, found.offer) for name, found in self.registrations.items())
        self.kind = kind
        self.conflicts = {name: tuple(found) for name, found in sorted(owners.items()) if len(found) > 1}
        self._failures = tuple(failures)

    def __missing__(self, name: str) -> _Offer:
        if name in self.conflicts:
            raise PluginError(self.conflict(name))
        choices = ", ".join(self) or "none"
        message = f"There is no {self.kind} {name!r}.{nearest(name, self)} Installed: {choices}."
        if name in EXTRAS:
            message += f" A separate package adds it: pip install 'psyche-lightning[{EXTRAS[name]}]'."
        raise PluginError(message + failed_to_load(self._failures))

    def conflict(self, name: str) -> str:
        """The message about a name that several plugins registered."""
        owners = " and by ".join(registration.owner for registration in self.conflicts[name])
        return (
            f"The {self.kind} {name!r} is registered by {owners}. Uninstall one of them, or set "
            f"{PLUGINS_VARIABLE} to the plugins you want."
        )


class Plugins:
    """The plugins of this process.

    Args:
        builtins: modules to load first.
        only: entry-point or distribution names to load; None for all installed plugins.
        clock: seconds, for what each plugin takes.

    Attributes:
        failures: the plugins that failed to load.
        loadings: what loading took, for each plugin in order.
    """

    def __init__(
        self,
        builtins: Sequence[str] = BUILTINS,
        only: Sequence[str] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.failures: list[Failure] = []
        self.loadings: list[Loading] = []
        self._clock = clock
        self._manager = pluggy.PluginManager(hookspecs.PROJECT)
        self._manager.add_hookspecs(hookspecs)
        self._registrations: list[Registration] = []
        for module in builtins:
            name = module.removeprefix("psyche_lightning.")
            self._load(name, "psyche-lightning", __version__, _importer(module))
        wanted = None if only is None else {_normalized(name) for name in only}
        for entry_point in _entry_points():
            distribution, version = _origin(entry_point)
            if wanted is None or wanted & {_normalized(entry_point.name), _normalized(distribution)}:
                self._load(entry_point.name, distribution, version, entry_point.load)

    def transports(self) -> Registry[TransportFactory]:
        """Ways for nodes to exchange messages and blobs."""
        return self._registry("transport")

    def coordinators(self) -> Registry[CoordinatorKind]:
        """Kinds of coordinators, by URL scheme."""
        return self._registry("coordinator")

    def models(self) -> Registry[ModelFactory]:
        """Models, by the recipe's ``model.name``."""
        return self._registry("model")

    def data_providers(self) -> Registry[DataProviderFactory]:
        """Sources of samples, by the recipe's ``data.name``."""
        return self._registry("data provider")

    def exports(self) -> Registry[Exporter]:
        """Formats of checkpoints for other programs, by ``--to`` of ``psyche export``."""
        return self._registry("export format")

    def commands(self) -> Registry[CommandFactory]:
        """Sub-commands of ``psyche`` that plugins add."""
        return self._registry("command")

    def registries(self) -> list[Registry[object]]:
        """All registries, in the order of the manual."""
        return [self._registry(kind) for kind in KINDS.values()]

    def _registry(self, kind: str) -> Registry[Any]:
        return Registry(kind, (found for found in self._registrations if found.kind == kind), self.failures)

    def _load(self, name: str, distribution: str, version: str, load: Callable[[], object]) -> None:
        """Import one plugin and call its hooks; records any error and then keeps nothing of the plugin."""
        begun = self._clock()
        before = {heavy for heavy in HEAVY if heavy in sys.modules}
        try:
            plugin = load()
            if self._manager.is_registered(plugin):
                raise PluginError("this module is already loaded as another plugin; name it in one entry point only")
            self._check(plugin)
            self._manager.register(plugin, f"{distribution}:{name}")
            found: list[Registration] = []
            for hook in KINDS:
                implementation = getattr(plugin, hook, None)
                if implementation is not None and self._manager.parse_hookimpl_opts(plugin, hook) is not None:
                    implementation(_Recorder(found, hook, name, distribution, version))
        except (Exception, SystemExit) as error:
            text = str(error) if isinstance(error, PluginError) else f"{type(error).__name__}: {error}"
            self.failures.append(Failure(name, distribution, version, text, traceback.format_exc()))
        else:
            self._registrations += found
        heavy = tuple(package for package in HEAVY if package in sys.modules and package not in before)
        self.loadings.append(Loading(name, distribution, version, self._clock() - begun, heavy))

    def _check(self, plugin: object) -> None:
        """Refuse hooks that do not exist and signatures other than the specification's.

        Raises:
            PluginError: shows the plugin's own signature beside the specification's.
        """
        for name in dir(plugin):
            if self._manager.parse_hookimpl_opts(plugin, name) is None:
                continue
            implementation = getattr(plugin, name)
            where = f"{name}{inspect.signature(implementation)} in {_file(implementation)}"
            if name not in KINDS:
                raise PluginError(
                    f"There is no hook {name!r}.{nearest(name, KINDS)} Hooks: {', '.join(KINDS)}.\n"
                    f"  the plugin's: {where}"
                )
            specification = inspect.signature(getattr(hookspecs, name))
            if list(inspect.signature(implementation).parameters) != list(specification.parameters):
                raise PluginError(
                    f"The hook {name!r} has other arguments than its specification.\n"
                    f"  the plugin's:  {where}\n"
                    f"  the specified: {name}{specification} in {hookspecs.__name__}"
                )


class _Recorder:
    """The ``register`` argument of one hook of one plugin."""

    def __init__(self, found: list[Registration], hook: str, plugin: str, distribution: str, version: str) -> None:
        self._found = found
        self._kind = KINDS[hook]
        self._origin = (plugin, distribution, version)

    def __call__(self, name: str, offer: Any) -> None:
        if not isinstance(name, str) or _NAME.fullmatch(name) is None:
            raise PluginError(
                f"A {self._kind} cannot be named {name!r}: a name begins with a lower-case letter, followed by "
                "lower-case letters, digits, '-', '_' and '.'."
            )
        if self._kind == "coordinator":
            if not isinstance(offer, CoordinatorKind):
                raise PluginError(
                    f"The coordinator {name!r} needs a CoordinatorKind, not {offer!r}: "
                    f"register({name!r}, CoordinatorKind(client=...))."
                )
        elif not callable(offer):
            raise PluginError(f"The {self._kind} {name!r} needs a callable factory, not {offer!r}.")
        if any((found.kind, found.name) == (self._kind, name) for found in self._found):
            raise PluginError(f"The plugin registers the {self._kind} {name!r} twice.")
        self._found.append(Registration(self._kind, name, offer, *self._origin))


@functools.cache
def load_plugins() -> Plugins:
    """The plugins of this process; the first call loads them as ``PSYCHE_PLUGINS`` says."""
    names = os.environ.get(PLUGINS_VARIABLE)
    only = None if names is None else [name.strip() for name in names.split(",") if name.strip()]
    return Plugins(only=only)


def build(
    what: str, target: Callable[..., _Built], options: Mapping[str, Any], *, besides: Iterable[str] = ()
) -> _Built:
    """Call ``target(**options)`` and refuse options that it does not take; for factories.

    Args:
        what: the result's name for messages, such as ``"transport 'tcp'"``.
        target: a class or function with named parameters.
        options: values by parameter name.
        besides: options that the caller has taken already, for the text about an unknown one.

    Raises:
        ConfigError: an option is unknown (the text names the nearest and the choices) or a required one is missing.
    """
    signature = inspect.signature(target)
    for name in options:
        if name not in signature.parameters:
            choices = [*besides, *signature.parameters]
            raise ConfigError(
                f"The {what} has no option {name!r}.{nearest(name, choices)} Options: {', '.join(choices) or 'none'}."
            )
    try:
        signature.bind(**options)
    except TypeError as error:
        raise ConfigError(f"The {what} has an option that is not set: {error}.") from error
    return target(**options)


def _importer(module: str) -> Callable[[], object]:
    return lambda: importlib.import_module(module)


def packages() -> list[str]:
    """The top-level packages of installed plugins, which are their logger names; imports nothing."""
    return sorted({entry_point.module.partition(".")[0] for entry_point in _entry_points()})


def _entry_points() -> list[importlib.metadata.EntryPoint]:
    found = importlib.metadata.entry_points(group=ENTRY_POINT_GROUP)
    return sorted(found, key=lambda entry_point: (_origin(entry_point), entry_point.name))


def _origin(entry_point: importlib.metadata.EntryPoint) -> tuple[str, str]:
    distribution = entry_point.dist
    return (distribution.name, distribution.version) if distribution is not None else ("unknown distribution", "?")


def _normalized(name: str) -> str:
    """Normalize a distribution name (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _file(function: Callable[..., Any]) -> str:
    code = getattr(inspect.unwrap(function), "__code__", None)
    return f"{code.co_filename}:{code.co_firstlineno}" if code is not None else getattr(function, "__module__", "?")

"""The name ``"psyche"`` in the strategy registries of Lightning's Trainer and Fabric.

The import of Lightning takes seconds and the ``psyche`` command does not need it, so ``import psyche_lightning`` must
not import it. If a registry exists, it gets the name at once. Otherwise a finder on ``sys.meta_path`` adds the name
when Lightning creates the registry; the finder watches for these two modules only.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

NAME = "psyche"
DESCRIPTION = "Train one model on many machines that share only the internet."


def _trainer_strategy(**options: Any) -> Any:
    from psyche_lightning.lightning.strategy import PsycheStrategy

    return PsycheStrategy(**options)


def _fabric_strategy(**options: Any) -> Any:
    from psyche_lightning.lightning.fabric import PsycheFabricStrategy

    return PsycheFabricStrategy(**options)


# Module that makes a registry -> the registry's name, and the class that "psyche" builds.
REGISTRIES = {
    "lightning.pytorch.strategies": ("StrategyRegistry", _trainer_strategy),
    "lightning.fabric.strategies": ("STRATEGY_REGISTRY", _fabric_strategy),
}


def register() -> None:
    """Add the name to both registries, now or when they exist; a second call changes nothing."""
    for module in REGISTRIES:
        if module in sys.modules:
            _add(sys.modules[module])
    if not any(isinstance(finder, _Watcher) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watcher())


def _add(module: ModuleType) -> None:
    registry_name, strategy = REGISTRIES[module.__name__]
    registry = getattr(module, registry_name, None)  # missing while Lightning is half imported
    if registry is not None and NAME not in registry:
        registry.register(NAME, strategy, description=DESCRIPTION)


class _Watcher(importlib.abc.MetaPathFinder):
    """Lets the other finders find the two modules, and adds the name after a module has run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in REGISTRIES:
            return None
        for finder in sys.meta_path:
            if finder is not self and (spec := finder.find_spec(fullname, path, target)) is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader)
                return spec
        return None


class _Loader(importlib.abc.Loader):
    """Wraps another loader, and adds the name after the module has run."""

    def __init__(self, loader: importlib.abc.Loader) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        _add(module)

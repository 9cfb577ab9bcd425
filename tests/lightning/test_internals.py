"""Private names of Lightning and torch stand in two modules, which say why."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import psyche_lightning

PACKAGE = Path(psyche_lightning.__file__).parent
ALLOWED = {PACKAGE / "distro" / "internals.py", PACKAGE / "lightning" / "internals.py"}
OTHERS = {"_api", "_attn_implementation", "_exit"}
"""Of huggingface_hub's file system, which has no public name for its client, and of transformers' configurations, which
have none for how attention is computed, and Python's ``os._exit``."""


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def own_names(trees: list[ast.Module]) -> set[str]:
    """The private names that this package defines."""
    found: set[str] = set()
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found.add(node.target.id)
        elif (
            isinstance(node, ast.Attribute)
            and isinstance(node.ctx, ast.Store)
            and isinstance(node.value, ast.Name)
            and node.value.id in ("self", "cls")
        ):
            found.add(node.attr)
    return found


def foreign_names(tree: ast.Module, own: set[str]) -> Iterator[str]:
    """Private names that are used here and defined elsewhere."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and private(node.attr) and node.attr not in own:
            yield node.attr
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in ("torch", "lightning"):
            yield from (alias.name for alias in node.names if private(alias.name))


def test_private_names_of_lightning_and_torch_stand_in_internals_alone() -> None:
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in PACKAGE.rglob("*.py")}
    own = own_names([tree for path, tree in trees.items() if path not in ALLOWED])
    found = {path: set(foreign_names(tree, own)) - OTHERS for path, tree in trees.items()}
    assert {path.relative_to(PACKAGE): names for path, names in found.items() if names and path not in ALLOWED} == {}
    assert all(found[path] for path in ALLOWED)

"""The agreed manifest of a run: sections that the first node to name them fixes (invariant I9)."""

from __future__ import annotations

import json
from typing import Any

from psyche_lightning.errors import CoordinatorError, ManifestMismatchError

MAX_MANIFEST_SIZE = 4 * 1024 * 1024
MAX_SHOWN = 10
ABSENT = "(absent)"
"""Stands for a field that one side does not have."""


def merge(held: dict[str, Any] | None, offered: dict[str, Any]) -> dict[str, Any]:
    """The run's manifest after a node with ``offered`` joins: it must equal what is held, and may add sections.

    Args:
        held: the run's sections so far; None before the first node.
        offered: the node's.

    Returns:
        A new dictionary of plain JSON values, or ``held`` itself when nothing is added.

    Raises:
        ManifestMismatchError: sections that both have differ; it lists every field.
        CoordinatorError: ``offered`` is not a JSON object or too large (``InvalidManifest``).
    """
    try:
        text = json.dumps(offered, allow_nan=False)
        plain = json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise CoordinatorError(f"the manifest is not JSON: {error}", code="InvalidManifest") from error
    if not isinstance(plain, dict) or len(text) > MAX_MANIFEST_SIZE:
        raise CoordinatorError(
            f"a manifest is a JSON object of at most {MAX_MANIFEST_SIZE} characters", code="InvalidManifest"
        )
    if held is None:
        return plain
    found = [d for name, section in held.items() if name in plain for d in differences(section, plain[name], name)]
    if found:
        lines = [f"  {field}: the run has {_brief(run)}, this node has {_brief(node)}" for field, run, node in found]
        more = [f"  and {len(lines) - MAX_SHOWN} more"] if len(lines) > MAX_SHOWN else []
        raise ManifestMismatchError(
            "this node's configuration is not the run's:\n"
            + "\n".join(lines[:MAX_SHOWN] + more)
            + "\nGive this node the run's values, or train under another run id.",
            found,
        )
    return {**held, **plain} if plain.keys() - held.keys() else held


def differences(run: Any, node: Any, field: str) -> list[tuple[str, object, object]]:
    """``(dotted field, the run's value, the node's value)`` for each leaf in which two JSON values differ."""
    if isinstance(run, dict) and isinstance(node, dict):
        names = dict.fromkeys([*run, *node])
        pairs = [(f"{field}.{name}", run.get(name, ABSENT), node.get(name, ABSENT)) for name in names]
    elif isinstance(run, list) and isinstance(node, list) and len(run) == len(node):
        pairs = [(f"{field}.{i}", a, b) for i, (a, b) in enumerate(zip(run, node, strict=True))]
    else:
        return [] if type(run) is type(node) and run == node else [(field, run, node)]
    return [found for name, a, b in pairs for found in differences(a, b, name)]


def _brief(value: object) -> str:
    text = value if value is ABSENT else json.dumps(value)
    return str(text) if len(str(text)) <= 80 else f"{str(text)[:77]}..."

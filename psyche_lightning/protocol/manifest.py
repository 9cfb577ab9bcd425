"""The agreed manifest of a run: its creator fixes what he knows, the first node the rest (invariant I9)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from psyche_lightning.errors import CoordinatorError, ManifestMismatchError
from psyche_lightning.protocol.state import CoordinatorConfig
from psyche_lightning.text import plain
from psyche_lightning.wire.canonical import sha256

MAX_MANIFEST_SIZE = 4 * 1024 * 1024
"""Characters of a whole manifest as JSON, whoever gave its parts; with it, the terms of a run fit into one frame."""
_RULE = f"a run's manifest is a JSON object of at most {MAX_MANIFEST_SIZE} characters, all sections together"
MAX_SHOWN = 10
START = "start"
"""The section of a run that resumes from a checkpoint: its ``step``, ``data_index`` and parameter ``digest``."""
ABSENT = "(absent)"
"""Stands for a field that one side does not have."""


BY_SPEED, EQUAL = "speed", "equal"
SHARES = (BY_SPEED, EQUAL)
"""How a run divides the samples of a round: ``run.shares`` of its manifest."""
LEFT_OPEN = ("global_batch_size", "total_steps")
"""Values that a run's creator may leave to the first node, which gives them in the section ``run`` of its manifest."""


def manifest_text(manifest: Mapping[str, Any]) -> str:
    """The canonical form of a manifest: JSON with sorted keys, no spaces, ASCII (invariant I9).

    Raises:
        CoordinatorError: the manifest is not JSON (``InvalidManifest``).
    """
    try:
        return json.dumps(manifest, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise CoordinatorError(f"the manifest is not JSON: {error}", code="InvalidManifest") from error


def manifest_digest(manifest: Mapping[str, Any]) -> bytes:
    """SHA-256 of :func:`manifest_text`, the address of the manifest on a server."""
    return sha256(manifest_text(manifest).encode())


def fix_values(held: dict[str, int | None], offered: Any) -> tuple[Any, dict[str, int | None]]:
    """Take a node's values for the configuration out of its manifest.

    Args:
        held: the values that the first node fixes, or None for those not yet fixed. A node's other values do not count,
            because the run's creator decided them.
        offered: the node's manifest.

    Returns:
        The manifest without these values, and the values with those that this node fixed.

    Raises:
        ManifestMismatchError: the node's values differ from the first node's.
        CoordinatorError: a value is missing, or is not a whole number (``InvalidManifest``).
    """
    section = offered.get("run") if isinstance(offered, dict) else None
    if not isinstance(section, dict):
        section = {}
    given = {name: section[name] for name in LEFT_OPEN if section.get(name) is not None}
    rest = {name: value for name, value in section.items() if name not in LEFT_OPEN}
    if rest != section:
        offered = (
            {**offered, "run": rest} if rest else {name: value for name, value in offered.items() if name != "run"}
        )
    fixed = dict(held)
    for name, value in held.items():
        if value is None and name not in given:
            raise CoordinatorError(
                f"the run has no {name} and this node's configuration does not say one. Give the node one (for "
                "total_steps, Trainer's max_steps), or create the run with one.",
                code="InvalidManifest",
            )
        if value is None and type(given[name]) is not int:
            raise CoordinatorError(f"run.{name} is {given[name]!r}; expected a whole number", code="InvalidManifest")
        fixed[name] = given[name] if value is None else value
    found: list[tuple[str, object, object]]
    found = [(f"run.{name}", value, given[name]) for name, value in fixed.items() if given.get(name, value) != value]
    if found:
        raise mismatch(found)
    return offered, fixed


def shares_by_speed(manifest: Mapping[str, Any] | None) -> bool:
    """Whether the nodes' shares of a run with this manifest follow their speeds."""
    section = (manifest or {}).get("run")
    return isinstance(section, Mapping) and section.get("shares") == BY_SPEED


def with_values(config: CoordinatorConfig, held: dict[str, int | None]) -> CoordinatorConfig:
    """The configuration with the fixed values."""
    batch, steps = held.get("global_batch_size"), held.get("total_steps")
    if batch is not None:
        config = replace(config, global_batch_size_start=batch, global_batch_size_end=batch)
    return config if steps is None else replace(config, total_steps=steps)


def merge(held: dict[str, Any] | None, offered: dict[str, Any], *, sealed: bool = False) -> dict[str, Any]:
    """The run's manifest after a node with ``offered`` joins, which must equal it where both have a section.

    Args:
        held: the run's sections so far; None if there are none.
        offered: the node's sections.
        sealed: whether the manifest is complete, so that nothing is added to it.

    Returns:
        A new dictionary of plain JSON values, or ``held`` itself if nothing is added.

    Raises:
        ManifestMismatchError: common sections differ, or the node has one that the sealed manifest lacks; the error
            lists every field.
        CoordinatorError: ``offered`` is not a JSON object, or it or the result is too large (``InvalidManifest``).
    """
    try:
        text = json.dumps(offered, allow_nan=False)
        plain = json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise CoordinatorError(f"the manifest is not JSON: {error}", code="InvalidManifest") from error
    if not isinstance(plain, dict) or len(text) > MAX_MANIFEST_SIZE:
        raise CoordinatorError(_RULE, code="InvalidManifest")
    fixed = held or {}
    found = [d for name, section in fixed.items() if name in plain for d in differences(section, plain[name], name)]
    added = {name: section for name, section in plain.items() if name not in fixed}
    if sealed:
        found += [(name, ABSENT, section) for name, section in added.items()]
    if found:
        raise mismatch(found)
    if held is not None and not added:
        return held
    merged = {**fixed, **added}
    if len(json.dumps(merged)) > MAX_MANIFEST_SIZE:
        raise CoordinatorError(_RULE, code="InvalidManifest")
    return merged


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


def mismatch(
    found: list[tuple[str, object, object]],
    advice: str = "Give this node the run's values, or train under another run id.",
) -> ManifestMismatchError:
    """The error for a node whose configuration differs from the run's.

    Args:
        found: differences, as :func:`differences` returns them.
        advice: what to do.
    """
    lines = [f"  {plain(field)}: the run has {brief(run)}, this node has {brief(node)}" for field, run, node in found]
    more = [f"  and {len(lines) - MAX_SHOWN} more"] if len(lines) > MAX_SHOWN else []
    return ManifestMismatchError(
        "this node's configuration differs from the run's:\n" + "\n".join(lines[:MAX_SHOWN] + more) + f"\n{advice}",
        found,
    )


def brief(value: object) -> str:
    """A value of a manifest as JSON of at most 80 characters."""
    text = value if value is ABSENT else json.dumps(value)
    return str(text) if len(str(text)) <= 80 else f"{str(text)[:77]}..."

"""The recipe's part of the run's manifest: everything that must be equal on all nodes, and nothing else (invariant I9).

The coordinator holds the manifest, compares it with each node's, and says in which fields they differ
(:mod:`psyche_lightning.protocol.manifest`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from psyche_lightning.checkpoints.manifest import Manifest
from psyche_lightning.protocol.evals import SECTION as EVALS
from psyche_lightning.recipe.config import Recipe
from psyche_lightning.recipe.options import RunValues
from psyche_lightning.recipe.schedule import KINDS, Schedule

PLACES = ("path", "url", "tokenizer", "fetch")
"""Keys of ``model.config`` and ``data.config`` that name a location or how to fetch from it; nodes may differ."""


def start_section(checkpoint: Manifest) -> dict[str, Any]:
    """The section ``start`` of a run that resumes from a checkpoint; nodes that would start otherwise are refused."""
    metadata = checkpoint.metadata
    return {"step": metadata.step, "data_index": metadata.data_index, "digest": checkpoint.digest}


def manifest(recipe: Recipe, fingerprint: str | None = None) -> dict[str, dict[str, Any]]:
    """The manifest's sections, as plain JSON values.

    The coordinator's own configuration is not part of it, because the coordinator has it, nor are micro-batches,
    devices, folders and connections. The schedule contains the ``total_steps`` that is equal on all nodes.

    Args:
        recipe: the node's recipe.
        fingerprint: the data provider's fingerprint, if it has one.
    """
    data = {"name": recipe.data.name, "seq_len": recipe.data.seq_len, "config": _without_places(recipe.data.config)}
    if fingerprint is not None:
        data["fingerprint"] = fingerprint
    optimizer = asdict(recipe.optimizer)
    optimizer["schedule"] = {"kind": recipe.optimizer.schedule.kind, **asdict(recipe.schedule)}
    del optimizer["lr"]  # the schedule has it as base_lr
    sections = {
        "run": {item.name: getattr(recipe.run, item.name) for item in fields(RunValues)},
        "distro": asdict(recipe.distro),
        "model": {
            "name": recipe.model.name,
            "dtype": recipe.model.dtype,
            "config": _without_places(recipe.model.config),
            **({"adapter": dict(recipe.model.adapter)} if recipe.model.adapter else {}),
        },
        "data": data,
        "optimizer": optimizer,
    }
    evals = recipe.evals
    if evals.tasks or evals.prompts:
        prompts = {"prompts": evals.prompts} if evals.prompts else {}
        sections[EVALS] = {"tasks": evals.tasks, "every": evals.every, "limit": evals.limit, **prompts}
    plain: dict[str, dict[str, Any]] = json.loads(json.dumps(sections, allow_nan=False))
    return plain


def schedule_of(sections: Mapping[str, Mapping[str, Any]]) -> Schedule | None:
    """The schedule of the learning rate in a manifest; None if it has none, as where users have their own schedulers.

    Args:
        sections: those of the manifest.
    """
    section = dict(sections.get("optimizer", {}).get("schedule") or {})
    kind = KINDS.get(section.pop("kind", ""))
    return kind(**section) if kind is not None else None


def _without_places(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in PLACES}

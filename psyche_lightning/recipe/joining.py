"""A run's recipe as its manifest tells it, for who joins with nothing but the link.

The section ``join`` of a manifest has what a recipe has besides the sections that all nodes compare: where data and
model come from, as far as others reach it, and how the run's creator computes. Nodes do not state it, so it is compared
with nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from psyche_lightning.errors import ConfigError
from psyche_lightning.protocol.requests import Terms
from psyche_lightning.recipe.config import Recipe
from psyche_lightning.recipe.loading import parse_override, resolve_with
from psyche_lightning.recipe.manifest import PLACES
from psyche_lightning.recipe.options import RunValues
from psyche_lightning.text import plain

SECTION = "join"
NEEDED = ("model", "optimizer", "distro")
COMPUTING = ("precision", "micro_batch_size", "gradient_checkpointing", "attn_implementation")
"""Keys of ``trainer`` that suit the model more than the machine."""
_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://.+")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?(@[A-Za-z0-9._/-]+)?")
"""A word that a plugin knows, such as ``stdlib``, or a name on the Hub, perhaps with a revision."""
REMOTE_CODE = "trust_remote_code"


def offer(recipe: Recipe) -> tuple[dict[str, Any], list[str]]:
    """The section, and the keys that it lacks because they name files of this machine.

    Args:
        recipe: that of the run's creator.
    """
    section = {
        "data": {
            "name": recipe.data.name,
            "seq_len": recipe.data.seq_len,
            "config": dict(recipe.data.config),
            "validation": dict(recipe.data.validation),
        },
        "model": {"path": recipe.model.path},
        "trainer": {name: getattr(recipe.trainer, name) for name in COMPUTING},
        "checkpoint": {"resume": recipe.checkpoint.resume},
    }
    found: dict[str, Any] = json.loads(json.dumps(section, allow_nan=False))
    local = [(key, holder, name) for key, holder, name in _places(found) if not _is_for_all(holder[name])]
    for _, holder, name in local:
        del holder[name]
    return found, [key for key, _, _ in local]


def has_recipe(terms: Terms) -> bool:
    """Whether a run was created with a recipe."""
    manifest: Mapping[str, Any] = terms.manifest or {}
    return all(isinstance(manifest.get(name), dict) for name in NEEDED)


def recipe_of(run: str, terms: Terms, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a run.

    Args:
        run: its name.
        terms: what the run has fixed.
        overrides: values of this machine, as for :func:`~psyche_lightning.recipe.load_recipe`.

    Raises:
        ConfigError: the run was created without a recipe, its manifest is damaged, it names files of this machine or
            runs code from elsewhere, or an override is wrong.
    """
    manifest: Mapping[str, Any] = terms.manifest or {}
    if not has_recipe(terms):
        raise ConfigError(
            f"run {run!r} was created without a recipe, so its manifest does not say what to train. Run the program or "
            "the recipe that its owner gives you: psyche train RECIPE --coordinator LINK"
        )
    source = f"the recipe of run {run!r}"
    try:
        values = _values(run, terms, manifest)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{source}: its manifest is not that of a recipe ({error!r})") from error
    own = [parse_override(text)[0] for text in overrides]
    for key, holder, name in _places(values):
        if not _is_for_all(holder[name]) and not any(f"{key}.".startswith(f"{given}.") for given in own):
            raise ConfigError(
                f"{source}: {key} is {plain(str(holder[name]))!r}, which names files of this machine. A run may not "
                f"choose them; if you want to train on them, say so: {key}=PATH"
            )
    recipe = resolve_with(values, overrides, source=source)
    trust = f"model.config.{REMOTE_CODE}"
    if recipe.model.config.get(REMOTE_CODE) and trust not in own:
        raise ConfigError(
            f"{source}: its model runs Python code from {plain(str(recipe.model.path))!r} on your machine. If you "
            f"trust that code, say so: {trust}=true"
        )
    return recipe


def _values(run: str, terms: Terms, manifest: Mapping[str, Any]) -> dict[str, Any]:
    told = manifest.get(SECTION, {})
    optimizer = dict(manifest["optimizer"])
    schedule = dict(optimizer["schedule"])
    optimizer["lr"] = schedule.pop("base_lr")
    optimizer["schedule"] = schedule
    unset = {"total_steps": ("total_steps",), "global_batch_size": ("global_batch_size_start", "global_batch_size_end")}
    open_ = {name for key in terms.unset for name in unset[key]}
    shared = {name: value for name, value in manifest.get("run", {}).items() if name in _names(RunValues)}
    # What all nodes compare wins over what the creator told beside it.
    data = {**told.get("data", {}), **_without(manifest.get("data", {}), "config", "fingerprint")}
    data["config"] = {**told.get("data", {}).get("config", {}), **manifest.get("data", {}).get("config", {})}
    values: dict[str, Any] = {
        "name": run,
        "run": {**{name: value for name, value in asdict(terms.config).items() if name not in open_}, **shared},
        "distro": dict(manifest["distro"]),
        "model": {**told.get("model", {}), **manifest["model"]},
        "data": data,
        "optimizer": optimizer,
        "trainer": {name: value for name, value in told.get("trainer", {}).items() if name in COMPUTING},
        "evals": dict(manifest.get("evals", {})),
        "checkpoint": {"resume": told.get("checkpoint", {}).get("resume")},
    }
    copied: dict[str, Any] = json.loads(json.dumps(values))
    return copied


def _names(section: type) -> set[str]:
    return {item.name for item in fields(section)}


def _without(values: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in names}


def _places(values: Any, prefix: str = "") -> Iterator[tuple[str, dict[str, Any], str]]:
    """The key of each place in nested values, with the dictionary and the name where it stands."""
    if isinstance(values, list):
        for number, value in enumerate(values):
            yield from _places(value, f"{prefix}{number}.")
    elif isinstance(values, dict):
        for name, value in list(values.items()):
            if (name in PLACES or name == "resume") and value is not None:
                yield f"{prefix}{name}", values, name
            else:
                yield from _places(value, f"{prefix}{name}.")


def _is_for_all(value: Any) -> bool:
    """Whether a place is no file of this machine."""
    if isinstance(value, (list, dict)):
        return all(_is_for_all(one) for one in (value.values() if isinstance(value, dict) else value))
    if not isinstance(value, str):
        return isinstance(value, (bool, int, float))
    if _ADDRESS.fullmatch(value):
        return not value.startswith(("file:", "local:"))
    return _NAME.fullmatch(value) is not None and not Path(value).exists()

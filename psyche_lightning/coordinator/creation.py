"""Creates a run from a request: checks names and values, and uses defaults for the rest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

from psyche_lightning.coordinator.host import RunHost
from psyche_lightning.errors import ConfigError, nearest
from psyche_lightning.protocol.manifest import START
from psyche_lightning.protocol.state import INCARNATION_SIZE, CoordinatorConfig

KEYS = ("run_id", "config", "manifest", "seed", "max_seq_len", "everybody", "by_link")
SETTINGS = {field.name: field.type for field in fields(CoordinatorConfig)}


def create_host(body: dict[str, Any], entropy: Callable[[int], bytes]) -> RunHost:
    """Create the run that a request describes, not yet open to members.

    The first node that joins fixes a batch size or number of steps that the request leaves out. A run whose manifest
    has the section ``start`` begins after that step, with that data id.

    Args:
        body: ``run_id``, and optionally ``config`` (fields of :class:`CoordinatorConfig`), ``manifest``, ``seed``,
            ``max_seq_len``, ``everybody`` (false: only nodes whose keys the owner authorizes may join) and ``by_link``
            (true: only nodes that have the run's join link, or whose keys the owner authorizes).
        entropy: returns a number of random bytes, for the run's incarnation, and for its seed if the request has none.

    Raises:
        ConfigError: a key is unknown (the text names the nearest), or a value has a wrong type or is out of range.
    """
    _known(body, KEYS, "key of a run's creation")
    run_id, config, manifest = body.get("run_id"), body.get("config") or {}, body.get("manifest")
    seed, max_seq_len = body.get("seed"), body.get("max_seq_len", 1)
    if not isinstance(run_id, str):
        raise ConfigError(f"run_id is {run_id!r}; expected a name")
    if not isinstance(config, dict):
        raise ConfigError("config is not a JSON object of settings such as init_min_clients")
    if not isinstance(manifest, (dict, type(None))):
        raise ConfigError("manifest is not a JSON object of sections such as model")
    if seed is None:
        seed = int.from_bytes(entropy(8), "little")
    for name, value in (("seed", seed), ("max_seq_len", max_seq_len)):
        if type(value) is not int:
            raise ConfigError(f"{name} is {value!r}; expected a whole number")
    everybody, by_link = body.get("everybody", True), body.get("by_link", False)
    for name, value in (("everybody", everybody), ("by_link", by_link)):
        if type(value) is not bool:
            raise ConfigError(f"{name} is {value!r}; expected true or false")
    values = check_settings(config)
    if "global_batch_size_start" in values:
        values.setdefault("global_batch_size_end", values["global_batch_size_start"])
    elif "global_batch_size_end" in values:
        values["global_batch_size_start"] = values["global_batch_size_end"]
    unset = [] if "global_batch_size_start" in values else ["global_batch_size"]
    unset += [] if "total_steps" in values else ["total_steps"]
    host = RunHost(
        run_id,
        CoordinatorConfig(**values),
        seed=seed,
        max_seq_len=max_seq_len,
        manifest=manifest or None,
        unset=unset,
        incarnation=entropy(INCARNATION_SIZE),
    )
    host.membership.by_link = by_link
    if not everybody:
        host.membership.forbid(None)
    if manifest and START in manifest:
        done, index = _start(manifest[START], None if "total_steps" in unset else host.state.config.total_steps)
        host.state = replace(host.state, step=done + 1, start_step=done + 1, epoch_start_data_index=index)
    return host


def _start(section: Any, total_steps: int | None) -> tuple[int, int]:
    """The steps that were done before the run, and its first data id."""
    values: list[Any] = [section.get(name) for name in ("step", "data_index")] if isinstance(section, dict) else []
    if not values or any(type(value) is not int or not 0 <= value < 1 << 63 for value in values):
        raise ConfigError(f"the manifest's section {START} is {section!r}; expected step and data_index from 0")
    done, index = values
    if total_steps is not None and done >= total_steps:
        raise ConfigError(
            f"the run resumes after step {done}, but total_steps is {total_steps}; total_steps counts from the very "
            "beginning, so raise it"
        )
    return done, index


def check_settings(config: dict[str, Any]) -> dict[str, Any]:
    """Check settings and convert their numbers; leaves out settings that are null.

    Raises:
        ConfigError: a name is unknown (the text names the nearest and the choices), or a value is not a number.
    """
    _known(config, tuple(SETTINGS), "setting of a run")
    values: dict[str, Any] = {}
    for name, value in config.items():
        if value is None:
            continue
        # Annotations are texts, and only these two occur.
        if SETTINGS[name] == "float" and type(value) in (int, float):
            values[name] = float(value)
        elif SETTINGS[name] == "int" and type(value) is int:
            values[name] = value
        else:
            expected = "a number of seconds" if SETTINGS[name] == "float" else "a whole number"
            raise ConfigError(f"{name} is {value!r}; expected {expected}")
    return values


def _known(given: dict[str, Any], names: tuple[str, ...], what: str) -> None:
    for name in given:
        if name not in names:
            raise ConfigError(f"{name!r} is not a {what}.{nearest(name, names)} Choices: {', '.join(names)}.")

"""What this node and its run agree on before it joins: the run's values win, explicit options must not contradict."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from psyche_lightning.distro import DistroConfig
from psyche_lightning.errors import ConfigError
from psyche_lightning.protocol.manifest import START, differences, manifest_text, mismatch
from psyche_lightning.protocol.requests import Coordinator, GetTerms, Terms
from psyche_lightning.protocol.state import CoordinatorConfig
from psyche_lightning.recipe.options import SHARED, RunOptions, RunValues


@dataclass(frozen=True)
class Agreement:
    """The values that all nodes of a run share.

    Attributes:
        config: the coordinator's durations and sizes.
        unset: what of them this node will fix if it is the first.
        held: the sections that the run's manifest has.
        run: what the nodes share besides.
        distro: the compression.
    """

    config: CoordinatorConfig
    unset: tuple[str, ...]
    held: Mapping[str, Any]
    run: RunValues
    distro: DistroConfig

    @property
    def sections(self) -> dict[str, dict[str, Any]]:
        """The sections ``run`` and ``distro`` of this node's manifest: as the run has them, where it does."""
        return {name: dict(self.held.get(name, asdict(getattr(self, name)))) for name in SHARED}


def look(client: Coordinator, timeout: float = 60.0) -> Terms:
    """Ask a run for what it has fixed, on an event loop of its own.

    Raises:
        CoordinatorError: the coordinator cannot be reached, or does not have the run.
    """

    async def ask() -> Terms:
        try:
            return await client.request(GetTerms())
        finally:
            await client.close()

    # In a thread, because notebooks have a running loop in this one.
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(lambda: asyncio.run(asyncio.wait_for(ask(), timeout))).result()


def agree(options: RunOptions, terms: Terms) -> Agreement:
    """Combine a node's options with what its run has fixed: the run's values win, and options must not contradict them.

    Raises:
        ManifestMismatchError: options, or sections that the node brings, differ from the run's; it lists all fields.
        ConfigError: the run has a value that this version does not know, or goes on from a checkpoint that this node
            does not have.
    """
    held = terms.manifest or {}
    shared: dict[str, Any] = {}
    found: list[tuple[str, object, object]] = []
    for section, kind in SHARED.items():
        defaults, given = asdict(kind()), options.given[section]
        fixed = {**defaults, **held[section]} if section in held else {}
        unknown = fixed.keys() - defaults.keys()
        if unknown:
            raise ConfigError(
                f"the run has the setting {section}.{min(unknown)}, which this version does not know; install the "
                f"version with which it was created. Known: {', '.join(defaults)}."
            )
        found += [(f"{section}.{name}", fixed[name], v) for name, v in given.items() if fixed and fixed[name] != v]
        shared[section] = {**defaults, **given, **fixed}
    sizes = {"global_batch_size": terms.config.global_batch_size_end, "total_steps": terms.config.total_steps}
    for name, size in sizes.items():
        value = getattr(options, name)
        if name not in terms.unset and value not in (None, size):
            found.append((f"run.{name}", size, value))
    for name, section in json.loads(manifest_text(options.manifest)).items():
        found += differences(held[name], section, name) if name in held else []
    if found:
        raise mismatch(found, "Give this node the run's values; an option of the strategy that is left out has them.")
    begun = held.get(START)
    if begun is not None and START not in options.manifest:
        raise ConfigError(
            f"the run goes on from the checkpoint of step {begun.get('step')}, and this node would begin anew: give "
            "its recipe checkpoint.resume=ADDRESS, where that checkpoint lies."
        )
    return Agreement(terms.config, terms.unset, held, RunValues(**shared["run"]), DistroConfig(**shared["distro"]))

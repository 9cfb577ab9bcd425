"""What this node and its run agree on before it joins: the run's values win, explicit options must not contradict."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from psyche_lightning.distro import DistroConfig
from psyche_lightning.errors import ConfigError, ManifestMismatchError
from psyche_lightning.lightning.options import Options
from psyche_lightning.protocol.manifest import START
from psyche_lightning.protocol.requests import Coordinator, GetTerms, Terms
from psyche_lightning.protocol.state import CoordinatorConfig

RUN_DEFAULTS: dict[str, Any] = {"overlap": False, "seed": 0, "digest_every": 10, "keep_bytes": 0}
DISTRO_DEFAULTS: dict[str, Any] = asdict(DistroConfig())


@dataclass(frozen=True)
class Agreement:
    """The values that all nodes of a run share.

    Attributes:
        config: the coordinator's durations and sizes.
        unset: what of them this node will fix if it is the first.
        manifest: the sections that the run has, or that this node was given.
        overlap: whether results are applied one round later.
        seed: of the order of the data.
        digest_every: rounds between digests of the parameters.
        keep_bytes: agreed payloads kept between two snapshots, in bytes; 0 for as many as the parameters have.
        distro: the compression.
    """

    config: CoordinatorConfig
    unset: tuple[str, ...]
    manifest: Mapping[str, Any]
    overlap: bool
    seed: int
    digest_every: int
    keep_bytes: int
    distro: DistroConfig

    @property
    def run_section(self) -> dict[str, Any]:
        """This node's section ``run`` of the manifest."""
        own = {name: getattr(self, name) for name in RUN_DEFAULTS}
        return dict(self.manifest.get("run", own))

    @property
    def distro_section(self) -> dict[str, Any]:
        """This node's section ``distro`` of the manifest."""
        return dict(self.manifest.get("distro", asdict(self.distro)))


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


def agree(options: Options, terms: Terms) -> Agreement:
    """Combine a node's options with what its run has fixed.

    Raises:
        ManifestMismatchError: an option differs from the run's value.
        ConfigError: a value is out of its range, or the run has one that this version does not know, or goes on from a
            checkpoint that this node does not have.
    """
    held = {**options.manifest, **(terms.manifest or {})}
    found: list[tuple[str, object, object]] = []
    sections = {}
    for section, defaults in (("run", RUN_DEFAULTS), ("distro", DISTRO_DEFAULTS)):
        fixed = held.get(section, {})
        unknown = fixed.keys() - defaults.keys()
        if unknown:
            raise ConfigError(
                f"the run has the setting {section}.{min(unknown)}, which this version does not know; install the "
                f"version with which it was created. Known: {', '.join(defaults)}."
            )
        wanted = {name: getattr(options, name) for name in defaults if getattr(options, name) is not None}
        found += [(f"{section}.{k}", fixed[k], v) for k, v in wanted.items() if k in fixed and fixed[k] != v]
        sections[section] = {**defaults, **wanted, **fixed}
    sizes = {"global_batch_size": terms.config.global_batch_size_end, "total_steps": terms.config.total_steps}
    for name, size in sizes.items():
        value = getattr(options, name)
        if name not in terms.unset and value not in (None, size):
            found.append((f"run.{name}", size, value))
    if found:
        lines = "\n".join(f"  {name}: the run has {run!r}, this node has {own!r}" for name, run, own in found)
        raise ManifestMismatchError(
            f"the strategy's options are not the run's:\n{lines}\nLeave them out to take the run's values.", found
        )
    begun = (terms.manifest or {}).get(START)
    if begun is not None and START not in options.manifest:
        raise ConfigError(
            f"the run goes on from the checkpoint of step {begun.get('step')}, and this node would begin anew: give "
            "its recipe checkpoint.resume=ADDRESS, where that checkpoint lies."
        )
    run = sections["run"]
    return Agreement(
        terms.config,
        terms.unset,
        {**(terms.manifest or {}), **options.manifest},
        run["overlap"],
        run["seed"],
        run["digest_every"],
        run["keep_bytes"],
        DistroConfig(**sections["distro"]),
    )

"""How a process takes part in a run: one set of names for recipes, Trainer and Fabric.

All nodes share :class:`RunValues` and :class:`~psyche_lightning.distro.DistroConfig`, the sections ``run`` and
``distro`` of a run's manifest. Each node has its own :class:`NodeOptions` and
:class:`~psyche_lightning.distro.holding.Holding`, a part of the section ``trainer``. A recipe has all of them as
sections. :class:`RunOptions` has them in one list, in which a shared value may be left to the run: strategies take it,
and a recipe becomes one for training.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from psyche_lightning.distro.config import DistroConfig
from psyche_lightning.distro.holding import Holding
from psyche_lightning.errors import ConfigError
from psyche_lightning.protocol.limits import REGION, check_run_id, is_region
from psyche_lightning.protocol.link import JoinLink, whole_url
from psyche_lightning.protocol.manifest import BY_SPEED, SHARES
from psyche_lightning.protocol.state import CoordinatorConfig

COORDINATOR_VARIABLE = "PSYCHE_COORDINATOR"
RUN_VARIABLE = "PSYCHE_RUN"


@dataclass(frozen=True)
class RunValues:
    """Values that all nodes of a run share besides the compression: the section ``run`` of its manifest.

    Attributes:
        overlap: whether results travel while the next round computes; they are then applied one round later.
        seed: seed for the initial parameters and the order of the data.
        digest_every: rounds between digests of the parameters, by which nodes notice differences.
        keep_bytes: bytes of agreed payloads that nodes keep so that others can catch up; beyond them, they take a new
            snapshot. 0 means as many as the parameters have, but at least 64 MiB.
        cold_start_warmup_steps: steps over which learning rates rise again in the epoch after a pause; 0 for none.
        shares: ``speed`` or ``equal``: whether nodes of different speed get shares of a round's samples by which they
            are done at the same time. Nodes of about the same speed get equal shares in any case, and so do all where
            the coordinator is a chain.

    Raises:
        ConfigError: a value has a wrong type or is out of range.
    """

    overlap: bool = False
    seed: int = 0
    digest_every: int = 10
    keep_bytes: int = 0
    cold_start_warmup_steps: int = 0
    shares: str = BY_SPEED

    def __post_init__(self) -> None:
        if type(self.overlap) is not bool:
            raise ConfigError(f"run.overlap is {self.overlap!r}; choose true or false.")
        if self.shares not in SHARES:
            raise ConfigError(f"run.shares is {self.shares!r}; choose {' or '.join(SHARES)}.")
        bounds = {"seed": (0, (1 << 64) - 1), "digest_every": (1, None)}
        for name in ("seed", "digest_every", "keep_bytes", "cold_start_warmup_steps"):
            value, (least, most) = getattr(self, name), bounds.get(name, (0, None))
            if type(value) is not int or value < least or (most is not None and value > most):
                to = "on" if most is None else "to 2^64 - 1"
                raise ConfigError(f"run.{name} is {value!r}; choose a whole number from {least} {to}.")


SHARED: dict[str, type[RunValues] | type[DistroConfig]] = {"run": RunValues, "distro": DistroConfig}
"""What all nodes share, by section of the manifest."""


@dataclass(frozen=True)
class NodeOptions:
    """``node``: how a node is connected and where it keeps its durable files; nodes may differ.

    Attributes:
        transport: how nodes reach each other; ``psyche plugins`` lists the choices.
        transport_options: options of the transport, such as ``{"host": "0.0.0.0", "advertise": "10.0.0.7"}``.
        directory: the folder for the node's key, promises and payloads, so that it can be killed and come back; each
            node needs its own.
        patience: longest time to wait for a round, in seconds.
        region: where this node is, for the run's page: any name, such as ``eu-west``; empty to say nothing.

    Raises:
        ConfigError: a value has a wrong type or is out of range.
    """

    transport: str = "tcp"
    transport_options: Mapping[str, Any] = field(default_factory=dict)
    directory: str | os.PathLike[str] | None = None
    patience: float = 24 * 3600.0
    region: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.transport_options, Mapping):
            raise ConfigError(f"node.transport_options is {self.transport_options!r}; expected options by name.")
        if not isinstance(self.patience, (int, float)) or math.isnan(self.patience) or self.patience <= 0:
            raise ConfigError(f"node.patience is {self.patience!r}; choose a number of seconds above 0.")
        if not isinstance(self.region, str) or not is_region(self.region):
            raise ConfigError(f"node.region is {self.region!r}; choose {REGION}, such as eu-west.")

    @property
    def folder(self) -> Path | None:
        """``directory`` as a path."""
        return None if self.directory is None else Path(self.directory)


@dataclass(frozen=True)
class RunOptions(NodeOptions, Holding):
    """How this process takes part in a run. If a shared value is None, the run's value or the default counts.

    Attributes:
        coordinator: the run's join link, or the coordinator's URL; without it, the process is alone in its own run.
        run: the run's name; given together with ``coordinator``, unless that is a join link, or not at all.
        overlap: see :class:`RunValues`, as for the next five.
        seed: see there.
        digest_every: see there.
        keep_bytes: see there.
        cold_start_warmup_steps: see there.
        shares: see there.
        chunk: see :class:`~psyche_lightning.distro.DistroConfig`, as for the next nine.
        k: see there.
        decay: see there.
        removal: see there.
        lookahead: see there.
        k_for: see there.
        float32_gradients: see there.
        local_steps: see there.
        scale: see there.
        schedule: see there.
        global_batch_size: samples of a round of the whole run, if the run leaves it to its first node.
        total_steps: the last step of the run, if the run leaves it to its first node.
        config: sizes of a run of this process alone; None for those that data and Trainer give.
        start: for a run of this process alone: steps that were done before, and the first data id that is left.
        manifest: sections of the run's manifest that replace those made from the module and its data.
        tokens_per_sample: tokens that a sample counts in figures for people.

    Raises:
        ConfigError: a value has a wrong type or is out of range.
    """

    coordinator: str | None = field(default=None, repr=False)  # a join link has a secret
    run: str | None = None
    overlap: bool | None = None
    seed: int | None = None
    digest_every: int | None = None
    keep_bytes: int | None = None
    cold_start_warmup_steps: int | None = None
    shares: str | None = None
    chunk: int | None = None
    k: int | None = None
    decay: float | None = None
    removal: float | None = None
    lookahead: bool | None = None
    k_for: Mapping[str, int] | None = None
    float32_gradients: bool | None = None
    local_steps: int | None = None
    scale: float | None = None
    schedule: Sequence[Mapping[str, int]] | None = None
    global_batch_size: int | None = None
    total_steps: int | None = None
    config: CoordinatorConfig | None = None
    start: tuple[int, int] | None = None
    manifest: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    tokens_per_sample: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        Holding.__post_init__(self)
        if self.run is not None:
            check_run_id(self.run)  # it may come from somebody else, and names the node's folder
        for section, kind in SHARED.items():
            kind(**self.given[section])  # its constructor checks the values
        for name in ("global_batch_size", "total_steps", "tokens_per_sample"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise ConfigError(f"{name} is {value!r}; choose a whole number from 1 on.")
        foreign = sorted(self.manifest.keys() & SHARED.keys())
        if foreign:
            names = ", ".join(item.name for item in fields(SHARED[foreign[0]]))
            raise ConfigError(f"manifest has the section {foreign[0]!r}, whose values are options: {names}.")

    @property
    def given(self) -> dict[str, dict[str, Any]]:
        """The shared values that are given, by section of the manifest."""
        found = {name: {item.name: getattr(self, item.name) for item in fields(kind)} for name, kind in SHARED.items()}
        return {name: {key: value for key, value in each.items() if value is not None} for name, each in found.items()}

    def in_environment(self, environment: Mapping[str, str] = os.environ) -> RunOptions:
        """The options, completed from ``PSYCHE_COORDINATOR`` and ``PSYCHE_RUN``.

        Raises:
            ConfigError: only one of coordinator and run is known, or the coordinator is not a URL.
        """
        coordinator = whole_url(self.coordinator or environment.get(COORDINATOR_VARIABLE) or "") or None
        run = self.run or environment.get(RUN_VARIABLE) or None
        link = JoinLink.parse(coordinator or "")
        run = run or link.run or None
        if (coordinator is None) != (run is None):
            known, missing, variable = (
                (f"the run {run!r}", "its coordinator's URL", COORDINATOR_VARIABLE)
                if coordinator is None
                else (f"the coordinator {link.url!r}", "the run's name", RUN_VARIABLE)
            )
            raise ConfigError(
                f"The strategy 'psyche' knows {known} but not {missing}: set {variable}, or neither of "
                f"{COORDINATOR_VARIABLE} and {RUN_VARIABLE} to train alone."
            )
        if coordinator is not None and not re.match(r"[a-z][a-z0-9_.-]*:(?!\d+$)", coordinator):
            raise ConfigError(f"The coordinator {link.url!r} is not a URL; expected one such as http://127.0.0.1:8080.")
        return replace(self, coordinator=coordinator, run=run)

"""The options of the strategy ``"psyche"``, the same for Trainer and Fabric."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from psyche_lightning.errors import ConfigError, nearest
from psyche_lightning.protocol.state import CoordinatorConfig

COORDINATOR_VARIABLE = "PSYCHE_COORDINATOR"
RUN_VARIABLE = "PSYCHE_RUN"


@dataclass(frozen=True)
class Options:
    """How this process takes part in a run. What is None is the run's value, or the default where the run has none.

    Attributes:
        coordinator: URL of the coordinator; by default ``PSYCHE_COORDINATOR``. Without one, the process is alone in a
            run of its own.
        run: the run's name; by default ``PSYCHE_RUN``. Given together with ``coordinator``, or not at all.
        overlap: whether results travel while the next round computes; they are then applied one round later.
        chunk: side of DisTrO's chunks.
        k: coefficients sent of each chunk.
        decay: what remains of delta before a gradient is added.
        removal: fraction of the sent component that is subtracted from delta.
        lookahead: whether gradients are taken ahead of the published parameters.
        k_for: another k for the parameters whose names match a pattern, such as ``{"*embed*": 2}``.
        float32_gradients: whether gradients of parameters of lower precision are accumulated in float32.
        seed: of the order of the data.
        digest_every: rounds between digests of the parameters, by which nodes notice that theirs differ.
        keep_bytes: agreed payloads that nodes keep, in bytes, so that others can catch up; beyond them they take a new
            snapshot. 0 for as many as the parameters have, and at least 64 MiB.
        global_batch_size: samples of a round of the whole run; by default the DataLoader's ``batch_size`` times
            ``accumulate_grad_batches`` times the run's ``init_min_clients``.
        total_steps: where the run ends; by default Trainer's ``max_steps`` or ``max_epochs``.
        directory: where the node keeps its key, promises and payloads, so that it can be killed and come back; one
            folder for each node. None keeps them in memory.
        transport: how nodes reach each other; ``psyche plugins`` lists the choices.
        transport_options: what the transport is given, such as ``{"host": "0.0.0.0", "advertise": "10.0.0.7"}``.
        start: of a run of this process alone: steps that were done before, and the first data id that is left.
        config: sizes of a run of this process alone; None for those that the DataLoader and Trainer give.
        manifest: sections of the run's manifest that replace those made from the module and its data.
        tokens_per_sample: what a sample counts in the figures for people.
        patience: longest time to wait for a round, in seconds.
    """

    coordinator: str | None = None
    run: str | None = None
    overlap: bool | None = None
    chunk: int | None = None
    k: int | None = None
    decay: float | None = None
    removal: float | None = None
    lookahead: bool | None = None
    k_for: Mapping[str, int] | None = None
    float32_gradients: bool | None = None
    seed: int | None = None
    digest_every: int | None = None
    keep_bytes: int | None = None
    global_batch_size: int | None = None
    total_steps: int | None = None
    directory: str | os.PathLike[str] | None = None
    transport: str = "tcp"
    transport_options: Mapping[str, Any] = field(default_factory=dict)
    start: tuple[int, int] | None = None
    config: CoordinatorConfig | None = None
    manifest: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    tokens_per_sample: int = 1
    patience: float = 24 * 3600.0

    @classmethod
    def of(cls, given: Mapping[str, Any], environment: Mapping[str, str] = os.environ) -> Options:
        """Check options by name and fill in the coordinator from the environment.

        Raises:
            ConfigError: an option is unknown (with the nearest and the choices) or wrong, or only one of coordinator
                and run is known.
        """
        names = [item.name for item in fields(cls)]
        for name in given:
            if name not in names:
                raise ConfigError(
                    f"The strategy 'psyche' has no option {name!r}.{nearest(name, names)} Options: {', '.join(names)}."
                )
        values = dict(given)
        if values.get("coordinator") is None and values.get("run") is None:
            values["coordinator"] = environment.get(COORDINATOR_VARIABLE) or None
            values["run"] = environment.get(RUN_VARIABLE) or None
        elif values.get("run") is None:
            values["run"] = environment.get(RUN_VARIABLE) or None
        elif values.get("coordinator") is None:
            values["coordinator"] = environment.get(COORDINATOR_VARIABLE) or None
        options = cls(**values)
        options._check()
        return options

    def _check(self) -> None:
        if (self.coordinator is None) != (self.run is None):
            known, missing, variable = (
                (f"the run {self.run!r}", "its coordinator's URL", COORDINATOR_VARIABLE)
                if self.coordinator is None
                else (f"the coordinator {self.coordinator!r}", "the run's name", RUN_VARIABLE)
            )
            raise ConfigError(
                f"The strategy 'psyche' knows {known} but not {missing}: set {variable}, or neither of "
                f"{COORDINATOR_VARIABLE} and {RUN_VARIABLE} to train alone."
            )
        if self.coordinator is not None and not re.match(r"[a-z][a-z0-9_.-]*:(?!\d+$)", self.coordinator):
            raise ConfigError(
                f"The coordinator {self.coordinator!r} is not a URL; expected one such as http://127.0.0.1:8080."
            )
        for name in ("global_batch_size", "total_steps", "digest_every", "tokens_per_sample"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise ConfigError(f"The option {name} is {value!r}; expected a whole number from 1.")
        if self.keep_bytes is not None and (type(self.keep_bytes) is not int or self.keep_bytes < 0):
            raise ConfigError(f"The option keep_bytes is {self.keep_bytes!r}; expected a whole number from 0.")
        if self.seed is not None and (type(self.seed) is not int or not 0 <= self.seed < 1 << 64):
            raise ConfigError(f"The option seed is {self.seed!r}; expected a whole number from 0 to 2^64 - 1.")
        for name in ("overlap", "lookahead", "float32_gradients"):
            if not isinstance(getattr(self, name), (bool, type(None))):
                raise ConfigError(f"The option {name} is {getattr(self, name)!r}; expected True or False.")

    @property
    def alone(self) -> bool:
        """Whether this process is the whole run."""
        return self.coordinator is None

    @property
    def folder(self) -> Path | None:
        """``directory`` as a path."""
        return None if self.directory is None else Path(self.directory)

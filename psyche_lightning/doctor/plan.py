"""Chooses how nodes exchange: settings of which losses were measured, with the speed that a link leaves to each."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from fractions import Fraction
from typing import Any

from psyche_lightning.distro.config import DistroConfig
from psyche_lightning.doctor.finding import duration
from psyche_lightning.doctor.prediction import Network, RunShape, conditions
from psyche_lightning.doctor.round_time import WIRE, Conditions, Prediction, predict
from psyche_lightning.doctor.speed import TrainingSpeed
from psyche_lightning.errors import ConfigError, counted
from psyche_lightning.protocol.limits import Limits
from psyche_lightning.recipe import Recipe
from psyche_lightning.recipe.estimate import Estimate

ALL_REDUCE_LOSS = {120: 2.317, 1920: 1.473}
"""The loss of AdamW with an all-reduce in the trainings that measured those of the settings, by steps."""
CONDITIONS = "286 k parameters, bytes of Python, 4 nodes, 120 steps, or 1,920 for Muon votes with k=3"
"""What these trainings were."""
NEAR = 0.05
"""Nats above that loss up to which a setting is proposed."""
ALIKE = 0.95
"""From this share of the most tokens a second on, the lowest loss counts."""
ROUNDS_IN_LIMIT = 2
"""Predicted rounds that must fit into ``max_round_train_time``, as nobody waits longer for a node."""


@dataclass(frozen=True)
class Setting:
    """A way to exchange, and what ``psyche bench quality`` measured with it.

    Attributes:
        optimizer: ``adamw`` or ``muon``, the recipe's ``optimizer.name``.
        k: votes for each chunk.
        chunk: side of the chunks.
        decay: of delta.
        local_steps: steps of the optimizer in a round; 0 for votes on gradients.
        overlap: whether results travel while the next round computes.
        loss: nats per byte, as in docs/distro.md; None if not measured.
        rate: the learning rate of that loss.
        scale: factor on the mean of local steps.
        trained: steps of the training with that loss.
    """

    optimizer: str
    k: int
    chunk: int
    decay: float
    local_steps: int = 0
    overlap: bool = False
    loss: float | None = None
    rate: float | None = None
    scale: float = 1.0
    trained: int = 120

    @property
    def gap(self) -> float | None:
        """How much the loss is above that of AdamW with an all-reduce, in nats; None if not measured."""
        return None if self.loss is None else round(self.loss - ALL_REDUCE_LOSS[self.trained], 3)

    @property
    def unmeasured(self) -> Setting:
        """The setting alone."""
        return replace(self, loss=None, rate=None, trained=120)

    @property
    def steps(self) -> int:
        """Optimizer steps in a round."""
        return max(1, self.local_steps)

    @property
    def form(self) -> str:
        """What it is, for people."""
        title = {"adamw": "AdamW", "muon": "Muon"}[self.optimizer]
        muon = self.optimizer == "muon"
        form = f"{self.local_steps} {title} steps" if self.local_steps else "Muon votes" if muon else "votes"
        return form + " overlap" * self.overlap

    @property
    def density(self) -> str:
        """What is sent of each chunk, for people."""
        return f"{self.k} of {self.chunk}x{self.chunk}"

    @property
    def proposed(self) -> bool:
        """Whether its loss was measured to be near that of an all-reduce."""
        return self.gap is not None and self.gap <= NEAR

    def distro(self, recipe: Recipe) -> DistroConfig:
        """The section ``distro``; what a setting says nothing about has its default."""
        return DistroConfig(
            chunk=self.chunk,
            k=self.k,
            decay=self.decay,
            float32_gradients=recipe.distro.float32_gradients and not self.local_steps,
            local_steps=self.local_steps,
            scale=self.scale,
        )

    def values(self, recipe: Recipe) -> dict[str, Any]:
        """The values of the recipe's keys for this setting."""
        distro = self.distro(recipe)
        return {
            "optimizer.name": self.optimizer,
            "optimizer.muon_for": dict(recipe.optimizer.muon_for) if self.optimizer == "muon" else {},
            **{f"distro.{item.name}": getattr(distro, item.name) for item in fields(distro)},
            "run.overlap": self.overlap,
        }


SETTINGS = (
    Setting("adamw", 64, 32, 0.9, loss=2.290, rate=4e-3),
    Setting("adamw", 24, 32, 0.9, loss=2.347, rate=4e-3),
    Setting("adamw", 32, 64, 0.9, loss=2.403, rate=4e-3),
    Setting("adamw", 32, 64, 0.9, overlap=True, loss=2.630, rate=1e-3),
    Setting("adamw", 12, 64, 0.9, loss=2.464, rate=2e-3),
    Setting("adamw", 2, 64, 0.9, loss=2.600, rate=2e-3),
    Setting("muon", 24, 32, 0.95),
    Setting("muon", 12, 64, 0.95, loss=2.304, rate=8e-3),
    Setting("muon", 3, 64, 0.95, loss=1.491, rate=4e-3, trained=1920),
    Setting("muon", 100, 32, 0.95, 4, scale=2.0),
    Setting("muon", 50, 32, 0.95, 8, loss=2.345, rate=16e-3, scale=2.0),
    Setting("muon", 12, 32, 0.95, 8, scale=2.0),
    Setting("muon", 110, 32, 0.95, 16, scale=2.0),
)
"""What is compared: the rows of docs/distro.md, and some that were not measured."""


def own_setting(recipe: Recipe) -> Setting:
    """The recipe's own; of a schedule, that with the largest k."""
    distro, name = recipe.distro.densest, recipe.optimizer.name
    found = Setting(name, distro.k, distro.chunk, distro.decay, distro.local_steps, recipe.run.overlap)
    found = replace(found, scale=distro.scale)
    same = [one for one in SETTINGS if one.unmeasured == found and one.distro(recipe) == recipe.distro]
    return same[0] if same else found


def batch(recipe: Recipe, nodes: int, steps: int) -> dict[str, int]:
    """Samples of a round: each step has the recipe's, in equal shares of at least a micro-batch.

    Args:
        recipe: gives the samples of a step, and of a micro-batch.
        nodes: nodes of the run.
        steps: steps in a round.

    Returns:
        The values of the recipe's keys.
    """
    run, before = recipe.run, max(1, recipe.distro.densest.local_steps)
    share = max(math.ceil(run.global_batch_size_end / before / nodes), recipe.trainer.micro_batch_size)
    end = nodes * steps * share
    start = max(nodes * steps, round(run.global_batch_size_start * end / run.global_batch_size_end))
    return {"run.global_batch_size_start": min(start, end), "run.global_batch_size_end": end}


def overrides(recipe: Recipe, values: Mapping[str, Any]) -> list[str]:
    """The values that differ from the recipe's, as ``key=value``."""
    return [f"{key}={_yaml(value)}" for key, value in values.items() if _value(recipe, key) != value]


def _value(recipe: Recipe, key: str) -> Any:
    found: Any = recipe
    for name in key.split("."):
        found = getattr(found, name)
    return dict(found) if isinstance(found, Mapping) else found


def _yaml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name!r}: {_yaml(one)}" for name, one in value.items()) + "}"
    return str(value).lower() if isinstance(value, bool) else str(value)


@dataclass(frozen=True)
class Option:
    """A setting for a run of some hours.

    Attributes:
        setting: the setting.
        recipe: the recipe with it.
        estimate: its size.
        given: what its round depends on.
        prediction: the predicted round.
        seconds: how long the run lasts.
        memory: bytes of memory of the device; None when not known.
    """

    setting: Setting
    recipe: Recipe
    estimate: Estimate
    given: Conditions
    prediction: Prediction
    seconds: float
    memory: int | None

    @property
    def rounds(self) -> int:
        """Rounds in the time, of which a run can have so many."""
        return min(int(self.seconds / self.prediction.round_seconds), Limits().steps)

    @property
    def tokens(self) -> int:
        """Tokens of these rounds."""
        return self.rounds * self.given.samples * self.given.seq_len

    @property
    def sent(self) -> int:
        """Bytes that a node sends in these rounds, network headers included."""
        return round(WIRE * self.given.traffic * self.rounds)

    @property
    def fewer(self) -> float | None:
        """How many times fewer bytes a node sends than in an all-reduce at each step; None if it is alone."""
        dense = self.estimate.allreduce_bytes_per_round(self.given.nodes)
        return dense / self.given.traffic if self.given.traffic else None

    @property
    def needed(self) -> int:
        """Bytes of memory without activations."""
        return sum(self.estimate.memory.values())

    @property
    def fits(self) -> bool:
        """Whether the memory is large enough, as far as known."""
        return self.memory is None or self.needed <= self.memory

    def as_json(self) -> dict[str, Any]:
        """The option as JSON; bytes, seconds and tokens."""
        setting = {item.name: getattr(self.setting, item.name) for item in fields(Setting)}
        return {
            **setting,
            "above_all_reduce": self.setting.gap,
            "global_batch_size": self.given.samples,
            "payload": self.given.payload,
            "times_fewer_bytes": self.fewer,
            "utilization": self.prediction.utilization,
            "round_seconds": self.prediction.round_seconds,
            "parts": self.prediction.parts,
            "limit": self.prediction.limit if self.fits else "memory",
            "tokens_per_second": self.prediction.tokens_per_second,
            "rounds": self.rounds,
            "tokens": self.tokens,
            "bytes_sent_by_a_node": self.sent,
            "memory": self.needed,
            "memory_parts": self.estimate.memory,
            "checkpoint_copy": self.estimate.copied,
            "fits": self.fits,
        }


def option(
    setting: Setting,
    recipe: Recipe,
    estimate: Estimate,
    speed: TrainingSpeed,
    network: Network,
    *,
    nodes: int,
    seconds: float,
    memory: int | None,
    write_seconds: float | None,
) -> Option:
    """Predict a run with a setting; arguments as for :class:`Option` and :func:`conditions`."""
    shape = RunShape(nodes, recipe.run.global_batch_size_end, {})
    given = conditions(recipe, shape, network, speed, estimate.payload, write_seconds)
    return Option(setting, recipe, estimate, given, predict(given), seconds, memory)


def choose(options: Sequence[Option]) -> Option | None:
    """The option to propose; None if none fits into the memory and into the time.

    Of the settings whose measured loss is near that of an all-reduce, it is the one with the most tokens a second. Of
    those that come close to it, it is the one with the lowest loss.
    """
    able = [one for one in options if one.setting.proposed and one.fits and one.rounds]
    most = max((one.prediction.tokens_per_second for one in able), default=0.0)
    alike = [one for one in able if one.prediction.tokens_per_second >= ALIKE * most]
    return min(alike, key=lambda one: one.setting.gap or 0.0, default=None)


def lasting(chosen: Option) -> dict[str, Any]:
    """Values of the recipe's keys with which the run lasts for the time, and nobody is given up within a round.

    Raises:
        ConfigError: no round fits.
    """
    recipe, rounds = chosen.recipe, chosen.rounds
    run, seconds = recipe.run, chosen.prediction.round_seconds
    if not rounds:
        raise ConfigError(f"a round takes {duration(seconds)}, so none fits into {duration(chosen.seconds)}")
    values: dict[str, Any] = {"run.total_steps": rounds}
    lengths = recipe.optimizer.schedule.lengths(Fraction(rounds, run.total_steps))
    values.update((f"optimizer.schedule.{name}", max(1, length)) for name, length in lengths.items())
    longest = math.ceil(ROUNDS_IN_LIMIT * seconds)
    if longest > run.max_round_train_time:
        values["run.max_round_train_time"] = longest
        least = run.warmup_time + longest * max(10, run.cold_start_warmup_steps)
        if run.epoch_time < least:
            values["run.epoch_time"] = math.ceil(least)
    return values


def unmeasured(chosen: Option, base: Recipe) -> Iterator[str]:
    """What the proposal rests on that nobody measured, in sentences."""
    yield "The loss of this model: measured were small ones only, for some thousand steps at most."
    before = base.run.global_batch_size_end / max(1, base.distro.densest.local_steps)
    now = chosen.given.samples / chosen.setting.steps
    if now != before:
        yield f"What {now:,.0f} samples a step do to the loss, in place of the recipe's {before:,.0f}."
    if chosen.given.nodes != 4:
        yield f"The loss with {counted(chosen.given.nodes, 'node')}, as those trainings had 4."
    yield "Activations in memory, pauses, warm-ups, validation, and nodes or links that differ from these."

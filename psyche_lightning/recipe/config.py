"""A recipe as frozen dataclasses; their fields are the keys of the YAML file.

Each class documents its section; ``distro`` is :class:`~psyche_lightning.distro.DistroConfig` itself, ``node`` is
:class:`~psyche_lightning.recipe.options.NodeOptions`. :mod:`psyche_lightning.recipe.loading` checks the bounds of
``Annotated``.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from fractions import Fraction
from typing import Annotated, Any, Literal, NamedTuple

from psyche_lightning.distro.config import DistroConfig
from psyche_lightning.distro.holding import Holding
from psyche_lightning.errors import ConfigError
from psyche_lightning.protocol.evals import MAX_NAME, MAX_PROMPT, MAX_PROMPTS, MAX_TASKS
from psyche_lightning.protocol.state import CoordinatorConfig
from psyche_lightning.recipe.options import SHARED, NodeOptions, RunOptions, RunValues
from psyche_lightning.recipe.schedule import KINDS, Constant, Schedule


class Range(NamedTuple):
    """Bounds of a number: ``low <= value <= high``, or ``low < value`` if ``above``."""

    low: float
    high: float = float("inf")
    above: bool = False

    def __contains__(self, value: object) -> bool:
        assert isinstance(value, (int, float))
        return (self.low < value if self.above else self.low <= value) and value <= self.high

    def __str__(self) -> str:
        low = f"more than {self.low:g}" if self.above else f"at least {self.low:g}"
        return low if self.high == float("inf") else f"{low} and at most {self.high:g}"


Count = Annotated[int, Range(1)]
NonNegative = Annotated[int, Range(0)]
Rate = Annotated[float, Range(0)]
Positive = Annotated[float, Range(0, above=True)]


@dataclass(frozen=True)
class RunSection(RunValues, CoordinatorConfig):
    """``run``: the coordinator's configuration, and further values that the nodes share.

    Its keys are those of :class:`~psyche_lightning.protocol.state.CoordinatorConfig` and of
    :class:`~psyche_lightning.recipe.options.RunValues`.
    """

    @property
    def coordinator(self) -> CoordinatorConfig:
        """The coordinator's configuration."""
        return CoordinatorConfig(**_part(self, CoordinatorConfig))


@dataclass(frozen=True)
class ModelSection:
    """``model``: the model to train.

    Attributes:
        name: a plugin's model; ``psyche plugins`` lists them.
        config: the configuration for the plugin's factory.
        path: where the first parameters come from: a folder in Hugging Face format, a name on the Hub, or an address of
            checkpoints. The factory gets it as ``path``; an address becomes the folder of a copy.
        dtype: dtype of the parameters; bfloat16 ones have float32 masters. What ``transformers`` keeps in float32 in a
            bfloat16 model, such as rotary frequencies, stays so.
        adapter: trains an adapter of ``peft`` in place of the model's own parameters, which come from ``path`` then:
            ``type`` (``lora`` by default) and fields of its configuration. Empty for none.
    """

    name: str = "hf"
    config: Mapping[str, Any] = field(default_factory=dict)
    path: str | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    adapter: Mapping[str, Any] = field(default_factory=dict)

    @property
    def options(self) -> dict[str, Any]:
        """The arguments of the factory."""
        return {**self.config, **({} if self.path is None else {"path": self.path})}


@dataclass(frozen=True)
class DataSection:
    """``data``: the data to train on.

    Attributes:
        name: a plugin's data provider; ``psyche plugins`` lists them.
        config: the configuration for the plugin's factory.
        seq_len: tokens of a sample; the factory gets it, too.
        validation: a set of its own for validation: the options in which it differs from ``config``, such as
            ``{split: validation}``; empty for samples that the provider holds out. Nodes may differ.
    """

    name: str = "text"
    config: Mapping[str, Any] = field(default_factory=dict)
    seq_len: Count = 256
    validation: Mapping[str, Any] = field(default_factory=dict)

    @property
    def options(self) -> dict[str, Any]:
        """The arguments of the factory."""
        return {**self.config, "seq_len": self.seq_len}

    @property
    def validation_options(self) -> dict[str, Any]:
        """The arguments of the factory for the set of ``validation``, which holds out nothing."""
        kept = {name: value for name, value in self.config.items() if not name.startswith("validation_")}
        return {**kept, **self.validation, "seq_len": self.seq_len}


@dataclass(frozen=True)
class ScheduleSection:
    """``optimizer.schedule``: how the learning rate changes with the run's step.

    Attributes:
        kind: ``constant``, ``linear``, ``cosine`` or ``wsd`` (warm-up, stable, decay).
        warmup_steps: length of the linear warm-up.
        warmup_init_lr: the rate at which the warm-up begins.
        final_lr: for ``linear`` and ``cosine``: the last rate.
        total_steps: for ``linear`` and ``cosine``: the step of the last rate; by default the run's ``total_steps``.
        stable_steps: for ``wsd``: steps at the base rate.
        cosine_decay_steps: for ``wsd``: length of the cosine.
        cosine_decay_final_lr: for ``wsd``: rate at the end of the cosine.
        linear_decay_steps: for ``wsd``: length of the line after the cosine.
        linear_decay_final_lr: for ``wsd``: rate at the end of the line.
    """

    kind: Literal["constant", "linear", "cosine", "wsd"] = "constant"
    warmup_steps: NonNegative = 0
    warmup_init_lr: Rate = 0.0
    final_lr: Rate | None = None
    total_steps: Count | None = None
    stable_steps: NonNegative | None = None
    cosine_decay_steps: NonNegative | None = None
    cosine_decay_final_lr: Rate | None = None
    linear_decay_steps: NonNegative | None = None
    linear_decay_final_lr: Rate | None = None

    def lengths(self, share: Fraction) -> dict[str, int]:
        """The fields that are set and count steps, each multiplied by ``share`` and rounded down."""
        names = ("warmup_steps", "total_steps", "stable_steps", "cosine_decay_steps", "linear_decay_steps")
        values = {name: getattr(self, name) for name in names}
        return {name: int(value * share) for name, value in values.items() if value}

    def build(self, lr: float, run_steps: int) -> Schedule:
        """Build the schedule with base rate ``lr`` for a run of ``run_steps``.

        Raises:
            ConfigError: a field of another kind is set, one of this kind is missing, or they contradict each other.
        """
        build = KINDS[self.kind]
        own = [item.name for item in fields(build) if item.name not in {item.name for item in fields(Constant)}]
        shared = ("kind", "warmup_steps", "warmup_init_lr")
        values = {item.name: getattr(self, item.name) for item in fields(self) if item.name not in shared}
        if "total_steps" in own and values["total_steps"] is None:
            values["total_steps"] = run_steps
        foreign = [name for name, value in values.items() if name not in own and value is not None]
        missing = [name for name in own if values[name] is None]
        if foreign or missing:
            problem = f"has no {', '.join(foreign)}" if foreign else f"needs {', '.join(missing)}"
            choices = ", ".join((*shared[1:], *own))
            raise ConfigError(f"The schedule {self.kind!r} {problem}; its fields are {choices}.")
        return build(lr, self.warmup_steps, self.warmup_init_lr, **{name: values[name] for name in own})


@dataclass(frozen=True)
class OptimizerSection:
    """``optimizer``: the size of the steps; DisTrO decides their direction, unless nodes make local steps of it.

    Attributes:
        lr: base learning rate.
        weight_decay: decoupled weight decay, applied with each agreed update.
        clip_grad_norm: largest norm of a node's gradient; null for no clipping.
        lr_for: a factor on the learning rate of the parameters whose names match a pattern; the first match counts.
        schedule: how the learning rate changes.
        name: ``adamw``, or ``muon``, with which the gradients of hidden matrices go through Muon before DisTrO.
        muon_for: for ``muon``: whether it trains the parameters whose names match a pattern; the first match counts.

    Raises:
        ConfigError: a factor is not a finite number from 0 on, or ``muon_for`` has other values than true and false.
    """

    lr: Positive = 1e-3
    weight_decay: Rate = 0.0
    clip_grad_norm: Positive | None = None
    lr_for: Mapping[str, float] = field(default_factory=dict)
    schedule: ScheduleSection = field(default_factory=ScheduleSection)
    name: Literal["adamw", "muon"] = "adamw"
    muon_for: Mapping[str, bool] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for pattern, factor in self.lr_for.items():
            if type(factor) not in (int, float) or not 0 <= factor < math.inf:
                raise ConfigError(f"optimizer.lr_for of {pattern!r} is {factor!r}; choose a number from 0 on.")
        for pattern, muon in self.muon_for.items():
            if type(muon) is not bool:
                raise ConfigError(f"optimizer.muon_for of {pattern!r} is {muon!r}; choose true or false.")
        if self.muon_for and self.name != "muon":
            raise ConfigError(f"optimizer.muon_for needs optimizer.name=muon; it is {self.name!r}.")


LoggerName = Literal["csv", "tensorboard", "wandb"]


@dataclass(frozen=True)
class TrainerSection(Holding):
    """``trainer``: how this node computes and holds numbers in memory; nodes may differ.

    It has the keys of :class:`~psyche_lightning.distro.holding.Holding`, too.

    Attributes:
        precision: Lightning's ``precision``.
        micro_batch_size: samples in one forward pass.
        validate_every: rounds between validations; 0 for never.
        validation_samples: samples of one validation.
        log_every: rounds between log lines.
        accelerator: Lightning's ``accelerator``; ``auto`` for the best of this machine.
        devices: devices of this machine that train the node's share together; each has a process of its own.
        inner: how they share the work. ``ddp``: each has the whole model. ``fsdp``: each has a part of it.
        threads: torch threads; null for torch's own choice.
        attn_implementation: how ``transformers`` computes attention: ``eager``, ``sdpa``, ``flex_attention``,
            ``flash_attention_2``, ...; null for the model's default.
        gradient_checkpointing: whether the backward pass computes activations again instead of keeping them.
        compile: whether ``torch.compile`` compiles the model.
        device_memory: GB (10^9 bytes) of each device, for which the recipe is made: a dry run says whether it fits;
            null to compare with none.
        logger: one of Lightning's loggers, which gets the figures of ``metrics.jsonl``; null for none.
        slowdown: how many times slower than it could this node computes, for demonstrations.
    """

    precision: Literal["32-true", "16-mixed", "bf16-mixed", "bf16-true"] = "32-true"
    micro_batch_size: Count = 8
    validate_every: NonNegative = 0
    validation_samples: Count = 64
    log_every: Count = 10
    accelerator: Literal["auto", "cpu", "gpu", "cuda", "mps"] = "auto"
    devices: Count = 1
    inner: Literal["ddp", "fsdp"] = "ddp"
    threads: Count | None = None
    attn_implementation: str | None = None
    gradient_checkpointing: bool = False
    compile: bool = False
    device_memory: Annotated[float, Range(0, above=True)] | None = None
    logger: LoggerName | None = None
    slowdown: Annotated[float, Range(1)] = 1.0


@dataclass(frozen=True)
class EvalsSection:
    """``evals``: what nodes do while they wait for others: measure tasks of lm-eval together, and write texts.

    Attributes:
        tasks: names of tasks; none for no evaluations.
        every: rounds between evaluations; 0 for one at the end, which the others have as well.
        limit: only so many questions of each task; null for all.
        tasks_from: a folder with tasks of your own, in lm-eval's form; nodes may differ.
        prompts: beginnings of texts, which each node continues in turn; none for no texts.

    Raises:
        ConfigError: names or prompts are too many, too long or repeated, or other keys are set without tasks.
    """

    tasks: tuple[str, ...] = ()
    every: NonNegative = 0
    limit: Count | None = None
    tasks_from: str | None = None
    prompts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.tasks and (self.every or self.limit or self.tasks_from):
            raise ConfigError("evals.tasks names no tasks, but other keys of evals are set; name tasks of lm-eval.")
        if len(self.tasks) > MAX_TASKS or len(set(self.tasks)) < len(self.tasks):
            raise ConfigError(f"evals.tasks has {len(self.tasks)} names; expected at most {MAX_TASKS}, each once.")
        for name in self.tasks:
            if not 0 < len(name) <= MAX_NAME:
                raise ConfigError(f"evals.tasks has {name!r}; a task's name has 1 to {MAX_NAME} characters.")
        if len(self.prompts) > MAX_PROMPTS or len(set(self.prompts)) < len(self.prompts):
            raise ConfigError(
                f"evals.prompts has {len(self.prompts)} texts; expected at most {MAX_PROMPTS}, each once."
            )
        for text in self.prompts:
            if not 0 < len(text) <= MAX_PROMPT:
                raise ConfigError(
                    f"evals.prompts has a text of {len(text)} characters, {text[:40]!r}; expected 1 to {MAX_PROMPT}."
                )


@dataclass(frozen=True)
class CheckpointSection:
    """``checkpoint``: which checkpoints are kept, and from which one a run resumes.

    Attributes:
        every: rounds between checkpoints; 0 for one at the end.
        keep: number of newest checkpoints to keep, in the node's folder and at the address.
        to: an address that the nodes share, besides each node's own folder; null for none.
        writers: nodes that write to the address: the first one writes, and another one only if those before it fail.
        resume: an address of checkpoints from which the run resumes: parameters, step and data; null to start anew.
        save_dtype: dtype of saved parameters; null for bfloat16 if the model comes from a checkpoint in bfloat16, else
            for that of the parameters.
    """

    every: NonNegative = 0
    keep: Count = 3
    to: str | None = None
    writers: Count = 1
    resume: str | None = None
    save_dtype: Literal["float32", "bfloat16"] | None = None


@dataclass(frozen=True)
class Recipe:
    """A complete description of a run.

    Attributes:
        name: the default of the run's name.
        run: durations, sizes, seed.
        distro: compression.
        model: the model to train.
        data: the data to train on.
        optimizer: step sizes.
        trainer: how this node computes.
        evals: what the nodes evaluate.
        checkpoint: which checkpoints are kept.
        node: how this node is connected.
    """

    name: str
    run: RunSection = field(default_factory=RunSection)
    distro: DistroConfig = field(default_factory=DistroConfig)
    model: ModelSection = field(default_factory=ModelSection)
    data: DataSection = field(default_factory=DataSection)
    optimizer: OptimizerSection = field(default_factory=OptimizerSection)
    trainer: TrainerSection = field(default_factory=TrainerSection)
    evals: EvalsSection = field(default_factory=EvalsSection)
    checkpoint: CheckpointSection = field(default_factory=CheckpointSection)
    node: NodeOptions = field(default_factory=NodeOptions)

    @property
    def schedule(self) -> Schedule:
        """The learning rate as a function of the run's step."""
        return self.optimizer.schedule.build(self.optimizer.lr, self.run.total_steps)

    def options(
        self,
        coordinator: str | None,
        run: str | None,
        directory: str | os.PathLike[str],
        manifest: Mapping[str, Mapping[str, Any]],
        *,
        start: tuple[int, int] | None = None,
        tokens_per_sample: int,
    ) -> RunOptions:
        """How a node takes part in a run with this recipe.

        Args:
            coordinator: URL of the run's coordinator; None to train alone.
            run: the run's name.
            directory: the node's folder; a process that trains alone keeps nothing in it.
            manifest: the manifest's sections, as :func:`psyche_lightning.recipe.manifest.manifest` returns them.
            start: for a run of this process alone: steps that were done before, and the first data id that is left.
            tokens_per_sample: tokens of a sample.
        """
        alone = coordinator is None
        return RunOptions(
            **{
                **_part(self.node, NodeOptions),
                **_part(self.run, RunValues),
                **_part(self.distro, DistroConfig),
                **_part(self.trainer, Holding),
                "directory": None if alone else directory,
            },
            coordinator=coordinator,
            run=None if alone else run,
            config=self.run.coordinator if alone else None,
            start=start if alone else None,
            manifest={name: section for name, section in manifest.items() if name not in SHARED},
            tokens_per_sample=tokens_per_sample,
        )


def _part(
    values: object, kind: type[CoordinatorConfig | RunValues | DistroConfig | NodeOptions | Holding]
) -> dict[str, Any]:
    """The fields of ``kind`` in ``values``, by name."""
    return {item.name: getattr(values, item.name) for item in fields(kind)}

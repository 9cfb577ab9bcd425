"""How a node computes with its model: attention, recomputed activations, compilation. Nodes may differ."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import torch

from psyche_lightning.errors import ConfigError, counted
from psyche_lightning.recipe.config import TrainerSection
from psyche_lightning.system import devices

logger = logging.getLogger(__name__)

_COMPILERS = ("torch._dynamo", "torch._inductor")
"""The modules of the errors of ``torch.compile``."""


_GPUS = {"auto": ("cuda", "mps"), "gpu": ("cuda", "mps"), "cuda": ("cuda",), "mps": ("mps",)}
"""The kinds of devices that each ``trainer.accelerator`` may mean, but for the CPU."""


def check_accelerator(trainer: TrainerSection) -> None:
    """Refuse devices that this machine lacks, before a model is loaded.

    Raises:
        ConfigError: there is no such device, or not as many; the text says what there is.
    """
    found = devices()
    count = max((found.get(kind, 0) for kind in _GPUS.get(trainer.accelerator, ())), default=0)
    if not count and trainer.accelerator not in ("auto", "cpu"):
        raise ConfigError(
            f"trainer.accelerator is {trainer.accelerator!r}, but torch finds only {', '.join(found)} on this "
            "machine. Set trainer.accelerator=auto, or install a torch that is built for it, and its driver."
        )
    if 0 < count < trainer.devices:
        raise ConfigError(
            f"trainer.devices is {trainer.devices}, but torch finds {counted(count, 'device')} on this machine. Set "
            f"trainer.devices={count} or less, or trainer.accelerator=cpu."
        )


def apply_choices(model: torch.nn.Module, trainer: TrainerSection) -> None:
    """Set up a model as a recipe's ``trainer`` says; names and values of its parameters stay.

    Raises:
        ConfigError: the model or this machine cannot do it; the text says why.
    """
    if trainer.attn_implementation is not None:
        _choose_attention(model, trainer.attn_implementation)
    if trainer.gradient_checkpointing:
        _recompute(model)


@contextlib.contextmanager
def compiling(model: torch.nn.Module, trainer: TrainerSection) -> Iterator[None]:
    """Train inside the context; the model's first call there compiles it in place, if the recipe says so.

    Raises:
        ConfigError: it cannot be compiled on this machine.
    """
    if not trainer.compile:
        yield
        return
    model.compile()
    logger.info("the first rounds compile the model, and so take longer")
    try:
        yield
    except Exception as error:
        if not any(type(one).__module__.startswith(_COMPILERS) for one in (error, error.__cause__)):
            raise
        raise ConfigError(
            f"trainer.compile is true, and {type(model).__name__} cannot be compiled on this machine: "
            f"{_first_line(error)} On a CPU that needs a C++ compiler such as g++. Install what is missing, or leave "
            "trainer.compile out."
        ) from error


def _choose_attention(model: Any, name: str) -> None:
    choose = getattr(model, "set_attn_implementation", None)
    reason = "it has a way of its own."
    before = getattr(getattr(model, "config", None), "_attn_implementation", None)
    if choose is not None:
        try:
            choose(name)
        except Exception as error:  # transformers raises several types for what is missing or unknown
            reason = _first_line(error)
        if model.config._attn_implementation == name:
            return
    use = "" if before is None else f" (now {before})"
    raise ConfigError(
        f"trainer.attn_implementation is {name!r}, and {type(model).__name__}{use} cannot compute its attention so: "
        f"{reason} Most models of transformers have eager, sdpa and flex_attention; flash_attention_2 needs the "
        "package flash-attn and a GPU."
    )


def _recompute(model: Any) -> None:
    enable = getattr(model, "activation_checkpointing_enable", None) or getattr(
        model, "gradient_checkpointing_enable", None
    )
    reason = "it has no activation_checkpointing_enable."
    if enable is not None:
        try:
            enable()
        except Exception as error:  # models raise different types
            reason = _first_line(error)
        else:
            return
    raise ConfigError(
        f"trainer.gradient_checkpointing is true, and {type(model).__name__} cannot do it: {reason} Leave it out, and "
        "save memory with a smaller trainer.micro_batch_size."
    )


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    line = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return line if line.endswith(".") else f"{line}."

"""How a node holds what it has of each parameter besides the parameter: its own choice, which no other node sees."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal, get_args

from psyche_lightning.errors import ConfigError

MastersForm = Literal["float32", "split"]
DeltaForm = Literal["float32", "bfloat16", "int8"]
GradientsForm = Literal["kept", "streamed"]

_CHOICES = {"masters": MastersForm, "delta": DeltaForm, "gradients": GradientsForm}


@dataclass(frozen=True)
class Holding:
    """How a node holds numbers in memory; nodes may differ.

    Attributes:
        masters: how parameters of less than 32 bits have their exact values. ``float32``: as 4 bytes beside each.
            ``split``: as the 2 bytes that a bfloat16 one lacks of them. Results are the same to the bit.
        delta: the dtype in which delta is kept between steps. ``int8``: in blocks of 256 values with one scale. This
            node's payloads differ a little with it; the loss was measured.
        gradients: ``kept`` until the update is encoded, or ``streamed``: added to delta one by one during the backward
            pass, and freed. Nothing can look at them together then, as clipping by the norm, Muon and gradient scalers
            do, and local steps need them.

    Raises:
        ConfigError: a value is none of the choices.
    """

    masters: MastersForm = "float32"
    delta: DeltaForm = "float32"
    gradients: GradientsForm = "kept"

    @property
    def holding(self) -> Holding:
        """These values alone."""
        return Holding(**{item.name: getattr(self, item.name) for item in fields(Holding)})

    def __post_init__(self) -> None:
        for name, kind in _CHOICES.items():
            value, choices = getattr(self, name), get_args(kind)
            if value not in choices:
                raise ConfigError(f"trainer.{name} is {value!r}; choose {' or '.join(choices)}.")

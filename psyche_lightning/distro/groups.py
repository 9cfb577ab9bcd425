"""Parameter groups with the names that the layout needs."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, cast

import torch

from psyche_lightning.errors import ConfigError


def named_groups(parameters: Iterable[tuple[str, torch.Tensor]] | Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Groups with ``params`` and ``param_names``; a parameter that is tied within a group stands once.

    Raises:
        ConfigError: a parameter has no name.
    """
    items = list(parameters)
    groups = cast(list[dict[str, Any]], items if items and isinstance(items[0], dict) else [{"params": items}])
    named = []
    for group in groups:
        pairs = list(group["params"])
        if "param_names" in group:
            pairs = list(zip(group["param_names"], pairs, strict=True))
        if not all(isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str) for pair in pairs):
            raise ConfigError("DisTrO needs the parameters' names; pass module.named_parameters()")
        unique: dict[int, tuple[str, torch.Tensor]] = {}
        for name, parameter in pairs:
            unique.setdefault(id(parameter), (name, parameter))
        names, tensors = [name for name, _ in unique.values()], [tensor for _, tensor in unique.values()]
        named.append({**group, "params": tensors, "param_names": names})
    return named


def check_weight_decay(value: Any) -> None:
    """Refuse what cannot be a weight decay.

    Raises:
        ConfigError: it is not a finite number from 0.
    """
    if not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
        raise ConfigError(f"weight_decay is {value!r}; choose a finite number that is not negative")

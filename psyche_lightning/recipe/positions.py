"""The number of positions that a model has, against the length of its samples."""

from __future__ import annotations

from typing import TYPE_CHECKING

from psyche_lightning.errors import ConfigError
from psyche_lightning.recipe.text_config import text_config

if TYPE_CHECKING:
    import torch

_NAMES = ("max_position_embeddings", "max_target_positions", "max_seq_len", "context_length")
"""The fields of configurations of ``transformers`` that say it; further ones are aliases of the first."""


def positions(model: torch.nn.Module) -> int | None:
    """The tokens of the longest text that a model takes; None if it names no limit.

    Args:
        model: a model; one with a configuration of ``transformers`` names its limit there.
    """
    found = _named(model)
    return None if found is None else found[1] - _reserved(model, found[1])


def check_positions(model: torch.nn.Module, seq_len: int) -> None:
    """Refuse samples that are longer than the model's positions; a model that names no limit takes all.

    Args:
        model: see :func:`positions`.
        seq_len: tokens of a sample.

    Raises:
        ConfigError: they are longer; the text says what to do.
    """
    found, usable = _named(model), positions(model)
    if found is None or usable is None or seq_len <= usable:
        return
    field, limit = found
    raise ConfigError(
        f"data.seq_len is {seq_len}, and {type(model).__name__} has {usable} positions. Set data.seq_len={usable} "
        f"or less, or give the model more of them with model.config.{field}={limit + seq_len - usable}: learned "
        "ones have to be new then, and rotary ones are not trained for longer texts."
    )


def _named(model: torch.nn.Module) -> tuple[str, int] | None:
    """The field of a model's configuration that names a limit, and its value."""
    text = text_config(model)
    for name in _NAMES:
        limit = getattr(text, name, None)
        if type(limit) is int and limit > 0:
            field = getattr(text, "attribute_map", {}).get(name, name)
            return (field if text is model.config else f"text_config.{field}"), limit
    return None


def _reserved(model: torch.nn.Module, limit: int) -> int:
    """Positions that no token gets: models such as RoBERTa begin to count behind the padding's."""
    import torch

    for name, module in model.named_modules():
        learned = isinstance(module, torch.nn.Embedding) and name.endswith(".position_embeddings")
        if learned and module.num_embeddings == limit and module.padding_idx is not None:
            return int(module.padding_idx) + 1
    return 0

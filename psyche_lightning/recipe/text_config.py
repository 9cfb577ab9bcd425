"""The part of a model's configuration that is about text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def text_config(model: torch.nn.Module) -> Any:
    """The configuration of the model that writes text, within that of a model which also sees or hears.

    Args:
        model: a model; one of ``transformers`` has a configuration.

    Returns:
        Its configuration of ``transformers``, or the part for text; None without one.
    """
    config: Any = getattr(model, "config", None)
    try:
        return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    except ValueError:  # it has several parts for text
        return config

"""Adapters of ``peft``, such as LoRA: a few new parameters are trained and exchanged, the model's own stay."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from psyche_lightning.errors import ConfigError, nearest, needing

if TYPE_CHECKING:
    import torch

_OURS = ("peft_type", "task_type", "base_model_name_or_path", "revision", "inference_mode")
"""Fields of a configuration that are not the user's."""


def adapted(model: torch.nn.Module, fields: Mapping[str, Any], base: str | None, saved: Path | None) -> torch.nn.Module:
    """The model with an adapter; only the adapter's parameters are trained.

    Args:
        model: the model to adapt, of the class ``PreTrainedModel``.
        fields: the recipe's ``model.adapter``: ``type`` (``lora`` by default) and fields of its configuration.
        base: the recipe's ``model.path``, which the adapter's folder names as its model.
        saved: the folder of an adapter to train further; None for a new one.

    Raises:
        ConfigError: ``peft`` is missing, a field is unknown or wrong, or there is no model to adapt.
    """
    with needing("peft", "peft", "model.adapter"):
        import peft
    if base is None:
        raise ConfigError("model.adapter adapts a model that was trained before: name it with model.path.")
    here = Path(base).expanduser()
    name, _, revision = (str(here.resolve()), "", "") if here.exists() else base.partition("@")
    config = _config(peft, fields)
    config.base_model_name_or_path, config.revision = name, revision or None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of matters that peft settles itself
            if saved is not None:
                found: torch.nn.Module = peft.PeftModel.from_pretrained(model, str(saved), is_trainable=True)
            else:
                found = peft.get_peft_model(model, config)
    except Exception as error:  # models and methods raise different types
        raise ConfigError(f"model.adapter cannot be made: {error}") from error
    if not any(parameter.requires_grad for parameter in found.parameters()):
        raise ConfigError("model.adapter has no parameters to train; name the layers with target_modules.")
    return found.train()


def _config(peft: Any, fields: Mapping[str, Any]) -> Any:
    wanted = dict(fields)
    kind = wanted.pop("type", "lora")
    kinds = {one.value.lower(): made for one, made in peft.PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    if kind not in kinds:
        choices = f"{nearest(str(kind), kinds)} Choose one of {', '.join(kinds)}."
        raise ConfigError(f"model.adapter.type is {kind!r}.{choices}")
    known = [one.name for one in dataclasses.fields(kinds[kind]) if one.name not in _OURS]
    for name in wanted:
        if name not in known:
            raise ConfigError(f"model.adapter of type {kind!r} has no field {name!r}.{nearest(name, known)}")
    try:
        return kinds[kind](task_type="CAUSAL_LM", **wanted)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"model.adapter is not right: {error}") from error

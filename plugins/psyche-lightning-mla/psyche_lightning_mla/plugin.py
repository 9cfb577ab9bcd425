"""The plugin: registers the model ``mla``, and ``deepseek_v3`` as a format of its checkpoints."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from psyche_lightning import hookimpl
from psyche_lightning.checkpoints.pretrained import Source, load
from psyche_lightning.errors import ConfigError, nearest

if TYPE_CHECKING:
    from pathlib import Path

    from psyche_lightning_mla.configuration import MLAConfig
    from psyche_lightning_mla.modeling import MLAForCausalLM


@hookimpl
def register_models(register: Callable[[str, Callable[..., Any]], None]) -> None:
    """Register the model under its name in recipes, and under the model type of its checkpoints."""
    register("mla", build)
    register("psyche_mla", build)


@hookimpl
def register_exports(register: Callable[[str, Callable[..., Any]], None]) -> None:
    """Register the format that plain `transformers` loads."""
    register("deepseek_v3", export)


def export(source: Path, target: Path) -> None:
    """Write a checkpoint of the model for plain `transformers`; see :func:`psyche_lightning_mla.deepseek.export`."""
    from psyche_lightning_mla import deepseek

    deepseek.export(source, target)


def build(config: Mapping[str, Any]) -> MLAForCausalLM:
    """Build an MLA language model.

    Args:
        config: fields of :class:`psyche_lightning_mla.MLAConfig`; also ``rope_theta`` (the base of the rotary
            frequencies), ``gradient_checkpointing`` (bool: recompute activations in the backward pass, to save
            memory), and ``path``, a checkpoint of this model or in DeepSeek-V3's format (``deepseek_v3``), in a
            folder or on the Hub (``OWNER/NAME[@REVISION]``), which replaces all fields.

    Returns:
        The model, in training mode, with new parameters, or with those at ``path``. On the meta device, parameters have
        only shapes.

    Raises:
        ConfigError: a key is unknown, a value does not fit, or the checkpoint is another model's.
        CheckpointError: the checkpoint lacks parameters, or has some of other shapes.
    """
    import torch
    from huggingface_hub.errors import StrictDataclassError

    from psyche_lightning_mla.modeling import MLAForCausalLM

    fields = copy.deepcopy(dict(config))  # transformers completes `rope_parameters` in place
    checkpointing = fields.pop("gradient_checkpointing", False)
    if not isinstance(checkpointing, bool):
        raise ConfigError(f"gradient_checkpointing of the model 'mla' is {checkpointing!r}, expected true or false.")
    path = fields.pop("path", None)
    try:
        if path is None:
            model = MLAForCausalLM(_configuration(fields))
        else:
            if fields:
                raise ConfigError(
                    f"The model 'mla' takes its shape from path={path!r}; remove the options "
                    f"{', '.join(sorted(fields))}."
                )
            source = Source.of(str(path))
            resolved = _stored_configuration(source)
            fresh = torch.get_default_device().type == "meta"
            model = MLAForCausalLM(resolved) if fresh else load(MLAForCausalLM, source, config=resolved)
    except (StrictDataclassError, KeyError, OSError, RuntimeError, TypeError, ValueError) as error:
        reason = error.__cause__ or error
        raise ConfigError(f"The model 'mla' cannot be built from these options: {reason}") from error
    if checkpointing:
        model.activation_checkpointing_enable()
    model.train()
    return model


def _configuration(fields: dict[str, Any]) -> MLAConfig:
    """The configuration with these fields; ``rope_theta`` becomes a rope parameter."""
    from psyche_lightning_mla.configuration import MLAConfig

    own = [field.name for field in dataclasses.fields(MLAConfig) if field.name in MLAConfig.__annotations__]
    known = [*own, "rope_theta", "gradient_checkpointing", "path"]
    for key in fields:
        if key not in known:
            raise ConfigError(
                f"The model 'mla' has no option {key!r}.{nearest(key, known)} Options: {', '.join(sorted(known))}."
            )
    if "rope_theta" in fields:
        fields["rope_theta"] = float(fields["rope_theta"])
    return MLAConfig(**fields)


def _stored_configuration(source: Source) -> MLAConfig:
    """The configuration of a checkpoint."""
    from psyche_lightning_mla.configuration import MLAConfig
    from psyche_lightning_mla.deepseek import MODEL_TYPE, from_deepseek

    found, _ = MLAConfig.get_config_dict(source.name, **source.options)
    kind = found.get("model_type")
    if kind == MLAConfig.model_type:
        return MLAConfig.from_dict(found)
    if kind == MODEL_TYPE:
        return from_deepseek(found, source.name)
    raise ConfigError(
        f"The checkpoint {source.name!r} has the model type {kind!r}, expected {MLAConfig.model_type!r} or "
        f"{MODEL_TYPE!r}."
    )

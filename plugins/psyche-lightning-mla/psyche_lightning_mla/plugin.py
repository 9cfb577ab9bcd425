"""The plugin: registers the model ``mla``."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from psyche_lightning import hookimpl
from psyche_lightning.checkpoints.pretrained import Source, load
from psyche_lightning.errors import ConfigError, nearest

if TYPE_CHECKING:
    from psyche_lightning_mla.configuration import MLAConfig
    from psyche_lightning_mla.modeling import MLAForCausalLM


@hookimpl
def register_models(register: Callable[[str, Callable[..., Any]], None]) -> None:
    """Register the model under its name in recipes, and under the model type of its checkpoints."""
    register("mla", build)
    register("psyche_mla", build)


def build(config: Mapping[str, Any]) -> MLAForCausalLM:
    """Build an MLA language model.

    Args:
        config: fields of :class:`psyche_lightning_mla.MLAConfig`; also ``rope_theta`` (the base of the rotary
            frequencies), ``gradient_checkpointing`` (bool: recompute activations in the backward pass, to save
            memory), and ``path``, a checkpoint folder that replaces all fields.

    Returns:
        The model, in training mode, with new parameters, or with those at ``path``. On the meta device, parameters have
        only shapes.

    Raises:
        ConfigError: a key is unknown or a value does not fit.
        CheckpointError: the checkpoint lacks parameters, or has some of other shapes.
    """
    import torch
    from huggingface_hub.errors import StrictDataclassError

    from psyche_lightning_mla.configuration import MLAConfig
    from psyche_lightning_mla.modeling import MLAForCausalLM

    fields = copy.deepcopy(dict(config))  # transformers completes `rope_parameters` in place
    checkpointing = fields.pop("gradient_checkpointing", False)
    if not isinstance(checkpointing, bool):
        raise ConfigError(f"gradient_checkpointing of the model 'mla' is {checkpointing!r}, expected true or false.")
    path = fields.pop("path", None)
    if path is not None:
        resolved = _load_config(path, fields)
    else:
        own = [field.name for field in dataclasses.fields(MLAConfig) if field.name in MLAConfig.__annotations__]
        known = [*own, "rope_theta", "gradient_checkpointing", "path"]
        for key in fields:
            if key not in known:
                raise ConfigError(
                    f"The model 'mla' has no option {key!r}.{nearest(key, known)} Options: {', '.join(sorted(known))}."
                )
        try:
            if "rope_theta" in fields:
                fields["rope_theta"] = float(fields["rope_theta"])
            resolved = MLAConfig(**fields)
        except (StrictDataclassError, KeyError, TypeError, ValueError) as error:
            reason = error.__cause__ or error
            raise ConfigError(f"The model 'mla' cannot be built from these options: {reason}") from error
    if path is None or torch.get_default_device().type == "meta":
        model = MLAForCausalLM(resolved)
    else:
        model = load(MLAForCausalLM, Source(str(path)), config=resolved)
    if checkpointing:
        model.activation_checkpointing_enable()
    model.train()
    return model


def _load_config(path: Any, others: Mapping[str, Any]) -> MLAConfig:
    """Read the configuration of a checkpoint folder."""
    from psyche_lightning_mla.configuration import MLAConfig

    if others:
        raise ConfigError(
            f"The model 'mla' takes its shape from path={path!r}; remove the options {', '.join(sorted(others))}."
        )
    if not Path(str(path)).joinpath("config.json").is_file():
        raise ConfigError(
            f"There is no config.json in {str(path)!r}: path must be a folder written by save_pretrained."
        )
    found, _ = MLAConfig.get_config_dict(path, local_files_only=True)
    if found.get("model_type") != MLAConfig.model_type:
        raise ConfigError(
            f"The checkpoint at {str(path)!r} has the model type {found.get('model_type')!r}, expected "
            f"{MLAConfig.model_type!r}."
        )
    return MLAConfig.from_dict(found)

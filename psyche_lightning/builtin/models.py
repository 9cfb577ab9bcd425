"""The built-in model ``hf``: any causal language model of ``transformers``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from psyche_lightning.errors import ConfigError
from psyche_lightning.hookspecs import ModelFactory, Register, hookimpl
from psyche_lightning.plugins import nearest

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


@hookimpl
def register_models(register: Register[ModelFactory]) -> None:
    """Offer the models that every installation has."""
    register("hf", hf)


def hf(config: Mapping[str, Any]) -> PreTrainedModel:
    """Any causal language model of ``transformers``, fresh by its configuration or from a local folder.

    Args:
        config: either ``model_type`` (``"llama"``, ...) with fields of its configuration class, or ``path`` of a folder
            in Hugging Face format, with fields that replace those of its configuration. Nothing is downloaded.

    Returns:
        The model in training mode, its parameters in float32.

    Raises:
        ConfigError: neither or both are given, the type or a field is unknown or wrong, or the folder is no checkpoint.
    """
    fields = dict(config)
    path, model_type = fields.pop("path", None), fields.pop("model_type", None)
    if (path is None) == (model_type is None):
        raise ConfigError(
            "The model 'hf' needs either model_type (such as 'llama') with fields of its configuration, or the path of "
            f"a local folder in Hugging Face format; it got {'both' if path is not None else 'neither'}."
        )
    import torch
    from transformers import AutoModelForCausalLM

    source = f"type {model_type!r}" if path is None else f"path {str(path)!r}"
    try:
        resolved = _by_type(str(model_type), fields) if path is None else _by_path(Path(path), fields)
        auto: Any = AutoModelForCausalLM  # it has no annotations
        if path is None or torch.get_default_device().type == "meta":
            model: PreTrainedModel = auto.from_config(resolved, dtype=torch.float32)
        else:
            model = auto.from_pretrained(path, config=resolved, local_files_only=True, dtype=torch.float32)
        model.train()
        return model
    except ConfigError:
        raise
    except Exception as error:  # what wrong fields raise differs from model to model
        reason = error.__cause__ or error
        raise ConfigError(f"The model 'hf' of {source} cannot be built: {type(reason).__name__}: {reason}") from error


def _by_type(model_type: str, fields: Mapping[str, Any]) -> PreTrainedConfig:
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as TYPES

    if model_type not in TYPES:
        raise ConfigError(
            f"transformers has no causal language model of type {model_type!r}.{nearest(model_type, TYPES)} It has "
            f"{len(TYPES)} types, such as llama, qwen3, gpt2 and deepseek_v3."
        )
    _check_fields(AutoConfig.for_model(model_type), fields)
    resolved: PreTrainedConfig = AutoConfig.for_model(model_type, **fields)
    return resolved


def _by_path(path: Path, fields: Mapping[str, Any]) -> PreTrainedConfig:
    from transformers import AutoConfig

    if not (path / "config.json").is_file():
        raise ConfigError(f"The model path {str(path)!r} is not a folder in Hugging Face format: no config.json.")
    stored: PreTrainedConfig = AutoConfig.from_pretrained(path, local_files_only=True)
    _check_fields(stored, fields)
    resolved: PreTrainedConfig = AutoConfig.from_pretrained(path, local_files_only=True, **fields)
    return resolved


def _check_fields(config: PreTrainedConfig, fields: Mapping[str, Any]) -> None:
    known = config.to_dict()
    for name in fields:
        if name not in known:
            raise ConfigError(f"The {config.model_type!r} configuration has no field {name!r}.{nearest(name, known)}")

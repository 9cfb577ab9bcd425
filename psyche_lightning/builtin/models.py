"""The built-in model ``hf``: any causal language model of ``transformers``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from psyche_lightning.errors import ConfigError
from psyche_lightning.hookspecs import ModelFactory, Register, hookimpl
from psyche_lightning.plugins import nearest

if TYPE_CHECKING:
    import torch


@hookimpl
def register_models(register: Register[ModelFactory]) -> None:
    """Offer the models that every installation has."""
    register("hf", hf)


def hf(config: Mapping[str, Any]) -> torch.nn.Module:
    """Any causal language model of ``transformers``, fresh by its configuration or from a local folder.

    Args:
        config: either ``model_type`` (``"llama"``, ...) with fields of its configuration class, or ``path`` of a folder
            in Hugging Face format, with fields that override its configuration. Nothing is downloaded.

    Raises:
        ConfigError: neither or both are given, the type or a field is unknown, or the folder is no checkpoint.
    """
    fields = dict(config)
    path, model_type = fields.pop("path", None), fields.pop("model_type", None)
    if (path is None) == (model_type is None):
        raise ConfigError(
            "The model 'hf' needs either model_type (such as 'llama') with fields of its configuration, or the path of "
            f"a local folder in Hugging Face format; it got {'both' if path is not None else 'neither'}."
        )
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if path is not None:
        if not (Path(path) / "config.json").is_file():
            raise ConfigError(f"The model path {str(path)!r} is not a folder in Hugging Face format: no config.json.")
        return AutoModelForCausalLM.from_pretrained(path, local_files_only=True, **fields)
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ConfigError(
            f"transformers has no causal language model of type {model_type!r}."
            f"{nearest(str(model_type), MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)} It has "
            f"{len(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)} types, such as llama, qwen3, gpt2 and deepseek_v3."
        )
    default = AutoConfig.for_model(model_type)
    known = set(default.to_dict())
    for name in fields:
        if name not in known:
            raise ConfigError(f"The {model_type!r} configuration has no field {name!r}.{nearest(name, known)}")
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **fields))

"""DeepSeek-V3's format: configurations of `transformers`' ``deepseek_v3`` and of this model, in both directions.

The files of parameters have the same names and shapes in both; only ``config.json`` differs.
"""

# mypy: allow-untyped-calls
# (transformers is partly without annotations)

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from psyche_lightning.checkpoints.manifest import NAME as MANIFEST
from psyche_lightning.errors import ConfigError

if TYPE_CHECKING:
    from psyche_lightning_mla.configuration import MLAConfig

MODEL_TYPE = "deepseek_v3"
ARCHITECTURE = "DeepseekV3ForCausalLM"
_CONFIG = "config.json"
_EXPERTS = (
    "n_routed_experts",
    "num_experts_per_tok",
    "n_shared_experts",
    "moe_intermediate_size",
    "first_k_dense_replace",
    "n_group",
    "topk_group",
    "norm_topk_prob",
    "routed_scaling_factor",
)
_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "q_lora_rank",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "max_position_embeddings",
    "rope_parameters",
    "rope_interleave",
    "rms_norm_eps",
    "attention_bias",
    "initializer_range",
    "tie_word_embeddings",
    "use_cache",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
)


def from_deepseek(found: Mapping[str, Any], where: str) -> MLAConfig:
    """The configuration of this model with the parameters of a ``deepseek_v3`` checkpoint.

    Args:
        found: the content of its ``config.json``.
        where: its folder, for messages.

    Raises:
        ConfigError: the checkpoint has something that this model lacks.
    """
    from transformers import DeepseekV3Config

    from psyche_lightning_mla.configuration import MLAConfig

    config = DeepseekV3Config.from_dict(dict(found))
    if getattr(config, "quantization_config", None) is not None:
        raise ConfigError(f"The checkpoint at {where!r} is quantized; convert its parameters to bfloat16 first.")
    for name, value in (("hidden_act", "silu"), ("attention_dropout", 0.0)):
        if getattr(config, name) != value:
            raise ConfigError(
                f"The checkpoint at {where!r} has {name}={getattr(config, name)!r}; the model 'mla' has only {value!r}."
            )
    fields = {name: getattr(config, name) for name in _FIELDS}
    if config.first_k_dense_replace is None or config.first_k_dense_replace < config.num_hidden_layers:
        fields |= {name: getattr(config, name) for name in _EXPERTS}
    return MLAConfig(**fields)


def to_deepseek(config: MLAConfig) -> dict[str, Any]:
    """The content of ``config.json`` of a ``deepseek_v3`` checkpoint with the parameters of this model."""
    from transformers import DeepseekV3Config

    fields = {name: getattr(config, name) for name in (*_FIELDS, *_EXPERTS)}
    if not config.n_routed_experts:
        # No layer has experts, but the configuration of some must be valid.
        fields |= {"first_k_dense_replace": config.num_hidden_layers, "n_routed_experts": 1, "num_experts_per_tok": 1}
        fields |= {"n_group": 1, "topk_group": 1}
    deepseek = DeepseekV3Config(
        **fields, num_key_value_heads=config.num_attention_heads, num_mtp_layers=0, architectures=[ARCHITECTURE]
    )
    deepseek.dtype = config.dtype
    plain: dict[str, Any] = json.loads(deepseek.to_json_string(use_diff=False))
    return plain


def export(source: Path, target: Path) -> None:
    """Write a checkpoint of this model as one of ``deepseek_v3``, which plain `transformers` loads.

    Args:
        source: a folder in Hugging Face format.
        target: the folder for the result, which exists and is empty.

    Raises:
        ConfigError: the checkpoint is of another model.
        OSError: it cannot be read or written.
    """
    from psyche_lightning_mla.configuration import MLAConfig

    found, _ = MLAConfig.get_config_dict(source, local_files_only=True)
    if found.get("model_type") != MLAConfig.model_type:
        raise ConfigError(
            f"The checkpoint at {str(source)!r} has the model type {found.get('model_type')!r}; only "
            f"{MLAConfig.model_type!r} can become {MODEL_TYPE!r}."
        )
    config = to_deepseek(MLAConfig.from_dict(found))
    for path in source.iterdir():
        if path.is_file() and path.name not in (_CONFIG, MANIFEST):  # a run's checkpoint has its files' hashes
            shutil.copyfile(path, target / path.name)
    (target / _CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

"""A recipe in the form of Psyche's accounts, so that Psyche's tools can show the run.

Nodes of this project follow the manifest; these values set only durations, batch sizes and steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from psyche_lightning.errors import ConfigError
from psyche_lightning.protocol.limits import PSYCHE_LIMITS, check_config
from psyche_lightning.protocol.state import CoordinatorConfig
from psyche_lightning_solana.layout import CONFIG

if TYPE_CHECKING:
    from psyche_lightning.recipe import Recipe

SHORT, DESCRIPTION = 64, 280
_DURATIONS = (
    "warmup_time",
    "cooldown_time",
    "max_round_train_time",
    "round_witness_time",
    "epoch_time",
    "waiting_for_members_extra_time",
)
_SCHEDULES = {"Constant": "Constant", "Linear": "Linear", "Cosine": "Cosine", "WarmupStableDecay": "WarmupStableDecay"}


def config_section(config: CoordinatorConfig | Mapping[str, Any]) -> dict[str, int]:
    """Durations and sizes in the layout's form: durations are ceilings and round up to whole seconds.

    Raises:
        ConfigError: a value does not fit the layout.
    """
    values = dict(config) if isinstance(config, Mapping) else asdict(config)
    for name in _DURATIONS:
        if math.isfinite(values[name]):
            values[name] = float(max(1, math.ceil(values[name])))
    check_config(CoordinatorConfig(**{name: values[name] for name in CONFIG.names or ()}), PSYCHE_LIMITS)
    return {name: int(values[name]) for name in CONFIG.names or ()}


def model_section(recipe: Recipe) -> dict[str, Any]:
    """``{"LLM": ...}`` for a recipe: the fields of Psyche's run configuration that a recipe has."""
    schedule = {name: value for name, value in asdict(recipe.schedule).items() if value is not None}
    optimizer: dict[str, Any] = {
        "clip_grad_norm": recipe.optimizer.clip_grad_norm,
        "weight_decay": recipe.optimizer.weight_decay or None,
        "compression_decay": float(recipe.distro.decay),
        "compression_topk": recipe.distro.k,
        "compression_chunk": recipe.distro.chunk,
        "quantize_1bit": True,
    }
    return plain_model(
        recipe.name,
        recipe.data.seq_len,
        cold_start_warmup_steps=recipe.run.cold_start_warmup_steps,
        lr_schedule={_SCHEDULES[type(recipe.schedule).__name__]: schedule},
        optimizer={"Distro": optimizer},
    )


def plain_model(
    name: str,
    max_seq_len: int = 1,
    *,
    cold_start_warmup_steps: int = 0,
    lr_schedule: Mapping[str, Any] | None = None,
    optimizer: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """``{"LLM": ...}`` if only the manifest describes the model.

    Args:
        name: replaces Psyche's repository of the first parameters, which here come from the first node.
        max_seq_len: tokens of a sample.
        cold_start_warmup_steps: steps over which learning rates rise again after a pause.
        lr_schedule: Psyche's schedule; a constant rate unless given.
        optimizer: Psyche's optimizer; DisTrO's defaults unless given.
    """
    repository = f"psyche-lightning/{name}".encode()[:SHORT].decode("utf-8", "ignore")
    distro = {
        "clip_grad_norm": None,
        "weight_decay": None,
        "compression_decay": 0.999,
        "compression_topk": 8,
        "compression_chunk": 64,
        "quantize_1bit": True,
    }
    return {
        "LLM": {
            "max_seq_len": max_seq_len,
            "cold_start_warmup_steps": cold_start_warmup_steps,
            "architecture": "HfAuto",
            "checkpoint": {"Dummy": {"repo_id": repository, "revision": None}},
            "data_type": "Pretraining",
            "data_location": "Dummy",
            "lr_schedule": dict(
                lr_schedule or {"Constant": {"base_lr": 0.0, "warmup_init_lr": 0.0, "warmup_steps": 0}}
            ),
            "optimizer": dict(optimizer or {"Distro": distro}),
        }
    }


def metadata_section(name: str, description: str = "", parameters: int = 0, vocabulary: int = 0) -> dict[str, Any]:
    """A run's metadata for lists."""
    return {
        "name": name.encode()[:SHORT].decode("utf-8", "ignore"),
        "description": description.encode()[:DESCRIPTION].decode("utf-8", "ignore"),
        "num_parameters": parameters,
        "vocab_size": vocabulary,
    }


def described(values: Mapping[str, Any]) -> dict[str, Any]:
    """A run's metadata from what people wrote.

    Raises:
        ConfigError: a text does not fit into its field.
    """
    for field, most in (("name", SHORT), ("description", DESCRIPTION)):
        size = len(values[field].encode())
        if size > most:
            raise ConfigError(f"the run's {field} has {size} bytes; the account keeps {most}")
    return dict(values)


def of_recipe(recipe: Recipe) -> dict[str, Any]:
    """A recipe's arguments for :meth:`~psyche_lightning_solana.client.admin.SolanaAdmin.create`.

    Only a node that has the samples can describe them, so the manifest has no section ``data``.
    """
    from psyche_lightning.recipe.estimate import estimate
    from psyche_lightning.recipe.manifest import manifest

    sections = manifest(recipe)
    del sections["data"]
    vocabulary = recipe.model.config.get("vocab_size", 0)
    return {
        "config": asdict(recipe.run.coordinator),
        "manifest": sections,
        "model": model_section(recipe),
        "metadata": metadata_section(
            recipe.name, parameters=estimate(recipe).trainable, vocabulary=vocabulary if type(vocabulary) is int else 0
        ),
    }

"""Reads Psyche's own run configurations in TOML as recipes.

It ignores settings that decide nothing here (DisTrO replaces AdamW, and ``quantize_1bit`` is always on), and refuses
those that this project does not support. What a file leaves out, such as the data, has its default, and ``key=value``
overrides it as in any recipe.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from psyche_lightning.errors import ConfigError
from psyche_lightning.protocol.state import CoordinatorConfig

SCHEDULES = {"Constant": "constant", "Linear": "linear", "Cosine": "cosine", "WarmupStableDecay": "wsd"}
SIZES = {"TwoBytes": 2, "FourBytes": 4}


def read_toml(path: Path) -> dict[str, Any]:
    """Convert a run configuration to the sections of a recipe.

    Raises:
        ConfigError: the file is not TOML, has another form, or needs something that this project does not support.
    """
    tomllib: Any = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} is not a readable TOML file: {error}") from error
    config = values.get("config")
    if not isinstance(config, dict):
        raise ConfigError(f"{path} has no section [config]; one of Psyche's run configurations begins with it.")
    known = CoordinatorConfig.__dataclass_fields__
    unknown = [name for name in config if name not in known]
    if unknown:
        raise ConfigError(f"{path}: [config] has the unknown key {unknown[0]!r}. Known keys: {', '.join(known)}.")
    recipe: dict[str, Any] = {"run": dict(config)}
    model = values.get("model")
    if model is not None:
        try:
            recipe["run"]["cold_start_warmup_steps"] = model["LLM"]["cold_start_warmup_steps"]
            recipe.update(_model(model["LLM"]))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ConfigError(f"{path}: [model.LLM] does not have Psyche's form: {error!r}") from error
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error
    if isinstance(values.get("run_id"), str):
        recipe["name"] = values["run_id"]
    return recipe


def _model(llm: Mapping[str, Any]) -> dict[str, Any]:
    if llm["architecture"] == "Torchtitan":
        raise ConfigError("the architecture Torchtitan is not supported; use HfLlama, HfDeepseek or HfAuto.")
    recipe: dict[str, Any] = {"data": {"seq_len": llm["max_seq_len"], **_data(llm["data_location"])}}
    source = _checkpoint(llm["checkpoint"])
    if source is not None:
        recipe["model"] = {"name": "hf", "path": source}
    kind, fields = _only(llm["lr_schedule"], "lr_schedule")
    schedule = dict(fields)
    optimizer: dict[str, Any] = {"lr": schedule.pop("base_lr"), "schedule": {"kind": SCHEDULES[kind], **schedule}}
    rule, settings = _only(llm["optimizer"], "optimizer")
    if rule == "Distro":
        recipe["distro"] = {
            "k": settings["compression_topk"],
            "chunk": settings["compression_chunk"],
            "decay": settings["compression_decay"],
        }
    elif rule != "AdamW":
        raise ConfigError(f"the optimizer {rule!r} is not supported; choose Distro.")
    for name in ("weight_decay", "clip_grad_norm"):
        if settings.get(name) is not None:
            optimizer[name] = settings[name]
    recipe["optimizer"] = optimizer
    return recipe


def _checkpoint(value: Any) -> str | None:
    """Where the first parameters come from: a repository, an address, or None."""
    kind, fields = _only(value, "checkpoint")
    if kind in ("Hub", "P2P"):
        revision = fields.get("revision")
        return str(fields["repo_id"]) + (f"@{revision}" if revision else "")
    if kind in ("Gcs", "P2PGcs"):
        prefix = fields.get("prefix")
        return f"gs://{fields['bucket']}" + (f"/{prefix}" if prefix else "")
    return None


def _data(value: Any) -> dict[str, Any]:
    kind, place = _only(value, "data_location")
    if kind == "Dummy":
        return {}
    if kind == "Local":
        return {"name": "tokens", "config": {"path": place}}
    if kind == "WeightedHttp":
        return {"name": "mix", "config": {"url": place}}
    if kind == "Preprocessed":
        return {"name": "parquet", "config": {"path": place}}
    if kind == "Http":
        return {"name": "tokens", "config": _http(place)}
    raise ConfigError(
        f"the data location {kind!r} is not supported: choose Local, Http, WeightedHttp, Preprocessed or Dummy."
    )


def _http(place: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {"token_size": SIZES[place["token_size_in_bytes"]]}
    shuffle, seed = _only(place["shuffle"], "shuffle")
    found["shuffle"] = list(seed) if shuffle == "Seeded" else False
    kind, where = _only(place["location"], "location")
    if kind == "SingleUrl":
        found["url"] = where
    elif kind == "NumberedFiles":
        found |= {
            "url": where["url_template"],
            "start": where["start_index"],
            "pad": where["n_left_pad_zeros"],
            "count": where["num_files"],
        }
    else:
        raise ConfigError(f"the location {kind!r} is not supported: choose SingleUrl or NumberedFiles.")
    return found


def _only(value: Any, name: str) -> tuple[str, Any]:
    """Split an externally tagged value: ``"Dummy"``, or ``{"Hub": {...}}``."""
    if isinstance(value, str):
        return value, {}
    if isinstance(value, dict) and len(value) == 1:
        ((kind, fields),) = value.items()
        return kind, fields
    raise ConfigError(f"{name} is {value!r}; expected one kind, such as Hub = {{...}}.")

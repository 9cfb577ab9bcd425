"""Finds a trained model for the commands that use one."""

from __future__ import annotations

import json
from pathlib import Path

from psyche_lightning.checkpoints.folder import ADAPTER, local_model
from psyche_lightning.errors import ConfigError
from psyche_lightning.plugins import load_plugins


def find(model: str) -> tuple[Path, Path]:
    """The folder of a checkpoint, and that of its model: another one if the checkpoint is an adapter.

    The model's type is known to ``transformers`` then.

    Args:
        model: a folder in Hugging Face format, a folder of checkpoints, or an address.

    Raises:
        ConfigError: something is missing, or the type is unknown to transformers and to every installed plugin.
        CheckpointError: nothing usable is there.
    """
    import torch
    from transformers import CONFIG_MAPPING

    checkpoint = Path(local_model(model))
    adapter = checkpoint / ADAPTER
    base = _base(adapter) if adapter.is_file() else checkpoint
    model_type = _model_type(base)
    models = load_plugins().models()
    if model_type in models:  # its factory makes the type known to transformers
        with torch.device("meta"):
            models[model_type]({})
    if model_type not in CONFIG_MAPPING:
        raise ConfigError(
            f"The checkpoint's model_type {model_type!r} is unknown to transformers and to every installed plugin "
            f"({', '.join(models)}); install the plugin that the model was trained with."
        )
    return checkpoint, base


def _base(adapter: Path) -> Path:
    """The folder of the model that an adapter's configuration names; one on the Hub is taken from the Hub's cache.

    Raises:
        ConfigError: it is not here.
    """
    from huggingface_hub import snapshot_download

    try:
        values = json.loads(adapter.read_text(encoding="utf-8"))
        name, revision = str(values["base_model_name_or_path"]), values.get("revision")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{str(adapter)!r} names no model ({error}).") from error
    here = Path(local_model(name))
    if here.is_dir():
        return here
    try:
        return Path(snapshot_download(name, revision=revision, local_files_only=True))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"The adapter in {str(adapter.parent)!r} belongs to the model {name!r}, which is not on this machine. "
            f"Download it (`hf download {name}`), or correct base_model_name_or_path in {adapter.name}."
        ) from error


def _model_type(checkpoint: Path) -> str:
    """The model type in ``config.json``.

    Raises:
        ConfigError: the folder is missing or is not a checkpoint.
    """
    expected = "expected a folder in Hugging Face format, with config.json and model.safetensors"
    if not checkpoint.is_dir():
        raise ConfigError(f"There is no folder {str(checkpoint)!r}; {expected}.")
    try:
        model_type = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))["model_type"]
    except FileNotFoundError:
        raise ConfigError(f"{str(checkpoint)!r} has no config.json; {expected}.") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{str(checkpoint / 'config.json')!r} names no model_type ({error}); {expected}.") from error
    return str(model_type)

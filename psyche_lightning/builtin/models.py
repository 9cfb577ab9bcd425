"""The built-in model ``hf``: any causal language model of ``transformers``."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from psyche_lightning.checkpoints.building import BUILDING
from psyche_lightning.checkpoints.pretrained import Source, kept_in, load
from psyche_lightning.errors import ConfigError, PsycheError, nearest
from psyche_lightning.hookspecs import ModelFactory, Register, hookimpl

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_ELSEWHERE = {
    "attn_implementation": "trainer.attn_implementation",
    "dtype": "model.dtype",
    "gradient_checkpointing": "trainer.gradient_checkpointing",
    "torch_dtype": "model.dtype",
}
"""Arguments of ``transformers`` for which a recipe has keys of its own."""


@hookimpl
def register_models(register: Register[ModelFactory]) -> None:
    """Register the models that every installation has."""
    register("hf", hf)


def hf(config: Mapping[str, Any]) -> PreTrainedModel:
    """Any causal language model of ``transformers``: new from a configuration, from a folder, or from the Hub.

    Args:
        config: either ``model_type`` (``"llama"``, ...) and fields of its configuration class; or ``path`` of a folder
            in Hugging Face format or ``OWNER/NAME[@REVISION]`` on the Hub, and fields that replace those of its
            configuration. With ``path`` also ``fresh`` (bool: use its configuration with new parameters) and
            ``trust_remote_code`` (bool: run the model's own code). Another ``vocab_size`` resizes the embeddings. If
            ``HF_HUB_OFFLINE`` is set, the Hub is not asked, and its cache must have the model.

    Returns:
        The model in training mode, with parameters in float32; those of a ``path`` may be in the dtype of training
        already (:func:`~psyche_lightning.checkpoints.pretrained.kept_in`).

    Raises:
        ConfigError: neither or both are given, the type or a field is unknown or wrong, the folder is not a model, or
            the Hub does not deliver the model; the text says why.
        CheckpointError: the model there lacks parameters, or has some of other shapes; the text names them.
    """
    fields = dict(config)
    path, model_type = fields.pop("path", None), fields.pop("model_type", None)
    if (path is None) == (model_type is None):
        raise ConfigError(
            "The model 'hf' needs either model_type (such as 'llama') with fields of its configuration, or a path: a "
            "local folder in Hugging Face format, or a name on the Hub such as Qwen/Qwen3-0.6B@main; it got "
            f"{'both' if path is not None else 'neither'}."
        )
    if path is None:
        return _built(f"type {model_type!r}", lambda: _fresh(_by_type(str(model_type), fields), False))
    fresh, trusted = (_switch(fields, name) for name in ("fresh", "trust_remote_code"))
    source = Source.of(str(path))

    def build() -> PreTrainedModel:
        import torch
        from transformers import AutoModelForCausalLM

        if fresh or torch.get_default_device().type == "meta":
            return _fresh(_by_source(source, fields, trusted), trusted)
        vocab_size = fields.get("vocab_size")
        resolved = _by_source(source, {name: fields[name] for name in fields if name != "vocab_size"}, trusted)
        options: dict[str, Any] = {"config": resolved, "trust_remote_code": trusted}
        if vocab_size is None:
            loaded: PreTrainedModel = load(AutoModelForCausalLM, source, **options)
            return loaded
        with kept_in(None):  # new rows are drawn like the old ones, which are not rounded before
            loaded = load(AutoModelForCausalLM, source, **options)
            loaded.resize_token_embeddings(vocab_size)
        return loaded

    return _built(f"path {str(path)!r}", build)


def _switch(fields: dict[str, Any], name: str) -> bool:
    value = fields.pop(name, False)
    if not isinstance(value, bool):
        raise ConfigError(f"{name} of the model 'hf' is {value!r}; expected true or false.")
    return value


def _fresh(resolved: PreTrainedConfig, trusted: bool) -> PreTrainedModel:
    import torch
    from transformers import AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM  # it has no annotations
    model: PreTrainedModel = auto.from_config(resolved, dtype=torch.float32, trust_remote_code=trusted)
    return model


def _built(source: str, build: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    """Call ``build``, make its model ready to train, and turn its errors into a ConfigError."""
    try:
        with BUILDING:
            model = build()
        model.train()
        return model
    except PsycheError:
        raise
    except Exception as error:  # models raise different types for wrong fields
        raise ConfigError(f"The model 'hf' of {source} cannot be built: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    """Why a model could not be built; the Hub's client says it somewhere in a chain of errors."""
    from huggingface_hub import errors as hub

    chain: list[BaseException] = []
    one: BaseException | None = error
    while one is not None and len(chain) < 20:
        chain.append(one)
        one = one.__cause__ or one.__context__
    known: dict[type[BaseException], str] = {
        hub.GatedRepoError: "it is gated: ask for access on its page of the Hub, then log in with `hf auth login`.",
        hub.RepositoryNotFoundError: "the Hub has no such model, or your user may not see it: check the name, or log "
        "in with `hf auth login`. (There is no local folder of that name, either.)",
        hub.RevisionNotFoundError: "the Hub has the model, but not this revision.",
        hub.OfflineModeIsEnabled: "HF_HUB_OFFLINE is set and the Hub's cache does not have it: download it once with "
        "a network (`hf download OWNER/NAME`), or unset HF_HUB_OFFLINE.",
        hub.LocalEntryNotFoundError: "the Hub's cache does not have it, and the Hub cannot be reached or "
        "HF_HUB_OFFLINE is set: download it once with a network (`hf download OWNER/NAME`). (There is no local folder "
        "of that name, either.)",
    }
    for kind, text in known.items():
        if any(isinstance(one, kind) for one in chain):
            return text
    if "trust_remote_code" in str(error):
        return (
            "it has code of its own, which nobody has checked. Read that code; if you trust it, set "
            "model.config.trust_remote_code=true and name the revision that you read, as OWNER/NAME@COMMIT."
        )
    reason = error.__cause__ or error
    return f"{type(reason).__name__}: {reason}"


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


def _by_source(source: Source, fields: Mapping[str, Any], trusted: bool) -> PreTrainedConfig:
    from transformers import AutoConfig

    place: dict[str, Any] = {**source.options, "trust_remote_code": trusted}
    stored: PreTrainedConfig = AutoConfig.from_pretrained(source.name, **place)
    _check_fields(stored, fields)
    resolved: PreTrainedConfig = AutoConfig.from_pretrained(source.name, **place, **fields)
    return resolved


def _check_fields(config: PreTrainedConfig, fields: Mapping[str, Any]) -> None:
    known = config.to_dict()
    for name in fields:
        if name in _ELSEWHERE:
            raise ConfigError(f"model.config.{name} would do nothing here; the recipe's key is {_ELSEWHERE[name]}.")
        if name not in known and name not in config.attribute_map and not _read_if_there(config, name):
            raise ConfigError(f"The {config.model_type!r} configuration has no field {name!r}.{nearest(name, known)}")


def _read_if_there(config: PreTrainedConfig, name: str) -> bool:
    """Whether the model's code reads a field that its configuration need not have, such as ``head_dim``."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    models: Any = MODEL_FOR_CAUSAL_LM_MAPPING  # it has no annotations
    if type(config) not in models:
        return False
    code = inspect.getsource(sys.modules[models[type(config)].__module__])
    return re.search(rf'getattr\((self\.)?config, "{re.escape(name)}"', code) is not None

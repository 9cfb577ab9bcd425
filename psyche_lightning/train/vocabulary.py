"""Makes a model and the tokenizer of its data agree on special tokens, and says where they do not."""

from __future__ import annotations

import logging
from collections.abc import Collection
from typing import Any

import torch

from psyche_lightning.hookspecs import DataProvider
from psyche_lightning.recipe.text_config import text_config

logger = logging.getLogger(__name__)

_PADDING = 1024
"""Models round their vocabulary up, at most so far."""


def settle_vocabulary(model: torch.nn.Module, provider: DataProvider, *, fresh: bool, given: Collection[str]) -> None:
    """Give a fresh model the special tokens of its data, so that what it writes ends; warn where another model differs.

    Args:
        model: with a ``config`` of ``transformers``; another one stays as it is.
        provider: the data.
        fresh: whether the model was made from a configuration, without loading parameters.
        given: names of the configuration's fields that the user has set; these stay.
    """
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "eos_token_id"):
        return
    tokenizer: Any = provider.tokenizer
    end = getattr(provider, "end_of_text", None)
    if end is None:
        end = getattr(tokenizer, "eos_token_id", None)
    generation: Any = getattr(model, "generation_config", None)
    if fresh and tokenizer is not None:
        for name, value in (("eos_token_id", end), ("bos_token_id", getattr(tokenizer, "bos_token_id", None))):
            if name not in given:
                for holder in (config, generation):
                    if holder is not None:
                        setattr(holder, name, value)
    ends = {*_ids(config), *_ids(generation)}
    if end is not None and end not in ends:
        has = f"ends them with {_words(ends)}" if ends else "has no such id"
        logger.warning(
            "the texts of the data end with the token id %d, but the model %s: what it generates will not end there. "
            "Set model.config.eos_token_id=%d",
            end,
            has,
            end,
        )
    begins = [getattr(holder, "bos_token_id", None) for holder in (config, tokenizer)]
    if all(isinstance(one, int) for one in begins) and begins[0] != begins[1]:
        logger.warning(
            "texts begin with the token id %d according to the model, and with %d according to the tokenizer of the "
            "data: is this the tokenizer that the model was trained with?",
            *begins,
        )
    size = getattr(text_config(model), "vocab_size", None)
    if isinstance(size, int) and tokenizer is not None:
        tokens = provider.vocab_size
        if size >= tokens + _PADDING or size >= 2 * tokens:
            logger.warning(
                "the model has %d token ids and the tokenizer of the data %d: the others are never trained. Set "
                "model.config.vocab_size=%d, unless this is the wrong tokenizer",
                size,
                tokens,
                tokens,
            )


def _ids(holder: Any) -> list[int]:
    """The ids that end a text, according to a configuration."""
    found = getattr(holder, "eos_token_id", None)
    return [found] if isinstance(found, int) else list(found or [])


def _words(ids: Collection[int]) -> str:
    return " or ".join(map(str, sorted(ids)))

"""Looks once, before training, whether a model learns to predict each token from those before it."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

import torch

from psyche_lightning.errors import ConfigError
from psyche_lightning.lightning.weights import IGNORED
from psyche_lightning.train.module import call_options
from psyche_lightning.train.packing import embeddings, undisturbed

logger = logging.getLogger(__name__)

_LENGTH = 32
"""Tokens of the probe."""
Question = Callable[[torch.nn.Module, torch.Tensor], bool]


def check_objective(model: torch.nn.Module, vocab_size: int, seq_len: int) -> None:
    """Refuse a model whose loss compares labels with the outputs at their own place, or whose outputs see later tokens.

    Such a model learns to copy: its loss falls quickly, and it is of no use. The model stays as it is.

    Args:
        model: see :class:`~psyche_lightning.hookspecs.ModelFactory`, on the device where it trains.
        vocab_size: number of token ids of the data.
        seq_len: tokens of a sample.

    Raises:
        ConfigError: it is such a model.
    """
    ids = torch.randint(vocab_size, (1, min(_LENGTH, seq_len)), generator=torch.Generator().manual_seed(0))
    sees = _answered(_sees_later_tokens, model, ids)
    if not sees and not _answered(_compares_in_place, model, ids):
        return
    name = type(model).__name__
    why = (
        f"the outputs of {name} for a token depend on the tokens after it"
        if sees
        else f"{name} compares the label of a token with the output at the same place, not with the one before it"
    )
    raise ConfigError(
        f"{why}, so it would learn to copy its input instead of predicting the next token. Choose a causal language "
        "model such as llama, qwen3 or gpt2 (some need model.config.is_decoder=true)."
    )


def _answered(question: Question, model: torch.nn.Module, ids: torch.Tensor) -> bool:
    """The answer to a question about the model and a row of token ids; False if the model fails on it."""
    device = next((one.device for one in model.parameters()), torch.device("cpu"))
    ids = ids.to(device)
    try:
        with undisturbed(model, device), torch.enable_grad():
            return question(model, ids)
    except Exception:  # models raise different types, and some take no short rows: training says more
        logger.debug("no answer to %s", question.__name__, exc_info=True)
        return False


def _sees_later_tokens(model: torch.nn.Module, ids: torch.Tensor) -> bool:
    """Whether the outputs before the last token have a gradient with respect to its embedding."""
    with embeddings(model, ids) as embedded:
        earlier = model(input_ids=ids, labels=ids, **call_options(model)).logits[:, :-1]
    if not embedded or not earlier.requires_grad:
        return False
    chance = torch.Generator().manual_seed(1)
    total = (earlier * torch.randn(earlier.shape, generator=chance).to(earlier)).sum()
    reached = torch.autograd.grad(total, [leaf for leaf, _ in embedded], allow_unused=True)
    last = torch.zeros_like(ids, dtype=torch.bool)
    last[:, -1] = True
    pairs = zip(reached, embedded, strict=True)
    return any(bool(grad[arrange(last)].any()) for grad, (_, arrange) in pairs if grad is not None)


def _compares_in_place(model: torch.nn.Module, ids: torch.Tensor) -> bool:
    """Whether the loss compares a label with the output at its own place.

    The gradient of a cross-entropy with respect to the logits is negative at the label alone, whatever is rounded. If
    the loss is not made of the logits that the model returns, the first label tells: no token precedes it, so only a
    model that does not shift its labels has a loss that depends on it.
    """
    options = call_options(model)
    out = model(input_ids=ids, labels=ids, **options)
    if out.logits.requires_grad:
        (slope,) = torch.autograd.grad(out.loss, out.logits, allow_unused=True)
        if slope is not None:
            compared = slope[0].argmin(-1)
            here, behind = int((compared == ids[0]).sum()), int((compared[:-1] == ids[0, 1:]).sum())
            return here > max(behind, ids.shape[1] // 2)
    alone = torch.full_like(ids, IGNORED)
    losses = []
    for label in (int(out.logits[0, 0].argmin()), int(out.logits[0, 0].argmax())):
        alone[:, 0] = label
        losses.append(float(model(input_ids=ids, labels=alone, **options).loss.detach()))
    return math.isfinite(losses[0]) and losses[0] > losses[1]

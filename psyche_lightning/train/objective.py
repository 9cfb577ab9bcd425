"""Looks once, before training, whether a model learns to predict each token from those before it."""

from __future__ import annotations

import logging

import torch
from torch.nn.functional import cross_entropy

from psyche_lightning.errors import ConfigError
from psyche_lightning.train.module import call_options
from psyche_lightning.train.packing import embeddings, undisturbed

logger = logging.getLogger(__name__)

_LENGTH = 32
"""Tokens of the probe."""


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
    try:
        copies, sees = _probe(model, vocab_size, min(_LENGTH, seq_len))
    except Exception:  # models raise different types, and some take no short rows: training says more
        logger.debug("no probe of what the model learns", exc_info=True)
        return
    if not copies and not sees:
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


def _probe(model: torch.nn.Module, vocab_size: int, length: int) -> tuple[bool, bool]:
    """Whether the model compares labels with outputs at their own place, and whether these see later tokens."""
    device = next((one.device for one in model.parameters()), torch.device("cpu"))
    chance = torch.Generator().manual_seed(0)
    ids, labels = torch.randint(vocab_size, (2, 1, length), generator=chance).to(device)
    options = call_options(model)
    with undisturbed(model, device):
        with torch.enable_grad(), embeddings(model, ids) as embedded:
            one = model(input_ids=ids, labels=ids, **options)
        with torch.no_grad():
            two = model(input_ids=ids, labels=labels, **options)
    sees = False
    slope: torch.Tensor | None = None
    if one.logits.requires_grad:
        (slope,) = torch.autograd.grad(one.loss, one.logits, retain_graph=True, allow_unused=True)
    if one.logits.requires_grad and embedded:
        earlier = one.logits[:, :-1]
        total = (earlier * torch.randn(earlier.shape, generator=chance).to(earlier)).sum()
        reached = torch.autograd.grad(total, [leaf for leaf, _ in embedded], allow_unused=True)
        last = torch.zeros_like(ids, dtype=torch.bool)
        last[:, -1] = True
        pairs = zip(reached, embedded, strict=True)
        sees = any(bool(grad[arrange(last)].any()) for grad, (_, arrange) in pairs if grad is not None)
    logits = one.logits.detach().float()
    if slope is not None:  # of a cross-entropy, negative at the label alone, whatever is rounded
        compared = slope[0].argmin(-1)
        here, behind = int((compared == ids[0]).sum()), int((compared[:-1] == ids[0, 1:]).sum())
        return here > max(behind, length // 2), sees

    def apart(shift: int) -> float:
        """By how much the two losses would differ; what a model adds to both, such as a router's loss, drops out."""
        rows = logits[0, : length - shift]
        return float(cross_entropy(rows, ids[0, shift:]) - cross_entropy(rows, labels[0, shift:]))

    found = float(one.loss.detach() - two.loss)
    next_token, same_place = abs(found - apart(1)), abs(found - apart(0))
    return same_place < next_token / 10 and next_token > 1e-5, sees

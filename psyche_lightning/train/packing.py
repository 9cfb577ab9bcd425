"""Looks once, before training, whether a model keeps texts apart that are packed into one sample."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch

from psyche_lightning.errors import ConfigError
from psyche_lightning.hookspecs import DataProvider
from psyche_lightning.train.module import call_options

logger = logging.getLogger(__name__)

_TEXT = 8
"""Tokens of a text of the probe: more than the kernels of usual convolutions have."""
_ROUNDING = 64
"""Differences of so many units in the last place come from the order of additions, as in a mixture of experts."""
BEFORE, AFTER = "before", "after"

Arrange = Callable[[torch.Tensor], torch.Tensor]


def check_packing(model: torch.nn.Module, provider: DataProvider, micro_batch_size: int = 2) -> None:
    """Refuse a model whose texts see each other although their positions say where each begins.

    In rows of two texts, the tokens of one change, and the logits of the other must stay; nor may these have a gradient
    with respect to the embeddings of the first. Both are tried in both directions, for one row and for two that are cut
    at different places, because some kernels look at the positions only if there is one row. The model stays as it is.

    Args:
        model: see :class:`~psyche_lightning.hookspecs.ModelFactory`; its forward takes ``position_ids``.
        provider: the data; only its sizes count.
        micro_batch_size: with 1, only one row is tried.

    Raises:
        ConfigError: texts see each other, or the model fails on such rows.
    """
    for rows in range(1, min(micro_batch_size, 2) + 1):
        found = _leaks(model, provider, rows)
        if found:
            several = rows > 1  # with one row it passed
            seen = " and ".join(f"what comes {one} it" for one in found)
            fewer = "set trainer.micro_batch_size=1, " if several else ""
            raise ConfigError(
                f"the data packs several texts into a sample, and with {type(model).__name__} they see each other"
                f"{' when a batch has two samples' if several else ''}: a text sees {seen}, although position_ids say "
                f"where each begins. To train on texts that are apart, {fewer}choose data with one text in a sample "
                "(data.config.packed=false for conversations; prepared rows without position_ids and sequence_lengths, "
                "padded with labels of -100), another trainer.attn_implementation, such as sdpa, or another "
                "model, such as llama, qwen3 or gpt2"
            )


def _leaks(model: torch.nn.Module, provider: DataProvider, rows: int) -> list[str]:
    """The directions in which texts see each other."""
    try:
        return _probe(model, provider.vocab_size, rows, 2 * _TEXT)
    except Exception:  # models raise different types
        logger.debug("no packed row of %d tokens", 2 * _TEXT, exc_info=True)
    try:  # some models take only rows of one length
        return _probe(model, provider.vocab_size, rows, provider.seq_len)
    except Exception as error:
        raise ConfigError(
            f"{type(model).__name__} fails on samples that hold two texts ({type(error).__name__}: {error}); train "
            "another model, or make the data without position_ids (each sample one text)"
        ) from error


def _probe(model: torch.nn.Module, vocab_size: int, rows: int, length: int) -> list[str]:
    device = next((one.device for one in model.parameters()), torch.device("cpu"))
    chance = torch.Generator().manual_seed(0)
    ids = torch.randint(vocab_size, (rows, length), generator=chance)
    others = (ids + torch.randint(1, max(2, vocab_size), ids.shape, generator=chance)) % vocab_size
    cuts = torch.tensor([[max(1, length // (2 + row))] for row in range(rows)])
    place = torch.arange(length).expand(rows, length)
    second = place >= cuts
    positions = torch.where(second, place - cuts, place).to(device)
    ids, others, second = ids.to(device), others.to(device), second.to(device)
    call = _Call(model, positions)
    found = []
    with undisturbed(model, device):
        with torch.enable_grad(), embeddings(model, ids) as embedded:
            logits = call(ids)
        weights = torch.randn(logits.shape, generator=chance).to(logits)
        base = logits.detach()
        types = {base.dtype, *(one.dtype for one in model.parameters() if one.is_floating_point())}
        if torch.is_autocast_enabled(device.type):
            types.add(torch.get_autocast_dtype(device.type))
        rounding = _ROUNDING * max(torch.finfo(one).eps for one in types) * float(base.abs().max())
        for other, part in ((BEFORE, second), (AFTER, ~second)):
            with torch.no_grad():
                changed = call(torch.where(part, ids, others))
            if float((changed - base)[part].abs().max()) > rounding:
                found.append(other)
            elif logits.requires_grad and embedded:  # which no rounding hides
                leaves, arranged = [leaf for leaf, _ in embedded], [arrange(~part) for _, arrange in embedded]
                loss = (logits * weights)[part].sum()
                reached = torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True)
                if any(bool(grad[of].any()) for grad, of in zip(reached, arranged, strict=True) if grad is not None):
                    found.append(other)
    return found


class _Call:
    """Calls a model as training does.

    Args:
        model: the model.
        positions: int64 [batch, seq_len].
    """

    def __init__(self, model: torch.nn.Module, positions: torch.Tensor) -> None:
        self._model = model
        self._options = {"position_ids": positions, **call_options(model)}

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits [batch, seq_len, vocab]; the same chance each time."""
        torch.manual_seed(0)
        logits: torch.Tensor = self._model(input_ids=ids, labels=ids, **self._options).logits
        return logits


@contextlib.contextmanager
def embeddings(model: torch.nn.Module, ids: torch.Tensor) -> Iterator[list[tuple[torch.Tensor, Arrange]]]:
    """Collects what each embedding makes of ``ids``: a tensor that gradients reach, and how the ids lie in it."""
    found: list[tuple[torch.Tensor, Arrange]] = []

    def cut(_: torch.nn.Module, inputs: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor | None:
        for arrange in (torch.clone, torch.t, torch.flatten):
            if inputs and isinstance(inputs[0], torch.Tensor) and torch.equal(inputs[0], arrange(ids)):
                found.append((output.detach().requires_grad_(), arrange))
                return found[-1][0] + 0  # some models change it in place
        return None  # it embeds something else, such as positions

    hooks = [one.register_forward_hook(cut) for one in model.modules() if isinstance(one, torch.nn.Embedding)]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def undisturbed(model: torch.nn.Module, device: torch.device) -> Iterator[None]:
    """Turns dropout off; afterwards the model's modes and the generators of random numbers are as before."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode

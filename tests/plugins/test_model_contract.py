"""The built-in model against the conformance kit, and the kit against models that break the contract."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from psyche_lightning.builtin.models import hf
from psyche_lightning.testing.models import Factory, ModelContract

SIZES = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
LLAMA: dict[str, Any] = {"model_type": "llama", "num_key_value_heads": 1, **SIZES}


class TestHf(ModelContract):
    def make_factory(self) -> Factory:
        return hf

    def make_config(self) -> dict[str, Any]:
        return dict(LLAMA)


class TestHfWithTiedWeightsAndDropout(ModelContract):
    def make_factory(self) -> Factory:
        return hf

    def make_config(self) -> dict[str, Any]:
        return {"model_type": "gpt2", "vocab_size": 64, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}


class Broken(ModelContract):
    """The kit's own test: a model with one fault."""

    __test__ = False

    def __init__(self, change: Any) -> None:
        self.change = change

    def make_factory(self) -> Factory:
        def build(config: dict[str, Any]) -> torch.nn.Module:
            model = hf(config)
            forward = model.forward
            change = self.change
            model.forward = lambda input_ids, labels=None: change(forward, input_ids, labels)  # type: ignore[method-assign]
            return model

        return build

    def make_config(self) -> dict[str, Any]:
        return dict(LLAMA)


def shifted(forward: Any, ids: torch.Tensor, labels: torch.Tensor) -> Any:
    """Expects labels that the caller shifted."""
    return forward(input_ids=ids, labels=torch.roll(labels, 1, dims=1))


def all_counted(forward: Any, ids: torch.Tensor, labels: torch.Tensor) -> Any:
    return forward(input_ids=ids, labels=labels.clamp(min=0))


def clairvoyant(forward: Any, ids: torch.Tensor, labels: torch.Tensor | None) -> Any:
    result = forward(input_ids=ids, labels=labels)
    result.logits = result.logits + result.logits.mean(dim=1, keepdim=True)
    return result


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (shifted, "test_labels_are_not_shifted_by_the_caller"),
        (all_counted, "test_labels_of_minus_100_are_ignored"),
        (clairvoyant, "test_a_token_sees_nothing_after_it"),
    ],
)
def test_the_kit_notices(change: Any, name: str) -> None:
    contract = Broken(change)
    ids = torch.randint(64, (3, 12), generator=torch.Generator().manual_seed(0))
    with pytest.raises(AssertionError):
        getattr(contract, name)(contract.make(), ids)

"""A model that is built tensor by tensor is equal to the bit to one that is built in float32 and cast."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from psyche_lightning.builtin.models import hf
from psyche_lightning.checkpoints import deferred
from psyche_lightning.checkpoints.deferred import Deferred, built, outlined
from psyche_lightning.checkpoints.dtypes import cast, fill, tensors
from psyche_lightning.plugins import load_plugins
from tests.checkpoints.test_dtypes import KINDS, SMALL, build

Make = Callable[[], torch.nn.Module]

LATENT = {**SMALL, "q_lora_rank": 8, "kv_lora_rank": 8, "n_routed_experts": 4, "moe_intermediate_size": 16}
GPT2 = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 2}  # its layers draw some parameters again

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


class Odd(torch.nn.Module):
    """Does with its parameters what other people's models do."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(16, 16)
        torch.nn.init.trunc_normal_(self.first.weight, std=0.02)
        torch.nn.init.orthogonal_(self.first.weight[:8])
        self.first.weight.data[3] = 1.0
        self.tied = torch.nn.Linear(16, 16)
        self.tied.weight = self.first.weight
        self.drawn = torch.nn.Parameter(torch.randn(16, 16))
        self.scaled = torch.nn.Parameter(torch.empty(16, 16).normal_())
        with torch.no_grad():
            self.scaled.div_(self.scaled.norm()).add_(self.first.weight.mean())
            self.tied.bias.copy_(torch.linspace(0, 1, 16, device=self.tied.weight.device))
        self.register_buffer("there", torch.empty(16, 16).fill_(math.pi))
        self.register_buffer("places", torch.arange(16))


def latent() -> torch.nn.Module:
    model: torch.nn.Module = load_plugins().models()["mla"](
        {key: value for key, value in LATENT.items() if key != "max_position_embeddings"}
    )
    return model


MAKES: dict[str, Make] = {
    **{kind: lambda kind=kind: build(kind) for kind in KINDS},  # type: ignore[misc]
    "gpt2": lambda: hf({"model_type": "gpt2", **GPT2}),
    "mla": latent,
    "odd": Odd,
}


def drawn(make: Callable[[], torch.nn.Module]) -> tuple[torch.nn.Module, torch.Tensor]:
    """The model of one seed, and the generator's state after it."""
    torch.manual_seed(5)
    return make(), torch.get_rng_state()


def same(ours: torch.nn.Module, theirs: torch.nn.Module) -> None:
    mine, wanted = dict(tensors(ours)), dict(tensors(theirs))
    assert list(mine) == list(wanted)
    for name, value in wanted.items():
        assert (mine[name].dtype, mine[name].device) == (value.dtype, value.device), name
        assert torch.equal(mine[name], value), name
        assert mine[name].requires_grad == value.requires_grad
    assert list(ours.state_dict()) == list(theirs.state_dict())


@pytest.fixture(autouse=True)
def _small_tensors_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deferred, "LEAST", 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", MAKES)
def test_every_bit_is_as_if_it_were_built_at_once(kind: str, dtype: torch.dtype) -> None:
    theirs, after = drawn(lambda: cast(MAKES[kind](), dtype))
    with Deferred():
        followed = MAKES[kind]()
    assert sum(one.is_meta for one in followed.parameters()) >= 3
    ours, state = drawn(lambda: built(MAKES[kind], dtype))
    same(ours, theirs)
    assert torch.equal(state, after)  # what is drawn next, such as an adapter, is the same


def test_tied_parameters_stay_one_object() -> None:
    model: Any = built(MAKES["gemma"], torch.bfloat16)
    assert model.lm_head.weight is model.model.embed_tokens.weight


class Unfollowed(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(16, 16)
        self.first.weight.data = torch.rand(16, 16)


def test_a_model_that_cannot_be_followed_is_built_at_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    theirs, _ = drawn(lambda: cast(Unfollowed(), torch.bfloat16))
    ours, _ = drawn(lambda: built(Unfollowed, torch.bfloat16))
    same(ours, theirs)
    assert "Unfollowed is built in float32 as a whole" in caplog.text


@pytest.mark.parametrize("saved", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["llama", "gemma", "glm4_moe", "deepseek_v3", "mamba"])
def test_a_checkpoint_is_read_in_the_dtype_of_training(kind: str, saved: torch.dtype, tmp_path: Path) -> None:
    model: Any = cast(build(kind), saved)
    model.save_pretrained(tmp_path)
    path = {"path": str(tmp_path)}
    same(built(lambda: hf(path), torch.bfloat16), cast(hf(path), torch.bfloat16))
    same(built(lambda: hf(path), torch.float32), hf(path))
    larger = {**path, "vocab_size": 80}
    theirs, _ = drawn(lambda: cast(hf(larger), torch.bfloat16))
    ours, _ = drawn(lambda: built(lambda: hf(larger), torch.bfloat16))
    same(ours, theirs)


@pytest.mark.parametrize("saved", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["llama", "gemma", "glm4_moe", "deepseek_v3", "mamba"])
def test_a_checkpoint_stays_in_its_files_until_parts_are_read(kind: str, saved: torch.dtype, tmp_path: Path) -> None:
    model: Any = cast(build(kind), saved)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len([*tmp_path.glob("*.safetensors")]) > 1
    wanted = cast(hf({"path": str(tmp_path)}), torch.bfloat16)
    ours, values = outlined(lambda: hf({"path": str(tmp_path)}), torch.bfloat16)
    left = {name: value for name, value in tensors(ours) if value.is_meta}
    assert left.keys() == values.keys()
    assert {name for name, value in wanted.named_parameters() if value.numel() >= 8} <= left.keys()
    parted = 0
    for name, tensor in left.items():
        value, size, part = torch.empty(tensor.numel(), dtype=tensor.dtype), tensor.numel(), values[name].part
        if part is None:  # experts, which transformers puts together
            value = values[name]().reshape(-1)
        else:
            parted += 1
            for start, stop in ((0, size // 3), (size // 3, size), (size, size)):
                value[start:stop] = part(start, stop)
        fill(tensor, value.view(tensor.shape))
    assert parted > len(left) / 2
    same(ours, wanted)
    assert ours.generation_config.to_dict() == wanted.generation_config.to_dict()  # type: ignore[union-attr]
    assert ours.name_or_path == wanted.name_or_path
    larger = {"path": str(tmp_path), "vocab_size": 80}
    theirs, _ = drawn(lambda: cast(hf(larger), torch.bfloat16))
    with_rows, _ = drawn(lambda: outlined(lambda: hf(larger), torch.bfloat16)[0])
    assert with_rows.get_input_embeddings().weight.shape == theirs.get_input_embeddings().weight.shape  # type: ignore[operator]

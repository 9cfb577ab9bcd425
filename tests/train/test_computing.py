"""The recipe's choices of how a node computes: the numbers stay, and what cannot be done is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from psyche_lightning.builtin.models import hf
from psyche_lightning.distro import DisTrO
from psyche_lightning.errors import ConfigError
from psyche_lightning.node.parameters import ParameterReplica, named_parameters, persistent_buffers
from psyche_lightning.node.store import MemoryBlobStore
from psyche_lightning.plugins import load_plugins
from psyche_lightning.recipe.config import TrainerSection
from psyche_lightning.train.computing import apply_choices, check_accelerator, compiling

SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 2, "intermediate_size": 32}
KINDS: dict[str, dict[str, Any]] = {
    "llama": HEADS,
    "gpt2": {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
    "mamba": {"state_size": 4},
    "qwen3_moe": {
        **HEADS,
        "num_key_value_heads": 2,
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 16,
        "head_dim": 16,
    },
}


def build(kind: str) -> Any:
    torch.manual_seed(0)
    if kind == "mla":
        return load_plugins().models()["mla"]({**SMALL, **HEADS, "kv_lora_rank": 8})
    fields = {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 64} if kind == "gpt2" else SMALL
    return hf({"model_type": kind, **fields, **KINDS[kind]})


def gradients(model: Any) -> dict[str, torch.Tensor]:
    ids = torch.randint(64, (2, 12), generator=torch.Generator().manual_seed(1))
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


@pytest.mark.parametrize("kind", [*KINDS, "mla"])
def test_recomputed_activations_give_the_same_gradients(kind: str) -> None:
    plain, other = build(kind), build(kind)
    apply_choices(other, TrainerSection(gradient_checkpointing=True))
    assert any(getattr(module, "gradient_checkpointing", False) for module in other.modules())
    expected, found = gradients(plain), gradients(other)
    assert list(expected) == list(found)
    assert all(torch.allclose(found[name], value, atol=1e-6) for name, value in expected.items())


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_another_attention_gives_the_same_gradients(kind: str) -> None:
    plain, other = build(kind), build(kind)
    apply_choices(other, TrainerSection(attn_implementation="eager"))
    assert (plain.config._attn_implementation, other.config._attn_implementation) == ("sdpa", "eager")
    expected, found = gradients(plain), gradients(other)
    assert all(torch.allclose(found[name], value, atol=1e-5) for name, value in expected.items())


@pytest.mark.parametrize(
    ("model", "choice", "message"),
    [
        ("llama", {"attn_implementation": "speedy"}, r"'speedy', and LlamaForCausalLM \(now sdpa\) cannot"),
        ("llama", {"attn_implementation": "flash_attention_2"}, r"cannot compute its attention so: .*lash"),
        ("mamba", {"attn_implementation": "sdpa"}, r"MambaForCausalLM \(now eager\) cannot"),
        (None, {"attn_implementation": "sdpa"}, r"Linear cannot compute its attention so: it has a way of its own"),
        (None, {"gradient_checkpointing": True}, r"Linear cannot do it: .* trainer\.micro_batch_size"),
    ],
)  # fmt: skip
def test_what_a_model_cannot_do_is_refused(model: str | None, choice: dict[str, Any], message: str) -> None:
    built = torch.nn.Linear(2, 2) if model is None else build(model)
    with pytest.raises(ConfigError, match=message):
        apply_choices(built, TrainerSection(**choice))


@pytest.mark.parametrize(
    ("cards", "choice", "message"),
    [
        (0, {"accelerator": "gpu"}, "'gpu', but torch finds only cpu on this machine"),
        (0, {"accelerator": "cuda", "devices": 2}, "'cuda', but torch finds only cpu"),
        (1, {"accelerator": "mps"}, "'mps', but torch finds only cpu, cuda"),
        (1, {"devices": 2}, "trainer.devices is 2, but torch finds 1 device on this machine"),
        (4, {"accelerator": "cuda", "devices": 5}, "trainer.devices is 5, but torch finds 4 devices"),
    ],
)
def test_devices_that_do_not_exist_are_refused(
    monkeypatch: pytest.MonkeyPatch, cards: int, choice: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cards)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=message):
        check_accelerator(TrainerSection(**choice))


@pytest.mark.parametrize(("cards", "accelerator"), [(0, "auto"), (0, "cpu"), (1, "cpu"), (2, "auto"), (2, "gpu")])
def test_devices_that_exist_are_taken(monkeypatch: pytest.MonkeyPatch, cards: int, accelerator: str) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cards)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    check_accelerator(TrainerSection(accelerator=accelerator, devices=2))  # type: ignore[arg-type]  # of the choices


def test_what_cannot_be_compiled_is_explained() -> None:
    def broken(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("No working C++ compiler found")

    def train(model: torch.nn.Module) -> None:
        with compiling(model, TrainerSection(compile=True)):
            model.compile(backend=broken)
            model(torch.ones(1, 2))

    class Doubled(torch.nn.Module):  # torch compiles none of its own modules alone
        def forward(self, value: torch.Tensor) -> torch.Tensor:
            return value * 2

    text = r"Doubled cannot be compiled on this machine: .*No working C\+\+ compiler found.* leave trainer\.compile out"
    with pytest.raises(ConfigError, match=text):
        train(Doubled())
    with pytest.raises(ZeroDivisionError), compiling(torch.nn.Linear(2, 2), TrainerSection(compile=True)):
        1 / 0  # noqa: B018 - an error that has nothing to do with it


class Compiled(torch.nn.Module):
    """Parts are compiled, as a user's module may do it on one machine and not on another."""

    def __init__(self, compile_parts: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        parts = [torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2)]
        parts[2].requires_grad_(False)
        self.parts = torch.nn.ModuleList(torch.compile(part) if compile_parts else part for part in parts)  # type: ignore[misc]


def test_names_do_not_tell_whether_parts_are_compiled() -> None:
    plain, other = Compiled(False), Compiled(True)
    assert "parts.0._orig_mod.weight" in dict(other.named_parameters())
    assert list(named_parameters(other)) == list(named_parameters(plain)) == list(dict(plain.named_parameters()))
    assert list(persistent_buffers(other)) == list(persistent_buffers(plain)) != []
    digests = set()
    for module in (plain, other):
        trained = [(name, value) for name, value in named_parameters(module).items() if value.requires_grad]
        replica = ParameterReplica(DisTrO(trained, lr=0.1), module)
        digests.add((replica.layout, replica.digest(MemoryBlobStore().put)))
    assert len(digests) == 1

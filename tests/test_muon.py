"""Muon for hidden matrices, AdamW for the rest, as one optimizer."""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from psyche_lightning import MuonAdamW
from psyche_lightning.distro import DistroConfig
from psyche_lightning.errors import ConfigError
from psyche_lightning.lightning.optimizers import build_distro
from psyche_lightning.muon import InFloat32, hidden_matrices, product_dtype, products_on, to_directions


class Net(nn.Module):
    """An embedding, a matrix and a head."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens = nn.Embedding(11, 6)
        self.inner = nn.Linear(6, 6)
        self.out = nn.Linear(6, 11, bias=False)
        if tied:
            self.out.weight = self.tokens.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.out(torch.tanh(self.inner(self.tokens(ids))))


class Heads(nn.Module):
    """Attention whose heads are a numbered list, a position embedding of its own, and a head by that name."""

    def __init__(self) -> None:
        super().__init__()
        self.pos_embed = nn.Parameter(torch.zeros(4, 6))
        self.kernel = nn.Conv1d(6, 6, 3)
        self.blocks = nn.ModuleList([nn.ModuleDict({"heads": nn.ModuleList([nn.Linear(6, 6)])})])
        self.value_head = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 1))
        self.after = nn.Linear(6, 6, bias=False)


def llama(tied: bool) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = AutoConfig.for_model("llama", vocab_size=16, tie_word_embeddings=tied, **sizes)
    model: nn.Module = AutoModelForCausalLM.from_config(config)
    return model


def chosen(module: nn.Module, muon_for: Mapping[str, bool] | None = None) -> set[str]:
    return {name for name, hidden in hidden_matrices(module, muon_for).items() if hidden}


def loss(net: nn.Module, seed: int) -> torch.Tensor:
    ids = torch.randint(11, (5, 7), generator=torch.Generator().manual_seed(seed))
    return nn.functional.cross_entropy(net(ids).flatten(0, 1), (ids * 3 % 11).flatten())


def train(net: nn.Module, optimizer: torch.optim.Optimizer, *seeds: int) -> None:
    for seed in seeds:
        optimizer.zero_grad()
        loss(net, seed).backward()
        optimizer.step()


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(a.equal(b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("tied", [False, True])
def test_hidden_matrices_are_neither_embedding_nor_head(tied: bool) -> None:
    assert chosen(Net(tied)) == {"inner.weight"}
    layer = "model.layers.0."
    attention = {f"{layer}self_attn.{one}_proj.weight" for one in "qkvo"}
    assert chosen(llama(tied)) == attention | {f"{layer}mlp.{one}_proj.weight" for one in ("gate", "up", "down")}


def test_names_tell_heads_from_the_heads_of_attention() -> None:
    assert chosen(Heads()) == {"blocks.0.heads.0.weight", "after.weight"}
    assert chosen(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))) == {"0.weight"}


def test_a_user_decides_by_patterns() -> None:
    assert chosen(Net(), {"inner*": False, "out*": True}) == {"out.weight"}
    assert chosen(Net(), {"tokens*": True, "*s*": False}) == {"tokens.weight", "inner.weight"}
    with pytest.raises(ConfigError, match="muon_for has 'nowhere', which matches no parameter of Net"):
        hidden_matrices(Net(), {"nowhere": True})
    with pytest.raises(ConfigError, match=r"'inner\*' gives 'inner.bias' to Muon of shape \[6\].* leave it to AdamW"):
        hidden_matrices(Net(), {"inner*": True})


def test_its_steps_are_those_of_torch() -> None:
    ours, theirs = Net(), Net()
    optimizer = MuonAdamW(ours, 0.02, 0.3, momentum=0.8, betas=(0.7, 0.9))
    muon = torch.optim.Muon([theirs.inner.weight], 0.02, 0.3, momentum=0.8, adjust_lr_fn="match_rms_adamw")
    rest = [theirs.tokens.weight, theirs.inner.bias, theirs.out.weight]
    adamw = torch.optim.AdamW(rest, 0.02, (0.7, 0.9), weight_decay=0.3)
    before = loss(ours, 9).item()
    for seed in range(5):
        train(ours, optimizer, seed)
        loss(theirs, seed).backward()
        for one in (muon, adamw):
            with products_on(torch.device("cpu")):
                one.step()
            one.zero_grad()
    assert same(ours, theirs)
    assert loss(ours, 9).item() < before - 0.1


def test_without_instructions_for_bfloat16_products_are_in_float32() -> None:
    gradient = torch.randn(20, 24, generator=torch.Generator().manual_seed(0))

    def step(dtype: torch.dtype, nesterov: bool) -> torch.Tensor:
        matrix = nn.Parameter(torch.zeros(20, 24))
        matrix.grad = gradient.clone()
        muon = torch.optim.Muon([matrix], 1.0, 0.0, 0.75, nesterov)
        with InFloat32() if dtype is torch.float32 else contextlib.nullcontext():
            muon.step()
        assert muon.state[matrix]["momentum_buffer"].equal(0.25 * gradient)
        return matrix.detach()

    for nesterov in (True, False):
        exact, usual = step(torch.float32, nesterov), step(torch.bfloat16, nesterov)
        assert torch.allclose(exact, usual, atol=2e-2)
        assert usual.equal(usual.bfloat16().float())
        assert not exact.equal(exact.bfloat16().float())
    (ours,) = to_directions([gradient.clone()], [{}], 0.75)
    expected = step(product_dtype(torch.device("cpu")), True)
    assert torch.allclose(ours, -0.2 * 24**0.5 * expected, rtol=1e-5, atol=1e-5)


def test_a_step_returns_what_its_closure_returns() -> None:
    net = Net()
    optimizer = MuonAdamW(net)

    def closure() -> torch.Tensor:
        found = loss(net, 1)
        found.backward()
        return found

    before = copy.deepcopy(net)
    assert optimizer.step(closure).item() == loss(before, 1).item()
    assert not same(net, before)


def through_a_file(optimizer: MuonAdamW, net: nn.Module) -> MuonAdamW:
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    fresh = MuonAdamW(net, 0.5)
    train(net, fresh)  # makes no step
    fresh.load_state_dict(torch.load(file, weights_only=True))
    return fresh


def as_a_copy(optimizer: MuonAdamW, net: nn.Module) -> MuonAdamW:
    pairs = zip(optimizer.param_groups, MuonAdamW(net).param_groups, strict=True)
    memo = {id(a): b for old, new in pairs for a, b in zip(old["params"], new["params"], strict=True)}
    return copy.deepcopy(optimizer, memo)


@pytest.mark.parametrize("again", [through_a_file, as_a_copy])
def test_it_goes_on_exactly(again: Callable[[MuonAdamW, nn.Module], MuonAdamW]) -> None:
    whole, part = Net(), Net()
    optimizer = MuonAdamW(whole, 0.02)
    train(whole, optimizer, *range(6))
    first = MuonAdamW(part, 0.02)
    train(part, first, 0, 1, 2)
    net = copy.deepcopy(part)
    second = again(first, net)
    train(net, second, 3, 4, 5)
    assert same(net, whole)
    assert not same(net, part)
    assert second.state[net.inner.weight].keys() == {"momentum_buffer"}


@pytest.mark.parametrize(
    "schedule",
    [
        lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=6),
        lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 6),
        lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda n: 0.5**n, lambda n: 0.0]),
    ],
)
def test_schedulers_move_both_rates(schedule: Callable[[torch.optim.Optimizer], Any]) -> None:
    net = Net()
    optimizer = MuonAdamW(net, 0.02)
    scheduler = schedule(optimizer)
    for seed in range(4):
        rates = [group["lr"] for group in optimizer.param_groups]
        before = copy.deepcopy(net)
        train(net, optimizer, seed)
        for rate, part in zip(rates, ("inner", "tokens"), strict=True):
            moved = (getattr(net, part).weight - getattr(before, part).weight).abs().max()
            assert (moved > 0) == (rate > 0)
        scheduler.step()
        assert [group["lr"] for group in optimizer.param_groups] != rates


def test_groups_of_ones_own() -> None:
    net = Net()
    groups = [
        {"params": [net.inner.weight], "muon": True, "lr": 0.0},
        {"params": [net.inner.bias], "betas": (0.0, 0.5)},
    ]
    optimizer = MuonAdamW(groups, 0.01, 0.0)
    before = copy.deepcopy(net)
    train(net, optimizer, 0)
    assert net.inner.weight.equal(before.inner.weight)
    assert torch.allclose(net.inner.bias, before.inner.bias - 0.01 * net.inner.bias.grad.sign(), atol=1e-6)
    optimizer.add_param_group({"params": net.tokens.parameters()})
    train(net, optimizer, 1)
    assert not net.tokens.weight.equal(before.tokens.weight)
    assert net.out.weight.equal(before.out.weight)


@pytest.mark.parametrize("given", [lambda net: net.parameters(), lambda net: net.named_parameters()])
def test_without_the_module_it_cannot_know(given: Callable[[nn.Module], Any]) -> None:
    with pytest.raises(ConfigError, match=r"Give it the module in place of its parameters \(MuonAdamW\(self\)"):
        MuonAdamW(given(Net()))


def test_nothing_for_muon_is_an_error() -> None:
    for nothing in (nn.Linear(2, 2), [{"params": nn.Linear(2, 2).parameters()}]):
        with pytest.raises(ConfigError, match=r"no hidden matrix to train.*torch\.optim\.AdamW"):
            MuonAdamW(nothing)
    with pytest.raises(ConfigError, match=r'"muon": True has a parameter of shape \[2\]'):
        MuonAdamW([{"params": nn.Linear(2, 2).parameters(), "muon": True}])


def test_votes_go_through_muon_where_the_optimizer_is_muon() -> None:
    net = Net()

    def matrices(optimizer: torch.optim.Optimizer) -> list[tuple[list[str], float]]:
        groups = build_distro(optimizer, net, DistroConfig()).param_groups
        return [(group["param_names"], group["momentum"]) for group in groups if group["muon"]]

    assert matrices(MuonAdamW(net, momentum=0.8)) == [(["inner.weight"], 0.8)]
    assert matrices(torch.optim.Muon([net.inner.weight], momentum=0.7)) == [(["inner.weight"], 0.7)]
    assert matrices(torch.optim.SGD(net.parameters(), momentum=0.8)) == []


class Module(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        return loss(self.net, self.global_step)

    def configure_optimizers(self) -> Any:
        optimizer = MuonAdamW(self, 0.05)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.LinearLR(optimizer), "interval": "step"}]


def test_plain_trainer_trains_and_resumes_with_it(tmp_path: Path) -> None:
    data = DataLoader(TensorDataset(torch.arange(6)), batch_size=1)

    def fit(module: Module, steps: int, checkpoint: Path | None = None) -> Trainer:
        quiet: dict[str, Any] = dict.fromkeys(
            ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
        )
        trainer = Trainer(
            accelerator="cpu", devices=1, max_steps=steps, gradient_clip_val=1.0, default_root_dir=tmp_path, **quiet
        )
        trainer.fit(module, data, ckpt_path=checkpoint)
        return trainer

    whole, part, resumed = Module(), Module(), Module()
    fit(whole, 6)
    fit(part, 3).save_checkpoint(tmp_path / "three.ckpt")
    fit(resumed, 6, tmp_path / "three.ckpt")
    assert same(resumed, whole)
    assert not same(part, whole)

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from psyche_lightning.distro import DisTrO, DistroConfig, LocalSteps
from psyche_lightning.errors import StoreError
from psyche_lightning.lightning import delta as saved_delta


def make(k: int = 8, muon: bool = False) -> DisTrO:
    weight, bias = torch.nn.Linear(20, 10).named_parameters()
    groups = [{"params": [weight], "muon": muon}, {"params": [bias]}]
    return DisTrO(groups, lr=0.1, config=DistroConfig(k=k))


def train(optimizer: DisTrO, seed: int) -> bytes:
    generator = torch.Generator().manual_seed(seed)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
    return optimizer.encode()


@pytest.mark.parametrize("muon", [False, True])
def test_another_life_goes_on_with_the_same_payloads(tmp_path: Path, muon: bool) -> None:
    one, other = make(muon=muon), make(muon=muon)
    train(one, 1)
    saved_delta.save(tmp_path, "run", one)
    assert saved_delta.load(tmp_path, "run", other)
    assert other.nonce == 1
    assert train(other, 2) == train(one, 2)
    assert train(make(muon=muon), 2) != train(one, 2)


def test_of_another_run_or_layout_it_is_left_alone(tmp_path: Path) -> None:
    one = make()
    train(one, 1)
    saved_delta.save(tmp_path, "run", one)
    assert not saved_delta.load(tmp_path, "other", make())
    assert not saved_delta.load(tmp_path, "run", make(k=4))
    assert not saved_delta.load(tmp_path / "nowhere", "run", make())


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def without_end(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def not_finite(path: Path) -> None:
    """The file as a trainer would write it whose delta has one infinite value."""
    one = make()
    train(one, 1)
    name, delta = next(iter(one.delta()))
    delta[0] = math.inf
    one.load_delta(name, delta)
    saved_delta.save(path.parent, "run", one)


def without_checksum(path: Path) -> None:
    with safe_open(path, framework="pt") as file:
        about = json.loads(file.metadata()["psyche"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    del about["checksum"]
    save_file(tensors, path, metadata={"psyche": json.dumps(about)})


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda path: path.write_bytes(b"\xff" * 100), "cannot be read"),
        (lambda path: path.write_bytes(b""), "cannot be read"),
        (without_end, "cannot be read"),
        (without_checksum, "cannot be read: KeyError"),
        (lambda path: flip(path, -1), "its checksum is"),
        (lambda path: flip(path, path.read_bytes().index(b"nonce") + 9), "its checksum is"),
        (lambda path: flip(path, path.read_bytes().index(b"layout") + 14), "its checksum is"),
        (not_finite, "bias: values are not finite"),
    ],
)
def test_a_damaged_file_is_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, spoil: Callable[[Path], None], why: str
) -> None:
    one = make()
    train(one, 1)
    saved_delta.save(tmp_path, "run", one)
    spoil(tmp_path / saved_delta.FILE)
    fresh = make()
    assert not saved_delta.load(tmp_path, "run", fresh)
    assert f"the delta in {tmp_path / saved_delta.FILE} is damaged and left out" in caplog.text
    assert why in caplog.text
    assert (fresh.nonce, list(fresh.delta())) == (0, [])


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    one = make()
    train(one, 1)
    with pytest.raises(StoreError, match=r"delta\.safetensors"):
        saved_delta.save(tmp_path / "missing", "run", one)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_another_life_has_the_state_of_its_own_optimizer(tmp_path: Path, kind: type[torch.optim.Optimizer]) -> None:
    """Of the same kind; SGD's buffer is missing at first."""

    def life() -> tuple[LocalSteps, torch.optim.Optimizer]:
        model = torch.nn.Linear(20, 10)
        torch.nn.init.ones_(model.weight)
        torch.nn.init.ones_(model.bias)
        options = {"momentum": 0.9} if kind is torch.optim.SGD else {}
        return LocalSteps(model.named_parameters(), lr=0.1), kind(model.parameters(), lr=0.1, **options)

    def work(shared: LocalSteps, own: torch.optim.Optimizer, seed: int) -> bytes:
        generator = torch.Generator().manual_seed(seed)
        with shared.working():
            for parameter in own.param_groups[0]["params"]:
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            own.step()
        return shared.encode()

    one, other, fresh = life(), life(), life()
    work(*one, 1)
    saved_delta.save(tmp_path, "run", *one)
    assert saved_delta.load(tmp_path, "run", *other)
    assert work(*other, 2) == work(*one, 2) != work(*fresh, 2)
    shared, _ = life()
    another = torch.optim.RMSprop(shared.param_groups[0]["params"])
    assert saved_delta.load(tmp_path, "run", shared, another)
    assert not another.state

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from psyche_lightning.distro import DisTrO, DistroConfig
from psyche_lightning.errors import StoreError
from psyche_lightning.lightning import delta as saved_delta


def make(k: int = 8) -> DisTrO:
    module = torch.nn.Linear(20, 10)
    return DisTrO(module.named_parameters(), lr=0.1, config=DistroConfig(k=k))


def train(optimizer: DisTrO, seed: int) -> bytes:
    generator = torch.Generator().manual_seed(seed)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
    return optimizer.encode()


def test_another_life_goes_on_with_the_same_payloads(tmp_path: Path) -> None:
    one, other = make(), make()
    train(one, 1)
    saved_delta.save(tmp_path, "run", one)
    assert saved_delta.load(tmp_path, "run", other)
    assert other.nonce == 1
    assert train(other, 2) == train(one, 2)
    assert train(make(), 2) != train(one, 2)


def test_of_another_run_or_layout_it_is_left_alone(tmp_path: Path) -> None:
    one = make()
    train(one, 1)
    saved_delta.save(tmp_path, "run", one)
    assert not saved_delta.load(tmp_path, "other", make())
    assert not saved_delta.load(tmp_path, "run", make(k=4))
    assert not saved_delta.load(tmp_path / "nowhere", "run", make())


def test_a_damaged_file_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / saved_delta.FILE).write_bytes(b"\xff" * 100)
    fresh = make()
    assert not saved_delta.load(tmp_path, "run", fresh)
    assert "cannot be read" in caplog.text
    assert fresh.nonce == 0


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    one = make()
    train(one, 1)
    with pytest.raises(StoreError, match=r"delta\.safetensors"):
        saved_delta.save(tmp_path / "missing", "run", one)

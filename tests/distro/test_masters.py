"""Split masters give the results of float32 masters, to the bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from psyche_lightning.distro import DisTrO, DistroConfig, Layout, LocalSteps
from psyche_lightning.distro.holding import Holding
from psyche_lightning.distro.masters import Masters
from psyche_lightning.errors import ConfigError
from psyche_lightning.node.parameters import ParameterReplica
from psyche_lightning.node.store import MemoryBlobStore

SPLIT = Holding(masters="split")
CONFIG = DistroConfig(chunk=8, k=4)
SHAPES = {"matrix": (20, 13), "runs": (150,), "scalar": (), "kernel": (6, 3, 5, 2), "empty": (0, 4), "whole": (16, 8)}


class Model(torch.nn.Module):
    """Parameters of many shapes; one is float32, and one has strides that allow no view of its matrix."""

    def __init__(self) -> None:
        super().__init__()
        drawn = torch.Generator().manual_seed(0)
        for name, shape in SHAPES.items():
            values = torch.randn(shape, generator=drawn).bfloat16()
            self.register_parameter(name, torch.nn.Parameter(values))
        self.strided = torch.nn.Parameter(torch.randn(4, 9, 2, generator=drawn).bfloat16().transpose(0, 1))
        self.norm = torch.nn.Parameter(torch.ones(12))


def values_with_all_ends() -> torch.Tensor:
    """float32 values whose lower 16 bits are 0, just beside or exactly half, or all ones, of both signs."""
    high = np.array([0x0000, 0x0001, 0x0080, 0x3F80, 0x3F81, 0x7F7F, 0x4049, 0x0FFF], np.uint32)
    low = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFE, 0xFFFF], np.uint32)
    bits = (high[:, None] << 16 | low).reshape(-1)
    bits = np.concatenate([bits, bits | 0x80000000, np.random.default_rng(0).integers(0, 0x7F800000, 400)])
    return torch.from_numpy(bits.astype(np.uint32).view(np.float32).copy())


@pytest.mark.parametrize("shape", [(512,), (64, 8), (8, 64), (4, 2, 16, 4), (32, 16)])
def test_every_float32_value_is_kept_and_shown_rounded_to_even(shape):
    values = values_with_all_ends().reshape(shape)
    parameter = torch.nn.Parameter(torch.zeros(shape, dtype=torch.bfloat16))
    layout = Layout([("w", parameter)], 8)
    masters = Masters(layout, [parameter], split=True)
    masters.put(0, values)
    assert torch.equal(parameter.view(torch.int16), values.bfloat16().view(torch.int16))
    assert torch.equal(masters.get(0).view(torch.int32), values.view(torch.int32))
    for limit in (1, 3, 100):  # and batches hold the same
        masters.begin()
        for batch in layout.batches(limit):
            masters.open(batch)
            masters.close(batch)
        masters.end()
        assert torch.equal(masters.get(0).view(torch.int32), values.view(torch.int32))
        assert torch.equal(parameter.view(torch.int16), values.bfloat16().view(torch.int16))


def backward(model: torch.nn.Module, seed: int) -> None:
    """Gradients that depend on the parameters, so that each bit of these counts."""
    drawn = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=drawn).to(parameter.dtype)
        parameter.grad = noise * (1 + parameter.detach())


def digest(optimizer: DisTrO, model: torch.nn.Module) -> bytes:
    return ParameterReplica(optimizer, model).digest(MemoryBlobStore().put)


def shown(model: torch.nn.Module) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


@pytest.mark.parametrize("lookahead", [False, True])
@pytest.mark.parametrize("lr", [1e-3, 2.0**-9])  # with the second one, every other value is a tie
def test_training_with_split_masters_is_the_same_to_the_bit(lr, lookahead):
    config = DistroConfig(chunk=8, k=4, lookahead=lookahead)
    both = []
    for holding in (Holding(), SPLIT):
        model = Model()
        optimizer = DisTrO(model.named_parameters(), lr, 0.1 if lr == 1e-3 else 0.0, config, holding=holding)
        for seed in range(6):
            optimizer.step(lambda model=model, seed=seed: backward(model, seed))
        both.append((optimizer, model))
    (one, plain), (two, halves) = both
    assert all(map(torch.equal, shown(plain), shown(halves)))
    assert digest(one, plain) == digest(two, halves)
    for (name, master), (_, parameter) in zip(two.published(), sorted(halves.named_parameters()), strict=True):
        assert torch.equal(parameter, master.to(parameter.dtype)), name


def test_local_steps_with_split_masters_are_the_same_to_the_bit():
    config = DistroConfig(chunk=8, k=4, local_steps=2)
    found = []
    for holding in (Holding(), SPLIT):
        model = Model()
        shared, own = (
            LocalSteps(model.named_parameters(), 0.0, config, holding=holding),
            torch.optim.SGD(model.parameters(), 0.05),
        )
        for round_ in range(4):
            with shared.working():
                for step in range(2):
                    backward(model, 2 * round_ + step)
                    own.step()
            shared.apply([shared.encode()], shared.lr_bits())
        found.append((digest(shared, model), shown(model)))
    assert found[0][0] == found[1][0]
    assert all(map(torch.equal, found[0][1], found[1][1]))


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(("before", "after"), [(Holding(), SPLIT), (SPLIT, Holding()), (SPLIT, SPLIT)])
def test_a_saved_state_is_read_by_both_forms(before, after, first):
    model = Model()
    optimizer = DisTrO(model.named_parameters(), 2.0**-9, config=CONFIG, holding=before)
    for seed in range(3):
        backward(model, seed)
        optimizer.step()
    state, weights = optimizer.state_dict(), {name: p.detach().clone() for name, p in model.named_parameters()}
    other = Model()
    resumed = DisTrO(other.named_parameters(), 2.0**-9, config=CONFIG, holding=after)
    if first:
        other.load_state_dict(weights)
        resumed.load_state_dict(state)
    else:
        resumed.load_state_dict(state)
        other.load_state_dict(weights)
    assert digest(resumed, other) == digest(optimizer, model)
    for one, its in ((optimizer, model), (resumed, other)):
        backward(its, 9)
        one.step()
    assert digest(resumed, other) == digest(optimizer, model)


def test_a_split_master_is_of_what_was_loaded_into_the_module():
    model = Model()
    optimizer = DisTrO(model.named_parameters(), 1e-4, config=CONFIG, holding=SPLIT)
    backward(model, 0)
    optimizer.step()
    kept = dict(optimizer.published())
    with torch.no_grad():
        model.whole[0] = 5
        model.runs.data.fill_(2)  # which torch's own counter of changes does not see
    now = dict(optimizer.published())
    assert torch.equal(now["whole"], model.whole.detach().float())
    assert torch.equal(now["runs"], torch.full((150,), 2.0))
    assert torch.equal(now["matrix"], kept["matrix"])
    backward(model, 1)
    optimizer.step()
    assert torch.equal(model.whole, dict(optimizer.published())["whole"].bfloat16())


def test_a_snapshot_fills_split_masters():
    model = Model()
    optimizer = DisTrO(model.named_parameters(), 2.0**-9, config=CONFIG)
    for seed in range(3):
        backward(model, seed)
        optimizer.step()
    store = MemoryBlobStore()
    address = ParameterReplica(optimizer, model).snapshot(store.put)
    other = Model()
    joined = DisTrO(other.named_parameters(), 2.0**-9, config=CONFIG, holding=SPLIT)
    ParameterReplica(joined, other).load(address, store.get)
    assert digest(joined, other) == address
    assert all(map(torch.equal, shown(model), shown(other)))


def test_splitting_takes_four_bytes_a_parameter():
    parameter = torch.nn.Parameter(torch.randn(256, 256).bfloat16())
    masters = Masters(Layout([("w", parameter)]), [parameter], split=True)
    masters.begin()
    held = [value for value in vars(masters).values() if isinstance(value, list)]
    tensors = {one.data_ptr(): one for each in held for one in each if isinstance(one, torch.Tensor) and one.dim()}
    assert sum(one.nbytes for one in tensors.values()) == 4 * parameter.numel()  # the parameter's own bytes among them


def test_other_dtypes_and_other_words_are_refused():
    parameter = torch.nn.Parameter(torch.zeros(8, 8, dtype=torch.float16))
    with pytest.raises(ConfigError, match=r"'w' is torch\.float16\. Choose trainer\.masters=float32"):
        DisTrO([("w", parameter)], 1e-3, config=CONFIG, holding=SPLIT)
    with pytest.raises(ConfigError, match=r"trainer\.masters is 'half'; choose float32 or split"):
        Holding(masters="half")

"""Delta in fewer bytes: what it keeps, how exactly, and that no other node notices."""

from __future__ import annotations

import pytest
import torch

from psyche_lightning.distro import DisTrO, DistroConfig, Layout, LocalSteps
from psyche_lightning.distro.delta import BLOCK, Delta
from psyche_lightning.distro.holding import Holding
from psyche_lightning.errors import ConfigError

FORMS = ("float32", "bfloat16", "int8")
CONFIG = DistroConfig(chunk=16, k=6, decay=0.9)
SHAPES = {"matrix": (40, 33), "runs": (300,), "scalar": (), "kernel": (6, 3, 5, 2), "empty": (0, 4)}


def model() -> torch.nn.ParameterDict:
    drawn = torch.Generator().manual_seed(0)
    return torch.nn.ParameterDict(
        {name: torch.nn.Parameter(torch.randn(shape, generator=drawn)) for name, shape in SHAPES.items()}
    )


def backward(parameters: torch.nn.ParameterDict, seed: int) -> None:
    drawn = torch.Generator().manual_seed(seed)
    for parameter in parameters.values():
        parameter.grad = torch.randn(parameter.shape, generator=drawn) * (1 + parameter.detach())


def drawn_values(scale: float = 1.0) -> dict[str, torch.Tensor]:
    drawn = torch.Generator().manual_seed(1)
    return {name: scale * torch.randn(shape, generator=drawn) for name, shape in SHAPES.items()}


def kept(form: str, values: dict[str, torch.Tensor]) -> tuple[Layout, Delta]:
    layout = Layout(model().items(), 16)
    delta = Delta(layout, [torch.device("cpu")] * len(layout.entries), form)  # type: ignore[arg-type]
    for number, entry in enumerate(layout.entries):
        delta.put(number, values[entry.name])
    return layout, delta


@pytest.mark.parametrize("form", FORMS)
def test_values_come_back_as_exactly_as_the_form_says(form):
    values = drawn_values()
    layout, delta = kept(form, values)
    for number, entry in enumerate(layout.entries):
        found, value = delta.get(number), values[entry.name]
        assert found.shape == value.shape
        assert found.dtype == torch.float32
        if form == "float32":
            assert torch.equal(found, value)
        elif form == "bfloat16":
            assert torch.equal(found, value.bfloat16().float())
        elif value.numel():
            assert (found - value).abs().max() <= 1.001 * value.abs().max() / 128


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e-40, 1e30, 0.0])
@pytest.mark.parametrize("form", FORMS)
def test_what_is_put_back_unchanged_stays_as_it_was(form, scale):
    layout, delta = kept(form, drawn_values(scale))
    before = [delta.get(number) for number in range(len(layout.entries))]
    for batch in layout.batches(3):
        delta.close(batch, delta.open(batch))
    for number in range(len(layout.entries)):
        assert torch.equal(delta.get(number), before[number])
        delta.put(number, before[number])
        assert torch.equal(delta.get(number), before[number])


def test_ends_of_a_block_keep_their_signs():
    layout, delta = kept("int8", {**drawn_values(), "runs": torch.tensor([3.0, -3.0] * 150)})
    number = [entry.name for entry in layout.entries].index("runs")
    assert torch.equal(delta.get(number).sign(), torch.tensor([1.0, -1.0] * 150))
    assert (delta.get(number).abs() >= 2.97).all()


def test_bytes_of_each_form():
    chunks = Layout(model().items(), 16).chunk_count
    sizes = {form: kept(form, drawn_values())[1].held for form in FORMS}
    assert sizes == {"float32": 1024 * chunks, "bfloat16": 512 * chunks, "int8": 256 * chunks + 4 * chunks}
    assert BLOCK == 256


@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_a_resumed_node_goes_on_to_the_same_bytes(form, local):
    def make() -> tuple[DisTrO, torch.nn.ParameterDict]:
        parameters, holding = model(), Holding(delta=form)
        if local:
            config = DistroConfig(chunk=16, k=6, decay=0.9, local_steps=1)
            return LocalSteps(parameters.items(), 0.0, config, holding=holding), parameters
        return DisTrO(parameters.items(), 0.01, config=CONFIG, holding=holding), parameters

    def train(optimizer: DisTrO, parameters: torch.nn.ParameterDict, seed: int) -> bytes:
        backward(parameters, seed)
        if isinstance(optimizer, LocalSteps):
            with optimizer.working(), torch.no_grad():
                for parameter in parameters.values():
                    parameter -= 0.01 * parameter.grad
        payload = optimizer.encode()
        optimizer.apply([payload], optimizer.lr_bits())
        return payload

    one, its = make()
    for seed in range(4):
        train(one, its, seed)
    two, theirs = make()
    two.load_state_dict(one.state_dict())
    theirs.load_state_dict(its.state_dict())
    assert [train(one, its, seed) for seed in range(4, 7)] == [train(two, theirs, seed) for seed in range(4, 7)]


def test_nodes_with_different_forms_hold_the_same_parameters():
    nodes = []
    for form in FORMS:
        parameters = model()
        nodes.append((DisTrO(parameters.items(), 0.01, config=CONFIG, holding=Holding(delta=form)), parameters))
    for seed in range(5):
        payloads = []
        for number, (optimizer, parameters) in enumerate(nodes):
            backward(parameters, 10 * seed + number)
            payloads.append(optimizer.encode())
        for optimizer, _ in nodes:
            optimizer.apply(payloads, optimizer.lr_bits())
    first = nodes[0][1]
    for _, parameters in nodes[1:]:
        assert all(torch.equal(parameters[name], value) for name, value in first.items())


@pytest.mark.parametrize("form", FORMS)
def test_padding_stays_empty(form):
    parameters = model()
    optimizer = DisTrO(parameters.items(), 0.01, config=CONFIG, holding=Holding(delta=form))
    for seed in range(3):
        backward(parameters, seed)
        optimizer.step()
    delta, layout = optimizer._delta, optimizer.layout
    assert delta is not None
    (whole,) = layout.batches(layout.chunk_count)
    chunks = delta.open(whole)
    assert any(padding.numel() for padding in layout.padding(whole, chunks))
    assert not any(padding.any() for padding in layout.padding(whole, chunks))


def test_another_dtype_is_refused():
    with pytest.raises(ConfigError, match=r"trainer\.delta is 'int4'; choose float32 or bfloat16 or int8"):
        Holding(delta="int4")  # type: ignore[arg-type]

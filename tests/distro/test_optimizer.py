import io
import math
import warnings

import numpy as np
import pytest
import torch

from psyche_lightning.distro import DisTrO, DistroConfig, NonFiniteGradientError, decode
from psyche_lightning.distro.transform import basis, integer_basis
from psyche_lightning.errors import ConfigError, PayloadError, PsycheError

CONFIG = DistroConfig(chunk=16, k=4)


class Model(torch.nn.Module):
    """All kinds of parameters: a table, odd matrices, vectors, a scalar, a convolution, a tied and a frozen one."""

    def __init__(self, dtype=torch.float32, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.table = torch.nn.Embedding(50, 24)
        self.inner = torch.nn.Linear(24, 37)
        self.convolution = torch.nn.Conv1d(1, 5, 3)
        self.scale = torch.nn.Parameter(torch.tensor(1.0))
        self.outer = torch.nn.Linear(37 * 5, 24)
        self.head = torch.nn.Linear(24, 50, bias=False)
        self.head.weight = self.table.weight
        self.frozen = torch.nn.Parameter(torch.ones(3), requires_grad=False)
        self.to(dtype)

    def forward(self, tokens):
        x = torch.relu(self.inner(self.table(tokens)))
        x = torch.nn.functional.pad(x.unsqueeze(1), (1, 1))
        x = torch.relu(self.convolution(x)).flatten(1)
        return self.head(self.outer(x) * self.scale)


def loss_of(model, seed, rows=64):
    tokens = torch.randint(0, 50, (rows,), generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.cross_entropy(model(tokens).float(), (tokens * 7 + 3) % 50)


def backward(model, optimizer, seed):
    optimizer.zero_grad()
    loss = loss_of(model, seed)
    loss.backward()
    return loss.item()


def bytes_of(model):
    flat = [parameter.detach().cpu().reshape(-1) for parameter in model.parameters()]
    return b"".join(tensor.view(torch.uint8).numpy().tobytes() for tensor in flat)


def published(optimizer):
    return {name: tensor.clone() for name, tensor in optimizer.published()}


def test_parameters_and_payload_follow_the_formulas():
    torch.manual_seed(0)
    weight, config = torch.nn.Parameter(torch.randn(8, 8)), DistroConfig(chunk=8, k=4, decay=0.9, removal=0.5)
    optimizer = DisTrO([("w", weight)], lr=0.01, weight_decay=0.1, config=config)
    f, b, delta, p = basis(8), integer_basis(8), np.zeros((8, 8)), weight.detach().numpy().copy()
    for _ in range(5):
        weight.grad = torch.randn(8, 8)
        payload = optimizer.encode()
        delta = 0.9 * delta + 0.01 * weight.grad.double().numpy()
        coefficients = (f.T @ delta @ f).ravel()
        positions = np.sort(np.argsort(-np.abs(coefficients))[:4])
        votes = decode(payload, 1, config)
        assert votes.positions.tolist() == [positions.tolist()]
        assert votes.signs.tolist() == [np.sign(coefficients[positions]).tolist()]
        kept = np.zeros(64)
        kept[positions] = coefficients[positions]
        delta -= 0.5 * f @ kept.reshape(8, 8) @ f.T
        np.testing.assert_allclose(dict(optimizer.delta())["w"], delta, atol=1e-7)
        optimizer.apply([payload], optimizer.lr_bits())
        lr = np.float32(0.01)
        sign = np.sign(b @ np.sign(kept).astype(np.int64).reshape(8, 8) @ b.T).astype(np.float32)
        p = p * np.float32(1 - float(lr) * 0.1) - lr * sign
        assert weight.detach().numpy().tobytes() == p.tobytes()
    assert optimizer.nonce == 5


def test_each_operation_rounds_by_itself():
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(64, 64, generator=generator))
    before = weight.detach().numpy().copy()
    optimizer = DisTrO([("w", weight)], lr=0.0123, weight_decay=0.1)
    weight.grad = torch.randn(64, 64, generator=generator)
    optimizer.step()
    lr = np.float32(0.0123)
    factor = np.float32(1 - float(lr) * 0.1)
    sign = np.sign(before * factor - weight.detach().numpy())
    separate = before * factor - lr * sign
    fused = (before.astype(np.float64) * factor - lr.astype(np.float64) * sign).astype(np.float32)
    assert weight.detach().numpy().tobytes() == separate.tobytes()
    assert separate.tobytes() != fused.tobytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nodes_with_different_gradients_stay_identical(dtype, device):
    models = [Model(dtype).to(device) for _ in range(3)]
    optimizers = [DisTrO(model.named_parameters(), 1e-3, 0.1, CONFIG) for model in models]
    assert len({optimizer.layout_digest for optimizer in optimizers}) == 1
    for step in range(6):
        for node, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            optimizer.zero_grad()
            tokens = torch.randint(0, 50, (8,), generator=torch.Generator().manual_seed(10 * step + node))
            model(tokens.to(device)).float().square().mean().backward()
        payloads = [optimizer.encode() for optimizer in optimizers]
        assert len(set(payloads)) == 3
        for node, optimizer in enumerate(optimizers):
            optimizer.apply(payloads[node:] + payloads[:node], optimizer.lr_bits())
        assert len({bytes_of(model) for model in models}) == 1
        first, *others = (published(optimizer) for optimizer in optimizers)
        assert all(torch.equal(first[name], other[name]) for other in others for name in first)


def test_whoever_compiles_a_step_gets_the_same_bytes():
    ended = []
    for compiled in (False, True):
        model = Model()
        optimizer = DisTrO(model.named_parameters(), 0.01, config=CONFIG)
        step = torch.compile(optimizer.step, backend="aot_eager") if compiled else optimizer.step
        for seed in range(2):
            backward(model, optimizer, seed)
            step()
        ended.append(bytes_of(model))
    assert ended[0] == ended[1]


def test_training_alone_learns():
    model = Model()
    optimizer = DisTrO(model.named_parameters(), 2e-3, config=CONFIG)
    first = backward(model, optimizer, 0)
    for step in range(150):
        last = backward(model, optimizer, step)
        optimizer.step()
    assert first > 3.5
    assert last < 0.5


def test_regression_learns_with_look_ahead_and_a_closure():
    torch.manual_seed(0)
    inputs, truth = torch.randn(256, 20), torch.randn(20, 3)
    model = torch.nn.Linear(20, 3)
    optimizer = DisTrO(model.named_parameters(), 1e-2, config=DistroConfig(chunk=8, k=4, lookahead=True))

    def closure():
        optimizer.zero_grad()
        loss = (model(inputs) - inputs @ truth).square().mean()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(300)]
    assert losses[-1] < losses[0] / 50


def test_look_ahead_restores_the_same_bytes():
    for dtype in (torch.float32, torch.bfloat16):
        model = Model(dtype)
        optimizer = DisTrO(model.named_parameters(), 1e-2, config=CONFIG)
        before = bytes_of(model)
        with optimizer.look_ahead():
            assert bytes_of(model) == before  # nothing is accumulated yet
        backward(model, optimizer, 0)
        optimizer.encode()
        own = [parameter.detach().clone() for parameter in model.parameters()]
        state = published(optimizer)
        with optimizer.look_ahead():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    ahead = state[name] - np.float32(1e-2) * dict(optimizer.delta())[name].sign()
                    assert torch.equal(parameter, ahead.to(dtype))
            assert bytes_of(model) != before
            loss_of(model, 1).backward()
        assert bytes_of(model) == before
        with pytest.raises(ZeroDivisionError), optimizer.look_ahead():
            raise ZeroDivisionError
        assert bytes_of(model) == before
        assert all(torch.equal(one, other) for one, other in zip(own, model.parameters(), strict=True))
        assert all(torch.equal(tensor, state[name]) for name, tensor in optimizer.published())


def test_look_ahead_refuses_what_needs_published_parameters():
    model = Model()
    optimizer = DisTrO(model.named_parameters(), 1e-2, config=CONFIG)
    payload = optimizer.encode()
    with optimizer.look_ahead():
        for call in (
            lambda: optimizer.apply([payload], optimizer.lr_bits()),
            lambda: list(optimizer.published()),
            lambda: optimizer.load_published("scale", torch.tensor(0.0)),
            lambda: optimizer.load_state_dict(optimizer.state_dict()),
            lambda: optimizer.look_ahead().__enter__(),
        ):
            with pytest.raises(PsycheError, match=r"within look_ahead\(\)"):
                call()


def test_bfloat16_weights_move_by_their_masters():
    weight = torch.nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
    optimizer = DisTrO([("w", weight)], lr=1e-4)
    weight.grad = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    payload = optimizer.encode()
    optimizer.apply([payload], optimizer.lr_bits())
    assert (weight == 1).all()  # 1e-4 is below half a unit in the last place
    master = dict(optimizer.published())["w"]
    assert master.dtype == torch.float32
    assert ((master - 1).abs() > 5e-5).all()
    for _ in range(50):
        optimizer.apply([payload], optimizer.lr_bits())
    assert (weight != 1).all()
    assert torch.equal(weight, master.bfloat16())


def test_a_master_takes_over_what_was_loaded_into_the_module():
    weight = torch.nn.Parameter(torch.ones(8, 8, dtype=torch.bfloat16))
    optimizer = DisTrO([("w", weight)], lr=1e-4, config=DistroConfig(chunk=8))
    weight.grad = torch.ones(8, 8, dtype=torch.bfloat16)
    optimizer.step()
    kept = dict(optimizer.published())["w"].clone()
    with torch.no_grad():
        weight[0] = 5
    now = dict(optimizer.published())["w"]
    assert (now[0] == 5).all()
    assert torch.equal(now[1:], kept[1:])


def test_no_payloads_change_nothing():
    model = Model()
    optimizer = DisTrO(model.named_parameters(), 1e-2, weight_decay=0.5, config=CONFIG)
    before = bytes_of(model)
    optimizer.apply([], optimizer.lr_bits())
    assert bytes_of(model) == before


def test_missing_gradients_count_as_zero_and_zero_chunks_do_not_move():
    model = Model()
    optimizer = DisTrO(model.named_parameters(), 1e-2, config=CONFIG)
    before = published(optimizer)
    model.outer.weight.grad = torch.randn_like(model.outer.weight)
    optimizer.step()
    moved = {name for name, tensor in optimizer.published() if not torch.equal(tensor, before[name])}
    assert moved == {"outer.weight"}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_gradients_are_named_and_change_nothing(value):
    model = Model()
    optimizer = DisTrO(model.named_parameters(), 1e-2, config=CONFIG)
    backward(model, optimizer, 0)
    optimizer.encode()
    deltas = dict(optimizer.delta())
    backward(model, optimizer, 1)
    model.inner.weight.grad[3, 4] = value
    with pytest.raises(NonFiniteGradientError, match=r"'inner\.weight'") as error:
        optimizer.encode()
    assert isinstance(error.value, FloatingPointError)
    assert isinstance(error.value, PsycheError)
    assert optimizer.nonce == 1
    assert deltas
    for name, delta in optimizer.delta():
        assert torch.equal(delta, deltas[name])


def test_half_precision_gradients_are_finite_although_their_norm_is_not_in_their_dtype():
    weight = torch.nn.Parameter(torch.ones(64, 64, dtype=torch.float16))
    optimizer = DisTrO([("w", weight)], lr=1e-4)
    weight.grad = torch.full((64, 64), 60000.0, dtype=torch.float16)
    assert len(optimizer.encode()) == optimizer.max_payload


def test_sparse_gradients_are_refused():
    table = torch.nn.Embedding(10, 4, sparse=True)
    optimizer = DisTrO(table.named_parameters(), 1e-2)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(ConfigError, match="'weight' is sparse"):
        optimizer.encode()


def test_a_bad_payload_among_good_ones_changes_nothing():
    model = Model()
    optimizer = DisTrO(model.named_parameters(), 1e-2, config=CONFIG)
    backward(model, optimizer, 0)
    good, before = optimizer.encode(), bytes_of(model)
    optimizer.check(good)
    for bad in (good[:-1], good + b"\0", b"\7" + good[1:], b""):
        with pytest.raises(PayloadError):
            optimizer.check(bad)
        with pytest.raises(PayloadError):
            optimizer.apply([good, bad], optimizer.lr_bits())
    for lrs in ((), (0, 0), (-1,), (0x7F800000,), (0x7FC00000,), (0x80000000,), (1 << 32,)):
        with pytest.raises(PayloadError, match="learning rates"):
            optimizer.apply([good], lrs)
    assert bytes_of(model) == before


def test_groups_have_their_own_rates_and_decays():
    one, other, still = (torch.nn.Parameter(torch.ones(8, 8)) for _ in range(3))
    groups = [
        {"params": [("one", one)], "lr": 0.5},
        {"params": [other, still], "param_names": ["other", "still"], "weight_decay": 0.5},
    ]
    optimizer = DisTrO(groups, lr=0.25, config=DistroConfig(chunk=8))
    assert [np.uint32(bits).view(np.float32) for bits in optimizer.lr_bits()] == [0.5, 0.25]
    for parameter in (one, other):
        parameter.grad = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    assert set(one.detach().unique().tolist()) <= {0.5, 1.0, 1.5}
    assert set(other.detach().unique().tolist()) <= {0.875 - 0.25, 0.875, 0.875 + 0.25}
    assert (still == 0.875).all()
    agreed = np.array([0.0, 1.0], np.float32).view(np.uint32).tolist()
    optimizer.apply([optimizer.encode()], agreed)
    assert set(one.detach().unique().tolist()) <= {0.5, 1.0, 1.5}
    assert (still == 0.4375).all()


def test_schedulers_set_the_rate_without_warnings():
    model = Model()
    optimizer = DisTrO(model.named_parameters(), 0.5, config=CONFIG)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(3):
            assert optimizer.lr_bits() == (int(np.float32(0.5 * 0.5**step).view(np.uint32)),)
            optimizer.apply([optimizer.encode()], optimizer.lr_bits())
            scheduler.step()


def test_a_learning_rate_that_is_not_finite_is_refused():
    optimizer = DisTrO(Model().named_parameters(), 0.5, config=CONFIG)
    for lr in (-1.0, math.nan, math.inf):
        optimizer.param_groups[0]["lr"] = lr
        with pytest.raises(ConfigError, match="finite and not negative"):
            optimizer.lr_bits()
    optimizer.param_groups[0]["lr"] = -0.0
    assert optimizer.lr_bits() == (0,)


def test_reset_empties_delta():
    model = Model()
    optimizer = DisTrO(model.named_parameters(), 1e-2, config=CONFIG)
    backward(model, optimizer, 0)
    first = optimizer.encode()
    assert optimizer.encode() != first
    optimizer.reset()
    assert optimizer.nonce == 0
    assert optimizer.encode() == first


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_state_continues_identically(dtype):
    def run(model, optimizer, steps):
        for step in steps:
            backward(model, optimizer, step)
            optimizer.step()

    model = Model(dtype)
    optimizer = DisTrO(model.named_parameters(), 1e-3, 0.1, CONFIG)
    run(model, optimizer, range(4))
    file = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), file)
    run(model, optimizer, range(4, 8))

    file.seek(0)
    again = Model(dtype, seed=1)
    restored = DisTrO(again.named_parameters(), 7.0, config=CONFIG)
    weights, state = torch.load(file, weights_only=True)
    again.load_state_dict(weights)
    restored.load_state_dict(state)
    assert restored.nonce == 4
    run(again, restored, range(4, 8))
    assert restored.nonce == 8
    assert bytes_of(again) == bytes_of(model)
    mine, theirs = published(optimizer), published(restored)
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert restored.encode() == optimizer.encode()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda state: state["state"][0]["delta"].view(torch.int32).view(-1)[0].bitwise_xor_(1), "its checksum is"),
        (lambda state: state.update(nonce=7), "its checksum is"),
        (
            lambda state: (state.pop("checksum"), state["state"][0]["delta"].view(-1)[0].fill_(math.nan)),
            "not finite",
        ),
    ],
)
def test_a_damaged_state_is_left_out(dtype, spoil, why, caplog):
    optimizer = DisTrO(Model(dtype).named_parameters(), 1e-3, 0.1, CONFIG)
    backward(Model(dtype), optimizer, 0)
    optimizer.encode()
    state = optimizer.state_dict()
    spoil(state)
    again = DisTrO(Model(dtype, seed=1).named_parameters(), 7.0, config=CONFIG)
    again.load_state_dict(state)
    assert "the saved state of DisTrO is damaged and left out" in caplog.text
    assert why in caplog.text
    assert (again.nonce, list(again.delta())) == (0, [])
    assert again.param_groups[0]["lr"] == 1e-3


def test_a_state_of_version_0_1_has_no_checksum():
    optimizer = DisTrO([("a", torch.nn.Parameter(torch.ones(3)))], 1e-2)
    optimizer.encode()
    state = optimizer.state_dict()
    del state["checksum"]
    again = DisTrO([("a", torch.nn.Parameter(torch.ones(3)))], 1e-2)
    again.load_state_dict(state)
    assert again.nonce == 1


def test_a_state_of_other_parameters_is_refused():
    optimizer = DisTrO([("a", torch.nn.Parameter(torch.ones(3)))], 1e-2)
    other = DisTrO([("b", torch.nn.Parameter(torch.ones(3)))], 1e-2)
    wider = DisTrO([("a", torch.nn.Parameter(torch.ones(4)))], 1e-2)
    wider.encode()
    with pytest.raises(ConfigError, match=r"\['b'\].*\['a'\]"):
        optimizer.load_state_dict(other.state_dict())
    with pytest.raises(ConfigError, match=r"delta of 'a' was saved with shape \(4,\)"):
        optimizer.load_state_dict(wider.state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_published_parameters_carry_over(dtype):
    one, other = Model(dtype), Model(dtype, seed=1)
    source = DisTrO(one.named_parameters(), 1e-3, config=CONFIG)
    target = DisTrO(other.named_parameters(), 1e-3, config=CONFIG)
    backward(one, source, 0)
    source.step()
    names = [name for name, _ in source.published()]
    assert names == sorted(names)
    assert "frozen" not in names
    for name, tensor in source.published():
        target.load_published(name, tensor)
    assert bytes_of(one) == bytes_of(other)
    payload = source.encode()
    for optimizer in (source, target):
        optimizer.apply([payload], source.lr_bits())
    assert bytes_of(one) == bytes_of(other)
    with pytest.raises(PsycheError, match=r"no trainable parameter is named 'frozen'; there are .*scale"):
        target.load_published("frozen", torch.ones(3))
    with pytest.raises(PsycheError, match=r"'scale' was sent as torch\.float64 \(1,\)"):
        target.load_published("scale", torch.ones(1, dtype=torch.float64))


def test_any_strides_work():
    generator = torch.Generator().manual_seed(0)
    values, gradient = torch.randn(20, 30, generator=generator), torch.randn(20, 30, generator=generator)
    plain, turned = torch.nn.Parameter(values.clone()), torch.nn.Parameter(values.t().contiguous().t())
    assert not turned.is_contiguous()
    outcomes = []
    for parameter in (plain, turned):
        optimizer = DisTrO([("w", parameter)], 1e-2, config=CONFIG)
        parameter.grad = gradient.clone()
        payload = optimizer.encode()
        optimizer.apply([payload], optimizer.lr_bits())
        with optimizer.look_ahead():
            pass
        outcomes.append((payload, parameter.detach().contiguous().numpy().tobytes()))
    assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize("budget", [1, 100_000, 1 << 30])
def test_the_budget_does_not_change_what_is_applied(budget):
    model, other = Model(), Model()
    optimizer = DisTrO(model.named_parameters(), 1e-3, 0.1, CONFIG)
    payloads = []
    for step in range(3):
        backward(model, optimizer, step)
        payloads.append(optimizer.encode())
    optimizer.apply(payloads, optimizer.lr_bits())
    tight = DisTrO(other.named_parameters(), 1e-3, 0.1, CONFIG, budget=budget)
    before = bytes_of(other)
    with pytest.raises(PayloadError):  # wherever it is found, nothing has been applied
        tight.apply([*payloads, payloads[0][:-3] + b"\xff\xff\xff"], optimizer.lr_bits())
    assert bytes_of(other) == before
    tight.apply(payloads, optimizer.lr_bits())
    assert bytes_of(other) == bytes_of(model)
    with pytest.raises(ConfigError, match="budget is 0"):
        DisTrO(other.named_parameters(), 1e-3, budget=0)


def test_strides_that_fold_into_no_matrix_are_copied():
    generator = torch.Generator().manual_seed(0)
    values, gradient = torch.randn(2, 6, 8, 10, 5, generator=generator)[:, :, :, :, 0]
    outcomes = []
    for form in (torch.contiguous_format, torch.channels_last):
        parameter = torch.nn.Parameter(values[None].clone(memory_format=form))
        parameter.grad = gradient[None].clone(memory_format=form)
        optimizer = DisTrO([("w", parameter)], 1e-2, config=CONFIG)
        payload = optimizer.encode()
        optimizer.apply([payload], optimizer.lr_bits())
        assert not torch.equal(parameter, values[None])
        outcomes.append((payload, parameter.detach().contiguous().numpy().tobytes()))
    assert outcomes[0] == outcomes[1]


def test_it_works_if_started_in_inference_mode():
    weight = torch.nn.Parameter(torch.ones(8, 8, dtype=torch.bfloat16))
    optimizer = DisTrO([("w", weight)], 1e-2, config=DistroConfig(chunk=8))
    with torch.inference_mode():
        list(optimizer.published())
        optimizer.encode()
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert (weight != 1).any()


def test_wrong_arguments_are_explained():
    model = Model()
    with pytest.raises(ConfigError, match=r"pass module\.named_parameters\(\)"):
        DisTrO(model.parameters(), 1e-2)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="weight_decay is -1"):
        DisTrO(model.named_parameters(), 1e-2, weight_decay=-1)
    with pytest.raises(ConfigError, match="learning rates"):
        DisTrO(model.named_parameters(), -1e-2)
    with pytest.raises(ConfigError, match="two parameters are named 'w'"):
        DisTrO([{"params": [("w", torch.nn.Parameter(torch.ones(1)))]} for _ in range(2)], 1e-2)
    with pytest.raises(ConfigError, match="no trainable parameter"):
        DisTrO([("w", torch.ones(3))], 1e-2)
    optimizer = DisTrO(model.named_parameters(), 1e-2)
    with pytest.raises(ConfigError, match="fixed"):
        optimizer.add_param_group({"params": [("late", torch.nn.Parameter(torch.ones(1)))]})

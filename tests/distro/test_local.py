"""Local steps: what a node sends of where its own optimizer led, and that all nodes end at the same bytes."""

import io
import itertools
from functools import partial

import numpy as np
import pytest
import torch

from psyche_lightning.distro import STEPS_VERSION, DistroConfig, LocalSteps, NonFiniteGradientError, decode, local
from psyche_lightning.distro.magnitudes import Sum
from psyche_lightning.errors import ConfigError, PayloadError, PsycheError

CONFIG = DistroConfig(chunk=16, k=8, decay=0.9)


class Model(torch.nn.Module):
    """A table, odd matrices, vectors, a scalar and a frozen parameter."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.table = torch.nn.Embedding(50, 24)
        self.inner = torch.nn.Linear(24, 37)
        self.head = torch.nn.Linear(37, 50)
        self.scale = torch.nn.Parameter(torch.tensor(1.0))
        self.frozen = torch.nn.Parameter(torch.ones(3), requires_grad=False)
        self.to(dtype)

    def loss(self, seed, rows=32):
        tokens = torch.randint(0, 50, (rows,), generator=torch.Generator().manual_seed(seed)).to(self.scale.device)
        return torch.nn.functional.cross_entropy(self(tokens).float(), (tokens * 7 + 3) % 50)

    def forward(self, tokens):
        return self.head(torch.relu(self.inner(self.table(tokens)))) * self.scale


class Node:
    """A model, its own AdamW and the shared optimizer."""

    def __init__(self, number=0, dtype=torch.float32, device="cpu", steps=3, **options):
        self.model, self.number, self.steps = Model(dtype).to(device), number, steps
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.own = torch.optim.AdamW(trained, lr=3e-3)
        self.shared = LocalSteps(self.model.named_parameters(), lr=3e-3, config=CONFIG, **options)

    def work(self, turn):
        with self.shared.working():
            for step in range(self.steps):
                self.own.zero_grad()
                self.model.loss(1000 * turn + 10 * self.number + step).backward()
                self.shared.check_gradients()
                self.own.step()

    def encode(self, turn):
        self.work(turn)
        return self.shared.encode()

    def apply(self, payloads):
        self.shared.apply(payloads, self.shared.lr_bits())

    @property
    def bytes(self):
        flat = [p.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes() for p in self.model.parameters()]
        return b"".join(flat) + b"".join(p.cpu().numpy().tobytes() for _, p in self.shared.published())


def test_delta_payload_and_parameters_follow_the_formulas():
    torch.manual_seed(0)
    weight, config = torch.nn.Parameter(torch.randn(8, 8)), DistroConfig(chunk=8, k=4, decay=0.9)
    shared = LocalSteps([("w", weight)], lr=0.01, config=config, scale=1.5)
    delta, p = np.zeros(64, np.float32), weight.detach().numpy().copy()
    for turn in range(5):
        with shared.working(), torch.no_grad():
            weight.add_(torch.randn(8, 8), alpha=0.01)
            weight.add_(torch.randn(8, 8), alpha=0.01)
            local = weight.numpy().copy()
        assert weight.detach().numpy().tobytes() == p.tobytes()
        payload = shared.encode()
        assert weight.detach().numpy().tobytes() == p.tobytes()
        delta = np.float32(0.9) * delta + (p - local).ravel()
        positions = np.sort(np.argsort(-np.abs(delta))[:4])
        size = 2.0 ** np.round(np.log2(np.abs(delta[positions]).mean()))
        sent = np.sign(delta[positions]) * size * np.where(np.abs(delta[positions]) > 1.5 * size, 2, 1)
        votes = decode(payload, 1, config, version=STEPS_VERSION)
        assert votes.positions.tolist() == [positions.tolist()]
        assert (votes.signs[0] * 2.0 ** (votes.exponents[0] - 28.0)).tolist() == sent.tolist()
        delta[positions] -= sent.astype(np.float32)
        np.testing.assert_allclose(dict(shared.delta())["w"].numpy().ravel(), delta, atol=1e-8)
        shared.apply([payload], shared.lr_bits())
        p.reshape(-1)[positions] -= np.float32(1.5) * sent.astype(np.float32)
        assert weight.detach().numpy().tobytes() == p.tobytes(), turn
    assert shared.nonce == 5


def test_each_operation_rounds_by_itself():
    """A factor that is no power of two, times a sum, then a difference: a fused kernel would give other bytes."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(64, 64, generator=generator) * 2**-6)
    before, config = weight.detach().numpy().copy(), DistroConfig(chunk=32, k=128, decay=0.5)
    shared = LocalSteps([("w", weight)], lr=0.1, config=config, scale=0.7)
    payloads = []
    for _ in range(9):
        with shared.working(), torch.no_grad():
            weight.add_(torch.randn(64, 64, generator=generator), alpha=0.1)
        payloads.append(shared.encode())
    shared.apply(payloads, shared.lr_bits())
    sums = np.zeros((4, 1024), np.int64)
    for payload in payloads:
        votes = decode(payload, 4, config, version=STEPS_VERSION)
        assert np.ptp(votes.exponents) <= 2  # so none is limited
        np.add.at(
            sums, (np.arange(4)[:, None], votes.positions), votes.signs.astype(np.int64) << votes.exponents[:, None]
        )
    matrix = sums.reshape(2, 2, 32, 32).swapaxes(1, 2).reshape(64, 64)
    factor = np.float32(0.7 / 9)
    separate = before - matrix.astype(np.float32) * (factor * np.float32(2.0**-28))
    fused = (before - matrix.astype(np.float64) * (float(factor) * 2.0**-28)).astype(np.float32)
    assert weight.detach().numpy().tobytes() == separate.tobytes()
    assert separate.tobytes() != fused.tobytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nodes_stay_identical_in_any_order_and_with_any_threads_and_budget(dtype, device):
    nodes = [Node(number, dtype, device, budget=budget) for number, budget in enumerate((1, 1 << 20, 1 << 27))]
    assert len({node.shared.layout_digest for node in nodes}) == 1
    for turn in range(5):
        payloads = [node.encode(turn) for node in nodes]
        assert len(set(payloads)) == 3
        before = nodes[0].bytes
        for node in nodes:
            torch.set_num_threads(1 + node.number % 2)
            node.apply(payloads[node.number :] + payloads[: node.number])
        assert len({node.bytes for node in nodes}) == 1
        assert nodes[0].bytes != before


def test_nodes_stay_identical_when_one_compiles_its_model():
    compiled, eager = Node(0), Node(1)
    compiled.model.compile(backend="aot_eager")
    for turn in range(3):
        payloads = [node.encode(turn) for node in (compiled, eager)]
        for node in (compiled, eager):
            node.apply(payloads)
        assert compiled.bytes == eager.bytes


def test_whoever_compiles_what_calls_the_optimizer_gets_the_same_bytes():
    nodes = [Node(number) for number in range(2)]
    compiled = torch.compile(nodes[1].apply, backend="aot_eager")
    for turn in range(2):
        payloads = [node.encode(turn) for node in nodes]
        nodes[0].apply(payloads)
        compiled(payloads)
        assert nodes[0].bytes == nodes[1].bytes


def test_sums_of_floats_and_of_integers_move_the_parameters_alike(monkeypatch):
    nodes = [Node(number) for number in range(3)]
    for turn in range(3):
        payloads = [node.encode(turn) for node in nodes]
        for node in nodes:
            with monkeypatch.context() as patch:
                if node.number:
                    patch.setattr(local, "Sum", partial(Sum, dtype=torch.int64))
                node.apply(payloads)
        assert len({node.bytes for node in nodes}) == 1


def test_training_learns_and_a_larger_scale_goes_further():
    losses = {}
    for scale in (1.0, 2.0):
        nodes = [Node(number, scale=scale, steps=4) for number in range(2)]
        for turn in range(12):
            payloads = [node.encode(turn) for node in nodes]
            for node in nodes:
                node.apply(payloads)
        losses[scale] = nodes[0].model.loss(12345, 500).item()
    assert losses[2.0] < losses[1.0] < Model().loss(12345, 500).item() - 0.1


def test_a_resumed_node_sends_the_same_bytes():
    whole, broken = Node(), Node()
    for turn in range(2):
        for node in (whole, broken):
            node.apply([node.encode(turn)])
    saved = io.BytesIO()
    states = {"shared": broken.shared.state_dict(), "own": broken.own.state_dict(), "model": broken.model.state_dict()}
    torch.save(states, saved)
    loaded = torch.load(io.BytesIO(saved.getvalue()), weights_only=True)
    resumed = Node()
    resumed.model.load_state_dict(loaded["model"])
    resumed.own.load_state_dict(loaded["own"])
    resumed.shared.load_state_dict(loaded["shared"])
    assert resumed.shared.nonce == 2
    for turn in range(2, 4):
        payloads = [node.encode(turn) for node in (whole, resumed)]
        assert payloads[0] == payloads[1]
        for node in (whole, resumed):
            node.apply(payloads[:1])
        assert whole.bytes == resumed.bytes


def test_whoever_abstains_does_not_count():
    one, other = Node(), Node()
    payload = one.encode(0)
    other.encode(0)
    one.apply([payload])
    other.apply([other.shared.abstention(), payload, other.shared.abstention()])
    assert one.bytes == other.bytes
    before = one.bytes
    one.apply([one.shared.abstention()])
    one.apply([])
    assert one.bytes == before


def test_steps_that_fail_leave_the_published_parameters():
    node = Node()
    before = node.bytes

    def fail():
        with node.shared.working(), torch.no_grad():
            node.model.head.weight.zero_()
            with pytest.raises(PsycheError, match="working"):
                node.shared.apply([], node.shared.lr_bits())
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        fail()
    assert node.bytes == before


def test_what_is_not_finite_is_never_sent():
    node = Node()
    node.encode(0)
    before = node.bytes, [delta.clone() for _, delta in node.shared.delta()], node.shared.nonce
    node.own.zero_grad()
    node.model.loss(1).backward()
    node.model.head.weight.grad[0, 0] = float("nan")
    with pytest.raises(NonFiniteGradientError, match=r"gradient of 'head.weight'"):
        node.shared.check_gradients()
    with node.shared.working(), torch.no_grad():
        node.model.scale.fill_(float("inf"))
    with pytest.raises(NonFiniteGradientError, match=r"moved 'scale' by inf"):
        node.shared.encode()
    assert before[0] == node.bytes
    assert all(map(torch.equal, before[1], [delta for _, delta in node.shared.delta()]))
    assert before[2] == node.shared.nonce


def test_a_displacement_is_sent_once():
    node = Node()
    node.encode(0)
    with pytest.raises(PsycheError, match=r"without working\(\)"):
        node.shared.encode()


def test_one_damaged_payload_changes_nothing():
    node = Node(budget=1)  # several parts, each decoded by itself
    payload = node.encode(0)
    before = node.bytes
    damaged = payload[:-1] + bytes([payload[-1] ^ 1])
    for wrong in (damaged, payload[:-1], b"\x02" + payload[1:]):
        with pytest.raises(PayloadError):
            node.apply([payload, wrong])
        with pytest.raises(PayloadError):
            node.shared.check(wrong)
    assert node.bytes == before


def test_figures_are_those_of_gradients_delta_and_signs():
    nodes = [Node(number) for number in range(3)]
    payloads = [node.encode(0) for node in nodes]
    nodes[0].shared.observing = True
    nodes[0].apply(payloads)
    (figures,) = nodes[0].shared.figures()
    delta = sum(float(delta.square().sum()) for _, delta in nodes[0].shared.delta()) ** 0.5
    assert figures["momentum_norm"] == pytest.approx(delta, rel=1e-5)
    assert figures["gradient_norm"] > 0
    assert 0.5 < figures["agreement"] <= 1


@pytest.mark.parametrize(
    ("options", "scale"),
    list(itertools.product([{"lookahead": True}, {"removal": 0.5}, {"float32_gradients": True}], [1.0]))
    + [({}, scale) for scale in (0, -1.0, float("nan"), 2000, True, "2")],
)
def test_settings_without_a_meaning_are_refused(options, scale):
    with pytest.raises(ConfigError, match=r"local steps"):
        LocalSteps([("w", torch.nn.Parameter(torch.ones(4, 4)))], 0.1, DistroConfig(**options), scale)


def test_parameters_with_their_own_k():
    config = DistroConfig(chunk=8, k=3, k_for={"embed*": 1, "norm": 9})
    generator = torch.Generator().manual_seed(0)
    shapes = {"embed": (40, 16), "layer": (16, 24), "norm": (70,)}
    named = {name: torch.nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in shapes.items()}
    shared = LocalSteps(named.items(), 0.1, config, budget=1)
    before = {name: parameter.detach().clone() for name, parameter in named.items()}
    with shared.working(), torch.no_grad():
        for parameter in named.values():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.01)
    payload = shared.encode()
    assert len(payload) == shared.max_payload
    shared.apply([payload], shared.lr_bits())
    moved = {name: int((parameter != before[name]).sum()) for name, parameter in named.items()}
    assert moved == {"embed": 10, "layer": 18, "norm": 15}  # 6 of the last chunk of 'norm', which has 6 elements

"""A schedule of k: payloads follow their step, and what a node has yet to send outlives a change."""

import io
import json
from dataclasses import asdict

import pytest
import torch

from psyche_lightning.distro import DisTrO, DistroConfig, Layout, LocalSteps
from psyche_lightning.errors import ConfigError, PayloadError, PsycheError

DENSE, SPARSE, CHANGE = 12, 3, 4
SCHEDULE = [{"from_step": 0, "k": DENSE}, {"from_step": CHANGE, "k": SPARSE}]
SHAPES = {"embed": (40, 16), "layer": (16, 24), "norm": (70,)}
KINDS = [DisTrO, LocalSteps]


def config_of(**options):
    return DistroConfig(**{"chunk": 8, "decay": 0.9, "schedule": SCHEDULE, **options})


class Node:
    """Parameters, the optimizer that shares them, and displacements or gradients that differ from node to node."""

    def __init__(self, kind, number=0, config=None, budget=1 << 27):
        generator = torch.Generator().manual_seed(0)
        self.parameters = {
            name: torch.nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in SHAPES.items()
        }
        self.number = number
        self.shared = kind(self.parameters.items(), lr=0.01, config=config or config_of(), budget=budget)

    def encode(self, step, given=...):
        generator = torch.Generator().manual_seed(100 * step + self.number)
        noise = [torch.randn(parameter.shape, generator=generator) for parameter in self.parameters.values()]
        if isinstance(self.shared, LocalSteps):
            with self.shared.working(), torch.no_grad():
                for parameter, some in zip(self.parameters.values(), noise, strict=True):
                    parameter.add_(some, alpha=0.01)
        for parameter, some in zip(self.parameters.values(), noise, strict=True):
            parameter.grad = some
        return self.shared.encode(step if given is ... else given)

    def apply(self, payloads, step):
        self.shared.apply(payloads, self.shared.lr_bits(), step)

    @property
    def bytes(self):
        return b"".join(parameter.detach().numpy().tobytes() for parameter in self.parameters.values())


def k_in(payload):
    return int.from_bytes(payload[2:4], "big")


def test_stages_follow_each_other_from_the_first_step_on():
    config = DistroConfig(k=20, local_steps=2, schedule=[{"from_step": 5, "k": 9}, {"from_step": 8, "local_steps": 7}])
    found = [(first, stage.k, stage.local_steps) for first, stage in config.stages]
    assert found == [(1, 20, 2), (5, 9, 2), (8, 9, 7)]
    assert [config.at(step).k for step in (0, 1, 4, 5, 7, 8, 10**9)] == [20, 20, 20, 9, 9, 9, 9]
    assert [config.at(step).local_steps for step in (4, 7, 8)] == [2, 2, 7]
    assert not any(stage.schedule for _, stage in config.stages)
    for begin in (0, 1):
        assert [first for first, _ in DistroConfig(schedule=[{"from_step": begin, "k": 3}]).stages] == [1]
    assert DistroConfig().stages == ((1, DistroConfig()),)


def test_a_schedule_outlives_json():
    config = config_of()
    again = DistroConfig(**json.loads(json.dumps(asdict(config))))
    assert again == config
    assert hash(again) == hash(config)
    assert config != config_of(schedule=[])


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (5, r"schedule is 5; expected a list such as"),
        ({"from_step": 0, "k": 5}, "expected a list"),
        ([5], "expected a list"),
        ([{"k": 5}], r"schedule\.0\.from_step is None; choose the first step"),
        ([{"from_step": -1, "k": 5}], r"from_step is -1; .*from 0 on"),
        ([{"from_step": True, "k": 5}], "from_step is True"),
        ([{"from_step": 0}], r"schedule\.0 changes nothing; give k or local_steps"),
        ([{"from_step": 0, "k": 17}], r"schedule\.0\.k is 17; with distro\.chunk=8 choose a whole number from 1 to 16"),
        ([{"from_step": 0, "k": 5.0}], r"schedule\.0\.k is 5\.0"),
        ([{"from_step": 0, "rate": 1}], r"the key 'rate'; choose from from_step, k, local_steps\."),
        ([{"from_step": 0, "k_for": {}}], r"distro\.k_for names keep their k"),
        ([{"from_step": 9, "k": 5}, {"from_step": 9, "k": 4}], "from_step 9 before 9; .*ascending order"),
        ([{"from_step": 0, "k": 5}, {"from_step": 1, "k": 4}], "from_step 0 before 1; steps count from 1"),
        ([{"from_step": 3, "local_steps": 2}], r"local_steps is 2, but distro\.local_steps is 0"),
        ([{"from_step": step, "k": 5} for step in range(1, 102)], "101 entries; give at most 100"),
    ],
)
def test_other_schedules_are_refused(schedule, message):
    with pytest.raises(ConfigError, match=message):
        DistroConfig(chunk=8, schedule=schedule)


@pytest.mark.parametrize("steps", [0, 1001, True, 2.0])
def test_local_steps_stay_local_steps(steps):
    with pytest.raises(ConfigError, match=r"schedule\.0\.local_steps is .*from 1 to 1000"):
        DistroConfig(local_steps=4, schedule=[{"from_step": 3, "local_steps": steps}])


@pytest.mark.parametrize("kind", KINDS)
def test_nodes_stay_identical_over_a_change_in_any_order_with_any_budget_and_threads(kind):
    nodes = [Node(kind, number, budget=budget) for number, budget in enumerate((1, 1 << 20, 1 << 27))]
    assert len({node.shared.layout_digest for node in nodes}) == 1
    for step in range(1, 2 * CHANGE):
        payloads = [node.encode(step) for node in nodes]
        k = DENSE if step < CHANGE else SPARSE
        assert {k_in(payload) for payload in payloads} == {k}
        assert {len(payload) for payload in payloads} == {nodes[0].shared.payload_size(step)}
        for node in nodes:
            torch.set_num_threads(1 + node.number % 2)
            node.apply(payloads[node.number :] + payloads[: node.number], step)
        assert len({node.bytes for node in nodes}) == 1
    assert nodes[0].shared.max_payload == nodes[0].shared.payload_size(1) > nodes[0].shared.payload_size(CHANGE)


@pytest.mark.parametrize("kind", KINDS)
def test_stages_are_those_of_constant_k_with_one_delta(kind):
    """Before the change the bytes are those of the one k, after it those of the other with the delta of then."""
    node, dense = Node(kind), Node(kind, config=config_of(k=DENSE, schedule=[]))
    for step in range(1, CHANGE):
        payload = node.encode(step)
        assert payload == dense.encode(step)
        for each in (node, dense):
            each.apply([payload], step)
    sparse = Node(kind, config=config_of(k=SPARSE, schedule=[]))
    with torch.no_grad():
        for ours, theirs in zip(sparse.parameters.values(), node.parameters.values(), strict=True):
            ours.copy_(theirs)
    sparse.shared.load_state_dict(node.shared.state_dict())
    assert any(delta.any() for _, delta in sparse.shared.delta())
    for step in range(CHANGE, CHANGE + 3):
        payload = node.encode(step)
        assert payload == sparse.encode(step)
        for each in (node, sparse):
            each.apply([payload], step)
        assert node.bytes == sparse.bytes


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("killed", [CHANGE - 1, CHANGE])
def test_a_node_that_resumes_at_the_change_sends_the_same_bytes(kind, killed):
    node, others = Node(kind), Node(kind, 1)
    resumed = None
    for step in range(1, CHANGE + 3):
        payloads = [each.encode(step) for each in (node, others)]
        if resumed is not None:
            assert resumed.encode(step) == payloads[0]
            resumed.apply(payloads[::-1], step)
        for each in (node, others):
            each.apply(payloads, step)
        if step == killed:
            saved = io.BytesIO()
            torch.save(node.shared.state_dict(), saved)
            resumed = Node(kind)
            with torch.no_grad():
                for ours, theirs in zip(resumed.parameters.values(), node.parameters.values(), strict=True):
                    ours.copy_(theirs)
            resumed.shared.load_state_dict(torch.load(io.BytesIO(saved.getvalue()), weights_only=True))
    assert resumed.bytes == node.bytes == others.bytes


@pytest.mark.parametrize("kind", KINDS)
def test_the_payload_s_own_step_counts_with_overlap(kind):
    late, waiting = Node(kind), []
    for step in range(1, CHANGE + 3):
        waiting.append((late.encode(step), step))
        if len(waiting) > 1:
            payload, its = waiting.pop(0)
            late.shared.observing = True
            late.apply([payload, payload], its)
            (figures,) = late.shared.figures()
            assert figures["agreement"] == 1.0


@pytest.mark.parametrize("kind", KINDS)
def test_a_payload_of_another_k_is_malformed(kind):
    node = Node(kind)
    dense, sparse = node.encode(CHANGE - 1), node.encode(CHANGE)
    before = node.bytes
    for payload, step in ((sparse, CHANGE - 1), (dense, CHANGE), (node.shared.abstention(1), CHANGE)):
        with pytest.raises(PayloadError, match="k is"):
            node.shared.check(payload, step)
    for payload, step in ((sparse, CHANGE - 1), (dense, CHANGE)):
        with pytest.raises(PayloadError, match="k is"):
            node.apply([payload], step)
    assert node.bytes == before
    node.shared.check(dense, CHANGE - 1)
    node.shared.check(sparse, CHANGE)
    node.apply([node.shared.abstention(CHANGE)], CHANGE)
    assert node.bytes == before


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_with_their_own_k_keep_it(kind):
    node = Node(kind, config=config_of(k_for={"embed*": 2}))
    counts = []
    for step in (CHANGE - 1, CHANGE):
        votes = node.shared._codec(step).decode(node.encode(step))
        for entry in node.shared.layout.entries:
            chunks = slice(entry.offset, entry.offset + entry.chunks)
            counts.append((entry.name, {int(count) for count in (votes.signs[chunks] != 0).sum(axis=1)}))
    after = [(name, {k}) for name, k in (("embed", 2), ("layer", SPARSE), ("norm", SPARSE))]
    assert counts[3:] == after
    assert counts[:3] == [(name, {k}) for name, k in (("embed", 2), ("layer", DENSE), ("norm", DENSE))]


def test_the_step_is_asked_for_where_it_matters():
    node = Node(DisTrO)
    with pytest.raises(PsycheError, match="give it as step="):
        node.encode(1, given=None)
    assert node.shared.nonce == 0
    for use in (node.shared.abstention, node.shared.payload_size, lambda: node.shared.check(b"")):
        with pytest.raises(PsycheError, match="give it as step="):
            use()


def test_an_optimizer_alone_counts_its_own_steps():
    alone, node = Node(DisTrO), Node(DisTrO)
    for step in range(1, CHANGE + 2):
        payload = node.encode(step)
        node.apply([payload], step)
        for parameter, theirs in zip(alone.parameters.values(), node.parameters.values(), strict=True):
            parameter.grad = theirs.grad
        alone.shared.step()
        assert alone.bytes == node.bytes


def test_nodes_with_other_schedules_have_other_layouts():
    layout = Layout(((name, torch.empty(shape, requires_grad=True)) for name, shape in SHAPES.items()), 8)
    others = [[], SCHEDULE[:1], [*SCHEDULE[:1], {"from_step": CHANGE + 1, "k": SPARSE}], SCHEDULE]
    assert len({layout.digest(config_of(schedule=schedule)) for schedule in others}) == 4

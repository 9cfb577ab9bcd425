"""What a coordinator keeps of evaluations: bounded, checked, and of the run's tasks only."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from psyche_lightning.coordinator.history import CHANGING_EVALUATIONS
from psyche_lightning.coordinator.host import RunHost
from psyche_lightning.errors import CoordinatorError, WireError
from psyche_lightning.protocol.evals import SHARES, Evaluation, Measure, measures_from_wire, measures_to_wire, shares_of
from psyche_lightning.protocol.requests import Evaluated, Join
from psyche_lightning.protocol.state import CoordinatorConfig

KEYS = [bytes([number]) * 32 for number in range(3)]


def make(**section: Any) -> RunHost:
    config = CoordinatorConfig(total_steps=25, init_min_clients=3)
    host = RunHost("r", config, seed=1, manifest={"evals": {"tasks": ["sums", "lines"], "every": 10, **section}})
    for signer in KEYS:
        host.handle(signer, Join("a:1", {}), 0.0)
    object.__setattr__(host.state, "step", 26)
    return host


def share(number: int, total: float, task: str = "sums", step: int = 10, documents: int = 150) -> Evaluated:
    weight = len(range(number, documents, shares_of(documents)))
    return Evaluated(task, step, documents, number, (Measure("acc", total, float(weight)),))


def code_of(host: RunHost, request: Evaluated, signer: bytes = KEYS[0]) -> str:
    before = host.dump()
    with pytest.raises(CoordinatorError) as caught:
        host.handle(signer, request, 1.0)
    assert host.dump()["evaluations"] == before["evaluations"]
    return caught.value.code


def test_shares_of_three_nodes_make_the_whole() -> None:
    host = make()
    right = [float(number % 3 == 0) for number in range(150)]
    for number in range(SHARES):
        total = sum(right[number::SHARES])
        answer = host.handle(KEYS[number % 3], share(number, total), 1.0)
        assert number not in answer.missing
    assert answer.missing == []
    assert (answer.measured, answer.values) == (150, {"acc": sum(right) / 150})
    again = host.handle(KEYS[0], share(5, 100.0), 1.0)  # of a node that did not know that it is there
    assert again == answer


@pytest.mark.parametrize("nodes", [1, 3, 7, 100])
def test_nodes_divide_the_shares_and_no_node_holds_up_the_others(nodes: int) -> None:
    parts: list[set[int]] = []
    for place in range(nodes):
        evaluation, order = Evaluation("t", 1, 1000), []
        while (number := evaluation.next_share(0, place, nodes)) is not None:
            order.append(number)
            evaluation = evaluation.plus(number, [Measure("acc", 1.0, 1.0)])
        assert sorted(order) == list(range(SHARES))
        parts.append(set(order[: len(range(place, SHARES, nodes))]))
    assert set().union(*parts) == set(range(SHARES))
    assert sum(map(len, parts)) == SHARES


def test_a_node_helps_from_the_last_share_on_and_repeats_nothing() -> None:
    evaluation = Evaluation("t", 1, 6)
    assert evaluation.next_share(0b001001, 0, 3) == 4  # its own are on their way to the coordinator
    others = evaluation.plus(4, [Measure("acc", 1.0, 1.0)])
    assert others.next_share(0b001001, 0, 3) == 1
    assert others.next_share(0b101111, 0, 3) is None


def test_a_small_task_has_a_share_for_each_document() -> None:
    host = make()
    answer = host.handle(KEYS[0], share(1, 1.0, documents=3), 1.0)
    assert (answer.missing, answer.measured) == ([0, 2], 1)


@pytest.mark.parametrize(
    ("request_", "signer", "code"),
    [
        (share(0, 1.0, task="else"), KEYS[0], "InvalidRequest"),
        (share(0, 1.0), b"x" * 32, "NotMember"),
        (share(0, 1.0, step=11), KEYS[0], "InvalidRequest"),
        (share(0, 1.0, step=30), KEYS[0], "InvalidRequest"),
        (share(0, 1.0, step=0), KEYS[0], "InvalidRequest"),
        (share(64, 1.0), KEYS[0], "InvalidRequest"),
        (Evaluated("sums", 10, 0, 0, (Measure("acc", 1.0, 1.0),)), KEYS[0], "InvalidRequest"),
    ],
)
def test_what_is_no_part_of_an_evaluation_is_refused(request_: Evaluated, signer: bytes, code: str) -> None:
    assert code_of(make(), request_, signer) == code


def test_the_last_step_is_evaluated_even_if_it_is_not_due() -> None:
    assert make().handle(KEYS[0], share(0, 1.0, step=25), 1.0).step == 25


def test_shares_that_do_not_fit_together_are_refused() -> None:
    host = make()
    host.handle(KEYS[0], share(0, 1.0), 1.0)
    assert code_of(host, share(1, 1.0, documents=151)) == "InvalidRequest"
    assert code_of(host, Evaluated("sums", 10, 150, 1, (Measure("f1", 1.0, 3.0),))) == "InvalidRequest"


@pytest.mark.parametrize("section", [{"tasks": "sums"}, {"tasks": ["sums"] * 17}, {"every": "10"}, {"tasks": [1]}])
def test_a_section_that_is_none_names_no_tasks(section: dict[str, Any]) -> None:
    assert code_of(make(**section), share(0, 1.0)) == "InvalidRequest"


def test_going_back_undoes_the_evaluations_of_what_is_undone() -> None:
    host = make()
    for step in (10, 20):
        host.handle(KEYS[0], share(0, 1.0, step=step), 1.0)
    host.history.undo(15)
    assert [one.undone for one in host.history.evaluations.since(0)] == [False, True]
    answer = host.handle(KEYS[0], share(3, 0.0, step=20), 1.0)
    assert (answer.done, answer.values) == (1 << 3, {"acc": 0.0})


def test_they_are_stored_with_the_run_and_are_not_in_older_stores() -> None:
    host = make()
    host.handle(KEYS[0], share(0, 1.0), 1.0)
    data = json.loads(json.dumps(host.dump()))
    assert RunHost.load(data).history.evaluations.since(0) == host.history.evaluations.since(0)
    assert host.dump(since={"evaluations": 1})["evaluations"] == {"first": 1, "items": []}
    del data["evaluations"]
    assert RunHost.load(data).history.evaluations.count == 0


def test_whoever_reports_much_evicts_only_evaluations() -> None:
    host = make(every=1)
    object.__setattr__(host.state.config, "total_steps", 10**6)
    object.__setattr__(host.state, "step", 10**6)
    for step in range(1, 700):
        host.handle(KEYS[0], share(0, 1.0, step=step), 1.0)
    assert len(host.history.evaluations.since(0)) == 512
    assert host.handle(KEYS[0], share(1, 1.0, step=699), 1.0).done == 3
    assert host.handle(KEYS[0], share(1, 1.0, step=699 - CHANGING_EVALUATIONS), 1.0).done == 2  # begun anew


def test_perplexities_and_weights() -> None:
    assert Measure("p", -6.0, 3.0, True).value == math.exp(2)
    assert Measure("p", -1e9, 1.0, True).value == math.inf
    infinite = Evaluation("t", 1, 1).plus(
        0, [Measure("p", -1e9, 1.0, True), Measure("n", 0.0, 0.0), Measure("a", 1.0, 2.0)]
    )
    assert infinite.values == {"a": 0.5}


@pytest.mark.parametrize(
    "values",
    [
        [],
        [["acc", 1.0, 1.0, False]] * 17,
        [["acc", 1.0, 1.0, False]] * 2,
        [["acc", 1, 1.0, False]],
        [["acc", math.nan, 1.0, False]],
        [["acc", math.inf, 1.0, False]],
        [["acc", 1.0, -1.0, False]],
        [["", 1.0, 1.0, False]],
        [["a" * 65, 1.0, 1.0, False]],
        [["\x1b[2J", 1.0, 1.0, False]],
        [["acc", 1.0, 1.0]],
        ["acc"],
    ],
)
def test_figures_that_are_none_are_refused(values: list[Any]) -> None:
    with pytest.raises((WireError, CoordinatorError)):
        measures_from_wire(values)
    good = (Measure("acc", 1.0, 2.0), Measure("p", -3.0, 2.0, True))
    assert measures_from_wire(measures_to_wire(good)) == good

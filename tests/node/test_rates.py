"""Which learning rates a result may have: those that a node can apply, and where the run has a schedule, its own."""

from __future__ import annotations

import struct
from dataclasses import asdict, replace

import pytest

from psyche_lightning.errors import WireError
from psyche_lightning.node.rates import Rates, agreed_rates
from psyche_lightning.protocol.state import RunState
from psyche_lightning.recipe.manifest import schedule_of
from psyche_lightning.recipe.schedule import KINDS, Cosine


def bits(*rates: float) -> tuple[int, ...]:
    return tuple(struct.unpack("<I", struct.pack("<f", rate))[0] for rate in rates)


@pytest.mark.parametrize(
    ("lrs", "text"),
    [
        (bits(), "0 learning rates; the optimizer has 2 parameter groups"),
        (bits(0.1), "1 learning rate; the optimizer has 2 parameter groups"),
        (bits(0.1, 0.1, 0.1), "3 learning rates"),
        (bits(0.1, -0.1), "negative or not finite"),
        (bits(0.1, -0.0), "negative or not finite"),
        (bits(float("inf"), 0.1), "negative or not finite"),
        (bits(0.1, float("nan")), "negative or not finite"),
    ],
)
def test_rates_that_no_node_could_apply_are_refused(lrs: tuple[int, ...], text: str) -> None:
    with pytest.raises(WireError, match=text):
        Rates(groups=2).check(lrs, 1, "abcd1234")


def test_without_a_schedule_any_rate_that_can_be_applied_is_taken() -> None:
    Rates(groups=2).check(bits(0.0, 3e38), 1, "abcd1234")


def test_with_a_schedule_its_rate_is_taken_however_a_machine_rounds_it_and_no_other() -> None:
    rates = Rates(1, Cosine(1e-3, warmup_steps=10, total_steps=100, final_lr=0.0))
    due = 1e-3 * 5 / 10
    for rounded in (bits(due)[0] - 1, *bits(due), bits(due)[0] + 1):
        rates.check((rounded,), 5, "abcd1234")
    rates.check(bits(0.0), 100, "abcd1234")
    for step, wrong in ((5, due * 1.01), (6, due), (5, 0.0), (100, 1e-9)):
        with pytest.raises(WireError, match=f"abcd1234 trained step {step} with the learning rate"):
            rates.check(bits(wrong), step, "abcd1234")


def test_each_group_has_its_share_of_the_planned_rate() -> None:
    rates = Rates(2, lambda step: 0.1 * step, shares=(1.0, 10.0))
    rates.check(bits(0.2, 2.0), 2, "abcd1234")
    with pytest.raises(WireError, match=r"step 2 with the learning rate 0\.2; the run has 2"):
        rates.check(bits(0.2, 0.2), 2, "abcd1234")


def test_after_a_pause_rates_rise_in_a_straight_line_from_nothing() -> None:
    every = Rates(1, lambda _: 1.0, cold_start=4)
    state = RunState("run", start_step=11)
    assert every.of_epoch(state).factor(11) == 1.0
    assert Rates().of_epoch(replace(state, cold_start_epoch=True)).factor(11) == 1.0
    rates = every.of_epoch(replace(state, cold_start_epoch=True))
    assert [rates.factor(step) for step in range(11, 18)] == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    rates.check(bits(0.25), 12, "abcd1234")
    with pytest.raises(WireError, match=r"step 12 with the learning rate 1; the run has 0\.25"):
        rates.check(bits(1.0), 12, "abcd1234")


def test_the_agreed_rate_of_each_group_is_the_lower_median() -> None:
    assert agreed_rates([bits(1.0, 8.0), bits(2.0, 4.0), bits(3.0, 6.0), bits(9.0, 9.0)]) == bits(2.0, 6.0)
    assert agreed_rates([]) == ()


def test_the_schedule_of_a_manifest_is_the_one_that_it_was_made_from() -> None:
    schedule = Cosine(1e-3, warmup_steps=10, total_steps=100, final_lr=1e-5)
    assert schedule_of({"optimizer": {"schedule": {"kind": "cosine", **asdict(schedule)}}}) == schedule
    assert set(KINDS) == {"constant", "linear", "cosine", "wsd"}
    for without in ({}, {"optimizer": {}}, {"optimizer": {"groups": [], "clip": None}}):
        assert schedule_of(without) is None

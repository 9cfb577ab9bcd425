from __future__ import annotations

import pytest

from psyche_lightning.errors import ConfigError
from psyche_lightning.recipe.schedule import Constant, Cosine, Linear, Schedule, WarmupStableDecay

CONSTANT = Constant(0.01, 10, 0.001)
LINEAR = Linear(0.01, 10, 0.001, 100, 0.0001)
COSINE = Cosine(0.01, 10, 0.001, 110, 0.0)
WSD = WarmupStableDecay(0.01, 10, 0.001, 60, 110, 0.001, 20, 0.0)


@pytest.mark.parametrize(
    ("schedule", "step", "expected"),
    [  # vectors of Psyche's definitions.rs
        (CONSTANT, 5, 0.0055),
        (CONSTANT, 9, 0.0091),
        (CONSTANT, 10, 0.01),
        (LINEAR, 55, 0.00505),
        (LINEAR, 200, 0.0001),
        (COSINE, 60, 0.005),
        (WSD, 69, 0.01),
        (WSD, 125, 0.0055),
        (WSD, 180, 0.001),
        (WSD, 190, 0.0005),
        (WSD, 200, 0.0),
        # and where the pieces meet
        (CONSTANT, 0, 0.001),
        (LINEAR, 10, 0.01),
        (LINEAR, 100, 0.0001),
        (COSINE, 10, 0.01),
        (COSINE, 110, 0.0),
        (COSINE, 210, 0.01),  # not clamped
        (WSD, 10, 0.01),
        (WSD, 70, 0.01),
        (WSD, 10**9, 0.0),
        (WarmupStableDecay(1.0, stable_steps=2, cosine_decay_final_lr=0.5, linear_decay_final_lr=0.25), 2, 0.25),
        (Constant(0.5), 0, 0.5),
    ],
)
def test_vectors(schedule: Schedule, step: int, expected: float) -> None:
    assert schedule(step) == pytest.approx(expected, rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("schedule", [CONSTANT, LINEAR, COSINE, WSD])
def test_the_warm_up_is_a_straight_line(schedule: Schedule) -> None:
    rates = [schedule(step) for step in range(11)]
    assert rates == pytest.approx([0.001 + 0.0009 * step for step in range(11)])


def test_contradictions_are_refused() -> None:
    with pytest.raises(ConfigError, match="no steps left after a warm-up of 10"):
        Linear(0.01, 10, 0.0, 10)
    with pytest.raises(ConfigError, match=r"0\.02 <= 0\.001 <= 0\.01"):
        WarmupStableDecay(0.01, cosine_decay_final_lr=0.001, linear_decay_final_lr=0.02)

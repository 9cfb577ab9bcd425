"""A node that is slowed down sleeps in proportion to what it computed."""

from __future__ import annotations

from typing import Any

from psyche_lightning.train.slowed import Slowed


def test_it_sleeps_in_proportion_to_each_step() -> None:
    now, slept = [10.0], []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        now[0] += seconds

    slowed: Any = Slowed(4.0, clock=lambda: now[0], sleep=sleep)
    slowed.on_train_batch_start(None, None, None, 0)
    for seconds in (0.5, 1.0):  # two local steps of one share
        now[0] += seconds
        slowed.on_before_optimizer_step(None, None, None)
    now[0] += 5.0  # waits for others
    slowed.on_train_batch_start(None, None, None, 1)
    now[0] += 0.25
    slowed.on_before_optimizer_step(None, None, None)
    assert slept == [1.5, 3.0, 0.75]

"""Learning rates rise again after a pause, on every node alike."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from psyche_lightning.recipe import load_recipe
from psyche_lightning.server.admin import CoordinatorAdmin
from psyche_lightning.train.runner import train_recipe

STEPS = 4


def test_two_nodes_begin_anew_after_a_pause(
    text: Path, tmp_path: Path, create_run: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "psyche_lightning")
    constant = ["schedule.kind=constant", "schedule.final_lr=null", "schedule.warmup_steps=0"]
    own = [f"data.config.path={text}", "validate_every=0", "total_steps=40"]
    recipe = load_recipe("demo", [*constant, *own, f"cold_start_warmup_steps={STEPS}"], twin=True)
    url, run = create_run(init_min_clients=2, global_batch_size_start=4)
    admin = CoordinatorAdmin(url)
    results: dict[int, dict[str, Any]] = {}

    def node(number: int) -> None:
        results[number] = train_recipe(recipe, coordinator_url=url, run_id=run, directory=tmp_path / str(number))

    def until(holds: Callable[[dict[str, Any]], bool]) -> None:
        deadline = time.monotonic() + 240
        while not holds(admin.status(run)):
            assert time.monotonic() < deadline
            time.sleep(0.05)

    threads = [threading.Thread(target=node, args=(number,), daemon=True) for number in (0, 1)]
    for thread in threads:
        thread.start()
    until(lambda found: found["step"] and found["step"] > 3)
    admin.pause(run)
    until(lambda found: found["phase"] == "paused")
    paused = admin.status(run)["step"]
    admin.resume(run)
    for thread in threads:
        thread.join(240)
    assert results[0]["digest"] == results[1]["digest"]
    for number in (0, 1):
        rows = [json.loads(line) for line in (tmp_path / str(number) / "metrics.jsonl").read_text().splitlines()]
        factors = {row["step"]: row["lr"] / recipe.optimizer.lr for row in rows}
        wanted = {step: min(1.0, (step - paused) / STEPS) if step >= paused else 1.0 for step in factors}
        assert factors == pytest.approx(wanted)
        assert factors[paused] == 0.0
    assert caplog.text.count("delta is empty, and learning rates rise over 4 steps") == 2

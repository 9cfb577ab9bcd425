"""There is no bad time to kill a node or the coordinator."""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from psyche_lightning.doctor.prediction import Network, RunShape, conditions
from psyche_lightning.doctor.speed import TrainingSpeed
from psyche_lightning.node.audit import audit
from psyche_lightning.node.ledger import read_ledger
from psyche_lightning.recipe import load_recipe
from psyche_lightning.recipe.estimate import estimate
from psyche_lightning.wire.identity import Identity

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def digests(figures: dict[str, Any]) -> set[str]:
    return {node["digest"] for node in figures["nodes"]}


def test_three_nodes_end_with_equal_parameters_and_the_figures_are_there(start_demo: Callable[..., Any]) -> None:
    figures = start_demo("--rounds", "8").finish()
    assert len(figures["nodes"]) == 3
    assert len(digests(figures)) == 1
    assert figures["rounds"] == 8
    assert len(figures["history"]) == 8
    assert len(figures["loss"]["train"]) == len(figures["loss"]["validation"]) == 2
    assert figures["ratio_to_fp32_allreduce"] > 1
    for node in figures["nodes"]:
        assert node["socket_bytes_up"] > node["payload_bytes_up"] > 0
        # Each payload goes to both peers once, a repeated fetch aside.
        assert node["payload_bytes_up"] >= 8 * node["payload_bytes_computed"]


LOCAL = ["local_steps=2", "scale=2", "k=50", "decay=0.95", "optimizer.name=muon"]


@pytest.mark.parametrize("options", [[], LOCAL], ids=["votes", "local steps"])
def test_nodes_send_what_the_doctor_and_the_plan_predict(start_demo: Callable[..., Any], options: list[str]) -> None:
    figures = start_demo("--rounds", "20", *options).finish()
    recipe = load_recipe("demo", options, twin=True)
    size = estimate(recipe)
    speed, network = TrainingSpeed(1.0, 0.0, 0.0, 1, 1, ""), Network(None, None, None, None)
    given = conditions(recipe, RunShape(3, 4, {}), network, speed, size.payload)
    assert {node["payload_bytes_computed"] for node in figures["nodes"]} == {size.bytes_per_round(3)}
    node = max(figures["nodes"], key=lambda one: one["payload_bytes_up"])  # on a busy machine one may join late
    rounds = node["payload_bytes_up"] / size.bytes_per_round(3)
    assert 10 <= rounds <= 22
    assert node["socket_bytes_up"] == pytest.approx(rounds * given.traffic, rel=0.15)


@pytest.mark.parametrize(("seed", "options"), [(1, ["overlap=false"]), (2, ["overlap=true"]), (3, LOCAL)])
def test_a_killed_node_does_not_stop_the_others(start_demo: Callable[..., Any], seed: int, options: list[str]) -> None:
    rng = random.Random(seed)
    demo = start_demo("--rounds", "100", "max_round_train_time=15", *options)  # long enough: quick ones take 40 ms
    demo.wait_for_step(rng.randint(1, 8))
    time.sleep(rng.uniform(0, 0.5))
    victim = rng.choice(demo.children("train"))
    os.kill(victim, signal.SIGKILL)
    figures = demo.finish()
    assert len(figures["nodes"]) == 2
    assert len(digests(figures)) == 1
    assert len(figures["history"]) == 100
    gone = [event for event in figures["events"] if event["kind"] == "dropped"]
    assert len(gone) == 1
    survivors = {node["id"][:8] for node in figures["nodes"]}
    assert gone[0]["text"].split()[0] not in survivors
    assert gone[0]["time"] > 0


@pytest.mark.parametrize("seed", [3])
def test_a_killed_coordinator_goes_on_from_where_it_was(start_demo: Callable[..., Any], seed: int) -> None:
    rng = random.Random(seed)
    demo = start_demo("--rounds", "30")
    demo.wait_for_step(rng.randint(2, 10))
    time.sleep(rng.uniform(0, 0.5))
    [victim] = demo.children("coordinator")
    os.kill(victim, signal.SIGKILL)
    figures = demo.finish()
    assert len(figures["nodes"]) == 3
    assert len(digests(figures)) == 1
    steps = [row["step"] for row in figures["history"]]
    assert steps == list(range(1, 31))


def test_a_killed_rank_ends_its_node_and_no_other(start_demo: Callable[..., Any]) -> None:
    """Of three nodes: one of one device, one that divides its model among two, and one of two with the whole model."""
    ranks = ["--devices", "1:2:fsdp", "--devices", "2:2:ddp", "trainer.accelerator=cpu", *LOCAL]
    demo = start_demo("--rounds", "40", "max_round_train_time=15", *ranks)
    demo.wait_for_step(3)
    commands = {node: Path(f"/proc/{node}/cmdline").read_text().split("\0") for node in demo.children("train")}
    [whole] = [node for node, command in commands.items() if "trainer.inner=ddp" in command]
    [rank] = Path(f"/proc/{whole}/task/{whole}/children").read_text().split()
    os.kill(int(rank), signal.SIGKILL)
    figures = demo.finish()
    assert len(figures["nodes"]) == 2
    assert len(digests(figures)) == 1
    assert len(figures["history"]) == 40


@pytest.mark.parametrize("options", [[], ["overlap=false", *LOCAL]])
def test_a_slow_node_gets_a_smaller_share(start_demo: Callable[..., Any], options: list[str]) -> None:
    batch = ["global_batch_size_start=280", "global_batch_size_end=280"]  # of few, equal shares cost no time
    demo = start_demo("--nodes", "4", "--slow", "3:4", "--rounds", "16", *batch, *options)
    figures = demo.finish()
    assert len(figures["nodes"]) == 4
    assert len(digests(figures)) == 1
    folders = [demo.folder / f"node-{number}" for number in range(4)]
    audited = audit(row for folder in folders for row in read_ledger(folder / "ledger.jsonl"))
    assert audited.problems == []
    assert (audited.rounds, audited.last_step) == (16, 16)
    last = [line for line in audited.lines if line.step > 8]
    trained = Counter({line.trainer: 0 for line in last})
    for line in last:
        trained[line.trainer] += line.stop - line.start
    slow = Identity.load_or_create(folders[3] / "node.key").public
    assert trained[slow] < min(many for trainer, many in trained.items() if trainer != slow)
    assert figures["pace"]["part"] > 0


def test_one_node_twice_gives_the_same_digest(start_demo: Callable[..., Any]) -> None:
    seen = [digests(start_demo("--nodes", "1", "--rounds", "6").finish()) for _ in range(2)]
    assert seen[0] == seen[1]
    assert len(seen[0]) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_leaves_no_process_behind(start_demo: Callable[..., Any], number: signal.Signals) -> None:
    demo = start_demo("--rounds", "500")
    demo.wait_for_step(2)
    children = demo.children("train") + demo.children("coordinator")
    assert len(children) == 4
    demo.process.send_signal(number)
    demo.process.communicate(timeout=60)
    assert demo.process.returncode == 130
    assert not [pid for pid in children if os.path.exists(f"/proc/{pid}")]

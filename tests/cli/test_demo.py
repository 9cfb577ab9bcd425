"""``psyche demo`` without its processes: what it asks for and what it prints."""

from __future__ import annotations

import io
import signal
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from psyche_lightning.cli.demo.command import _by_node, _devices, _finish, _show_pace, _stretched, _sum_up
from psyche_lightning.cli.demo.processes import Child, Processes
from psyche_lightning.cli.demo.report import Figures, note_paces
from psyche_lightning.cli.demo.stage import ServerStage
from psyche_lightning.cli.demo.view import View
from psyche_lightning.errors import ConfigError, PsycheError
from psyche_lightning.recipe import load_recipe


@pytest.mark.parametrize("recipe", ["demo", "hf-llama", "consilience-40b", "mla-200m"])
@pytest.mark.parametrize("rounds", [1, 2, 6, 10, 11, 1000])
def test_a_schedule_fits_any_number_of_rounds(recipe: str, rounds: int) -> None:
    whole = load_recipe(recipe)
    steps = whole.run.coordinator.total_steps
    fitted = load_recipe(recipe, [*_stretched(whole, rounds), f"total_steps={rounds}"])
    assert fitted.optimizer.schedule.warmup_steps == whole.optimizer.schedule.warmup_steps * rounds // steps
    assert all(0 <= fitted.schedule(step) <= whole.optimizer.lr for step in range(1, rounds + 1))
    as_it_is = whole.optimizer.schedule.lengths(Fraction(1))
    assert _stretched(whole, steps) == [f"optimizer.schedule.{name}={length}" for name, length in as_it_is.items()]


def test_a_schedule_of_k_keeps_its_shares_too() -> None:
    given = "distro.schedule=[{from_step: 0, k: 96}, {from_step: 61, k: 12}, {from_step: 181, k: 6}]"
    whole = load_recipe("demo", [given, "total_steps=240"])
    for rounds, firsts in {240: (1, 61, 181), 24: (1, 7, 19), 1000: (1, 251, 751), 1: (1,)}.items():
        fitted = load_recipe("demo", [*_stretched(whole, rounds), f"total_steps={rounds}"]).distro
        assert [first for first, _ in fitted.stages] == list(firsts)
        assert fitted.at(rounds).k == 6


def status(step: int, **more: Any) -> dict[str, Any]:
    node = {"status": "healthy", "loss": 2.5, "tokens_per_second": 12_345.6, "bytes_up": 123_456_789}
    clients = [{"key": f"{number:08x}", **node, "bytes_down": 98_765_432} for number in range(3)]
    metrics = [{"step": done, "loss": 2.5} for done in range(1, step)]
    run = {"run_id": "demo", "phase": "waiting_for_members", "epoch": 10, "step": step, "metrics": metrics}
    return {**run, "clients": clients, "pending": [], "exited": [], "events": [{"text": "all is well"}], **more}


def shown(statuses: list[dict[str, Any]], rounds: int, nodes: int = 3, **console: Any) -> str:
    text = io.StringIO()
    with View(Console(file=text, **console), all_reduce=1e9 if nodes > 1 else None, rounds=rounds) as view:
        for each in statuses:
            view.show(each)
    return text.getvalue()


def test_nothing_is_cut_on_a_terminal_of_80_columns() -> None:
    text = shown([status(100_001)], 120_000, force_terminal=True, width=80, color_system=None)
    assert "…" not in text
    assert "run demo, epoch 10: waiting for members" in text
    assert "100000/120000" in text
    assert "left" in text


@pytest.mark.parametrize(("rounds", "every"), [(1, 1), (6, 1), (12, 2), (30, 5), (120, 10), (1000, 10)])
def test_a_pipe_gets_lines_of_short_runs_too(rounds: int, every: int) -> None:
    lines = shown([status(step) for step in range(1, rounds + 2)], rounds, width=200).splitlines()
    assert [line.split("  ")[0] for line in lines] == [
        f"round {done}/{rounds}" for done in range(every, rounds + 1, every)
    ]
    assert max(map(len, lines)) <= 80, "a log of 80 columns has whole lines"


def test_a_node_alone_is_compared_with_nobody() -> None:
    assert "ratio -" in shown([status(3)], 2, nodes=1, width=200)
    sizes = dict.fromkeys(("socket_bytes_up", "socket_bytes_down", "payload_bytes_up", "payload_bytes_computed"), 9)
    node = {"id": "0" * 64, "digest": "1" * 64, **sizes}
    history = [{"step": 1, "loss": 5.0}]

    def told(nodes: int) -> str:
        text = io.StringIO()
        figures = Figures(1, 1e6, 1, 1.0, nodes, [node] * nodes, history)
        _sum_up(Console(file=text, width=80), figures, Path("nowhere"), "nats")
        return text.getvalue()

    assert "train loss  5.000 nats" in told(1)
    assert "fewer bytes" not in told(1)
    assert "2 of 2 nodes finished with equal parameters" in told(2)
    assert "times fewer bytes than an fp32 all-reduce" in told(2)
    assert "…" not in told(2)


def test_the_pace_is_that_of_the_second_half() -> None:
    row = {"clients": 2, "reports": 2, "batch_size": 10, "loss": 1.0}
    times = [0.0, 9.0, 18.0, 20.0, 22.0, 24.0]  # of the last four rounds, two seconds each
    speeds = [7.0, 7.0, 60.0, 60.0, 60.0, 60.0]
    history = [
        {**row, "step": step, "time": at, "tokens_per_second": speed}
        for step, (at, speed) in enumerate(zip(times, speeds, strict=True), 1)
    ]
    history[3]["reports"] = 1  # then the sum of the speeds is not known
    figures = Figures(1, 1e6, 5, 24.0, 2, [], history, seq_len=10)
    for step, rate, share in ((1, 1.0, 0.5), (3, 40.0, 0.75), (5, 50.0, 0.8), (4, 45.0, 0.8)):
        client = {"key": "a", "step": step, "tokens_per_second": rate, "share": share}
        note_paces(figures.paces, {"clients": [client, {**client, "key": "b", "share": None}]})
    assert figures.pace == {
        "tokens_per_second": 50.0,
        "summed_speeds": 60.0,
        "part": round(50 / 60, 4),
        "nodes": {"a": {"tokens_per_second": 45.0, "share": 0.8}},
    }
    text = io.StringIO()
    _show_pace(Console(file=text, width=80), figures)
    assert "50 tokens/s: 83% of the nodes' summed speeds" in text.getvalue()
    assert Figures(1, 1e6, 5, 24.0, 2, [], [{"step": 4, "loss": 1.0}]).pace is None


@pytest.mark.parametrize("given", ["3", "4:4", "-1:4", "3:0.5", "3:x", "x:4", "3:nan", "3:1e9"])
def test_a_slow_node_is_named_by_number_and_factor(given: str) -> None:
    assert _by_node("--slow", ["0:2.5", "3:4"], 4, float, 1e3, "N:F, a node {}") == {0: 2.5, 3: 4.0}
    with pytest.raises(ConfigError, match=r"--slow .*: expected N:F, a node from 0 to 3, from 1 to 1000, such as 3:4"):
        _by_node("--slow", [given], 4, float, 1e3, "N:F, a node {}")


def test_a_node_of_several_devices_is_named_by_number_and_devices() -> None:
    named = {0: ["trainer.devices=2"], 3: ["trainer.devices=4", "trainer.inner=fsdp"]}
    assert _devices(["0:2", "3:4:fsdp"], 4) == named
    with pytest.raises(ConfigError, match=r"--devices 1:1\.5: expected N:D or N:D:INNER, a node from 0 to 3 and how"):
        _devices(["1:1.5"], 4)
    with pytest.raises(ConfigError, match=r"--devices 1:2:fspd: there is no 'fspd'; expected ddp or fsdp"):
        _devices(["1:2:fspd"], 4)


def test_a_node_that_failed_is_no_success_but_one_that_was_killed_is_part_of_the_show(tmp_path: Path) -> None:
    with Processes() as processes:

        def node(does: str) -> Child:
            return processes.add(Child("node 1", [], tmp_path / "log.txt", program=("-c", does)))

        killed = node("import time; time.sleep(60)")
        killed.signal(signal.SIGKILL)
        _finish([node("pass"), killed])
        with pytest.raises(PsycheError, match=r"node 1 failed with exit code 3; its last lines:\nno disk"):
            _finish([node("pass"), node("print('no disk'); raise SystemExit(3)")])


def test_the_demo_needs_no_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "a file"))
    stage, processes = ServerStage(), Processes()
    try:
        stage.open(processes, tmp_path, 1, Console(quiet=True))
        stage.create("r", "demo", [], True)
        status = stage.look([])
        assert status is not None
        assert status["phase"] == "waiting_for_members"
    finally:
        processes.stop()

import json
import os

import pytest

from psyche_lightning.bench.ddp import Comparison, Task, run
from psyche_lightning.bench.engine import load_reference, measure
from psyche_lightning.cli import main
from psyche_lightning.distro import DistroConfig
from psyche_lightning.errors import ConfigError, PsycheError

REFERENCE = """
import torch
class DeMo(torch.optim.SGD):
    def __init__(self, params, compression_decay, compression_topk, compression_chunk, **kwargs):
        super().__init__(params, **kwargs)
    def step(self, closure=None):
        own = torch.zeros(3)
        gathered, _ = self._demo_all_gather(own, own)
        assert len(gathered) == 4
        assert all(one is not own for one in gathered)
        return super().step(closure)
"""


def test_wire_counts_bytes(tmp_path):
    assert (
        main(["bench", "wire", "--millions", "1", "--json", str(tmp_path / "j"), "--png", str(tmp_path / "p.png")]) == 0
    )
    figures = json.loads((tmp_path / "j").read_text())
    assert [row["k"] for row in figures["payloads"]] == [1, 2, 4, 8, 16, 32, 64]
    assert all(row["limit"] < row["bits"] < 1.05 * row["limit"] for row in figures["payloads"])
    assert [row["peers"] for row in figures["relays"]] == [2, 4, 8, 16, 32, 64]
    assert figures["relays"][-1]["merged"] < 0.7 * figures["relays"][-1]["separate"]
    assert (tmp_path / "p.png").stat().st_size > 1000


def test_wire_counts_the_stages_of_a_schedule(tmp_path, capsys):
    arguments = ["--millions", "1", "--rounds", "300", "--json", str(tmp_path / "j")]
    planned = "[{from_step: 101, k: 32}, {from_step: 201, k: 2, local_steps: 8}, {from_step: 900, k: 1}]"
    assert main(["bench", "wire", *arguments, "--schedule", planned, "--local-steps", "2"]) == 0
    stages = json.loads((tmp_path / "j").read_text())["stages"]
    figures = [(row["first"], row["rounds"], row["k"], row["steps"]) for row in stages]
    assert figures == [(1, 100, 4, 2), (101, 100, 32, 2), (201, 100, 2, 8)]
    mean = sum(row["megabytes"] for row in stages) / 3
    assert f"{mean:.3f} MB a round" in capsys.readouterr().out
    # Each vote has a sign and one bit of magnitude on top of its place.
    assert all(row["bits"] > 2 for row in stages)
    assert main(["bench", "wire", "--schedule", "96"]) == 1
    assert "expected a list such as" in capsys.readouterr().err


def test_engine_times_every_part(tmp_path):
    (tmp_path / "demo.py").write_text(REFERENCE)
    for kind in ("blocks", "small", "odd"):
        result = measure(kind, 1, DistroConfig(k=4), load_reference(tmp_path), 1)
        assert set(result.times) == {"encode", "apply", "of it pack", "of it unpack", "reference", "adamw"}
        assert set(result.local) == {"encode", "apply", "of it pack", "of it unpack", "working"}
        assert all(seconds > 0 for seconds in (*result.times.values(), *result.local.values()))
        assert result.step > 0
        assert result.bound(DistroConfig(k=4)) > 0
    with pytest.raises(ConfigError, match="checkout"):
        load_reference(tmp_path / "nowhere")


def test_engine_as_a_command(tmp_path):
    arguments = [
        "--millions",
        "0.2",
        "--chunk",
        "32",
        "--repeats",
        "1",
        "--json",
        str(tmp_path / "j"),
        "--png",
        str(tmp_path / "p.png"),
    ]
    assert main(["bench", "engine", *arguments]) == 0
    assert json.loads((tmp_path / "j").read_text())["models"][0]["times"]["encode"] > 0


def test_engine_on_several_devices(tmp_path, capsys):
    arguments = ["--millions", "0.4", "--chunk", "32", "--repeats", "1", "--devices", "2", "--threads", "1"]
    assert main(["bench", "engine", *arguments, "--json", str(tmp_path / "j")]) == 0
    figures = json.loads((tmp_path / "j").read_text())["devices"]
    assert [(one["device"], one["devices"]) for one in figures] == [(1, 1), (1, 2), (2, 2)]
    assert all(one["encode"] > 0 and one["apply"] > 0 for one in figures)
    assert "2 of 2" in capsys.readouterr().out


@pytest.mark.parametrize("local_steps", ["0", "2"])
def test_a_step_is_timed_with_each_strategy(tmp_path, capsys, local_steps):
    arguments = ["--steps", "5", "--repeats", "1", "--local-steps", local_steps, "--json", str(tmp_path / "j")]
    assert main(["bench", "step", *arguments]) == 0
    figures = json.loads((tmp_path / "j").read_text())
    assert set(figures["strategies"]) == {"default", "psyche"}
    assert all(cost[clock][0] > 0 for cost in figures["strategies"].values() for clock in ("cpu", "wall"))
    assert "1.00" in capsys.readouterr().out


def test_each_training_with_psyche_is_compared_with_those_of_ddp_around_it():
    found = Comparison(ddp=(90.0, 110.0, 150.0), psyche=(95.0, 143.0), waited=(0.1, 0.2))
    assert found.ratios == (0.95, 1.1)


def test_what_ddp_cannot_train_is_refused_with_a_way_out():
    with pytest.raises(ConfigError, match=r"divides by 5 \(5 nodes, 1 step each\).*global_batch_size_start=5"):
        Task("demo", (), False, nodes=5, rounds=1)
    assert Task("demo", ("distro.local_steps=4",), False, nodes=3, rounds=2).tokens == 2 * 24 * 128
    with pytest.raises(ConfigError, match=r"divides by 15 \(3 nodes, 5 steps each\)"):
        Task("demo", ("distro.local_steps=5",), False, nodes=3, rounds=1)
    with pytest.raises(ConfigError, match=r"trainer\.precision=32-true"):
        Task("demo", ("trainer.precision=bf16-mixed",), False, nodes=3, rounds=1)


def test_a_process_that_fails_stops_the_others(tmp_path):
    mark = tmp_path / "number"
    sleeps = f"import os, pathlib, time; pathlib.Path({str(mark)!r}).write_text(str(os.getpid())); time.sleep(600)"
    mark.touch()
    fails = (
        f"import pathlib, time\nwhile not pathlib.Path({str(mark)!r}).read_text(): time.sleep(0.01)\nexit('no luck')"
    )
    with pytest.raises(PsycheError, match="no luck"):
        run([["-c", sleeps], ["-c", fails]], tmp_path / "log")
    with pytest.raises(ProcessLookupError):
        os.kill(int(mark.read_text()), 0)


@pytest.mark.slow
def test_psyche_and_ddp_train_in_turn_with_processes_of_their_own(tmp_path, capsys):
    options = ["--twin", "--nodes", "2", "--rounds", "3", "--repeats", "1", "--json", str(tmp_path / "j")]
    assert main(["bench", "ddp", *options, "distro.local_steps=2"]) == 0
    figures = json.loads((tmp_path / "j").read_text())
    assert len(figures["ddp"]) == 2
    assert len(figures["psyche"]) == len(figures["ratios"]) == len(figures["waited"]) == 1
    assert all(speed > 0 for speed in (*figures["ddp"], *figures["psyche"]))
    assert "psyche / DDP" in capsys.readouterr().out


def test_fuzz_finds_nothing(tmp_path):
    assert main(["bench", "fuzz", "--inputs", "1000", "--seed", "3", "--json", str(tmp_path / "j")]) == 0
    figures = json.loads((tmp_path / "j").read_text())
    assert all(outcome["inputs"] == 1000 for outcome in figures.values())
    assert all(0 < outcome["accepted"] < 500 for outcome in figures.values())


def test_a_file_that_cannot_be_written_is_reported_first(tmp_path, capsys):
    assert main(["bench", "wire", "--json", str(tmp_path / "no" / "j")]) == 1
    assert "does not exist" in capsys.readouterr().err

"""A node of several ranks: to the run it is one, its ranks hold the same bytes, and it ends with a clear error."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from psyche_lightning import PsycheStrategy
from psyche_lightning.errors import ConfigError
from psyche_lightning.lightning.fabric import PsycheFabricStrategy
from psyche_lightning.lightning.world import check_devices
from psyche_lightning.server.admin import CoordinatorAdmin

Make = Callable[..., Any]
pytestmark = pytest.mark.timeout(600)  # many trainings, in two processes beside others
SCRIPT = Path(__file__).with_name("ranks_script.py")
PATIENCE = 540.0
CASES: list[dict[str, Any]] = [
    {"statistics": True, "equal": False},
    {"batch": 3, "steps": 3, "accumulate": 2},
    {"options": {"overlap": True, "lookahead": True}},
    {"options": {"local_steps": 4, "global_batch_size": 5}},
    {"dtype": "bfloat16"},
    {"fabric": {}, "batch": 3},
    {"fabric": {"local_steps": 2, "overlap": True}},
]


def start(cases: list[dict[str, Any]], **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), json.dumps(cases)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def found(text: str) -> list[dict[str, Any]]:
    decoder = json.JSONDecoder()
    return [decoder.raw_decode(part)[0] for part in text.split("FOUND ")[1:]]


def end(process: subprocess.Popen[str]) -> str:
    text, _ = process.communicate(timeout=PATIENCE)
    return text


def test_the_ranks_of_a_node_hold_the_same_bytes_and_train_what_one_device_would(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    two = start(CASES)
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), json.dumps([{**CASES[3], "devices": 1}])])
    runpy.run_path(str(SCRIPT))
    (alone,) = found(capsys.readouterr().out)
    text = end(two)
    assert two.returncode == 0, text
    results = found(text)
    first, others = ([one for one in results if one["rank"] == rank] for rank in (0, 1))
    assert len(first) == len(others) == len(CASES), text
    assert [one["digest"] for one in first] == [one["digest"] for one in others]
    assert [one["samples"] for one in first] == [8, 12, 8, 5, 8, 6, 16]
    assert [one["rounds"] for one in first[5:]] == [4, 2], "of twenty samples"
    assert alone["loss"] == pytest.approx(first[3]["loss"], rel=1e-5), "five samples in four steps"
    assert alone["samples"] == 5


def test_ranks_that_share_one_model_train_what_one_device_would(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    cases = [{**case, "options": {**case.get("options", {}), "inner": "fsdp"}} for case in CASES[1:5]]
    cases[1:] = [{**case, "muon": True} for case in cases[1:]]
    for case in CASES[5:]:
        for inner in ("fsdp", "ddp"):
            cases.append({**case, "fabric": {**case["fabric"], "inner": inner}, "equal": True, "scaled": True})
    cases[-2]["saved"] = str(tmp_path / "saved.ckpt")
    in_parts = {
        "fabric": {**cases[-2]["fabric"], "save_distributed_checkpoint": True},
        "saved": str(tmp_path / "parts"),
    }
    cases.append({**cases[-2], **in_parts})
    cases += [{"options": {"inner": "fsdp", "gradients": how}, "clip": None} for how in ("kept", "streamed")]
    two = start(cases)
    alone = [{**CASES[1], "batch": 6, "devices": 1}, {**CASES[3], "devices": 1, "muon": True}]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), json.dumps(alone)])
    runpy.run_path(str(SCRIPT))
    ones = found(capsys.readouterr().out)
    text = end(two)
    assert two.returncode == 0, text
    first, others = ([one for one in found(text) if one["rank"] == rank] for rank in (0, 1))
    assert len(first) == len(others) == len(cases), text
    assert [one["digest"] for one in first] == [one["digest"] for one in others]
    assert [one["samples"] for one in first] == [12, 8, 5, 8, 6, 6, 16, 16, 16, 8, 8]
    assert set(ones[0]["figures"]) == {"gradient_norm", "momentum_norm"}
    assert first[0]["figures"] == pytest.approx(ones[0]["figures"], rel=1e-3)
    assert ones[0]["loss"] == pytest.approx(first[0]["loss"], rel=1e-5)
    assert ones[1]["loss"] == pytest.approx(first[2]["loss"], rel=1e-2), "Muon computes in bfloat16"
    for divided, whole in (first[4:6], first[6:8]):
        assert divided["rounds"] == whole["rounds"]
        assert divided["loss"] == pytest.approx(whole["loss"], rel=1e-5)
    assert first[9]["digest"] == first[10]["digest"], "one micro-batch, streamed or not"
    assert [one["gradients"] for one in first[9:]] == [6, 0]
    for one in (first[6], others[6], first[8], others[8]):
        assert (one["loaded"], one["round"], one["left"]) == (first[6]["digest"], 2, [])
    shapes = {name: list(tensor.shape) for name, tensor in torch.load(tmp_path / "saved.ckpt")["model"].items()}
    assert shapes == {"scale": [], "0.weight": [2, 6], "0.bias": [2]}


def test_checkpoints_in_parts_resume_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trainer: Make) -> None:
    options = {"inner": "fsdp", "save_distributed_checkpoint": True, "local_steps": 2}
    case = {"options": options, "muon": True, "steps": 4, "saved": str(tmp_path / "saved")}
    resumed = {**case, "saved": str(tmp_path / "again"), "resumed": str(tmp_path / "saved" / "step=2.ckpt")}
    two = start([case, resumed])
    text = end(two)
    assert two.returncode == 0, text
    assert "delta begins empty" not in text
    assert [one["steps"] for one in found(text)] == [4] * 4
    assert len({one["digest"] for one in found(text)}) == 1
    assert {path.name for path in (tmp_path / "saved").iterdir()} == {"step=2.ckpt", "step=4.ckpt"}
    assert "state_dict" not in torch.load(tmp_path / "saved" / "step=2.ckpt" / "meta.pt", weights_only=False)

    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "[]"])
    script = runpy.run_path(str(SCRIPT))
    model = script["Model"](torch.nn.LayerNorm(8))
    data = torch.utils.data.TensorDataset(torch.ones(2, 6), torch.ones(2).long())
    one = trainer(strategy=PsycheStrategy(), num_sanity_val_steps=0)
    one.validate(model, torch.utils.data.DataLoader(data), ckpt_path=tmp_path / "saved" / "step=4.ckpt", verbose=False)
    assert script["digest"](model) == found(text)[0]["digest"], "one device has it as a whole"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trouble", "words"),
    [
        ([1, 2, "kill"], "rank 1 of this node's 2 ended, so the node ends: its process ended without a word"),
        ([1, 2, "memory"], "rank 1 of this node's 2 ended, so the node ends: OutOfMemoryError: this rank is out of"),
        ([0, 2, "memory"], "rank 0 of this node's 2 ended, so the node ends: OutOfMemoryError: this rank is out of"),
        ([1, 2, "terminate"], "rank 1 of this node's 2 ended, so the node ends: SIGTERMException"),
    ],
)
@pytest.mark.parametrize("inner", ["ddp", "fsdp"])
def test_a_rank_that_ends_ends_the_node(trouble: list[Any], words: str, inner: str) -> None:
    process = start([{"trouble": trouble, "steps": 50, "options": {"inner": inner}}])
    text = end(process)
    assert process.returncode != 0
    assert words in text
    assert "FOUND" not in text


def test_ranks_of_different_models_are_refused() -> None:
    process = start([{"other": True}])
    text = end(process)
    assert process.returncode != 0
    assert text.count("ConfigError: rank 1 of this node has another model, optimizer, data set") == 2, "on both ranks"


@pytest.mark.slow
@pytest.mark.parametrize("inner", ["ddp", "fsdp"])
def test_a_node_of_two_ranks_and_one_of_one_end_with_equal_parameters(
    create_run: Make, tmp_path: Path, inner: str
) -> None:
    url, run = create_run(init_min_clients=2)
    where = {"PSYCHE_COORDINATOR": url, "PSYCHE_RUN": run}
    cases = [{"devices": devices, "steps": 12, "directory": str(tmp_path / str(devices))} for devices in (1, 2)]
    cases[1]["options"] = {"inner": inner}
    nodes = [start([{**case, "equal": False}], **where) for case in cases]
    texts = [end(node) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], texts
    results = [one for text in texts for one in found(text)]
    assert len({one["digest"] for one in results}) == 1
    assert len(results) == 3
    status = CoordinatorAdmin(url).status(run)
    assert status["phase"] == "finished"
    assert len(status["clients"]) == 2, "a node of two ranks has one key"
    assert {path.name for path in tmp_path.iterdir()} == {"1", "2"}


@pytest.mark.slow
def test_the_run_goes_on_without_a_node_whose_rank_was_killed(create_run: Make) -> None:
    url, run = create_run(init_min_clients=3, min_clients=2, max_round_train_time=5)
    where = {"PSYCHE_COORDINATOR": url, "PSYCHE_RUN": run}
    killed = start([{"trouble": [1, 3, "kill"], "steps": 14}], **where)
    others = [start([{"devices": devices, "steps": 14}], **where) for devices in (1, 2)]
    text = end(killed)
    assert killed.returncode != 0
    assert "rank 1 of this node's 2 ended, so the node ends" in text
    texts = [end(node) for node in others]
    assert [node.returncode for node in others] == [0, 0], texts
    assert len({one["digest"] for text in texts for one in found(text)}) == 1


@pytest.mark.parametrize(
    ("devices", "words"),
    [
        (["cpu", "meta"], "the devices cpu, meta, but those of one node must all be of one kind"),
        (["cuda:0", "cuda:0"], "a device twice: cuda:0, cuda:0"),
        (["mps", "mps:1"], "this machine's accelerator 'mps' is one device"),
        (["cuda:0", "cuda:1"], "this build of torch lacks NCCL"),
    ],
)
def test_devices_that_cannot_train_together(devices: list[str], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    with pytest.raises(ConfigError, match=words):
        check_devices("Trainer", [torch.device(name) for name in devices])


def test_a_way_to_share_work_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match="inner is 'tp'; choose ddp"):
        PsycheStrategy(inner="tp")
    with pytest.raises(ConfigError, match="inner is 'tp'; choose ddp"):
        PsycheFabricStrategy(inner="tp")


def test_torchrun_and_devices_go_together(trainer: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "TORCHELASTIC_RUN_ID": "none"}.items():
        monkeypatch.setenv(name, value)
    for name, value in {"GROUP_RANK": "0", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "x", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=r"torchrun started 2 processes, but Trainer has devices=1\. Set devices=2"):
        trainer()

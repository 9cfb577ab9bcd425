"""A run that has stopped altogether goes on from what it left at an address, exactly."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.training import train_all

from psyche_lightning.checkpoints.address import open_storage
from psyche_lightning.checkpoints.folder import newest, scan
from psyche_lightning.checkpoints.manifest import Metadata
from psyche_lightning.cli import main
from psyche_lightning.coordinator.creation import create_host
from psyche_lightning.errors import CheckpointError, ConfigError
from psyche_lightning.recipe import load_recipe
from psyche_lightning.recipe.config import Recipe
from psyche_lightning.recipe.manifest import manifest
from psyche_lightning.server.admin import CoordinatorAdmin
from psyche_lightning.train.runner import train_recipe
from psyche_lightning.train.saving import Beginning, begin, say_changes

# With the whole update sent and nothing kept of it, DisTrO has no state: going on is then exact.
STATELESS = ["decay=0", "optimizer.name=adamw", "checkpoint.keep=9", "schedule.kind=constant", "warmup_steps=0"]


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    (folder / "all.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 400)
    return folder


@pytest.fixture
def recipe(text: Path) -> Recipe:
    overrides = [f"data.config.path={text}", "micro_batch_size=4", "schedule.final_lr=null", *STATELESS]
    return load_recipe("demo", overrides, twin=True)


def with_checkpoint(recipe: Recipe, **values: Any) -> Recipe:
    return replace(recipe, checkpoint=replace(recipe.checkpoint, **values))


def with_steps(recipe: Recipe, steps: int) -> Recipe:
    return replace(recipe, run=replace(recipe.run, total_steps=steps))


def manifest_at(address: str) -> Any:
    return newest(address).manifest


def test_a_single_node_resumes_exactly(recipe: Recipe, tmp_path: Path, cache: Path, memory: str) -> None:
    whole = train_recipe(recipe, directory=tmp_path / "whole")
    first = train_recipe(with_checkpoint(with_steps(recipe, 2), to=memory), directory=tmp_path / "first")
    saved = manifest_at(memory)
    assert saved.digest == first["digest"]
    assert (saved.metadata.step, saved.metadata.data_index) == (2, 8)
    second = train_recipe(with_checkpoint(recipe, resume=memory, every=2), directory=tmp_path / "second")
    assert second["digest"] == whole["digest"]
    assert scan(open_storage(str(tmp_path / "second" / "checkpoints"))) == {4: True}
    rows = [json.loads(line) for line in (tmp_path / "second" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [3, 4]
    old = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert [(r["step"], r["loss"], r["lr"]) for r in rows if "loss" in r] == [
        (r["step"], r["loss"], r["lr"]) for r in old if "loss" in r and r["step"] > 2
    ]


def test_resuming_with_other_values_says_each_of_them(
    recipe: Recipe, tmp_path: Path, cache: Path, said: Callable[[], list[str]]
) -> None:
    train_recipe(with_steps(recipe, 1), directory=tmp_path / "first")
    resumed = with_checkpoint(with_steps(recipe, 2), resume=str(tmp_path / "first" / "checkpoints"))
    said()
    train_recipe(resumed, directory=tmp_path / "same")
    assert not [line for line in said() if "another" in line]
    (tmp_path / "other.txt").write_text("jackdaws love my big sphinx of quartz\n" * 400)
    data = replace(recipe.data, seq_len=32, config={**recipe.data.config, "path": str(tmp_path / "other.txt")})
    changed = replace(resumed, optimizer=replace(recipe.optimizer, lr=5e-4), data=data)
    train_recipe(changed, directory=tmp_path / "changed")
    lines = said()
    for field, here, there in (("optimizer.schedule.base_lr", "0.0005", "0.006"), ("data.seq_len", "32", "64")):
        assert f"the run resumes with another {field}: {here}, was {there} in the checkpoint" in lines
    assert [line for line in lines if "another data.fingerprint: " in line]
    assert [line for line in lines if line.startswith("the data index 4 counts samples of the former data")]


def test_a_checkpoint_that_names_no_values(recipe: Recipe, said: Callable[[], list[str]]) -> None:
    say_changes(Beginning({}, resumed=Metadata("run", 3, 1, 12, "ab" * 32)), manifest(recipe))
    assert said() == ["the run resumes with other values than its checkpoint was trained with, which it does not name"]
    say_changes(Beginning({}), manifest(recipe))
    assert said() == []


@pytest.mark.parametrize("overlap", [False, True])
def test_a_checkpoint_on_the_way_says_what_it_contains(recipe: Recipe, tmp_path: Path, overlap: bool) -> None:
    run = replace(recipe.run, overlap=overlap, total_steps=7)
    train_recipe(with_checkpoint(replace(recipe, run=run), every=2), directory=tmp_path / "node")
    storage = open_storage(str(tmp_path / "node" / "checkpoints"))
    digests = {}
    for step, whole in scan(storage).items():
        assert whole
        digests[step] = manifest_at(storage.name(f"step-{step:06d}")).digest
    assert {7} < digests.keys() <= set(range(2, 8))  # one is late while the one before is still being written
    assert len({step // 2 for step in digests if step < 7}) == len(digests) - 1
    for step, digest in digests.items():
        alone = train_recipe(with_steps(replace(recipe, run=run), step), directory=tmp_path / f"to-{step}")
        assert alone["digest"] == digest, f"the checkpoint of step {step} has other parameters"


def test_checkpoints_that_cannot_be_resumed(recipe: Recipe, tmp_path: Path, cache: Path, memory: str) -> None:
    with pytest.raises(CheckpointError, match="no complete checkpoint at memory://bucket/run"):
        train_recipe(with_checkpoint(recipe, resume=memory), directory=tmp_path / "a")
    train_recipe(with_checkpoint(recipe, to=memory), directory=tmp_path / "b")
    with pytest.raises(ConfigError, match=r"has 4 steps already, and run\.total_steps is 4; raise it"):
        train_recipe(with_checkpoint(recipe, resume=memory), directory=tmp_path / "c")


def test_an_address_that_cannot_be_written_fails_at_the_start(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for address, message in ((f"{tmp_path}/file/x", "cannot write to"), ("s3://bucket/x", "s3fs")):
        with pytest.raises((CheckpointError, ConfigError), match=message):
            train_recipe(with_checkpoint(recipe, to=address), directory=tmp_path / "node")
    assert not (tmp_path / "node" / "result.json").exists()


# --- with a coordinator -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with coordinator() as address:
        yield address


@contextmanager
def coordinator() -> Iterator[str]:
    """A real one on a port of the system's choice, in a thread."""
    import asyncio

    from psyche_lightning.server.server import CoordinatorServer
    from psyche_lightning.server.store import MemoryStore

    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    server = CoordinatorServer(MemoryStore())
    address: str = asyncio.run_coroutine_threadsafe(server.start("127.0.0.1", 0), loop).result(30)
    try:
        yield address
    finally:
        asyncio.run_coroutine_threadsafe(server.stop(), loop).result(30)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)


def test_a_new_run_resumes_a_stopped_run_of_two(
    recipe: Recipe, text: Path, tmp_path: Path, cache: Path, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shared = str(tmp_path / "shared")
    nodes = replace(recipe.run, init_min_clients=2, waiting_for_members_extra_time=0.05)
    recipe = replace(with_checkpoint(recipe, to=shared, every=1), run=nodes)
    given = ["--twin", f"data.config.path={text}", *STATELESS, "schedule.final_lr=null", "init_min_clients=2"]
    given += ["waiting_for_members_extra_time=0.05", "--coordinator", url]
    assert main(["run", "create", "first", "demo", *given, "total_steps=2"]) == 0
    first = train_all([with_steps(recipe, 2)] * 2, url, "first", [tmp_path / f"first-{place}" for place in (0, 1)])
    assert first[0]["digest"] == first[1]["digest"] == manifest_at(shared).digest

    assert main(["run", "create", "second", "demo", *given, f"checkpoint.resume={shared}"]) == 0
    assert "resuming after step 2" in capsys.readouterr().out
    assert CoordinatorAdmin(url).status("second")["step"] == 3
    on = with_checkpoint(recipe, resume=shared)
    with pytest.raises(ConfigError, match="resumes from the checkpoint of step 2, but this node starts at step 1"):
        train_recipe(with_checkpoint(recipe, to=None), coordinator_url=url, run_id="second", directory=tmp_path / "x")
    second = train_all([on, on], url, "second", [tmp_path / f"second-{place}" for place in (0, 1)])
    assert second[0]["digest"] == second[1]["digest"] == manifest_at(shared).digest
    saved = manifest_at(shared).metadata
    assert (saved.step, saved.run, saved.data_index) == (4, "second", 16)
    rows = (tmp_path / "second-0" / "metrics.jsonl").read_text().splitlines()
    assert {json.loads(row)["step"] for row in rows if "tokens_per_second" in row} == {3, 4}
    with pytest.raises(ConfigError, match="the run begins with step 1"):
        train_recipe(on, coordinator_url=url, run_id="first", directory=tmp_path / "y")


def test_a_node_joins_a_resumed_run_late(
    recipe: Recipe, make: Any, tmp_path: Path, said: Callable[[], list[str]]
) -> None:
    """It begins with the checkpoint that the run began with, or with a newer one where that is not kept any more."""
    for step in (2, 3):
        make(tmp_path, step)
    first = {"step": 2, "data_index": 20, "digest": manifest_at(str(tmp_path)).digest}
    on = with_checkpoint(recipe, resume=str(tmp_path))
    found = begin(on, {"start": first})
    assert (found.start, found.options["path"]) == ((2, 20), str(tmp_path / "step-000002"))
    with pytest.raises(ConfigError, match="is not the checkpoint of step 2 that the run was created from"):
        begin(on, {"start": {**first, "digest": "00" * 32}})
    open_storage(str(tmp_path)).remove("step-000002")
    said()
    found = begin(on, {"start": first})
    assert (found.section, found.options["path"]) == (first, str(tmp_path / "step-000003"))
    assert "this node takes the newest one" in said()[0]


def test_where_a_run_begins() -> None:
    start = {"step": 5, "data_index": 70, "digest": "ab" * 32}
    body: dict[str, Any] = {"run_id": "r", "manifest": {"start": start}, "config": {"total_steps": 9}}
    state = create_host(body, bytes).state
    assert (state.step, state.start_step, state.epoch_start_data_index) == (6, 6, 70)
    for other in ({}, 1, {"step": -1, "data_index": 0}, {"step": True, "data_index": 0}, {"step": 5}):
        with pytest.raises(ConfigError, match="section start"):
            create_host({**body, "manifest": {"start": other}}, bytes)
    with pytest.raises(ConfigError, match="total_steps is 5; total_steps counts from the very beginning"):
        create_host({**body, "config": {"total_steps": 5}}, bytes)

"""Checkpoints are written in the background, in order, complete or not at all, by one node or the next."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from psyche_lightning.checkpoints.address import Storage, open_storage
from psyche_lightning.checkpoints.folder import fetch_newest, scan
from psyche_lightning.checkpoints.manifest import NAME, Metadata, folder_name
from psyche_lightning.checkpoints.model import ModelCopy
from psyche_lightning.checkpoints.writer import Worker, Writer, copy_newest
from psyche_lightning.errors import CheckpointError

Make = Callable[[Path, int], Path]

pytestmark = pytest.mark.usefixtures("quiet")


def metadata(step: int) -> Metadata:
    return Metadata("run", step, 1, 10 * step, "ab" * 32)


def writer(folder: Path, to: str | None = None, **options: Any) -> Writer:
    values: dict[str, Any] = {"keep": 2, "extra": {}, "pauses": (), "sleep": lambda seconds: None, **options}
    return Writer(folder, None if to is None else open_storage(to), **values)


class Gate(ModelCopy):
    """A copy that is saved when the test says so."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__(model)
        self.open = threading.Event()

    def save(self, folder: Path) -> None:
        assert self.open.wait(30)
        super().save(folder)


def test_the_checkpoints_that_a_run_leaves(model: Any, tmp_path: Path, memory: str) -> None:
    one = writer(tmp_path, memory, extra={"tokenizer_config.json": b"{}"})
    for step in (10, 20, 30):
        one.save(lambda: ModelCopy(model, "model."), metadata(step), 0, last=True)
    one.finish(30)
    assert scan(open_storage(str(tmp_path / "checkpoints"))) == scan(open_storage(memory)) == {20: True, 30: True}
    assert (tmp_path / "checkpoint").resolve() == (tmp_path / "checkpoints" / folder_name(30)).resolve()
    found, _ = fetch_newest(memory, tmp_path / "cache")
    assert found.manifest.metadata == metadata(30)
    assert "tokenizer_config.json" in found.manifest.files
    assert not list(tmp_path.rglob("*.new"))


def test_training_goes_on_while_the_copy_is_written(model: Any, tmp_path: Path, said: Callable[[], list[str]]) -> None:
    one = writer(tmp_path)
    weight = next(iter(model.parameters()))
    before = weight.detach().clone()
    gate = Gate(model)
    assert one.save(lambda: gate, metadata(10), None)
    with torch.no_grad():
        weight.add_(1)  # what training does meanwhile is not in it
    try:
        assert not one.save(lambda: pytest.fail("no second copy"), metadata(20), None)
        assert said() == ["the checkpoint of step 20 is skipped: an earlier one is still being written"]
        gate.open.set()
        one.finish(10)
    finally:
        with torch.no_grad():
            weight.copy_(before)
    from transformers import AutoModelForCausalLM

    again: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint", local_files_only=True)
    assert torch.equal(next(iter(again.parameters())), before)


def test_tied_parameters_stay_tied(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"vocab_size": 32, "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 16}
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **sizes))
    model.save_pretrained(tmp_path / "plain")
    ModelCopy(model).save(tmp_path / "copied")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "copied" / name).read_bytes()


def test_a_model_of_another_kind_is_written_at_once(tmp_path: Path) -> None:
    class Own(torch.nn.Linear):
        def save_pretrained(self, folder: Path) -> None:
            folder.mkdir()
            (folder / "config.json").write_text(threading.current_thread().name)

    one = writer(tmp_path)
    one.save(lambda: ModelCopy(Own(2, 2)), metadata(1), None)
    one.finish(1)
    assert (tmp_path / "checkpoint" / "config.json").read_text() == threading.current_thread().name


def test_an_address_that_is_away_for_a_while(
    model: Any, tmp_path: Path, memory: str, monkeypatch: pytest.MonkeyPatch, said: Callable[[], list[str]]
) -> None:
    slept, upload = [], Storage.upload

    def unlucky(storage: Storage, folder: Path, name: str) -> None:
        if len(slept) < 2:
            raise CheckpointError("the line is down")
        upload(storage, folder, name)

    monkeypatch.setattr(Storage, "upload", unlucky)
    one = writer(tmp_path, memory, pauses=(1.0, 5.0), sleep=slept.append)
    one.save(lambda: ModelCopy(model), metadata(10), 0, last=True)
    one.finish(10)
    assert slept == [1, 5]
    assert said() == ["the line is down; trying again in 1 s", "the line is down; trying again in 5 s"]
    assert scan(open_storage(memory)) == {10: True}


def test_an_address_that_stays_away(
    model: Any, tmp_path: Path, memory: str, monkeypatch: pytest.MonkeyPatch, said: Callable[[], list[str]]
) -> None:
    def failing(storage: Storage, folder: Path, name: str) -> None:
        raise CheckpointError("the line is down")

    monkeypatch.setattr(Storage, "upload", failing)
    one = writer(tmp_path, memory)
    one.save(lambda: ModelCopy(model), metadata(10), 0, last=True)
    with pytest.raises(CheckpointError, match=r"the line is down\. The checkpoint of step 10 is in .*step-000010"):
        one.finish(10)
    one.finish(20)  # what failed on the way is said and does not stop a training
    assert len(said()) == 1
    assert (tmp_path / "checkpoint" / "model.safetensors").is_file()


def test_a_folder_that_cannot_be_written(model: Any, tmp_path: Path, said: Callable[[], list[str]]) -> None:
    one = writer(tmp_path)
    (tmp_path / "checkpoints" / f"{folder_name(10)}.new").write_text("in the way")
    (tmp_path / "checkpoints" / folder_name(10)).write_text("in the way")
    one.save(lambda: ModelCopy(model), metadata(10), None)
    with pytest.raises(CheckpointError, match=r"cannot write the checkpoint .*step-000010"):
        one.finish(10)
    with pytest.raises(CheckpointError, match=r"cannot write the checkpoint .*step-000010"):
        one.check()  # in the next round
    with pytest.raises(CheckpointError, match=r"cannot write the checkpoint .*step-000010"):
        one.save(lambda: ModelCopy(model), metadata(20), None)


# --- several writers --------------------------------------------------------------------------------------------------


def test_only_writers_write(model: Any, tmp_path: Path, memory: str) -> None:
    one = writer(tmp_path, memory)
    one.save(lambda: ModelCopy(model), metadata(10), None, last=True)
    one.finish(10)
    assert open_storage(memory).entries() == {}


def test_the_second_writer_leaves_it_to_the_first(model: Any, tmp_path: Path, memory: str) -> None:
    first = writer(tmp_path / "a", memory)
    first.save(lambda: ModelCopy(model), metadata(10), 0, last=True)
    first.finish(10)
    before = open_storage(memory).read(f"{folder_name(10)}/{NAME}", 1 << 20)
    slept: list[float] = []
    second = writer(tmp_path / "b", memory, sleep=slept.append, extra={"more.txt": b"more"})
    second.save(lambda: ModelCopy(model), metadata(10), 1, last=True)
    second.finish(10)
    assert slept == []
    assert open_storage(memory).read(f"{folder_name(10)}/{NAME}", 1 << 20) == before


def test_the_second_writer_takes_over(model: Any, tmp_path: Path, memory: str, said: Callable[[], list[str]]) -> None:
    """The first one dies in the middle: what it has written is replaced, once nothing new has come for a while."""
    storage = open_storage(memory)
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 20:  # the first one's only sign of life
            storage._fs.pipe_file("/bucket/run/step-000010/config.json", b"half of it")

    second = writer(tmp_path, memory, sleep=sleep, takeover=60.0)
    second.save(lambda: ModelCopy(model), metadata(10), 1, last=True)
    second.finish(10)
    assert sum(slept) == pytest.approx(20 * 2 + 60, abs=2)
    assert said() == ["writing memory://bucket/run/step-000010, because the node before this one did not"]
    assert fetch_newest(memory, tmp_path / "cache")[0].manifest.metadata.step == 10


def test_other_parameters_of_the_same_step_replace_those_there(model: Any, tmp_path: Path, memory: str) -> None:
    """An epoch that was not agreed is trained again."""
    first = writer(tmp_path, memory)
    first.save(lambda: ModelCopy(model), metadata(10), 0, last=True)
    first.finish(10)
    changed = copy.deepcopy(model)
    with torch.no_grad():
        next(iter(changed.parameters())).add_(1)
    made = ModelCopy(changed)
    again = writer(tmp_path, memory)
    again.save(lambda: made, metadata(10), 0, last=True)
    again.finish(10)
    assert fetch_newest(memory, tmp_path / "cache")[0].manifest.digest == made.digest().hex()


def test_one_that_was_damaged_there_is_replaced(model: Any, tmp_path: Path, memory: str) -> None:
    storage = open_storage(memory)
    storage._fs.pipe_file(f"/bucket/run/{folder_name(10)}/{NAME}", b"{")
    one = writer(tmp_path, memory)
    one.save(lambda: ModelCopy(model), metadata(10), 0, last=True)
    one.finish(10)
    assert fetch_newest(memory, tmp_path / "cache")[0].manifest.metadata.step == 10


# --- parts ------------------------------------------------------------------------------------------------------------


def test_only_the_newest_waiting_task_is_done() -> None:
    worker, gate, done = Worker("test"), threading.Event(), []
    started = threading.Event()

    def first() -> None:
        started.set()
        gate.wait(30)

    assert worker.start(first, 1) is None
    assert started.wait(30)
    assert worker.start(lambda: done.append(2), 2) is None
    assert worker.start(lambda: done.append(3), 3) == 2
    assert worker.busy
    gate.set()
    worker.wait()
    assert done == [3]
    assert not worker.busy


def test_a_finished_task_is_released_before_waiting_threads_go_on() -> None:
    """A thread that frees tensors, which lets others run, while Python ends: that aborts the process."""
    forgotten = []

    class Work:
        def __call__(self) -> None:
            pass

        def __del__(self) -> None:
            time.sleep(0.1)
            forgotten.append(True)

    worker = Worker("test")
    worker.start(Work())
    worker.wait()
    assert forgotten


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_failure_does_not_block_waiting_threads() -> None:
    worker = Worker("test")
    worker.start(lambda: 1 / 0)
    worker.wait()


def test_copying_from_one_address_to_another(make: Make, tmp_path: Path, memory: str) -> None:
    make(tmp_path / "run", 10)
    make(tmp_path / "run", 20)
    assert copy_newest(str(tmp_path / "run"), memory, tmp_path / "cache") == f"{memory}/step-000020"
    assert scan(open_storage(memory)) == {20: True}

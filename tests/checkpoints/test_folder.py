"""Checkpoints at addresses: found, checked, fetched, and what is said when they are not what they should be."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from psyche_lightning.checkpoints.address import open_storage
from psyche_lightning.checkpoints.folder import fetch, fetch_newest, local_model, newest, prune, removable, scan
from psyche_lightning.checkpoints.manifest import NAME, Manifest, folder_name, step_of
from psyche_lightning.errors import CheckpointError, ConfigError

Make = Callable[[Path, int], Path]

pytestmark = pytest.mark.usefixtures("quiet")


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


# --- manifest ---------------------------------------------------------------------------------------------------------


def test_manifests_round_trip(make: Make, tmp_path: Path) -> None:
    data = (make(tmp_path, 7) / NAME).read_bytes()
    manifest = Manifest.parse(data, "here")
    assert manifest.text().encode() == data
    assert (manifest.metadata.step, manifest.metadata.data_index, manifest.metadata.run) == (7, 70, "run")
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= manifest.files.keys()
    assert manifest.size == sum(path.stat().st_size for path in (tmp_path / folder_name(7)).iterdir()) - len(data)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "its format is 2"),
        ({"step": -1}, "not a whole number"),
        ({"step": True}, "not a whole number"),
        ({"digest": "x"}, "not a SHA-256"),
        ({"files": {}}, "0 files"),
        ({"files": {"../evil": {"size": 1, "sha256": "0" * 64}}}, "not a name of a file"),
        ({"files": {"/etc/passwd": {"size": 1, "sha256": "0" * 64}}}, "not a name of a file"),
        ({"files": {".hidden": {"size": 1, "sha256": "0" * 64}}}, "not a name of a file"),
        ({"files": {NAME: {"size": 1, "sha256": "0" * 64}}}, "not a name of a file"),
        ({"files": {"a": {"size": -1, "sha256": "0" * 64}}}, "not a number of bytes"),
        ({"files": [1]}, "not the manifest"),
    ],
)
def test_other_manifests_are_refused(make: Make, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    values = json.loads((make(tmp_path, 7) / NAME).read_bytes()) | change
    del values["checksum"]
    with pytest.raises(CheckpointError, match=message):
        Manifest.parse(json.dumps(values).encode(), "here")


@pytest.mark.parametrize("name", ["run", "step", "epoch", "data_index", "digest", "recipe", "files", "checksum"])
def test_a_damaged_manifest_is_refused(make: Make, tmp_path: Path, name: str) -> None:
    text = (make(tmp_path, 7) / NAME).read_text()
    value = json.loads(text)[name]
    other = value + 1 if isinstance(value, int) else {} if isinstance(value, dict) else "0" * 64
    with pytest.raises(CheckpointError, match="it is damaged: its checksum is wrong"):
        Manifest.parse(json.dumps(json.loads(text) | {name: other}).encode(), "here")


@pytest.mark.parametrize("data", [b"", b"[]", b"null", b"{}", b"\xff", b"[" * 100_000])
def test_other_bytes_are_not_a_manifest(data: bytes) -> None:
    with pytest.raises(CheckpointError, match="here is not the manifest of a checkpoint"):
        Manifest.parse(data, "here")


def test_names_of_folders() -> None:
    assert folder_name(120) == "step-000120"
    assert [step_of(name) for name in ("step-000120", "step-1234567", "step-120", "step-0000120", "x")] == [
        120,
        1234567,
        None,
        None,
        None,
    ]


# --- fetching ---------------------------------------------------------------------------------------------------------


def test_the_newest_complete_one_is_taken(make: Make, tmp_path: Path) -> None:
    for step in (10, 20, 30):
        make(tmp_path, step)
    (tmp_path / folder_name(30) / NAME).unlink()
    (tmp_path / "notes.txt").write_text("not a checkpoint")
    assert scan(open_storage(str(tmp_path))) == {10: True, 20: True, 30: False}
    found, folder = fetch_newest(str(tmp_path), tmp_path / "cache")
    assert (found.manifest.metadata.step, folder) == (20, tmp_path / folder_name(20))
    assert fetch_newest(str(tmp_path), tmp_path, step=10)[1] == tmp_path / folder_name(10)
    assert fetch_newest(str(tmp_path / folder_name(10)), tmp_path)[0].manifest.metadata.step == 10


@pytest.mark.parametrize("how", ["changed", "shorter", "missing", "manifest"])
def test_the_checkpoint_before_a_damaged_one_is_used(
    make: Make, tmp_path: Path, how: str, said: Callable[[], list[str]]
) -> None:
    make(tmp_path, 10)
    weights = make(tmp_path, 20) / "model.safetensors"
    if how == "changed":
        flip(weights)
    elif how == "shorter":
        weights.write_bytes(weights.read_bytes()[:-1])
    elif how == "missing":
        weights.unlink()
    else:
        (weights.parent / NAME).write_text("{")
    found, _ = fetch_newest(str(tmp_path), tmp_path / "cache")
    assert found.manifest.metadata.step == 10
    (line,) = said()
    assert "step-000020" in line
    assert "trying the one before it" in line
    assert ("model.safetensors" in line) == (how != "manifest")
    with pytest.raises(CheckpointError, match="step-000020"):
        fetch_newest(str(tmp_path), tmp_path / "cache", step=20)


def test_when_all_are_damaged_the_newest_is_named(make: Make, tmp_path: Path, said: Callable[[], list[str]]) -> None:
    for step in (10, 20):
        flip(make(tmp_path, step) / "config.json")
    with pytest.raises(CheckpointError, match=r"no checkpoint of .* is usable; the newest: .*step-000020"):
        fetch_newest(str(tmp_path), tmp_path / "cache")


def test_a_renamed_folder_is_refused(make: Make, tmp_path: Path, said: Callable[[], list[str]]) -> None:
    make(tmp_path, 10).rename(tmp_path / folder_name(20))
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        newest(str(tmp_path))


def test_from_an_address_it_is_copied_once(make: Make, tmp_path: Path, memory: str) -> None:
    storage = open_storage(memory)
    storage.upload(make(tmp_path, 10), folder_name(10))
    cache = tmp_path / "cache"
    found, folder = fetch_newest(memory, cache)
    assert cache in folder.parents
    assert {path.name for path in folder.iterdir()} == set(found.manifest.files)
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    flip(folder / "config.json")
    fetch(found, cache)
    after = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert {name for name in after if after[name] != before[name]} == {"config.json"}
    few = fetch(found, tmp_path / "few", weights=False)
    assert "model.safetensors" not in {path.name for path in few.iterdir()}


def test_an_address_that_changes_under_way(make: Make, tmp_path: Path, memory: str) -> None:
    storage = open_storage(memory)
    storage.upload(make(tmp_path, 10), folder_name(10))
    found = newest(memory)
    fs = fsspec.filesystem("memory")
    fs.pipe_file("/bucket/run/step-000010/model.safetensors", b"something else")
    with pytest.raises(CheckpointError, match=r"damaged, or changed meanwhile: model\.safetensors has 14 bytes"):
        fetch(found, tmp_path / "cache")
    fs.rm_file("/bucket/run/step-000010/tokenizer.json")
    fs.pipe_file("/bucket/run/step-000010/model.safetensors", (tmp_path / "step-000010/model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match=r"cannot read memory://bucket/run/step-000010/tokenizer\.json"):
        fetch(found, tmp_path / "cache")


# --- addresses --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "error", "message"),
    [
        (
            "/no/such/place",
            CheckpointError,
            r"no complete checkpoint at /no/such/place: .*step-000120.*found nothing",
        ),
        ("memory://nowhere", CheckpointError, "no complete checkpoint at memory://nowhere"),
        ("memry://bucket/run", ConfigError, r"unknown protocol\. Did you mean 'memory'\?"),
        ("s3://", ConfigError, "nothing after s3://"),
        ("http://127.0.0.1:1/run", CheckpointError, "http://127.0.0.1:1/run"),
    ],
)
def test_addresses_with_nothing(address: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        newest(address)


def test_a_protocol_whose_package_is_missing() -> None:
    import importlib.util

    address = "s3://bucket/run" if importlib.util.find_spec("s3fs") is None else "gs://bucket/run"
    with pytest.raises(ConfigError, match=r"needs a package that is not installed: .*Install (s3fs|gcsfs)"):
        open_storage(address)


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot write to .*file/run"):
        open_storage(str(tmp_path / "file" / "run")).prepare()


@pytest.mark.parametrize("kind", ["file", "memory"])
def test_uploads_are_complete_only_with_their_manifest(make: Make, tmp_path: Path, memory: str, kind: str) -> None:
    address = memory if kind == "memory" else f"file://{tmp_path}/there"
    storage = open_storage(address)
    storage.prepare()
    folder = make(tmp_path / "here", 10)
    written: list[str] = []
    put = type(storage._fs).put_file

    def watched(fs: Any, local: str, remote: str, **options: Any) -> None:
        written.append(remote.rpartition("/")[2])
        if len(written) == 3 and not failed:
            failed.append(remote)
            raise OSError("the line is down")
        put(fs, local, remote, **options)

    failed: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(storage._fs), "put_file", watched)
        with pytest.raises(CheckpointError, match="the line is down"):
            storage.upload(folder, folder.name)
        assert scan(storage) == {10: False}
        written.clear()
        storage.upload(folder, folder.name)
    assert written[-1] == NAME
    assert set(written) == {path.name for path in folder.iterdir()}
    assert scan(storage) == {10: True}
    storage.remove(folder.name)
    assert storage.entries() == {}


# --- pruning ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("found", "keep", "gone"),
    [
        ({}, 3, []),
        ({1: True, 2: True, 3: True, 4: True}, 2, [1, 2]),
        ({1: True, 2: False, 3: True}, 2, [2]),
        ({1: True, 2: False}, 1, []),
        ({1: False, 2: False}, 1, []),
        ({1: True}, 0, []),
    ],
)
def test_which_checkpoints_are_removable(found: dict[int, bool], keep: int, gone: list[int]) -> None:
    assert removable(found, keep) == gone


@given(st.dictionaries(st.integers(0, 50), st.booleans()), st.integers(1, 5), st.sets(st.integers(0, 50)))
def test_the_newest_complete_checkpoint_is_never_removable(found: dict[int, bool], keep: int, spare: set[int]) -> None:
    gone = set(removable(found, keep, spare))
    complete = sorted(step for step, whole in found.items() if whole)
    assert not gone & set(complete[-keep:])
    assert not gone & spare
    left = [step for step in complete if step not in gone]
    assert not complete or left[-1] == complete[-1]
    assert all(found[step] or (complete and step < complete[-1]) for step in gone)


def test_pruning_removes_folders(make: Make, tmp_path: Path) -> None:
    for step in (10, 20, 30, 40):
        make(tmp_path, step)
    (tmp_path / folder_name(30) / NAME).unlink()
    (tmp_path / "other").mkdir()
    assert prune(open_storage(str(tmp_path)), 1, spare={20}) == [10, 30]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "step-000020", "step-000040"]


# --- a model's path ---------------------------------------------------------------------------------------------------


def test_the_path_for_a_model(
    make: Make, saved: Path, tmp_path: Path, memory: str, said: Callable[[], list[str]]
) -> None:
    checkpoints = make(tmp_path / "run", 10).parent
    assert local_model(str(saved)) == str(saved)
    assert local_model("owner/name@main") == "owner/name@main"
    assert local_model(str(checkpoints)) == str(checkpoints / folder_name(10))
    assert local_model(f"file://{saved}") == str(saved)
    open_storage(memory).upload(checkpoints / folder_name(10), folder_name(10))
    folder = Path(local_model(memory, cache=tmp_path / "cache"))
    assert (folder / "model.safetensors").read_bytes() == (saved / "model.safetensors").read_bytes()
    assert [f"from {storage}/step-000010" in line for storage, line in zip((checkpoints, memory), said(), strict=True)]
    shape = Path(local_model(memory, weights=False, cache=tmp_path / "shape"))
    assert (shape / "config.json").is_file()
    assert not (shape / "model.safetensors").exists()


def test_a_plain_model_at_an_address(saved: Path, tmp_path: Path, memory: str) -> None:
    open_storage(memory).upload(saved, "model")
    folder = Path(local_model(f"{memory}/model", cache=tmp_path / "cache"))
    assert {path.name for path in folder.iterdir()} == {path.name for path in saved.iterdir()}
    with pytest.raises(CheckpointError, match="There is nothing at memory://bucket/other"):
        local_model("memory://bucket/other")


def test_anyone_can_load_one(make: Make, model: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = make(tmp_path, 10)
    again: Any = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert AutoTokenizer.from_pretrained(folder, local_files_only=True)("abc")["input_ids"] == [97, 98, 99]
    shutil.rmtree(folder)

"""The Hub's own client against a server on this machine: checkpoints there, and models by their names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from support.hub import LARGE, LocalHub

from psyche_lightning.checkpoints.address import open_storage
from psyche_lightning.checkpoints.folder import fetch_newest, local_model, prune, scan
from psyche_lightning.checkpoints.manifest import NAME, folder_name
from psyche_lightning.errors import CheckpointError

Make = Callable[[Path, int], Path]

pytestmark = pytest.mark.usefixtures("quiet")


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_checkpoint_is_uploaded_and_fetched(hub: LocalHub, make: Make, tmp_path: Path) -> None:
    repository = hub.add("me/run")
    storage = open_storage("hf://me/run/deep/inside")
    storage.prepare()
    here = make(tmp_path, 10)
    storage.upload(here, here.name)
    assert repository.messages == ["first", "step-000010: files", "step-000010: manifest"]
    assert not any(name.endswith(NAME) for name in list(repository.commits.values())[1])
    assert any(len(data) >= LARGE for data in repository.files.values()), "nothing went by LFS"
    assert scan(storage) == {10: True}
    found, folder = fetch_newest("hf://me/run/deep/inside", tmp_path / "cache")
    assert content(folder) == {name: data for name, data in content(here).items() if name != NAME}
    assert str(found) == "hf://me/run/deep/inside/step-000010"


def test_pruning_there(hub: LocalHub, make: Make, tmp_path: Path) -> None:
    repository = hub.add("me/run")
    storage = open_storage("hf://me/run")
    for step in (1, 2, 3):
        storage.upload(make(tmp_path, step), folder_name(step))
    assert prune(storage, 2) == [1]
    assert scan(storage) == {2: True, 3: True}
    assert repository.messages[-1] == "step-000001: removed"
    assert ".gitattributes" in repository.files


def test_a_revision_does_not_change(hub: LocalHub, make: Make, tmp_path: Path) -> None:
    repository = hub.add("me/run")
    storage = open_storage("hf://me/run")
    storage.upload(make(tmp_path, 1), folder_name(1))
    first = next(reversed(repository.commits))
    storage.upload(make(tmp_path, 2), folder_name(2))
    assert fetch_newest("hf://me/run", tmp_path / "cache")[0].manifest.metadata.step == 2
    assert fetch_newest(f"hf://me/run@{first}", tmp_path / "cache")[0].manifest.metadata.step == 1


def test_damage_and_change_there(hub: LocalHub, make: Make, tmp_path: Path, said: Callable[[], list[str]]) -> None:
    repository = hub.add("me/run")
    storage = open_storage("hf://me/run")
    for step in (1, 2):
        storage.upload(make(tmp_path, step), folder_name(step))
    repository.commit({**repository.files, "step-000002/config.json": b"{}"}, "someone else's")
    assert fetch_newest("hf://me/run", tmp_path / "cache")[0].manifest.metadata.step == 1
    assert "config.json has 2 bytes" in said()[0]


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("hf://me/other", "the repository does not exist, or this machine's user may not see it"),
        ("hf://me/run@nothing", "hf://me/run@nothing"),
        ("hf://single", "hf://single"),
    ],
)
def test_addresses_that_are_not_there(hub: LocalHub, address: str, message: str) -> None:
    hub.add("me/run")
    with pytest.raises(CheckpointError, match=message):
        open_storage(address).prepare()


def test_without_the_right_to_write(hub: LocalHub, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("me/run")
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    with pytest.raises(CheckpointError, match=r"cannot write hf://me/run/step-000001: HfHubHTTPError"):
        open_storage("hf://me/run").upload(make(tmp_path, 1), folder_name(1))


def test_offline(hub: LocalHub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE is set, so the Hub is not asked"):
        open_storage("hf://me/run")


def test_a_plain_model_there(hub: LocalHub, saved: Path, tmp_path: Path) -> None:
    hub.add("me/model", content(saved))
    folder = Path(local_model("hf://me/model", cache=tmp_path / "cache"))
    assert content(folder) == content(saved)

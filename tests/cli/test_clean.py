"""``psyche clean`` removes what finished runs need no more, and nothing else."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path

import pytest

from psyche_lightning.cli import main
from psyche_lightning.node.journal import Journal
from psyche_lightning.node.notices import Finished, Outcome
from psyche_lightning.node.status import FILE, StatusFile
from psyche_lightning.node.store import DirectoryBlobStore
from psyche_lightning.wire.canonical import sha256
from psyche_lightning.wire.identity import Identity

OVER = str(Finished(Outcome.LAST_PARAMETERS))
BLOB = bytes(1000)


def node(folder: Path, left: str | None) -> Path:
    """A node's folder with one blob, delta, and two checkpoints."""
    Identity.load_or_create(folder / "node.key")
    DirectoryBlobStore(folder / "blobs").put(BLOB)
    with contextlib.closing(Journal(folder / "journal")) as journal:
        journal.append("promise", b"kept")
    StatusFile(folder / FILE).write(run="mine", left=left)
    (folder / "delta.safetensors").write_bytes(bytes(500))
    for step in (10, 20):
        saved = folder / "checkpoints" / f"step-{step:06d}"
        saved.mkdir(parents=True)
        (saved / "manifest.json").write_text("{}")
    (folder / "checkpoint").symlink_to(saved)
    return folder


def has_blob(folder: Path) -> bool:
    return DirectoryBlobStore(folder / "blobs").has(sha256(BLOB))


def test_only_finished_nodes_are_cleaned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = node(tmp_path / "demo" / "node-0", OVER)
    killed = node(tmp_path / "demo" / "node-1", None)
    stopped = node(tmp_path / "psyche-other", "Ctrl-C")
    unknown = node(tmp_path / "odd", OVER)
    (unknown / FILE).unlink()
    assert main(["clean", str(tmp_path), "--yes"]) == 0
    shown = capsys.readouterr().out
    assert "of 1 node" in shown
    for reason in ("it has not left its run", "Ctrl-C", f"it has no {FILE}"):
        assert reason in shown
    assert sorted(path.name for path in done.iterdir()) == [
        "checkpoint", "checkpoints", "journal", "node.key", FILE
    ]  # fmt: skip
    for folder in (killed, stopped, unknown):
        assert has_blob(folder)
        assert (folder / "delta.safetensors").exists()


def test_nothing_goes_without_a_yes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    done = node(tmp_path / "node", OVER)
    monkeypatch.chdir(tmp_path)
    assert main(["clean"]) == 0
    assert "nothing is removed; --yes removes it" in capsys.readouterr().out
    assert has_blob(done)


def test_old_checkpoints_go_only_if_asked_for(tmp_path: Path) -> None:
    done = node(tmp_path / "node", OVER)
    assert main(["clean", str(done), "--yes"]) == 0
    assert len(list((done / "checkpoints").iterdir())) == 2
    assert main(["clean", str(done), "--yes", "--checkpoints"]) == 0
    assert [path.name for path in (done / "checkpoints").iterdir()] == ["step-000020"]
    assert (done / "checkpoint" / "manifest.json").exists()


def test_a_node_that_runs_keeps_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    running, done = node(tmp_path / "a", OVER), node(tmp_path / "b", OVER)
    journal = str(running / "journal")
    hold = (
        f"from psyche_lightning.node.journal import Journal; held = Journal({journal!r}); print(1, flush=True); input()"
    )
    with subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline()
        assert main(["clean", str(tmp_path), "--yes"]) == 1
        holder.communicate(b"\n")
    said = capsys.readouterr()
    assert "of 1 node" in said.out
    assert f"Not removed: {running}: " in said.err
    assert "another process uses the journal" in said.err
    assert has_blob(running)
    assert not (done / "blobs").exists()


def test_a_folder_that_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["clean", str(tmp_path / "nowhere")]) == 1
    assert f"There is no folder {tmp_path / 'nowhere'}" in capsys.readouterr().err
    assert main(["clean", str(tmp_path)]) == 0
    assert "none has a node.key" in capsys.readouterr().out

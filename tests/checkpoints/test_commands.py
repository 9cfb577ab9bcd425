"""``psyche checkpoints`` and ``psyche generate`` at addresses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from psyche_lightning.checkpoints.address import open_storage
from psyche_lightning.checkpoints.folder import scan
from psyche_lightning.checkpoints.manifest import NAME, folder_name
from psyche_lightning.cli import main

Make = Callable[[Path, int], Path]


def test_a_list_of_what_is_there(make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for step in (10, 20):
        make(tmp_path, step)
    assert main(["checkpoints", str(tmp_path), "--verify"]) == 0
    rows = [line.split("│")[1:] for line in capsys.readouterr().out.splitlines() if "│ run " in line]
    assert [(row[0].strip(), row[-2].strip()) for row in rows] == [("20", "yes"), ("10", "yes")]
    (tmp_path / folder_name(20) / "config.json").write_text("{}")
    assert main(["checkpoints", str(tmp_path), "--verify"]) == 1
    captured = capsys.readouterr()
    assert "damaged" in captured.out
    assert "config.json has 2 bytes" in " ".join(captured.err.split())


def test_of_a_nodes_folder_its_checkpoints_are_listed(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "node.key").write_bytes(bytes(32))
    assert main(["checkpoints", str(tmp_path)]) == 1
    assert f"at {tmp_path / 'checkpoints'}" in "".join(capsys.readouterr().err.split("\n"))
    make(tmp_path / "checkpoints", 10)
    assert main(["checkpoints", str(tmp_path)]) == 0
    assert "│ 10 " in capsys.readouterr().out


def test_a_checkpoint_whose_manifest_cannot_be_read_is_damaged_too(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (10, 20):
        make(tmp_path, step)
    (tmp_path / folder_name(20) / NAME).write_text("{")
    assert main(["checkpoints", str(tmp_path), "--verify"]) == 1
    assert f"{folder_name(20)} is damaged: its {NAME} cannot be read" in " ".join(capsys.readouterr().err.split())


def test_a_copy_elsewhere_from_which_anyone_generates(
    make: Make, tmp_path: Path, memory: str, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path, 10)
    assert main(["checkpoints", str(tmp_path), "--to", memory]) == 0
    assert scan(open_storage(memory)) == {10: True}
    assert f"copied to {memory}/step-000010" in capsys.readouterr().out
    assert main(["generate", memory, "--prompt", "a", "--max-new-tokens", "2", "--seed", "1"]) == 0
    captured = capsys.readouterr()
    assert captured.out
    assert "loading the parameters of step 10" in captured.err
    assert main(["checkpoints", f"{memory}/other"]) == 1
    assert "There is no complete checkpoint at memory://bucket/run/other" in " ".join(capsys.readouterr().err.split())

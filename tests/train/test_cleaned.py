"""What a finished run leaves in a node's folder, and what ``psyche clean`` leaves of that."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from psyche_lightning.cli import main
from psyche_lightning.errors import UnfinishedError
from psyche_lightning.node.snapshot import decode_index
from psyche_lightning.node.store import DirectoryBlobStore
from psyche_lightning.recipe import load_recipe
from psyche_lightning.train.runner import train_recipe


def test_a_finished_run_leaves_its_last_parameters_and_clean_frees_them(
    text: Path, tmp_path: Path, create_run: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    own = [f"data.config.path={text}", "total_steps=4", "validate_every=0", "digest_every=1"]
    recipe = load_recipe("demo", own, twin=True)
    url, run = create_run(init_min_clients=1, global_batch_size_start=4)
    folder = tmp_path / "nodes" / "0"
    result = train_recipe(recipe, coordinator_url=url, run_id=run, directory=folder)
    store = DirectoryBlobStore(folder / "blobs")
    index = store.get(bytes.fromhex(result["digest"]))
    assert index is not None
    last = {bytes.fromhex(result["digest"]), *(piece.digest for piece in decode_index(index).pieces)}
    assert {bytes.fromhex(file.name) for file in (folder / "blobs").glob("??/*")} == last

    assert main(["clean", str(tmp_path), "--yes"]) == 0
    assert "of 1 node" in capsys.readouterr().out
    assert not (folder / "blobs").exists()
    assert {path.name for path in folder.iterdir()} >= {
        "node.key",
        "journal",
        "ledger.jsonl",
        "checkpoint",
        "result.json",
    }
    with pytest.raises(UnfinishedError, match="or from its checkpoints"):  # it has nothing to give any more
        train_recipe(recipe, coordinator_url=url, run_id=run, directory=folder)

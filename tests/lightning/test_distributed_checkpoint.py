"""Checkpoints in parts: what cannot be written or read ends all ranks with one error."""

from __future__ import annotations

from pathlib import Path

import pytest
from lightning.fabric import Fabric
from ranks import in_parts, run

from psyche_lightning import PsycheStrategy
from psyche_lightning.errors import CheckpointError, ConfigError
from psyche_lightning.lightning.distributed_checkpoint import META, is_distributed
from psyche_lightning.lightning.fabric import PsycheFabricStrategy


def test_a_rank_that_cannot_write_or_read_its_part_is_an_error_of_all(tmp_path: Path) -> None:
    first, second = run(in_parts.troubles, str(tmp_path))
    assert first[:2] == second[:2]
    assert first[0] == f"cannot write the checkpoint {tmp_path}/file/saved: Not a directory"
    assert first[1] == f"cannot write the checkpoint {tmp_path}/taken: No space left on device"
    for told in (first, second):
        assert "Missing key in checkpoint state_dict: state_dict.bias" in told[2]
        assert "Size mismatch" in told[3]
    assert not (tmp_path / "taken" / META).exists()


def test_a_folder_that_is_no_checkpoint_is_explained(tmp_path: Path) -> None:
    assert not is_distributed(tmp_path / "nothing")
    with pytest.raises(
        CheckpointError, match=r"without meta\.pt: no checkpoint, or one that was not written to its end"
    ):
        is_distributed(tmp_path)
    (tmp_path / META).touch()
    fabric = Fabric(strategy=PsycheFabricStrategy(), accelerator="cpu", devices=1)
    with pytest.raises(ConfigError, match=r"Give a dictionary, such as fabric\.load\(path, "):
        fabric.load(tmp_path)


@pytest.mark.parametrize("strategy", [PsycheStrategy, PsycheFabricStrategy])
def test_only_a_divided_model_is_saved_in_parts(strategy: type[PsycheStrategy]) -> None:
    with pytest.raises(ConfigError, match=r"with inner='ddp' each has all of it; set inner='fsdp', or leave it out"):
        strategy(save_distributed_checkpoint=True)

"""No rank of a node with ``inner="fsdp"`` ever holds the whole model, and its parts are as if one had."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import filling, run

from psyche_lightning.builtin.models import hf
from psyche_lightning.checkpoints.deferred import built

pytestmark = pytest.mark.slow  # several processes


def save(fields: dict[str, Any], folder: Path, dtype: torch.dtype = torch.bfloat16) -> Any:
    torch.manual_seed(1)
    model: Any = built(lambda: hf(fields), dtype)
    model.save_pretrained(folder)
    return model


def test_parts_of_ranks_are_those_of_the_whole_model(tmp_path: Path) -> None:
    model = save(filling.TIED, tmp_path / "saved", torch.float32)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[-1, -1] = torch.nan  # on the last rank
    model.save_pretrained(tmp_path / "saved-bad")
    for new, read in run(filling.same, str(tmp_path / "saved"), timeout=300.0):
        assert "the model begins with values that are not finite" in new
        assert "in 1 parameter such as 'model.model.layers.1.mlp.up_proj.weight'" in read


def test_no_rank_holds_the_whole_model() -> None:
    for peak, parameters, largest in run(filling.peak, filling.LARGE, filling.FEW, timeout=300.0):
        assert parameters > 100_000_000
        assert (
            peak < parameters + 16 * largest < 2 * parameters
        )  # its half in bfloat16, and one tensor as it is made and sent


def test_a_rank_reads_no_more_than_its_part_of_a_checkpoint(tmp_path: Path) -> None:
    for name, fields in (("large", filling.LARGE), ("few", filling.FEW)):
        save(fields, tmp_path / name)
    folders = [{"path": str(tmp_path / name)} for name in ("large", "few")]
    for peak, parameters, largest in run(filling.peak, *folders, timeout=300.0):
        assert parameters > 100_000_000
        assert peak < parameters + 4 * largest < 1.5 * parameters  # its half in bfloat16, and one part

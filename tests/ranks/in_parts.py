"""What ranks do in ``tests/lightning/test_distributed_checkpoint.py``: they write and read checkpoints in parts."""

from pathlib import Path

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from psyche_lightning.distro.shards import Ranks
from psyche_lightning.errors import CheckpointError
from psyche_lightning.lightning.distributed_checkpoint import load, save


def troubles(folder: str) -> list[str]:
    """The errors of a checkpoint that cannot be written by all, by one rank, and of those that cannot be read."""
    ranks, mesh = Ranks(), init_device_mesh("cpu", (2,))
    whole = torch.arange(6.0).view(3, 2)
    parts = {"state_dict": {"weight": distribute_tensor(whole, mesh, [Shard(0)])}}
    (Path(folder) / "file").touch()
    told = []

    def attempt(work):
        try:
            work()
        except CheckpointError as error:
            told.append(str(error))

    attempt(lambda: save(Path(folder) / "file" / "saved", parts, None, {}, ranks))
    unwritable = {"fails": Unwritable()} if ranks.rank else {}
    attempt(lambda: save(Path(folder) / "taken", parts, unwritable, {}, ranks))
    save(Path(folder) / "saved", parts, {"rank": ranks.rank}, {"epoch": 1}, ranks)
    attempt(lambda: load(Path(folder) / "saved", {"state_dict": {"bias": torch.zeros(2)}}))
    attempt(lambda: load(Path(folder) / "saved", {"state_dict": {"weight": torch.zeros(2, 2)}}))
    found = torch.zeros(3, 2)
    load(Path(folder) / "saved", {"state_dict": {"weight": found}})
    assert torch.equal(found, whole)
    return told


class Unwritable:
    """What no file can hold."""

    def __reduce__(self):
        raise OSError(28, "No space left on device")

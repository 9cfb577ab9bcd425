"""What ranks do in ``tests/lightning/test_filling.py``: they fill a model, of which each keeps its part."""

from typing import Any

import torch
import torch.distributed as dist

from psyche_lightning.builtin.models import hf
from psyche_lightning.checkpoints import deferred
from psyche_lightning.checkpoints.deferred import built, outlined
from psyche_lightning.checkpoints.dtypes import tensors
from psyche_lightning.distro.shards import Ranks
from psyche_lightning.errors import CheckpointError
from psyche_lightning.lightning.sharding import shard
from psyche_lightning.lightning.world import World

from .sharded import memory

SMALL = {"vocab_size": 50, "num_hidden_layers": 2, "num_attention_heads": 1, "hidden_size": 33, "intermediate_size": 37}
TIED = {"model_type": "gemma", "num_key_value_heads": 1, "head_dim": 16, **SMALL}
LARGE = {
    "model_type": "llama", "vocab_size": 8192, "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 13,
    "num_attention_heads": 12,
}  # fmt: skip
FEW = {**LARGE, **SMALL, "hidden_size": 32}


def _world() -> World:
    return World(dist.get_rank(), dist.get_world_size(), torch.device("cpu"), [])


def _filled(fields: dict[str, Any], seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    model, values = outlined(lambda: hf(fields), torch.bfloat16)
    module = torch.nn.ModuleDict({"model": model})
    shard(module, _world(), values={f"model.{name}": value for name, value in values.items()})
    return module


def same(folder: str) -> list[str]:
    """Compare with a model that one process builds or reads; gives the errors of those with values not finite."""
    deferred.LEAST = 8
    torch.manual_seed(3)
    wanted: Any = built(lambda: hf(TIED), torch.bfloat16)
    _compare(_filled(TIED, 3 + dist.get_rank()), wanted)  # rank 0's values count
    saved = {"path": folder}
    _compare(_filled(saved), built(lambda: hf(saved), torch.bfloat16))
    return [_refused({**TIED, "initializer_range": float("inf")}), _refused({"path": f"{folder}-bad"})]


def _refused(fields: dict[str, Any]) -> str:
    try:
        _filled(fields)
    except CheckpointError as error:
        return str(error)
    return "it was taken"


def _compare(module: Any, wanted: Any) -> None:
    ours = module["model"]
    assert ours.lm_head.weight is ours.model.embed_tokens.weight
    tokens = torch.arange(9)[None]
    with torch.no_grad():  # it gathers what is there by then
        assert torch.equal(ours(input_ids=tokens).logits, wanted(input_ids=tokens).logits)
    ranks = Ranks()
    ranks.reshard(ours)
    found = dict(tensors(ours))
    for name, value in tensors(wanted):
        whole = ranks.whole(found[name])
        assert whole is None or (whole.dtype == value.dtype and torch.equal(whole, value)), name


def peak(fields: dict[str, Any], small: dict[str, Any]) -> tuple[int, int, int]:
    """The peak of a rank above what it had before, in bytes; parameters of the model, and of its largest tensor.

    Args:
        fields: of the model.
        small: of another one that comes first, so that torch has what it loads once.
    """
    _filled(small)
    start = memory("VmRSS")
    model = _filled(fields)
    sizes = [one.numel() for one in model.parameters()]
    return memory("VmHWM") - start, sum(sizes), max(sizes)

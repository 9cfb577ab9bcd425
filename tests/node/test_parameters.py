"""A torch module as the replica that a node drives."""

from __future__ import annotations

import asyncio
from functools import partial

import pytest
import torch
from ranks import run, sharded

from psyche_lightning.distro import DisTrO, DistroConfig
from psyche_lightning.errors import ConfigError, PayloadError, WireError
from psyche_lightning.node.download import Downloads
from psyche_lightning.node.parameters import ParameterReplica, persistent_buffers
from psyche_lightning.node.snapshot import PIECE_SIZE, TensorEntry, decode_index, encode_index
from psyche_lightning.node.store import MemoryBlobStore
from psyche_lightning.wire.canonical import sha256


def module(seed: int, dtype: torch.dtype = torch.float32, width: int = 8) -> torch.nn.Module:
    torch.manual_seed(seed)
    made = torch.nn.Sequential(torch.nn.Linear(6, width), torch.nn.BatchNorm1d(width), torch.nn.Linear(width, 2))
    made.register_buffer("scratch", torch.randn(2), persistent=False)
    made[2].bias.requires_grad_(False)
    made[2].bias.data.normal_()
    return made.to(dtype)


def replica(of: torch.nn.Module) -> ParameterReplica:
    return ParameterReplica(DisTrO(of.named_parameters(), lr=0.1, config=DistroConfig(k=4)), of)


def get(store: MemoryBlobStore):  # type: ignore[no-untyped-def]
    def found(digest: bytes) -> bytes:
        data = store.get(digest)
        assert data is not None
        return data

    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parameters_go_from_one_module_to_another(dtype: torch.dtype) -> None:
    mine, theirs, store = module(0, dtype), module(1, dtype), MemoryBlobStore()
    digest = replica(mine).snapshot(store.put)
    taken = replica(theirs)
    assert taken.digest(store.put) != digest
    taken.load(digest, get(store))
    assert taken.digest(store.put) == digest
    for (name, a), b in zip(mine.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_the_digest_is_that_of_the_index_and_stores_no_tensor() -> None:
    store = MemoryBlobStore()
    digest = replica(module(0)).digest(store.put)
    index = store.get(digest)
    assert index is not None
    assert sha256(index) == digest
    entries = decode_index(index).tensors
    assert [entry.name for entry in entries] == ["0.bias", "0.weight", "1.bias", "1.weight", "2.bias", "2.weight"]
    assert not any(store.has(piece) for entry in entries for piece in entry.pieces)


def test_frozen_parameters_are_part_of_it() -> None:
    of = module(0)
    before = replica(of).digest(MemoryBlobStore().put)
    of[2].bias.data.add_(1)  # type: ignore[union-attr, operator, index]
    assert replica(of).digest(MemoryBlobStore().put) != before


def test_large_tensors_travel_in_pieces() -> None:
    width = PIECE_SIZE // (6 * 4) + 1
    mine, theirs, store = module(0, width=width), module(1, width=width), MemoryBlobStore()
    digest = replica(mine).snapshot(store.put)
    index = store.get(digest)
    assert index is not None
    assert max(len(entry.pieces) for entry in decode_index(index).tensors) == 2
    replica(theirs).load(digest, get(store))
    assert torch.equal(mine[0].weight, theirs[0].weight)  # type: ignore[index, union-attr, arg-type]


def test_buffers_that_are_saved_are_copied() -> None:
    mine, theirs, store = module(0), module(1), MemoryBlobStore()
    mine.train()(torch.randn(4, 6))
    assert sorted(persistent_buffers(mine)) == ["1.num_batches_tracked", "1.running_mean", "1.running_var"]
    taken = replica(theirs)
    assert taken.has_buffers
    scratch = theirs.scratch.clone()  # type: ignore[operator, union-attr]
    taken.load_buffers(replica(mine).snapshot_buffers(store.put), get(store))
    for a, b in zip(persistent_buffers(mine).values(), persistent_buffers(theirs).values(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(theirs.scratch, scratch)  # type: ignore[arg-type]


def test_applying_is_the_optimizer_s() -> None:
    of = module(0)
    mine = replica(of)
    with pytest.raises(PayloadError):
        mine.check(b"nonsense", 1)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (lambda entries: entries[1:], "lacks 1 parameters of this model, such as 0.bias"),
        (lambda entries: [*entries, TensorEntry("zz", "float32", (), 4, (bytes(32),))], "has unknown 1 parameters"),
        (
            lambda entries: [TensorEntry("0.bias", "float32", (2, 4), 32, entries[0].pieces), *entries[1:]],
            r"'0.bias' of the snapshot is float32 \[2, 4\]; this model has float32 \[8\]",
        ),
        (
            lambda entries: [TensorEntry("0.bias", "bfloat16", (8,), 16, entries[0].pieces), *entries[1:]],
            r"is bfloat16 \[8\]; this model has float32 \[8\]",
        ),
    ],
)
def test_another_model_s_parameters_are_refused_untouched(other, words: str) -> None:  # type: ignore[no-untyped-def]
    of, store = module(0), MemoryBlobStore()
    mine = replica(of)
    index = store.get(mine.snapshot(store.put))
    assert index is not None
    before = mine.digest(store.put)
    wrong = store.put(encode_index(other(decode_index(index).tensors)))
    with pytest.raises(WireError, match=words):
        mine.load(wrong, get(store))
    assert mine.digest(store.put) == before
    data = store.get(wrong)
    assert data is not None
    with pytest.raises(WireError, match=words):
        mine.check_index(decode_index(data), buffers=False)


def test_only_what_this_model_has_is_fetched() -> None:
    """The index is looked at before a single piece is asked for."""
    large, asked = MemoryBlobStore(), []
    foreign = replica(module(0, width=64)).snapshot(large.put)

    class Peers:
        async def fetch(self, digest: bytes, providers: object, **options: object) -> bytes:
            asked.append(digest)
            data = large.get(digest)
            assert data is not None
            return data

    mine, store = replica(module(0)), MemoryBlobStore()
    downloads = Downloads(Peers(), store)  # type: ignore[arg-type]
    with pytest.raises(WireError, match="this model has float32"):
        asyncio.run(downloads.obtain(foreign, [b"p" * 32], partial(mine.check_index, buffers=False)))
    assert asked == [foreign]
    asyncio.run(downloads.obtain(foreign, [b"p" * 32]))
    assert len(asked) > 5


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_parameters_that_are_not_finite_are_refused(value: float) -> None:
    theirs, store = module(1), MemoryBlobStore()
    with torch.no_grad():
        theirs[2].weight[0, 0] = value
    digest = replica(theirs).snapshot(store.put)
    mine = module(0)
    before = {name: tensor.clone() for name, tensor in mine.state_dict().items()}
    with pytest.raises(WireError, match=r"the parameter '2\.weight' of the snapshot has values that are not finite"):
        replica(mine).load(digest, get(store))
    assert all(torch.equal(tensor, before[name]) for name, tensor in mine.state_dict().items())  # none was replaced


@pytest.mark.parametrize(("value", "taken"), [(float("nan"), False), (float("inf"), True)])
def test_buffers_that_are_no_numbers_are_refused(value: float, taken: bool) -> None:
    """Infinite ones may be a mask's."""
    theirs, mine = (torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2)) for _ in range(2))
    store = MemoryBlobStore()
    theirs[1].running_mean.fill_(3.0)  # type: ignore[operator, union-attr]
    theirs[1].running_var[0] = value  # type: ignore[index, operator]
    index = replica(theirs).snapshot_buffers(store.put)
    if taken:
        replica(mine).load_buffers(index, get(store))
    else:
        with pytest.raises(WireError, match=r"the buffer '1\.running_var' has values that are no numbers"):
            replica(mine).load_buffers(index, get(store))
    assert mine[1].running_mean.tolist() == [3.0 * taken] * 2  # type: ignore[operator, union-attr]


def test_a_piece_of_another_size_is_refused() -> None:
    store = MemoryBlobStore()
    mine = replica(module(0))
    index = store.get(mine.snapshot(store.put))
    assert index is not None
    first, *rest = decode_index(index).tensors
    wrong = TensorEntry(first.name, first.dtype, first.shape, first.size, (store.put(b"short"),))
    with pytest.raises(WireError, match=r"a piece of '0.bias' has 5 bytes; 32 are expected"):
        mine.load(store.put(encode_index([wrong, *rest])), get(store))


def test_dtypes_without_a_place_in_a_snapshot() -> None:
    of = module(0)
    of.register_buffer("phase", torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(ConfigError, match=r"'phase' is torch.complex64"):
        replica(of)


def test_a_fingerprint_shows_every_single_bit_and_only_the_tensor_that_has_it() -> None:
    of = module(0)
    mine = replica(of)
    before = mine.prints()
    assert mine.tensors == ("0.bias", "0.weight", "1.bias", "1.weight", "2.weight")
    assert len(before) == 8 * len(mine.tensors)
    for bit in (0, 13, 31):
        with torch.no_grad():
            of[2].weight.view(torch.int32)[0, 1] ^= torch.tensor(1, dtype=torch.int32) << bit  # type: ignore[index, union-attr, operator]
        after = mine.prints()
        differing = [i for i in range(len(mine.tensors)) if after[8 * i : 8 * i + 8] != before[8 * i : 8 * i + 8]]
        assert [mine.tensors[i] for i in differing] == ["2.weight"]
        before = after


def test_the_size_of_a_snapshot_is_known_before() -> None:
    store = MemoryBlobStore()
    mine = replica(module(0))
    index = store.get(mine.snapshot(store.put))
    assert index is not None
    assert mine.size == decode_index(index).size


@pytest.mark.slow
def test_a_snapshot_goes_from_one_device_to_two_ranks_and_back() -> None:
    first, second = run(sharded.replicas)
    assert len(first) == 2
    assert "lacks" in first[1]
    assert first == second

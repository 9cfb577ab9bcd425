"""Data ids to samples, and shares to micro-batches."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset

from psyche_lightning.data.order import DataOrder
from psyche_lightning.lightning.loader import RoundLoader
from psyche_lightning.node.participant import RoundWork

PINNED = [6, 7, 1, 9, 8, 3, 2, 5, 4, 0, 7, 3, 5, 1, 2, 6, 0, 4, 8, 9]


@given(st.integers(1, 300), st.integers(0, 2**64 - 1), st.integers(0, 5))
def test_each_pass_is_a_permutation(length: int, seed: int, epoch: int) -> None:
    order = DataOrder(length, True, seed)
    indices = order.indices(epoch * length, (epoch + 1) * length)
    assert sorted(indices) == list(range(length))


@given(st.integers(1, 50), st.booleans(), st.integers(0, 200), st.integers(0, 60))
def test_an_index_depends_on_nothing_but_its_id(length: int, shuffle: bool, start: int, count: int) -> None:
    order = DataOrder(length, shuffle, 7)
    stop = start + count
    assert order.indices(start, stop) == [order.indices(i, i + 1)[0] for i in range(start, stop)]


def test_the_order_is_the_same_on_every_machine() -> None:
    assert DataOrder(10, True, 0).indices(0, 20) == PINNED
    assert DataOrder(4, False, 0).indices(2, 10) == [2, 3, 0, 1, 2, 3, 0, 1]


class Numbers(Dataset[int]):
    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> int:
        return index


def rounds(loader: RoundLoader, start: int, stop: int) -> tuple[list[int], list[list[int]]]:
    share = loader.load(RoundWork(0, 0, 1, ((start, stop),)))
    return share.sizes, [batch.tolist() for batch in share.rest]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_share_is_cut_into_micro_batches_as_equal_as_can_be(workers: int) -> None:
    loader = RoundLoader(DataLoader(Numbers(), batch_size=4, num_workers=workers), 30, 0, lambda: iter(()))
    try:
        assert len(loader) == 1
        assert rounds(loader, 0, 10) == ([3, 3, 4], [[0, 1, 2], [3, 4, 5], [6, 7, 8, 9]])
        assert rounds(loader, 18, 22) == ([4], [[18, 19, 0, 1]])
        assert rounds(loader, 5, 6) == ([1], [[5]])
    finally:
        loader.close()


def test_workers_live_as_long_as_the_loader() -> None:
    class Where(Numbers):
        def __getitem__(self, index: int) -> int:
            info = torch.utils.data.get_worker_info()
            assert info is not None
            return int(torch.multiprocessing.current_process().pid or 0)

    loader = RoundLoader(DataLoader(Where(), batch_size=4, num_workers=1), 8, 0, lambda: iter(()))
    try:
        found = {pid for start in (0, 8, 16) for batch in rounds(loader, start, start + 8)[1] for pid in batch}
    finally:
        loader.close()
    assert len(found) == 1


def test_the_user_s_collate_function_is_used() -> None:
    collate: Callable[[list[int]], Any] = lambda items: torch.tensor(items) * 10  # noqa: E731
    loader = RoundLoader(DataLoader(Numbers(), batch_size=2, collate_fn=collate), 8, 0, lambda: iter(()))
    assert rounds(loader, 3, 5) == ([2], [[30, 40]])


def test_micro_batches_that_the_collate_function_leaves_out_do_not_come() -> None:
    collate: Callable[[list[int]], Any] = lambda items: None if 4 in items or 8 in items else torch.tensor(items)  # noqa: E731
    loader = RoundLoader(DataLoader(Numbers(), batch_size=2, collate_fn=collate), 8, 0, lambda: iter(()))
    assert rounds(loader, 0, 10) == ([2, 2, 2], [[0, 1], [2, 3], [6, 7]])
    assert rounds(loader, 4, 8) == ([2], [[6, 7]])
    left_out = loader.load(RoundWork(0, 0, 1, ((4, 5), (8, 9))))
    assert (list(left_out.rest), left_out.sizes) == ([None], [2])


def test_a_copy_is_the_users_loader() -> None:
    """A Trainer that was fitted holds one, and may be pickled."""
    loader = RoundLoader(DataLoader(Numbers(), batch_size=5), 10, 0, lambda: iter(()))
    copied = pickle.loads(pickle.dumps(loader))
    assert type(copied) is DataLoader
    assert [len(batch) for batch in copied] == [5, 5, 5, 5]

"""What the parameters contain after a round, and who writes them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from psyche_lightning.lightning.standing import after_round, at_the_end
from psyche_lightning.protocol.state import Checkpoint, CoordinatorConfig, Phase, Round, RunState

NODES = (b"a" * 32, b"b" * 32, b"c" * 32)


def state(batch: int = 6, height: int = 3) -> RunState:
    rounds = tuple(
        Round(height=h, step=11 + h, seed=100 + h, data_index=batch * (10 + h), batch_size=batch, clients=NODES)
        for h in range(height + 1)
    )
    return RunState(
        "run", config=CoordinatorConfig(witness_nodes=0), epoch=2, rounds=rounds, head=height, step=11 + height
    )


@pytest.mark.parametrize(
    ("overlap", "height", "step", "data_index"),
    [
        (False, 0, 11, 66),
        (False, 3, 14, 84),
        (True, 0, 10, 60),
        (True, 1, 10, 60),
        (True, 2, 11, 66),
        (True, 3, 12, 72),
    ],
)
def test_what_they_contain(overlap: bool, height: int, step: int, data_index: int) -> None:
    found = after_round(state(), 2, height, overlap=overlap)
    assert found is not None
    assert (found.step, found.data_index, found.epoch) == (step, data_index, 2)


def test_writers_are_those_who_trained_and_take_turns() -> None:
    first = []
    for height in range(4):
        found = after_round(state(), 2, height, overlap=False)
        assert found is not None
        assert sorted(found.writers) == sorted(NODES)
        assert sorted(found.rank(node) or 0 for node in NODES) == [0, 1, 2]
        first.append(found.writers[0])
    assert len(set(first)) == 3
    few = after_round(state(batch=2), 2, 1, overlap=False)
    assert few is not None
    assert len(few.writers) == 2
    assert sum(few.rank(node) is None for node in NODES) == 1


def test_a_round_that_is_not_known() -> None:
    assert after_round(state(), 3, 1, overlap=False) is None
    assert after_round(state(), 2, 9, overlap=False) is None


def test_at_the_end_those_write_whose_votes_were_agreed() -> None:
    digest, other = b"d" * 32, b"e" * 32
    votes = ((NODES[2], 14, digest), (NODES[0], 14, other), (NODES[1], 14, digest))
    end = replace(state(), phase=Phase.FINISHED, checkpoint=Checkpoint(digest, 14), checkpoint_votes=votes)
    found = at_the_end(end)
    assert found is not None
    assert (found.step, found.data_index, found.writers) == (14, 84, (NODES[2], NODES[1]))
    assert at_the_end(replace(end, checkpoint=Checkpoint())) is None

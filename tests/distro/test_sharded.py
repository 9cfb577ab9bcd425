"""DisTrO by several ranks: to the bit what one device makes, in a share of its memory."""

import pytest
import torch
from ranks import run, sharded

from psyche_lightning.distro import Layout
from psyche_lightning.distro.fragments import fragments
from psyche_lightning.errors import ConfigError

CASES = [
    ({"chunk": 16, "k": 4, "lookahead": True, "k_for": {"inner*": 2}}, "float32"),
    ({"chunk": 8, "k": 3, "schedule": [{"from_step": 3, "k": 5}]}, "bfloat16"),
    ({"chunk": 16, "k": 4, "decay": 0.9, "local_steps": 1, "scale": 1.5}, "float32"),
    ({"chunk": 16, "k": 4, "decay": 0.9, "local_steps": 1, "k_for": {"inner*": 6}}, "bfloat16"),
    ({"chunk": 16, "k": 4}, "float32", False, {}, True),
    ({"chunk": 16, "k": 4}, "bfloat16", True, {"masters": "split"}, True),
    ({"chunk": 16, "k": 4, "lookahead": True}, "float32", True, {"delta": "bfloat16"}),
    ({"chunk": 16, "k": 4}, "bfloat16", True, {"gradients": "streamed", "masters": "split"}),
    ({"chunk": 16, "k": 4, "lookahead": True}, "float32", True, {"delta": "int8"}, True),
]


def even(shape, ranks):
    """What ranks hold of a tensor that ``fully_shard`` divides."""
    length = shape[0] if shape else 1
    row = torch.Size(shape).numel() // length
    each = -(-length // ranks)
    return tuple((min(rank * each, length) * row, min((rank + 1) * each, length) * row) for rank in range(ranks))


@pytest.mark.parametrize("ranks", [2, 3, 8])
@pytest.mark.parametrize("whole", [False, True])
def test_fragments_cover_each_chunk_once(ranks, whole):
    shapes = [(1000, 70), (3, 5), (33, 5, 3, 3), (5000,), (1,), (130, 16), (7, 300)]
    layout = Layout([(str(number), torch.nn.Parameter(torch.empty(shape))) for number, shape in enumerate(shapes)], 16)
    sizes = [torch.Size(shape).numel() for shape in shapes]
    spans = [((0, size),) * ranks if whole else even(shape, ranks) for shape, size in zip(shapes, sizes, strict=True)]
    found = fragments(layout, spans, ranks)
    chunks = [chunk for part in found for chunk in range(part.chunk, part.chunk + part.chunks)]
    assert chunks == list(range(layout.chunk_count))
    assert sum(part.stop - part.start for part in found) == sum(sizes)
    load = [sum(part.chunks for part in found if part.rank == rank) for rank in range(ranks)]
    widest = max(entry.grid[1] for entry in layout.entries)
    assert max(load) <= layout.chunk_count / ranks + widest
    copies = sum(part.stop - part.start for part in found if not part.held)
    assert copies == 0 if whole else copies < 0.5 * sum(sizes)


def test_more_ranks_than_chunks_are_refused():
    layout = Layout([("small", torch.nn.Parameter(torch.empty(64, 64)))])
    with pytest.raises(ConfigError, match="only 1 chunks of 64x64, and rank 1 would have none; use fewer devices"):
        fragments(layout, [even((64, 64), 2)], 2)


@pytest.mark.slow
def test_two_ranks_are_one_device_to_the_bit():
    run(sharded.all_rounds, CASES)


@pytest.mark.slow
def test_muon_s_own_steps_are_those_with_whole_matrices():
    *rows, columns = zip(*run(sharded.own_steps), strict=True)
    for (alone, one), (_, other) in rows:
        assert one + other == alone, "each matrix belongs to one rank"
        assert one > 0 < other
    (alone, one), (_, other) = columns
    assert one == other == alone


@pytest.mark.slow
def test_refusals_are_the_same_on_every_rank():
    first, second = run(sharded.refusals)
    few, muon, endless, payload, name, other, nonce = first
    assert "only 1 chunks of 64x64, and rank 1 would have none" in few
    assert "has 'bias' of shape [70], but Muon trains matrices" in muon
    assert "NonFiniteGradientError: the gradient of 'inner.weight' has the norm inf" in endless
    assert "PayloadError: the payload ends after 5 bytes" in payload
    assert "PsycheError: no trainable parameter is named 'nobody'" in name
    assert "this state is of rank 5 of 2; this is rank 0 of 2. Resume with as many devices" in other
    assert nonce == 0
    assert second == [few, muon, endless, payload, name, other.replace("this is rank 0", "this is rank 1"), nonce]


@pytest.mark.slow
def test_each_rank_needs_its_share_of_the_memory():
    (alone,), ranks = run(sharded.peak, 24, 2048, ranks=1), run(sharded.peak, 24, 2048)
    assert max(ranks) <= 0.6 * alone

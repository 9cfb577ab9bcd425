import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from psyche_lightning.distro import DistroConfig, Layout
from psyche_lightning.errors import ConfigError

shapes = st.lists(
    st.one_of(
        st.just(()),
        st.tuples(st.sampled_from([0, 1, 7, 63, 64, 65, 131])),
        st.tuples(*[st.sampled_from([1, 2, 8, 13, 17, 24, 31])] * 2),
        st.tuples(*[st.integers(1, 9)] * 3),
        st.tuples(*[st.integers(1, 6)] * 4),
    ),
    min_size=1,
    max_size=6,
)


def parameters(shapes, *, strided=False):
    generator = torch.Generator().manual_seed(0)
    for number, shape in enumerate(shapes):
        tensor = torch.randn(shape, generator=generator)
        if strided and tensor.ndim >= 2:
            tensor = tensor.transpose(0, -1).contiguous().transpose(0, -1)
        yield f"p{number}", torch.nn.Parameter(tensor)


def gather(layout, tensors, limit):
    blocks = torch.full((layout.chunk_count, layout.chunk, layout.chunk), math.nan)
    for batch in layout.batches(limit):
        chunks = blocks[batch.start : batch.stop]
        if batch.padding:
            chunks.zero_()
        matrices = [layout.folded(number, tensor) for number, tensor in enumerate(tensors)]
        for view, block in zip(layout.views(batch, matrices), layout.blocks(batch, chunks), strict=True):
            block.copy_(view)
    return blocks


def plain(entry, tensor, c):
    """The chunks of one parameter, cut one by one."""
    if entry.in_runs:
        flat = torch.zeros(entry.chunks * c * c)
        flat[: tensor.numel()] = tensor.reshape(-1)
        return list(flat.view(-1, c, c))
    matrix = torch.zeros(entry.grid[0] * c, entry.grid[1] * c)
    matrix[: entry.rows, : entry.cols] = tensor.reshape(entry.rows, entry.cols)
    return [
        matrix[row * c : (row + 1) * c, column * c : (column + 1) * c]
        for row in range(entry.grid[0])
        for column in range(entry.grid[1])
    ]


@settings(max_examples=150)
@given(shapes=shapes, limit=st.integers(1, 40), strided=st.booleans())
def test_tiles_cut_and_pad_and_put_back(shapes, limit, strided):
    named = list(parameters(shapes, strided=strided))
    layout = Layout(named, chunk=8)
    tensors = [dict(named)[entry.name].detach() for entry in layout.entries]
    blocks = gather(layout, tensors, limit)
    expected = [
        block for entry, tensor in zip(layout.entries, tensors, strict=True) for block in plain(entry, tensor, 8)
    ]
    assert layout.chunk_count == len(expected)
    if expected:
        assert torch.equal(blocks, torch.stack(expected))
    back = [torch.full(entry.shape, math.nan) for entry in layout.entries]
    matrices = [layout.folded(number, tensor) for number, tensor in enumerate(back)]
    for batch in layout.batches(limit):
        source = layout.blocks(batch, blocks[batch.start : batch.stop].clone())
        for view, block in zip(layout.views(batch, matrices), source, strict=True):
            view.copy_(block)
    assert all(torch.equal(one, other) for one, other in zip(tensors, back, strict=True))


@settings(max_examples=100)
@given(shapes=shapes, limit=st.integers(1, 40))
def test_batches_are_bounded_and_in_order(shapes, limit):
    layout = Layout(parameters(shapes), chunk=8)
    split = [index % 2 for index in range(len(layout.entries))]
    for devices in (None, split):
        at = 0
        for batch in layout.batches(limit, devices):
            assert batch.start == at
            assert 0 < len(batch) <= limit
            covered = torch.zeros(len(batch), 8, 8)
            for view in layout.blocks(batch, covered) + layout.padding(batch, covered):
                view.add_(1)
            assert (covered == 1).all()
            assert devices is None or len({devices[tile.entry] for tile in batch.tiles}) == 1
            at = batch.stop
        assert at == layout.chunk_count


def test_a_prime_dimension_costs_padding_only():
    layout = Layout([("w", torch.nn.Parameter(torch.empty(127, 131, device="meta")))])
    assert layout.entries[0].grid == (2, 3)


def test_dimensions_fold_where_the_fewest_chunks_are_needed():
    meta = torch.device("meta")
    named = [
        ("convolution", torch.nn.Parameter(torch.empty(64, 64, 3, 3, device=meta))),
        ("experts", torch.nn.Parameter(torch.empty(8, 128, 64, device=meta))),
    ]
    convolution, experts = Layout(named).entries
    assert (convolution.rows, convolution.cols, convolution.grid) == (64, 576, (1, 9))
    assert (experts.rows, experts.cols, experts.grid) == (1024, 64, (16, 1))


def test_entries_are_in_byte_order_without_frozen_and_repeated_parameters():
    one = torch.nn.Parameter(torch.zeros(3))
    frozen = torch.nn.Parameter(torch.zeros(3), requires_grad=False)
    named = [("é", torch.nn.Parameter(torch.zeros(1))), ("b", one), ("B", frozen), ("a", one), ("z", torch.zeros(1))]
    named.append(("Z", torch.nn.Parameter(torch.zeros(2))))
    assert [entry.name for entry in Layout(named).entries] == ["Z", "b", "é"]


def test_digest_covers_names_shapes_chunk_and_k_but_not_the_dtype():
    def digest(name="w", shape=(8, 8), chunk=8, k=2, dtype=torch.float32):
        layout = Layout([(name, torch.nn.Parameter(torch.zeros(shape, dtype=dtype)))], chunk)
        return layout.digest(DistroConfig(chunk=chunk, k=k))

    assert len(digest()) == 32
    assert digest() == digest(dtype=torch.bfloat16)
    others = [digest(name="v"), digest(shape=(64,)), digest(shape=(4, 16)), digest(chunk=16), digest(k=3)]
    assert len({digest(), *others}) == 6


def test_errors_of_the_layout_are_explained():
    one, other = torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(ConfigError, match="two parameters are named 'w'"):
        Layout([("w", one), ("w", other)])
    with pytest.raises(ConfigError, match="no trainable parameter"):
        Layout([("w", one.detach())])
    with pytest.raises(ConfigError, match=r"'w' is torch\.complex64"):
        Layout([("w", torch.nn.Parameter(torch.zeros(3, dtype=torch.complex64)))])

import numpy as np
import pytest
import torch

from psyche_lightning.distro import select
from psyche_lightning.distro.votes import VotesOn


def test_positions_ascend_and_hold_the_largest_magnitudes():
    coefficients = torch.randn(50, 16, 16, generator=torch.Generator().manual_seed(0))
    positions, values = select(coefficients, 9)
    assert (positions.diff(dim=1) > 0).all()
    flat = coefficients.flatten(1)
    assert torch.equal(values, flat.gather(1, positions))
    left = flat.abs().scatter(1, positions, 0.0).amax(dim=1)
    assert (values.abs().amin(dim=1) >= left).all()


def test_ties_are_decided_alike_each_time():
    coefficients = torch.randint(-2, 3, (40, 8, 8), generator=torch.Generator().manual_seed(3)).float()
    first, _ = select(coefficients, 6)
    for _ in range(3):
        assert torch.equal(select(coefficients, 6)[0], first)


def test_a_chunk_of_zeros_casts_no_votes():
    coefficients = torch.zeros(3, 8, 8)
    coefficients[1, 4, 4] = -2
    positions, values = select(coefficients, 4)
    votes = VotesOn.chosen(positions, values.sign()).votes()
    assert (votes.positions.dtype, votes.signs.dtype) == (np.int16, np.int8)
    assert (votes.signs[[0, 2]] == 0).all()
    assert (votes.positions[[0, 2]] == np.arange(4)).all()
    assert votes.signs[1, votes.positions[1].tolist().index(36)] == -1
    assert (np.abs(votes.signs[1]) == 1).all()


@pytest.mark.parametrize("k", [1, 2, 8, 9, 32, 128])
def test_the_groups_hold_what_a_plain_search_finds(k, device):
    coefficients = torch.randn(30, 32, 32, generator=torch.Generator().manual_seed(k)).to(device)
    positions, _ = select(coefficients, k)
    expected = coefficients.flatten(1).abs().topk(k, dim=1).indices.sort(dim=1).values
    assert torch.equal(positions, expected)

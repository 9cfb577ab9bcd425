import numpy as np
import pytest
import torch

from psyche_lightning.distro import select, transform
from psyche_lightning.distro.internals import has_quick_product


def test_basis_of_size_4_is_the_published_one():  # vector 11
    expected = [
        [0.5, 0.6533, 0.5, 0.2706],
        [0.5, 0.2706, -0.5, -0.6533],
        [0.5, -0.2706, -0.5, 0.6533],
        [0.5, -0.6533, 0.5, -0.2706],
    ]
    np.testing.assert_allclose(transform.basis(4), expected, atol=5e-5)


def test_encoding_a_ramp_gives_the_published_coefficients():  # vector 11
    expected = [9.8995, -6.4423, 0, -0.67345, 0, -0.2009, 0, -0.0507]
    np.testing.assert_allclose(np.arange(8) @ transform.basis(8), expected, atol=5e-5)


def test_the_strongest_two_of_each_row_are_the_published_ones():  # vector 12
    rows = [[0.1911, 0.4076, 0.1649, 0.8059], [0.2803, 0.9381, 0.9071, 0.2573]]
    rows += [[0.4070, 0.5765, 0.7226, 0.9486], [0.0737, 0.7378, 0.1898, 0.2990]]
    positions, values = select(torch.tensor(rows).view(4, 2, 2), 2)
    assert positions.tolist() == [[1, 3], [1, 2], [2, 3], [1, 3]]
    assert values[0].tolist() == torch.tensor([0.4076, 0.8059]).tolist()


@pytest.mark.parametrize("size", [8, 16, 32, 64])
def test_the_transform_is_orthonormal_and_invertible(size, device):
    generator = torch.Generator().manual_seed(size)
    blocks = torch.randn(7, size, size, generator=generator).to(device)
    coefficients = transform.forward(blocks)
    reference = transform.basis(size).T @ blocks.cpu().double().numpy() @ transform.basis(size)
    np.testing.assert_allclose(coefficients.cpu(), reference, atol=1e-5)
    torch.testing.assert_close(transform.inverse(coefficients), blocks, atol=1e-5, rtol=0)
    torch.testing.assert_close(coefficients.square().sum(), blocks.square().sum())


@pytest.mark.parametrize("size", [8, 16, 32, 64])
def test_the_integer_basis_does_not_depend_on_the_last_bits_of_a_cosine(size):
    scaled = 127 * transform.basis(size) / np.abs(transform.basis(size)).max()
    integers = transform.integer_basis(size)
    assert np.abs(integers).max() == 127
    assert np.abs(scaled - integers).max() <= 0.5 - 1e-6


def test_the_integer_basis_is_fixed():
    assert transform.integer_basis(8)[0].tolist() == [92, 127, 120, 108, 92, 72, 50, 25]


def test_subtracting_all_coefficients_leaves_nothing(device):
    blocks = torch.randn(5, 8, 8, generator=torch.Generator().manual_seed(1)).to(device)
    positions, values = select(transform.forward(blocks), 64)
    transform.subtract(blocks, positions, values)
    assert blocks.abs().max() < 1e-5


def test_subtracting_some_leaves_the_others():
    blocks = torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(2))
    coefficients = transform.forward(blocks)
    positions, values = select(coefficients, 5)
    transform.subtract(blocks, positions, values)
    expected = coefficients.flatten(1).scatter(1, positions, 0.0).view_as(blocks)
    torch.testing.assert_close(transform.forward(blocks), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("quick", [True, False])
@pytest.mark.parametrize("size", [16, 64])
def test_many_blocks_at_once_are_exact_where_integers_are(size, quick, monkeypatch):
    monkeypatch.setattr(transform, "has_quick_product", lambda: quick and has_quick_product())
    count = transform.MANY // size**2 + 3
    generator = torch.Generator().manual_seed(size)
    blocks = torch.randint(-3, 4, (count, size, size), generator=generator)
    left = torch.tensor(transform.integer_basis(size))
    expected = left @ blocks @ left.T
    assert expected.abs().max() < 2**24
    exact, floats = left.to(torch.float32), blocks.to(torch.float32)
    assert torch.equal(transform.sandwich(exact, floats, exact.T).to(torch.int64), expected)
    assert torch.equal(floats.to(torch.int64), blocks)
    torch.testing.assert_close(transform.inverse(transform.forward(floats)), floats, atol=1e-4, rtol=0)
    assert torch.equal(transform.sandwich(exact, floats, exact.T, (torch.empty_like(floats), floats)), floats)
    assert torch.equal(floats.to(torch.int64), expected)

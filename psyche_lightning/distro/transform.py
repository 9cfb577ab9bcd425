"""The orthonormal DCT-II of square blocks, and the integer basis of the exact inverse (invariant I1)."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray

from psyche_lightning.distro.internals import has_quick_product, quick_product

MANY = 1 << 16
"""From so many coefficients on, the call of a quicker product pays."""


@cache
def basis(size: int) -> NDArray[np.float64]:
    """The matrix F of the DCT-II, [size, size].

    ``F[j, b] = a_b cos(pi (j + 1/2) b / size)`` with ``a_0 = sqrt(1/size)``, else ``a_b = sqrt(2/size)``. Its columns
    are orthonormal: ``x @ F`` transforms a row, and ``y @ F.T`` is the inverse.
    """
    j, b = np.arange(size)[:, None], np.arange(size)[None, :]
    matrix: NDArray[np.float64] = np.sqrt(2 / size) * np.cos(np.pi * (j + 0.5) * b / size)
    matrix[:, 0] = np.sqrt(1 / size)
    matrix.setflags(write=False)
    return matrix


@cache
def integer_basis(size: int) -> NDArray[np.int64]:
    """``round(127 F / max|F|)``: integers of magnitude at most 127, the same on every machine.

    No value lies within 1e-6 of a rounding boundary, so the last bits of a libm's cosine do not matter.
    """
    scaled = basis(size) * (127 / np.abs(basis(size)).max())
    rounded: NDArray[np.int64] = np.rint(scaled).astype(np.int64)
    rounded.setflags(write=False)
    return rounded


@cache
def basis_tensor(size: int, device: torch.device) -> torch.Tensor:
    """:func:`basis` as float32 on a device; its columns are contiguous."""
    with torch.inference_mode(False):
        return torch.tensor(np.ascontiguousarray(basis(size).T), dtype=torch.float32, device=device).T


def forward(blocks: torch.Tensor, work: tuple[torch.Tensor, torch.Tensor] | None = None) -> torch.Tensor:
    """Transform blocks: ``F.T @ X @ F`` for each X.

    Args:
        blocks: float32, [chunks, c, c].
        work: as in :func:`sandwich`.

    Returns:
        The coefficients, float32, [chunks, c, c]; the frequency of the rows comes first.
    """
    f = basis_tensor(blocks.shape[-1], blocks.device)
    return sandwich(f.T, blocks, f, work)


def inverse(coefficients: torch.Tensor) -> torch.Tensor:
    """Undo :func:`forward`: ``F @ C @ F.T`` for each C; same shapes."""
    f = basis_tensor(coefficients.shape[-1], coefficients.device)
    return sandwich(f, coefficients, f.T)


def sandwich(
    left: torch.Tensor,
    blocks: torch.Tensor,
    right: torch.Tensor,
    work: tuple[torch.Tensor, torch.Tensor] | None = None,
    split: int = 0,
) -> torch.Tensor:
    """``left @ X @ right`` for each X of [chunks, c, c], as two matrix products, the right one first.

    Args:
        left: [c, c].
        blocks: contiguous, [chunks, c, c].
        right: [c, c].
        work: buffers like ``blocks`` for the two products, so a loop over batches allocates little. The result is in
            the second, which may be ``blocks`` itself.
        split: if not 0, the first product consists of integers, and the second one is the sum of two: of their lowest
            ``split`` bits (as signed numbers), and of the rest. So partial sums stay smaller.
    """
    chunks, c, _ = blocks.shape
    half, whole = work or (torch.empty_like(blocks), torch.empty_like(blocks))
    if blocks.is_cpu and blocks.dtype == torch.float32 and blocks.numel() >= MANY and has_quick_product():
        # The first rows of all chunks side by side, then the second ones: so the left product is one for all, too.
        rows = half.view(c, chunks, c).copy_(blocks.transpose(0, 1))
        once = quick_product(rows.view(c * chunks, c), right).view(c, chunks * c)
        rest = _rest(once, split) if split else None
        twice = quick_product(left, once)
        if rest is not None:
            twice.add_(quick_product(left, rest), alpha=2.0**split)
        return whole.copy_(twice.view(c, chunks, c).transpose(0, 1))
    torch.mm(blocks.view(chunks * c, c), right, out=half.view(chunks * c, c))
    rest = _rest(half, split) if split else None
    torch.bmm(left.expand(chunks, c, c), half, out=whole)
    if rest is not None:
        whole.add_(torch.bmm(left.expand(chunks, c, c), rest), alpha=2.0**split)
    return whole


def _rest(integers: torch.Tensor, bits: int) -> torch.Tensor:
    """What is left of integers, in units of ``2^bits``, without their lowest bits, which alone remain in them."""
    rest = integers.mul(2.0**-bits).round_()
    integers.sub_(rest, alpha=2.0**bits)
    return rest


def subtract(blocks: torch.Tensor, positions: torch.Tensor, values: torch.Tensor) -> None:
    """Subtract a few coefficients from blocks, in place: a sum of k outer products of basis vectors per chunk.

    Args:
        blocks: float32 [chunks, c, c].
        positions: int64 [chunks, k], positions of the coefficients.
        values: float32 [chunks, k], the values to subtract.
    """
    c = blocks.shape[-1]
    columns = basis_tensor(c, blocks.device).T
    left = columns.index_select(0, (positions >> (c.bit_length() - 1)).view(-1)).view(*positions.shape, c)
    right = columns.index_select(0, (positions & (c - 1)).view(-1)).view(*positions.shape, c)
    torch.baddbmm(blocks, left.mul_(values[:, :, None]).transpose(1, 2), right, alpha=-1, out=blocks)

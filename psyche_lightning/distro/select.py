"""Votes: which coefficients of each chunk a node sends, and with which sign (spec S4.2)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Votes:
    """One node's votes for all chunks of a model.

    Attributes:
        positions: int16 [chunks, k], strictly ascending in each chunk; ``row * c + column`` of the coefficient.
        signs: int8 [chunks, k], +1 or -1; a chunk of zeros casts no votes, and its k signs are 0.
    """

    positions: NDArray[np.int16]
    signs: NDArray[np.int8]

    @staticmethod
    def empty(chunks: int, k: int) -> Votes:
        """No chunk casts any."""
        return Votes(np.tile(np.arange(k, dtype=np.int16), (chunks, 1)), np.zeros((chunks, k), np.int8))

    @staticmethod
    def of(positions: NDArray[np.int16], signs: NDArray[np.int8]) -> Votes:
        """Votes for what was selected, in place: a coefficient that is zero counts as positive unless all are."""
        zero = signs == 0
        if zero.any():
            silent = zero.all(axis=1)
            signs[zero] = 1
            positions[silent], signs[silent] = np.arange(positions.shape[1]), 0
        return Votes(positions, signs)

    def part(self, start: int, stop: int) -> Votes:
        """The votes of some chunks, not copied."""
        return Votes(self.positions[start:stop], self.signs[start:stop])


def select(coefficients: torch.Tensor, k: int, work: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """The k coefficients of largest magnitude of each chunk.

    Args:
        coefficients: float32 [chunks, c, c].
        k: how many to keep.
        work: a buffer like ``coefficients``, so that a loop over batches allocates little.

    Returns:
        Positions, int64 [chunks, k], ascending, and the values there, float32 [chunks, k]. Which of several equal
        magnitudes is kept depends on the machine, never on the run: the choice is local, its outcome is what is sent.
    """
    flat = coefficients.flatten(1)
    chunks, area = flat.shape
    # Every one of the k largest is in one of the k groups with the largest maxima.
    depth = 1 << (area // k).bit_length() // 2
    groups = area // depth
    magnitudes = flat.abs() if work is None else torch.abs(flat, out=work.view(chunks, area))
    if depth > 1 and groups > k:
        best = _largest(magnitudes.view(chunks, depth, groups).amax(dim=1), k)
        rows = torch.arange(0, area, groups, device=flat.device)
        candidates = (best[:, None, :] + rows[:, None]).flatten(1)
        chosen = _largest(magnitudes.gather(1, candidates), k)
        positions = candidates.gather(1, chosen)
    else:
        positions = _largest(magnitudes, k)
    if positions.is_cpu:
        positions = torch.from_numpy(np.sort(positions.numpy(), axis=1))
    else:
        positions = positions.sort(dim=1).values
    return positions, flat.gather(1, positions)


def _largest(magnitudes: torch.Tensor, k: int) -> torch.Tensor:
    """Where the k largest of each row are, int64 [rows, k], in any order; magnitudes are float32 and not negative."""
    if not magnitudes.is_cpu:
        return magnitudes.topk(k, dim=1, sorted=False).indices
    # numpy's vectorized partition of whole numbers beats torch's: magnitudes order like their bits.
    count = magnitudes.shape[1]
    shift = (count - 1).bit_length()
    keys = magnitudes.numpy().view(np.int32).astype(np.int64)
    keys <<= shift
    keys |= np.arange(count)
    keys.partition(count - k, axis=1)
    return torch.from_numpy(keys[:, count - k :] & ((1 << shift) - 1))

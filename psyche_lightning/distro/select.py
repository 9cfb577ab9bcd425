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
        """Votes to be filled in: no chunk has cast any."""
        return Votes(np.tile(np.arange(k, dtype=np.int16), (chunks, 1)), np.zeros((chunks, k), np.int8))

    def put(self, start: int, positions: torch.Tensor, values: torch.Tensor) -> None:
        """Fill in chunks from ``start`` on with the outcome of :func:`select`."""
        stop = start + len(positions)
        signs = torch.where(values < 0, -1, 1)
        signs[(values == 0).all(dim=1)] = 0
        self.positions[start:stop] = positions.cpu().numpy()
        self.signs[start:stop] = signs.cpu().numpy()
        self.positions[start:stop][self.signs[start:stop, 0] == 0] = np.arange(positions.shape[1])


def select(coefficients: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k coefficients of largest magnitude of each chunk.

    Args:
        coefficients: float32 [chunks, c, c].
        k: how many to keep.

    Returns:
        Positions, int64 [chunks, k], ascending, and the values there, float32 [chunks, k]. Which of several equal
        magnitudes is kept depends on the machine, never on the run: the choice is local, its outcome is what is sent.
    """
    flat = coefficients.flatten(1)
    positions = flat.abs().topk(k, dim=1, sorted=False).indices.sort(dim=1).values
    return positions, flat.gather(1, positions)

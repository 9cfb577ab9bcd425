"""Votes: which coefficients of each chunk a node sends, and their signs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from psyche_lightning.distro.config import STEPS_VERSION, WIRE_VERSION

FEW = 1 << 15
"""Up to so many coefficients, a CPU finds the largest ones at once as soon as by groups."""


@dataclass(frozen=True, eq=False)
class Votes:
    """One node's votes for all chunks of a model.

    Attributes:
        positions: int16 [chunks, k], strictly ascending in each chunk; ``row * c + column`` of the coefficient.
        signs: int8 [chunks, k], +1 or -1; a chunk of zeros has no votes, and its k signs are 0. Those of local steps
            are signs times magnitudes, which are 1 or 2.
        exponents: int8 [chunks], which power of two a chunk's votes are multiples of
            (:mod:`~psyche_lightning.distro.magnitudes`); 0 without votes. None unless they come from local steps.
    """

    positions: NDArray[np.int16]
    signs: NDArray[np.int8]
    exponents: NDArray[np.int8] | None = None

    @staticmethod
    def empty(chunks: int, k: int, version: int = WIRE_VERSION) -> Votes:
        """Votes without any vote, for payloads of that version."""
        positions = np.tile(np.arange(k, dtype=np.int16), (chunks, 1))
        exponents = np.zeros(chunks, np.int8) if version == STEPS_VERSION else None
        return Votes(positions, np.zeros((chunks, k), np.int8), exponents)

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        exponents = 0 if self.exponents is None else self.exponents.nbytes
        return self.positions.nbytes + self.signs.nbytes + exponents

    def part(self, start: int, stop: int) -> Votes:
        """The votes of some chunks, not copied."""
        return self.of_chunks(slice(start, stop), self.signs.shape[1])

    def of_chunks(self, chunks: slice | NDArray[np.int64], k: int) -> Votes:
        """The first k columns of some chunks."""
        exponents = None if self.exponents is None else self.exponents[chunks]
        return Votes(self.positions[chunks, :k], self.signs[chunks, :k], exponents)

    def put(self, chunks: slice | NDArray[np.int64], some: Votes) -> None:
        """Replace the first columns of some chunks by other votes; columns beyond theirs stay."""
        k = some.signs.shape[1]
        self.positions[chunks, :k], self.signs[chunks, :k] = some.positions, some.signs
        if self.exponents is not None and some.exponents is not None:
            self.exponents[chunks] = some.exponents


@dataclass(frozen=True, eq=False)
class VotesOn:
    """Votes like :class:`Votes`, as tensors on one device.

    Attributes:
        positions: int16 [chunks, k].
        signs: int8 [chunks, k].
        exponents: int8 [chunks], or None.
    """

    positions: torch.Tensor
    signs: torch.Tensor
    exponents: torch.Tensor | None = None

    @staticmethod
    def empty(chunks: int, k: int, device: torch.device, version: int = WIRE_VERSION) -> VotesOn:
        """Like :meth:`Votes.empty`."""
        return VotesOn.of(Votes.empty(chunks, k, version), device)

    @staticmethod
    def of(votes: Votes | VotesOn, device: torch.device) -> VotesOn:
        """Any votes on that device; nothing is copied if they are there."""
        if isinstance(votes, VotesOn):
            exponents = None if votes.exponents is None else votes.exponents.to(device)
            return VotesOn(votes.positions.to(device), votes.signs.to(device), exponents)
        exponents = None if votes.exponents is None else torch.from_numpy(votes.exponents).to(device)
        return VotesOn(
            torch.from_numpy(votes.positions).to(device), torch.from_numpy(votes.signs).to(device), exponents
        )

    @staticmethod
    def chosen(positions: torch.Tensor, signs: torch.Tensor, exponents: torch.Tensor | None = None) -> VotesOn:
        """Votes for selected coefficients, without waiting for the device.

        Args:
            positions: int64 [chunks, k].
            signs: [chunks, k]; a zero counts as positive unless its whole chunk is zero.
            exponents: int8 [chunks], or None.
        """
        if signs.is_cpu and signs.all():  # as nearly always; on a device, to ask takes longer than to write
            return VotesOn(positions.to(torch.int16), signs.to(torch.int8), exponents)
        silent = (signs == 0).all(dim=1, keepdim=True)
        first = torch.arange(positions.shape[1], device=positions.device)
        cast = torch.where(signs == 0, 1, signs).to(torch.int8).masked_fill_(silent, 0)
        return VotesOn(torch.where(silent, first, positions).to(torch.int16), cast, exponents)

    def votes(self) -> Votes:
        """These votes on the host; on the CPU nothing is copied."""
        exponents = None if self.exponents is None else self.exponents.cpu().numpy()
        return Votes(self.positions.cpu().numpy(), self.signs.cpu().numpy(), exponents)

    def part(self, start: int, stop: int) -> VotesOn:
        """The votes of some chunks, not copied."""
        return self.of_chunks(slice(start, stop), self.signs.shape[1])

    def of_chunks(self, chunks: slice | torch.Tensor, k: int) -> VotesOn:
        """The first k columns of some chunks."""
        exponents = None if self.exponents is None else self.exponents[chunks]
        return VotesOn(self.positions[chunks, :k], self.signs[chunks, :k], exponents)

    def put(self, chunks: slice | torch.Tensor, some: VotesOn) -> None:
        """Replace the first columns of some chunks by other votes; columns beyond theirs stay."""
        k = some.signs.shape[1]
        self.positions[chunks, :k], self.signs[chunks, :k] = some.positions, some.signs
        if self.exponents is not None and some.exponents is not None:
            self.exponents[chunks] = some.exponents


def select(coefficients: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Select the k coefficients of largest magnitude of each chunk.

    Args:
        coefficients: float32 [chunks, c, c].
        k: how many to select.

    Returns:
        Positions, int64 [chunks, k], ascending, and the values there, float32 [chunks, k]. Among equal magnitudes the
        choice may depend on the machine. This does no harm, because nodes exchange the chosen votes.
    """
    flat = coefficients.flatten(1)
    if flat.is_cpu and flat.numel() <= FEW:
        positions = _largest(flat.abs(), k)
        return positions, flat.gather(1, positions)
    chunks, area = flat.shape
    # Each of the k largest is in one of the k groups with the largest maxima.
    depth = 1 << ((area // k).bit_length() - 1) // 2
    groups = area // depth
    if depth > 1 and groups > k:
        grid = flat.view(chunks, depth, groups)
        best = _largest(torch.maximum(grid.amax(dim=1), grid.amin(dim=1).neg_()), k)
        rows = torch.arange(0, area, groups, device=flat.device)
        candidates = (best[:, None, :] + rows[:, None]).flatten(1)  # in ascending order, like the groups
        positions = candidates.gather(1, _largest(flat.gather(1, candidates).abs_(), k))
    else:
        positions = _largest(flat.abs(), k)
    return positions, flat.gather(1, positions)


def _largest(magnitudes: torch.Tensor, k: int) -> torch.Tensor:
    """Positions of the k largest of each row, int64 [rows, k], ascending; magnitudes are float32, not negative."""
    if not magnitudes.is_cpu:
        return magnitudes.topk(k, dim=1, sorted=False).indices.sort(dim=1).values
    # numpy's vectorized partition of integers is faster than torch's top-k, and magnitudes order like their bits.
    bits = magnitudes.numpy().view(np.int32)
    rows, count = bits.shape
    least = np.partition(bits, count - k, axis=1)[:, count - k, None]
    found = np.flatnonzero(bits >= least)
    if len(found) == rows * k:
        return torch.from_numpy(found.reshape(rows, k) - np.arange(rows)[:, None] * count)
    # Some row has more values equal to its k-th largest: their positions decide.
    shift = (count - 1).bit_length()
    keys = bits.astype(np.int64) << shift | np.arange(count)
    keys.partition(count - k, axis=1)
    return torch.from_numpy(np.sort(keys[:, count - k :] & ((1 << shift) - 1), axis=1))

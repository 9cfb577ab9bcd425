"""The magnitudes of local steps: how displacements become small integers, their bits, and their exact sum.

A chunk's votes are ``q 2^(e - 28)`` with q of -2, -1, 1 or 2, and one exponent e from 0 to 31 for the chunk. So they
are integers times 2^-28, and |q 2^e| is at most 2^32: sums over up to 2^21 payloads stay within 2^53. int64 and float64
represent them all, in any order of summation.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from psyche_lightning.distro.votes import Votes
from psyche_lightning.errors import PayloadError

EXPONENT_BITS = 5
LARGEST = 2**EXPONENT_BITS - 1
"""The largest exponent."""
UNIT = 2.0**-28
"""What votes with the exponent 0 are multiples of."""
HEADROOM = 2
"""How far an exponent counts beyond the median of its chunk."""
_BATCH = 8 << 10  # chunks, a multiple of 8, so that a batch fills whole bytes


def quantize(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round the chosen entries of each chunk to 1 or 2 times one power of two.

    Args:
        values: float32 [chunks, k].

    Returns:
        Signs times magnitudes, int8 [chunks, k], and exponents, int8 [chunks]. A zero counts as +1; a chunk of zeros
        has zeros and the exponent 0.
    """
    sizes = values.abs()
    mean = sizes.mean(dim=1)
    exponents = torch.log2(mean / UNIT).round_().clamp_(0, LARGEST)
    exponents[mean == 0] = 0
    magnitudes = 1 + (sizes > 1.5 * UNIT * torch.exp2(exponents)[:, None]).to(torch.int8)
    magnitudes[mean == 0] = 0
    return torch.where(values < 0, -magnitudes, magnitudes), exponents.to(torch.int8)


def size(chunks: int, k: int) -> int:
    """Bytes of :func:`write`."""
    return (chunks * (EXPONENT_BITS + k) + 7) // 8


def write(signs: NDArray[np.int8], exponents: NDArray[np.int8]) -> bytes:
    """The second stream of a payload: exponents and magnitudes.

    Args:
        signs: signs times magnitudes, [chunks, k].
        exponents: [chunks].

    Raises:
        ValueError: a chunk has another form, which alone is canonical.
    """
    wrong = _problem(signs, exponents)
    if wrong is not None:
        raise ValueError(f"chunk {wrong[0]} of the votes has {wrong[1]}")
    parts = []
    for first in range(0, len(signs), _BATCH):
        some = signs[first : first + _BATCH]
        bits = np.empty((len(some), EXPONENT_BITS + some.shape[1]), np.uint8)
        here = exponents[first : first + _BATCH].astype(np.uint8)[:, None]
        bits[:, :EXPONENT_BITS] = np.unpackbits(here, axis=1)[:, -EXPONENT_BITS:]
        bits[:, EXPONENT_BITS:] = np.abs(some) == 2
        parts.append(np.packbits(bits).tobytes())
    return b"".join(parts)


def read(stream: NDArray[np.uint8], signs: NDArray[np.int8], total: int, start: int) -> NDArray[np.int8]:
    """Undo :func:`write` for some chunks.

    Args:
        stream: the bytes, of the right size for all chunks; untrusted.
        signs: the signs of the wanted chunks, [chunks, k], which become signs times magnitudes.
        total: chunks of the payload.
        start: the first wanted chunk.

    Returns:
        The exponents of the wanted chunks.

    Raises:
        PayloadError: the bytes are not canonical.
    """
    width = EXPONENT_BITS + signs.shape[1]
    unused = total * width % 8
    if unused and stream[-1] & ((1 << (8 - unused)) - 1):
        raise PayloadError("the last byte of the payload's magnitudes is not padded with zeros")
    exponents = np.empty(len(signs), np.int8)
    for first in range(0, len(signs), _BATCH):
        some = signs[first : first + _BATCH]
        begin, end = (start + first) * width, (start + first + len(some)) * width
        bits = np.unpackbits(stream[begin // 8 : (end + 7) // 8])[begin % 8 :][: end - begin].reshape(len(some), width)
        silent = some[:, 0] == 0
        if (stray := silent & bits.any(axis=1)).any():
            number = start + first + int(stray.argmax())
            raise PayloadError(f"chunk {number} of the payload has an exponent or magnitudes but no votes")
        exponents[first : first + _BATCH] = bits[:, :EXPONENT_BITS] @ (1 << np.arange(EXPONENT_BITS)[::-1])
        some *= 1 + bits[:, EXPONENT_BITS:].astype(np.int8)
    wrong = _problem(signs, exponents)
    if wrong is not None:
        raise PayloadError(f"chunk {start + wrong[0]} of the payload has {wrong[1]}")
    return exponents


def _problem(signs: NDArray[np.int8], exponents: NDArray[np.int8]) -> tuple[int, str] | None:
    """The first chunk whose numbers have another, canonical form, and why; None if all are canonical."""
    doubled = (np.abs(signs) == 2).all(axis=1) & (exponents < LARGEST)
    if doubled.any():
        return int(doubled.argmax()), "magnitudes that are all 2, which is 1 with the next exponent"
    stray = (signs[:, 0] == 0) & (exponents != 0)
    return (int(stray.argmax()), "an exponent but no votes") if stray.any() else None


class Sum:
    """The votes of several payloads for the same chunks, added up exactly.

    Args:
        votes: one for each payload, in any order, all with exponents.
        device: where to compute.
        dtype: float64 or int64; the sums are the same.

    Attributes:
        dtype: as given.
        device: as given.
    """

    def __init__(self, votes: Sequence[Votes], device: torch.device, dtype: torch.dtype = torch.float64) -> None:
        def stacked(columns: Sequence[NDArray[np.generic]]) -> torch.Tensor:
            return torch.from_numpy(np.stack(columns, axis=1)).to(device)

        self.dtype, self.device = dtype, device
        limited = _limited(votes)
        self._positions = stacked([one.positions for one in votes])
        self._signs = stacked([one.signs for one in votes])
        self._exponents = stacked(limited)
        self._powers = torch.tensor([1 << exponent for exponent in range(LARGEST + 1)], dtype=dtype, device=device)

    def sums(self, start: int, stop: int, out: torch.Tensor) -> torch.Tensor:
        """Add up some of the chunks.

        Args:
            start: the first chunk.
            stop: the chunk after the last.
            out: contiguous zeros of this dtype, [chunks, area], for the sums.

        Returns:
            The sums, integers, rounded to float32, [chunks, area].
        """
        chunks = stop - start
        powers = self._powers[self._exponents[start:stop].to(torch.int64)]
        values = self._signs[start:stop].to(self.dtype) * powers[:, :, None]
        out.scatter_add_(1, self._positions[start:stop].to(torch.int64).view(chunks, -1), values.view(chunks, -1))
        return out.to(torch.float32)


def _limited(votes: Sequence[Votes]) -> list[NDArray[np.int8]]:
    """The exponents of each payload's chunks, at most ``HEADROOM`` above the upper median of those that vote there.

    So one node among three or more cannot outvote the others by size.
    """
    given = np.stack([np.zeros(0, np.int8) if one.exponents is None else one.exponents for one in votes])
    voting = np.stack([one.signs[:, 0] != 0 for one in votes])
    ordered = np.sort(np.where(voting, given, np.int8(-1)), axis=0)  # those without votes come first
    voters = voting.sum(axis=0)
    median = ordered[np.minimum(len(votes) - voters + voters // 2, len(votes) - 1), np.arange(given.shape[1])]
    return list(np.minimum(given, median + np.int8(HEADROOM)))

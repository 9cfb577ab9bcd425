"""The magnitudes of local steps: how displacements become small integers, their bits, and their exact sum.

A chunk's votes are ``q 2^(e - 28)`` with q of -2, -1, 1 or 2, and one exponent e from 0 to 31 for the chunk. So they
are integers times 2^-28, and |q 2^e| is at most 2^32: sums over up to 2^21 payloads stay within 2^53. int64 and float64
represent them all, in any order of summation.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray

from psyche_lightning.distro.votes import Votes, VotesOn
from psyche_lightning.errors import PayloadError

EXPONENT_BITS = 5
LARGEST = 2**EXPONENT_BITS - 1
"""The largest exponent."""
UNIT = 2.0**-28
"""What votes with the exponent 0 are multiples of."""
HEADROOM = 2
"""How far an exponent counts beyond the median of its chunk."""
_BATCH = 8 << 10  # chunks, a multiple of 8, so that a batch fills whole bytes


def quantize(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Round the chosen entries of each chunk to 1 or 2 times one power of two.

    Args:
        values: float32 [chunks, k].

    Returns:
        Signs times magnitudes, int8 [chunks, k], exponents, int8 [chunks], and the values that these say, float32
        [chunks, k]. A zero counts as +1; a chunk of zeros has zeros and the exponent 0.
    """
    sizes = values.abs()
    mean = sizes.mean(dim=1, keepdim=True)
    exponents = torch.log2(mean / UNIT).round_().clamp_(0, LARGEST)  # of zeros, minus infinity becomes 0
    units = torch.exp2(exponents).mul_(UNIT)
    numbers = (sizes > 1.5 * units).to(torch.float32).add_(1).mul_(mean > 0)
    numbers = torch.where(values < 0, -numbers, numbers)
    return numbers.to(torch.int8), exponents[:, 0].to(torch.int8), numbers.mul_(units)


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


def read(streams: NDArray[np.uint8], signs: NDArray[np.int8], total: int, start: int) -> NDArray[np.int8]:
    """Undo :func:`write` for some chunks of several payloads.

    Args:
        streams: the bytes of each payload, [payloads, bytes], of the right size for all chunks; untrusted.
        signs: the signs of the wanted chunks, [payloads, chunks, k], which become signs times magnitudes.
        total: chunks of a payload.
        start: the first wanted chunk.

    Returns:
        The exponents of the wanted chunks, [payloads, chunks].

    Raises:
        PayloadError: the bytes are not canonical.
    """
    count, chunks, k = signs.shape
    width = EXPONENT_BITS + k
    for stream in streams:
        check_padding(stream, total, k)
    exponents = np.empty((count, chunks), np.int8)
    step = max(8, _BATCH // count // 8 * 8)
    for first in range(0, chunks, step):
        here = slice(first, min(first + step, chunks))
        begin, end = (start + first) * width, (start + here.stop) * width
        bits = np.unpackbits(streams[:, begin // 8 : (end + 7) // 8], axis=1)[:, begin % 8 :][:, : end - begin]
        bits = bits.reshape(count, -1, width)
        some, its = signs[:, here], exponents[:, here]
        stray = (some[..., 0] == 0) & bits.any(axis=2)
        its[:] = np.packbits(bits[..., :EXPONENT_BITS], axis=2)[..., 0] >> 8 - EXPONENT_BITS
        some *= 1 + bits[..., EXPONENT_BITS:].view(np.int8)
        wrong = _first(stray, "an exponent or magnitudes but no votes") or _problem(some, its)
        if wrong is not None:
            raise PayloadError(f"chunk {start + first + wrong[0]} of the payload has {wrong[1]}")
    return exponents


def check_padding(stream: bytes | NDArray[np.uint8], chunks: int, k: int) -> None:
    """Check the last byte of a second stream, or of a whole payload.

    Raises:
        PayloadError: bits after the last chunk are set.
    """
    unused = chunks * (EXPONENT_BITS + k) % 8
    if unused and int(stream[-1]) & ((1 << (8 - unused)) - 1):
        raise PayloadError("the last byte of the payload's magnitudes is not padded with zeros")


def _problem(signs: NDArray[np.int8], exponents: NDArray[np.int8]) -> tuple[int, str] | None:
    """The first chunk whose numbers have another, canonical form, and why; None if all are canonical."""
    doubled = (np.abs(signs) == 2).all(axis=-1) & (exponents < LARGEST)
    stray = (signs[..., 0] == 0) & (exponents != 0)
    return _first(doubled, "magnitudes that are all 2, which is 1 with the next exponent") or _first(
        stray, "an exponent but no votes"
    )


def _first(wrong: NDArray[np.bool_], what: str) -> tuple[int, str] | None:
    """The number of a chunk that is wrong, in any of several payloads, and why; None if none is."""
    return (int(wrong.argmax()) % wrong.shape[-1], what) if wrong.any() else None


@cache
def _powers(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """What a vote of 1 with each exponent counts."""
    with torch.inference_mode(False):
        return torch.tensor([1 << exponent for exponent in range(LARGEST + 1)], dtype=dtype, device=device)


class Sum:
    """The votes of several payloads for the same chunks, added up exactly.

    Args:
        votes: one for each payload, in any order, all with exponents.
        device: where to compute.
        dtype: float64 or int64, which give the same sums; by default float64 on the CPU and int64 elsewhere, as some
            devices are slow with float64 or have none.

    Attributes:
        dtype: of the sums before they are rounded.
        device: as given.
    """

    def __init__(
        self, votes: Sequence[Votes | VotesOn], device: torch.device, dtype: torch.dtype | None = None
    ) -> None:
        self.dtype = dtype or (torch.float64 if device.type == "cpu" else torch.int64)
        self.device = device
        here = [VotesOn.of(one, device) for one in votes]
        self._positions = torch.stack([one.positions for one in here], 1)
        self._signs = torch.stack([one.signs for one in here], 1)
        exponents = torch.stack([one.exponents for one in here if one.exponents is not None], 1)
        self._exponents = _limited(exponents, self._signs[:, :, 0] != 0)
        self._powers = _powers(self.dtype, device)

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


def _limited(exponents: torch.Tensor, voting: torch.Tensor) -> torch.Tensor:
    """Exponents of at most ``HEADROOM`` above the upper median of those that vote in a chunk, all [chunks, payloads].

    So one node among three or more cannot outvote the others by size.
    """
    count = exponents.shape[1]
    ordered = exponents.masked_fill(~voting, -1).sort(dim=1).values  # those without votes come first
    voters = voting.sum(dim=1, keepdim=True)
    median = ordered.gather(1, (count - voters + voters // 2).clamp_(max=count - 1))
    return torch.minimum(exponents, median + HEADROOM)

"""The base of providers whose data is a row of tokens cut into blocks: order, validation, checks and errors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from psyche_lightning.data.order import Order, in_passes
from psyche_lightning.errors import ConfigError, DataError

if TYPE_CHECKING:
    import torch

    from psyche_lightning.data.tokenizer import Encoder

_SHOWN = 8


class Unavailable(Exception):
    """Blocks that a source cannot deliver.

    Attributes:
        numbers: numbers of the blocks.
        lasting: whether another attempt is useless.
    """

    def __init__(self, reason: str, numbers: Iterable[int], *, lasting: bool = False) -> None:
        super().__init__(reason)
        self.numbers = frozenset(numbers)
        self.lasting = lasting


class Blocks(Protocol):
    """Numbered blocks of ``seq_len`` tokens.

    Attributes:
        count: number of blocks.
        fingerprint: a text that is equal on two machines if their blocks are.
    """

    count: int
    fingerprint: str

    def read(self, numbers: Sequence[int]) -> list[NDArray[Any]]:
        """Returns the blocks with these numbers, unsigned integers of shape [seq_len].

        Raises:
            Unavailable: some of them cannot be read.
        """
        ...

    def prefetch(self, numbers: Sequence[int]) -> None:
        """Start to fetch blocks that will be read soon, as many as fit into memory; returns at once."""
        ...


class PackedData:
    """A data provider over blocks of tokens (:class:`psyche_lightning.hookspecs.DataProvider`).

    Blocks spread evenly over the data are held out for validation. The ids number the other blocks, in their order.

    Args:
        blocks: the blocks.
        seq_len: tokens of a block.
        vocab_size: number of token ids; blocks with larger ids are refused.
        order: makes the order for a number of training blocks.
        encoder: has the tokenizer to save with checkpoints.
        validation_samples: number of blocks to hold out.
        source: where the data comes from, for messages.

    Attributes:
        seq_len: tokens of a sample.
        vocab_size: number of token ids.
        fingerprint: fingerprint of the data.

    Raises:
        ConfigError: there are too few blocks.
    """

    def __init__(
        self,
        blocks: Blocks,
        *,
        seq_len: int,
        vocab_size: int,
        order: Callable[[int], Order],
        encoder: Encoder | None = None,
        validation_samples: int = 0,
        source: str,
    ) -> None:
        self.seq_len = seq_len
        self.vocab_size = vocab_size
        self.fingerprint = blocks.fingerprint
        self._blocks = blocks
        self._encoder = encoder
        self._source = source
        self._length = blocks.count - validation_samples
        if self._length < 1:
            raise ConfigError(
                f"There is too little data in {source}: it makes {blocks.count} samples of seq_len={seq_len}, of which "
                f"{validation_samples} are for validation; expected at least one more for training. Add data, or "
                "choose a smaller seq_len or validation_samples."
            )
        # The middles of equal stretches; they are distinct, because a stretch has at least one block.
        held_out = np.arange(validation_samples, dtype=np.int64)
        self._held_out = (2 * held_out + 1) * blocks.count // (2 * validation_samples or 1)
        self._skips = self._held_out - held_out
        self._order = order(self._length)

    def __len__(self) -> int:
        """The number of training samples."""
        return self._length

    @property
    def tokenizer(self) -> Any:
        """The tokenizer as a ``transformers`` object, or None if the data does not name the one that made it."""
        return None if self._encoder is None else self._encoder.tokenizer

    @property
    def end_of_text(self) -> int | None:
        """The id after each text; None if there is none, or nothing names the tokenizer."""
        return None if self._encoder is None else self._encoder.end

    def samples(self, start: int, stop: int) -> list[dict[str, torch.Tensor]]:
        """Returns the training samples with ids from ``start`` up to, but not including, ``stop``; passes follow.

        Returns:
            For each id ``input_ids`` and ``labels``, int64 of shape [seq_len], equal (the model shifts the labels).

        Raises:
            DataError: some samples are not available; it has their ids.
        """
        return self._samples(self._numbers(start, stop), range(start, stop), "samples")

    def prefetch(self, start: int, stop: int) -> None:
        """Start to fetch samples that will be needed soon, within the limit on memory; returns at once."""
        self._blocks.prefetch(self._numbers(start, stop))

    def validation(self) -> list[dict[str, torch.Tensor]]:
        """Returns the held-out samples, in the order of the data, in the same form as training samples.

        Raises:
            DataError: some samples are not available.
        """
        return self._samples(self._held_out.tolist(), range(len(self._held_out)), "validation samples")

    def _numbers(self, start: int, stop: int) -> list[int]:
        """The blocks of these ids."""
        places = np.array(in_passes(self._order, self._length, start, stop), dtype=np.int64)
        numbers: list[int] = (places + np.searchsorted(self._skips, places, side="right")).tolist()
        return numbers

    def _samples(self, numbers: list[int], ids: range, what: str) -> list[dict[str, torch.Tensor]]:
        try:
            blocks = self._blocks.read(numbers)
        except Unavailable as error:
            lost = [one for one, number in zip(ids, numbers, strict=True) if number in error.numbers]
            raise DataError(
                f"{what} {intervals(lost)} of {self._source} are not available: {error}",
                ids=lost,
                lasting=error.lasting,
            ) from error
        samples = [self._sample(block) for block in blocks]
        tops = [int(sample["input_ids"].max()) for sample in samples]
        wrong = [one for one, top in zip(ids, tops, strict=True) if top >= self.vocab_size]
        if wrong:
            largest = max(tops)
            raise DataError(
                f"{what} {intervals(wrong)} of {self._source} have token ids up to {largest}, but the vocabulary has "
                f"{self.vocab_size}: another tokenizer made the data, or token_size does not fit the files",
                ids=wrong,
                lasting=True,
            )
        return samples

    def _sample(self, block: NDArray[Any]) -> dict[str, torch.Tensor]:
        import torch

        tokens = torch.from_numpy(block.astype(np.int64))
        return {"input_ids": tokens, "labels": tokens.clone()}


def intervals(ids: Sequence[int]) -> str:
    """Numbers as intervals, for people: ``3-5, 9``."""
    found: list[list[int]] = []
    for one in sorted(ids):
        if found and one - found[-1][1] <= 1:
            found[-1][1] = one
        else:
            found.append([one, one])
    texts = [f"{first}" if first == last else f"{first}-{last}" for first, last in found]
    more = [f"and {len(texts) - _SHOWN} more intervals"] if len(texts) > _SHOWN else []
    return ", ".join([*texts[:_SHOWN], *more])

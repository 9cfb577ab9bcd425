"""Tokenizes documents into a temporary file, as far as samples are requested."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tenacity import Retrying, retry_if_exception_type, retry_if_not_exception_type, stop_after_delay
from tenacity import wait_random_exponential as wait

from psyche_lightning import system
from psyche_lightning.data.damage import is_damage
from psyche_lightning.data.packed import Unavailable
from psyche_lightning.data.tokenizer import Encoder, QuietProgress
from psyche_lightning.errors import ConfigError, DataError, counted

Documents = Callable[[int], Iterator["bytes | NDArray[np.int64]"]]
"""Yields the texts, or their token ids, from the one with this number on; called again after a failure."""


class Spool:
    """Blocks of ``seq_len`` tokens, cut from the tokens of all documents; memory holds one document.

    The file is in ``TMPDIR``. It has no name, so it disappears however the process ends. A copy in another process
    reads the documents again, as far as its blocks are requested.

    Args:
        documents: yields the texts; may fail temporarily.
        encoder: makes the ids.
        seq_len: tokens of a block.
        vocab_size: number of token ids; None for the encoder's.
        most: the most blocks to make; None for all.
        lazily: whether to read documents only when their blocks are requested; ``most`` is then the count.
        retry_seconds: how long to try reading again before blocks count as lost.

    Attributes:
        count: number of blocks.
        fingerprint: fingerprint of all blocks; lazily, of the first one.

    Raises:
        DataError: the documents cannot be read, or there is no space for their tokens.
    """

    def __init__(
        self,
        documents: Documents,
        encoder: Encoder,
        seq_len: int,
        *,
        vocab_size: int | None = None,
        most: int | None = None,
        lazily: bool = False,
        retry_seconds: float = 0.0,
    ) -> None:
        self._documents = documents
        self._encoder = encoder
        self._seq_len = seq_len
        self._vocab_size = vocab_size or encoder.vocab_size
        self._dtype = np.dtype(np.min_scalar_type(self._vocab_size - 1))
        self._most = most
        self._lazily = lazily
        self._retry_seconds = retry_seconds
        self._begin()
        try:
            with QuietProgress("Tokenizing documents", None) as progress:
                self._fill(1 if lazily else None, progress)
        except Unavailable as error:
            raise DataError(str(error)) from error
        made = self._tokens // seq_len
        self.count = min(made, most) if most is not None else made
        digest = self._sha256(self.count)
        self.fingerprint = f"{self.count} samples, {digest}"
        if lazily:
            assert most is not None
            self.count = most
            self.fingerprint = f"stream of {most} samples, the first {digest}"

    def _begin(self) -> None:
        self._file = tempfile.TemporaryFile(prefix="psyche-")  # noqa: SIM115 - closed with this object
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._texts: Iterator[bytes | NDArray[np.int64]] | None = None
        self._read = 0
        self._tokens = 0
        self._ended = False
        self._target = 0
        self._worker: threading.Thread | None = None

    def __getstate__(self) -> dict[str, Any]:
        left_out = ("_file", "_lock", "_texts", "_worker")
        return {name: value for name, value in self.__dict__.items() if name not in left_out}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()

    # --- blocks -----------------------------------------------------------------------------------------------------

    def read(self, numbers: Sequence[int]) -> list[NDArray[Any]]:
        """Returns the blocks with these numbers, after tokenizing all blocks before them.

        Raises:
            Unavailable: the documents cannot be read that far.
        """
        if self._lazily and self._process != os.getpid():  # a forked worker must not write to its parent's file
            self._begin()
        self._fill(max(numbers, default=-1) + 1)
        size = self._seq_len * self._dtype.itemsize
        return [np.frombuffer(self._at(number * size, size), self._dtype) for number in numbers]

    def _at(self, offset: int, size: int) -> bytes:
        return system.read_at(self._file, size, offset, self._lock)

    def prefetch(self, numbers: Sequence[int]) -> None:
        """Start to tokenize up to these blocks."""
        self._target = max(self._target, max(numbers, default=-1) + 1)
        if self._lazily and self._process == os.getpid() and (self._worker is None or not self._worker.is_alive()):
            self._worker = threading.Thread(target=self._prefetch, name="psyche-spool", daemon=True)
            self._worker.start()

    def _prefetch(self) -> None:
        with contextlib.suppress(Unavailable):  # reading the blocks raises it again
            self._fill(self._target)

    # --- filling ----------------------------------------------------------------------------------------------------

    def _fill(self, blocks: int | None, progress: QuietProgress | None = None) -> None:
        """Tokenize until there are this many blocks, or all of them."""
        wanted = self._most if blocks is None else blocks
        retrying = Retrying(
            stop=stop_after_delay(self._retry_seconds),
            wait=wait(multiplier=0.2, max=3.0),
            retry=retry_if_exception_type(Exception) & retry_if_not_exception_type((ConfigError, DataError)),
            reraise=True,
        )
        with self._lock:
            try:
                retrying(self._append, wanted, progress)
            except (ConfigError, DataError):
                raise
            except Exception as error:  # errors of data sets have no common type
                self._texts = None
                here, end = self._tokens // self._seq_len, self._most if wanted is None else wanted
                reason = f"the documents after number {self._read} cannot be read ({type(error).__name__}: {error})"
                lasting = not self._retry_seconds and is_damage(error)  # a file on this machine
                raise Unavailable(reason, range(here, end or here + 1), lasting=lasting) from error

    def _append(self, blocks: int | None, progress: QuietProgress | None) -> None:
        if self._ended or (blocks is not None and self._tokens >= blocks * self._seq_len):
            return
        if self._texts is None:
            self._texts = self._documents(self._read)
        try:
            self._append_from(self._texts, blocks, progress)
        except BaseException:
            self._texts = None
            raise

    def _append_from(
        self, texts: Iterator[bytes | NDArray[np.int64]], blocks: int | None, progress: QuietProgress | None
    ) -> None:
        try:
            while blocks is None or self._tokens < blocks * self._seq_len:
                text = next(texts, None)
                if text is None:
                    self._ended = True
                    break
                ids = self._encoder.encode(text) if isinstance(text, bytes) else self._checked(text)
                self._write(ids.tobytes())
                self._read += 1
                self._tokens += len(ids)
                if progress is not None:
                    progress.advance(1)
        finally:
            self._write(b"", flush=True)
        needed = (blocks or 0) * self._seq_len
        if self._lazily and self._tokens < needed:
            raise ConfigError(
                f"The data set ended after {counted(self._tokens // self._seq_len, 'sample')} of "
                f"seq_len={self._seq_len}, fewer than max_samples={self._most}; set max_samples to that number or less."
            )

    def _checked(self, ids: NDArray[np.int64]) -> NDArray[Any]:
        """Ids from elsewhere in the type of the file."""
        wrong = ids[(ids < 0) | (ids >= self._vocab_size)]
        if len(wrong):
            raise ConfigError(
                f"Row {self._read} of the data has the token id {int(wrong[0])}, but the vocabulary has "
                f"{self._vocab_size}: another tokenizer made the data, or vocab_size is too small."
            )
        return ids.astype(self._dtype)

    def _write(self, data: bytes, *, flush: bool = False) -> None:
        try:
            self._file.write(data)
            if flush:
                self._file.flush()
        except OSError as error:
            raise DataError(
                f"There is no space for the tokens in {tempfile.gettempdir()}: {error.strerror}. Set TMPDIR to a "
                "folder on a larger disk."
            ) from error

    def _sha256(self, blocks: int) -> str:
        digest = hashlib.sha256()
        end = blocks * self._seq_len * self._dtype.itemsize
        for start in range(0, end, 1 << 20):
            digest.update(self._at(start, min(1 << 20, end - start)))
        return digest.hexdigest()

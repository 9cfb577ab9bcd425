"""``dataset.json`` describes a folder of token files; the writer makes such folders."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from psyche_lightning.data.files import MAX_FILES, SUFFIXES, TOKEN_SIZES
from psyche_lightning.data.tokenizer import BYTES, Encoder
from psyche_lightning.errors import ConfigError, DataError

NAME = "dataset.json"
MAX_SIZE = 4 << 20
"""The most bytes of a description."""
FORMAT = "psyche tokens 1"
TOKENIZER = "tokenizer"
"""Folder next to the description, in the format of ``save_pretrained``."""


@dataclass(frozen=True)
class TokenFile:
    """One file of a folder.

    Attributes:
        name: name within the folder.
        tokens: number of tokens.
        sha256: SHA-256 of its bytes, in hex.
    """

    name: str
    tokens: int
    sha256: str


@dataclass(frozen=True)
class Description:
    """Describes a folder of token files.

    Attributes:
        token_size: bytes of a token.
        vocab_size: number of token ids.
        tokenizer: ``"bytes"``, or ``"tokenizer"`` for the folder of that name.
        files: the files, in order.
    """

    token_size: int
    vocab_size: int
    tokenizer: str
    files: tuple[TokenFile, ...] = field(default_factory=tuple)

    @property
    def tokens(self) -> int:
        """Tokens of all files."""
        return sum(file.tokens for file in self.files)

    def text(self) -> str:
        """The content of ``dataset.json``."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n"

    @classmethod
    def parse(cls, text: bytes, where: str) -> Description:
        """Read what :meth:`text` wrote.

        Args:
            text: untrusted bytes.
            where: where they come from, for messages.

        Raises:
            ConfigError: they are something else.
        """
        try:
            values = json.loads(text)
            if values.pop("format") != FORMAT:
                raise ValueError(f"its format is not {FORMAT!r}")
            files = tuple(TokenFile(**file) for file in values.pop("files"))
            found = cls(**values, files=files)
            found._check()
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ConfigError(f"{where} does not describe token files that psyche can read: {error}.") from error
        return found

    def _check(self) -> None:
        if self.token_size not in TOKEN_SIZES or self.tokenizer not in (BYTES, TOKENIZER):
            raise ValueError(f"token_size is {self.token_size!r}, tokenizer {self.tokenizer!r}")
        if type(self.vocab_size) is not int or not 0 < self.vocab_size <= 1 << 32:
            raise ValueError(f"vocab_size is {self.vocab_size!r}")
        if not 0 < len(self.files) <= MAX_FILES:
            raise ValueError(f"it names {len(self.files)} files")
        for file in self.files:
            plain = isinstance(file.name, str) and file.name == Path(file.name).name and "\\" not in file.name
            if not plain or Path(file.name).suffix not in SUFFIXES:
                raise ValueError(f"it names the file {file.name!r}")
            if type(file.tokens) is not int or file.tokens < 0:
                raise ValueError(f"it gives {file.name} {file.tokens!r} tokens")


def read_description(folder: Path) -> Description | None:
    """Returns the description in a folder, or None if there is none.

    Raises:
        ConfigError: it is malformed, or the files differ from it.
    """
    path = folder / NAME
    if not path.is_file():
        return None
    with path.open("rb") as file:
        found = Description.parse(file.read(MAX_SIZE), str(path))
    for one in found.files:
        size = (folder / one.name).stat().st_size if (folder / one.name).is_file() else None
        if size != one.tokens * found.token_size:
            raise ConfigError(
                f"{folder / one.name} {'is missing' if size is None else f'has {size} bytes'}, but {path} says that it "
                f"has {one.tokens * found.token_size}; copy the folder again, or tokenize the text again."
            )
    return found


class TokenWriter:
    """Writes token files and finally their description.

    Args:
        folder: a new or empty folder.
        encoder: makes the ids.
        token_size: bytes of a token; None for the smallest size that fits the vocabulary.
        file_tokens: tokens after which a new file begins.

    Attributes:
        tokens: tokens written so far.

    Raises:
        ConfigError: the folder is not empty or cannot be created, or the token size is too small.
    """

    def __init__(
        self, folder: Path, encoder: Encoder, *, token_size: int | None = None, file_tokens: int = 1 << 30
    ) -> None:
        size = token_size or (2 if encoder.vocab_size <= 1 << 16 else 4)
        if size not in TOKEN_SIZES or encoder.vocab_size > 1 << (8 * size):
            raise ConfigError(
                f"token_size is {token_size}, expected {' or '.join(map(str, TOKEN_SIZES))} bytes, enough for the "
                f"tokenizer's {encoder.vocab_size} ids."
            )
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if any(folder.iterdir()):
                raise ConfigError(f"The folder {folder} is not empty; choose a new one for the token files.")
        except OSError as error:
            raise ConfigError(f"The folder {folder} cannot be created: {error.strerror}.") from error
        self.tokens = 0
        self._folder = folder
        self._encoder = encoder
        self._size = size
        self._most = file_tokens
        self._files: list[TokenFile] = []
        self._open: IO[bytes] | None = None
        self._here = 0
        self._digest = hashlib.sha256()

    def write(self, ids: NDArray[Any]) -> None:
        """Append ids.

        Raises:
            DataError: the disk is full or gone.
        """
        try:
            while len(ids):
                part, ids = ids[: self._most - self._here], ids[self._most - self._here :]
                if self._open is None:
                    self._open = (self._folder / self._name).open("wb")
                data = part.astype(f"<u{self._size}").tobytes()
                self._open.write(data)
                self._digest.update(data)
                self._here += len(part)
                self.tokens += len(part)
                if self._here == self._most:
                    self._finish_file()
        except OSError as error:
            raise DataError(f"{self._folder / self._name} cannot be written: {error.strerror}.") from error

    def close(self) -> Description:
        """Write the tokenizer and, last, the description.

        Raises:
            ConfigError: nothing was written.
            DataError: the disk is full or gone.
        """
        try:
            self._finish_file()
            if not self._files:
                raise ConfigError("There is no text to tokenize: all files are empty.")
            tokenizer = BYTES if self._encoder.is_bytes else TOKENIZER
            if tokenizer == TOKENIZER:
                self._encoder.tokenizer.save_pretrained(self._folder / TOKENIZER)
            found = Description(self._size, self._encoder.vocab_size, tokenizer, tuple(self._files))
            fresh = self._folder / f"{NAME}.new"
            fresh.write_text(found.text(), encoding="utf-8")
            fresh.replace(self._folder / NAME)
        except OSError as error:
            raise DataError(f"The folder {self._folder} cannot be written: {error.strerror}.") from error
        return found

    @property
    def _name(self) -> str:
        return f"tokens-{len(self._files):05}.bin"

    def _finish_file(self) -> None:
        if self._open is not None:
            self._open.close()
            self._files.append(TokenFile(self._name, self._here, self._digest.hexdigest()))
            self._open, self._here, self._digest = None, 0, hashlib.sha256()


def changed_files(folder: Path, description: Description) -> list[str]:
    """The names of the files whose bytes differ from the description."""
    return [file.name for file in description.files if _sha256(folder / file.name) != file.sha256]


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def largest_id(path: Path, token_size: int, start: int = 0) -> int:
    """The largest token id in a file; -1 if it has none."""
    largest = -1
    with path.open("rb") as file:
        file.seek(start)
        while chunk := file.read(token_size << 20):
            ids = np.frombuffer(chunk[: len(chunk) // token_size * token_size], f"<u{token_size}")
            largest = max(largest, int(ids.max(initial=0)))
    return largest

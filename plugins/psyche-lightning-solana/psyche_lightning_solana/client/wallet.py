"""A wallet: the Ed25519 key pair that signs a node's transactions and pays for them.

The secret never leaves this module: no log, error, ``repr`` or traceback shows it.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

from solders.keypair import Keypair
from solders.message import MessageV0, to_bytes_versioned
from solders.pubkey import Pubkey
from solders.signature import Signature

from psyche_lightning import system
from psyche_lightning.errors import ConfigError

PATH_VARIABLE = "PSYCHE_WALLET"
SECRET_VARIABLE = "PSYCHE_WALLET_SECRET"
DEFAULT_PATH = "~/.config/solana/id.json"
KEYPAIR_SIZE = 64
MAX_FILE_SIZE = 4096

_MAKE_ONE = "Make one with `psyche solana keygen FILE`, or with `solana-keygen new -o FILE`."


class Wallet:
    """Signs messages. You cannot print or pickle it, nor copy it into a printable object.

    Args:
        keypair: the key pair.
        source: its origin, in words for messages.

    Attributes:
        public: its address.
        source: as given.
    """

    __slots__ = ("__keypair", "public", "source")

    def __init__(self, keypair: Keypair, source: str = "a generated key") -> None:
        self.__keypair = keypair
        self.public: Pubkey = keypair.pubkey()
        self.source = source

    def __repr__(self) -> str:
        return f"Wallet({self.public})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a wallet is not pickled")

    def sign(self, message: MessageV0) -> Signature:
        """The wallet's signature of a transaction's message."""
        return self.__keypair.sign_message(to_bytes_versioned(message))

    @classmethod
    def generate(cls) -> Wallet:
        """A fresh random wallet."""
        return cls(Keypair())

    @classmethod
    def load(cls, path: str | os.PathLike[str] | None = None, environment: Mapping[str, str] = os.environ) -> Wallet:
        """Find the wallet: ``path``, ``PSYCHE_WALLET_SECRET``, ``PSYCHE_WALLET``, or solana-cli's default.

        Args:
            path: a file in solana-cli's form, a JSON list of 64 numbers.
            environment: the variables. ``PSYCHE_WALLET_SECRET`` holds the list itself, or base58.

        Raises:
            ConfigError: it is missing, unreadable, readable by others, or not a key pair.
        """
        if path is None and environment.get(SECRET_VARIABLE):
            return _parse(environment[SECRET_VARIABLE], f"the variable {SECRET_VARIABLE}")
        given = path or environment.get(PATH_VARIABLE)
        return _read(Path(given or DEFAULT_PATH).expanduser(), chosen=bool(given))


def create(path: Path) -> Wallet:
    """Write a fresh wallet to a new file that only its owner can read.

    Raises:
        ConfigError: the file exists already, or cannot be written.
    """
    keypair = Keypair()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(json.dumps(list(bytes(keypair))))
            file.flush()
            os.fsync(file.fileno())
    except FileExistsError:
        raise ConfigError(f"{path} exists already; a wallet is never overwritten. Choose another file.") from None
    except OSError as error:
        raise ConfigError(f"cannot write the wallet {path}: {error.strerror}") from None
    return Wallet(keypair, str(path))


def _read(path: Path, *, chosen: bool) -> Wallet:
    try:
        with path.open("rb") as file:
            exposed = system.open_to_others(file)
            text = file.read(MAX_FILE_SIZE + 1).decode("ascii", "replace")
    except FileNotFoundError:
        hint = "" if chosen else f" No wallet was named: neither {SECRET_VARIABLE} nor {PATH_VARIABLE} is set."
        raise ConfigError(f"there is no wallet {path}.{hint} {_MAKE_ONE}") from None
    except OSError as error:
        raise ConfigError(f"cannot read the wallet {path}: {error.strerror}") from None
    if exposed:
        raise ConfigError(
            f"other users can read the wallet {path}, and spend its SOL. Close it with "
            f"`chmod 600 {shlex.quote(str(path))}`."
        )
    return _parse(text, str(path))


def _parse(text: str, source: str) -> Wallet:
    # The parsers' errors quote their input; `from None` and our own texts hide it.
    try:
        text = text.strip()
        if text.startswith("["):
            keypair = Keypair.from_bytes(_bytes(json.loads(text)))
        else:
            keypair = Keypair.from_base58_string(text)
        if Keypair.from_seed(bytes(keypair)[:32]) != keypair:
            raise ValueError
    except (ValueError, TypeError, RecursionError):
        raise ConfigError(
            f"{source} is not a wallet; expected solana-cli's form, a JSON list of {KEYPAIR_SIZE} numbers from 0 to "
            f"255 whose second half is the public key of the first. {_MAKE_ONE}"
        ) from None
    return Wallet(keypair, source)


def _bytes(values: object) -> bytes:
    if not isinstance(values, list) or len(values) != KEYPAIR_SIZE or any(type(value) is not int for value in values):
        raise ValueError
    return bytes(values)

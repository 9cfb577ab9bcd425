"""The parameters of a call, checked before they are used."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from solders.hash import Hash
from solders.pubkey import Pubkey
from solders.signature import Signature

from psyche_lightning_solana.localnet.chain import COMMITMENTS
from psyche_lightning_solana.localnet.errors import invalid_params

MAX_U64 = (1 << 64) - 1


class Params:
    """Positional parameters.

    Args:
        values: the member ``params`` of a request; None if there was none.

    Raises:
        RpcError: -32602, they are not a list.
    """

    def __init__(self, values: object) -> None:
        if values is not None and not isinstance(values, list):
            raise invalid_params("Invalid params: expected an array of positional parameters.")
        self._values: list[Any] = values or []

    def raw(self, index: int) -> Any:
        """A parameter as it is; None if it is missing."""
        return self._values[index] if index < len(self._values) else None

    def required(self, index: int) -> Any:
        """A parameter that must be there."""
        value = self.raw(index)
        if value is None:
            raise invalid_params(f"`params` should have at least {index + 1} argument(s)")
        return value

    def integer(self, index: int) -> int:
        """A whole number of 64 bits without sign."""
        return _integer(self.required(index))

    def pubkey(self, index: int) -> Pubkey:
        """An address."""
        return _pubkey(self.required(index))

    def pubkeys(self, index: int, most: int) -> list[Pubkey]:
        """A list of addresses."""
        return [_pubkey(value) for value in self._list(index, most)]

    def signatures(self, index: int, most: int) -> list[str]:
        """A list of signatures, in base58."""
        return [_signature(value) for value in self._list(index, most)]

    def signature(self, index: int) -> str:
        """A signature, in base58."""
        return _signature(self.required(index))

    def blockhash(self, index: int) -> Hash:
        """A blockhash."""
        try:
            return Hash.from_string(self.required(index))
        except (ValueError, TypeError):
            raise invalid_params("Invalid param: Invalid") from None

    def config(self, index: int, *, commitment: str = "finalized") -> Config:
        """The options at the end; none if they are missing.

        Args:
            index: where they would be.
            commitment: what the method takes when it is not told.
        """
        value = self.raw(index)
        if value is not None and not isinstance(value, dict):
            raise invalid_params("Invalid params: expected an object of options.")
        return Config(value or {}, commitment)

    def _list(self, index: int, most: int) -> list[Any]:
        values = self.required(index)
        if not isinstance(values, list):
            raise invalid_params("Invalid params: expected an array.")
        if len(values) > most:
            raise invalid_params(f"Too many inputs provided; max {most}")
        return values


class Config:
    """The options of a call.

    Args:
        values: by name.
        commitment: what it is unless given.
    """

    def __init__(self, values: dict[str, Any], commitment: str = "finalized") -> None:
        self._values = values
        self._commitment = commitment

    @property
    def commitment(self) -> str:
        """``processed``, ``confirmed`` or ``finalized``."""
        return self.choice("commitment", COMMITMENTS, self._commitment)

    @property
    def min_context_slot(self) -> int | None:
        """The slot that the answer must not be older than."""
        return self.integer("minContextSlot")

    @property
    def data_slice(self) -> dict[str, int] | None:
        """``offset`` and ``length``, or None."""
        value = self._values.get("dataSlice")
        if value is None:
            return None
        if not isinstance(value, dict):
            raise invalid_params("Invalid params: dataSlice needs an offset and a length.")
        return {name: _integer(value.get(name)) for name in ("offset", "length")}

    def get(self, name: str) -> Any:
        """An option as it is; None if it is missing."""
        return self._values.get(name)

    def choice(self, name: str, choices: Sequence[str], default: str) -> str:
        """An option that is one of several words."""
        value = self._values.get(name)
        if value is None:
            return default
        if value not in choices:
            raise invalid_params(f"Invalid params: unknown variant `{value}`, expected one of {', '.join(choices)}.")
        return str(value)

    def flag(self, name: str) -> bool:
        """An option that is true or false; false if it is missing."""
        value = self._values.get(name)
        if value is not None and not isinstance(value, bool):
            raise invalid_params(f"Invalid params: {name}: expected a boolean.")
        return bool(value)

    def integer(self, name: str) -> int | None:
        """An option that is a whole number without sign, or None."""
        value = self._values.get(name)
        return None if value is None else _integer(value)

    def signature(self, name: str) -> str | None:
        """An option that is a signature, or None."""
        value = self._values.get(name)
        return None if value is None else _signature(value)


def _integer(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_U64:
        raise invalid_params("Invalid params: invalid type: expected u64.")
    return value


def _pubkey(value: object) -> Pubkey:
    try:
        return Pubkey.from_string(value)  # type: ignore[arg-type]
    except (ValueError, TypeError):
        raise invalid_params("Invalid param: Invalid") from None


def _signature(value: object) -> str:
    try:
        return str(Signature.from_string(value))  # type: ignore[arg-type]
    except (ValueError, TypeError):
        raise invalid_params("Invalid param: Invalid") from None

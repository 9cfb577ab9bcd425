"""JSON-RPC over any connection: reads requests, checks their parameters, and writes responses."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from solders.hash import Hash
from solders.pubkey import Pubkey
from solders.signature import Signature

from psyche_lightning_localnet.chain import COMMITMENTS, LocalChain
from psyche_lightning_localnet.errors import (
    INTERNAL_ERROR,
    INVALID_REQUEST,
    METHOD_NOT_FOUND,
    MIN_CONTEXT_SLOT,
    PARSE_ERROR,
    RpcError,
    invalid_params,
)

API_VERSION = "2.2.0"
MAX_U64 = (1 << 64) - 1


class Params:
    """The positional parameters of a request.

    Args:
        values: the member ``params`` of a request; None if missing.

    Raises:
        RpcError: -32602, the parameters are not a list.
    """

    def __init__(self, values: object) -> None:
        if values is not None and not isinstance(values, list):
            raise invalid_params("Invalid params: expected an array of positional parameters.")
        self._values: list[Any] = values or []

    def raw(self, index: int) -> Any:
        """A parameter without checks; None if it is missing."""
        return self._values[index] if index < len(self._values) else None

    def required(self, index: int) -> Any:
        """A required parameter."""
        value = self.raw(index)
        if value is None:
            raise invalid_params(f"`params` should have at least {index + 1} argument(s)")
        return value

    def integer(self, index: int) -> int:
        """An unsigned 64-bit integer."""
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
        """The options, which are the last parameter; empty if they are missing.

        Args:
            index: their position.
            commitment: the method's default commitment.
        """
        value = self.raw(index)
        if value is not None and not isinstance(value, dict):
            raise invalid_params("Invalid params: expected an object of options.")
        return Config(value or {}, commitment)

    def options(self, index: int) -> Config:
        """The options of a method that once took only an encoding there, as a word."""
        value = self.raw(index)
        return Config({"encoding": value}) if isinstance(value, str) else self.config(index)

    def _list(self, index: int, most: int) -> list[Any]:
        values = self.required(index)
        if not isinstance(values, list):
            raise invalid_params("Invalid params: expected an array.")
        if len(values) > most:
            raise invalid_params(f"Too many inputs provided; max {most}")
        return values


class Config:
    """The options of a request.

    Args:
        values: the options by name.
        commitment: the default commitment.
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
        """The oldest slot that the answer may have; None for any."""
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
        """An option without checks; None if it is missing."""
        return self._values.get(name)

    def choice(self, name: str, choices: Sequence[str], default: str) -> str:
        """An option that is one of several words."""
        value = self._values.get(name)
        if value is None:
            return default
        if value not in choices:
            raise invalid_params(f"Invalid params: unknown variant `{value}`, expected one of {', '.join(choices)}.")
        return str(value)

    def flag(self, name: str, *, default: bool = False) -> bool:
        """A boolean option."""
        value = self._values.get(name)
        if value is not None and not isinstance(value, bool):
            raise invalid_params(f"Invalid params: {name}: expected a boolean.")
        return default if value is None else bool(value)

    def integer(self, name: str) -> int | None:
        """An unsigned integer option, or None."""
        value = self._values.get(name)
        return None if value is None else _integer(value)

    def signature(self, name: str) -> str | None:
        """A signature option, or None."""
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


Method = Callable[[LocalChain, Params], Any]


def with_context(chain: LocalChain, config: Config, value: Any) -> dict[str, Any]:
    """An answer with its slot."""
    return {"context": {"slot": chain.slot_at(config.commitment), "apiVersion": API_VERSION}, "value": value}


def require_context(chain: LocalChain, config: Config) -> None:
    """Check that the commitment has the slot that the client requires.

    Raises:
        RpcError: -32016, it has older slots only.
    """
    slot = chain.slot_at(config.commitment)
    if config.min_context_slot is not None and config.min_context_slot > slot:
        raise RpcError(MIN_CONTEXT_SLOT, "Minimum context slot has not been reached", {"contextSlot": slot})


def require_settled(config: Config) -> None:
    """Check that the client asks for a commitment at which blocks do not change.

    Raises:
        RpcError: -32602, it asks for ``processed``.
    """
    if config.commitment == "processed":
        raise invalid_params("Method does not support commitment below `confirmed`")


def parse(text: str | bytes) -> Any:
    """Parse a request or a batch of requests.

    Raises:
        RpcError: -32700, the text is not JSON.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise RpcError(PARSE_ERROR, "Parse error") from None


def answer(identity: Any, result: Any) -> dict[str, Any]:
    """The response with a result."""
    return {"jsonrpc": "2.0", "result": result, "id": identity}


def refusal(identity: Any, error: RpcError) -> dict[str, Any]:
    """The response with an error."""
    return {"jsonrpc": "2.0", "error": error.to_json(), "id": identity}


def call(request: Any, run: Callable[[str, Params], Any]) -> dict[str, Any] | None:
    """Handle one request; returns the response, or None if the request needs none.

    Args:
        request: the parsed request.
        run: runs a method with its parameters.
    """
    identity = request.get("id") if isinstance(request, dict) else None
    try:
        if not isinstance(request, dict) or not isinstance(request.get("method"), str):
            raise RpcError(INVALID_REQUEST, "Invalid request")
        result = run(request["method"], Params(request.get("params")))
    except RpcError as error:
        return refusal(identity, error)
    except Exception as error:
        return refusal(identity, RpcError(INTERNAL_ERROR, f"Internal error: {error}"))
    return answer(identity, result) if "id" in request else None


class Methods:
    """Runs the methods of a chain.

    Args:
        chain: the chain.
        methods: the methods by name.
    """

    def __init__(self, chain: LocalChain, methods: Mapping[str, Method]) -> None:
        self._chain = chain
        self._methods = methods

    def respond(self, body: bytes) -> str | None:
        """The response to a request or a batch as JSON; None if it needs none."""
        try:
            requests = parse(body)
        except RpcError as error:
            return json.dumps(refusal(None, error))
        if isinstance(requests, list):
            if not requests:
                return json.dumps(refusal(None, RpcError(INVALID_REQUEST, "Invalid request")))
            answers = [one for one in (call(request, self._run) for request in requests) if one is not None]
            return json.dumps(answers) if answers else None
        single = call(requests, self._run)
        return None if single is None else json.dumps(single)

    def _run(self, name: str, params: Params) -> Any:
        method = self._methods.get(name)
        if method is None:
            raise RpcError(METHOD_NOT_FOUND, "Method not found")
        self._chain.keep_time()
        return method(self._chain, params)

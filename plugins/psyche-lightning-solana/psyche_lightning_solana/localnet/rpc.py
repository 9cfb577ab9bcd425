"""JSON-RPC: requests in, answers out, whatever they travel in."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from psyche_lightning_solana.localnet.chain import LocalChain
from psyche_lightning_solana.localnet.errors import (
    INTERNAL_ERROR,
    INVALID_REQUEST,
    METHOD_NOT_FOUND,
    MIN_CONTEXT_SLOT,
    PARSE_ERROR,
    RpcError,
)
from psyche_lightning_solana.localnet.params import Config, Params

API_VERSION = "2.2.0"

Method = Callable[[LocalChain, Params], Any]


def with_context(chain: LocalChain, config: Config, value: Any) -> dict[str, Any]:
    """An answer and the slot that it is of."""
    return {"context": {"slot": chain.slot_at(config.commitment), "apiVersion": API_VERSION}, "value": value}


def require_context(chain: LocalChain, config: Config) -> None:
    """Refuse when the caller wants a newer slot than there is at its commitment.

    Raises:
        RpcError: -32016.
    """
    slot = chain.slot_at(config.commitment)
    if config.min_context_slot is not None and config.min_context_slot > slot:
        raise RpcError(MIN_CONTEXT_SLOT, "Minimum context slot has not been reached", {"contextSlot": slot})


def parse(text: str | bytes) -> Any:
    """A request, or a batch of them.

    Raises:
        RpcError: -32700, this is not JSON.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise RpcError(PARSE_ERROR, "Parse error") from None


def answer(identity: Any, result: Any) -> dict[str, Any]:
    """A response."""
    return {"jsonrpc": "2.0", "result": result, "id": identity}


def refusal(identity: Any, error: RpcError) -> dict[str, Any]:
    """A response that says no."""
    return {"jsonrpc": "2.0", "error": error.to_json(), "id": identity}


def call(request: Any, run: Callable[[str, Params], Any]) -> dict[str, Any] | None:
    """Handle one request; None if it wants no answer.

    Args:
        request: as parsed.
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
    """The methods of a chain.

    Args:
        chain: which.
        tables: methods by name.
    """

    def __init__(self, chain: LocalChain, *tables: dict[str, Method]) -> None:
        self._chain = chain
        self._methods = {name: method for table in tables for name, method in table.items()}

    def respond(self, body: bytes) -> str | None:
        """The answer to a request or a batch, in JSON; None if it wants none."""
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

"""What goes wrong between a client and the chain, and whether trying again can help (spec S7.6)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

FINAL_CODES = frozenset({-32600, -32601, -32602, -32700, -32003, -32006, -32013, -32015})
"""Codes of JSON-RPC and of Solana for requests that are wrong: malformed, unsigned, of an unknown version."""
PREFLIGHT_FAILURE = -32002
MIN_CONTEXT_SLOT = -32016

RETRYABLE_ERRORS = frozenset(
    {
        "BlockhashNotFound",
        "AccountInUse",
        "ClusterMaintenance",
        "WouldExceedMaxBlockCostLimit",
        "WouldExceedMaxAccountCostLimit",
        "WouldExceedMaxVoteCostLimit",
        "WouldExceedAccountDataBlockLimit",
        "WouldExceedAccountDataTotalLimit",
        "TooManyAccountLocks",
        "ResanitizationNeeded",
        "ProgramCacheHitMaxLimit",
        "CommitCancelled",
    }
)
"""Errors of a transaction that say more about the moment than about it."""
ALREADY = "AlreadyProcessed"
UNFUNDED = frozenset({"AccountNotFound", "InsufficientFundsForFee", "InsufficientFundsForRent"})


class RpcProblem(Exception):
    """A request failed.

    Attributes:
        text: what happened, without what may be secret.
        retryable: whether the same request, perhaps to another service, may succeed.
        code: of JSON-RPC; None where there was no such answer.
        data: what came with the code.
        endpoint: the service's name; empty when it does not matter which.
        wait: seconds that the service asked to be left alone; None when it did not.
        lost: whether the request may have been carried out all the same: some attempt was not answered.
    """

    def __init__(
        self,
        text: str,
        *,
        retryable: bool,
        code: int | None = None,
        data: Mapping[str, Any] | None = None,
        endpoint: str = "",
        wait: float | None = None,
    ) -> None:
        super().__init__(text)
        self.text = text
        self.retryable = retryable
        self.code = code
        self.data = dict(data or {})
        self.endpoint = endpoint
        self.wait = wait
        self.lost = code is None

    @property
    def transaction_error(self) -> Any:
        """Why a transaction failed its preflight, in the JSON of a ``TransactionError``; None if that is not it."""
        return self.data.get("err") if self.code == PREFLIGHT_FAILURE else None


def from_error(error: object, endpoint: str) -> RpcProblem:
    """The problem that the ``error`` object of an answer describes; anything malformed is one, too."""
    if not isinstance(error, Mapping) or type(error.get("code")) is not int:
        return RpcProblem("it answered with a malformed error", retryable=True, endpoint=endpoint)
    code, message, data = error["code"], str(error.get("message"))[:500], error.get("data")
    data = data if isinstance(data, Mapping) else {}
    retryable = code not in FINAL_CODES
    if code == PREFLIGHT_FAILURE:
        retryable = is_retryable(data.get("err"))
    return RpcProblem(f"{message} ({code})", retryable=retryable, code=code, data=data, endpoint=endpoint)


def error_name(error: Any) -> str:
    """The name of a ``TransactionError`` in its JSON form; of an instruction's error that of the inner one."""
    if isinstance(error, str):
        return error
    if isinstance(error, Mapping) and len(error) == 1:
        name, value = next(iter(error.items()))
        if name == "InstructionError" and isinstance(value, list) and len(value) == 2:
            return error_name(value[1])
        if name == "Custom":
            return f"Custom {value}"
        return str(name)
    return "an unknown error"


def custom_code(error: Any) -> int | None:
    """The program's own error number in a ``TransactionError``; None when it is another kind of error."""
    if isinstance(error, Mapping) and isinstance(error.get("InstructionError"), list):
        inner = error["InstructionError"][-1]
        if isinstance(inner, Mapping) and type(inner.get("Custom")) is int:
            return int(inner["Custom"])
    return None


def is_retryable(error: Any) -> bool:
    """Whether a transaction that failed like this may do better later: an error of a program is final."""
    return error_name(error) in RETRYABLE_ERRORS

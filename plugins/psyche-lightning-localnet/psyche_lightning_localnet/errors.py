"""The errors of this package, and those of JSON-RPC with the codes, texts and data of a validator.

The codes are those of JSON-RPC 2.0 and of Agave's ``rpc-client-api/src/custom_error.rs``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from solders.rpc.responses import RpcSimulateTransactionResult
from solders.transaction_status import (
    InstructionErrorCustom,
    TransactionErrorDuplicateInstruction,
    TransactionErrorInstructionError,
    TransactionErrorInsufficientFundsForRent,
    TransactionErrorType,
)

BLOCK_CLEANED_UP = -32001
PREFLIGHT_FAILURE = -32002
SIGNATURE_VERIFICATION = -32003
BLOCK_NOT_AVAILABLE = -32004
NODE_UNHEALTHY = -32005
SCAN_ABORTED = -32012
UNSUPPORTED_VERSION = -32015
MIN_CONTEXT_SLOT = -32016
INVALID_REQUEST = -32600
METHOD_NOT_FOUND = -32601
INVALID_PARAMS = -32602
INTERNAL_ERROR = -32603
PARSE_ERROR = -32700


class LocalnetError(Exception):
    """A local chain cannot do something. The text says why, and what to do."""


class LedgerError(LocalnetError):
    """A chain cannot be saved to its folder or loaded from it."""


class RpcError(Exception):
    """An error that a response gives to the client.

    Attributes:
        code: one of the codes above.
        data: further JSON that some codes have; else None.
    """

    def __init__(self, code: int, message: str, data: Any = None) -> None:
        super().__init__(message)
        self.code = code
        self.data = data

    def to_json(self) -> dict[str, Any]:
        """The member ``error`` of a response."""
        error: dict[str, Any] = {"code": self.code, "message": str(self)}
        return error if self.data is None else {**error, "data": self.data}


def invalid_params(message: str) -> RpcError:
    """Build the error for parameters that do not fit the method."""
    return RpcError(INVALID_PARAMS, message)


def simulation_json(
    err: TransactionErrorType | None, logs: Sequence[str] | None = None, units: int | None = None
) -> dict[str, Any]:
    """The result of a simulation as JSON of solders, without the members that only ``simulateTransaction`` adds."""
    result = RpcSimulateTransactionResult(
        err=err, logs=None if logs is None else list(logs), units_consumed=None if units is None else units
    )
    value: dict[str, Any] = json.loads(result.to_json())
    return value


def error_json(err: TransactionErrorType | None) -> Any:
    """A transaction error as JSON in the form of a validator; None if there is none.

    ``to_json`` of the error itself loses the name of its variant. A result that contains the error keeps it.
    """
    return None if err is None else simulation_json(err)["err"]


def preflight_failure(err: TransactionErrorType, logs: Sequence[str], units: int) -> RpcError:
    """Build the error for a transaction that was not sent, because its simulation failed."""
    message = f"Transaction simulation failed: {error_text(err, logs)}"
    return RpcError(PREFLIGHT_FAILURE, message, simulation_json(err, logs, units))


def error_text(err: TransactionErrorType, logs: Sequence[str] = ()) -> str:
    """The text of a validator for a transaction error."""
    if isinstance(err, TransactionErrorInstructionError):
        inner = err.err
        if isinstance(inner, InstructionErrorCustom):
            what = f"custom program error: {inner.code:#x}"
        else:  # the last line of the runtime's log ends with its text
            _, failed, what = (logs[-1] if logs else "").partition(" failed: ")
            what = what if failed else str(inner).rpartition(".")[2]
        return f"Error processing Instruction {err.index}: {what}"
    if isinstance(err, TransactionErrorInsufficientFundsForRent):
        return f"Transaction results in an account ({err.account_index}) with insufficient funds for rent"
    if isinstance(err, TransactionErrorDuplicateInstruction):
        return f"Transaction contains a duplicate instruction ({err.index}) that is not allowed"
    return _TEXTS.get(str(err).rpartition(".")[2], f"Transaction failed: {err}")


_TEXTS = {
    "AccountInUse": "Account in use",
    "AccountLoadedTwice": "Account loaded twice",
    "AccountNotFound": "Attempt to debit an account but found no record of a prior credit.",
    "ProgramAccountNotFound": "Attempt to load a program that does not exist",
    "InsufficientFundsForFee": "Insufficient funds for fee",
    "InvalidAccountForFee": "This account may not be used to pay transaction fees",
    "AlreadyProcessed": "This transaction has already been processed",
    "BlockhashNotFound": "Blockhash not found",
    "SanitizeFailure": "Transaction failed to sanitize accounts offsets correctly",
    "SignatureFailure": "Transaction did not pass signature verification",
    "TooManyAccountLocks": "Transaction locked too many accounts",
    "InvalidProgramForExecution": "This program may not be used for executing instructions",
    "AddressLookupTableNotFound": "Transaction loads an address table account that doesn't exist",
    "InvalidAddressLookupTableOwner": "Transaction loads an address table account with an invalid owner",
    "InvalidAddressLookupTableData": "Transaction loads an address table account with invalid data",
    "InvalidAddressLookupTableIndex": "Transaction address table lookup uses an invalid index",
    "MaxLoadedAccountsDataSizeExceeded": "Transaction exceeded max loaded accounts data size cap",
    "InvalidLoadedAccountsDataSizeLimit": "LoadedAccountsDataSizeLimit set for transaction must be greater than 0.",
    "UnbalancedTransaction": "Sum of account balances before and after transaction do not match",
}

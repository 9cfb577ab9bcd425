"""Methods that send, simulate and look up transactions."""

from __future__ import annotations

from itertools import islice
from typing import Any

from solders.transaction import VersionedTransaction

from psyche_lightning_solana.localnet.chain import MAX_PROCESSING_AGE, LocalChain
from psyche_lightning_solana.localnet.encoding import (
    ACCOUNT_ENCODINGS,
    TRANSACTION_ENCODINGS,
    account_json,
    inner_json,
    return_data_json,
    transaction_json,
)
from psyche_lightning_solana.localnet.errors import (
    INTERNAL_ERROR,
    NODE_UNHEALTHY,
    SIGNATURE_VERIFICATION,
    RpcError,
    error_json,
    invalid_params,
    preflight_failure,
    simulation_json,
)
from psyche_lightning_solana.localnet.fees import fee_of
from psyche_lightning_solana.localnet.params import Config, Params
from psyche_lightning_solana.localnet.rpc import Method, require_context, with_context
from psyche_lightning_solana.localnet.transactions import decode, decode_message, with_blockhash

MAX_STATUSES = 256
MAX_SIGNATURES = 1000
MAX_FEE_ACCOUNTS = 128
MAX_AIRDROP = 1_000_000 * 10**9


def send_transaction(chain: LocalChain, params: Params) -> Any:
    """Check a transaction unless told not to, and let it land."""
    config = params.config(1)
    config.integer("maxRetries")  # there is nothing to retry: it lands at once or not at all
    transaction = decode(params.required(0), config.choice("encoding", ("base58", "base64"), "base58"))
    at = Config({**_only(config, "minContextSlot"), "commitment": config.get("preflightCommitment")})
    require_context(chain, at)
    chain.names(transaction)
    preflight = None
    if not config.flag("skipPreflight"):
        _require_signatures(transaction)
        if not chain.healthy:
            raise RpcError(NODE_UNHEALTHY, "Node is unhealthy", {"numSlotsBehind": None})
        preflight = chain.simulate(transaction, commitment=at.commitment)
        if preflight.err is not None:
            raise preflight_failure(preflight.err, preflight.logs, preflight.units)
    chain.submit(transaction, preflight)
    return str(transaction.signatures[0])


def simulate_transaction(chain: LocalChain, params: Params) -> Any:
    """What a transaction would come to."""
    config = params.config(1)
    require_context(chain, config)
    transaction = decode(params.required(0), config.choice("encoding", ("base58", "base64"), "base58"))
    verify, replace = config.flag("sigVerify"), config.flag("replaceRecentBlockhash")
    if verify and replace:
        raise invalid_params("sigVerify may not be used with replaceRecentBlockhash")
    replacement = None
    if replace:
        slot = chain.slot_at(config.commitment)
        transaction = with_blockhash(transaction, chain.blockhash(slot))
        replacement = {
            "blockhash": str(chain.blockhash(slot)),
            "lastValidBlockHeight": slot + MAX_PROCESSING_AGE,
        }
    names = chain.names(transaction)
    if verify:
        _require_signatures(transaction)
    wanted = _wanted_accounts(config, len(names.keys))
    outcome = chain.simulate(transaction, commitment=config.commitment, verify=verify)
    value = simulation_json(outcome.err, outcome.logs, outcome.units)
    value["replacementBlockhash"] = replacement
    value["returnData"] = return_data_json(outcome.return_data)
    if config.flag("innerInstructions"):
        value["innerInstructions"] = list(inner_json(outcome.inner))
    if wanted is not None:
        keys, encoding = wanted
        # A failed transaction changes nothing that its caller would want to see.
        changes = outcome.changes if outcome.err is None else {}
        accounts = [changes.get(key) or chain.account(key, config.commitment) for key in keys]
        value["accounts"] = [
            None if item is None or item.lamports == 0 else account_json(item, encoding) for item in accounts
        ]
    return with_context(chain, config, value)


def get_signature_statuses(chain: LocalChain, params: Params) -> Any:
    """What became of up to 256 transactions."""
    signatures, config = params.signatures(0, MAX_STATUSES), params.config(1)
    everywhere = config.flag("searchTransactionHistory")
    statuses: list[dict[str, Any] | None] = []
    for signature in signatures:
        record = chain.history.get(signature)
        if record is None or not (everywhere or chain.status_slot(signature) is not None):
            statuses.append(None)
            continue
        level = chain.commitment_of(record.slot)
        statuses.append(
            {
                "slot": record.slot,
                "confirmations": None if level == "finalized" else chain.slot - record.slot,
                "err": record.err,
                "status": {"Ok": None} if record.err is None else {"Err": record.err},
                "confirmationStatus": level,
            }
        )
    return with_context(chain, Config({}, "processed"), statuses)


def get_transaction(chain: LocalChain, params: Params) -> Any:
    """One transaction."""
    signature = params.signature(0)
    given = params.raw(1)
    config = Config({"encoding": given}) if isinstance(given, str) else params.config(1)
    _require_settled(config)
    record = chain.history.get(signature)
    if record is None or record.slot > chain.slot_at(config.commitment):
        return None
    encoding = config.choice("encoding", TRANSACTION_ENCODINGS, "json")
    return transaction_json(record, encoding, config.integer("maxSupportedTransactionVersion"))


def get_signatures_for_address(chain: LocalChain, params: Params) -> Any:
    """The transactions that name an address, newest first."""
    address, config = str(params.pubkey(0)), params.config(1)
    require_context(chain, config)
    _require_settled(config)
    limit = config.integer("limit")
    if limit is not None and not 1 <= limit <= MAX_SIGNATURES:
        raise invalid_params(f"Invalid limit; max {MAX_SIGNATURES}")
    newest = chain.slot_at(config.commitment)
    records = chain.history.of(address, config.signature("before"), config.signature("until"))
    return [
        {
            "signature": record.signature,
            "slot": record.slot,
            "err": record.err,
            "memo": record.memo,
            "blockTime": record.time,
            "confirmationStatus": chain.commitment_of(record.slot),
        }
        for record in islice((item for item in records if item.slot <= newest), limit or MAX_SIGNATURES)
    ]


def get_fee_for_message(chain: LocalChain, params: Params) -> Any:
    """Lamports that a message costs, or None when its blockhash cannot be used."""
    message, config = decode_message(params.required(0)), params.config(1)
    require_context(chain, config)
    known = chain.blockhash_slot(message.recent_blockhash, config.commitment) is not None
    return with_context(chain, config, fee_of(message).total if known else None)


def get_recent_prioritization_fees(chain: LocalChain, params: Params) -> Any:
    """The least price that was paid in each recent slot by transactions that name some accounts."""
    wanted = {str(key) for key in params.pubkeys(0, MAX_FEE_ACCOUNTS)} if params.raw(0) is not None else set()
    oldest = max(0, chain.slot - MAX_PROCESSING_AGE + 1)
    least: dict[int, int] = {}
    for record in chain.history.newest():
        if record.slot < oldest:
            break
        if wanted <= set(record.addresses):
            least[record.slot] = min(record.price, least.get(record.slot, record.price))
    return [{"slot": slot, "prioritizationFee": least.get(slot, 0)} for slot in range(oldest, chain.slot + 1)]


def request_airdrop(chain: LocalChain, params: Params) -> Any:
    """Lamports from the faucet."""
    to, lamports = params.pubkey(0), params.integer(1)
    if lamports > MAX_AIRDROP:
        raise invalid_params(f"Invalid param: at most {MAX_AIRDROP} lamports at a time")
    signature, outcome = chain.airdrop(to, lamports)
    if outcome.err is not None:
        raise RpcError(INTERNAL_ERROR, f"airdrop request failed: {error_json(outcome.err)}")
    return signature


def _only(config: Config, *names: str) -> dict[str, Any]:
    return {name: config.get(name) for name in names if config.get(name) is not None}


def _require_signatures(transaction: VersionedTransaction) -> None:
    if not all(transaction.verify_with_results()):
        raise RpcError(SIGNATURE_VERIFICATION, "Transaction signature verification failure")


def _require_settled(config: Config) -> None:
    if config.commitment == "processed":
        raise invalid_params("Method does not support commitment below `confirmed`")


def _wanted_accounts(config: Config, named: int) -> tuple[list[Any], str] | None:
    wanted = config.get("accounts")
    if wanted is None:
        return None
    if not isinstance(wanted, dict):
        raise invalid_params("Invalid params: accounts needs addresses.")
    encoding = Config(wanted).choice("encoding", ACCOUNT_ENCODINGS, "base64")
    if encoding in ("binary", "base58"):
        raise invalid_params("base58 encoding not supported")
    return Params([wanted.get("addresses")]).pubkeys(0, named), encoding


TRANSACTION_METHODS: dict[str, Method] = {
    "sendTransaction": send_transaction,
    "simulateTransaction": simulate_transaction,
    "getSignatureStatuses": get_signature_statuses,
    "getTransaction": get_transaction,
    "getSignaturesForAddress": get_signatures_for_address,
    "getFeeForMessage": get_fee_for_message,
    "getRecentPrioritizationFees": get_recent_prioritization_fees,
    "requestAirdrop": request_airdrop,
}

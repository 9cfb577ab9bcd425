"""The methods of JSON-RPC: those of a validator, and our own for the clock."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

from solders.account import Account
from solders.pubkey import Pubkey
from solders.transaction import VersionedTransaction

from psyche_lightning_localnet import blocks, tokens
from psyche_lightning_localnet.chain import GENESIS, MAX_PROCESSING_AGE, LocalChain
from psyche_lightning_localnet.encoding import (
    ACCOUNT_ENCODINGS,
    TRANSACTION_ENCODINGS,
    account_json,
    filters_of,
    inner_json,
    matches,
    return_data_json,
    transaction_json,
)
from psyche_lightning_localnet.errors import (
    INTERNAL_ERROR,
    INVALID_REQUEST,
    NODE_UNHEALTHY,
    SCAN_ABORTED,
    SIGNATURE_VERIFICATION,
    RpcError,
    error_json,
    invalid_params,
    preflight_failure,
    simulation_json,
)
from psyche_lightning_localnet.rpc import (
    API_VERSION,
    Config,
    Method,
    Params,
    require_context,
    require_settled,
    with_context,
)
from psyche_lightning_localnet.transactions import decode, decode_message, fee_of, with_blockhash

MAX_MULTIPLE_ACCOUNTS = 100
MAX_DATA_SIZE = 10 * 1024 * 1024
MAX_SCAN = 64 * 1024 * 1024
"""The most bytes of accounts in one list, with ``ACCOUNT_META`` for each account besides its data."""
ACCOUNT_META = 256
MAX_ADVANCED = 1 << 40
"""One call advances the clock by fewer slots than this."""
MAX_STATUSES = 256
MAX_SIGNATURES = 1000
MAX_FEE_ACCOUNTS = 128
MAX_AIRDROP = 1_000_000 * 10**9


def get_version(chain: LocalChain, params: Params) -> Any:
    """The version, in the form of a validator."""
    return {"solana-core": API_VERSION, "feature-set": 0}


def get_health(chain: LocalChain, params: Params) -> Any:
    """``ok``, or an error if the server refuses transactions."""
    if not chain.healthy:
        raise RpcError(NODE_UNHEALTHY, "Node is unhealthy", {"numSlotsBehind": None})
    return "ok"


def get_genesis_hash(chain: LocalChain, params: Params) -> Any:
    """The hash of the first block, which identifies a cluster."""
    return str(GENESIS)


def get_slot(chain: LocalChain, params: Params) -> Any:
    """The newest slot at a commitment; it is also the block height."""
    config = params.config(0)
    require_context(chain, config)
    return chain.slot_at(config.commitment)


def get_latest_blockhash(chain: LocalChain, params: Params) -> Any:
    """A blockhash and the last block height at which it is valid."""
    config = params.config(0)
    require_context(chain, config)
    slot = chain.slot_at(config.commitment)
    value = {"blockhash": str(chain.blockhash(slot)), "lastValidBlockHeight": slot + MAX_PROCESSING_AGE}
    return with_context(chain, config, value)


def is_blockhash_valid(chain: LocalChain, params: Params) -> Any:
    """Whether a blockhash is valid."""
    blockhash, config = params.blockhash(0), params.config(1)
    require_context(chain, config)
    return with_context(chain, config, chain.blockhash_slot(blockhash, config.commitment) is not None)


def get_minimum_balance(chain: LocalChain, params: Params) -> Any:
    """Lamports that an account must hold to be rent-exempt, by its size in bytes."""
    size = params.integer(0)
    if size > MAX_DATA_SIZE:
        raise invalid_params(f"Invalid param: an account has at most {MAX_DATA_SIZE} bytes")
    return chain.vm.minimum_balance(size)


# ---------------------------------------------------------------------------------------------------------------------
# Accounts
# ---------------------------------------------------------------------------------------------------------------------


def get_balance(chain: LocalChain, params: Params) -> Any:
    """Lamports of an account."""
    key, config = params.pubkey(0), params.config(1)
    require_context(chain, config)
    account = chain.account(key, config.commitment)
    return with_context(chain, config, 0 if account is None else account.lamports)


def get_account_info(chain: LocalChain, params: Params) -> Any:
    """One account."""
    key, config = params.pubkey(0), params.config(1)
    require_context(chain, config)
    form = _form(config, "binary")
    account = chain.account(key, config.commitment)
    shown = None if account is None else account_json(account, *form, read=chain.account)
    return with_context(chain, config, shown)


def get_multiple_accounts(chain: LocalChain, params: Params) -> Any:
    """Up to a hundred accounts."""
    keys, config = params.pubkeys(0, MAX_MULTIPLE_ACCOUNTS), params.config(1)
    require_context(chain, config)
    form = _form(config, "base64")
    accounts = [chain.account(key, config.commitment) for key in keys]
    shown = [None if item is None else account_json(item, *form, read=chain.account) for item in accounts]
    return with_context(chain, config, shown)


def _form(config: Config, default: str) -> tuple[str, dict[str, int] | None]:
    """Encoding and requested part of accounts."""
    encoding, part = config.choice("encoding", ACCOUNT_ENCODINGS, default), config.data_slice
    if encoding == "jsonParsed" and part is not None:
        raise RpcError(
            INVALID_REQUEST,
            "Sliced account data can only be encoded using binary (base 58) or base64 encoding.",
        )
    return encoding, part


def get_program_accounts(chain: LocalChain, params: Params) -> Any:
    """The accounts of a program that pass filters."""
    program, config = params.pubkey(0), params.config(1)
    require_context(chain, config)
    filters = filters_of(config.get("filters"))
    found = chain.accounts.owned(chain.slot_at(config.commitment), program)
    shown = _listed(chain, config, ((key, account) for key, account in found if matches(account, filters)))
    return with_context(chain, config, shown) if config.flag("withContext") else shown


def _listed(chain: LocalChain, config: Config, found: Iterable[tuple[Pubkey, Account]]) -> list[dict[str, Any]]:
    encoding, part = _form(config, "binary")
    shown = []
    size = 0
    for key, account in found:
        size += ACCOUNT_META + (len(account.data) if part is None else min(len(account.data), part["length"]))
        if size > MAX_SCAN:
            raise RpcError(SCAN_ABORTED, "scan aborted: The accumulated scan results exceeded the limit")
        shown.append({"pubkey": str(key), "account": account_json(account, encoding, part, read=chain.account)})
    return shown


# ---------------------------------------------------------------------------------------------------------------------
# Tokens
# ---------------------------------------------------------------------------------------------------------------------


def get_token_account_balance(chain: LocalChain, params: Params) -> Any:
    """The amount of an SPL token account."""
    key, config = params.pubkey(0), params.config(1)
    account = chain.account(key, config.commitment)
    if account is None:
        raise invalid_params("Invalid param: could not find account")
    token = tokens.read_account(account)
    mint = None if token is None else tokens.read_mint(chain.account(token.mint, config.commitment))
    if token is None or mint is None:
        raise invalid_params("Invalid param: not a Token account")
    return with_context(chain, config, tokens.token_amount(token.amount, mint.decimals))


def get_token_supply(chain: LocalChain, params: Params) -> Any:
    """The supply of an SPL mint."""
    key, config = params.pubkey(0), params.config(1)
    account = chain.account(key, config.commitment)
    if account is None:
        raise invalid_params("Invalid param: could not find account")
    mint = tokens.read_mint(account)
    if mint is None:
        raise invalid_params("Invalid param: not a Token mint")
    return with_context(chain, config, tokens.token_amount(mint.supply, mint.decimals))


def get_token_largest_accounts(chain: LocalChain, params: Params) -> Any:
    """The twenty accounts with the most tokens of a mint."""
    key, config = params.pubkey(0), params.config(1)
    program, mint = _mint(chain, key, config)
    found = (
        (token.amount, str(address))
        for address, _, token in _token_accounts(chain, config, program)
        if token.mint == key
    )
    value = [
        {"address": address, **tokens.token_amount(amount, mint.decimals)}
        for amount, address in heapq.nlargest(blocks.LARGEST, found)
    ]
    return with_context(chain, config, value)


def get_token_accounts_by_owner(chain: LocalChain, params: Params) -> Any:
    """The token accounts of an owner, of one mint or of one token program."""
    return _tokens_of(chain, params, lambda token, key: token.owner == key)


def get_token_accounts_by_delegate(chain: LocalChain, params: Params) -> Any:
    """The token accounts that a delegate may spend from, of one mint or of one token program."""
    return _tokens_of(chain, params, lambda token, key: token.delegate == key)


def _tokens_of(chain: LocalChain, params: Params, wanted: Callable[[tokens.TokenAccount, Pubkey], bool]) -> Any:
    key, which, config = params.pubkey(0), params.required(1), params.config(2)
    require_context(chain, config)
    if not isinstance(which, dict) or len(which) != 1 or not {"mint", "programId"} & which.keys():
        raise invalid_params('Invalid params: expected {"mint": ADDRESS} or {"programId": ADDRESS}.')
    named = Params(list(which.values())).pubkey(0)
    mint = named if "mint" in which else None
    if mint is not None:
        program, _ = _mint(chain, mint, config)
    elif named in tokens.PROGRAMS:
        program = named
    else:
        raise invalid_params("Invalid param: unrecognized Token program id")
    found = (
        (address, account)
        for address, account, token in _token_accounts(chain, config, program)
        if wanted(token, key) and mint in (None, token.mint)
    )
    return with_context(chain, config, _listed(chain, config, found))


def _mint(chain: LocalChain, key: Pubkey, config: Config) -> tuple[Pubkey, tokens.Mint]:
    """A mint, and the token program that owns it."""
    account = chain.account(key, config.commitment)
    if account is None:
        raise invalid_params("Invalid param: could not find mint")
    mint = tokens.read_mint(account)
    if mint is None:
        raise invalid_params("Invalid param: not a Token mint")
    return account.owner, mint


def _token_accounts(
    chain: LocalChain, config: Config, program: Pubkey
) -> Iterator[tuple[Pubkey, Account, tokens.TokenAccount]]:
    for key, account in chain.accounts.owned(chain.slot_at(config.commitment), program):
        token = tokens.read_account(account)
        if token is not None:
            yield key, account, token


# ---------------------------------------------------------------------------------------------------------------------
# Transactions
# ---------------------------------------------------------------------------------------------------------------------


def send_transaction(chain: LocalChain, params: Params) -> Any:
    """Simulate a transaction, unless the client skips that, and let it land."""
    config = params.config(1)
    config.integer("maxRetries")  # ignored, because a transaction lands at once or never
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
    """Simulate a transaction."""
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
        # The answer does not show what a failed transaction changed.
        changes = outcome.changes if outcome.err is None else {}
        accounts = [changes.get(key) or chain.account(key, config.commitment) for key in keys]
        value["accounts"] = [
            None if item is None or item.lamports == 0 else account_json(item, encoding, read=chain.account)
            for item in accounts
        ]
    return with_context(chain, config, value)


def get_signature_statuses(chain: LocalChain, params: Params) -> Any:
    """The status of up to 256 transactions."""
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
    config = params.options(1)
    require_settled(config)
    record = chain.history.get(signature)
    if record is None or record.slot > chain.slot_at(config.commitment):
        return None
    encoding = config.choice("encoding", TRANSACTION_ENCODINGS, "json")
    shown = transaction_json(record, encoding, config.integer("maxSupportedTransactionVersion"))
    return {"slot": record.slot, "blockTime": record.time, **shown}


def get_signatures_for_address(chain: LocalChain, params: Params) -> Any:
    """The transactions that name an address, newest first."""
    address, config = str(params.pubkey(0)), params.config(1)
    require_context(chain, config)
    require_settled(config)
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
    """The fee of a message in lamports; None if its blockhash is invalid."""
    message, config = decode_message(params.required(0)), params.config(1)
    require_context(chain, config)
    known = chain.blockhash_slot(message.recent_blockhash, config.commitment) is not None
    return with_context(chain, config, fee_of(message).total if known else None)


def get_recent_prioritization_fees(chain: LocalChain, params: Params) -> Any:
    """The lowest price in each recent slot among the transactions that name all given accounts."""
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
    """Send lamports from the faucet."""
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


# ---------------------------------------------------------------------------------------------------------------------
# Our own methods, which validators lack
# ---------------------------------------------------------------------------------------------------------------------


def clock_json(chain: LocalChain) -> dict[str, Any]:
    """The clock's state, as our own methods answer it."""
    clock = chain.clock
    return {
        "slot": clock.slot,
        "unixTimestamp": clock.unix_time(),
        "slotMs": clock.slot_ms,
        "running": clock.running,
        "confirmedSlot": chain.slot_at("confirmed"),
        "finalizedSlot": chain.slot_at("finalized"),
    }


def get_clock(chain: LocalChain, params: Params) -> Any:
    """The clock's state."""
    return clock_json(chain)


def advance_clock(chain: LocalChain, params: Params) -> Any:
    """Advance the clock at once by ``{"slots": N}`` or ``{"seconds": S}``."""
    options = params.required(0)
    if not isinstance(options, dict) or len(options) != 1:
        raise invalid_params('Invalid params: expected {"slots": N} or {"seconds": S}.')
    config = Config(options)
    slots = config.integer("slots")
    seconds = options.get("seconds")
    if slots is None:
        if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not 0 < seconds < MAX_ADVANCED:
            raise invalid_params('Invalid params: expected {"slots": N} or {"seconds": S}, more than 0.')
        chain.advance_seconds(seconds)
    elif 0 < slots < MAX_ADVANCED:
        chain.advance(slots)
    else:
        raise invalid_params(f"Invalid params: slots must be 1 to {MAX_ADVANCED - 1}.")
    return clock_json(chain)


def freeze_clock(chain: LocalChain, params: Params) -> Any:
    """Freeze the clock: slots no longer pass by themselves."""
    chain.clock.freeze()
    return clock_json(chain)


def resume_clock(chain: LocalChain, params: Params) -> Any:
    """Let slots pass at the wall clock's pace again."""
    chain.clock.resume()
    return clock_json(chain)


def set_healthy(chain: LocalChain, params: Params) -> Any:
    """Make the server refuse transactions, or accept them again: for tests of clients."""
    if not isinstance(params.required(0), bool):
        raise invalid_params("Invalid params: expected true or false.")
    chain.healthy = params.required(0)
    return chain.healthy


METHODS: dict[str, Method] = {
    **blocks.METHODS,
    "getVersion": get_version,
    "getHealth": get_health,
    "getGenesisHash": get_genesis_hash,
    "getSlot": get_slot,
    "getBlockHeight": get_slot,
    "getLatestBlockhash": get_latest_blockhash,
    "isBlockhashValid": is_blockhash_valid,
    "getMinimumBalanceForRentExemption": get_minimum_balance,
    "getBalance": get_balance,
    "getAccountInfo": get_account_info,
    "getMultipleAccounts": get_multiple_accounts,
    "getProgramAccounts": get_program_accounts,
    "getTokenAccountBalance": get_token_account_balance,
    "getTokenSupply": get_token_supply,
    "getTokenLargestAccounts": get_token_largest_accounts,
    "getTokenAccountsByOwner": get_token_accounts_by_owner,
    "getTokenAccountsByDelegate": get_token_accounts_by_delegate,
    "sendTransaction": send_transaction,
    "simulateTransaction": simulate_transaction,
    "getSignatureStatuses": get_signature_statuses,
    "getTransaction": get_transaction,
    "getSignaturesForAddress": get_signatures_for_address,
    "getFeeForMessage": get_fee_for_message,
    "getRecentPrioritizationFees": get_recent_prioritization_fees,
    "requestAirdrop": request_airdrop,
    "psyche_getClock": get_clock,
    "psyche_advanceClock": advance_clock,
    "psyche_freezeClock": freeze_clock,
    "psyche_resumeClock": resume_clock,
    "psyche_setHealthy": set_healthy,
}

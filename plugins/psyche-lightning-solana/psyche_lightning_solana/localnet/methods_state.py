"""Methods that read the chain's state, and those of ours that move its clock."""

from __future__ import annotations

from typing import Any

from psyche_lightning_solana.localnet.chain import GENESIS, MAX_PROCESSING_AGE, LocalChain
from psyche_lightning_solana.localnet.encoding import (
    ACCOUNT_ENCODINGS,
    account_json,
    filters_of,
    matches,
    mint_decimals,
    token_account,
    token_amount,
)
from psyche_lightning_solana.localnet.errors import BLOCK_NOT_AVAILABLE, NODE_UNHEALTHY, RpcError, invalid_params
from psyche_lightning_solana.localnet.params import Config, Params
from psyche_lightning_solana.localnet.rpc import API_VERSION, Method, require_context, with_context
from psyche_lightning_solana.localnet.vm import SLOTS_PER_EPOCH

MAX_MULTIPLE_ACCOUNTS = 100
MAX_DATA_SIZE = 10 * 1024 * 1024
MAX_ADVANCED = 1 << 40
"""Most slots that the clock is moved by at once."""


def get_version(chain: LocalChain, params: Params) -> Any:
    """What runs here, in the words of a validator."""
    return {"solana-core": API_VERSION, "feature-set": 0}


def get_health(chain: LocalChain, params: Params) -> Any:
    """``ok``, or an error of a server that refuses to send."""
    if not chain.healthy:
        raise RpcError(NODE_UNHEALTHY, "Node is unhealthy", {"numSlotsBehind": None})
    return "ok"


def get_genesis_hash(chain: LocalChain, params: Params) -> Any:
    """The hash of the first block, by which a cluster is known."""
    return str(GENESIS)


def get_slot(chain: LocalChain, params: Params) -> Any:
    """The newest slot at a commitment, which is the block height as well."""
    config = params.config(0)
    require_context(chain, config)
    return chain.slot_at(config.commitment)


def get_epoch_info(chain: LocalChain, params: Params) -> Any:
    """Where the cluster is in its epoch."""
    config = params.config(0)
    require_context(chain, config)
    slot = chain.slot_at(config.commitment)
    return {
        "absoluteSlot": slot,
        "blockHeight": slot,
        "epoch": slot // SLOTS_PER_EPOCH,
        "slotIndex": slot % SLOTS_PER_EPOCH,
        "slotsInEpoch": SLOTS_PER_EPOCH,
        "transactionCount": chain.history.count,
    }


def get_block_time(chain: LocalChain, params: Params) -> Any:
    """Time of a slot in seconds since 1970."""
    slot = params.integer(0)
    if slot > chain.slot:
        raise RpcError(BLOCK_NOT_AVAILABLE, f"Block not available for slot {slot}")
    return chain.clock.unix_time(slot)


def get_latest_blockhash(chain: LocalChain, params: Params) -> Any:
    """A blockhash and the last block height at which it can be used."""
    config = params.config(0)
    require_context(chain, config)
    slot = chain.slot_at(config.commitment)
    value = {"blockhash": str(chain.blockhash(slot)), "lastValidBlockHeight": slot + MAX_PROCESSING_AGE}
    return with_context(chain, config, value)


def is_blockhash_valid(chain: LocalChain, params: Params) -> Any:
    """Whether a blockhash can be used."""
    blockhash, config = params.blockhash(0), params.config(1)
    require_context(chain, config)
    return with_context(chain, config, chain.blockhash_slot(blockhash, config.commitment) is not None)


def get_minimum_balance(chain: LocalChain, params: Params) -> Any:
    """Lamports that an account of that many bytes must hold."""
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
    form = config.choice("encoding", ACCOUNT_ENCODINGS, "binary"), config.data_slice
    account = chain.account(key, config.commitment)
    shown = None if account is None else account_json(account, *form)
    return with_context(chain, config, shown)


def get_multiple_accounts(chain: LocalChain, params: Params) -> Any:
    """Up to a hundred accounts."""
    keys, config = params.pubkeys(0, MAX_MULTIPLE_ACCOUNTS), params.config(1)
    require_context(chain, config)
    form = config.choice("encoding", ACCOUNT_ENCODINGS, "base64"), config.data_slice
    accounts = [chain.account(key, config.commitment) for key in keys]
    shown = [None if item is None else account_json(item, *form) for item in accounts]
    return with_context(chain, config, shown)


def get_program_accounts(chain: LocalChain, params: Params) -> Any:
    """The accounts of a program that pass filters."""
    program, config = params.pubkey(0), params.config(1)
    require_context(chain, config)
    form = config.choice("encoding", ACCOUNT_ENCODINGS, "binary"), config.data_slice
    filters = filters_of(config.get("filters"))
    shown = [
        {"pubkey": str(key), "account": account_json(account, *form)}
        for key, account in chain.accounts.owned(chain.slot_at(config.commitment), program)
        if matches(account, filters)
    ]
    return with_context(chain, config, shown) if config.flag("withContext") else shown


def get_token_account_balance(chain: LocalChain, params: Params) -> Any:
    """The amount of an SPL token account."""
    key, config = params.pubkey(0), params.config(1)
    account = chain.account(key, config.commitment)
    if account is None:
        raise invalid_params("Invalid param: could not find account")
    token = token_account(account)
    decimals = None if token is None else mint_decimals(chain.account(token[0], config.commitment))
    if token is None or decimals is None:
        raise invalid_params("Invalid param: not a Token account")
    return with_context(chain, config, token_amount(token[2], decimals))


def get_token_supply(chain: LocalChain, params: Params) -> Any:
    """The supply of an SPL mint."""
    key, config = params.pubkey(0), params.config(1)
    account = chain.account(key, config.commitment)
    decimals = mint_decimals(account)
    if account is None or decimals is None:
        raise invalid_params("Invalid param: not a Token mint")
    supply = int.from_bytes(bytes(account.data[36:44]), "little")
    return with_context(chain, config, token_amount(supply, decimals))


# ---------------------------------------------------------------------------------------------------------------------
# Ours: not of a validator
# ---------------------------------------------------------------------------------------------------------------------


def clock_json(chain: LocalChain) -> dict[str, Any]:
    """The clock as our own methods answer it."""
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
    """Slots and time."""
    return clock_json(chain)


def advance_clock(chain: LocalChain, params: Params) -> Any:
    """Let ``{"slots": N}`` or ``{"seconds": S}`` pass at once."""
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
    """No slot passes any more by itself."""
    chain.clock.freeze()
    return clock_json(chain)


def resume_clock(chain: LocalChain, params: Params) -> Any:
    """Slots pass with the wall clock again."""
    chain.clock.resume()
    return clock_json(chain)


def set_healthy(chain: LocalChain, params: Params) -> Any:
    """Make the server refuse to send, or send again: for tests of clients."""
    if not isinstance(params.required(0), bool):
        raise invalid_params("Invalid params: expected true or false.")
    chain.healthy = params.required(0)
    return chain.healthy


STATE_METHODS: dict[str, Method] = {
    "getVersion": get_version,
    "getHealth": get_health,
    "getGenesisHash": get_genesis_hash,
    "getSlot": get_slot,
    "getBlockHeight": get_slot,
    "getEpochInfo": get_epoch_info,
    "getBlockTime": get_block_time,
    "getLatestBlockhash": get_latest_blockhash,
    "isBlockhashValid": is_blockhash_valid,
    "getMinimumBalanceForRentExemption": get_minimum_balance,
    "getBalance": get_balance,
    "getAccountInfo": get_account_info,
    "getMultipleAccounts": get_multiple_accounts,
    "getProgramAccounts": get_program_accounts,
    "getTokenAccountBalance": get_token_account_balance,
    "getTokenSupply": get_token_supply,
    "psyche_getClock": get_clock,
    "psyche_advanceClock": advance_clock,
    "psyche_freezeClock": freeze_clock,
    "psyche_resumeClock": resume_clock,
    "psyche_setHealthy": set_healthy,
}

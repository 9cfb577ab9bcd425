"""The methods about blocks and the cluster, which block explorers ask before anything else."""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Callable
from typing import Any

from solders.hash import Hash
from solders.keypair import Keypair

from psyche_lightning_localnet.chain import LocalChain
from psyche_lightning_localnet.encoding import TRANSACTION_ENCODINGS, accounts_json, transaction_json
from psyche_lightning_localnet.errors import BLOCK_CLEANED_UP, BLOCK_NOT_AVAILABLE, RpcError, invalid_params
from psyche_lightning_localnet.rpc import (
    API_VERSION,
    Config,
    Method,
    Params,
    require_context,
    require_settled,
    with_context,
)
from psyche_lightning_localnet.state import Record
from psyche_lightning_localnet.vm import SLOTS_PER_EPOCH

NODE = Keypair.from_seed(hashlib.sha256(b"psyche-lightning localnet node").digest()).pubkey()
"""The identity of the cluster's node, which makes all blocks."""
TRANSACTION_DETAILS = ("full", "accounts", "signatures", "none")
MAX_BLOCKS = 500_000
MAX_SAMPLES = 720
MAX_LEADERS = 5_000
LARGEST = 20
"""Number of accounts in the answers of ``getLargestAccounts`` and ``getTokenLargestAccounts``."""
_SAMPLE_MS = 60_000
_SUPPLY_PARTS = ("circulating", "nonCirculating")


def get_block(chain: LocalChain, params: Params) -> Any:
    """A block and its transactions."""
    slot, config = params.integer(0), params.options(1)
    require_settled(config)
    _require_block(chain, slot, config)
    encoding = config.choice("encoding", TRANSACTION_ENCODINGS, "json")
    details = config.choice("transactionDetails", TRANSACTION_DETAILS, "full")
    newest = config.integer("maxSupportedTransactionVersion")
    parent = max(0, slot - 1)
    block: dict[str, Any] = {
        "blockhash": str(chain.blockhash(slot)),
        "previousBlockhash": str(chain.blockhash(parent) if slot else Hash.default()),
        "parentSlot": parent,
        "blockHeight": slot,
        "blockTime": chain.clock.unix_time(slot),
    }
    show: Callable[[Record], dict[str, Any]] | None = {
        "full": lambda record: transaction_json(record, encoding, newest),
        "accounts": lambda record: accounts_json(record, newest),
    }.get(details)
    if show is not None:
        block["transactions"] = [show(record) for record in chain.history.at(slot)]
    elif details == "signatures":
        block["signatures"] = [record.signature for record in chain.history.at(slot)]
    if config.flag("rewards", default=True):
        block["rewards"] = []  # fees are burned
    return block


def get_blocks(chain: LocalChain, params: Params) -> Any:
    """The slots of a range that have a block, both ends included: all of them."""
    start, end = params.integer(0), params.raw(1)
    ranged = end is not None and not isinstance(end, dict)
    config = params.config(2 if ranged or params.raw(2) is not None else 1)
    require_settled(config)
    newest = chain.slot_at(config.commitment)
    last = min(params.integer(1), newest) if ranged else newest
    if last - start > MAX_BLOCKS:
        raise invalid_params(f"Slot range too large; max {MAX_BLOCKS}")
    return list(range(max(start, chain.history.first_slot), last + 1))


def get_blocks_with_limit(chain: LocalChain, params: Params) -> Any:
    """Up to a number of slots that have a block, from a slot on."""
    start, limit, config = params.integer(0), params.integer(1), params.config(2)
    require_settled(config)
    if limit > MAX_BLOCKS:
        raise invalid_params(f"Limit too large; max {MAX_BLOCKS}")
    first = max(start, chain.history.first_slot)
    return list(range(first, min(first + limit, chain.slot_at(config.commitment) + 1)))


def get_first_available_block(chain: LocalChain, params: Params) -> Any:
    """The first slot from which on all transactions are remembered."""
    return chain.history.first_slot


def get_block_time(chain: LocalChain, params: Params) -> Any:
    """Time of a slot in seconds since 1970."""
    slot = params.integer(0)
    if slot > chain.slot:
        raise RpcError(BLOCK_NOT_AVAILABLE, f"Block not available for slot {slot}")
    return chain.clock.unix_time(slot)


def get_epoch_info(chain: LocalChain, params: Params) -> Any:
    """The cluster's epoch and its slot in it."""
    config = params.config(0)
    require_context(chain, config)
    slot = chain.slot_at(config.commitment)
    return {
        "absoluteSlot": slot,
        "blockHeight": slot,
        "epoch": slot // SLOTS_PER_EPOCH,
        "slotIndex": slot % SLOTS_PER_EPOCH,
        "slotsInEpoch": SLOTS_PER_EPOCH,
        "transactionCount": chain.history.count_at(slot),
    }


def get_epoch_schedule(chain: LocalChain, params: Params) -> Any:
    """The lengths of epochs: all have the same."""
    return {
        "slotsPerEpoch": SLOTS_PER_EPOCH,
        "leaderScheduleSlotOffset": SLOTS_PER_EPOCH,
        "warmup": False,
        "firstNormalEpoch": 0,
        "firstNormalSlot": 0,
    }


def get_transaction_count(chain: LocalChain, params: Params) -> Any:
    """Number of transactions since the first block."""
    config = params.config(0)
    require_context(chain, config)
    return chain.history.count_at(chain.slot_at(config.commitment))


def get_recent_performance_samples(chain: LocalChain, params: Params) -> Any:
    """Numbers of slots and transactions in each of the last minutes, the newest first."""
    limit = MAX_SAMPLES if params.raw(0) is None else params.integer(0)
    if limit > MAX_SAMPLES:
        raise invalid_params(f"Invalid limit; max {MAX_SAMPLES}")
    slots = max(1, _SAMPLE_MS // chain.clock.slot_ms)
    newest = chain.slot // slots
    oldest = max(-(-chain.history.first_slot // slots), newest - limit)
    counts = dict.fromkeys(range(newest, oldest, -1), 0)
    for record in chain.history.newest():
        minute = -(-record.slot // slots)
        if minute <= oldest:
            break
        if minute <= newest:
            counts[minute] += 1
    return [
        {
            "slot": minute * slots,
            "numTransactions": count,
            "numNonVoteTransactions": count,
            "numSlots": slots,
            "samplePeriodSecs": round(slots * chain.clock.slot_ms / 1000),
        }
        for minute, count in counts.items()
    ]


def get_supply(chain: LocalChain, params: Params) -> Any:
    """All lamports. Those of the faucet do not circulate."""
    config = params.config(0)
    slot = chain.slot_at(config.commitment)
    total = sum(account.lamports for _, account in chain.accounts.visible(slot))
    faucet = chain.accounts.get(slot, chain.faucet.pubkey())
    kept = 0 if faucet is None else faucet.lamports
    hidden = config.flag("excludeNonCirculatingAccountsList")
    value = {
        "total": total,
        "circulating": total - kept,
        "nonCirculating": kept,
        "nonCirculatingAccounts": [] if hidden else [str(chain.faucet.pubkey())],
    }
    return with_context(chain, config, value)


def get_largest_accounts(chain: LocalChain, params: Params) -> Any:
    """The twenty accounts with the most lamports."""
    config = params.config(0)
    part = config.choice("filter", _SUPPLY_PARTS, "")
    faucet = chain.faucet.pubkey()
    accounts = (
        (account.lamports, str(key))
        for key, account in chain.accounts.visible(chain.slot_at(config.commitment))
        if not part or (key == faucet) == (part == "nonCirculating")
    )
    value = [{"address": key, "lamports": lamports} for lamports, key in heapq.nlargest(LARGEST, accounts)]
    return with_context(chain, config, value)


def get_vote_accounts(chain: LocalChain, params: Params) -> Any:
    """The accounts that vote: none, because nobody has stakes."""
    config = params.config(0)
    if config.get("votePubkey") is not None:
        Params([config.get("votePubkey")]).pubkey(0)
    return {"current": [], "delinquent": []}


def get_identity(chain: LocalChain, params: Params) -> Any:
    """The identity of the node."""
    return {"identity": str(NODE)}


def get_slot_leader(chain: LocalChain, params: Params) -> Any:
    """The node that makes the newest block."""
    require_context(chain, params.config(0))
    return str(NODE)


def get_slot_leaders(chain: LocalChain, params: Params) -> Any:
    """The nodes that make the blocks of some slots: one node makes all."""
    params.integer(0)
    limit = params.integer(1)
    if not 1 <= limit <= MAX_LEADERS:
        raise invalid_params(f"Invalid limit; max {MAX_LEADERS}")
    return [str(NODE)] * limit


def cluster_nodes(rpc: str, pubsub: str) -> list[dict[str, Any]]:
    """The nodes of the cluster, in the form of ``getClusterNodes``.

    Args:
        rpc: host and port for requests.
        pubsub: host and port for subscriptions.
    """
    ways = ("gossip", "tvu", "tpu", "tpuQuic", "tpuForwards", "tpuForwardsQuic", "tpuVote", "serveRepair")
    return [
        {
            "pubkey": str(NODE),
            **dict.fromkeys(ways),
            "rpc": rpc,
            "pubsub": pubsub,
            "version": API_VERSION,
            "featureSet": 0,
            "shredVersion": 0,
        }
    ]


def _require_block(chain: LocalChain, slot: int, config: Config) -> None:
    if slot > chain.slot_at(config.commitment):
        raise RpcError(BLOCK_NOT_AVAILABLE, f"Block not available for slot {slot}")
    first = chain.history.first_slot
    if slot < first:
        raise RpcError(
            BLOCK_CLEANED_UP, f"Block {slot} cleaned up, does not exist on node. First available block: {first}"
        )


METHODS: dict[str, Method] = {
    "getBlock": get_block,
    "getBlocks": get_blocks,
    "getBlocksWithLimit": get_blocks_with_limit,
    "getFirstAvailableBlock": get_first_available_block,
    "minimumLedgerSlot": get_first_available_block,
    "getBlockTime": get_block_time,
    "getEpochInfo": get_epoch_info,
    "getEpochSchedule": get_epoch_schedule,
    "getTransactionCount": get_transaction_count,
    "getRecentPerformanceSamples": get_recent_performance_samples,
    "getSupply": get_supply,
    "getLargestAccounts": get_largest_accounts,
    "getVoteAccounts": get_vote_accounts,
    "getIdentity": get_identity,
    "getSlotLeader": get_slot_leader,
    "getSlotLeaders": get_slot_leaders,
}

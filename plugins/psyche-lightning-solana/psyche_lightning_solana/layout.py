"""The byte layout of a run's two zero-copy accounts, as numpy dtypes (docs/solana-account.md; the manifest is ours)."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from psyche_lightning.errors import WireError
from psyche_lightning.wire.canonical import sha256
from psyche_lightning_solana.types import METADATA, MODEL

VERSION = 1
MAX_CLIENTS = 256
MAX_WITNESSES = 32
MAX_MANIFEST_ADDRESS = 192

Record = npt.NDArray[np.void]
"""A view of one account: an array without dimensions."""


class AccountError(WireError):
    """An account has another kind, size or version."""


def discriminator(account: str) -> bytes:
    """The first 8 bytes of every account of that type (Anchor's rule)."""
    return sha256(f"account:{account}".encode())[:8]


def _key(size: int = 32) -> tuple[str, tuple[int]]:
    return ("u1", (size,))


def _struct(*fields: Any) -> np.dtype[np.void]:
    return np.dtype([(name, *kind) if isinstance(kind, tuple) else (name, kind) for name, kind in fields], align=True)


WITNESS = _struct(
    ("position", "<u8"),
    ("index", "<u8"),
    ("witness", "u1"),
    ("pad", _key(7)),
    ("participants", _key(192)),
    ("broadcasts", _key(192)),
    ("merkle", _key()),
)
ROUND = _struct(
    ("witnesses", (WITNESS, (MAX_WITNESSES,))),
    ("witnesses_len", "<u8"),
    ("data_index", "<u8"),
    ("seed", "<u8"),
    ("height", "<u4"),
    ("clients_len", "<u2"),
    ("tie_breaker_tasks", "<u2"),
)
CLIENT = _struct(
    ("signer", _key()), ("p2p", _key()), ("status", "u1"), ("place", "u1"), ("pad", _key(2)), ("exited_height", "<u4")
)
CLIENTS = _struct(("items", (CLIENT, (MAX_CLIENTS,))), ("len", "<u8"))
MEMBER = _struct(
    ("signer", _key()), ("p2p", _key()), ("unused", "<u8"), ("earned", "<u8"), ("slashed", "<u8"), ("active", "<u8")
)
RATES = _struct(("earning_total_shared", "<u8"), ("slashing_per_client", "<u8"))
CONFIG = _struct(
    ("warmup_time", "<u8"),
    ("cooldown_time", "<u8"),
    ("max_round_train_time", "<u8"),
    ("round_witness_time", "<u8"),
    ("global_batch_size_warmup_tokens", "<u8"),
    ("epoch_time", "<u8"),
    ("total_steps", "<u4"),
    ("init_min_clients", "<u2"),
    ("min_clients", "<u2"),
    ("witness_nodes", "<u2"),
    ("global_batch_size_start", "<u2"),
    ("global_batch_size_end", "<u2"),
    ("verification_percent", "u1"),
    ("waiting_for_members_extra_time", "u1"),
)
COORDINATOR = _struct(
    ("discriminator", _key(8)),
    ("version", "<u8"),
    ("metadata", _key(METADATA.size)),
    ("run_id", _key(32)),
    ("run_state", "u1"),
    ("pad0", _key(7)),
    ("model", _key(MODEL.size)),
    ("config", CONFIG),
    ("epoch", "<u2"),
    ("step", "<u4"),
    ("epoch_start_data_index", "<u8"),
    ("rounds", (ROUND, (4,))),
    ("clients", CLIENTS),
    ("exited_clients", CLIENTS),
    ("rounds_head", "<u4"),
    ("start_step", "<u4"),
    ("last_step", "<u4"),
    ("epoch_start", "<u8"),
    ("first_round", "u1"),
    ("cold_start_epoch", "u1"),
    ("run_state_start", "<u8"),
    ("pending_pause", "u1"),
    ("members", (MEMBER, (MAX_CLIENTS,))),
    ("members_len", "<u8"),
    ("next_active", "<u8"),
    ("current_rates", RATES),
    ("future_rates", RATES),
    ("is_warmup_first_tick", "u1"),
    ("is_training_first_tick", "u1"),
    ("client_version", _key(96)),
    ("nonce", "<u8"),
)
COORDINATOR_SIZE = 119_160
COORDINATOR_DISCRIMINATOR = discriminator("CoordinatorAccount")

# The parameters that a client says it holds: in warm-up with step 0, in a round with its report.
VOTE = np.dtype(
    [
        ("client", "u1"),  # index in the epoch's list of clients
        ("step", "<u4"),
        ("digest", "u1", (32,)),
    ]
)
MANIFEST = _struct(
    ("discriminator", _key(8)),
    ("bump", "u1"),
    ("pad", _key(7)),
    ("coordinator_account", _key()),
    ("authorizer", _key()),
    ("digest", _key()),
    ("address", _key(MAX_MANIFEST_ADDRESS)),
    ("checkpoint_digest", _key()),
    ("checkpoint_step", "<u4"),
    ("votes_len", "<u4"),
    ("epoch_digest", _key()),
    ("holders", _key()),  # bit i: the member in place i may hold the run's parameters
    ("trainers", ("u1", (4, 32))),  # the same for the clients of each stored round
    ("needed", "<u4"),  # equal reports that decide one of these rounds
    ("pad2", _key(4)),
    ("votes", (VOTE, (MAX_CLIENTS,))),
)
INSTANCE_SIZE = 8 + 165
ADDRESS_SIZE = 176
"""Bytes of the two accounts in borsh: a run's instance, and a node's address."""
MANIFEST_SIZE = 10_016
"""A new account gets at most 10,240 bytes per call."""
MANIFEST_DISCRIMINATOR = discriminator("RunManifest")


def _view(data: bytes | bytearray | memoryview, dtype: np.dtype[np.void], start: bytes, what: str) -> Record:
    if bytes(data[:8]) != start:
        raise AccountError(
            f"this is not a {what}: it begins with {bytes(data[:8]).hex() or 'nothing'}, not with {start.hex()}"
        )
    if len(data) != dtype.itemsize:
        raise AccountError(f"a {what} has {dtype.itemsize:,} bytes; this one has {len(data):,}")
    return np.frombuffer(data, dtype, 1).reshape(())


def view_coordinator(data: bytes | bytearray | memoryview) -> Record:
    """A coordinator account, Psyche's or ours, without copying it.

    Args:
        data: the account's bytes; writable ones give a writable view.

    Returns:
        An array without dimensions of :data:`COORDINATOR`.

    Raises:
        AccountError: the account has another kind, size or version.
    """
    record = _view(data, COORDINATOR, COORDINATOR_DISCRIMINATOR, "coordinator account")
    if record["version"] != VERSION:
        raise AccountError(
            f"the coordinator account has version {int(record['version'])}; this package reads version {VERSION}"
        )
    return record


def view_manifest(data: bytes | bytearray | memoryview) -> Record:
    """A run's manifest account, without copying it.

    Raises:
        AccountError: the account has another kind or size.
    """
    return _view(data, MANIFEST, MANIFEST_DISCRIMINATOR, "manifest account")

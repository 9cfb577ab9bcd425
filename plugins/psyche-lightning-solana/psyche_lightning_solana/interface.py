"""The interface of the three programs: each instruction's accounts and arguments, each account in borsh.

The tables define the builders in :mod:`psyche_lightning_solana.instructions`, the IDL, and the programs' tests.
Psyche's accounts come first and in Psyche's order; ours follow.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

from psyche_lightning.wire.canonical import sha256
from psyche_lightning_solana.borsh import (
    BOOL,
    I64,
    PUBKEY,
    U8,
    U16,
    U32,
    U64,
    Option,
    Raw,
    String,
    Struct,
    Type,
    Vector,
)
from psyche_lightning_solana.layout import MAX_MANIFEST_ADDRESS
from psyche_lightning_solana.types import (
    BLOOM,
    CHECKPOINT,
    CLIENT_ID,
    COMMITTEE,
    CONFIG,
    METADATA,
    MODEL,
    PROGRESS,
    PROOF,
    WITNESS_METADATA,
)

MAX_RUN_ID = 32
MAX_CLIENT_VERSION = 96
MAX_NODE_ADDRESS = 126

JOIN_SCOPE = b"CoordinatorJoinRun"
CHECKPOINT_SCOPE = b"CoordinatorCheckpoint"


@dataclass(frozen=True)
class Meta:
    """How an instruction uses an account."""

    name: str
    signer: bool = False
    writable: bool = False


@dataclass(frozen=True)
class InstructionSpec:
    """One instruction: its accounts in order and its arguments; ``more`` accounts may follow."""

    name: str
    accounts: tuple[Meta, ...]
    arguments: Struct
    more: tuple[Meta, ...] = ()

    @cached_property
    def discriminator(self) -> bytes:
        """The first 8 bytes of the instruction's data (Anchor's rule)."""
        return sha256(f"global:{self.name}".encode())[:8]


@dataclass(frozen=True)
class ProgramSpec:
    """One program: its instructions, and its accounts in borsh."""

    name: str
    instructions: dict[str, InstructionSpec]
    accounts: dict[str, Struct] = field(default_factory=dict)


def _metas(text: str) -> tuple[Meta, ...]:
    """Read ``"payer sw, run w, system_program"``: s for signer, w for writable."""
    metas = []
    for item in filter(None, text.split(", ")):
        name, _, flags = item.partition(" ")
        metas.append(Meta(name, "s" in flags, "w" in flags))
    return tuple(metas)


def _program(name: str, *instructions: InstructionSpec, accounts: tuple[Struct, ...] = ()) -> ProgramSpec:
    return ProgramSpec(name, {spec.name: spec for spec in instructions}, {kind.name: kind for kind in accounts})


def _instruction(name: str, metas: str, more: str = "", /, **arguments: Type) -> InstructionSpec:
    return InstructionSpec(name, _metas(metas), Struct(name, arguments), _metas(more))


_OWNER = "authority s, coordinator_instance, coordinator_account w, manifest w"
_USER = "user s, coordinator_instance, coordinator_account w, manifest w"
_REPORT: dict[str, Type] = {
    "proof": PROOF,
    "participant_bloom": BLOOM,
    "broadcast_bloom": BLOOM,
    "broadcast_merkle": Raw(32),
}

WITNESS_TRAILER = Struct("witness", {"epoch": U16, "height": U32, "step": U32, "digest": Raw(32)})
WARMUP_TRAILER = Struct("warmup_witness", {"epoch": U16})
"""Optional trailer of the two witness instructions, after Psyche's arguments: epoch and height must be the run's.

A witness also says which are the newest parameters that it holds; with a digest of zeros it does not know any.
"""

COORDINATOR = _program(
    "coordinator",
    _instruction(
        "init_coordinator",
        "payer sw, coordinator_instance w, coordinator_account w, system_program, authorizer, manifest w",
        main_authority=PUBKEY,
        join_authority=PUBKEY,
        run_id=String(1 << 16),
        client_version=String(MAX_CLIENT_VERSION),
    ),
    _instruction("free_coordinator", "authority s, spill w, coordinator_instance w, coordinator_account w, manifest w"),
    _instruction(
        "update",
        _OWNER,
        metadata=Option(METADATA),
        config=Option(CONFIG),
        model=Option(MODEL),
        progress=Option(PROGRESS),
    ),
    _instruction("update_client_version", _OWNER, client_version=String(MAX_CLIENT_VERSION)),
    _instruction(
        "set_future_epoch_rates",
        _OWNER,
        epoch_earning_rate_total_shared=Option(U64),
        epoch_slashing_rate_per_client=Option(U64),
    ),
    _instruction("set_paused", _OWNER, paused=BOOL),
    _instruction("restart_from", _OWNER, step=U32, digest=Raw(32)),
    _instruction(
        "join_run",
        "user s, authorization, coordinator_instance, coordinator_account w, manifest w, node s",
        client_id=CLIENT_ID,
    ),
    _instruction("tick", _USER),
    _instruction("witness", _USER, **_REPORT, metadata=WITNESS_METADATA),
    _instruction("warmup_witness", _USER, **_REPORT),
    _instruction("health_check", _USER, id=CLIENT_ID, committee=COMMITTEE, position=U64, index=U64),
    _instruction("checkpoint", _USER, "authorization", repo=CHECKPOINT),
    _instruction("withdraw", _USER),
    _instruction("kick", _OWNER, signer=PUBKEY),
    _instruction(
        "set_manifest",
        "authority s, coordinator_instance, coordinator_account, manifest w",
        digest=Raw(32),
        address=String(MAX_MANIFEST_ADDRESS),
    ),
    _instruction(
        "set_address", "user sw, address w, coordinator_instance, system_program", address=String(MAX_NODE_ADDRESS)
    ),
    accounts=(
        Struct(
            "CoordinatorInstance",
            {
                "bump": U8,
                "main_authority": PUBKEY,
                "join_authority": PUBKEY,
                "coordinator_account": PUBKEY,
                "run_id": String(MAX_RUN_ID),
            },
        ),
        Struct(
            "NodeAddress", {"bump": U8, "pad": Raw(7), "wallet": PUBKEY, "len": U16, "address": Raw(MAX_NODE_ADDRESS)}
        ),
    ),
)

AUTHORIZER = _program(
    "authorizer",
    _instruction(
        "authorization_create",
        "payer sw, grantor s, authorization w, system_program",
        grantee=PUBKEY,
        scope=Vector(U8),
    ),
    _instruction("authorization_grantor_update", "grantor s, authorization w", active=BOOL),
    _instruction(
        "authorization_grantee_update",
        "payer sw, grantee s, authorization w, system_program",
        delegates_clear=BOOL,
        delegates_added=Vector(PUBKEY),
    ),
    _instruction("authorization_close", "grantor s, spill w, authorization w, system_program"),
    accounts=(
        Struct(
            "Authorization",
            {
                "bump": U8,
                "grantor": PUBKEY,
                "grantee": PUBKEY,
                "scope": Vector(U8),
                "active": BOOL,
                "delegates": Vector(PUBKEY),
                "grantor_update_unix_timestamp": I64,
            },
        ),
    ),
)

_COMMAND = "authority s, run, coordinator_instance, coordinator_account w, coordinator_program, coordinator_manifest w"

TREASURER = _program(
    "treasurer",
    _instruction(
        "run_create",
        "payer sw, run w, run_collateral w, collateral_mint, coordinator_instance w, coordinator_account w, "
        "coordinator_program, associated_token_program, token_program, system_program, authorizer, "
        "coordinator_manifest w",
        index=U64,
        run_id=String(1 << 16),
        client_version=String(MAX_CLIENT_VERSION),
        main_authority=PUBKEY,
        join_authority=PUBKEY,
    ),
    _instruction(
        "run_update",
        _COMMAND,
        metadata=Option(METADATA),
        config=Option(CONFIG),
        model=Option(MODEL),
        progress=Option(PROGRESS),
        epoch_earning_rate_total_shared=Option(U64),
        epoch_slashing_rate_per_client=Option(U64),
        paused=Option(BOOL),
        client_version=Option(String(MAX_CLIENT_VERSION)),
    ),
    # Ours: the run is the coordinator's main authority, so the treasurer forwards that authority's commands.
    _instruction("run_set_manifest", _COMMAND, digest=Raw(32), address=String(MAX_MANIFEST_ADDRESS)),
    _instruction("run_checkpoint", _COMMAND, repo=CHECKPOINT),
    _instruction("run_restart_from", _COMMAND, step=U32, digest=Raw(32)),
    _instruction("participant_create", "payer sw, user s, run, participant w, system_program"),
    _instruction(
        "participant_claim",
        "user s, user_collateral w, run w, run_collateral w, coordinator_account, participant w, token_program",
        claim_earned_points=U64,
    ),
    accounts=(
        Struct(
            "Run",
            {
                "bump": U8,
                "index": U64,
                "main_authority": PUBKEY,
                "join_authority": PUBKEY,
                "coordinator_account": PUBKEY,
                "coordinator_instance": PUBKEY,
                "collateral_mint": PUBKEY,
                "total_claimed_collateral_amount": U64,
                "total_claimed_earned_points": U64,
                "coordinator_program": PUBKEY,
            },
        ),
        Struct("Participant", {"bump": U8, "claimed_collateral_amount": U64, "claimed_earned_points": U64}),
    ),
)

PROGRAMS = {program.name: program for program in (COORDINATOR, AUTHORIZER, TREASURER)}

"""The interface begins with Psyche's own: accounts, flags, arguments, fields and errors, as its programs say."""

from __future__ import annotations

from collections.abc import Mapping
from random import Random

import pytest
from psyche_lightning_solana.errors import REFUSALS
from psyche_lightning_solana.interface import PROGRAMS, Meta
from solana_support.values import any_value

_OWNER = "authority s, coordinator_instance, coordinator_account w"
_USER = "user s, coordinator_instance, coordinator_account w"
_REPORT = "proof participant_bloom broadcast_bloom broadcast_merkle"

# Of each instruction Psyche's accounts (s signs, w is writable) and arguments.
INSTRUCTIONS: Mapping[str, Mapping[str, tuple[str, str]]] = {
    "coordinator": {
        "init_coordinator": (
            "payer sw, coordinator_instance w, coordinator_account w, system_program",
            "main_authority join_authority run_id client_version",
        ),
        "free_coordinator": ("authority s, spill w, coordinator_instance w, coordinator_account w", ""),
        "update": (_OWNER, "metadata config model progress"),
        "update_client_version": (_OWNER, "client_version"),
        "set_future_epoch_rates": (_OWNER, "epoch_earning_rate_total_shared epoch_slashing_rate_per_client"),
        "set_paused": (_OWNER, "paused"),
        "join_run": ("user s, authorization, coordinator_instance, coordinator_account w", "client_id"),
        "tick": (_USER, ""),
        "witness": (_USER, f"{_REPORT} metadata"),
        "warmup_witness": (_USER, _REPORT),
        "health_check": (_USER, "id committee position index"),
        "checkpoint": (_USER, "repo"),
    },
    "authorizer": {
        "authorization_create": ("payer sw, grantor s, authorization w, system_program", "grantee scope"),
        "authorization_grantor_update": ("grantor s, authorization w", "active"),
        "authorization_grantee_update": (
            "payer sw, grantee s, authorization w, system_program",
            "delegates_clear delegates_added",
        ),
        "authorization_close": ("grantor s, spill w, authorization w, system_program", ""),
    },
    "treasurer": {
        "run_create": (
            "payer sw, run w, run_collateral w, collateral_mint, coordinator_instance w, coordinator_account w, "
            "coordinator_program, associated_token_program, token_program, system_program",
            "index run_id client_version main_authority join_authority",
        ),
        "run_update": (
            "authority s, run, coordinator_instance, coordinator_account w, coordinator_program",
            "metadata config model progress epoch_earning_rate_total_shared epoch_slashing_rate_per_client paused "
            "client_version",
        ),
        "participant_create": ("payer sw, user s, run, participant w, system_program", ""),
        "participant_claim": (
            "user s, user_collateral w, run w, run_collateral w, coordinator_account, participant w, token_program",
            "claim_earned_points",
        ),
    },
}

# Of each account Psyche's fields, and their sizes in bytes where they have one.
ACCOUNTS = {
    ("coordinator", "CoordinatorInstance"): (
        "bump 1, main_authority 32, join_authority 32, coordinator_account 32, run_id"
    ),
    ("authorizer", "Authorization"): (
        "bump 1, grantor 32, grantee 32, scope, active 1, delegates, grantor_update_unix_timestamp 8"
    ),
    ("treasurer", "Run"): (
        "bump 1, index 8, main_authority 32, join_authority 32, coordinator_account 32, coordinator_instance 32, "
        "collateral_mint 32, total_claimed_collateral_amount 8, total_claimed_earned_points 8"
    ),
    ("treasurer", "Participant"): "bump 1, claimed_collateral_amount 8, claimed_earned_points 8",
}

ERRORS = {
    "coordinator": (
        "UpdateConfigFinished UpdateConfigNotHalted CoordinatorAccountIncorrectSize ClientsFull "
        "ConfigSanityCheckFailed ModelSanityCheckFailed ProgressSanityCheckFailed SignerNotAClient SignerMismatch "
        "CloseCoordinatorNotHalted CoordinatorErrorNoActiveRound CoordinatorErrorInvalidWitness "
        "CoordinatorErrorInvalidRunState CoordinatorErrorDuplicateWitness CoordinatorErrorInvalidHealthCheck "
        "CoordinatorErrorHalted CoordinatorErrorInvalidCheckpoint CoordinatorErrorWitnessesFull "
        "CoordinatorErrorCannotResume CoordinatorErrorInvalidWithdraw CoordinatorErrorInvalidCommitteeSelection "
        "CoordinatorErrorInvalidCommitteeProof MoreClientsThanBatches RunIdInvalidLength"
    ),
    "authorizer": "AuthorizationActiveIsTrue AuthorizationClosingConditionsNotReachedYet",
    "treasurer": "InvalidParameter RunIdInvalidLength",
}


def _shown(metas: tuple[Meta, ...]) -> list[str]:
    return [f"{meta.name} {'s' * meta.signer}{'w' * meta.writable}".strip() for meta in metas]


@pytest.mark.parametrize("program", INSTRUCTIONS)
def test_each_instruction_begins_with_psyches_accounts_and_has_its_arguments(program: str) -> None:
    for name, (accounts, arguments) in INSTRUCTIONS[program].items():
        ours = PROGRAMS[program].instructions[name]
        wanted = accounts.split(", ")
        assert _shown(ours.accounts)[: len(wanted)] == wanted, name
        assert list(ours.arguments.fields) == arguments.split(), name


@pytest.mark.parametrize(("program", "account"), ACCOUNTS)
def test_each_account_begins_with_psyches_fields(program: str, account: str) -> None:
    fields = PROGRAMS[program].accounts[account].fields
    listed = [text.partition(" ") for text in ACCOUNTS[program, account].split(", ")]
    assert list(fields)[: len(listed)] == [name for name, *_ in listed]
    for name, _, size in listed:
        if size:
            assert len(fields[name].pack(any_value(fields[name], Random(name)))) == int(size), name


@pytest.mark.parametrize("program", ERRORS)
def test_the_errors_have_psyches_names_in_its_order(program: str) -> None:
    names = {number: refusal.name for number, refusal in REFUSALS[program].items() if number >= 6000}
    assert names == dict(enumerate(ERRORS[program].split(), 6000))

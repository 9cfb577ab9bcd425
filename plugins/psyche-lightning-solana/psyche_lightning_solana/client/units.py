"""Compute units that an instruction may need: what its transaction is limited to, and pays a priority fee for."""

from __future__ import annotations

from psyche_lightning_solana.client.cluster import MAX_COMPUTE_UNITS

LIMITS = {
    # What ends a round or an epoch does the most; the table in docs/solana-programs.md has what was measured with 256
    # clients, and these are about twice that.
    "witness": 350_000,
    "tick": 350_000,
    "health_check": 350_000,
    "withdraw": 350_000,
    "vote_checkpoint": 450_000,
    "checkpoint": 350_000,
    "warmup_witness": 100_000,
    "join_run": 100_000,
    "set_address": 60_000,
    "init_coordinator": 100_000,
    "update": 60_000,
    "update_client_version": 30_000,
    "set_future_epoch_rates": 30_000,
    "set_manifest": 30_000,
    "set_paused": 60_000,
    "free_coordinator": 30_000,
    # The authorizer and the treasurer; an address may take several tries to be found.
    "authorization_create": 60_000,
    "authorization_grantor_update": 30_000,
    "authorization_close": 30_000,
    "create manifest": 20_000,
    "write manifest": 20_000,
    "run_create": 250_000,
    "create_token_account": 60_000,
    "participant_create": 60_000,
    "participant_claim": 60_000,
}
FORWARDED = "treasurer:"
"""How a command of the coordinator is named that the treasurer passes on."""
FORWARDING = 60_000


def units(names: str) -> int:
    """The limit for a transaction.

    Args:
        names: its instructions, with ``+`` between them; one that is not known may use all that a transaction can.
    """
    total = 0
    for name in names.split("+"):
        total += FORWARDING if name.startswith(FORWARDED) else 0
        total += LIMITS.get(name.removeprefix(FORWARDED), MAX_COMPUTE_UNITS)
    return min(total, MAX_COMPUTE_UNITS)

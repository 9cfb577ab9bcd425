"""Compute units that an instruction of the coordinator may need: what its transactions are limited to."""

from __future__ import annotations

from psyche_lightning_solana.client.cluster import MAX_COMPUTE_UNITS


def units(instruction: str, clients: int) -> int:
    """The limit for a transaction with that instruction.

    Args:
        instruction: its name.
        clients: wallets that ever joined the run.
    """
    return MAX_COMPUTE_UNITS

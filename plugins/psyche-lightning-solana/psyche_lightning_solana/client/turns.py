"""Whose turn it is to tick, so that a deadline of the run costs one transaction and not one of every node.

Every instruction moves the run on as far as it goes; a tick is only needed where the clock alone does. The clients
stand in an order that the state gives; the first sends when time has come, each next one only if by then nothing
happened. Whoever is not in the list comes after it, so a run whose clients are all gone does not stand still.
"""

from __future__ import annotations

from psyche_lightning.coordinator.machine import deadline, healthy
from psyche_lightning.protocol.state import Phase, RunState
from psyche_lightning.wire.canonical import sha256
from psyche_lightning_solana.account import RunAccounts

STAGGER = 2.0
"""Seconds between two turns: a transaction of the one before should show by then."""
MOST_TURNS = 30
"""Nobody waits for more than so many others."""


def due(run: RunAccounts) -> float | None:
    """When the clock alone moves the run on, in the chain's seconds; None when only an input can."""
    return None if run.state.phase.halted else deadline(run.state)


def turn(run: RunAccounts, signer: bytes) -> int:
    """How many others go first at this state's deadline."""
    state = run.state
    waiting = state.phase is Phase.WAITING_FOR_MEMBERS
    those = [client.signer for client in (run.pending if waiting else healthy(state))]
    if signer not in those:
        return min(len(those), MOST_TURNS) + _number(state, signer) % MOST_TURNS
    return min(sorted(those, key=lambda other: _number(state, other)).index(signer), MOST_TURNS)


def _number(state: RunState, signer: bytes) -> int:
    place = state.nonce.to_bytes(8, "little") + state.epoch.to_bytes(2, "little")
    return int.from_bytes(sha256(place, signer)[:8], "little")

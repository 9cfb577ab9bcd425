"""What a run waits for, in words."""

from __future__ import annotations

from collections.abc import Collection

from psyche_lightning.coordinator.machine import gathered, unreported
from psyche_lightning.errors import counted
from psyche_lightning.protocol.state import Client, ClientStatus, Phase, RunState


def awaited(state: RunState, pending: Collection[Client]) -> str:
    """What a run waits for, in one line for people; empty while it trains, and when it is finished.

    Args:
        state: the run's state.
        pending: the members that wait for an epoch.
    """
    match state.phase:
        case Phase.UNINITIALIZED:
            return "waiting to be opened"
        case Phase.PAUSED:
            return "waiting to be resumed by its owner"
        case Phase.WAITING_FOR_MEMBERS if gathered(state, pending):
            return "waiting for further members before the next epoch is formed"
        case Phase.WAITING_FOR_MEMBERS:
            return _members(state, pending)
        case Phase.WARMUP:
            present = len(state.healthy)
            silent = present - len(state.warmup_witnesses)
            if silent > 0:
                return f"waiting for {silent} of {counted(present, 'member')} to report the parameters"
    return ""


def awaited_nodes(state: RunState, pending: Collection[Client]) -> list[bytes]:
    """The signers of the nodes for which a run waits, as far as they are known.

    In a warm-up those that have not reported the parameters, in a round the witnesses that have not reported, and
    before an epoch those that may hold the parameters, if none of them is here.
    """
    match state.phase:
        case Phase.WAITING_FOR_MEMBERS:
            here = {client.signer for client in pending}
            return list(state.holders) if state.checkpoint.digest and here.isdisjoint(state.holders) else []
        case Phase.WARMUP:
            reported = {record.proof.index for record in state.warmup_witnesses}
            return [
                client.signer
                for index, client in enumerate(state.clients)
                if index not in reported and client.status is ClientStatus.HEALTHY
            ]
        case Phase.ROUND_TRAIN | Phase.ROUND_WITNESS if state.current is not None:
            silent = unreported(state, state.current)
            return [client.signer for client in state.clients if client.signer in silent]
    return []


def _members(state: RunState, pending: Collection[Client]) -> str:
    wanted = state.config.init_min_clients - len(pending)
    held = state.checkpoint
    if not held.digest or not {client.signer for client in pending}.isdisjoint(state.holders):
        return f"waiting for {counted(wanted, 'more member')}"
    text = f"waiting for a holder of {held.digest[:4].hex()}, step {held.step}"
    if wanted > 1:  # the holder is one of them
        text += f", and {counted(wanted - 1, 'more member')}"
    if pending:
        text += f"; {counted(len(pending), 'newcomer')} {'is' if len(pending) == 1 else 'are'} here"
    return text

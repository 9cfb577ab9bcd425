"""Derives notices for people from two successive states of a run."""

from __future__ import annotations

from collections.abc import Iterator

from psyche_lightning.node.notices import Dropped, EpochFormed, Notice, Paused, PeerLeft, TooFewMembers
from psyche_lightning.node.waiting import lacks
from psyche_lightning.protocol.state import Client, ClientStatus, Phase, RunState


def news(before: RunState | None, now: RunState, signer: bytes) -> Iterator[Notice]:
    """The notices for the change between two states, perhaps not adjacent.

    Args:
        before: the run as the node last saw it; None at first sight.
        now: as it is.
        signer: this node's key at the coordinator.
    """
    if before is None:
        if now.phase is Phase.PAUSED:
            yield Paused(True)
    elif (before.phase is Phase.PAUSED) != (now.phase is Phase.PAUSED):
        yield Paused(now.phase is Phase.PAUSED)
    if before is not None and (lacking := lacks(now)) > lacks(before):
        needed = now.config.init_min_clients
        yield TooFewMembers(now.run_id, needed - lacking, needed, now.config.min_clients)
    formed = now.phase is Phase.WARMUP or now.phase.active
    known = before is not None and before.epoch == now.epoch and (before.phase is Phase.WARMUP or before.phase.active)
    if formed and not known:
        nodes = _well(now)
        yield EpochFormed(now.epoch, tuple(client.node for client in nodes.values()), signer in nodes)
    elif formed and before is not None:
        gone = {client.signer: client for client in (*now.exited_clients, *now.clients) if not _healthy(client)}
        for key, client in _well(before).items():
            if key in gone:
                yield Dropped(gone[key].status) if key == signer else PeerLeft(client.node, gone[key].status)


def _healthy(client: Client) -> bool:
    return client.status is ClientStatus.HEALTHY


def _well(state: RunState) -> dict[bytes, Client]:
    return {client.signer: client for client in state.clients if _healthy(client)}

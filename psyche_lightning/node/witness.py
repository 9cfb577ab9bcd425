"""Witness reports, and the keys of a node's promises."""

from __future__ import annotations

from psyche_lightning.node.rounds import RoundLog
from psyche_lightning.protocol.bloom import Bloom, participants_bloom
from psyche_lightning.protocol.merkle import EMPTY_ROOT
from psyche_lightning.protocol.requests import Witness


def result_promise(epoch: int, height: int) -> str:
    """Journal key of a node's result of a round: it never signs a second one (I8)."""
    return f"result/{epoch}/{height}"


def list_promise(epoch: int, height: int, root: bytes) -> str:
    """Journal key of the announcements in a list of a round's results that a node reports, or that was decided."""
    return f"list/{epoch}/{height}/{root.hex()}"


def offer_promise(epoch: int, applied: int) -> str:
    """Journal key of parameters that a node stored within an epoch: after a restart it goes on from them."""
    return f"offer/{epoch}/{applied}"


def witness_report(
    epoch: int, here: RoundLog, index: int, about: RoundLog | None, step: int = 0, digest: bytes = b""
) -> Witness:
    """What a node verified, for the coordinator.

    Args:
        epoch: of the run.
        here: the round in which it reports.
        index: its place in that round's client list.
        about: the round whose results it witnesses, or None.
        step: training steps in the parameters ``digest``.
        digest: its newest parameters whose digest it knows, or empty.

    Returns:
        The request. Its Bloom filters are Psyche's: participants has the signer hash of every client whose result is
        in the list or that owed none; broadcasts has the commitments.
    """
    commitments, root = about.own() if about else ((), EMPTY_ROOT)
    missing = about.missing if about else set()
    clients = (about or here).round.clients
    seed = here.round.seed
    return Witness(
        epoch,
        here.round.height,
        here.selection.witness_proof(index),
        root,
        participants_bloom(seed, (signer for i, signer in enumerate(clients) if i not in missing)),
        Bloom.of(seed, commitments).to_bytes(),
        step,
        digest,
    )

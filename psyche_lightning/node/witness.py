"""Witness reports, and the keys of a node's promises."""

from __future__ import annotations

from psyche_lightning.node.rounds import RoundLog
from psyche_lightning.protocol.bloom import Bloom, participants_bloom
from psyche_lightning.protocol.merkle import attest_root
from psyche_lightning.protocol.messages import Attest, Envelope
from psyche_lightning.protocol.requests import Witness


def result_promise(epoch: int, height: int) -> str:
    """Journal key of a node's result of a round: it never signs a second one (I8)."""
    return f"result/{epoch}/{height}"


def attest_promise(epoch: int, height: int) -> str:
    """Journal key of a node's witness list of a round."""
    return f"attest/{epoch}/{height}"


def witness_report(here: RoundLog, index: int, envelope: Envelope, about: RoundLog | None) -> Witness:
    """The request that binds a witness' list.

    Args:
        here: the round that sends it.
        index: this node's place in its client list.
        envelope: the signed :class:`Attest`.
        about: the round whose results it lists, or None.

    Returns:
        The request. Its Bloom filters are Psyche's: participants has the signer hash of every client that showed a
        sign of life or owed none; broadcasts has the commitments.
    """
    attest = envelope.message
    assert isinstance(attest, Attest)
    silent = about.missing if about else set()
    clients = (about or here).round.clients
    participants = participants_bloom(here.round.seed, (s for i, s in enumerate(clients) if i not in silent))
    broadcasts = Bloom.of(here.round.seed, attest.hashes())
    return Witness(
        attest.epoch,
        attest.height,
        here.selection.witness_proof(index),
        attest_root(attest),
        participants,
        broadcasts.to_bytes(),
    )

"""The faucet of every local chain."""

from __future__ import annotations

from solders.keypair import Keypair

from psyche_lightning.wire.canonical import sha256

FAUCET_LAMPORTS = 500_000_000 * 10**9


def faucet_keypair() -> Keypair:
    """Its key pair, which also may upgrade the programs that are there from the start. Its seed is public."""
    return Keypair.from_seed(sha256(b"psyche-lightning localnet faucet"))

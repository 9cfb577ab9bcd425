"""Putting programs on a chain through the upgradeable loader, any chain: ``psyche solana deploy``."""

"""Deploys programs to any chain through the upgradeable loader: ``psyche solana deploy``."""

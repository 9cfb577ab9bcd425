"""The Solana coordinator of psyche_lightning: programs, local chain, clients."""

"""``python -m psyche_lightning_localnet``."""

from psyche_lightning_localnet.cli import main

main()

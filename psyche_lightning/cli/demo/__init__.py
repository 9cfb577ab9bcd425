"""``psyche demo``: a coordinator and several nodes on this machine train a language model while you watch."""

from __future__ import annotations

from psyche_lightning.cli.demo.command import demo

__all__ = ["demo"]

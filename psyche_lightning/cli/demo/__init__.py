"""``psyche demo``: a coordinator and a few nodes on this machine train a language model before your eyes."""

from __future__ import annotations

from psyche_lightning.cli.demo.command import demo

__all__ = ["demo"]

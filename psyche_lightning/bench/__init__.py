"""Measurements for ``psyche bench``: bytes on the wire, speed of the engine, quality for bytes."""

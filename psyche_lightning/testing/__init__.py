"""Conformance kits for plugin authors, and the simulator."""

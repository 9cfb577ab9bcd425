"""Conformance kits for plugin authors, nodes that only go through the motions, and the simulator."""

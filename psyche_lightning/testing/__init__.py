"""Conformance kits: test classes that authors of plugins subclass."""

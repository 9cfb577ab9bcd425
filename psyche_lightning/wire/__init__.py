"""Canonical bytes, SHA-256, identities and signatures."""

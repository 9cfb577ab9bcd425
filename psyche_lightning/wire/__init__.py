"""Canonical encoding, SHA-256, identities and signatures."""

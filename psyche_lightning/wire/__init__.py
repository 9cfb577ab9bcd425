"""Identity, signatures, message types and their encoding, hashing."""

"""The recipe runner behind ``psyche train``."""

"""The built-in plugins; each could be a distribution of its own."""

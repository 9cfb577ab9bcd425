"""The built-in plugins: nothing here could not be a distribution of its own."""

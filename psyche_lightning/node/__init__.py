"""The participant: a core without I/O, and a runtime that adds transport, coordinator and clock."""

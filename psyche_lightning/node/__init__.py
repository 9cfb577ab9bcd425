"""The participant: a core without I/O, and the runtime that connects it to transport, coordinator and clock."""

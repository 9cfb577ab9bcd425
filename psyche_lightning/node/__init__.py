"""The participant: a core without I/O, and the runtime that ties it to transport, coordinator and clock."""

"""One run as its coordinator keeps it, without I/O: state machine, members, and history."""

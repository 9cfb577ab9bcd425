"""One run as its coordinator keeps it, without I/O: the state machine, members, and what happened."""

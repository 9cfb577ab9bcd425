"""Run state, state machine, committees, assignment, and the hosts that keep a run."""

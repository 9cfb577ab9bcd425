"""Whole runs in virtual time, with the real node core and the real coordinator machine."""

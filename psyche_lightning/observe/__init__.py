"""Looks at event files: the time line of a run, and the terminal program that shows it."""

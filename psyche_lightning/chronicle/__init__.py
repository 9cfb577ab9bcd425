"""Event files: what a node or a coordinator did and saw, one entry a line, for people and their programs."""

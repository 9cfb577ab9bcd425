"""What several rooms of tests use: real processes, servers of this machine. Not part of the package."""

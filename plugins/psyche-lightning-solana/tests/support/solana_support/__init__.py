"""A virtual machine for tests of the programs."""

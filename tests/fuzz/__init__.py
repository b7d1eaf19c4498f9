"""Strangers' files and wrong arguments, at random: see `python -m tests.fuzz --help`."""

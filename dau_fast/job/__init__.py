"""The one assembly that the command line and the Python API call: what is checked, run and measured."""

"""Make a trained image classifier forget part of its training data in seconds, and prove it."""

__version__ = "0.1.0"

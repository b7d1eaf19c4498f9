"""The one exception type for mistakes that are the caller's."""

from __future__ import annotations


class UserError(ValueError):
    """A request that cannot be carried out as asked.

    The message is one line: what was wrong, what was expected, what to do. The command line prints
    it and exits with code 2; from Python it is an ordinary `ValueError`.
    """

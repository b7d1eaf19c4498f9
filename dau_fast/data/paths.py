"""What may stand at a path that a user names, and reading a part of it."""

from __future__ import annotations

import os
import stat
import weakref
from pathlib import Path

from dau_fast.errors import UserError


def check_regular(path: str | Path, name: str) -> None:
    """Raise UserError, which calls it `name`, for a pipe, a socket or a device: reading one may never end.

    What is missing, or a folder, is left to whoever reads it and can say what was expected there.
    """
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):  # the latter for a path that holds a zero byte
        return
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise UserError(f"{name} is a pipe or a device: expected a regular file, copy what it gives into one")


class OpenFile:
    """The file `path`, of which parts are read, by several threads if need be.

    Not memory-mapped: where a file is cut short later, that ends a process (SIGBUS), and is an error here.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._number = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._number)

    def read_into(self, out: memoryview, start: int) -> None:
        """Fill the contiguous `out` with the bytes from `start` on. UserError where there are too few."""
        if os.preadv(self._number, [out], start) != out.nbytes:
            raise UserError(f"'{self.path}' was cut short while it was read: leave it as it is")

"""What may stand at a path that a user names."""

from __future__ import annotations

import os
import stat
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

"""The compiled extension dau_fast._C, or None and one log line where it cannot be had."""

from __future__ import annotations

import importlib
import logging
from types import ModuleType

_NAME = "dau_fast._C"


def _load() -> ModuleType | None:
    try:
        return importlib.import_module(_NAME)
    except ImportError as error:
        absent = isinstance(error, ModuleNotFoundError) and error.name == _NAME
        reason = " ".join(str(error).split())
        what = "is not installed" if absent else f"cannot be loaded ({reason})"
        logging.getLogger("dau_fast").warning(
            "the compiled extension %s %s: the slower PyTorch path runs; to get it, install "
            "dau-fast again with a C++20 compiler",
            _NAME,
            what,
        )
        return None


extension: ModuleType | None = _load()

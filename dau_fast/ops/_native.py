"""What is compiled, C++ and Triton: found here, and where it cannot be had one log line says so.

C++ takes an array as its address and its number of elements, which it checks before it touches memory.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Sequence
from types import ModuleType

from torch import Tensor

_NAME = "dau_fast._C"


@functools.cache
def _warn_once(message: str) -> None:
    logging.getLogger("dau_fast").warning("%s", message)


def _load() -> ModuleType | None:
    try:
        return importlib.import_module(_NAME)
    except ImportError as error:
        absent = isinstance(error, ModuleNotFoundError) and error.name == _NAME
        reason = " ".join(str(error).split())
        what = "is not installed" if absent else f"cannot be loaded ({reason})"
        _warn_once(
            f"the compiled extension {_NAME} {what}: the slower PyTorch path runs; to get it, install "
            "dau-fast again with a C++20 compiler"
        )
        return None


extension: ModuleType | None = _load()


@functools.cache
def kernels(module: str) -> ModuleType | None:
    """The module of Triton kernels `module` of this package, or None without Triton."""
    try:
        return importlib.import_module(f"dau_fast.ops.{module}")
    except ImportError as error:
        _warn_once(
            f"Triton cannot be imported ({error}): plain PyTorch runs on the GPU instead; install triton "
            "for the fused kernels"
        )
        return None


# ---- how C++ is told of arrays


def array(tensor: Tensor | None) -> tuple[int, int]:
    """Where a contiguous tensor is and how many elements it has; None: an array that is not there.

    The caller holds the tensor until C++ is done: nothing else keeps its memory.
    """
    return (0, 0) if tensor is None else (tensor.data_ptr(), tensor.numel())


def arrays(tensors: Sequence[Tensor]) -> tuple[list[int], list[int]]:
    """The same of many."""
    # Not by comprehensions, which take a fifth longer: that is what many small tensors cost.
    return list(map(Tensor.data_ptr, tensors)), list(map(Tensor.numel, tensors))

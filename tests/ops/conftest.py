"""What the tests of several kernels need."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from dau_fast.ops import _native


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """new_empty and new_empty_strided give NaN, or a large integer."""

    def poisoned(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def filled(self: Tensor, *size: Any, **kind: Any) -> Tensor:
            tensor = make(self, *size, **kind)
            if tensor.is_floating_point():
                return tensor.fill_(float("nan"))
            largest = True if tensor.dtype == torch.bool else torch.iinfo(tensor.dtype).max
            return tensor.fill_(min(2**40, largest))

        return filled

    for name in ("new_empty", "new_empty_strided"):
        monkeypatch.setattr(Tensor, name, poisoned(getattr(Tensor, name)))


@pytest.fixture
def _without_triton(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As if it were not installed, and nobody had been told."""
    monkeypatch.setitem(sys.modules, "triton", None)
    for module in [name for name in sys.modules if name.startswith("dau_fast.ops._") and "_cuda" in name]:
        monkeypatch.delitem(sys.modules, module)
    for known in (_native.kernels, _native._warn_once):
        known.cache_clear()
    yield
    for known in (_native.kernels, _native._warn_once):
        known.cache_clear()

"""What the tests of several kernels need."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """new_empty gives NaN, or the largest integer."""
    new_empty = Tensor.new_empty

    def filled(self: Tensor, *size: Any, **kind: Any) -> Tensor:
        tensor = new_empty(self, *size, **kind)
        return tensor.fill_(float("nan") if tensor.is_floating_point() else 2**40)

    monkeypatch.setattr(Tensor, "new_empty", filled)

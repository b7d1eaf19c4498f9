"""What the tests of several kernels need."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """new_empty gives NaN, or a large integer."""
    new_empty = Tensor.new_empty

    def filled(self: Tensor, *size: Any, **kind: Any) -> Tensor:
        tensor = new_empty(self, *size, **kind)
        if tensor.is_floating_point():
            return tensor.fill_(float("nan"))
        return tensor.fill_(True if tensor.dtype == torch.bool else min(2**40, torch.iinfo(tensor.dtype).max))

    monkeypatch.setattr(Tensor, "new_empty", filled)

"""TF32 imitated on the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dau_fast.ops._split_products import split


class TF32(TorchDispatchMode):
    """Products of float32 take what TF32 holds of their factors, wherever the process is set to that."""

    def __init__(self) -> None:
        super().__init__()
        self.taken: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func._schema.name in ("aten::mm", "aten::addmm", "aten::addmm_"):
            precision = torch.backends.cuda.matmul.fp32_precision
            self.taken.append(precision)
            if precision == "tf32":
                args = (*args[:-2], *(split(factor)[0] for factor in args[-2:]))
        return func(*args, **(kwargs or {}))

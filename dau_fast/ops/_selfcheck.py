"""Every op against its definition in float64, on the device at hand: forward, gradients, sizes, dtypes.

New chips have made correct kernels silently wrong, and compilers do too: what was tested elsewhere need not
hold here. Memory that is not written stays NaN, and every case runs twice: an error that moves is a race.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dau_fast.ops._library import explain_path
from dau_fast.ops._selfcheck_cases import Case, list_cases


@dataclass(frozen=True)
class Finding:
    """What became of a case. path: "C++", "Triton" or "PyTorch", or several; why: it is no faster one.

    error: as in the limits, NaN where a result is. failed: what was raised, or "".
    """

    case: Case
    path: str
    why: str
    error: float
    failed: str

    @property
    def right(self) -> bool:
        """Whether the error is within the case's limit, which NaN is not."""
        return not self.failed and self.error <= self.case.limit


def check_all(device: torch.device, seed: int = 0) -> Iterator[Finding]:
    """Every case on `device`, one after the other. seed: of the numbers that ops are tried on."""
    for place, case in enumerate(list_cases()):
        yield _check(case, device, torch.Generator().manual_seed(seed + place))


def _check(case: Case, device: torch.device, generator: torch.Generator) -> Finding:
    given = [_in_dtype(x, case.dtype) for x in case.make(generator)]
    expected = case.define(*(x.double() if x.is_floating_point() else x for x in given))
    error, failed, paths = 0.0, "", _Paths()
    try:
        for _ in range(2):
            with _poisoned(), paths:
                found = case.compute(*(x.to(device, copy=True) for x in given))
            pairs = zip(found, expected, strict=True)
            error = max(error, *(_error(one, other) for one, other in pairs), key=_nan_last)
    # A kernel that does not compile or launch is a finding like any other.
    except Exception as reason:
        failed = f"{type(reason).__name__}: {' '.join(str(reason).split())[:300]}"
    return Finding(case, *paths.describe(), error, failed)


def _in_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype) if x.is_floating_point() else x


def _nan_last(error: float) -> tuple[bool, float]:
    return error != error, error


def _error(found: Tensor, expected: Tensor) -> float:
    """The case's measure of error; of results in whole numbers, the share that differs."""
    if found.shape != expected.shape:
        return float("inf")
    found = found.detach().cpu()
    if not expected.is_floating_point():
        return (found != expected).double().mean().item() if expected.numel() else 0.0
    norm = torch.linalg.vector_norm
    return (norm(found.double() - expected) / norm(expected).clamp_min(1e-300)).item()


@contextmanager
def _poisoned() -> Iterator[None]:
    """New memory holds NaN, and float32 products have all their digits."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    mode = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    matmul.allow_tf32 = cudnn.allow_tf32 = False
    # With this PyTorch fills what it has not written, which is what is wanted of it here.
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            yield
    finally:
        torch.use_deterministic_algorithms(mode[0], warn_only=mode[1])
        matmul.allow_tf32, cudnn.allow_tf32 = before


class _Paths(TorchDispatchMode):
    """Which paths this package's ops take inside."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[tuple[str, str], None] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        space, _, name = func._schema.name.partition("::")
        if space == "dau_fast":
            first = args[0] if isinstance(args[0], Tensor) else args[0][0]
            self.seen[explain_path(name, first.device.type.upper(), args)] = None
        return func(*args, **(kwargs or {}))

    def describe(self) -> tuple[str, str]:
        """All of them, and why where it is not the fastest."""
        paths = sorted({path for path, _ in self.seen}) or ["PyTorch"]
        return ", ".join(paths), "; ".join(dict.fromkeys(why for _, why in self.seen if why))

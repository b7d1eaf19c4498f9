"""How every op of this package is registered with PyTorch, and which path runs where.

An op has one schema, a plain PyTorch implementation that runs on every device, a fake one that knows
shapes alone, and where it pays C++ for the CPU and a Triton launcher for CUDA. Autograd stays outside,
in an `autograd.Function` around the op: that costs less a call than autograd registered on the op.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

LIBRARY = torch.library.Library("dau_fast", "DEF")


def define(
    schema: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    cpu: Callable[..., Any] | None = None,
    cuda: Callable[..., Any] | None = None,
) -> Any:
    """Register an op and return its overload, torch.ops.dau_fast.<name>.default.

    schema: "name(Tensor x, ...) -> ...". implementation: plain PyTorch, any device. fake: the same
    shapes, dtypes and devices from shapes alone. cpu, cuda: what runs there instead, if anything.
    """
    name = LIBRARY.define(schema)
    LIBRARY.impl(name, _as_given(implementation), "CompositeExplicitAutograd")
    torch.library.register_fake(f"dau_fast::{name}", fake, lib=LIBRARY)
    for device, own in (("CPU", cpu), ("CUDA", cuda)):
        if own is not None:
            LIBRARY.impl(name, _as_given(own), device)
    return getattr(torch.ops.dau_fast, name).default


def _as_given(implementation: Callable[..., Any]) -> Callable[..., Any]:
    """`implementation` with autocast off inside: what an op keeps in float32 must stay there.

    Its first argument is a tensor, or a list of some.
    """

    @functools.wraps(implementation)
    def run(first: Tensor | list[Tensor], *rest: Any) -> Any:
        device = (first if isinstance(first, Tensor) else first[0]).device.type
        if not torch.is_autocast_enabled(device):
            return implementation(first, *rest)
        with torch.autocast(device, enabled=False):
            return implementation(first, *rest)

    return run


def differentiable_once(op: Any, instead: str) -> Callable[..., Any]:
    """The backward op `op` with a backward pass that refuses: without one, second derivatives would be 0.

    instead: sentence that names the function and what to use for a second derivative.
    """

    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> Any:
            return op(*arguments)

        @staticmethod
        def backward(ctx: Any, *_: Any) -> None:
            raise RuntimeError(instead)

    def run(*arguments: Any) -> Any:
        # Compiled code has no second derivative, nor can it trace a Function inside a backward pass.
        once = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        return Once.apply(*arguments) if once else op(*arguments)

    return run


_warned: set[str] = set()


def kernels(module: str) -> ModuleType | None:
    """The module of Triton kernels `module` of this package, or None without Triton, said once."""
    try:
        return importlib.import_module(f"dau_fast.ops.{module}")
    except ImportError as error:
        if module not in _warned:
            _warned.add(module)
            logging.getLogger("dau_fast").warning(
                "Triton cannot be imported (%s): plain PyTorch runs on the GPU instead; install triton "
                "for the fused kernels",
                error,
            )
        return None

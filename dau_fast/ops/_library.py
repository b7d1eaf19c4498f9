"""How every op of this package is registered with PyTorch, and which of its paths runs: decided here alone.

An op has one schema, a definition in plain PyTorch that runs on every device, a fake one that knows shapes
alone, and where it pays a fused path: C++ on the CPU, Triton on CUDA. One rule holds for all of them: the
fused path runs where it is compiled and takes the arguments, else the definition does; of the entries of
lists, those that it takes. Autograd stays outside, in an `autograd.Function` around the op: that costs less
a call than autograd registered on the op.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import compress
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from dau_fast.ops import _native

LIBRARY = torch.library.Library("dau_fast", "DEF")

# What an op runs on a device, "CPU" or "CUDA", by its name and that: a machine without a GPU can test both.
PATHS: dict[tuple[str, str], Callable[..., Any]] = {}


@dataclass(frozen=True)
class _Choice:
    """What decides on the path of an op on a device. fused: whether there is one beside the definition."""

    fused: bool
    compiled: Callable[[], ModuleType | None]
    takes: Callable[..., Any] | None
    by_entry: bool


_CHOICES: dict[tuple[str, str], _Choice] = {}
_FUSED = {"CPU": "C++", "CUDA": "Triton"}


def explain_path(name: str, device: str, arguments: Sequence[Any]) -> tuple[str, str]:
    """What runs for op `name` on `device`, "CPU" or "CUDA": "C++", "Triton" or "PyTorch", and why the last.

    arguments: the op's own.
    """
    choice, fused = _CHOICES[name, device], _FUSED[device]
    if not choice.fused:
        return "PyTorch", f"there is no {fused} for it"
    if choice.compiled() is None:
        return "PyTorch", f"{fused} is not installed here"
    taken: Any = True if choice.takes is None else choice.takes(*arguments)
    entries: list[bool] = taken if choice.by_entry else [taken]
    if all(entries):
        return fused, ""
    if any(entries):
        return f"{fused}, PyTorch", f"{fused} does not take all of these tensors"
    return "PyTorch", f"{fused} does not take these dtypes or strides"


# Called with the compiled module and the op's arguments.
Fused = Callable[..., Any]


@dataclass(frozen=True)
class Lists:
    """An op that returns nothing, and whose first `count` arguments are lists: an entry a tensor, or empty.

    changed: which of them are changed in place.
    """

    count: int
    changed: Sequence[int]


def define(
    schema: str,
    definition: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    check: Callable[..., None] | None = None,
    cpp: Fused | None = None,
    triton: tuple[str, str | Fused] | None = None,
    takes: Callable[..., Any] | None = None,
    lists: Lists | None = None,
) -> Any:
    """Register an op and return its overload, torch.ops.dau_fast.<name>.default.

    schema: "name(Tensor x, ...) -> ...". definition: plain PyTorch, any device. fake: the same shapes, dtypes
    and devices from shapes alone. check: raises ValueError for arguments that do not fit, before every path.
    cpp: what runs on the CPU instead. triton: the module of kernels, and what runs them on CUDA, by its name
    there where that takes the op's arguments as they are. takes: whether those two take the arguments, by
    default any; with lists, one bool an entry.
    """
    name = LIBRARY.define(schema)
    found = {"CPU": (cpp, _extension), "CUDA": (None, _extension)}
    if triton is not None:
        module, launch = triton
        launcher = _launcher(launch) if isinstance(launch, str) else launch
        found["CUDA"] = _on_its_device(launcher), functools.partial(_kernels, module)
    for device, (fused, compiled) in found.items():
        _CHOICES[name, device] = _Choice(fused is not None, compiled, takes, lists is not None)
        run = definition if fused is None else _either(definition, fused, compiled, takes, lists)
        PATHS[name, device] = _guarded(run, check, device.lower())
        LIBRARY.impl(name, PATHS[name, device], device)
    LIBRARY.impl(name, _guarded(definition, check), "CompositeExplicitAutograd")
    torch.library.register_fake(f"dau_fast::{name}", _checked(fake, check), lib=LIBRARY)
    return getattr(torch.ops.dau_fast, name).default


def _extension() -> ModuleType | None:
    return _native.extension


def _kernels(module: str) -> ModuleType | None:
    return _native.kernels(module)


def _launcher(name: str) -> Fused:
    return lambda kernels, *arguments: getattr(kernels, name)(*arguments)


def _on_its_device(launch: Fused) -> Fused:
    """`launch` on the device of the op's first tensor, where Triton alone would take the current one."""

    def run(kernels: ModuleType, *arguments: Any) -> Any:
        device = _first_tensor(arguments).device
        if device.type != "cuda" or device.index == torch.cuda.current_device():
            return launch(kernels, *arguments)
        with torch.cuda.device(device):
            return launch(kernels, *arguments)

    return run


def _first_tensor(arguments: Sequence[Any]) -> Tensor:
    first = arguments[0]
    return first if isinstance(first, Tensor) else first[0]


def _either(
    definition: Callable[..., Any],
    fused: Fused,
    compiled: Callable[[], ModuleType | None],
    takes: Callable[..., Any] | None,
    lists: Lists | None,
) -> Callable[..., Any]:
    """The rule."""

    def run(*arguments: Any) -> Any:
        module = compiled()
        if module is None or not (takes is None or takes(*arguments)):
            return definition(*arguments)
        return fused(module, *arguments)

    if lists is None:
        return run
    assert takes is not None
    return _by_entry(definition, fused, compiled, takes, lists)


def _by_entry(
    definition: Callable[..., None],
    fused: Fused,
    compiled: Callable[[], ModuleType | None],
    takes: Callable[..., list[bool]],
    lists: Lists,
) -> Callable[..., None]:
    def run(*arguments: Any) -> None:
        module = compiled()
        suited = [] if module is None else takes(*arguments)
        if not any(suited):
            return definition(*arguments)
        if not all(suited):
            definition(*_entries(arguments, lists, [not fits for fits in suited]))
            arguments = _entries(arguments, lists, suited)
        fused(module, *arguments)
        # Autograd cannot see a write through an address.
        return increment_version([tensor for place in lists.changed for tensor in arguments[place]])

    return run


def _entries(arguments: tuple[Any, ...], lists: Lists, chosen: list[bool]) -> tuple[Any, ...]:
    """`arguments` with the chosen entries of their lists alone."""
    families = (list(compress(family, chosen)) for family in arguments[: lists.count])
    return *families, *arguments[lists.count :]


def _guarded(
    run: Callable[..., Any], check: Callable[..., None] | None, device: str | None = None
) -> Callable[..., Any]:
    """`run` after `check`, with autocast off inside: what an op keeps in float32 must stay there.

    device: where it runs; None for that of its first argument, a tensor or a list of some.
    """

    def guarded(*arguments: Any) -> Any:
        if check is not None:
            check(*arguments)
        place = device or _first_tensor(arguments).device.type
        if not torch.is_autocast_enabled(place):
            return run(*arguments)
        with torch.autocast(place, enabled=False):
            return run(*arguments)

    return guarded


def _checked(fake: Callable[..., Any], check: Callable[..., None] | None) -> Callable[..., Any]:
    def run(*arguments: Any, **named: Any) -> Any:
        if check is not None:
            check(*arguments, **named)
        return fake(*arguments, **named)

    return run


def compute_dtype(*inputs: Tensor) -> torch.dtype:
    """What sums and products are kept in: float64 where an input is, else float32."""
    return torch.float64 if torch.float64 in [x.dtype for x in inputs] else torch.float32


def check_devices(**arguments: Tensor | None) -> None:
    """ValueError unless all that are given are on one device."""
    (first, device), *others = [(name, x.device) for name, x in arguments.items() if x is not None]
    for name, other in others:
        if other != device:
            raise ValueError(f"{name} is on {other}, {first} on {device}: expected one device")


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

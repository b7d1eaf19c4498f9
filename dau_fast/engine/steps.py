"""How a training step runs: op by op, compiled, or compiled and replayed as one CUDA graph.

A loop hands `prepare` a function that builds its step with a compiler for the pure functions inside, so
one definition of a step serves all engines. Before its first use a step is rehearsed once, and what it
changed is put back: kernels are then built, compiled and captured outside the loop's time.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dau_fast.engine.device import Stopwatch
from dau_fast.engine.profiling import section
from dau_fast.engine.runtime import Runtime
from dau_fast.errors import UserError

# What compiling is expected to cost and to gain on CUDA, where `auto` decides by it: seconds for one
# step, and the eager step's time over the captured one's. Assumed, not measured.
_COMPILE_SECONDS = 60.0
_GAIN = 1.5
# Calls on a side stream before a capture, so that lazily made state exists (PyTorch's own number).
_WARM_UPS = 3

Step = Callable[..., None]
Pure = Callable[..., Any]
Compile = Callable[[Pure], Pure]
# A compiler for the step's pure functions, and how many parts a batch is taken in.
Build = Callable[[Compile, int], Step]


@dataclass(frozen=True)
class Players:
    """What a step changes: the parameters and buffers of modules, and the state of optimisers."""

    modules: tuple[nn.Module, ...]
    optimizers: tuple[Optimizer, ...]

    def tensors(self) -> list[Tensor]:
        """All of them that exist by now."""
        found = [t for module in self.modules for t in (*module.parameters(), *module.buffers())]
        return found + [t for optimizer in self.optimizers for t in _state(optimizer)]


@dataclass(frozen=True)
class Prepared:
    """A step that is ready. engine: that runs it; reason: why, where nobody asked for it, else "".

    parts: that its batches are taken in. seconds: of rehearsing, compiling and capturing.
    """

    step: Step
    engine: str
    reason: str
    parts: int
    seconds: float


def prepare(
    loop: str,
    build: Build,
    inputs: tuple[Tensor, ...],
    players: Players,
    steps: int,
    runtime: Runtime,
    *,
    compilable: str | None = None,
) -> Prepared:
    """The step that `build` makes, ready to be called with tensors like `inputs`, `steps` times.

    loop: its name. players: everything that the step changes; it is the same after this call as before.
    compilable: why the step cannot be compiled, if so: it then runs eagerly.
    """
    device = inputs[0].device
    with Stopwatch(device) as watch, _kept(players, device):
        step, parts = _fitted(loop, build, inputs, runtime)
        engine, reason = _choose(step, inputs, steps, runtime, compilable)
        if engine != "eager":
            step = build(_compile, parts)
            _rehearse(step, inputs, loop)
        if engine == "captured":
            step = _capture(step, inputs)
    return Prepared(step, engine, reason, parts, watch.seconds)


def _fitted(loop: str, build: Build, inputs: tuple[Tensor, ...], runtime: Runtime) -> tuple[Step, int]:
    """A step that has run once: with more and smaller parts of a batch where memory is short."""
    parts = runtime.count_parts(loop)
    while True:
        step = build(_as_it_is, parts)
        try:
            step(*inputs)
        except torch.OutOfMemoryError as error:
            parts *= 2
            if not runtime.ranks.alone:
                raise UserError(
                    f"the GPU's memory does not hold a batch of {loop}: add `accumulate={parts}`, or start "
                    "more processes"
                ) from error
        else:
            return step, parts
        torch.cuda.empty_cache()
        logging.getLogger("dau_fast").warning(
            "memory is short in %s: its batches are taken in %d parts", loop, parts
        )


def _choose(
    step: Step, inputs: tuple[Tensor, ...], steps: int, runtime: Runtime, compilable: str | None
) -> tuple[str, str]:
    """The engine, and why it and no other where that was not asked for."""
    if compilable is not None:
        return "eager", compilable
    if runtime.engine != "auto":
        return runtime.engine, ""
    if not runtime.ranks.alone:
        return "eager", "steps of several processes are not compiled"
    if runtime.activation_checkpointing:
        return "eager", "steps with activation checkpointing are not compiled"
    device = inputs[0].device
    if device.type != "cuda":
        return "eager", "compiling takes longer than it saves on a CPU"
    with Stopwatch(device) as watch:
        step(*inputs)
    predicted = steps * watch.seconds
    saved = predicted * (1 - 1 / _GAIN)
    if saved <= _COMPILE_SECONDS:
        return "eager", f"{predicted:.0f} s of work are too few to compile for"
    return "captured", f"{predicted:.0f} s of work are worth compiling for"


def _rehearse(step: Step, inputs: tuple[Tensor, ...], loop: str) -> None:
    try:
        step(*inputs)
    except torch._dynamo.exc.TorchDynamoException as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"the steps of {loop} cannot be compiled ({reason}): take `engine=eager`") from error


def _as_it_is(function: Pure) -> Pure:
    return function


def _compile(function: Pure) -> Pure:
    # Shapes are those of one batch size, and kernels made for it are faster than general ones.
    return torch.compile(function, dynamic=False)


def _capture(step: Step, inputs: tuple[Tensor, ...]) -> Step:
    """`step` as one CUDA graph that reads copies of its inputs."""
    static = tuple(torch.empty_like(tensor).copy_(tensor) for tensor in inputs)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(_WARM_UPS):
            step(*static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    # Other threads may read batches ahead, on streams of their own.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        step(*static)

    def replay(*given: Tensor) -> None:
        with section("captured step"):
            torch._foreach_copy_(static, given)
            graph.replay()

    return replay


@contextmanager
def _kept(players: Players, device: torch.device) -> Iterator[None]:
    """Put back, in place, what changes inside: captured graphs hold on to these very tensors."""
    before = [(tensor, tensor.detach().clone()) for tensor in players.tensors()]
    known = {id(tensor) for tensor, _ in before}
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield
    with torch.no_grad():
        for tensor, value in before:
            tensor.copy_(value)
        for tensor in players.tensors():
            if id(tensor) not in known:
                tensor.zero_()  # an optimiser's first step finds zeros as it would find nothing


def _state(optimizer: Optimizer) -> list[Tensor]:
    return [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]

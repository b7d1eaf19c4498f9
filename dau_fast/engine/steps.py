"""How a training step runs: op by op, compiled, replayed as one CUDA graph, or compiled and replayed.

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

from dau_fast.engine.device import Stopwatch, fastest_convolutions
from dau_fast.engine.profiling import section
from dau_fast.engine.runtime import Runtime
from dau_fast.errors import UserError

# What compiling costs and gains on CUDA, where `auto` decides by it: seconds for one step, and the time of a
# graphed step, with fused layers, over that of a captured one. Of a turn of ResNet-18 on an NVIDIA H200.
_COMPILE_SECONDS = 30.0
_GAIN = 1.2
# A capture takes about as long as this many eager steps: fewer are not worth one.
_FEW = 20
# Replays by which a graphed step is timed.
_TIMED = 3
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
    """A step that is ready. engine: that runs it; reason: why, where it is not the one asked for, else "".

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
    with Stopwatch(device) as watch, _kept(players, device), fastest_convolutions(device):
        eager, parts = _fitted(loop, build, inputs, runtime)

        def make(engine: str) -> Step:
            return _made_by(engine, eager, lambda: build(_compile, parts), inputs)

        engine, reason = _choose(device, steps, runtime, compilable)
        if engine == "eager":
            step = eager
        elif runtime.engine == "auto":
            step, engine, reason = _make_fastest(make, eager, inputs, steps)
        else:
            try:
                step = make(engine)
            except _breaks() as error:
                raise _failed(loop, engine, _explain(error)) from error
    return Prepared(step, engine, reason, parts, watch.seconds)


def _make_fastest(
    make: Callable[[str], Step], eager: Step, inputs: tuple[Tensor, ...], steps: int
) -> tuple[Step, str, str]:
    """A step with its engine and why: graphed, or captured where that pays; what fails is done without."""
    try:
        graphed = make("graphed")
    except _breaks() as error:
        return eager, "eager", f"graphed steps failed ({_explain(error)})"
    with Stopwatch(inputs[0].device) as watch:
        for _ in range(_TIMED):
            graphed(*inputs)
    predicted = steps * watch.seconds / _TIMED
    if predicted * (1 - 1 / _GAIN) <= _COMPILE_SECONDS:
        return graphed, "graphed", f"{predicted:.0f} s of work are too few to compile for"
    try:
        return make("captured"), "captured", f"{predicted:.0f} s of work are worth compiling for"
    except _breaks() as error:
        return graphed, "graphed", f"captured steps failed ({_explain(error)})"


def _breaks() -> tuple[type[Exception], ...]:
    """What compilers and captures raise, who raise what they like; the step itself has run before."""
    # Looked up where something has been raised: loading it takes as long as loading PyTorch.
    return torch._dynamo.exc.TorchDynamoException, RuntimeError


def _made_by(engine: str, step: Step, compiled: Callable[[], Step], inputs: tuple[Tensor, ...]) -> Step:
    """`step` as `engine` runs it. compiled: makes the compiled one."""
    if engine != "graphed":
        step = compiled()
        step(*inputs)
    return step if engine == "compiled" else _capture(step, inputs)


def _explain(error: Exception) -> str:
    """Why, in a line. What ends a capture says only that something in it failed, which is its context."""
    cause = error.__context__ if isinstance(error.__context__, RuntimeError) else error
    # Dynamo's first line says only who failed.
    return " ".join((str(cause).strip() or type(cause).__name__).splitlines()[:2])


def _failed(loop: str, engine: str, told: str) -> UserError:
    what = "captured in a CUDA graph" if engine == "graphed" else "compiled"
    return UserError(f"the steps of {loop} cannot be {what} ({told}): take `engine=eager`")


def _fitted(loop: str, build: Build, inputs: tuple[Tensor, ...], runtime: Runtime) -> tuple[Step, int]:
    """A step that has run once: with more and smaller parts of a batch where memory is short."""
    parts = asked = runtime.count_parts(loop)
    while True:
        try:
            step = build(_as_it_is, parts)
        except UserError as error:
            if parts == asked:
                raise
            raise UserError(
                f"the GPU's memory does not hold a step of {loop}, not even with {parts // 2} parts of its "
                "batch one after the other: take a smaller model, or a device with more memory"
            ) from error
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


def _choose(device: torch.device, steps: int, runtime: Runtime, compilable: str | None) -> tuple[str, str]:
    """The engine, and why it and no other where that was not asked for; "graphed" or faster is "graphed"."""
    if compilable is not None:
        return "eager", compilable
    if runtime.engine != "auto":
        return runtime.engine, ""
    if not runtime.ranks.alone:
        return "eager", "steps of several processes are not compiled"
    if runtime.activation_checkpointing:
        return "eager", "steps with activation checkpointing are not compiled"
    if device.type != "cuda":
        return "eager", "compiling takes longer than it saves on a CPU"
    if steps <= _FEW:
        return "eager", f"{steps} steps are too few to capture"
    return "graphed", ""


def _as_it_is(function: Pure) -> Pure:
    return function


def _compile(function: Pure) -> Pure:
    # Shapes are those of one batch size, and kernels made for it are faster than general ones.
    return torch.compile(function, dynamic=False)


def _capture(step: Step, inputs: tuple[Tensor, ...]) -> Step:
    """`step` as one CUDA graph that reads copies of its inputs."""
    # Streams and graphs are made on the current device.
    with torch.cuda.device(inputs[0].device):
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
    return _Replay(step, static, graph)


@dataclass(frozen=True)
class _Replay:
    """A captured step. step: what was captured, which holds the tensors that the graph reads and writes."""

    step: Step
    static: tuple[Tensor, ...]
    graph: torch.cuda.CUDAGraph

    def __call__(self, *given: Tensor) -> None:
        with section("captured step"):
            torch._foreach_copy_(self.static, given)
            self.graph.replay()


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

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

# What compiling is expected to cost and to gain on CUDA, where `auto` decides by it: seconds for one
# step, and the eager step's time over the captured one's. Assumed, not measured.
_COMPILE_SECONDS = 60.0
_GAIN = 1.5
# A capture takes about as long as this many eager steps: fewer are not worth one.
_FEW = 20
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
        step, parts = _fitted(loop, build, inputs, runtime)
        engine, reason = _choose(step, inputs, steps, runtime, compilable)
        while engine != "eager":
            try:
                step = _made_by(engine, step, lambda: build(_compile, parts), inputs)
                break
            # Compilers and captures raise what they like; the step itself has just run.
            except (torch._dynamo.exc.TorchDynamoException, RuntimeError) as error:
                # Dynamo's first line says only who failed.
                told = " ".join((str(error).strip() or type(error).__name__).splitlines()[:2])
                if runtime.engine != "auto":
                    raise _failed(loop, engine, told) from error
                reason = f"{engine} steps failed ({told})"
                engine = "graphed" if engine == "captured" else "eager"
    return Prepared(step, engine, reason, parts, watch.seconds)


def _made_by(engine: str, step: Step, compiled: Callable[[], Step], inputs: tuple[Tensor, ...]) -> Step:
    """`step` as `engine` runs it. compiled: makes the compiled one."""
    if engine != "graphed":
        step = compiled()
        step(*inputs)
    return step if engine == "compiled" else _capture(step, inputs)


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
    if saved > _COMPILE_SECONDS:
        return "captured", f"{predicted:.0f} s of work are worth compiling for"
    if steps <= _FEW:
        return "eager", f"{steps} steps are too few to capture"
    return "graphed", f"{predicted:.0f} s of work are too few to compile for"


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

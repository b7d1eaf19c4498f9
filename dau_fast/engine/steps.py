"""How a training step runs: op by op, compiled, or compiled and replayed as one CUDA graph.

A loop hands `Engine.prepare` a function that builds its step with a compiler for the pure functions
inside, so one definition of a step serves all engines. Before its first use a step is rehearsed once,
and what it changed is put back: kernels are then built, compiled and captured outside the loop's time.
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

from dau_fast.engine.activation_checkpointing import blocks_of, checkpointed
from dau_fast.engine.profiling import Profiler, section
from dau_fast.engine.ranks import ALONE, Ranks
from dau_fast.engine.runtime import Stopwatch
from dau_fast.engine.waiting import Waiting
from dau_fast.errors import UserError
from dau_fast.models import Outputs

ENGINES = ("eager", "compiled", "captured")

# What compiling is expected to cost and to gain on CUDA, where `auto` decides by it: seconds for one
# step, and the eager step's time over the captured one's. Assumed, not measured.
_COMPILE_SECONDS = 60.0
_GAIN = 1.5
# Calls on a side stream before a capture, so that lazily made state exists (PyTorch's own number).
_WARM_UPS = 3

Step = Callable[..., None]
Pure = Callable[..., Any]
Compile = Callable[[Pure], Pure]


@dataclass(frozen=True)
class Players:
    """What a step changes: the parameters and buffers of modules, and the state of optimisers."""

    modules: tuple[nn.Module, ...]
    optimizers: tuple[Optimizer, ...]

    def tensors(self) -> list[Tensor]:
        """All of them that exist by now."""
        found = [t for module in self.modules for t in (*module.parameters(), *module.buffers())]
        return found + [t for optimizer in self.optimizers for t in _state(optimizer)]


def choose_engine(
    name: str,
    device: torch.device,
    profiler: Profiler | None = None,
    ranks: Ranks = ALONE,
    accumulate: int = 1,
    activation_checkpointing: bool = False,
    shard: bool = False,
) -> Engine:
    """`auto` or one of ENGINES on `device`. Raises UserError for others, and for captured without CUDA.

    Several processes and activation checkpointing run eagerly: `compiled` and `captured` are refused.
    One process has nothing to share a model with: `shard` is refused.
    """
    if name != "auto" and name not in ENGINES:
        raise UserError(f"unknown engine '{name}': expected auto, {', '.join(ENGINES)}")
    if name == "captured" and device.type != "cuda":
        raise UserError("--engine captured needs a CUDA device: take eager or compiled here")
    if name not in ("auto", "eager") and not ranks.alone:
        raise UserError(f"--engine {name} is for one process, and there are {ranks.count}: take eager")
    if name not in ("auto", "eager") and activation_checkpointing:
        raise UserError(f"--engine {name} does not go with --activation-checkpointing: take eager")
    if shard and ranks.alone:
        raise UserError(
            "--shard shares a model out to several processes, and there is one: start them with torchrun, or "
            "leave it out"
        )
    return Engine(name, profiler, ranks, accumulate, activation_checkpointing, shard)


class Engine:
    """Prepares steps. name: `auto` or one of ENGINES. profiler: looks at the first steps of every loop.

    ranks: the processes that take every step together. accumulate: parts of a batch, one after the other.
    activation_checkpointing: compute blocks' activations again in the backward pass, to save memory.
    shard: whether each of the processes is to hold its share of a model that is trained.
    compile_seconds: spent so far on rehearsing, compiling and capturing. chosen: by loop, the engine
    that runs it and, for auto, why. waiting: by loop, how much of its steps' time went into waiting for data.
    """

    def __init__(
        self,
        name: str = "eager",
        profiler: Profiler | None = None,
        ranks: Ranks = ALONE,
        accumulate: int = 1,
        activation_checkpointing: bool = False,
        shard: bool = False,
    ) -> None:
        self.name = name
        self.shard = shard
        self.activation_checkpointing = activation_checkpointing
        self.ranks = ranks
        self.accumulate = accumulate
        self.profiler = profiler
        self.compile_seconds = 0.0
        self.chosen: dict[str, str] = {}
        self.waiting: dict[str, Waiting] = {}

    def prepare(
        self,
        loop: str,
        build: Callable[[Compile], Step],
        inputs: tuple[Tensor, ...],
        players: Players,
        steps: int,
        *,
        compilable: str | None = None,
    ) -> Step:
        """The step that `build` makes, ready to be called with tensors like `inputs`, `steps` times.

        build: takes a compiler, applies it to the pure functions of the step, and returns the step.
        players: everything that the step changes; it is the same after this call as before.
        compilable: why the step cannot be compiled, if so: it then runs eagerly.
        """
        device = inputs[0].device
        if self.profiler:
            self.profiler.finish()
        with Stopwatch(device) as watch, _kept(players, device):
            step = self._fitted(build, inputs, loop)
            name, reason = self._choose(step, inputs, steps, compilable)
            if name != "eager":
                step = build(_compile)
                self._rehearse(step, inputs, loop)
            if name == "captured":
                step = _capture(step, inputs)
        self.compile_seconds += watch.seconds
        self.chosen[loop] = f"{name}: {reason}" if reason else name
        return self.profiler.watch(loop, step, steps, device) if self.profiler else step

    def waiting_of(self, loop: str) -> Waiting:
        """What takes the time of `loop`, which begins."""
        waiting = self.waiting.setdefault(loop, Waiting())
        waiting.begin()
        return waiting

    def forward(self, called: nn.Module, network: nn.Module) -> Callable[[Tensor], Outputs]:
        """How a step calls `called`, which runs `network` and perhaps averages its gradients."""
        return checkpointed(called, blocks_of(network)) if self.activation_checkpointing else called

    def _fitted(self, build: Callable[[Compile], Step], inputs: tuple[Tensor, ...], loop: str) -> Step:
        """A step that has run once: with more and smaller parts of a batch where memory is short."""
        while True:
            step = build(_as_it_is)
            try:
                step(*inputs)
            except torch.OutOfMemoryError as error:
                if not self.ranks.alone:
                    raise UserError(
                        f"the GPU's memory does not hold a batch of {loop}: add --accumulate "
                        f"{2 * self.accumulate}, or start more processes"
                    ) from error
                self.accumulate *= 2
            else:
                return step
            torch.cuda.empty_cache()
            logging.getLogger("dau_fast").warning(
                "memory is short in %s: batches are taken in %d parts from here on", loop, self.accumulate
            )

    def _choose(
        self, step: Step, inputs: tuple[Tensor, ...], steps: int, compilable: str | None
    ) -> tuple[str, str]:
        if compilable is not None:
            return "eager", compilable
        if self.name != "auto":
            return self.name, ""
        if not self.ranks.alone:
            return "eager", "steps of several processes are not compiled"
        if self.activation_checkpointing:
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

    def _rehearse(self, step: Step, inputs: tuple[Tensor, ...], loop: str) -> None:
        try:
            step(*inputs)
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(
                f"the steps of {loop} cannot be compiled ({reason}): take --engine eager"
            ) from error


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

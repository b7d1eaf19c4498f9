"""One training loop, whoever is trained on what: batches in, optimiser steps, what they cost out.

A loop says how its loss is built from a part of a batch; parts, processes, profiling and compiling are
the same for all loops and live here.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dau_fast.engine.activation_checkpointing import checkpointed, require_blocks
from dau_fast.engine.batches import Batch
from dau_fast.engine.chance import seeded
from dau_fast.engine.device import fastest_convolutions
from dau_fast.engine.fused_layers import fused_layers
from dau_fast.engine.losses import BrokenLoss, Losses, describe_loss, find_broken_layer, name_images
from dau_fast.engine.modes import find_batchnorms
from dau_fast.engine.profiling import LoopProfile, Profiler, optimizer_section, section
from dau_fast.engine.runtime import Runtime
from dau_fast.engine.steps import Compile, Players, Prepared, Step, prepare
from dau_fast.engine.waiting import Waiting
from dau_fast.models import Outputs

# Images [B, ...] -> outputs: how a step is to call the model.
Forward = Callable[[Tensor], Outputs]
# A part of a batch, and its rows of the loop's inputs -> the loss of these rows, a mean.
PartLoss = Callable[..., Tensor]


def _leave_gradients() -> None:
    return None


@dataclass(frozen=True)
class Loop:
    """`steps` optimiser steps of `model`, in place; `optimizer` holds what they change.

    name: what reports call it. batches: all of one size, of `sets` sets one after the other. loss: from a
    compiler for pure functions and a way to call the model makes what is minimised. inputs: what the loss
    is given of a batch, tensors of its rows. partners, their_optimizers: what else a step changes: a game,
    whose `after` judges what becomes of the model; a loss that is not finite is then told and not raised.
    after: called with the number of steps taken so far; true ends the loop. compilable: why its steps
    cannot be compiled, if so. seed: of what the model itself draws, such as dropout. before_step: called
    when a batch's gradients are complete, which it may change; it waits for nothing. settled: BatchNorm
    normalises by its running statistics, and leaves them as they are.
    """

    name: str
    model: nn.Module
    optimizer: Optimizer
    batches: Iterator[Batch]
    steps: int
    loss: Callable[[Compile, Forward], PartLoss]
    inputs: Callable[[Batch], tuple[Tensor, ...]]
    after: Callable[[int], bool | None]
    sets: int = 1
    partners: tuple[nn.Module, ...] = ()
    their_optimizers: tuple[Optimizer, ...] = ()
    compilable: str | None = None
    seed: int = 0
    before_step: Callable[[], None] = _leave_gradients
    settled: bool = False


@dataclass(frozen=True)
class LoopCost:
    """How a loop ran and what that cost.

    engine: that ran it; reason: why, where it is not the one asked for, else "". parts: that batches were
    taken in. compile_seconds: of rehearsing, compiling and capturing. seconds: of its steps but the first
    one, and data_seconds of them waiting for data. profile: of its first steps, where it was asked for.
    """

    loop: str
    engine: str
    reason: str
    parts: int
    compile_seconds: float
    seconds: float
    data_seconds: float
    profile: LoopProfile | None = None


def run_loop(loop: Loop, runtime: Runtime) -> tuple[LoopCost, ...]:
    """Take the loop's steps; what they cost, nothing where there are none.

    No more batches are taken than steps. PyTorch's global generators are as before afterwards. Raises
    BrokenLoss where a loss is NaN or infinite: on a CPU before that step changes anything, on other devices
    some steps later.
    """
    return run_in_turns((loop,), [0] * loop.steps, runtime)


def run_in_turns(loops: Sequence[Loop], turns: Sequence[int], runtime: Runtime) -> tuple[LoopCost, ...]:
    """Take steps of several loops of one model: `turns` names them by their place, one a step.

    What they cost, of each that took a step; the profile is of all, and stands with the first. Each `after`
    counts its own loop's steps, and ends all. The seed is the first loop's; otherwise as `run_loop`.
    """
    if not turns:
        return ()
    runs = [_Run(loop, runtime) for loop in loops]
    first = loops[turns[0]]
    # Processes draw apart from one another: each holds other rows.
    with (
        seeded(first.seed + runtime.ranks.rank, runtime.device),
        Profiler(first.name, runtime.device, runtime.traces) as profiler,
    ):
        first.model.train()
        if first.settled:
            for norm in find_batchnorms(first.model):
                norm.eval()
        for turn in turns:
            if runs[turn].take_step(profiler):
                break
        for run in runs:
            run.check_losses(last=True)
    profiles = {first.name: profiler.found}
    return tuple(run.cost(profiles.get(run.loop.name)) for run in runs if run.prepared)


class _Run:
    """A loop under way."""

    def __init__(self, loop: Loop, runtime: Runtime) -> None:
        self.loop, self.runtime = loop, runtime
        self.waiting, self.steps = Waiting(runtime.device), 0
        self.losses = Losses(runtime.device, runtime.ranks, at_once=not loop.partners)
        self.prepared: Prepared | None = None
        self.told = False  # that a loss is broken

    def take_step(self, profiler: Profiler) -> bool:
        """One step; whether it was the last."""
        batch = self.waiting.take(self.loop.batches)
        self.losses.keep(self.steps + 1, batch)
        inputs = self.loop.inputs(batch)
        try:
            if self.prepared is None:
                self.prepared = prepare_loop(self.loop, inputs, self.runtime, self.losses)
            with fastest_convolutions(self.runtime.device):
                profiler.run(partial(self.prepared.step, *inputs))
        except BrokenLoss as error:
            raise self._describe(self.steps + 1, batch) from error
        self.waiting.finish()
        self.steps += 1
        self.check_losses()
        return bool(self.loop.after(self.steps))

    def check_losses(self, *, last: bool = False) -> None:
        """Raise BrokenLoss, or tell, where a loss is known by now to be NaN or infinite."""
        broken = self.losses.find_broken(self.steps, last=last) if self.steps and not self.told else None
        if broken is None:
            return
        found = self._describe(broken)
        if not self.loop.partners:
            raise found
        self.told = True
        logging.getLogger("dau_fast").warning("%s", found)

    def _describe(self, step: int, batch: Batch | None = None) -> BrokenLoss:
        """batch: of that step, where it changed nothing yet."""
        told = describe_loss(self.loop.name, step, self.loop.steps)
        found = batch and find_broken_layer(self.loop.model, batch.images)
        if batch is None or found is None:
            return BrokenLoss(told + self.losses.describe_batch(step))
        where, rows = found
        return BrokenLoss(f"{told}, first in {where} for {name_images(batch.indices[rows])}")

    def cost(self, profile: LoopProfile | None) -> LoopCost:
        """What it cost so far, of a step at least."""
        assert self.prepared is not None
        return LoopCost(
            self.loop.name,
            self.prepared.engine,
            self.prepared.reason,
            self.prepared.parts,
            self.prepared.seconds,
            self.waiting.seconds,
            self.waiting.data,
            profile,
        )


def prepare_loop(
    loop: Loop, inputs: tuple[Tensor, ...], runtime: Runtime, losses: Losses | None = None
) -> Prepared:
    """The loop's step, ready to be called with tensors like `inputs`; nothing is changed by it.

    losses: that its steps note, None for nobody to look at.
    """
    watched = losses or Losses(runtime.device, runtime.ranks)
    ranks = runtime.ranks
    rows = ranks.sizes(len(inputs[0]) // loop.sets, inputs[0].device)
    called = ranks.parallel(loop.model)
    forward: Forward = called
    if runtime.activation_checkpointing:
        forward = checkpointed(called, require_blocks(loop.model))

    # Not where processes share BatchNorm, blocks are computed again, or a gradient is differentiated.
    simple = ranks.alone and not runtime.activation_checkpointing and loop.compilable is None
    fusing = runtime.device.type == "cuda" and simple

    def build(compile: Compile, count: int) -> Step:
        # A compiler joins layers by itself, and more of them.
        fused = fused_layers if fusing and compile(_leave_gradients) is _leave_gradients else nullcontext
        loss, parts = loop.loss(compile, forward), ranks.micro_batches(rows, count)

        def step(*inputs: Tensor) -> None:
            loop.optimizer.zero_grad(set_to_none=True)
            for part in parts:
                with ranks.sharing(called, part is parts[-1]), fused(loop.model):
                    value = loss(part, *(_take_rows(tensor, part.rows, loop.sets) for tensor in inputs))
                    watched.note(value)
                    with section("backward"):
                        (value if part.weight == 1 else part.weight * value).backward()
            watched.end_step()
            with section(optimizer_section(loop.optimizer)):
                loop.before_step()
                loop.optimizer.step()

        return step

    players = Players((loop.model, *loop.partners), (loop.optimizer, *loop.their_optimizers))
    made = prepare(loop.name, build, inputs, players, loop.steps, runtime, compilable=loop.compilable)
    watched.reset()
    return made


def _take_rows(tensor: Tensor, rows: slice, sets: int) -> Tensor:
    """`rows` of each of the `sets` sets that lie one after the other in `tensor`."""
    if (rows.start, rows.stop) == (0, len(tensor) // sets):
        return tensor
    if sets == 1:
        return tensor[rows]
    return torch.cat([part[rows] for part in tensor.chunk(sets)])

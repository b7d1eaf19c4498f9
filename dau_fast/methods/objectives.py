"""Training a copy of the original by losses of one's own: what the rivals share.

An `Objective` says what one kind of step minimises on which images. `pursue` takes such steps in any order;
a frozen network that a loss asks comes from `frozen`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import MultiStepLR

from dau_fast.config import UnlearningRecipe
from dau_fast.engine.batches import Batch, steps_for
from dau_fast.engine.loop import Forward, Loop, LoopCost, PartLoss, run_in_turns
from dau_fast.engine.optimizers import sgd
from dau_fast.engine.profiling import section
from dau_fast.engine.ranks import MicroBatch
from dau_fast.engine.steps import Compile
from dau_fast.methods.task import Task
from dau_fast.models import Classifier


def show_labels(batch: Batch) -> tuple[Tensor, ...]:
    """Images and their labels."""
    return batch.images, batch.labels


def fit_labels(forward: Forward, images: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of `images` [B, ...] with `labels`, int64 [B]; scalar."""
    return F.cross_entropy(forward(images).logits, labels)


def _nothing(_: int = 0) -> None:
    return None


@dataclass(frozen=True)
class Objective:
    """What one kind of step minimises.

    name: of its steps in reports, and of what they draw. sets: int64 indices of images; a batch holds
    batch_size of each set, one after the other, and BatchNorm takes them together. loss: (how to call the
    model, *shown) -> a mean over rows; pure. show: what the loss is given of a batch, tensors of its rows,
    images first; it may draw. optimizer: that takes the steps. before_step: see `Loop`. after: told how
    many of its steps were taken.
    """

    name: str
    sets: tuple[Tensor, ...]
    batch_size: int
    optimizer: Optimizer
    loss: Callable[..., Tensor] = fit_labels
    show: Callable[[Batch], tuple[Tensor, ...]] = show_labels
    before_step: Callable[[], None] = _nothing
    after: Callable[[int], None] = _nothing


def descend(trainee: Classifier, task: Task, recipe: UnlearningRecipe) -> Optimizer:
    """The recipe's optimiser of `trainee`; weights that task.masks masks stay zero."""
    return sgd(
        trainee.network,
        task.masks,
        lr=recipe.lr,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
    )


def pursue(
    trainee: Classifier,
    task: Task,
    name: str,
    objectives: Sequence[Objective],
    turns: Sequence[int],
    milestones: Sequence[float] = (),
) -> tuple[LoopCost, ...]:
    """Train `trainee` in place, one step for each of `turns`, the place of its objective.

    Returns how the steps ran. name: labels progress and randomness. milestones: shares of all steps after
    which learning rates are divided by 10.
    """
    advance = task.progress(name, len(turns))
    decays = [round(share * len(turns)) for share in milestones]
    optimizers = dict.fromkeys(objective.optimizer for objective in objectives)
    schedulers = [MultiStepLR(optimizer, decays) for optimizer in optimizers] if decays else []

    def after_each() -> None:
        for scheduler in schedulers:
            scheduler.step()
        advance()

    seed = task.derive_seed(f"{name} noise")
    with ExitStack() as stack:
        loops = []
        for place, objective in enumerate(objectives):
            feed = task.feed(objective.name, objective.batch_size, *objective.sets)
            batches = stack.enter_context(closing(feed))
            loop = _make_loop(trainee, objective, batches, turns.count(place), after_each)
            loops.append(replace(loop, seed=seed))
        return run_in_turns(loops, turns, task.runtime)


def minimise(
    model: Classifier,
    task: Task,
    recipe: UnlearningRecipe,
    name: str,
    sets: tuple[Tensor, ...],
    loss: Callable[..., Tensor] = fit_labels,
    show: Callable[[Batch], tuple[Tensor, ...]] = show_labels,
) -> tuple[LoopCost, ...]:
    """`pursue` a single objective on `model`, in place: the recipe's passes over the first of `sets`."""
    with task.trainee(model) as trainee:
        optimizer = descend(trainee, task, recipe)
        objective = Objective(name, sets, recipe.batch_size, optimizer, loss, show)
        turns = [0] * steps_of(recipe, sets[0])
        return pursue(trainee, task, name, [objective], turns, recipe.milestones)


def _make_loop(
    trainee: Classifier,
    objective: Objective,
    batches: Iterator[Batch],
    steps: int,
    after_each: Callable[[], None],
) -> Loop:
    """The steps of one objective."""

    def build_loss(compile: Compile, forward: Forward) -> PartLoss:
        measure = compile(objective.loss)

        def part_loss(_: MicroBatch, *shown: Tensor) -> Tensor:
            with section("forward"):
                value: Tensor = measure(forward, *shown)
            return value

        return part_loss

    def after(number: int) -> None:
        objective.after(number)
        after_each()

    return Loop(
        objective.name,
        trainee,
        objective.optimizer,
        batches,
        steps,
        loss=build_loss,
        inputs=objective.show,
        after=after,
        sets=len(objective.sets),
        before_step=objective.before_step,
    )


def steps_of(recipe: UnlearningRecipe, index: Tensor) -> int:
    """Steps that make the recipe's passes over `index` [N]."""
    return steps_for(recipe.epochs, len(index), recipe.batch_size)


def alternate(epochs: int, *steps: int) -> list[int]:
    """Turns in which each of `epochs` takes so many steps of the first objective, then of the second."""
    return epochs * [place for place, count in enumerate(steps) for _ in range(count)]


@contextmanager
def frozen(task: Task, model: Classifier) -> Iterator[Callable[[Tensor], Tensor]]:
    """images [B, ...] -> logits [B, C] of `model` as it is now, in evaluation mode and without gradient.

    It can be called from steps inside the block, also where models are sharded, which then all processes
    call equally often.
    """
    teacher = copy.deepcopy(model).eval().requires_grad_(False)
    with task.trainee(teacher) as part:

        def ask(images: Tensor) -> Tensor:
            with torch.no_grad():
                logits: Tensor = part(images).logits
            return logits

        yield ask


def divergence(logits: Tensor, target: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(softmax(target / T) || softmax(logits / T)) of each row of [B, C]; [B]. T: `temperature`."""
    log_p, log_q = (values.div(temperature).log_softmax(1) for values in (target, logits))
    return (log_p.exp() * (log_p - log_q)).sum(1)

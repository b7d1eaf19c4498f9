"""One job, whoever asks for it: a network is wrapped, a task checked, methods run, models measured.

The command line and the Python API differ in where models, images and settings come from; from there on
both go through here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from dau_fast import models
from dau_fast.data.images import Images
from dau_fast.engine.chance import seeded
from dau_fast.engine.device import run_flushed, warm_up
from dau_fast.engine.runtime import Runtime
from dau_fast.engine.sharding import check_shard, placed
from dau_fast.methods.dau.view import time_sensitivities
from dau_fast.methods.method import Method
from dau_fast.methods.running import Finished, run_timed
from dau_fast.methods.task import Task, Unlearned
from dau_fast.metrics.unlearning import Measures, measure
from dau_fast.models import Classifier
from dau_fast.prune import Masks
from dau_fast.prune.prunable import prunable_weights

# Images of the batch on which sensitivities are timed.
_COSTED = 16


def wrap_network(network: nn.Module, runtime: Runtime, head: str | None = None) -> Classifier:
    """`network` itself, laid out and placed as `runtime` computes, as a Classifier.

    head: name of its classifier layer, None for its last Linear layer.
    """
    network = network.to(runtime.device).to(memory_format=torch.channels_last)
    exact = runtime.precision == torch.float64
    network = runtime.ranks.prepare(network.double() if exact else network)
    return Classifier(network, head, precision=None if exact else runtime.precision)


def match_precision(images: Images, runtime: Runtime) -> Images:
    """`images` whose batches networks of `runtime` can take."""
    if runtime.precision != torch.float64:
        return images
    pixels = images.pixels.double() if images.pixels.is_floating_point() else images.pixels
    return replace(images, pixels=pixels, dtype=torch.float64)


def network_builder(arch: str, images: Images, runtime: Runtime) -> Callable[[int], Classifier]:
    """seed -> a newly initialised `arch` for `images`; PyTorch's generators are untouched."""

    def build(seed: int) -> Classifier:
        with seeded(seed, runtime.device):
            network = models.build(arch, len(images.class_names), images.shape)
        return wrap_network(network, runtime)

    return build


@dataclass(frozen=True)
class Outcome:
    """What came of a task, by method; of the original too, where it was trained or pruned here.

    task: with the original's masks. settings: that the methods ran with. measures: of every model, none
    without a test set.
    """

    task: Task
    settings: dict[str, Any]
    finished: dict[str, Finished]
    measures: dict[str, Measures]

    @property
    def models(self) -> dict[str, Classifier]:
        """All of them, the original first."""
        made = {name: finished.model for name, finished in self.finished.items()}
        return {"original": self.task.original} | made

    @property
    def masks(self) -> dict[str, Masks]:
        """Of the models that are pruned."""
        found = {name: finished.masks for name, finished in self.finished.items()}
        return {name: m for name, m in ({"original": self.task.masks} | found).items() if m is not None}


def carry_out(
    task: Task,
    methods: Sequence[Method[Any]],
    asked: Mapping[str, Any],
    make_original: Callable[[Task], Unlearned] | None = None,
) -> Outcome:
    """Check `task`, run `methods` on it one after the other, and measure all models.

    asked: settings by method, whole or some fields; see Method.resolve. make_original: trains or prunes the
    original in place before all others. Raises UserError for what does not go together before anything runs.
    """
    work = partial(_carry_out, task, methods, asked, make_original)
    return run_flushed(work, task.runtime.device)


def _carry_out(
    task: Task,
    methods: Sequence[Method[Any]],
    asked: Mapping[str, Any],
    make_original: Callable[[Task], Unlearned] | None,
) -> Outcome:
    settings = {method.name: method.resolve(task, asked.get(method.name)) for method in methods}
    _check(task, methods, settings)
    warm_up(task.runtime.device)
    if task.runtime.shard:
        task.original.to("cpu")  # where `run_timed` leaves the others
    finished: dict[str, Finished] = {}
    if make_original:
        finished["original"] = run_timed("original", make_original, task)
        task = replace(task, masks=finished["original"].masks)
    for method in methods:
        finished[method.name] = run_method(method, settings[method.name], task)
    outcome = Outcome(task, settings, finished, {})
    if len(task.split.test):
        outcome.measures.update({name: measure_model(m, task) for name, m in outcome.models.items()})
    return outcome


def run_method(method: Method[Any], settings: Any, task: Task) -> Finished:
    """Run `method` with `settings` on `task`, timed."""
    return run_timed(method.name, lambda given: method.run(given, settings), task)


def measure_model(model: Classifier, task: Task) -> Measures:
    """What is measured of `model`; every model of a task is measured on the same draws."""
    images, chance = task.images, task.generator("measures")
    with placed(images.device, model):
        return measure(model, images, images.labels, task.split, chance, ranks=task.ranks)


def measure_sensitivities(task: Task) -> dict[str, Any]:
    """What each sensitivity costs: "seconds" by name, on a batch of "images" images."""
    index = torch.arange(min(_COSTED, len(task.labels)), device=task.images.device)
    seconds = time_sensitivities(task.original, task.images.batch(index), task.labels[index])
    return {"images": len(index), "seconds": seconds}


def _check(task: Task, methods: Sequence[Method[Any]], settings: Mapping[str, Any]) -> None:
    check_shard(task.runtime.shard, "classifier", pruned=task.pruned)
    if task.pruning is not None:
        prunable_weights(task.original.network)
    for method in methods:
        method.check(task, settings[method.name])

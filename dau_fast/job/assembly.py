"""One job, whoever asks for it: a network is wrapped, a task checked, methods run, models measured.

The command line and the Python API differ in where models, images and settings come from; from there on
both go through here.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
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
from dau_fast.errors import Diverged, UserError
from dau_fast.job.keeping import Keeper
from dau_fast.job.tuning import Judge, Tuning, plan_trials, run_trials
from dau_fast.methods.dau.view import time_sensitivities
from dau_fast.methods.method import Method
from dau_fast.methods.running import Finished, run_timed
from dau_fast.methods.task import Task, Unlearned
from dau_fast.metrics.finite import find_broken_output, find_broken_weights
from dau_fast.metrics.unlearning import Measures, measure
from dau_fast.models import Classifier
from dau_fast.prune import Masks
from dau_fast.prune.prunable import prunable_weights

# Images of the batch on which sensitivities are timed.
_COSTED = 16


def place_network(network: nn.Module, runtime: Runtime) -> nn.Module:
    """`network` itself, laid out and placed as `runtime` computes."""
    network = network.to(runtime.device).to(memory_format=torch.channels_last)
    return runtime.ranks.prepare(network.double() if runtime.precision == torch.float64 else network)


def wrap_network(network: nn.Module, runtime: Runtime, head: str | None = None, **how: Any) -> Classifier:
    """`network` itself, laid out and placed as `runtime` computes, as a Classifier.

    head: name of its classifier layer, None for its last Linear layer. how: see Classifier.
    """
    exact = runtime.precision == torch.float64
    return Classifier(place_network(network, runtime), head, None if exact else runtime.precision, **how)


def match_precision(images: Images, runtime: Runtime, *, narrow: bool = False) -> Images:
    """`images` whose batches networks of `runtime` can take.

    narrow: under autocast in its dtype already, to which a network that begins with a convolution or a
    product rounds them first of all.
    """
    if narrow and runtime.precision == torch.bfloat16:
        return replace(images, dtype=torch.bfloat16)
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
    without a test set. tunings: of those that were tuned.
    """

    task: Task
    settings: dict[str, Any]
    finished: dict[str, Finished]
    measures: dict[str, Measures]
    tunings: dict[str, Tuning] = field(default_factory=dict)

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
    *,
    trials: int = 0,
    skip_unfit: bool = False,
    keeper: Keeper | None = None,
) -> Outcome:
    """Check `task`, run `methods` on it one after the other, and measure all models.

    asked: settings by method, whole or some fields; see Method.resolve. make_original: trains or prunes the
    original in place before all others. trials: of every method that has a space of settings, the best of
    which is its result; 0 for none. skip_unfit: leave out methods that do not go with the task, after a
    line that says why. keeper: of finished parts, to go on from where a run is killed; all trials of a method
    are one part. Raises UserError for what does not go together before anything runs.
    """
    work = partial(_carry_out, task, methods, asked, make_original, trials, skip_unfit, keeper)
    return run_flushed(work, task.runtime.device)


def _carry_out(
    task: Task,
    methods: Sequence[Method[Any]],
    asked: Mapping[str, Any],
    make_original: Callable[[Task], Unlearned] | None,
    trials: int,
    skip_unfit: bool,
    keeper: Keeper | None,
) -> Outcome:
    _check(task)
    settings = _resolve_all(task, methods, asked, skip_unfit=skip_unfit)
    methods = [method for method in methods if method.name in settings]
    plans = {
        method.name: plan_trials(method, task, settings[method.name], trials)
        for method in methods
        if trials and method.space
    }
    warm_up(task.runtime.device)
    if task.runtime.shard:
        task.original.to("cpu")  # where `run_timed` leaves the others
    outcome = Outcome(task, settings, {}, {})
    if make_original:
        train = partial(run_timed, "original", make_original, task)
        made = keeper.finish("original", task, None, train, in_place=True) if keeper else train()
        outcome.finished["original"] = made
        outcome = replace(outcome, task=replace(task, masks=outcome.finished["original"].masks))
    _run_all(outcome, methods, plans, keeper)
    if len(task.split.test):
        outcome.measures.update({name: measure_model(m, outcome.task) for name, m in outcome.models.items()})
    return outcome


def _resolve_all(
    task: Task, methods: Sequence[Method[Any]], asked: Mapping[str, Any], *, skip_unfit: bool
) -> dict[str, Any]:
    """The checked settings of each method; without those that do not go with `task`, if `skip_unfit`."""
    found = {}
    for method in methods:
        settings = method.resolve(task, asked.get(method.name))
        try:
            if method.moves_images and not task.images.continuous:
                raise UserError(
                    f"method '{method.name}' moves images a little, which {task.images.pixels.dtype} inputs "
                    "cannot be: leave it out"
                )
            method.check(task, settings)
        except UserError as error:
            if not skip_unfit:
                raise
            logging.getLogger("dau_fast").warning("%s is left out: %s", method.name, error)
        else:
            found[method.name] = settings
    return found


def _run_all(
    outcome: Outcome,
    methods: Sequence[Method[Any]],
    plans: Mapping[str, Sequence[Any]],
    keeper: Keeper | None,
) -> None:
    """Put into `outcome` what comes of `methods`, each of which tries the settings of its plan, if any."""
    task = outcome.task
    judge = Judge(task) if plans else None
    for method in methods:
        name = method.name
        if judge and name in plans:
            search = partial(run_trials, method, task, plans[name], judge)
            tuned = keeper.finish_tuned(name, task, plans[name], search) if keeper else search()
            outcome.finished[name], outcome.settings[name] = tuned.finished, tuned.settings
            outcome.tunings[name] = tuned.tuning
        else:
            run = partial(run_method, method, outcome.settings[name], task)
            made = keeper.finish(name, task, outcome.settings[name], run) if keeper else run()
            outcome.finished[name] = made


def run_method(method: Method[Any], settings: Any, task: Task) -> Finished:
    """Run `method` with `settings` on `task`, timed."""
    return run_timed(method.name, lambda given: method.run(given, settings), task)


def measure_model(model: Classifier, task: Task) -> Measures:
    """What is measured of `model`; every model of a task is measured on the same draws."""
    images, chance, split = task.images, task.generator("measures"), task.split
    with placed(images.device, model):
        try:
            return measure(model, images, images.labels, split, chance, ranks=task.ranks)
        except Diverged as error:
            sets = {name: getattr(split, name) for name in ("forget", "retain", "validation", "test")}
            found = find_broken_output(model, images, sets) if task.ranks.alone else None
            raise Diverged(f"{error}; it gives {found}" if found else str(error)) from error


def measure_sensitivities(task: Task) -> dict[str, Any]:
    """What each sensitivity costs: "seconds" by name, on a batch of "images" images."""
    index = torch.arange(min(_COSTED, len(task.labels)), device=task.images.device)
    seconds = time_sensitivities(task.original, task.images.batch(index), task.labels[index])
    return {"images": len(index), "seconds": seconds}


def _check(task: Task) -> None:
    broken = find_broken_weights(task.original.network)
    if broken:
        raise UserError(
            f"'{broken[0]}' of the model holds NaN or infinity ({len(broken)} of its tensors do): its "
            "training went wrong, take an earlier one"
        )
    check_shard(task.runtime.shard, "classifier", pruned=task.pruned)
    if task.pruning is not None:
        prunable_weights(task.original.network)

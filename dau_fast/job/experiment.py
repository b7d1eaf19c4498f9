"""One seed of a run: split, original, every method on the same task, and their measures."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from dau_fast import models
from dau_fast.config import DauConfig, PruneConfig, SplitConfig, TrainingRecipe
from dau_fast.data.images import Images
from dau_fast.data.split import Forget, Split, hold_out, make_split
from dau_fast.engine.batches import generator_for
from dau_fast.engine.ranks import ALONE, Ranks
from dau_fast.engine.sharding import placed
from dau_fast.engine.steps import Engine
from dau_fast.methods import original, retrain
from dau_fast.methods.running import METHODS, Finished, run
from dau_fast.methods.task import Progress, Task
from dau_fast.metrics.unlearning import Measures, avg_gap, measure
from dau_fast.models import Classifier
from dau_fast.prune import Masks
from dau_fast.report.record import method_entry


@dataclass(frozen=True)
class Checkpoint:
    """A given original, and the role every image had in its training, int8 [N], if it is known.

    masks: of a pruned one, where its file holds them.
    """

    model: Classifier
    roles: np.ndarray | None
    masks: Masks | None = None


@dataclass(frozen=True)
class Experiment:
    """What all seeds of a run share. seed: the first one. fresh: see Task. sensitivity: see View.

    recipe: of the original. retraining: those of retrain and retrain_fast, by method.
    pruning: of the original, a given one included; None leaves it as it is. engine: of all training steps.
    retain_sample: see DauConfig.
    """

    images: Images
    forget: Forget
    methods: tuple[str, ...]
    seed: int
    shares: SplitConfig
    recipe: TrainingRecipe
    retraining: Mapping[str, TrainingRecipe]
    fresh: Callable[[int], Classifier]
    checkpoint: Checkpoint | None
    sensitivity: str
    pruning: PruneConfig | None = None
    engine: Engine = field(default_factory=Engine)
    retain_sample: float | None = None

    def roles(self, seed: int) -> np.ndarray:
        """The role of every image, int8 [N]; a given original keeps the ones it was trained with."""
        given = self.checkpoint
        if given and given.roles is not None:
            return given.roles
        return hold_out(
            self.images.labels,
            self.images.test,
            self.seed if given else seed,
            validation_share=self.shares.validation_share,
            test_share=self.shares.test_share,
            keep=() if given else self.forget.indices or (),
        )


@dataclass(frozen=True)
class SeedResult:
    """One seed's numbers and models, by method.

    entries: as the report has them. history: of the game. retraining_gap: avg gap between two
    retrainings, or None. networks: "original" and one a method. masks: of those that are pruned.
    """

    seed: int
    split: Split
    roles: np.ndarray
    entries: dict[str, dict[str, Any]]
    history: dict[str, Any] | None
    retraining_gap: float | None
    networks: dict[str, nn.Module]
    masks: dict[str, Masks]


def run_seed(experiment: Experiment, seed: int, *, twice: bool, progress: Progress) -> SeedResult:
    """Run every method with `seed`. twice: retrain a second time for the noise floor."""
    images, given, pruning = experiment.images, experiment.checkpoint, experiment.pruning
    roles = experiment.roles(seed)
    split = make_split(roles, images.labels, experiment.forget, seed).to(images.device)
    initial = generator_for(seed, "original", images.device).initial_seed()
    start = given.model if given else experiment.fresh(initial)
    masks = given.masks if given else None
    usual = DauConfig.default(
        classwise=split.classwise,
        retain_images=len(split.retain),
        pruned=masks is not None or pruning is not None,
        forget_images=len(split.forget),
        retain_sample=experiment.retain_sample,
    )
    settings = {"dau": replace(usual, sensitivity=experiment.sensitivity), **experiment.retraining}
    if given and pruning:
        start = copy.deepcopy(start)  # pruned in place below, and dense again for the next seed
    if experiment.engine.shard:
        start.to("cpu")  # where `run` leaves the others
    task = Task(
        images, split, seed, start, experiment.fresh, experiment.recipe,
        settings, progress, masks, pruning, experiment.engine,
    )  # fmt: skip

    # This trains `start` itself, so it comes before all others.
    finished: dict[str, Finished] = {}
    if pruning or not given:
        finished["original"] = run("original", original.prune_trained if given else original.train, task)
        task = replace(task, masks=finished["original"].masks)
    for name, method in METHODS.items():
        if name in experiment.methods:
            finished[name] = run(name, method, task)

    def measured(model: Classifier) -> Measures:
        with placed(images.device, model):
            return measure(model, images, images.labels, split, task.generator("measures"), ranks=task.ranks)

    trained = {"original": start} | {name: result.model for name, result in finished.items()}
    measures = {name: measured(model) for name, model in trained.items()}
    reference = (measures["retrain"], finished["retrain"]) if "retrain" in finished else None
    clean = measures.get("retrain_clean")
    sparse = {name: result.masks for name, result in finished.items()} | {"original": task.masks}
    entries = {}
    for name, model in trained.items():
        entries[name] = method_entry(
            measures[name],
            finished.get(name),
            reference,
            fast=finished.get("retrain_fast"),
            clean=clean,
            sparsity=zero_share(model.network, sparse[name]),
        )
    gap = None
    if reference and twice:
        gap = avg_gap(measured(run("retrain", retrain.unlearn_again, task).model), reference[0])
    return SeedResult(
        seed,
        split,
        roles,
        entries,
        finished["dau"].history if "dau" in finished else None,
        gap,
        {name: model.network for name, model in trained.items()},
        {name: found for name, found in sparse.items() if found is not None},
    )


def zero_share(network: nn.Module, masks: Masks | None) -> float | None:
    """Share of zeros, 0 to 1, among the weights of `network` that have a mask; None without masks."""
    if masks is None:
        return None
    weights = masks.of(network).values()
    return 1 - sum(int(weight.count_nonzero()) for weight in weights) / masks.weights


def builder(
    arch: str, images: Images, precision: torch.dtype | None, ranks: Ranks = ALONE
) -> Callable[[int], Classifier]:
    """seed -> a newly initialised `arch` for `images`, on their device; torch's generator is untouched.

    precision: of choose_precision. ranks: the processes that will train it.
    """
    exact = precision == torch.float64

    def fresh(seed: int) -> Classifier:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            network = models.build(arch, len(images.class_names), images.shape)
        network = network.to(images.device).to(memory_format=torch.channels_last)
        network = ranks.prepare(network.double() if exact else network)
        return Classifier(network, precision=None if exact else precision)

    return fresh

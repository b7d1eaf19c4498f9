"""Training with pruning: how a pruned original comes about, and a retrained model with masks of its own."""

from __future__ import annotations

import copy
from dataclasses import replace

from torch import Tensor, nn

from dau_fast import prune
from dau_fast.config import PruneConfig
from dau_fast.methods.supervised import fit
from dau_fast.methods.task import Task
from dau_fast.models import Classifier
from dau_fast.prune import Masks


def fit_pruned(
    model: Classifier, index: Tensor, task: Task, pruning: PruneConfig, name: str, *, trained: bool = False
) -> Masks:
    """Find masks as `pruning` says and train `model` with them on images `index`, in place.

    omp and imp train the dense model first, and take it up again as it was early in that training
    (Frankle et al. 2020, arXiv 1912.05671); synflow and random prune the untrained one.
    trained: `model` is already; only for omp, which prunes it and trains it on from where it is, with
    the learning rates it would have had after rewinding (Renda et al. 2020, arXiv 2003.02389).
    """
    network, sparsity, dense = model.network, pruning.sparsity, replace(task, masks=None)
    if pruning.method == "synflow":
        masks = prune.synflow(network, sparsity, input_shape=task.images.shape, iterations=pruning.iterations)
    elif pruning.method == "random":
        masks = prune.random(network, sparsity, seed=task.generator(f"{name} masks").initial_seed())
    elif trained:
        masks = prune.omp(network, sparsity)
    else:
        fit(model, index, dense, task.recipe, f"{name} early", part=(0, pruning.rewind))
        if pruning.method == "omp":
            early = copy.deepcopy(network.state_dict())
            fit(model, index, dense, task.recipe, f"{name} dense", part=(pruning.rewind, 1))
            masks = prune.omp(network, sparsity, rewind=early)
        else:
            masks = _imp(model, index, dense, pruning, name)
    begin = pruning.rewind if pruning.method in ("omp", "imp") else 0
    fit(model, index, replace(task, masks=masks), task.recipe, name, part=(begin, 1))
    return masks


def _imp(model: Classifier, index: Tensor, task: Task, pruning: PruneConfig, name: str) -> Masks:
    done = 0

    def train(_: nn.Module, masks: Masks | None) -> None:
        nonlocal done
        done += 1
        sparse, part = replace(task, masks=masks), (pruning.rewind, 1.0)
        fit(model, index, sparse, task.recipe, f"{name} round {done}", part=part)

    return prune.imp(model.network, pruning.sparsity, train, rate=pruning.rate)

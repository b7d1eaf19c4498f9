"""Unlearning from Python, for a caller's own model and data."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from dau_fast.config import TrainingRecipe
from dau_fast.data.images import Images
from dau_fast.data.progress import Progress, silent
from dau_fast.data.sets import Labelled, join_sets
from dau_fast.data.split import TEST, TRAINING, VALIDATION, Forget, make_split
from dau_fast.engine.ranks import ALONE, Ranks
from dau_fast.engine.runtime import Runtime, choose_device, choose_precision
from dau_fast.errors import UserError
from dau_fast.job.assembly import Outcome, carry_out, match_precision, wrap_network
from dau_fast.methods.method import Method
from dau_fast.methods.registry import get_method
from dau_fast.methods.task import Task
from dau_fast.metrics.unlearning import Measures
from dau_fast.models import Classifier
from dau_fast.prune import Masks


@dataclass(frozen=True)
class Result:
    """An unlearned model and what it cost.

    model: a changed copy of the caller's network; the caller's is untouched. seconds: wall clock
    from call to finished weights; compile_seconds stands beside it. before, after: None without a
    test set. settings: that the method ran with. history: what the game recorded, None for other methods.
    """

    model: nn.Module
    seconds: float
    compile_seconds: float
    before: Measures | None
    after: Measures | None
    settings: Any
    history: dict[str, Any] | None


def unlearn(
    model: nn.Module,
    *,
    forget: Labelled,
    retain: Labelled,
    validation: Labelled,
    test: Labelled | None = None,
    config: Any = None,
    method: str = "dau",
    classifier: str | None = None,
    seed: int = 0,
    masks: Masks | None = None,
    device: str = "auto",
    precision: str = "auto",
    engine: str = "auto",
    accumulate: int = 1,
    activation_checkpointing: bool = False,
    distributed: bool = False,
    shard: bool = False,
    stream: bool = False,
    progress: Progress = silent,
) -> Result:
    """Make a copy of `model` behave as if it had been trained without `forget`.

    model: maps images [B, ...] to logits [B, C] and ends in a Linear layer, named by `classifier` if
    it is not the last one. forget, retain: what the model was trained on, in two parts. validation:
    never trained on. Each set is (images, labels) with floating-point images [N, ...] as the model
    takes them and int64 labels [N], or a map-style Dataset of such pairs. Without `test` nothing is
    measured. method: "dau", "ft", "ga" or another that does not retrain. config: the method's settings, such
    as a DauConfig, or a dict of some of its fields; None for the usual ones.
    masks: of a pruned model, whose masked weights stay zero. precision: "auto" (bf16 on CUDA), "fp32",
    "bf16" or "fp64". engine: how training steps run, "auto" or one of dau_fast.engine.runtime.ENGINES.
    accumulate: parts a batch is taken in, one after the other, to save memory. activation_checkpointing:
    compute blocks' activations again in the backward pass, which saves more of it and takes longer.
    distributed: whether all processes of torch.distributed's default group make this call together, with
    the same model and sets, each on a device of its own; each has the result. shard: whether each of them
    holds no more than its share of what is trained: weights, gradients and the optimiser's state.
    stream: read images while training, ahead of the steps, and hold none; otherwise all sets are held on
    `device`. Both give the same where a Dataset's items stay the same. One thread calls the Datasets, which
    so need not be safe for several; it is not the caller's. Labels are those in `targets` or `labels` of a
    Dataset (or of the one that a Subset is of), as torchvision's have them; where there are none, or where
    the first item differs from them, every item is read once before.
    Raises UserError (a ValueError) for settings out of range, for sets that do not fit together or do not
    fit the model, and for an item that a Dataset raises an error for.
    """
    chosen = _choose_method(method)
    place = choose_device(device)
    runtime = Runtime(
        place,
        choose_precision(precision, place),
        engine,
        _join_ranks(distributed),
        accumulate,
        activation_checkpointing=activation_checkpointing,
        shard=shard,
    )
    # Forget first, so that its indices count from 0.
    given = {"forget": forget, "retain": retain, "validation": validation, "test": test}
    sets = {name: data for name, data in given.items() if data is not None}
    original = wrap_network(copy.deepcopy(model), runtime, classifier)
    task = _make_task(original, sets, masks, runtime, seed=seed, stream=stream, progress=progress)
    outcome = carry_out(task, [chosen], {chosen.name: config})
    return _make_result(model, chosen.name, outcome)


def _make_task(
    original: Classifier,
    sets: dict[str, Labelled],
    masks: Masks | None,
    runtime: Runtime,
    *,
    seed: int,
    stream: bool,
    progress: Progress,
) -> Task:
    """The task of making `original` forget the first of `sets`."""
    if type(seed) is not int or not 0 <= seed < 2**32:
        raise UserError(f"`seed={str(seed)[:80]}`: expected a whole number from 0 to {2**32 - 1}")
    images, counts = join_sets(sets, stream, runtime.device)
    images = match_precision(images, runtime)
    _check_fits(original, images)
    if masks is not None:
        masks = masks.to(runtime.device)
        masks.apply_(original.network)
    roles = np.concatenate([np.full(counts[name], _ROLES[name], dtype=np.int8) for name in counts])
    forgotten = Forget("the given set", indices=tuple(range(counts["forget"])))
    split = make_split(roles, images.labels, forgotten, seed).to(runtime.device)
    return Task(
        images, split, seed, original, _no_fresh_network, TrainingRecipe(), progress, masks, runtime=runtime
    )


def _make_result(model: nn.Module, method: str, outcome: Outcome) -> Result:
    """What the caller of `method` gets: a copy of `model` with the finished weights."""
    finished = outcome.finished[method]
    network = copy.deepcopy(model)
    network.load_state_dict(finished.model.network.state_dict())
    return Result(
        network,
        finished.seconds,
        finished.compile_seconds,
        outcome.measures.get("original"),
        outcome.measures.get(method),
        outcome.settings[method],
        finished.history,
    )


def _choose_method(name: str) -> Method[Any]:
    chosen = get_method(name)
    if chosen.reference:
        raise UserError(f"method '{name}' needs the recipe the model was trained by: retrain it yourself")
    return chosen


def _join_ranks(distributed: bool) -> Ranks:
    if not distributed:
        return ALONE
    if not (dist.is_available() and dist.is_initialized()):
        raise UserError(
            "`distributed=True` without a process group: call torch.distributed.init_process_group first, or "
            "leave it out"
        )
    return Ranks.from_group()


_ROLES = {"forget": TRAINING, "retain": TRAINING, "validation": VALIDATION, "test": TEST}


def _check_fits(model: Classifier, images: Images) -> None:
    """One forward pass: (features, logits) of the right shapes, and a logit for every label."""
    try:
        with torch.no_grad():
            features, logits = model.eval()(_first_two(images))
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"the model cannot take images of shape {images.shape}: {reason}") from error
    if features.ndim != 2 or logits.ndim != 2 or logits.shape[1] < len(images.class_names):
        raise UserError(
            f"the model gives features {list(features.shape)} and logits {list(logits.shape)} for two "
            f"images: expected [2, D] and [2, C] with C of at least {len(images.class_names)}"
        )
    if images.labels.min() < 0:
        raise UserError("a label is negative: labels count from 0")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError("no parameter of the model requires grad: unfreeze what may change")


def _first_two(images: Images) -> Tensor:
    return images.batch(torch.arange(2, device=images.device))


def _no_fresh_network(seed: int) -> Classifier:
    raise UserError(f"a fresh network (seed {seed}) cannot be made from a caller's model")

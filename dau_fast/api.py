"""Unlearning from Python, for a caller's own model and data."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import Dataset

from dau_fast.config import DauConfig, TrainingRecipe
from dau_fast.dau.view import check_sensitivity
from dau_fast.engine.ranks import ALONE, Ranks
from dau_fast.engine.runtime import choose_device, warm_up
from dau_fast.engine.sharding import check_shard, placed
from dau_fast.engine.steps import choose_engine
from dau_fast.errors import UserError
from dau_fast.images import Images
from dau_fast.methods import method_named, run
from dau_fast.metrics.unlearning import Measures, measure
from dau_fast.models import Classifier
from dau_fast.prune import Masks
from dau_fast.split import TEST, TRAINING, VALIDATION, Forget, make_split
from dau_fast.task import Progress, Task, silent

Labelled = tuple[Tensor, Tensor] | Dataset[tuple[Tensor, int]]


@dataclass(frozen=True)
class Result:
    """An unlearned model and what it cost.

    model: a changed copy of the caller's network; the caller's is untouched. seconds: wall clock
    from call to finished weights; compile_seconds stands beside it. before, after: None without a
    test set. history: what the game recorded, None for other methods.
    """

    model: nn.Module
    seconds: float
    compile_seconds: float
    before: Measures | None
    after: Measures | None
    history: dict[str, Any] | None


def unlearn(
    model: nn.Module,
    *,
    forget: Labelled,
    retain: Labelled,
    validation: Labelled,
    test: Labelled | None = None,
    config: DauConfig | None = None,
    method: str = "dau",
    classifier: str | None = None,
    seed: int = 0,
    masks: Masks | None = None,
    device: str = "auto",
    engine: str = "auto",
    accumulate: int = 1,
    activation_checkpointing: bool = False,
    distributed: bool = False,
    shard: bool = False,
    progress: Progress = silent,
) -> Result:
    """Make a copy of `model` behave as if it had been trained without `forget`.

    model: maps images [B, ...] to logits [B, C] and ends in a Linear layer, named by `classifier` if
    it is not the last one. forget, retain: what the model was trained on, in two parts. validation:
    never trained on. Each set is (images, labels) with floating-point images [N, ...] as the model
    takes them and int64 labels [N], or a map-style Dataset of such pairs; all sets are held on
    `device`. Without `test` nothing is measured. method: "dau", "ft" or "ga".
    masks: of a pruned model, whose masked weights stay zero. engine: how training steps run, "auto" or
    one of dau_fast.engine.steps.ENGINES. accumulate: parts a batch is taken in, one after the other, to
    save memory. activation_checkpointing: compute blocks' activations again in the backward pass, which
    saves more of it and takes longer. distributed: whether all processes of torch.distributed's default
    group make this call together, with the same model and sets, each on a device of its own; each has
    the result. shard: whether each of them holds no more than its share of what is trained: weights,
    gradients and the optimiser's state.
    Raises UserError (a ValueError) for sets that do not fit together or do not fit the model.
    """
    if method.startswith("retrain"):
        raise UserError(f"method '{method}' needs the recipe the model was trained by: retrain it yourself")
    chosen = method_named(method)
    place = choose_device(device)
    ranks = _ranks(distributed)
    runner = choose_engine(engine, place, None, ranks, accumulate, activation_checkpointing, shard)
    check_shard(shard, config.sensitivity if config else "classifier", pruned=masks is not None)
    given = {"forget": forget, "retain": retain, "validation": validation, "test": test}
    sets = {name: _tensors(name, data) for name, data in given.items() if data is not None}
    images = _images(sets).to(place)
    original = Classifier(ranks.prepare(copy.deepcopy(model).to(place)), classifier)
    _check_fits(original, images)
    if masks is not None:
        masks = masks.to(place)
        masks.apply_(original.network)
    if config:
        check_sensitivity(config.sensitivity, original, images.pixels[:2])
    if shard:
        original.to("cpu")

    roles = np.concatenate([np.full(len(sets[name][1]), _ROLES[name], dtype=np.int8) for name in sets])
    indices = tuple(range(len(sets["forget"][1])))
    split = make_split(roles, images.labels, Forget("the given set", indices=indices), seed).to(place)
    settings = {"dau": config} if config else {}
    task = Task(
        images, split, seed, original, _no_fresh_network, TrainingRecipe(),
        settings, progress, masks, engine=runner,
    )  # fmt: skip
    warm_up(place)
    finished = run(method, chosen, task)

    def measured(classifier: Classifier) -> Measures | None:
        if test is None:
            return None
        with placed(place, classifier):
            return measure(
                classifier, images.batch, images.labels, split, task.generator("measures"), ranks=task.ranks
            )

    before, after = measured(original), measured(finished.model)
    network = copy.deepcopy(model)
    network.load_state_dict(finished.model.network.state_dict())
    return Result(network, finished.seconds, finished.compile_seconds, before, after, finished.history)


def _ranks(distributed: bool) -> Ranks:
    if not distributed:
        return ALONE
    if not (dist.is_available() and dist.is_initialized()):
        raise UserError(
            "distributed=True without a process group: call torch.distributed.init_process_group first, or "
            "leave it out"
        )
    return Ranks.all()


_ROLES = {"forget": TRAINING, "retain": TRAINING, "validation": VALIDATION, "test": TEST}


def _tensors(name: str, data: Labelled) -> tuple[Tensor, Tensor]:
    """A set as (images [N, ...], labels int64 [N])."""
    if isinstance(data, Dataset):
        pairs = [data[i] for i in range(len(data))]  # type: ignore[arg-type]
        if not pairs:
            raise UserError(f"the {name} set is empty: give at least one image")
        try:
            data = torch.stack([image for image, _ in pairs]), torch.tensor([int(y) for _, y in pairs])
        except (TypeError, ValueError, RuntimeError) as error:
            raise UserError(
                f"the {name} set's pairs do not fit together, all images need one shape: {error}"
            ) from error
    images, labels = data
    if len(images) == 0 or len(images) != len(labels):
        raise UserError(
            f"the {name} set has {len(images)} images and {len(labels)} labels: expected as many of "
            "both, at least one"
        )
    if not images.is_floating_point() or labels.dtype != torch.int64 or labels.ndim != 1:
        raise UserError(
            f"the {name} set has {images.dtype} images and {labels.dtype} labels: expected floating-point "
            "images as the model takes them, and int64 labels"
        )
    return images, labels


def _images(sets: dict[str, tuple[Tensor, Tensor]]) -> Images:
    """All sets one after the other; forget first, so that its indices count from 0."""
    shapes = {name: tuple(images.shape[1:]) for name, (images, _) in sets.items()}
    if len(set(shapes.values())) > 1:
        raise UserError(f"the sets hold images of different shapes {shapes}: give all the same shape")
    pixels, labels = (torch.cat(column) for column in zip(*sets.values(), strict=True))
    names = tuple(str(label) for label in range(int(labels.max()) + 1))
    return Images(pixels, labels, names)


def _check_fits(model: Classifier, images: Images) -> None:
    """One forward pass: (features, logits) of the right shapes, and a logit for every label."""
    try:
        with torch.no_grad():
            features, logits = model.eval()(images.pixels[:2])
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


def _device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _no_fresh_network(seed: int) -> Classifier:
    raise UserError(f"a fresh network (seed {seed}) cannot be made from a caller's model")

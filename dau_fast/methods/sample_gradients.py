"""Gradients of every sample's own loss, some samples at a time: what one-shot methods are made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from dau_fast.engine.batches import load_each
from dau_fast.engine.evaluation import EVALUATION_BATCH
from dau_fast.engine.modes import evaluating
from dau_fast.errors import UserError
from dau_fast.methods.task import Task
from dau_fast.models import Classifier

# Numbers in the per-sample gradients that are held at a time: half a GB in float32, or one sample's.
HELD = 2**27
# Their number is not all that a pass holds: activations grow with the samples too.
_MOST_SAMPLES = 256


class SampleGradients:
    """Of the cross-entropy of each of the images `index` [N] of `task`: evaluation mode, full precision.

    model: whose trainable parameters are meant, P numbers, flat and in their order; a masked weight's
    gradient is 0. All processes of the task share the work and have the sums.
    """

    def __init__(self, model: Classifier, task: Task, index: Tensor) -> None:
        self.model, self.task, self.index = model, task, index
        self.kept = _kept_weights(model, task)
        self._held: list[Tensor] | None = None

    def __len__(self) -> int:
        return len(self.index)

    def sum(self, over: Callable[[Tensor], Tensor]) -> Tensor:
        """The sum of over(gradients [b, P]) -> [P] over all samples, b of them at a time; [P]."""
        total = torch.zeros_like(flat_parameters(self.model))
        with _exactly(self.model):
            for gradients in self._compute() if self._held is None else self._held:
                total += over(gradients)
        return self._over_ranks(total)

    def squares(self) -> Tensor:
        """The mean of each entry's square over the samples: the empirical Fisher matrix's diagonal, [P]."""
        return self.sum(lambda gradients: gradients.square().sum(0)) / len(self)

    def total(self) -> Tensor:
        """The sum over the samples, [P], by ordinary passes."""
        parameters = list(trainable(self.model).values())
        found = torch.zeros_like(flat_parameters(self.model))
        with _exactly(self.model):
            for images, labels in self._batches(EVALUATION_BATCH):
                loss = F.cross_entropy(self.model(images).logits, labels, reduction="sum")
                found += _flat(torch.autograd.grad(loss, parameters, allow_unused=True), parameters)
        found = self._over_ranks(found)
        return found if self.kept is None else found * self.kept

    def hold(self) -> None:
        """Keep the gradients for further sums where all of them together are no more than `HELD` numbers."""
        if len(self) * flat_parameters(self.model).numel() <= HELD:
            with _exactly(self.model):
                self._held = list(self._compute())

    def _compute(self) -> Iterator[Tensor]:
        """Gradients [b, P] of this process's samples."""
        parameters = trainable(self.model)
        samples = HELD // max(1, sum(parameter.numel() for parameter in parameters.values()))
        each = vmap(grad(self._loss), in_dims=(None, 0, 0))
        values = {name: parameter.detach() for name, parameter in parameters.items()}
        for images, labels in self._batches(max(1, min(samples, _MOST_SAMPLES))):
            found = each(values, images, labels)
            gradients = torch.cat([found[name].flatten(1) for name in values], 1)
            yield gradients if self.kept is None else gradients.mul_(self.kept)

    def _loss(self, values: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        logits = functional_call(self.model, values, (image.unsqueeze(0),)).logits
        return F.cross_entropy(logits, label.unsqueeze(0))

    def _batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        parts = [part for part in self.task.ranks.batches(self.index, size) if len(part)]
        for part, images in zip(parts, load_each(self.task.images.widened(), parts), strict=True):
            yield images, self.task.labels[part]

    def _over_ranks(self, total: Tensor) -> Tensor:
        ranks = self.task.ranks
        return ranks.gather(total.unsqueeze(0), [1] * ranks.count).sum(0)


@contextmanager
def _exactly(model: Classifier) -> Iterator[None]:
    """`model` in evaluation mode and without autocast: squares of bfloat16's rounding would be summed up."""
    precision, model.precision = model.precision, None
    try:
        with evaluating(model):
            yield
    finally:
        model.precision = precision


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of `model` that may change, each once, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def flat_parameters(model: nn.Module) -> Tensor:
    """The trainable parameters as one vector [P], a copy."""
    return torch.cat([parameter.detach().flatten() for parameter in trainable(model).values()])


@torch.no_grad()
def set_parameters(model: Classifier, values: Tensor, task: Task) -> None:
    """Give `model` the trainable parameters `values` [P], in place; masked weights become 0."""
    parameters = list(trainable(model).values())
    parts = values.split([parameter.numel() for parameter in parameters])
    for parameter, part in zip(parameters, parts, strict=True):
        parameter.copy_(part.view(parameter.shape))
    if task.masks is not None:
        task.masks.apply_(model.network)


def check_sample_gradients(task: Task, name: str) -> None:
    """UserError where method `name` cannot have gradients of samples: of a sharded or an unfit network."""
    check_whole(task, name)
    try:
        SampleGradients(task.original, task, task.split.train[:2]).squares()
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"method '{name}' takes gradients image by image, which this network does not give: {reason}"
        ) from error


def check_whole(task: Task, name: str) -> None:
    """UserError where the task shares a model out, and method `name` needs it whole."""
    if task.runtime.shard:
        raise UserError(
            f"method '{name}' computes on whole models: leave `shard` out, or take others of `methods`"
        )


def _kept_weights(model: Classifier, task: Task) -> Tensor | None:
    """1 for a weight that is kept and 0 for a masked one, [P]; None where none is masked."""
    if task.masks is None:
        return None
    masks = {id(weight): task.masks[name] for name, weight in task.masks.find_weights(model.network).items()}
    return _flat(
        [masks[id(p)].to(p) if id(p) in masks else torch.ones_like(p) for p in trainable(model).values()]
    )


def _flat(tensors: Sequence[Tensor | None], like: Sequence[Tensor] = ()) -> Tensor:
    """All in one vector; zeros of the same place in `like` for None."""
    return torch.cat(
        [
            (torch.zeros_like(like[place]) if tensor is None else tensor.detach()).flatten()
            for place, tensor in enumerate(tensors)
        ]
    )

"""Does a caller's network fit its data: which Linear layer answers, and are its answers logits?"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import Parameter, signature
from typing import Any

import torch
from torch import Tensor, nn

from dau_fast.data.images import Images
from dau_fast.data.inputs import Layout
from dau_fast.engine.chance import seeded
from dau_fast.engine.modes import evaluating
from dau_fast.engine.runtime import Runtime
from dau_fast.errors import UserError
from dau_fast.job.assembly import place_network
from dau_fast.models import Classifier, find_logits, list_tensors

# How near a layer's answers must be to the network's, of their largest.
_NEAR = 1e-3


@dataclass(frozen=True)
class Head:
    """The layer that answers. answers_at_head: whether logits are to be taken there; see Classifier."""

    name: str
    answers_at_head: bool = False


def list_arguments(network: nn.Module) -> list[str] | None:
    """Names that the network's forward pass takes; None where it names none."""
    try:
        parameters = signature(network.forward).parameters.values()
    except (TypeError, ValueError):
        return None
    unnamed = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
    return [parameter.name for parameter in parameters if parameter.kind not in unnamed] or None


def find_head(network: nn.Module, images: Tensor, layout: Layout | None, named: str | None) -> Head:
    """The Linear layer of `network` whose output is its logits, or the one that the caller `named`.

    images: a few, [B, ...], on the network's device. A network that ends in a softmax is warned of, and its
    logits are taken before it; so are those of a named layer of several that answer. Raises UserError where
    the network cannot take the images, has no such layer, or does not answer by it.
    """
    linears = {name: m for name, m in network.named_modules() if isinstance(m, nn.Linear)}
    if named is not None and named not in linears:
        raise UserError(
            f"{type(network).__name__} has no Linear layer {named!r}: `classifier` is one of "
            f"{', '.join(linears) or 'none, as it has none'}"
        )
    if not linears:
        raise UserError(
            f"{type(network).__name__} has no Linear layer to read features from: it must end in one"
        )
    with _watching(linears) as seen:
        told = _call(network, images, layout)
    if named is not None and named not in seen:
        raise UserError(f"layer {named!r} takes no part in the forward pass: name the classifier layer")
    answers = _list_answers(told)
    if named is not None:
        return _check_named(named, seen[named], answers)
    return _choose(seen, answers)


def _call(network: nn.Module, images: Tensor, layout: Layout | None) -> Any:
    try:
        with torch.no_grad(), evaluating(network):
            return network(images) if layout is None else network(**layout(images))
    except Exception as error:  # whatever a stranger's network raises
        shown = f"images of shape {tuple(images.shape[1:])}" if layout is None else layout.describe()
        reason = " ".join(f"{error}".split("\n")[0].split()) or type(error).__name__
        raise UserError(f"the model cannot take {shown}: {reason}") from error


Seen = tuple[Tensor, Tensor]


@contextmanager
def _watching(linears: dict[str, nn.Linear]) -> Iterator[dict[str, Seen]]:
    """What each of `linears` was given and gave in its last call, by name, in the order of the calls."""
    seen: dict[str, Seen] = {}

    def watch(name: str) -> Any:
        def keep(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            seen.pop(name, None)
            seen[name] = inputs[0], output.clone()  # what follows may change it in place

        return keep

    hooks = [layer.register_forward_hook(watch(name)) for name, layer in linears.items()]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _list_answers(told: Any) -> list[Tensor]:
    """The logits that a network gave, and whatever else of two dimensions stands beside them."""
    first = find_logits(told)
    named = hasattr(told, "logits") or not isinstance(told, dict | list | tuple)
    others = [] if named else [part for part in list_tensors(told) if part.ndim == 2 and part is not first]
    return [first, *others]


def _check_named(name: str, seen: Seen, answers: list[Tensor]) -> Head:
    features, given = seen
    _check_shapes(features, given, answers[0])
    if _near(given, answers[0]):
        return Head(name)
    if any(_near(given, other) for other in answers[1:]):
        return Head(name, answers_at_head=True)
    if _is_softmax(given, answers[0]):
        _warn_of_softmax()
        return Head(name, answers_at_head=True)
    raise UserError(
        f"the model does not answer by its layer {name!r}: {name}(features) is not among what it returns; "
        "name the Linear layer whose output is the logits as `classifier`"
    )


def _choose(seen: dict[str, Seen], answers: list[Tensor]) -> Head:
    names = list(reversed(seen))
    answering = {
        i: name for i, answer in enumerate(answers) for name in names if _near(seen[name][1], answer)
    }
    if 0 in answering and len(answering) > 1:
        raise UserError(
            f"the model answers by several layers ({', '.join(answering.values())}): name one of them as "
            "`classifier`"
        )
    if 0 in answering:
        _check_shapes(*seen[answering[0]], answers[0])
        return Head(answering[0])
    for name in names:
        if _is_softmax(seen[name][1], answers[0]):
            _warn_of_softmax()
            return Head(name, answers_at_head=True)
    if names:
        _check_shapes(*seen[names[0]], answers[0])
    raise UserError(
        "no Linear layer gives what the model returns: expected one that ends it, so that layer(features) "
        f"are the logits; the layers it went through: {', '.join(seen) or 'none'}"
    )


def _check_shapes(features: Tensor, given: Tensor, logits: Tensor) -> None:
    if features.ndim != 2 or given.ndim != 2 or logits.ndim != 2:
        raise UserError(
            f"the model gives features {list(features.shape)} and logits {list(logits.shape)} for "
            f"{len(features)} images: expected [B, D] and [B, C]"
        )


def _near(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape:
        return False
    one, other = one.double(), other.double()
    finite = other[other.isfinite()].abs()
    largest = float(finite.max()) if len(finite) else 0.0
    return torch.allclose(one, other, rtol=0, atol=_NEAR * largest, equal_nan=True)


def _is_softmax(given: Tensor, answers: Tensor) -> bool:
    """Whether `answers` are probabilities of the logits `given`, or their logarithms."""
    if given.ndim != 2 or given.shape != answers.shape:
        return False
    return _near(given.softmax(1), answers) or _near(given.log_softmax(1), answers)


def _warn_of_softmax() -> None:
    logging.getLogger("dau_fast").warning(
        "the model ends in a softmax: its logits are taken before it, and what comes back still ends in it"
    )


def check_answers(features: Tensor, logits: Tensor, classes: int) -> None:
    """UserError unless these are of shapes [B, D] and [B, C], with a logit for each of the `classes`."""
    if features.ndim != 2 or logits.ndim != 2 or logits.shape[1] < classes:
        raise UserError(
            f"the model gives features {list(features.shape)} and logits {list(logits.shape)} for two "
            f"images: expected [2, D] and [2, C] with C of at least {classes}, for labels up to {classes - 1}"
        )


def own_network_builder(
    make: Callable[[], nn.Module], images: Images, runtime: Runtime
) -> Callable[[int], Classifier]:
    """seed -> a newly initialised network that `make` makes, for `images`.

    PyTorch's generators are untouched. Raises UserError where it does not fit the images.
    """
    head: list[Head] = []

    def build(seed: int) -> Classifier:
        with seeded(seed, runtime.device):
            network = place_network(make(), runtime)
        if not head:
            two = images.batch(torch.arange(2, device=images.device))
            head.append(find_head(network, two, None, None))
        precision = None if runtime.precision == torch.float64 else runtime.precision
        found = head[0]
        return Classifier(network, found.name, precision, answers_at_head=found.answers_at_head)

    return build

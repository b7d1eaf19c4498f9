"""Norms of every sample's own gradient, from one forward and one backward pass of the whole batch.

The backward pass stops at the layers' outputs, where hooks hand each layer's input and output gradient to
the formulas of _layer_gradients.py; the two hold all that a parameter's per-sample gradient is made of.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn import functional as F

from dau_fast.ops._layer_gradients import RULES, Rule, Sum, find_rule, square_sums, wide
from dau_fast.ops._whole_gradients import whole_squares

LossFunction = Callable[..., Tensor]


@overload
def per_sample_grad_norms(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    loss_fn: LossFunction = ...,
    per_layer: Literal[False] = ...,
    strict: bool = ...,
    create_graph: bool = ...,
) -> Tensor: ...


@overload
def per_sample_grad_norms(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    loss_fn: LossFunction = ...,
    *,
    per_layer: Literal[True],
    strict: bool = ...,
    create_graph: bool = ...,
) -> dict[str, Tensor]: ...


def per_sample_grad_norms(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    loss_fn: LossFunction = F.cross_entropy,
    per_layer: bool = False,
    strict: bool = True,
    create_graph: bool = False,
) -> Tensor | dict[str, Tensor]:
    """Norm of every sample's gradient with respect to all trainable parameters, [B].

    model: maps inputs [B, ...] to what loss_fn takes; samples must not see each other, so BatchNorm
    must be in evaluation mode. loss_fn(outputs, targets): takes reduction="none", as PyTorch's own
    do, or returns one loss a sample, [B]. per_layer: a dictionary instead, from the names of layers
    to norms [B]. create_graph: makes the result differentiable.
    Layers: Linear, Conv1d to 3d, Embedding, LayerNorm, GroupNorm, BatchNorm1d to 3d and SyncBatchNorm, and
    what `register_layer` was told of; also used more than once, and with shared parameters. Parameters of any
    other layer, as of attention or an LSTM, and of one whose output is not one a sample, as of windows, take
    a pass of the whole model under vmap, which is slower, or one of every sample where vmap cannot; a line
    says so once. Another axis that comes first and is as long as the batch is taken for it. With
    strict=False such layers are left out and a warning says so. Under autocast and in half precision, squares
    are summed in float32. Raises ValueError for a parameter that is used outside its layer, as in
    x @ embedding.weight.T, for outputs that the loss cannot take, and for layers without a rule where the
    model draws at random, as dropout in training does.
    The model is left as it was: no gradients, no hooks, the same mode.
    """
    layers, unknown = _layers(model)
    losses = functools.partial(sample_losses, loss_fn)
    squares = _Squares(layers, len(inputs))
    with squares.watching(), torch.enable_grad():
        loss = losses(model(inputs), targets).sum()
    unknown |= squares.rearranged
    if unknown and not strict:
        _tell_of_left_out(unknown)
    apart = _find_apart(model, loss, squares.uses, unknown)
    if loss.grad_fn is None or not (squares.edges or (strict and apart)):
        raise ValueError(
            "no layer with trainable parameters took part: check requires_grad, and give the model as it "
            "was before torch.compile"
        )
    squares.left_out = {id(parameter) for parameter in apart.values()}
    # Only the layers that come first need be asked for: the others lie on the way to them. Not so
    # where parameters of unknown layers, or the inputs, want gradients too.
    certain = not unknown and not inputs.requires_grad
    asked = [edge for edge, first in squares.edges if first or not certain]
    if asked:
        torch.autograd.grad(loss, asked, create_graph=create_graph, allow_unused=True)
    if strict and apart and len(inputs):
        _tell_of_apart(", ".join(sorted({type(layer).__name__ for layer in unknown.values()})))
        for name, total in whole_squares(model, apart, inputs, targets, losses, create_graph).items():
            squares.add(name.rpartition(".")[0], total)
    with torch.set_grad_enabled(create_graph):
        totals = squares.by_layer(loss.new_zeros(len(inputs), dtype=wide(loss)))
        if per_layer:
            return {name: _root(total) for name, total in totals.items()}
        return _root(torch.stack(list(totals.values())).sum(0))


def input_grad_norms(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    loss_fn: LossFunction = F.cross_entropy,
    create_graph: bool = False,
) -> Tensor:
    """Norm of every sample's loss gradient with respect to its own input, [B], float32 or float64.

    Arguments as in `per_sample_grad_norms`; inputs must be floating point.
    """
    _refuse_mixing(model)
    with torch.enable_grad():
        x = inputs.detach().requires_grad_()
        losses = sample_losses(loss_fn, model(x), targets)
        (grad,) = torch.autograd.grad(losses.sum(), [x], create_graph=create_graph)
    return torch.linalg.vector_norm(grad.flatten(1), dim=1, dtype=wide(grad))


def register_layer(
    layer: type[nn.Module],
    rule: Callable[..., Iterable[tuple[Tensor, Tensor]]] | None = None,
    *,
    like: type[nn.Module] | None = None,
) -> None:
    """Teach `per_sample_grad_norms` the layers of type `layer`, and subclasses that only look different.

    rule(layer, x, g): yields pairs of a parameter and its gradient for every sample, [B, *parameter.shape],
    from the layer's input x and the gradient g with respect to its output, both [B, ...]; of x[b] and g[b]
    alone for sample b, by differentiable operations. like: instead of a rule, a layer type that is known.
    Raises ValueError unless one of both is given, for a `layer` that is known already, for a `like` that
    is not, and, when the rule is used, for gradients of another shape.
    """
    name = layer.__name__
    if layer in RULES:
        raise ValueError(f"{name} has a per-sample gradient already: expected another type of layer")
    if rule is not None and like is None:
        RULES[layer] = _checked_rule(rule)
    elif like is not None and rule is None:
        if like not in RULES:
            raise ValueError(f"no per-sample gradient is known for {like.__name__}: {name} cannot be like it")
        RULES[layer] = RULES[like]
    else:
        raise ValueError(f"{name} needs a rule or a layer that it is like: expected one of the two")


def _checked_rule(rule: Callable[..., Iterable[tuple[Tensor, Tensor]]]) -> Rule:
    def run(layer: nn.Module, x: Tensor, g: Tensor) -> Iterator[Sum]:
        for parameter, gradients in rule(layer, x, g):
            if gradients.shape != (len(g), *parameter.shape):
                raise ValueError(
                    f"the rule of {type(layer).__name__} gives gradients of shape {list(gradients.shape)}: "
                    f"expected {[len(g), *parameter.shape]}, one of the parameter's shape a sample"
                )
            yield Sum(parameter, gradients)

    return run


def sample_losses(loss_fn: LossFunction, outputs: Any, targets: Tensor) -> Tensor:
    """One loss a sample, [B]; ValueError where loss_fn gives anything else."""
    if loss_fn is F.cross_entropy and not isinstance(outputs, Tensor):
        raise ValueError(
            f"the model returns a {type(outputs).__name__}: expected logits [B, C]; give as loss_fn a "
            "function of it and the targets, one loss a sample"
        )
    reduces = "reduction" in inspect.signature(loss_fn).parameters
    losses = loss_fn(outputs, targets, reduction="none") if reduces else loss_fn(outputs, targets)
    if losses.ndim == 0 or len(losses) != len(targets):
        raise ValueError(
            f"loss_fn gives shape {list(losses.shape)} for {len(targets)} samples: expected one loss "
            'a sample; give it a parameter reduction, or return what reduction="none" would'
        )
    return losses.flatten(1).sum(1) if losses.ndim > 1 else losses


# ---- recording


class _Squares:
    """Squared norms [B] by layer, added up while the backward pass goes through the layers' outputs.

    No output gradient outlives its layer. A parameter that is used more than once counts at the first
    layer, in the order of the backward pass, that uses it.
    """

    def __init__(self, layers: dict[str, nn.Module], batch: int) -> None:
        self.rearranged: dict[str, nn.Module] = {}  # layers whose inputs are not one a sample, as windows are
        self.edges: list[tuple[GradientEdge, bool]] = []  # and whether the layer is a first one
        self.left_out: set[int] = set()  # parameters, by their ids, that are not to be added up
        self._layers, self._batch = layers, batch
        self.uses: Counter[int] = Counter()  # of each parameter, by its id
        self._totals: dict[str, Tensor] = {}
        self._shared: dict[int, tuple[str, Tensor]] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Meanwhile the layers are watched as they are called."""
        handles = [
            layer.register_forward_hook(self._watch(name), with_kwargs=True)
            for name, layer in self._layers.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _watch(self, name: str) -> Callable[..., None]:
        """A forward hook for the layer `name`."""

        def seen(layer: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Tensor) -> None:
            if not output.requires_grad:
                return  # the model switched gradients off here
            x = inputs[0] if inputs else named["input"]
            if len(output) != self._batch:
                self.rearranged[name] = layer
                return
            self.uses.update(id(p) for p in layer.parameters(recurse=False) if p.requires_grad)
            # Edge and hook belong to the output as it is now: an activation may change it in place.
            self.edges.append((get_gradient_edge(output), not x.requires_grad))
            output.register_hook(lambda pull: self._add(name, layer, x, pull))

        return seen

    def _add(self, name: str, layer: nn.Module, x: Tensor, pull: Tensor) -> None:
        if len(pull) == 0:
            return
        if x.is_floating_point():
            x = x.to(pull.dtype)  # as autocast did for the layer
        with torch.autocast(pull.device.type, enabled=False):
            for unit in _get_rule(layer)(layer, x, pull):
                key = id(unit.parameter)
                if not unit.parameter.requires_grad or key in self.left_out:
                    continue
                if self.uses[key] == 1:
                    self.add(name, unit.squares())
                else:
                    first, total = self._shared.get(key, (name, 0))
                    self._shared[key] = first, total + unit.gradients()

    def add(self, name: str, squares: Tensor) -> None:
        """Add `squares` [B] to the layer `name`."""
        self._totals[name] = self._totals.get(name, 0) + squares

    def by_layer(self, nothing: Tensor) -> dict[str, Tensor]:
        """Layers in the model's order; nothing: zeros [B], for layers that do not touch the loss."""
        totals = {name: self._totals.get(name, nothing) for name in self._layers} | self._totals
        for name, gradients in self._shared.values():
            totals[name] = totals[name] + square_sums(gradients)
        return totals


def _layers(model: nn.Module) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
    """The layers with trainable parameters of their own, by name: the known and the unknown ones."""
    _refuse_mixing(model)
    known: dict[str, nn.Module] = {}
    unknown: dict[str, nn.Module] = {}
    for name, layer in model.named_modules():
        if any(parameter.requires_grad for parameter in layer.parameters(recurse=False)):
            (known if find_rule(layer) else unknown)[name] = layer
    return known, unknown


def _tell_of_left_out(layers: dict[str, nn.Module]) -> None:
    named = ", ".join(f"{name or 'the model itself'} ({type(m).__name__})" for name, m in layers.items())
    logging.getLogger("dau_fast").warning("per-sample gradient norms leave out %s", named)


def _refuse_mixing(model: nn.Module) -> None:
    for name, layer in model.named_modules():
        if not isinstance(layer, nn.modules.batchnorm._BatchNorm):
            continue
        if layer.training or layer.running_mean is None:
            raise ValueError(
                f"{name or 'the model'} normalises over the batch, so a sample has no gradient of its own: "
                "call model.eval(), and keep running statistics"
            )


def _get_rule(layer: nn.Module) -> Rule:
    rule = find_rule(layer)
    assert rule is not None
    return rule


@functools.cache
def _tell_of_apart(kinds: str) -> None:
    logging.getLogger("dau_fast").warning(
        "per-sample gradients of %s take a pass of the whole model, as no rule fits them", kinds
    )


def _find_apart(
    model: nn.Module, loss: Tensor, uses: Counter[int], unknown: dict[str, nn.Module]
) -> dict[str, nn.Parameter]:
    """The parameters of `unknown` layers, and those that these use of layers inside them without a call.

    ValueError where another parameter enters the loss in more places than its layers were called in.
    """
    found = _count_uses(loss)
    own = {id(p) for layer in unknown.values() for p in layer.parameters(recurse=False)}
    inside = {id(p) for layer in unknown.values() if layer is not model for p in layer.parameters()}
    apart = {}
    for name, parameter in model.named_parameters():
        key = id(parameter)
        outside = found[key] > uses[key]
        if parameter.requires_grad and (key in own or (outside and key in inside)):
            apart[name] = parameter
        elif outside:
            raise ValueError(
                f"{name} is used outside its layer, where its per-sample gradient cannot be seen: call the "
                "layer itself, or freeze the parameter"
            )
    return apart


def _count_uses(loss: Tensor) -> Counter[int]:
    """In how many places each parameter, by its id, enters the loss."""
    seen: set[Any] = set()
    found: Counter[int] = Counter()
    waiting = [loss.grad_fn] if loss.grad_fn is not None else []
    while waiting:
        for node, _ in waiting.pop().next_functions:
            leaf = getattr(node, "variable", None)
            if leaf is not None:
                found[id(leaf)] += 1
            elif node is not None and node not in seen:
                seen.add(node)
                waiting.append(node)
    return found


def _root(squares: Tensor) -> Tensor:
    """The square root, whose derivative at 0 is 0; rounding may leave a sum of products below it."""
    smallest = torch.finfo(squares.dtype).tiny
    return torch.where(squares <= 0, 0.0, squares.clamp_min(smallest).sqrt())

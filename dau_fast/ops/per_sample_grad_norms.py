"""Norms of every sample's own gradient, from one forward and one backward pass of the whole batch.

The backward pass stops at the layers' outputs: with a layer's input x_t and output gradient g_t at T
positions (1 in a Linear layer on [B, D], H W in a convolution), sample by sample

    dL/dW = sum_t g_t x_t^T,    ||dL/dW||^2 = sum_{t,t'} (x_t . x_t') (g_t . g_t')

direct form: the product itself, 2 T d p FLOPs; Gram form: the double sum, 2 T^2 (d + p) FLOPs and no
gradient at all (Goodfellow 2015, arXiv 1510.01799; Rochette et al. 2019, arXiv 1912.06015). Each layer
takes the cheaper one, a few samples at a time, so that neither form holds more than `_CHUNK` numbers.
"""

from __future__ import annotations

import inspect
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn import functional as F

from dau_fast.ops._library import define, kernels

# Numbers in a temporary array: 8 MB of float32.
_CHUNK = 2_000_000

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
    Layers: Linear, Conv1d to 3d, Embedding, LayerNorm, GroupNorm, BatchNorm1d to 3d; also used
    more than once, and with shared parameters. Under autocast and in half precision, squares are summed
    in float32. Raises ValueError for trainable parameters of any other layer, by name; with
    strict=False those are left out and a warning says so. Raises ValueError for a parameter that is
    used outside its layer, as in x @ embedding.weight.T.
    The model is left as it was: no gradients, no hooks, the same mode.
    """
    layers, unknown = _layers(model, strict)
    squares = _Squares(layers)
    handles = [
        layer.register_forward_hook(squares.watch(name), with_kwargs=True) for name, layer in layers.items()
    ]
    try:
        with torch.enable_grad():
            loss = sample_losses(loss_fn, model(inputs), targets).sum()
    finally:
        for handle in handles:
            handle.remove()
    if not squares.edges or loss.grad_fn is None:
        raise ValueError(
            "no layer with trainable parameters took part: check requires_grad, and give the model as it "
            "was before torch.compile"
        )
    _refuse_other_uses(model, loss, squares.uses, leave_out=unknown)
    # Only the layers that come first need be asked for: the others lie on the way to them. Not so
    # where parameters of unknown layers, or the inputs, want gradients too.
    certain = not unknown and not inputs.requires_grad
    asked = [edge for edge, first in squares.edges if first or not certain]
    torch.autograd.grad(loss, asked, create_graph=create_graph, allow_unused=True)
    with torch.set_grad_enabled(create_graph):
        totals = squares.by_layer(loss.new_zeros(len(inputs), dtype=_wide(loss)))
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
    """Norm of every sample's loss gradient with respect to its own input, [B].

    Arguments as in `per_sample_grad_norms`; inputs must be floating point.
    """
    _refuse_mixing(model)
    with torch.enable_grad():
        x = inputs.detach().requires_grad_()
        losses = sample_losses(loss_fn, model(x), targets)
        (grad,) = torch.autograd.grad(losses.sum(), [x], create_graph=create_graph)
    return torch.linalg.vector_norm(grad.flatten(1), dim=1)


def sample_losses(loss_fn: LossFunction, outputs: Any, targets: Tensor) -> Tensor:
    """One loss a sample, [B]; ValueError where loss_fn gives anything else."""
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

    def __init__(self, layers: dict[str, nn.Module]) -> None:
        self.edges: list[tuple[GradientEdge, bool]] = []  # and whether the layer is a first one
        self._layers = layers
        self.uses: Counter[int] = Counter()  # of each parameter, by its id
        self._totals: dict[str, Tensor] = {}
        self._shared: dict[int, tuple[str, Tensor]] = {}

    def watch(self, name: str) -> Callable[..., None]:
        """A forward hook for the layer `name`."""

        def seen(layer: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Tensor) -> None:
            if not output.requires_grad:
                return  # the model switched gradients off here
            x = inputs[0] if inputs else named["input"]
            self.uses.update(id(p) for p in layer.parameters(recurse=False) if p.requires_grad)
            # Edge and hook belong to the output as it is now: an activation may change it in place.
            self.edges.append((get_gradient_edge(output), not x.requires_grad))
            output.register_hook(lambda pull: self._add(name, layer, x, pull))

        return seen

    def _add(self, name: str, layer: nn.Module, x: Tensor, pull: Tensor) -> None:
        if x.is_floating_point():
            x = x.to(pull.dtype)  # as autocast did for the layer
        with torch.autocast(pull.device.type, enabled=False):
            for unit in _UNITS[type(layer)](layer, x, pull):
                key = id(unit.parameter)
                if not unit.parameter.requires_grad:
                    continue
                if self.uses[key] == 1:
                    self._totals[name] = self._totals.get(name, 0) + unit.squares()
                else:
                    first, total = self._shared.get(key, (name, 0))
                    self._shared[key] = first, total + unit.gradients()

    def by_layer(self, nothing: Tensor) -> dict[str, Tensor]:
        """Layers in the model's order; nothing: zeros [B], for layers that do not touch the loss."""
        totals = {name: self._totals.get(name, nothing) for name in self._layers}
        for name, gradients in self._shared.values():
            totals[name] = totals[name] + _square_sums(gradients)
        return totals


def _layers(model: nn.Module, strict: bool) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
    """The layers with trainable parameters of their own, by name: the known and the unknown ones."""
    _refuse_mixing(model)
    known: dict[str, nn.Module] = {}
    unknown: dict[str, nn.Module] = {}
    for name, layer in model.named_modules():
        if any(parameter.requires_grad for parameter in layer.parameters(recurse=False)):
            (known if type(layer) in _UNITS else unknown)[name] = layer
    if unknown:
        named = ", ".join(f"{name or 'the model itself'} ({type(m).__name__})" for name, m in unknown.items())
        if strict:
            raise ValueError(
                f"no per-sample gradient is known for {named}: freeze these parameters, or leave them "
                "out with strict=False"
            )
        logging.getLogger("dau_fast").warning("per-sample gradient norms leave out %s", named)
    return known, unknown


def _refuse_mixing(model: nn.Module) -> None:
    for name, layer in model.named_modules():
        if not isinstance(layer, nn.modules.batchnorm._BatchNorm):
            continue
        if layer.training or layer.running_mean is None:
            raise ValueError(
                f"{name or 'the model'} normalises over the batch, so a sample has no gradient of its own: "
                "call model.eval(), and keep running statistics"
            )


def _refuse_other_uses(
    model: nn.Module, loss: Tensor, uses: Counter[int], leave_out: dict[str, nn.Module]
) -> None:
    """ValueError where a parameter enters the loss in more places than its layers were called in."""
    seen: set[Any] = set()
    found: Counter[int] = Counter()
    waiting = [loss.grad_fn]
    while waiting:
        for node, _ in waiting.pop().next_functions:  # type: ignore[union-attr]
            leaf = getattr(node, "variable", None)
            if leaf is not None:
                found[id(leaf)] += 1
            elif node is not None and node not in seen:
                seen.add(node)
                waiting.append(node)
    known = {id(p) for layer in leave_out.values() for p in layer.parameters(recurse=False)}
    for name, parameter in model.named_parameters():
        if found[id(parameter)] > uses[id(parameter)] and id(parameter) not in known:
            raise ValueError(
                f"{name} is used outside its layer, where its per-sample gradient cannot be seen: call the "
                "layer itself, or freeze the parameter"
            )


# ---- norms


def _wide(x: Tensor) -> torch.dtype:
    """What sums over x are kept in: float32, or float64."""
    return torch.promote_types(x.dtype, torch.float32)


def _square_sums(x: Tensor, axes: int = 1) -> Tensor:
    """Sums of squares over all but the first `axes` axes."""
    return x.flatten(axes).to(_wide(x)).square().sum(axes)


def _root(squares: Tensor) -> Tensor:
    """The square root, whose derivative at 0 is 0; rounding may leave a sum of products below it."""
    smallest = torch.finfo(squares.dtype).tiny
    return torch.where(squares <= 0, 0.0, squares.clamp_min(smallest).sqrt())


@dataclass
class _Sum:
    """A gradient that is there at once: per-sample gradients [B, ...] of a bias or a scale."""

    parameter: Tensor
    value: Tensor

    def squares(self) -> Tensor:
        return _square_sums(self.value)

    def gradients(self) -> Tensor:
        return self.value.reshape(len(self.value), *self.parameter.shape)


@dataclass
class _Product:
    """A gradient sum_t g_t x_t^T. x: samples -> [b, G, d, T], for a slice of them; g: [B, G, p, T]."""

    parameter: Tensor
    x: Callable[[slice], Tensor]
    g: Tensor
    d: int

    def squares(self) -> Tensor:
        batch, groups, p, positions = self.g.shape
        if positions == 1:
            x = self.x(slice(None))
            return (_square_sums(x, 2) * _square_sums(self.g, 2)).sum(1)
        gram = positions * (self.d + p) < self.d * p
        # The kernels have no derivative and hold no T x T array.
        fused = gram and self.g.is_cuda and not torch.is_grad_enabled()
        product = 0 if fused else 2 * positions * positions if gram else self.d * p
        held = self.d * positions + product
        form = (_gram_op if fused else _gram_squares) if gram else _direct_squares
        step = max(1, _CHUNK // (groups * held))
        parts = [slice(start, start + step) for start in range(0, batch, step)]
        return torch.cat([form(self.x(part), self.g[part]) for part in parts])

    def gradients(self) -> Tensor:
        product = self.g @ self.x(slice(None)).mT
        return product.reshape(len(self.g), *self.parameter.shape)


def _direct_squares(x: Tensor, g: Tensor) -> Tensor:
    return _square_sums(g @ x.mT)


def _gram_squares(x: Tensor, g: Tensor) -> Tensor:
    product = (x.mT @ x) * (g.mT @ g)
    return product.flatten(1).sum(1, dtype=_wide(product))


def _gram_squares_cuda(x: Tensor, g: Tensor) -> Tensor:
    fused = kernels("_per_sample_grad_norms_cuda") if torch.float64 not in (x.dtype, g.dtype) else None
    return fused.gram_squares(x, g) if fused else _gram_squares(x, g)


def _gram_squares_fake(x: Tensor, g: Tensor) -> Tensor:
    return g.new_empty(len(g), dtype=_wide(g))


_gram_op = define(
    "gram_squares(Tensor x, Tensor g) -> Tensor", _gram_squares, _gram_squares_fake, cuda=_gram_squares_cuda
)


@dataclass
class _Lookup:
    """An Embedding's gradient: rows g_t [B, T, D] added up at indices [B, T], padding left out."""

    parameter: Tensor
    index: Tensor
    g: Tensor

    def squares(self) -> Tensor:
        batch, positions = self.index.shape
        step = max(1, _CHUNK // (2 * positions * positions))
        totals = []
        for start in range(0, batch, step):
            index, g = self.index[start : start + step], self.g[start : start + step]
            same = index.unsqueeze(1) == index.unsqueeze(2)
            totals.append(((g @ g.mT) * same).flatten(1).sum(1, dtype=_wide(g)))
        return torch.cat(totals)

    def gradients(self) -> Tensor:
        rows = self.g.new_zeros(len(self.g), *self.parameter.shape)
        index = self.index.unsqueeze(2).expand_as(self.g)
        return rows.scatter_add(1, index, self.g)


# ---- layers: what a layer's parameters get from input x [B, ...] and output gradient g


def _linear(layer: nn.Linear, x: Tensor, g: Tensor) -> Iterator[_Product | _Sum]:
    columns, pulls = (z.reshape(len(z), 1, -1, z.shape[-1]).mT for z in (x, g))
    yield _Product(layer.weight, lambda part: columns[part], pulls, layer.in_features)
    if layer.bias is not None:
        yield _Sum(layer.bias, pulls.sum(3))


def _convolution(layer: Any, x: Tensor, g: Tensor) -> Iterator[_Product | _Sum]:
    groups = layer.groups
    pulls = g.reshape(len(g), groups, layer.out_channels // groups, -1)
    d = layer.weight[0].numel()

    def patches(part: slice) -> Tensor:
        return _patches(layer, x[part]).reshape(-1, groups, d, pulls.shape[-1])

    yield _Product(layer.weight, patches, pulls, d)
    if layer.bias is not None:
        yield _Sum(layer.bias, pulls.sum(3))


def _patches(layer: Any, x: Tensor) -> Tensor:
    """What each output position of a convolution sees: [B, channels * kernel, positions]."""
    if layer.padding_mode != "zeros":
        x = F.pad(x, layer._reversed_padding_repeated_twice, mode=layer.padding_mode)
        padding = (0,) * len(layer.kernel_size)
    elif isinstance(layer.padding, str):
        x = F.pad(x, layer._reversed_padding_repeated_twice)
        padding = (0,) * len(layer.kernel_size)
    else:
        padding = layer.padding
    kernel, stride, dilation = layer.kernel_size, layer.stride, layer.dilation
    if max(kernel) == 1 and max(stride) == 1 and max(padding) == 0:
        return x.flatten(2)
    if len(kernel) == 1:
        x = x.unsqueeze(2)
        kernel, stride, dilation, padding = (1, *kernel), (1, *stride), (1, *dilation), (0, *padding)
    if len(kernel) == 2:
        return F.unfold(x, kernel, dilation, padding, stride)
    x = F.pad(x, [side for width in reversed(padding) for side in (width, width)])
    for axis, (size, step, gap) in enumerate(zip(kernel, stride, dilation, strict=True), start=2):
        reach = gap * (size - 1) + 1
        x = x.unfold(axis, reach, step)[..., ::gap]
    return x.movedim((-3, -2, -1), (2, 3, 4)).flatten(1, 4).flatten(2)


def _embedding(layer: nn.Embedding, x: Tensor, g: Tensor) -> Iterator[_Lookup]:
    if layer.scale_grad_by_freq or layer.max_norm is not None:
        raise ValueError("an Embedding with scale_grad_by_freq or max_norm has no per-sample gradient here")
    index, rows = x.reshape(len(x), -1), g.reshape(len(x), -1, layer.embedding_dim)
    if layer.padding_idx is not None:
        rows = rows * (index != layer.padding_idx).unsqueeze(2)
    yield _Lookup(layer.weight, index, rows)


def _layer_norm(layer: nn.LayerNorm, x: Tensor, g: Tensor) -> Iterator[_Sum]:
    shape = layer.normalized_shape
    unit = F.layer_norm(x, shape, eps=layer.eps)
    between = tuple(range(1, x.ndim - len(shape)))
    yield from _scale_and_shift(layer, g * unit, g, between)


def _group_norm(layer: nn.GroupNorm, x: Tensor, g: Tensor) -> Iterator[_Sum]:
    unit = F.group_norm(x, layer.num_groups, eps=layer.eps)
    yield from _scale_and_shift(layer, g * unit, g, tuple(range(2, x.ndim)))


def _batch_norm(layer: Any, x: Tensor, g: Tensor) -> Iterator[_Sum]:
    unit = F.batch_norm(x, layer.running_mean, layer.running_var, eps=layer.eps)
    yield from _scale_and_shift(layer, g * unit, g, tuple(range(2, x.ndim)))


def _scale_and_shift(layer: Any, scaled: Tensor, g: Tensor, over: tuple[int, ...]) -> Iterator[_Sum]:
    for parameter, value in ((layer.weight, scaled), (layer.bias, g)):
        if parameter is not None:
            yield _Sum(parameter, value.sum(over) if over else value)


_UNITS: dict[type, Callable[..., Iterator[Any]]] = {
    nn.Linear: _linear,
    nn.Conv1d: _convolution,
    nn.Conv2d: _convolution,
    nn.Conv3d: _convolution,
    nn.Embedding: _embedding,
    nn.LayerNorm: _layer_norm,
    nn.GroupNorm: _group_norm,
    nn.BatchNorm1d: _batch_norm,
    nn.BatchNorm2d: _batch_norm,
    nn.BatchNorm3d: _batch_norm,
}

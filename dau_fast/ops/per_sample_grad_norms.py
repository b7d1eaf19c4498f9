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
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn import functional as F

# Numbers in a temporary array: 32 MB of float32.
_CHUNK = 8_000_000

LossFunction = Callable[..., Tensor]


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
    more than once, and with shared parameters. Raises ValueError for trainable parameters of any other
    layer, by name; with strict=False those are left out and a warning says so.
    The model is left as it was: no gradients, no hooks, the same mode.
    """
    layers = _layers(model, strict)
    calls: list[_Call] = []
    handles = [
        layer.register_forward_hook(_recorder(name, calls), with_kwargs=True)
        for name, layer in layers.items()
    ]
    try:
        with torch.enable_grad():
            loss = sample_losses(loss_fn, model(inputs), targets).sum()
    finally:
        for handle in handles:
            handle.remove()
    if not calls:
        raise ValueError("no layer with trainable parameters took part: check requires_grad")
    pulls = torch.autograd.grad(
        loss, [call.edge for call in calls], create_graph=create_graph, materialize_grads=True
    )
    with torch.set_grad_enabled(create_graph):
        squares = _squares(model, calls, list(pulls), len(inputs))
        if per_layer:
            return {name: total.clamp_min(0).sqrt() for name, total in squares.items()}
        return torch.stack(list(squares.values())).sum(0).clamp_min(0).sqrt()


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


@dataclass
class _Call:
    """One use of a layer in the forward pass. edge: where the gradient of its output appears."""

    name: str
    layer: nn.Module
    x: Tensor
    edge: GradientEdge


def _recorder(name: str, calls: list[_Call]) -> Callable[..., None]:
    def record(layer: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Tensor) -> None:
        x = inputs[0] if inputs else named["input"]
        # The edge, and not the output, because an activation may change the output in place.
        calls.append(_Call(name, layer, x.detach() if not x.requires_grad else x, get_gradient_edge(output)))

    return record


def _layers(model: nn.Module, strict: bool) -> dict[str, nn.Module]:
    """The layers with trainable parameters of their own, by name."""
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
    return known


def _refuse_mixing(model: nn.Module) -> None:
    for name, layer in model.named_modules():
        if not isinstance(layer, nn.modules.batchnorm._BatchNorm):
            continue
        if layer.training or layer.running_mean is None:
            raise ValueError(
                f"{name or 'the model'} normalises over the batch, so a sample has no gradient of its own: "
                "call model.eval(), and keep running statistics"
            )


# ---- norms


def _squares(model: nn.Module, calls: list[_Call], pulls: list[Tensor], batch: int) -> dict[str, Tensor]:
    """Squared norms [B] by layer; a parameter that is used more than once counts at its first layer."""
    uses = Counter(id(p) for call in calls for p in call.layer.parameters(recurse=False) if p.requires_grad)
    squares: dict[str, Tensor] = {}
    shared: dict[int, tuple[str, Tensor]] = {}
    for i, call in enumerate(calls):
        pull, pulls[i] = pulls[i], torch.empty(0)
        for unit in _UNITS[type(call.layer)](call.layer, call.x, pull):
            if not unit.parameter.requires_grad:
                continue
            if uses[id(unit.parameter)] == 1:
                squares[call.name] = squares.get(call.name, 0) + unit.squares()
            else:
                first, total = shared.get(id(unit.parameter), (call.name, torch.zeros(())))
                shared[id(unit.parameter)] = first, total.to(pull.device) + unit.gradients()
    for name, total in shared.values():
        squares[name] = squares.get(name, 0) + total.flatten(1).square().sum(1)
    return squares


@dataclass
class _Sum:
    """A gradient that is there at once: per-sample gradients [B, ...] of a bias or a scale."""

    parameter: Tensor
    value: Tensor

    def squares(self) -> Tensor:
        return self.value.flatten(1).square().sum(1)

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
            return (x.square().sum((2, 3)) * self.g.square().sum((2, 3))).sum(1)
        gram = positions * (self.d + p) < self.d * p
        held = self.d * positions + (2 * positions * positions if gram else self.d * p)
        form = _gram_squares if gram else _direct_squares
        step = max(1, _CHUNK // (groups * held))
        parts = [slice(start, start + step) for start in range(0, batch, step)]
        return torch.cat([form(self.x(part), self.g[part]) for part in parts])

    def gradients(self) -> Tensor:
        product = self.g @ self.x(slice(None)).mT
        return product.reshape(len(self.g), *self.parameter.shape)


def _direct_squares(x: Tensor, g: Tensor) -> Tensor:
    return (g @ x.mT).flatten(1).square().sum(1)


def _gram_squares(x: Tensor, g: Tensor) -> Tensor:
    return ((x.mT @ x) * (g.mT @ g)).flatten(1).sum(1)


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
            totals.append(((g @ g.mT) * same).flatten(1).sum(1))
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

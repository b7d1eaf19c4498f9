"""Squared norms of per-sample gradients from a layer's input and output gradient, layer by layer.

With a layer's input x_t and output gradient g_t at T
positions (1 in a Linear layer on [B, D], H W in a convolution), sample by sample

    dL/dW = sum_t g_t x_t^T,    ||dL/dW||^2 = sum_{t,t'} (x_t . x_t') (g_t . g_t')

direct form: the product itself, 2 T d p FLOPs; Gram form: the double sum, 2 T^2 (d + p) FLOPs and no
gradient at all (Goodfellow 2015, arXiv 1510.01799; Rochette et al. 2019, arXiv 1912.06015). Each layer
takes the cheaper one, as many samples at a time as `most_numbers` of a temporary array allow.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dau_fast.ops._library import check_devices, define

# Numbers in a temporary array on a CPU, whose caches hold 8 MB of float32; on CUDA this part of its memory,
# as every chunk of samples launches all kernels again.
_CHUNK = 2_000_000
_MEMORY_SHARE = 1 / 32


@cache
def most_numbers(device: torch.device) -> int:
    """How many float32 numbers a temporary array may hold on `device`."""
    if device.type != "cuda":
        return _CHUNK
    return int(torch.cuda.get_device_properties(device).total_memory * _MEMORY_SHARE) // 4


def on_cuda(x: Tensor) -> bool:
    """Whether kernels are launched for `x`, each of which costs."""
    return x.is_cuda


def wide(x: Tensor) -> torch.dtype:
    """What sums over x are kept in: float32, or float64."""
    return torch.promote_types(x.dtype, torch.float32)


def square_sums(x: Tensor, axes: int = 1) -> Tensor:
    """Sums of squares over all but the first `axes` axes."""
    return x.flatten(axes).to(wide(x)).square().sum(axes)


@dataclass
class Sum:
    """A gradient that is there at once: per-sample gradients [B, ...] of a bias or a scale."""

    parameter: Tensor
    value: Tensor

    def squares(self) -> Tensor:
        return square_sums(self.value)

    def gradients(self) -> Tensor:
        return self.value.reshape(len(self.value), *self.parameter.shape)


@dataclass
class Product:
    """A gradient sum_t g_t x_t^T. x: samples -> [b, G, d, T], for a slice of them; g: [B, G, p, T]."""

    parameter: Tensor
    x: Callable[[slice], Tensor]
    g: Tensor
    d: int

    def squares(self) -> Tensor:
        batch, groups, p, positions = self.g.shape
        if positions == 1:
            x = self.x(slice(None))
            return (square_sums(x, 2) * square_sums(self.g, 2)).sum(1)
        form, product = _direct_squares, self.d * p
        if positions * (self.d + p) < self.d * p:
            # The op has no derivative, and its kernels hold no T x T array.
            form = _gram_squares if torch.is_grad_enabled() else gram_op
            fused = form is gram_op and on_cuda(self.g) and _takes_gram(self.g, self.g)
            product = 0 if fused else 2 * positions * positions
        step = max(1, most_numbers(self.g.device) // (groups * (self.d * positions + product)))
        parts = [slice(start, start + step) for start in range(0, batch, step)]
        return torch.cat([form(self.x(part), self.g[part]) for part in parts])

    def gradients(self) -> Tensor:
        product = self.g @ self.x(slice(None)).mT
        return product.reshape(len(self.g), *self.parameter.shape)


def _direct_squares(x: Tensor, g: Tensor) -> Tensor:
    return square_sums(g @ x.mT)


def _gram_squares(x: Tensor, g: Tensor) -> Tensor:
    product = (x.mT @ x) * (g.mT @ g)
    return product.flatten(1).sum(1, dtype=wide(product))


def _check_gram(x: Tensor, g: Tensor) -> None:
    fit = x.ndim == g.ndim == 4 and x.shape[:2] == g.shape[:2] and x.shape[3] == g.shape[3]
    if not fit:
        raise ValueError(
            f"x has shape {list(x.shape)}, g {list(g.shape)}: expected [B, G, d, T] and [B, G, p, T]"
        )
    check_devices(x=x, g=g)


def _takes_gram(x: Tensor, g: Tensor) -> bool:
    return torch.float64 not in (x.dtype, g.dtype)


def _gram_squares_fake(x: Tensor, g: Tensor) -> Tensor:
    return g.new_empty(len(g), dtype=wide(g))


gram_op = define(
    "gram_squares(Tensor x, Tensor g) -> Tensor",
    _gram_squares,
    _gram_squares_fake,
    check=_check_gram,
    triton=("_per_sample_grad_norms_cuda", "gram_squares"),
    takes=_takes_gram,
)


@dataclass
class Lookup:
    """An Embedding's gradient: rows g_t [B, T, D] added up at indices [B, T], padding left out."""

    parameter: Tensor
    index: Tensor
    g: Tensor

    def squares(self) -> Tensor:
        batch, positions = self.index.shape
        step = max(1, most_numbers(self.g.device) // (2 * positions * positions))
        totals = []
        for start in range(0, batch, step):
            index, g = self.index[start : start + step], self.g[start : start + step]
            same = index.unsqueeze(1) == index.unsqueeze(2)
            totals.append(((g @ g.mT) * same).flatten(1).sum(1, dtype=wide(g)))
        return torch.cat(totals)

    def gradients(self) -> Tensor:
        rows = self.g.new_zeros(len(self.g), *self.parameter.shape)
        index = self.index.unsqueeze(2).expand_as(self.g)
        return rows.scatter_add(1, index, self.g)


# ---- layers: what a layer's parameters get from input x [B, ...] and output gradient g


def _linear(layer: nn.Linear, x: Tensor, g: Tensor) -> Iterator[Product | Sum]:
    columns, pulls = (z.reshape(len(z), 1, -1, z.shape[-1]).mT for z in (x, g))
    yield Product(layer.weight, lambda part: columns[part], pulls, layer.in_features)
    if layer.bias is not None:
        yield Sum(layer.bias, pulls.sum(3))


def _convolution(layer: Any, x: Tensor, g: Tensor) -> Iterator[Product | Sum]:
    groups = layer.groups
    pulls = g.reshape(len(g), groups, layer.out_channels // groups, -1)
    d = layer.weight[0].numel()

    def patches(part: slice) -> Tensor:
        return _patches(layer, x[part]).reshape(-1, groups, d, pulls.shape[-1])

    yield Product(layer.weight, patches, pulls, d)
    if layer.bias is not None:
        yield Sum(layer.bias, pulls.sum(3))


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
    return strided_patches(x, kernel, dilation, padding, stride)


def strided_patches(
    x: Tensor,
    kernel: tuple[int, ...],
    dilation: tuple[int, ...],
    padding: tuple[int, ...],
    stride: tuple[int, ...],
) -> Tensor:
    """torch.nn.functional.unfold for any number of dimensions: one copy of a view with strides.

    The copy is faster than that function, which on the CPU looks at every number's place, and on CUDA
    launches a kernel for each sample.
    """
    axes = len(kernel)
    x = F.pad(x, [side for width in reversed(padding) for side in (width, width)])
    for axis, (size, step, gap) in enumerate(zip(kernel, stride, dilation, strict=True), start=2):
        reach = gap * (size - 1) + 1
        x = x.unfold(axis, reach, step)[..., ::gap]
    windows = x.movedim(tuple(range(-axes, 0)), tuple(range(2, 2 + axes)))
    return windows.reshape(len(x), x.shape[1] * math.prod(kernel), -1)


def _embedding(layer: nn.Embedding, x: Tensor, g: Tensor) -> Iterator[Lookup]:
    if layer.scale_grad_by_freq or layer.max_norm is not None:
        raise ValueError("an Embedding with scale_grad_by_freq or max_norm has no per-sample gradient here")
    index, rows = x.reshape(len(x), -1), g.reshape(len(x), -1, layer.embedding_dim)
    if layer.padding_idx is not None:
        rows = rows * (index != layer.padding_idx).unsqueeze(2)
    yield Lookup(layer.weight, index, rows)


def _layer_norm(layer: nn.LayerNorm, x: Tensor, g: Tensor) -> Iterator[Sum]:
    shape = layer.normalized_shape
    unit = F.layer_norm(x, shape, eps=layer.eps)
    between = tuple(range(1, x.ndim - len(shape)))
    yield from _scale_and_shift(layer, g * unit, g, between)


def _group_norm(layer: nn.GroupNorm, x: Tensor, g: Tensor) -> Iterator[Sum]:
    unit = F.group_norm(x, layer.num_groups, eps=layer.eps)
    yield from _scale_and_shift(layer, g * unit, g, tuple(range(2, x.ndim)))


def _batch_norm(layer: Any, x: Tensor, g: Tensor) -> Iterator[Sum]:
    unit = F.batch_norm(x, layer.running_mean, layer.running_var, eps=layer.eps)
    yield from _scale_and_shift(layer, g * unit, g, tuple(range(2, x.ndim)))


def _scale_and_shift(layer: Any, scaled: Tensor, g: Tensor, over: tuple[int, ...]) -> Iterator[Sum]:
    for parameter, value in ((layer.weight, scaled), (layer.bias, g)):
        if parameter is not None:
            yield Sum(parameter, value.sum(over) if over else value)


# A layer's rule, by its type.
Rule = Callable[..., Iterator[Sum | Product | Lookup]]
RULES: dict[type[nn.Module], Rule] = {
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
    nn.SyncBatchNorm: _batch_norm,
}


# What a subclass may say anew and still compute what its parent does.
_HARMLESS = {"__init__", "__repr__", "extra_repr", "reset_parameters"}


def find_rule(layer: nn.Module) -> Rule | None:
    """The rule of the layer's type, or of the one that it is a subclass of without computing otherwise."""
    for place, kind in enumerate(type(layer).__mro__):
        if kind in RULES:
            between = type(layer).__mro__[:place]
            said = {name for one in between for name, value in vars(one).items() if _computes(value)}
            return None if said - _HARMLESS or hasattr(layer, "parametrizations") else RULES[kind]
    return None


def _computes(value: Any) -> bool:
    return callable(value) or isinstance(value, property | staticmethod | classmethod)

"""BatchNorm over the rows of all processes.

On CUDA it is torch.nn.SyncBatchNorm, which refuses tensors on a CPU; there it is `GlobalBatchNorm`,
with the same statistics and gradients.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dau_fast.ops import register_layer


def synchronise_batchnorm(network: nn.Module) -> nn.Module:
    """`network` with its BatchNorm layers replaced, in place but for a network that is one itself.

    Names, parameters and buffers stay as they are, and so does what the layers do in evaluation mode.
    """
    if any(parameter.is_cuda for parameter in network.parameters()):
        return nn.SyncBatchNorm.convert_sync_batchnorm(network)
    if isinstance(network, _BatchNorm):
        return GlobalBatchNorm(network)
    for name, child in network.named_children():
        setattr(network, name, synchronise_batchnorm(child))
    return network


class GlobalBatchNorm(_BatchNorm):
    """A BatchNorm that in training mode normalises by the statistics of all ranks' rows.

    layer: the one whose parameters, buffers and settings it takes over. Ranks may hold different numbers
    of rows [b, C, ...], some of them none. As with DistributedDataParallel, gradients are those of the
    sum over ranks of their losses, parameters' those of this rank's rows.
    """

    def __init__(self, layer: _BatchNorm) -> None:
        super().__init__(
            layer.num_features, layer.eps, layer.momentum, layer.affine, layer.track_running_stats
        )
        self.weight, self.bias = layer.weight, layer.bias
        self.running_mean, self.running_var = layer.running_mean, layer.running_var
        self.num_batches_tracked = layer.num_batches_tracked
        self.training = layer.training

    def forward(self, x: Tensor) -> Tensor:
        """Normalised rows, of x's shape."""
        if not self.training:
            return super().forward(x)
        found: tuple[Tensor, Tensor, Tensor, Tensor] = _Normalise.apply(x, self.weight, self.bias, self.eps)
        normalised, mean, var, count = found
        if self.track_running_stats:
            self._track(mean, var, count)
        return normalised

    @torch.no_grad()
    def _track(self, mean: Tensor, var: Tensor, count: Tensor) -> None:
        assert self.num_batches_tracked is not None
        assert self.running_mean is not None
        assert self.running_var is not None
        self.num_batches_tracked += 1
        momentum = 1 / self.num_batches_tracked.item() if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean), momentum)
        unbiased = var * count / (count - 1).clamp_min(1)
        self.running_var.lerp_(unbiased.to(self.running_var), momentum)

    def _check_input_dim(self, input: Tensor) -> None:
        """Any number of dimensions from two on."""


class _Normalise(torch.autograd.Function):
    """(x, weight, bias, eps) -> (normalised, mean [C], biased variance [C], number of values)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, ...]:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        dims = [0, *range(2, x.ndim)]
        shape = [1, -1] + [1] * (x.ndim - 2)
        count = wide.new_full((1,), x.numel() // x.shape[1])
        total = torch.cat([wide.sum(dims), count])
        dist.all_reduce(total)
        mean, count = total[:-1] / total[-1], total[-1]
        # Means first and deviations from them second: a sum of squares would lose what they differ by.
        centred = wide - mean.view(shape)
        var = centred.square().sum(dims)
        dist.all_reduce(var)
        var /= count
        scale = (var + eps).rsqrt()
        normalised = centred.mul_(scale.view(shape))
        ctx.save_for_backward(normalised, weight, scale, count)
        ctx.dims, ctx.shape = dims, shape
        ctx.mark_non_differentiable(mean, var, count)
        out = normalised.clone() if weight is None else torch.mul(normalised, weight.view(shape))
        if bias is not None:
            out += bias.view(shape)
        return out.to(x.dtype), mean, var, count

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        normalised, weight, scale, count = ctx.saved_tensors
        wide = grad.to(normalised.dtype)
        of_bias, of_weight = wide.sum(ctx.dims), (wide * normalised).sum(ctx.dims)
        sums = torch.stack([of_bias, of_weight])
        dist.all_reduce(sums)
        shifts, slopes = (part.view(ctx.shape) for part in sums / count)
        factor = scale if weight is None else scale * weight
        of_x = (wide - shifts - normalised * slopes) * factor.view(ctx.shape)
        wanted = ctx.needs_input_grad
        return (
            of_x.to(grad.dtype),
            of_weight.to(weight.dtype) if wanted[1] else None,
            of_bias.to(weight.dtype) if wanted[2] else None,
            None,
        )


# In evaluation mode, where alone a sample has a gradient of its own, it is like any other.
register_layer(GlobalBatchNorm, like=nn.BatchNorm2d)

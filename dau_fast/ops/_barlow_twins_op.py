"""The Barlow Twins ops: both forms of the loss, forward and backward, and what else both halves share.

The mathematics stands in barlow_twins.py, which is the op's public half.
"""

from __future__ import annotations

from functools import partial
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor

from dau_fast.ops._library import check_devices, compute_dtype, define, differentiable_once
from dau_fast.ops._native import array

PRECISIONS = ("ieee", "tf32x3", "tf32")

# Gram runs where N is below this many times D: by FLOPs 0.75, measured on 2 CPU cores at D = 1024 0.72.
_GRAM_BELOW = 0.75


def prefers_gram(n: int, d: int) -> bool:
    """Whether the Gram form is the cheaper one for views [N, D]."""
    return n < _GRAM_BELOW * d


def gradients(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """With respect to both views, None where not wanted, from what a forward pass left in `ctx`."""
    wanted = ctx.needs_input_grad[:2]
    grads = _backward_once(grad_loss, *ctx.saved_tensors, *ctx.settings, *wanted)
    return grads[0] if wanted[0] else None, grads[1] if wanted[1] else None


# ---- the ops: plain PyTorch
# stats [5, D]: mean_a, mean_b, scale_a, scale_b, c; in the primal form also the sums of squares of C
# off its diagonal by row and by column, [7, D].
# products: C with a zero diagonal [1, D, D], or A A^T and B B^T [2, N, N].


class Product(Protocol):
    """Matrix products in one precision."""

    def __call__(self, x: Tensor, y: Tensor, base: Tensor | None = None, alpha: float = 1) -> Tensor:
        """X Y, or `base` + alpha X Y, to which `base` is changed."""


def _product(x: Tensor, y: Tensor, base: Tensor | None = None, alpha: float = 1) -> Tensor:
    """As PyTorch is set to multiply."""
    return x @ y if base is None else base.addmm_(x, y, alpha=alpha)


def forward_by(
    product: Product, z_a: Tensor, z_b: Tensor, lambd: float, eps: float, gram: bool, precision: str
) -> tuple[Tensor, Tensor, Tensor]:
    """The forward op in plain PyTorch, whatever `precision`: `product` has one."""
    # Both views in one array: half as many calls, which is what small views cost.
    views = torch.stack([z_a, z_b]).to(compute_dtype(z_a, z_b))
    mean = views.mean(1)
    views.sub_(mean.unsqueeze(1))
    scale = views.square().sum(1).add_(len(z_a) * eps).rsqrt_()
    a, b = views.mul_(scale.unsqueeze(1))
    if not gram:
        return primal_loss(product(a.T, b), mean, scale, lambd)
    products = torch.stack([product(a, a.T), product(b, b.T)])
    c = torch.linalg.vecdot(a, b, dim=0)
    return gram_loss(products, c, lambd), torch.cat([mean, scale, c.unsqueeze(0)]), products


def gram_loss(products: Tensor, c: Tensor, lambd: float) -> Tensor:
    """The loss from A A^T and B B^T, [2, N, N], and the diagonal of C."""
    off_diagonal = torch.dot(products[0].view(-1), products[1].view(-1)) - torch.dot(c, c)
    missing = 1 - c
    return torch.dot(missing, missing) + lambd * off_diagonal


def primal_loss(
    correlation: Tensor, mean: Tensor, scale: Tensor, lambd: float
) -> tuple[Tensor, Tensor, Tensor]:
    """What the op returns, from C [D, D], which is changed, and means and scales [2, D]."""
    c = correlation.diagonal().clone()
    squares = correlation.fill_diagonal_(0).square()
    rows, columns = squares.sum(1), squares.sum(0)
    missing = 1 - c
    loss = torch.dot(missing, missing) + lambd * rows.sum()
    return loss, torch.cat([mean, scale, torch.stack([c, rows, columns])]), correlation.unsqueeze(0)


def backward_by(
    product: Product,
    grad_loss: Tensor,
    z_a: Tensor,
    z_b: Tensor,
    stats: Tensor,
    products: Tensor,
    lambd: float,
    gram: bool,
    precision: str,
    need_a: bool,
    need_b: bool,
) -> tuple[Tensor, Tensor]:
    """The backward op in plain PyTorch, as `forward_by` is the forward one."""
    mean, scale, c = stats[:2].unsqueeze(1), stats[2:4].unsqueeze(1), stats[4]
    views = torch.stack([z_a, z_b]).to(stats.dtype).sub_(mean).mul_(scale).unbind()
    # The diagonal of G; the Gram form's squares still hold C's diagonal.
    g = torch.sub(c, 1).mul_(2)
    if gram:
        g.sub_(c, alpha=2 * lambd)

    def gradient(side: int) -> Tensor:
        own, other = views[side], views[1 - side]
        if gram:
            pulled = product(products[1 - side], own)
            squares = torch.linalg.vecdot(own, pulled, dim=0)
            grad = pulled.mul_(2 * lambd).addcmul_(other, g)
        else:
            squares = stats[5 + side]
            grad = product(other, products[0] if side else products[0].T, other * g, 2 * lambd)
        s = torch.add(g * c, squares, alpha=2 * lambd)
        return grad.addcmul_(own, s, value=-1).mul_(stats[2 + side] * grad_loss)

    return (
        gradient(0).to(z_a.dtype) if need_a else z_a.new_empty(0),
        gradient(1).to(z_b.dtype) if need_b else z_b.new_empty(0),
    )


# ---- what the ops refuse


def check_views(z_a: Tensor, z_b: Tensor, precision: str) -> None:
    """ValueError for views and a precision of which there is no loss."""
    if z_a.shape != z_b.shape or z_a.ndim != 2:
        raise ValueError(
            f"z_a has shape {list(z_a.shape)}, z_b {list(z_b.shape)}: expected one shape [N, D]; "
            "pair the rows of both"
        )
    if precision not in PRECISIONS:
        raise ValueError(f"precision {precision!r} is unknown: expected one of {', '.join(PRECISIONS)}")
    if not (z_a.is_floating_point() and z_b.is_floating_point()):
        raise ValueError(f"z_a is {z_a.dtype}, z_b {z_b.dtype}: expected floating point; convert them")
    check_devices(z_a=z_a, z_b=z_b)


def _check_forward(z_a: Tensor, z_b: Tensor, lambd: float, eps: float, gram: bool, precision: str) -> None:
    check_views(z_a, z_b, precision)


def _check_backward(
    grad_loss: Tensor,
    z_a: Tensor,
    z_b: Tensor,
    stats: Tensor,
    products: Tensor,
    lambd: float,
    gram: bool,
    precision: str,
    need_a: bool,
    need_b: bool,
) -> None:
    check_views(z_a, z_b, precision)
    check_devices(z_a=z_a, grad_loss=grad_loss, stats=stats, products=products)
    n, d = z_a.shape
    of_stats, of_products = ((5, d), (2, n, n)) if gram else ((7, d), (1, d, d))
    dtype = compute_dtype(z_a, z_b)
    fit = stats.shape == of_stats and products.shape == of_products and grad_loss.numel() == 1
    if not fit or stats.dtype != dtype or products.dtype != dtype:
        raise ValueError(
            f"stats have shape {list(stats.shape)}, products {list(products.shape)}, grad_loss "
            f"{list(grad_loss.shape)}: expected {list(of_stats)}, {list(of_products)} and one element, as "
            "from the forward op"
        )


# ---- C++ between the products, in float32


def _forward_cpp(
    extension: ModuleType,
    z_a: Tensor,
    z_b: Tensor,
    lambd: float,
    eps: float,
    gram: bool,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor]:
    sizes, views = _described(z_a, z_b)
    n, d = z_a.shape
    normalised, stats = views[0].new_empty((2, n, d)), views[0].new_empty((5 if gram else 7, d))
    extension.normalise_views(
        mean=array(stats[:2]),
        scale=array(stats[2:4]),
        views=array(normalised),
        c=array(stats[4] if gram else None),
        eps=eps,
        **sizes,
    )
    if gram:
        products, c = normalised @ normalised.mT, stats[4]
        return gram_loss(products, c, lambd), stats, products
    products = (normalised[0].T @ normalised[1]).unsqueeze(0)
    loss = extension.primal_loss(
        correlation=array(products),
        c=array(stats[4]),
        rows=array(stats[5]),
        columns=array(stats[6]),
        d=d,
        lambd=lambd,
        threads=sizes["threads"],
    )
    return stats.new_tensor(loss), stats, products


def _backward_cpp(
    extension: ModuleType,
    grad_loss: Tensor,
    z_a: Tensor,
    z_b: Tensor,
    stats: Tensor,
    products: Tensor,
    lambd: float,
    gram: bool,
    precision: str,
    need_a: bool,
    need_b: bool,
) -> tuple[Tensor, Tensor]:
    sizes, _views = _described(z_a, z_b)
    stats, normalised = stats.contiguous(), stats.new_empty((2, *z_a.shape))
    mean, scale, c = stats[:2], stats[2:4], stats[4]
    extension.standardise_views(mean=array(mean), scale=array(scale), views=array(normalised), **sizes)

    def gradient(side: int) -> Tensor:
        own, other = normalised[side], normalised[1 - side]
        correlation = products[0] if side else products[0].T
        pulled = products[1 - side] @ own if gram else other @ correlation
        extension.finish_gradient(
            pulled=array(pulled), own=array(own), other=array(other), c=array(c), scale=array(scale[side]),
            squares=array(None if gram else stats[5 + side]), n=sizes["n"], d=sizes["d"], lambd=lambd,
            grad_loss=float(grad_loss), threads=sizes["threads"],
        )  # fmt: skip
        return pulled

    return (
        gradient(0).to(z_a.dtype) if need_a else z_a.new_empty(0),
        gradient(1).to(z_b.dtype) if need_b else z_b.new_empty(0),
    )


def _described(z_a: Tensor, z_b: Tensor) -> tuple[dict[str, Any], tuple[Tensor, Tensor]]:
    """What C++ is told of two views, and the tensors whose memory that is."""
    a, b = z_a.float().contiguous(), z_b.float().contiguous()
    n, d = a.shape
    told = {"a": array(a), "b": array(b), "n": n, "d": d, "threads": torch.get_num_threads()}
    return told, (a, b)


# ---- registration


def _takes_forward(z_a: Tensor, z_b: Tensor, *_: Any) -> bool:
    return compute_dtype(z_a, z_b) == torch.float32


def _takes_backward(grad_loss: Tensor, z_a: Tensor, z_b: Tensor, *_: Any) -> bool:
    return compute_dtype(z_a, z_b) == torch.float32


def _forward_fake(
    z_a: Tensor, z_b: Tensor, lambd: float, eps: float, gram: bool, precision: str
) -> tuple[Tensor, Tensor, Tensor]:
    n, d = z_a.shape
    loss = z_a.new_empty((), dtype=compute_dtype(z_a, z_b))
    products = loss.new_empty((2, n, n) if gram else (1, d, d))
    return loss, loss.new_empty((5 if gram else 7, d)), products


def _backward_fake(grad_loss: Tensor, z_a: Tensor, z_b: Tensor, *saved: Any) -> tuple[Tensor, Tensor]:
    need_a, need_b = saved[-2:]
    return (
        z_a.new_empty(z_a.shape if need_a else (0,)),
        z_b.new_empty(z_b.shape if need_b else (0,)),
    )


forward_op = define(
    "barlow_twins_forward(Tensor z_a, Tensor z_b, float lambd, float eps, bool gram, str precision)"
    " -> (Tensor, Tensor, Tensor)",
    partial(forward_by, _product),
    _forward_fake,
    check=_check_forward,
    cpp=_forward_cpp,
    triton=("_barlow_twins_cuda", "forward"),
    takes=_takes_forward,
)
backward_op = define(
    "barlow_twins_backward(Tensor grad_loss, Tensor z_a, Tensor z_b, Tensor stats, Tensor products,"
    " float lambd, bool gram, str precision, bool need_a, bool need_b) -> (Tensor, Tensor)",
    partial(backward_by, _product),
    _backward_fake,
    check=_check_backward,
    cpp=_backward_cpp,
    triton=("_barlow_twins_cuda", "backward"),
    takes=_takes_backward,
)
_backward_once = differentiable_once(
    backward_op,
    "barlow_twins_loss is differentiable once: for a second derivative use "
    "dau_fast.ops.reference.barlow_twins_reference",
)

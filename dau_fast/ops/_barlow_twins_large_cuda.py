"""The Barlow Twins ops on CUDA for large views: by matrix products of the vendor's library.

Normalised views and what products in three of TF32 need are copies: the kernels of _barlow_twins_cuda.py,
which make none, are for views of which products are not all the time.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor, bfloat16, float16

from dau_fast.ops._barlow_twins_op import Product
from dau_fast.ops._split_products import multiplied_in, split_product

# FLOPs of the whole loss from which products are the time: at fewer, the other kernels' few launches are it.
LARGE = 6e9


def is_large(n: int, d: int, gram: bool) -> bool:
    """Whether the products of views [N, D] are worth making copies for."""
    return (8 * n * n * d if gram else 6 * n * d * d) >= LARGE


def choose_product(precision: str, *views: Tensor) -> Product:
    """What the plain ops multiply by; TF32 is finer than the rounding of float16 and bfloat16 views."""
    if precision == "tf32x3" and any(z.dtype not in (float16, bfloat16) for z in views):
        return split_product
    return partial(_product, "ieee" if precision == "ieee" else "tf32")


def _product(precision: str, x: Tensor, y: Tensor, base: Tensor | None = None, alpha: float = 1) -> Tensor:
    with multiplied_in(precision):
        return x @ y if base is None else base.addmm_(x, y, alpha=alpha)

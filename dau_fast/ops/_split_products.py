"""Products of float32 matrices on CUDA by three of TF32, which tensor cores take.

A float32 number is split into what TF32 holds of it, 11 significant bits, and the rest. Of the four products
of such parts the smallest is left out (Markidis et al. 2018, arXiv 1803.04014). Tensor cores cut off where
they add up, so that some more is lost than in float32: 3e-6 of the whole in sums of 1,100 random products.
Parts are copies: of small factors they cost more than tensor cores save.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

# The bits of a float32 number that TF32 has: all but the last 13.
_KEPT = -(1 << 13)
# Held by the thread that has changed the precision of products; by one may be changed again.
_SETTING = threading.RLock()


@contextmanager
def multiplied_in(precision: str) -> Iterator[None]:
    """Products of float32 on CUDA inside are taken in "ieee" or "tf32", whatever the process is set to.

    The setting is the whole process's: other threads wait here, so that it is put back to what it was.
    """
    settings = torch.backends.cuda.matmul
    with _SETTING:
        before, settings.fp32_precision = settings.fp32_precision, precision
        try:
            yield
        finally:
            settings.fp32_precision = before


def split(x: Tensor) -> tuple[Tensor, Tensor]:
    """Parts of float32 numbers `x` with 11 and 13 significant bits at most, whose sum they are."""
    high = x.view(torch.int32).bitwise_and(_KEPT).view(torch.float32)
    return high, x - high


def split_product(x: Tensor, y: Tensor, base: Tensor | None = None, alpha: float = 1) -> Tensor:
    """X Y, or `base` + alpha X Y, to which `base` is changed."""
    (x_high, x_low), (y_high, y_low) = split(x), split(y)
    with multiplied_in("tf32"):
        # The smallest first.
        found = (x_high @ y_low).addmm_(x_low, y_high).addmm_(x_high, y_high)
    return found if base is None else base.add_(found, alpha=alpha)

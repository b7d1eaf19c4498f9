"""The Barlow Twins loss, forward and backward, against the definition and its other implementations.

    pytest benchmarks/test_barlow_speed.py                 on the CPU
    pytest benchmarks/test_barlow_speed.py --device cuda

Every row stands for a loss of two float32 views [N, D] and its gradients. Floor: FLOPs of the cheaper form
(6 N D^2 or 8 N^2 D) over what a matrix product reaches in the same run, plus bytes (both views read twice,
both gradients written) over what a copy reaches. `extra_info` holds FLOPs, bytes, the percentage of the
floor, the memory held beyond the inputs, and the gradient's error against float64. Compiled rows are compiled
before the clock starts; how long that took stands in extra_info too.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from support.measuring import captured, record_row, relative_error
from torch import Tensor, nn

from dau_fast.ops import barlow_twins_loss
from dau_fast.ops.reference import barlow_twins_reference

Loss = Callable[[Tensor, Tensor], Tensor]
LAMBD = 5e-3

# (N, D); the last ones on CUDA alone.
SHAPES = [(512, 128), (256, 512), (1024, 1024), (256, 2048), (256, 8192)]
CUDA_SHAPES = [*SHAPES, (4096, 2048), (4096, 8192)]
SMOKE_SHAPES = [(8, 6)]


def lightly() -> Loss:
    """The package itself, where it is installed."""
    try:
        module = importlib.import_module("lightly.loss.barlow_twins_loss")
    except ImportError:
        pytest.skip("lightly is not installed: pip install 'dau-fast[bench]'")
    loss: Loss = module.BarlowTwinsLoss(LAMBD)
    return loss


def solo_learn() -> Loss:
    """Its formula: squared difference from the identity, off-diagonal entries weighted in place."""

    def loss(z_a: Tensor, z_b: Tensor) -> Tensor:
        n, d = z_a.shape
        normalise = nn.BatchNorm1d(d, affine=False).to(z_a.device)
        correlation = torch.einsum("ni,nj->ij", normalise(z_a), normalise(z_b)) / n
        identity = torch.eye(d, device=z_a.device)
        difference = (correlation - identity).square()
        difference[~identity.bool()] *= LAMBD
        return difference.sum()

    return loss


def facebook() -> Loss:
    """Its formula: diagonal and off-diagonal entries of C taken apart."""

    def loss(z_a: Tensor, z_b: Tensor) -> Tensor:
        n, d = z_a.shape
        normalise = nn.BatchNorm1d(d, affine=False).to(z_a.device)
        correlation = (normalise(z_a).T @ normalise(z_b)).div_(n)
        on_diagonal = (correlation.diagonal() - 1).square().sum()
        rest = correlation.flatten()[:-1].view(d - 1, d + 1)[:, 1:]
        return on_diagonal + LAMBD * rest.square().sum()

    return loss


def definition() -> Loss:
    return lambda z_a, z_b: barlow_twins_reference(z_a, z_b, LAMBD, 1e-5)


def dau_fast() -> Loss:
    return lambda z_a, z_b: barlow_twins_loss(z_a, z_b, LAMBD)


EAGER = {f.__name__: f for f in (dau_fast, definition, lightly, solo_learn, facebook)}
# On CUDA also as replays of a captured graph, which leave out the launches.
CAPTURED = [f"{name} captured" for name in ("dau_fast", "definition")]
IMPLEMENTATIONS = [*EAGER, *CAPTURED, *(f"{name} compiled" for name in EAGER if name != "dau_fast")]


def implementation(name: str, smoke: bool) -> Loss:
    loss = EAGER[name.removesuffix(" compiled").removesuffix(" captured")]()
    if not name.endswith("compiled"):
        return loss
    torch.compiler.reset()
    return torch.compile(loss, backend="eager" if smoke else "inductor")


@cache
def views(n: int, d: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(n, d, generator=generator)
    return a, 0.5 * a + torch.randn(n, d, generator=generator)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    config = metafunc.config
    on_cuda = config.getoption("--device") == "cuda"
    shapes = SMOKE_SHAPES if config.getoption("--smoke") else CUDA_SHAPES if on_cuda else SHAPES
    metafunc.parametrize(("n", "d"), shapes, ids=[f"{n}x{d}" for n, d in shapes])


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_forward_and_backward(
    benchmark: Any, device: torch.device, smoke: bool, name: str, n: int, d: int
) -> None:
    if name in CAPTURED and device.type != "cuda":
        pytest.skip("captured graphs need CUDA")
    a, b = (z.to(device).clone().requires_grad_() for z in views(n, d))
    loss = implementation(name, smoke)

    def work() -> None:
        a.grad = b.grad = None
        loss(a, b).backward()

    record_row(
        benchmark,
        captured(work) if name in CAPTURED else work,
        device,
        case=f"{n}x{d}",
        implementation=name,
        flops=min(6 * n * d * d, 8 * n * n * d),
        moved=4 * 2 * (2 * n * d + n * d),
        size=min(2048, max(n, d)),
        smoke=smoke,
    )
    benchmark.extra_info.update(n=n, d=d, gradient_error=_gradient_error(a, b))


def _gradient_error(a: Tensor, b: Tensor) -> float:
    """The worse one of both views' gradients, against the definition in float64."""
    exact = [z.detach().double().requires_grad_() for z in (a, b)]
    barlow_twins_reference(*exact, LAMBD, 1e-5).backward()
    return max(relative_error(z.grad, e.grad) for z, e in zip((a, b), exact, strict=True))

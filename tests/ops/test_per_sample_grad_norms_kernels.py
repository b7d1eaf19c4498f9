"""The Gram kernel without a GPU: its numbers in Triton's interpreter, its builds by ptxas."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from kernels import CAPABILITIES, Launches, build
from torch import Tensor

from dau_fast.ops._layer_gradients import gram_op

# (B, G, d, p, T)
SHAPES = [(1, 1, 1, 1, 1), (2, 1, 17, 5, 3), (3, 2, 33, 40, 64), (2, 3, 8, 70, 65), (1, 1, 20, 9, 150)]


def sample(b: int, groups: int, d: int, p: int, t: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(b + 10 * d + 1000 * t)
    return tuple(torch.randn(b, groups, width, t, generator=generator) for width in (d, p))


def defined(x: Tensor, g: Tensor) -> Tensor:
    """The squared norms of the per-sample gradients themselves, in float64."""
    return (g.double() @ x.double().mT).flatten(1).square().sum(1)


@pytest.fixture
def launchers() -> ModuleType:
    """The launchers, which take CPU tensors in the interpreter."""
    return importlib.import_module("dau_fast.ops._per_sample_grad_norms_cuda")


@pytest.fixture(autouse=True)
def _poisoned(poisoned_memory: None) -> None:
    """Memory that a kernel forgets to write shows as NaN."""


@pytest.mark.interpreter
@pytest.mark.parametrize("shape", SHAPES)
def test_numbers_are_those_of_the_gradients(launchers: ModuleType, shape: tuple[int, ...]) -> None:
    x, g = sample(*shape)
    torch.testing.assert_close(launchers.gram_squares(x, g).double(), defined(x, g), rtol=2e-5, atol=0)


@pytest.mark.interpreter
def test_strides_and_half_precision(launchers: ModuleType) -> None:
    x, g = sample(3, 2, 33, 40, 64)
    strided = x.mT.contiguous().mT, torch.stack([g, g], 4)[..., 0]
    torch.testing.assert_close(launchers.gram_squares(*strided), launchers.gram_squares(x, g))
    half = x.bfloat16(), g.bfloat16()
    torch.testing.assert_close(launchers.gram_squares(*half).double(), defined(*half), rtol=2e-5, atol=0)


@pytest.mark.interpreter
def test_no_samples(launchers: ModuleType) -> None:
    x, g = sample(0, 1, 3, 4, 5)
    assert launchers.gram_squares(x, g).shape == (0,)


def test_opcheck() -> None:
    torch.library.opcheck(gram_op, sample(3, 2, 5, 4, 7))


@pytest.mark.parametrize("shape", SHAPES)
def test_on_the_device(device: torch.device, shape: tuple[int, ...]) -> None:
    x, g = (z.to(device) for z in sample(*shape))
    torch.testing.assert_close(gram_op(x, g).double(), defined(x, g), rtol=1e-4, atol=0)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize(("view", "precision"), [("fp32", "tf32x3"), ("bf16", "tf32")])
def test_the_kernel_builds_without_spilling(
    capability: int, view: str, precision: str, tmp_path: Path
) -> None:
    pytest.importorskip("triton")
    from dau_fast.ops import _per_sample_grad_norms_cuda as cuda

    given: dict[str, Any] = {"PRECISION": precision, "TILE": cuda.TILE, "DEPTH": cuda.DEPTH}
    for name in ("x_ptr", "g_ptr"):
        given[name] = f"*{view}:16"
    given["parts_ptr"] = "*fp32:16"
    for name in ("T", "d", "p", "groups", "tiles", "halves"):
        given[name] = "i32"
    for side in ("xb", "xg", "xd", "gb", "gg", "gp"):
        given[f"stride_{side}"] = "i32"
    given |= {"stride_xt": 1, "stride_gt": 1}
    found = build(cuda.gram_kernel, given, capability, tmp_path, num_warps=cuda.WARPS)
    assert found.spilled == 0, found
    assert found.registers <= 255


def test_no_number_of_samples_is_too_many_for_a_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from dau_fast.ops import _per_sample_grad_norms_cuda as cuda

    launches = Launches(cuda, monkeypatch)
    x, g = (torch.empty(100_000, 2, width, 200, device="meta") for width in (5, 3))
    cuda.gram_squares(x, g)
    # Of 4 x 4 tiles, the 10 on and above the diagonal.
    assert launches.grids == [("gram_kernel", (100_000 * 2 * 10,))]

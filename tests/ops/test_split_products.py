"""Products of float32 in three of TF32: parts, accuracy, and when they are taken."""

from __future__ import annotations

import pytest
import torch
from tf32 import TF32
from torch._subclasses.fake_tensor import FakeTensorMode

from dau_fast.ops import linear_sensitivity
from dau_fast.ops._split_products import multiplied_in, product, product_into, split, split_product
from dau_fast.ops.reference import sensitivity_reference


@pytest.mark.parametrize("transposed", [False, True])
def test_parts_add_up_and_the_first_fits_tf32(transposed: bool) -> None:
    x = torch.cat([torch.randn(50, 20), torch.randn(50, 20) * 1e-30, torch.zeros(1, 20)])
    x = x.T if transposed else x
    high, low = split(x)
    assert torch.equal(high + low, x)
    assert not (high.contiguous().view(torch.int32) & 0x1FFF).any()
    assert (low.abs() <= x.abs() * 2**-10).all()


def test_the_process_multiplies_as_before_whatever_happens() -> None:
    before = torch.backends.cuda.matmul.fp32_precision
    with pytest.raises(RuntimeError):
        split_product(torch.ones(2, 3), torch.ones(2, 3))
    assert torch.backends.cuda.matmul.fp32_precision == before


@pytest.mark.parametrize("with_base", [False, True])
def test_three_products_are_as_exact_as_one_of_float32(with_base: bool) -> None:
    x, y, base = torch.randn(40, 300), torch.randn(300, 50), torch.randn(40, 50)
    with TF32() as products:
        found = split_product(x, y, base.clone(), 0.5) if with_base else split_product(x, y)
    assert products.taken == ["tf32"] * 3
    exact = x.double() @ y.double()
    exact = base.double() + 0.5 * exact if with_base else exact
    assert (found - exact).norm() / exact.norm() < 1e-6


def test_small_products_and_those_on_a_cpu_are_taken_as_they_are() -> None:
    x, y = torch.randn(8, 8), torch.randn(8, 8)
    with TF32() as products:
        assert torch.equal(product(x, y), x @ y)
        assert torch.equal(product(x, y, y[0]), torch.addmm(y[0], x, y))
        product_into(x, y, y)
    assert products.taken == ["none"] * 5
    assert torch.equal(x, y @ y)


def test_parts_are_for_large_products_of_exact_numbers() -> None:
    """By fake tensors, which say they are on CUDA."""
    with FakeTensorMode():
        x, y = torch.empty(1000, 1000, device="cuda"), torch.empty(1000, 1000, device="cuda")
        with TF32() as products:
            product(x, y)
            product(x, y, y[0])
            product_into(y, x, x)
            assert products.taken == ["tf32"] * 9
            product(x[:400], y)
            product(x.bfloat16(), y.bfloat16())
            assert products.taken[9:] == ["none"] * 2
            with multiplied_in("tf32"):
                product(x, y)
            assert products.taken[11:] == ["tf32"]


# ---- on the device that was chosen with --device


@pytest.mark.parametrize(("process", "limit"), [("ieee", 2e-6), ("tf32", 1e-2)])
def test_large_products_on_the_device(
    device: torch.device, process: str, limit: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the process's own precision or a better one, and a head of many classes with them."""
    if device.type != "cuda":
        pytest.skip("needs --device cuda")
    monkeypatch.setattr(torch.backends.cuda.matmul, "fp32_precision", process)
    x, y = torch.randn(1000, 1100, device=device), torch.randn(1100, 900, device=device)
    exact = x.double() @ y.double()
    assert (product(x, y) - exact).norm() / exact.norm() < limit
    features, weight = (0.1 * z for z in (torch.randn(256, 512), torch.randn(20_000, 512)))
    targets = torch.arange(256, device=device)
    leaves = [z.to(device).requires_grad_() for z in (features, weight)]
    found = torch.autograd.grad(linear_sensitivity(*leaves, None, targets).sum(), leaves)
    leaves = [z.double().to(device).requires_grad_() for z in (features, weight)]
    logits = leaves[0] @ leaves[1].T
    expected = torch.autograd.grad(
        sensitivity_reference(logits, leaves[0], targets, bias=False).sum(), leaves
    )
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() / other.norm() < 10 * limit

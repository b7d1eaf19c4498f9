"""Large Barlow Twins losses: products of TF32's parts, with TF32 imitated on the CPU."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from test_barlow_twins_op import defined, relative_error, value_and_gradients, views
from tf32 import TF32
from torch import Tensor

from dau_fast.ops import barlow_twins_loss
from dau_fast.ops._barlow_twins_large_cuda import choose_product, is_large
from dau_fast.ops._barlow_twins_op import backward_by, forward_by


def run(a: Tensor, b: Tensor, gram: bool, precision: str = "tf32x3") -> tuple[list[str], tuple[Tensor, ...]]:
    """The precisions of all products, and loss and gradients."""
    how = 0.1, gram, precision
    with TF32() as products:
        by = choose_product(precision, a, b)
        loss, stats, kept = forward_by(by, a, b, 0.1, 1e-5, gram, precision)
        grads = backward_by(by, torch.tensor(1.0), a, b, stats, kept, *how, True, True)
    return products.taken, (loss, *grads)


def expected_of(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    return value_and_gradients(lambda x, y: defined(x, y, 0.1), a.double(), b.double())


@pytest.mark.parametrize("gram", [True, False])
def test_three_products_of_parts_are_as_exact_as_float32(gram: bool) -> None:
    a, b = views(96, 80, torch.float32)
    taken, found = run(a, b, gram)
    assert set(taken) == {"tf32"}
    assert len(taken) == 3 * (4 if gram else 3)
    for one, other in zip(found, expected_of(a, b), strict=True):
        assert relative_error(one, other) < 3e-6


@pytest.mark.parametrize("gram", [True, False])
@pytest.mark.parametrize(("precision", "least", "most"), [("tf32", 1e-5, 1e-2), ("ieee", 0.0, 3e-6)])
def test_the_other_precisions_take_one_product(gram: bool, precision: str, least: float, most: float) -> None:
    a, b = views(96, 80, torch.float32)
    taken, found = run(a, b, gram, precision)
    assert set(taken) == {precision}
    assert len(taken) == (4 if gram else 3)
    for one, other in zip(found[1:], expected_of(a, b)[1:], strict=True):
        assert least < relative_error(one, other) < most


def test_views_in_half_precision_need_no_parts() -> None:
    a, b = (z.bfloat16() for z in views(24, 20, torch.float32))
    taken, found = run(a, b, gram=False)
    assert len(taken) == 3
    for one, other in zip(found, expected_of(a, b), strict=True):
        assert relative_error(one, other) < 8e-3


@pytest.mark.parametrize(
    ("n", "d", "gram", "expected"),
    [(1024, 1024, False, True), (256, 8192, True, False), (4096, 8192, True, True), (512, 128, False, False)],
)
def test_products_must_be_the_time(n: int, d: int, gram: bool, expected: bool) -> None:
    assert is_large(n, d, gram) == expected


@pytest.mark.parametrize(("n", "d"), [(1024, 1024), (900, 1250)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_views_on_the_device(device: torch.device, n: int, d: int, dtype: torch.dtype) -> None:
    if device.type != "cuda":
        pytest.skip("needs --device cuda")
    a, b = (z.to(device) for z in views(n, d, dtype))
    expected = value_and_gradients(defined, a.double(), b.double())
    for precision, limit in {"ieee": 1e-5, "tf32x3": 1e-5, "tf32": 8e-3}.items():
        loss = partial(barlow_twins_loss, precision=precision)
        for one, other in zip(value_and_gradients(loss, a, b), expected, strict=True):
            assert relative_error(one, other) < (limit if dtype == torch.float32 else 8e-3)
